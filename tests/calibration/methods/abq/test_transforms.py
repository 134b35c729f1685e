"""Equivalent transforms keep the float block's function; their start sees every reader; the
compensation is a rank-1 term.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from calibration.blocks.forward import BlockWeights, block_output, float_linear
from calibration.families.decoder import Block
from calibration.methods.abq.transforms import Compensation, EquivalentTransform, TransformParts
from calibration.reference.steps import Rope, attention_rows
from tests.calibration.llama import DOWN, GATE_UP, OUT, QKV, SITES, heads_from_qkv
from tests.calibration.methods.abq.blocks import HEAD_DIM, HIDDEN, block, rope, streams

NONE = TransformParts((), query_key=False)
PARTS = {
    "qkv": TransformParts((QKV,), query_key=False),
    "out": TransformParts((OUT,), query_key=False),
    "gate_up": TransformParts((GATE_UP,), query_key=False),
    "down": TransformParts((DOWN,), query_key=False),
    "query_key": TransformParts(()),
}


def absmax(weights: BlockWeights) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {
        site: torch.rand(weights[f"{SITES[site][0]}.weight"].shape[1], generator=generator) * 9
        + 0.1
        for site in SITES
    }


def unit_mean(s: Tensor) -> Tensor:
    """s over its geometric mean."""
    return s / s.log().mean().exp()


def randomised(weights: BlockWeights, shape: Block, parts: TransformParts) -> EquivalentTransform:
    """fp64, every scale away from its start, some negative."""
    transform = EquivalentTransform(weights, shape, absmax(weights), parts).double()
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for s in transform.parameters():
            s.mul_(torch.rand(s.shape, generator=generator, dtype=torch.float64) + 0.5)
            s[..., 1] *= -1
    return transform


def wide(weights: BlockWeights) -> BlockWeights:
    return {name: tensor.double() for name, tensor in weights.items()}


def output(weights: BlockWeights, shape: Block, dtype: torch.dtype) -> Tensor:
    table = rope(24)
    x = torch.stack(streams(2)).to(dtype)
    return block_output(
        x,
        weights,
        float_linear(weights, shape),
        shape,
        Rope(table.cos.to(dtype), table.sin.to(dtype)),
    )


@pytest.mark.parametrize("part", [*PARTS, "all"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (6, 1)])
def test_float_block_stays_the_same_function(
    heads: int, kv_heads: int, bias: bool, part: str
) -> None:
    """Trap 1 too: scales of a rotated pair that differ would not commute with RoPE, and query_key
    alone would fail here.
    """
    weights, shape = block(heads, kv_heads, bias)
    transform = randomised(weights, shape, PARTS.get(part, TransformParts()))
    changed = transform.apply_to(wide(weights))
    assert changed.keys() == weights.keys()
    moved = [name for name in weights if not torch.equal(changed[name], weights[name].double())]
    assert any(name.endswith("proj.weight") for name in moved)
    torch.testing.assert_close(
        output(changed, shape, torch.float64),
        output(wide(weights), shape, torch.float64),
        rtol=1e-11,
        atol=1e-11,
    )
    narrow = {name: tensor.float() for name, tensor in changed.items()}
    torch.testing.assert_close(
        output(narrow, shape, torch.float32),
        output(weights, shape, torch.float32),
        rtol=1e-4,
        atol=1e-3,
    )


def test_untied_rotary_pairs_would_change_the_function() -> None:
    """Trap 1, the published behaviour: one free scale per key row."""
    weights, shape = block(4, 2)
    free = torch.linspace(0.5, 2, 2 * HEAD_DIM)
    changed = dict(weights)
    for name, s in (
        ("k_proj", free),
        ("q_proj", 1 / free.view(2, HEAD_DIM).repeat_interleave(2, 0).flatten()),
    ):
        changed[f"self_attn.{name}.weight"] = weights[f"self_attn.{name}.weight"] * s[:, None]
        changed[f"self_attn.{name}.bias"] = weights[f"self_attn.{name}.bias"] * s

    def rows(weights: BlockWeights) -> Tensor:
        query, key, _ = heads_from_qkv(
            float_linear(weights, shape)(QKV, torch.stack(streams(1))), shape, rope(24)
        )
        return attention_rows(query, key, torch.arange(24), shape.attend).exp()

    assert (rows(changed) - rows(weights)).abs().max() > 0.05
    tied = randomised(weights, shape, PARTS["query_key"]).apply_to(wide(weights))
    torch.testing.assert_close(
        rows({name: tensor.float() for name, tensor in tied.items()}),
        rows(weights),
        rtol=1e-3,
        atol=1e-4,
    )


def test_parts_touch_only_what_they_name() -> None:
    weights, shape = block()
    touched = {
        "qkv": {"input_layernorm.weight", *(f"self_attn.{name}_proj.weight" for name in "qkv")},
        "out": {"self_attn.v_proj.weight", "self_attn.v_proj.bias", "self_attn.o_proj.weight"},
        "gate_up": {
            "post_attention_layernorm.weight",
            "mlp.gate_proj.weight",
            "mlp.up_proj.weight",
        },
        "down": {"mlp.up_proj.weight", "mlp.up_proj.bias", "mlp.down_proj.weight"},
        "query_key": {
            f"self_attn.{name}_proj.{kind}" for name in "qk" for kind in ("weight", "bias")
        },
    }
    for part, names in touched.items():
        transform = randomised(weights, shape, PARTS[part])
        changed = transform.apply_to(wide(weights))
        assert {
            name for name in weights if not torch.equal(changed[name], weights[name].double())
        } == names, part
        assert len(list(transform.parameters())) == 1


def test_start_is_from_all_readers() -> None:
    """Trap 4: the published start looks at q_proj and up_proj only."""
    weights, shape = block()
    for name in ("self_attn.v_proj", "mlp.gate_proj"):
        weights[f"{name}.weight"][2, 7] = 50.0
    ranges = absmax(weights)
    transform = EquivalentTransform(weights, shape, ranges, TransformParts(), 0.5)
    for site in (QKV, GATE_UP):
        s = transform.scale(site)
        largest = torch.stack(
            [weights[f"{name}.weight"].abs().amax(0) for name in SITES[site]]
        ).amax(0)
        assert largest[7] == 50.0
        torch.testing.assert_close(s.detach(), unit_mean((ranges[site] / largest).sqrt()))
    assert transform.query_key is not None and transform.query_key.eq(1).all()


def test_start_of_value_scales_covers_the_query_heads_that_share_them() -> None:
    """Trap 4: the published start takes the first query head of each group."""
    weights, shape = block(4, 2)
    ranges = absmax(weights)
    transform = EquivalentTransform(weights, shape, ranges, TransformParts(), 0.25)
    assert transform.scale(OUT).shape == (2 * HEAD_DIM,)
    columns = weights["self_attn.o_proj.weight"].abs().amax(0)
    expected = torch.empty(2 * HEAD_DIM)
    for kv_head in range(2):
        for channel in range(HEAD_DIM):
            reads = [head * HEAD_DIM + channel for head in (2 * kv_head, 2 * kv_head + 1)]
            expected[kv_head * HEAD_DIM + channel] = (
                ranges[OUT][reads].max() ** 0.25 / columns[reads].max() ** 0.75
            )
    torch.testing.assert_close(transform.scale(OUT).detach(), unit_mean(expected))


def test_restart_is_a_power_of_the_start() -> None:
    weights, shape = block()
    transform = EquivalentTransform(
        weights, shape, absmax(weights), TransformParts((QKV, GATE_UP, DOWN), query_key=False)
    )
    assert transform.sites == (QKV, GATE_UP, DOWN)
    start = {site: transform.scale(site).detach().clone() for site in transform.sites}
    transform.restart(DOWN, 0.5)
    torch.testing.assert_close(transform.scale(DOWN).detach(), start[DOWN].sqrt())
    assert torch.equal(transform.scale(QKV), start[QKV])
    transform.restart(DOWN, 0.0)
    assert transform.scale(DOWN).eq(1).all()
    transform.restart(DOWN, 1.0)
    assert torch.equal(transform.scale(DOWN), start[DOWN])


def test_columns_say_what_inputs_are_divided_by() -> None:
    weights, shape = block(4, 2)
    transform = randomised(weights, shape, TransformParts())
    changed, scales = transform.apply_to(wide(weights)), transform.columns()
    assert scales.keys() == SITES.keys()
    for site in (OUT, DOWN):
        torch.testing.assert_close(
            changed[f"{SITES[site][0]}.weight"],
            weights[f"{SITES[site][0]}.weight"].double() * scales[site],
        )
    assert EquivalentTransform(weights, shape, {}, NONE).columns() == {}


def test_scales_are_floored_with_their_sign() -> None:
    weights, shape = block()
    transform = EquivalentTransform(
        weights, shape, absmax(weights) | {QKV: torch.zeros(HIDDEN)}, TransformParts()
    )
    assert (transform.scale(QKV) >= 0.01).all()  # dead channels
    with torch.no_grad():
        transform.scale(QKV)[:4] = torch.tensor([1e-4, -1e-4, -3.0, 0.5])
    transform.project()
    torch.testing.assert_close(
        transform.scale(QKV)[:4].detach(), torch.tensor([0.01, -0.01, -3.0, 0.5])
    )


def test_gradients_reach_every_scale() -> None:
    weights, shape = block()
    transform = EquivalentTransform(weights, shape, absmax(weights), TransformParts())
    loss = torch.stack(
        [tensor.pow(3).sum() for tensor in transform.apply_to(weights).values()]
    ).sum()
    loss.backward()
    assert all(s.grad is not None and (s.grad != 0).all() for s in transform.parameters())


def test_compensation_is_rank_one_and_starts_at_nothing() -> None:
    weights, shape = block()
    compensation = Compensation(weights, shape)
    torch.testing.assert_close(compensation.apply_to(weights), weights, rtol=0, atol=0)
    with torch.no_grad():
        compensation.left.copy_(torch.linspace(-1, 1, HIDDEN)[:, None])
        compensation.right[0, 3] = 2.0
    changed = compensation.apply_to(weights)
    difference = changed["mlp.down_proj.weight"] - weights["mlp.down_proj.weight"]
    torch.testing.assert_close(difference, compensation.left.detach() * compensation.right.detach())
    assert [name for name in weights if not torch.equal(changed[name], weights[name])] == [
        "mlp.down_proj.weight"
    ]
    difference.square().sum().backward()
    assert compensation.left.grad is not None and compensation.left.grad.ne(0).any()
