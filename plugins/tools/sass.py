"""Reads the machine code of a kernel library: resources and instructions of every kernel, and
whether they are what the kernel is for.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from plugins.errors import InputError, UserError
from plugins.tools.toolkit import find_cuda, find_program, wheel_program

__all__ = [
    "FAMILIES",
    "MOST_LIBRARY_BYTES",
    "Kernel",
    "Loop",
    "failures",
    "inspect",
    "loops",
    "table",
]

MOST_LIBRARY_BYTES = 60 << 20
REGISTER_FILE = 65_536  # registers of a multiprocessor, sm_80 to sm_120
_MATRIX = {
    "IMMA",
    "BMMA",
    "HMMA",
    "IGMMA",
    "HGMMA",
}  # tensor-core instructions, the last two are wgmma's
# Family of a kernel: (part of its C++ name, the instructions that do its work, each with the reason
# for it). A family with IGMMA is there, with its work, in sm_90a code only.
FAMILIES: dict[str, tuple[str, dict[str, str]]] = {
    "abq int8": (
        "AbqInt8<",
        {
            "IMMA": "int8 tensor cores",
            "LDGSTS.128": "16-byte asynchronous copies",
            "LDSM": "ldmatrix",
        },
    ),
    "abq b1": (
        "AbqBinary<",
        {
            "BMMA": "binary tensor cores",
            "LDGSTS.128": "16-byte asynchronous copies",
            "LDSM": "ldmatrix",
        },
    ),
    "abq a16": (
        "AbqWeightOnly<",
        {
            "HMMA": "16-bit tensor cores",
            "LDGSTS.128": "16-byte asynchronous copies",
            "LDSM": "ldmatrix",
        },
    ),
    "qqq int8": (
        "QqqInt8<",
        {
            "IMMA": "int8 tensor cores",
            "LDGSTS.128": "16-byte asynchronous copies",
            "LDS.128": "16-byte fragments",
        },
    ),
    "abq wgmma": (
        "AbqWarpgroup<",
        {
            "IGMMA": "wgmma on int8",
            "LDGSTS.128": "16-byte asynchronous copies",
            "LDSM": "ldmatrix",
            "UBLKCP": "bulk copies",
            "USETMAXREG": "registers shared out",
        },
    ),
    "qqq wgmma": (
        "QqqWarpgroup<",
        {
            "IGMMA": "wgmma on int8",
            "UBLKCP": "bulk copies",
            "LDS.64": "pairs of packed words",
            "USETMAXREG": "registers shared out",
        },
    ),
    "tokens": ("prepare_kernel<", {"LDG.128": "16-byte loads", "STG.128": "16-byte stores"}),
}


@dataclass
class Kernel:
    """One kernel of one architecture.

    Attributes:
        arch: such as "sm_80".
        name: demangled, without the parameters.
        registers: of a thread.
        stack, local, shared: bytes of a thread, of a thread, and statically of a block.
        code: bytes.
        counts: instructions by opcode; memory instructions that are 8 or 16 bytes wide also as
            OPCODE.64, OPCODE.128.
    """

    arch: str
    name: str
    registers: int = 0
    stack: int = 0
    local: int = 0
    shared: int = 0
    code: int = 0
    counts: Counter[str] = field(default_factory=Counter)

    @property
    def family(self) -> str:
        """Key of FAMILIES, or "other" for the simple kernels."""
        return next(
            (family for family, (part, _) in FAMILIES.items() if part in self.name), "other"
        )

    @property
    def threads(self) -> int:
        """Threads of a block that the name tells (32 x warps of its TileShape, and those that
        copy), else 32.
        """
        shape = re.search(r"TileShape<(\d+)", self.name)
        return (32 * int(shape[1]) if shape else 32) + 128 * ("gemm_warpgroups<" in self.name)


def _run(command: Sequence[str], where: Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(
            str(where),
            f"got exit code {done.returncode} from {command[0]} ({done.stderr.strip()[:300]}), expected 0",
            "Give a library or object file with CUDA machine code",
        )
    return done.stdout


def _cuobjdump() -> str:
    program = wheel_program("cuobjdump") or shutil.which("cuobjdump")
    if program is None:
        with suppress(InputError):  # a toolkit that is not on PATH
            program = shutil.which("cuobjdump", path=str(find_cuda().nvcc.parent))
    if program is None:
        raise InputError(
            "cuobjdump",
            "got no such program from the wheels or PATH, expected it",
            "Install it: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm",
        )
    return str(program)


def _demangled(names: list[str]) -> list[str]:
    done = subprocess.run(
        [find_program("c++filt", "binutils")],
        input="\n".join(names),
        capture_output=True,
        text=True,
        check=True,
    )
    kept = (
        re.sub(r"\(anybit::\w+\)(?=\d)|\((?!anybit::\w+\)\d).*$", "", line)
        for line in done.stdout.splitlines()
    )  # no parameters
    return [re.sub(r"^void |anybit::", "", name) for name in kept]


def _resources(text: str) -> Iterator[tuple[str, str, list[int]]]:
    """(arch, mangled name, [registers, stack, shared, local]) from cuobjdump -res-usage."""
    arch, name = "", ""
    for line in text.splitlines():
        if found := re.match(r"arch = (\S+)", line):
            arch = found[1]
        elif found := re.match(r"\s*Function (\S+):", line):
            name = found[1]
        elif found := re.match(r"\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", line):
            yield arch, name, [int(number) for number in found.groups()]


def _instructions(text: str) -> Iterator[tuple[str, str, int, str, str]]:
    """(arch, mangled name, address, opcode with modifiers, operands) from cuobjdump -sass."""
    arch, name = "", ""
    for line in text.splitlines():
        if found := re.search(r"code for (\S+)", line):
            arch = found[1]
        elif found := re.search(r"Function : (\S+)", line):
            name = found[1]
        elif found := re.match(
            r"\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]*)([^;]*)", line
        ):
            yield arch, name, int(found[1], 16), found[2], found[3]


def inspect(library: Path) -> list[Kernel]:
    """Every kernel of every architecture in a library or object file.

    Raises:
        InputError: no such file, or no cuobjdump.
        UserError: cuobjdump cannot read it.
    """
    if not library.is_file():
        raise InputError(
            str(library),
            "got no such file, expected a kernel library",
            "Build it: python -m plugins build",
        )
    program, kernels = _cuobjdump(), {}
    for arch, name, (registers, stack, shared, local) in _resources(
        _run([program, "-res-usage", str(library)], library)
    ):
        kernels[arch, name] = Kernel(arch, name, registers, stack, local, shared)
    for arch, name, address, opcode, _ in _instructions(
        _run([program, "-sass", str(library)], library)
    ):
        if (arch, name) not in kernels:
            continue
        kernel, base = kernels[arch, name], opcode.split(".")[0]
        kernel.code = address + 16
        kernel.counts[base] += 1
        for width in (".64", ".128"):
            if width in opcode:
                kernel.counts[base + width] += 1
    for kernel, name in zip(
        kernels.values(), _demangled([kernel.name for kernel in kernels.values()]), strict=True
    ):
        kernel.name = name
    return sorted(kernels.values(), key=lambda kernel: (kernel.arch, kernel.family, kernel.name))


@dataclass(frozen=True)
class Loop:
    """A loop of a kernel: the code from the target of a backward branch to the branch.

    Attributes:
        arch, kernel: as arch and name of Kernel.
        first, last: addresses of its instructions, both within.
        counts: instructions by opcode without modifiers; those of loops within it are theirs alone.
    """

    arch: str
    kernel: str
    first: int
    last: int
    counts: Counter[str]

    def within(self, other: Loop) -> bool:
        """Whether `other` holds this loop."""
        return other.first <= self.first and self.last <= other.last and other != self


def loops(library: Path) -> list[Loop]:
    """Every loop of every kernel in a library or object file, in order of code.

    Raises:
        UserError: no cuobjdump, or it cannot read the file.
    """
    code: dict[tuple[str, str], list[tuple[int, str, str]]] = {}
    for arch, mangled, address, opcode, operands in _instructions(
        _run([_cuobjdump(), "-sass", str(library)], library)
    ):
        code.setdefault((arch, mangled), []).append((address, opcode.split(".")[0], operands))
    found = []
    for ((arch, _), instructions), name in zip(
        code.items(), _demangled([name for _, name in code]), strict=True
    ):
        targets = [
            (address, re.search(r"0x([0-9a-f]+)", operands))
            for address, opcode, operands in instructions
            if opcode == "BRA"
        ]
        spans = [
            (int(target[1], 16), last)
            for last, target in targets
            if target and int(target[1], 16) < last
        ]
        counts: dict[tuple[int, int], Counter[str]] = {span: Counter() for span in spans}
        for address, opcode, _ in instructions:
            around = [span for span in spans if span[0] <= address <= span[1]]
            if around:
                counts[min(around, key=lambda span: span[1] - span[0])][opcode] += 1
        found += [Loop(arch, name, first, last, counts[first, last]) for first, last in spans]
    return found


def _has(arch: str, family: str) -> bool:
    return arch == "sm_90a" or "IGMMA" not in FAMILIES[family][1]


def failures(kernels: Sequence[Kernel], library_bytes: int = 0) -> list[str]:
    """What is wrong, one line each: a family that is missing, local memory, a missing instruction,
    registers that no block fits.
    """
    found = []
    if library_bytes > MOST_LIBRARY_BYTES:
        found.append(f"library: got {library_bytes} bytes, expected at most {MOST_LIBRARY_BYTES}")
    for arch in sorted({kernel.arch for kernel in kernels}):
        there = {kernel.family for kernel in kernels if kernel.arch == arch}
        missing = sorted(
            family for family in FAMILIES if _has(arch, family) and family not in there
        )
        found += [f"{arch}: got no kernel of family {family}, expected some" for family in missing]
    for kernel in kernels:
        where = f"{kernel.arch} {kernel.name}"
        spilled = kernel.stack + kernel.local + kernel.counts["LDL"] + kernel.counts["STL"]
        if spilled:
            found.append(
                f"{where}: got {kernel.stack} bytes of stack, {kernel.local} of local memory and "
                f"{kernel.counts['LDL'] + kernel.counts['STL']} accesses to it, expected none"
            )
        if kernel.registers * kernel.threads > REGISTER_FILE:
            found.append(
                f"{where}: got {kernel.registers} registers x {kernel.threads} threads, "
                f"expected at most {REGISTER_FILE}"
            )
        if kernel.counts["IGMMA"] and kernel.counts["WARPGROUP"] >= kernel.counts["IGMMA"]:
            found.append(
                f"{where}: got {kernel.counts['WARPGROUP']} waits and fences for "
                f"{kernel.counts['IGMMA']} IGMMA, expected fewer: "
                "the compiler lets each wait for the one before"
            )
        for opcode, reason in FAMILIES.get(kernel.family, ("", {}))[1].items():
            if not kernel.counts[opcode] and _has(kernel.arch, kernel.family):
                found.append(f"{where}: got no {opcode}, expected {reason}")
    return found


def table(kernels: Sequence[Kernel]) -> str:
    """One line for each kernel."""
    columns = ["LDGSTS.128", "LDSM", "LDS.128", "LDG.128", "STG.128", "LDL", "STL"]
    head = f"{'arch':<8} {'family':<9} {'regs':>4} {'stack':>5} {'code':>7} {'matrix':>9} "
    lines = [head + " ".join(f"{name:>10}" for name in columns) + "  kernel"]
    for kernel in kernels:
        matrix = next(
            (f"{kernel.counts[name]} {name}" for name in sorted(_MATRIX) if kernel.counts[name]),
            "-",
        )
        counts = " ".join(f"{kernel.counts[name] or '-':>10}" for name in columns)
        lines.append(
            f"{kernel.arch:<8} {kernel.family:<9} {kernel.registers:>4} {kernel.stack:>5} "
            f"{kernel.code:>7} {matrix:>9} {counts}"
            f"  {kernel.name}"
        )
    return "\n".join(lines)
