"""What a .gguf file may say of itself: nothing is believed before the file is long enough."""

from __future__ import annotations

import os
import struct
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from calibration.checkpoints.gguf_header import GgufPart
from plugins.errors import InputError
from tests.calibration.checkpoints.gguf_files import (
    ARRAY,
    STRING,
    UINT32,
    array,
    entry,
    gguf_bytes,
    info,
    text,
)

AGAIN = "The file is truncated or damaged: download it again."
WORD = struct.pack("<I", 7)
LONG = struct.pack("<Q", 1 << 62)
ROW = bytes(32 * 4)  # of 32 fp32


def _refusal(path: Path, data: bytes) -> str:
    """The message that a file is refused with, before a megabyte has been allocated."""
    path.write_bytes(data)
    tracemalloc.start()
    try:
        with pytest.raises(InputError) as caught:
            GgufPart(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
    message = str(caught.value)
    assert message.startswith(str(path))
    return message.removeprefix(str(path)).removeprefix(": ")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "m.gguf"


def test_values_lists_and_tensors_are_those_of_the_gguf_package(path: Path) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint8("u8", 200)
    writer.add_int16("i16", -300)
    writer.add_uint64("u64", 1 << 63)
    writer.add_float64("f64", 0.1)
    writer.add_bool("yes", True)
    writer.add_string("text", "zażółć 漢字")
    writer.add_array("numbers", [1.5, 2.5])
    writer.add_array("strings", ["a", "", "漢"])
    values = np.arange(96, dtype=np.float32).reshape(3, 32)
    writer.add_tensor("first", values)
    writer.add_tensor("second", values[0].astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    part, reader = GgufPart(path), gguf.GGUFReader(path)
    for key, field in reader.fields.items():
        if not key.startswith("GGUF."):
            lists = part.strings(key), part.numbers(key)
            got = part.values[key] if lists == (None, None) else lists[0] or lists[1]
            assert got == field.contents()
    for tensor in reader.tensors:
        mine = part.tensors[tensor.name]
        assert (mine.type, list(mine.shape)) == (tensor.tensor_type, tensor.shape.tolist()[::-1])
        assert mine.data.tobytes() == tensor.data.tobytes()


def test_fp32_values_are_the_decimals_they_were_made_from(path: Path) -> None:
    path.write_bytes(gguf_bytes([entry("e", 6, struct.pack("<f", 1e-5))]))
    assert GgufPart(path).values == {"e": 1e-5}


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ([entry("k", ARRAY, array(UINT32, 1 << 60))], 49 + (1 << 62)),
        ([entry("k", ARRAY, array(STRING, 1 << 60))], 49 + (1 << 63)),
        ([entry("k", ARRAY, array(STRING, 2, text("a") + LONG))], 66 + (1 << 62)),
        ([entry("k", STRING, LONG)], 45 + (1 << 62)),
        ([LONG], 32 + (1 << 62)),
    ],
    ids=["numbers", "strings", "a string of a list", "a string", "a key"],
)  # fmt: skip
def test_lengths_beyond_the_file(path: Path, entries: list[bytes], expected: int) -> None:
    data = gguf_bytes(entries)
    size = max(len(data), 40)
    assert _refusal(path, data.ljust(size, b"\0")) == (
        f"got {size} bytes, expected at least {expected}. {AGAIN}"
    )


@pytest.mark.parametrize(
    ("counts", "expected"),
    [((1 << 60, 0), 24 + (24 << 60)), ((0, 1 << 60), 24 + (13 << 60))],
)
def test_counts_beyond_the_file(path: Path, counts: tuple[int, int], expected: int) -> None:
    assert (
        _refusal(path, gguf_bytes(counts=counts))
        == f"got 24 bytes, expected at least {expected}. {AGAIN}"
    )


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (
            gguf_bytes([entry("k", ARRAY, array(STRING, 1 << 22))]) + bytes(1 << 25),
            "got 4194304 strings in its lists, expected at most 2097152",
        ),
        (
            gguf_bytes(counts=(0, 1 << 17)) + bytes(1 << 21),
            "got 131072 metadata entries, expected at most 65536",
        ),
        (
            gguf_bytes(counts=(1 << 18, 0)) + bytes(1 << 23),
            "got 262144 tensors, expected at most 32768",
        ),
    ],
    ids=["strings", "entries", "tensors"],
)
def test_more_of_a_thing_than_models_have(path: Path, data: bytes, problem: str) -> None:
    assert _refusal(path, data) == f"{problem}. {AGAIN}"


@pytest.mark.parametrize(
    ("entries", "problem"),
    [
        (
            [entry("k", UINT32, WORD)] * 2,
            ", metadata k: got this key twice, expected it once",
        ),
        (
            [entry("k", ARRAY, array(ARRAY, 2, array(UINT32, 1, WORD) * 2))],
            ", metadata k: got an array of arrays, expected one of numbers or strings",
        ),
        (
            [entry("k", ARRAY, array(77, 1, WORD))],
            ", metadata k: got an array of type 77, expected one of numbers or strings",
        ),
        ([entry("k", 13, WORD)], ", metadata k: got value type 13, expected 0 to 12"),
        ([entry("k", 7, b"\2")], ", metadata k: got the boolean 2, expected 0 or 1"),
        ([entry("k", STRING, text(b"\xff"))], ", metadata k: got text that is not UTF-8"),
        ([text(b"\xff" * 5)], "got text that is not UTF-8"),
        (
            [entry("general.alignment", UINT32, struct.pack("<I", 24))],
            ", metadata general.alignment: got '24', expected a power of two of at most 65536",
        ),
        (
            [entry("general.alignment", STRING, text("32"))],
            ", metadata general.alignment: got '32', expected a power of two of at most 65536",
        ),
    ],
)
def test_metadata_that_says_nothing_sound(path: Path, entries: list[bytes], problem: str) -> None:
    assert _refusal(path, gguf_bytes(entries)) == f"{problem}. {AGAIN}"


@pytest.mark.parametrize(
    ("infos", "data", "problem"),
    [
        (
            [info("a", (32,)), info("b", (32,), offset=256)],
            3 * ROW,
            ", tensor b: got its data at offset 256, expected 128, where the tensors before it end",
        ),
        (
            [info("a", (32,)), info("b", (32,))],
            ROW,
            ", tensor b: got its data at offset 0, expected 128, where the tensors before it end",
        ),
        (
            [info("b", (32,), offset=128), info("a", (32,))],
            2 * ROW,
            ", tensor b: got its data at offset 128, expected 0, where the tensors before it end",
        ),
        (
            [info("a", (32,), kind=1), info("b", (32,), offset=128)],
            2 * ROW,
            ", tensor b: got its data at offset 128, expected 64, where the tensors before it end",
        ),
        (
            [info("a", (32,), kind=1)],
            ROW,
            "got 192 bytes, expected at most 128 from its header",
        ),
        ([info("a", (32,))], ROW[:-1], "got 191 bytes, expected at least 192"),
        ([info("a", (1 << 62, 1 << 62))], ROW, f"got 224 bytes, expected at least {96 + (1 << 126)}"),
        (
            [info("a", (32,)), info("a", (32,), offset=128)],
            2 * ROW,
            ", tensor a: got this tensor twice, expected it once",
        ),
        (
            [info("a", (32, 0))],
            b"",
            ", tensor a: got shape [0, 32], expected rows of blocks of 1 as type F32 has them",
        ),
        (
            [info("a", (31, 2), kind=8)],
            b"",
            ", tensor a: got shape [2, 31], expected rows of blocks of 32 as type Q8_0 has them",
        ),
        (
            [info("a", (320, 2), kind=12)],
            b"",
            ", tensor a: got shape [2, 320], expected rows of blocks of 256 as type Q4_K has them",
        ),
        ([info("a", (256, 2), kind=14)], bytes(160), "got 256 bytes, expected at least 516"),
        ([info("a", ())], b"", ", tensor a: got 0 dimensions, expected 1 to 4"),
        ([info("a", [1] * 5)], b"", ", tensor a: got 5 dimensions, expected 1 to 4"),
    ],
    ids=[
        *("gap", "overlap", "order", "smaller type", "smaller type at the end", "short"),
        *("sizes that overflow", "twice", "empty", "part of a block",
        "part of a super-block", "super-block cut short", "scalar", "too many sizes"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fill_the_data_section(
    path: Path, infos: list[bytes], data: bytes, problem: str
) -> None:
    assert _refusal(path, gguf_bytes(infos=infos, data=data)) == f"{problem}. {AGAIN}"


def test_the_last_tensor_may_end_before_its_padding_does(path: Path) -> None:
    infos = [info("a", (1,)), info("b", (1,), offset=32)]
    for end in (b"", bytes(28)):
        path.write_bytes(gguf_bytes(infos=infos, data=bytes(32) + WORD + end))
        assert GgufPart(path).tensors["b"].data.tobytes() == WORD


def test_a_type_that_nobody_knows(path: Path) -> None:
    assert _refusal(path, gguf_bytes(infos=[info("a", (32,), kind=999)])) == (
        ", tensor a: got type 999, expected one that the package gguf knows. "
        "Convert the model to another GGUF type, such as Q8_0 or F16."
    )


@pytest.mark.parametrize("version", [0, 1, 4])
def test_another_version(path: Path, version: int) -> None:
    assert _refusal(path, b"GGUF" + struct.pack("<I", version) + bytes(16)) == (
        f"got GGUF version {version}, expected 2 or 3. Convert the model to GGUF again."
    )


def test_big_endian(path: Path) -> None:
    writer = gguf.GGUFWriter(path, "llama", endianess=gguf.GGUFEndian.BIG)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert _refusal(path, path.read_bytes()) == (
        "got a big-endian GGUF file, expected a little-endian one. Convert it with "
        "gguf-convert-endian of the package gguf, or download the other one."
    )


def test_a_pipe_is_refused_without_waiting_for_its_writer(path: Path) -> None:
    os.mkfifo(path)
    with pytest.raises(InputError) as caught:
        GgufPart(path)
    assert (
        str(caught.value)
        == f"{path}: got a pipe, expected a GGUF file. Check the path and the permissions."
    )


def test_a_file_that_may_not_be_read(path: Path) -> None:
    with pytest.raises(InputError) as caught:
        GgufPart(path)
    assert str(caught.value) == (
        f"{path}: got no such file, expected a GGUF file. Check the path and the permissions."
    )


WHOLE = gguf_bytes(
    [
        entry("general.architecture", STRING, text("llama")),
        entry("k", UINT32, WORD),
        entry("list", ARRAY, array(STRING, 2, text("ab") + text(""))),
        entry("numbers", ARRAY, array(UINT32, 2, WORD * 2)),
        entry("yes", 7, b"\1"),
    ],
    [info("a", (32, 2)), info("b", (32,), kind=1, offset=256)],
    bytes(range(64)) * 5,
)


@given(
    position=st.integers(4, len(WHOLE) - 1),
    value=st.one_of(
        st.binary(min_size=1, max_size=8),
        st.integers(0, 64).map(lambda bit: struct.pack("<Q", (1 << bit) - 1)),
    ),
    end=st.one_of(st.none(), st.integers(4, len(WHOLE))),
)
@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_a_damaged_file_is_refused_or_read_as_the_gguf_package_reads_it(
    path: Path, position: int, value: bytes, end: int | None
) -> None:
    data = bytearray(WHOLE)
    data[position : position + len(value)] = value[: len(WHOLE) - position]
    path.write_bytes(data[:end])
    try:
        part = GgufPart(path)
        strings = part.strings("list")
    except InputError as error:
        assert error.where.startswith(str(path))
        return
    reader = gguf.GGUFReader(path)
    assert set(part.keys) == {key for key in reader.fields if not key.startswith("GGUF.")}
    assert strings is None or strings == reader.fields["list"].contents()
    for tensor in reader.tensors:
        mine = part.tensors[tensor.name]
        assert mine.data.tobytes() == tensor.data.tobytes()
        assert mine.type == tensor.tensor_type
