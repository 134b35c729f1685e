"""Records the bytes of quant/ and onnx/ for a set of exports, to show that a change of the code
changed none of them.

    python benchmarks/same_bytes.py record before.json           # in the checkout before the change
    python benchmarks/same_bytes.py check before.json [--demo]   # in the one after it: exit code 3
    where a file differs

Bytes depend on the processor, so both must run on one machine. `--demo` adds the demo model, which
takes several minutes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
MODELS = {
    "llama": ("Llama", {**TINY, "tie_word_embeddings": True}),
    "bias": (
        "Llama",
        {
            **TINY,
            "tie_word_embeddings": False,
            "attention_bias": True,
            "mlp_bias": True,
            "num_key_value_heads": 1,
        },
    ),
    "mistral": (
        "Mistral",
        {**TINY, "tie_word_embeddings": False, "sliding_window": None, "num_key_value_heads": 4},
    ),
}
FLOAT_HEAD = "--head-bits 16"
FEW = "--nsamples 3 --seqlen 64"
CASES = {  # name: (model, arguments of python -m exporter)
    "qqq": ("llama", f"--wbits 4 --abits 8 {FLOAT_HEAD} {FEW}"),
    "qqq-bias-g64": (
        "bias",
        f"--wbits 4 --abits 8 --group-size 64 --dtype bfloat16 {FLOAT_HEAD} {FEW}",
    ),
    "qqq-smooth": (
        "bias",
        f"--wbits 4 --abits 8 --set rotation=none --set smooth=all --kv-bits 4 {FLOAT_HEAD} {FEW}",
    ),
    "qqq-orthogonal": (
        "mistral",
        f"--wbits 4 --abits 8 --set rotation=orthogonal --set smooth=down --set refits=1 {FLOAT_HEAD} {FEW}",
    ),
    "abq-w2b": ("llama", f"--wbits 2b --abits 8 --group-size 32 {FLOAT_HEAD} {FEW}"),
    "abq-train": (
        "bias",
        f"--wbits 3 --abits 6 --kv-bits 4 --set epochs=1 --set tune=1 {FLOAT_HEAD} {FEW}",
    ),
    "abq-paper": (
        "llama",
        f"--wbits 2 --abits 8 --effort paper {FLOAT_HEAD} {FEW} --set epochs=1 --set "
        "train_windows=2",
    ),
    "abq-a16": ("mistral", f"--wbits 4 --abits 16 --dtype float32 {FLOAT_HEAD} {FEW}"),
    "abq-1b": ("bias", f"--wbits 1b --abits 4 --act-quant sym {FLOAT_HEAD} {FEW}"),
    "mixed": ("llama", f"--wbits 4 --abits 8 --bits-file BITS {FLOAT_HEAD} {FEW}"),
    "budget": ("bias", f"--wbits 4 --abits 8 --budget 4.6 {FLOAT_HEAD} {FEW}"),
    "rtn": ("bias", "--wbits 4 --abits 8 --method rtn --format compressed-tensors"),
    "rtn-abq": ("mistral", "--wbits 5 --abits 7 --method rtn --group-size 16 --act-quant asym"),
    "head-8": ("llama", f"--wbits 4 --abits 8 --head-bits 8 {FEW}"),
    "head-4": ("bias", f"--wbits 3 --abits 6 --group-size 32 --head-bits 4 {FEW}"),
    "rtn-head": ("llama", "--wbits 4 --abits 16 --method rtn --head-bits 6"),
}
DEMO = {
    "demo-w4a8": "--wbits 4 --abits 8 --effort fast",
    "demo-w2b-g64": "--wbits 2b --abits 8 --group-size 64 --effort fast --nsamples 4",
    "demo-w4a16": "--wbits 4 --abits 16 --effort fast --nsamples 4",
}
RULES = "down_proj w8a8\nlayers.0.mlp.gate_up_proj w2ba8-g16\nlayers.1.self_attn.* w4a16\n"


def make_model(folder: Path, architecture: str, config: dict[str, object]) -> None:
    """A random model with gains and biases away from their usual values, and a small tokenizer."""
    import torch
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    from calibration.data import default_text

    torch.manual_seed(0)
    model = getattr(transformers, f"{architecture}ForCausalLM")(
        getattr(transformers, f"{architecture}Config")(**config)
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            elif "layers" in name:
                parameter.mul_(5.0)
    model.save_pretrained(folder)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<|end|>"],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([default_text()], trainer)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|end|>", eos_token="<|end|>"
    ).save_pretrained(folder)


def hashes(out: Path) -> dict[str, str]:
    """{name: SHA-256} of every file below quant/ and onnx/."""
    files = sorted(
        path for stage in ("quant", "onnx") for path in (out / stage).rglob("*") if path.is_file()
    )
    return {
        str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files
    }


def run_case(name: str, model: str, arguments: str, folder: Path) -> dict[str, str]:
    """Export one case and hash it."""
    out, began = folder / "out" / name, time.monotonic()
    command = [
        sys.executable,
        "-m",
        "exporter",
        model,
        *arguments.replace("BITS", str(folder / "bits.txt")).split(),
        "--until",
        "onnx",
        "--engine",
        "none",
        "--offline",
        "--progress",
        "none",
        "--out",
        str(out),
    ]
    subprocess.run(
        command,
        check=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(Path.cwd())},
        stdout=subprocess.DEVNULL,
    )
    print(f"{name}: {time.monotonic() - began:.0f} s", flush=True)
    return hashes(out)


def main() -> int:
    """Record or check; 3 where bytes differ."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=("record", "check"))
    parser.add_argument("file", type=Path)
    parser.add_argument("--demo", action="store_true", help="the demo model too")
    parser.add_argument("--only", nargs="*", help="these cases")
    args = parser.parse_args()
    wanted = {
        name
        for name in (*CASES, *(DEMO if args.demo else ()))
        if not args.only or name in args.only
    }
    found: dict[str, dict[str, str]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "bits.txt").write_text(RULES, encoding="utf-8")
        sys.path.insert(0, str(Path.cwd()))
        for name, (architecture, config) in MODELS.items():
            make_model(folder / name, architecture, config)
        for name, (model, arguments) in CASES.items():
            if name in wanted:
                found[name] = run_case(name, model, arguments, folder)
        for name, arguments in DEMO.items():
            if name in wanted:
                found[name] = run_case(name, "smollm2-135m", arguments, folder)
    if args.action == "record":
        args.file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        return 0
    before = json.loads(args.file.read_text(encoding="utf-8"))
    wrong = [
        f"{case}: {file}"
        for case, files in before.items()
        if case in found
        for file, digest in sorted(files.items())
        if found[case].get(file) != digest
    ]
    new = sorted({file for case, files in found.items() for file in files.keys() - before[case]})
    if new:
        print(f"new files: {', '.join(new)}")
    print(
        "\n".join(f"differs: {line}" for line in wrong) or f"{len(found)} exports, the same bytes"
    )
    return 3 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
