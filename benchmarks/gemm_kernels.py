"""Layers of random weights, run through the kernels' C interface on the GPU or in the simulation,
and checked against reference().
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from benchmarks.gemm_cases import Scheme
from plugins import op_spec
from plugins.core.op_spec import GemmAttributes
from plugins.errors import CheckError
from plugins.tools.kernels import GemmShape, KernelLibrary, gemm_shape

__all__ = ["Kernels", "Layer", "check"]

BLOCK = 64  # output channels that are checked: one column block of QQQGemm


class Kernels:
    """A loaded kernel library and the device whose memory its kernels work on.

    Args:
        path: of the plugin library, or of the simulation.
        device: "cuda", or "cpu" for the simulation.
    """

    def __init__(self, path: str, device: str) -> None:
        self.device = device
        self._library = KernelLibrary(path)

    def shape(self, attrs: GemmAttributes, tokens: int, tactic: int = 0) -> GemmShape:
        """The C struct of a call with fp16 activations."""
        return gemm_shape(attrs, tokens, np.dtype(np.float16), tactic)

    def tactics(self, op: str, attrs: GemmAttributes, tokens: int) -> dict[int, str]:
        """Kernel names by tactic, the default choice first."""
        return self._library.tactics(op, self.shape(attrs, tokens))

    def workspace(self, op: str, shape: GemmShape) -> torch.Tensor:
        """Scratch memory for a call, filled with a byte that is neither 0 nor harmless."""
        size = self._library.workspace_bytes(op, shape)
        return torch.full((size,), 0xCB, dtype=torch.uint8, device=self.device)

    def run(self, op: str, shape: GemmShape, pointers: dict[str, int], stream: int) -> None:
        """Enqueue one call.

        Raises:
            CheckError: it returned an error code.
        """
        code = self._library.run(op, shape, pointers, stream)
        if code:
            raise CheckError(
                op,
                f"got CUDA error {code} for {shape.m} x {shape.n} x {shape.k}, expected success",
                "Run the self-test",
            )


class Layer:
    """Random packed weights of one layer, in `copies` copies so that none of them stays in the
    cache between calls.
    """

    def __init__(self, kernels: Kernels, scheme: Scheme, n: int, k: int, copies: int) -> None:
        self.kernels, self.scheme, self.attrs = kernels, scheme, scheme.attributes(n, k)
        self._generator = torch.Generator(kernels.device).manual_seed(n + k)
        self.copies = [self._weights() for _ in range(copies)]

    def _uniform(self, low: float, high: float, *shape: int) -> torch.Tensor:
        return torch.empty(shape, device=self.kernels.device).uniform_(
            low, high, generator=self._generator
        )

    def _words(self, *shape: int) -> torch.Tensor:
        return torch.randint(
            -(1 << 31),
            (1 << 31) - 1,
            shape,
            dtype=torch.int32,
            device=self.kernels.device,
            generator=self._generator,
        )

    def _weights(self) -> dict[str, torch.Tensor]:
        a, groups = self.attrs, self.attrs.n_groups
        if self.scheme.op == "QQQGemm":
            weights = {
                "weight": self._words(-(-a.in_features // 16), 2 * -(-a.out_features // 64) * 64),
                "scale": self._uniform(1e-4, 2e-4, a.out_features, 1),
            }
            return weights | (
                {"scale_group": self._uniform(4, 15, groups, a.out_features).half()}
                if a.group_size
                else {}
            )
        words = -(-groups * -(-a.group_len // 32) // 4) * 4
        if a.group_len % 32 or words * 32 != a.in_features:
            raise ValueError(f"{a}: random words need rows without padding")
        weight = self._words(a.planes, a.out_features, words)
        if a.levels & (
            a.levels - 1
        ):  # 5 or 3 codes: the top plane is 1 only where the others are 0
            for plane in weight[:-1]:
                plane &= ~weight[-1]
        zero = torch.randint(
            0,
            a.levels,
            (a.out_features, groups),
            dtype=torch.int32,
            device=weight.device,
            generator=self._generator,
        )
        return {
            "weight": weight,
            "scale": self._uniform(1e-3, 2e-3, a.out_features, groups),
            "zero": zero,
        }

    def tokens(self, m: int) -> torch.Tensor:
        """x [m, k] fp16."""
        x = torch.empty(m, self.attrs.in_features, device=self.kernels.device).normal_(
            generator=self._generator
        )
        return x.half()

    def prepare(self, x: torch.Tensor, tactic: int = 0) -> tuple[torch.Tensor, Any]:
        """y, poisoned, and a function that enqueues the call with copy i on a stream."""
        shape = self.kernels.shape(self.attrs, len(x), tactic)
        y = torch.full(
            (len(x), self.attrs.out_features), float("nan"), dtype=torch.float16, device=x.device
        )
        workspace = self.kernels.workspace(self.scheme.op, shape)
        fixed = {"x": x.data_ptr(), "y": y.data_ptr(), "workspace": workspace.data_ptr()}
        pointers = [
            fixed | {name: tensor.data_ptr() for name, tensor in copy.items()}
            for copy in self.copies
        ]

        def run(i: int, stream: int, keep: object = (workspace, x, y)) -> None:
            self.kernels.run(self.scheme.op, shape, pointers[i % len(pointers)], stream)

        return y, run

    def block(self, first: int) -> tuple[GemmAttributes, dict[str, np.ndarray]]:
        """Attributes and tensors of BLOCK output channels from `first` (a multiple of BLOCK) of the
        first copy, in host memory.
        """
        a, part = self.attrs, slice(first, first + BLOCK)
        count = min(BLOCK, a.out_features - first)
        attrs = GemmAttributes(**{**a.as_dict(), "out_features": count})
        copy = self.copies[0]
        if self.scheme.op == "QQQGemm":
            cut = {
                "weight": copy["weight"][:, 2 * first : 2 * first + 2 * BLOCK],
                "scale": copy["scale"][part],
            }
            cut |= {"scale_group": copy["scale_group"][:, part]} if a.group_size else {}
        else:
            cut = {
                "weight": copy["weight"][:, part],
                "scale": copy["scale"][part],
                "zero": copy["zero"][part],
            }
        return attrs, {name: tensor.contiguous().cpu().numpy() for name, tensor in cut.items()}


def check(layer: Layer, x: torch.Tensor, tactic: int = 0, rows: int = 16) -> None:
    """Run once and compare three blocks of output channels, at some tokens, with reference().

    Raises:
        CheckError: an output is not written, or differs by more than the rounding of the scheme.
    """
    y, run = layer.prepare(x, tactic)
    run(0, 0)
    if x.is_cuda:
        torch.cuda.synchronize()
    where = (
        f"{layer.scheme.name} {len(x)} x {layer.attrs.out_features} x "
        f"{layer.attrs.in_features}, tactic {tactic}"
    )
    if bool(torch.isnan(y).any()):
        raise CheckError(
            where,
            f"got {int(torch.isnan(y).sum())} outputs that nothing wrote, expected none",
            "Run the self-test",
        )
    last = (layer.attrs.out_features - 1) // BLOCK * BLOCK
    some = torch.unique(torch.linspace(0, len(x) - 1, min(rows, len(x)), device=x.device).long())
    tokens = x[some].cpu().numpy()
    for first in sorted({0, last // 2 // BLOCK * BLOCK, last}):
        attrs, tensors = layer.block(first)
        want = op_spec(layer.scheme.op).reference(tokens, tensors, attrs).astype(np.float64)
        got = y[some, first : first + BLOCK].cpu().numpy().astype(np.float64)
        limit = 2e-3 * np.abs(want) + 2e-3 * np.abs(want).max()
        form = op_spec(layer.scheme.op).affine(attrs)
        one_scale = form is not None and form.group_size in (0, attrs.in_features)
        if one_scale and attrs.abits < 16:
            limit = np.zeros_like(want)  # integers until the last steps: equal to the last bit
        if (np.abs(got - want) > limit).any():
            worst = np.unravel_index(int(np.argmax(np.abs(got - want) - limit)), want.shape)
            raise CheckError(
                where,
                f"got {got[worst]} for token {int(some[worst[0]])}, channel {first + worst[1]}, "
                f"expected {want[worst]}",
                "Run the self-test",
            )
