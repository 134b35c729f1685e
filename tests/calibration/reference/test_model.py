"""The torch references: the float one equals transformers' own, the quantised one follows the
scheme.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from calibration.checkpoints.checkpoint import open_checkpoint
from calibration.quant.folder import read_quant
from calibration.reference.fake_quant import FakeQuantLinear
from calibration.reference.model import _cache_argument, float_model, quantised_model

IDS = torch.arange(48).reshape(2, 24) * 7 % 512


def _logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": False},
        {"attention_bias": True, "mlp_bias": True},
        {"head_dim": 32},
        {"dtype": "bfloat16"},
        {"architecture": "Mistral", "sliding_window": None},
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ],
    ids=str,
)
def test_float_model_equals_transformers_own_loading(
    tiny_llama: Callable[..., Path], changes: dict[str, Any]
) -> None:
    from transformers import AutoModelForCausalLM

    folder = tiny_llama(**changes)
    ours = float_model(open_checkpoint(str(folder), True))
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert type(ours) is type(theirs) and not ours.training
    assert torch.equal(_logits(ours), _logits(theirs))


@pytest.mark.parametrize(
    "fields",
    [
        {"wbits": 8, "abits": 16, "dtype": "float32"},
        {"wbits": 8, "abits": 8},
        {},
        {"op": "QQQGemm"},
        {"op": "QQQGemm", "group_size": 64},
        {"dtype": "bfloat16"},
    ],
    ids=str,
)
def test_quantised_model_is_near_the_float_model(
    tiny_quant: Callable[..., Path], tiny_model_dir: Path, fields: dict[str, Any]
) -> None:
    expected = _logits(float_model(open_checkpoint(str(tiny_model_dir), True)))
    quant = read_quant(tiny_quant(**fields) / "quant")
    got = _logits(quantised_model(quant))
    error = 10 * torch.log10(expected.square().mean() / (got - expected).square().mean())
    assert error > (
        30 if fields.get("wbits") == 8 else 6
    )  # dB; the random tiny model is harder on 4 bits than a real one


def test_quantised_model_equals_one_with_its_weights_replaced_by_hand(
    tiny_quant: Callable[..., Path], tiny_model_dir: Path
) -> None:
    quant = read_quant(tiny_quant(4, 16, dtype="float32") / "quant")
    model = float_model(open_checkpoint(str(tiny_model_dir), True))
    for name, module in model.named_modules():
        if name.endswith("_proj"):
            module.weight.data = torch.from_numpy(quant.linear(name).dequantize())
    torch.testing.assert_close(
        _logits(quantised_model(quant)), _logits(model), rtol=1e-5, atol=1e-5
    )


def test_every_linear_is_one_of_codes_and_the_head_stays_tied(
    tiny_quant: Callable[..., Path],
) -> None:
    quant = read_quant(tiny_quant() / "quant")
    model = quantised_model(quant)
    assert list(model.linears) == list(quant.decoder.linears) and len(model.linears) == 14
    assert all(isinstance(linear, FakeQuantLinear) for linear in model.linears.values())
    table = torch.from_numpy(quant.tensor("model.embed_tokens.weight").astype(np.float32))
    normed: dict[str, torch.Tensor] = {}

    def keep(kind: str, name: str, value: torch.Tensor) -> torch.Tensor:
        normed[f"{kind} {name}"] = value
        return value

    logits = quantised_model(quant, round_activations=False)(IDS, tap=keep).logits
    last = normed["layer 1"]
    gain = torch.from_numpy(quant.tensor("model.norm.weight").astype(np.float32))
    scaled = last * torch.rsqrt(last.square().mean(-1, keepdim=True) + 1e-5) * gain
    torch.testing.assert_close(logits, scaled @ table.T)


def test_what_flows_between_steps_is_rounded(tiny_quant: Callable[..., Path]) -> None:
    quant = read_quant(tiny_quant() / "quant")

    def values(round_activations: bool) -> dict[str, torch.Tensor]:
        seen: dict[str, torch.Tensor] = {}

        def keep(kind: str, name: str, value: torch.Tensor) -> torch.Tensor:
            seen[f"{kind} {name}"] = value
            return value

        made = quantised_model(quant, round_activations)(IDS, tap=keep)
        return seen | {"logits": made.logits}

    rounded, plain = values(True), values(False)
    # of each layer two norms, inputs and outputs of four nodes, new keys, and the stream behind it;
    # of the head its norm, input and output, and the logits
    assert len(rounded) == 2 * (2 + 8 + 1 + 1) + 3 + 1
    for name, value in rounded.items():
        assert torch.equal(value, value.half().float()), name
        if name != "norm model.layers.0.input_layernorm":  # rows of the fp16 table
            assert not torch.equal(plain[name], plain[name].half().float()), name
        torch.testing.assert_close(value, plain[name], rtol=0.3, atol=0.3)


def test_generation_with_the_cache_equals_one_pass(tiny_quant: Callable[..., Path]) -> None:
    model = quantised_model(read_quant(tiny_quant(8, 16, dtype="float32") / "quant"))
    whole = model(IDS).logits
    first = model(IDS[:, :20])
    rest = model(IDS[:, 20:], cache=first.cache).logits
    np.testing.assert_allclose(rest.numpy(), whole[:, 20:].numpy(), atol=1e-4)


def test_both_names_that_transformers_gives_the_cache() -> None:
    class Old:
        def forward(self, input_ids: int, past_key_values: None = None) -> None: ...

    class New:
        def forward(self, input_ids: int, cache: None = None, **more: int) -> None: ...

    assert _cache_argument(Old()) == "past_key_values"
    assert _cache_argument(New()) == "cache"
