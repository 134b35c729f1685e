"""benchmarks/gemm.py without a GPU: every kernel it would time is compared in the simulation;
tables and plots from made-up rows.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import gemm, gemm_timing
from benchmarks.gemm_cases import SCHEMES, SHAPES, TARGET_SHAPE, TOKENS
from benchmarks.gemm_kernels import Kernels, Layer, check
from benchmarks.gemm_plot import plot
from benchmarks.gemm_tables import measured_rows, target_table
from benchmarks.gemm_timing import Time
from plugins.errors import CheckError
from plugins.tools.build import build_sim


@pytest.mark.slow
def test_every_scheme_is_right_in_the_simulation(capsys: pytest.CaptureFixture[str]) -> None:
    assert gemm.main(["--check-only", "--sim", "--tokens", "2", "9"]) == 0
    assert "results compared, all right" in capsys.readouterr().out


@pytest.mark.parametrize("scheme", [SCHEMES[0], SCHEMES[3]], ids=lambda scheme: scheme.name)
def test_wrong_weights_are_noticed(scheme: Any) -> None:
    """The check compares what the kernel reads with what reference() reads: another scale in one of
    them must show.
    """
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
        "benchmarks.gemm: got no CUDA device, expected one. Run it on a GPU; without one: "
        "--check-only --sim."
    )
    assert gemm.main(["--sim"]) == 2
    assert "the simulation has no speed" in capsys.readouterr().err


def test_targets_are_those_of_the_table() -> None:
    w4 = SCHEMES[0]
    assert [w4.target(m) for m in TOKENS] == [3.7] * 5 + [
        None,
        2.6,
        None,
        None,
        None,
        1.8,
        1.8,
        1.8,
    ]
    assert replace(w4, targets=()).target(1) is None
    n, k = SHAPES[TARGET_SHAPE]
    bits = [scheme.weight_bits(k) for scheme in SCHEMES[:5]]
    assert bits == pytest.approx([4 + 32 / k, 4.125 + 32 / k, 2 + 64 / k, 3 + 64 / k, 8 + 64 / k])
    assert n == 8192


def test_missed_targets_are_counted_and_drawn(tmp_path: Path) -> None:
    rows = [
        {
            "shape": TARGET_SHAPE,
            "scheme": "W4A8",
            "m": m,
            "chosen": True,
            "speedup": speedup,
            "gb_per_s": 3000.0,
            "tops": 100.0,
        }
        for m, speedup in ((1, 3.9), (32, 1.0), (64, 2.0))
    ]
    text, missed = target_table(rows)
    assert missed == 1
    assert (
        text.splitlines()[1] == "W4A8         M=1: 3.90 (3.7)  M=32: 1.00  M=64: 2.00 (2.6 MISSED)"
    )
    plot(
        {"device": "<GPU>", "copy_gb_per_s": 4000.0, "fp16_tflops": 700.0, "rows": rows},
        tmp_path / "plot.svg",
    )
    svg = (tmp_path / "plot.svg").read_text()
    assert svg.count("<polyline") == 2
    assert "&lt;GPU&gt;" in svg


def test_targets_that_were_not_measured_are_not_met() -> None:
    rows = [
        {"shape": TARGET_SHAPE, "scheme": "W4A8", "m": 1, "chosen": True, "speedup": 3.9},
        {"shape": "other", "scheme": "W4A8", "m": 64, "chosen": True, "speedup": 3.9},
        {"shape": TARGET_SHAPE, "scheme": "W4A8", "m": 1024, "chosen": False, "speedup": 3.9},
    ]
    text, missed = target_table(rows, SCHEMES[:2], [1, 32, 64, 1024])
    assert missed == 5
    assert text.splitlines()[-1] == "NOT MEASURED: 5 of 6 targets"
    assert target_table(rows, SCHEMES[:1], [1, 32])[1] == 0
    assert "NOT MEASURED" not in target_table(rows, SCHEMES[:1], [1, 32])[0]


class FakePeers:
    def __init__(self, n: int, k: int) -> None:
        pass

    def times(self, x: torch.Tensor, budget: float) -> dict[str, Time]:
        return {"fp16": Time(10.0, 0.1, 20)}


@pytest.fixture
def timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """run(seconds, tactics) -> a Run that has measured the simulation with a clock of ours: one
    share of K is fastest.
    """

    def time_calls(call: Any, budget: float, copies: int) -> Time:
        assert budget > 0
        for i in range(3):
            call(i, 0)
        return Time(2.0, 0.1, 3)

    monkeypatch.setattr(gemm_timing, "Peers", FakePeers)
    monkeypatch.setattr(gemm_timing, "copies_for", lambda size: 2)
    monkeypatch.setattr(gemm_timing, "time_calls", time_calls)

    def run(seconds: int, tactics: bool) -> gemm.Run:
        args = argparse.Namespace(
            seconds=seconds, tactics=tactics, schemes=["W4A8", "W2A8"], results=tmp_path
        )
        made = gemm.Run(
            args,
            Kernels(str(build_sim()), "cpu"),
            {"other": (64, 512), TARGET_SHAPE: (130, 512)},
            [1, 2],
        )
        made.result = {"failures": made.failures, "rows": made.rows, "not_timed": 0}
        made.path = gemm.new_path(tmp_path, "gemm-sim")
        made.measure()
        return made

    return run


def test_a_failure_is_noted_and_the_rest_goes_on(
    timed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(layer: Layer, x: torch.Tensor, tactic: int) -> None:
        if layer.scheme.name == "W2A8":
            raise CheckError("W2A8", "got 1, expected 2", "Run the self-test")
        check(layer, x, tactic)

    monkeypatch.setattr(gemm, "check", failing)
    run = timed(100, False)
    written = json.loads(run.path.read_text())
    assert set(written["failures"]) == {"W2A8: got 1, expected 2. Run the self-test."}
    assert {row["scheme"] for row in written["rows"]} == {"fp16", "W4A8"}
    assert [row["shape"] for row in written["rows"] if row.get("chosen")] == [TARGET_SHAPE] * 2 + [
        "other"
    ] * 2
    assert all(row["speedup"] == 5.0 for row in written["rows"] if row.get("chosen"))


def test_what_no_time_is_left_for_is_counted(timed: Any) -> None:
    run = timed(0, True)
    assert run.rows == []
    assert json.loads(run.path.read_text())["not_timed"] == 2 * 2 * (2 + 2)


@pytest.mark.parametrize("slow", ["time", "failure"])
def test_a_case_without_all_its_kernels_is_no_measurement(
    timed: Any, monkeypatch: pytest.MonkeyPatch, slow: str
) -> None:
    """The time ends, or the third kernel fails, within the first layer: what was reached stays out
    of the table, and is counted.
    """
    called: list[str] = []

    def third_call(layer: Layer, x: torch.Tensor, tactic: int) -> None:
        called.append(layer.scheme.name)
        if len(called) == 3 and slow == "failure":
            raise CheckError("W4A8", "got 1, expected 2", "Run the self-test")

    clock = SimpleNamespace(
        monotonic=lambda: 1000.0 if len(called) >= 3 and slow == "time" else 0.0
    )
    monkeypatch.setattr(gemm, "check", third_call)
    monkeypatch.setattr(gemm, "time", clock)
    run = timed(100, True)
    written = json.loads(run.path.read_text())
    first = [
        row
        for row in written["rows"]
        if (row["shape"], row["scheme"], row["m"]) == (TARGET_SHAPE, "W4A8", 1)
    ]
    assert len(first) > 1
    assert not any(row["complete"] for row in first)
    rest = [row for row in written["rows"] if row["scheme"] != "fp16" and row not in first]
    assert all(row["complete"] for row in rest)
    reached = {(row["shape"], row["scheme"], row["m"]) for row in rest}
    assert len(reached) == (0 if slow == "time" else 7)
    peers = 2 * sum(row["scheme"] == "fp16" for row in written["rows"])
    assert written["not_timed"] == 2 * 2 * (2 + 2) - peers - len(reached)
    lines = measured_rows(
        {**written, "device": "GPU", "date": "today", "capability": "9.0", "multiprocessors": 132},
        SCHEMES,
    )
    assert len(lines) == len(reached)


@pytest.mark.slow
def test_tactics_with_other_shares_and_a_file_of_its_own(timed: Any) -> None:
    first, second = timed(100, True), timed(100, True)
    assert [path.path.name for path in (first, second)] == ["gemm-sim.json", "gemm-sim-2.json"]
    assert first.failures == []
    mine = [
        row
        for row in first.rows
        if row["shape"] == "other" and row["scheme"] == "W4A8" and row["m"] == 1
    ]
    assert len({row["kernel"] for row in mine}) == 7
    assert sum(bool(row.get("chosen")) for row in mine) == 1
    usual = {row["tactic"] for row in mine if not row.get("other_shares")}
    others = {row["tactic"] for row in mine if row.get("other_shares")}
    assert others
    assert not others & usual
    assert gemm.other_shares(64 * 2 + 6) == [64 * 2 + 3, 64 * 2 + 12]
    assert gemm.other_shares(64 * 2 + 1) == [64 * 2 + 2]
    assert gemm.other_shares(64 * 2 + 63) == [64 * 2 + 31]


def test_a_graph_that_gives_other_bits_is_a_failure(
    timed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def off_by_one(call: Any, budget: float, copies: int) -> Time:
        call(0, 0)
        return Time(2.0, 0.1, 2)  # claims that copy 1 came last

    monkeypatch.setattr(gemm_timing, "time_calls", off_by_one)
    run = timed(100, False)
    assert run.failures
    assert all(
        "outputs that differ between graph and single call" in failure for failure in run.failures
    )


@pytest.fixture
def commanded(timed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """run(*arguments) -> the exit code of a run that measures the simulation at small shapes."""
    del timed  # its clock is all that is needed

    def start(run: gemm.Run) -> None:
        run.result = {
            "device": "GPU",
            "copy_gb_per_s": 1.0,
            "fp16_tflops": 1.0,
            "failures": run.failures,
            "rows": run.rows,
        }
        run.path = gemm.new_path(tmp_path, "gemm-sim")

    monkeypatch.setattr(gemm, "SHAPES", {"llama-7b o": (64, 512), TARGET_SHAPE: (130, 512)})
    monkeypatch.setattr(gemm, "_library", lambda args: str(build_sim()))
    monkeypatch.setattr(gemm, "Kernels", lambda library, device: Kernels(library, "cpu"))
    monkeypatch.setattr(gemm.Run, "start", start)
    return lambda *arguments: gemm.main([*arguments, "--results", str(tmp_path)])


def test_exit_code_says_whether_every_target_was_met(
    commanded: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The clock gives a speed-up of 5.0. Only the targets that a run asks for count."""
    assert commanded("--schemes", "W4A8", "--tokens", "1", "2") == 0
    assert commanded("--schemes", "W2A8", "--tokens", "1") == 3  # 6.5
    capsys.readouterr()
    monkeypatch.setattr(
        gemm, "time", SimpleNamespace(monotonic=count(0, 1000).__next__)
    )  # always too late
    assert commanded("--schemes", "W4A8", "--tokens", "1", "2", "3000") == 3
    assert capsys.readouterr().out.splitlines()[-1] == "NOT MEASURED: 3 of 3 targets"
    assert commanded("--quick") == 3
    assert capsys.readouterr().out.splitlines()[-1] == "NOT MEASURED: 20 of 20 targets"
    assert commanded("--schemes", "W4A8", "--tokens", "32") == 0  # no target there
    assert commanded("--schemes", "W4A4") == 0
    assert commanded("--shapes", "llama-7b o") == 0
    assert "NOT MEASURED" not in capsys.readouterr().out


@pytest.mark.parametrize("only", [["--check-only"], []], ids=["check", "measure"])
def test_a_lost_gpu_ends_the_run_without_a_traceback(
    commanded: Any,
    only: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    def lost(*_: Any) -> None:
        raise RuntimeError("CUDA error: an illegal memory access")

    def third_call(layer: Layer, x: torch.Tensor, tactic: int) -> None:
        called.append(tactic)
        if len(called) == 3:
            layer.kernels.device = "cuda"
            lost()

    called: list[int] = []
    monkeypatch.setattr(gemm, "check", third_call)
    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    assert commanded(*only, "--schemes", "W4A8", "--tokens", "1", "2") == 3
    printed = capsys.readouterr()
    assert printed.err == ""
    lines = printed.out.splitlines()
    assert lines[:2] == [
        "FAILED CUDA error: an illegal memory access",
        "stopped: CUDA error: an illegal memory access",
    ]
    assert len(called) == 3
    if only:
        assert lines[2:] == ["3 results compared, 1 WRONG"]
    else:
        assert lines[-1] == "NOT MEASURED: 1 of 2 targets"
        assert (
            json.loads((tmp_path / "gemm-sim.json").read_text())["not_timed"] == 12 - 4 - 1
        )  # both peers, and one kernel
