"""--format of the exporter: the folder for other tools is part of the quant stage, and asking for
it makes that stage again.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

Run = Callable[..., tuple[int, str, str]]
NAME = "compressed-tensors"


def test_the_folder_is_in_the_manifest_and_resumes(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    stage = ("--until", "quant", "--resume")
    assert run(out, *stage)[0] == 0 and not (out / "quant" / NAME).exists()
    code, _, err = run(out, *stage, "--format", NAME)
    assert code == 0 and "quant: kept" not in err
    files = json.loads((out / "manifest.json").read_text())["stages"]["quant"]["files"]
    assert {f"{NAME}/config.json", f"{NAME}/model-00001-of-00001.safetensors", "quant.json"} <= {
        *files
    }
    _, _, err = run(out, *stage, "--format", NAME)
    assert "quant: kept, nothing changed\n" in err
    (out / "quant" / NAME / "config.json").unlink()
    _, _, err = run(out, *stage, "--format", NAME)
    assert (
        f"quant: made again, {out / 'quant' / NAME / 'config.json'}: got no such file, expected "
        f"it from the manifest" in err
    )


def test_a_scheme_that_it_cannot_say_is_refused_before_anything_is_written(
    run: Run, tmp_path: Path, refused: Callable[[tuple[int, str, str], str], None]
) -> None:
    refused(
        run(tmp_path / "out", "--format", NAME, wbits="6"),
        "--format compressed-tensors: got W6A8, expected W4A8, W8A8, W4A16 or "
        "W8A16. Use such bits, or leave out --format.",
    )
    assert not (tmp_path / "out").exists()
