"""Carries out recipes: compiles and links what they list, when sources, flags or compilers have
changed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from plugins.errors import InputError, UserError
from plugins.lock import locked
from plugins.tools.toolkit import compiler_environment, find_program

__all__ = ["Command", "Recipe", "make", "make_file", "run"]

_COMPILER_OUTPUT_LINES = 40
_SCRATCH = ".build-"  # begins the name of a folder for what comes before

Command = list[str]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a library or program is made.

    Attributes:
        root: folder that commands run in and that the names of sources are relative to.
        name: of the library or program.
        folders: where it may be, the best first.
        compiles: compiler command by source file; "-c source -o object" is appended.
        link: linker command; "objects -o output" goes in place of "{}".
        include: folders below `root` whose headers are ours.
        more: further files below `root` that the output depends on.
        record: what else it depends on, such as a compiler's version; kept in the note beside it.
        takes: how long that usually is, in words.
    """

    root: Path
    name: str
    folders: Sequence[Path]
    compiles: dict[str, Command]
    link: Command
    include: Sequence[str]
    more: Sequence[str] = ()
    record: dict[str, Any] = field(default_factory=dict)
    takes: str = "up to a minute"

    def files(self) -> list[Path]:
        """The source files and every file of ours that they or an option include, directly or not;
        conditions are not looked at.
        """
        found: set[Path] = set()
        waiting = [self.root / source for source in self.compiles]
        waiting += [
            self.root / name
            for command in self.compiles.values()
            for option, name in pairwise(command)
            if option == "-include"
        ]
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
    result = subprocess.run(
        command,
        cwd=folder,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        env=compiler_environment(),
        check=False,
    )
    if result.returncode != 0:
        output = "\n".join(
            (result.stdout + result.stderr).strip().splitlines()[:_COMPILER_OUTPUT_LINES]
        )
        raise UserError(
            what,
            f"got exit code {result.returncode} from {command[0]}, expected 0",
            f"The command was: {' '.join(command)}",
            output,
        )


def make(recipe: Recipe, say: Callable[[str], None] | None = None) -> Path:
    """The output, made unless the note beside it says that it was made from the same things.

    Args:
        recipe: how.
        say: told before and after it is made; None prints on stderr.

    Raises:
        InputError: it is not there, and none of its folders can be written.
        UserError: a compiler failed; the message holds its output. What was there before stays.
    """
    say = say or _print
    digest, note = recipe.digest(), Path(recipe.name).with_suffix(".json").name

    def is_made(output: Path) -> bool:
        return output.is_file() and _digest_in(output.with_name(note)) == digest

    def work(scratch: Path, output: Path) -> None:
        say(f"compiling {recipe.name}, which takes {recipe.takes} and is done once")
        began = time.monotonic()
        library = _compile_and_link(recipe, scratch)
        done = {
            **recipe.record,
            "digest": digest,
            "seconds": round(time.monotonic() - began, 1),
            "bytes": library.stat().st_size,
        }
        text = json.dumps(done, indent=2, sort_keys=True) + "\n"
        (scratch / note).write_text(text, encoding="utf-8")
        output.with_name(note).unlink(missing_ok=True)  # it never tells of another library
        library.replace(output)
        (scratch / note).replace(output.with_name(note))
        say(f"compiled {recipe.name} in {done['seconds']:.0f} s")

    return make_file(recipe.name, recipe.folders, is_made, work, say)


def make_file(
    name: str,
    folders: Sequence[Path],
    is_made: Callable[[Path], bool],
    work: Callable[[Path, Path], None],
    say: Callable[[str], None] | None = None,
) -> Path:
    """A file in the first of these folders that has it, else made in the first that can be written.

    What is made already is taken as it is: nothing is locked or written, so that anybody who can
    read it can use it. Else one process makes it, and others wait for it.

    Args:
        name: of the file.
        folders: where it may be; made if need be.
        is_made: whether the file at this path is the one.
        work: makes it, with an empty folder for what comes before and the path where it belongs.
        say: told of a file system without locks.

    Raises:
        InputError: it is not there, and no folder can be written. Else as `work`.
    """
    for folder in folders:
        if is_made(folder / name):
            return folder / name
    refused = []
    for folder in folders:
        with ExitStack() as held:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                if held.enter_context(locked(folder / ".lock", wait=True, say=say)):
                    for killed in folder.glob(f"{_SCRATCH}*"):  # nobody else is making anything
                        shutil.rmtree(killed, ignore_errors=True)
                scratch = tempfile.TemporaryDirectory(dir=folder, prefix=_SCRATCH)
                scratch_path = Path(held.enter_context(scratch))
            except OSError as error:
                refused.append(f"{folder}: {error.strerror}")
                continue
            if not is_made(folder / name):
                work(scratch_path, folder / name)
            return folder / name
    raise InputError(
        name,
        f"got no folder that can be written ({'; '.join(refused)}), expected one to compile it in",
        "Set XDG_CACHE_HOME to a folder of your own",
    )


def _print(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _digest_in(note: Path) -> str | None:
    try:
        found = json.loads(note.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found.get("digest") if isinstance(found, dict) else None


def _compile_and_link(recipe: Recipe, scratch: Path) -> Path:
    # Compilers run side by side, then the linker.
    commands = (*recipe.compiles.values(), recipe.link)
    for program in dict.fromkeys(command[0] for command in commands):
        find_program(program, Path(program).name)
    launcher = [ccache] if (ccache := shutil.which("ccache")) else []
    objects = {
        source: str(scratch / (source.replace("/", "-") + ".o")) for source in recipe.compiles
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
    library = scratch / recipe.name
    place = recipe.link.index("{}")
    made = [*objects.values(), "-o", str(library)]
    run([*recipe.link[:place], *made, *recipe.link[place + 1 :]], recipe.name, recipe.root)
    return library
