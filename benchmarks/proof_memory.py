"""What a proof takes of the memory against the estimate in front of it, and whether it fits.

python benchmarks/proof_memory.py OUT [--tokens N] [--memory GB]
python benchmarks/proof_memory.py WORK --like llama-7b [--layers N] [--tokens N] [--memory GB] [--keep] [-- OPTIONS OF THE EXPORTER]

Runs `python -m deploy prove` in a process of its own, as on a machine with --memory GB free, and looks at its
anonymous memory twenty times a second: pages of mapped files can be given back and do not count. With --like the
artifact is of a model with random weights and a published model's shapes, made in WORK first, plainly rounded to
W4A8 unless OPTIONS say otherwise. What is finished stays when the script is stopped, and is taken up by the same
command; it goes when the proof is through, unless --keep is given. WORK needs about twice the float model's size on
the disk (LLaMA-7B: 28 GB). Writes benchmarks/results/<processor>-<date>-proof-memory-<name>.json, and ends with 3
where the peak is not within 20 % of the estimate, or beyond --memory.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from random_model import SHAPES, own_and_exporters, write_model
from result_file import command_on, write_result

HERE = Path(__file__).resolve().parent
# The proof where so many bytes are free.
PROVE = """
import sys
from deploy.__main__ import main
from exporter.proof import memory
if free := int(sys.argv[1]):
    memory.usable_memory = lambda: free
sys.exit(main(["prove", *sys.argv[2:], "--progress", "json"]))
"""


def anonymous(pid: int) -> int:
    """Bytes of a process that no file is behind; 0 once it has ended."""
    try:
        text = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    except OSError:
        return 0
    return 1024 * sum(map(int, re.findall(r"^Rss(?:Anon|Shmem):\s+(\d+) kB", text, re.MULTILINE)))


class Watch(threading.Thread):
    """Looks at a process until it has ended; `peak` is the most since it was last set to 0."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        super().__init__(daemon=True)
        self.process, self.peak = process, 0

    def run(self) -> None:
        """Look."""
        while self.process.poll() is None:
            self.peak = max(self.peak, anonymous(self.process.pid))
            time.sleep(0.05)


def prove(out: Path, tokens: int, free: int) -> dict[str, Any]:
    """Prove, say how far it is, and return the peak of each part and of all.

    Raises:
        SystemExit: it failed.
    """
    began, parts = time.monotonic(), dict[str, int]()
    command = [sys.executable, "-c", PROVE, str(free), str(out), "--tokens", str(tokens)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=HERE.parent) as process:
        watch = Watch(process)
        watch.start()
        for line in process.stdout or ():
            if not line.startswith("{"):
                print(line, end="", flush=True)
                continue
            event = json.loads(line)
            peak, watch.peak = watch.peak, 0
            what = event.get("note") or event.get("text") or event["event"]
            note = f"{event['stage']} {what}"
            parts[note] = max(parts.get(note, 0), peak)
            print(
                f"{time.monotonic() - began:7.0f} s  {event['done']:4} of {event['total']:4}  "
                f"{peak / 1e9:6.2f} GB  {note}",
                flush=True,
            )
        code = process.wait()
    if code:
        raise SystemExit(f"the proof ended with {code}: nothing was measured")
    return {
        "peak_bytes": max(*parts.values(), watch.peak),
        "parts": dict(sorted(parts.items(), key=lambda item: -item[1])[:12]),
        "seconds": round(time.monotonic() - began),
    }


def measure(out: Path, tokens: int, free: int) -> dict[str, Any]:
    """The estimate of an artifact's proof, said before it runs, and what it took."""
    from calibration.out.layout import QUANT
    from calibration.quant.folder import read_quant
    from exporter.proof import memory

    quant = read_quant(out / QUANT, verify=False)
    schemes = {node: quant.scheme_of(node) for node in quant.decoder.nodes}
    if free:
        memory.usable_memory = lambda: free  # type: ignore[assignment]
    context = int(quant.config["max_position_embeddings"])
    calls = memory.Calls.within(context, prefill=tokens)
    folded, floats, estimate = memory.check_memory(quant.decoder, schemes, calls.tokens)
    print(
        f"estimate: {estimate / 1e9:.2f} GB, function bodies {'folded' if folded else 'whole'}, "
        f"{'with' if floats else 'without'} the float model",
        flush=True,
    )
    found = prove(out, tokens, free)
    return {
        "weights": int(quant.sizes["linear_weights"]),
        "scheme": quant.label,
        "bodies_folded": folded,
        "float_model": floats,
        "memory_bytes": free,
        "estimate_bytes": estimate,
        "ratio": round(found["peak_bytes"] / estimate, 3),
        **found,
    }


def make(work: Path, like: str, layers: int | None, options: list[str]) -> Path:
    """OUT of a random model; finished steps are kept in `work`, which is of this model alone."""
    model, out = work / "model", work / "out"
    if not model.is_dir():
        part = work / "model.part"
        shutil.rmtree(part, ignore_errors=True)
        write_model(part, like, layers)
        part.rename(model)
    command = [sys.executable, "-m", "exporter", str(model), "--out", str(out), "--until", "onnx"]
    subprocess.run([*command, "--offline", "--resume", *options], cwd=HERE.parent, check=True)
    return out


def main() -> int:
    """Make what is asked for, measure, write, and take it away."""
    own, options = own_and_exporters()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, metavar="OUT or WORK")
    parser.add_argument("--like", choices=SHAPES)
    parser.add_argument("--layers", type=int, help="in place of the published model's number")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--memory", type=float, default=0.0, help="GB (default: what is free)")
    parser.add_argument("--keep", action="store_true", help="leave model and artifact in WORK")
    args = parser.parse_args(own)
    free, name = int(args.memory * 1e9), args.out.name
    try:
        out = args.out.resolve()
        if args.like:
            name = args.like + (f"-{args.layers}-layers" if args.layers else "")
            out = make(out / name, args.like, args.layers, options)
        found = measure(out, args.tokens, free)
    except KeyboardInterrupt:
        print("Interrupted; the same command goes on with what is finished.", file=sys.stderr)
        return 130
    write_result(
        f"proof-memory-{name}", {"command": command_on("proof_memory.py", args.out)} | found
    )
    if args.like and not args.keep:
        shutil.rmtree(args.out / name)
    estimate, peak = found["estimate_bytes"] / 1e9, found["peak_bytes"] / 1e9
    near = abs(found["ratio"] - 1) <= 0.2
    fits = not free or found["peak_bytes"] <= free
    print(
        f"estimate {estimate:.2f} GB, peak {peak:.2f} GB: {'within' if near else 'not within'} 20 %"
    )
    if free:
        print(f"{'fits' if fits else 'does not fit'} into {args.memory:g} GB")
    return 0 if near and fits else 3


if __name__ == "__main__":
    sys.exit(main())
