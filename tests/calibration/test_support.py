"""The table of families, as the command prints it and the README shows it."""

from __future__ import annotations

import pytest

from calibration.families import aliases, family, family_names
from calibration.support import support_table
from exporter.__main__ import main
from tests.tracked import REPOSITORY


def test_the_readme_has_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--list-families"])
    printed = capsys.readouterr().out
    assert ended.value.code == 0 and printed == f"{support_table()}\n"
    assert f"\n\n{printed}\n" in (REPOSITORY / "README.md").read_text(encoding="utf-8")


def test_every_family_has_a_row() -> None:
    _, _, *rows = support_table().splitlines()
    for name, row in zip(family_names(), rows, strict=True):
        assert row.startswith(f"| `{name}` | {family(name).models} |")
    assert all(f"`{alias}`" in "".join(rows) for alias in aliases())
    rotated = {row.split("`")[1] for row in rows if row.endswith("| yes |")}
    like_llama = {"granite", "llama", "mistral", "phi3", "qwen2", "qwen3", "smollm3"}
    assert rotated == like_llama | {"mixtral", "qwen3_moe"}
