"""Calibration side by side with llm-compressor, on one machine in one run: wall time, peak memory,
then how good the two results are.

python benchmarks/against_llmcompressor.py --peer-python peer/bin/python --calib wiki.valid.detok
--text wiki.test.raw
    [--model smollm2-135m] [--method qqq] [--group-size 0 64] [--nsamples 64] [--seqlen 1024]
    [--threads N] [--repeat 1] [--first 20]

llm-compressor is no dependency of this project. The Python that has it (torch first and pinned, or
a build with CUDA comes along):
    python3 -m venv peer && peer/bin/pip install torch==2.13.0
    peer/bin/pip install torch==2.13.0 "llmcompressor==0.14.*" ml_dtypes

Both sides start from the same weights (llm-compressor from a Hugging Face folder in fp32, written
once before), read the same text and take the same tokens, with the same number of threads. Time and
memory are of whole processes: interpreter, imports, reading the model, calibration, writing the
result. Sides take turns, and which goes first alternates; the median counts. Everything is imported
and the model read once before, so that neither side pays for a cold disk. Prints a table; writes
benchmarks/results/calibration-peer-<date>.json, after each step, so that a later failure loses
nothing. Exit code 3: more than half of llm-compressor's time, or more memory.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from calibration.checkpoints.sources import model_slug
from calibration.out.json_file import read_json
from plugins.cli import run_cli, whole_number
from plugins.errors import EXIT_CHECK, InputError, UserError

__all__ = ["Run", "main", "measure", "report", "verdict"]

HERE = Path(__file__).resolve().parent
OURS, PEER, FLOAT = "anybit-trt", "llm-compressor", "float"
TIME_LIMIT, MEMORY_LIMIT = 0.5, 1.0  # of llm-compressor's


@dataclass(frozen=True)
class Run:
    """One finished process.

    Attributes:
        seconds: wall time.
        cpu_seconds: user and system time, of all threads.
        peak_rss: bytes.
        load: the machine's load average (1 minute) when it started: above zero, others were at
            work.
    """

    seconds: float
    cpu_seconds: float
    peak_rss: int
    load: float


def measure(command: Sequence[str], environment: dict[str, str], log: Path) -> Run:
    """Run a command to its end, its output into a file.

    The kernel counts the peak of the starting process into that of the started one: this program
    must stay small, and import no torch.

    Raises:
        UserError: it failed; the message ends with the end of its output.
    """
    load, began = os.getloadavg()[0], time.monotonic()
    with (
        log.open("wb") as file,
        subprocess.Popen(
            command, env=environment, stdout=file, stderr=subprocess.STDOUT
        ) as process,
    ):
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.monotonic() - began
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:])
        raise UserError(
            " ".join(command),
            f"got exit code {process.returncode}, expected 0",
            "The end of its output follows",
            tail,
        )
    return Run(
        round(seconds, 2),
        round(usage.ru_utime + usage.ru_stime, 2),
        usage.ru_maxrss * 1024,
        round(load, 2),
    )


def write_float_folder(model: str, folder: Path, environment: dict[str, str]) -> None:
    """The float model as a Hugging Face folder in fp32. Runs in a process of its own, which may be
    large.
    """
    os.environ.update(environment)
    from calibration.checkpoints.checkpoint import open_checkpoint
    from calibration.reference.model import float_model

    checkpoint = open_checkpoint(model, offline=True)
    float_model(checkpoint).save_pretrained(folder)
    checkpoint.tokenizer().save_pretrained(folder)


class Comparison:
    """One run of the benchmark: commands, folders and the result file.

    Args:
        args: the command line.

    Attributes:
        path: the result file.
        result: its content so far.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        self._float = args.work / FLOAT
        self._environment = {
            **os.environ,
            "PYTHONPATH": str(HERE.parent),
            "OMP_NUM_THREADS": str(args.threads),
            "OMP_WAIT_POLICY": "PASSIVE",
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        date = datetime.date.today().isoformat()
        self.path: Path = args.results / f"calibration-peer-{date}.json"
        self.result: dict[str, Any] = {
            "date": date,
            "model": model_slug(args.model),
            "calib": Path(args.calib).name,
            "nsamples": args.nsamples,
            "seqlen": args.seqlen,
            "text": Path(args.text).name,
            "machine": platform.machine(),
            "cores": os.cpu_count(),
            "threads": args.threads,
            "settings": {},
        }

    def prepare(self) -> None:
        """Check llm-compressor's Python, and write the float model for it.

        Raises:
            InputError: llm-compressor cannot be imported there, or there is no such model.
        """
        peer, fix = self._args.peer_python, "Make it as this script's --help says"
        try:
            done = subprocess.run(
                [peer, str(HERE / "llmcompressor_side.py"), "--versions"],
                env=self._environment,
                capture_output=True,
                text=True,
                check=False,
            )
        except OSError as error:
            raise InputError(
                "--peer-python",
                f"got {peer}, which cannot be run ({error.strerror}), expected a Python with "
                f"llm-compressor",
                fix,
            ) from None
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            raise InputError(
                "--peer-python", f"got {peer}, which cannot import llm-compressor ({reason})", fix
            )
        self.result["peer"] = json.loads(done.stdout.splitlines()[-1])
        shutil.rmtree(self._float, ignore_errors=True)
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            pool.submit(
                write_float_folder, self._args.model, self._float, self._environment
            ).result()

    def compare(self, group_size: int) -> dict[str, Any]:
        """Time both sides, then score both results; returns {"runs", "rows"} and the ratios."""
        runs: dict[str, list[Run]] = {OURS: [], PEER: []}
        for turn in range(self._args.repeat):
            for side in (OURS, PEER) if turn % 2 == 0 else (PEER, OURS):
                shutil.rmtree(self._args.work / side, ignore_errors=True)
                run = measure(self._command(side, group_size), self._environment, self._log(side))
                runs[side].append(run)
                print(
                    f"{side}: {run.seconds:.1f} s, {run.cpu_seconds:.1f} s of CPU, "
                    f"{run.peak_rss / 1e9:.2f} GB",
                    flush=True,
                )
        setting = {
            "group_size": group_size,
            "runs": {side: [asdict(run) for run in done] for side, done in runs.items()},
            "method": read_json(self._args.work / OURS / "quant" / "quant.json")["scheme"][
                "method"
            ],
            "peer_steps": read_json(self._args.work / PEER / "seconds.json"),
        }
        self.result["settings"][f"g{group_size}" if group_size else "per channel"] = setting
        setting.update(verdict(runs))
        self.write()
        setting["rows"] = self._quality()
        self.write()
        return setting

    def _log(self, side: str) -> Path:
        return Path(self._args.work) / f"{side}.log"

    def _command(self, side: str, group_size: int) -> list[str]:
        args = self._args
        common = [
            "--group-size",
            str(group_size),
            "--calib",
            args.calib,
            "--nsamples",
            str(args.nsamples),
            "--seqlen",
            str(args.seqlen),
            "--out",
            str(args.work / side),
        ]
        if side == PEER:
            return [
                args.peer_python,
                str(HERE / "llmcompressor_side.py"),
                str(self._float),
                *common,
            ]
        return [
            sys.executable,
            "-m",
            "calibration",
            args.model,
            "--wbits",
            "4",
            "--abits",
            "8",
            "--method",
            args.method,
            *common,
            "--head-bits",
            "16",  # as the peer's
            "--offline",
            "--progress",
            "none",
        ]

    def _quality(self) -> dict[str, dict[str, float]]:
        # In llm-compressor's Python, which alone is sure to read what it wrote; the float model is
        # the folder that both came from.
        args, file = self._args, self._args.work / "quality.json"
        command = [
            args.peer_python,
            str(HERE / "quality.py"),
            str(args.work / OURS),
            "--hf-folder",
            str(args.work / PEER),
            "--model",
            str(self._float),
            "--text",
            args.text,
            "--first",
            str(args.first),
            "--seqlen",
            str(args.eval_seqlen),
            "--json",
            str(file),
        ]
        measure(command, self._environment, self._log("quality"))
        rows: dict[str, dict[str, float]] = read_json(file)["rows"]
        return rows

    def write(self) -> None:
        """Bring the result file up to date."""
        self.path.write_text(json.dumps(self.result, indent=2) + "\n", encoding="utf-8")


def verdict(runs: dict[str, list[Run]]) -> dict[str, Any]:
    """Medians of both sides, our share of llm-compressor's, and whether both shares are within the
    limits.
    """
    medians = {
        side: {
            key: statistics.median(getattr(run, key) for run in done)
            for key in ("seconds", "cpu_seconds", "peak_rss")
        }
        for side, done in runs.items()
    }
    time_share, memory_share = (
        medians[OURS][key] / medians[PEER][key] for key in ("seconds", "peak_rss")
    )
    return {
        "medians": medians,
        "time_share": round(time_share, 4),
        "memory_share": round(memory_share, 4),
        "within": time_share <= TIME_LIMIT and memory_share <= MEMORY_LIMIT,
    }


def report(settings: dict[str, dict[str, Any]]) -> str:
    """The last table: one block for each setting, one line for each model."""
    lines = []
    for name, setting in settings.items():
        lines += [
            "",
            f"{'W4A8 ' + name:<20} {'time, s':>9} {'CPU, s':>9} {'peak, GB':>9} "
            f"{'perplexity':>12} {'top-1':>8} {'KL, nats':>9}",
        ]
        for side, row in setting["rows"].items():
            median = setting["medians"].get(side)
            cost = (
                f"{median['seconds']:9.1f} {median['cpu_seconds']:9.1f} "
                f"{median['peak_rss'] / 1e9:9.2f}"
                if median
                else f"{'-':>9} {'-':>9} {'-':>9}"
            )
            label = f"{side} ({setting['method']})" if side == OURS else side
            lines.append(
                f"{label:<20} {cost} {row['ppl']:12,.4f} {row['top1']:8.2%} {row['kl']:9.5f}"
            )
        peer = setting["peer_steps"]["calibrate"]
        lines.append(
            f"{OURS} takes {setting['time_share']:.2f} of {PEER}'s time (limit {TIME_LIMIT}) "
            f"and {setting['memory_share']:.2f} of "
            f"its memory (limit {MEMORY_LIMIT}); {PEER} without imports, reading and writing: "
            f"{peer:.1f} s"
        )
    return "\n".join(lines[1:])


def _main(argv: Sequence[str] | None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--peer-python", required=True, metavar="PATH", help="a Python with llm-compressor")
    add("--calib", required=True, metavar="FILE", help="calibration text")
    add("--text", required=True, metavar="FILE", help="held-out text to score")
    add("--model", default="smollm2-135m")
    add("--method", default="qqq")
    add("--group-size", type=int, nargs="+", default=[0], choices=(0, 64, 128))
    add("--nsamples", type=whole_number(1), default=64)
    add("--seqlen", type=whole_number(2), default=1024)
    add("--threads", type=whole_number(1), default=os.cpu_count())
    add("--repeat", type=whole_number(1), default=1)
    add("--first", type=whole_number(0), default=20, help="windows to score; 0 is all (default 20)")
    add("--eval-seqlen", type=whole_number(2), default=2048)
    add(
        "--work", type=Path, default=Path("out/calibration-peer"), help="folder for models and logs"
    )
    add("--results", type=Path, default=HERE / "results", help="folder for the result file")
    args = parser.parse_args(argv)
    args.work.mkdir(parents=True, exist_ok=True)
    comparison = Comparison(args)
    comparison.prepare()
    for group_size in args.group_size:
        comparison.compare(group_size)
    settings = comparison.result["settings"]
    print(f"\n{report(settings)}\nwritten to {comparison.path}")
    return 0 if all(setting["within"] for setting in settings.values()) else EXIT_CHECK


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    return run_cli(lambda: _main(argv))


if __name__ == "__main__":
    sys.exit(main())
