"""Training a block: it helps, it never ends worse than it starts, it says what went wrong, and
processes share it exactly.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from calibration.blocks.forward import BlockWeights, block_output, float_linear, load_block
from calibration.checkpoints.checkpoint import open_checkpoint
from calibration.data import default_text, text_tokens, windows_from_tokens
from calibration.methods.abq import train
from calibration.methods.abq.losses import LossWeights, output_error
from calibration.methods.abq.train import BlockTask, TrainedBlock, TrainSettings, train_block
from calibration.methods.abq.transforms import EquivalentTransform, TransformParts
from calibration.quant.scheme import QuantLinear, QuantScheme
from calibration.reference.fake_quant import ActivationQuantizer, FakeQuantLinear
from calibration.reference.steps import Rope
from plugins.errors import InputError
from tests.calibration.llama import DOWN, OUT, SITES
from tests.calibration.methods.abq.blocks import block, rope, scheme, streams

SHORT = TrainSettings(
    epochs=3, transform_rate=3e-2, powers=(0.0,), rows=8
)  # leaves the large input channels to training
ERROR_ONLY = LossWeights(1, 0, 0)


def make_task(count: int = 4, **changes: Any) -> BlockTask:
    weights, shape = block()
    x_fp = streams(count)
    noise = streams(count, seed=2)
    x_q = [x + 0.02 * y for x, y in zip(x_fp, noise, strict=True)]
    return dataclasses.replace(
        BlockTask("block 5", shape, weights, rope(24), scheme(8, 4), x_fp, x_q), **changes
    )


def skewed() -> BlockWeights:
    """Weights whose best clip is not the same at both ends, so that the search of the start leaves
    something to learn.
    """
    return {
        name: tensor.abs().square() * 3 - 0.1 if name.endswith("proj.weight") else tensor
        for name, tensor in block()[0].items()
    }


def inference(task: BlockTask, trained: TrainedBlock, x: Tensor) -> Tensor:
    """The block as the kernels compute it: integer codes, per-token activation codes."""
    layers = {}
    for site, names in SITES.items():
        quantizer = ActivationQuantizer(task.schemes[site].abits, task.schemes[site].act_symmetric)
        layers[site] = [
            FakeQuantLinear(
                QuantLinear(
                    name,
                    task.schemes[site],
                    trained.quantizers[name].arrays(
                        trained.weights[f"{name}.weight"], trained.weights.get(f"{name}.bias")
                    ),
                ),
                quantizer,
                "float32",
            )
            for name in names
        ]
    return block_output(
        x,
        trained.weights,
        lambda site, x: torch.cat([layer(x) for layer in layers[site]], -1),
        task.block,
        task.rope,
    )


def mean_error(task: BlockTask, trained: TrainedBlock) -> float:
    """The error term as training measures it, but of inference's arithmetic."""
    errors = [
        float(output_error(inference(task, trained, x_q[None]), float_output(task, x[None])))
        for x_fp, x_q in zip(task.x_fp, task.x_q, strict=True)
        for x in (x_fp, x_q)
    ]
    return sum(errors) / len(task.x_q)


def float_output(task: BlockTask, x: Tensor) -> Tensor:
    return block_output(
        x, task.weights, float_linear(task.weights, task.block), task.block, task.rope
    )


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"compensation": True},
        {"schemes": scheme(4, 4, group_size=0)},
        {"kv_bits": 8},
        {"kv_bits": 6, "q_bits": 6},
        {
            "schemes": {
                **scheme(8, 4),
                DOWN: scheme(3, 16)[DOWN],
                OUT: scheme(2, 8, balanced=True)[OUT],
            }
        },
    ],
    ids=str,
)
def test_training_helps(changes: dict[str, Any]) -> None:
    trained = train_block(make_task(**changes), SHORT)
    assert trained.notes == () and len(trained.losses) == 3
    assert trained.loss_after == min(trained.losses) < 0.9 * trained.loss_before
    assert not any(tensor.requires_grad for tensor in trained.weights.values())


@pytest.mark.parametrize(
    "schemes",
    [scheme(1, 8), scheme(1, 8, balanced=True), scheme(2, 8), scheme(2, 8, balanced=True)],
    ids=str,
)
def test_few_levels_never_end_worse(schemes: dict[str, QuantScheme]) -> None:
    """So few weights make a rugged loss: these runs fail about as often as they help."""
    task = make_task(schemes=schemes)
    trained = train_block(task, dataclasses.replace(SHORT, loss=ERROR_ONLY))
    assert trained.loss_after <= trained.loss_before < 1
    assert mean_error(task, trained) == pytest.approx(trained.loss_after, rel=1e-3)


def test_what_was_trained_is_what_inference_computes() -> None:
    task = make_task(compensation=True, schemes={**scheme(8, 4), DOWN: scheme(4, 6)[DOWN]})
    trained = train_block(task, dataclasses.replace(SHORT, loss=ERROR_ONLY))
    assert mean_error(task, trained) == pytest.approx(trained.loss_after, rel=1e-3)
    assert trained.loss_after < 0.9 * trained.loss_before


def test_float_weights_stay_the_same_function_without_compensation() -> None:
    task = make_task(kv_bits=8)
    trained = train_block(task, SHORT)
    x = torch.stack(list(task.x_fp))
    assert trained.loss_after < trained.loss_before
    assert not any(
        torch.allclose(trained.weights[f"{name}.weight"], task.weights[f"{name}.weight"])
        for names in SITES.values()
        for name in names
    )
    y = block_output(
        x, trained.weights, float_linear(trained.weights, task.block), task.block, task.rope
    )
    torch.testing.assert_close(y, float_output(task, x), rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("parts", [None, TrainSettings().parts], ids=["no scales", "scales"])
def test_compensation_is_folded_with_and_without_scales(parts: Any) -> None:
    """Trap 3: the published code drops it from what it saves, and has none without scales."""
    settings = dataclasses.replace(SHORT, parts=parts)
    down = "mlp.down_proj.weight"
    task = make_task(compensation=True)
    with_it, without = (
        train_block(dataclasses.replace(task, compensation=flag), settings)
        for flag in (True, False)
    )
    assert not torch.allclose(with_it.weights[down], without.weights[down], atol=1e-4)
    if parts is None:
        difference = with_it.weights[down] - task.weights[down]
        singular = torch.linalg.svdvals(difference)
        assert singular[0] > 1e-3 and singular[1] < 1e-5
        assert torch.equal(without.weights[down], task.weights[down])


def test_parts_of_the_method_switch_off() -> None:
    skew = make_task(compensation=True, weights=skewed(), schemes=scheme(2, 16))
    clips = train_block(
        skew, dataclasses.replace(SHORT, parts=None, clip_rate=3e-2, compensation_rate=0.0)
    )
    assert all(torch.equal(clips.weights[name], skew.weights[name]) for name in skew.weights)
    assert clips.loss_after < 0.95 * clips.loss_before
    task = make_task(compensation=True)
    fixed = train_block(task, dataclasses.replace(SHORT, clip_rate=0.0))
    start = train_block(task, dataclasses.replace(SHORT, epochs=0))
    assert fixed.loss_after < fixed.loss_before == start.loss_before == start.loss_after
    for name, quantizer in start.quantizers.items():
        assert torch.equal(fixed.quantizers[name].gamma_high, quantizer.gamma_high)
    no_scales = TransformParts((), query_key=False)
    assert (
        train_block(
            skew, dataclasses.replace(SHORT, parts=no_scales, compensation_rate=0.0)
        ).loss_before
        == clips.loss_before
    )
    nothing = train_block(
        task, dataclasses.replace(SHORT, transform_rate=0.0, clip_rate=0.0, compensation_rate=0.0)
    )
    assert (
        nothing.losses == () and nothing.notes == () and nothing.loss_after == nothing.loss_before
    )
    one, both = (
        train_block(task, dataclasses.replace(SHORT, epochs=0, both_streams=flag, loss=ERROR_ONLY))
        for flag in (False, True)
    )
    assert 0 < one.loss_before < both.loss_before


def test_each_site_starts_at_its_best_power() -> None:
    task = make_task(schemes={**scheme(8, 4), DOWN: scheme(2, 16)[DOWN], OUT: scheme(2, 16)[OUT]})
    alone = dataclasses.replace(SHORT, epochs=0)
    fixed = [
        train_block(task, dataclasses.replace(alone, powers=(power,))) for power in (0.0, 0.5, 1.0)
    ]
    chosen = train_block(task, dataclasses.replace(alone, powers=(0.0, 0.5, 1.0)))
    assert chosen.loss_before < 0.97 * min(start.loss_before for start in fixed)
    for norm in ("input_layernorm.weight", "post_attention_layernorm.weight"):
        assert sum(torch.equal(chosen.weights[norm], start.weights[norm]) for start in fixed) == 1


def test_a_run_that_makes_it_worse_is_repeated_slower_and_then_given_up() -> None:
    task = make_task()
    start = train_block(task, dataclasses.replace(SHORT, epochs=0))
    wild = train_block(
        task, dataclasses.replace(SHORT, epochs=1, transform_rate=1e4, clip_rate=1e4)
    )
    assert wild.loss_after == wild.loss_before == start.loss_before and wild.losses == ()
    assert len(wild.notes) == 3
    assert wild.notes[0].startswith(
        f"block 5: at 1 of the learning rates the loss rose from {start.loss_before:.4g} to "
    )
    assert wild.notes[1].startswith(
        f"block 5: at 0.25 of the learning rates the loss rose from {start.loss_before:.4g} to "
    )
    assert wild.notes[2] == "block 5: kept as it was before training"
    assert all(torch.equal(wild.weights[name], start.weights[name]) for name in start.weights)
    for name, quantizer in start.quantizers.items():
        assert torch.equal(wild.quantizers[name].gamma_low, quantizer.gamma_low)


def poisoned(steps: set[int]) -> Callable[[list[Tensor]], None]:
    """An all_reduce that puts a NaN into the gradients of some steps."""
    seen = 0

    def reduce(tensors: list[Tensor]) -> None:
        nonlocal seen
        if len(tensors) > 2:  # gradients; statistics come by two and losses by one
            seen += 1
            if seen in steps:
                tensors[3].view(-1)[1] = torch.nan

    return reduce


def test_a_gradient_that_is_not_finite_ends_the_run_and_the_next_one_starts_afresh() -> None:
    clean = train_block(
        make_task(),
        dataclasses.replace(
            SHORT, transform_rate=SHORT.transform_rate / 4, clip_rate=SHORT.clip_rate / 4
        ),
    )
    trained = train_block(make_task(all_reduce=poisoned({6})), SHORT)
    assert trained.notes == ("block 5: at 1 of the learning rates a gradient was not finite",)
    assert trained.losses == clean.losses and trained.loss_after < trained.loss_before
    given_up = train_block(make_task(all_reduce=poisoned({2, 3})), SHORT)
    assert given_up.notes == (
        "block 5: at 1 of the learning rates a gradient was not finite",
        "block 5: at 0.25 of the learning rates a gradient was not finite",
        "block 5: kept as it was before training",
    )
    assert given_up.loss_after == given_up.loss_before


class Processes:
    """Threads that stand for processes and average their tensors."""

    def __init__(self, world: int) -> None:
        self.world, self._barrier, self._shelf = world, threading.Barrier(world), [[]] * world
        self.results: list[TrainedBlock | None] = [None] * world

    def all_reduce(self, rank: int) -> Callable[[list[Tensor]], None]:
        def reduce(tensors: list[Tensor]) -> None:
            self._shelf[rank] = [tensor.clone() for tensor in tensors]
            self._barrier.wait(60)
            for place, tensor in enumerate(tensors):
                tensor.copy_(torch.stack([shelf[place] for shelf in self._shelf]).mean(0))
            self._barrier.wait(60)

        return reduce

    def run(self, settings: TrainSettings, **changes: Any) -> list[TrainedBlock | None]:
        def one(rank: int) -> None:
            task = make_task(
                rank=rank, world=self.world, all_reduce=self.all_reduce(rank), **changes
            )
            self.results[rank] = train_block(task, settings)

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(self.world)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return self.results


@pytest.mark.parametrize("count", [8, 5])
def test_two_processes_train_what_one_does(count: int) -> None:
    settings = dataclasses.replace(SHORT, batch=4, powers=(1.0, 0.5))
    alone = train_block(make_task(count, compensation=True), settings)
    first, second = Processes(2).run(settings, count=count, compensation=True)
    assert first is not None and second is not None
    assert first.losses == second.losses and first.loss_before == second.loss_before
    assert first.losses == pytest.approx(
        alone.losses, rel=1e-4
    ) and first.loss_before == pytest.approx(alone.loss_before, rel=1e-5)
    assert alone.loss_after < alone.loss_before
    for name, tensor in first.weights.items():
        assert torch.equal(tensor, second.weights[name])


def test_the_seed_fixes_the_result() -> None:
    runs = [train_block(make_task(seed=seed), SHORT) for seed in (0, 0, 1)]
    assert runs[0].losses == runs[1].losses != runs[2].losses


def test_weights_are_quantised_once_per_step(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0
    forward = train.Student.forward

    def counted(self: train.Student) -> Any:
        nonlocal calls
        calls += 1
        return forward(self)

    monkeypatch.setattr(train.Student, "forward", counted)
    train_block(make_task(8), dataclasses.replace(SHORT, epochs=2, batch=4))
    assert (
        calls == 2 * 2 + 7
        # 2 steps per epoch; measured at the start of each of 4 sites, as a whole, and after each epoch
    )


def test_scales_are_floored_after_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0
    project = EquivalentTransform.project

    def counted(self: EquivalentTransform) -> None:
        nonlocal calls
        calls += 1
        project(self)

    monkeypatch.setattr(EquivalentTransform, "project", counted)
    train_block(make_task(), SHORT)
    assert (
        calls == 9 + 3 * 4
    )  # the start, twice per site to try it and take it, 3 epochs of 4 steps


def test_bad_tasks_are_refused() -> None:
    with pytest.raises(InputError) as caught:
        train_block(make_task(x_q=[]), SHORT)
    assert str(caught.value) == (
        "block 5: got 4 float and 0 quantised windows, expected as many, at least 1."
        " Capture both streams over the same text."
    )
    with pytest.raises(InputError) as caught:
        train_block(make_task(world=2), dataclasses.replace(SHORT, batch=3))
    assert str(caught.value) == (
        "block 5: got 3 windows per step for 2 processes and 4 windows in all, expected a "
        "multiple of the"
        " processes and no more than the windows. Choose another batch."
    )
    task = make_task()
    task.x_q[1][3, 4] = torch.inf
    with pytest.raises(InputError) as caught:
        train_block(task, SHORT)
    assert str(caught.value) == (
        "block 5: got a loss of nan before training, expected a finite one."
        " Look for NaN or inf in the block's weights and in its input."
    )


@pytest.mark.slow
def test_a_real_block_at_few_bits(demo_gguf: Path) -> None:
    """Five levels of weight in the first block of SmolLM2-135M: the clips learn, and what they
    learn holds on other text.
    """
    checkpoint = open_checkpoint(str(demo_gguf), offline=True)
    text = text_tokens(checkpoint.tokenizer(), default_text(), checkpoint.decoder.vocab, "")
    tokens = windows_from_tokens(text, 128)[:6]
    x = list(checkpoint.tensor("model.embed_tokens.weight")[torch.from_numpy(tokens)])
    schemes = scheme(2, 8, balanced=True, group_size=64)
    task = BlockTask(
        "block 0",
        checkpoint.decoder.blocks[0],
        load_block(checkpoint, 0),
        Rope.of(checkpoint, 128),
        schemes,
        x[:4],
        x[:4],
    )
    settings = TrainSettings(
        epochs=4, clip_rate=3e-2, transform_rate=0.0, powers=(0.5,), rows=16, loss=ERROR_ONLY
    )
    trained = train_block(task, settings)
    assert trained.notes == () and trained.loss_after < 0.85 * trained.loss_before
    start = train_block(task, dataclasses.replace(settings, epochs=0))
    other = dataclasses.replace(task, x_fp=x[4:], x_q=x[4:])
    assert mean_error(other, trained) < 0.95 * mean_error(other, start)
