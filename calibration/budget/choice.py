"""Picks the bits of every GEMM node under an average-bits budget, from what each choice is expected
to cost in loss.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from calibration import formats
from calibration.blocks.ranks import ALONE, Ranks
from calibration.methods import find_method
from calibration.out.files import write_json
from calibration.out.fingerprint import (
    CALIBRATION_CODE,
    code_digest,
    digest,
    method_digest,
    package_versions,
    text_digest,
)
from calibration.out.json_file import read_record
from calibration.quant.bits import Rule, SchemeMap
from calibration.quant.scheme import FLOAT_BITS, QuantScheme
from calibration.quant.sizes import node_bits, node_weights
from calibration.settings import CalibrationSettings
from plugins.errors import InputError

if TYPE_CHECKING:
    from calibration.checkpoints.checkpoint import Checkpoint
    from calibration.progress import Progress

__all__ = ["Budget", "allocate", "bits_within", "candidates", "schemes_within"]

# Not 1, which is beyond second order, nor W2*, whose 5 levels take the 3 planes of W3's 8.
_WBITS = range(2, 9)
# At most: sums over all weights of a node settle long before a calibration does.
_WINDOWS, _SEQLEN = 8, 512

Option = tuple[int, float]  # bits, cost


@dataclass(frozen=True)
class Budget:
    """What to choose from, and how much of it.

    Attributes:
        bits: per weight of the linears on average, at most; scales and zero points count, as in
            quant.json's bits_per_weight, which counts a quantized head too.
        base: the scheme whose method, activation bits and groups every choice keeps.
        settings: of the calibration; the measurement takes windows of the same text, but fewer and
            shorter ones.
        format: of calibration.formats; only what it can say is chosen.
        offline: never touch the network.
        cache: JSON file that keeps the measurement.
        resume: take it from there if it is of the same model, settings and code.
        ranks: the processes that share the measurement.
        head_bits, head_limit: as of SchemeMap; the head is beside the budget.
    """

    bits: float
    base: QuantScheme
    settings: CalibrationSettings
    format: str
    offline: bool
    cache: Path
    resume: bool
    ranks: Ranks = ALONE
    head_bits: int = FLOAT_BITS
    head_limit: float | None = None


def candidates(base: QuantScheme, format_name: str = formats.OURS) -> tuple[QuantScheme, ...]:
    """The base and all other weight bits that the format can say, with the base's activation bits
    and groups.
    """
    group = f"-g{base.group_size}" if base.group_size else ""
    found = dict.fromkeys(
        (base, *(Rule("*", f"w{bits}a{base.abits}{group}").scheme(base) for bits in _WBITS))
    )
    return tuple(scheme for scheme in found if _can_say(format_name, scheme))


def _can_say(format_name: str, scheme: QuantScheme) -> bool:
    try:
        formats.check(format_name, scheme)
    except InputError:
        return False
    return True


def _choices(budget: Budget) -> tuple[QuantScheme, ...]:
    """The candidates whose codes the method makes."""
    method = find_method(budget.base.method, budget.settings.method_file)
    return tuple(filter(method.makes, candidates(budget.base, budget.format)))


def _weights(checkpoint: Checkpoint) -> int:
    return sum(node_weights(site.linears) for site in checkpoint.decoder.sites.values())


def _sizes(checkpoint: Checkpoint, schemes: Sequence[QuantScheme]) -> list[list[int]]:
    """Bits of each node in each scheme."""
    return [
        [node_bits(site.linears, scheme) for scheme in schemes]
        for site in checkpoint.decoder.sites.values()
    ]


def bits_within(checkpoint: Checkpoint, budget: Budget) -> int:
    """Bits for all nodes of a model together.

    Raises:
        InputError: fewer than the smallest choice everywhere takes, or more than the largest.
    """
    sizes, weights = _sizes(checkpoint, _choices(budget)), _weights(checkpoint)
    bits = math.floor(budget.bits * weights)
    least, most = sum(map(min, sizes)), sum(map(max, sizes))
    low, high = (math.ceil(100 * total / weights) / 100 for total in (least, most))
    if bits < least or budget.bits > high:
        raise InputError(
            "--budget",
            f"got {budget.bits:g} bits per weight, expected {low:.2f} to {high:.2f} for this model, "
            "scales and zero points included",
            "Choose a budget in between",
        )
    return bits


def schemes_within(checkpoint: Checkpoint, budget: Budget, progress: Progress) -> SchemeMap:
    """The schemes of least expected loss within the budget: a rule for every node that does not
    keep the base.

    Raises:
        InputError: the budget is outside of what the choices give, or the calibration text is
            missing or empty.
    """
    schemes = _choices(budget)
    room, sizes = bits_within(checkpoint, budget), _sizes(checkpoint, schemes)
    costs = _costs(checkpoint, budget, schemes, progress)
    nodes, weights = checkpoint.decoder.nodes, _weights(checkpoint)
    options = [
        list(zip(size, costs[node], strict=True)) for node, size in zip(nodes, sizes, strict=True)
    ]
    chosen = allocate(options, room)
    rules = tuple(
        Rule(node, schemes[at].label, "--budget")
        for node, at in zip(nodes, chosen, strict=True)
        if schemes[at] != budget.base
    )

    def total(choice: Sequence[int]) -> str:
        bits, cost = (
            sum(parts)
            for parts in zip(
                *(node[at] for node, at in zip(options, choice, strict=True)), strict=True
            )
        )
        return (
            f"{bits / weights:.3f} bits per weight, expected rise in loss {cost:.4f} nats per token"
        )

    everywhere = [schemes.index(budget.base)] * len(nodes)
    progress.message(
        f"budget {budget.bits:g}: {total(chosen)}; {len(rules)} of {len(nodes)} nodes differ "
        f"from {budget.base.label}, "
        f"which everywhere would be {total(everywhere)}"
    )
    return SchemeMap(budget.base, rules, budget.head_bits, budget.head_limit)


def allocate(options: Sequence[Sequence[Option]], room: int) -> list[int]:
    """One option per node, of least total cost within `room` bits: the number of each node's
    option.

    From the fewest bits of every node, the step that saves most cost per bit of all that still fit
    is taken until none is left. As long as all fit, the steps follow each node's lower convex hull,
    whose totals are optimal for their size (the Lagrangian of the problem); the last ones fill the
    room that is left. What it costs above the optimum is less than one step saves.

    Args:
        options: (bits, cost) of each node's options.
        room: bits for all nodes together, at least the sum of the fewest.
    """
    chosen = [min(range(len(node)), key=node.__getitem__) for node in options]
    room -= sum(node[at][0] for node, at in zip(options, chosen, strict=True))
    while True:
        steps = [
            ((node[at][1] - cost) / (bits - node[at][0]), number, choice)
            for number, (node, at) in enumerate(zip(options, chosen, strict=True))
            for choice, (bits, cost) in enumerate(node)
            if 0 < bits - node[at][0] <= room
        ]
        saving, number, choice = max(steps, default=(0.0, 0, 0))
        if saving <= 0:
            return chosen
        room -= options[number][choice][0] - options[number][chosen[number]][0]
        chosen[number] = choice


class _Measured(TypedDict):
    """What the cache of measurements holds."""

    fingerprint: str
    costs: dict[str, list[float]]


def _costs(
    checkpoint: Checkpoint, budget: Budget, schemes: tuple[QuantScheme, ...], progress: Progress
) -> dict[str, list[float]]:
    """{node: nats per token of each scheme}: measured, or as an earlier run did."""
    settings = replace(
        budget.settings,
        nsamples=min(budget.settings.nsamples, _WINDOWS),
        seqlen=min(budget.settings.seqlen, _SEQLEN),
    )
    stamp = digest(
        checkpoint.stamp(),
        [scheme.as_dict() for scheme in schemes],
        settings.stamp(checkpoint),
        text_digest(settings.calib),
        code_digest(*CALIBRATION_CODE),
        method_digest(settings.method_file),
        package_versions(("torch", "numpy")),
    )
    if budget.resume and budget.cache.is_file():
        with suppress(InputError):  # a damaged one is measured again
            found = read_record(budget.cache, _Measured)
            if found["fingerprint"] == stamp:
                progress.message("budget: measured before, nothing changed")
                return found["costs"]

    from calibration.budget.sensitivity import Measurement, measure
    from calibration.data import calibration_windows

    windows, _ = calibration_windows(
        checkpoint.tokenizer(),
        settings,
        int(checkpoint.config.max_position_embeddings),
        checkpoint.decoder.vocab,
        budget.offline,
    )
    costs = measure(
        Measurement(checkpoint, settings, schemes, windows, budget.cache.parent, budget.ranks),
        progress,
    )
    if budget.ranks.first:
        write_json(budget.cache, {"fingerprint": stamp, "costs": costs})
    return costs
