"""python -m deploy COMMAND: run an artifact."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from deploy import commands
from plugins.cli import Parser, add_version, program, run_cli

__all__ = ["build_parser", "main"]


def build_parser() -> argparse.ArgumentParser:
    """The command line; imports nothing heavy."""
    parser = Parser(prog=program("deploy", ""), description="Run what python -m exporter made.")
    add_version(parser)
    choices = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in commands().values():
        choice = choices.add_parser(
            command.name, help=command.help, description=command.description
        )
        if command.out_help:
            choice.add_argument("out", metavar="OUT", type=Path, help=command.out_help)
        else:
            choice.set_defaults(out=Path())
        command.add_arguments(choice)
    return parser


def _main(argv: list[str] | None) -> int:
    args = build_parser().parse_args(argv)
    command = commands()[args.command]
    if not command.takes_packs:
        command.run(args.out, args)
        return 0
    from deploy.unpack import opened

    with opened(args.out) as out:
        command.run(out, args)
    return 0


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code: 0 done, 2 input, 3 a check failed, 1 anything else, 130
    interrupted.
    """
    return run_cli(lambda: _main(argv))


if __name__ == "__main__":
    sys.exit(main())
