"""Where the tensors of a quant folder come from: a method that looks at weights alone, a block-wise
calibration, or a checkpoint that has codes already.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from calibration import formats
from calibration.data import calibration_windows, load_text, text_tokens
from calibration.methods import PLAIN_METHOD, Method, find_method
from calibration.out.fingerprint import (
    CALIBRATION_CODE,
    code_digest,
    digest,
    method_digest,
    package_versions,
)
from calibration.out.pieces import Pieces
from calibration.quant.keep import kept_arrays, kept_orders
from calibration.quant.options import QuantizeOptions
from calibration.quant.scheme import FLOAT_BITS
from calibration.quant.sizes import linear_specs
from plugins.core.op_spec import QuantArrays
from plugins.errors import InputError
from plugins.text import some

if TYPE_CHECKING:
    from calibration.blocks.driver import Calibrated, Calibration
    from calibration.blocks.store import BlockResult
    from calibration.checkpoints.checkpoint import Checkpoint
    from calibration.checkpoints.safetensors import TensorSpec
    from calibration.families import Decoder
    from calibration.progress import Progress
    from calibration.quant.bits import SchemeMap
    from calibration.quant.scheme import QuantScheme

__all__ = ["QuantSource", "open_source"]


class QuantSource(Protocol):
    """A quantised model, tensor by tensor.

    Attributes:
        decoder: of the result: a method may untie the head from the embedding.
        facts: how it was made, for quant.json; the same input gives the same.
        cost: time and memory that it took.
        writes: whether this process writes the folder.
        pieces: where finished files are kept, by all that they depend on but for `made_of`.
        made_of: checksums of what lies there already and goes into the tensors.
    """

    decoder: Decoder
    facts: dict[str, Any]
    cost: dict[str, float]
    writes: bool
    pieces: Pieces
    made_of: list[str]

    def rest(self, name: str) -> np.ndarray:
        """A tensor that is not quantised."""

    def linear(self, name: str, scheme: QuantScheme) -> QuantArrays:
        """A quantised linear by its Hugging Face name."""

    def order(self, node: str) -> np.ndarray:
        """Of a GEMM node's input channels, int32 [in_features], where its decoder has one."""


class _PlainSource:
    """Each linear by itself, when it is written."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        decoder: Decoder,
        method: Method,
        schemes: SchemeMap,
        options: QuantizeOptions,
    ) -> None:
        self._checkpoint, self.decoder, self.writes = checkpoint, decoder, options.ranks.first
        self._method = method
        self.facts: dict[str, Any] = _origin(method)
        self.cost: dict[str, float] = {}
        self.made_of: list[str] = []
        assert options.work is not None
        stamp = digest(*_stamp(checkpoint, schemes, options))
        self.pieces = Pieces(options.work, stamp, keep=options.resume, writes=self.writes)

    def rest(self, name: str) -> np.ndarray:
        return self._checkpoint.array(name)

    def linear(self, name: str, scheme: QuantScheme) -> QuantArrays:
        has_bias, bias = self.decoder.linears[name].bias, self._bias(name)
        float_decoder = self._checkpoint.decoder
        table = float_decoder.head_table() if name == float_decoder.head.name else name
        weight = self._checkpoint.array(f"{table}.weight")
        arrays = self._method.quantize(weight, bias, scheme)
        for spec in linear_specs(name, weight.shape, has_bias, scheme):
            _check_array(self._method, spec, arrays.named().get(spec.name.rpartition(".")[2]))
        return arrays

    def order(self, node: str) -> np.ndarray:
        raise KeyError(node)  # no order but that of a checkpoint's codes

    def _bias(self, name: str) -> np.ndarray | None:
        return self._checkpoint.array(f"{name}.bias") if self.decoder.linears[name].bias else None


class _KeptSource(_PlainSource):
    """The checkpoint's own codes, and a head that it has as floats rounded to nearest."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        decoder: Decoder,
        schemes: SchemeMap,
        options: QuantizeOptions,
    ) -> None:
        self._orders = kept_orders(checkpoint)
        reordered = decoder.reordered(self._orders)
        super().__init__(checkpoint, reordered, find_method(PLAIN_METHOD), schemes, options)
        self.facts = {"kept": checkpoint.format}

    def linear(self, name: str, scheme: QuantScheme) -> QuantArrays:
        if not scheme.kept:
            return super().linear(name, scheme)
        head = self._checkpoint.decoder.head.name
        table = self._checkpoint.decoder.head_table() if name == head else name
        stored, bias = self._checkpoint.coded(table), self._bias(name)
        assert stored is not None  # see kept_schemes
        found = kept_arrays(stored, scheme)
        return found if bias is None else replace(found, bias=np.asarray(bias, np.float32))

    def order(self, node: str) -> np.ndarray:
        return self._orders[node]


def _check_array(method: Method, spec: TensorSpec, array: Any) -> None:
    if not isinstance(array, np.ndarray) or (array.dtype, array.shape) != (spec.dtype, spec.shape):
        got = type(array).__name__
        if isinstance(array, np.ndarray):
            got = f"{array.dtype} {list(array.shape)}"
        raise InputError(
            f"{method.where}, {spec.name}",
            f"got {got}, expected {spec.dtype} {list(spec.shape)}",
            "Let quantize give the arrays that docs/quant_format.md lists for this op",
        )


def _origin(method: Method) -> dict[str, Any]:
    """For quant.json: which file the method was, if it is not one of the package."""
    return {} if method.file is None else {"method": method_digest(method.file)}


class _CalibratedSource:
    """The blocks of a store and, in the method's basis, what is outside the blocks."""

    def __init__(self, job: Calibration, method: Method, done: Calibrated) -> None:
        checkpoint, basis = job.checkpoint, job.method.basis(job.checkpoint, job.settings)
        self._checkpoint, self._basis, self._store, self.cost, self.writes = (
            checkpoint,
            basis,
            job.store,
            done.cost,
            job.ranks.first,
        )
        self.pieces = job.store.pieces
        self.made_of = job.store.recorded(checkpoint.decoder.layers + 1)
        self.facts = {
            "settings": job.settings.as_dict(),
            "windows": list(job.windows.shape),
            "blocks": done.reports,
            **({} if done.head is None else {"head": done.head}),
            **_rotation(job),
            **_origin(method),
        }
        self.decoder = checkpoint.decoder.untied() if basis.unties else checkpoint.decoder
        if done.head is not None and done.head["kept"]:
            self.decoder = self.decoder.with_quantized_head()
        self._block: tuple[int, BlockResult] | None = None

    def _result(self, index: int) -> BlockResult:
        if self._block is None or self._block[0] != index:
            self._block = (index, self._store.load(index))
        return self._block[1]

    def _place(self, name: str) -> tuple[int, str] | None:
        """Block and name below its prefix."""
        for block in self.decoder.blocks:
            if name.startswith(f"{block.prefix}."):
                return block.index, name.removeprefix(f"{block.prefix}.")
        return None

    def rest(self, name: str) -> np.ndarray:
        place = self._place(name)
        if place is None:
            return np.asarray(self._basis.tensor(self._checkpoint, name).numpy())
        return self._result(place[0]).gains[place[1]]

    def linear(self, name: str, scheme: QuantScheme) -> QuantArrays:
        place = self._place(name)
        if place is None:
            return self._result(self.decoder.layers).sites[name]
        block = self.decoder.blocks[place[0]]
        for node, site in block.sites.items():
            start = 0
            for linear in site.linears.members:
                rows = slice(start, start + linear.out_features)
                if linear.name == place[1]:
                    arrays = self._result(block.index).sites[node].rows(rows)
                    return arrays if linear.bias else replace(arrays, bias=None)
                start = rows.stop
        raise KeyError(name)

    def order(self, node: str) -> np.ndarray:
        raise KeyError(node)  # no order but that of a checkpoint's codes


def _rotation(job: Calibration) -> dict[str, str]:
    """For quant.json, where the switches do not tell: what was folded into the weights."""
    kind = job.method.rotation(job.settings)
    told = getattr(job.settings.method, "rotation", "none")
    return {} if kind == told else {"rotation": kind}


def open_source(
    checkpoint: Checkpoint,
    schemes: SchemeMap,
    options: QuantizeOptions,
    tokenizer: Any,
    progress: Progress,
) -> QuantSource:
    """Calibrate, where the method does, and give the result's tensors.

    Raises:
        InputError: the calibration text is missing or empty, the model has NaN, or the method does
            not fit.
    """
    settings = options.settings
    if schemes.base.kept:
        decoder = schemes.decoder(checkpoint.decoder)
        if schemes.floats:
            progress.message(
                f"stored in floating point, and left so: {some(schemes.floats)}, "
                f"{len(schemes.floats)} of {len(decoder.nodes) + len(schemes.floats)} GEMM nodes"
            )
        return _KeptSource(checkpoint, decoder, schemes, options)
    method = find_method(schemes.base.method, settings.method_file)
    method.check_settings(settings)
    schemes = _with_possible_head(schemes, method, options, progress)
    for scheme in schemes.schemes():
        method.check(scheme)
    if not method.looks_at_data:
        if settings.calib is not None:
            text = load_text(settings.calib, options.offline, strict=False, say=progress.message)
            text_tokens(tokenizer, text, checkpoint.decoder.vocab, "--calib")
        # Without data nobody knows what a quantized head costs.
        known = schemes.head is not None and schemes.head_limit is None
        decoder = checkpoint.decoder.with_quantized_head() if known else checkpoint.decoder
        return _PlainSource(checkpoint, decoder, method, schemes, options)

    import torch

    from calibration.blocks.driver import Calibration, calibrate
    from calibration.blocks.store import BlockStore

    windows, note = calibration_windows(
        tokenizer,
        settings,
        int(checkpoint.config.max_position_embeddings),
        checkpoint.decoder.vocab,
        options.offline,
    )
    if note:
        progress.message(note)
    headless = replace(schemes, head_bits=FLOAT_BITS, head_limit=None)
    stamp = digest(
        *_stamp(checkpoint, headless, options),
        hashlib.sha256(windows.tobytes()).hexdigest(),
        torch.cuda.is_available(),
        options.ranks.world if method.declaration.counts_processes else 0,
    )
    assert options.work is not None
    store = BlockStore(options.work, stamp, keep=options.resume, writes=options.ranks.first)
    options.ranks.wait()
    job = Calibration(
        checkpoint,
        method.block_method,
        schemes.nodes(checkpoint.decoder).__getitem__,
        settings,
        windows,
        store,
        options.ranks,
        schemes.head,
        schemes.head_limit,
    )
    return _CalibratedSource(job, method, calibrate(job, progress))


def _stamp(checkpoint: Checkpoint, schemes: SchemeMap, options: QuantizeOptions) -> list[Any]:
    """What every number depends on, however it is made."""
    return [
        checkpoint.stamp(),
        schemes.as_dict(),
        options.settings.stamp(checkpoint),
        code_digest(*CALIBRATION_CODE),
        method_digest(options.settings.method_file),
        package_versions(("torch", "numpy", "transformers")),
    ]


def _with_possible_head(
    schemes: SchemeMap, method: Method, options: QuantizeOptions, progress: Progress
) -> SchemeMap:
    """The map, without a head that was left to be chosen where there is no choice, which is said.

    Raises:
        InputError: the head was not, and the method does not quantise any.
    """
    if schemes.head is None:
        return schemes
    objection = _head_objection(method, options)
    if schemes.head_limit is None:
        if objection:
            raise InputError(method.where, *objection)
        return schemes
    why = ""
    if not method.looks_at_data:
        why = f"method {method.name!r} has no data to choose its bits by, --head-bits B sets them"
    elif options.format != formats.OURS:
        why = f"--format {options.format} has no bits for it"
    elif objection or not method.makes(schemes.head):
        why = f"method {method.name!r} makes no codes for it"
    if not why:
        return schemes
    progress.message(f"head: stays in floating point: {why}")
    return replace(schemes, head_bits=FLOAT_BITS, head_limit=None)


def _head_objection(method: Method, options: QuantizeOptions) -> tuple[str, str] | None:
    if not method.looks_at_data:
        return None
    from calibration.blocks.head import HeadMethod
    from calibration.blocks.settings import WalkSettings

    if isinstance(method.block_method, HeadMethod) and isinstance(
        options.settings.method, WalkSettings
    ):
        return None
    return (
        "got a METHOD without head(task), or without switches of WalkSettings, expected both to "
        "quantize the head",
        "Add --head-bits 16, or see calibration/blocks/head.py",
    )
