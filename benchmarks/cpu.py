"""A whole model on a CPU: native kernels beside the function bodies, llama.cpp and ORT-GenAI.

python benchmarks/cpu.py OUT [--peers FOLDER] [--threads 1 2] [--rounds 3] [--label NAME]

OUT is an artifact up to its ONNX file, exported with --max-seq 2100 or more; however it was exported,
it runs as it is. FOLDER is what benchmarks/cpu_peers.py made of the same model; a peer that is
not there, or fails, is said and left out. The logits of our two runners are compared first: both
take the same tokens, and what the file with native kernels predicts must be as good as what the
bodies do. Then all are measured in turn, each in a process of its own with so many cores to run on:
load     seconds to open, and what memory is then taken: anonymous, and mapped from files
prefill  512 tokens, in tokens a second
decode   32 tokens after 128 and after 2000, in tokens a second
Writes benchmarks/results/<processor>-<date>-<label>.json, medians with the least and the largest, and
a plot of it, and prints a table. --no-bodies leaves the function bodies out, which need up to 55
bytes of memory for each weight.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from cpu_peer_side import DECODE, PASTS, PREFILL, memory
from result_file import command_on, fair_environment, processor, spread, write_result

HERE = Path(__file__).resolve().parent
NATIVE, BODIES = "native", "onnxruntime"
LARGEST_GAP = 0.02  # nats a token between the runners' losses, where chance explains no more
CHECKED = 1024  # tokens
SPEEDS = ["prefill_tokens_per_second"]
SPEEDS += [f"decode_at_{past}_tokens_per_second" for past in PASTS]


def default_ids(out: Path, runner: str) -> np.ndarray:
    """Tokens of the default text, over again where it is short: int64 [1, 2100]."""
    from calibration.data import default_text
    from exporter.run.model import find_model

    ids = np.array(find_model(out, runner).tokenizer()(default_text())["input_ids"], np.int64)
    return np.resize(ids, (1, max(PASTS) + 100))


def measure(out: Path, runner: str, check: bool) -> dict[str, Any]:
    """In a process of its own: one number for each thing measured."""
    from exporter.run.model import find_model

    model, ids = find_model(out, runner), default_ids(out, runner)
    began = time.perf_counter()
    session = model.open()
    found: dict[str, Any] = {"load_seconds": time.perf_counter() - began, **memory()}
    if check:
        found["losses"] = []
        for start in range(0, CHECKED, 256):
            logits = session.run(ids[:, start : start + 256])[0].astype(np.float64)
            logits -= logits.max(-1, keepdims=True)
            odds = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            wanted = ids[0, start + 1 : start + 257]
            found["losses"] += (-odds[np.arange(256), wanted]).tolist()
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


def child(command: list[str], threads: int) -> dict[str, Any] | str:
    """What a process prints that may run on so many cores; or why it prints nothing."""
    cores = ",".join(map(str, sorted(os.sched_getaffinity(0))[:threads]))
    done = subprocess.run(
        ["taskset", "-c", cores, *command],
        capture_output=True,
        text=True,
        check=False,
        env={**fair_environment(), "PYTHONPATH": str(HERE.parent)},
    )
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        return f"exit {done.returncode}{': ' + lines[-1] if lines else ''}"
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def own_command(out: Path, runner: str, *more: str) -> list[str]:
    return [sys.executable, str(HERE / "cpu.py"), str(out), "--one", runner, *more]


def peer_commands(peers: Path, tokens: Path, threads: int) -> dict[str, list[str]]:
    """A command for each peer in a folder of cpu_peers.py.

    llama.cpp's repacked weights crash on some machines: both ways are tried.
    """
    record = json.loads((peers / "peers.json").read_text(encoding="utf-8"))
    for name, why in record["missing"].items():
        print(f"{name}: left out, {why}")
    commands = {}
    for name, peer in record["peers"].items():
        kinds = {name: peer["kind"]}
        if peer["kind"] == "llama.cpp":
            kinds[f"{name} plain"] = "llama.cpp-plain"
        for title, kind in kinds.items():
            side = [record["python"], str(HERE / "cpu_peer_side.py"), kind]
            model = str(peers / peer["model"])
            commands[title] = [*side, model, str(tokens), "--threads", str(threads)]
    return commands


def plot(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    """Bars of the speeds, native = 1, one panel for each number of threads and thing measured."""
    panels = [row for row in rows if row["what"] in SPEEDS]
    names = list(dict.fromkeys(name for row in panels for name in row["tokens"]))
    high, wide, left = 16 * len(names) + 46, 420, 170
    parts = [f'<text x="10" y="20" font-weight="bold">{escape(title)}</text>']
    for number, row in enumerate(panels):
        y = 50 + number * high
        what = row["what"].removesuffix("_tokens_per_second").replace("_", " ")
        parts.append(f'<text x="10" y="{y - 6}">{what}, {row["threads"]} threads, tokens/s</text>')
        most = max(values[0] for values in row["tokens"].values())
        for index, name in enumerate(names):
            if name not in row["tokens"]:
                continue
            value, at = row["tokens"][name][0], y + 16 * index
            colour = "#1b6ca8" if name == NATIVE else "#b8860b"
            parts.append(f'<text x="{left - 6}" y="{at + 11}" text-anchor="end">{name}</text>')
            parts.append(
                f'<rect x="{left}" y="{at}" width="{value / most * wide:.1f}" height="13" '
                f'fill="{colour}"/>'
            )
            parts.append(
                f'<text x="{left + value / most * wide + 5:.1f}" y="{at + 11}">{value:.0f}</text>'
            )
    size = f'width="{left + wide + 70}" height="{60 + high * len(panels)}"'
    path.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="12">\n'
        '<rect width="100%" height="100%" fill="white"/>\n' + "\n".join(parts) + "\n</svg>\n",
        encoding="utf-8",
    )


def settings(out: Path) -> dict[str, Any]:
    """What model.json says about the export, without long lists."""
    card = json.loads((out / "onnx" / "model.json").read_text(encoding="utf-8"))
    return {name: value for name, value in card.items() if len(json.dumps(value)) < 300}


def main() -> None:
    """Check, measure in turn, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--peers", type=Path)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--label", default="model")
    parser.add_argument("--no-bodies", action="store_true")
    parser.add_argument("--no-record", action="store_true")
    parser.add_argument("--one", choices=(NATIVE, BODIES), help=argparse.SUPPRESS)
    parser.add_argument("--check", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.out, args.one, args.check)))
        return
    own = (NATIVE,) if args.no_bodies else (NATIVE, BODIES)
    losses = {}
    for runner in own:
        checked = child(own_command(args.out, runner, "--check"), max(args.threads))
        if isinstance(checked, str):
            sys.exit(f"{runner}: {checked}")
        losses[runner] = np.array(checked["losses"])
    gap = losses[NATIVE] - losses[own[-1]]
    # Roundings between 16-bit nodes differ, which turns single codes of later activations.
    chance = 3 * float(gap.std()) / len(gap) ** 0.5
    if abs(gap.mean()) > max(LARGEST_GAP, chance):
        sys.exit(f"the runners predict differently: by {gap.mean():.3f} nats a token")
    rows: list[dict[str, Any]] = []
    left_out: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        tokens = Path(folder) / "tokens.json"
        tokens.write_text(json.dumps(default_ids(args.out, NATIVE)[0].tolist()), encoding="utf-8")
        for threads in args.threads:
            commands = {runner: own_command(args.out, runner) for runner in own}
            if args.peers:
                commands |= peer_commands(args.peers, tokens, threads)
            rows += compare(commands, threads, args.rounds, left_out)
    if args.no_record:
        return
    import onnxruntime

    record = {
        "command": command_on("cpu.py", args.out),
        "instruction_set": os.environ.get("ANYBIT_CPU", "") or "the best",
        "onnxruntime": onnxruntime.__version__,
        "model": settings(args.out),
        "loss": {runner: round(float(each.mean()), 4) for runner, each in losses.items()},
        "left_out": left_out,
        "rows": rows,
    }
    path = write_result(args.label, record)
    date = datetime.date.today().isoformat()
    plot(rows, f"{processor()}, {args.label}, {date}", path.with_suffix(".svg"))


def compare(
    commands: dict[str, list[str]], threads: int, rounds: int, left_out: dict[str, str]
) -> list[dict[str, Any]]:
    """Rows of all commands, run in turn; those that fail go to `left_out`."""
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in commands}
    for _ in range(rounds):
        for name, command in commands.items():
            if name in left_out:
                continue
            found = child(command, threads)
            if isinstance(found, str):
                left_out[name] = found
                print(f"{name}: left out, {found}", flush=True)
            else:
                runs[name].append(found)
    runs = {name: found for name, found in runs.items() if len(found) == rounds}
    rows = []
    for what in runs[NATIVE][0]:
        values = {name: [run[what] for run in found] for name, found in runs.items()}
        row = {
            "threads": threads,
            "what": what,
            "tokens" if what in SPEEDS else "values": {
                name: spread(v, 3) for name, v in values.items()
            },
        }
        text = f"{threads} threads  {what.removesuffix('_tokens_per_second'):16}"
        text += "".join(f"  {name} {statistics.median(v):.1f}" for name, v in values.items())
        peers = {name: v for name, v in values.items() if name not in (NATIVE, BODIES)}
        if what in SPEEDS and peers:
            best = max(peers, key=lambda name: statistics.median(peers[name]))
            ratios = [a / b for a, b in zip(values[NATIVE], peers[best], strict=True)]
            row |= {"best_peer": best, "against_best_peer": round(statistics.median(ratios), 3)}
            text += f"  = x {row['against_best_peer']:.2f} of {best}"
        rows.append(row)
        print(text, flush=True)
    return rows


if __name__ == "__main__":
    main()
