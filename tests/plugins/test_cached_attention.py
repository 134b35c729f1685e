"""The native kernel of attention with its cache against numpy, for every instruction set."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests.plugins.attention_runner import (
    Case,
    attend,
    chunk_of,
    error,
    make_case,
    reference,
    same_bits,
    tolerance,
)
from tests.plugins.kernel_cases import BF16, F16, F32
from tests.plugins.kernel_runner import INSTRUCTION_SETS, cpu_missing

GROWING: list[dict[str, Any]] = [
    {},
    {"tokens": 1, "past": 700, "heads": 3, "kv_heads": 1, "head_dim": 64},
    {"tokens": 1, "past": 1100, "heads": 12, "kv_heads": 1, "head_dim": 40},
    {"tokens": 70, "past": 3, "head_dim": 20, "heads": 6, "kv_heads": 3},
    {"tokens": 65, "past": 130, "head_dim": 64, "window": 33, "batch": 2, "padding": 9},
    {"tokens": 5, "past": 200, "window": 1, "heads": 16, "kv_heads": 1},
    {"tokens": 33, "past": 50, "softcap": 3.0},
    {"tokens": 5, "past": 0, "heads": 1, "kv_heads": 1, "head_dim": 1},
    {"tokens": 40, "past": 300, "head_dim": 128, "heads": 9, "kv_heads": 1},
    {"tokens": 2, "past": 64, "head_dim": 257},
]
STATIC: list[dict[str, Any]] = [
    {"tokens": 2, "past": 40, "places": (0, 17, 38), "batch": 3, "heads": 8, "kv_heads": 1},
    {"tokens": 1, "past": 1300, "places": (1299, 640), "batch": 2, "head_dim": 80},
    {"tokens": 100, "past": 260, "places": (3, 160), "batch": 2, "window": 50, "softcap": 5.0},
]


@pytest.fixture(scope="module", params=INSTRUCTION_SETS)
def isa(request: pytest.FixtureRequest) -> str:
    """An instruction set of this machine."""
    if reason := cpu_missing(request.param):
        pytest.skip(reason)
    return str(request.param)


def check(case: Case, isa: str, in_place: bool = False) -> None:
    got, want = attend(case, isa, in_place), reference(case)
    assert got[1].keys() == want[1].keys()
    for name, cache in got[1].items():
        same_bits(cache, want[1][name])
    assert error(got[0], want[0]) <= tolerance(case.query.dtype)


@pytest.mark.parametrize("dtype", [F16, BF16, F32], ids=str)
@pytest.mark.parametrize("fields", GROWING, ids=str)
def test_a_cache_that_grows(isa: str, fields: dict[str, Any], dtype: np.dtype[Any]) -> None:
    check(make_case(dtype=dtype, **fields), isa)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("dtype", [F16, BF16, F32], ids=str)
@pytest.mark.parametrize("fields", STATIC, ids=str)
def test_a_static_cache(
    isa: str, fields: dict[str, Any], dtype: np.dtype[Any], in_place: bool
) -> None:
    """Its rows that were never written hold NaN, which nothing reads."""
    check(make_case(dtype=dtype, **fields), isa, in_place)


@pytest.mark.parametrize("bits", range(2, 9))
def test_a_cache_of_few_bits(isa: str, bits: int) -> None:
    """Codes and scales are those of numpy to the bit, and attention sees what they stand for."""
    for dtype in (F16, BF16, F32):
        check(make_case(tokens=40, past=70, head_dim=24, dtype=dtype, bits=bits), isa)
        case = make_case(
            tokens=2, past=140, places=(0, 130), batch=2, head_dim=72, dtype=dtype, bits=bits
        )
        for in_place in (False, True):
            check(case, isa, in_place)
        check(make_case(tokens=1, past=600, head_dim=64, dtype=dtype, bits=bits, softcap=4.0), isa)


@pytest.mark.parametrize("dtype", [F16, BF16, F32], ids=str)
def test_hard_rows_of_few_bits(isa: str, dtype: np.dtype[Any]) -> None:
    """Outliers, one sign, ties, zeros, the smallest and the largest numbers, NaN and inf."""
    largest = 65504.0 if dtype == F16 else 3e38
    rows = np.random.default_rng(0).normal(0, 1, (12, 16))
    rows[0], rows[1], rows[2] = 0, np.abs(rows[1]), -np.abs(rows[2])
    rows[3] *= 2.0**-20
    rows[4] = np.arange(16) - 7.5
    rows[5, :2] = largest, -largest / 3
    rows[6, 3] = 4e4
    rows[7], rows[8] = 1e-7, -1e-7
    rows[9, 2], rows[10, 4], rows[11, 5] = np.nan, np.inf, -np.inf
    for bits in range(2, 9):
        case = make_case(heads=1, kv_heads=1, tokens=12, past=0, dtype=dtype, bits=bits)
        case = replace(case, key=rows[None, None].astype(dtype), mask=case.mask & False)
        present = attend(case, isa)[1]
        want = reference(case)[1]
        for name in ("present_key", "present_key_scale"):
            np.testing.assert_array_equal(present[name], want[name])
        assert np.isnan(present["present_key_scale"][0, 0, 9:, 0]).all()


# 70 tokens are more than a block of queries, and pass the end of a span of keys. Of the last block of
# others few rows are left, at the end of the first span.
ALONE: list[dict[str, Any]] = [
    {"past": 470, "heads": 6, "kv_heads": 2, "head_dim": 64},
    {"past": 470, "heads": 2, "kv_heads": 2, "head_dim": 40, "window": 90},
    {"past": 1000, "heads": 7, "kv_heads": 1, "head_dim": 24, "softcap": 3.0},
    {"past": 470, "heads": 4, "kv_heads": 1, "head_dim": 64, "bits": 4, "dtype": F16},
    {"past": 1100, "places": (1020, 0), "batch": 2, "heads": 6, "kv_heads": 2, "head_dim": 48},
    {"past": 600, "places": (500,), "heads": 3, "kv_heads": 1, "bits": 3, "head_dim": 128},
    {"past": 1050, "heads": 14, "kv_heads": 2, "head_dim": 64, "dtype": F16, "window": 600},
    {"past": 470, "heads": 8, "kv_heads": 1, "head_dim": 32, "dtype": BF16},
    *(
        {"past": 512 - tokens, "tokens": tokens, "heads": groups, "kv_heads": 1, "head_dim": 16}
        for groups, tokens in (
            (1, 64 + 9),
            (1, 64 + 12),
            (1, 64 + 31),
            (1, 64 + 32),
            (2, 64 + 16),
            (3, 64 + 10),
            (4, 48 + 8),
            (8, 24 + 4),
        )
    ),
]


@pytest.mark.parametrize("fields", ALONE, ids=str)
def test_a_query_is_the_same_to_the_bit_whatever_else_a_call_computes(
    isa: str, fields: dict[str, Any]
) -> None:
    """In chunks of any size, on 1 and 2 threads, and with its sequence alone: the two kernels, for few
    rows and for many, sum alike.
    """
    case = make_case(**{"tokens": 70, "dtype": F32, **fields})
    context, present = attend(case, isa)
    same_bits(attend(case, isa, threads=2)[0], context)
    tokens = case.query.shape[2]
    for sizes, threads in (((1, 2, 5, 6, 17, 39), 1), ((40, 1, 1, 1, 2, 3, 22), 2), ((64, 6), 1)):
        first = 0
        for size in (*sizes, tokens):
            size = min(size, tokens - first)
            got = attend(chunk_of(case, present, first, size), isa, threads=threads)[0]
            same_bits(got, context[:, first : first + size])
            first += size
    if case.write_indices is not None:
        for i in range(len(case.query)):
            names = ("query", "key", "value", "past_key", "past_value", "mask", "write_indices")
            parts = {name: getattr(case, name)[i : i + 1] for name in names}
            scales = {name: scale[i : i + 1] for name, scale in case.scales.items()}
            same_bits(attend(replace(case, **parts, scales=scales), isa)[0], context[i : i + 1])


def test_these_tests_would_notice(isa: str) -> None:
    case = make_case(tokens=20, past=30, dtype=F32)
    got, want = attend(case, isa)[0], reference(case)[0]
    for other in (
        replace(case, scale=case.scale * 1.0001),
        replace(case, softcap=30.0),
        replace(case, mask=case.mask & (np.arange(50) != 3)),
    ):
        assert error(reference(other)[0], want) > 3 * tolerance(F32) > error(got, want)


def test_one_mask_may_serve_all_sequences(isa: str) -> None:
    case = make_case(batch=3, tokens=4, past=9, dtype=F32)
    one = replace(case, mask=case.mask[:1])
    np.testing.assert_array_equal(attend(one, isa)[0], attend(case, isa)[0])


def test_a_bad_number_stays_loud_where_it_is_seen(isa: str) -> None:
    case = make_case(batch=2, tokens=8, past=70, dtype=F16)
    case.key[0, 1, 5, 3] = np.nan
    case.value[1, 0, 6, 2] = np.nan
    context = attend(case, isa)[0].astype(np.float32).reshape(2, 8, 4, 16)
    loud = ~np.isfinite(context)
    assert loud[0, 5:, 2:].all() and not loud[0, :, :2].any()
    assert loud[1, 6:, :2, 2].all() and not loud[1, :, 2:].any()
    assert not np.isfinite(attend(replace(case, mask=case.mask & False), isa)[0]).any()


def test_scores_of_any_size(isa: str) -> None:
    """Weights of 0 and 1 where one score is far above the others, and equal ones where all are far
    below 0.
    """
    case = make_case(tokens=3, past=150, dtype=F32)
    for factor in (1e4, -1e4, 1e-20):
        loud = replace(case, scale=case.scale * factor)
        check(loud, isa)
    silent = replace(case, query=np.zeros_like(case.query))
    check(silent, isa)


def test_no_new_tokens_and_no_sequences(isa: str) -> None:
    case = make_case(tokens=0, past=7)
    same_bits(attend(case, isa)[1]["present_key"], case.past_key)
    assert attend(make_case(batch=0), isa)[0].size == 0


@pytest.mark.parametrize(
    "fields",
    [
        {"heads": 5},
        {"head_dim": 1025},
        {"bits": 9, "head_dim": 16},
        {"places": (-1,)},
        {"places": (3,)},
        {"softcap": -1.0},
    ],
    ids=str,
)
def test_what_no_kernel_takes(isa: str, fields: dict[str, Any]) -> None:
    if "places" in fields:
        case = replace(make_case(places=(2,)), write_indices=np.array(fields["places"]))
    elif "heads" in fields:
        case = replace(make_case(), query=make_case(heads=5, kv_heads=1).query)
    elif "bits" in fields:
        case = replace(make_case(bits=8), bits=9)
    elif "softcap" in fields:
        case = replace(make_case(), softcap=-1.0)
    else:
        case = make_case(**fields)
    attend(case, isa, code=1)
