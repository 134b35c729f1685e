"""Text generation: the tokens against transformers' own loop, the text against the tokenizer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deploy.evaluate import evaluate
from deploy.generate import (
    GenerateRequest,
    TextStream,
    generate_text,
    generate_tokens,
    prompt_tokens,
)
from deploy.sampling import Sampler, Sampling, SamplingOptions
from exporter.proof.perplexity import EvalRequest
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


# ---------------------------------------------------------------- what the checkpoint says


def _tokens(out: Path, runner: str, count: int) -> list[int]:
    from exporter.run.model import find_model

    model = find_model(out, runner)
    prompt = prompt_tokens(model.tokenizer(), PROMPT, 512)
    with model.open() as session:
        return list(generate_tokens(session, prompt, Sampler(Sampling()), count))


@pytest.mark.parametrize("runner", ["torch", "onnxruntime"])
def test_an_end_token_of_generation_config_alone_ends_the_text(
    artifact: Path,
    export: Callable[..., Path],
    tiny_model_dir: Path,
    tmp_path: Path,
    runner: str,
) -> None:
    """As in transformers, whose generate reads no other file for it."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))
    ids = torch.tensor([prompt_tokens(AutoTokenizer.from_pretrained(model), PROMPT, 512)])

    def theirs() -> list[int]:
        real = AutoModelForCausalLM.from_pretrained(model)
        made = real.generate(ids, max_new_tokens=12, do_sample=False)
        return [int(token) for token in made[0, ids.shape[1] :]]

    def first(tokens: list[int]) -> int:
        return next(place for place, token in enumerate(tokens) if token in ends)

    whole, ours = theirs(), _tokens(artifact, runner, 12)
    ends = {next(token for token in text[4:] if token not in text[:4]) for text in (whole, ours)}
    assert len(whole) == len(ours) == 12 and first(whole) >= 4
    _write_generation(model, eos_token_id=[*ends, 0])
    assert theirs() == whole[: first(whole) + 1]  # the end token itself is one of them
    request = GenerateRequest(prompt=PROMPT, max_new_tokens=12, runner=runner)
    assert generate_text(artifact, request) == 12
    assert generate_text(export(model, tmp_path / "out"), request) == first(ours)


def test_how_the_makers_want_tokens_to_be_chosen(
    export: Callable[..., Path],
    tiny_model_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))
    _write_generation(model, do_sample=True, temperature=1.5, repetition_penalty=1.2)
    out = export(model, tmp_path / "out")

    def text(**options: Any) -> tuple[str, str]:
        request = GenerateRequest(
            prompt=PROMPT,
            max_new_tokens=12,
            runner="onnxruntime",
            sampling=SamplingOptions(**options),
        )
        generate_text(out, request)
        captured = capsys.readouterr()
        return captured.out, captured.err[: -len(captured.err.splitlines(keepends=True)[-1])]

    said = "Of the model's generation_config.json: {}. Options change it{}.\n"
    greedy = "; --temperature 0 takes the best token"
    note = said.format("temperature 1.5, top k 50, repetition penalty 1.2", greedy)
    own = {"temperature": 1.5, "top_k": 50, "top_p": 1.0, "repetition_penalty": 1.2}
    assert text(**own) == (text()[0], "") and text()[1] == note
    assert text(seed=1)[0] != text()[0]
    few = text(top_k=5)
    assert few == (
        text(**own | {"top_k": 5})[0],
        said.format("temperature 1.5, repetition penalty 1.2", greedy),
    )
    assert text(top_p=0.5)[1] == note and few[0] != text()[0] != text(top_p=0.5)[0]
    assert text(temperature=0.0)[1] == said.format("repetition penalty 1.2", "")
    best = text(temperature=0.0, repetition_penalty=1.0)
    assert best[0] != text()[0] and not best[1]


def test_a_prompt_with_a_token_that_the_model_does_not_know(
    export: Callable[..., Path], tiny_model_dir: Path, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    model = Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens([f"<|{index}|>" for index in range(513 - len(tokenizer))])
    tokenizer.save_pretrained(model)
    token = tokenizer.convert_ids_to_tokens(512)
    out = export(model, tmp_path / "out")
    with pytest.raises(InputError) as error:
        generate_text(out, GenerateRequest(prompt=f"The {token}", runner="onnxruntime"))
    assert (error.value.exit_code, str(error.value)) == (
        2,
        f"--prompt: got the token {token!r} with id 512, expected ids below the model's vocab_size "
        "of 512. Leave it out of the text, or give a model whose embedding has a row for it.",
    )
    text = tmp_path / "text.txt"
    text.write_text(f"The river {token}")
    for request in (EvalRequest(text, seqlen=2), EvalRequest(text, seqlen=2, runner="torch")):
        with pytest.raises(InputError) as error:
            evaluate(out, request)
        assert str(error.value).startswith(f"--text: got the token {token!r} with id 512, ")


def _write_generation(model: Path, **fields: Any) -> None:
    (model / "generation_config.json").write_text(json.dumps(fields))
