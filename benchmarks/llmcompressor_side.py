"""llm-compressor's half of against_llmcompressor.py: SmoothQuant, then GPTQ to W4A8, with its own
defaults otherwise.

PYTHONPATH=. PEER_PYTHON benchmarks/llmcompressor_side.py FOLDER --calib TEXT --nsamples N --seqlen
L [--group-size G] --out DIR Runs where llm-compressor is installed. DIR/seconds.json holds the
seconds of import, load, calibrate and save. PEER_PYTHON benchmarks/llmcompressor_side.py --versions
Imports what the other form imports and prints the versions as JSON.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import sys
import time
from pathlib import Path
from typing import Any

SMOOTHING = 0.5
PACKAGES = ("llmcompressor", "compressed-tensors", "torch", "transformers")


class Stopwatch:
    """Seconds of each step, one after the other."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._began = time.monotonic()

    def lap(self, step: str) -> None:
        """What came since the last call was this step."""
        now = time.monotonic()
        self.seconds[step], self._began = round(now - self._began, 2), now


def w4a8_groups(group_size: int) -> dict[str, Any]:
    """llm-compressor's config_groups: symmetric int4 weights, one scale per output channel (0) or
    group; dynamic int8 per token.
    """
    shape = (
        {"strategy": "group", "group_size": group_size} if group_size else {"strategy": "channel"}
    )
    return {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 4, "type": "int", "symmetric": True, **shape},
            "input_activations": {
                "num_bits": 8,
                "type": "int",
                "symmetric": True,
                "strategy": "token",
                "dynamic": True,
            },
        }
    }


def quantise(args: argparse.Namespace) -> None:
    """Read the model, quantise it on the windows that python -m calibration takes too, write it and
    the seconds.
    """
    watch = Stopwatch()
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from calibration.data import calibration_windows
    from calibration.settings import CalibrationSettings

    watch.lap("import")
    tokenizer = AutoTokenizer.from_pretrained(
        args.model, local_files_only=True, trust_remote_code=False
    )
    model = AutoModelForCausalLM.from_pretrained(
        args.model, dtype=torch.float32, local_files_only=True, trust_remote_code=False
    )
    watch.lap("load")
    settings = CalibrationSettings(
        calib=str(args.calib), nsamples=args.nsamples, seqlen=args.seqlen
    )
    windows = calibration_windows(
        tokenizer, settings, args.seqlen, model.config.vocab_size, offline=True
    )[0].tolist()
    recipe = [
        SmoothQuantModifier(smoothing_strength=SMOOTHING),
        GPTQModifier(config_groups=w4a8_groups(args.group_size), ignore=["lm_head"]),
    ]
    dataset = Dataset.from_dict(
        {"input_ids": windows, "attention_mask": [[1] * args.seqlen for _ in windows]}
    )
    oneshot(
        model=model,
        tokenizer=tokenizer,
        recipe=recipe,
        dataset=dataset,
        max_seq_length=args.seqlen,
        num_calibration_samples=args.nsamples,
        shuffle_calibration_samples=False,
    )
    watch.lap("calibrate")
    model.save_pretrained(args.out, save_compressed=True)
    tokenizer.save_pretrained(args.out)
    watch.lap("save")
    (args.out / "seconds.json").write_text(json.dumps(watch.seconds), encoding="utf-8")


def versions() -> dict[str, str]:
    """Of the packages that decide the result; fails where one is missing."""
    for module in (
        "calibration.data",
        "datasets",
        "llmcompressor.modifiers.gptq",
        "llmcompressor.modifiers.transform.smoothquant",
        "ml_dtypes",
        "transformers.models.llama.modeling_llama",
    ):
        importlib.import_module(module)
    return {name: importlib.metadata.version(name) for name in PACKAGES}


def main() -> int:
    """Run one of the two forms."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", metavar="FOLDER", help="a Hugging Face folder in fp32")
    parser.add_argument("--calib")
    parser.add_argument("--nsamples", type=int)
    parser.add_argument("--seqlen", type=int)
    parser.add_argument("--group-size", type=int, default=0)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--versions", action="store_true")
    args = parser.parse_args()
    missing = [
        name
        for name in ("model", "calib", "nsamples", "seqlen", "out")
        if getattr(args, name) is None
    ]
    if missing and not args.versions:
        parser.error(f"missing: {', '.join(missing)}")
    if args.versions:
        print(json.dumps(versions()))
    else:
        quantise(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
