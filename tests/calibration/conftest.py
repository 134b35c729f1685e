"""Several processes that calibrate together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest


@pytest.fixture
def together(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """together(work, *arguments, world=2) -> exit code, stdout and stderr of work(rank, *arguments)
    in each of so many processes that find each other.
    """
    from tests.calibration.process_group import together as run

    return lambda *given, **options: run(tmp_path_factory.mktemp("ranks"), *given, **options)
