"""The test programs of the C++ runtime, compiled once."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnxruntime
import pytest

from deploy.runtime.build import build_program, header_folder
from plugins.tools.build import build_onnxruntime
from tests.deploy.runtime.token_cases import Answers

HERE = Path(__file__).parent


@pytest.fixture(scope="session", params=["concat", "static"])
def model(
    request: pytest.FixtureRequest,
    artifact: Path,
    tiny_model_dir: Path,
    export: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """OUT of a tiny model, of each form that its cache can have. Do not change it."""
    if request.param == "concat":
        return artifact
    out = tmp_path_factory.mktemp("static") / "out"
    return export(tiny_model_dir, out, max_seq=128, static_cache=True)


@pytest.fixture(scope="session")
def compiled() -> Callable[..., Path]:
    """compiled("driver", variant="") -> a program of one of the sources here, or a library."""

    def build(source: str, variant: str = "", shared: bool = False) -> Path:
        doctest = header_folder("doctest", "doctest/doctest.h")
        name = "-".join(filter(None, ("anybit-test", Path(source).name, variant)))
        flags = ["-isystem", str(doctest), "-O0"]
        sources = [HERE / f"{source}.cpp"]
        return build_program(name, sources, flags, variant=variant, shared=shared)

    return build


@pytest.fixture(scope="session")
def libraries() -> dict[str, str]:
    """Where ONNX Runtime and the native kernels are, as options of Model::load."""
    (library,) = (Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so.*")
    return {"onnxruntime": str(library), "kernels": str(build_onnxruntime())}


@pytest.fixture(scope="session")
def driver(
    compiled: Callable[..., Path], libraries: dict[str, str]
) -> Callable[..., dict[str, Any]]:
    """run(folder, rounds, load={}, **task) -> what driver.cpp prints; `fails` gives its error
    instead.
    """

    def run(
        folder: Path,
        rounds: list[list[dict[str, Any]]],
        load: dict[str, Any] | None = None,
        fails: bool = False,
        program: Path | None = None,
        **task: Any,
    ) -> Any:
        options = {**libraries, "threads": 1, **(load or {})}
        task |= {"folder": str(folder), "rounds": rounds, "load": options}
        found = subprocess.run(
            [program or compiled("driver")],
            input=json.dumps(task),
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert found.returncode == (2 if fails else 0), found.stderr
        return found.stderr.strip() if fails else json.loads(found.stdout)

    return run


@pytest.fixture(scope="module")
def answers(compiled: Callable[..., Path]) -> Iterator[Answers]:
    """The C++ tokenizer and chat templates as a process."""
    process = Answers(compiled("tokens"))
    yield process
    process.close()
