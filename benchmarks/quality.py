"""How far quantised models are from their float model on held-out text: perplexity, top-1
agreement, KL divergence.

python benchmarks/quality.py OUT [OUT ...] --text wiki.test.raw [--first 20] [--seqlen 2048]
[--model smollm2-135m]
    [--hf-folder DIR ...] [--name quality | --json FILE]

OUT is an artefact folder, DIR a Hugging Face folder, one that llm-compressor wrote too (this takes
the package compressed-tensors). The windows do not overlap, each is scored alone, without BOS. All
arithmetic is fp32, with the activation quantisation of each model; log-probabilities and sums are
fp64. Every model is in memory at once, logits only of CHUNK positions. Prints a table and writes
benchmarks/results/<name>-<date>.json, or FILE.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporter.proof.quality import CHUNK, Quality
from plugins.cli import run_cli, whole_number
from plugins.errors import InputError

if TYPE_CHECKING:
    from numpy import ndarray
    from torch import Tensor

    from calibration.checkpoints.checkpoint import Checkpoint
    from calibration.reference.model import Reference

__all__ = ["FLOAT", "Quality", "main", "open_models", "score", "table"]

FLOAT = "float"


def score(models: dict[str, Reference], windows: ndarray) -> dict[str, Quality]:
    """Compare models over token windows.

    Args:
        models: by name; the first is the float model.
        windows: tokens [n, L], of which 1..L-1 are predicted.

    Returns:
        The sums of each model, the float model's against itself.
    """
    import torch

    totals = {name: Quality() for name in models}
    with torch.no_grad():  # inference tensors have no version, which ActivationQuantizer looks at
        for window in torch.from_numpy(windows):
            inputs, targets = window[None, :-1], window[1:]
            hidden = {name: model.hidden(inputs)[0] for name, model in models.items()}
            for start in range(0, len(targets), CHUNK):
                piece = slice(start, start + CHUNK)
                reference: Tensor | None = None
                for name, model in models.items():
                    log_probabilities = model.head(hidden[name][piece]).double().log_softmax(-1)
                    reference = log_probabilities if reference is None else reference
                    totals[name].add(reference, log_probabilities, targets[piece])
    return totals


def open_models(
    checkpoint: Checkpoint, outs: Sequence[Path], folders: Sequence[Path]
) -> dict[str, Reference]:
    """The float model, then the quantised ones under their folders' names, all with fp32
    arithmetic.

    Raises:
        InputError: a folder cannot be read, has another vocabulary, two have one name, or exports are
            for contexts with different rotary frequencies.
    """
    from calibration.quant.folder import read_quant
    from calibration.reference.model import FloatReference, float_model, quantised_model
    from deploy.compare import contexts

    quants = [read_quant(out / "quant") for out in outs]
    longest = contexts(outs, quants)
    own = {
        out: quantised_model(quant, round_activations=False, max_context=most)
        for out, quant, most in zip(outs, quants, longest, strict=True)
    }
    whole = float_model(checkpoint, longest[0] if longest else None)
    models: dict[str, Reference] = {FLOAT: FloatReference(whole)}
    for path in (*outs, *folders):
        name = path.resolve().name
        if name in models:
            raise InputError(
                str(path),
                f"got a second model named {name}, expected different names",
                "Rename the folder",
            )
        models[name] = model = FloatReference(_hf_model(path)) if path in folders else own[path]
        got, expected = model.vocab, checkpoint.config.vocab_size
        if got != expected:
            raise InputError(
                str(path),
                f"got a vocabulary of {got} tokens, expected the {expected} of {checkpoint.name}",
                "Give the float model it was made from with --model",
            )
    return models


def _hf_model(folder: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    if not (folder / "config.json").is_file():
        raise InputError(
            str(folder),
            "got no config.json in it, expected a Hugging Face model folder",
            "Check the path",
        )
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, trust_remote_code=False
        ).eval()
    except ImportError as error:
        raise InputError(
            str(folder),
            f"got a model that needs a package which is not there "
            f"({str(error).strip().splitlines()[0]})",
            "Run this script with the Python that wrote the folder",
        ) from None
    # compressed-tensors unpacks its weights in the first call of the whole model; score() calls
    # only its parts.
    with torch.no_grad():
        model(torch.zeros(1, 1, dtype=torch.long))
    return model


def table(rows: dict[str, dict[str, float]]) -> str:
    """One line for each model."""
    width = max(len(name) for name in rows)
    lines = [f"{'':<{width}}  {'perplexity':>14}  {'top-1':>8}  {'KL, nats':>9}"]
    return "\n".join(
        [
            *lines,
            *(
                f"{name:<{width}}  {row['ppl']:14,.4f}  {row['top1']:8.2%}  {row['kl']:9.5f}"
                for name, row in rows.items()
            ),
        ]
    )


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """The content of the result file."""
    import torch

    from calibration.checkpoints.checkpoint import open_checkpoint
    from exporter.proof.perplexity import select_windows, text_windows

    checkpoint = open_checkpoint(args.model, offline=True)
    windows = text_windows(checkpoint.tokenizer(), args.text, args.seqlen, checkpoint.decoder.vocab)
    windows = windows[select_windows(len(windows), 0, args.first)]
    totals = score(open_models(checkpoint, args.outs, args.hf_folder), windows)
    return {
        "date": datetime.date.today().isoformat(),
        "model": checkpoint.name,
        "text": args.text.name,
        "windows": len(windows),
        "seqlen": args.seqlen,
        "tokens": totals[FLOAT].tokens,
        "machine": platform.machine(),
        "torch": torch.__version__,
        "rows": {name: quality.means(name) for name, quality in totals.items()},
    }


def _main(argv: Sequence[str] | None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("outs", metavar="OUT", nargs="*", type=Path)
    add("--text", type=Path, required=True)
    add(
        "--first",
        type=whole_number(0),
        default=20,
        help="windows to score, from the start; 0 is all (default 20)",
    )
    add("--seqlen", type=whole_number(2), default=2048)
    add(
        "--model",
        default="smollm2-135m",
        help="the float model: alias, Hugging Face folder or .gguf file",
    )
    add("--hf-folder", metavar="DIR", nargs="+", type=Path, default=[])
    add("--name", default="quality", help="of the result file")
    add("--json", metavar="FILE", type=Path, help="write the result here instead")
    args = parser.parse_args(argv)
    result = measure(args)
    print(table(result["rows"]))
    path = args.json or Path(__file__).parent / "results" / f"{args.name}-{result['date']}.json"
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"written to {path}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    return run_cli(lambda: _main(argv))


if __name__ == "__main__":
    sys.exit(main())
