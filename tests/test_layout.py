"""The shape of the source: what each file is for, which way imports point, commands that start
without loading anything heavy, nothing of any one machine.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatch
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
# Each may import itself and what stands before it.
ORDER = ("plugins", "calibration", "exporter", "deploy")


@cache
def source_files() -> tuple[Path, ...]:
    """Every file that git tracks; where there is no git, every file that .gitignore leaves."""
    if (REPOSITORY / ".git").exists():
        listed = subprocess.run(
            ["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, text=True, check=True
        ).stdout.split("\0")
        return tuple(path for name in listed if name and (path := REPOSITORY / name).is_file())
    return tuple(not_ignored(REPOSITORY))


def not_ignored(folder: Path) -> Iterator[Path]:
    """Files below a folder that its .gitignore does not name; knows the patterns that ours uses:
    a name, a name with a star, a folder, and a folder at the top.
    """
    lines = (folder / ".gitignore").read_text(encoding="utf-8").split()
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        ignored = any(
            fnmatch(part, pattern.strip("/"))
            and (not pattern.startswith("/") or depth == 0)
            and (not pattern.endswith("/") or depth < len(parts) - 1)
            for pattern in lines
            for depth, part in enumerate(parts)
        )
        if path.is_file() and not ignored and parts[0] != ".git":
            yield path


def short(path: Path) -> str:
    return str(path.relative_to(REPOSITORY))


def modules(folder: Path, files: Iterable[Path], packages: Iterable[str]) -> dict[str, Path]:
    """The packages' Python files by the name that an import uses."""
    found = {}
    for path in files:
        parts = path.relative_to(folder).with_suffix("").parts
        if path.suffix == ".py" and parts[0] in packages:
            found[".".join(parts).removesuffix(".__init__")] = path
    return found


def imports(path: Path, known: Mapping[str, Path]) -> set[str]:
    """What a file imports: anywhere, so inside a function and for a type checker too. A known
    module by its own name; anything else as it is written.
    """
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found.add(whole if whole in known else str(node.module))
    return found


def circle(graph: Mapping[str, set[str]]) -> list[str]:
    """Modules that import each other in a ring, the first one again at the end; empty: none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def ours() -> dict[str, Path]:
    return modules(REPOSITORY, source_files(), ORDER)


def test_there_is_something_to_look_at() -> None:
    assert {"plugins", "exporter.__main__", "calibration.quant.scheme"} <= set(ours())
    assert Path(__file__) in source_files()


@pytest.mark.parametrize("package", ORDER)
def test_imports_point_one_way(package: str) -> None:
    known = ours()
    later = {*ORDER[ORDER.index(package) + 1 :], "tests", "benchmarks"}
    wrong = {
        name: upward
        for name, path in known.items()
        if name.split(".")[0] == package
        and (upward := sorted(one for one in imports(path, known) if one.split(".")[0] in later))
    }
    assert not wrong


def test_no_modules_import_each_other() -> None:
    """A circle that an import inside a function hides is a circle all the same."""
    known = ours()
    graph = {name: imports(path, known) & set(known) for name, path in known.items()}
    assert sum(map(len, graph.values())) > len(graph)
    assert circle(graph) == []


def test_a_circle_and_an_upward_import_are_found(tmp_path: Path) -> None:
    (tmp_path / "low").mkdir()
    texts = {
        "low/__init__.py": "",
        "low/one.py": "import os\nfrom low import two\n",
        "low/two.py": "def late():\n    from low.three import name\n",
        "low/three.py": "if TYPE_CHECKING:\n    import low.one\nfrom high.top import x\n",
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    known = modules(tmp_path, map(tmp_path.joinpath, texts), ["low"])
    assert imports(known["low.three"], known) == {"low.one", "high.top"}
    graph = {name: imports(path, known) & set(known) for name, path in known.items()}
    assert set(circle(graph)) == {"low.one", "low.two", "low.three"}
    del graph["low.three"]
    assert circle(graph) == []


def test_without_git_what_gitignore_names_is_left_out(tmp_path: Path) -> None:
    (tmp_path / ".gitignore").write_text("/out/\nbuild/\n*.pyc\n.ci/run\n")
    kept = ("a/out/kept.py", "a/one.py", ".ci/more", "build.py")
    for name in (*kept, "out/x.py", "a/build/x.py", "a/one.pyc", ".git/config"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = {str(path.relative_to(tmp_path)) for path in not_ignored(tmp_path)}
    assert found == {".gitignore", *kept}


def test_every_folder_of_modules_is_a_package() -> None:
    """A folder without __init__.py is missing in the wheel, and one that .gitignore names by
    accident in every clone.
    """
    known = ours()
    assert not {name.rpartition(".")[0] for name in known if "." in name} - set(known)
    named = {one for path in known.values() for one in imports(path, known)}
    assert not {one for one in named if one.split(".")[0] in ORDER} - set(known)


def test_every_module_says_what_it_is_for() -> None:
    silent = [
        short(path)
        for path in source_files()
        if path.suffix == ".py"
        and not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert not silent


def test_nothing_of_one_machine_and_nothing_unfinished() -> None:
    pattern = re.compile(
        r"/work/|/tmp/w\b|/root/|/home/\w|index-url|\bPIP_INDEX|trusted-host|\bartifactory|\bdevpi\b|\bnexus\b"
        r"|\bTODO\b(?!-gpu)|\bFIXME\b|raise NotImplementedError",
        re.IGNORECASE,
    )
    found = [
        f"{short(path)}: {match.group()}"
        for path in source_files()
        if path != Path(__file__) and path.name != "LICENSE"
        for match in pattern.finditer(path.read_text(encoding="utf-8", errors="replace"))
    ]
    assert not found


@pytest.mark.parametrize("package", ORDER)
def test_help_imports_nothing_heavy(package: str) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", package, "--help"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    loaded = {
        line.split("|")[-1].strip().split(".")[0]
        for line in done.stderr.splitlines()
        if line.startswith("import time:")
    }
    assert "argparse" in loaded
    assert not loaded & {
        "torch",
        "transformers",
        "onnx",
        "onnxruntime",
        "polygraphy",
        "numpy",
        "tensorrt",
        "tensorrt_rtx",
        "rich",
    }
