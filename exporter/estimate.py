"""What an export takes of the disk and of the memory, held against what there is before any work:
nobody should learn after hours that an engine does not fit.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from calibration import formats
from calibration.out.files import folder_bytes, free_bytes
from calibration.out.layout import ENGINE, ONNX, QUANT, WORK
from calibration.quant.quantize import quant_bytes
from plugins.cores import usable_memory
from plugins.errors import InputError

if TYPE_CHECKING:
    from calibration.checkpoints.checkpoint import Checkpoint
    from calibration.families.decoder import Block
    from calibration.quant.bits import SchemeMap
    from calibration.settings import CalibrationSettings

__all__ = ["Estimate", "check_room", "estimate"]

_PROGRAM = 0.4e9  # torch, or TensorRT, before any tensor
_MOMENTS = 5.4  # matrices of a site's inputs, fp64: moments, and their factors at work; measured
_BUILDER_COPIES = 2.05  # of the weights, in TensorRT-RTX 1.7; measured by benchmarks/scale.py
_FIXES = {
    QUANT: "Give --max-memory, fewer --nsamples, or --effort fast",
    ENGINE: "Give --until onnx, and build the engine on a machine with more memory",
}


@dataclass(frozen=True)
class Estimate:
    """Bytes.

    Attributes:
        disk: most that the folder takes while the stages run.
        kept: what it takes in the end.
        memory: at the peak of a stage, pages of mapped files not counted.
    """

    disk: int
    kept: int
    memory: dict[str, int]

    def __str__(self) -> str:
        memory = ", ".join(f"{size / 1e9:.1f} for {name}" for name, size in self.memory.items())
        return (
            f"estimate: {self.disk / 1e9:.1f} GB of disk at work and {self.kept / 1e9:.1f} in the "
            f"end, GB of memory: {memory}"
        )


def estimate(
    checkpoint: Checkpoint,
    schemes: SchemeMap,
    settings: CalibrationSettings,
    stages: Collection[str],
    calibrates: bool,
    format_name: str = formats.OURS,
) -> Estimate:
    """Of the stages that are to run, with a calibration or without one; the proof has an estimate of
    its own.

    Whatever the depth, quantizing takes the largest tensor in fp32 twice. A calibration takes a block
    in fp32, its quantized self and the codes, fp64 moments of the widest input with their factors, and
    the residual streams of all windows, in the float model and in the quantized one, and of experts the
    sum of what they make, as far as --max-memory leaves them in memory; the streams are on the disk too,
    twice while those behind a block take the place of those before it. benchmarks/scale.py measures them.
    What a proof keeps to go on from is not counted: where the disk does not take it, the proof goes on.
    """
    decoder = checkpoint.decoder
    one = quant_bytes(checkpoint, schemes) // 2  # the other half are finished blocks
    copies = {QUANT: 1 if format_name == formats.OURS else 2, ONNX: 1, ENGINE: 1}
    kept = sum(copies.get(stage, 0) * one for stage in stages)
    spilled, saved, memory = 0, 0, {}
    if QUANT in stages:
        needed = 8 * max(map(prod, decoder.shapes().values()))
        if calibrates:
            # Of a mixture of experts some blocks may be dense.
            weights = max(sum(map(prod, _shapes(block))) for block in decoder.blocks)
            widest = max(shape[1] for block in decoder.blocks for shape in _shapes(block))
            moments = _MOMENTS * 8 * widest**2
            stream = 4 * settings.nsamples * settings.seqlen * decoder.hidden
            saved = 2 * 2 * stream
            streams = (3 if decoder.routers else 2) * stream
            held = min(streams, settings.max_memory or streams)
            spilled = streams - held
            needed = max(needed, 10 * weights + int(moments)) + held
        memory[QUANT] = int(_PROGRAM + needed)
    if ENGINE in stages:
        memory[ENGINE] = int(_PROGRAM + _BUILDER_COPIES * one)
    # Finished blocks, and streams, go when quant/ is whole; a stage's folder has room to spare.
    return Estimate(kept + max(one, spilled) + saved, kept, memory)


def _shapes(block: Block) -> list[tuple[int, int]]:
    return [linear.shape for linear in block.linears]


def check_room(out: Path, asked: Estimate) -> None:
    """Hold an estimate against what there is. What an interrupted calibration left is free for another
    one, which goes on with it or deletes it.

    Raises:
        InputError: too little space on the disk of `out`, or too little memory.
    """
    free = free_bytes(out) + folder_bytes(out / WORK)
    if free < asked.disk:
        raise InputError(
            str(out),
            f"got {free / 1e6:.0f} MB of free space, expected at least {asked.disk / 1e6:.0f} MB",
            "Free some space, choose another --out, or stop earlier with --until",
        )
    usable = usable_memory()
    for stage, needed in asked.memory.items():
        if usable is not None and usable < needed:
            raise InputError(
                stage,
                f"got {usable / 1e9:.1f} GB of free memory, expected {needed / 1e9:.1f} GB",
                _FIXES[stage],
            )
