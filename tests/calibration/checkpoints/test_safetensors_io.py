"""Our safetensors reader and writer against the safetensors library, and every kind of damage."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from calibration.checkpoints.safetensors import (
    SafetensorsWriter,
    TensorSpec,
    numpy_dtype,
    read_header,
    read_tensor,
)
from plugins.errors import InputError

AGAIN = "The file is truncated or damaged: download or make it again."


def _write(path: Path, arrays: dict[str, np.ndarray]) -> None:
    with SafetensorsWriter(
        path, [TensorSpec(name, array.dtype, array.shape) for name, array in arrays.items()]
    ) as writer:
        for array in arrays.values():
            writer.write(array)


@pytest.fixture
def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "b.codes": rng.integers(0, 255, (3, 5), dtype=np.uint8),
        "a.scale": rng.standard_normal((3, 1)).astype(np.float32),
        "c": np.arange(4, dtype=np.int32),
        "d": np.array([1.5, -2.0], np.float16),
        "empty": np.zeros((0, 4), np.float32),
    }


def test_the_library_reads_what_we_write(tmp_path: Path, arrays: dict[str, np.ndarray]) -> None:
    _write(tmp_path / "a.safetensors", arrays)
    loaded = load_file(tmp_path / "a.safetensors")
    assert set(loaded) == set(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(loaded[name], array)


def test_we_read_what_the_library_writes(tmp_path: Path, arrays: dict[str, np.ndarray]) -> None:
    path = tmp_path / "a.safetensors"
    save_file(arrays, path)
    entries = read_header(path)
    assert set(entries) == set(arrays)
    for name, array in arrays.items():
        got = read_tensor(path, entries[name])
        np.testing.assert_array_equal(got, array)
        assert got.dtype == array.dtype


def test_bfloat16_round_trip(tmp_path: Path) -> None:
    array = np.array([[1.0, -3.5], [2**-120, 0.0]], ml_dtypes.bfloat16)
    _write(tmp_path / "a.safetensors", {"w": array})
    got = read_tensor(tmp_path / "a.safetensors", read_header(tmp_path / "a.safetensors")["w"])
    assert got.dtype == numpy_dtype("bfloat16")
    np.testing.assert_array_equal(got.view(np.uint16), array.view(np.uint16))


def test_truncated_file_says_both_sizes(tmp_path: Path, arrays: dict[str, np.ndarray]) -> None:
    path = tmp_path / "a.safetensors"
    _write(path, arrays)
    whole = path.read_bytes()
    path.write_bytes(whole[:-3])
    with pytest.raises(InputError) as caught:
        read_header(path)
    assert (
        str(caught.value)
        == f"{path}: got {len(whole) - 3} bytes, expected {len(whole)} from its header. {AGAIN}"
    )


@pytest.mark.parametrize(
    "content", [b"", b"abc", b"\xff" * 64, (100).to_bytes(8, "little") + b"{}"]
)
def test_no_header(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_header(path)
    assert (
        str(caught.value)
        == f"{path}: got {len(content)} bytes with no safetensors header at the start. {AGAIN}"
    )


ONE = b'{"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}'


@pytest.mark.parametrize(
    "header",
    [
        b"not json",
        b'{"w": 3}',
        b'["w"]',
        b'{"w": {"dtype": "F32", "shape": [1]}}',
        b'{"w": {"dtype": "F32", "shape": [-1, -1], "data_offsets": [0, 4]}}',
        b'{"w": {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}}',
        b'{"w": {"dtype": "F32", "shape": [true], "data_offsets": [0, 4]}}',
        b'{"w": {"dtype": "F32", "shape": ["1"], "data_offsets": [0, 4]}}',
        b'{"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]}}',
        b'{"w": {"dtype": "F32", "shape": [1e999], "data_offsets": [0, 4]}}',
        b'{"w": {"dtype": "F32", "shape": [' + b"9" * 5000 + b'], "data_offsets": [0, 4]}}',
        b'{"w": {"dtype": "F32", "shape": [NaN], "data_offsets": [0, 4]}}',
        b'{"__metadata__": {"format": 3}, "w": ' + ONE + b"}",
        b'{"__metadata__": [], "w": ' + ONE + b"}",
        b'{"w": ' + ONE + b', "w": ' + ONE + b"}",
        b'{"w": {"dtype": "F32", "shape": [1], "shape": [1], "data_offsets": [0, 4]}}',
        b"[" * 100_000,
        b'{"\xff": ' + ONE + b"}",
    ],
    ids=lambda header: header[:60],
)
def test_header_that_is_not_tensors(tmp_path: Path, header: bytes) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(InputError) as caught:
        read_header(path)
    assert (
        str(caught.value)
        == f"{path}: got a safetensors header that is not valid JSON of tensors. {AGAIN}"
    )


def test_overlapping_tensors(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    header = b'{"v": ' + ONE + b', "w": ' + ONE + b"}"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(InputError) as caught:
        read_header(path)
    assert (
        str(caught.value)
        == f"{path}: got a header whose tensor w does not fit its place in the file. {AGAIN}"
    )


def _raw(path: Path, info: dict[str, object], size: int, name: str = "w") -> None:
    header = json.dumps({name: info}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(size))


@pytest.mark.parametrize(
    ("shape", "name"), [([2, 2], "w"), ([1 << 61], "w"), ([1 << 61] * 9, "w"), ([2, 2], "w" * 5000)]
)
def test_tensor_that_does_not_fit_its_place(tmp_path: Path, shape: list[int], name: str) -> None:
    path = tmp_path / "a.safetensors"
    _raw(path, {"dtype": "F32", "shape": shape, "data_offsets": [0, 12]}, 12, name)
    with pytest.raises(InputError) as caught:
        read_header(path)
    shown = name if len(name) == 1 else f"{'w' * 60} ... {'w' * 60}"
    assert (
        str(caught.value)
        == f"{path}: got a header whose tensor {shown} does not fit its place in the file. {AGAIN}"
    )


def test_unknown_dtype(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    _raw(path, {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}, 1)
    with pytest.raises(InputError) as caught:
        read_header(path)
    assert str(caught.value) == (
        f"{path}, tensor w: got dtype F4, expected one of F64, F32, F16, BF16, I64, I32, I16, "
        f"I8, U64, U32, U16, U8, BOOL, "
        "F8_E4M3, "
        "F8_E5M2. Save the checkpoint as float32, float16 or bfloat16."
    )


def test_git_lfs_pointer(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(InputError) as caught:
        read_header(path)
    assert str(caught.value) == (
        f"{path}: got a Git LFS pointer, expected the weights themselves. "
        "Run `git lfs pull` in the model folder."
    )


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        read_header(tmp_path / "none.safetensors")
    assert str(caught.value) == (
        f"{tmp_path / 'none.safetensors'}: got no such file, expected a safetensors "
        "file. "
        "Check the path and the permissions."
    )


def test_writer_refuses_another_tensor_and_a_missing_one(tmp_path: Path) -> None:
    spec = TensorSpec("w", np.dtype(np.float32), (2,))
    with (
        pytest.raises(RuntimeError, match="planned float32"),
        SafetensorsWriter(tmp_path / "a", [spec]) as writer,
    ):
        writer.write(np.zeros(3, np.float32))
    with (
        pytest.raises(RuntimeError, match="1 tensors not written"),
        SafetensorsWriter(tmp_path / "b", [spec]),
    ):
        pass
