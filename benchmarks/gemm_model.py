"""A model of the GEMM kernels: bytes, tensor-core operations and instructions of each against what
a GPU can do. Nothing is measured.

python -m benchmarks.gemm_model [--gpu h200] [--shape 8192x21760] [--results DIR]

The kernel and its shares of K are what the library itself would choose on such a GPU (the
simulation is asked). For each, the time that every resource needs if it alone mattered: device
memory, tensor cores, instructions, shared memory. The slowest is the prediction, plus a fixed cost
for the token kernel; real kernels are slower. What it is for: which resource binds, and which
target a kernel cannot reach. Writes benchmarks/results/gemm-model-<date>.json.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.gemm_cases import SCHEMES, SHAPES, TARGET_SHAPE, TOKENS, Scheme
from benchmarks.gemm_kernels import Kernels
from plugins.cli import run_cli
from plugins.tools.build import build_sim

__all__ = ["GPUS", "Gpu", "main", "predict"]

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Gpu:
    """Vendor datasheets: dense rates, boost clock.

    Attributes:
        sm: compute capability.
        multiprocessors, clock: GHz.
        bandwidth: GB/s of device memory.
        fp16, int8: TFLOP/s and TOP/s of tensor cores, fp32 accumulation.
        mma_share: part of int8 and fp16 that mma.sync reaches: on Hopper 0.63 (arXiv 2402.13499),
            elsewhere all. wgmma reaches all.
        shared: bytes of shared memory of a block.
    """

    sm: int
    multiprocessors: int
    clock: float
    bandwidth: float
    fp16: float
    int8: float
    mma_share: float
    shared: int


GPUS = {
    "a100": Gpu(80, 108, 1.41, 2039, 312, 624, 1.0, 163 << 10),
    "h100": Gpu(90, 132, 1.83, 3350, 989, 1979, 0.63, 227 << 10),
    "h200": Gpu(90, 132, 1.83, 4800, 989, 1979, 0.63, 227 << 10),
    "rtx-4090": Gpu(89, 128, 2.52, 1008, 165, 661, 1.0, 99 << 10),
    "l4": Gpu(89, 58, 2.04, 300, 121, 242, 1.0, 99 << 10),
}
TOKEN_KERNEL = 2.0  # us, an assumption: one launch whose beginning hides behind nothing
_LANES = 128  # instructions that a multiprocessor issues for one thread each, per cycle
_SHARED_BYTES = 128  # per cycle and multiprocessor
# Instructions that make 4 weights ready for the tensor core, from codes_from_planes and the QQQ
# policies (counted in the source), and the others of the main loop but for the mma and the
# fragments of tokens (counted in the SASS for sm_90a: 4 planes, QQQ per channel)
_PER_FOUR = {2: 2.25, 4: 3.5, 8: 6.0}
_CHANNEL, _GROUP = 1.5, 7.5
_REST = {
    ("ABQGemm", "int8"): 1.8,
    ("ABQGemm", "a16"): 1.8,
    ("ABQGemm", "b1"): 1.0,
    ("ABQGemm", "wgmma"): 5.1,
    ("QQQGemm", "int8"): 2.1,
    ("QQQGemm", "wgmma"): 2.4,
}
_PAIRS_TO_16_BIT = 4.0  # more for A16
_SCALES = {
    "int8": 4.0,
    "wgmma": 2.0,
}  # more for QQQ per group: scales fetched, doubled and compared with the limit


def _instructions(scheme: Scheme, family: str, columns: int, row_tiles: int) -> float:
    """Of one thread, for 4 weights, in a tile of so many columns and m16 tiles of a warp."""
    rest = _REST[scheme.op, family]
    if family in (
        "int8",
        "a16",
    ):  # a pair of mma for 8 columns and 16 x 64 weights, an ldmatrix for all row tiles
        rest += columns / 8 * (0.25 + 0.125 / row_tiles) * (2 if family == "a16" else 1)
    if family == "b1":
        return rest
    if scheme.op == "QQQGemm":
        return rest + (_GROUP + _SCALES[family] if scheme.group_size else _CHANNEL)
    planes = next(planes for planes in (2, 4, 8) if (scheme.levels - 1).bit_length() <= planes)
    if scheme.abits < 16:
        return rest + _PER_FOUR[planes]
    return rest + _PER_FOUR[max(planes, 4)] + _PAIRS_TO_16_BIT


def predict(gpu: Gpu, scheme: Scheme, shape: tuple[int, int, int], kernel: str) -> dict[str, Any]:
    """Microseconds by resource and the speed-up over fp16 cuBLAS at its own bound, for m x n x k
    and a kernel such as "int8 64x8".
    """
    m, n, k = shape
    family, rows, columns = re.fullmatch(r"(\w+) (\d+)x(\d+)", kernel).groups()  # type: ignore[union-attr]
    per_token = next(c for c in (2, 4, 8) if c >= scheme.abits) if family == "b1" else 1
    tokens, tiles = (
        int(columns) // per_token,
        -(-m * per_token // int(columns)),
    )  # of a tile, along m
    weights = n * k * scheme.weight_bits(k) / 8
    moved = weights + m * (2 * k + 2 * n) + 2 * m * k * (2 if family == "a16" else 1)
    padded = tiles * tokens
    extra = (
        8 / int(columns) if family == "int8" and not scheme.act_symmetric else 0
    )  # the fragment of ones
    rate = (
        (gpu.fp16 if family == "a16" else gpu.int8)
        * (1.0 if family == "wgmma" else gpu.mma_share)
        * 1e12
    )
    # one binary operation is an eighth of an int8 one on tensor cores that have them
    work = (
        n * k * padded * per_token * (scheme.levels - 1).bit_length() / 8
        if family == "b1"
        else n * k * padded * (1 + extra)
    )
    cycles = gpu.multiprocessors * gpu.clock * 1e9
    # weights once for each tile of tokens, tokens once for each warp (wgmma: four warps): it has so
    # many rows
    warp_rows = 64 if family == "wgmma" or scheme.op == "QQQGemm" else 32 if rows == "256" else 16
    blocks = tiles * -(-n // int(rows))
    # K of few tiles is shared out; many come in whole waves
    busy = (
        1.0
        if blocks < gpu.multiprocessors
        else blocks / (-(-blocks // gpu.multiprocessors) * gpu.multiprocessors)
    )
    shared = tiles * (
        n * k * scheme.weight_bits(k) / 8
        + n / warp_rows * k * int(columns) * (2 if family == "a16" else 1)
    )
    issued = tiles * n * k / 4 * _instructions(scheme, family, int(columns), warp_rows // 16)
    times = {
        "memory": moved / gpu.bandwidth / 1e3,
        "tensor cores": 2 * work / rate * 1e6 / busy,
        "instructions": issued / _LANES / cycles * 1e6 / busy,
        "shared memory": shared / _SHARED_BYTES / cycles * 1e6 / busy,
    }
    binding = max(times, key=lambda name: times[name])
    fp16 = max((2 * n * k + 2 * m * (n + k)) / gpu.bandwidth / 1e3, 2 * m * n * k / gpu.fp16 / 1e6)
    total = times[binding] + TOKEN_KERNEL
    return {
        "kernel": kernel,
        **{name: round(value, 2) for name, value in times.items()},
        "binding": binding,
        "us": round(total, 2),
        "fp16_us": round(fp16, 2),
        "speedup": round(fp16 / total, 2),
    }


def _main(argv: Sequence[str] | None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gemm_model",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--gpu", choices=list(GPUS), default="h200")
    parser.add_argument("--shape", choices=list(SHAPES), default=TARGET_SHAPE)
    parser.add_argument("--results", type=Path, default=HERE / "results")
    args = parser.parse_args(argv)
    gpu, (n, k) = GPUS[args.gpu], SHAPES[args.shape]
    library = str(build_sim())
    kernels = Kernels(library, "cpu")
    ctypes.CDLL(library).anybit_sim_set_device(gpu.sm, gpu.multiprocessors, gpu.shared)
    rows = []
    print(
        f"MODEL, not measured: {args.gpu}, {args.shape}; us by resource\n{'':<12} {'M':>5} "
        f"{'kernel':<12} {'memory':>8} {'tensor':>8} "
        f"{'instr':>8} {'shared':>8} {'speed-up':>9} {'target':>7}  binding"
    )
    for scheme in SCHEMES:
        for m in TOKENS:
            kernel = next(iter(kernels.tactics(scheme.op, scheme.attributes(n, k), m).values()))
            row = predict(gpu, scheme, (m, n, k), kernel)
            target = scheme.target(m)
            rows.append({"scheme": scheme.name, "m": m, "target": target, **row})
            if target is not None or m == 32:
                times = " ".join(
                    f"{row[name]:>8.1f}"
                    for name in ("memory", "tensor cores", "instructions", "shared memory")
                )
                print(
                    f"{scheme.name:<12} {m:>5} {kernel:<12} {times} {row['speedup']:>9.2f} "
                    f"{target or '':>7}  {row['binding']}"
                )
    date = datetime.date.today().isoformat()
    path = args.results / f"gemm-model-{args.gpu}-{date}.json"
    note = "a model: nothing in this file was measured"
    result = {"note": note, "date": date, "gpu": asdict(gpu), "shape": args.shape, "rows": rows}
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"written to {path}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    return run_cli(lambda: _main(argv))


if __name__ == "__main__":
    sys.exit(main())
