"""GGUF files: a tiny one written on the spot must give back the Hugging Face model it was made
from.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from calibration.checkpoints.checkpoint import Checkpoint, open_checkpoint
from calibration.families import family
from calibration.families.decoder import Config
from calibration.reference.model import FloatReference, float_model
from plugins.errors import InputError
from tests.calibration.block_cases import float_logits
from tests.calibration.checkpoints.gguf_files import finish, write_gguf
from tests.conftest import FAMILIES

AGAIN = "The file is truncated or damaged: download it again."
SPLIT = {"split_max_tensors": 8}  # of 20 tensors: three parts


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


GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 6}
ROPE = {"rope_type": "linear", "rope_theta": 1000.0, "factor": 4.0}
CONVERTED: dict[str, dict[str, Any]] = {
    "Gemma2": {**GEMMA, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    "Gemma3": {
        **GEMMA,
        "num_hidden_layers": 6,
        "rope_parameters": {
            "full_attention": ROPE,
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        },
    },
    "Granite": FAMILIES["Granite"],
    "Olmo2": {},
    "Phi3": {
        **FAMILIES["Phi3"],
        "original_max_position_embeddings": 20,
        "rope_parameters": {**FAMILIES["Phi3"]["rope_parameters"], "attention_factor": 1.3},
    },
    "Qwen2": {"rope_parameters": ROPE},
    "Qwen3": FAMILIES["Qwen3"],
    "SmolLM3": {"num_hidden_layers": 5},
}


@pytest.mark.parametrize("name", CONVERTED)
def test_files_of_other_families_give_back_their_models(
    tiny_llama: Callable[..., Path], tmp_path: Path, name: str
) -> None:
    original = open_checkpoint(str(tiny_llama(architecture=name, **CONVERTED[name])), True)
    copy = open_checkpoint(str(write_gguf(tmp_path / "m.gguf", original)), True)
    assert list(copy.decoder.shapes()) == list(original.decoder.shapes())
    for tensor in original.decoder.shapes():  # adding and taking 1 away rounds
        first, second = original.array(tensor), copy.array(tensor)
        np.testing.assert_allclose(first, second, atol=1e-6, rtol=0, err_msg=tensor)
    for frequencies in original.decoder.frequencies:
        np.testing.assert_allclose(original.rope(frequencies)[0], copy.rope(frequencies)[0])
    for length in (12, 24):
        ids = torch.arange(2 * length).reshape(2, -1) * 7 % 512
        want = FloatReference(float_model(original))(ids).logits
        for found in (FloatReference(float_model(copy))(ids).logits, float_logits(copy, ids)):
            torch.testing.assert_close(found, want, atol=1e-4, rtol=0)


MOE: dict[str, dict[str, Any]] = {
    "Mixtral": FAMILIES["Mixtral"],
    "Qwen3Moe": {**FAMILIES["Qwen3Moe"], "mlp_only_layers": [], "norm_topk_prob": True},
}


@pytest.mark.parametrize("name", MOE)
@pytest.mark.parametrize("unstacked", [False, True], ids=["stacked", "unstacked"])
def test_mixtures_of_experts_have_the_logits_of_transformers(
    tiny_llama: Callable[..., Path], tmp_path: Path, name: str, unstacked: bool
) -> None:
    folder = tiny_llama(architecture=name, **MOE[name])
    original = open_checkpoint(str(folder), True)
    write_gguf(tmp_path / "m.gguf", original, unstacked=unstacked, split_max_tensors=16)
    part = next(tmp_path.glob("m-00002-of-*.gguf"))
    copy = open_checkpoint(str(part), True)
    _same_tensors(original, copy)
    ids = torch.arange(24).reshape(2, -1) * 7 % 512
    with torch.no_grad():
        want = AutoModelForCausalLM.from_pretrained(folder)(ids).logits
    torch.testing.assert_close(
        FloatReference(float_model(copy))(ids).logits, want, atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("name", MOE)
def test_experts_have_the_names_that_the_converter_gives(
    tiny_llama: Callable[..., Path], name: str
) -> None:
    """What writes files for these tests has its names from the families; gguf's own table has not."""
    model = open_checkpoint(str(tiny_llama(architecture=name, **MOE[name])), True)
    kinds = {kind: number for number, kind in gguf.MODEL_ARCH_NAMES.items()}
    table = gguf.get_tensor_name_map(kinds[model.family.gguf], model.decoder.layers)
    for info in model.decoder.tensors():
        converted = re.sub(r"experts\.\d+", "experts", info.name)
        assert info.gguf == table.get_name(converted, (".weight", ".bias")), info.name


def test_experts_that_are_not_the_configs(tiny_llama: Callable[..., Path], tmp_path: Path) -> None:
    original = open_checkpoint(str(tiny_llama(architecture="Mixtral", **MOE["Mixtral"])), True)
    path = tmp_path / "m.gguf"

    def refusal(metadata: dict[str, Any], **options: Any) -> str:
        write_gguf(path, original, metadata, **options)
        with pytest.raises(InputError) as caught:
            open_checkpoint(str(path), True)
        return str(caught.value).removeprefix(str(path))

    assert refusal({"llama.expert_count": 4}) == (
        ", tensor blk.0.ffn_gate_exps.weight: got shape [5, 112, 80], expected [4, 112, 80], a matrix "
        "for each of 4 experts. The weights and the metadata belong to different models: download "
        "it again."
    )
    assert refusal({"llama.expert_count": 4}, unstacked=True).startswith(
        ": got tensors that the model's 2 layers do not use: blk.0.ffn_gate.4.weight"
    )
    assert refusal({"llama.expert_count": 6}, unstacked=True) == (
        ": got 47 of the 53 tensors its config asks for, missing expert 5 of layer 0, expert 5 of "
        "layer 1 (experts in the file: 5, in the config: 6). The file is incomplete or belongs to a "
        "smaller model: check the download."
    )
    assert refusal({"llama.expert_used_count": 6}) == (
        ": got num_experts_per_tok 6, expected at most the 5 experts of a layer. Choose a model "
        "without it; this export would compute something else."
    )
    assert refusal({"llama.expert_count": 1 << 20}) == (
        ", num_local_experts: got 1048576, expected at most 1024. Choose a model that is not so large."
    )


def test_parts_of_a_fused_tensor_are_dequantized_alone(
    tiny_llama: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = open_checkpoint(str(tiny_llama(architecture="Phi3", **CONVERTED["Phi3"])), True)
    copy = open_checkpoint(str(write_gguf(tmp_path / "m.gguf", original)), True)
    read: list[int] = []

    def dequantize(data: np.ndarray, kind: gguf.GGMLQuantizationType) -> np.ndarray:
        read.append(len(data))
        return gguf.quants.dequantize(data, kind)

    monkeypatch.setattr("calibration.checkpoints.gguf.dequantize", dequantize)
    for part, rows in (("q_proj", 96), ("k_proj", 48), ("v_proj", 48)):
        name = f"model.layers.1.self_attn.{part}.weight"
        np.testing.assert_array_equal(copy.array(name), original.array(name))
        assert read.pop() == rows and not read


def test_the_largest_gemmas_divide_queries_by_another_number() -> None:
    sizes = {"hidden_size": 96, "num_attention_heads": 4, "head_dim": 16}
    for name, layers in (("gemma2", 46), ("gemma3", 62)):
        implied = family(name).gguf_implied
        for count, scalar in ((layers, 24), (26, 16)):
            found = implied(Config(sizes | {"num_hidden_layers": count}))
            assert found["query_pre_attn_scalar"] == scalar


def test_quantized_types_are_dequantized(tiny_model_dir: Path, tmp_path: Path) -> None:
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
        quantized = tensor.name == "blk.0.ffn_down.weight"
        data = (
            gguf.quants.quantize(weight, gguf.GGMLQuantizationType.Q8_0)
            if quantized
            else tensor.data
        )
        writer.add_tensor(
            tensor.name, data, raw_dtype=gguf.GGMLQuantizationType.Q8_0 if quantized else None
        )
    finish(writer)
    got = open_checkpoint(str(tmp_path / "q.gguf"), True).array(
        "model.layers.0.mlp.down_proj.weight"
    )
    assert got.dtype == np.float32
    steps = np.abs(weight).reshape(64, -1, 32).max(-1, keepdims=True) / 127
    assert (np.abs(got - weight).reshape(64, -1, 32) <= steps * 0.6).all()


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


def _refusal(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        open_checkpoint(str(path), True)
    return str(caught.value)


@pytest.fixture
def parts(tiny_model_dir: Path, tmp_path: Path) -> list[Path]:
    """The tiny model in three parts, as the gguf package splits it."""
    write_gguf(tmp_path / "tiny.gguf", open_checkpoint(str(tiny_model_dir), True), **SPLIT)
    return [tmp_path / f"tiny-0000{number}-of-00003.gguf" for number in (1, 2, 3)]


def test_any_part_opens_the_whole_set(parts: list[Path], tiny_gguf: Path) -> None:
    whole, opened = open_checkpoint(str(tiny_gguf), True), []
    for part in parts:
        checkpoint = open_checkpoint(str(part), True)
        _same_tensors(whole, checkpoint)
        assert checkpoint.name == "tiny"
        assert checkpoint.hf_config() == whole.hf_config()
        assert checkpoint.tokenizer()("Light.")["input_ids"]
        opened.append(checkpoint.fingerprint)
    assert len(set(opened)) == 1


def test_the_fingerprint_of_a_set_depends_on_every_part(parts: list[Path]) -> None:
    before = open_checkpoint(str(parts[0]), True).fingerprint
    data = bytearray(parts[2].read_bytes())
    data[-40] ^= 1
    parts[2].write_bytes(data)
    assert open_checkpoint(str(parts[0]), True).fingerprint != before


def test_missing_parts_are_named(parts: list[Path]) -> None:
    parts[0].unlink()
    parts[1].unlink()
    assert _refusal(parts[2]) == (
        f"{parts[2]}: got 1 of 3 parts, missing tiny-00001-of-00003.gguf, tiny-00002-of-00003.gguf. "
        "Put all parts of the model into one folder."
    )


def test_a_part_under_another_name(parts: list[Path]) -> None:
    path = parts[1].rename(parts[1].with_name("b.gguf"))
    assert _refusal(path) == (
        f"{path}: got one of 3 parts under a name of its own, expected NAME-00001-of-00003.gguf. "
        "Give the parts the names that gguf-split gave them."
    )


def test_parts_in_the_wrong_order(parts: list[Path]) -> None:
    parts[1].write_bytes(parts[2].read_bytes())
    assert _refusal(parts[0]) == (
        f"{parts[1]}: got split.no 2 of split.count 3, expected 1 of 3. "
        "The part belongs to another model or was renamed: download it again."
    )


def test_a_tensor_in_two_parts(parts: list[Path], tiny_model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    write_gguf(
        tmp_path / "other" / "tiny.gguf",
        open_checkpoint(str(tiny_model_dir), True),
        split_max_tensors=9,
    )
    parts[1].write_bytes((tmp_path / "other" / "tiny-00001-of-00003.gguf").read_bytes())
    data = parts[1].read_bytes()
    at = data.index(b"split.no") + len(b"split.no") + 4
    parts[1].write_bytes(data[:at] + b"\1" + data[at + 1 :])
    assert _refusal(parts[0]).startswith(f"{parts[1]}, tensor ")
    assert _refusal(parts[0]).endswith(f": got this tensor twice, expected it in one part. {AGAIN}")


def test_a_set_with_another_number_of_tensors(parts: list[Path]) -> None:
    data = parts[0].read_bytes()
    at = data.index(b"split.tensors.count") + len(b"split.tensors.count") + 4
    parts[0].write_bytes(data[:at] + b"\x63" + data[at + 1 :])
    assert _refusal(parts[0]) == (f"{parts[0]}: got 20 tensors in 3 parts, expected 99. {AGAIN}")


def test_tensors_that_the_family_does_not_use_are_named(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    names = ["rope_factors_long.weight", "blk.0.attn_q_norm.weight", "a.b", "c"]
    path = write_gguf(
        tmp_path / "m.gguf",
        open_checkpoint(str(tiny_model_dir), True),
        extra={name: np.ones(8, np.float32) for name in names},
    )
    assert _refusal(path) == (
        f"{path}: got tensors that the model's 2 layers do not use: "
        "rope_factors_long.weight, blk.0.attn_q_norm.weight, a.b and 1 more. "
        "The export would drop them: choose a model without them."
    )


def test_what_the_file_tells_is_refused_without_waiting_for_transformers(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    """Whose import takes seconds."""
    original, extra = open_checkpoint(str(tiny_model_dir), True), {"a.b": np.ones(8, np.float32)}
    path = write_gguf(tmp_path / "m.gguf", original, extra=extra)
    script = (
        "import sys\n"
        "from calibration.checkpoints.checkpoint import open_checkpoint\n"
        "from plugins.errors import InputError\n"
        f"try:\n    open_checkpoint({str(path)!r}, True)\n"
        "except InputError as error:\n    print(error, {'torch', 'transformers'} & {*sys.modules})\n"
    )
    found = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert found.stdout == (
        f"{path}: got tensors that the model's 2 layers do not use: a.b. The export would drop them: "
        "choose a model without them. set()\n"
    )


def test_layers_beyond_the_block_count_are_named(tiny_model_dir: Path, tmp_path: Path) -> None:
    path = write_gguf(
        tmp_path / "m.gguf", open_checkpoint(str(tiny_model_dir), True), {"llama.block_count": 1}
    )
    assert _refusal(path) == (
        f"{path}: got tensors that the model's 1 layers do not use: blk.1.attn_norm.weight, "
        "blk.1.ffn_norm.weight, blk.1.attn_q.weight and 6 more. "
        "The export would drop them: choose a model without them."
    )


def test_a_type_that_cannot_be_read_shows_before_any_work(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    original = open_checkpoint(str(tiny_model_dir), True)
    norm = original.array("model.norm.weight").astype(np.int32)
    path = write_gguf(tmp_path / "m.gguf", original, extra={"output_norm.weight": norm})
    assert _refusal(path) == (
        f"{path}, tensor output_norm.weight: got type I32 that cannot be read (Dequantization for "
        "I32 is not yet implemented). Convert the model to another GGUF type, such as Q8_0 or F16."
    )


@pytest.mark.parametrize(
    ("factors", "problem"),
    [
        (np.ones(4, np.float32), "got shape [4], expected [8], half a head"),
        (np.zeros(8, np.float32), "got 0.0, expected positive numbers"),
        (np.full(8, np.nan, np.float32), "got nan, expected positive numbers"),
    ],
    ids=["shape", "zero", "nan"],
)
def test_rope_factors_that_are_none(
    tiny_model_dir: Path, tmp_path: Path, factors: np.ndarray, problem: str
) -> None:
    original = open_checkpoint(str(tiny_model_dir), True)
    path = write_gguf(tmp_path / "m.gguf", original, extra={"rope_freqs.weight": factors})
    with pytest.raises(InputError) as caught:
        open_checkpoint(str(path), True).rope()
    assert str(caught.value) == f"{path}, tensor rope_freqs.weight: {problem}. {AGAIN}"
