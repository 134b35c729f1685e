"""python -m deploy.runtime: compile the C++ runtime library and print where it is."""

from __future__ import annotations

import sys

from deploy.runtime.build import build_runtime
from plugins.cli import Parser, run_cli


def _main(argv: list[str] | None) -> int:
    Parser(
        prog="python -m deploy.runtime",
        description="Compile the C++ runtime library, if needed, and print where it is.",
    ).parse_args(argv)
    print(build_runtime(lambda text: print(text, file=sys.stderr)))
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(lambda: _main(None)))
