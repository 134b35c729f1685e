"""What bench times, on a clock of the test's own: which calls count, whose turn it is, what is said."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from deploy.__main__ import main
from deploy.bench import BenchRequest, Timed, bench, summary, table
from exporter.run.sessions import DecoderSession
from plugins.errors import InputError


def ticking() -> Callable[[], float]:
    """A clock that is a second on at every look."""
    now = [0.0]

    def look() -> float:
        now[0] += 1.0
        return now[0]

    return look


def test_every_call_is_timed_once_and_the_first_round_is_not(
    artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes: list[tuple[int, ...]] = []
    run = DecoderSession.run

    def watched(self: DecoderSession, ids: np.ndarray, **options: bool) -> np.ndarray:
        shapes.append(ids.shape)
        return run(self, ids, **options)

    monkeypatch.setattr(DecoderSession, "run", watched)
    request = BenchRequest(
        outs=[artifact, artifact], runner="onnxruntime", prompt=6, new=3, batch=2, rounds=2
    )
    first, second = bench(request, ticking())
    assert (
        shapes == [(2, 6), (2, 1), (2, 1), (2, 1)] * 2 * 3
    )  # two artifacts in turns, three rounds
    for timed in (first, second):
        assert (timed.prefill, timed.decode) == ([1.0] * 2, [1.0] * 6)
        assert timed.tokens == {"prefill": 12, "decode": 2}
        assert timed.bytes == (artifact / "onnx" / "model.onnx.data").stat().st_size


def test_numbers() -> None:
    times = [0.001 * number for number in range(1, 102)]  # 1 to 101 ms
    timed = Timed("out", "native", 10**8, {"prefill": 128, "decode": 1}, [0.5], times)
    found = summary(timed, 4e9)
    assert found["prefill"]["tokens_per_second"] == 256
    decode = found["decode"]
    assert [decode[name] for name in ("min", "median", "p90", "p99")] == pytest.approx(
        [1, 51, 91, 100]
    )
    assert decode["of_bandwidth"] == pytest.approx(1e8 / 0.051 / 4e9)
    assert table([timed], 4e9).splitlines() == [
        "ms               min    median       p90       p99    tokens/s",
        "out, native, 100.0 MB of weights",
        "  prefill     500.00    500.00    500.00    500.00       256.0",
        "  decode        1.00     51.00     91.00    100.00        19.6  49% of 4.0 GB/s",
    ]


def test_the_command(artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = ["--prompt-len", "4", "--gen-len", "2", "--rounds", "1", "--runner", "torch"]
    file = tmp_path / "bench.json"
    words = ["bench", str(artifact), *short, "--vs", str(artifact), "--json", str(file)]
    assert main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 8 and lines[-1].endswith(" MB at the peak")
    data = json.loads(file.read_text())
    assert [row["runner"] for row in data["results"]] == ["torch", "torch"]
    assert all(len(row["decode"]) == 2 and row["bytes"] > 0 for row in data["results"])
    assert data["bandwidth"] > 0 and data["peak_rss"] > 0


def test_a_context_that_is_too_short(artifact: Path) -> None:
    with pytest.raises(InputError) as error:
        bench(BenchRequest(outs=[artifact], runner="onnxruntime", prompt=250, new=10))
    assert str(error.value) == (
        f"--prompt-len and --gen-len: got 260 tokens together, expected at most 256, the context of "
        f"{artifact}. Give less, or export with a larger --max-seq."
    )
