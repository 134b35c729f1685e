"""Blocks of tiny models, ready to be calibrated, and the command that calibrates a whole one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from calibration.__main__ import main
from calibration.blocks.driver import Basis, BlockTask
from calibration.blocks.forward import (
    BlockWeights,
    block_output,
    embedded,
    float_linear,
    load_block,
)
from calibration.blocks.ranks import ALONE
from calibration.blocks.rounding import Plain
from calibration.blocks.streams import StreamBudget, Windows
from calibration.blocks.walk import Streams
from calibration.checkpoints.checkpoint import Checkpoint, open_checkpoint
from calibration.methods.qqq.settings import QqqSettings
from calibration.quant.scheme import QuantScheme
from calibration.reference.steps import PLAIN, Rope
from calibration.settings import CalibrationSettings
from tests.conftest import FOUR_WINDOWS, W4A8

__all__ = [
    "MODELS",
    "QQQ",
    "QQQ_GROUPS",
    "W3A6",
    "block_task",
    "calibrate_tiny",
    "files",
    "float_logits",
    "streams",
    "tokens",
]

QQQ = QuantScheme("QQQGemm", "qqq", 4, 8, act_symmetric=True)
QQQ_GROUPS = QuantScheme("QQQGemm", "qqq", 4, 8, group_size=64, act_symmetric=True)
W3A6 = QuantScheme("ABQGemm", "qqq", 3, 6, group_size=16)
MODELS: dict[
    str, dict[str, Any]
] = {  # changes to the tiny model, which has grouped queries, tied embeddings and no biases
    "tied, grouped queries": {},
    "untied, one key per query": {"tie_word_embeddings": False, "num_key_value_heads": 4},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "biases, untied, one key for all": {
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": False,
        "num_key_value_heads": 1,
    },
    "hidden 48": {"hidden_size": 48, "intermediate_size": 80},
    "hidden 36": {
        "hidden_size": 36,
        "intermediate_size": 64,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    },
    "wide heads": {"head_dim": 24},
}


def tokens(count: int = 4, length: int = 32, vocabulary: int = 512, seed: int = 0) -> Tensor:
    """Random token ids int64 [count, length]."""
    return torch.randint(vocabulary, (count, length), generator=torch.Generator().manual_seed(seed))


def streams(inputs: list[Tensor], budget: StreamBudget | None = None, real: bool = True) -> Streams:
    """Both residual streams holding the same windows [L, H]."""
    budget = budget or StreamBudget()

    def stream() -> Windows:
        windows = budget.windows(len(inputs), tuple(inputs[0].shape))
        for index, x in enumerate(inputs):
            windows[index] = x
        return windows

    return Streams(stream(), stream() if real else None, budget)


def block_task(
    model: Path,
    method: QqqSettings | None = None,
    scheme: QuantScheme = QQQ,
    weights: BlockWeights | None = None,
    index: int = 0,
) -> BlockTask:
    """Block `index` of a model, in its own coordinates unless `weights` are given, with four
    windows of 32 embedded tokens.
    """
    checkpoint: Checkpoint = open_checkpoint(str(model), offline=True)
    table = checkpoint.tensor("model.embed_tokens.weight")
    settings = CalibrationSettings(nsamples=4, seqlen=32, method=method or QqqSettings())
    block = checkpoint.decoder.blocks[index]
    return BlockTask(
        block=block,
        count=checkpoint.decoder.layers,
        weights=weights or load_block(checkpoint, index),
        rope=Rope.of(checkpoint, 32),
        schemes=dict.fromkeys(block.sites, scheme),
        streams=streams([table[row] for row in tokens()]),
        settings=settings,
        ranks=ALONE,
        windows=len(tokens()),
    )


def calibrate_tiny(model: Path, out: Path, *more: str) -> int:
    """Exit code of the command on four windows of 32 tokens, without a word and without the
    network.
    """
    return main(
        [
            str(model),
            *W4A8,
            *FOUR_WINDOWS,
            "--out",
            str(out),
            "--offline",
            "--progress",
            "none",
            *more,
        ]
    )


def files(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def float_logits(checkpoint: Checkpoint, ids: Tensor, basis: Basis | None = None) -> Tensor:
    """Logits [B, S, vocab] of the float model, step by step.

    Args:
        ids: int64 [B, S].
        basis: in which its weights are; None: as they are.
    """
    basis = basis or Plain()
    decoder = checkpoint.decoder
    x = embedded(basis.tensor(checkpoint, f"{decoder.embedding.name}.weight"), ids, decoder)
    for block in decoder.blocks:
        weights = basis.load(checkpoint, block.index)
        rope = Rope.of(checkpoint, ids.shape[1], step=block.rope, max_context=ids.shape[1])
        x = block_output(x, weights, float_linear(weights, block), block, rope)
    head = decoder.head
    tied = decoder.tied and not basis.unties
    table = basis.tensor(checkpoint, f"{(decoder.embedding if tied else head).name}.weight")
    scores = PLAIN.norm(x, head.norm, basis.tensor(checkpoint, head.norm.gain)) @ table.T
    return scores if head.softcap is None else PLAIN.softcap(scores, head.softcap)
