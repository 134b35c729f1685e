"""Runs the exported model in ONNX Runtime on the CPU as it is, its custom nodes by native kernels."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calibration.out.layout import DATA_FILE, MODEL_FILE, ONNX
from exporter.run.forms import cache_bits, cache_form, with_numbers
from exporter.run.onnxruntime import inference_session, load_model, whole_graph
from exporter.run.rounding import round_every_op
from exporter.run.runner import Runner
from exporter.run.sessions import DecoderSession, cache_names
from plugins.errors import InputError, UserError

if TYPE_CHECKING:
    import numpy as np

    from calibration.out.description import Description
    from calibration.out.folder import StageFolder

__all__ = ["RUNNER", "NativeSession", "native_library", "native_session"]


@dataclass(frozen=True)
class _Listener:
    say: Callable[[str], None] | None = field(compare=False)  # whoever it is, there is one library


@cache
def _library(listener: _Listener) -> Path | UserError:
    from plugins.tools.build import build_onnxruntime

    try:
        return build_onnxruntime(listener.say)
    except UserError as error:
        return error


def native_library(say: Callable[[str], None] | None = None) -> Path | UserError:
    """The library of native kernels, compiled if needed; or why there is none.

    Args:
        say: told before and after it is compiled, which is tried once in a process; None prints on
            stderr.
    """
    return _library(_Listener(say))


def native_session(folder: Path, dtype: str, marked: Sequence[str] = ()) -> Any:
    """An onnxruntime.InferenceSession on the ONNX file in `folder`, as it is.

    The weights stay where the system maps the data file; nothing is copied or repacked. ONNX
    Runtime has no bfloat16 on a CPU: such a graph is rewritten by round_every_op first.

    Args:
        dtype: of the model's floats.
        marked: inner tensors that are outputs too, behind the model's own.

    Raises:
        InputError: ONNX Runtime refuses the file or the library.
    """
    library = native_library()
    if isinstance(library, UserError):
        raise library
    graph: str | bytes = str(folder / MODEL_FILE)
    if dtype == "bfloat16" or marked:
        model = load_model(folder, marked)
        if dtype == "bfloat16":
            with whole_graph(folder):
                round_every_op(model)
        graph = model.SerializeToString()
    return inference_session(graph, folder, library)


class NativeRunner(Runner):
    """The ONNX file on the CPU; the custom nodes run kernels of plugins/*/cpu."""

    name = "native"
    stage = ONNX
    help = "the ONNX file on the CPU, the custom nodes by native kernels"
    automatic = 2

    def unavailable(self) -> InputError | None:
        """There may be no compiler for the kernels."""
        library = native_library()
        if isinstance(library, Path):
            return None
        return InputError(
            "--runner native",
            f"got no library of native kernels ({library.where}: {library.problem})",
            "Install g++, or use --runner onnxruntime",
        )

    def open(self, folder: StageFolder, description: Description) -> DecoderSession:
        """Reads the graph; the weights are mapped."""
        for name in (MODEL_FILE, DATA_FILE):
            folder.file(name)
        return NativeSession(folder.path, description.max_context, dtype=description.dtype)


@dataclass
class _Bound:
    """What ONNX Runtime reads and writes in a call.

    Attributes:
        binding: an onnxruntime.IOBinding.
        cache: OrtValues by their names.
        batch: sequences.
        inputs: the arrays of the other inputs, by their names, which the binding only points at.
    """

    binding: Any
    cache: dict[str, Any]
    batch: int
    inputs: dict[str, np.ndarray] = field(default_factory=dict)


class NativeSession(DecoderSession):
    """ONNX Runtime on the CPU with native kernels. A cache that grows is ONNX Runtime's from call to
    call; a static one has memory of its own, into which new rows are written. After reset() as many
    sequences take that memory over without clearing it: kernels read only rows that are filled.

    Args:
        folder: OUT/onnx.
        max_context: most tokens a sequence may have.
        dtype: of the model's floats.
        marked: inner tensors that step() returns besides the logits, and with them the cache; None:
            neither.
    """

    def __init__(
        self,
        folder: Path,
        max_context: int,
        dtype: str = "float32",
        marked: Sequence[str] | None = None,
    ) -> None:
        super().__init__(max_context, dtype=dtype)
        self._folder, self._marked = folder, marked
        self._data = _MappedFile(folder / DATA_FILE)
        self._session: Any = native_session(folder, dtype, marked or ())
        with whole_graph(folder):
            inputs = {value.name: value for value in self._session.get_inputs()}
            self._names = cache_names(inputs)
            self._form = cache_form({name: value.shape for name, value in inputs.items()})
            self._past = {name: inputs[f"past_key_values.{name}"] for name in self._names}
            self._vocabulary = self._session.get_outputs()[0].shape[-1]
            self._bits = 0 if marked is None else cache_bits(load_model(folder).graph)
        self._cache: dict[str, Any] = {}
        self._kept: _Bound | None = None

    @property
    def cache_bytes(self) -> int:
        """What the KV cache takes now."""
        return sum(value.numpy().nbytes for value in self._cache.values())

    def _clear(self) -> None:
        if not self._form.rows():
            self._cache = {}

    def _forward(
        self,
        input_ids: np.ndarray,
        attention_mask: np.ndarray,
        positions: np.ndarray,
        wanted: np.ndarray,
    ) -> dict[str, np.ndarray]:
        self._data.check()
        feeds = self._form.feeds(input_ids, attention_mask, positions, wanted)
        with whole_graph(self._folder):
            bound = self._bound(len(input_ids))
            logits = self._bind(bound, feeds, wanted.shape)
            self._session.run_with_iobinding(bound.binding)
            found = {"logits": logits.numpy()}
            # of a static cache these would be what it holds already, and asking takes time
            outputs = bound.binding.get_outputs() if self._marked or not self._form.rows() else []
            if self._form.rows():
                self._cache, self._kept = bound.cache, bound
                if wanted.shape[1] > 1:
                    bound.binding.bind_output("logits")  # lets go of many
            else:
                self._cache = dict(zip(self._names, outputs, strict=False))
            if self._marked is None:
                return self._form.restored(found, attention_mask)
            inner = outputs[len(self._names) + 1 :]
            found |= {name: one.numpy() for name, one in zip(self._marked, inner, strict=True)}
            found |= {f"present.{name}": self._cache[name].numpy() for name in self._names}
            restored = self._form.restored(found, attention_mask)
            return with_numbers(restored, self._bits, self.dtype)

    def _bound(self, batch: int) -> _Bound:
        """A binding with the cache of so many sequences as input and output, new or the kept one."""
        if self._kept is not None and self._kept.batch == batch:
            return self._kept
        rows = self._form.rows()
        if rows:
            self._cache, self._kept = {}, None  # before there is memory for another
        cache = self._cache or self._empty_cache(batch)
        binding = self._session.io_binding()
        for name in self._names:
            binding.bind_ortvalue_input(f"past_key_values.{name}", cache[name])
            if rows:
                binding.bind_ortvalue_output(f"present.{name}", cache[name])
            else:
                binding.bind_output(f"present.{name}")
        return _Bound(binding, cache, batch)

    def _bind(self, bound: _Bound, feeds: dict[str, np.ndarray], wanted: tuple[int, ...]) -> Any:
        """The other inputs and outputs; returns the logits'. An input of the last call's shape and type is
        written in its place: a step fills the processor's caches with weights, so that whatever is
        touched between two steps takes time.
        """
        import numpy as np
        from onnxruntime import OrtValue

        for name, array in feeds.items():
            old = bound.inputs.get(name)
            if old is not None and (old.shape, old.dtype) == (array.shape, array.dtype):
                old[...] = array
                continue
            bound.inputs.pop(name, None)
            own = array.copy()  # which later calls write to
            bound.binding.bind_ortvalue_input(name, OrtValue.ortvalue_from_numpy(own))
            bound.inputs[name] = own
        logits = OrtValue.ortvalue_from_shape_and_type([*wanted, self._vocabulary], np.float32)
        bound.binding.bind_ortvalue_output("logits", logits)
        for name in self._marked or ():
            bound.binding.bind_output(name)
        return logits

    def _empty_cache(self, batch: int) -> dict[str, Any]:
        """Memory for new sequences."""
        import numpy as np
        from onnxruntime import OrtValue

        types = {"float": np.float32, "float16": np.float16, "int8": np.int8}
        return {
            name: OrtValue.ortvalue_from_numpy(
                np.zeros(
                    (batch, int(past.shape[1]), self._form.rows(), int(past.shape[3])),
                    types[past.type.removeprefix("tensor(").removesuffix(")")],
                )
            )
            for name, past in self._past.items()
        }

    def close(self) -> None:
        """Free the session."""
        self._cache = {}
        self._kept = self._session = None  # a binding holds on to its session
        self._data.close()


class _MappedFile:
    """A file that ONNX Runtime maps: what is written into it while a session is open changes the
    weights of that session, and what is cut off ends the process. A new file under its name, as the
    exporter makes one, does neither.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("rb")
        self._state = self._now()

    def _now(self) -> tuple[int, int]:
        state = os.fstat(self._file.fileno())
        return state.st_size, state.st_mtime_ns

    def check(self) -> None:
        """Raise InputError if it was written to since it was opened."""
        if self._now() != self._state:
            raise InputError(
                str(self._path),
                "got weights that were written to while a session had them open, expected the same "
                "file until it is closed",
                "Start again; write a new file and rename it",
            )

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()


RUNNER = NativeRunner()
