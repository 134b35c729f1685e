"""What all calibrations have in common: data, seed, memory, the efforts, and how switches are read;
imports nothing heavy.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plugins.errors import InputError

if TYPE_CHECKING:
    from calibration.checkpoints.checkpoint import Checkpoint
    from calibration.quant.scheme import QuantScheme

__all__ = ["EFFORTS", "CalibrationSettings", "MethodSettings", "calibration_settings"]


@dataclass(frozen=True)
class MethodSettings:
    """The switches of a method, those of one without any; others derive their own from it.

    Each field is a --set NAME=VALUE of its default's type: bool, int, float or, with
    metadata={"choices": (...)}, one of several words.
    """

    @classmethod
    def preset(cls, effort: str, scheme: QuantScheme) -> Mapping[str, Any]:
        """The switches that --effort sets to something else than their default, for this base."""
        return {}


@dataclass(frozen=True)
class CalibrationSettings:
    """How a model is calibrated.

    Attributes:
        effort: the preset: fast, default or paper.
        calib: text file or dataset; None is the text that ships with the project.
        nsamples, seqlen: calibration windows and their tokens.
        seed: of everything random: choice of windows, rotation, order of training.
        max_memory: bytes that activations may take before they are put on the disk; None is no
            limit.
        method: the switches of the method, of the type that it declares.
        method_file: where the method is if it is not one of the package.
        max_context: most tokens of a sequence of the export, whose rotary frequencies count however
            long the windows are; None is the model's context.
    """

    effort: str = "default"
    calib: str | None = None
    nsamples: int = 64
    seqlen: int = 1024
    seed: int = 0
    max_memory: int | None = None
    method: Any = MethodSettings()
    method_file: Path | None = None
    max_context: int | None = None

    def as_dict(self) -> dict[str, Any]:
        """What the result depends on, as plain JSON: where activations are kept changes nothing,
        and a method's file counts by what is in it, as code does.
        """
        return {
            "effort": self.effort,
            "calib": self.calib or "default",
            "nsamples": self.nsamples,
            "seqlen": self.seqlen,
            "seed": self.seed,
            "switches": dataclasses.asdict(self.method),
        }

    def stamp(self, checkpoint: Checkpoint) -> list[Any]:
        """What the numbers of a model depend on: of the text nothing, which counts by what is in it,
        and of max_context the rotary frequencies.
        """
        context = self.max_context or int(checkpoint.config.max_position_embeddings)
        ropes = [rope.frequencies(rope.long(context)) for rope in checkpoint.decoder.ropes]
        return [self.as_dict() | {"calib": ""}, ropes]


EFFORTS: Mapping[str, Mapping[str, int]] = {  # how much data; a method's settings have the rest
    "fast": {"nsamples": 16, "seqlen": 512},
    "default": {"nsamples": 64, "seqlen": 1024},
    "paper": {"nsamples": 128, "seqlen": 2048},
}


def calibration_settings(
    kind: type[MethodSettings],
    scheme: QuantScheme,
    effort: str,
    switches: Iterable[str] = (),
    **given: Any,
) -> CalibrationSettings:
    """The settings of a command line.

    Args:
        kind: the settings of the scheme's method.
        scheme: of the base.
        effort: one of EFFORTS.
        switches: "name=value" for fields of `kind`.
        given: fields of CalibrationSettings that the user gave; None means not given.

    Raises:
        InputError: a switch is unknown or its value cannot be read; lists what there is.
    """
    values = dict(kind.preset(effort, scheme))
    for switch in switches:
        name, value = _parsed(switch, kind, scheme.method)
        values[name] = value
    chosen = {name: value for name, value in given.items() if value is not None}
    return CalibrationSettings(
        effort=effort, method=kind(**values), **{**EFFORTS[effort], **chosen}
    )


def _parsed(switch: str, kind: type[Any], method: str) -> tuple[str, Any]:
    name, _, text = switch.partition("=")
    known = {item.name: item for item in fields(kind)}
    where, listed = f"--set {switch}", ", ".join(known) or "none"
    if name not in known:
        raise InputError(
            where,
            f"got the switch {name!r}, expected one of {method}'s: {listed}",
            "Write --set NAME=VALUE",
        )
    choices = known[name].metadata.get("choices")
    if choices:
        if text in choices:
            return name, text
        raise InputError(
            where, f"got {text!r}, expected one of {', '.join(choices)}", "Give one of these"
        )
    default = getattr(kind(), name)
    try:
        return name, _read(text, type(default))
    except ValueError:
        expected = {
            bool: "on or off",
            int: "a whole number of at least 0",
            float: "a number of at least 0",
        }[type(default)]
        raise InputError(
            where, f"got {text!r}, expected {expected}", f"The default is {name}={_shown(default)}"
        ) from None


_SWITCH = {"on": True, "true": True, "1": True, "off": False, "false": False, "0": False}


def _read(text: str, kind: type) -> Any:
    value = _SWITCH.get(text.lower()) if kind is bool else kind(text)
    if value is None or not 0 <= value < float("inf"):
        raise ValueError
    return value


def _shown(value: Any) -> str:
    return ("off", "on")[value] if isinstance(value, bool) else str(value)
