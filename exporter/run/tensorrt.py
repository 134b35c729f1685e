"""Runs the built TensorRT engine on a GPU."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calibration.out.layout import ENGINE, ENGINE_FILE, ENGINE_RECORD
from calibration.quant.scheme import FLOAT_BITS
from exporter.engine.edition import (
    Edition,
    captured_log,
    check_engine,
    gpu_capabilities,
    load_plugins,
)
from exporter.engine.limits import engine_limits
from exporter.engine.record import EngineRecord
from exporter.graph.names import WRITE_INDICES
from exporter.run.forms import with_numbers
from exporter.run.runner import Runner
from exporter.run.sessions import CHUNK, DecoderSession, cache_names
from plugins.errors import InputError
from plugins.tools.toolkit import find_cuda

if TYPE_CHECKING:
    import numpy as np

    from calibration.out.description import Description
    from calibration.out.folder import StageFolder

__all__ = ["RUNNER", "PieceEngine", "TensorrtSession"]


class TensorrtRunner(Runner):
    """The engine, where there is a GPU and the TensorRT that built it."""

    name = "tensorrt"
    stage = ENGINE
    help = "the engine on a GPU"
    automatic = 3

    def unavailable(self) -> InputError | None:
        """There may be no CUDA device."""
        if gpu_capabilities():
            return None
        return InputError(
            "--runner tensorrt",
            "got no CUDA device, expected one to run the engine",
            "Use --runner onnxruntime, or run on a machine with an NVIDIA GPU and its driver",
        )

    def check(self, folder: StageFolder) -> None:
        """The engine may be another TensorRT's or another GPU's, or have a static cache, which
        Polygraphy's runner cannot keep where TensorRT wants it: at one address, read and written.
        """
        record = check_engine(folder.file(ENGINE_RECORD).parent)
        if WRITE_INDICES in record["profiles"][0]["inputs"]:
            raise InputError(
                f"--runner {self.name}",
                "got an engine with a static cache, expected one whose cache grows",
                "Run it in a C++ program (docs/cpp_service.md), or export with --kv concat",
            )

    def open(self, folder: StageFolder, description: Description) -> DecoderSession:
        """Reads the engine and the plugin library."""
        record = check_engine(folder.file(ENGINE_RECORD).parent)
        for name in (ENGINE_FILE, record["plugin_library"]["name"]):
            folder.file(name)
        return TensorrtSession(
            folder.path, description.max_context, description.dtype, description.cache.bits
        )


class TensorrtSession(DecoderSession):
    """The built engine on a GPU, through Polygraphy.

    The cache goes through host memory at each call: this proves the engine, the C++ runtime is the
    fast way. The engine was built from the ONNX file as it is, without the casts that OnnxSession
    adds, and shows logits and present cache only.

    Args:
        folder: OUT/engine.
        max_context: most tokens a sequence may have; the engine may allow fewer.
        dtype: of the model's floats.
        bits: of the KV cache.

    Attributes:
        max_batch: most sequences in one call.

    Raises:
        InputError: there is no engine, or it is another TensorRT's.
    """

    def __init__(
        self,
        folder: Path,
        max_context: int,
        dtype: str = "float32",
        bits: int = FLOAT_BITS,
    ) -> None:
        record = check_engine(folder)
        limits = engine_limits(record)
        super().__init__(min(max_context, limits.max_context), min(CHUNK, limits.max_tokens), dtype)
        decode = record["profiles"][1]["inputs"]
        self.max_batch = limits.max_batch
        self._most_logits = record["profiles"][0]["inputs"]["logits_indices"]["max"][1]
        self._names, self._bits = cache_names(decode), bits
        self._decode_past = decode["past_key_values.0.key"]["max"][2]
        self._cache_shapes = {
            name: (most[1], most[3])
            for name in self._names
            for most in [decode[f"past_key_values.{name}"]["max"]]
        }
        self._open(folder / ENGINE_FILE, folder, record)
        self._clear()

    def _open(self, engine: Path, folder: Path, record: EngineRecord) -> None:
        edition = Edition(record["edition"], record["version"])
        load_plugins(edition, folder / record["plugin_library"]["name"])
        _offer_cuda_runtime()
        from polygraphy.backend.common import BytesFromPath
        from polygraphy.backend.trt import EngineFromBytes, TrtRunner
        from polygraphy.exception import PolygraphyException

        self._runner = TrtRunner(EngineFromBytes(BytesFromPath(str(engine))), name="tensorrt")
        with captured_log() as log:
            try:
                self._runner.activate()
            except PolygraphyException as error:
                why = "; ".join(log.errors) or str(error)
                raise InputError(
                    str(engine),
                    f"got an engine that {edition} refuses ({why}), expected one for this GPU",
                    "Build it again on this machine, or free GPU memory",
                ) from None
        inputs = self._runner.get_input_metadata(use_numpy_dtypes=False)
        self._dtypes = {
            name: str(inputs[f"past_key_values.{name}"].dtype.name) for name in self._names
        }

    def _clear(self) -> None:
        self._cache: dict[str, Any] = {}

    def _forward(
        self,
        input_ids: np.ndarray,
        attention_mask: np.ndarray,
        positions: np.ndarray,
        wanted: np.ndarray,
    ) -> dict[str, np.ndarray]:
        import torch

        past = attention_mask.shape[1] - input_ids.shape[1]
        self._runner.set_profile(1 if input_ids.shape[1] == 1 and past <= self._decode_past else 0)
        cache = self._cache or self._empty_cache(len(input_ids))
        # torch tensors, because numpy has no bfloat16
        feeds = {
            "input_ids": torch.from_numpy(input_ids),
            "attention_mask": torch.from_numpy(attention_mask),
            "position_ids": torch.from_numpy(positions),
            **{f"past_key_values.{name}": cache[name] for name in self._names},
        }
        logits, most = [], self._most_logits
        # All of the same call, whose cache begins anew with each piece.
        for start in range(0, wanted.shape[1], most):
            feeds["logits_indices"] = torch.from_numpy(wanted[:, start : start + most].copy())
            outputs = {
                name: tensor.clone()
                for name, tensor in self._runner.infer(feeds, check_inputs=False).items()
            }
            logits.append(outputs["logits"])
        outputs["logits"] = torch.cat(logits, 1)
        self._cache = {name: outputs[f"present.{name}"] for name in self._names}
        found = {name: tensor.float().numpy() for name, tensor in outputs.items()}
        return with_numbers(found, self._bits, self.dtype)

    def _empty_cache(self, batch: int) -> dict[str, Any]:
        """Tensors of no tokens; TensorRT wants an address all the same, so they point at a few
        bytes on the GPU.
        """
        from polygraphy import cuda
        from polygraphy.datatype import DataType

        self._anchor = cuda.DeviceArray(shape=(256,), dtype=DataType.UINT8)
        return {
            name: cuda.DeviceView(
                self._anchor.ptr,
                (batch, heads, 0, width),
                getattr(DataType, self._dtypes[name].upper()),
            )
            for name, (heads, width) in self._cache_shapes.items()
        }

    def close(self) -> None:
        """Free the engine."""
        if self._runner.is_active:
            self._runner.deactivate()


class PieceEngine:
    """An engine of a part of the graph on a GPU, through Polygraphy; a with statement opens it.

    Args:
        engine: its file.
        profiles: the two that it was built with, see exporter.engine.build.profile_shapes.
    """

    def __init__(self, engine: Path, profiles: Sequence[Mapping[str, Any]]) -> None:
        self._engine, self._profiles = engine, profiles

    def __enter__(self) -> PieceEngine:
        _offer_cuda_runtime()
        from polygraphy import cuda
        from polygraphy.backend.common import BytesFromPath
        from polygraphy.backend.trt import EngineFromBytes, TrtRunner
        from polygraphy.datatype import DataType

        self._runner = TrtRunner(EngineFromBytes(BytesFromPath(str(self._engine))), name="tensorrt")
        self._runner.activate()
        self._inputs = self._runner.get_input_metadata(use_numpy_dtypes=False)
        self._anchor = cuda.DeviceArray(shape=(256,), dtype=DataType.UINT8)
        return self

    def __exit__(self, *raised: object) -> None:
        self._runner.deactivate()
        del self._anchor

    def infer(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The outputs, bfloat16 as fp32; see exporter.proof.pieces.PieceRunner."""
        self._runner.set_profile(self._profile(feeds))
        found = self._runner.infer(
            {name: self._given(name, array) for name, array in feeds.items()}, check_inputs=False
        )
        return {name: _as_numpy(tensor) for name, tensor in found.items()}

    def _profile(self, feeds: Mapping[str, np.ndarray]) -> int:
        """The last one whose largest shapes hold these."""
        fits = [
            place
            for place, profile in enumerate(self._profiles)
            if all(
                size <= most
                for name, array in feeds.items()
                for size, most in zip(array.shape, profile["inputs"][name]["max"], strict=True)
            )
        ]
        return fits[-1]

    def _given(self, name: str, array: np.ndarray) -> Any:
        """An input as Polygraphy takes it; of one without elements TensorRT wants an address all the
        same.
        """
        import numpy as np
        import torch
        from polygraphy import cuda

        kind = self._inputs[name].dtype
        if not array.size:
            return cuda.DeviceView(self._anchor.ptr, array.shape, kind)
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        return tensor.to(torch.bfloat16) if str(kind.name) == "bfloat16" else tensor


def _as_numpy(tensor: Any) -> np.ndarray:
    """A copy of a torch tensor; bfloat16, which numpy lacks, as fp32."""
    import numpy as np
    import torch

    wide = tensor.float() if tensor.dtype == torch.bfloat16 else tensor
    return np.array(wide.cpu().numpy())


def _offer_cuda_runtime() -> None:
    """Let Polygraphy find libcudart where only pip's CUDA wheels have it: it looks along
    LD_LIBRARY_PATH of this process.
    """
    with suppress(InputError):
        paths = [os.environ.get("LD_LIBRARY_PATH", ""), str(find_cuda().lib)]
        os.environ["LD_LIBRARY_PATH"] = os.pathsep.join(path for path in paths if path)


RUNNER = TensorrtRunner()
