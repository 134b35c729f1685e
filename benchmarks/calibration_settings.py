"""Perplexity of the calibrated demo model at each setting, against the floors to pass; or what each
ingredient brings.

python benchmarks/calibration_settings.py settings|ablation --calib wiki.valid.detok --text
wiki.test.raw [--work DIR] [--only NAME ...]
    [--first 20] [--nsamples 32] [--seqlen 1024]

Every row is one run of `python -m calibration` in a process of its own; finished ones in --work are
kept, so it can go on. The text that is scored is never calibrated on. benchmarks/quality.py adds
agreement and divergence to any of the folders. Prints a table and writes
benchmarks/results/calibration-<set>-<date>.json.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from plugins.cli import run_cli, whole_number
from plugins.errors import CheckError

__all__ = ["ROWS", "main"]

HERE = Path(__file__).resolve().parent
FLOORS = {  # name: (options, perplexity to pass on the first 20 windows of WikiText-2 raw test)
    "w4a8": ("--wbits 4 --abits 8", 26.0),
    "w4a8-g64": ("--wbits 4 --abits 8 --group-size 64", 23.8),
    "w8a8": ("--wbits 8 --abits 8", 21.4),
    "w6a6": ("--wbits 6 --abits 6", 23.2),
    "w3a8-g64": ("--wbits 3 --abits 8 --group-size 64", 38.0),
    "w2ba8-g64": ("--wbits 2b --abits 8 --group-size 64", 60.0),
    "w4a4-g64": ("--wbits 4 --abits 4 --group-size 64", 90.0),
}
_QQQ, _W2 = FLOORS["w4a8"][0], FLOORS["w2ba8-g64"][0]
_ROUNDED = "--set rotation=none --set gptq=off --set correct=0 --set clip_steps=1"
ABLATION = {  # each row changes one thing of the row named first
    "qqq": _QQQ,
    "qqq-rtn": f"{_QQQ} --method rtn",
    "qqq-rotation=none": f"{_QQQ} --set rotation=none",
    "qqq-rotation=orthogonal": f"{_QQQ} --set rotation=orthogonal",
    "qqq-gptq=off": f"{_QQQ} --set gptq=off",
    "qqq-correct=0": f"{_QQQ} --set correct=0",
    "qqq-clip=off": f"{_QQQ} --set clip_steps=1",
    "qqq-act-order=off": f"{_QQQ} --set act_order=off",
    "qqq-smooth=all": f"{_QQQ} --set smooth=all",
    "qqq-smooth-only": f"{_QQQ} --set rotation=none --set smooth=all",
    "qqq-refits=1": f"{_QQQ} --set refits=1",
    "w2b": _W2,
    "w2b-rtn": f"{_W2} --method rtn",
    "w2b-tune=0": f"{_W2} --set tune=0",
    "w2b-refits=0": f"{_W2} --set refits=0",
    "w2b-correct=0": f"{_W2} --set correct=0",
    "w2b-epochs=5": f"{_W2} --set epochs=5",
    "w2b-paper": f"{_W2} {_ROUNDED} --set epochs=5 --set tune=0",
}
ROWS = {"settings": {name: options for name, (options, _) in FLOORS.items()}, "ablation": ABLATION}


def calibrate(out: Path, options: str, args: argparse.Namespace) -> dict[str, Any]:
    """One row: its seconds and the size of its codes. A finished folder is kept."""
    record, asked = (
        out / "row.json",
        [options, args.nsamples, args.seqlen, args.calib.name, args.model],
    )
    if not record.is_file() or json.loads(record.read_text(encoding="utf-8")).get("asked") != asked:
        command = [
            sys.executable,
            "-m",
            "calibration",
            args.model,
            *options.split(),
            "--calib",
            str(args.calib),
            "--dtype",
            "float32",
            "--head-bits",
            "16",  # what is compared are the layers
            "--offline",
            "--progress",
            "none",
            "--nsamples",
            str(args.nsamples),
            "--seqlen",
            str(args.seqlen),
            "--out",
            str(out),
        ]
        began = time.monotonic()
        done = subprocess.run([*command, "--resume"], capture_output=True, text=True, check=False)
        if done.returncode:
            raise CheckError(
                f"python -m calibration {options}",
                f"got exit code {done.returncode} ({done.stderr.strip()})",
                "See there",
            )
        meta = json.loads((out / "quant" / "quant.json").read_text(encoding="utf-8"))
        row = {
            "asked": asked,
            "options": options,
            "seconds": round(time.monotonic() - began, 1),
            "bits": meta["sizes"]["bits_per_weight"],
        }
        record.write_text(json.dumps(row) + "\n", encoding="utf-8")
    found: dict[str, Any] = json.loads(record.read_text(encoding="utf-8"))
    if "ppl" not in found:
        found["ppl"] = perplexity(out, args)
        record.write_text(json.dumps(found) + "\n", encoding="utf-8")
    return found


def perplexity(out: Path, args: argparse.Namespace) -> float:
    """Of the quantised model in fp32 arithmetic, with its activation quantisation."""
    from calibration.quant.folder import read_quant
    from calibration.reference.model import quantised_model
    from exporter.proof.perplexity import EvalRequest, score
    from exporter.run.model import find_model
    from exporter.run.reference import TorchSession

    quant = read_quant(out / "quant")
    with TorchSession(quantised_model(quant, round_activations=False)) as session:
        request = EvalRequest(args.text, first=args.first, runner="torch")
        return float(score(session, find_model(out, "torch"), request)["ppl"])


def table(rows: dict[str, dict[str, Any]]) -> str:
    """One line for each row."""
    width = max(map(len, rows))
    lines = [f"{'':<{width}}  {'bits':>6}  {'perplexity':>12}  {'floor':>6}  {'seconds':>8}"]
    for name, row in rows.items():
        forms = {"bits": ".3f", "floor": ".1f", "seconds": ".0f"}
        bits, floor, seconds = (
            format(row[key], form) if key in row else "" for key, form in forms.items()
        )
        lines.append(f"{name:<{width}}  {bits:>6}  {row['ppl']:12,.3f}  {floor:>6}  {seconds:>8}")
    return "\n".join(lines)


def _run(args: argparse.Namespace, work: Path) -> dict[str, dict[str, Any]]:
    rows: dict[str, dict[str, Any]] = {}
    for name in args.only or ROWS[args.set]:
        rows[name] = calibrate(work / name, ROWS[args.set][name], args)
        print(f"{name}: perplexity {rows[name]['ppl']:.3f}, {rows[name]['seconds']} s", flush=True)
    for name in rows if args.set == "settings" else ():
        rows[name]["floor"] = FLOORS[name][1]
    return rows


def _main(argv: Sequence[str] | None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("set", choices=list(ROWS))
    add("--calib", type=Path, required=True)
    add("--text", type=Path, required=True)
    add("--model", default="smollm2-135m")
    add("--only", nargs="+", metavar="NAME")
    add("--work", type=Path, help="keeps finished rows (default: a temporary folder)")
    add(
        "--first",
        type=whole_number(1),
        default=20,
        help="windows of 2048 tokens that are scored (default 20)",
    )
    add("--nsamples", type=whole_number(1), default=32)
    add("--seqlen", type=whole_number(2), default=1024)
    args = parser.parse_args(argv)
    asked = {"nsamples": args.nsamples, "seqlen": args.seqlen, "calib": args.calib.name}
    with tempfile.TemporaryDirectory() as folder:
        rows = _run(args, args.work or Path(folder))
    print(table(rows))
    date = datetime.date.today().isoformat()
    path = HERE / "results" / f"calibration-{args.set}-{date}.json"
    result = {
        "date": date,
        "model": args.model,
        "text": args.text.name,
        "windows": args.first,
        **asked,
        "cores": os.cpu_count(),
        "rows": rows,
    }
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"written to {path}")
    failed = [name for name, row in rows.items() if row["ppl"] > row.get("floor", float("inf"))]
    if failed:
        raise CheckError(
            "perplexity",
            f"got more than the floor for {', '.join(failed)}, expected less",
            "See the table",
        )
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    return run_cli(lambda: _main(argv))


if __name__ == "__main__":
    sys.exit(main())
