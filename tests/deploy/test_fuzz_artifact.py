"""Whatever the files of an artifact hold, with checksums that fit, the user gets a text, a number or
a message, never a traceback.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from calibration.out.files import file_records
from deploy.sampling import Sampler, SamplingOptions
from exporter.run.model import find_model
from tests.fuzz_cases import Folder, bounded_memory, changed_bytes, changed_json, fuzzed, outcome

pytestmark = pytest.mark.slow


@pytest.fixture
def out(copy: Path) -> Folder:
    """An OUT folder whose files the tests overwrite."""
    return Folder(copy)


@pytest.fixture(scope="module")
def untouched(artifact: Path) -> dict[str, np.ndarray]:
    """The logits of the artifact as it was made, by runner."""
    return {runner: use(artifact, runner) for runner in ("onnxruntime", "torch")}


def use(out: Path, runner: str) -> np.ndarray:
    """What a command does with an artifact: find it, load it, read a prompt, make a token; returns
    the logits of a text that no tokenizer has a part in.
    """
    model = find_model(out, runner)
    with model.open() as session:
        prompt = model.tokenizer()("The river")["input_ids"]
        logits = session.run(np.array([prompt], np.int64), reset=True, last_only=True)
        sampler = Sampler(SamplingOptions().over(model.description.sampling))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            token = sampler.choose(logits[0, -1], prompt)
        assert 0 <= token < logits.shape[-1]
        return session.run(np.array([[5, 6]]), reset=True)


def mended(out: Path) -> bytes:
    """A manifest that says of every file that it is as it should be."""
    manifest = json.loads((out / "manifest.json").read_text())
    for stage, record in manifest["stages"].items():
        record["files"] = file_records(out / stage)
    return json.dumps(manifest).encode()


@pytest.mark.parametrize(
    ("name", "runner"),
    [
        ("manifest.json", "onnxruntime"),
        ("onnx/model.json", "onnxruntime"),
        ("onnx/tokenizer.json", "onnxruntime"),
        ("onnx/tokenizer_config.json", "onnxruntime"),
        ("quant/quant.json", "torch"),
        ("quant/tokenizer_config.json", "torch"),
    ],
)
@given(data=st.data())
@fuzzed
def test_json_of_an_artifact(
    out: Folder,
    untouched: dict[str, np.ndarray],
    name: str,
    runner: str,
    data: st.DataObject,
) -> None:
    """What is taken all the same computes the same, but for quant.json, where other numbers may
    stand.
    """
    changed = data.draw(changed_json(out.json(name)))
    with out.holding(**{name: changed}), bounded_memory():
        if name == "manifest.json":
            logits = outcome(lambda: use(out.path, runner))
        else:
            with out.holding(**{"manifest.json": mended(out.path)}):
                logits = outcome(lambda: use(out.path, runner))
    if isinstance(logits, np.ndarray) and name != "quant/quant.json":
        np.testing.assert_array_equal(logits, untouched[runner])


@given(data=st.data())
@fuzzed
def test_the_graph(out: Folder, data: st.DataObject) -> None:
    changed = data.draw(changed_bytes(out.bytes("onnx/model.onnx")))
    with (
        out.holding(**{"onnx/model.onnx": changed}),
        out.holding(**{"manifest.json": mended(out.path)}),
    ):
        outcome(lambda: use(out.path, "onnxruntime"))
