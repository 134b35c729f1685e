"""The program anybit-serve: what it is built from, and how."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from deploy.runtime.build import build_runtime, header_folder
from plugins.tools.build import build_onnxruntime
from plugins.tools.recipe import Command, Recipe, make
from plugins.tools.toolkit import find_program

__all__ = ["SERVICE", "build_service"]

SERVICE = "anybit-serve"

_SOURCES = Path(__file__).resolve().parent.parent  # the page lies beside the service
_FLAGS = ["-std=c++17", "-O2", "-Wall", "-Wextra", "-pthread"]
_LIBRARIES = {  # a header of each
    "boost": "boost/beast.hpp",
    "nlohmann_json": "nlohmann/json.hpp",
    "cli11": "CLI/CLI.hpp",
}


def _compiler() -> Command:
    folders = {str(header_folder(*item)) for item in _LIBRARIES.items()}
    system = [
        word for folder in sorted(folders - {"/usr/include"}) for word in ("-isystem", folder)
    ]
    return [find_program("g++", "g++"), *_FLAGS, "-I.", "-Iruntime/include", *system]


def build_service(say: Callable[[str], None] | None = None) -> Path:
    """The program, compiled if needed, beside the libraries that it loads: the runtime, and the
    native kernels.

    Args:
        say: told before anything is compiled.

    Raises:
        InputError: no g++, or no headers.
        UserError: the compiler failed; the message holds its output.
    """
    build_onnxruntime(say)
    runtime = build_runtime(say)
    compiler = _compiler()
    sources = sorted(str(path.relative_to(_SOURCES)) for path in _SOURCES.glob("service/*.cpp"))
    # Beside the program, wherever the two are copied.
    link = [compiler[0], "-pthread", "-Wl,-rpath,$ORIGIN", "{}", str(runtime)]
    recipe = Recipe(
        root=_SOURCES,
        name=SERVICE,
        folders=[runtime.parent],
        compiles=dict.fromkeys(sources, compiler),
        link=link,
        include=[".", "runtime/include"],
        more=["web/index.html"],
    )
    return make(recipe, say)
