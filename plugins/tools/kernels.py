"""Calls a kernel library through its C interface (plugins/core/host/params.h): the ops it exports,
by name.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import ml_dtypes
import numpy as np

from plugins.core.op_spec import GemmAttributes
from plugins.errors import InputError

__all__ = [
    "ANY_TACTIC",
    "DTYPES",
    "KERNEL_STEP",
    "SIMPLE",
    "GemmBuffers",
    "GemmShape",
    "KernelLibrary",
    "gemm_shape",
]

ANY_TACTIC = -1  # kAnyTactic of params.h
KERNEL_STEP = 64  # kTacticKernel of config.h: a tactic is this times a kernel, plus shares of K
SIMPLE = KERNEL_STEP + 1  # the tactic of every op's simple kernel, with K whole
_MOST_TACTICS = 64
DTYPES = {np.dtype(np.float16): 0, np.dtype(ml_dtypes.bfloat16): 1, np.dtype(np.float32): 2}


class GemmShape(ctypes.Structure):
    """One call: the struct of this name in params.h."""

    _fields_: ClassVar = [
        ("m", ctypes.c_int32),
        ("n", ctypes.c_int32),
        ("k", ctypes.c_int32),
        ("group_size", ctypes.c_int32),
        ("planes", ctypes.c_int32),
        ("wbits", ctypes.c_int32),
        ("levels", ctypes.c_int32),
        ("abits", ctypes.c_int32),
        ("act_symmetric", ctypes.c_int32),
        ("dtype", ctypes.c_int32),
        ("tactic", ctypes.c_int32),
        ("norm_epsilon", ctypes.c_float),
        ("has_minimum", ctypes.c_int32),
    ]


class GemmBuffers(ctypes.Structure):
    """Pointers of one call: the struct of this name in params.h."""

    _fields_: ClassVar = [
        ("x", ctypes.c_void_p),
        ("weight", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("zero", ctypes.c_void_p),
        ("scale_group", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("workspace", ctypes.c_void_p),
        ("gamma", ctypes.c_void_p),
        ("minimum", ctypes.c_void_p),
    ]


_SHAPE = ctypes.POINTER(GemmShape)


class _Op(ctypes.Structure):
    # AnybitOp of params.h
    _fields_: ClassVar = [
        ("name", ctypes.c_char_p),
        ("workspace", ctypes.CFUNCTYPE(ctypes.c_size_t, _SHAPE)),
        (
            "tactics",
            ctypes.CFUNCTYPE(ctypes.c_int, _SHAPE, ctypes.POINTER(ctypes.c_int32), ctypes.c_int),
        ),
        ("kernel", ctypes.CFUNCTYPE(ctypes.c_char_p, ctypes.c_int32)),
        (
            "run",
            ctypes.CFUNCTYPE(ctypes.c_int, _SHAPE, ctypes.POINTER(GemmBuffers), ctypes.c_void_p),
        ),
    ]


def gemm_shape(
    attrs: GemmAttributes, tokens: int, dtype: np.dtype[Any], tactic: int = 0
) -> GemmShape:
    """The C struct for one call; tactic 0 leaves the choice of kernel to the library."""
    return GemmShape(
        m=tokens,
        n=attrs.out_features,
        k=attrs.in_features,
        group_size=attrs.group_size,
        planes=attrs.planes,
        wbits=attrs.wbits,
        levels=attrs.levels,
        abits=attrs.abits,
        act_symmetric=attrs.act_symmetric,
        dtype=DTYPES[np.dtype(dtype)],
        tactic=tactic,
        norm_epsilon=attrs.norm_epsilon,
        has_minimum=attrs.has_minimum,
    )


class KernelLibrary:
    """A loaded kernel library: the plugin library or the simulation.

    Attributes:
        library: for functions that are not an op's.
        ops: names of the ops that the library exports.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = str(path)
        self.library = ctypes.CDLL(self.path)
        table = ctypes.POINTER(_Op)()
        count = self.library.anybit_ops(ctypes.byref(table))
        self._ops = {table[i].name.decode(): table[i] for i in range(count)}
        self.ops = tuple(self._ops)

    def _op(self, name: str) -> Any:
        if name not in self._ops:
            raise InputError(
                self.path,
                f"got no op {name!r}, expected one of {', '.join(self.ops)}",
                "Build the library again: python -m plugins build",
            )
        return self._ops[name]

    def kernels_made(self) -> int:
        """Of ONNX Runtime's custom-op library: how many kernels the sessions of the calling thread
        have made so far.
        """
        count = self.library.anybit_kernels_made
        count.restype = ctypes.c_int64
        return int(count())

    def tactics(self, op: str, shape: GemmShape) -> dict[int, str]:
        """Kernel names by tactic, the default choice first."""
        functions, listed = self._op(op), (ctypes.c_int32 * _MOST_TACTICS)()
        count = functions.tactics(ctypes.byref(shape), listed, _MOST_TACTICS)
        return {tactic: functions.kernel(tactic).decode() for tactic in listed[:count]}

    def workspace_bytes(self, op: str, shape: GemmShape) -> int:
        """Scratch bytes that the op asks for; 0 for a refused shape."""
        return int(self._op(op).workspace(ctypes.byref(shape)))

    def run(
        self, op: str, shape: GemmShape, pointers: Mapping[str, int], stream: int | None = None
    ) -> int:
        """Enqueue one call; returns a cudaError_t, 0 for success.

        Args:
            pointers: addresses by the names of GemmBuffers; the others are null.
        """
        buffers = GemmBuffers(**pointers)
        return int(self._op(op).run(ctypes.byref(shape), ctypes.byref(buffers), stream))
