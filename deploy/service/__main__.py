"""python -m deploy.service: compile anybit-serve and print where it is."""

from __future__ import annotations

import sys

from deploy.service.build import build_service
from plugins.cli import Parser, run_cli


def _main(argv: list[str] | None) -> int:
    Parser(
        prog="python -m deploy.service",
        description="Compile anybit-serve and the libraries beside it, if needed, and print where "
        "it is.",
    ).parse_args(argv)
    print(build_service(lambda text: print(text, file=sys.stderr)))
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(lambda: _main(None)))
