"""Text generation: the tokens against transformers' own loop, the text against the tokenizer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deploy.generate import (
    GenerateRequest,
    TextStream,
    generate_text,
    generate_tokens,
    prompt_tokens,
)
from deploy.sampling import Sampler, Sampling, SamplingOptions
from plugins.errors import InputError

PROMPT = "The river and the town"


@pytest.fixture(scope="module")
def tokenizer(artifact: Path) -> Any:
    from calibration.quant.folder import read_quant

    return read_quant(artifact / "quant").tokenizer()


class CountingSession:
    """Its best token is always one more than the last one fed."""

    max_context = 20

    def __init__(self) -> None:
        self.fed: list[list[int]] = []

    def run(
        self, input_ids: np.ndarray, reset: bool = False, last_only: bool = False
    ) -> np.ndarray:
        assert reset == (not self.fed) and last_only
        self.fed.append(input_ids[0].tolist())
        logits = np.zeros((1, 1, 100), np.float32)
        logits[0, 0, int(input_ids[0, -1]) + 1] = 1
        return logits


def test_one_prefill_then_one_step_per_token() -> None:
    session: Any = CountingSession()
    assert list(generate_tokens(session, [5, 6, 7], Sampler(Sampling()), 4)) == [8, 9, 10, 11]
    assert session.fed == [[5, 6, 7], [8], [9], [10]]


def test_generation_ends_with_the_context() -> None:
    session: Any = CountingSession()
    assert len(list(generate_tokens(session, list(range(17)), Sampler(Sampling()), 99))) == 3


def test_a_prompt_that_fills_the_context_is_refused() -> None:
    session: Any = CountingSession()
    with pytest.raises(InputError) as error:
        next(generate_tokens(session, [1] * 20, Sampler(Sampling()), 4))
    assert str(error.value) == (
        "--prompt: got 20 tokens, expected fewer than the context of 20. "
        "Give a shorter prompt, or export with a larger --max-seq."
    )


def test_greedy_tokens_are_those_of_whole_passes_without_a_cache(
    artifact: Path, tokenizer: Any
) -> None:
    import torch

    from calibration.quant.folder import read_quant
    from calibration.reference.model import quantised_model
    from exporter.run.model import open_session

    prompt = prompt_tokens(tokenizer, PROMPT, 512)
    model = quantised_model(read_quant(artifact / "quant"))
    expected = list(prompt)
    for _ in range(12):
        expected.append(int(model(torch.tensor([expected])).logits[0, -1].argmax()))
    for runner in ("torch", "onnxruntime"):
        with open_session(runner, artifact) as session:
            tokens = list(generate_tokens(session, prompt, Sampler(Sampling()), 12))
        assert tokens == expected[len(prompt) :], runner


@pytest.mark.parametrize(
    "text",
    ["Plain words, and more.", "naïve café — 水の上 🙂🙂 ok", "  two  spaces\n\nand\tlines "],
)
def test_streamed_text_is_whole_and_never_shows_half_a_character(tokenizer: Any, text: str) -> None:
    start = tokenizer("Some words 🙂 first")["input_ids"]
    stream = TextStream(tokenizer, start)
    pieces = [
        stream.feed(token) for token in tokenizer(text, add_special_tokens=False)["input_ids"]
    ]
    assert not any("\ufffd" in piece for piece in pieces)
    assert "".join(pieces) + stream.flush() == text


def test_what_is_held_back_comes_out_at_the_end(tokenizer: Any) -> None:
    stream = TextStream(tokenizer, tokenizer("x")["input_ids"])
    first_byte = tokenizer("🙂", add_special_tokens=False)["input_ids"][0]
    assert stream.feed(first_byte) == ""
    assert stream.flush() == "\ufffd"


def test_generation_stops_at_the_end_token(
    artifact: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from calibration.out.folder import StageFolder

    request = GenerateRequest(prompt=PROMPT, max_new_tokens=6, runner="onnxruntime")
    assert generate_text(artifact, request) == 6
    whole = capsys.readouterr().out
    real = StageFolder.description
    monkeypatch.setattr(
        StageFolder,
        "description",
        lambda folder: replace(real(folder), eos_token_ids=tuple(range(512))),
    )
    assert generate_text(artifact, request) == 0
    assert capsys.readouterr().out == f"{PROMPT}\n"
    assert whole.startswith(PROMPT) and len(whole) > len(PROMPT) + 1


def test_streaming_prints_the_same(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = []
    for stream in (False, True):
        request = GenerateRequest(
            prompt=PROMPT,
            max_new_tokens=8,
            runner="onnxruntime",
            sampling=SamplingOptions(temperature=0.8, top_k=20, seed=3),
            stream=stream,
        )
        generate_text(artifact, request)
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1]


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        (
            "",
            '--prompt: got an empty text, expected at least one word. Give some: --prompt "Once '
            'upon a time".',
        ),
        (
            "a\udcff",
            "--prompt: got bytes that are not UTF-8, expected text. Check the terminal's encoding.",
        ),
    ],
)
def test_bad_prompts(prompt: str, text: str) -> None:
    with pytest.raises(InputError) as error:
        prompt_tokens(object(), prompt, 512)
    assert str(error.value) == text


@pytest.mark.parametrize(("asked", "said"), [(249, True), (248, False), (3, False)])
def test_a_full_context_is_said(
    artifact: Path, tokenizer: Any, capsys: pytest.CaptureFixture[str], asked: int, said: bool
) -> None:
    prompt = tokenizer.decode(tokenizer("The river and the town " * 40)["input_ids"][:8])
    room = 256 - len(prompt_tokens(tokenizer, prompt, 512))
    request = GenerateRequest(
        prompt=prompt, max_new_tokens=room + asked - 248, runner="onnxruntime"
    )
    made = generate_text(artifact, request)
    err = capsys.readouterr().err
    message = "The context of 256 tokens is full, so the text ends here: give a shorter prompt.\n"
    assert err.endswith(message) == said
    assert made == min(room, request.max_new_tokens)
