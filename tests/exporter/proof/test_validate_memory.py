"""The memory check: what each op needs, and a refusal before the work."""

from __future__ import annotations

from dataclasses import replace

import pytest

from calibration.quant.scheme import QuantScheme
from exporter.proof.memory import check_memory
from plugins.errors import InputError

QQQ, W8A8, W4A16 = (
    QuantScheme(op, "rtn", wbits, abits)
    for op, wbits, abits in (("QQQGemm", 4, 8), ("ABQGemm", 8, 8), ("ABQGemm", 4, 16))
)


def free(monkeypatch: pytest.MonkeyPatch, kilobytes: int) -> None:
    monkeypatch.setattr("exporter.proof.memory.free_memory", lambda: kilobytes * 1024)


@pytest.mark.parametrize(
    "scheme, per_weight", [(QQQ, 18), (replace(QQQ, group_size=64), 47), (W8A8, 55), (W4A16, 46)]
)
def test_the_need_follows_from_the_op(
    monkeypatch: pytest.MonkeyPatch, scheme: QuantScheme, per_weight: int
) -> None:
    weights = 1024**2
    free(monkeypatch, per_weight * 1024)
    check_memory(weights, {scheme: 99})
    with pytest.raises(InputError):
        check_memory(weights + 1, {scheme: 99})


def test_mixed_bits_need_their_average(monkeypatch: pytest.MonkeyPatch) -> None:
    schemes = {QQQ: 300, W8A8: 100}
    free(monkeypatch, (18 * 3 + 55) * 1024)
    check_memory(4 * 1024**2, schemes)
    with pytest.raises(InputError):
        check_memory(4 * 1024**2 + 1, schemes)


def test_the_message_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    free(monkeypatch, 1_000_000)
    with pytest.raises(InputError) as caught:
        check_memory(7 * 10**9, {QQQ: 1})
    assert str(caught.value) == (
        "validation: got 1.02 GB of free memory, expected 126.00 GB to unpack 7000 M weights. "
        "Use --until engine here, and validate on a machine with more memory."
    )


def test_a_system_that_does_not_tell_is_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("exporter.proof.memory.free_memory", lambda: None)
    check_memory(10**15, {QQQ: 1})
