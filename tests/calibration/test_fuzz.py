"""Whatever a file holds, the user gets a result or a message, never a traceback; and a result has the
numbers that transformers gives.

A bounded number of damaged and hostile variants of every file that is read from outside, the same
in every run.
"""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from calibration.checkpoints.checkpoint import Checkpoint, open_checkpoint
from calibration.checkpoints.huggingface import open_hf_weights
from calibration.data import load_text
from plugins.errors import UserError
from tests.calibration.block_cases import float_logits
from tests.conftest import FAMILIES
from tests.fuzz_cases import Folder, bounded_memory, changed_bytes, changed_json, fuzzed, outcome

pytestmark = pytest.mark.slow

IDS = torch.tensor([[1, 5, 9, 300, 2]])


@pytest.fixture(scope="module")
def model(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """A model whose files the tests overwrite."""
    return Folder(shutil.copytree(tiny_model_dir, tmp_path_factory.mktemp("fuzz") / "model"))


def _logits_of_transformers(folder: Path, architecture: str) -> np.ndarray:
    import transformers

    model = getattr(transformers, architecture).from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", local_files_only=True
    )
    with torch.no_grad():
        return np.asarray(model(IDS).logits)


def _check_numbers(folder: Path, found: Checkpoint | UserError) -> None:
    if isinstance(found, UserError):
        return
    want = _logits_of_transformers(folder, found.family.architecture)
    np.testing.assert_allclose(float_logits(found, IDS).numpy(), want, atol=1e-4, rtol=0)


@given(data=st.data())
@fuzzed
def test_config(model: Folder, data: st.DataObject) -> None:
    config = data.draw(changed_json(model.json("config.json")))
    with model.holding(**{"config.json": config}):
        with bounded_memory():
            found = outcome(lambda: open_checkpoint(str(model.path), offline=True))
        _check_numbers(model.path, found)


@pytest.fixture(scope="module", params=FAMILIES)
def of_a_family(
    request: pytest.FixtureRequest,
    tiny_llama: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Folder:
    """A model of a family whose files the tests overwrite."""
    original = tiny_llama(architecture=request.param, **FAMILIES[request.param])
    return Folder(shutil.copytree(original, tmp_path_factory.mktemp("fuzz") / "model"))


@pytest.mark.usefixtures("more_families")
@given(data=st.data())
@fuzzed
def test_config_of_a_family(of_a_family: Folder, data: st.DataObject) -> None:
    config = data.draw(changed_json(of_a_family.json("config.json")))
    with of_a_family.holding(**{"config.json": config}):
        with bounded_memory():
            found = outcome(lambda: open_checkpoint(str(of_a_family.path), offline=True))
        _check_numbers(of_a_family.path, found)


@given(data=st.data())
@fuzzed
def test_safetensors_header(model: Folder, data: st.DataObject) -> None:
    file = model.bytes("model.safetensors")
    length = struct.unpack("<Q", file[:8])[0]
    text = data.draw(changed_json(json.loads(file[8 : 8 + length])))
    text += b" " * (-len(text) % 8)
    changed = struct.pack("<Q", len(text)) + text + file[8 + length :]
    with model.holding(**{"model.safetensors": changed}):
        with bounded_memory():
            weights = outcome(lambda: open_hf_weights(model.path))
        if isinstance(weights, UserError):
            return
        with safe_open(model.path / "model.safetensors", "np") as theirs:
            assert set(weights.shapes()) == set(theirs.keys())
            for name in weights.shapes():
                np.testing.assert_array_equal(weights.array(name), theirs.get_tensor(name))


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json"]
)
@given(data=st.data())
@fuzzed
def test_side_files(model: Folder, name: str, data: st.DataObject) -> None:
    def read() -> Any:
        checkpoint = open_checkpoint(str(model.path), offline=True)
        return checkpoint.tokenizer()("The river runs.")["input_ids"]

    changed = data.draw(changed_json(model.json(name)))
    with model.holding(**{name: changed}), bounded_memory():
        outcome(read)


@given(data=st.data())
@fuzzed
def test_calibration_text(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    lines = b'{"text": "The river."}\n{"text": "The sea \xe2\x80\xa8 and the sky."}\n'
    suffix = data.draw(st.sampled_from([".txt", ".json", ".jsonl", ".gz", ""]))
    path = tmp_path_factory.mktemp("text") / f"text{suffix}"
    path.write_bytes(data.draw(st.one_of(changed_bytes(lines), st.binary(max_size=300))))
    text = outcome(lambda: load_text(str(path)))
    assert isinstance(text, UserError) or text.strip()
