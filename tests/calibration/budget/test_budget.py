"""Bits under a budget: the allocation against every possible one, its sizes against quant.json, and
the command.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from calibration.__main__ import main
from calibration.budget.choice import Budget, allocate, bits_within, candidates, schemes_within
from calibration.checkpoints.checkpoint import open_checkpoint
from calibration.cli import add_quant_arguments, default_out, scheme_from_args, schemes_from_args
from calibration.progress import JsonProgress, NullProgress
from calibration.quant.bits import SchemeMap, read_bits_file
from calibration.quant.folder import read_quant
from calibration.quant.scheme import QuantScheme
from calibration.quant.sizes import node_bits
from calibration.settings import CalibrationSettings
from plugins.errors import InputError
from tests.conftest import W4A8

QQQ = QuantScheme("QQQGemm", "rtn", 4, 8, act_symmetric=True)
SMALL = CalibrationSettings(nsamples=4, seqlen=64)

# ---------------------------------------------------------------- allocation


def total(options: list[list[tuple[int, float]]], choice: Any, part: int) -> float:
    return sum(node[at][part] for node, at in zip(options, choice, strict=True))


def random_options(generator: np.random.Generator) -> list[list[tuple[int, float]]]:
    """Five nodes of 2, 3, 4, 6 and 8 bits, costs about four times less per bit, some out of order."""
    nodes = []
    for size in generator.integers(1, 9, 5):
        scale = np.exp(generator.normal(0, 1.5))
        nodes.append(
            [
                (
                    int(size) * bits + 1,
                    float(scale * size * 4.0**-bits * np.exp(generator.normal(0, 0.5))),
                )
                for bits in (2, 3, 4, 6, 8)
            ]
        )
    return nodes


def test_allocation_is_within_one_step_of_the_best() -> None:
    """Against every allocation of five nodes: never over the budget, on average a few percent above
    the least cost.
    """
    generator, excess = np.random.default_rng(0), []
    for _ in range(60):
        options = random_options(generator)
        every = list(itertools.product(range(5), repeat=5))
        bits = np.array([total(options, choice, 0) for choice in every])
        costs = np.array([total(options, choice, 1) for choice in every])
        for room in generator.integers(bits.min(), bits.max() + 1, 3).tolist():
            chosen = allocate(options, room)
            best, got = costs[bits <= room].min(), total(options, chosen, 1)
            assert total(options, chosen, 0) <= room
            largest = max(
                max(cost for _, cost in node) - min(cost for _, cost in node) for node in options
            )
            assert best <= got * (1 + 1e-9) and got <= best + largest
            excess.append(got / best)
    assert len(excess) == 180 and np.mean(excess) < 1.05 and np.median(excess) < 1.005, (
        np.mean(excess),
        np.median(excess),
    )


def test_many_small_nodes_come_as_near_as_makes_no_difference() -> None:
    """200 nodes against the bound of the relaxed problem, in which one node may have a part of a
    step.
    """
    generator = np.random.default_rng(1)
    options = [node for _ in range(40) for node in random_options(generator)]
    low, high = (sum(pick(bits for bits, _ in node) for node in options) for pick in (min, max))
    for share in (0.1, 0.4, 0.8):
        room = int(low + share * (high - low))
        got = total(options, allocate(options, room), 1)
        # Lagrange: for any price of a bit, the least of cost + price * bits less price * room is
        # below every allocation's cost.
        bound = max(
            sum(min(cost + price * bits for bits, cost in node) for node in options) - price * room
            for price in np.exp(np.linspace(-20, 5, 2000))
        )
        assert bound <= got * (1 + 1e-9) and got < bound * 1.01, share


def test_edges_of_an_allocation() -> None:
    options = [[(2, 5.0), (4, 1.0), (8, 1.5)], [(3, 7.0), (3, 6.0), (5, 2.0)]]
    assert allocate(options, 5) == [0, 1]  # of equal bits the lower cost
    assert allocate(options, 6) == [0, 1]  # no step fits
    assert allocate(options, 7) == [1, 1] or allocate(options, 7) == [0, 2]
    assert allocate(options, 100) == [1, 2]  # more bits that cost more are left alone
    assert allocate([], 0) == []


# ---------------------------------------------------------------- what to choose from


@pytest.mark.parametrize(
    ("base", "format_name", "labels"),
    [
        (QQQ, "anybit", ["w4a8", "w2a8", "w3a8", "w5a8", "w6a8", "w7a8", "w8a8"]),
        (
            QuantScheme("ABQGemm", "abq", 3, 4, group_size=32),
            "anybit",
            ["w3a4-g32", "w2a4-g32", "w4a4-g32", "w5a4-g32", "w6a4-g32", "w7a4-g32", "w8a4-g32"],
        ),
        (
            QuantScheme("ABQGemm", "abq", 2, 16, True),
            "anybit",
            ["w2ba16", "w2a16", "w3a16", "w4a16", "w5a16", "w6a16", "w7a16", "w8a16"],
        ),
        (QQQ, "compressed-tensors", ["w4a8", "w8a8"]),
    ],
)
def test_candidates(base: QuantScheme, format_name: str, labels: list[str]) -> None:
    found = candidates(base, format_name)
    assert [scheme.label for scheme in found] == labels and found[0] == base
    assert {
        (scheme.method, scheme.abits, scheme.act_symmetric, scheme.group_size) for scheme in found
    } == {(base.method, base.abits, base.act_symmetric, base.group_size)}
    assert [scheme.op for scheme in found[1:]] == ["ABQGemm"] * (len(found) - 1)


def budget(bits: float, folder: Path, base: QuantScheme = QQQ, resume: bool = False) -> Budget:
    return Budget(bits, base, SMALL, "anybit", True, folder / "costs.json", resume)


@pytest.mark.parametrize(
    ("bits", "base", "message"),
    [
        (
            2.8,
            QQQ,
            "--budget: got 2.8 bits per weight, expected 2.89 to 8.89 for this model, scales "
            "and zero points included. "
            "Choose a budget in between.",
        ),
        (
            8.9,
            QQQ,
            "--budget: got 8.9 bits per weight, expected 2.89 to 8.89 for this model, scales "
            "and zero points included. "
            "Choose a budget in between.",
        ),
        (
            5.99,
            QuantScheme("ABQGemm", "rtn", 4, 8, group_size=16),
            "--budget: got 5.99 bits per weight, expected 6.00 to 12.00 for this model, "
            "scales and zero points included. Choose a budget in between.",
        ),
    ],
)
def test_a_budget_out_of_reach(
    tiny_model_dir: Path, tmp_path: Path, bits: float, base: QuantScheme, message: str
) -> None:
    with pytest.raises(InputError) as caught:
        bits_within(open_checkpoint(str(tiny_model_dir), True), budget(bits, tmp_path, base))
    assert str(caught.value) == message


# ---------------------------------------------------------------- measured


def test_the_measurement_is_kept_for_resume(
    tiny_model_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    checkpoint = open_checkpoint(str(tiny_model_dir), True)
    first = schemes_within(checkpoint, budget(5.5, tmp_path), NullProgress())
    assert first.rules and first.base == QQQ
    assert (
        schemes_within(checkpoint, budget(5.5, tmp_path), NullProgress()) == first
    )  # the same, measured again
    kept = (tmp_path / "costs.json").read_bytes()

    def forbidden(*arguments: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr("calibration.budget.sensitivity.measure", forbidden)
    assert schemes_within(checkpoint, budget(5.5, tmp_path, resume=True), JsonProgress()) == first
    texts = [json.loads(line)["text"] for line in capsys.readouterr().out.splitlines()]
    assert texts[0] == "budget: measured before, nothing changed" and texts[1].startswith(
        "budget 5.5: 5.4"
    )
    assert (
        schemes_within(checkpoint, budget(7, tmp_path, resume=True), NullProgress()) != first
    )  # of another budget
    for other in (
        budget(5.5, tmp_path),
        budget(5.5, tmp_path, QuantScheme("ABQGemm", "rtn", 4, 8), resume=True),
    ):
        with pytest.raises(AssertionError, match="measured again"):
            schemes_within(checkpoint, other, NullProgress())
    assert (tmp_path / "costs.json").read_bytes() == kept


def test_costs_fall_as_the_budget_grows_and_the_richest_is_eight_bits(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(str(tiny_model_dir), True)
    bits = [2.89, 4, 5, 6, 7, 8.89]
    found = [
        schemes_within(checkpoint, budget(value, tmp_path, resume=at > 0), NullProgress())
        for at, value in enumerate(bits)
    ]
    assert {rule.bits for rule in found[0].rules} == {"w2a8"} and {
        rule.bits for rule in found[-1].rules
    } == {"w8a8"}
    assert all(len(found[at].rules) == 8 for at in (0, -1))
    costs = json.loads((tmp_path / "costs.json").read_text())["costs"]
    labels = [scheme.label for scheme in candidates(QQQ)]
    totals = [
        sum(
            costs[node][labels.index(scheme.label)]
            for node, scheme in schemes.nodes(checkpoint.decoder).items()
        )
        for schemes in found
    ]
    assert totals == sorted(totals, reverse=True) and len(set(totals)) == len(totals)


# ---------------------------------------------------------------- the command line


def _args(line: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_quant_arguments(parser)
    return parser.parse_args(["smollm2-135m", *line.split()])


def test_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    args = _args("--wbits 4 --abits 8 --budget 3.50 --head-bits 16")
    assert schemes_from_args(args) == SchemeMap(scheme_from_args(args))
    assert default_out(args, scheme_from_args(args)) == Path("out/smollm2-135m-w4a8-b3.5")
    for line, message in (
        (
            "--budget 4 --bits-file bits.txt",
            "argument --bits-file: not allowed with argument --budget",
        ),
        ("--budget many", "argument --budget: got 'many', expected a number of at least 0"),
    ):
        with pytest.raises(SystemExit) as stop:
            _args(f"--wbits 4 --abits 8 {line}")
        assert stop.value.code == 2 and capsys.readouterr().err.endswith(f"error: {message}\n")


def command(model: Path, out: Path, *more: str) -> int:
    return main(
        [
            str(model),
            *W4A8,
            "--method",
            "rtn",
            "--nsamples",
            "4",
            "--seqlen",
            "64",
            "--out",
            str(out),
            "--progress",
            "none",
            "--offline",
            *more,
        ]
    )


def test_the_command_keeps_to_the_budget_and_leaves_its_bits_file(
    tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, again = tmp_path / "out", tmp_path / "again"
    assert command(tiny_model_dir, out, "--budget", "5.5") == 0
    quant = read_quant(out / "quant")
    assert quant.sizes["linear_quant_bits"] == sum(
        node_bits(site.linears, quant.scheme_of(node)) for node, site in quant.decoder.sites.items()
    )
    assert (
        5.3 < quant.sizes["bits_per_weight"] <= 5.5
        and quant.scheme == QQQ
        and len(quant.schemes) > 2
    )
    assert (
        (out / "quant" / "bits.txt")
        .read_text()
        .startswith("# Over a base of w4a8; the last line that matches counts.\nmodel.layers.0.")
    )
    assert "bits.txt" in quant.files
    assert sorted(path.name for path in out.iterdir()) == [".lock", ".sensitivity.json", "quant"]
    assert read_bits_file(out / "quant" / "bits.txt", QQQ).nodes(quant.decoder) == {
        node: quant.scheme_of(node) for node in quant.decoder.nodes
    }
    assert command(tiny_model_dir, again, "--bits-file", str(out / "quant" / "bits.txt")) == 0
    assert read_quant(again / "quant").files == quant.files  # the same weights, bit for bit
    assert command(tiny_model_dir, out, "--budget", "5.5") == 0  # the same again may replace it
    capsys.readouterr()
    assert command(tiny_model_dir, out, "--budget", "7", "--resume") == 2
    assert capsys.readouterr().err.startswith(f"{out / 'quant'}: got a model quantised with ")
    assert (
        command(tiny_model_dir, out, "--budget", "7", "--dtype", "float32") == 2
    )  # before anything is measured
    assert capsys.readouterr().err == (
        f"{out / 'quant'}: got a model quantised with dtype float16, expected dtype float32. "
        "Choose another --out, or delete this folder.\n"
    )
    assert read_quant(out / "quant").files == quant.files


def test_a_refused_budget_leaves_nothing_behind(
    tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(tiny_model_dir, tmp_path / "out", "--budget", "2") == 2
    assert capsys.readouterr().err == (
        "--budget: got 2 bits per weight, expected 2.89 to 8.89 for this model, scales and zero points "
        "included. Choose a budget in between.\n"
    )
    assert not (tmp_path / "out").exists()
