"""Says what of a layer that failed differs from quant/ in the ONNX file: which array of which node, or
which attribute.

Numbers show where a fault is; this shows what it is. Where nothing differs, the graph is wired
otherwise or a runtime computes something else.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from calibration.out.layout import DATA_FILE, MODEL_FILE
from exporter.graph.names import layer_of
from plugins import op_spec
from plugins.core.op_spec import is_custom

if TYPE_CHECKING:
    import onnx

    from calibration.quant.folder import QuantModel

__all__ = ["causes", "initializers", "same_bytes"]


def initializers(folder: Path, model: onnx.ModelProto) -> dict[str, np.ndarray]:
    """Every initializer of the graph in `folder`; those in the data file are mapped."""
    import onnx

    found: dict[str, np.ndarray] = {}
    for tensor in model.graph.initializer:
        if not tensor.external_data:
            found[tensor.name] = onnx.numpy_helper.to_array(tensor)
            continue
        offset = next((int(item.value) for item in tensor.external_data if item.key == "offset"), 0)
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
        found[tensor.name] = np.memmap(folder / DATA_FILE, dtype, "r", offset, tuple(tensor.dims))
    return found


def same_bytes(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two arrays are of one type and shape and hold the same bytes, NaN or not."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    mine, theirs = (
        np.ascontiguousarray(array).reshape(-1).view(np.uint8) for array in (one, other)
    )
    return np.array_equal(mine, theirs)


_COMPUTED = {  # by the last part of a tensor's name
    "key": "RoPE or the cache of keys",
    "value": "the cache of values",
    "context": "attention",
    "product": "the gate or the activation",
    "residual": "the residual sum",
    "output": "the residual sum",
    "logits": "the head",
}


def causes(
    quant: QuantModel, folder: Path, layer: int | None, operator: str, most: int = 3
) -> list[str]:
    """What differs from quant/, such as "model.layers.1.mlp.down_proj, scale: 1 of 64 values"; where
    nothing does, what is computed otherwise.

    Args:
        quant: the quant folder.
        folder: OUT/onnx.
        layer: the decoder layer to look at; None: what is outside of them.
        operator: whose result is wrong.
        most: how many are named.
    """
    layers = {layer, None} if layer == 0 else {layer}  # the embedding is judged with the first
    if found := list(islice(_differences(quant, folder, layers), most)):
        return found
    what = _COMPUTED.get(operator.rpartition(".")[2], "the operator")
    return [f"{operator}: no weight differs, {what} is computed otherwise"]


def _differences(quant: QuantModel, folder: Path, layers: set[int | None]) -> Iterator[str]:
    import onnx

    model = onnx.load(folder / MODEL_FILE, load_external_data=False)
    arrays = initializers(folder, model)
    for node in model.graph.node:
        ours = is_custom(node.domain) and node.name in quant.decoder.nodes
        if ours and layer_of(node.name) in layers:
            yield from _node_causes(quant, node, arrays)
    for name, array in arrays.items():
        if layer_of(name) in layers and quant.has(name):
            yield from _differs(name, "", quant.tensor(name), array)


def _node_causes(
    quant: QuantModel, node: onnx.NodeProto, arrays: dict[str, np.ndarray]
) -> Iterator[str]:
    import onnx

    linear = quant.fused(quant.decoder.members(node.name), node.name)
    spec, attrs = op_spec(linear.scheme.op), linear.attributes
    packed = spec.pack(linear.arrays, attrs, node.name)
    for place, key in enumerate(spec.input_names(attrs)[1:], 1):
        read = node.input[place] if place < len(node.input) else ""
        if (array := arrays.get(read)) is None:
            yield f"{node.name}, {key}: not there"
        else:
            yield from _differs(node.name, key, packed[key], array)
    found = {item.name: onnx.helper.get_attribute_value(item) for item in node.attribute}
    norm = quant.decoder.sites[node.name].norm
    if norm is not None and found.get("norm_epsilon"):  # else the norm is a node of its own
        attrs = replace(attrs, norm_epsilon=norm.epsilon)
    for key, expected in attrs.as_dict().items():
        got = found.get(key)
        same = (
            np.float32(got or 0) == np.float32(expected)
            if isinstance(expected, float)
            else got == expected
        )
        if not same:
            yield f"{node.name}, attribute {key}: {got}, not {expected}"


def _differs(name: str, key: str, expected: np.ndarray, got: np.ndarray) -> Iterator[str]:
    if same_bytes(expected, got):
        return
    what = f"{name}, {key}" if key else name
    if expected.shape != got.shape or expected.dtype != got.dtype:
        kinds = (f"{array.dtype}{list(array.shape)}" for array in (got, expected))
        yield f"{what}: {', not '.join(kinds)}"
        return
    count = int(np.count_nonzero(np.asarray(expected) != np.asarray(got)))
    kind = "words" if expected.dtype.kind in "iu" else "values"
    yield f"{what}: {count} of {expected.size} {kind}"
