"""A model of decode with five-level weights in each storage: bytes and instructions against what a
GPU can do. Nothing is measured.

Instructions are counted in machine code. Expansion: the loop of the storage's streaming kernel. The
rest of a GEMM: the main loop of "int8 64x8" (one scale per row, asymmetric activations), less its
own expansion; every loop within it counted as often as it runs in a stage. Every storage gets the
same rest. "b1 64x8", which the library takes for one token below compute capability 9.0, multiplies
planes as they are: with `planes` it expands nothing, with `planes7` it splits the planes of 7-bit
numbers; `base5` has none for it.

Logic, shifts and byte permutations share one pipe of a multiprocessor, integer multiplications have
another; each takes half of what the schedulers issue. Tensor cores and shared memory bind no decode
(benchmarks/gemm_model.py) and are left out. All resources are taken as busy to the last cycle: a
real kernel reaches less.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.gemm_model import GPUS, Gpu
from benchmarks.w2b_packing import STORAGES, Storage
from plugins.errors import UserError
from plugins.tools.build import build_source
from plugins.tools.sass import Loop, loops

__all__ = [
    "ARCHITECTURES",
    "KERNELS",
    "SOURCE",
    "Cost",
    "Kernel",
    "expansion_cost",
    "expansions",
    "model",
    "predict",
    "rest_cost",
    "table",
]

SOURCE = Path(__file__).resolve().parent / "w2b_storage.cu"
ARCHITECTURES = {80: "sm_80", 89: "sm_89", 90: "sm_90a"}  # by compute capability
# Of a multiprocessor and cycle, for one thread each: CUDA C++ Best Practices Guide, throughput of
# native arithmetic instructions, 8.0 to 9.0; the schedulers issue twice that. That the pipes work
# side by side is an assumption.
_ISSUED, _OF_A_PIPE = 128, 64
_LOGIC = {"LOP3", "SHF", "PRMT", "LEA", "IADD3", "VIADD", "ISETP", "SEL"}
_MULTIPLY = {"IMAD"}
_EXPANSION = {
    "LOP3",
    "SHF",
    "PRMT",
    "LEA",
    "IMAD",
}  # of a streaming kernel's loop; what is left loads, multiplies and counts
_GIGABYTE_WEIGHTS = 8e9 / 3  # weights of 1 GB in three planes


@dataclass(frozen=True)
class Kernel:
    """What one pass through the loops of a GEMM kernel does. A register holds 4 weights of a lane;
    planes are copied one by one.

    Attributes:
        name, part: as the library names it; of its C++ name.
        matrix: tensor core instruction of its innermost loop.
        registers: of that loop.
        times: passes of that loop in one of the loop around it, or that it is unrolled to.
        logic, multiply: instructions of its own expansion among those, by pipe.
        below_sm: the library takes it for compute capabilities below this.
    """

    name: str
    part: str
    matrix: str
    registers: int
    times: int
    logic: int = 0
    multiply: int = 0
    below_sm: int = 100


# int8: a chunk of 128 k of 16 rows; codes_from_planes<4> takes 56 for 16 registers, and the
# compiler shifts left by multiplying. b1: two steps of 256 k of 16 rows; the code for 4 planes is
# counted, of which 3 run.
KERNELS = [
    Kernel("int8 64x8", "AbqInt8<", "IMMA", 16, 4, 48, 8),
    Kernel("b1 64x8", "AbqBinary<", "BMMA", 64, 2, below_sm=90),
]
_PLANES = 3


@dataclass(frozen=True)
class Cost:
    """Instructions of one thread for 4 weights: all, those of the logic pipe, those of the
    multiplying pipe.
    """

    issued: float
    logic: float
    multiply: float

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.issued + other.issued, self.logic + other.logic, self.multiply + other.multiply
        )

    def __sub__(self, other: Cost) -> Cost:
        return Cost(
            self.issued - other.issued, self.logic - other.logic, self.multiply - other.multiply
        )

    def rounded(self) -> dict[str, float]:
        """For a result file."""
        return {name: round(value, 3) for name, value in asdict(self).items()}


def _cost(counts: Counter[str], registers: float) -> Cost:
    logic, multiply = (
        sum(count for name, count in counts.items() if name in pipe) for pipe in (_LOGIC, _MULTIPLY)
    )
    return Cost(sum(counts.values()) / registers, logic / registers, multiply / registers)


def expansion_cost(found: Sequence[Loop], arch: str, storage: Storage) -> Cost:
    """Of making u8 codes, from the loop that consumes them.

    Raises:
        UserError: the kernel's machine code holds no such loop, or does not consume each register
            once.
    """
    kernel = f"w2b::stream_kernel<w2b::{storage.name.capitalize()}>"
    mine = [
        loop for loop in found if loop.arch == arch and loop.kernel == kernel and loop.counts["IDP"]
    ]
    if len(mine) != 1 or mine[0].counts["IDP"] != storage.registers:
        consumed = [loop.counts["IDP"] for loop in mine]
        raise UserError(
            f"{kernel} on {arch}",
            f"got loops that consume {consumed} registers, expected [{storage.registers}]",
            "Count its instructions by hand: cuobjdump -sass",
        )
    return _cost(Counter({name: mine[0].counts[name] for name in _EXPANSION}), storage.registers)


def rest_cost(found: Sequence[Loop], arch: str, kernel: Kernel) -> Cost:
    """Of everything but the expansion in the main loop of a GEMM kernel.

    Raises:
        UserError: the machine code has no such loop.
    """
    mine = [
        loop
        for loop in found
        if loop.arch == arch and loop.kernel.startswith("gemm<") and kernel.part in loop.kernel
    ]
    multiply = next((loop for loop in mine if loop.counts[kernel.matrix]), None)
    unrolled = (
        multiply if multiply and multiply.counts["LDGSTS"] else None
    )  # into the loop over stages, which copies
    stage = min(
        (loop for loop in mine if multiply and multiply.within(loop)),
        key=lambda loop: loop.last - loop.first,
        default=unrolled,
    )
    if multiply is None or stage is None:
        raise UserError(
            f"{kernel.name} on {arch}",
            f"got {len(mine)} loops, expected one with {kernel.matrix} that copies or lies in "
            f"one that does",
            "Count its instructions by hand: cuobjdump -sass",
        )
    total = Counter(stage.counts)
    for loop in mine:
        if loop.within(stage):
            times = kernel.times if loop == multiply else _PLANES  # the loop over planes
            total.update({name: times * count for name, count in loop.counts.items()})
    own = Cost(kernel.logic + kernel.multiply, kernel.logic, kernel.multiply)
    of_one = Cost(*(value / kernel.registers for value in (own.issued, own.logic, own.multiply)))
    return _cost(total, kernel.times * kernel.registers) - of_one


def expansions(kernel: Kernel, of_storage: dict[str, Cost]) -> dict[str, Cost]:
    """What each storage that the kernel can read costs in it, `of_storage` being the expansions to
    u8 codes.
    """
    if kernel.matrix == "IMMA":
        return of_storage
    split = (
        of_storage["planes7"] - of_storage["planes3"]
    )  # both make codes of three planes by the same instructions
    return {"planes": Cost(0, 0, 0), "planes7": split}


def predict(gpu: Gpu, bits: float, cost: Cost) -> dict[str, Any]:
    """Microseconds by resource for the weights of 1 GB in three planes, and which binds.

    instruction_share is what the busiest of the instruction limits needs of the time that memory
    needs: from 1 on it binds, and a little below 1 a real kernel will not reach the memory's time.
    """
    cycles, registers = (
        gpu.multiprocessors * gpu.clock * 1e3,
        _GIGABYTE_WEIGHTS / 4,
    )  # cycles of a microsecond
    times = {
        "memory": _GIGABYTE_WEIGHTS * bits / 8 / gpu.bandwidth / 1e3,
        "issue": registers * cost.issued / _ISSUED / cycles,
        "logic": registers * cost.logic / _OF_A_PIPE / cycles,
        "multiply": registers * cost.multiply / _OF_A_PIPE / cycles,
    }
    binding = max(times, key=lambda name: times[name])
    return {
        **{name: round(value, 1) for name, value in times.items()},
        "binding": binding,
        "us": round(times[binding], 1),
        "instruction_share": round(
            max(times["issue"], times["logic"], times["multiply"]) / times["memory"], 3
        ),
    }


def model() -> dict[str, Any]:
    """Instruction counts and predictions for every GPU, kernel and storage.

    Raises:
        InputError: no CUDA compiler, or no cuobjdump.
        UserError: the machine code is not as expected.
    """
    found = loops(
        build_source(SOURCE, ";".join(arch.removeprefix("sm_") for arch in ARCHITECTURES.values()))
    )
    rest = {
        arch: {kernel.name: rest_cost(found, arch, kernel) for kernel in KERNELS}
        for arch in ARCHITECTURES.values()
    }
    to_codes = {
        arch: {storage.name: expansion_cost(found, arch, storage) for storage in STORAGES}
        for arch in rest
    }
    bits, rows = {storage.name: storage.bits for storage in STORAGES}, []
    for name, gpu in GPUS.items():
        arch = ARCHITECTURES[gpu.sm]
        for kernel in (kernel for kernel in KERNELS if gpu.sm < kernel.below_sm):
            costs = expansions(kernel, to_codes[arch])
            predicted = {
                storage: predict(gpu, bits[storage], cost + rest[arch][kernel.name])
                for storage, cost in costs.items()
            }
            rows += [
                {
                    "gpu": name,
                    "kernel": kernel.name,
                    "storage": storage,
                    "bits": round(bits[storage], 3),
                    **row,
                    "speedup": round(predicted["planes"]["us"] / row["us"], 3),
                }
                for storage, row in predicted.items()
            ]
    counts = {"expansion_to_codes": to_codes, "rest_of_the_gemm": rest}
    return {
        "note": "a model: nothing in this file was measured",
        "unit": "us for 2.67e9 weights, 1 GB in three planes",
        "instructions_for_4_weights": {
            what: {
                arch: {name: cost.rounded() for name, cost in costs.items()}
                for arch, costs in of_arch.items()
            }
            for what, of_arch in counts.items()
        },
        "gpus": {name: asdict(gpu) for name, gpu in GPUS.items()},
        "rows": rows,
    }


def table(result: dict[str, Any]) -> str:
    """The predictions as text."""
    labels = {storage.name: storage.label for storage in STORAGES}
    lines = [
        f"MODEL, not measured: {result['unit']}",
        f"{'GPU':<9} {'kernel':<10} {'storage':<19} "
        f"{'memory':>7} {'issue':>7} {'logic':>7} {'mult.':>7} {'busy':>5} {'speed-up':>9}  binding",
    ]
    for row in result["rows"]:
        times = " ".join(f"{row[name]:>7.1f}" for name in ("memory", "issue", "logic", "multiply"))
        shares = f"{row['instruction_share']:>5.0%} {row['speedup']:>9.2f}"
        lines.append(
            f"{row['gpu']:<9} {row['kernel']:<10} {labels[row['storage']]:<19} {times} {shares} "
            f" {row['binding']}"
        )
    return "\n".join(lines)
