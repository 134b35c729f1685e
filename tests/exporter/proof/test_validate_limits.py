"""Limits follow from the bit widths: tighter with more bits, none where nothing can be said."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from calibration.quant.scheme import QuantScheme
from exporter.proof.limits import Limits, coarsest


def limits(wbits: int = 4, abits: int = 8, dtype: str = "float16", kv_bits: int = 16) -> Limits:
    return Limits(QuantScheme("ABQGemm", "rtn", wbits, abits, dtype=dtype, kv_bits=kv_bits))


def accumulated(layers: int, **scheme: object) -> float:
    value = limits(**scheme).accumulated(layers, 4 * layers)  # type: ignore[arg-type]
    assert value is not None
    return value


def test_operator_limits_are_a_few_roundings_at_any_bits() -> None:
    for wbits, abits in ((8, 8), (4, 4), (2, 8), (4, 16)):
        assert limits(wbits, abits).gemm() == pytest.approx(2 * 2**-11 + 2**-16)
    assert limits(dtype="bfloat16").gemm() == pytest.approx(2 * 2**-8 + 2**-16)
    assert limits(dtype="float32").gemm() < 2e-5
    assert limits().attention() == pytest.approx(16 * 2**-11 + 2**-16)
    assert limits().pointwise() == pytest.approx(8 * 2**-11 + 2**-16)


def test_accumulated_limit_is_the_noise_of_flipped_codes() -> None:
    assert accumulated(1) == pytest.approx(8 * 2 * (math.sqrt(3 * 2**-11 / 127) + 2**-10) + 2**-16)
    assert accumulated(4) == pytest.approx(2 * accumulated(1), rel=1e-3)
    assert (
        accumulated(1, abits=16)
        < accumulated(1, abits=8)
        < accumulated(1, abits=6)
        < accumulated(1, abits=4)
    )
    assert accumulated(1, dtype="float32") == pytest.approx(
        8 * 2 * math.sqrt(3 * 2**-11 / 127), rel=1e-3
    )  # one flip is enough
    assert accumulated(1, abits=16, dtype="float32") < 1e-4
    assert accumulated(1, dtype="float32") < accumulated(1) < accumulated(1, dtype="bfloat16")
    assert limits(abits=2).accumulated(30, 120) is None


def test_differences_grow_only_in_a_network_far_from_the_trained_one() -> None:
    for wbits, abits in ((8, 8), (6, 6), (4, 8)):
        assert accumulated(16, wbits=wbits, abits=abits) == pytest.approx(
            4 * accumulated(1, wbits=wbits, abits=abits), rel=1e-3
        )
    growth = (1 + limits(3, 16).noise() - 0.2) ** 8
    assert accumulated(9, wbits=3, abits=16) == pytest.approx(
        3 * growth * accumulated(1, wbits=3, abits=16), rel=1e-2
    )
    assert limits(2, 8).accumulated(8, 32) is None


def test_quantisation_limit_follows_both_widths() -> None:
    eight = limits(8, 8).quantisation(4)
    assert eight == pytest.approx(4 * 2 * math.hypot(8, 20) / 255 / math.sqrt(12))
    six, weight_only = limits(6, 8).quantisation(4), limits(8, 16).quantisation(4)
    assert six is not None and weight_only is not None and weight_only < eight < six
    assert limits(2, 8).quantisation(120) is None


def test_a_low_bit_cache_flips_codes_and_makes_noise() -> None:
    assert accumulated(1, wbits=8, kv_bits=4) == pytest.approx(
        8 * math.hypot(2 * (math.sqrt(3 * 2**-11 / 127) + 2**-10), math.sqrt(3 * 2**-11 / 7))
        + 2**-16
    )
    assert (
        accumulated(1)
        < accumulated(1, kv_bits=8)
        < accumulated(1, kv_bits=4)
        < accumulated(1, kv_bits=2)
    )
    assert limits(8, 8, kv_bits=4).noise() == pytest.approx(
        math.hypot(8 / 255, 20 / 255, 8 / 15) / math.sqrt(12)
    )
    assert (
        limits(8, 16).noise() < limits(8, 16, kv_bits=8).noise() < limits(8, 16, kv_bits=4).noise()
    )
    assert limits(8, 8, kv_bits=2).accumulated(8, 32) is None
    assert limits(kv_bits=4, dtype="bfloat16").cache() == 2**-16  # the same numbers, in every type


def test_the_coarsest_of_several_schemes_bounds_their_noise() -> None:
    schemes = [QuantScheme("ABQGemm", "rtn", *bits) for bits in ((8, 4), (2, 16), (4, 8))] + [
        QuantScheme("ABQGemm", "rtn", 2, 8, True)
    ]
    found = coarsest(schemes)
    assert (found.levels, found.abits) == (4, 4)
    assert all(Limits(found).noise() >= Limits(scheme).noise() for scheme in schemes)
    assert coarsest(schemes[:1]) == schemes[0]
    assert coarsest([schemes[1], replace(schemes[1], wbits=4)]).abits == 16
