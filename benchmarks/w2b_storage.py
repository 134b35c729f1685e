"""Weights of five levels (W2*): 3 bit planes, or 3 codes in 7 bits? Streams both from device memory
and expands them to u8 codes.

python -m benchmarks.w2b_storage [--rows 32768] [--codes 49152] [--seconds 30] [--model] [--results
DIR]

With a GPU, which needs PyTorch and nvcc: every expansion is compared with numpy, then timed;
weights cold in the second-level cache, launches in a CUDA graph, median of its replays. Writes
benchmarks/results/w2b-storage-<device>-<date>.json. Without a GPU: the same comparison in the CPU
simulation, then a model from the instructions in the machine code (benchmarks/w2b_model.py; needs
cuobjdump), written as w2b-storage-model-<date>.json. --model: the model as well where there is a
GPU. Exit code 3: wrong codes.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.w2b_model import SOURCE, model, table
from benchmarks.w2b_packing import STORAGES, Storage
from plugins.cli import run_cli, whole_number
from plugins.errors import CheckError, InputError
from plugins.tools.build import build_source

__all__ = ["Expander", "check", "main"]

HERE = Path(__file__).resolve().parent
_MULTIPLE = 24576  # codes that are whole steps in every storage
_DISTINCT_ROWS = 64  # the rows that are timed repeat these


class Expander:
    """The compiled kernels.

    Args:
        device: "cuda", or "cpu" for the simulation.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        arch = None
        if device == "cuda":
            major, minor = torch.cuda.get_device_capability()
            arch = f"{major}{minor}"
        self._library = ctypes.CDLL(str(build_source(SOURCE, arch)))

    def tensor(self, array: np.ndarray) -> torch.Tensor:
        """The words of an array on the device, int32."""
        return torch.from_numpy(np.ascontiguousarray(array).view(np.int32)).to(self.device)

    def run(
        self,
        storage: Storage,
        packed: torch.Tensor,
        against: torch.Tensor,
        out: torch.Tensor,
        stream: int = 0,
    ) -> None:
        """Enqueue one pass.

        Args:
            packed: int32 [rows, steps, parts, 32, 4].
            against: int32 [32], 4 int8 of each lane.
            out: int32 [rows] for the products of the rows with `against`, or [rows, steps, 32,
                registers] for the codes.

        Raises:
            CheckError: it returned an error code.
        """
        assert packed.shape[2:] == (storage.parts, 32, 4)
        rows, steps = packed.shape[:2]
        outputs = (out.data_ptr(), None) if out.dim() == 1 else (None, out.data_ptr())
        pointers = [
            ctypes.c_void_p(pointer)
            for pointer in (packed.data_ptr(), against.data_ptr(), *outputs)
        ]
        code = self._library.run_w2b(
            storage.name.encode(), *pointers, rows, steps, ctypes.c_void_p(stream)
        )
        if code:
            raise CheckError(
                f"w2b_storage {storage.name}",
                f"got CUDA error {code} for {rows} rows of {steps} steps, expected success",
                "Run it again with fewer rows",
            )


def _against() -> np.ndarray:
    """What the codes are multiplied with: int8 [32 lanes, 4]."""
    return np.random.default_rng(7).integers(-128, 128, (32, 4)).astype(np.int8)


def _products(codes: np.ndarray) -> np.ndarray:
    """int32 [rows] of codes [rows, steps, 32, registers, 4] with _against()."""
    product: np.ndarray = np.einsum(
        "rslgi,li->r", codes.astype(np.int64), _against().astype(np.int64)
    ).astype(np.int32)
    return product


def check(expander: Expander, storage: Storage, codes: np.ndarray, packed: np.ndarray) -> None:
    """Compare the kernels' codes and sums with numpy.

    Args:
        codes: what must come out, uint8 [rows, steps, 32, registers, 4].
        packed: what goes in, uint32 [rows, steps, parts, 32, 4].

    Raises:
        CheckError: they differ.
    """
    given, against = expander.tensor(packed), expander.tensor(_against())
    got = torch.full(codes.shape[:-1], -1, dtype=torch.int32, device=expander.device)
    sums = torch.full(codes.shape[:1], -1, dtype=torch.int32, device=expander.device)
    expander.run(storage, given, against, got)
    expander.run(storage, given, against, sums)
    wrong = np.argwhere(got.cpu().numpy().view(np.uint8).reshape(codes.shape) != codes)
    if len(wrong):
        raise CheckError(
            f"w2b_storage {storage.name}",
            f"got {len(wrong)} wrong codes of {codes.size}, the first at {wrong[0].tolist()}, "
            "expected those of numpy",
            "Report it: the expansion is wrong on this GPU",
        )
    rows = np.flatnonzero(sums.cpu().numpy() != _products(codes))
    if len(rows):
        raise CheckError(
            f"w2b_storage {storage.name}",
            f"got {len(rows)} wrong sums of {len(codes)}, the first of row {rows[0]}, "
            "expected those of numpy",
            "Report it: the streaming kernel is wrong on this GPU",
        )


def _time(
    expander: Expander, storage: Storage, codes: np.ndarray, rows: int, seconds: float
) -> dict[str, Any]:
    """A row of the result: the time of a pass over `rows` rows that repeat those of `codes`."""
    from benchmarks.gemm_timing import copies_for, time_calls

    distinct = expander.tensor(storage.pack(codes))
    one = distinct.repeat(-(-rows // len(codes)), 1, 1, 1, 1)[:rows].contiguous()
    size = one.numel() * 4
    copies = [one, *(one.clone() for _ in range(copies_for(size) - 1))]
    against, sums = (
        expander.tensor(_against()),
        torch.empty(rows, dtype=torch.int32, device=expander.device),
    )
    took = time_calls(
        lambda i, stream: expander.run(storage, copies[i % len(copies)], against, sums, stream),
        seconds,
        copies=len(copies),
    )
    if not np.array_equal(sums.cpu().numpy(), np.resize(_products(codes), rows)):
        raise CheckError(
            f"w2b_storage {storage.name}",
            "got wrong sums in the timed passes, expected those of numpy",
            "Report it",
        )
    weights = rows * codes[0].size
    return {
        "storage": storage.name,
        "bits": round(storage.bits, 3),
        **asdict(took),
        "bytes": size,
        "gb_per_s": round(size / took.median / 1e3, 1),
        "weights_per_us": round(weights / took.median, 1),
    }


def _measure(expander: Expander, args: argparse.Namespace) -> Path:
    """Time every storage; returns the result file."""
    from benchmarks.gemm_timing import gpu_facts, result_name

    facts = gpu_facts()
    result: dict[str, Any] = {
        **facts,
        "rows_of_weights": args.rows,
        "codes_of_a_row": args.codes,
        "rows": [],
    }
    print(
        f"{facts['device']}: copies at {result['copy_gb_per_s']} GB/s\n{'storage':<19} "
        f"{'us':>9} {'GB/s':>8} {'speed-up':>9}"
    )
    base = 0.0
    for storage in STORAGES:
        codes = storage.random_codes(
            min(args.rows, _DISTINCT_ROWS), args.codes // storage.step_codes, seed=3
        )
        row = _time(expander, storage, codes, args.rows, args.seconds / len(STORAGES))
        base = base or row["median"]
        row["speedup"] = round(base / row["median"], 3)
        result["rows"].append(row)
        print(
            f"{storage.label:<19} {row['median']:>9.1f} {row['gb_per_s']:>8.1f} "
            f"{row['speedup']:>9.2f}",
            flush=True,
        )
        torch.cuda.empty_cache()
    return _written(result, args.results / f"{result_name('w2b-storage', facts)}.json")


def _written(result: dict[str, Any], path: Path) -> Path:
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return path


def _main(argv: Sequence[str] | None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.w2b_storage",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--rows",
        type=whole_number(1),
        default=32768,
        help="rows of weights that are timed (default 32768)",
    )
    add(
        "--codes",
        type=whole_number(1),
        default=2 * _MULTIPLE,
        help=f"weights of a row (default {2 * _MULTIPLE}): a multiple of {_MULTIPLE}",
    )
    add("--seconds", type=whole_number(1), default=30, help="of timing, about (default 30)")
    add("--model", action="store_true", help="the model as well where there is a GPU")
    add("--results", type=Path, default=HERE / "results")
    args = parser.parse_args(argv)
    if args.codes % _MULTIPLE:
        raise InputError(
            "--codes",
            f"got {args.codes}, expected a multiple of {_MULTIPLE}",
            "Give whole steps of every storage",
        )
    if not args.results.is_dir():
        raise InputError(
            str(args.results),
            "got no such folder, expected one for the result file",
            "Create it, or leave --results out",
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    expander = Expander(device)
    for storage in STORAGES:
        codes = storage.random_codes(3, _MULTIPLE // storage.step_codes, seed=1)
        check(expander, storage, codes, storage.pack(codes))
    print(f"{len(STORAGES)} expansions compared with numpy on {device}, all right", flush=True)
    if device == "cuda":
        print(f"written to {_measure(expander, args)}")
    if device == "cpu" or args.model:
        date = datetime.date.today().isoformat()
        result = {"date": date, **model()}
        print(table(result))
        print(f"written to {_written(result, args.results / f'w2b-storage-model-{date}.json')}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    return run_cli(lambda: _main(argv))


if __name__ == "__main__":
    sys.exit(main())
