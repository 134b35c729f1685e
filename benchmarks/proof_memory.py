"""What a proof takes of the memory against the estimate in front of it.

python benchmarks/proof_memory.py OUT [--tokens N]

Runs `python -m deploy prove OUT` in a process of its own and looks at its anonymous memory twenty times a
second: pages of mapped files can be given back and do not count. Writes
benchmarks/results/<processor>-<date>-proof-memory-<name of OUT>.json.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import time
from pathlib import Path

from result_file import command_on, write_result


def anonymous(pid: int) -> int:
    """Bytes of a process that no file is behind; 0 once it has ended."""
    try:
        text = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    except OSError:
        return 0
    return 1024 * sum(map(int, re.findall(r"^Rss(?:Anon|Shmem):\s+(\d+) kB", text, re.MULTILINE)))


def main() -> None:
    """Estimate, run, write."""
    from calibration.out.layout import QUANT
    from calibration.quant.folder import read_quant
    from exporter.proof.memory import check_memory, memory_needed

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokens", type=int, default=64)
    args = parser.parse_args()
    quant = read_quant(args.out / QUANT, verify=False)
    need = memory_needed(quant.decoder, quant.weights())
    folded, floats = check_memory(quant.decoder, quant.weights())
    estimate = max(need.folded if folded else need.whole, need.floats if floats else 0)
    command = ["deploy", "prove", str(args.out), "--tokens", str(args.tokens)]
    began, peak = time.monotonic(), 0
    with subprocess.Popen(
        [sys.executable, "-m", *command, "--progress", "none"], stdout=subprocess.PIPE, text=True
    ) as process:
        while process.poll() is None:
            peak = max(peak, anonymous(process.pid))
            time.sleep(0.05)
        printed = process.stdout.read() if process.stdout else ""
    print(printed)
    if process.returncode:
        raise SystemExit(f"the proof ended with {process.returncode}: nothing was measured")
    record = {
        "command": command_on("proof_memory.py", args.out),
        "weights": int(quant.sizes["linear_weights"]),
        "scheme": quant.label,
        "bodies_folded": folded,
        "float_model": floats,
        "estimate_bytes": estimate,
        "peak_bytes": peak,
        "ratio": round(peak / estimate, 3),
        "seconds": round(time.monotonic() - began),
    }
    print(record)
    write_result(f"proof-memory-{args.out.name}", record)


if __name__ == "__main__":
    main()
