"""Finished blocks on the disk: whole or not there, damaged ones noticed, those of other settings
thrown away.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from calibration.blocks.store import BlockResult, BlockStore
from calibration.out.files import temporary
from plugins.core.op_spec import QuantArrays
from plugins.errors import InputError


def _result(seed: int) -> BlockResult:
    """A site of each op, with and without the optional arrays."""
    rng = np.random.default_rng(seed)
    qqq = QuantArrays(
        rng.integers(-8, 8, (4, 64), np.int8),
        rng.random((4, 1), np.float32),
        None,
        rng.random((4, 1)).astype(np.float16),
    )
    abq = QuantArrays(
        rng.integers(0, 16, (4, 64), np.uint8),
        rng.random((4, 2), np.float32),
        rng.integers(-9, 9, (4, 2), np.int32),
        None,
        rng.random(4, np.float32),
    )
    return BlockResult(
        {"self_attn.qkv_proj": qqq, "mlp.down_proj": abq},
        {"input_layernorm.weight": rng.random(64, np.float32)},
        {"loss_before": 1 / 3, "loss_after": 0.1 + seed, "notes": ["a note"]},
    )


def _filled(folder: Path, count: int = 3) -> BlockStore:
    store = BlockStore(folder, "print")
    for index in range(count):
        store.save(index, _result(index))
    return store


def _finished(store: BlockStore) -> int:
    return len(store.digests())


def _same(a: BlockResult, b: BlockResult) -> bool:
    def arrays(result: BlockResult) -> dict[str, np.ndarray]:
        found = {
            f"{site}/{name}": array
            for site, one in result.sites.items()
            for name, array in one.named().items()
        }
        return found | result.gains

    ours, theirs = arrays(a), arrays(b)
    return (
        ours.keys() == theirs.keys()
        and a.report == b.report
        and all(
            ours[key].dtype == theirs[key].dtype and np.array_equal(ours[key], theirs[key])
            for key in ours
        )
    )


def test_blocks_come_back_as_they_were(tmp_path: Path) -> None:
    _filled(tmp_path / "work")
    store = BlockStore(tmp_path / "work", "print")
    assert _finished(store) == 3
    for index in range(3):
        result = store.load(index)
        assert _same(result, _result(index)) and not _same(result, _result(index + 1))
        assert result.lookup("mlp.down_proj") is result.sites["mlp.down_proj"]


@pytest.mark.parametrize(("fingerprint", "keep"), [("another", True), ("print", False)])
def test_other_settings_or_a_fresh_start_throw_them_away(
    tmp_path: Path, fingerprint: str, keep: bool
) -> None:
    _filled(tmp_path / "work")
    store = BlockStore(tmp_path / "work", fingerprint, keep=keep)
    assert _finished(store) == 0
    assert [path.name for path in (tmp_path / "work").iterdir()] == ["state.json"]


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "damage", [_truncate, _flip, Path.unlink, lambda path: path.write_bytes(b"")]
)
@pytest.mark.parametrize("index", [0, 1, 2])
def test_a_damaged_block_and_those_behind_it_do_not_count(
    tmp_path: Path, damage: Callable[[Path], None], index: int
) -> None:
    _filled(tmp_path / "work")
    damage(tmp_path / "work" / f"block-{index:05d}.safetensors")
    store = BlockStore(tmp_path / "work", "print")
    assert _finished(store) == index
    store.save(index, _result(index))
    assert _finished(store) == 3  # those behind it were made behind the same
    store.save(index, _result(7))
    assert _finished(store) == index + 1
    assert _same(store.load(index), _result(7))


def test_a_block_that_is_not_recorded_yet_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = _filled(tmp_path / "work", 1)

    def die(path: Path, value: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("calibration.out.pieces.write_json", die)
        with pytest.raises(KeyboardInterrupt):
            store.save(1, _result(1))
    assert _finished(BlockStore(tmp_path / "work", "print")) == 1


def test_a_store_goes_on_behind_an_error_in_its_first_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = BlockStore(tmp_path / "work", "print")

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("safetensors.numpy.save_file", full)
        with pytest.raises(InputError):
            store.save(0, _result(0))
    assert not (tmp_path / "work").exists()
    store.save(0, _result(0))
    assert _finished(BlockStore(tmp_path / "work", "print")) == 1


@pytest.mark.parametrize("text", ["", "{", "[]", '{"fingerprint": 5}', '{"files": {}}'])
def test_a_damaged_state_starts_over(tmp_path: Path, text: str) -> None:
    _filled(tmp_path / "work")
    (tmp_path / "work" / "state.json").write_text(text)
    assert _finished(BlockStore(tmp_path / "work", "print")) == 0
    assert json.loads((tmp_path / "work" / "state.json").read_text()) == {
        "fingerprint": "print",
        "files": {},
    }


def test_a_process_that_only_reads_changes_nothing(tmp_path: Path) -> None:
    _filled(tmp_path / "work")
    assert _finished(BlockStore(tmp_path / "work", "another", keep=False, writes=False)) == 3
    assert (
        _finished(BlockStore(tmp_path / "nowhere", "print", writes=False)) == 0
        and not (tmp_path / "nowhere").exists()
    )


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = _filled(tmp_path / "work", 1)

    def full(tensors: object, path: str, metadata: object) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("safetensors.numpy.save_file", full)
        with pytest.raises(InputError) as caught:
            store.save(1, _result(1))
    assert str(caught.value) == (
        f"{tmp_path / 'work' / 'block-00001.safetensors'}: got [Errno 28] No space left on "
        f"device while writing, "
        "expected a writable folder with enough space. "
        "Check the disk; finished blocks are whole, go on with --resume."
    )
    assert _finished(store) == 1 and _same(store.load(0), _result(0))
    store.save(1, _result(1))
    assert _finished(store) == 2


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError) as caught:
        BlockStore(tmp_path / "file" / "work", "print")
    assert str(caught.value) == (
        f"{tmp_path / 'file' / 'work'}: got Not a directory, expected a folder that can be written. "
        "Choose another --out."
    )


def test_removed_when_everything_is_written(tmp_path: Path) -> None:
    _filled(tmp_path / "work").pieces.remove()
    assert not (tmp_path / "work").exists()


def test_nothing_is_written_through_a_link(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    store = _filled(victim)
    kept = {path.name: path.read_bytes() for path in victim.iterdir()}
    link = tmp_path / "work"
    link.symlink_to(victim)
    store = BlockStore(link, "print")  # the right fingerprint is no excuse
    assert _finished(store) == 0 and not link.is_symlink()
    for name in (".block.tmp", "block-00000.safetensors", "state.json"):
        (link / name).unlink(missing_ok=True)
        (link / name).symlink_to(victim / "block-00001.safetensors")
    (link / "state.json").unlink()
    store = BlockStore(link, "other")
    (link / "block-00000.safetensors").symlink_to(victim / "block-00001.safetensors")
    store.save(0, _result(7))
    assert _finished(store) == 1 and not (link / "block-00000.safetensors").is_symlink()
    assert {path.name: path.read_bytes() for path in victim.iterdir()} == kept
    store.pieces.remove()
    assert not link.exists()


def test_half_a_block_of_a_killed_process_is_swept(tmp_path: Path) -> None:
    folder = tmp_path / "work"
    _filled(folder, 1)
    temporary(folder / "block-00001.safetensors").write_bytes(b"half")
    assert _finished(BlockStore(folder, "print")) == 1
    assert sorted(path.name for path in folder.iterdir()) == [
        "block-00000.safetensors",
        "state.json",
    ]


@pytest.mark.parametrize("state", [{"fingerprint": "print", "files": 5}, {"files": [3]}])
def test_a_state_of_other_types_is_none(tmp_path: Path, state: object) -> None:
    folder = tmp_path / "work"
    _filled(folder, 1)
    (folder / "state.json").write_text(json.dumps(state))
    assert _finished(BlockStore(folder, "print")) == 0
