"""Checks that every op's pack() makes before it touches a layer."""

from __future__ import annotations

import numpy as np

from plugins.core.op_spec import GemmAttributes, OpSpec, QuantArrays
from plugins.errors import InputError

__all__ = ["check_attributes", "check_group", "check_norm", "check_shapes"]

_AGAIN = "Quantise the layer again"


def check_attributes(op: OpSpec, attrs: GemmAttributes, where: str) -> None:
    """The scheme must be one that the op takes, its group size and norm must fit.

    Raises:
        InputError: something does not.
    """
    objection = op.objection(attrs)
    if objection is not None:
        raise InputError(where, *objection)
    check_group(attrs, where)
    check_norm(attrs, where)


def check_group(attrs: GemmAttributes, where: str) -> None:
    """The group size must be 0 or divide in_features.

    Raises:
        InputError: it does not; lists those that do.
    """
    if attrs.in_features < 1 or attrs.out_features < 1:
        raise InputError(
            where,
            f"got a weight of {attrs.out_features} x {attrs.in_features}, expected at least 1 x 1",
            "Check the model",
        )
    if attrs.group_size < 0 or (attrs.group_size and attrs.in_features % attrs.group_size):
        fitting = [
            size for size in range(1, attrs.in_features + 1) if attrs.in_features % size == 0
        ]
        raise InputError(
            where,
            f"got group size {attrs.group_size}, expected 0 or a divisor of in_features "
            f"{attrs.in_features}",
            f"Use one of {', '.join(map(str, [0, *fitting]))}",
        )


def check_norm(attrs: GemmAttributes, where: str) -> None:
    """The norm's epsilon must be 0 or positive, as fp32.

    Raises:
        InputError: it is not.
    """
    with np.errstate(over="ignore"):
        epsilon = np.float32(attrs.norm_epsilon)
    if not 0 <= epsilon < np.inf or (attrs.norm_epsilon and not epsilon):
        raise InputError(
            where,
            f"got norm_epsilon {attrs.norm_epsilon}, expected 0 (no norm) or a positive fp32 number",
            "Check rms_norm_eps in the model's config.json",
        )


def check_shapes(
    arrays: QuantArrays, attrs: GemmAttributes, where: str, scale_columns: int
) -> None:
    """Codes, scales, minimums and bias must fit the attributes and be finite.

    Raises:
        InputError: which one does not.
    """
    shape = (attrs.out_features, attrs.in_features)
    if arrays.codes.shape != shape:
        raise InputError(
            where, f"got codes of shape {arrays.codes.shape}, expected {shape}", _AGAIN
        )
    if arrays.scale.shape != (attrs.out_features, scale_columns):
        raise InputError(
            where,
            f"got scales of shape {arrays.scale.shape}, expected "
            f"{(attrs.out_features, scale_columns)}",
            _AGAIN,
        )
    if (arrays.bias is not None) != bool(attrs.has_bias):
        got = "a" if arrays.bias is not None else "no"
        raise InputError(where, f"got {got} bias, expected has_bias={attrs.has_bias}", _AGAIN)
    if arrays.bias is not None and arrays.bias.shape != (attrs.out_features,):
        raise InputError(
            where,
            f"got a bias of shape {arrays.bias.shape}, expected {(attrs.out_features,)}",
            _AGAIN,
        )
    for name, dtype in (
        ("scale", np.float32),
        ("scale_group", np.float16),
        ("bias", np.float32),
        ("minimum", np.float32),
    ):
        values = getattr(arrays, name)
        if values is not None:
            with np.errstate(over="ignore"):
                values = values.astype(dtype)
        if values is not None and not np.isfinite(values).all():
            row = int(np.argwhere(~np.isfinite(values))[0][0])
            raise InputError(
                where,
                f"got a {name} that is NaN or inf in output channel {row}, expected finite numbers",
                _AGAIN,
            )
