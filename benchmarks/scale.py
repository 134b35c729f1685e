"""What an export of a large model takes, and how that grows with its depth: nobody needs the model.

python benchmarks/scale.py WORK [--like llama-7b] [--layers 8 16 32] [--until engine] [-- OPTIONS OF THE EXPORTER]

For each number of layers a model with random weights and the published model's widths is written into
a new folder in WORK, exported, plainly rounded to W4A8 unless OPTIONS say otherwise, and taken away again. Of each
stage: seconds, the peak of the process's memory (pages of mapped files included, which the system may drop) and
bytes written. Writes benchmarks/results/<processor>-<date>-scale-<model>.json and prints a table.
WORK needs about twice the float model's size on the disk.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from random_model import SHAPES, write_model
from result_file import write_result

HERE = Path(__file__).resolve().parent


def measure(work: Path, like: str, layers: int, until: str, options: list[str]) -> dict[str, Any]:
    """Make a model, export it, and return what the manifest says of the stages."""
    model, out = work / "model", work / "out"
    write_model(model, like, layers)
    command = [sys.executable, "-m", "exporter", str(model), "--out", str(out), "--until", until]
    began = time.monotonic()
    subprocess.run([*command, "--offline", *options], cwd=HERE.parent, check=True)
    seconds = time.monotonic() - began
    manifest = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
    rows = {
        name: {
            "seconds": stage["seconds"],
            "peak_rss": stage["peak_rss"],
            "bytes": sum(file["bytes"] for file in stage["files"].values()),
        }
        for name, stage in manifest["stages"].items()
    }
    size = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    return {"layers": layers, "model_bytes": size, "seconds": round(seconds, 1), "stages": rows}


def main() -> None:
    """Measure each depth, the least first."""
    own, options = sys.argv[1:], ["--wbits", "4", "--abits", "8", "--method", "rtn"]
    if "--" in own:
        at = own.index("--")
        own, options = own[:at], own[at + 1 :]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", type=Path)
    parser.add_argument("--like", choices=SHAPES, default="llama-7b")
    parser.add_argument("--layers", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--until", choices=("quant", "onnx", "engine", "report"), default="engine")
    args = parser.parse_args(own)
    rows = []
    args.work.mkdir(parents=True, exist_ok=True)
    for layers in sorted(args.layers):
        with tempfile.TemporaryDirectory(prefix="scale-", dir=args.work) as folder:
            rows.append(measure(Path(folder).resolve(), args.like, layers, args.until, options))
        for name, stage in rows[-1]["stages"].items():
            print(
                f"{layers:3d} layers  {name:<7}{stage['seconds']:8.1f} s  "
                f"peak {stage['peak_rss'] / 1e9:6.2f} GB  written {stage['bytes'] / 1e9:6.2f} GB",
                flush=True,
            )
    command = f"python benchmarks/scale.py WORK --like {args.like} --layers {' '.join(map(str, sorted(args.layers)))} --until {args.until} -- {' '.join(options)}"
    write_result(f"scale-{args.like}", {"command": command, "rows": rows})


if __name__ == "__main__":
    main()
