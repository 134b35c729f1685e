"""Small random decoder blocks and streams for the tests of the trained method."""

from __future__ import annotations

import torch
from torch import Tensor

from calibration.blocks.forward import BlockWeights
from calibration.families.decoder import Block
from calibration.quant.scheme import QuantScheme
from calibration.reference.steps import Rope
from tests.calibration.llama import LINEARS, SITES, llama_block

__all__ = ["HEAD_DIM", "HIDDEN", "block", "rope", "scheme", "streams"]

HEAD_DIM, HIDDEN, INTERMEDIATE = 8, 32, 48


def block(
    heads: int = 4, kv_heads: int = 2, bias: bool = True, seed: int = 0
) -> tuple[BlockWeights, Block]:
    """Weights fp32, biases on every linear if any, norm gains away from 1."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    rows = {
        "q_proj": heads * HEAD_DIM,
        "k_proj": kv_heads * HEAD_DIM,
        "v_proj": kv_heads * HEAD_DIM,
        "o_proj": HIDDEN,
        "gate_proj": INTERMEDIATE,
        "up_proj": INTERMEDIATE,
        "down_proj": HIDDEN,
    }
    columns = {"o_proj": heads * HEAD_DIM, "down_proj": INTERMEDIATE}
    weights = {
        "input_layernorm.weight": 1 + 0.3 * random(HIDDEN),
        "post_attention_layernorm.weight": 1 + 0.3 * random(HIDDEN),
    }
    for name in LINEARS:
        short = name.split(".")[1]
        weights[f"{name}.weight"] = random(rows[short], columns.get(short, HIDDEN)) * 0.2
        if bias:
            weights[f"{name}.bias"] = 0.3 * random(rows[short])
    return weights, llama_block(heads, kv_heads, HEAD_DIM, HIDDEN, INTERMEDIATE, bias)


def rope(length: int) -> Rope:
    """Of LLaMA's default base."""
    angles = torch.arange(length)[:, None] * 10000.0 ** (-torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    angles = torch.cat((angles, angles), -1)
    return Rope(angles.cos(), angles.sin())


def streams(count: int, length: int = 24, seed: int = 1) -> list[Tensor]:
    """Windows [length, HIDDEN] with a few large channels."""
    generator = torch.Generator().manual_seed(seed)
    channels = torch.ones(HIDDEN)
    channels[[3, 17]] = 12.0
    return [torch.randn(length, HIDDEN, generator=generator) * channels for _ in range(count)]


def scheme(
    wbits: int = 3, abits: int = 8, balanced: bool = False, group_size: int = 16
) -> dict[str, QuantScheme]:
    """The same scheme at every site."""
    return {
        site: QuantScheme("ABQGemm", "abq", wbits, abits, balanced, group_size) for site in SITES
    }
