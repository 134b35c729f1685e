"""GGUF files: a tiny one written on the spot must give back the Hugging Face model it was made
from.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from calibration.checkpoints.checkpoint import Checkpoint, open_checkpoint
from plugins.errors import InputError

AGAIN = "The file is truncated or damaged: download it again."


def _interleaved(rows: np.ndarray, heads: int) -> np.ndarray:
    """The row order llama.cpp's converter writes for q and k."""
    return (
        rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
        .swapaxes(1, 2)
        .reshape(rows.shape)
    )


def write_gguf(
    path: Path,
    checkpoint: Checkpoint,
    metadata: dict[str, Any] | None = None,
    extra: dict[str, np.ndarray] | None = None,
) -> Path:
    """Write a checkpoint as GGUF: fp32 norms and head, Q8_0 for the linears whose rows allow it."""
    config = checkpoint.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    for key, value in (metadata or {}).items():
        kinds = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}
        kinds[type(value)](key, value)
    _add_tokenizer(writer, checkpoint.source.path)
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    for index in range(config.num_hidden_layers):
        block = checkpoint.decoder.blocks[index]
        for part in (*block.norms, *block.linears):
            names[block.name(part.name)] = f"blk.{index}.{part.gguf}"
    for name in checkpoint.decoder.shapes():
        base, _, end = name.rpartition(".")
        array = checkpoint.array(name).astype(np.float32)
        if "q_proj" in name or "k_proj" in name:
            array = _interleaved(
                array,
                config.num_attention_heads if "q_proj" in name else config.num_key_value_heads,
            )
        writer.add_tensor(f"{names[base]}.{end}", np.ascontiguousarray(array))
    for name, array in (extra or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_tokenizer(writer: gguf.GGUFWriter, folder: Path) -> None:
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token == "<|end|>" else 1 for token in tokens])
    writer.add_token_merges(
        [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    )
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)


@pytest.fixture(scope="session")
def tiny_gguf(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(
        tmp_path_factory.mktemp("gguf") / "tiny.gguf", open_checkpoint(str(tiny_model_dir), True)
    )


def _same_tensors(first: Checkpoint, second: Checkpoint) -> None:
    names = list(first.decoder.shapes())
    assert names == list(second.decoder.shapes())
    for name in names:
        np.testing.assert_array_equal(first.array(name), second.array(name), err_msg=name)


@pytest.mark.parametrize(
    "changes",
    [{}, {"tie_word_embeddings": False}, {"attention_bias": True, "mlp_bias": True}],
    ids=str,
)
def test_gguf_gives_back_the_model_it_was_made_from(
    tiny_llama: Callable[..., Path], tmp_path: Path, changes: dict[str, Any]
) -> None:
    original = open_checkpoint(str(tiny_llama(**changes)), True)
    copy = open_checkpoint(str(write_gguf(tmp_path / "m.gguf", original)), True)
    _same_tensors(original, copy)
    assert copy.decoder.shapes() == original.decoder.shapes()
    for field in (
        "rms_norm_eps",
        "max_position_embeddings",
        "bos_token_id",
        "eos_token_id",
        "head_dim",
    ):
        assert getattr(copy.config, field) == pytest.approx(getattr(original.config, field))
    np.testing.assert_array_equal(copy.rope()[0], original.rope()[0])


def test_tokenizer_of_a_gguf(tiny_gguf: Path, tiny_model_dir: Path) -> None:
    text = "The harbour at first light, 350 grams."
    expected = open_checkpoint(str(tiny_model_dir), True).tokenizer()(text)["input_ids"]
    assert open_checkpoint(str(tiny_gguf), True).tokenizer()(text)["input_ids"] == expected


def test_quantised_types_are_dequantised(tiny_model_dir: Path, tmp_path: Path) -> None:
    original = open_checkpoint(str(tiny_model_dir), True)
    weight = original.array("model.layers.0.mlp.down_proj.weight")
    path = write_gguf(tmp_path / "m.gguf", original)
    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(tmp_path / "q.gguf", "llama")
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            writer.add_key_value(
                key,
                field.contents(),
                field.types[0],
                field.types[-1] if len(field.types) > 1 else None,
            )
    for tensor in reader.tensors:
        quantised = tensor.name == "blk.0.ffn_down.weight"
        data = (
            gguf.quants.quantize(weight, gguf.GGMLQuantizationType.Q8_0)
            if quantised
            else tensor.data
        )
        writer.add_tensor(
            tensor.name, data, raw_dtype=gguf.GGMLQuantizationType.Q8_0 if quantised else None
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    got = open_checkpoint(str(tmp_path / "q.gguf"), True).array(
        "model.layers.0.mlp.down_proj.weight"
    )
    assert got.dtype == np.float32
    steps = np.abs(weight).reshape(64, -1, 32).max(-1, keepdims=True) / 127
    assert (np.abs(got - weight).reshape(64, -1, 32) <= steps * 0.6).all()


def test_rope_factors_divide_the_frequencies(tiny_model_dir: Path, tmp_path: Path) -> None:
    original = open_checkpoint(str(tiny_model_dir), True)
    factors = np.linspace(1, 8, 8).astype(np.float32)
    path = write_gguf(tmp_path / "m.gguf", original, extra={"rope_freqs.weight": factors})
    np.testing.assert_array_equal(
        open_checkpoint(str(path), True).rope()[0], original.rope()[0] / factors
    )


@pytest.mark.parametrize(
    ("metadata", "problem"),
    [
        (
            {"llama.rope.scaling.type": "longrope"},
            "got rope_type longrope (frequencies that change with the length), expected one of "
            "default, linear, llama3, yarn",
        ),
        (
            {"llama.rope.dimension_count": 8},
            "got partial_rotary_factor 0.5, expected 1 (the whole head rotates)",
        ),
    ],
)
def test_metadata_the_graph_cannot_express(
    tiny_model_dir: Path, tmp_path: Path, metadata: dict[str, Any], problem: str
) -> None:
    path = write_gguf(tmp_path / "m.gguf", open_checkpoint(str(tiny_model_dir), True), metadata)
    with pytest.raises(InputError) as caught:
        open_checkpoint(str(path), True)
    assert caught.value.where == str(path)
    assert problem in caught.value.problem or caught.value.problem.startswith(
        "got a config that transformers refuses ("
    )


def test_linear_rope_scaling(tiny_model_dir: Path, tmp_path: Path) -> None:
    original = open_checkpoint(str(tiny_model_dir), True)
    path = write_gguf(
        tmp_path / "m.gguf",
        original,
        {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0},
    )
    np.testing.assert_array_equal(
        open_checkpoint(str(path), True).rope()[0], original.rope()[0] / np.float32(4)
    )


def test_bad_magic(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"PK\x03\x04 something else")
    with pytest.raises(InputError) as caught:
        open_checkpoint(str(path), True)
    assert str(caught.value) == (
        f"{path}: got first bytes b'PK\\x03\\x04', expected b'GGUF'. "
        "This is not a GGUF file: check the download."
    )


def test_truncated_data_section(tiny_gguf: Path, tmp_path: Path) -> None:
    whole = tiny_gguf.read_bytes()
    path = tmp_path / "m.gguf"
    path.write_bytes(whole[:-4096])
    with pytest.raises(InputError) as caught:
        open_checkpoint(str(path), True)
    message = str(caught.value)
    assert message.startswith(
        f"{path}: got {len(whole) - 4096} bytes, expected at least "
    ) and message.endswith(f". {AGAIN}")
    wanted = int(message.split("at least ")[1].split(".")[0])
    assert len(whole) - 4096 < wanted <= len(whole)


@pytest.mark.parametrize("size", [4, 5, 20, 24, 100, 1000, 5000])
def test_truncated_metadata(tiny_gguf: Path, tmp_path: Path, size: int) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(tiny_gguf.read_bytes()[:size])
    with pytest.raises(InputError) as caught:
        open_checkpoint(str(path), True)
    assert str(caught.value).startswith(f"{path}: got {size} bytes, expected at least ")
    assert caught.value.fix + "." == AGAIN


def test_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"")
    with pytest.raises(InputError) as caught:
        open_checkpoint(str(path), True)
    assert (
        str(caught.value)
        == f"{path}: got first bytes b'', expected b'GGUF'. This is not a GGUF file: check the download."
    )


def test_random_damage_in_the_metadata_never_escapes(tiny_gguf: Path, tmp_path: Path) -> None:
    """One flipped byte anywhere in the header ends in InputError or in a model, never in another
    exception.
    """
    whole = bytearray(tiny_gguf.read_bytes())
    rng = np.random.default_rng(0)
    path = tmp_path / "m.gguf"
    refused = 0
    for position in [*range(4, 32), *rng.integers(32, 1200, 60)]:
        damaged = bytearray(whole)
        damaged[position] ^= 0xFF
        path.write_bytes(damaged)
        try:
            open_checkpoint(str(path), True)
        except InputError as error:
            assert error.where.startswith(str(path))
            refused += 1
    assert refused > 30


def _empty_gguf(path: Path, architecture: str) -> Path:
    """A whole GGUF file of an architecture, with no other metadata and no tensors."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_other_architecture(tmp_path: Path) -> None:
    path = _empty_gguf(tmp_path / "m.gguf", "bert")
    with pytest.raises(InputError) as caught:
        open_checkpoint(str(path), True)
    assert str(caught.value) == (
        f"{path}: got architecture bert, expected one of llama. Choose a model of a supported "
        "architecture."
    )


def test_missing_metadata(tmp_path: Path) -> None:
    path = _empty_gguf(tmp_path / "m.gguf", "llama")
    with pytest.raises(InputError) as caught:
        open_checkpoint(str(path), True)
    assert str(caught.value) == (
        f"{path}: got no metadata llama.attention.head_count, expected it in a model file. "
        "Convert the model to GGUF again."
    )


def test_weights_and_frequencies_equal_transformers_own_loading(tiny_gguf: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from calibration.reference.model import float_model

    ours = float_model(open_checkpoint(str(tiny_gguf), True))
    theirs = AutoModelForCausalLM.from_pretrained(
        tiny_gguf.parent, gguf_file=tiny_gguf.name, dtype=torch.float32
    )
    expected = theirs.state_dict()
    assert set(ours.state_dict()) == set(expected)
    assert all(torch.equal(value, expected[name]) for name, value in ours.state_dict().items())
    assert torch.equal(ours.model.rotary_emb.inv_freq, theirs.model.rotary_emb.inv_freq)
