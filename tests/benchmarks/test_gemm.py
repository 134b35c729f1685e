"""benchmarks/gemm.py without a GPU: every kernel it would time is compared in the simulation; tables and plots from made-up rows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gemm
from benchmarks.gemm_cases import SCHEMES, SHAPES, TARGET_SHAPE, TOKENS
from benchmarks.gemm_kernels import Kernels, Layer, check
from benchmarks.gemm_plot import plot
from plugins.build import build_sim
from plugins.core.errors import CheckError


def test_every_scheme_is_right_in_the_simulation(capsys: pytest.CaptureFixture[str]) -> None:
    assert gemm.main(["--check-only", "--sim", "--tokens", "2", "9"]) == 0
    assert "results compared, all right" in capsys.readouterr().out


@pytest.mark.parametrize("scheme", [SCHEMES[0], SCHEMES[3]], ids=lambda scheme: scheme.name)
def test_wrong_weights_are_noticed(scheme: Any) -> None:
    """The check compares what the kernel reads with what reference() reads: another scale in one of them must show."""
    layer = Layer(Kernels(str(build_sim()), "cpu"), scheme, 130, 256, 2)
    x = layer.tokens(3)
    check(layer, x)
    layer.copies.reverse()  # the kernel runs with copy 0, and so does reference()
    check(layer, x)
    layer.block = lambda first: replace_scale(Layer.block(layer, first))  # type: ignore[method-assign]
    with pytest.raises(CheckError, match="for token"):
        check(layer, x)


def replace_scale(block: tuple[Any, dict[str, Any]]) -> tuple[Any, dict[str, Any]]:
    attrs, tensors = block
    return attrs, tensors | {"scale": tensors["scale"] * 1.01}


def test_needs_a_gpu_to_time(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert gemm.main(["--quick"]) == 2
    assert capsys.readouterr().err.strip() == (
        "benchmarks.gemm: got no CUDA device, expected one. Run it on a GPU; without one: --check-only --sim.")
    assert gemm.main(["--sim"]) == 2
    assert "the simulation has no speed" in capsys.readouterr().err


def test_targets_are_those_of_the_table() -> None:
    w4 = SCHEMES[0]
    assert [w4.target(m) for m in TOKENS] == [3.7] * 5 + [None, 2.6, None, None, None, 1.8, 1.8, 1.8]
    assert replace(w4, targets=()).target(1) is None
    n, k = SHAPES[TARGET_SHAPE]
    bits = [scheme.weight_bits(k) for scheme in SCHEMES[:5]]
    assert bits == pytest.approx([4 + 32 / k, 4.125 + 32 / k, 2 + 64 / k, 3 + 64 / k, 8 + 64 / k])
    assert n == 8192


def test_missed_targets_are_counted_and_drawn(tmp_path: Path) -> None:
    rows = [{"shape": TARGET_SHAPE, "scheme": "W4A8", "m": m, "chosen": True, "speedup": speedup, "gb_per_s": 3000.0, "tops": 100.0}
            for m, speedup in ((1, 3.9), (32, 1.0), (64, 2.0))]
    text, missed = gemm.target_table(rows)
    assert missed == 1
    assert text.splitlines()[1] == "W4A8         M=1: 3.90 (3.7)  M=32: 1.00  M=64: 2.00 (2.6 MISSED)"
    plot({"device": "<GPU>", "copy_gb_per_s": 4000.0, "fp16_tflops": 700.0, "rows": rows}, tmp_path / "plot.svg")
    svg = (tmp_path / "plot.svg").read_text()
    assert svg.count("<polyline") == 2
    assert "&lt;GPU&gt;" in svg
