"""Differentiable fake quantisation: what is trained is what the op computes, bit for bit; gradients
reach weights, clips and ranges.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from calibration.methods.abq.quantizer import WeightQuantizer, quantize_dequantize_activation
from calibration.quant.scheme import QuantLinear, QuantScheme
from calibration.reference.fake_quant import quantize_activation

LEVELS = {
    2: (1, False),
    3: (1, True),
    4: (2, False),
    5: (2, True),
    8: (3, False),
    16: (4, False),
    256: (8, False),
}


def scheme(levels: int, group_size: int = 0) -> QuantScheme:
    wbits, balanced = LEVELS[levels]
    return QuantScheme("ABQGemm", "abq", wbits, 8, balanced, group_size)


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def quantizer(levels: int, weight: torch.Tensor, group_size: int = 0) -> WeightQuantizer:
    return WeightQuantizer(tuple(weight.shape), scheme(levels, group_size))


@pytest.mark.parametrize("group_size", [0, 16])
@pytest.mark.parametrize("levels", LEVELS)
def test_arrays_dequantise_to_what_was_trained(levels: int, group_size: int) -> None:
    weight = gaussian(12, 48) * torch.logspace(-6, 3, 12)[:, None]
    weight[3] = weight[3].abs() + 1e-3  # one sign
    weight[4] = 0.0
    weight[5] = 2.5
    trained = quantizer(levels, weight, group_size)
    with torch.no_grad():
        trained.gamma_high.copy_(gaussian(*trained.gamma_high.shape, seed=1) + 1)
        trained.gamma_low.copy_(gaussian(*trained.gamma_low.shape, seed=2) + 1)
    bias = gaussian(12, seed=3)
    arrays = trained.arrays(weight, bias)
    assert (arrays.codes.dtype, arrays.scale.dtype) == (np.uint8, np.float32)
    assert (
        arrays.zero is not None
        and arrays.zero.dtype == np.int32
        and arrays.codes.max() == levels - 1
    )
    assert arrays.bias is not None
    np.testing.assert_array_equal(arrays.bias, bias.numpy())
    linear = QuantLinear("test", scheme(levels, group_size), arrays)
    np.testing.assert_array_equal(linear.dequantize(), trained(weight).detach().numpy())
    from plugins import op_spec

    op_spec("ABQGemm").pack(
        arrays, linear.attributes, "test"
    )  # shapes and ranges are those of the op


def test_range_is_that_of_the_formula() -> None:
    weight = torch.tensor([[-3.0, -1.0, 0.5, 1.0]])
    trained = quantizer(16, weight)
    with torch.no_grad():
        trained.gamma_low.fill_(0.0)  # sigmoid 0.5: low = -1.5
        trained.gamma_high.fill_(float(torch.logit(torch.tensor(0.75))))  # high = 0.75
    arrays = trained.arrays(weight)
    assert arrays.zero is not None
    np.testing.assert_allclose(arrays.scale, [[2.25 / 15]], rtol=1e-6)
    assert arrays.zero.tolist() == [[10]] and arrays.codes.tolist() == [[0, 3, 13, 15]]


def test_zero_points_leave_the_codes_for_groups_of_one_sign() -> None:
    """Trap 6: zero points stored in as many bits as the codes would be wrong."""
    weight = torch.stack([torch.linspace(10, 11, 32), torch.linspace(-11, -10, 32)])
    trained = quantizer(16, weight)
    arrays = trained.arrays(weight)
    assert arrays.zero is not None and arrays.zero[0, 0] < -100 and arrays.zero[1, 0] > 115
    assert (
        trained(weight) - weight
    ).abs().max() < 0.25  # the start clips 0.018 of the ends, no more


def test_scales_of_small_weights_are_not_floored_at_half_precision() -> None:
    """Trap 7: a floor of 1e-5, a subnormal of fp16, would round these weights to 0."""
    weight = gaussian(4, 64) * 1e-6
    trained = quantizer(256, weight)
    assert (trained(weight) - weight).abs().max() < 1e-7
    assert (torch.from_numpy(trained.arrays(weight).scale) < 1e-7).all()
    assert torch.from_numpy(trained.arrays(torch.zeros(4, 64)).scale).eq(2.0**-126).all()


def test_balanced_two_bits_are_five_levels_four_steps_apart() -> None:
    """Trap 8: W2* is 0..4; two bit planes do not hold it."""
    weight = gaussian(8, 256)
    trained = quantizer(5, weight)
    arrays = trained.arrays(weight)
    assert set(np.unique(arrays.codes)) == {0, 1, 2, 3, 4}
    clip = torch.sigmoid(torch.tensor(4.0))
    np.testing.assert_allclose(
        arrays.scale[:, 0], (clip * (weight.amax(1) - weight.amin(1)) / 4).numpy(), rtol=1e-5
    )
    assert QuantLinear("test", scheme(5), arrays).attributes.planes == 3
    assert set(np.unique(quantizer(4, weight).arrays(weight).codes)) == {
        0,
        1,
        2,
        3,
    }  # plain W2 is there as well


@pytest.mark.parametrize(("levels", "expected"), [(2, 0.7), (3, 0.2), (4, 0.15), (5, 0.1)])
def test_search_starts_few_levels_where_most_weights_are_not_zero(
    levels: int, expected: float
) -> None:
    weight = gaussian(16, 512)
    full, searched = quantizer(levels, weight), quantizer(levels, weight)
    searched.search(weight)
    errors = [
        float((trained(weight) - weight).square().mean().detach()) for trained in (full, searched)
    ]
    assert errors[1] < expected and errors[1] < 0.75 * errors[0]
    if levels <= 3:
        assert (full(weight) == 0).float().mean() > 0.85  # what min and max do
        assert (searched(weight) == 0).float().mean() < 0.75


def test_search_minds_the_columns_that_carry_the_signal() -> None:
    weight = gaussian(8, 128)
    weight[:, 5] *= 4  # the end of every range
    importance = torch.ones(128)
    importance[5] = 1e4
    plain, minding = quantizer(8, weight), quantizer(8, weight)
    plain.search(weight)
    minding.search(weight, importance)
    errors = [
        (trained(weight) - weight).square().mul(importance).sum().detach()
        for trained in (plain, minding)
    ]
    assert errors[1] < 0.5 * errors[0]


def test_weight_gradients_are_straight_through() -> None:
    """Inside the range the rounding passes gradients on; the clips get theirs through scale and
    zero.
    """
    weight = gaussian(6, 64).requires_grad_()
    trained = quantizer(16, weight.detach(), 16)
    trained(weight).sum().backward()
    assert (
        weight.grad is not None
        and trained.gamma_high.grad is not None
        and trained.gamma_low.grad is not None
    )
    codes = torch.from_numpy(trained.arrays(weight.detach()).codes)
    inside = (codes > 0) & (codes < 15)
    extreme = (
        weight == weight.unflatten(1, (4, 16)).amax(-1, keepdim=True).expand(6, 4, 16).flatten(1)
    ) | (weight == weight.unflatten(1, (4, 16)).amin(-1, keepdim=True).expand(6, 4, 16).flatten(1))
    torch.testing.assert_close(
        weight.grad[inside & ~extreme], torch.ones_like(weight)[inside & ~extreme]
    )
    assert trained.gamma_high.grad.abs().min() > 0 and trained.gamma_low.grad.abs().min() > 0


def test_zero_point_passes_a_gradient() -> None:
    """The published quantiser rounds it without one: for weights above the range, d w^ / d zero =
    -scale is then lost.
    """
    weight = torch.tensor([[-1.0, 0.2, 0.4, 1.0]])
    trained = quantizer(4, weight)
    with torch.no_grad():
        trained.gamma_high.fill_(-0.5)  # the last weight is clipped
    trained(weight)[0, 3].backward()
    low, high = torch.sigmoid(torch.tensor(4.0)) * -1.0, torch.sigmoid(torch.tensor(-0.5))
    scale, zero = (high - low) / 3, torch.round(-low / ((high - low) / 3))
    slope = (
        torch.sigmoid(torch.tensor(4.0)) * (1 - torch.sigmoid(torch.tensor(4.0))) * -1.0
    )  # d low / d gamma_low
    through_scale = (3 - zero) * (-1 / 3)
    through_zero = -scale * (
        -1 / scale - low / scale**2 / 3
    )  # d(-low / scale) / d low, with d scale / d low = -1/3
    assert trained.gamma_low.grad is not None
    torch.testing.assert_close(trained.gamma_low.grad[0, 0], slope * (through_scale + through_zero))


def test_clips_can_be_learned() -> None:
    weight = torch.cat(
        (gaussian(4, 63), torch.full((4, 1), 12.0)), 1
    )  # an outlier that the best clip gives up
    trained = quantizer(8, weight)
    optimizer = torch.optim.Adam(trained.parameters(), 0.1)
    losses = []
    for _ in range(60):
        loss = (trained(weight) - weight)[:, :63].square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.3 * losses[0]


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_activation_values_are_those_of_inference(bits: int, symmetric: bool) -> None:
    x = gaussian(5, 7, 48)
    x[0, 0] = 0.0
    x[0, 1] = x[0, 1].abs() + 3
    x[0, 2] *= 1e-30
    codes, scale, zero = quantize_activation(x, bits, symmetric)
    torch.testing.assert_close(
        quantize_dequantize_activation(x, bits, symmetric), (codes - zero) * scale, rtol=0, atol=0
    )


@pytest.mark.parametrize("symmetric", [False, True])
def test_activation_gradient_goes_straight_through_and_through_the_range(symmetric: bool) -> None:
    x = gaussian(3, 32).requires_grad_()
    weight = gaussian(3, 32, seed=1)
    (quantize_dequantize_activation(x, 4, symmetric) * weight).sum().backward()
    assert x.grad is not None
    ends = x.detach().abs() == x.detach().abs().amax(-1, keepdim=True)
    if not symmetric:
        ends = (x.detach() == x.detach().amax(-1, keepdim=True)) | (
            x.detach() == x.detach().amin(-1, keepdim=True)
        )
    torch.testing.assert_close(x.grad[~ends], weight[~ends])
    assert (x.grad[ends] != weight[ends]).all()


def test_sixteen_bits_are_the_identity() -> None:
    x = gaussian(2, 8)
    assert quantize_dequantize_activation(x, 16, False) is x


def test_rank_and_group_follow_the_scheme() -> None:
    trained = WeightQuantizer((6, 64), dataclasses.replace(scheme(16), group_size=32))
    assert trained.gamma_high.shape == trained.gamma_low.shape == (6, 2)
    assert torch.sigmoid(trained.gamma_high.detach()).sub(0.982).abs().max() < 1e-3
