"""Nodes that are no plugins: local functions of standard ops, which TensorRT inlines, and for which the
library for ONNX Runtime has native kernels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import onnx

__all__ = ["FunctionForm", "is_inlined"]

# Not below the domain of the GEMMs, whose nodes become plugins: every runtime takes the function.
_PREFIX = "anybit_"


def is_inlined(domain: str) -> bool:
    """Whether a node of this ONNX domain is a function that runtimes inline, or run natively."""
    return domain.startswith(_PREFIX)


class FunctionForm(Protocol):
    """What nodes that share a function have in common; equal forms have the same function."""

    @property
    def domain(self) -> str:
        """Of the op; further forms in one model are written as their bodies."""

    @property
    def op(self) -> str:
        """The op's name."""

    @property
    def inputs(self) -> list[str]:
        """Names of the function's inputs."""

    @property
    def outputs(self) -> list[str]:
        """Names of the function's outputs."""

    @property
    def attributes(self) -> dict[str, Any]:
        """Those that all nodes of the form have, for the native kernel; nodes may have more."""

    @property
    def opset(self) -> int:
        """Of the standard ops in the body."""

    def function(self, dtype: int) -> onnx.FunctionProto:
        """The local function.

        Args:
            dtype: onnx.TensorProto type of the model's floats.
        """
