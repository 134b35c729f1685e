"""Every bad input gives one message and exit code 2 through the exporter's command line, and leaves
earlier results whole.
"""

from __future__ import annotations

import errno
import fcntl
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from calibration.checkpoints.checkpoint import open_checkpoint
from plugins.errors import EXIT_INPUT

Run = Callable[..., tuple[int, str, str]]
Refused = Callable[[tuple[int, str, str], str], None]
Snapshot = Callable[[Path], dict[str, bytes]]


def test_a_full_disk_is_refused_before_writing(
    run: Run, refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1_000_000))
    code, _, err = run(tmp_path / "out")
    assert code == EXIT_INPUT
    assert err.splitlines()[-1].startswith(
        f"{tmp_path / 'out'}: got 1 MB of free space, expected at least "
    )
    assert err.endswith("Free some space, choose another --out, or stop earlier with --until.\n")
    assert not (tmp_path / "out").exists()


def test_a_folder_of_another_setting_is_refused_and_kept(
    run: Run, refused: Refused, tmp_path: Path, tiny_llama: Callable[..., Path], snapshot: Snapshot
) -> None:
    out = tmp_path / "out"
    run(out)
    before = snapshot(out)
    refused(
        run(out, wbits="3"),
        f'{out}: got an artifact with scheme.op "QQQGemm", scheme.wbits 4, scheme.act_symmetric '
        'true, expected scheme.op "ABQGemm", scheme.wbits 3, scheme.act_symmetric false. Choose '
        "another --out, or delete this folder.",
    )
    assert snapshot(out) == before


@pytest.mark.parametrize("resume", [(), ("--resume",)])
def test_a_different_model_under_the_same_name_is_refused_and_kept(
    run: Run,
    refused: Refused,
    tmp_path: Path,
    tiny_model_dir: Path,
    tiny_llama: Callable[..., Path],
    snapshot: Snapshot,
    monkeypatch: pytest.MonkeyPatch,
    resume: tuple[str, ...],
) -> None:
    out = tmp_path / "out"
    for name, model in (("a", tiny_model_dir), ("b", tiny_llama(tie_word_embeddings=False))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model").symlink_to(model)
    monkeypatch.chdir(tmp_path / "a")
    assert run(out, model=Path("model"))[0] == 0
    before = snapshot(out)
    ours, theirs = (
        open_checkpoint(str(tmp_path / name / "model")).fingerprint[:12] for name in ("a", "b")
    )
    monkeypatch.chdir(tmp_path / "b")
    refused(
        run(out, *resume, model=Path("model")),
        f'{out}: got an artifact of another model or config (model "model", fingerprint {ours}), expected '
        f"those of model ({theirs}). Choose another --out.",
    )
    assert snapshot(out) == before


def test_a_mistyped_model_is_named_before_a_folder_is_compared(
    run: Run, tmp_path: Path, snapshot: Snapshot
) -> None:
    out = tmp_path / "out"
    run(out)
    before = snapshot(out)
    code, _, err = run(out, model=Path("smollm4"))
    assert code == EXIT_INPUT
    assert err.splitlines()[-1].startswith("model 'smollm4': got an unknown name, expected ")
    assert snapshot(out) == before


def test_a_setting_that_the_folder_does_not_have_is_said_to_be_missing(
    run: Run, refused: Refused, tmp_path: Path
) -> None:
    out, bits = tmp_path / "out", tmp_path / "bits.txt"
    bits.write_text("down_proj w8a8\n")
    run(out)
    code, _, err = run(out, "--bits-file", str(bits))
    assert code == EXIT_INPUT and "{}" not in err
    assert err.splitlines()[-1] == (
        f"{out}: got an artifact with no scheme.rules, expected scheme.rules "
        '[["down_proj", "w8a8"]]. Choose another --out, or delete this folder.'
    )


def test_a_strangers_folder_is_refused_and_kept(run: Run, refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    refused(
        run(tmp_path),
        f"{tmp_path}: got a folder with other files in it (thesis.tex), expected a new or an "
        f"artefact folder. "
        "Choose another --out.",
    )
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    refused(
        run(tmp_path / "thesis.tex"),
        f"{tmp_path / 'thesis.tex'}: got a file, expected a folder. Choose another --out.",
    )


def test_two_exports_do_not_share_a_folder(run: Run, refused: Refused, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with (out / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        refused(
            run(out),
            f"{out}: got a folder that another process is writing, expected a free one. "
            "Wait for it to end or choose another --out.",
        )


def test_a_file_system_without_locks_is_written_with_a_word(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    out = tmp_path / "out"
    code, _, err = run(out, "--max-seq", "64")
    assert code == 0 and err.splitlines()[1] == (  # behind the estimate
        f"{out} lies on a file system without locks (No locks available): let no other process "
        "write it meanwhile"
    )


def test_links_in_out_lead_nowhere(run: Run, tmp_path: Path, refused: Refused) -> None:
    """An OUT from somebody else whose names lead to files of ours."""
    out, victim = tmp_path / "out", tmp_path / "thesis.tex"
    victim.write_text("years of work")
    assert run(out)[0] == 0
    (out / "quant").rename(tmp_path / "elsewhere")
    (out / "quant").symlink_to(tmp_path / "elsewhere")
    for name in (".manifest.json.tmp", ".onnx.partial", ".onnx.old", "report", ".calibration"):
        (out / name).symlink_to(victim)
    code, _, err = run(out, "--resume")  # a folder on another disk is read
    assert code == 0 and "quant: kept" in err and victim.read_text() == "years of work"
    kept = {path.name: path.read_bytes() for path in (tmp_path / "elsewhere").iterdir()}
    assert run(out)[0] == 0 and not (out / "quant").is_symlink()
    assert {path.name: path.read_bytes() for path in (tmp_path / "elsewhere").iterdir()} == kept
    assert victim.read_text() == "years of work"
    (out / ".lock").unlink()
    (out / ".lock").symlink_to(victim)
    refused(
        run(out),
        f"{out / '.lock'}: got a symbolic link, expected a file that can be written. Choose another "
        "--out.",
    )
    assert victim.read_text() == "years of work"


def test_names_are_shown_and_not_obeyed(
    run: Run, tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a path, of an architecture, and markup of the library that draws the table."""
    code, _, err = run(tmp_path / "out", model=tmp_path / "\x1b[2Jmodel\n\u202e.gguf")
    assert code == EXIT_INPUT
    assert err.startswith(f"{tmp_path}/\\x1b[2Jmodel\\n\\u202e.gguf: got no such file or folder")
    model = shutil.copytree(tiny_model_dir, tmp_path / "model")
    config = (model / "config.json").read_text()
    (model / "config.json").write_text(config.replace("LlamaForCausalLM", "Llama\\u001b[31m"))
    code, _, err = run(tmp_path / "out", model=model)
    assert code == EXIT_INPUT and "Llama\\x1b[31m" in err and "\x1b" not in err
    (model / "config.json").write_text(config)
    monkeypatch.chdir(tmp_path)
    for name in ("a[/]b", "a[bold red]b", "a\x1b[31m\u202eb", ":smile:"):
        out = Path(name)
        code, stdout, err = run(out, model=model)
        shown = name.replace("\x1b", "\\x1b").replace("\u202e", "\\u202e")
        assert code == 0 and stdout.splitlines()[0].rstrip() == shown
        assert "\x1b" not in stdout + err
        assert (out / "onnx" / "model.onnx").is_file()


def test_bits_and_limits_out_of_range(run: Run, refused: Refused, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for more in (("--max-seq", "0"), ("--max-batch", "-1")):
        with pytest.raises(SystemExit) as caught:
            run(out, *more)
        assert caught.value.code == EXIT_INPUT
    refused(
        run(out, wbits="9"),
        "--wbits: got '9', expected 1 to 8, 1* (3 levels) or 2* (5 levels). "
        "Give one of these; in a shell write 2b or '2*' for the balanced set.",
    )
    refused(
        run(out, abits="9"),
        "--abits: got 9, expected 2 to 8, or 16 for weight-only. Give one of these.",
    )
    assert not out.exists()


def test_an_unknown_model_leaves_nothing(run: Run, refused: Refused, tmp_path: Path) -> None:
    out, missing = tmp_path / "out", tmp_path / "missing.gguf"
    code, _, err = run(out, model=Path("smollm4"))
    assert code == EXIT_INPUT
    assert err.splitlines()[-1].startswith(
        "model 'smollm4': got an unknown name, expected an alias, a hub id (owner/name), a "
        "folder or a "
        ".gguf file. Did you mean smollm"
    )
    code, _, err = run(out, model=missing)
    assert code == EXIT_INPUT and err.splitlines()[-1].startswith(
        f"{missing}: got no such file or folder, expected a Hugging"
    )
    assert not out.exists()


def test_a_group_size_that_does_not_divide(run: Run, refused: Refused, tmp_path: Path) -> None:
    refused(
        run(tmp_path / "out", "--method", "abq", "--group-size", "48"),
        "--group-size: got 48, which does not divide the in_features 64, 128 of this model's "
        "linear layers. "
        "Use --group-size 0 (one scale per output channel) or 16, 32, 64.",
    )
    assert not (tmp_path / "out").exists()


def test_an_out_that_cannot_be_read(
    run: Run, refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = tmp_path / ("x" * 300)
    refused(
        run(long),
        f"{long}: got File name too long, expected a folder that can be read. Choose another --out.",
    )

    def forbid(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", forbid)
    refused(
        run(tmp_path),
        f"{tmp_path}: got Permission denied, expected a folder that can be read. Choose another --out.",
    )


def test_calibration_text_that_is_empty_or_one_token(
    run: Run, refused: Refused, tmp_path: Path
) -> None:
    out, text = tmp_path / "out", tmp_path / "text.txt"
    text.write_text(" \n")
    refused(
        run(out, "--calib", str(text)),
        f"--calib: got {text} with no text in it. Give a file with at least a few thousand words.",
    )
    text.write_text("a")
    refused(
        run(out, "--calib", str(text), "--method", "qqq"),
        "--calib: got a text of 1 tokens, expected at least 2. Give a longer text.",
    )
    assert sorted(path.name for path in out.iterdir()) == [".lock", "manifest.json"]
    assert run(out)[0] == 0  # a folder without a finished stage is nobody's


def _damage(path: Path, change: Callable[[bytearray], Any]) -> None:
    data = bytearray(path.read_bytes())
    change(data)
    path.write_bytes(data)


def _set_nan(data: bytearray) -> None:
    data[-4:] = np.float32("nan").tobytes()


def test_damaged_weights_leave_earlier_results_whole(
    run: Run, refused: Refused, tmp_path: Path, tiny_model_dir: Path, snapshot: Snapshot
) -> None:
    out, model = tmp_path / "out", shutil.copytree(tiny_model_dir, tmp_path / "model")
    assert run(out, model=model)[0] == 0
    before, path = snapshot(out), model / "model.safetensors"
    size = path.stat().st_size
    _damage(path, _set_nan)
    code, _, err = run(out, "--resume", model=model)
    assert code == EXIT_INPUT and ": got an artifact of another model or config (" in err
    code, _, err = run(tmp_path / "new", model=model)
    assert (
        code == EXIT_INPUT
        and err.splitlines()[-1].startswith(f"{model}, tensor model.")
        and "got nan at" in err
    )
    assert snapshot(out) == before
    _damage(path, lambda data: data.__delitem__(slice(-100, None)))
    code, _, err = run(out, "--resume", model=model)
    assert code == EXIT_INPUT and err.splitlines()[-1].startswith(
        f"{path}: got {size - 100} bytes, expected {size}"
    )
    assert "Traceback" not in err and snapshot(out) == before


def test_a_truncated_gguf(run: Run, refused: Refused, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_tensor("token_embd.weight", np.zeros((512, 64), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    size = path.stat().st_size
    _damage(path, lambda data: data.__delitem__(slice(-1000, None)))
    refused(
        run(tmp_path / "out", model=path),
        f"{path}: got {size - 1000} bytes, expected at least {size}. "
        "The file is truncated or damaged: download it again.",
    )
    assert not (tmp_path / "out").exists()


def test_no_space_before_the_onnx_stage(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, usage, real = tmp_path / "out", shutil.disk_usage(tmp_path), shutil.disk_usage
    with monkeypatch.context() as patch:
        patch.setattr(
            shutil,
            "disk_usage",
            lambda path: usage._replace(free=1000) if (out / "quant").exists() else real(path),
        )
        code, _, err = run(out)
    assert code == EXIT_INPUT
    assert err.splitlines()[-1].startswith(
        f"{out / 'onnx'}: got 0 MB of free space, expected at least "
    )
    assert err.endswith("Free some space or choose another --out.\n")
    assert sorted(path.name for path in out.iterdir()) == [".lock", "manifest.json", "quant"]
    code, _, err = run(out, "--resume")
    assert code == 0 and "quant: kept, nothing changed" in err
