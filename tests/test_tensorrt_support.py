"""What README says of TensorRT is what the tests have seen: tests/tensorrt.json."""

from __future__ import annotations

import re

from tests.real_tensorrt import SEEN, support_rows
from tests.tracked import REPOSITORY, tracked_files


def test_the_readme_has_the_rows() -> None:
    assert f"\n{support_rows()}\n" in (REPOSITORY / "README.md").read_text(encoding="utf-8")


def test_each_thing_is_shown_by_a_test() -> None:
    tests = (path for path in tracked_files() if path.name.startswith("test_"))
    shown = {
        thing
        for path in tests
        for thing in re.findall(r'"real", showing\("(.+)"\)', path.read_text(encoding="utf-8"))
    }
    assert shown == {
        thing for versions in SEEN.values() for things in versions.values() for thing in things
    }
