"""Makes the models that benchmarks/cpu.py gives to the peers.

python benchmarks/cpu_peers.py MODEL FOLDER --python PEERS

MODEL is what was exported: a GGUF file, or a Hugging Face folder of the Llama architecture. PEERS is the
Python of a virtual environment of its own, made with
    python -m venv /tmp/peers
    /tmp/peers/bin/pip install onnxruntime-genai onnx-ir
    /tmp/peers/bin/pip install --no-binary llama-cpp-python llama-cpp-python     (compiles; minutes)
FOLDER gets
    Q4_0.gguf, Q4_K.gguf        quantized by llama.cpp from the same weights
    genai-int4, genai-fp32      ONNX files of ORT-GenAI's builder: MatMulNBits with accuracy_level 4, or
                                plain MatMul
    peers.json                  which there are, and why others are not
The builder runs in this project's environment, which has torch; only its files are the peers'.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

SIDE = Path(__file__).resolve().parent / "cpu_peer_side.py"
BUILDER = """
import runpy, sys
sys.path += [sys.argv.pop(1)]
runpy.run_module("onnxruntime_genai.models.builder", run_name="__main__")
"""
LAYER = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def write_gguf(folder: Path, target: Path) -> None:
    """A Hugging Face folder as GGUF in fp16, for measuring: rows of queries and keys are not put in
    llama.cpp's order, and it has no tokenizer.
    """
    import gguf
    import numpy as np
    from safetensors import safe_open

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    writer = gguf.GGUFWriter(target, "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config.get("rope_theta", 10000.0))
    width = config.get("head_dim", config["hidden_size"] // config["num_attention_heads"])
    writer.add_rope_dimension_count(width)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "np") as tensors:
            for name in tensors.keys():  # noqa: SIM118  (no mapping)
                array = tensors.get_tensor(name)
                array = array.astype(np.float32 if array.ndim == 1 else np.float16)
                writer.add_tensor(gguf_name(name), array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_name(name: str) -> str:
    """What GGUF calls a tensor."""
    outer = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}
    parts = name.removeprefix("model.").removesuffix(".weight")
    if parts in outer:
        return f"{outer[parts]}.weight"
    _, layer, inner = parts.split(".", 2)
    return f"blk.{layer}.{LAYER[inner]}.weight"


def hugging_face(model: Path, folder: Path) -> Path:
    """The model as a Hugging Face folder, which the builder reads."""
    if model.is_dir():
        return model
    from calibration.checkpoints.checkpoint import open_checkpoint
    from calibration.reference.model import float_model

    target = folder / "huggingface"
    if not target.is_dir():
        checkpoint = open_checkpoint(str(model), True)
        float_model(checkpoint).save_pretrained(target)
        checkpoint.tokenizer().save_pretrained(target)
    return target


def build_genai(source: Path, target: Path, precision: str, site: Path) -> None:
    """ORT-GenAI's own builder, for the CPU."""
    level = ["--extra_options", "int4_accuracy_level=4"] if precision == "int4" else []
    command = ["-i", str(source), "-o", str(target), "-p", precision, "-e", "cpu"]
    cache = ["-c", str(target.parent / "cache")]
    run([sys.executable, "-c", BUILDER, str(site), *command, *cache, *level])


def run(command: list[str]) -> None:
    """Run it, or raise RuntimeError with the last line that it wrote."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = (done.stderr or done.stdout).strip().splitlines() or [f"exit {done.returncode}"]
        raise RuntimeError(lines[-1])


def main() -> None:
    """Make what can be made."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--python", type=Path, required=True)
    args = parser.parse_args()
    folder, python = args.folder, str(args.python)
    folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, dict[str, str]] = {}
    missing: dict[str, str] = {}

    def make(name: str, kind: str, target: Path, work: Callable[[], None]) -> None:
        try:
            if not target.exists():
                work()
            found[name] = {"kind": kind, "model": target.name}
            print(f"{name}: {target}", flush=True)
        except (RuntimeError, OSError, ImportError, ValueError, KeyError) as error:
            missing[name] = str(error)
            print(f"{name}: none. {error}", flush=True)

    source = args.model
    if source.is_dir():
        source = folder / "F16.gguf"
        if not source.exists():
            write_gguf(args.model, source)
    for kind in ("Q4_0", "Q4_K"):
        target = folder / f"{kind}.gguf"
        command = [python, str(SIDE), "quantize", str(source), str(target), "--type", kind]
        make(f"llama.cpp {kind}", "llama.cpp", target, lambda command=command: run(command))
    site = next(args.python.parent.parent.glob("lib/python*/site-packages"), args.python.parent)
    for precision in ("int4", "fp32"):
        target = folder / f"genai-{precision}"

        def work(target: Path = target, precision: str = precision) -> None:
            build_genai(hugging_face(args.model, folder), target, precision, site)

        make(f"genai {precision}", "genai", target, work)
    record = {"python": python, "peers": found, "missing": missing}
    (folder / "peers.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
