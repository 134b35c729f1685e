"""What bench times, on a clock of the test's own: which calls count, whose turn it is, what is said."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import onnx
import pytest

from deploy.__main__ import main
from deploy.bench import BenchRequest, Timed, bandwidth, bench, plot, summary, table
from exporter.proof.diagnose import initializers
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


@pytest.mark.parametrize("tied", [True, False])
def test_a_step_reads_rows_of_tables_and_the_cache(
    tiny_llama: Callable[..., Path], export: Callable[..., Path], tmp_path: Path, tied: bool
) -> None:
    out = export(tiny_llama(tie_word_embeddings=tied), tmp_path / "out")
    request = BenchRequest(outs=[out], runner="onnxruntime", prompt=6, new=3, batch=2, rounds=1)
    timed = bench(request, ticking())[0]
    folder = out / "onnx"
    graph = onnx.load(folder / "model.onnx", load_external_data=False)
    sizes = {name: array.nbytes for name, array in initializers(folder, graph).items()}
    read = {name: size for name, size in sizes.items() if name.endswith((".cos", ".sin"))}
    assert len(read) == 2
    rows = 2 * sum(size // 256 for size in read.values())  # of 256 positions
    if not tied:
        read["model.embed_tokens.weight"] = size = sizes["model.embed_tokens.weight"]
        rows += 2 * size // 512
    cache = 2 * 7 * 2 * 2 * 2 * 16 * 2  # sequences, tokens, layers, keys and values, heads, fp16
    assert timed.step == sum(sizes.values()) - sum(read.values()) + rows + cache


def test_no_share_where_the_weights_are_elsewhere(artifact: Path) -> None:
    request = BenchRequest(outs=[artifact], runner="torch", prompt=4, new=2, rounds=1)
    timed = bench(request, ticking())[0]
    assert timed.step is None and "of_bandwidth" not in summary(timed, 1e9)["decode"]
    assert "GB/s" not in table([timed], 1e9)


def test_the_memory_is_read_by_all_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = set()

    def seen(part: np.ndarray) -> int:
        threads.add(threading.get_ident())
        barrier.wait(10)
        return int(add(part))

    barrier, add = threading.Barrier(3), np.add.reduce
    monkeypatch.setattr("deploy.bench.usable_cores", lambda: 3)
    monkeypatch.setattr("deploy.bench._READ", 3 << 10)
    monkeypatch.setattr("numpy.add", SimpleNamespace(reduce=seen))
    assert bandwidth(ticking()) == 3 << 10 and len(threads) == 3


def test_the_picture_has_every_time() -> None:
    one = Timed("out/<a>", "native", 1, None, {"prefill": 1, "decode": 1}, [0.1], [0.01, 0.02, 0.1])
    other = Timed("out/b", "native", 1, None, {"prefill": 1, "decode": 1}, [0.1])
    root = ElementTree.fromstring(plot([one, other]))
    names = [text.text for text in root.iter("{http://www.w3.org/2000/svg}text")]
    assert names == [
        *("10", "100", "ms"),
        *("<a>, prefill: 100.00 ms", "b, prefill: 100.00 ms", "<a>, decode: 20.00 ms"),
    ]
    dots = [float(dot.get("cx", "")) for dot in root.iter("{http://www.w3.org/2000/svg}circle")]
    right = 720 - 40
    assert dots == [right, right, 40, pytest.approx(40 + 640 * 0.30103, abs=0.1), right]


def test_folders_of_one_name_are_told_apart_in_the_picture() -> None:
    tokens = {"prefill": 1, "decode": 1}
    both = [Timed(out, "native", 1, None, tokens, [0.5], [0.1]) for out in ("a/x", "b/x")]
    picture = plot(both)
    assert ">a/x, decode: 100.00 ms<" in picture and ">b/x, decode: 100.00 ms<" in picture


def test_percentiles_of_few_are_left_out() -> None:
    timed = Timed("out", "native", 10**8, None, {"prefill": 1, "decode": 1}, [0.5], [0.1] * 19)
    assert set(summary(timed, 4e9)["decode"]) == {"min", "median", "tokens_per_second"}
    timed.decode.append(0.1)
    assert summary(timed, 4e9)["decode"]["p99"] == pytest.approx(100)


def test_numbers() -> None:
    times = [0.001 * number for number in range(1, 102)]  # 1 to 101 ms
    timed = Timed("out", "native", 10**8, 8e7, {"prefill": 128, "decode": 1}, [0.5], times)
    found = summary(timed, 4e9)
    assert found["prefill"]["tokens_per_second"] == 256
    decode = found["decode"]
    assert [decode[name] for name in ("min", "median", "p90", "p99")] == pytest.approx(
        [1, 51, 91, 100]
    )
    assert decode["of_bandwidth"] == pytest.approx(8e7 / 0.051 / 4e9)
    assert table([timed], 4e9).splitlines() == [
        "ms               min    median       p90       p99    tokens/s",
        "out, native, 100.0 MB of weights, 80.0 MB read by a decode step",
        "  prefill     500.00    500.00         -         -       256.0",
        "  decode        1.00     51.00     91.00    100.00        19.6  39% of 4.0 GB/s",
    ]


def test_the_command(artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = ["--prompt-len", "4", "--gen-len", "2", "--rounds", "1", "--runner", "torch"]
    file, picture = tmp_path / "bench.json", tmp_path / "bench.svg"
    words = ["bench", str(artifact), *short, "--vs", str(artifact), "--json", str(file)]
    assert main([*words, "--plot", str(picture)]) == 0
    assert picture.read_text().count("<circle") == 2 * (1 + 2)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 8 and lines[-1].endswith(" MB at the peak, the whole process with both")
    data = json.loads(file.read_text())
    assert [row["runner"] for row in data["results"]] == ["torch", "torch"]
    assert all(len(row["decode"]) == 2 and row["bytes"] > 0 for row in data["results"])
    assert data["bandwidth"] > 0 and data["peak_rss"] > 0


def test_a_file_that_cannot_be_written_is_told_before_the_work(
    artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    for path, problem in (
        (tmp_path, "a folder"),
        (tmp_path / "no" / "x", f"a file in {tmp_path / 'no'}, which is no folder"),
        (tmp_path / "file" / "x", f"a file in {tmp_path / 'file'}, which is no folder"),
    ):
        for command, option in (
            ("bench", "--json"),
            ("bench", "--plot"),
            ("compare", "--csv"),
            ("compare", "--plot"),
        ):
            assert main([command, str(artifact), option, str(path)]) == 2
            said = capsys.readouterr()
            assert (said.out, said.err) == (
                "",
                f"{option} {path}: got {problem}, expected a file to write. Choose another file.\n",
            )


def test_a_context_that_is_too_short(artifact: Path) -> None:
    with pytest.raises(InputError) as error:
        bench(BenchRequest(outs=[artifact], runner="onnxruntime", prompt=250, new=10))
    assert str(error.value) == (
        f"--prompt-len and --gen-len: got 260 tokens together, expected at most 256, the context of "
        f"{artifact}. Give less, or export with a larger --max-seq."
    )
