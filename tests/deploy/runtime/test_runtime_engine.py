"""Requests on an exported model: the tokens of python -m deploy generate, alone and in a crowd."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from calibration.progress import NullProgress
from calibration.quant.bits import SchemeMap
from calibration.quant.scheme import QuantScheme
from deploy.generate import generate_tokens
from deploy.sampling import Sampler, Sampling
from exporter.pipeline import ExportRequest, run_pipeline
from exporter.run.model import open_session

NEW = 12


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    random = np.random.default_rng(0)
    return [random.integers(1, 500, random.integers(1, 60)).tolist() for _ in range(32)]


@pytest.fixture(scope="module")
def expected(model: Path, prompts: list[list[int]]) -> list[list[int]]:
    """What python -m deploy generate --runner native takes for best."""
    with open_session("native", model) as session:
        return [
            list(generate_tokens(session, prompt, Sampler(Sampling()), NEW)) for prompt in prompts
        ]


def requests(prompts: list[list[int]], **options: Any) -> list[dict[str, Any]]:
    return [
        {"tokens": prompt, "max_new_tokens": NEW, "ignore_end": True, **options}
        for prompt in prompts
    ]


def test_scheduling(compiled: Callable[..., Path]) -> None:
    """Who joins and leaves, what calls hold, and what failed ones do: see engine_cases.cpp."""
    found = subprocess.run(
        [compiled("engine_cases")], capture_output=True, text=True, timeout=300, check=False
    )
    assert found.returncode == 0, found.stdout


def test_greedy_tokens_are_those_of_deploy_generate(
    model: Path,
    driver: Callable[..., dict[str, Any]],
    prompts: list[list[int]],
    expected: list[list[int]],
) -> None:
    """A round of 32 at once in 8 slots, in which slots are used again; then each of them alone."""
    alone = [[request] for request in requests(prompts)]
    found = driver(model, [requests(prompts), *alone], {"slots": 8})
    assert [answer["tokens"] for answer in found["rounds"][0]] == expected
    assert [answer["tokens"] for (answer,) in found["rounds"][1:]] == expected
    assert found["stats"]["full"] == 64


@pytest.mark.parametrize("static", [False, True], ids=["concat", "static"])
def test_bfloat16(
    static: bool,
    tiny_model_dir: Path,
    tmp_path: Path,
    driver: Callable[..., dict[str, Any]],
    prompts: list[list[int]],
) -> None:
    """The file as it is gives the tokens of the file in which Python puts every rounding in its place."""
    schemes = SchemeMap(QuantScheme("ABQGemm", "rtn", 8, 8, dtype="bfloat16"), head_bits=8)
    request = ExportRequest(
        model=str(tiny_model_dir),
        schemes=schemes,
        out=tmp_path / "out",
        until="onnx",
        offline=True,
        max_seq=128,
        static_cache=static,
    )
    run_pipeline(request, NullProgress())
    with open_session("native", request.out) as session:
        expected = [
            list(generate_tokens(session, prompt, Sampler(Sampling()), NEW))
            for prompt in prompts[:8]
        ]
    found = driver(request.out, [requests(prompts[:8]), requests(prompts[:8])], {"chunk": 16})
    for answers in found["rounds"]:
        assert [answer["tokens"] for answer in answers] == expected


@pytest.fixture(scope="module", params=["concat", "static"])
def exact(
    request: pytest.FixtureRequest,
    tiny_llama: Callable[..., Path],
    export: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """OUT of a model in which nothing rounds away a last bit, with 3 query heads per key-value head."""
    model = tiny_llama(hidden_size=96, num_attention_heads=6)
    scheme = QuantScheme("ABQGemm", "rtn", 8, 16, dtype="float32")
    out = tmp_path_factory.mktemp("exact") / "out"
    return export(model, out, scheme, max_seq=128, static_cache=request.param == "static")


def odds(rounds: list[list[dict[str, Any]]]) -> list[tuple[list[int], list[float]]]:
    """Tokens and their log-odds of all answers."""
    return [(answer["tokens"], answer["logprobs"]) for answers in rounds for answer in answers]


def test_a_cached_beginning_changes_no_token(
    exact: Path, driver: Callable[..., dict[str, Any]], prompts: list[list[int]]
) -> None:
    """The same again, further into the answer, and with an end of its own; odds too, to the bit."""
    prompt = max(prompts, key=len)

    def ask(*prompts: list[int]) -> list[list[dict[str, Any]]]:
        rounds = [requests([each], logprobs=1) for each in prompts]
        return list(driver(exact, rounds)["rounds"])

    ((tokens, numbers),) = odds(ask(prompt))
    found = ask(prompt, prompt, prompt + tokens[:5], prompt[:30])
    cached = [answers[0]["cached_tokens"] for answers in found]
    assert cached == [0, len(prompt) - 1, len(prompt) + 4, 29]
    same, again, further, short = odds(found)
    assert same == again == (tokens, numbers)
    assert further[0][: NEW - 5] == tokens[5:]
    assert further[1][: NEW - 5] == numbers[5:]
    assert [short] == odds(ask(prompt[:30]))


def test_chunks_change_no_token(
    exact: Path, driver: Callable[..., dict[str, Any]], prompts: list[list[int]]
) -> None:
    """Nor does who shares the slots; odds too, to the bit."""
    asked = requests(prompts[:8], logprobs=1)
    whole = odds(driver(exact, [[request] for request in asked])["rounds"])
    for chunk in (1, 7):
        found = driver(exact, [asked], {"slots": 3, "chunk": chunk})["rounds"]
        assert odds(found) == whole


def test_a_seed_gives_the_same_tokens_whatever_else_runs(
    model: Path, driver: Callable[..., dict[str, Any]], prompts: list[list[int]]
) -> None:
    drawn = [
        {**request, "temperature": 1.5, "top_p": 0.95, "seed": seed}
        for seed, request in enumerate(requests(prompts[:6]))
    ]
    found = driver(model, [drawn, *([request] for request in drawn)], {"slots": 6})
    crowd = [answer["tokens"] for answer in found["rounds"][0]]
    assert crowd == [answer["tokens"] for (answer,) in found["rounds"][1:]]
    other = driver(model, [[{**drawn[0], "seed": 99}]])["rounds"][0][0]
    assert other["tokens"] != crowd[0]


def test_text_is_what_the_tokenizer_gives(
    artifact: Path, driver: Callable[..., dict[str, Any]]
) -> None:
    from calibration.quant.folder import read_quant

    tokenizer = read_quant(artifact / "quant").tokenizer()
    text = "The river and the town"
    tokens = tokenizer(text)["input_ids"]
    asked = {"max_new_tokens": NEW, "ignore_end": True}
    ((by_text, by_tokens),) = driver(
        artifact, [[{"text": text, **asked}, {"tokens": tokens, **asked}]]
    )["rounds"]
    assert by_text["prompt_tokens"] == len(tokens)
    assert by_text["tokens"] == by_tokens["tokens"]
    whole = tokenizer.decode(by_text["tokens"], skip_special_tokens=True)
    assert "".join(by_text["texts"]) + by_text["text"] == whole
    stop = whole[5:8]
    ((stopped,),) = driver(artifact, [[{"text": text, **asked, "stop": [stop]}]])["rounds"]
    assert "".join(stopped["texts"]) + stopped["text"] == whole[: whole.index(stop)]
    assert (stopped["reason"], stopped["detail"]) == ("stop", stop)


def test_cancelled_requests_leave_the_others_alone(
    model: Path,
    driver: Callable[..., dict[str, Any]],
    prompts: list[list[int]],
    expected: list[list[int]],
) -> None:
    asked = requests(prompts[:9])
    for request in asked[::3]:
        request["cancel_after"] = 2
    (found,) = driver(model, [asked], {"slots": 4})["rounds"]
    for i, answer in enumerate(found):
        gone = i % 3 == 0
        assert answer["reason"] == ("cancelled" if gone else "length")
        assert answer["tokens"] == expected[i][: 2 if gone else NEW]


def test_card(artifact: Path, driver: Callable[..., dict[str, Any]]) -> None:
    """2 layers of 2 heads of 16 numbers in 2 bytes, keys and values, for 256 tokens."""
    card = driver(artifact, [], {"slots": 3, "verify": True})["card"]
    assert card["family"] == "llama"
    assert card["scheme"] == "w8a8"
    assert card["max_context"] == 256
    assert card["vocab"] == 512
    assert card["cache_form"] == "concat"
    assert card["proof"] == "unknown"
    assert card["verified"]
    assert card["backend"].startswith("ONNX Runtime 1.")
    assert card["backend"].endswith(", native kernels")
    token = 2 * 2 * 2 * 16 * 2
    assert card["cache"] == 3 * 256 * token
    assert card["second_cache"] == 256 * token
    assert card["logits"] == 512 * 4
    assert driver(artifact, [], {"capacity": 100})["card"]["max_context"] == 100


def test_card_of_a_static_cache(
    model: Path, artifact: Path, driver: Callable[..., dict[str, Any]]
) -> None:
    """There is no copy, and a call may compute all slots."""
    if model == artifact:
        pytest.skip("its cache grows")
    card = driver(model, [], {"slots": 3})["card"]
    assert card["cache_form"] == "static"
    assert card["max_context"] == 128
    assert card["cache"] == 3 * 128 * 2 * 2 * 2 * 16 * 2
    assert card["second_cache"] == 0
    assert card["logits"] == 3 * 512 * 4


def test_a_static_cache_is_full_to_the_last_token(
    model: Path, driver: Callable[..., dict[str, Any]]
) -> None:
    """Beside slots that are full too, and are computed along."""
    asked = [{"tokens": [5 + i] * 100, "max_new_tokens": 999, "ignore_end": True} for i in range(5)]
    found = driver(model, [asked, asked[:1], asked[2:3]], {"slots": 5, "capacity": 128})
    for answers in found["rounds"]:
        for answer in answers:
            assert answer["completion_tokens"] == 28
    first, alone, third = found["rounds"]
    assert alone[0]["tokens"] == first[0]["tokens"]
    assert third[0]["tokens"] == first[2]["tokens"]


def test_bodies_run_where_kernels_are_none(
    artifact: Path, driver: Callable[..., dict[str, Any]], prompts: list[list[int]]
) -> None:
    """First tokens, against ONNX Runtime on the file as it is."""
    from exporter.run.onnxruntime import inference_session

    folder = artifact / "onnx"
    session = inference_session(str(folder / "model.onnx"), folder, None)
    empty = {
        value.name: np.zeros((1, value.shape[1], 0, value.shape[3]), np.float16)
        for value in session.get_inputs()
        if value.name.startswith("past")
    }
    best = []
    for prompt in prompts[:8]:
        count = len(prompt)
        feeds = {
            "input_ids": np.array([prompt]),
            "attention_mask": np.ones((1, count), np.int64),
            "position_ids": np.arange(count)[None],
            "logits_indices": np.array([[count - 1]]),
            **empty,
        }
        best.append([int(session.run(["logits"], feeds)[0].argmax())])
    asked = requests(prompts[:8], max_new_tokens=1)
    found = driver(artifact, [asked], {"kernels": "none"})
    assert found["card"]["backend"].endswith(", function bodies")
    assert [answer["tokens"] for answer in found["rounds"][0]] == best


@pytest.mark.slow
def test_32_prompts_of_the_demo_model(
    demo_gguf: Path,
    export: Callable[..., Path],
    tmp_path: Path,
    driver: Callable[..., dict[str, Any]],
) -> None:
    """64 tokens each, at once in 16 slots of a static cache, against one after the other in Python."""
    from calibration.data import default_text
    from exporter.run.model import find_model

    out = export(demo_gguf, tmp_path / "out", max_seq=512, static_cache=True)
    model = find_model(out, "native")
    tokens = model.tokenizer()(default_text())["input_ids"]
    prompts = [tokens[500 * i : 500 * i + 3 + 5 * i] for i in range(32)]
    with model.open() as session:
        expected = [
            list(generate_tokens(session, prompt, Sampler(Sampling()), 64)) for prompt in prompts
        ]
    asked = [{"tokens": each, "max_new_tokens": 64, "ignore_end": True} for each in prompts]
    (found,) = driver(out, [asked], {"slots": 16, "threads": 0})["rounds"]
    assert [answer["tokens"] for answer in found] == expected


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["address,undefined", "thread"])
def test_sanitizers(
    model: Path,
    compiled: Callable[..., Path],
    driver: Callable[..., dict[str, Any]],
    prompts: list[list[int]],
    expected: list[list[int]],
    variant: str,
) -> None:
    """The scheduling on the test's own backend; the model too, but for the thread sanitizer, which
    does not know ONNX Runtime's own locks.
    """
    found = subprocess.run(
        [compiled("engine_cases", variant)], capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stdout + found.stderr
    if variant != "thread":
        program = compiled("driver", variant)
        answers = driver(model, [requests(prompts[:4])], {"slots": 2}, program=program)
        assert [answer["tokens"] for answer in answers["rounds"][0]] == expected[:4]
