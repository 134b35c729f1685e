"""python -m deploy pack: an artifact as one file."""

from __future__ import annotations

import argparse
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from calibration.out.layout import ENGINE, MANIFEST, ONNX, QUANT, REPORT, STAGES
from deploy.command import Command, add_progress, check_file
from plugins.errors import InputError
from plugins.text import printable

if TYPE_CHECKING:
    from calibration.progress import Progress

__all__ = ["COMMAND", "pack_artifact"]

_DEFAULT = (ONNX, ENGINE, REPORT)  # what running needs, and what was proven


def pack_artifact(
    out: Path, to: Path, stages: Collection[str] = (), progress: Progress | None = None
) -> list[str]:
    """Write stages of an artifact into one file; every file is held against its checksum first.

    Args:
        out: the artifact folder, or the folder of one stage.
        to: the file.
        stages: which; none: all that are there but quant/, or quant/ where there is nothing else to
            run.
        progress: advanced twice a file: it is whole, and it is written.

    Returns:
        The names of the files in it.

    Raises:
        InputError: a stage is missing or damaged, or the file cannot be written.
    """
    from calibration.out.folder import open_stage, stages_in
    from calibration.out.pack import write_pack
    from calibration.progress import NullProgress

    there = stages_in(out)
    wanted = [stage for stage in STAGES if stage in (stages or (set(there) & set(_DEFAULT)))]
    if not {ONNX, ENGINE} & set(wanted) and not stages:
        wanted = [stage for stage in STAGES if stage in there]
    if not wanted:
        raise InputError(
            str(out),
            f"got no stage, expected some of {', '.join(STAGES)}",
            "Choose an artifact folder of python -m exporter",
        )
    progress = progress or NullProgress()
    folders = {stage: open_stage(out, stage, "the pack") for stage in wanted}
    _check_target(to, out, [folder.path for folder in folders.values()])
    steps = 2 * sum(len(folder.names) for folder in folders.values())
    progress.start("pack", steps + (out / MANIFEST).is_file())
    files: dict[str, Path] = {}
    for stage, folder in folders.items():
        for name in folder.names:
            files[f"{stage}/{name}"] = folder.file(name)
            progress.advance(1, name)
    if (out / MANIFEST).is_file():
        files[MANIFEST] = out / MANIFEST
    members = write_pack(to, files, lambda name: progress.advance(1, name))
    progress.finish()
    return [member.name for member in members]


def _check_target(to: Path, out: Path, folders: Collection[Path]) -> None:
    """Look whether a pack may take the place of `to`, before anything is read."""
    place = to.resolve()
    stages = [path.resolve() for path in (*(out / stage for stage in STAGES), *folders)]
    if place == (out / MANIFEST).resolve() or any(map(place.is_relative_to, stages)):
        got = "a place in a stage of the artifact, which then holds a file that is not its own"
    elif to.exists() and not to.is_file():
        got = "no regular file"
    else:
        return
    raise InputError(f"-o {to}", f"got {got}, expected another file", "Choose another file")


def _stages(text: str) -> tuple[str, ...]:
    """An argparse type: names of stages, separated by commas."""
    names = tuple(text.split(","))
    if unknown := [name for name in names if name not in STAGES]:
        raise argparse.ArgumentTypeError(
            f"got {unknown[0]!r}, expected some of {','.join(STAGES)}, separated by commas"
        )
    return names


class PackCommand(Command):
    """Writes the file."""

    name = "pack"
    help = "an artifact as one file with checksums"
    description = (
        "Write an artifact into one file: every member as it is, on a page of its own, so that it can "
        "be mapped, and an index with checksums. inspect shows what is in it, unpack makes a folder of "
        "it again."
    )

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Where to, and which stages."""
        add = parser.add_argument
        add("-o", "--output", required=True, type=Path, metavar="FILE", help="such as model.anybit")
        add(
            "--stages",
            type=_stages,
            default=(),
            metavar="NAME,...",
            help=f"of {', '.join(STAGES)} (default: those that are there but {QUANT})",
        )
        add_progress(parser)

    def run(self, out: Path, args: argparse.Namespace) -> None:
        """Write, and say what."""
        from calibration.progress import make_progress

        check_file("-o", args.output)
        progress = make_progress(args.progress)
        try:
            names = pack_artifact(out, args.output, args.stages, progress)
        finally:
            progress.close()
        size = args.output.stat().st_size
        print(printable(f"{args.output}: {len(names)} files, {size / 1e6:.1f} MB"))


COMMAND = PackCommand()
