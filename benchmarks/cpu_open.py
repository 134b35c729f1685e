"""How long an artifact takes to open with native kernels, and what memory it then has.

python benchmarks/cpu_open.py OUT [--label NAME]

In a process of its own, after everything is imported: seconds to open the session and to run a first
prompt of 16 tokens and one more token; and memory of the process by then, apart from what it had
before: anonymous (its own), and mapped from files (shared with the system's file cache, and free to
be dropped). `more_than_weights` is what there is of both together beyond the size of the data file.
Writes benchmarks/results/<processor>-<date>-open-<label>.json and prints it. A large model:
    python benchmarks/random_model.py FOLDER --like llama-7b
    python -m exporter FOLDER --wbits 4 --abits 8 --method rtn --until onnx --offline --out OUT
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from cpu_peer_side import memory
from result_file import write_result

HERE = Path(__file__).resolve().parent


def measure(out: Path) -> dict[str, Any]:
    """Open, run, and look at the memory after each."""
    import onnx  # noqa: F401  (a session imports it)
    import onnxruntime

    from calibration.out.layout import DATA_FILE
    from exporter.run.model import find_model
    from exporter.run.native import native_library

    model = find_model(out, "native")
    native_library()
    path = model.folder.path / DATA_FILE
    verified = time.perf_counter()
    model.folder.file(DATA_FILE)  # its hash; open() does not compute it again
    verified = time.perf_counter() - verified
    before = memory()

    def more() -> dict[str, float]:
        now = memory()
        return {name: round(now[name] - before[name], 1) for name in now}

    began = time.perf_counter()
    session = model.open()
    opened, at_open = time.perf_counter() - began, more()
    began = time.perf_counter()
    session.run(np.arange(1, 17, dtype=np.int64)[None], last_only=True)
    session.run(np.array([[17]], np.int64), last_only=True)
    first, at_first = time.perf_counter() - began, more()
    began = time.perf_counter()
    session.run(np.array([[18]], np.int64), last_only=True)
    warm = time.perf_counter() - began
    weights = path.stat().st_size / 1e6
    return {
        "onnxruntime": onnxruntime.__version__,
        "weights_mb": round(weights, 1),
        "seconds_to_verify": round(verified, 2),
        "seconds_to_open": round(opened, 2),
        "seconds_to_first_tokens": round(first, 2),
        "seconds_of_a_token": round(warm, 3),
        "after_opening": at_open,
        "after_first_tokens": at_first,
        "more_than_weights": round(sum(at_first.values()) / weights - 1, 3),
    }


def main() -> None:
    """Measure in a new process."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--label", default="model")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        sys.path.insert(0, str(HERE.parent))
        print(json.dumps(measure(args.out)))
        return
    command = [sys.executable, __file__, str(args.out), "--one"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    record = json.loads(done.stdout.splitlines()[-1])
    print(json.dumps(record, indent=1))
    write_result(f"open-{args.label}", record)


if __name__ == "__main__":
    main()
