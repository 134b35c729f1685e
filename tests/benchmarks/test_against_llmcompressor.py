"""The side-by-side benchmark: what a process is charged with, the verdict, the table, the messages;
llm-compressor is not needed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import against_llmcompressor as benchmark
from benchmarks.llmcompressor_side import w4a8_groups
from calibration.data import default_text
from plugins.errors import UserError


def test_a_process_is_charged_with_its_own_time_and_memory(tmp_path: Path) -> None:
    log = tmp_path / "log"
    program = "import time; block = bytearray(300 << 20); time.sleep(0.3); print('done')"
    run = benchmark.measure([sys.executable, "-c", program], dict(os.environ), log)
    assert log.read_text(encoding="utf-8") == "done\n"
    assert run.seconds >= 0.3
    assert 0 < run.cpu_seconds < run.seconds + 5
    assert run.peak_rss >= 300 << 20


def test_importing_the_benchmark_loads_nothing_heavy() -> None:
    # A started process inherits the peak of the one that starts it.
    program = (
        "import sys; import benchmarks.against_llmcompressor; print(sorted({'torch', "
        "'numpy', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        cwd=benchmark.HERE.parent,
    )
    assert done.stdout == "[]\n"


def test_a_failed_process_shows_the_end_of_its_output(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-c",
        "import sys; print('\\n'.join(map(str, range(20)))); sys.exit(5)",
    ]
    with pytest.raises(UserError) as caught:
        benchmark.measure(command, dict(os.environ), tmp_path / "log")
    end = "\n".join(str(number) for number in range(5, 20))
    assert (
        str(caught.value)
        == f"{' '.join(command)}: got exit code 5, expected 0. The end of its output follows.\n{end}"
    )


def runs(
    ours: tuple[float, int], peer: tuple[float, int], extra: float = 0.0
) -> dict[str, list[benchmark.Run]]:
    return {
        side: [
            benchmark.Run(seconds + late, 2 * seconds, peak, 0.0) for late in (0.0, extra, 100.0)
        ]
        for side, (seconds, peak) in ((benchmark.OURS, ours), (benchmark.PEER, peer))
    }


@pytest.mark.parametrize(
    ("ours", "within"), [((10.0, 800), True), ((10.0, 801), False), ((10.1, 800), False)]
)
def test_verdict_takes_medians_and_both_limits(ours: tuple[float, int], within: bool) -> None:
    got = benchmark.verdict(runs(ours, (20.0, 800)))
    assert got == {
        "medians": {
            "anybit-trt": {"seconds": ours[0], "cpu_seconds": 2 * ours[0], "peak_rss": ours[1]},
            "llm-compressor": {"seconds": 20.0, "cpu_seconds": 40.0, "peak_rss": 800},
        },
        "time_share": round(ours[0] / 20, 4),
        "memory_share": round(ours[1] / 800, 4),
        "within": within,
    }


def test_report() -> None:
    rows = {
        "float": {"ppl": 20.97, "top1": 1.0, "kl": 0.0},
        "anybit-trt": {"ppl": 25.5, "top1": 0.75, "kl": 0.2},
        "llm-compressor": {"ppl": 29.67, "top1": 0.7, "kl": 0.3},
    }
    setting: dict[str, Any] = {
        "method": "qqq",
        "peer_steps": {"calibrate": 15.0},
        "rows": rows,
        **benchmark.verdict(runs((9.0, 10**9), (20.0, 2 * 10**9))),
    }
    assert benchmark.report({"g64": setting}) == (
        "W4A8 g64               time, s    CPU, s  peak, GB   perplexity    top-1  KL, nats\n"
        "float                        -         -         -      20.9700  100.00%   0.00000\n"
        "anybit-trt (qqq)           9.0      18.0      1.00      25.5000   75.00%   0.20000\n"
        "llm-compressor            20.0      40.0      2.00      29.6700   70.00%   0.30000\n"
        "anybit-trt takes 0.45 of llm-compressor's time (limit 0.5) and 0.50 of its memory "
        "(limit 1.0); "
        "llm-compressor without imports, reading and writing: 15.0 s"
    )


def test_peer_schemes() -> None:
    groups = {size: w4a8_groups(size)["group_0"] for size in (0, 64)}
    weights = {"num_bits": 4, "type": "int", "symmetric": True}
    assert groups[0]["weights"] == {**weights, "strategy": "channel"}
    assert groups[64]["weights"] == {**weights, "strategy": "group", "group_size": 64}
    for group in groups.values():
        assert group["input_activations"] == {
            "num_bits": 8,
            "type": "int",
            "symmetric": True,
            "strategy": "token",
            "dynamic": True,
        }


def arguments(tmp_path: Path, peer: Path) -> list[str]:
    return [
        "--peer-python",
        str(peer),
        "--calib",
        "calib.txt",
        "--text",
        "text.txt",
        "--work",
        str(tmp_path / "work"),
        "--results",
        str(tmp_path),
    ]


def test_a_python_without_llm_compressor(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    peer = tmp_path / "python"
    peer.write_text(
        '#!/bin/sh\necho Traceback >&2\necho "ModuleNotFoundError: No module named '
        "'llmcompressor'\" >&2\nexit 1\n"
    )
    peer.chmod(0o755)
    assert benchmark.main(arguments(tmp_path, peer)) == 2
    assert capsys.readouterr().err == (
        f"--peer-python: got {peer}, which cannot import llm-compressor (ModuleNotFoundError: "
        f"No module named 'llmcompressor'). "
        "Make it as this script's --help says.\n"
    )


def test_no_python_at_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    peer = tmp_path / "nowhere"
    assert benchmark.main(arguments(tmp_path, peer)) == 2
    assert capsys.readouterr().err == (
        f"--peer-python: got {peer}, which cannot be run (No such file or directory), expected a Python "
        "with llm-compressor. Make it as this script's --help says.\n"
    )


FAKE_PEER = """#!{python}
import json, pathlib, sys
script, arguments = pathlib.Path(sys.argv[1]).name, sys.argv[2:]
if script == "quality.py":
    rows = {{name: {{"ppl": 1.0, "top1": 1.0, "kl": 0.0}} for name in ("float", "anybit-trt", "llm-compressor")}}
    pathlib.Path(arguments[arguments.index("--json") + 1]).write_text(json.dumps({{"rows": rows}}))
elif arguments == ["--versions"]:
    print(json.dumps({{"llmcompressor": "0.14"}}))
else:
    out = pathlib.Path(arguments[arguments.index("--out") + 1])
    out.mkdir()
    (out / "seconds.json").write_text(json.dumps({{"calibrate": 1.0, "arguments": arguments}}))
"""


@pytest.mark.slow
def test_the_whole_run_around_a_peer_that_does_nothing(
    tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    peer, calib = tmp_path / "python", tmp_path / "calib.txt"
    peer.write_text(FAKE_PEER.format(python=sys.executable))
    peer.chmod(0o755)
    calib.write_text(default_text(), encoding="utf-8")
    options = arguments(tmp_path, peer)
    options[options.index("--calib") + 1] = str(calib)
    code = benchmark.main(
        [
            *options,
            "--model",
            str(tiny_model_dir),
            "--group-size",
            "0",
            "64",
            "--nsamples",
            "2",
            "--seqlen",
            "32",
            "--threads",
            "1",
        ]
    )
    assert code == 3  # nothing is done faster than nothing
    (file,) = tmp_path.glob("calibration-peer-*.json")
    result = json.loads(file.read_text(encoding="utf-8"))
    assert result["peer"] == {"llmcompressor": "0.14"} and (
        result["nsamples"],
        result["seqlen"],
        result["threads"],
    ) == (2, 32, 1)
    assert list(result["settings"]) == ["per channel", "g64"]
    work = tmp_path / "work"
    for size, setting in zip((0, 64), result["settings"].values(), strict=True):
        assert setting["peer_steps"]["arguments"] == [
            str(work / "float"),
            "--group-size",
            str(size),
            "--calib",
            str(calib),
            "--nsamples",
            "2",
            "--seqlen",
            "32",
            "--out",
            str(work / "llm-compressor"),
        ]
        assert not setting["within"] and setting["time_share"] > 0.5
        assert [len(done) for done in setting["runs"].values()] == [1, 1]
    assert (work / "float" / "model.safetensors").is_file()
    quant = json.loads((work / "anybit-trt" / "quant" / "quant.json").read_text(encoding="utf-8"))
    assert (quant["scheme"]["op"], quant["scheme"]["group_size"]) == ("QQQGemm", 64)
    assert capsys.readouterr().out.endswith(
        f"\n\n{benchmark.report(result['settings'])}\nwritten to {file}\n"
    )
