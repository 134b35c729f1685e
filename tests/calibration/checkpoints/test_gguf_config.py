"""GGUF metadata as a config: followed as llama.cpp means it, or refused by name."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from calibration.checkpoints.checkpoint import open_checkpoint
from calibration.reference.model import float_model
from plugins.errors import InputError
from tests.calibration.checkpoints.gguf_files import write_gguf, write_metadata

AGAIN = "The file is truncated or damaged: download it again."
ANOTHER = "Choose a model without it; this export would compute something else."
YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
SCALING = "llama.rope.scaling."


@pytest.fixture
def gguf_of(tiny_model_dir: Path, tmp_path: Path) -> Callable[..., Path]:
    """make({key: value}) -> the tiny model with this metadata."""
    original = open_checkpoint(str(tiny_model_dir), True)

    def make(metadata: dict[str, Any], **options: Any) -> Path:
        return write_gguf(tmp_path / "m.gguf", original, metadata, **options)

    return make


def _refusal(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        open_checkpoint(str(path), True)
    message = str(caught.value)
    assert message.startswith(str(path))
    return message.removeprefix(str(path))


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 500000.0},
        {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
        YARN,
        {**YARN, "attention_factor": 1.3},
        {**YARN, "factor": 2.7, "beta_fast": 16.0, "beta_slow": 2.0},
        {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ],
    ids=["default", "linear", "yarn", "attention_factor", "betas", "llama3"],
)
def test_logits_are_those_of_the_folder_that_was_converted(
    tiny_llama: Callable[..., Path], tmp_path: Path, rope: dict[str, Any]
) -> None:
    folder = tiny_llama(rope_parameters=rope)
    path = write_gguf(tmp_path / "m.gguf", open_checkpoint(str(folder), True))
    tokens = torch.from_numpy(np.random.default_rng(0).integers(0, 512, (1, 200)))
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(tokens).logits
        got = float_model(open_checkpoint(str(path), True))(tokens).logits
    exact = rope["rope_type"] != "llama3"  # whose factors are a tensor in fp32
    torch.testing.assert_close(got, expected, rtol=0, atol=0 if exact else 2e-5)


def _llama_cpp(
    kind: str, factor: float, original: int, attention: float = 1.0
) -> tuple[np.ndarray, float]:
    """Frequencies of heads of 16 and the factor on cos and sin, by llama.cpp's formulas."""
    plain = 10000.0 ** (-np.arange(0, 16, 2) / 16)
    scale = 1.0 if kind == "none" else 1 / factor
    if kind != "yarn":
        return plain * scale, attention
    low, high = (
        16 * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(10000.0))
        for rotations in (32, 1)
    )
    low, high = max(0, math.floor(low)), min(15, math.ceil(high))
    mix = 1 - np.clip((np.arange(8) - low) / max(0.001, high - low), 0, 1)
    cancelled = (1 + 0.1 * math.log(factor)) / (1 + 0.1 * math.log(factor))
    magnitude = cancelled * attention * (1 + 0.1 * math.log(factor))
    return plain * scale * (1 - mix) + plain * mix, magnitude


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({"factor": 4.0}, ("linear", 4.0, 256)),
        ({"type": "linear"}, ("linear", 1.0, 256)),
        ({"type": "linear", "factor": 0.0}, ("linear", 1.0, 256)),
        ({"type": "none", "factor": 4.0}, ("none", 4.0, 256)),
        ({"type": "yarn", "factor": 4.0}, ("yarn", 4.0, 256)),
        ({"type": "yarn", "factor": 4.0, "original_context_length": 0}, ("yarn", 4.0, 256)),
        ({"type": "yarn", "factor": 4.0, "original_context_length": 64}, ("yarn", 4.0, 64)),
        ({"type": "yarn", "factor": 4.0, "attn_factor": 0.0}, ("yarn", 4.0, 256)),
        ({"factor": 4.0, "yarn_attn_factor": 0.0}, ("linear", 4.0, 256)),
        (
            {"type": "yarn", "factor": 4.0, "original_context_length": 64, "attn_factor": 0.8},
            ("yarn", 4.0, 64, 0.8),
        ),
        (
            {"type": "yarn", "factor": 4.0, "yarn_ext_factor": 1.0, "finetuned": True},
            ("yarn", 4.0, 256),
        ),
    ],
    ids=str,
)
def test_rope_scaling_as_llama_cpp_computes_it(
    gguf_of: Callable[..., Path], metadata: dict[str, Any], expected: tuple[Any, ...]
) -> None:
    path = gguf_of({SCALING + name: value for name, value in metadata.items()})
    frequencies, magnitude = open_checkpoint(str(path), True).rope()
    wanted, factor = _llama_cpp(*expected)
    np.testing.assert_allclose(frequencies, wanted, rtol=2e-6)
    assert magnitude == pytest.approx(factor, rel=1e-12)


def test_the_older_key_counts_where_the_newer_is_missing(gguf_of: Callable[..., Path]) -> None:
    plain = _llama_cpp("none", 1.0, 256)[0]
    for metadata, factor in (
        ({"llama.rope.scale_linear": 4.0}, 4),
        ({"llama.rope.scale_linear": 4.0, SCALING + "factor": 2.0}, 2),
    ):
        frequencies, _ = open_checkpoint(str(gguf_of(metadata)), True).rope()
        np.testing.assert_allclose(frequencies, plain / factor, rtol=2e-6)


def test_rope_factors_divide_the_frequencies(gguf_of: Callable[..., Path]) -> None:
    factors = np.linspace(1, 8, 8).astype(np.float32)
    plain, _ = open_checkpoint(str(gguf_of({})), True).rope()
    path = gguf_of({}, extra={"rope_freqs.weight": factors})
    np.testing.assert_array_equal(open_checkpoint(str(path), True).rope()[0], plain / factors)


@pytest.mark.parametrize(
    ("metadata", "key", "problem"),
    [
        (
            {SCALING + "type": "longrope"},
            SCALING + "type",
            "got 'longrope', expected none, linear or yarn: frequencies that stay the same",
        ),
        (
            {SCALING + "attn_factor": 1.5},
            SCALING + "attn_factor",
            "got '1.5', expected 1 with RoPE scaling of type linear",
        ),
        (
            {SCALING + "type": "none", SCALING + "yarn_attn_factor": 1.5},
            SCALING + "yarn_attn_factor",
            "got '1.5', expected 1 with RoPE scaling of type none",
        ),
        (
            {SCALING + "yarn_ext_factor": 1.0},
            SCALING + "yarn_ext_factor",
            "got '1.0', expected 0 with RoPE scaling of type linear",
        ),
        (
            {SCALING + "type": "yarn", SCALING + "yarn_ext_factor": 0.5},
            SCALING + "yarn_ext_factor",
            "got '0.5', expected 1",
        ),
        (
            {SCALING + "yarn_log_multiplier": 0.1},
            SCALING + "yarn_log_multiplier",
            "got '0.1', expected nothing: no llama decoder here follows it",
        ),
        (
            {SCALING + "alpha": 1000.0},
            SCALING + "alpha",
            "got '1000.0', expected nothing: no llama decoder here follows it",
        ),
        (
            {"llama.rope.dimension_count": 8},
            "llama.rope.dimension_count",
            "got '8', expected 16, a whole head",
        ),
        (
            {"llama.attention.value_length": 8},
            "llama.attention.value_length",
            "got '8', expected 16, a whole head",
        ),
        (
            {"llama.attention.key_length": 15},
            "llama.attention.key_length",
            "got '15', expected even heads, not 15",
        ),
        (
            {"llama.rope.dimension_sections": [4, 4]},
            "llama.rope.dimension_sections",
            "got a list of 2, expected nothing: no llama decoder here follows it",
        ),
        (
            {"llama.attention.sliding_window": 255},
            "llama.attention.sliding_window",
            "got '255', expected nothing: no llama decoder here follows it",
        ),
        ({"llama.attention.causal": False}, "llama.attention.causal", "got 'False', expected True"),
        ({"llama.expert_gating_func": 2}, "llama.expert_gating_func", "got '2', expected 1"),
        (
            {"llama.attention.scale": 0.5},
            "llama.attention.scale",
            "got '0.5', expected 0.25",
        ),
        ({"llama.logit_scale": 0.5}, "llama.logit_scale", "got '0.5', expected 1"),
        (
            {"llama.attention.clamp_kqv": 8.0},
            "llama.attention.clamp_kqv",
            "got '8.0', expected nothing: no llama decoder here follows it",
        ),
        (
            {"llama.final_logit_softcapping": 30.0},
            "llama.final_logit_softcapping",
            "got '30.0', expected nothing: no llama decoder here follows it",
        ),
        (
            {"llama.invented": "yes"},
            "llama.invented",
            "got 'yes', expected nothing: no llama decoder here follows it",
        ),
    ],
    ids=str,
)  # fmt: skip
def test_keys_that_change_numbers_are_refused_by_name(
    gguf_of: Callable[..., Path], metadata: dict[str, Any], key: str, problem: str
) -> None:
    assert _refusal(gguf_of(metadata)) == f", metadata {key}: {problem}. {ANOTHER}"


def test_keys_that_change_nothing(gguf_of: Callable[..., Path]) -> None:
    plain = open_checkpoint(str(gguf_of({})), True).hf_config()
    metadata = {
        "general.type": "model",
        "general.file_type": 2,
        "quantize.imatrix.entries_count": 210,
        "llama.vocab_size": 512,
        "llama.rope.dimension_count": 16,
        "llama.attention.key_length": 16,
        "llama.attention.value_length": 16,
        "llama.attention.causal": True,
        "llama.attention.scale": 0.25,
        "llama.attention.sliding_window": 256,
        "llama.attention.layer_norm_epsilon": 1e-5,
        "llama.attention.clamp_kqv": 0.0,
        "llama.expert_count": 0,
        "llama.logit_scale": 1.0,
        "llama.embedding_scale": 0.0,
        "llama.use_parallel_residual": False,
        "llama.tensor_data_layout": "Meta AI original pth",
        SCALING + "finetuned": False,
        SCALING + "yarn_log_multiplier": 0.0,
    }
    assert open_checkpoint(str(gguf_of(metadata)), True).hf_config() == plain


@pytest.mark.parametrize(
    ("metadata", "ends"),
    [
        ({}, 0),
        ({"tokenizer.ggml.eot_token_id": 7}, [0, 7]),
        ({"tokenizer.ggml.eot_token_id": 7, "tokenizer.ggml.eom_token_id": 5}, [0, 7, 5]),
        ({"tokenizer.ggml.eot_token_id": 0, "tokenizer.ggml.eom_token_id": 0xFFFFFFFF}, 0),
    ],
    ids=str,
)
def test_every_end_of_a_turn_ends_generation(
    gguf_of: Callable[..., Path], metadata: dict[str, Any], ends: int | list[int]
) -> None:
    assert open_checkpoint(str(gguf_of(metadata)), True).config.eos_token_id == ends


def test_special_tokens_beyond_the_vocabulary(gguf_of: Callable[..., Path]) -> None:
    checkpoint = open_checkpoint(str(gguf_of({"tokenizer.ggml.padding_token_id": 512})), True)
    assert checkpoint.config.pad_token_id is None
    for name in ("bos", "eos", "eot", "eom"):
        key = f"tokenizer.ggml.{name}_token_id"
        assert _refusal(gguf_of({key: 512})) == (
            f", metadata {key}: got '512', expected an id below 512, the number of tokens. {AGAIN}"
        )


@pytest.mark.parametrize(
    ("metadata", "where", "problem"),
    [
        (
            {"llama.block_count": 1 << 30},
            "llama.block_count",
            "got '1073741824', expected at most the 20 tensors of the file",
        ),
        (
            {"llama.embedding_length": 64.5},
            "llama.embedding_length",
            "got '64.5', expected a positive whole number below 2^31",
        ),
        (
            {"llama.context_length": 0xFFFFFFFF},
            "llama.context_length",
            "got '4294967295', expected a positive whole number below 2^31",
        ),
        (
            {"llama.attention.head_count": [4, 4]},
            "llama.attention.head_count",
            "got a list of 2, expected one value",
        ),
        (
            {"llama.attention.layer_norm_rms_epsilon": math.nan},
            "llama.attention.layer_norm_rms_epsilon",
            "got nan, expected a finite number",
        ),
        (
            {"llama.rope.freq_base": [500000.0]},
            "llama.rope.freq_base",
            "got a list of 1, expected one value",
        ),
        ({"split.count": [1, 2]}, "split.count", "got a list of 2, expected one value"),
        (
            {SCALING + "type": "yarn", SCALING + "yarn_ext_factor": math.nan},
            SCALING + "yarn_ext_factor",
            "got nan, expected a finite number",
        ),
        (
            {"llama.logit_scale": math.inf},
            "llama.logit_scale",
            "got inf, expected a finite number",
        ),
        (
            {"llama.context_length": "long"},
            "llama.context_length",
            "got 'long', expected a positive number",
        ),
        (
            {"tokenizer.ggml.tokens": ["a", "b"]},
            "tokenizer.ggml.tokens",
            "got a list of 2, expected 512, the rows of token_embd.weight",
        ),
    ],
    ids=str,
)
def test_values_that_no_model_has(
    gguf_of: Callable[..., Path], metadata: dict[str, Any], where: str, problem: str
) -> None:
    assert _refusal(gguf_of(metadata)) == f", metadata {where}: {problem}. {AGAIN}"


@pytest.mark.parametrize(
    ("key", "value", "field", "most"),
    [
        ("context_length", 1 << 25, "max_position_embeddings", 1 << 24),
        ("feed_forward_length", 1 << 25, "intermediate_size", 1 << 24),
    ],
)
def test_sizes_that_no_model_has(
    gguf_of: Callable[..., Path], key: str, value: int, field: str, most: int
) -> None:
    """The limits are those of config.json."""
    assert _refusal(gguf_of({f"llama.{key}": value})) == (
        f", {field}: got {value}, expected at most {most}. Choose a model that is not so large."
    )


def test_as_many_layers_as_tensors(gguf_of: Callable[..., Path]) -> None:
    tensors = {f"t{index}": np.zeros(1, np.float32) for index in range(2000)}
    assert _refusal(gguf_of({"llama.block_count": 2000}, extra=tensors)) == (
        ", num_hidden_layers: got 2000, expected at most 1024. Choose a model that is not so large."
    )


def test_other_architecture_experts_and_adapters(
    tmp_path: Path, gguf_of: Callable[..., Path]
) -> None:
    known = "gemma2, gemma3, granite, llama, olmo2, phi3, qwen2, qwen3, qwen3moe, smollm3"
    other = f"expected one of {known}. Choose a model of a supported architecture."
    path = tmp_path / "m.gguf"
    write_metadata(path, {}, "bert")
    assert _refusal(path) == f": got architecture bert, {other}"
    path = gguf_of({}, extra={"blk.0.ffn_gate_exps.weight": np.zeros((2, 4, 64), np.float32)})
    assert _refusal(path) == (
        ": got tensors that the model's 2 layers do not use: blk.0.ffn_gate_exps.weight. The export "
        "would drop them: choose a model without them."
    )
    write_metadata(path, {"qwen2.expert_count": 8}, "qwen2")
    assert _refusal(path) == (
        ": got a mixture of experts (qwen2), expected one of llama, qwen3moe where there are "
        "experts. Give the model as a Hugging Face folder."
    )
    write_metadata(path, {"qwen3moe.expert_used_count": 8}, "qwen3moe")
    assert _refusal(path) == (
        ": got no metadata qwen3moe.expert_count, expected it in a model file. "
        "Convert the model to GGUF again."
    )
    path = gguf_of({"llama.expert_count": 8})
    assert _refusal(path) == (
        ": got no metadata llama.expert_used_count, expected it in a model file. "
        "Convert the model to GGUF again."
    )
    write_metadata(path, {"general.type": "adapter"})
    assert _refusal(path) == (
        ", metadata general.type: got 'adapter', expected 'model'. Give the model itself."
    )


def test_missing_metadata(tmp_path: Path) -> None:
    assert _refusal(write_metadata(tmp_path / "m.gguf", {})) == (
        ": got no metadata llama.attention.head_count, expected it in a model file. "
        "Convert the model to GGUF again."
    )


def _keys() -> list[str]:
    sizes = (
        "block_count",
        "context_length",
        "embedding_length",
        "feed_forward_length",
        "vocab_size",
    )
    heads = (
        "head_count",
        "head_count_kv",
        "key_length",
        "layer_norm_rms_epsilon",
        "sliding_window",
    )
    scaling = ("type", "factor", "original_context_length", "attn_factor", "yarn_beta_fast")
    tokens = ("tokens", "token_type", "merges", "model", "pre", "add_bos_token", "eos_token_id")
    return [
        *(f"llama.{name}" for name in (*sizes, "rope.freq_base", "rope.dimension_count")),
        *(f"llama.attention.{name}" for name in heads),
        *(SCALING + name for name in scaling),
        *(f"tokenizer.ggml.{name}" for name in tokens),
        *("tokenizer.chat_template", "general.type", "split.count", "split.tensors.count"),
    ]


ANY_VALUE = st.one_of(
    st.integers(0, 0xFFFFFFFF),
    st.floats(width=32),
    st.booleans(),
    st.sampled_from(["", "llama", "gpt2", "yarn", "linear", "none", "x" * 5000, "\x1b[31m"]),
    st.lists(st.integers(0, 1000), min_size=1, max_size=4),
    st.lists(st.sampled_from(["a", "b c", "<0x0A>"]), min_size=1, max_size=4),
)


@given(values=st.dictionaries(st.sampled_from(_keys()), ANY_VALUE, min_size=1, max_size=3))
@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_metadata_is_refused_or_makes_a_model(
    gguf_of: Callable[..., Path], values: dict[str, Any]
) -> None:
    try:
        checkpoint = open_checkpoint(str(gguf_of(values)), True)
        frequencies, magnitude = checkpoint.rope()
        assert checkpoint.tokenizer()("light")["input_ids"]
    except InputError as error:
        assert len(str(error)) < 1000
    else:
        assert np.isfinite(frequencies).all() and math.isfinite(magnitude)
