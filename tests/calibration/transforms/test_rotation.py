"""Rotation: orthogonal matrices, and the same function end to end on models of every build."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from calibration.blocks.forward import block_output, float_linear, load_block
from calibration.blocks.rounding import Plain
from calibration.checkpoints.checkpoint import Checkpoint, open_checkpoint
from calibration.reference.steps import Rope
from calibration.transforms.rotation import Rotation, fold_gains, hadamard, orthogonal
from tests.calibration.block_cases import MODELS, tokens
from tests.calibration.llama import INPUT_NORM, POST_NORM, rms_norm

SIZES = [64, 48, 36, 18, 9, 2, 1]


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("make", [hadamard, orthogonal])
def test_matrices_are_orthogonal_and_fixed_by_the_seed(
    make: Callable[[int, torch.Generator], Tensor], size: int
) -> None:
    matrix = make(size, _generator())
    assert matrix.shape == (size, size) and matrix.dtype == torch.float64
    torch.testing.assert_close(
        matrix.T @ matrix, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-12
    )
    assert torch.equal(matrix, make(size, _generator()))
    assert size < 3 or not torch.equal(matrix, make(size, _generator(1)))


@pytest.mark.parametrize("size", [64, 16, 2])
def test_a_power_of_two_spreads_every_channel_evenly(size: int) -> None:
    torch.testing.assert_close(
        hadamard(size, _generator()).abs(),
        torch.full((size, size), size**-0.5, dtype=torch.float64),
    )


@pytest.mark.parametrize("size", [48, 36])
def test_other_sizes_spread_over_their_power_of_two(size: int) -> None:
    blocks = size & -size  # a channel lands in each of so many parts with the same energy
    energy = hadamard(size, _generator()).square().view(blocks, size // blocks, size).sum(1)
    torch.testing.assert_close(energy, torch.full((blocks, size), 1 / blocks, dtype=torch.float64))


def _logits(checkpoint: Checkpoint, basis: Rotation | Plain, ids: Tensor) -> Tensor:
    """The whole float model in a basis, [B, L] -> [B, L, vocab]."""
    rope = Rope.of(checkpoint, ids.shape[1])
    x = basis.tensor(checkpoint, "model.embed_tokens.weight")[ids]
    for block in checkpoint.decoder.blocks:
        weights = basis.load(checkpoint, block.index)
        x = block_output(x, weights, float_linear(weights, block), block, rope)
    tied = checkpoint.decoder.tied and not basis.unties
    head = basis.tensor(checkpoint, "model.embed_tokens.weight" if tied else "lm_head.weight")
    return rms_norm(x, basis.tensor(checkpoint, "model.norm.weight")) @ head.T


@pytest.mark.parametrize("kind", ["hadamard", "orthogonal", "values", "none"])
@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
def test_the_function_stays(
    tiny_llama: Callable[..., Path], changes: dict[str, Any], kind: str
) -> None:
    """Against transformers. Gains folded or rotated in twice, as tied tables are by the published
    code, give other logits.
    """
    from transformers import AutoModelForCausalLM

    folder = tiny_llama(**changes)
    checkpoint = open_checkpoint(str(folder), offline=True)
    with torch.no_grad():
        wanted = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(
            tokens(2, 24)
        ).logits
    decoder = checkpoint.decoder
    head_dim = decoder.blocks[0].heads.head_dim
    basis = Plain() if kind == "none" else Rotation.make(kind, decoder.hidden, head_dim, seed=3)
    found = _logits(checkpoint, basis, tokens(2, 24))
    assert (found - wanted).abs().max() <= 1e-4 * wanted.abs().max()


def test_tied_tables_part(tiny_model_dir: Path) -> None:
    checkpoint, basis = (
        open_checkpoint(str(tiny_model_dir), offline=True),
        Rotation.make("hadamard", 64, 16, 0),
    )
    assert checkpoint.decoder.tied and basis.unties
    table, gain = (checkpoint.tensor(f"model.{name}.weight") for name in ("embed_tokens", "norm"))
    embedding, head = (
        basis.tensor(checkpoint, "model.embed_tokens.weight"),
        basis.tensor(checkpoint, "lm_head.weight"),
    )
    torch.testing.assert_close(embedding @ basis.residual.float().T, table, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(head @ basis.residual.float().T, table * gain, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(embedding, head)
    assert torch.equal(basis.tensor(checkpoint, "model.norm.weight"), torch.ones(64))
    assert torch.equal(
        checkpoint.tensor("model.embed_tokens.weight"), table
    )  # the source is left alone


def test_values_alone_leave_everything_else(tiny_model_dir: Path) -> None:
    checkpoint = open_checkpoint(str(tiny_model_dir), offline=True)
    basis = Rotation.make("values", 64, 16, 0)
    assert not basis.unties and basis.residual is None
    for name in ("model.embed_tokens.weight", "model.norm.weight"):
        assert torch.equal(basis.tensor(checkpoint, name), checkpoint.tensor(name))
    weights, rotated = load_block(checkpoint, 0), basis.load(checkpoint, 0)
    changed = {name for name in weights if not torch.equal(weights[name], rotated[name])}
    assert changed == {"self_attn.v_proj.weight", "self_attn.o_proj.weight"}


def test_rotation_spreads_an_outlier_channel(tiny_model_dir: Path) -> None:
    checkpoint = open_checkpoint(str(tiny_model_dir), offline=True)
    weights, block = load_block(checkpoint, 0), checkpoint.decoder.blocks[0]
    weights["mlp.gate_proj.weight"][:, 5] *= 100
    rotated = Rotation.make("hadamard", 64, 16, 0).block(weights, block)["mlp.gate_proj.weight"]
    peak, spread = (
        w.abs().amax(1) / w.square().mean(1).sqrt()
        for w in (weights["mlp.gate_proj.weight"], rotated)
    )
    assert peak.median() > 7 and spread.median() < 2


@pytest.mark.parametrize(
    "changes", [{}, {"attention_bias": True, "mlp_bias": True}], ids=["plain", "biases"]
)
def test_folded_gains_leave_the_function_and_become_ones(
    tiny_llama: Callable[..., Path], changes: dict[str, Any]
) -> None:
    checkpoint = open_checkpoint(str(tiny_llama(**changes)), offline=True)
    weights = load_block(checkpoint, 0)
    block = checkpoint.decoder.blocks[0]
    folded = fold_gains(weights, block)
    rope, x = (
        Rope.of(checkpoint, 16),
        torch.randn(1, 16, 64, generator=_generator()),
    )
    wanted = block_output(x, weights, float_linear(weights, block), block, rope)
    torch.testing.assert_close(
        block_output(x, folded, float_linear(folded, block), block, rope),
        wanted,
        rtol=1e-4,
        atol=1e-4,
    )
    for norm in (INPUT_NORM, POST_NORM):
        assert torch.equal(folded[f"{norm}.weight"], torch.ones(64)) and not torch.allclose(
            weights[f"{norm}.weight"], torch.ones(64)
        )
