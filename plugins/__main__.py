"""Command line of the plugins package: python -m plugins build | sim."""

from __future__ import annotations

import argparse
import sys

from plugins.build import build_library, build_sim
from plugins.core.errors import UserError

__all__ = ["main"]


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m plugins", description="Compile the custom ops.")
    commands = parser.add_subparsers(dest="command", required=True)
    build = commands.add_parser("build", help="the TensorRT plugin library, with nvcc")
    build.add_argument("--arch", default="all", help='"all" or compute capabilities such as "80;90" (default: all)')
    commands.add_parser("sim", help="the same kernels for the CPU, with g++")
    options = parser.parse_args(arguments)
    try:
        print(build_library(options.arch) if options.command == "build" else build_sim())
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
