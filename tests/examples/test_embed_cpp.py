"""The C++ example: it runs on a fake TensorRT, and compiles against the official headers where an
SDK is at hand.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[2] / "examples" / "02_embed_cpp" / "main.cpp"


def test_it_compiles_without_a_warning() -> None:
    root = os.environ.get("TENSORRT_ROOT")
    if not root:
        pytest.skip("no TensorRT SDK: TENSORRT_ROOT is not set")
    from plugins.tools.build import find_cuda_include

    done = subprocess.run(
        [
            "g++",
            "-std=c++17",
            "-Wall",
            "-Wextra",
            "-Werror",
            "-fsyntax-only",
            "-isystem",
            f"{root}/include",
            "-isystem",
            str(find_cuda_include()),
            str(SOURCE),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def embed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example, with tests/examples/fake_tensorrt in TensorRT's place."""
    program = tmp_path_factory.mktemp("embed") / "embed"
    fake = str(Path(__file__).parent / "fake_tensorrt")
    command = ["g++", "-std=c++17", "-Wall", "-Wextra", "-Werror", "-isystem", fake, str(SOURCE)]
    subprocess.run([*command, "-o", str(program)], check=True)
    return program


def _run(
    embed: Path, out: Path, allowed: int, new: int, *prompt: int, **record: object
) -> tuple[int, str, str]:
    """Of an engine whose tables end at 8 tokens and whose profiles at `allowed`."""
    folder = out / "engine"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.engine").write_text(f"8 {allowed}")
    text = json.dumps({"edition": "tensorrt-rtx", "max_context": 8} | record, indent=2)
    (folder / "engine.json").write_text(text)
    words = [str(embed), str(out), str(new), *map(str, prompt)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, done.stderr


FULL = "The context of {} tokens is full.\n"


@pytest.mark.parametrize(
    ("allowed", "new", "made", "said"),
    [
        (64, 4, "4 5 6 7 \n", ""),
        (64, 6, "4 5 6 7 8 9 \n", ""),  # the last of them is never fed
        (64, 7, "4 5 6 7 8 9 \n", FULL.format(8)),
        (6, 99, "4 5 6 7 \n", FULL.format(6)),
    ],
)
def test_it_ends_with_the_context(
    embed: Path, tmp_path: Path, allowed: int, new: int, made: str, said: str
) -> None:
    """Of the model or of the profiles, whichever is shorter."""
    assert _run(embed, tmp_path, allowed, new, 1, 2, 3) == (0, made, said)


def test_a_prompt_longer_than_the_context(embed: Path, tmp_path: Path) -> None:
    assert _run(embed, tmp_path, 64, 4, *range(9)) == (
        2,
        "",
        "TOKEN_ID: got 9 tokens, expected at most 8. Give fewer, or export with a larger "
        "--max-seq.\n",
    )


def test_a_record_without_the_context(embed: Path, tmp_path: Path) -> None:
    assert _run(embed, tmp_path, 64, 4, 1, max_context=None) == (
        2,
        "",
        f"{tmp_path}/engine/engine.json: got no max_context, expected an engine built by this version. Build "
        "the engine again.\n",
    )
