"""Where the tensors of a quant folder come from: a method that looks at weights alone, or a
block-wise calibration.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from calibration.data import calibration_windows, load_text
from calibration.methods import Method, is_block_method, method
from calibration.out.fingerprint import (
    CALIBRATION_CODE,
    code_digest,
    digest,
    file_stamps,
    package_versions,
)
from calibration.settings import AbqSettings
from plugins.core.op_spec import QuantArrays

if TYPE_CHECKING:
    from calibration.blocks.driver import Basis, BlockMethod, Calibrated, Calibration
    from calibration.blocks.store import BlockResult
    from calibration.checkpoints.checkpoint import Checkpoint
    from calibration.families.base import ModelDims
    from calibration.progress import Progress
    from calibration.quant.bits import SchemeMap
    from calibration.quant.quantize import QuantizeOptions
    from calibration.quant.scheme import QuantScheme

__all__ = ["QuantSource", "open_source"]


class QuantSource(Protocol):
    """A quantised model, tensor by tensor.

    Attributes:
        dims: sizes of the result: a method may untie the head from the embedding.
        facts: how it was made, for quant.json; the same input gives the same.
        cost: time and memory that it took.
        writes: whether this process writes the folder.
    """

    dims: ModelDims
    facts: dict[str, Any]
    cost: dict[str, float]
    writes: bool

    def rest(self, name: str) -> np.ndarray:
        """A tensor that is not quantised."""

    def linear(self, name: str, scheme: QuantScheme) -> QuantArrays:
        """A quantised linear by its Hugging Face name."""

    def close(self) -> None:
        """The folder is written: away with what was kept for it."""


class _PlainSource:
    """Each linear by itself, when it is written."""

    def __init__(self, checkpoint: Checkpoint, writes: bool) -> None:
        self._checkpoint, self.dims, self.writes = checkpoint, checkpoint.dims, writes
        self.facts: dict[str, Any] = {}
        self.cost: dict[str, float] = {}

    def rest(self, name: str) -> np.ndarray:
        return self._checkpoint.array(name)

    def linear(self, name: str, scheme: QuantScheme) -> QuantArrays:
        maker: Method = method(scheme.method)
        has_bias = any(
            name.endswith(f".{linear.name}") and self._checkpoint.family.has_bias(linear, self.dims)
            for linear in self._checkpoint.family.linears()
        )
        bias = self._checkpoint.array(f"{name}.bias") if has_bias else None
        return maker.quantize(self._checkpoint.array(f"{name}.weight"), bias, scheme)

    def close(self) -> None:
        pass


class _CalibratedSource:
    """The blocks of a store and, in the method's basis, what is outside the blocks."""

    def __init__(self, job: Calibration, basis: Basis, done: Calibrated) -> None:
        checkpoint = job.checkpoint
        self._checkpoint, self._basis, self._store, self.cost, self.writes = (
            checkpoint,
            basis,
            job.store,
            done.cost,
            job.ranks.first,
        )
        self.facts = {
            "settings": job.settings.as_dict(),
            "windows": list(job.windows.shape),
            "blocks": done.reports,
        }
        self.dims = replace(checkpoint.dims, tied=checkpoint.dims.tied and not basis.unties)
        self._block: tuple[int, BlockResult] | None = None

    def _result(self, index: int) -> BlockResult:
        if self._block is None or self._block[0] != index:
            self._block = (index, self._store.load(index))
        return self._block[1]

    def _place(self, name: str) -> tuple[int, str] | None:
        """Block and name below its prefix."""
        for index in range(self.dims.layers):
            prefix = f"{self._checkpoint.family.layer(index)}."
            if name.startswith(prefix):
                return index, name.removeprefix(prefix)
        return None

    def rest(self, name: str) -> np.ndarray:
        place = self._place(name)
        if place is None:
            return np.asarray(self._basis.tensor(self._checkpoint, name).numpy())
        return self._result(place[0]).gains[place[1]]

    def linear(self, name: str, scheme: QuantScheme) -> QuantArrays:
        place = self._place(name)
        assert place is not None
        index, member = place
        family = self._checkpoint.family
        start = 0
        for group in family.groups:
            for linear in group.members:
                rows = family.linear_shape(linear, self.dims)[0]
                if linear.name == member:
                    part, has_bias = slice(start, start + rows), family.has_bias(linear, self.dims)
                    arrays = self._result(index).sites[group.node]
                    values = {
                        key: np.ascontiguousarray(array[part])
                        for key, array in vars(arrays).items()
                        if array is not None
                    }
                    return QuantArrays(
                        **(
                            values
                            if has_bias
                            else {key: array for key, array in values.items() if key != "bias"}
                        )
                    )
                start += rows
            start = 0
        raise KeyError(name)

    def close(self) -> None:
        self._store.remove()


def open_source(
    checkpoint: Checkpoint,
    schemes: SchemeMap,
    options: QuantizeOptions,
    tokenizer: Any,
    progress: Progress,
) -> QuantSource:
    """Calibrate, where the method does, and give the result's tensors.

    Raises:
        InputError: the calibration text is missing or empty, or the model has NaN.
    """
    settings = options.settings
    name = schemes.base.method
    if not is_block_method(name):
        if settings.calib is not None:
            load_text(settings.calib, options.offline, strict=False)
        return _PlainSource(checkpoint, options.ranks.first)

    import torch

    from calibration.blocks.driver import Calibration, calibrate
    from calibration.blocks.store import BlockStore

    maker: BlockMethod = method(name).METHOD
    windows, note = calibration_windows(
        tokenizer, settings, int(checkpoint.config.max_position_embeddings), options.offline
    )
    if note:
        progress.message(note)
    stamp = digest(
        checkpoint.fingerprint,
        file_stamps(checkpoint.input_files()),
        schemes.as_dict(),
        settings.as_dict(),
        hashlib.sha256(windows.tobytes()).hexdigest(),
        code_digest(*CALIBRATION_CODE),
        package_versions(("torch", "numpy")),
        torch.cuda.is_available(),
        options.ranks.world if isinstance(settings.method, AbqSettings) else 0,
    )  # order of sums
    assert options.work is not None
    store = BlockStore(options.work, stamp, keep=options.resume, writes=options.ranks.first)
    options.ranks.wait()
    job = Calibration(checkpoint, maker, schemes.of, settings, windows, store, options.ranks)
    done = calibrate(job, progress)
    return _CalibratedSource(job, maker.basis(checkpoint, settings), done)
