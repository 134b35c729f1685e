"""The C interface from a program in C, which is all that other languages see."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import deploy.runtime
from deploy.runtime.build import build_runtime

HERE = Path(__file__).parent
INCLUDE = Path(deploy.runtime.__file__).parent / "include"


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    library = build_runtime()
    made = tmp_path_factory.mktemp("c") / "c_api"
    strict = ["-std=c99", "-pedantic", "-Wall", "-Wextra", "-Werror"]
    links = [str(library), f"-Wl,-rpath,{library.parent}"]
    command = ["gcc", *strict, f"-I{INCLUDE}", str(HERE / "c_api.c"), *links, "-o", str(made)]
    subprocess.run(command, check=True)
    return made


def test_every_function(
    program: Path,
    model: Path,
    libraries: dict[str, str],
    driver: Callable[..., dict[str, Any]],
) -> None:
    found = subprocess.run(
        [program, model, libraries["onnxruntime"], libraries["kernels"]],
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stdout
    said = dict(line.split(": ", 1) for line in found.stdout.splitlines())
    asked = {"text": "The river and the town", "max_new_tokens": 12, "ignore_end": True}
    ((answer,),) = driver(model, [[asked]])["rounds"]
    card = json.loads(said.pop("card"))
    assert card["family"] == "llama"
    assert (card["slots"], card["threads"]) == (4, 1)
    stats = json.loads(said.pop("stats"))
    assert (stats["full"], stats["completion_tokens"], stats["slots"]) == (1, 12, 4)
    size = said.pop("wrong size")
    assert size.startswith("size: got 3, expected ")
    assert size.endswith(". Set the structure up with its init function.")
    assert said == {
        "no folder": "/no/such/folder: got no such folder, expected an artifact folder. Make one "
        "with: python -m exporter MODEL --wbits W --abits A --out DIR.",
        "older options": 'backend: got "tpu", expected auto, tensorrt or onnxruntime. Choose one of these.',
        "encoded": str(answer["prompt_tokens"]),
        "decoded": said["decoded"],
        "no engine": "engine: got null, expected one. Pass what was opened.",
        "chat": "refused",
        "finish": f"1 {answer['prompt_tokens']} 12 12",
        "text": "".join(answer["texts"]) + answer["text"],
        "no prompt": "prompt: got no tokens, expected at least one. Give some text.",
        "wrong bias": "logit_bias: got 100000, expected a token of 0 to 511. Give ids of the "
        "model's own tokens.",
        "written": "0",
        "size": "1 0",
        "no list": "bias_tokens: got null for 1 of them, expected a list. Pass a list of that many, "
        "or 0.",
        "no roles": "roles: got null for 1 of them, expected a list. Pass a list of that many, or 0.",
        "cancelled": "1",
        "after the engine": "0",
        "version": "1",
    }
    assert "The river and the town".startswith(said["decoded"])
