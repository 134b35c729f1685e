"""What an engine takes, from its profiles."""

from __future__ import annotations

import copy

import pytest

from exporter.engine.limits import EngineLimits, engine_limits
from plugins.errors import InputError
from tests.exporter.engine_cases import ENGINE


def test_limits_of_both_profiles() -> None:
    assert engine_limits(ENGINE["profiles"]) == EngineLimits(
        max_batch=2, max_tokens=8, max_context=16
    )


@pytest.mark.parametrize(("name", "rank"), [("input_ids", 2), ("past_key_values.0.key", 4)])
def test_profiles_that_are_no_decoders(name: str, rank: int) -> None:
    for change in ({}, {name: {"max": [1]}}):
        profiles = copy.deepcopy(ENGINE["profiles"])
        del profiles[1]["inputs"][name]
        profiles[1]["inputs"] |= change
        with pytest.raises(InputError) as caught:
            engine_limits(profiles)
        assert str(caught.value) == (
            f"engine.json, profiles: got no {name} of {rank} sizes, expected the profiles of a "
            "decoder. It is damaged: build the engine again."
        )
