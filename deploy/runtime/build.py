"""The C++ runtime library libanybit.so: what it is built from, and how."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path

from plugins.errors import InputError
from plugins.tools.build import build_folders
from plugins.tools.recipe import Command, Recipe, make
from plugins.tools.toolkit import find_program

__all__ = ["RUNTIME_LIBRARY", "build_program", "build_runtime", "header_folder"]

RUNTIME_LIBRARY = "libanybit.so"

_SOURCES = Path(__file__).resolve().parent
_SYSTEM = (Path("/usr/local/include"), Path("/usr/include"))
# -ffp-contract=off: the odds of a draw are the same on every machine.
_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-ffp-contract=off", "-fvisibility=hidden"]
_FLAGS += ["-Wall", "-Wextra", "-pthread"]
_INCLUDE = ["include", "src", "../../plugins", "../../plugins/core/tensorrt/abi"]


def header_folder(library: str, header: str) -> Path:
    """The folder to include a header-only library from: the system's, or of the Python package
    pgm-build-deps.

    Args:
        library: as pgm-build-deps names it, such as "nlohmann_json".
        header: one of its headers, such as "nlohmann/json.hpp".

    Raises:
        InputError: it is in neither.
    """
    spec = importlib.util.find_spec("pgm_build_deps")
    wheels = list(spec.submodule_search_locations or ()) if spec else []
    for folder in (*_SYSTEM, *(Path(wheel) / library / "include" for wheel in wheels)):
        if (folder / header).is_file():
            return folder
    raise InputError(
        header,
        f"got no such header in {', '.join(map(str, _SYSTEM))} or the Python package "
        f"pgm-build-deps, expected it in one of them",
        "Install it: pip install pgm-build-deps, or the package of your system",
    )


def _recipe(
    name: str,
    sources: Sequence[str],
    flags: Sequence[str],
    link: Command,
    *more: str,
    include: Sequence[str] = (),
) -> Recipe:
    compiler = find_program("g++", "g++")
    json = header_folder("nlohmann_json", "nlohmann/json.hpp")
    system = [] if json in _SYSTEM else ["-isystem", str(json)]
    folders = [*_INCLUDE, *include]
    compiles = [compiler, *_FLAGS, *flags, *(f"-I{folder}" for folder in folders), *system]
    return Recipe(
        root=_SOURCES,
        name=name,
        folders=build_folders(),
        compiles=dict.fromkeys(sources, compiles),
        link=[compiler, *link],
        include=folders,
        more=more,
    )


def _objects(say: Callable[[str], None] | None, variant: str, flags: Sequence[str]) -> Path:
    """All of the runtime in one object file, for the library and for programs."""
    sources = sorted(str(path.relative_to(_SOURCES)) for path in (_SOURCES / "src").rglob("*.cpp"))
    sources.append("../../plugins/core/cpu/machine.cpp")  # as the kernels count cores
    name = f"anybit_runtime{variant}.o"
    if variant:
        # All as one: the headers' templates, which sanitizers make twice as long, are compiled once.
        *others, last = sources
        sources = [last]
        flags = [*flags, "-Wno-subobject-linkage"]
        flags += [word for other in others for word in ("-include", other)]
    return make(_recipe(name, sources, flags, ["-r", "-nostdlib", "{}"]), say)


def build_runtime(say: Callable[[str], None] | None = None) -> Path:
    """The runtime library, compiled if needed; needs g++ and the headers of nlohmann-json.

    Args:
        say: told before it is compiled.

    Raises:
        InputError: no g++, or no headers.
        UserError: the compiler failed; the message holds its output.
    """
    objects = str(_objects(say, "", []))
    link = ["-shared", "-pthread", "-Wl,--no-undefined", f"-Wl,-soname,{RUNTIME_LIBRARY}", "{}"]
    return make(_recipe(RUNTIME_LIBRARY, [], [], [*link, objects, "-ldl"], objects))


def build_program(
    name: str,
    sources: Sequence[Path],
    flags: Sequence[str] = (),
    *,
    include: Sequence[Path] = (),
    variant: str = "",
    shared: bool = False,
    say: Callable[[str], None] | None = None,
) -> Path:
    """A program of these sources, compiled if needed. The runtime is linked into it, so that it
    runs wherever it is copied.

    Args:
        name: of the program.
        sources: its own .cpp files.
        flags: for the compiler, such as "-isystem", "FOLDER".
        include: folders of its own headers.
        variant: of the runtime, "" or a sanitizer of g++ such as "thread".
        shared: make a shared library instead.
        say: told before it is compiled.

    Raises:
        InputError: no g++, or no headers.
        UserError: the compiler failed; the message holds its output.
    """
    # Compiles in a fifth of the time of -g -O1, and nothing that a sanitizer sees is optimized away.
    special = [f"-fsanitize={variant}", "-g1", "-O0"] if variant else []
    objects = str(_objects(say, f"_{variant}" if variant else "", special))
    own = [str(path.resolve()) for path in sources]
    kind = ["-shared"] if shared else []
    link = ["-pthread", *kind, *special, "{}", objects, "-ldl"]
    folders = [str(folder.resolve()) for folder in include]
    return make(_recipe(name, own, [*special, *flags], link, objects, include=folders), say)
