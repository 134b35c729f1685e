"""The TensorRT session: refused without a GPU; its profiles and cache, with ONNX Runtime in the
engine's place.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exporter.run.model import open_session
from exporter.run.tensorrt import TensorrtSession
from plugins.errors import InputError

IDS = np.array([[5, 300, 17, 42, 99, 7, 256, 3, 444, 12, 13]], np.int64)


def test_tensorrt_needs_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("exporter.run.tensorrt.gpu_capabilities", lambda: [])
    with pytest.raises(InputError) as caught:
        open_session("tensorrt", Path("nowhere"))  # said before anything is read
    assert caught.value.exit_code == 2
    assert str(caught.value) == (
        "--runner tensorrt: got no CUDA device, expected one to run the engine. "
        "Use --runner onnxruntime, or run on a machine with an NVIDIA GPU and its driver."
    )


class FakeEngine:
    """Stands in for Polygraphy's TrtRunner: ONNX Runtime does the work, torch tensors go in and
    out.
    """

    is_active = False

    def __init__(self, out: Path) -> None:
        from exporter.run.onnxruntime import onnx_runner

        self.profiles: list[int] = []
        self.calls = 0
        self._runner = onnx_runner(out / "onnx")
        self._runner.activate()

    def set_profile(self, index: int) -> None:
        self.profiles.append(index)

    def infer(self, feeds: dict[str, Any], check_inputs: bool) -> dict[str, Any]:
        import torch

        self.calls += 1
        outputs = self._runner.infer({name: tensor.numpy() for name, tensor in feeds.items()})
        return {name: torch.from_numpy(array) for name, array in outputs.items()}


class FakeSession(TensorrtSession):
    """TensorrtSession without a GPU."""

    def _open(self, engine: Path, folder: Path, record: dict[str, Any]) -> None:
        self._runner = FakeEngine(folder.parent)

    def _empty_cache(self, batch: int) -> dict[str, Any]:
        import torch

        shapes = self._cache_shapes.items()
        return {name: torch.zeros(batch, heads, 0, width) for name, (heads, width) in shapes}


def test_tensorrt_session_picks_profiles_and_keeps_the_cache(
    tiny_export: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tiny_export(abits=8, dtype="float32")
    inputs = {
        "prefill": ([1, 8], [1, 3], [1, 2, 8, 16]),
        "decode": ([1, 1], [1, 1], [1, 2, 12, 16]),
    }
    profiles = [
        {
            "inputs": {
                "input_ids": {"max": ids},
                "logits_indices": {"max": logits},
                **{
                    f"past_key_values.{layer}.{part}": {"max": past}
                    for layer in range(2)
                    for part in ("key", "value")
                },
            }
        }
        for ids, logits, past in inputs.values()
    ]
    monkeypatch.setattr("exporter.run.tensorrt.check_engine", lambda folder: {"profiles": profiles})
    with open_session("onnxruntime", out) as onnx:
        want = [onnx.run(IDS), onnx.run(IDS[:, :1])]
    session = FakeSession(out / "engine", 256)
    assert (session.max_context, session.max_tokens) == (16, 8)
    for got, expected in zip([session.run(IDS), session.run(IDS[:, :1])], want, strict=True):
        assert np.linalg.norm(got - expected) < 1e-3 * np.linalg.norm(expected)
    assert session._runner.profiles == [0, 0, 1]  # 8 tokens, 3 tokens, 1 token behind 11
    assert session._runner.calls == 5  # 3 for the logits of 8 tokens
    session.run(IDS[:, :2])
    session.run(IDS[:, :1])
    assert (
        session._runner.profiles[-1] == 0
    )  # 14 cached tokens are more than the decode profile takes
