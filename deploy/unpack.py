"""python -m deploy unpack: a folder again of a pack."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calibration.out.layout import DATA_FILE, DESCRIPTION, ENGINE, MANIFEST, ONNX
from deploy.command import Command, add_progress
from plugins.errors import InputError
from plugins.text import printable

if TYPE_CHECKING:
    from calibration.out.pack import Pack
    from calibration.progress import Progress

__all__ = ["COMMAND", "opened", "unpack"]


@contextmanager
def opened(path: Path) -> Iterator[Path]:
    """An artifact as a folder, for a with statement: itself, or of a pack a folder beside it for the
    time being, in which the weights are the pack's.

    Raises:
        InputError: as unpack does, or nothing can be written beside the pack.
    """
    from tempfile import TemporaryDirectory

    from calibration.out.pack import Pack, is_pack

    if not is_pack(path):
        yield path
        return
    link = _linkable(Pack(path))
    try:
        beside = TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent)
    except OSError as error:
        raise InputError(
            str(path),
            f"got {error.strerror} for a folder beside it, expected one that can be written",
            f"Unpack it elsewhere: python -m deploy unpack {path} --to DIR",
        ) from None
    with beside as folder:
        out = Path(folder) / path.stem
        unpack(path, out, link)
        yield out


def unpack(path: Path, to: Path, link: bool = False, progress: Progress | None = None) -> list[str]:
    """Make a folder of a pack, or none at all where something is wrong with it.

    Args:
        path: the pack.
        to: a new folder.
        link: the ONNX model's weights are not copied: their file is a second name of the pack, which
            holds them at its beginning.
        progress: advanced once a file.

    Returns:
        The names of the files.

    Raises:
        InputError: the pack is cut, damaged, or leads out of the folder; the folder is there; or it
            cannot be written or linked.
    """
    from calibration.out.files import StageWriter
    from calibration.out.pack import LINKED, Pack
    from calibration.progress import NullProgress

    if to.exists() or not to.parent.is_dir():
        got = "something that is there" if to.exists() else "a place in no folder"
        raise InputError(f"--to {to}", f"got {got}, expected a new folder", "Choose another --to")
    pack = Pack(path)
    linked = link and _linkable(pack)
    if link and not linked:
        raise InputError(
            "--link",
            f"got {path} without {LINKED} at its beginning, expected one with it",
            "Leave out --link",
        )
    progress = progress or NullProgress()
    progress.start("unpack", len(pack.members))
    needed = sum(item.bytes for name, item in pack.members.items() if not linked or name != LINKED)
    with StageWriter(to.parent, to.name, needed) as writer:
        for name in pack.members:
            if linked and name == LINKED:
                pack.link(name, writer.path)
            else:
                pack.extract(name, writer.path)
            progress.advance(1, name)
        _keep_what_is_there(pack, writer.path, linked)
    progress.finish()
    return [*pack.members]


def _linkable(pack: Pack) -> bool:
    """Whether offsets into the ONNX model's weights are offsets into the pack, and the model is there."""
    from calibration.out.pack import LINKED

    data = pack.members.get(LINKED)
    return data is not None and data.offset == 0 and f"{ONNX}/{DESCRIPTION}" in pack.members


def _keep_what_is_there(pack: Pack, folder: Path, linked: bool) -> None:
    """Let the records of OUT name the stages that were packed, and a linked file as it is now."""
    from calibration.out.files import file_records, write_json
    from calibration.out.manifest import read_manifest

    record: dict[str, Any] = {}
    if linked:
        record = {"bytes": pack.path.stat().st_size, "sha256": pack.sha256()}
        description = pack.json(f"{ONNX}/{DESCRIPTION}")
        description["files"] = {**_files(description, pack), DATA_FILE: record}
        write_json(folder / ONNX / DESCRIPTION, description)
    if MANIFEST not in pack.members:
        return
    manifest = read_manifest(folder / MANIFEST)
    stages = {name: found for name, found in manifest["stages"].items() if (folder / name).is_dir()}
    if linked and ONNX in stages:
        stages[ONNX]["files"] |= {
            DATA_FILE: record,
            **file_records(folder / ONNX, only=DESCRIPTION),
        }
    write_json(folder / MANIFEST, manifest | {"stages": stages})


def _files(description: dict[str, Any], pack: Pack) -> dict[str, Any]:
    """The records of files in a description."""
    found = description.get("files")
    if not isinstance(found, dict):
        raise InputError(
            f"{pack.path}, {ONNX}/{DESCRIPTION}",
            "got no files, expected a record of each",
            "It is damaged: make the pack again with python -m deploy pack",
        )
    return found


class Unpack(Command):
    """Writes the folder."""

    name = "unpack"
    help = "a folder again of a pack"
    description = (
        "Make a folder of a pack, every file held against its checksum. With --link the ONNX model's "
        "weights are not copied: ONNX Runtime maps them from the pack."
    )
    out_help = "file that pack wrote"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Where to, and how."""
        add = parser.add_argument
        add("--to", required=True, type=Path, metavar="FOLDER", help="a new folder")
        add(
            "--link",
            action="store_true",
            help="weights stay in the pack: their file becomes a second name (hard link) of it",
        )
        add_progress(parser)

    def run(self, out: Path, args: argparse.Namespace) -> None:
        """Unpack, and say how to run it."""
        import shlex

        from calibration.progress import make_progress

        progress = make_progress(args.progress)
        try:
            names = unpack(out, args.to, args.link, progress)
        finally:
            progress.close()
        print(printable(f"{args.to}: {len(names)} files"))
        if any(name.startswith((f"{ONNX}/", f"{ENGINE}/")) for name in names):
            print(printable(f"python -m deploy generate {shlex.quote(str(args.to))} --prompt ..."))


COMMAND = Unpack()
