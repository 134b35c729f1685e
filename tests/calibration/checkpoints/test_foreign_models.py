"""What other people's Hugging Face folders hold: tensors beyond the config's, code, and sizes and
types that no model has.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from calibration.__main__ import main
from calibration.checkpoints.checkpoint import open_checkpoint
from calibration.quant.folder import read_quant
from calibration.reference.model import FloatReference, float_model
from plugins.errors import CheckError, InputError
from tests.conftest import FAMILIES, REPOSITORY, W4A8

HEAD, TABLE = "lm_head.weight", "model.embed_tokens.weight"
OTHER = "Choose a model without it; this export would compute something else."
Tensors = dict[str, torch.Tensor]


@pytest.fixture
def model(tiny_model_dir: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that the test may change."""
    return shutil.copytree(tiny_model_dir, tmp_path / "model")


def change(folder: Path, how: Callable[[Tensors], Tensors | None]) -> Tensors:
    """Change the tensors of a folder; returns those that are there then."""
    path = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    tensors = how(tensors) or tensors
    save_file(tensors, path, {"format": "pt"})
    return tensors


def configure(folder: Path, **changes: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return path


def refusal(folder: Path) -> str:
    with pytest.raises(InputError) as caught:
        open_checkpoint(str(folder), offline=True)
    return str(caught.value)


def check_as_transformers(folder: Path, **options: Any) -> None:
    """The float reference's logits are those of transformers' own loading."""
    ids = torch.arange(24).reshape(2, 12) * 7 % 512
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
    ours = FloatReference(float_model(open_checkpoint(str(folder), True)))
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=0, atol=0)


# ---------------------------------------------------------------- tied heads


def test_a_head_of_its_own_in_a_tied_model_is_used_as_transformers_does(model: Path) -> None:
    tensors = change(model, lambda found: found.update({HEAD: torch.randn(512, 64)}))
    checkpoint = open_checkpoint(str(model), True)
    assert torch.equal(checkpoint.tensor(HEAD), tensors[HEAD])
    assert not checkpoint.decoder.tied and not checkpoint.hf_config()["tie_word_embeddings"]
    check_as_transformers(model)


def test_an_equal_copy_of_the_embedding_leaves_a_model_tied(
    model: Path, tiny_model_dir: Path
) -> None:
    change(model, lambda found: found.update({HEAD: found[TABLE].clone()}))
    checkpoint = open_checkpoint(str(model), True)
    assert checkpoint.decoder.tied and HEAD not in checkpoint.decoder.shapes()
    assert checkpoint.hf_config() == open_checkpoint(str(tiny_model_dir), True).hf_config()
    check_as_transformers(model)


def test_one_number_makes_the_difference(model: Path) -> None:
    def add(found: Tensors) -> None:
        found[HEAD] = found[TABLE].clone()
        found[HEAD][-1, -1] += 1e-3

    change(model, add)
    assert not open_checkpoint(str(model), True).decoder.tied


def test_the_table_of_a_tied_model_may_have_the_heads_name_alone(model: Path) -> None:
    tensors = change(model, lambda found: found.update({HEAD: found.pop(TABLE)}))
    checkpoint = open_checkpoint(str(model), True)
    assert checkpoint.decoder.tied and torch.equal(checkpoint.tensor(TABLE), tensors[HEAD])
    check_as_transformers(model)


def test_a_head_of_another_shape_in_a_tied_model(model: Path) -> None:
    change(model, lambda found: found.update({HEAD: torch.zeros(500, 64)}))
    assert refusal(model) == (
        f"{model}, tensor {HEAD}: got shape [500, 64], expected [512, 64] from the config. The "
        "weights and the config belong to different models: use the config of these weights."
    )


def test_a_bin_file_of_a_tied_model_shares_the_table(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    torch.save({**tensors, HEAD: tensors[TABLE]}, model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    assert open_checkpoint(str(model), True).decoder.tied
    check_as_transformers(model)


# ---------------------------------------------------------------- every tensor is used


EXTRA = [
    "model.layers.0.self_attn.q_proj.bias",
    "model.layers.0.mlp.new_gate",
    "model.layers.2.mlp.down_proj.weight",
    "score.weight",
    "vision_tower.patch.weight",
    "x" * 5000,
]


@pytest.mark.parametrize("name", EXTRA, ids=lambda name: name[:20])
@pytest.mark.parametrize("architecture", ["Llama", "Mistral"])
def test_a_tensor_that_nobody_would_use_is_refused(
    tiny_llama: Callable[..., Path], tmp_path: Path, architecture: str, name: str
) -> None:
    sizes = {"sliding_window": None} if architecture == "Mistral" else {}
    check_extra_is_refused(tiny_llama(architecture=architecture, **sizes), tmp_path / "model", name)


@pytest.mark.parametrize("architecture", FAMILIES)
def test_a_tensor_that_nobody_would_use_is_refused_of_every_family(
    tiny_llama: Callable[..., Path],
    more_families: dict[str, str],
    tmp_path: Path,
    architecture: str,
) -> None:
    folder = tiny_llama(architecture=architecture, **FAMILIES[architecture])
    check_extra_is_refused(folder, tmp_path / "model", "model.layers.0.self_attn.sinks")


def check_extra_is_refused(original: Path, folder: Path, name: str) -> None:
    shutil.copytree(original, folder)
    change(folder, lambda found: found.update({name: torch.zeros(3)}))
    shown = name if len(name) < 120 else f"{name[:60]} ... {name[-60:]}"
    assert refusal(folder) == (
        f"{folder}: got tensors the config does not ask for: {shown}. The export would drop them: "
        "correct num_hidden_layers, attention_bias or mlp_bias in the config, or save the model "
        "without them."
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_buffers_of_old_versions_do_no_harm(model: Path, dtype: torch.dtype) -> None:
    frequencies = torch.from_numpy(open_checkpoint(str(model), True).rope()[0].copy())

    def add(found: Tensors) -> None:
        for layer in range(2):
            place = f"model.layers.{layer}.self_attn."
            found[f"{place}rotary_emb.inv_freq"] = frequencies.to(dtype).clone()
            found[f"{place}masked_bias"] = torch.tensor(-1e4)

    change(model, add)
    check_as_transformers(model)


def test_saved_frequencies_of_scaled_positions_are_those_of_rope_theta(model: Path) -> None:
    frequencies = torch.from_numpy(open_checkpoint(str(model), True).rope()[0].copy())
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    change(model, lambda found: found.update({name: frequencies}))
    configure(model, rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0})
    check_as_transformers(model)


@pytest.mark.parametrize("values", [torch.ones(8), torch.ones(3), torch.full((8,), torch.nan)])
def test_saved_frequencies_of_another_rope_theta_are_told_of(
    model: Path, values: torch.Tensor
) -> None:
    """transformers does not read them."""
    assert open_checkpoint(str(model), True).warnings == []
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    change(model, lambda found: found.update({name: values}))
    assert open_checkpoint(str(model), True).warnings == [
        f"{name} holds other rotary frequencies than those of rope_theta 10000, which is used, as "
        "transformers does. If the model was trained with the others, correct rope_theta in "
        "config.json."
    ]
    check_as_transformers(model)


# ---------------------------------------------------------------- prefixes, adapters


@pytest.mark.parametrize("prefix", ["base_model.model.", "language_model.", "_orig_mod."])
@pytest.mark.parametrize("tied", [True, False])
def test_a_prefix_of_all_names(
    tiny_llama: Callable[..., Path], tmp_path: Path, prefix: str, tied: bool
) -> None:
    original = tiny_llama(tie_word_embeddings=tied)
    folder = shutil.copytree(original, tmp_path / "model")
    change(folder, lambda found: {prefix + name: tensor for name, tensor in found.items()})
    change(folder, lambda found: found.update({f"{prefix}masked_bias": torch.zeros(())}))
    check_same_model(folder, original, {f"^{re.escape(prefix)}": ""})


@pytest.mark.parametrize("tied", [True, False])
def test_a_prefix_behind_the_first_part_of_the_names(
    tiny_llama: Callable[..., Path], tmp_path: Path, tied: bool
) -> None:
    original = tiny_llama(tie_word_embeddings=tied)
    folder = shutil.copytree(original, tmp_path / "model")
    change(
        folder,
        lambda found: {
            re.sub(r"^model\.", "model.language_model.", name): tensor
            for name, tensor in found.items()
        },
    )
    check_same_model(folder, original, {r"^model\.language_model\.": "model."})


def check_same_model(folder: Path, original: Path, key_mapping: dict[str, str]) -> None:
    found, wanted = (open_checkpoint(str(path), True) for path in (folder, original))
    assert found.decoder.shapes() == wanted.decoder.shapes()
    for name in found.decoder.shapes():
        np.testing.assert_array_equal(found.array(name), wanted.array(name))
    check_as_transformers(folder, key_mapping=key_mapping)


def test_a_prefix_whose_rest_does_not_fit_is_named(model: Path) -> None:
    change(model, lambda found: {f"language_model.{name}": one for name, one in found.items()})
    change(model, lambda found: found.update({"vision_tower.patch.weight": torch.zeros(3)}))
    assert refusal(model) == (
        f"{model}: got 0 of the 20 tensors its config asks for, missing {TABLE}, "
        "model.layers.0.input_layernorm.weight, model.layers.0.post_attention_layernorm.weight "
        "and 17 more (names have the prefix language_model.). Without that prefix they are not the "
        "config's model either: save the language model alone, with its own config."
    )


def test_an_adapters_tensors_are_told_from_a_models(model: Path) -> None:
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    change(model, lambda found: {name: torch.zeros(8, 64)})
    assert refusal(model) == (
        f"{model}: got 0 of the 20 tensors its config asks for, missing {TABLE}, "
        "model.layers.0.input_layernorm.weight, model.layers.0.post_attention_layernorm.weight "
        "and 17 more (these are an adapter's tensors). Merge the adapter into its base model with "
        "peft's merge_and_unload, and give what that saves."
    )


@pytest.mark.parametrize("config", [True, False])
def test_an_adapters_folder(model: Path, config: bool) -> None:
    path = model / "adapter_config.json"
    path.write_text("{}")
    if not config:
        (model / "config.json").unlink()
    assert refusal(model) == (
        f"{path}: got a PEFT adapter, expected a whole model. Merge it into its base model with "
        "peft's merge_and_unload and give what that saves; if the weights beside it have it in "
        "them, take adapter_config.json away."
    )


# ---------------------------------------------------------------- the float reference


def test_numbers_that_transformers_reads_otherwise_are_found(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_checkpoint(str(model), True)
    stored, name = checkpoint.stored, "model.layers.1.mlp.up_proj.weight"
    monkeypatch.setattr(
        checkpoint, "stored", lambda one: stored(one) * (1.001 if one == name else 1.0)
    )
    with pytest.raises(CheckError) as caught:
        float_model(checkpoint)
    assert str(caught.value) == (
        f"{model}, tensor {name}: got other numbers than transformers reads from the same files. "
        "The quantised model was made of the wrong numbers: do not use it, and report this model."
    )


@pytest.mark.parametrize(
    ("how", "report"),
    [
        (lambda found: {**found, "new.weight": torch.ones(3)}, "unexpected_keys new.weight"),
        (
            lambda found: {key: one for key, one in found.items() if key != "model.norm.weight"},
            "missing_keys model.norm.weight",
        ),
    ],
)
def test_what_transformers_does_not_use_or_makes_up_is_refused(
    model: Path, how: Callable[[Tensors], Tensors], report: str
) -> None:
    checkpoint = open_checkpoint(str(model), True)
    change(model, how)  # behind the back of the checks
    with pytest.raises(InputError) as caught:
        float_model(checkpoint)
    assert str(caught.value) == (
        f"{model}: got weights that transformers does not all use ({report}). Make the checkpoint "
        "again with save_pretrained."
    )


def test_a_folder_that_transformers_does_not_load(model: Path) -> None:
    checkpoint = open_checkpoint(str(model), True)
    (model / "model.safetensors").write_bytes(b"")
    with pytest.raises(InputError) as caught:
        float_model(checkpoint)
    assert caught.value.where == str(model)
    assert caught.value.problem.startswith("got a model that transformers does not load (")


@pytest.mark.parametrize(
    "changes",
    [
        {"return_dict": False},
        {"output_attentions": True},
        {"use_cache": False},
        {"_attn_implementation": "flash_attention_2"},
        {"attn_implementation": "owner/kernels"},
        {"generation_config": 3},
    ],
    ids=str,
)
def test_fields_that_only_a_caller_of_transformers_sees(
    model: Path, tiny_model_dir: Path, changes: dict[str, Any]
) -> None:
    configure(model, **changes)
    (model / "generation_config.json").write_text('{"top_p": 0.5, "num_beams": 0}')
    ids = torch.arange(12)[None]
    ours, original = (
        FloatReference(float_model(open_checkpoint(str(folder), True)))
        for folder in (model, tiny_model_dir)
    )
    assert torch.equal(ours(ids).logits, original(ids).logits)
    assert torch.equal(ours.hidden(ids), original.hidden(ids))


def test_both_a_file_and_an_index_mean_what_transformers_means(
    tiny_llama: Callable[..., Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_llama(shard_size="100KB"), tmp_path / "model")
    tensors = load_file(tiny_llama() / "model.safetensors")
    tensors["model.norm.weight"] = torch.full((64,), 3.0)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    checkpoint = open_checkpoint(str(folder), True)
    assert torch.equal(checkpoint.tensor("model.norm.weight"), tensors["model.norm.weight"])
    check_as_transformers(folder)


# ---------------------------------------------------------------- config.json


SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "vocab_size", "head_dim")


@pytest.mark.parametrize(
    ("field", "most"),
    [
        *((name, 1 << 24) for name in SIZES),
        ("num_key_value_heads", 1 << 24),
        ("max_position_embeddings", 1 << 24),
        ("num_hidden_layers", 1 << 10),
        ("num_labels", 1 << 12),
    ],
)
def test_sizes_that_no_model_has(model: Path, field: str, most: int) -> None:
    path = configure(model, **{field: 1 << 40})
    assert refusal(model) == (
        f"{path}, {field}: got {1 << 40}, expected at most {most}. Correct config.json."
    )


@pytest.mark.parametrize(
    ("field", "value", "problem"),
    [
        ("architectures", 3, "got 3, expected a list or null"),
        ("dtype", [1], "got a list of 1, expected a string or null"),
        ("hidden_size", "", 'got "", expected a whole number or null'),
        ("hidden_size", "wide", 'got "wide", expected a whole number or null'),
        ("hidden_size", 64.0, "got 64.0, expected a whole number or null"),
        ("hidden_size", True, "got true, expected a whole number or null"),
        ("vocab_size", 0, "got 0, expected at least 1"),
        ("rms_norm_eps", "", 'got "", expected a number or null'),
        ("tie_word_embeddings", "no", 'got "no", expected true or false or null'),
        ("model_type", 5, "got 5, expected a string or null"),
        ("is_causal", 1, "got 1, expected true or false or null"),
        ("bos_token_id", "<s>", 'got "<s>", expected a whole number or null'),
        ("bos_token_id", [1], "got a list of 1, expected a whole number or null"),
        ("eos_token_id", 1 << 31, "got 2147483648, expected at most 2147483647"),
    ],
)
def test_fields_of_another_type(model: Path, field: str, value: Any, problem: str) -> None:
    path = configure(model, **{field: value})
    assert refusal(model) == f"{path}, {field}: {problem}. Correct config.json."


@pytest.mark.parametrize(("ids", "meant"), [(-1, None), ([3, -1], [3]), ([-1], [])])
def test_a_negative_token_is_none(model: Path, ids: int | list[int], meant: Any) -> None:
    configure(model, bos_token_id=-1, eos_token_id=ids)
    config = open_checkpoint(str(model), True).config
    assert config.bos_token_id is None and config.eos_token_id == meant


def test_a_model_type_of_another_architecture(model: Path) -> None:
    path = configure(model, model_type="mistral")
    assert refusal(model) == (
        f"{path}, model_type: got mistral, expected llama with LlamaForCausalLM. Correct the one "
        "that is not the model's."
    )


@pytest.mark.parametrize(
    "field",
    [
        "configuration_files",
        "fusion_config",
        "per_layer_config",
        "text_config",
        "transformers_weights",
    ],
)
def test_fields_that_lead_transformers_elsewhere(model: Path, field: str) -> None:
    path = configure(model, **{field: {"0": {"rms_norm_eps": 1.0}}})
    assert refusal(model) == (
        f"{path}, {field}: got a field that makes transformers read or compute something else, "
        f"expected none. {OTHER}"
    )


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"is_causal": False}, "got is_causal false, expected causal attention"),
        (
            {"pad_token_id": 512},
            "got pad_token_id 512, expected a row of the 512 of the embedding",
        ),
        (
            {"hidden_act": "x" * 5000},
            f"got hidden_act {'x' * 185} ... {'x' * 145}, expected one of silu, swish, "
            "gelu_pytorch_tanh, relu2",
        ),
    ],
    ids=["is_causal", "pad_token_id", "hidden_act"],
)
def test_configs_that_would_compute_something_else(
    model: Path, changes: dict[str, Any], problem: str
) -> None:
    path = configure(model, **changes)
    assert refusal(model) == f"{path}: {problem}. {OTHER}"


@pytest.mark.parametrize(
    "field", ["id2label", "rope_parameters", "attention_bias", "initializer_range"]
)
def test_what_transformers_refuses_fits_a_line(model: Path, field: str) -> None:
    path = configure(model, **{field: "x" * 5000})
    message = refusal(model)
    assert message.startswith(f"{path}: got a config that transformers refuses (")
    assert message.endswith("). Correct the named field.") and len(message) < len(str(path)) + 300


@pytest.mark.parametrize("theta", ["", 0, -5, 1e-300])
def test_rope_settings_without_frequencies(model: Path, theta: Any) -> None:
    configure(model, rope_parameters={"rope_type": "default", "rope_theta": theta})
    with pytest.raises(InputError) as caught:
        open_checkpoint(str(model), True).rope()
    assert caught.value.where == str(model)
    assert caught.value.problem.startswith("got RoPE settings without frequencies (")
    assert caught.value.fix == "Correct rope_theta and rope_scaling in config.json"


# ---------------------------------------------------------------- code


CODE = (
    "Nothing here runs such code. If transformers' own classes compute the same, take auto_map out of "
    "the file; download a model of the hub into a folder first."
)
OWN = "got classes in Python code of the model's own, expected those of transformers"


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_code_of_a_model_is_refused_by_name(model: Path, name: str) -> None:
    path = model / name
    known = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**known, "auto_map": {"AutoConfig": "own.Config"}}))
    assert refusal(model) == f"{path}, auto_map: {OWN}. {CODE}"


def test_code_that_transformers_own_classes_were_made_from_is_left_aside(
    tiny_llama: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_llama(architecture="Phi3", **FAMILIES["Phi3"]), folder)
    known = {"AutoConfig": "configuration_phi3.Phi3Config"}
    known |= {"AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"}
    configure(folder, auto_map=known | {"AutoTokenizer": "Xenova/gpt-4o"})
    check_as_transformers(folder)
    assert open_checkpoint(str(folder), True).tokenizer()("The river")["input_ids"]
    configure(folder, auto_map=known | {"AutoTokenizer": "own.Own"})
    assert refusal(folder) == f"{folder / 'config.json'}, auto_map: {OWN}. {CODE}"


def test_code_of_another_family_is_refused(model: Path) -> None:
    path = model / "tokenizer_config.json"
    known = json.loads(path.read_text())
    path.write_text(json.dumps({**known, "auto_map": {"AutoTokenizer": "Xenova/gpt-4o"}}))
    assert refusal(model) == f"{path}, auto_map: {OWN}. {CODE}"


def test_a_quant_folder_names_no_code(tiny_llama: Callable[..., Path], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_llama(architecture="Phi3", **FAMILIES["Phi3"]), folder)
    path = folder / "tokenizer_config.json"
    known = json.loads(path.read_text())
    path.write_text(json.dumps({**known, "auto_map": {"AutoTokenizer": "Xenova/gpt-4o"}}))
    words = [str(folder), *W4A8, "--method", "rtn", "--out", str(tmp_path / "out"), "--offline"]
    assert main([*words, "--progress", "none"]) == 0
    saved = tmp_path / "out/quant/tokenizer_config.json"
    assert "auto_map" not in json.loads(saved.read_text())
    assert read_quant(saved.parent).tokenizer()("The river")["input_ids"]


def test_nobody_is_asked_whether_code_shall_run(model: Path, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    (model / "own.py").write_text(f"open({str(mark)!r}, 'w')\nclass Own: pass\n")
    path = model / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config |= {"auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}, "tokenizer_class": "Own"}
    path.write_text(json.dumps(config))
    out = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, "-m", "calibration", str(model), *W4A8, "--out", str(out)],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        input="y\n" * 9,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and f"{path}, auto_map: {OWN}" in done.stderr.replace("\n", " ")
    assert not mark.exists() and not (out / "quant").exists()


# ---------------------------------------------------------------- files that are none


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.safetensors", "got a pipe, expected a safetensors file. Check the path "),
        ("config.json", "got a pipe, expected a JSON file. The file is truncated "),
        ("tokenizer_config.json", "got a pipe, expected a JSON file. The file is "),
    ],
)
def test_a_pipe_does_not_hang(model: Path, name: str, message: str) -> None:
    (model / name).unlink()
    os.mkfifo(model / name)
    assert refusal(model).startswith(f"{model / name}: {message}")


def test_an_endless_device_does_not_hang(model: Path) -> None:
    (model / "model.safetensors").unlink()
    path = model / "pytorch_model.bin"
    path.symlink_to("/dev/zero")
    assert refusal(model) == (
        f"{path}: got a device, expected a PyTorch file. Check the path and the permissions."
    )
