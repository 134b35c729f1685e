"""The shape of the source: what each file is for, which way imports point, commands that start
without loading anything heavy, nothing of any one machine.
"""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.tracked import REPOSITORY, listed, may_be_tracked, tracked_files

# Each may import itself and what stands before it.
ORDER = ("plugins", "calibration", "exporter", "deploy")


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
    return modules(REPOSITORY, tracked_files(), ORDER)


def test_there_is_something_to_look_at() -> None:
    assert {"plugins", "exporter.__main__", "calibration.quant.scheme"} <= set(ours())
    assert Path(__file__) in tracked_files()


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


@pytest.mark.slow
def test_what_lies_beside_the_project_is_not_looked_at(tmp_path: Path) -> None:
    """A user's folders, an OUT, a checkpoint and notes in the clone change no check."""
    clone = tmp_path / "clone"
    for path in tracked_files():
        copy = clone / path.relative_to(REPOSITORY)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    cache = REPOSITORY / ".mypy_cache"  # of our own files, which are the same there
    if cache.is_dir():
        shutil.copytree(cache, clone / cache.name)
    for command in (["init", "-q"], ["add", "-A"]):
        subprocess.run(["git", *command], cwd=clone, check=True)
    for name, text in {
        "mine/own.py": "import os, deploy\nx  =  1 # TODO at /home/me\n",
        "mine/half.py": "def broken(:\n",
        "model/config.json": "{}",
        "quantised/onnx/model.onnx": "",
        "notes.md": "[gone](nowhere.md)\n```sh\nmake nothing\n```\n",
        "docs/mine.md": "[gone](nowhere.md)\n",
    }.items():
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        (clone / name).write_text(text)
    makefile = (clone / "Makefile").read_text(encoding="utf-8")
    folders = re.search(r"^FOLDERS *:= (.*)$", makefile, re.MULTILINE)
    assert folders
    checks = [
        words.replace("$(FOLDERS)", folders[1]).split()
        for words in re.findall(
            r"^\t\$\(PY\) -m (ruff (?:check|format --check) \$\(FOLDERS\)|mypy)$",
            makefile,
            re.MULTILINE,
        )
    ]
    assert [check[0] for check in checks] == ["ruff", "ruff", "mypy"]
    for check in (
        *checks,
        ["pytest", "-q", "-n0", "tests/test_layout.py", "tests/test_readme.py", "-m", "not slow"],
    ):
        done = subprocess.run(
            [sys.executable, "-m", *check], cwd=clone, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr


def test_without_git_the_reason_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.tracked.REPOSITORY", tmp_path)
    monkeypatch.setattr("tests.tracked.listed", listed.__wrapped__)
    with pytest.raises(pytest.skip.Exception, match=r"git cannot say: no \.git in the folder"):
        tracked_files()
    (tmp_path / ".git").mkdir()
    with pytest.raises(pytest.skip.Exception, match="git cannot say: fatal: not a git repository"):
        tracked_files()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(pytest.skip.Exception, match="git: No such file or directory"):
        tracked_files()
    assert may_be_tracked(tmp_path / "any")


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
        for path in tracked_files()
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
        for path in tracked_files()
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
