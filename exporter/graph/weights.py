"""Streams initializers into one external data file, so that export holds one layer's weights at a
time.
"""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import onnx

__all__ = ["ExternalWeights"]

ALIGNMENT = 64  # bytes; enough for any vector load from a memory-mapped file


class ExternalWeights:
    """Context manager that appends arrays to a data file and remembers the TensorProtos that point
    at them.

    Args:
        path: the data file, written next to the ONNX file that will name it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.initializers: list[onnx.TensorProto] = []
        self._names: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def __enter__(self) -> ExternalWeights:
        self._file = self._path.open("wb")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def add(self, name: str, array: np.ndarray) -> str:
        """Append an array (fp16, bf16 of ml_dtypes, fp32 or any integer type); returns its name."""
        import numpy as np
        import onnx
        from onnx import helper

        self._file.write(bytes(-self._file.tell() % ALIGNMENT))
        offset = self._file.tell()
        data = np.ascontiguousarray(array)
        self._file.write(data.reshape(-1).view(np.uint8).data)
        tensor = onnx.TensorProto(
            name=name,
            dims=array.shape,
            data_type=helper.np_dtype_to_tensor_dtype(array.dtype),
            data_location=onnx.TensorProto.EXTERNAL,
        )
        for key, value in (
            ("location", self._path.name),
            ("offset", offset),
            ("length", data.nbytes),
        ):
            tensor.external_data.add(key=key, value=str(value))
        return self._remember(tensor)

    def add_inline(self, name: str, array: np.ndarray) -> str:
        """Keep a small constant in the ONNX file itself: shape inference must see it; returns its
        name.
        """
        from onnx import numpy_helper

        return self._remember(numpy_helper.from_array(array, name))

    def _remember(self, tensor: onnx.TensorProto) -> str:
        self.initializers.append(tensor)
        self._names.add(tensor.name)
        return str(tensor.name)
