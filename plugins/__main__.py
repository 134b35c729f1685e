"""Command line of the plugins package: python -m plugins build | cpu | sim | sass | selftest."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from plugins import library_ops
from plugins.cli import Parser, add_version, program, run_cli, whole_number
from plugins.errors import EXIT_CHECK, InputError
from plugins.text import printable
from plugins.tools.build import build_library, build_onnxruntime, build_selftest, build_sim
from plugins.tools.sass import failures, inspect, table

__all__ = ["main"]


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    return run_cli(lambda: _main(arguments))


def _main(arguments: list[str] | None) -> int:
    parser = Parser(
        prog=program("plugins", "plugins"), description="Compile and inspect the custom ops."
    )
    add_version(parser)
    commands = parser.add_subparsers(dest="command", required=True)
    build = commands.add_parser(
        "build", help="the libraries for TensorRT, with nvcc, and for ONNX Runtime"
    )
    build.add_argument(
        "--arch", default="all", help='"all" or compute capabilities such as "80;90" (default: all)'
    )
    commands.add_parser("cpu", help="the library for ONNX Runtime alone, with g++")
    commands.add_parser("sim", help="the same kernels for the CPU, with g++")
    sass = commands.add_parser(
        "sass",
        help="table and check of the machine code: tensor cores, 16-byte copies, no local memory",
    )
    sass.add_argument(
        "library", nargs="?", type=Path, help="default: the plugin library, built if it is not"
    )
    selftest = commands.add_parser(
        "selftest", help="check every kernel against a plain CPU computation"
    )
    place = selftest.add_mutually_exclusive_group()
    place.add_argument(
        "--sim", action="store_true", help="in the CPU simulation, not on this machine's GPU"
    )
    place.add_argument("--cpu", action="store_true", help="the native kernels of this CPU")
    selftest.add_argument("--quick", action="store_true", help="fewer shapes")
    selftest.add_argument("--list", action="store_true", help="only list what would be checked")
    selftest.add_argument("--op", metavar="NAME", help="only this op, such as ABQGemm")
    selftest.add_argument("--kernel", metavar="NAME", help='such as "int8 64x8"')
    selftest.add_argument("--seed", type=whole_number(0), metavar="N")
    options = parser.parse_args(arguments)
    if options.command == "selftest":
        return _selftest(options)
    if options.command == "sass":
        return _inspect(options.library or build_library())
    if options.command == "build":
        print(build_library(options.arch))
    print(build_sim() if options.command == "sim" else build_onnxruntime())
    return 0


def _selftest(options: argparse.Namespace) -> int:
    words = [f"--{name}" for name in ("quick", "list") if getattr(options, name)]
    for name in ("op", "kernel", "seed"):
        if getattr(options, name) is not None:
            words += [f"--{name}", str(getattr(options, name))]
    if options.op is not None and options.op not in library_ops():
        raise InputError(
            "--op",
            f"got {options.op!r}, expected one of {', '.join(library_ops())}",
            "Check the spelling",
        )
    build = build_sim if options.sim else build_onnxruntime if options.cpu else build_library
    library = build()
    return subprocess.run([str(build_selftest()), str(library), *words], check=False).returncode


def _inspect(library: Path) -> int:
    kernels = inspect(library)
    print(printable(table(kernels), keep="\n"))
    found, size = failures(kernels, library.stat().st_size), library.stat().st_size / 1e6
    print(
        f"\n{len(kernels)} kernels, {size:.1f} MB: "
        + (f"{len(found)} failures" if found else "all checks passed")
    )
    print("\n".join(map(printable, found)))
    return EXIT_CHECK if found else 0


if __name__ == "__main__":
    sys.exit(main())
