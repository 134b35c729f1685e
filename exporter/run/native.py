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


class NativeSession(DecoderSession):
    """ONNX Runtime on the CPU with native kernels. The cache stays in ONNX Runtime's memory from
    call to call; a static one in the same, in which new rows are written, until sequences of another
    batch begin: rows that a sequence has not filled are never read.

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
        self._batch = 0
        self._cache: dict[str, Any] = {}

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
            self._bind_cache(len(input_ids))
            logits = self._bind(feeds, wanted.shape)
            self._session.run_with_iobinding(self._binding)
            found = {"logits": logits.numpy()}
            # of a static cache these would be what it holds already, and asking takes time
            outputs = self._binding.get_outputs() if self._marked or not self._form.rows() else []
            if not self._form.rows():
                self._cache = dict(zip(self._names, outputs, strict=False))
            if self._marked is None:
                return self._form.restored(found, attention_mask)
            inner = outputs[len(self._names) + 1 :]
            found |= {name: one.numpy() for name, one in zip(self._marked, inner, strict=True)}
            found |= {f"present.{name}": self._cache[name].numpy() for name in self._names}
            restored = self._form.restored(found, attention_mask)
            return with_numbers(restored, self._bits, self.dtype)

    def _bind_cache(self, batch: int) -> None:
        """The cache as input and output; a static one is bound once for all calls of a batch."""
        rows = self._form.rows()
        if rows and batch == self._batch:
            return
        self._batch = batch
        self._binding = self._session.io_binding()
        self._inputs: dict[str, np.ndarray] = {}
        if rows:
            self._cache = {}  # before there is another
        self._cache = self._cache or self._empty_cache(batch)
        for name in self._names:
            self._binding.bind_ortvalue_input(f"past_key_values.{name}", self._cache[name])
            if rows:
                self._binding.bind_ortvalue_output(f"present.{name}", self._cache[name])
            else:
                self._binding.bind_output(f"present.{name}")

    def _bind(self, feeds: dict[str, np.ndarray], wanted: tuple[int, ...]) -> Any:
        """The other inputs and outputs; returns the logits'. Where shapes are those of the last call
        inputs are written in place: a step leaves nothing in the processor's caches, so that all that
        is touched between two of them takes time.
        """
        import numpy as np
        from onnxruntime import OrtValue

        for name, array in feeds.items():
            bound = self._inputs.get(name)
            if bound is not None and bound.shape == array.shape:
                bound[...] = array
                continue
            self._inputs[name] = array.copy()  # a binding does not hold on to arrays
            value = OrtValue.ortvalue_from_numpy(self._inputs[name])
            self._binding.bind_ortvalue_input(name, value)
        logits = OrtValue.ortvalue_from_shape_and_type([*wanted, self._vocabulary], np.float32)
        self._binding.bind_ortvalue_output("logits", logits)
        for name in self._marked or ():
            self._binding.bind_output(name)
        return logits

    def _empty_cache(self, batch: int) -> dict[str, Any]:
        """Zeros: function bodies multiply rows that nobody sees by 0, and 0 times NaN is NaN."""
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
        self._session = None
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
