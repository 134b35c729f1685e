"""A model with random weights and a published model's shapes, as a Hugging Face folder.

python benchmarks/random_model.py FOLDER --like llama-3.2-1b [--layers N]

For what does not depend on the values: time, memory, sizes. Weights are fp16 and uniform,
and are written layer by layer, so that a model of 7 B weights needs little memory.
The tokenizer is of bytes and has no more tokens than it learns from the default calibration text.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
    | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 1024},
    "llama-3.2-1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16}
    | {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256},
    "llama-7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32}
    | {"num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": 128}
    | {"vocab_size": 32000, "tie_word_embeddings": False},
    "llama-13b": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40}
    | {"num_attention_heads": 40, "num_key_value_heads": 40, "head_dim": 128}
    | {"vocab_size": 32000, "tie_word_embeddings": False},
}


ROUNDED = ["--wbits", "4", "--abits", "8", "--method", "rtn"]


def own_and_exporters() -> tuple[list[str], list[str]]:
    """This command's words in front of a "--", and those for the exporter behind it: plain rounding where
    there is none.
    """
    words = sys.argv[1:]
    if "--" not in words:
        return words, ROUNDED
    at = words.index("--")
    return words[:at], words[at + 1 :]


def tensor_shapes(config: dict[str, Any]) -> dict[str, dict[str, tuple[int, ...]]]:
    """The tensors of each file: of the embedding and the head, then of each layer."""
    hidden, width = config["hidden_size"], config["head_dim"]
    query, key = (config[f"num_{kind}_heads"] * width for kind in ("attention", "key_value"))
    inner = config["intermediate_size"]
    outer = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    outer["model.norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        outer["lm_head.weight"] = (config["vocab_size"], hidden)
    files: dict[str, dict[str, tuple[int, ...]]] = {"model-outer.safetensors": outer}
    for layer in range(config["num_hidden_layers"]):
        tensors = {
            "self_attn.q_proj": (query, hidden),
            "self_attn.k_proj": (key, hidden),
            "self_attn.v_proj": (key, hidden),
            "self_attn.o_proj": (hidden, query),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
            "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
        }
        files[f"model-{layer:03}.safetensors"] = {
            f"model.layers.{layer}.{name}.weight": shape for name, shape in tensors.items()
        }
    return files


def random_weights(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """fp16 between -0.05 and 0.05."""
    whole = rng.integers(-127, 128, shape, np.int8)
    return whole.astype(np.float16) * np.float16(0.05 / 127)


def write_tokenizer(folder: Path, vocab: int) -> None:
    """A byte-level BPE tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from calibration.data import default_text

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=min(vocab, 4096),
        special_tokens=["<|end|>"],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([default_text()], trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|end|>", eos_token="<|end|>", pad_token="<|end|>"
    ).save_pretrained(folder)


def write_model(folder: Path, like: str, layers: int | None = None, seed: int = 0) -> None:
    """Write the folder."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "float16",
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
    } | SHAPES[like]
    if layers is not None:
        config["num_hidden_layers"] = layers
    (folder / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    rng, weight_map, total = np.random.default_rng(seed), {}, 0
    for name, shapes in tensor_shapes(config).items():
        tensors = {
            tensor: np.ones(shape, np.float16) if len(shape) == 1 else random_weights(rng, shape)
            for tensor, shape in shapes.items()
        }
        save_file(tensors, folder / name, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
        total += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    write_tokenizer(folder, config["vocab_size"])
    print(f"{folder}: {total / 1e9:.2f} GB")


def main() -> None:
    """Write what the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--like", choices=SHAPES, required=True)
    parser.add_argument("--layers", type=int, help="in place of the published model's number")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    write_model(args.folder, args.like, args.layers, args.seed)


if __name__ == "__main__":
    main()
