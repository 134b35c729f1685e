"""A whole model on a CPU: native kernels beside the function bodies.

python benchmarks/cpu.py OUT [--threads 1 2] [--rounds 3] [--label NAME]

OUT is an artifact up to its ONNX file, exported with --max-seq 2048 or more. The logits of both
runners are compared first: each takes the same tokens, and every prediction of the file that runs
as it is must be as good as those of the bodies. Then both are measured in turn, each in a process of
its own with so many cores to run on:
load     seconds to open, and what memory is then taken: anonymous, and mapped from files
prefill  512 tokens, in tokens a second
decode   32 tokens after 128 and after 2000, in tokens a second
Writes benchmarks/results/<processor>-<date>-<label>.json, medians with the least and the largest,
and prints a table.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
RUNNERS = ("native", "onnxruntime")
PREFILL, DECODE, PASTS = 512, 32, (128, 2000)
LARGEST_GAP = 0.02  # nats a token between the runners' losses


def memory() -> dict[str, float]:
    """MB of this process: anonymous, and mapped from files."""
    text = Path("/proc/self/smaps_rollup").read_text(encoding="ascii")
    kilobytes = {name: int(value) for name, value in re.findall(r"(\w+): +(\d+) kB", text)}
    anonymous = kilobytes["Anonymous"] / 1e3
    return {"anonymous_mb": anonymous, "mapped_mb": kilobytes["Rss"] / 1e3 - anonymous}


def measure(out: Path, runner: str, check: bool) -> dict[str, Any]:
    """In a process of its own: one number for each thing measured."""
    from calibration.data import default_text
    from exporter.run.model import find_model

    model = find_model(out, runner)
    ids = np.array([model.tokenizer()(default_text())["input_ids"][:2048]], np.int64)
    began = time.perf_counter()
    session = model.open()
    found: dict[str, Any] = {"load_seconds": time.perf_counter() - began, **memory()}
    if check:
        logits = session.run(ids[:, :256], reset=True)[0].astype(np.float64)
        logits -= logits.max(-1, keepdims=True)
        odds = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        found["loss"] = -float(odds[np.arange(255), ids[0, 1:256]].mean())
        return found
    session.run(ids[:, :PREFILL], reset=True, last_only=True)  # once, to fill caches
    began = time.perf_counter()
    session.run(ids[:, :PREFILL], reset=True, last_only=True)
    found["prefill_tokens_per_second"] = PREFILL / (time.perf_counter() - began)
    for past in PASTS:
        session.run(ids[:, :past], reset=True, last_only=True)
        began = time.perf_counter()
        for index in range(DECODE):
            session.run(ids[:, past + index : past + index + 1], last_only=True)
        found[f"decode_at_{past}_tokens_per_second"] = DECODE / (time.perf_counter() - began)
    session.close()
    return found


def child(out: Path, runner: str, threads: int, check: bool = False) -> dict[str, Any]:
    """Measure in a new process that may run on so many cores."""
    cores = ",".join(map(str, sorted(os.sched_getaffinity(0))[:threads]))
    command = [sys.executable, __file__, str(out), "--one", runner, *(["--check"] if check else [])]
    result = subprocess.run(
        ["taskset", "-c", cores, *command],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(HERE.parent)},
    )
    if result.returncode != 0:
        sys.exit(f"{runner}: {result.stderr.strip()}")
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--label", default="model")
    parser.add_argument("--one", choices=RUNNERS, help=argparse.SUPPRESS)
    parser.add_argument("--check", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.out, args.one, args.check)))
        return
    threads = max(args.threads)
    losses = {runner: child(args.out, runner, threads, True)["loss"] for runner in RUNNERS}
    if abs(losses["native"] - losses["onnxruntime"]) > LARGEST_GAP:
        sys.exit(f"the runners predict differently: {losses}")
    rows = []
    for count in args.threads:
        runs: dict[str, list[dict[str, float]]] = {runner: [] for runner in RUNNERS}
        for _ in range(args.rounds):
            for runner in RUNNERS:
                runs[runner].append(child(args.out, runner, count))
        for name in runs["native"][0]:
            row: dict[str, Any] = {"threads": count, "what": name}
            for runner in RUNNERS:
                values = [run[name] for run in runs[runner]]
                row[runner] = [round(statistics.median(values), 3), min(values), max(values)]
            ratios = [
                ours[name] / theirs[name] for ours, theirs in zip(*runs.values(), strict=True)
            ]
            row["ratio"] = round(statistics.median(ratios), 3)
            rows.append(row)
            print(
                f"{count} threads  {name:36} {row['native'][0]:10.2f} {row['onnxruntime'][0]:10.2f}"
                f"  x {row['ratio']:.2f}",
                flush=True,
            )
    import onnxruntime
    from cpu_gemm import processor  # not above: what it imports must not count as memory

    date = datetime.date.today().isoformat()
    record = {
        "date": date,
        "command": " ".join(["python", "benchmarks/cpu.py", f"out/{args.out.name}", *sys.argv[2:]]),
        "processor": processor(),
        "onnxruntime": onnxruntime.__version__,
        "loss": losses,
        "rows": rows,
    }
    path = (
        HERE / "results" / f"{'-'.join(processor().lower().split()[:2])}-{date}-{args.label}.json"
    )
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(path)


if __name__ == "__main__":
    main()
