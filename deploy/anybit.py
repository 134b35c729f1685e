"""anybit COMMAND: every command line of the project under one name, from any folder.

Unlike python -m, a console script leaves the working directory out of Python's path, so a folder
there that is called deploy or exporter hides nothing.
"""

from __future__ import annotations

import argparse
import importlib
import sys

from deploy import commands
from plugins.cli import Parser, add_version
from plugins.streams import streams

__all__ = ["main"]

_PACKAGES = {  # command: the package whose command line it is, and what it does
    "export": ("exporter", "the whole way: quantize, export, build an engine, prove it, report"),
    "calibrate": ("calibration", "quantize a model into OUT/quant, and no more"),
    "plugins": ("plugins", "compile, inspect and check the custom ops"),
}


def main(argv: list[str] | None = None) -> int:
    """Entry point of the console script; returns the exit code of the command."""
    argv = sys.argv[1:] if argv is None else argv
    own = {name: help for name, (_, help) in _PACKAGES.items()}
    own |= {command.name: command.help for command in commands().values()}
    listed = "\n".join(f"  {name:<12}{help}" for name, help in own.items())
    parser = Parser(
        "anybit",
        usage="anybit COMMAND ...",
        description=f"commands:\n{listed}\n\nanybit COMMAND --help tells of each.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_version(parser)
    parser.add_argument("command", choices=tuple(own), metavar="COMMAND", help=argparse.SUPPRESS)
    with streams(stdout_is_result=True):
        command = parser.parse_args(argv[:1]).command
    package, rest = _PACKAGES.get(command, ("deploy", ""))[0], argv[1:]
    entry = importlib.import_module(f"{package}.__main__").main
    code: int = entry([command, *rest] if package == "deploy" else rest)
    return code


if __name__ == "__main__":
    sys.exit(main())
