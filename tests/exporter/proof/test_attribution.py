"""Attribution: a changed model is the model that one would make, float weights lie in the coordinates of
the codes, and the search finds a planted bad node, goes on where it stopped and keeps to its time.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from calibration.blocks.rounding import Plain
from calibration.blocks.walk import site_weight
from calibration.checkpoints.checkpoint import Checkpoint, open_checkpoint
from calibration.data import default_text, text_tokens
from calibration.methods import find_method
from calibration.progress import NullProgress
from calibration.quant.bits import Rule
from calibration.quant.folder import QuantModel, read_quant
from calibration.quant.keep import Keeping, kept_schemes
from calibration.quant.quantize import QuantizeOptions, quantize_model
from calibration.quant.scheme import QuantScheme
from calibration.reference.model import FloatReference, float_model, quantised_model
from calibration.settings import calibration_settings
from calibration.solvers.hessian import Moments
from exporter.proof import swaps
from exporter.proof.attribution import AttributionJob, attribute
from exporter.proof.basis import recorded_rotation
from exporter.proof.quality import FloatStates
from exporter.proof.swaps import Swap, Swapped, float_block
from exporter.report.attribution import attribution_section
from tests.calibration.formats import written

QUIET = NullProgress()
BAD = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def checkpoint(tiny_model_dir: Path) -> Checkpoint:
    return open_checkpoint(str(tiny_model_dir), offline=True)


@pytest.fixture(scope="module")
def windows(checkpoint: Checkpoint) -> np.ndarray:
    tokens = text_tokens(checkpoint.tokenizer(), default_text(), 512, "text")
    return np.resize(tokens, (2, 24))


@pytest.fixture(scope="module")
def calibrated(
    checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., QuantModel]:
    """make(method, *switches, wbits) -> the tiny model by a method that looks at data."""

    def make(method: str, *switches: str, wbits: int = 8) -> QuantModel:
        folder = tmp_path_factory.mktemp(method)
        scheme = QuantScheme("ABQGemm", method, wbits, 8)
        kind = find_method(method).settings
        settings = calibration_settings(kind, scheme, "fast", switches, nsamples=4, seqlen=32)
        quantize_model(checkpoint, scheme, QuantizeOptions(settings=settings), folder)
        return read_quant(folder)

    return make


def kl(quant: QuantModel, checkpoint: Checkpoint, windows: np.ndarray, *swaps: Swap) -> list[float]:
    calibration = windows[::-1, ::-1].copy()
    model = Swapped(quant, checkpoint, windows, calibration, 256, QUIET)
    assert model.baseline.means("")["kl"] == 0
    return [total.means("")["kl"] for total in model.measure(swaps, QUIET)]


def everything(quant: QuantModel) -> Swap:
    nodes = frozenset(quant.decoder.nodes)
    return Swap(nodes, nodes, frozenset(range(quant.layers)))


@pytest.mark.parametrize(
    "made",
    [
        {"wbits": 3},
        {"wbits": 4, "kv_bits": 3},
        {"wbits": 4, "op": "QQQGemm", "group_size": 64},
        {"wbits": 4, "head": 4},
    ],
)
def test_the_model_as_it_is_and_back_in_float(
    tiny_quant: Callable[..., Path],
    checkpoint: Checkpoint,
    windows: np.ndarray,
    made: dict[str, Any],
) -> None:
    quant = read_quant(tiny_quant(**made) / "quant")
    states = FloatStates(FloatReference(float_model(checkpoint, 256)), windows, QUIET)
    wanted = states.compare(quantised_model(quant, round_activations=False), QUIET).means("")["kl"]
    as_is, whole = kl(quant, checkpoint, windows, Swap(), everything(quant))
    assert as_is == pytest.approx(wanted, rel=1e-4)
    assert as_is > 1e-3 and abs(whole) < 1e-5  # embedding and norms were rounded to fp16


def test_kept_codes_are_the_float_weights(
    tiny_llama: Callable[..., Path], tmp_path: Path, windows: np.ndarray
) -> None:
    """A node of them in floating point is the same one, with its channels in an order of their own."""
    source = tiny_llama(dtype="float16", num_hidden_layers=1)
    made = written.gptq(source, tmp_path / "model", ordered=True, symmetric=False)
    checkpoint = open_checkpoint(str(made.folder), offline=True)
    folder = tmp_path / "quant"
    folder.mkdir()
    schemes = kept_schemes(checkpoint, Keeping(abits=8))
    quantize_model(checkpoint, schemes, QuantizeOptions(), folder)
    quant = read_quant(folder)
    nodes = frozenset(quant.decoder.nodes)
    as_is, weights, whole = kl(quant, checkpoint, windows, Swap(), Swap(nodes), everything(quant))
    assert weights == pytest.approx(as_is, rel=1e-3) and as_is > 1e-6
    assert abs(whole) < as_is / 10


def test_each_kind_of_numbers_by_itself(
    tiny_quant: Callable[..., Path], checkpoint: Checkpoint, windows: np.ndarray
) -> None:
    quant = read_quant(tiny_quant(3, 4, kv_bits=4) / "quant")
    nodes = frozenset(quant.decoder.nodes)
    swaps = Swap(weights=nodes), Swap(activations=nodes), Swap(caches=frozenset([0, 1]))
    as_is, *parts = kl(quant, checkpoint, windows, Swap(), *swaps)
    assert all(0 < part < as_is for part in parts)
    # With float weights and caches the activations alone are left, as of a model with 8-bit weights.
    fine = read_quant(tiny_quant(8, 4) / "quant")
    left = kl(quant, checkpoint, windows, Swap(nodes, caches=frozenset([0, 1])))
    assert left == pytest.approx(kl(fine, checkpoint, windows, Swap()), rel=0.1)


def test_other_bits_are_those_of_a_model_that_has_them(
    tiny_quant: Callable[..., Path], checkpoint: Checkpoint, windows: np.ndarray
) -> None:
    plain, mixed = (
        read_quant(tiny_quant(3, 8, dtype="float32", rules=rules) / "quant")
        for rules in ((), ("down_proj w5a8-g32", "layers.0.self_attn.* w4a16"))
    )
    schemes = mixed.exceptions
    assert len(schemes) == 4
    changed, unchanged = kl(plain, checkpoint, windows, Swap(schemes=schemes), Swap())
    assert changed == pytest.approx(kl(mixed, checkpoint, windows, Swap())[0], rel=1e-6)
    assert unchanged != pytest.approx(changed, rel=0.01)


@pytest.mark.parametrize(
    "switches",
    [
        ("qqq", "rotation=none", "smooth=all"),
        ("qqq", "rotation=hadamard", "smooth=all"),
        ("qqq", "rotation=values"),
        ("abq", "rotation=none", "epochs=1", "transform_rate=0.05", "compensation=False"),
    ],
)
def test_float_weights_lie_where_the_codes_do(
    calibrated: Callable[..., QuantModel],
    checkpoint: Checkpoint,
    windows: np.ndarray,
    switches: tuple[str, ...],
) -> None:
    quant = calibrated(*switches, "correct=0")
    basis = recorded_rotation(quant) or Plain()
    with torch.no_grad():
        for block in quant.decoder.blocks:
            floats = float_block(quant, checkpoint, basis, block)
            for name, site in block.sites.items():
                whole = quant.fused(quant.decoder.members(block.name(name)))
                found, wanted = (
                    torch.from_numpy(whole.dequantize()),
                    site_weight(floats, site.linears)[0],
                )
                assert float((found - wanted).norm() / wanted.norm()) < 0.02, name
    as_is, whole_kl = kl(quant, checkpoint, windows, Swap(), everything(quant))
    assert whole_kl < as_is / 20


def test_other_bits_of_a_calibrated_model(
    calibrated: Callable[..., QuantModel],
    checkpoint: Checkpoint,
    windows: np.ndarray,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    quant = calibrated("abq", wbits=3)
    seen: list[tuple[int, ...]] = []
    add = Moments.add

    def watched(self: Moments, window: torch.Tensor) -> None:
        seen.append(tuple(window.shape))
        add(self, window)

    monkeypatch.setattr(Moments, "add", watched)
    fine = {node: Rule(node, "w7a8").scheme(quant.scheme) for node in quant.decoder.nodes}
    as_is, changed = kl(quant, checkpoint, windows, Swap(), Swap(schemes=fine))
    assert changed < as_is / 20
    assert len(seen) == 2 * 8 and set(seen) == {(23, 64), (23, 128)}  # two windows of every node


def test_a_walk_begins_where_its_first_change_is(
    tiny_quant: Callable[..., Path],
    checkpoint: Checkpoint,
    windows: np.ndarray,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    quant = read_quant(tiny_quant(3, head=4) / "quant")
    walked: list[int] = []
    layer = swaps._Layer

    def seen(*arguments: Any) -> Any:
        walked.append(arguments[3].index)
        return layer(*arguments)

    monkeypatch.setattr(swaps, "_Layer", seen)
    late, head = Swap(weights=frozenset([BAD])), Swap(weights=frozenset(["lm_head"]))
    model = Swapped(quant, checkpoint, windows, windows, 256, QUIET)
    found = [model.measure([swap], QUIET)[0] for swap in (late, head, late, Swap())]
    assert walked == [0, 1, 1]
    monkeypatch.setattr(swaps, "_KEPT", 1)
    thrifty = Swapped(quant, checkpoint, windows, windows, 256, QUIET)
    assert [thrifty.measure([swap], QUIET)[0] for swap in (late, head, late, Swap())] == found
    assert walked == [0, 1, 1, *4 * [0, 1]] and found[0] == found[2] != found[3]


# ---------------------------------------------------------------- the search


@pytest.fixture
def job(
    tiny_quant: Callable[..., Path], checkpoint: Checkpoint, windows: np.ndarray, tmp_path: Path
) -> AttributionJob:
    quant = read_quant(tiny_quant(6, 8, rules=("layers.1.mlp.down_proj w2a8",)) / "quant")
    return AttributionJob(
        quant, checkpoint, windows, "a text", windows, 256, tmp_path / "record.json"
    )


def test_a_bad_node_is_found_and_bought_back(job: AttributionJob) -> None:
    found = attribute(job, QUIET)
    assert found.ranked()[0][0] == BAD and found.finished
    assert found.gain(found.nodes[BAD]) > 0.8 * found.found.kl
    assert found.gain(found.parts["weights"]) > 10 * found.gain(found.parts["activations"])
    assert found.parts["everything"].kl < 1e-5 and found.plan is not None
    assert found.plan.lines[0].split()[0] == BAD and found.plan.bits_before < found.plan.bits_after
    assert found.plan.bits_after <= found.plan.bits_before + job.add_bits
    assert found.plan.found.kl < 0.3 * found.found.kl
    assert found.plan.expected == pytest.approx(found.plan.found.kl, abs=0.2 * found.found.kl)
    data = json.loads(json.dumps(found.as_dict()))
    section = attribution_section(data)
    assert section.index(BAD) < section.index("model.layers.1.mlp.gate_up_proj")
    assert f"<pre>{found.plan.lines[0]}" in section and "of a text" in section
    assert attribution_section(None) == ""


def test_it_goes_on_where_it_stopped(job: AttributionJob, monkeypatch: pytest.MonkeyPatch) -> None:
    walks: list[int] = []
    measure = Swapped.measure

    def counted(self: Swapped, swaps: Any, progress: Any) -> Any:
        walks.append(len(swaps))
        return measure(self, swaps, progress)

    monkeypatch.setattr(Swapped, "measure", counted)
    clock: Iterator[float] = count(0.0, 60.0)
    hurried = replace(job, minutes=0.5, add_bits=0.6)
    short = attribute(hurried, QUIET, lambda: next(clock))
    assert not short.finished and not short.nodes and short.plan is not None
    assert all(line.startswith("model.layers.1.") for line in short.plan.lines)
    assert walks == [6, 1]  # what always runs, and the check of the lines
    whole = attribute(job, QUIET)
    made = len(walks)
    assert whole.finished and made > 2
    assert attribute(job, QUIET) == whole and len(walks) == made
    other = replace(job, windows=job.windows[:1])
    assert attribute(other, QUIET).found != whole.found and len(walks) > made
    job.record.write_text("{", encoding="utf-8")
    assert attribute(job, QUIET) == whole


def test_a_layer_of_equal_bits_is_one_line(
    job: AttributionJob, tiny_quant: Callable[..., Path]
) -> None:
    clock: Iterator[float] = count(0.0, 60.0)
    plain = replace(job, quant=read_quant(tiny_quant(4, 8) / "quant"), minutes=0.5, add_bits=1.1)
    plan = attribute(plain, QUIET, lambda: next(clock)).plan
    assert plan is not None
    assert plan.lines == ("model.layers.0.* w5a8", "model.layers.1.* w5a8")
    assert plan.found.kl < attribute(plain, QUIET).found.kl / 2


def test_ctrl_c_keeps_what_was_measured(
    job: AttributionJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Impatient(NullProgress):
        stages = 0

        def start(self, stage: str, total: int) -> None:
            self.stages += 1
            if self.stages == 2:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        attribute(job, Impatient())
    measured = json.loads(job.record.read_text())["measured"]
    assert {"as it is", "everything", "weights", "activations", "layer 0", "layer 1"} == set(
        measured
    )
