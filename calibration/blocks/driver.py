"""Calibrates a model block by block: one block and the residual streams in memory, every finished
block durable.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import mean
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from calibration.blocks.forward import BlockWeights, embedded
from calibration.blocks.head import HeadMethod, HeadTask, quantise_head
from calibration.blocks.ranks import ALONE, Ranks
from calibration.blocks.saved_streams import SavedStreams
from calibration.blocks.streams import StreamBudget
from calibration.blocks.walk import Streams, WalkBlock, walk
from calibration.out.manifest import peak_rss
from calibration.progress import NullProgress, Progress, duration
from calibration.quant.scheme import LARGEST_FLOAT16
from calibration.reference.steps import Rope
from plugins.errors import InputError

if TYPE_CHECKING:
    import numpy as np

    from calibration.blocks.store import BlockResult, BlockStore
    from calibration.checkpoints.checkpoint import Checkpoint
    from calibration.families.decoder import Block
    from calibration.quant.scheme import QuantScheme
    from calibration.settings import CalibrationSettings

__all__ = ["Basis", "BlockMethod", "BlockTask", "Calibrated", "Calibration", "calibrate"]


_TIMED = 2  # blocks of a run after which it says what all of them will take


class Basis(Protocol):
    """The float model in the coordinates that are quantised."""

    @property
    def unties(self) -> bool:
        """Whether a tied head is no longer the embedding."""

    def load(self, checkpoint: Checkpoint, index: int) -> BlockWeights:
        """Weights of a block, fp32."""

    def tensor(self, checkpoint: Checkpoint, name: str) -> Tensor:
        """A tensor outside the blocks: embedding, final norm or head, fp32."""


@dataclass(frozen=True, kw_only=True)
class BlockTask:
    """One block for a method to quantise.

    Attributes:
        block: its steps.
        count: how many blocks there are.
        weights: float weights in the basis.
        rope: its position tables.
        schemes: how each site is quantised.
        streams: this process's residual streams before the block.
        settings: all settings.
        ranks: the processes that share the windows.
        windows: how many all of them have.
    """

    block: Block
    count: int
    weights: BlockWeights
    rope: Rope
    schemes: Mapping[str, QuantScheme]
    streams: Streams
    settings: CalibrationSettings
    ranks: Ranks
    windows: int

    @property
    def device(self) -> str:
        """Where the block is computed."""
        return str(self.rope.cos.device)

    @property
    def kv_bits(self) -> int:
        """Of the cache, one number for all sites."""
        return next(iter(self.schemes.values())).kv_bits


class BlockMethod(Protocol):
    """What the file of a method that looks at data defines as METHOD, or what its rounding rule
    becomes; to quantise the head it is a HeadMethod too.
    """

    def rotation(self, settings: CalibrationSettings) -> str:
        """The kind of Rotation that is folded into the weights, or "none"."""

    def basis(self, checkpoint: Checkpoint, settings: CalibrationSettings) -> Basis:
        """The coordinates to quantise in."""

    def wants_real(self, settings: CalibrationSettings) -> bool:
        """Whether it reads the float model's activations."""

    def calibrate(self, task: BlockTask) -> BlockResult:
        """Quantise a block and move its streams past it, by `walk`."""


@dataclass(frozen=True)
class Calibration:
    """What to calibrate.

    Attributes:
        checkpoint: the float model.
        method: who quantises the blocks.
        scheme_of: scheme of a linear or GEMM node by its full name.
        settings: all settings.
        windows: token ids int64 [n, L].
        store: where finished blocks, and the head behind them, go, and come from.
        ranks: the processes that share the windows.
        head: the head's scheme; None leaves it in floating point.
        head_limit: as of SchemeMap.
    """

    checkpoint: Checkpoint
    method: BlockMethod
    scheme_of: Callable[[str], QuantScheme]
    settings: CalibrationSettings
    windows: np.ndarray
    store: BlockStore
    ranks: Ranks = ALONE
    head: QuantScheme | None = None
    head_limit: float | None = None


@dataclass(frozen=True)
class Calibrated:
    """How it went.

    Attributes:
        reports: of the blocks; the same however often the run was interrupted.
        head: the report of quantise_head; None where the head was to stay as it is.
        cost: of this very run: "seconds", "peak_stream_bytes", "spilled_bytes".
    """

    reports: list[dict[str, Any]]
    head: dict[str, Any] | None
    cost: dict[str, float]


def calibrate(job: Calibration, progress: Progress | None = None) -> Calibrated:
    """Quantise every block that the store does not have yet.

    Going on begins with the streams that were saved behind the last of the blocks that it has. Where
    they are missing, blocks are walked with their finished codes, which is the same arithmetic on the
    same numbers: either gives the bits of a run that was never interrupted.

    Raises:
        InputError: fewer windows than processes, NaN in the model, or a full disk.
    """
    progress, began = progress or NullProgress(), time.monotonic()
    ranks, device = job.ranks, "cuda" if torch.cuda.is_available() else "cpu"
    if len(job.windows) < ranks.world:
        raise InputError(
            "--nsamples",
            f"got {len(job.windows)} calibration windows for {ranks.world} processes, expected "
            f"one each or more",
            "Give more windows or a longer text, or start fewer processes",
        )
    checkpoint, layers = job.checkpoint, job.checkpoint.decoder.layers
    basis = job.method.basis(checkpoint, job.settings)
    budget = StreamBudget(job.settings.max_memory, job.store.pieces.folder)
    streams, saved = (
        _rooms(job, budget, ranks, device),
        SavedStreams(job.store.pieces, ranks, progress.warning),
    )
    finished, reports = len(job.store.digests()), []
    head = _known_head(job, finished)
    if finished >= layers and (job.head is None or head is not None):
        known = layers  # nothing is left that reads streams
    elif known := saved.behind(min(finished, layers)):
        saved.load(known, streams.all)
    else:
        _embed(job, basis, streams)
    took: list[float] = []
    # those that are known take no time, and would flatter the rest
    progress.start("calibrate", layers - known)
    for index, block in enumerate(checkpoint.decoder.blocks):
        if index < known:
            reports.append(job.store.report(index))
            progress.message(_kept_line(index, layers))
            continue
        block_began = time.monotonic()
        weights = {
            name: tensor.to(device) for name, tensor in basis.load(checkpoint, index).items()
        }
        schemes = {site: job.scheme_of(block.name(site)) for site in block.sites}
        length, most = job.windows.shape[1], job.settings.max_context
        rope = Rope.of(checkpoint, length, device, block.rope, most)
        if index < finished:
            result = job.store.load(index)
            gains = {
                name: torch.from_numpy(array).to(device) for name, array in result.gains.items()
            }
            walk(
                WalkBlock(block, weights, rope, schemes, gains),
                streams,
                result.lookup,
                measure=False,
            )
        else:
            result = job.method.calibrate(
                BlockTask(
                    block=block,
                    count=layers,
                    weights=weights,
                    rope=rope,
                    schemes=schemes,
                    streams=streams,
                    settings=job.settings,
                    ranks=ranks,
                    windows=len(job.windows),
                )
            )
            if next(iter(schemes.values())).dtype == "float16":
                _check_range(block, streams, ranks)
            if ranks.first:
                job.store.save(index, result)
            ranks.wait()
        saved.save(index + 1, streams.all)
        note = _kept_line(index, layers)
        if index >= finished:
            took.append(time.monotonic() - block_began)  # with the disk's part, which may be long
            note = _line(index, layers, result.report, took)
        reports.append(result.report)
        progress.message(note)
        progress.advance(1, note)
        if len(took) == _TIMED and index + 1 < layers:
            progress.message(_estimate(took, layers - index - 1))
    if job.head is not None and head is None:
        head = _head(job, job.head, basis, streams, device)
    if head is not None:
        progress.message(_head_line(head))
    ranks.wait()  # the first one removes the store, which others may be reading still
    progress.finish()
    cost = {
        "seconds": round(time.monotonic() - began, 1),
        "peak_stream_bytes": budget.peak,
        "spilled_bytes": budget.spilled,
    }
    return Calibrated(reports, head, cost)


def _known_head(job: Calibration, finished: int) -> dict[str, Any] | None:
    """The report of the head, if it is wanted and the store has it."""
    layers = job.checkpoint.decoder.layers
    if job.head is None or finished <= layers:
        return None
    found = job.store.report(layers)
    return dict(found["head"]) if found["stamp"] == _head_stamp(job, job.head) else None


def _head_stamp(job: Calibration, scheme: QuantScheme) -> list[Any]:
    """What it alone depends on, and no block."""
    return [scheme.as_dict(), job.head_limit]


def _head(
    job: Calibration,
    scheme: QuantScheme,
    basis: Basis,
    streams: Streams,
    device: str,
) -> dict[str, Any]:
    """The report of the head, which the store has afterwards."""
    decoder, ranks = job.checkpoint.decoder, job.ranks
    assert isinstance(job.method, HeadMethod)
    gain, table = (
        basis.tensor(job.checkpoint, name).to(device)
        for name in (decoder.head.norm.gain, f"{decoder.head_table(basis.unties)}.weight")
    )
    numbers = list(ranks.share(len(job.windows)))
    result: BlockResult = quantise_head(
        job.method,
        HeadTask(
            head=decoder.head,
            index=decoder.layers,
            gain=gain,
            table=table,
            scheme=scheme,
            limit=job.head_limit,
            streams=streams,
            tokens=torch.from_numpy(job.windows[numbers]),
            numbers=numbers,
            settings=job.settings,
            ranks=ranks,
            windows=len(job.windows),
        ),
    )
    if ranks.first:
        report = {"stamp": _head_stamp(job, scheme), "head": result.report}
        kept = replace(result, report=report)
        job.store.save(decoder.layers, kept)
    ranks.wait()
    return result.report


def _head_line(report: Mapping[str, Any]) -> str:
    kept = "" if report["kept"] else ", which is too much: it stays in floating point"
    if any(value is None for value in report.values()):
        return f"head {report['bits']}: change of perplexity unknown{kept}"
    loss = report["loss_quantized"] - report["loss_float"]
    return (
        f"head {report['bits']}: {report['rise']:+.3%} perplexity by KL divergence{kept} (loss of "
        f"the text {loss:+.5f}, standard error {report['loss_error']:.5f})"
    )


def _check_range(block: Block, streams: Streams, ranks: Ranks) -> None:
    """Look whether float16, in which the model is to run, holds the residual stream."""
    peak = torch.stack([window.abs().max() for window in streams.quant]).max()
    ranks.largest(peak)
    if not peak <= LARGEST_FLOAT16:
        raise InputError(
            f"--dtype float16, {block.prefix}",
            f"got {float(peak):.3g} in the residual stream behind this layer, expected at most "
            f"{LARGEST_FLOAT16:g}",
            "Use --dtype bfloat16 or float32, which hold larger numbers",
        )


def _kept_line(index: int, layers: int) -> str:
    return f"block {index + 1} of {layers}: kept"


def _line(index: int, layers: int, report: Mapping[str, Any], took: Sequence[float]) -> str:
    loss = f"loss {report['loss_before']:.3g} -> {report['loss_after']:.3g}"
    notes = "".join(f"; {note}" for note in report.get("notes", ()))
    more = layers - index - 1
    left = f", about {duration(_left(took, more))} left" if more else ""
    return f"block {index + 1} of {layers}: {loss}{left}{notes}"


def _left(took: Sequence[float], more: int) -> float:
    """Seconds of so many more blocks. The first one of a run does things that no other has to do, and
    counts while there is no other.
    """
    return mean(took[1:] or took) * more


def _estimate(took: Sequence[float], more: int) -> str:
    """What the work still takes: the first blocks are a part of it, and are kept."""
    return (
        f"estimate: about {duration(_left(took, more))} for {more} more block{'s' * (more > 1)}, after "
        f"{' and '.join(map(duration, took))} for these; {peak_rss() / 1e9:.1f} GB of memory until now. "
        "If that is too long, stop it: --resume goes on from here"
    )


def _rooms(job: Calibration, budget: StreamBudget, ranks: Ranks, device: str) -> Streams:
    """Room for the residual streams of this process's windows."""
    count = len(ranks.share(len(job.windows)))
    size = (job.windows.shape[1], job.checkpoint.decoder.hidden)
    wants_real = job.method.wants_real(job.settings)
    real = budget.windows(count, size, device=device) if wants_real else None
    return Streams(budget.windows(count, size, device=device), real, budget, ranks)


def _embed(job: Calibration, basis: Basis, streams: Streams) -> None:
    """Fill the streams with what they are before the first block: embedded tokens."""
    decoder = job.checkpoint.decoder
    table = basis.tensor(job.checkpoint, f"{decoder.embedding.name}.weight")
    for index, number in enumerate(streams.ranks.share(len(job.windows))):
        tokens = torch.from_numpy(job.windows[number])
        for windows in streams.all:
            windows[index] = embedded(table, tokens, decoder)
