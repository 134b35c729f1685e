"""What benchmarks of a processor share: the file that each leaves in benchmarks/results, and the
surroundings of the peers. Imports nothing heavy, so that a process whose memory is measured may
import it.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import shlex
import statistics
import sys
from pathlib import Path
from typing import Any

__all__ = ["command_on", "fair_environment", "processor", "spread", "write_result"]

RESULTS = Path(__file__).resolve().parent / "results"


def processor() -> str:
    """Its name, as the operating system has it."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def command_on(script: str, out: Path) -> str:
    """What was typed, with the artifact where a reader would have it, and of other paths their ends."""
    rest = [Path(word).name if word.startswith("/") else word for word in sys.argv[2:]]
    return shlex.join(["python", f"benchmarks/{script}", f"out/{out.name}", *rest])


def fair_environment() -> dict[str, str]:
    """This process's environment without what is set for OpenMP: make and this project's commands tell
    it not to spin, which slows a peer down by a third.
    """
    return {name: one for name, one in os.environ.items() if not name.startswith("OMP_")}


def spread(values: list[float], digits: int = 4) -> list[float]:
    """The median, the least and the largest, rounded."""
    return [round(one, digits) for one in (statistics.median(values), min(values), max(values))]


def write_result(label: str, record: dict[str, Any]) -> Path:
    """Write <processor>-<date>-<label>.json with the date and the processor in front of the record,
    say where, and return its path.
    """
    date = datetime.date.today().isoformat()
    path = RESULTS / f"{'-'.join(processor().lower().split()[:2])}-{date}-{label}.json"
    whole = {"date": date, "processor": processor()} | record
    path.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    print(path)
    return path
