"""What an engine takes, from its profiles."""

from __future__ import annotations

import copy
from typing import Any, cast

import pytest

from exporter.engine.limits import EngineLimits, engine_limits
from exporter.engine.record import EngineRecord
from plugins.errors import InputError
from tests.exporter.engine_cases import ENGINE


def test_limits_of_both_profiles() -> None:
    """Together with the position tables, where the record knows of them."""
    for known, longest in (({}, 16), ({"max_context": 8}, 8), ({"max_context": 99}, 16)):
        record = cast(EngineRecord, ENGINE | known)
        assert engine_limits(record) == EngineLimits(max_batch=2, max_tokens=8, max_context=longest)


@pytest.mark.parametrize(
    ("name", "rank"), [("input_ids", 2), ("logits_indices", 2), ("past_key_values.0.key", 4)]
)
def test_profiles_that_are_no_decoders(name: str, rank: int) -> None:
    for change in ({}, {name: {"max": [1]}}):
        record: Any = copy.deepcopy(ENGINE)
        inputs = record["profiles"][1]["inputs"]
        del inputs[name]
        inputs |= change
        with pytest.raises(InputError) as caught:
            engine_limits(record)
        assert str(caught.value) == (
            f"engine.json, profiles: got no {name} of {rank} sizes, expected the profiles of a "
            "decoder. It is damaged: build the engine again."
        )
