"""Command-line arguments that say what to quantise and how, shared by every command; imports
nothing heavy.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calibration import formats
from calibration.checkpoints.sources import model_slug
from calibration.methods import PLAIN_METHOD, Method, find_method, method_names
from calibration.quant.bits import SchemeMap, check_head_bits, read_bits_file
from calibration.quant.scheme import (
    FLOAT_BITS,
    Bits,
    QuantScheme,
    check_abits,
    check_kv_bits,
    scheme_for,
)
from calibration.settings import EFFORTS, CalibrationSettings, calibration_settings
from plugins import op_names, op_spec, ranked_ops
from plugins.cli import number, whole_number
from plugins.core.code_sets import parse_code_set, set_choices
from plugins.errors import InputError

if TYPE_CHECKING:
    from plugins.core.op_spec import OpSpec

__all__ = [
    "ListFamilies",
    "add_quant_arguments",
    "default_out",
    "model_slug",
    "scheme_from_args",
    "schemes_from_args",
    "settings_from_args",
]


class ListFamilies(argparse.Action):
    """Prints the table of families and ends, as --help does."""

    def __call__(self, parser: argparse.ArgumentParser, *arguments: Any) -> None:
        """Print it."""
        from calibration.support import support_table

        print(support_table())
        parser.exit()


AUTO = "auto"  # the method that the op was made for; a head of 8 bits where that costs little
_AUTO_HEAD, _AUTO_LIMIT = 8, 0.001  # bits, and the largest rise of perplexity


def add_quant_arguments(parser: argparse.ArgumentParser) -> None:
    """MODEL and every option that decides the quantised numbers, and --out, --offline, --progress.

    The parser takes no abbreviations any more: --wbit is an error, not --wbits.
    """
    parser.allow_abbrev = False
    add = parser.add_argument
    add(
        "model",
        metavar="MODEL",
        help="alias (--list-families shows them), hub id, Hugging Face folder or .gguf file",
    )
    add(
        "--list-families",
        action=ListFamilies,
        nargs=0,
        help="print which models are read, and their aliases, and exit",
    )
    add(
        "--wbits",
        metavar="W",
        help=f"weight bits: {set_choices()}; in a shell write b for *, such as 2b",
    )
    add(
        "--abits",
        type=int,
        metavar="A",
        help="activation bits 2 to 8, or 16 for weight-only; with --keep the checkpoint's, else 16",
    )
    quantized = parser.add_mutually_exclusive_group()
    quantized.add_argument(
        "--keep",
        action="store_true",
        help="export the codes of a checkpoint that is quantized already as they are, in the place "
        "of --wbits; docs/checkpoints.md lists the formats",
    )
    quantized.add_argument(
        "--requantize",
        action="store_true",
        help="round the weights of such a checkpoint again, as those of a float model",
    )
    add(
        "--method",
        default=AUTO,
        metavar="NAME|FILE",
        help=f"auto (default: the method of the op that takes these bits, qqq for W4A8, else abq), "
        f"{', '.join(method_names())}, or a .py file with a method of your own, docs/methods.md",
    )
    add(
        "--group-size",
        type=int,
        default=0,
        metavar="G",
        help="input channels per weight scale; 0 (default): one scale per output channel",
    )
    add(
        "--kv-bits",
        type=int,
        default=FLOAT_BITS,
        metavar="B",
        help="bits of keys and values in the KV cache, 2 to 8; 16 (default): as --dtype says",
    )
    add(
        "--head-bits",
        default=AUTO,
        metavar="B",
        help="weight bits of the head, 4 to 8; 16: as --dtype says; auto (default): 8 where that "
        f"raises perplexity by at most {_AUTO_LIMIT:.1%}% by KL divergence from the float model, else 16",
    )
    add(
        "--act-quant",
        choices=("sym", "asym"),
        help="activation codes; default: of the op, sym for qqq, asym for abq",
    )
    mixed = parser.add_mutually_exclusive_group()
    mixed.add_argument(
        "--bits-file",
        type=Path,
        metavar="FILE",
        help="other bits for some linears, a line each: PATTERN BITS, such as 'down_proj w8a8'",
    )
    mixed.add_argument(
        "--budget",
        type=number(0),
        metavar="B",
        help="weight bits of each GEMM node by its measured sensitivity, on average at most B "
        "with scales and zero points",
    )
    add(
        "--dtype",
        default="float16",
        choices=("float16", "bfloat16", "float32"),
        help="of all that is not integer (default float16)",
    )
    add(
        "--format",
        default=formats.OURS,
        choices=formats.format_names(),
        help="also write quant/<format>, a folder for other tools (default anybit: ours alone)",
    )
    add(
        "--calib",
        metavar="FILE|DATASET",
        help="calibration text: a text file, JSON lines or a JSON document, also gzipped, or "
        "NAME[:CONFIG[:SPLIT]] of the datasets library",
    )
    add(
        "--nsamples",
        type=whole_number(1),
        metavar="N",
        help="calibration windows (default: of --effort)",
    )
    add(
        "--seqlen",
        type=whole_number(2),
        metavar="L",
        help="tokens per calibration window (default: of --effort)",
    )
    add(
        "--effort",
        default="default",
        choices=list(EFFORTS),
        help="how much data and training (default: default; paper: 128 x 2048)",
    )
    add(
        "--seed",
        type=whole_number(0),
        default=0,
        metavar="S",
        help="fixes everything random (default 0)",
    )
    add(
        "--set",
        action="append",
        default=[],
        dest="switches",
        metavar="NAME=VALUE",
        help="a switch of the method, such as rotation=none; docs/calibration.md lists them",
    )
    add(
        "--max-memory",
        type=_gigabytes,
        metavar="GB",
        help="activations beyond this go to the disk (default: no limit)",
    )
    add("--out", type=Path, metavar="DIR", help="artefact folder (default out/<model>-w<W>a<A>)")
    add("--offline", action="store_true", help="never touch the network")
    add(
        "--progress",
        default="auto",
        choices=("auto", "rich", "plain", "json", "none"),
        help="json: one object per line on stdout",
    )


def scheme_from_args(args: argparse.Namespace) -> QuantScheme:
    """The scheme that the arguments ask for, of every node that --bits-file does not name or
    --budget does not change.

    Raises:
        InputError: bits out of range, or a combination that does not exist; no such method.
    """
    method = _method(args)
    _check_bits_given(args)
    bits = Bits(parse_code_set(args.wbits), check_abits(args.abits), args.group_size)
    if bits.group_size < 0:
        raise InputError(
            "--group-size",
            f"got {bits.group_size}, expected 0 or a positive number",
            "Use 0 for one scale per output channel",
        )
    scheme = scheme_for(
        bits,
        _ops_for(method),
        None if args.act_quant is None else args.act_quant == "sym",
        f"--method {args.method}",
        method=args.method if method is None else method.name,
        dtype=args.dtype,
        kv_bits=check_kv_bits(args.kv_bits),
    )
    if method is not None:
        return scheme
    return replace(scheme, method=op_spec(scheme.op).method or PLAIN_METHOD)


def _check_bits_given(args: argparse.Namespace) -> None:
    for option, value, example in (("--wbits", args.wbits, 4), ("--abits", args.abits, 8)):
        if value is None:
            raise InputError(
                option,
                "got none, expected bits, or --keep for a checkpoint that is quantized already",
                f"Give {option} {example}, for example",
            )


def _method(args: argparse.Namespace) -> Method | None:
    """The one that --method names; None: auto.

    Raises:
        InputError: there is none.
    """
    if args.method == AUTO:
        return None
    if not args.method.endswith(".py"):
        return find_method(args.method)
    file = Path(args.method).expanduser().resolve()
    return find_method(file.stem, file)


def _method_of(args: argparse.Namespace, scheme: QuantScheme) -> Method:
    """The one that the arguments' scheme names."""
    return _method(args) or find_method(scheme.method)


def _ops_for(method: Method | None) -> list[OpSpec]:
    """The op that a method declares, else those that name it as theirs, else every op.

    Raises:
        InputError: it declares an op that there is not.
    """
    op = None if method is None else method.declaration.op
    if method is None or op is None:
        own = [spec for spec in ranked_ops() if method and spec.method == method.name]
        return own or ranked_ops()
    if op not in op_names():
        raise InputError(
            method.where,
            f"got op {op!r} in its DECLARATION, expected one of {', '.join(op_names())}",
            "Check the spelling",
        )
    return [op_spec(op)]


def schemes_from_args(args: argparse.Namespace) -> SchemeMap:
    """That scheme as the base, with the rules of --bits-file over it; those of --budget take a
    measurement, calibration/budget/choice.py.

    Raises:
        InputError: as scheme_from_args, the file is not a bits file, or bits that --format cannot
            say or whose codes the method does not make; of --keep an option that it leaves no room
            for, or as kept_schemes.
    """
    if args.keep:
        return _kept_schemes(args)
    base = scheme_from_args(args)
    schemes = SchemeMap(base) if args.bits_file is None else read_bits_file(args.bits_file, base)
    for scheme in schemes.schemes():
        formats.check(args.format, scheme)
        _method_of(args, scheme).check(scheme)
    return _with_head(schemes, args)


# Options that decide what --keep leaves as it is, and their values where nobody gave them.
_NOT_KEPT: dict[str, Any] = {
    "wbits": None,
    "method": AUTO,
    "group_size": 0,
    "bits_file": None,
    "budget": None,
    "calib": None,
    "nsamples": None,
    "seqlen": None,
    "effort": "default",
    "seed": 0,
    "switches": [],
    "max_memory": None,
}


def _kept_schemes(args: argparse.Namespace) -> SchemeMap:
    for name, unset in _NOT_KEPT.items():
        if getattr(args, name) != unset:
            option = "--set" if name == "switches" else f"--{name.replace('_', '-')}"
            raise InputError(
                option,
                "got it beside --keep, which leaves the checkpoint's codes as they are, expected one "
                "of the two",
                f"Leave out {option}, or give --requantize in the place of --keep",
            )
    from calibration.checkpoints.checkpoint import open_checkpoint
    from calibration.checkpoints.sources import check_name
    from calibration.quant.keep import Keeping, check_quantized, kept_orders, kept_schemes

    check_name(args.model)
    keeping = Keeping(
        abits=None if args.abits is None else check_abits(args.abits),
        act_symmetric=None if args.act_quant is None else args.act_quant == "sym",
        head_bits=None if args.head_bits == AUTO else check_head_bits(args.head_bits),
        dtype=args.dtype,
        kv_bits=check_kv_bits(args.kv_bits),
    )
    checkpoint = open_checkpoint(args.model, args.offline)
    check_quantized(checkpoint, keep=True, requantize=False)
    schemes = kept_schemes(checkpoint, keeping)
    for scheme in schemes.schemes():
        formats.check(args.format, scheme)
    if schemes.head is not None:
        formats.check_head(args.format, schemes.head)
    formats.check_orders(args.format, kept_orders(checkpoint))
    return schemes


def _with_head(schemes: SchemeMap, args: argparse.Namespace) -> SchemeMap:
    """The map with the head of --head-bits: of auto one that a calibration may leave as it is."""
    if args.head_bits == AUTO:
        return replace(schemes, head_bits=_AUTO_HEAD, head_limit=_AUTO_LIMIT)
    schemes = replace(schemes, head_bits=check_head_bits(args.head_bits))
    if schemes.head is not None:
        formats.check_head(args.format, schemes.head)
        _method_of(args, schemes.base).check(schemes.head)
    return schemes


def settings_from_args(args: argparse.Namespace, scheme: QuantScheme) -> CalibrationSettings:
    """The calibration settings that the arguments ask for.

    Raises:
        InputError: a switch that the method does not have, or a value that does not fit.
    """
    if args.keep:
        return CalibrationSettings()
    method = _method_of(args, scheme)
    return calibration_settings(
        method.settings,
        scheme,
        args.effort,
        args.switches,
        calib=args.calib,
        nsamples=args.nsamples,
        seqlen=args.seqlen,
        seed=args.seed,
        max_memory=args.max_memory,
        method_file=method.file,
    )


def _gigabytes(text: str) -> int:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 1 <= value * 1e9 < 1e15:
        raise argparse.ArgumentTypeError(
            f"got {text!r}, expected gigabytes above 0, such as 8 or 0.5"
        )
    return int(value * 1e9)


def default_out(args: argparse.Namespace, scheme: QuantScheme) -> Path:
    """--out, or out/<model>-w<W>a<A>, then -kv<B> of a low-bit cache, and -kept, -mixed or -b<B>
    where codes are kept, or a bits file or budget changes bits.
    """
    if args.out is not None:
        return Path(args.out)
    end = "-kept" if args.keep else ""
    if args.bits_file is not None:
        end = "-mixed"
    elif args.budget is not None:
        end = f"-b{args.budget:g}"
    return Path("out") / f"{model_slug(args.model)}-{scheme.model_label}{end}"
