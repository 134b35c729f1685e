"""The quantised block and its teacher: what they compute, on how many elements, and what is
learned.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from calibration.blocks.forward import block_output, float_linear
from calibration.families.steps import Attend
from calibration.methods.abq import student as module
from calibration.methods.abq.quantizer import WeightQuantizer
from calibration.methods.abq.student import BlockTask, Student, Teacher
from calibration.methods.abq.transforms import TransformParts
from calibration.reference.fake_quant import quantize_activation
from calibration.reference.steps import attention_rows
from tests.calibration.llama import QKV, SITES, attend, heads_from_qkv, mlp_product, rms_norm
from tests.calibration.methods.abq.blocks import HEAD_DIM, block, rope, scheme, streams


def make_task(**changes: Any) -> BlockTask:
    weights, shape = block(4, 2)
    return dataclasses.replace(
        BlockTask(
            "block 0", shape, weights, rope(24), scheme(4, 6), streams(3), streams(3, seed=4)
        ),
        **changes,
    )


def make_student(task: BlockTask, parts: TransformParts | None = None) -> Student:
    return Student(task, Teacher(task, range(3), True).statistics, parts, 0.5)


def quantised(x: Tensor, bits: int) -> Tensor:
    if bits == 16:
        return x
    codes, scale, zero = quantize_activation(x, bits, False)
    return (codes - zero) * scale


def expected_output(
    task: BlockTask, hat: dict[str, Tensor], x: Tensor, rows: Tensor
) -> tuple[Tensor, Tensor]:
    """By hand, with keys quantised after they are repeated for every query head, as published."""
    linear, block = float_linear(hat, task.block), task.block
    bits = task.schemes[QKV].abits
    normed = rms_norm(x, hat["input_layernorm.weight"])
    query, key, value = heads_from_qkv(linear(QKV, quantised(normed, bits)), block, task.rope)
    key, value = (
        quantised(part.repeat_interleave(block.heads.groups, -3), task.kv_bits)
        for part in (key, value)
    )
    query = quantised(query, task.q_bits)
    x = x + linear("self_attn.o_proj", quantised(attend(query, key, value), bits))
    normed = rms_norm(x, hat["post_attention_layernorm.weight"])
    product = mlp_product(linear("mlp.gate_up_proj", quantised(normed, bits)))
    return x + linear("mlp.down_proj", quantised(product, bits)), attention_rows(
        query, key, rows, block.attend
    )


@pytest.mark.parametrize(("kv_bits", "q_bits"), [(16, 16), (4, 16), (3, 8)])
def test_output_is_that_of_quantised_inputs_and_heads(kv_bits: int, q_bits: int) -> None:
    task = make_task(kv_bits=kv_bits, q_bits=q_bits)
    student, rows = make_student(task, TransformParts()), torch.tensor([2, 23])
    hat = student()
    x = task.window(task.x_q, 1)
    y, log_p = student.outputs(hat, x, rows)
    expected_y, expected_log_p = expected_output(task, hat, x, rows)
    assert log_p is not None and log_p.shape == (1, 4, 2, 24)
    torch.testing.assert_close(y, expected_y)
    torch.testing.assert_close(log_p.exp(), expected_log_p.exp())
    assert student.outputs(hat, x, None)[1] is None


def test_keys_are_quantised_before_they_are_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trap 5: after it would be the same numbers at several times the work, and not what a cache
    holds.
    """
    shapes = []
    original = module.quantize_dequantize_activation

    def watched(x: Tensor, bits: int, symmetric: bool) -> Tensor:
        if bits == 4:
            shapes.append(tuple(x.shape))
        return original(x, bits, symmetric)

    monkeypatch.setattr(module, "quantize_dequantize_activation", watched)
    task = make_task(kv_bits=4)
    student = make_student(task)
    student.outputs(student(), task.window(task.x_q, 0), None)
    assert shapes == [(1, 2, 24, HEAD_DIM)] * 2


def test_query_key_scales_are_learned_only_where_heads_are_quantised() -> None:
    """Codes are per row: elsewhere these scales change no rounding, and the optimiser would amplify
    noise.
    """
    for kv_bits, learned in ((16, False), (8, True)):
        transform = make_student(make_task(kv_bits=kv_bits), TransformParts()).transform
        assert transform is not None and (transform.query_key is not None) == learned
    assert make_student(make_task(), None).transform is None


def test_student_weights_are_the_codes_of_the_folded_ones() -> None:
    task = make_task(compensation=True)
    student = make_student(task, TransformParts())
    folded, hat = student.folded(), student()
    assert student.by_name().keys() == {name for names in SITES.values() for name in names}
    for name, quantizer in student.by_name().items():
        torch.testing.assert_close(
            hat[f"{name}.weight"], quantizer(folded[f"{name}.weight"]), rtol=0, atol=0
        )
        assert torch.equal(hat[f"{name}.bias"], folded[f"{name}.bias"])


@pytest.mark.parametrize("parts", [None, TransformParts()], ids=["no scales", "scales"])
def test_clips_start_at_the_best_for_the_inputs_of_the_folded_block(
    parts: TransformParts | None,
) -> None:
    task = make_task(schemes=scheme(2, 8))
    student = make_student(task, parts)
    folded = {name: tensor.detach() for name, tensor in student.folded().items()}
    squares: dict[str, Tensor] = {site: torch.zeros(()) for site in SITES}
    linear = float_linear(folded, task.block)

    def watched(site: str, x: Tensor) -> Tensor:
        squares[site] = squares[site] + x[0].square().mean(0) / 3
        return linear(site, x)

    for x in task.x_q:
        block_output(x[None], folded, watched, task.block, task.rope)
    for site, names in SITES.items():
        for name in names:
            weight, trained = folded[f"{name}.weight"], student.by_name()[name]
            searched = WeightQuantizer(tuple(weight.shape), task.schemes[site])
            searched.search(weight, squares[site])
            same = (
                trained.gamma_high - searched.gamma_high
            ).abs() < 1e-4  # rounding may decide between two clips that are as good
            assert same.float().mean() > 0.98, name
            assert (trained.gamma_high < 3.9).float().mean() > 0.6


def test_teacher_outputs_and_statistics() -> None:
    task = make_task()
    teacher = Teacher(task, range(3), True)
    inputs: dict[str, list[Tensor]] = {site: [] for site in SITES}
    linear = float_linear(task.weights, task.block)

    def watched(site: str, x: Tensor) -> Tensor:
        inputs[site].append(x[0])
        return linear(site, x)

    for index in range(3):
        for x, target in zip(
            (task.x_fp[index], task.x_q[index]), teacher.targets(index), strict=True
        ):
            torch.testing.assert_close(
                target, block_output(x[None], task.weights, linear, task.block, task.rope)
            )
        block_output(task.x_q[index][None], task.weights, watched, task.block, task.rope)
    for site, rows in inputs.items():
        torch.testing.assert_close(teacher.statistics.absmax[site], torch.cat(rows).abs().amax(0))
        torch.testing.assert_close(
            teacher.statistics.square[site], torch.cat(rows).square().mean(0)
        )
    assert len(Teacher(task, range(1), False).targets(0)) == 1


def test_teacher_attention_is_of_the_float_stream() -> None:
    task, rows = make_task(), torch.tensor([0, 7])
    inputs = rms_norm(task.x_fp[2][None], task.weights["input_layernorm.weight"])
    query, key, _ = heads_from_qkv(
        float_linear(task.weights, task.block)(QKV, inputs), task.block, task.rope
    )
    torch.testing.assert_close(
        Teacher(task, range(3), True).attention_rows(2, rows),
        attention_rows(query, key, rows, task.block.attend),
    )


def test_attention_memory_is_that_of_the_sampled_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trap 2: no map of all positions by all positions is made, and none is kept per window."""
    seen = []
    original = module.attention_rows

    def watched(query: Tensor, key: Tensor, rows: Tensor, step: Attend) -> Tensor:
        result = original(query, key, rows, step)
        seen.append(tuple(result.shape))
        return result

    monkeypatch.setattr(module, "attention_rows", watched)
    from calibration.methods.abq.train import TrainSettings, train_block

    train_block(make_task(), TrainSettings(epochs=1, rows=5))
    assert set(seen) == {(1, 4, 5, 24)}
