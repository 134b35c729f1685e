"""A group of zeros beside others: its second-level scale must not become 0, which would make NaN of
it and of what GPTQ corrects.
"""

from __future__ import annotations

import torch

from calibration.quant.scheme import QuantLinear, QuantScheme
from calibration.solvers.gptq import factored, gptq, quadratic_error
from calibration.solvers.grid import search_grid


def test_a_group_of_zeros_stays_zero_and_finite() -> None:
    scheme = QuantScheme("QQQGemm", "qqq", 4, 8, group_size=64, act_symmetric=True)
    weight = torch.randn(8, 256, generator=torch.Generator().manual_seed(0))
    weight[3, 64:128] = 0
    group = torch.arange(256) // 64
    grid = search_grid(weight, scheme)
    for hessian in (
        torch.eye(256, dtype=torch.float64),
        torch.diag(torch.rand(256, dtype=torch.float64) + 0.1),
    ):
        result = gptq(weight, factored(hessian), grid, group)
        assert torch.isfinite(result.values).all() and not result.values[3, 64:128].any()
        assert quadratic_error(weight, result.values, hessian) < 0.05 * quadratic_error(
            weight, torch.zeros_like(weight), hessian
        )
        stored = QuantLinear("test", scheme, grid.arrays(result.codes, None)).dequantize()
        assert (stored == result.values.numpy()).all()
