"""A block whose codes are final: what is left to learn are the weight scales and the norm gains,
which the op takes as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from calibration.blocks.forward import BlockWeights
from calibration.methods.abq.student import BlockTask, QuantizedBlock
from calibration.methods.abq.training import TrainSettings
from calibration.quant.scheme import QuantLinear
from plugins.core.op_spec import QuantArrays

__all__ = ["TunedStudent"]


class _Scales(nn.Module):  # type: ignore[misc]
    """Factors that start at 1, as logarithms: a step of the optimiser changes every scale by the
    same part, and none its sign.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], device: torch.device) -> None:
        super().__init__()
        self._names = list(shapes)
        self.logs = nn.ParameterList(torch.zeros(shape, device=device) for shape in shapes.values())

    def factors(self) -> dict[str, Tensor]:
        return {name: log.exp() for name, log in zip(self._names, self.logs, strict=True)}


class TunedStudent(QuantizedBlock):
    """The quantised block with learnable scales per group and learnable norm gains.

    Args:
        arrays: by site, as the walk gave them.
        gains: norm gains by name, and routers.
    """

    def __init__(
        self, task: BlockTask, arrays: Mapping[str, QuantArrays], gains: Mapping[str, Tensor]
    ) -> None:
        super().__init__(task)
        device = next(iter(gains.values())).device
        self._arrays, self._gains = dict(arrays), dict(gains)
        self._integers: dict[str, Tensor] = {}
        self._start: dict[str, Tensor] = {}
        for site, values in arrays.items():
            integers, scale = QuantLinear(site, task.schemes[site], values).integers()
            self._integers[site] = torch.tensor(integers, device=device).unflatten(
                1, (scale.shape[1], -1)
            )
            self._start[site] = torch.tensor(scale, device=device)
        self.scales = _Scales(
            {site: tuple(scale.shape) for site, scale in self._start.items()}, device
        )
        norms = {norm.gain: (norm.width,) for norm in task.block.norms}
        self.norms = _Scales(norms, device)

    def parts(self, settings: TrainSettings) -> list[tuple[nn.Module | None, float]]:
        """Scales and gains."""
        return [(self.scales, settings.scale_rate), (self.norms, settings.gain_rate)]

    def forward(self) -> BlockWeights:
        """The weights that inference uses, and the gains."""
        weights = self.norm_gains()
        for site, factor in self.scales.factors().items():
            stacked = (self._integers[site] * (self._start[site] * factor)[..., None]).flatten(1)
            names = self._task.block.sites[site].linears.names
            rows = [len(self._task.weights[f"{name}.weight"]) for name in names]
            for name, part in zip(names, stacked.split(rows), strict=True):
                weights[f"{name}.weight"] = part
            bias = self._arrays[site].bias
            if bias is not None:
                for name, part in zip(
                    names, torch.tensor(bias, device=stacked.device).split(rows), strict=True
                ):
                    weights[f"{name}.bias"] = part
        return weights

    def norm_gains(self) -> dict[str, Tensor]:
        """Norm gains as they are now, and routers as they came."""
        learned = self.norms.factors()
        return self._gains | {name: self._gains[name] * learned[name] for name in learned}

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def arrays(self) -> dict[str, QuantArrays]:
        """Codes as they came, scales as they are now."""
        return {
            site: replace(self._arrays[site], scale=(self._start[site] * factor).cpu().numpy())
            for site, factor in self.scales.factors().items()
        }
