"""Command line of the plugins package: python -m plugins build | sim."""

from __future__ import annotations

import argparse
import sys

from plugins.build import build_library, build_sim
from plugins.core.cli import run_cli

__all__ = ["main"]


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m plugins", description="Compile the custom ops.")
    commands = parser.add_subparsers(dest="command", required=True)
    build = commands.add_parser("build", help="the TensorRT plugin library, with nvcc")
    build.add_argument("--arch", default="all", help='"all" or compute capabilities such as "80;90" (default: all)')
    commands.add_parser("sim", help="the same kernels for the CPU, with g++")
    options = parser.parse_args(arguments)

    def run() -> int:
        print(build_library(options.arch) if options.command == "build" else build_sim())
        return 0

    return run_cli(run)


if __name__ == "__main__":
    sys.exit(main())
