"""Carries out recipes: compiles and links what they list, when sources, flags or compilers have
changed.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from plugins.errors import UserError

__all__ = ["Command", "Recipe", "locked", "make", "run"]

_COMPILER_OUTPUT_LINES = 40

Command = list[str]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a library or program is made.

    Attributes:
        root: folder that commands run in and that the names of sources are relative to.
        output: the library or program.
        compiles: compiler command by source file; "-c source -o object" is appended.
        link: linker command; "objects -o output" goes in place of "{}".
        include: folders below `root` whose headers are ours.
        more: further files below `root` that the output depends on.
        record: what else it depends on, such as a compiler's version; kept in the note beside it.
    """

    root: Path
    output: Path
    compiles: dict[str, Command]
    link: Command
    include: Sequence[str]
    more: Sequence[str] = ()
    record: dict[str, Any] = field(default_factory=dict)

    def files(self) -> list[Path]:
        """The source files and every file of ours that they include, directly or not; conditions
        are not looked at.
        """
        found: set[Path] = set()
        waiting = [self.root / source for source in self.compiles]
        while waiting:
            path = waiting.pop()
            if path in found:
                continue
            found.add(path)
            for quote, name in re.findall(
                r'^[ \t]*#[ \t]*include[ \t]*(["<])([^">]+)[">]',
                path.read_text(encoding="utf-8"),
                re.MULTILINE,
            ):
                beside = [path.parent] if quote == '"' else []
                folders = [*beside, *(self.root / folder for folder in self.include)]
                waiting += [
                    file.resolve() for folder in folders if (file := folder / name).is_file()
                ]
        return sorted(found) + [self.root / name for name in self.more]

    def digest(self) -> str:
        """Hash of everything that the output depends on."""
        parts = [self.record, self.compiles, self.link]
        digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode())
        for path in self.files():
            digest.update(f"\0{os.path.relpath(path, self.root)}\0".encode())
            digest.update(path.read_bytes())
        return digest.hexdigest()


def run(command: Command, what: str, folder: Path) -> None:
    """Run a command in `folder`.

    Raises:
        UserError: it failed to make `what`; the message holds its output.
    """
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        output = "\n".join(
            (result.stdout + result.stderr).strip().splitlines()[:_COMPILER_OUTPUT_LINES]
        )
        raise UserError(
            what,
            f"got exit code {result.returncode} from {command[0]}, expected 0:\n{output}\n",
            f"The command was: {' '.join(command)}",
        )


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One build at a time; a second process waits and then finds the result."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _compile_and_link(recipe: Recipe) -> None:
    # Compilers run side by side, then the linker; the output gets to its place in one step.
    launcher = [ccache] if (ccache := shutil.which("ccache")) else []
    with tempfile.TemporaryDirectory(dir=recipe.output.parent, prefix=".build-") as scratch:
        objects = {
            source: str(Path(scratch) / (source.replace("/", "-") + ".o"))
            for source in recipe.compiles
        }
        with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
            jobs = [
                pool.submit(
                    run,
                    [*launcher, *command, "-c", source, "-o", objects[source]],
                    source,
                    recipe.root,
                )
                for source, command in recipe.compiles.items()
            ]
            for job in jobs:
                job.result()
        library = Path(scratch) / recipe.output.name
        place = recipe.link.index("{}")
        made = [*objects.values(), "-o", str(library)]
        link = [*recipe.link[:place], *made, *recipe.link[place + 1 :]]
        run(link, recipe.output.name, recipe.root)
        library.replace(recipe.output)


def _is_made(output: Path, note: Path, digest: str) -> bool:
    if not (output.is_file() and note.is_file()):
        return False
    return bool(json.loads(note.read_text(encoding="utf-8")).get("digest") == digest)


def make(recipe: Recipe, say: Callable[[str], None] | None = None) -> Path:
    """The output, made unless the note beside it says that it was made from the same things.

    Args:
        recipe: how.
        say: told before it is made.

    Raises:
        UserError: a compiler failed; the message holds its output.
    """
    output, note, digest = recipe.output, recipe.output.with_suffix(".json"), recipe.digest()
    with locked(output.parent):
        if _is_made(output, note, digest):
            return output
        if say is not None:
            say(f"compiling {output.name}, which takes a minute or two and is done once")
        began = time.monotonic()
        note.unlink(missing_ok=True)
        _compile_and_link(recipe)
        done = {
            **recipe.record,
            "digest": digest,
            "seconds": round(time.monotonic() - began, 1),
            "bytes": output.stat().st_size,
        }
        note.write_text(json.dumps(done, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return output
