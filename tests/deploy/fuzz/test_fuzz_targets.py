"""Inputs that anybody may have made, changed at random: an error with a reason, and never a crash, a
finding of the sanitizers of memory and undefined behavior, or anything else.

The rounds are few and the same in every run. docs/runtime.md says how libFuzzer runs the same targets;
what it found is kept in corpus/.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from deploy.runtime.build import build_program, header_folder
from exporter.chat import chat_data
from tests.conftest import REPOSITORY
from tests.deploy.runtime.test_hostile_tokens import small
from tests.deploy.runtime.token_cases import STYLES
from tests.exporter.chat_cases import SAID, tokenizer

HERE = Path(__file__).parent
ROUNDS = {
    "body": 1500,
    "chat_template": 1500,
    "folder": 1500,
    "http": 1500,
    "messages": 1500,
    "tokenizer": 1500,
}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def program() -> Path:
    """The targets and what they try, in one program."""
    service = REPOSITORY / "deploy" / "service"
    sources = [service / f"{name}.cpp" for name in ("api", "http", "json", "log")]
    boost = header_folder("boost", "boost/beast.hpp")
    return build_program(
        "anybit-fuzz",
        [*sorted(HERE.glob("*.cpp")), *sources],
        ["-isystem", str(boost), "-fno-sanitize-recover=undefined"],
        include=[HERE, service.parent],
        variant="address,undefined",
    )


def made(target: str, folder: Path) -> list[Path]:
    """What is too large to keep: tokenizers and templates of each style."""
    files = {
        "tokenizer": {style: small(style) for style in STYLES},
        "chat_template": {name: chat_data(tokenizer(template)) for name, template in SAID.items()},
    }[target]
    for name, value in files.items():
        (folder / name).write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
    return [folder / name for name in files]


@pytest.mark.parametrize("target", ROUNDS)
def test_changed_inputs(program: Path, tmp_path: Path, target: str) -> None:
    files = sorted((HERE / "corpus" / target).iterdir())
    good = sum(path.name.startswith("good") for path in files)
    if target in ("tokenizer", "chat_template"):
        more = made(target, tmp_path)
        files += more
        good += len(more)
    done = subprocess.run(
        [program, target, str(ROUNDS[target]), *files],
        env={"UBSAN_OPTIONS": "print_stacktrace=1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    accepted = json.loads(done.stdout)
    assert good <= accepted["seeds"] <= len(files)
    assert 0 < accepted["changed"] < ROUNDS[target]
