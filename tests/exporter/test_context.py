"""--max-seq: how many tokens a sequence may have, in every file, runner and message."""

from __future__ import annotations

import json
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from calibration.checkpoints.checkpoint import open_checkpoint
from calibration.quant.folder import read_quant
from deploy.generate import GenerateRequest, generate_text
from exporter.engine.build import EngineOptions, profile_shapes
from exporter.engine.limits import EngineLimits, engine_limits
from exporter.graph.decoder import export_onnx
from exporter.proof.perplexity import EvalRequest, score
from exporter.run.model import find_model
from exporter.run.onnxruntime import OnnxSession, load_model
from plugins.errors import InputError

pytestmark = pytest.mark.slow  # whole exports

Run = Callable[..., tuple[int, str, str]]
TEXT = Path(__file__).resolve().parents[2] / "calibration" / "default_text.txt"
CUT = "--max-seq: cut from {} to 256 tokens, the context that the model was made for."


def _description(out: Path) -> tuple[int, int]:
    value = json.loads((out / "onnx" / "model.json").read_text())
    return value["context"], value["max_context"]


@pytest.mark.parametrize(
    ("options", "cut", "longest"),
    [
        ((), "", 256),
        (("--max-seq", "300", "--progress", "none"), CUT.format(300), 256),
        (("--max-seq", "300"), CUT.format(300), 256),
        (("--max-seq", "256"), "", 256),
        (("--max-seq", "64"), "", 64),
        (("--max-seq", "2"), "", 2),
    ],
)
def test_no_more_than_the_model_was_made_for(
    run: Run, tmp_path: Path, options: tuple[str, ...], cut: str, longest: int
) -> None:
    out = tmp_path / "out"
    code, _, err = run(out, *options)
    told = [line for line in err.splitlines() if "--max-seq" in line]
    assert code == 0 and told == ([cut] if cut else [])
    assert _description(out) == (256, longest)
    tables = load_model(out / "onnx").graph.initializer
    assert {int(one.dims[0]) for one in tables if one.name.startswith("rope.")} == {longest}


@pytest.mark.parametrize("length", ["1", "0", "-5", "many"])
def test_too_short_a_context(
    tiny_model_dir: Path, capsys: pytest.CaptureFixture[str], length: str
) -> None:
    from exporter.__main__ import main

    options = ["--wbits", "4", "--abits", "8", f"--max-seq={length}"]
    with pytest.raises(SystemExit) as ended:
        main([str(tiny_model_dir), *options])
    expected = "a whole number of at least 2" if length == "many" else "at least 2"
    got = repr(length) if length == "many" else length
    last = capsys.readouterr().err.splitlines()[-1]
    assert ended.value.code == 2
    assert last.endswith(f"argument --max-seq: got {got}, expected {expected}")


@pytest.fixture(scope="module")
def short(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """OUT of a model with a context of 256, exported for 24 tokens."""
    from exporter.__main__ import main

    out = tmp_path_factory.mktemp("short") / "out"
    options = [
        "--wbits",
        "8",
        "--abits",
        "8",
        "--method",
        "rtn",
        "--max-seq",
        "24",
        "--engine",
        "none",
        "--offline",
    ]
    text = ["--eval", str(TEXT), "--eval-windows", "2"]
    assert (
        main([str(tiny_model_dir), *options, *text, "--progress", "none", "--out", str(out)]) == 0
    )
    return out


def test_fewer_positions_are_the_first_ones(short: Path, tmp_path: Path) -> None:
    quant = read_quant(short / "quant")
    export_onnx(quant, tmp_path)
    ids = np.arange(24)[None] * 7
    with OnnxSession(short / "onnx", 24) as few, OnnxSession(tmp_path, 256) as all_of_them:
        np.testing.assert_array_equal(few.run(ids), all_of_them.run(ids))
        with pytest.raises(InputError) as error:
            few.run(ids[:, :1])
    assert str(error.value) == (
        "input_ids: got a context of 25 tokens, expected at most 24. Give less text, or reset the "
        "session."
    )


def test_the_report_scores_windows_that_fit(short: Path) -> None:
    report = json.loads((short / "report" / "report.json").read_text())
    assert report["perplexity"]["seqlen"] == 24 and report["perplexity"]["windows"] == 2
    assert report["validation"]["ok"]
    assert (report["validation"]["tokens"], report["validation"]["steps"]) == (16, 8)


@pytest.mark.parametrize("runner", ["onnxruntime", "torch"])
def test_runners_hold_to_it_and_say_how_to_get_more(
    short: Path, capsys: pytest.CaptureFixture[str], runner: str
) -> None:
    model = find_model(short, runner)
    with model.open() as session:
        assert session.max_context == 24
        assert score(session, model, EvalRequest(TEXT, first=1))["seqlen"] == 24
        with pytest.raises(InputError) as error:
            score(session, model, EvalRequest(TEXT, first=1, seqlen=25))
    assert str(error.value) == (
        f"--seqlen: got 25, expected at most 24, the context with {runner}. Give a smaller "
        "--seqlen, or export with a larger --max-seq."
    )
    words = "The river and the town"
    request = GenerateRequest(prompt=words, max_new_tokens=99, runner=runner)
    prompt = len(model.tokenizer()(words)["input_ids"])
    assert generate_text(short, request) == 24 - prompt
    assert capsys.readouterr().err.splitlines()[-1] == (
        "The context of 24 tokens is full, so the text ends here: give a shorter prompt, or export "
        "with a larger --max-seq."
    )
    with pytest.raises(InputError) as error:
        generate_text(short, GenerateRequest(prompt=words * 9, runner=runner))
    assert error.value.fix == "Give a shorter prompt, or export with a larger --max-seq"


def test_the_reference_alone_needs_no_tables(short: Path, tmp_path: Path) -> None:
    alone = shutil.copytree(short / "quant", tmp_path / "alone")
    for folder, longest in ((alone, 256), (short / "quant", 24)):
        with find_model(folder, "torch").open() as session:
            assert session.max_context == longest


@pytest.mark.parametrize("length", [2, 3, 9, 10, 11])
def test_the_proof_of_very_short_sequences(run: Run, tmp_path: Path, length: int) -> None:
    out = tmp_path / "out"
    code, _, err = run(out, "--max-seq", str(length), "--until", "report")
    assert code == 0, err
    report = json.loads((out / "report" / "report.json").read_text())["validation"]
    assert report["ok"] and report["tokens"] + report["steps"] == length
    phases = {row["phase"] for row in report["rows"]} - {""}
    assert phases == {"prefill", "padded batch"} | ({"decode"} if length > 2 else set())


def test_another_length_is_another_graph(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(out)
    _, _, err = run(out, "--resume", "--max-seq", "300")
    assert "onnx: kept, nothing changed" in err  # both are cut to the context
    _, _, err = run(out, "--resume", "--max-seq", "100")
    assert "quant: kept, nothing changed" in err and "onnx: kept" not in err
    assert _description(out) == (256, 100)


def test_a_context_of_millions_takes_no_more(
    tiny_llama: Callable[..., Path], run: Run, tmp_path: Path
) -> None:
    """The tables are as long as --max-seq, in the file and while they are made."""
    model = tiny_llama(max_position_embeddings=4_000_000)
    out = tmp_path / "out"
    tracemalloc.start()
    code, _, err = run(out, "--until", "report", model=model)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert code == 0, err
    assert peak < 64 << 20  # a table of 4 million positions alone would be 256 MB in fp64
    assert _description(out) == (4_000_000, 2048)
    graph = onnx.load(out / "onnx" / "model.onnx", load_external_data=False).graph
    tables = [list(one.dims) for one in graph.initializer if one.name in ("rope.cos", "rope.sin")]
    assert tables == [[2048, 8], [2048, 8]]
    assert (out / "onnx" / "model.onnx.data").stat().st_size < 1 << 20
    assert open_checkpoint(str(model), True).config.max_position_embeddings == 4_000_000


@pytest.mark.parametrize("length", [1, 2, 3, 64, 2048])
def test_profiles_end_with_the_context(length: int) -> None:
    """A runner that knows the decode profile alone does not step past the tables."""
    inputs: dict[str, list[int | str]] = {
        "input_ids": ["B", "S"],
        "attention_mask": ["B", "T"],
        "logits_indices": ["B", "L"],
        "past_key_values.0.key": ["B", 2, "P", 64],
    }
    profiles = profile_shapes(inputs, EngineOptions(max_seq=length))
    decode = profiles[1]["inputs"]
    assert decode["attention_mask"]["max"] == [1, length]
    assert decode["past_key_values.0.key"]["max"][2] == length - 1
    for profile in profiles:
        for which in ("min", "opt", "max"):
            shapes = {name: shape[which] for name, shape in profile["inputs"].items()}
            new, past = shapes["input_ids"][1], shapes["past_key_values.0.key"][2]
            assert shapes["attention_mask"][1] == new + past and new <= length and past < length
    record: Any = {"profiles": profiles, "max_context": length}
    assert engine_limits(record) == EngineLimits(max_batch=1, max_tokens=length, max_context=length)
