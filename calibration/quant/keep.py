"""Keeps the codes of a checkpoint that is quantized already: which scheme says them, and the arrays
of its op.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import reduce
from math import gcd
from typing import TYPE_CHECKING

import numpy as np

from calibration.checkpoints.codes import GGUF, Form, StoredLinear, affine_weights, regrouped
from calibration.methods import PLAIN_METHOD
from calibration.quant.bits import SchemeMap, head_scheme
from calibration.quant.scheme import FLOAT_BITS, KEPT, QuantScheme
from plugins import op_spec, ranked_ops
from plugins.core.op_spec import OpSpec, QuantArrays
from plugins.errors import InputError
from plugins.text import some

if TYPE_CHECKING:
    from calibration.checkpoints.checkpoint import Checkpoint
    from calibration.out.records import Dtype

__all__ = ["Keeping", "check_quantized", "kept_arrays", "kept_orders", "kept_schemes"]

_REQUANTIZE = "--requantize rounds its weights again, with --wbits and --abits"
_LEAST_GROUP = 16


@dataclass(frozen=True, kw_only=True)
class Keeping:
    """What is asked for beside the codes.

    Attributes:
        abits: of the activations; None: as the checkpoint says, else 16.
        act_symmetric: of their codes; None: as the checkpoint says, else as the op has them.
        head_bits: of a head that is stored as floats, see head_scheme; None keeps its codes where it
            has some, and leaves floats as they are.
        dtype, kv_bits: of the schemes.
    """

    abits: int | None = None
    act_symmetric: bool | None = None
    head_bits: int | None = None
    dtype: Dtype = "float16"
    kv_bits: int = FLOAT_BITS


def check_quantized(checkpoint: Checkpoint, keep: bool, requantize: bool) -> str:
    """Whether what is asked for fits a checkpoint that may be quantized already; a line for the user
    where its codes could be kept, or "".

    Raises:
        InputError: it does not, or it has to be asked for one of the two.
    """
    where, format = str(checkpoint.source.path), checkpoint.format
    if not format:
        if keep or requantize:
            raise InputError(
                "--keep" if keep else "--requantize",
                f"got a model of floats, {where}, expected a checkpoint that is quantized already",
                "Leave it out and give --wbits and --abits",
            )
        return ""
    if keep or requantize:
        return ""
    if format == GGUF:
        if not _all_coded(checkpoint):
            return ""
        return (
            "The model's weights are quantized already, and are rounded once more here. --keep "
            "instead of --wbits exports its own codes as they are, which is faster and nearer to it."
        )
    if not _all_coded(checkpoint):
        raise InputError(
            where,
            f"got a checkpoint that is quantized already ({format}), with weights that no op takes as "
            f"they are, expected --requantize",
            _REQUANTIZE,
        )
    raise InputError(
        where,
        f"got a checkpoint that is quantized already ({format}), expected --keep or --requantize",
        f"--keep exports its own codes as they are, which is the better of the two for 4 to 8 bits; "
        f"{_REQUANTIZE}",
    )


def _all_coded(checkpoint: Checkpoint) -> bool:
    """Whether every GEMM node has codes, or was left in floating point."""
    with suppress(InputError):  # a type that no op says
        parts = [_parts(checkpoint, node) for node in checkpoint.decoder.nodes]
        return any(parts)
    return False


def kept_schemes(checkpoint: Checkpoint, keeping: Keeping) -> SchemeMap:
    """The scheme of every GEMM node; the base is that of most weights. Nodes that the checkpoint has
    in floating point stay so.

    Raises:
        InputError: a linear without codes, or codes that no op says.
    """
    decoder = checkpoint.decoder
    schemes: dict[str, QuantScheme] = {}
    weights: dict[QuantScheme, int] = {}
    floats: list[str] = []
    for node, site in decoder.sites.items():
        parts = _parts(checkpoint, node)
        if not parts:
            floats.append(node)
            continue
        schemes[node] = scheme = _scheme(node, _common(node, parts), keeping)
        size = site.linears.out_features * site.linears.in_features
        weights[scheme] = weights.get(scheme, 0) + size
    if not schemes:
        raise _no_codes(checkpoint, decoder.members(floats[0])[0])
    kept_orders(checkpoint)  # that are none are refused before any work
    base = max(weights, key=lambda scheme: weights[scheme])
    own = tuple((node, scheme) for node, scheme in schemes.items() if scheme != base)
    own_head = _head(checkpoint, base, keeping)
    return SchemeMap(base, own=own, own_head=own_head, floats=tuple(floats))


def _parts(checkpoint: Checkpoint, node: str) -> list[StoredLinear]:
    """The codes of a GEMM node's linears; none where all of them are in floating point.

    Raises:
        InputError: only some of them are, or one has other numbers than codes.
    """
    members = checkpoint.decoder.members(node)
    plain = [member for member in members if checkpoint.plain(member)]
    if plain and len(plain) < len(members):
        raise InputError(
            f"{checkpoint.source.path}, {node}",
            f"got codes beside linears in floating point ({some(plain)}), expected either, because "
            "these linears are one GEMM node",
            _REQUANTIZE,
        )
    return [] if plain else [_coded(checkpoint, member) for member in members]


def _coded(checkpoint: Checkpoint, linear: str) -> StoredLinear:
    found = checkpoint.coded(linear)
    if found is None:
        raise _no_codes(checkpoint, linear)
    return found


def _no_codes(checkpoint: Checkpoint, linear: str) -> InputError:
    return InputError(
        f"{checkpoint.source.path}, {linear}",
        "got weights without codes that an op takes, expected such for --keep",
        _REQUANTIZE,
    )


def _common(node: str, parts: Sequence[StoredLinear]) -> Form:
    """The form in which all parts of a GEMM node can be said as exactly as in their own: the most
    codes, the smallest groups.

    Raises:
        InputError: there is none.
    """
    forms = list(dict.fromkeys(part.form for part in parts))
    first = parts[0].form
    if len(forms) == 1:
        return first
    told = {(form.op, form.abits, form.act_symmetric) for form in forms}
    columns = parts[0].shape[1]
    group = reduce(gcd, (form.group_size or columns for form in forms))
    if len(told) > 1 or first.op:
        raise InputError(
            f"{parts[0].where}, {node}",
            f"got linears with different settings ({some([_label(form) for form in forms])}), "
            "expected one, because these linears are one GEMM node",
            _REQUANTIZE,
        )
    codes = max((form.codes for form in forms), key=lambda codes: codes.levels)
    return replace(
        first,
        codes=codes,
        group_size=0 if group == columns else group,
        symmetric=all(form.symmetric and form.codes == codes for form in forms),
        minimum=any(form.minimum for form in forms),
    )


def _label(form: Form) -> str:
    group = f"-g{form.group_size}" if form.group_size else ""
    return f"w{form.codes.label}a{form.abits or FLOAT_BITS}{group}"


def _scheme(node: str, form: Form, keeping: Keeping) -> QuantScheme:
    abits = keeping.abits or form.abits or FLOAT_BITS
    symmetric = keeping.act_symmetric
    if symmetric is None and keeping.abits in (None, form.abits):
        symmetric = form.act_symmetric
    if 0 < form.group_size < _LEAST_GROUP:
        raise InputError(
            node,
            f"got codes in groups of {form.group_size} input channels, expected groups of at least "
            f"{_LEAST_GROUP}",
            _REQUANTIZE,
        )
    refused = None
    for op in ranked_ops():
        scheme = QuantScheme(
            op.name,
            KEPT,
            form.codes.bits,
            abits,
            form.codes.balanced,
            form.group_size,
            (op.act_symmetric if symmetric is None else symmetric) and abits < FLOAT_BITS,
            keeping.dtype,
            keeping.kv_bits,
            form.minimum,
        )
        objection = op.objection(scheme.gemm)
        if objection is None and _says(op, scheme, form):
            return scheme
        refused = refused or objection
    raise InputError(
        node,
        f"got codes of {_label(form)}{' of ' + form.op if form.op else ''}, expected such as an op "
        f"takes with {abits} activation bits"
        + (f": {form.op} {refused[0]}" if form.op and refused else ""),
        f"Choose other --abits, or {_REQUANTIZE}",
    )


def _says(op: OpSpec, scheme: QuantScheme, form: Form) -> bool:
    """Whether an op's weights in this scheme are those of the form, to the bit."""
    if form.op:
        return op is op_spec(form.op)
    if form.minimum:  # which an op that takes the scheme has
        return True
    affine = op.affine(scheme.gemm)
    return (
        affine is not None
        and (affine.bits, affine.group_size) == (scheme.gemm.planes, form.group_size)
        and (form.symmetric or not affine.symmetric)
    )


def _head(checkpoint: Checkpoint, base: QuantScheme, keeping: Keeping) -> QuantScheme | None:
    """Of the head: that of its own codes, or of those it is to get; None leaves a float table."""
    decoder = checkpoint.decoder
    if keeping.head_bits is not None:
        wanted = head_scheme(keeping.head_bits, base)
        return wanted and replace(wanted, method=PLAIN_METHOD)
    try:
        found = checkpoint.coded(decoder.head_table())
    except InputError:  # of a type that no op says: the table is floats as well
        return None
    if found is None or found.order is not None:  # no step in front of the head reorders
        return None
    abits = 8 if base.abits < FLOAT_BITS else FLOAT_BITS  # as of every other head
    return _scheme(decoder.head.name, found.form, replace(keeping, abits=abits))


def kept_orders(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    """{GEMM node: the channel that comes to each place of its input, int32 [in_features]} of the
    nodes whose codes have an order of their own.

    Raises:
        InputError: the linears of a node have different ones.
    """
    decoder, found = checkpoint.decoder, {}
    for node in decoder.nodes:
        parts = _parts(checkpoint, node)
        orders = [part.order for part in parts] or [None]
        first = orders[0]
        if any(not _same_order(order, first) for order in orders):
            raise InputError(
                f"{parts[0].where}, {node}",
                "got linears with their input channels in different orders, expected one, because "
                "these linears are one GEMM node",
                _REQUANTIZE,
            )
        if first is not None:
            found[node] = first
    return found


def _same_order(one: np.ndarray | None, other: np.ndarray | None) -> bool:
    return one is other or (one is not None and other is not None and np.array_equal(one, other))


def kept_arrays(stored: StoredLinear, scheme: QuantScheme) -> QuantArrays:
    """The checkpoint's codes as the scheme's op stores them; its numbers are the checkpoint's.

    Raises:
        InputError: damaged tensors, or numbers that this scheme cannot say.
    """
    arrays, form = stored.read(), stored.form
    op = op_spec(scheme.op)
    if form.op:
        return arrays
    columns = stored.shape[1]
    group, smaller = form.group_size or columns, scheme.group_size or columns
    if group != smaller:
        more = {
            name: np.ascontiguousarray(regrouped(array, group, smaller, columns))
            for name, array in arrays.named().items()
            if name != "codes"
        }
        arrays = QuantArrays.of({"codes": arrays.codes, **more})
    if scheme.has_minimum and not form.minimum:
        arrays = _with_minimum(arrays, form, stored.where)
    _check_range(arrays, form, stored.where)
    return op.from_affine(arrays, scheme.gemm, stored.where)


def _check_range(arrays: QuantArrays, form: Form, where: str) -> None:
    """Refuse scales and minimums with which a weight may be no number of fp32."""
    with np.errstate(over="ignore", invalid="ignore"):
        largest = np.abs(arrays.scale) * np.float32(form.codes.levels)
        if arrays.minimum is not None:
            largest += np.abs(arrays.minimum)
    if len(bad := np.argwhere(~np.isfinite(largest))):
        raise InputError(
            where,
            f"got scales of weights beyond fp32 at {bad[0].tolist()} and {len(bad)} such in all, "
            "expected finite weights",
            "The checkpoint is damaged: download it again",
        )


def _with_minimum(arrays: QuantArrays, form: Form, where: str) -> QuantArrays:
    """Zero points as the minimums that stand beside those of another linear of the node.

    Raises:
        InputError: a weight would be another number in fp32.
    """
    assert arrays.zero is not None
    minimum = -(arrays.scale * arrays.zero.astype(np.float32))
    found = replace(arrays, zero=None, minimum=minimum)
    if not np.array_equal(affine_weights(found, form), affine_weights(arrays, form)):
        raise InputError(
            where,
            "got zero points beside minimums of other linears of one GEMM node, and scales that are "
            "too fine to say them as minimums, expected one of the two",
            _REQUANTIZE,
        )
    return found
