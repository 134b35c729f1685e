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

from calibration.blocks.forward import BlockWeights, load_block
from calibration.families.decoder import Block, Decoder
from calibration.families.steps import Linear, Norm

if TYPE_CHECKING:
    from calibration.checkpoints.checkpoint import Checkpoint

__all__ = ["Rotation", "fold_gains", "hadamard", "obstacle", "orthogonal"]

_ROWS = 4096  # of a table, in fp64 together


def obstacle(decoder: Decoder) -> str:
    """Why the residual stream of a decoder cannot be rotated, or "": every branch has to start with
    a norm and end with a linear.
    """
    for block in decoder.blocks:
        for branch in block.branches:
            first, last = branch.sites[0], branch.sites[-1]
            if branch.norm is None:
                return f"{block.name(first.linears.node)} reads the residual stream without a norm"
            if branch.tail:
                step = branch.tail[0]
                name = block.name(step.name) if isinstance(step, Norm) else type(step).__name__
                return f"{name}, behind {block.name(last.linears.node)}, does not commute with it"
        for node, site in block.sites.items():
            if site.attention and site.source is None:
                return f"{block.name(node)} reads values that are no linear of their own"
    return ""


def _readers(block: Block) -> dict[str, Norm]:
    """Linears that read the normed residual stream, with the norm."""
    return {
        linear.name: branch.norm
        for branch in block.branches
        if branch.norm is not None
        for linear in branch.readers
    }


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


def fold_gains(weights: BlockWeights, block: Block) -> BlockWeights:
    """Norm gains moved into the columns of the linears that read them; gains become ones. fp64
    inside.
    """
    folded = dict(weights)
    for name, norm in _readers(block).items():
        gain = weights[norm.gain]
        folded[f"{name}.weight"] = (weights[f"{name}.weight"].double() * gain.double()).float()
        folded[norm.gain] = torch.ones_like(gain)
    return folded


@dataclass(frozen=True)
class Rotation:
    """An orthogonal matrix for the residual stream and one for every value head.

    Attributes:
        residual: Q, fp64 [hidden, hidden]; None leaves the residual stream, as where obstacle()
            says why it has to stay.
        head: R, fp64 [head_dim, head_dim]; v' = v R, read by o_proj as W_o (I x R).
    """

    residual: Tensor | None
    head: Tensor

    @classmethod
    def make(cls, kind: str, hidden: int, head_dim: int, seed: int) -> Rotation:
        """kind "hadamard" or "orthogonal", or "values": value heads alone by a Hadamard matrix. The
        seed fixes it, on every machine with the same torch.
        """
        generator = torch.Generator().manual_seed(seed)
        if kind == "values":
            return cls(None, hadamard(head_dim, generator))
        maker = {"hadamard": hadamard, "orthogonal": orthogonal}[kind]
        return cls(maker(hidden, generator), maker(head_dim, generator))

    def block(self, weights: BlockWeights, block: Block) -> BlockWeights:
        """A block's weights (gains not yet folded) in the rotated basis, fp32 from fp64."""
        rotated = dict(weights)
        if self.residual is not None:
            rotated = self._residual(weights, block, self.residual)
        for site in block.sites.values():
            if site.by_value_head and isinstance(site.source, Linear):
                self._turn_values(rotated, weights, site.source.name, site.linears.names)
        return {name: tensor.float().contiguous() for name, tensor in rotated.items()}

    def _residual(self, weights: BlockWeights, block: Block, residual: Tensor) -> BlockWeights:
        """Gains in the linears that read the stream, and linears that read and write x Q, in fp64."""
        rotated = fold_gains(weights, block)

        def wide(name: str) -> Tensor:
            return weights[f"{name}.weight"].double()

        readers = _readers(block)
        for name, norm in readers.items():
            rotated[f"{name}.weight"] = wide(name) * weights[norm.gain].double() @ residual
        for branch in block.branches:
            for name in (linear.name for linear in branch.writers):
                weight = rotated[f"{name}.weight"] if name in readers else wide(name)
                rotated[f"{name}.weight"] = residual.T @ weight
                if f"{name}.bias" in weights:
                    rotated[f"{name}.bias"] = residual.T @ weights[f"{name}.bias"].double()
        return rotated

    def _turn_values(
        self, rotated: BlockWeights, weights: BlockWeights, value: str, readers: tuple[str, ...]
    ) -> None:
        """Value heads v R, and the linears that read attention's output."""
        rotated[f"{value}.weight"] = self._rows(rotated[f"{value}.weight"])
        if f"{value}.bias" in weights:
            bias = weights[f"{value}.bias"].double()[:, None]
            rotated[f"{value}.bias"] = self._rows(bias)[:, 0]
        for out in readers:
            rotated[f"{out}.weight"] = self._rows(rotated[f"{out}.weight"].T).T

    def _rows(self, rows: Tensor) -> Tensor:
        """[heads * d, K]: R^T on every head's d rows, so that the head's vector v becomes v R."""
        heads = rows.double().unflatten(0, (-1, len(self.head)))
        return (self.head.T @ heads).flatten(0, 1)

    def load(self, checkpoint: Checkpoint, index: int) -> BlockWeights:
        """Block `index` of a checkpoint, rotated."""
        return self.block(load_block(checkpoint, index), checkpoint.decoder.blocks[index])

    @property
    def unties(self) -> bool:
        """Whether a tied head is no longer the embedding."""
        return self.residual is not None

    def tensor(self, checkpoint: Checkpoint, name: str) -> Tensor:
        """A tensor outside the blocks, fp32: the embedding E Q, a final norm of ones, the head W
        diag(gain) Q.

        A tied embedding gives both tables, which are no longer the same.
        """
        if self.residual is None:
            return checkpoint.tensor(name)
        decoder = checkpoint.decoder
        embedding, gain = f"{decoder.embedding.name}.weight", decoder.head.norm.gain
        if name == embedding:
            return _product(checkpoint.tensor(name), None, self.residual)
        if name == gain:
            return torch.ones_like(checkpoint.tensor(name))
        table = checkpoint.tensor(embedding if decoder.tied else name)
        return _product(table, checkpoint.tensor(gain), self.residual)


def _product(table: Tensor, gain: Tensor | None, residual: Tensor) -> Tensor:
    """table diag(gain) Q in fp64, by chunks of rows and into the table's own memory."""
    scaled = residual if gain is None else gain.double()[:, None] * residual
    for rows in table.split(_ROWS):
        rows.copy_(rows.double() @ scaled)
    return table
