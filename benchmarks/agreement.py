"""Perplexity of the torch reference against ONNX Runtime for each layout and bit pair: they must
agree within 0.5 %.

python benchmarks/agreement.py TEXT [--first 5] [--model smollm2-135m] [--only w4a8 w2ba8]
Writes benchmarks/results/agreement-<date>.json and prints a table.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

# name: (weight bits, activation bits, group size); W4A8 is QQQGemm, the others are ABQGemm
SETTINGS = {
    "qqq-w4a8": ("4", "8", "0"),
    "qqq-w4a8-g64": ("4", "8", "64"),
    "w8a8": ("8", "8", "0"),
    "w6a6": ("6", "6", "0"),
    "w4a4": ("4", "4", "0"),
    "w3a8": ("3", "8", "0"),
    "w2ba8": ("2b", "8", "0"),
}
LIMIT = 0.005


def run(*arguments: str) -> str:
    """Output of python -m ..., or an error that shows what failed."""
    done = subprocess.run(
        [sys.executable, "-m", *arguments], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(
            f"python -m {' '.join(arguments)} ended with {done.returncode}:\n{done.stderr}"
        )
    return done.stdout


def measure(name: str, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Quantise and export one setting, then evaluate it twice."""
    wbits, abits, group = SETTINGS[name]
    out = str(folder / name)
    run(
        "exporter",
        args.model,
        "--method",
        "rtn",
        "--wbits",
        wbits,
        "--abits",
        abits,
        "--group-size",
        group,
        "--out",
        out,
        "--until",
        "onnx",
        "--offline",
        "--progress",
        "none",
    )
    ppl = {
        runner: json.loads(
            run(
                "deploy",
                "eval",
                out,
                "--text",
                args.text,
                "--first",
                str(args.first),
                "--seqlen",
                "2048",
                "--runner",
                runner,
            ).splitlines()[-1]
        )["ppl"]
        for runner in ("torch", "onnxruntime")
    }
    return {**ppl, "difference": abs(ppl["onnxruntime"] / ppl["torch"] - 1)}


def main() -> int:
    """Print the table, write the result file; exit code 3 if a pair disagrees."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("text")
    parser.add_argument("--first", type=int, default=5)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--only", nargs="*", choices=list(SETTINGS), default=list(SETTINGS))
    args = parser.parse_args()
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in args.only:
            rows[name] = row = measure(name, args, Path(folder))
            print(
                f"{name:<14} torch {row['torch']:14.4f}  onnxruntime {row['onnxruntime']:14.4f}  "
                f"difference {row['difference']:.4%}",
                flush=True,
            )
    date = datetime.date.today().isoformat()
    result = {
        "date": date,
        "model": args.model,
        "text": Path(args.text).name,
        "windows": args.first,
        "seqlen": 2048,
        "machine": platform.machine(),
        "method": "rtn",
        "rows": rows,
    }
    path = Path(__file__).parent / "results" / f"agreement-{date}.json"
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"written to {path}")
    return 0 if all(row["difference"] <= LIMIT for row in rows.values()) else 3


if __name__ == "__main__":
    sys.exit(main())
