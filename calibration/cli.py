"""Command-line arguments that say what to quantise and how, shared by every command; imports nothing heavy."""

from __future__ import annotations

import argparse
from pathlib import Path

from calibration import formats
from calibration.methods import method_names
from calibration.scheme import QuantScheme, parse_wbits
from calibration.sources import ALIASES, model_slug
from plugins.core.cli import whole_number
from plugins.core.errors import InputError

__all__ = ["add_quant_arguments", "default_out", "model_slug", "scheme_from_args", "stand_in_notice"]

_LAYOUTS = {"qqq": "QQQGemm", "abq": "ABQGemm"}
_PLAIN = "rtn"


def add_quant_arguments(parser: argparse.ArgumentParser) -> None:
    """MODEL and every option that decides the quantised numbers, and --out, --offline, --progress."""
    add = parser.add_argument
    add("model", metavar="MODEL", help=f"alias ({', '.join(ALIASES)}), hub id, Hugging Face folder or .gguf file")
    add("--wbits", required=True, metavar="W", help="weight bits 1 to 8; 2b (or '2*') for 5 levels, 1b for 3 levels")
    add("--abits", required=True, type=int, metavar="A", help="activation bits 2 to 8, or 16 for weight-only")
    add("--method", default="auto", choices=sorted({"auto", *_LAYOUTS, *method_names()}), help="auto: qqq for W4A8, else abq")
    add("--group-size", type=int, default=0, metavar="G",
        help="input channels per weight scale; 0 (default): one scale per output channel")
    add("--act-quant", choices=("sym", "asym"), help="activation codes; default: sym for qqq, asym for abq")
    add("--dtype", default="float16", choices=("float16", "bfloat16", "float32"),
        help="of all that is not integer (default float16)")
    add("--format", default=formats.OURS, choices=formats.format_names(),
        help="also write quant/<format>, a folder for other tools (default anybit: ours alone)")
    add("--calib", metavar="FILE|DATASET",
        help="calibration text: .txt, .jsonl or NAME[:CONFIG[:SPLIT]] of the datasets library")
    add("--nsamples", type=whole_number(1), default=128, metavar="N", help="calibration windows (default 128)")
    add("--seqlen", type=whole_number(2), default=2048, metavar="L", help="tokens per calibration window (default 2048)")
    add("--out", type=Path, metavar="DIR", help="artefact folder (default out/<model>-w<W>a<A>)")
    add("--offline", action="store_true", help="never touch the network")
    add("--progress", default="auto", choices=("auto", "rich", "plain", "json", "none"),
        help="json: one object per line on stdout")


def scheme_from_args(args: argparse.Namespace) -> QuantScheme:
    """The scheme that the arguments ask for.

    Raises:
        InputError: bits out of range, a combination that does not exist, or one that --format cannot say.
    """
    wbits, balanced = parse_wbits(args.wbits)
    if args.abits not in (2, 3, 4, 5, 6, 7, 8, 16):
        raise InputError("--abits", f"got {args.abits}, expected 2 to 8, or 16 for weight-only", "Give one of these")
    if args.group_size < 0:
        raise InputError("--group-size", f"got {args.group_size}, expected 0 or a positive number",
                         "Use 0 for one scale per output channel")
    op = _LAYOUTS.get(args.method) or _auto_layout(args, wbits, balanced)
    symmetric = op == "QQQGemm" if args.act_quant is None else args.act_quant == "sym"
    if op == "QQQGemm" and ((wbits, balanced, args.abits) != (4, False, 8) or not symmetric):
        got = f"W{args.wbits}A{args.abits}" + ("" if symmetric else " with --act-quant asym")
        raise InputError("--method qqq", f"got {got}, expected W4A8 with symmetric activations",
                         "Use --wbits 4 --abits 8, or --method abq")
    if op == "QQQGemm" and args.group_size not in (0, 64, 128):
        raise InputError("--group-size", f"got {args.group_size}, expected 0, 64 or 128 for --method qqq",
                         "Use one of these, or --method abq")
    method = args.method if args.method in method_names() else _PLAIN
    scheme = QuantScheme(op, method, wbits, args.abits, balanced, args.group_size, symmetric and args.abits < 16, args.dtype)
    formats.check(args.format, scheme)
    return scheme


def _auto_layout(args: argparse.Namespace, wbits: int, balanced: bool) -> str:
    w4a8 = (wbits, balanced, args.abits) == (4, False, 8)
    return "QQQGemm" if w4a8 and args.act_quant != "asym" and args.group_size in (0, 64, 128) else "ABQGemm"


def stand_in_notice(args: argparse.Namespace, scheme: QuantScheme) -> str:
    """One line if the method asked for is not the one that makes the codes, else ""."""
    wanted = args.method if args.method != "auto" else {op: name for name, op in _LAYOUTS.items()}[scheme.op]
    if wanted == scheme.method:
        return ""
    return f"Method {wanted} is not there yet: plain round-to-nearest ({scheme.method}) stands in, in its layout ({scheme.op})."


def default_out(args: argparse.Namespace, scheme: QuantScheme) -> Path:
    """--out, or out/<model>-w<W>a<A>."""
    return args.out if args.out is not None else Path("out") / f"{model_slug(args.model)}-{scheme.label}"
