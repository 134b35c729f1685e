"""The block as a function of its weights against transformers' own, and its pieces against their
formulas.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from calibration.blocks.forward import block_output, float_linear, load_block
from calibration.checkpoints.checkpoint import open_checkpoint
from calibration.families.steps import Attend, Heads
from calibration.families.steps import Rope as RopeStep
from calibration.reference.steps import Context, Rope, attention_rows, rms_norm, run
from tests.calibration.block_cases import MODELS, tokens
from tests.calibration.llama import SITES, attend

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "rope_theta": 1e4,
    "original_max_position_embeddings": 64,
}


@pytest.mark.parametrize(
    "changes",
    [*MODELS.values(), {"rope_parameters": LLAMA3_ROPE}],
    ids=[*MODELS, "scaled positions"],
)
def test_block_is_that_of_transformers(
    tiny_llama: Callable[..., Path], changes: dict[str, Any]
) -> None:
    from transformers import AutoModelForCausalLM

    folder = tiny_llama(**changes)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    before: list[Tensor] = []
    after: list[Tensor] = []

    def keep(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        before.append(inputs[0])
        after.append(output)

    for layer in model.model.layers:
        layer.register_forward_hook(keep)
    with torch.no_grad():
        model(tokens(2, 48))
    checkpoint = open_checkpoint(str(folder), offline=True)
    rope = Rope.of(checkpoint, 48)
    assert len(before) == 2
    for index, (x, wanted) in enumerate(zip(before, after, strict=True)):
        weights = load_block(checkpoint, index)
        block = checkpoint.decoder.blocks[index]
        found = block_output(x, weights, float_linear(weights, block), block, rope)
        assert (found - wanted).abs().max() <= 2e-5 * wanted.abs().max()
        assert (
            x - wanted
        ).abs().max() > 0.1 * wanted.abs().max()  # a block that does nothing would not do


def test_block_reads_its_sites_in_order(tiny_model_dir: Path) -> None:
    checkpoint = open_checkpoint(str(tiny_model_dir), offline=True)
    weights, seen = load_block(checkpoint, 0), []

    def linear(site: str, x: Tensor) -> Tensor:
        seen.append((site, x.shape[-1]))
        return float_linear(weights, checkpoint.decoder.blocks[0])(site, x)

    block_output(
        torch.randn(1, 8, 64),
        weights,
        linear,
        checkpoint.decoder.blocks[0],
        Rope.of(checkpoint, 8),
    )
    assert seen == list(zip(SITES, (64, 64, 64, 128), strict=True))


@pytest.mark.parametrize("heads", [4, 2, 1])
def test_attention_rows_are_log_probabilities(heads: int) -> None:
    """Their softmax by hand, and times the values they are the attention's own output."""
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(2, 4, 12, 8, generator=generator)
    key, value = torch.randn(2, 2, heads, 12, 8, generator=generator)
    rows = torch.tensor([0, 3, 11])
    found = attention_rows(query, key, rows, Attend(scale=8**-0.5))
    assert found.shape == (2, 4, 3, 12)
    for head in range(4):
        scores = query[:, head, rows] @ key[:, head * heads // 4].mT / 8**0.5
        for place, row in enumerate(rows.tolist()):
            wanted = scores[:, place, : row + 1].softmax(-1)
            torch.testing.assert_close(found[:, head, place, : row + 1].exp(), wanted)
            assert (found[:, head, place, row + 1 :] == -torch.inf).all()
    mixed = found.exp() @ value.repeat_interleave(4 // heads, 1)
    torch.testing.assert_close(
        mixed.transpose(1, 2).flatten(-2), attend(query, key, value)[:, rows]
    )


def test_heads_are_split_as_they_are_stacked() -> None:
    heads, length = Heads(4, 2, 6), 5
    still = Rope(torch.ones(length, 6), torch.zeros(length, 6))
    qkv = torch.arange(length * 48.0).view(1, length, 48)
    made = run((heads, RopeStep()), qkv, Context({}, still)).heads
    assert heads.groups == 2 and made is not None
    query, key, value = made
    torch.testing.assert_close(query[0, 3], qkv[0, :, 18:24])
    torch.testing.assert_close(key[0, 1], qkv[0, :, 30:36])
    torch.testing.assert_close(value[0, 0], qkv[0, :, 36:42])


def test_an_all_zero_token_stays_finite() -> None:
    x = torch.zeros(1, 3, 8)
    assert torch.equal(rms_norm(x, torch.ones(8), 1e-6), x)
