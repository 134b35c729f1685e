"""python -m deploy serve: the artifact as a service, by the program anybit-serve."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from pathlib import Path

from deploy.command import Command

__all__ = ["COMMAND"]


class Serve(Command):
    """Becomes the program anybit-serve, which is compiled first where it is not there."""

    name = "serve"
    help = "a service with OpenAI's API"
    description = (
        "Serve the artifact with OpenAI's API, on port 8080 of this machine alone unless told "
        "otherwise. What stands behind OUT goes to anybit-serve: OUT --help lists its options."
    )

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """All that follows."""
        parser.add_argument(
            "options",
            nargs=argparse.REMAINDER,
            metavar="...",
            help="options of anybit-serve, such as --port 8081",
        )

    def run(self, out: Path, args: argparse.Namespace) -> None:
        """Take the program's place; does not return.

        Raises:
            InputError: there is nothing to compile it with.
            UserError: the compiler failed.
        """
        from deploy.service.build import build_service

        program = build_service(lambda text: print(text, file=sys.stderr, flush=True))
        spec = importlib.util.find_spec("onnxruntime")
        if spec and spec.origin:  # of this environment, which the program does not know
            library = Path(spec.origin).parent / "capi"
            os.environ.setdefault("ANYBIT_ONNXRUNTIME", str(library))
        os.execv(program, [str(program), str(out), *args.options])


COMMAND = Serve()
