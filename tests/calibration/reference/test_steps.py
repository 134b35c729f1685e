"""The two definitions of a decoder's steps know the same ones."""

from __future__ import annotations

from typing import get_args

from calibration.families import steps
from calibration.families.steps import Step
from calibration.reference.steps import _ACTIVATIONS, STEPS
from exporter.graph.steps import WRITERS
from plugins.pointwise.forms import ACTIVATIONS


def test_every_step_is_defined_for_torch_and_for_onnx() -> None:
    assert set(STEPS) == set(WRITERS) == set(get_args(Step))


def test_every_activation_is_defined_for_torch_and_for_onnx() -> None:
    assert set(_ACTIVATIONS) == set(ACTIVATIONS) == set(steps.ACTIVATIONS.values())
