"""The head's calibration: what it reads, what it costs, and whether it is kept."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from calibration.blocks import rounding
from calibration.blocks.head import HeadTask, quantise_head
from calibration.blocks.ranks import ALONE
from calibration.checkpoints.checkpoint import open_checkpoint
from calibration.methods import find_method
from calibration.methods.qqq.settings import QqqSettings
from calibration.quant.bits import head_scheme
from calibration.quant.folder import read_quant
from calibration.quant.scheme import QuantLinear
from calibration.reference.fake_quant import Activation
from calibration.settings import CalibrationSettings
from plugins.core.op_spec import QuantArrays
from tests.calibration.block_cases import QQQ, calibrate_tiny, streams, tokens

METHOD = find_method("qqq").block_method
assert isinstance(METHOD, rounding.RoundingMethod)


def head_task(model: Path, bits: int, windows: int = 4, limit: float | None = None) -> HeadTask:
    """On windows of 32 random rows, of a tied model in its own coordinates."""
    checkpoint = open_checkpoint(str(model), offline=True)
    scheme = head_scheme(bits, QQQ)
    assert scheme is not None
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn(32, 64, generator=generator) for _ in range(windows)]
    return HeadTask(
        head=checkpoint.decoder.head,
        index=2,
        gain=checkpoint.tensor("model.norm.weight"),
        table=checkpoint.tensor("model.embed_tokens.weight"),
        scheme=scheme,
        limit=limit,
        streams=streams(inputs),
        tokens=tokens(windows),
        numbers=range(windows),
        settings=CalibrationSettings(method=QqqSettings()),
        ranks=ALONE,
        windows=windows,
    )


@pytest.mark.parametrize(("windows", "measured"), [(4, range(4)), (17, (7, 15))])
def test_its_cost_is_measured_on_windows_apart(
    tiny_model_dir: Path, windows: int, measured: range | tuple[int, ...]
) -> None:
    task = head_task(tiny_model_dir, 4, windows)
    assert task.streams.real is not None
    for index in range(windows):
        task.streams.real[index] = task.streams.real[index] + torch.linspace(-1, 1, 64)
    result = quantise_head(METHOD, task)
    values = torch.from_numpy(
        QuantLinear("lm_head", task.scheme, result.sites["lm_head"]).dequantize()
    )
    losses, logs = [], []
    for table, quantised in ((task.table, False), (values, True)):
        total = 0.0
        found = []
        for index in measured:
            x = task.inputs(task.streams.quant[index])
            if quantised:
                x = Activation.of(x, 8, True).values()
            found.append((x @ table.T)[:-1].double().log_softmax(-1))
            total += float(F.nll_loss(found[-1], task.tokens[index, 1:], reduction="sum"))
        losses.append(total / (31 * len(measured)))
        logs.append(torch.cat(found))
    wanted = torch.cat([task.tokens[index, 1:] for index in measured])[:, None]
    real = torch.cat([task.inputs(task.streams.real[index])[:-1] for index in measured])
    expected = (real @ task.table.T).double().softmax(-1)
    scatter = (logs[0] - logs[1]).gather(-1, wanted).std(correction=0) / len(wanted) ** 0.5
    divergence = (expected * (logs[0] - logs[1])).sum(-1).mean()
    report = result.report
    assert report["bits"] == "w4a8" and report["kept"] and report["tokens"] == 31 * len(measured)
    assert [report["loss_float"], report["loss_quantized"]] == pytest.approx(losses, rel=1e-5)
    assert report["divergence"] == pytest.approx(float(divergence), abs=3e-6)
    assert report["rise"] == pytest.approx(math.expm1(divergence), abs=3e-6)
    assert report["loss_error"] == pytest.approx(float(scatter), rel=1e-3)


@pytest.mark.parametrize(("bits", "luck"), [(4, 1), (8, -1)])
def test_luck_on_the_text_does_not_choose(tiny_model_dir: Path, bits: int, luck: int) -> None:
    """A bad head that happens to know this text better, and a good one that knows it worse."""
    task = head_task(tiny_model_dir, bits, limit=1e-5)
    x = torch.cat([task.inputs(task.streams.quant[index]) for index in range(4)])
    made = QuantLinear("lm_head", task.scheme, METHOD.head(task)).dequantize()
    seen = Activation.of(x, 8, True).values()
    gain = (seen @ torch.from_numpy(made).T).log_softmax(-1) - (x @ task.table.T).log_softmax(-1)
    best = (gain * luck).argmax(-1).view(4, 32).roll(1, 1)
    report = quantise_head(METHOD, replace(task, tokens=best)).report
    assert (report["loss_quantized"] - report["loss_float"]) * luck < -1e-3
    assert report["kept"] is (bits == 8)


def test_what_a_head_makes_up_for_the_blocks_is_no_loss(tiny_model_dir: Path) -> None:
    """A method that keeps no float stream cannot tell it from one."""
    task = head_task(tiny_model_dir, 8)
    task = replace(task, table=20 * task.table)
    for index in range(4):  # blocks that turn half of the channels, as the head's codes do
        stream = task.streams.quant[index].clone()
        stream[:, :32] *= -1
        task.streams.quant[index] = stream
    turned = task.table.clone()
    turned[:, :32] *= -1

    class Turns:
        def head(self, task: HeadTask) -> QuantArrays:
            return METHOD.head(
                replace(
                    task,
                    table=turned,
                    streams=streams([task.streams.quant[index] for index in range(4)]),
                )
            )

    blind = replace(task, streams=replace(task.streams, real=None))
    rises = [quantise_head(Turns(), one).report["rise"] for one in (task, blind)]
    assert rises[0] < -0.1 and rises[1] > 0.1


def test_windows_that_are_measured_on_are_not_calibrated_with(tiny_model_dir: Path) -> None:
    task = head_task(tiny_model_dir, 4, 17)
    before = METHOD.head(task)
    for windows in (task.streams.quant, task.streams.real):
        assert windows is not None
        windows[7] = windows[7] * 9
    assert (METHOD.head(task).codes == before.codes).all()
    task.streams.quant[6] = task.streams.quant[6] * torch.linspace(-9, 9, 64)
    assert (METHOD.head(task).codes != before.codes).any()


@pytest.mark.parametrize("limit", [1.0, -1.0])
def test_a_limit(tiny_model_dir: Path, limit: float) -> None:
    result = quantise_head(METHOD, head_task(tiny_model_dir, 8, limit=limit))
    kept = limit > 0
    assert result.report["kept"] is kept and list(result.sites) == ["lm_head"] * kept


def test_numbers_that_are_none(tiny_model_dir: Path) -> None:
    task = head_task(tiny_model_dir, 8, limit=0.5)
    task.streams.quant[0] = torch.full((32, 64), torch.nan)
    report = quantise_head(METHOD, task).report
    assert report["rise"] is None and report["loss_float"] is None and not report["kept"]
    json.dumps(report, allow_nan=False)


def test_rows_are_rounded_by_themselves(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only which of several roundings is the best is asked of some rows together."""
    task = head_task(tiny_model_dir, 4)
    method = rounding.RoundingMethod(lambda target, hessian, grid, settings: grid.round(target))
    whole = method.head(task)
    monkeypatch.setattr(rounding, "_HEAD_WEIGHTS", 0)
    parts = method.head(task)
    for name, array in whole.named().items():
        assert (array == parts.named()[name]).all()


def test_gptq_serves_the_outputs(tiny_model_dir: Path) -> None:
    task = head_task(tiny_model_dir, 4)
    plain = replace(task, settings=CalibrationSettings(method=QqqSettings(gptq=False)))
    moments = task.moments().hessian.float()
    errors = []
    for one in (task, plain):
        made = QuantLinear("lm_head", one.scheme, METHOD.head(one)).dequantize()
        difference = torch.from_numpy(made) - one.table
        errors.append(float(((difference @ moments) * difference).sum()))
    assert errors[0] < 0.95 * errors[1]


def test_it_is_kept_with_the_blocks(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that is stopped while it writes goes on with the head's codes."""
    import calibration.blocks.driver as driver
    import calibration.quant.quantize as quantize

    def stop(*arguments: object) -> None:
        raise KeyboardInterrupt

    out, whole = tmp_path / "out", tmp_path / "whole"
    more = ("--head-bits", "8")
    assert calibrate_tiny(tiny_model_dir, whole, *more) == 0
    with monkeypatch.context() as patch:
        patch.setattr(quantize, "_write_shards", stop)
        assert calibrate_tiny(tiny_model_dir, out, *more) == 130
    with monkeypatch.context() as patch:
        patch.setattr(driver, "quantise_head", stop)
        assert calibrate_tiny(tiny_model_dir, out, *more, "--resume") == 0
    for path in (whole / "quant").iterdir():
        assert path.read_bytes() == (out / "quant" / path.name).read_bytes()
    quant = read_quant(out / "quant")
    assert quant.head is not None and quant.calibration["head"]["bits"] == "w8a8"


@pytest.mark.parametrize("rise", [0.0009, 0.0011])
def test_the_choice_is_by_the_rise(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rise: float
) -> None:
    from calibration.blocks import head

    monkeypatch.setattr(head.math, "expm1", lambda value: rise)
    assert calibrate_tiny(tiny_model_dir, tmp_path) == 0
    quant = read_quant(tmp_path / "quant")
    assert (quant.head is not None) is (rise < 0.001)
    assert quant.has("lm_head.weight") is (rise > 0.001)  # rotated, so it is not the embedding
    assert quant.calibration["head"]["rise"] == rise


def test_other_bits_of_the_head_keep_the_blocks(
    tiny_model_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import calibration.quant.quantize as quantize

    def stop(*arguments: object) -> None:
        raise KeyboardInterrupt

    out, whole = tmp_path / "out", tmp_path / "whole"
    assert calibrate_tiny(tiny_model_dir, whole, "--head-bits", "4") == 0
    with monkeypatch.context() as patch:
        patch.setattr(quantize, "_write_shards", stop)
        for bits in ("8", "auto", "16"):
            more = ("--head-bits", bits, "--resume", "--progress", "plain")
            assert calibrate_tiny(tiny_model_dir, out, *more) == 130
    capsys.readouterr()
    more = ("--head-bits", "4", "--resume", "--progress", "plain")
    assert calibrate_tiny(tiny_model_dir, out, *more) == 0
    assert capsys.readouterr().err.count(" of 2: kept\n") == 2
    for path in (whole / "quant").iterdir():
        assert path.read_bytes() == (out / "quant" / path.name).read_bytes()


@pytest.mark.parametrize(
    ("more", "why"),
    [
        (
            ("--method", "rtn"),
            "method 'rtn' has no data to choose its bits by, --head-bits B sets them",
        ),
        (("--format", "compressed-tensors"), "--format compressed-tensors has no bits for it"),
    ],
)
def test_auto_says_where_it_cannot_choose(
    tiny_model_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    more: tuple[str, str],
    why: str,
) -> None:
    plain = ("--progress", "plain")
    assert calibrate_tiny(tiny_model_dir, tmp_path / "auto", *more, *plain) == 0
    line = "head: stays in floating point"
    assert f"{line}: {why}\n" in capsys.readouterr().err
    assert calibrate_tiny(tiny_model_dir, tmp_path / "16", *more, *plain, "--head-bits", "16") == 0
    assert line not in capsys.readouterr().err


def test_the_table_goes_in_pieces(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from calibration.blocks import head

    task = head_task(tiny_model_dir, 4)
    whole = quantise_head(METHOD, task).report
    monkeypatch.setattr(head, "_ROWS", 100)  # 512 are not a multiple
    monkeypatch.setattr(head, "_LOGITS", 512 * 5)
    assert quantise_head(METHOD, task).report == pytest.approx(whole, abs=2e-6)


OWN = """
class Own:
    def rotation(self, settings):
        return "none"
    def basis(self, checkpoint, settings):
        from calibration.blocks.rounding import Plain
        return Plain()
    def wants_real(self, settings):
        return False
    def calibrate(self, task):
        from dataclasses import replace
        from calibration.blocks.rounding import RoundingMethod
        from calibration.blocks.settings import WalkSettings
        nearest = RoundingMethod(lambda target, hessian, grid, settings: grid.round(target))
        settings = replace(task.settings, method=WalkSettings(correct=0.0))
        return nearest.calibrate(replace(task, settings=settings))
METHOD = Own()
"""


def test_a_method_that_knows_no_head(
    tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "own.py"
    file.write_text(OWN)
    more = ("--method", str(file))
    assert calibrate_tiny(tiny_model_dir, tmp_path / "auto", *more) == 0
    assert read_quant(tmp_path / "auto" / "quant").head is None
    capsys.readouterr()
    assert calibrate_tiny(tiny_model_dir, tmp_path / "8", *more, "--head-bits", "8") == 2
    assert capsys.readouterr().err == (
        "method 'own': got a METHOD without head(task), or without switches of "
        "WalkSettings, expected both to quantize the head. Add --head-bits 16, or see "
        "calibration/blocks/head.py.\n"
    )
