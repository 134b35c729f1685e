"""The C++ tokenizer and chat templates as a process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.deploy.runtime.token_cases import Answers, build_answers


@pytest.fixture(scope="module")
def answers() -> Iterator[Answers]:
    process = Answers(build_answers())
    yield process
    process.close()
