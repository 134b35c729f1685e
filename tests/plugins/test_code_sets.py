"""The table of code sets, and that what is in it is all that a command line, a bits file, a scheme
and an op know of them.
"""

from __future__ import annotations

import pytest

from calibration.quant.bits import Rule
from calibration.quant.scheme import QuantScheme
from plugins import op_spec
from plugins.core.code_sets import (
    CODE_SETS,
    CodeSet,
    code_set,
    levels_with,
    parse_code_set,
    set_choices,
)
from plugins.errors import InputError


@pytest.mark.parametrize("codes", CODE_SETS, ids=lambda codes: codes.label)
def test_a_row_is_all_that_a_set_needs(codes: CodeSet) -> None:
    assert parse_code_set(codes.label) is parse_code_set(codes.title) is codes
    assert code_set(codes.bits, codes.balanced) is codes
    assert levels_with(codes.bits)[codes.levels] is codes
    base = QuantScheme("ABQGemm", "rtn", 8, 8)
    for name in (codes.label, codes.title):
        scheme = Rule("*", f"w{name}a6").scheme(base)
        assert (scheme.levels, scheme.balanced) == (codes.levels, codes.balanced)
        assert scheme.label == f"w{codes.label}a6" and scheme.gemm.title == f"W{codes.title}A6"
        assert op_spec("ABQGemm").takes(scheme.gemm)
    assert (codes.levels % 2 == 1) == codes.balanced


def test_the_sets_that_there_are() -> None:
    assert [(codes.label, codes.levels) for codes in CODE_SETS] == [
        *((str(bits), 2**bits) for bits in range(1, 9)),
        ("1b", 3),
        ("2b", 5),
    ]
    assert set_choices() == "1 to 8, 1* (3 levels) or 2* (5 levels)"
    assert len({(codes.bits, codes.balanced) for codes in CODE_SETS}) == len(CODE_SETS)


@pytest.mark.parametrize("text", ["", "0", "9", "3b", "b", "2bb", "-1", "2.0", "x"])
def test_others_are_refused(text: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_code_set(text, "here")
    assert str(caught.value) == (
        f"here: got {text!r}, expected 1 to 8, 1* (3 levels) or 2* (5 levels). "
        "Give one of these; in a shell write 2b or '2*' for the balanced set."
    )


def test_a_scheme_of_a_damaged_file_is_refused() -> None:
    with pytest.raises(InputError) as caught:
        _ = QuantScheme("ABQGemm", "rtn", 3, 8, balanced=True).levels
    assert str(caught.value) == (
        "weight bits: got 3*, expected 1 to 8, 1* (3 levels) or 2* (5 levels). "
        "Choose other weight bits."
    )
