"""Packs: one file and a folder again, weights that ONNX Runtime maps from the pack, what inspect says of
one, and every damaged or hostile pack that is refused.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from calibration.out.files import file_records
from calibration.out.pack import ALIGNMENT, Pack, write_pack
from deploy.__main__ import main
from deploy.inspect import inspect
from deploy.pack import pack_artifact
from deploy.unpack import unpack
from exporter.run.model import open_session
from plugins.errors import InputError

AGAIN = "It is cut, damaged or no pack: get it again, or make it with python -m deploy pack."
FOOTER = 64


@pytest.fixture
def packed(copy: Path, tmp_path: Path) -> Path:
    path = tmp_path / "model.anybit"
    pack_artifact(copy, path)
    return path


def test_there_and_back(
    copy: Path, packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pack = Pack(packed)
    first = next(iter(pack.members.values()))
    assert (first.name, first.offset) == ("onnx/model.onnx.data", 0)
    assert all(member.offset % ALIGNMENT == 0 for member in pack.members.values())
    before = packed.read_bytes()
    assert main(["pack", str(copy), "-o", str(packed)]) == 0
    assert packed.read_bytes() == before
    to = tmp_path / "back"
    assert main(["unpack", str(packed), "--to", str(to)]) == 0
    assert file_records(to / "onnx") == file_records(copy / "onnx")
    assert not (to / "quant").exists() and inspect(to)["bytes"].keys() == {"onnx"}
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith(f"{packed}: ") and out[1] == f"{to}: {len(pack.members)} files"
    assert out[2] == f"python -m deploy generate {to} --prompt ..."


def test_weights_are_mapped_from_the_pack(copy: Path, packed: Path, tmp_path: Path) -> None:
    to = tmp_path / "linked"
    unpack(packed, to, link=True)
    assert packed.samefile(to / "onnx" / "model.onnx.data")
    ids = np.array([[5, 9, 300, 17]])
    logits = []
    for folder in (copy, to, to / "onnx"):
        for runner in ("native", "onnxruntime"):
            with open_session(runner, folder) as session:
                logits.append(session.run(ids))
    assert all(np.array_equal(logits[0], other) for other in logits[::2])
    assert all(np.array_equal(logits[1], other) for other in logits[1::2])


def test_a_pack_runs_as_it_is(
    copy: Path, packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--prompt", "The river", "--max-new-tokens", "4", "--temperature", "0"]
    texts = []
    for out in (copy, packed):
        assert main(["generate", str(out), *words]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert {path.name for path in tmp_path.iterdir()} == {"out", packed.name}
    damaged = bytearray(packed.read_bytes())
    damaged[3] ^= 1
    packed.write_bytes(damaged)
    assert main(["generate", str(packed), *words]) == 2
    assert capsys.readouterr().err.startswith(f"{packed}, onnx/model.onnx.data: got SHA-256 ")
    assert {path.name for path in tmp_path.iterdir()} == {"out", packed.name}


def test_other_stages(copy: Path, tmp_path: Path) -> None:
    path, to = tmp_path / "all.anybit", tmp_path / "back"
    pack_artifact(copy, path, ("quant", "onnx"))
    unpack(path, to)
    assert file_records(to / "quant") == file_records(copy / "quant")
    alone = tmp_path / "alone"
    pack_artifact(copy / "onnx", path)
    unpack(path, alone)
    assert file_records(alone / "onnx") == file_records(copy / "onnx")
    assert not (alone / "manifest.json").exists()


def test_inspect_says_the_same_of_both(copy: Path, packed: Path, tmp_path: Path) -> None:
    found, folder = inspect(packed), inspect(copy)
    assert found["kind"] == "pack" and found["bytes"].keys() == {"onnx"}
    assert found["run"] == [
        f"python -m deploy generate {packed} --prompt 'Once upon a time'",
        f"python -m deploy unpack {packed} --to model",
    ]
    same = folder.keys() - {"kind", "bytes", "run"}
    assert {key: found[key] for key in same} == {key: folder[key] for key in same}
    quant = tmp_path / "quant.anybit"
    pack_artifact(copy, quant, ("quant",))
    assert inspect(quant)["nodes"].keys() == folder["nodes"].keys()


# ---------------------------------------------------------------- refused


def forged(path: Path, change: Callable[[list[dict[str, Any]]], None]) -> None:
    """Change the index of a pack, with a checksum that fits."""
    data = path.read_bytes()
    place, length = struct.unpack("<QQ", data[-48:-32])
    index = json.loads(data[place : place + length])
    change(index["members"])
    text = json.dumps(index).encode()
    footer = (
        data[-FOOTER:-48] + struct.pack("<QQ", place, len(text)) + hashlib.sha256(text).digest()
    )
    path.write_bytes(data[:place] + text + footer)


def refusal(path: Path, tmp_path: Path) -> str:
    to = tmp_path / "refused"
    with pytest.raises(InputError) as error:
        unpack(path, to)
    assert not to.exists() and not list(tmp_path.glob(".*partial"))
    return str(error.value)


@pytest.mark.parametrize("left", [0, 10, FOOTER, 100_000, -1])
def test_a_cut_pack(packed: Path, tmp_path: Path, left: int) -> None:
    os.truncate(packed, left if left >= 0 else packed.stat().st_size - 1)
    assert refusal(packed, tmp_path) == (
        f"{packed}: got a file that does not end as a pack does, expected a whole pack. {AGAIN}"
    )


def test_a_pack_that_lost_its_beginning(packed: Path, tmp_path: Path) -> None:
    data = packed.read_bytes()
    packed.write_bytes(data[1:])
    place, length = struct.unpack("<QQ", data[-48:-32])
    assert refusal(packed, tmp_path) == (
        f"{packed}: got an index at {place} of {length} bytes in {len(data) - 1}, expected a whole "
        f"pack. {AGAIN}"
    )


def test_flipped_bytes(packed: Path, tmp_path: Path) -> None:
    data = packed.read_bytes()
    place = struct.unpack("<Q", data[-48:-40])[0]
    member = Pack(packed).members["onnx/model.json"]
    damaged = bytearray(data)
    damaged[place + 5] ^= 1
    packed.write_bytes(damaged)
    assert refusal(packed, tmp_path) == (
        f"{packed}: got an index with another checksum, expected a whole pack. {AGAIN}"
    )
    for at, name in ((3, "onnx/model.onnx.data"), (member.offset + 3, "onnx/model.json")):
        damaged = bytearray(data)
        damaged[at] ^= 1
        packed.write_bytes(damaged)
        message = refusal(packed, tmp_path)
        assert message.startswith(f"{packed}, {name}: got SHA-256 ") and message.endswith(AGAIN)
    with pytest.raises(InputError):
        inspect(packed)  # which reads model.json


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("../evil", "the name of a file in this folder"),
        ("/etc/evil", "the name of a file in this folder"),
        ("onnx/../../evil", "the name of a file in this folder"),
        ("onnx\\evil", "the name of a file in this folder"),
        ("onnx/e\nvil", "the name of a file in this folder"),
        ("evil", "files of an artifact"),
        ("onnx/", "files of an artifact"),
        ("onnx//evil", "files of an artifact"),
        ("onnx/model.json", "files of an artifact"),
        ("onnx/model.json/evil", "files of an artifact"),
        ("manifest.json/evil", "files of an artifact"),
    ],
)
def test_names_that_lead_elsewhere(packed: Path, tmp_path: Path, name: str, words: str) -> None:
    forged(packed, lambda members: members[-1].update(name=name))
    assert words in refusal(packed, tmp_path)
    assert not list(tmp_path.rglob("evil"))


@pytest.mark.parametrize(
    "change",
    [
        lambda members: members[0].update(offset=ALIGNMENT),
        lambda members: members[-1].update(bytes=1 << 40),
        lambda members: members[1].update(offset=members[0]["offset"]),
        lambda members: members.pop(1),
    ],
)
def test_members_that_lie_elsewhere(
    packed: Path, tmp_path: Path, change: Callable[[list[dict[str, Any]]], None]
) -> None:
    forged(packed, change)
    assert refusal(packed, tmp_path).endswith(f", expected members in a row. {AGAIN}")


def test_what_the_commands_refuse(
    copy: Path, packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(*words: str) -> str:
        assert main([*words]) == 2
        return capsys.readouterr().err

    assert said("unpack", str(packed), "--to", str(copy)) == (
        f"--to {copy}: got something that is there, expected a new folder. Choose another --to.\n"
    )
    assert said("unpack", str(tmp_path / "none"), "--to", str(tmp_path / "x")) == (
        f"{tmp_path / 'none'}: got no such file, expected a pack. {AGAIN}\n"
    )
    assert said("prove", str(packed)) == (
        f"{packed}: got a pack, expected an artifact folder. Make one with: python -m deploy unpack "
        f"{packed} --to DIR --link.\n"
    )
    data = copy / "onnx" / "model.onnx.data"
    inside = "a place in a stage of the artifact, which then holds a file that is not its own"
    for out, place in (
        (copy, data),
        (copy, copy / "onnx" / "new.anybit"),
        (copy, copy / "quant" / "new.anybit"),
        (copy / "onnx", copy / "onnx" / "new.anybit"),
        (copy, copy / "manifest.json"),
    ):
        assert said("pack", str(out), "-o", str(place)) == (
            f"-o {place}: got {inside}, expected another file. Choose another file.\n"
        )
    os.mkfifo(tmp_path / "pipe")
    assert said("pack", str(copy), "-o", str(tmp_path / "pipe")) == (
        f"-o {tmp_path / 'pipe'}: got no regular file, expected another file. Choose another file.\n"
    )
    assert (tmp_path / "pipe").is_fifo()
    with data.open("r+b") as file:
        file.write(b"x")
    assert said("pack", str(copy), "-o", str(tmp_path / "new")).startswith(f"{data}: got SHA-256 ")
    assert not (tmp_path / "new").exists()
    only = tmp_path / "only.anybit"
    write_pack(only, {"onnx/model.json": copy / "onnx" / "model.json"})
    assert said("unpack", str(only), "--to", str(tmp_path / "x"), "--link") == (
        f"--link: got {only} without onnx/model.onnx.data at its beginning, expected one with it. Leave "
        "out --link.\n"
    )


def test_weights_that_do_not_begin_the_pack_are_copied(
    packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A pack that somebody else wrote: offsets into the weights are none into it."""
    folder, moved = tmp_path / "folder", tmp_path / "moved.anybit"
    unpack(packed, folder)
    last = {"onnx/model.onnx.data": "onnx/zz"}
    write_pack(moved, {last.get(name, name): folder / name for name in Pack(packed).members})
    forged(moved, lambda members: members[-1].update(name="onnx/model.onnx.data"))
    words = ["--prompt", "The river", "--max-new-tokens", "4", "--temperature", "0"]
    texts = []
    for out in (packed, moved):
        assert main(["generate", str(out), *words]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    with pytest.raises(InputError) as error:
        unpack(moved, tmp_path / "linked", link=True)
    assert "without onnx/model.onnx.data at its beginning" in str(error.value)


def test_a_description_without_files(packed: Path, tmp_path: Path) -> None:
    folder, broken = tmp_path / "folder", tmp_path / "broken.anybit"
    unpack(packed, folder)
    (folder / "onnx" / "model.json").write_text("{}")
    write_pack(broken, {name: folder / name for name in Pack(packed).members})
    with pytest.raises(InputError) as error:
        unpack(broken, tmp_path / "linked", link=True)
    assert str(error.value) == (
        f"{broken}, onnx/model.json: got no files, expected a record of each. It is damaged: make the "
        "pack again with python -m deploy pack."
    )
