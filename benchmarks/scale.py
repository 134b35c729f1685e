"""What an export of a large model takes, and how that grows with its depth: nobody needs the model.

python benchmarks/scale.py WORK [--like llama-7b] [--layers 8 16 32] [--until engine] [-- OPTIONS OF THE EXPORTER]

For each number of layers a model with random weights and the published model's widths is written into WORK
and exported, plainly rounded to W4A8 unless OPTIONS say otherwise. Every stage runs in a process of its own;
of each: seconds, the peak of that process's memory, with pages of mapped files, which the system may drop, and
without, and bytes written. Of a calibration also the seconds of every block, and in how many pieces it ran:
"seconds" and the peaks of "quant" are those of the last one.
What a later stage does not read is deleted: WORK needs the float model's size on the disk and half as much again.
The same command goes on where it was stopped, so that it can run in pieces: finished stages stand in WORK/*.json,
and a calibration goes on with its next block. When all is done it writes
benchmarks/results/<processor>-<date>-scale-<model>.json and prints a table; OPTIONS are part of the name.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import Any

from random_model import ROUNDED, SHAPES, own_and_exporters, write_model
from result_file import write_result

HERE = Path(__file__).resolve().parent
READS = {"quant": "model", "onnx": "out/quant", "engine": "out/onnx"}  # of each stage

# The stages behind the first, alone: they read the folder before their own and no model.
CHILD = """
import sys
from pathlib import Path
from calibration.out.files import StageWriter

stage, out = sys.argv[1], Path(sys.argv[2])
with StageWriter(out, stage) as writer:
    if stage == "onnx":
        from calibration.quant.folder import read_quant
        from exporter.graph.decoder import export_onnx

        export_onnx(read_quant(out / "quant"), writer.path, max_context=2048)
    else:
        from calibration.progress import PlainProgress
        from exporter.engine.build import EngineOptions, build_engine, select_edition
        from exporter.engine.edition import prepare_parser
        from plugins.tools.build import build_library

        edition = select_edition("auto")
        prepare_parser(edition)
        options = EngineOptions(edition=edition.name, max_batch=1, max_seq=2048)
        model = out / "onnx" / "model.onnx"
        build_engine(model, build_library(), writer.path, options, PlainProgress())
print("torch" in sys.modules)
"""


class Depth:
    """The stages of a model of some layers, and what is known of them already.

    Args:
        work: where its folder and its record are.
        like: one of SHAPES.
        layers: of the model.
        options: of the exporter.
    """

    def __init__(self, work: Path, like: str, layers: int, options: list[str]) -> None:
        self.folder, self.path = work / f"{like}-{layers}", work / f"{like}-{layers}.json"
        self._like, self._options = like, options
        self.record: dict[str, Any] = {"layers": layers, "options": options, "stages": {}}
        if self.path.exists():
            self.record = json.loads(self.path.read_text(encoding="utf-8"))
        if self.record["options"] != options:
            raise SystemExit(
                f"{self.path}: made with {self.record['options']}: choose another WORK"
            )

    def run(self, until: str) -> dict[str, Any]:
        """Make what is missing; returns the record."""
        model, out = self.folder / "model", self.folder / "out"
        made: dict[str, Callable[[], dict[str, Any]]] = {
            "quant": lambda: self._quant(model, out),
            "onnx": lambda: _alone("onnx", out),
            "engine": lambda: _alone("engine", out),
        }
        stages = list(READS)[: list(READS).index(until) + 1]
        missing = [stage for stage in stages if stage not in self.record["stages"]]
        if missing and missing[0] != "quant" and not (self.folder / READS[missing[0]]).exists():
            self.record |= {"stages": {}, "block_seconds": [], "pieces": 0}  # it went no farther
        for stage in stages:
            if stage not in self.record["stages"]:
                row = made[stage]()
                row["bytes"] = _size(out / stage)
                self.record["stages"][stage] = row
                self._save()
            shutil.rmtree(self.folder / READS[stage], ignore_errors=True)
        shutil.rmtree(self.folder, ignore_errors=True)
        return self.record

    def _save(self) -> None:
        self.path.write_text(json.dumps(self.record, indent=1) + "\n", encoding="utf-8")

    def _quant(self, model: Path, out: Path) -> dict[str, Any]:
        if not model.exists():
            unfinished = self.folder / "unfinished"
            shutil.rmtree(unfinished, ignore_errors=True)
            write_model(unfinished, self._like, self.record["layers"])
            unfinished.rename(model)
        self.record["model_bytes"] = _size(model)
        blocks = self.record.setdefault("block_seconds", [])
        self.record["pieces"] = self.record.get("pieces", 0) + 1
        self._save()
        command = [
            sys.executable,
            "-m",
            "exporter",
            str(model),
            "--out",
            str(out),
            "--until",
            "quant",
        ]
        began = 0.0

        def follow(line: str) -> None:
            nonlocal began
            told = json.loads(line)
            if told["event"] == "message":
                print(told["text"], flush=True)
            if told["stage"] == "calibrate" and told["event"] in ("start", "progress"):
                if made := re.match(r"block (\d+) of .*: loss ", told.get("note", "")):
                    del blocks[int(made[1]) - 1 :]  # of a run that had to be begun again
                    blocks.append(round(told["seconds"] - began, 2))
                    self._save()
                began = told["seconds"]

        options = ["--resume", "--offline", "--progress", "json", *self._options]
        row = _measured([*command, *options], follow)
        stage = json.loads((out / "manifest.json").read_text(encoding="utf-8"))["stages"]["quant"]
        return row | {name: stage[name] for name in ("seconds", "peak_rss")}


def _alone(stage: str, out: Path) -> dict[str, Any]:
    said: list[str] = []
    row = _measured([sys.executable, "-c", CHILD, stage, str(out)], said.append)
    return row | {"torch": said[-1] == "True"}


def _measured(command: list[str], follow: Callable[[str], None]) -> dict[str, Any]:
    """Run a command; its seconds and peaks of memory, watched twenty times a second."""
    began = time.monotonic()
    process = subprocess.Popen(command, cwd=HERE.parent, stdout=subprocess.PIPE, text=True)
    peaks = {"VmHWM": 0, "RssAnon": 0}

    def watch() -> None:
        while process.poll() is None:
            for name, size in _memory(process.pid):
                peaks[name] = max(peaks.get(name, 0), size)
            time.sleep(0.05)

    watcher = Thread(target=watch)
    watcher.start()
    assert process.stdout is not None
    for line in process.stdout:
        follow(line.strip())
    watcher.join()
    if process.returncode:
        raise SystemExit(process.returncode)
    return {
        "seconds": round(time.monotonic() - began, 2),
        "peak_rss": peaks["VmHWM"],
        "peak_without_files": peaks["RssAnon"],
    }


def _memory(pid: int) -> Iterator[tuple[str, int]]:
    """The kernel's numbers of a process's memory, in bytes."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines():
            name, _, value = line.partition(":")
            if value.endswith("kB"):
                yield name, int(value.split()[0]) * 1024


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def main() -> None:
    """Measure each depth, the least first."""
    own, options = own_and_exporters()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", type=Path)
    parser.add_argument("--like", choices=SHAPES, default="llama-7b")
    parser.add_argument("--layers", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--until", choices=READS, default="engine")
    args = parser.parse_args(own)
    rows, layers = [], sorted(args.layers)
    args.work.mkdir(parents=True, exist_ok=True)
    for count in layers:
        record = Depth(args.work.resolve(), args.like, count, options).run(args.until)
        rows.append({name: value for name, value in record.items() if name != "options"})
        for name, stage in record["stages"].items():
            print(
                f"{count:3d} layers  {name:<7}{stage['seconds']:8.1f} s  "
                f"peak {stage['peak_rss'] / 1e9:6.2f} GB, {stage['peak_without_files'] / 1e9:6.2f} "
                f"without files  written {stage['bytes'] / 1e9:6.2f} GB",
                flush=True,
            )
    named = f"--like {args.like} --layers {' '.join(map(str, layers))} --until {args.until}"
    command = f"python benchmarks/scale.py WORK {named} -- {' '.join(options)}"
    words = [] if options == ROUNDED else re.findall(r"[\w.]+", " ".join(options))
    write_result("-".join(["scale", args.like, *words]), {"command": command, "rows": rows})


if __name__ == "__main__":
    main()
