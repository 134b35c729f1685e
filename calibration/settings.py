"""Every switch of the calibration methods, with the presets of --effort; imports nothing heavy."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from plugins.errors import InputError

__all__ = [
    "EFFORTS",
    "METHOD_SETTINGS",
    "AbqSettings",
    "CalibrationSettings",
    "NoSettings",
    "QqqSettings",
    "calibration_settings",
]


@dataclass(frozen=True)
class NoSettings:
    """Of methods without switches and without data."""


@dataclass(frozen=True)
class QqqSettings:
    """QQQ (arXiv 2406.09904): smoothing or rotation, then GPTQ.

    Attributes:
        rotation: of the residual stream and the value heads: hadamard, orthogonal or none.
        smooth: adaptive smoothing at "all" four sites, at "down" only, or "none".
        gptq: round with GPTQ; off rounds to nearest.
        damp: part of the Hessian's mean diagonal that is added to it.
        act_order: GPTQ takes columns in descending order of their activations.
        clip_steps: clip ratios tried in the search for scales; 1 takes min and max.
        refits: how often scales are fitted to GPTQ's codes and the codes made again; where that is
            no better, the first stay.
        correct: 0 to 1, how far weights make up for what earlier layers and activation codes got
            wrong.
    """

    rotation: str = field(
        default="hadamard", metadata={"choices": ("hadamard", "orthogonal", "none")}
    )
    smooth: str = field(default="none", metadata={"choices": ("none", "all", "down")})
    gptq: bool = True
    damp: float = 0.01
    act_order: bool = True
    clip_steps: int = 40
    refits: int = 0
    correct: float = 1.0


@dataclass(frozen=True)
class AbqSettings(QqqSettings):
    """ABQ-LLM (arXiv 2408.08554): transforms and clips learned block by block, then the rounding of
    QqqSettings, then scales.

    Attributes:
        epochs: passes over the windows that train transforms, clips and compensation; 0 leaves them
            out.
        transforms: learn equivalent transforms (LET).
        compensation: learn a rank-1 term of down_proj in the first three and last four blocks.
        tune: passes that train weight scales and norm gains once the codes are final, in blocks
            with weights of 1 or 2 bits, where it pays; 0 leaves them.
        train_windows: calibration windows that training sees, at most.
        batch: windows per step, over all processes.
        alpha: start of the transforms, SmoothQuant's.
        transform_rate, clip_rate, compensation_rate, scale_rate, gain_rate: learning rates; 0 keeps
        a part at its start.
        loss_error, loss_direction, loss_attention: factors of the squared error, of the
            distribution correction and of the attention divergence.
    """

    refits: int = 1
    epochs: int = 0
    transforms: bool = True
    compensation: bool = True
    tune: int = 1
    train_windows: int = 16
    batch: int = 1
    alpha: float = 0.5
    transform_rate: float = 5e-3
    clip_rate: float = 1e-2
    compensation_rate: float = 1e-2
    scale_rate: float = 5e-3
    gain_rate: float = 5e-3
    loss_error: float = 1.0
    loss_direction: float = 1.0
    loss_attention: float = 1.0


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
        method: the switches of the method.
    """

    effort: str = "default"
    calib: str | None = None
    nsamples: int = 64
    seqlen: int = 1024
    seed: int = 0
    max_memory: int | None = None
    method: NoSettings | QqqSettings | AbqSettings = NoSettings()

    def as_dict(self) -> dict[str, Any]:
        """What the result depends on, as plain JSON: where activations are kept changes nothing."""
        return {
            "effort": self.effort,
            "calib": self.calib or "default",
            "nsamples": self.nsamples,
            "seqlen": self.seqlen,
            "seed": self.seed,
            "switches": dataclasses.asdict(self.method),
        }


METHOD_SETTINGS: Mapping[str, type[NoSettings | QqqSettings | AbqSettings]] = {
    "qqq": QqqSettings,
    "abq": AbqSettings,
}
_PAPER = {"rotation": "none", "clip_steps": 1, "correct": 0.0}
EFFORTS: Mapping[
    str, Mapping[str, Mapping[str, Any]]
] = {  # effort: {"data" or a method: its values}
    "fast": {"data": {"nsamples": 16, "seqlen": 512}, "abq": {"tune": 0, "refits": 0}},
    "default": {"data": {"nsamples": 64, "seqlen": 1024}},
    "paper": {
        "data": {"nsamples": 128, "seqlen": 2048},
        "qqq": _PAPER | {"smooth": "all"},
        "abq": _PAPER | {"gptq": False, "refits": 0, "epochs": 20, "tune": 0, "train_windows": 128},
    },
}


def calibration_settings(
    method: str, effort: str, switches: Iterable[str] = (), **given: Any
) -> CalibrationSettings:
    """The settings of a command line.

    Args:
        method: name of the method.
        effort: one of EFFORTS.
        switches: "name=value" for fields of the method's settings.
        given: fields of CalibrationSettings that the user gave; None means not given.

    Raises:
        InputError: a switch is unknown or its value cannot be read; lists what there is.
    """
    preset = EFFORTS[effort]
    kind = METHOD_SETTINGS.get(method, NoSettings)
    values = dict(preset.get(method, {}))
    for switch in switches:
        name, value = _parsed(switch, kind, method)
        values[name] = value
    chosen = {name: value for name, value in given.items() if value is not None}
    return CalibrationSettings(effort=effort, method=kind(**values), **{**preset["data"], **chosen})


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
