"""Rotation of the residual stream and of value heads, folded into weights in fp64: the same
function, without outlier channels.

RMSNorm commutes with an orthogonal matrix once its gain is moved into the linears that read it
(QuaRot, arXiv 2404.00456; QQQ's rotation option). With x' = x Q: weights that read x become W Q,
weights that write x become Q^T W. Nothing is left to do at run time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from calibration.blocks.forward import INPUT_NORM, POST_NORM, BlockWeights, load_block

if TYPE_CHECKING:
    from calibration.checkpoints.checkpoint import Checkpoint

__all__ = ["Rotation", "fold_gains", "hadamard", "orthogonal"]

_READERS = {
    "self_attn.q_proj": INPUT_NORM,
    "self_attn.k_proj": INPUT_NORM,
    "self_attn.v_proj": INPUT_NORM,
    "mlp.gate_proj": POST_NORM,
    "mlp.up_proj": POST_NORM,
}
_ROWS = 4096  # of a table, in fp64 together
_WRITERS = ("self_attn.o_proj", "mlp.down_proj")


def orthogonal(size: int, generator: torch.Generator) -> Tensor:
    """A random orthogonal matrix, Haar distributed, fp64 [size, size]: QR of a Gaussian with the
    signs of R fixed.
    """
    q, r = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator))
    return (q * torch.sign(torch.diagonal(r))).contiguous()


def hadamard(size: int, generator: torch.Generator) -> Tensor:
    """A randomised Hadamard matrix fp64 [size, size], H diag(+-1) / sqrt(size).

    For size = 2^k m with m odd > 1 the Kronecker product of the 2^k Hadamard matrix and a random
    orthogonal m x m one: no Hadamard matrix of an odd order exists, and this keeps every entry of
    the order of 1 / sqrt(size).
    """
    odd = size // (size & -size)
    h = torch.ones(1, 1, dtype=torch.float64)
    while len(h) < size // odd:
        h = torch.cat((torch.cat((h, h), 1), torch.cat((h, -h), 1)), 0)
    h = h / math.sqrt(len(h))
    if odd > 1:
        h = torch.kron(h, orthogonal(odd, generator))
    return h * (torch.randint(0, 2, (size,), generator=generator, dtype=torch.float64) * 2 - 1)


def fold_gains(weights: BlockWeights) -> BlockWeights:
    """Norm gains moved into the columns of the linears that read them; gains become ones. fp64
    inside.
    """
    folded = dict(weights)
    for name, norm in _READERS.items():
        folded[f"{name}.weight"] = (
            weights[f"{name}.weight"].double() * weights[f"{norm}.weight"].double()
        ).float()
    for norm in (INPUT_NORM, POST_NORM):
        folded[f"{norm}.weight"] = torch.ones_like(weights[f"{norm}.weight"])
    return folded


@dataclass(frozen=True)
class Rotation:
    """An orthogonal matrix for the residual stream and one for every value head.

    Attributes:
        residual: Q, fp64 [hidden, hidden].
        head: R, fp64 [head_dim, head_dim]; v' = v R, read by o_proj as W_o (I x R).
    """

    residual: Tensor
    head: Tensor

    @classmethod
    def make(cls, kind: str, hidden: int, head_dim: int, seed: int) -> Rotation:
        """kind "hadamard" or "orthogonal"; the seed fixes it, on every machine with the same torch."""
        generator = torch.Generator().manual_seed(seed)
        maker = {"hadamard": hadamard, "orthogonal": orthogonal}[kind]
        return cls(maker(hidden, generator), maker(head_dim, generator))

    def block(self, weights: BlockWeights) -> BlockWeights:
        """A block's weights (gains not yet folded) in the rotated basis, fp32 from fp64."""
        rotated = fold_gains(weights)

        def wide(name: str) -> Tensor:
            return weights[f"{name}.weight"].double()

        for name, norm in _READERS.items():
            rotated[f"{name}.weight"] = (
                wide(name) * weights[f"{norm}.weight"].double() @ self.residual
            )
        for name in _WRITERS:
            rotated[f"{name}.weight"] = self.residual.T @ wide(name)
            if f"{name}.bias" in weights:
                rotated[f"{name}.bias"] = self.residual.T @ weights[f"{name}.bias"].double()
        value, out = "self_attn.v_proj", "self_attn.o_proj"
        rotated[f"{value}.weight"] = self._rows(rotated[f"{value}.weight"])
        if f"{value}.bias" in weights:
            rotated[f"{value}.bias"] = self._rows(weights[f"{value}.bias"].double()[:, None])[:, 0]
        rotated[f"{out}.weight"] = self._rows(rotated[f"{out}.weight"].T).T
        return {name: tensor.float().contiguous() for name, tensor in rotated.items()}

    def _rows(self, rows: Tensor) -> Tensor:
        """[heads * d, K]: R^T on every head's d rows, so that the head's vector v becomes v R."""
        heads = rows.unflatten(0, (-1, len(self.head)))
        return (self.head.T @ heads).flatten(0, 1)

    def load(self, checkpoint: Checkpoint, index: int) -> BlockWeights:
        """Block `index` of a checkpoint, rotated."""
        return self.block(load_block(checkpoint, index))

    unties = True

    def tensor(self, checkpoint: Checkpoint, name: str) -> Tensor:
        """A tensor outside the blocks, fp32: the embedding E Q, a final norm of ones, the head W
        diag(gain) Q.

        A tied embedding gives both tables, which are no longer the same.
        """
        family = checkpoint.family
        embedding, gain = f"{family.embedding}.weight", f"{family.final_norm}.weight"
        if name == embedding:
            return _product(checkpoint.tensor(name), None, self.residual)
        if name == gain:
            return torch.ones_like(checkpoint.tensor(name))
        return _product(
            checkpoint.tensor(embedding if checkpoint.dims.tied else name),
            checkpoint.tensor(gain),
            self.residual,
        )


def _product(table: Tensor, gain: Tensor | None, residual: Tensor) -> Tensor:
    """table diag(gain) Q in fp64, by chunks of rows and into the table's own memory."""
    scaled = residual if gain is None else gain.double()[:, None] * residual
    for rows in table.split(_ROWS):
        rows.copy_(rows.double() @ scaled)
    return table
