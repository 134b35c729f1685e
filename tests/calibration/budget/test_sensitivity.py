"""Sensitivities against the whole model: the same gradients, and the divergence that really comes
of quantising one node.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from calibration.blocks.forward import block_output, float_linear
from calibration.blocks.ranks import Ranks
from calibration.budget.sensitivity import Measurement, measure
from calibration.checkpoints.checkpoint import Checkpoint, open_checkpoint
from calibration.methods import find_method
from calibration.methods.qqq.settings import QqqSettings
from calibration.methods.rtn import quantize
from calibration.progress import JsonProgress
from calibration.quant.scheme import QuantLinear, QuantScheme
from calibration.reference.fake_quant import Activation
from calibration.reference.steps import Rope
from calibration.settings import CalibrationSettings
from calibration.solvers.grid import search_grid
from tests.calibration.llama import SITES, rms_norm

BITS = (2, 3, 4, 6, 8)
SEED = CalibrationSettings(seed=5)
TOKENS = np.random.default_rng(3).integers(1, 512, (6, 48))


def schemes(abits: int = 16, method: str = "rtn", group_size: int = 0) -> tuple[QuantScheme, ...]:
    return tuple(
        QuantScheme("ABQGemm", method, bits, abits, group_size=group_size) for bits in BITS
    )


def measurement(
    folder: Path, tried: tuple[QuantScheme, ...], settings: CalibrationSettings = SEED
) -> Measurement:
    return Measurement(open_checkpoint(str(folder), True), settings, tried, TOKENS)


def whole_model(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32).eval()


def nodes(checkpoint: Checkpoint) -> Iterator[tuple[str, list[str]]]:
    """Every node with its linears."""
    for layer in range(checkpoint.decoder.layers):
        for site, members in SITES.items():
            yield (
                f"model.layers.{layer}.{site}",
                [f"model.layers.{layer}.{member}" for member in members],
            )


def rounded(weight: Tensor, scheme: QuantScheme) -> Tensor:
    return torch.from_numpy(
        QuantLinear("", scheme, quantize(weight.detach().numpy(), None, scheme)).dequantize()
    )


@pytest.fixture(scope="module")
def model_dir(tiny_llama: Callable[..., Path]) -> Path:
    """Tied embeddings, three layers, biases."""
    return tiny_llama(num_hidden_layers=3, attention_bias=True)


@pytest.mark.parametrize("tied", [True, False])
def test_costs_are_those_of_autograd_through_the_whole_model(
    tiny_llama: Callable[..., Path], tied: bool
) -> None:
    """Squares of the weight gradients of whole windows, with the labels that the seed draws."""
    folder = tiny_llama(num_hidden_layers=3, attention_bias=True, tie_word_embeddings=tied)
    job, model, wanted = measurement(folder, schemes()), whole_model(folder), {}
    weights = {
        name: module.weight for name, module in model.named_modules() if name.endswith("_proj")
    }
    fisher = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for number, tokens in enumerate(torch.from_numpy(TOKENS)):
        logits = model(tokens[None]).logits[0]
        drawn = torch.multinomial(
            logits.softmax(-1), 1, generator=torch.Generator().manual_seed((5 << 16) + number)
        )[:, 0]
        gradients = torch.autograd.grad(
            F.cross_entropy(logits, drawn, reduction="sum"), list(weights.values())
        )
        for name, gradient in zip(weights, gradients, strict=True):
            fisher[name] += gradient.square()
    for node, members in nodes(job.checkpoint):
        wanted[node] = [
            sum(
                float(
                    (
                        fisher[name]
                        * (rounded(weights[name], scheme) - weights[name].detach()).square()
                    ).sum()
                )
                for name in members
            )
            / (2 * TOKENS.size)
            for scheme in job.schemes
        ]
    found = measure(job)
    assert list(found) == list(job.checkpoint.decoder.nodes) == list(wanted)
    np.testing.assert_allclose(list(found.values()), list(wanted.values()), rtol=2e-3)


# ---------------------------------------------------------------- what really happens


def divergence(log_p: Tensor, logits: Tensor) -> float:
    """Kullback-Leibler divergence of predictions from the float model's, nats per token."""
    return float((log_p.exp() * (log_p - logits.log_softmax(-1))).sum(-1).mean())


def spearman(a: list[float], b: list[float]) -> float:
    ranks = [np.argsort(np.argsort(values)).astype(float) for values in (a, b)]
    return float(np.corrcoef(*ranks)[0, 1])


def assert_foretold(found: list[float], true: list[float], factor: float = 1.7) -> None:
    """One number per node: the same order, each within a factor, their sum closer."""
    assert len(found) == len(true) == 12
    ratios = np.array(found) / np.array(true)
    assert spearman(found, true) > 0.9 and ratios.min() > 1 / factor and ratios.max() < factor, (
        spearman(found, true),
        ratios,
    )
    assert sum(found) == pytest.approx(sum(true), rel=0.25)


def with_hooks(model: Any, hooks: list[Any]) -> Tensor:
    """Logits of all windows, and the hooks are gone again."""
    try:
        return model(torch.from_numpy(TOKENS)).logits
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()  # type: ignore[untyped-decorator]
def test_costs_foretell_what_rounding_one_node_does(model_dir: Path) -> None:
    job, model = measurement(model_dir, schemes()), whole_model(model_dir)
    with torch.enable_grad():
        costs = measure(job)
    log_p = model(torch.from_numpy(TOKENS)).logits.log_softmax(-1)
    for at, scheme in enumerate(job.schemes):

        def quantised(
            linear: Any, x: tuple[Tensor], _: Tensor, scheme: QuantScheme = scheme
        ) -> Tensor:
            return F.linear(x[0], rounded(linear.weight, scheme), linear.bias)

        true = []
        for _, members in nodes(job.checkpoint):
            hooks = [model.get_submodule(name).register_forward_hook(quantised) for name in members]
            true.append(divergence(log_p, with_hooks(model, hooks)))
        assert_foretold([cost[at] for cost in costs.values()], true)
        assert min(true) > 0


@torch.no_grad()  # type: ignore[untyped-decorator]
@pytest.mark.parametrize(("abits", "symmetric"), [(3, False), (4, True)])
def test_costs_foretell_what_activation_codes_do(
    model_dir: Path, abits: int, symmetric: bool
) -> None:
    model = whole_model(model_dir)
    log_p, found, true = model(torch.from_numpy(TOKENS)).logits.log_softmax(-1), [], []
    with torch.enable_grad():
        job = measurement(
            model_dir, (QuantScheme("ABQGemm", "rtn", 8, abits, act_symmetric=symmetric),)
        )
        costs = measure(job)
    for node, members in nodes(job.checkpoint):
        hooks = [
            model.get_submodule(name).register_forward_pre_hook(
                lambda _, x: (Activation.of(x[0], abits, symmetric).values(),)
            )
            for name in members
        ]
        true.append(divergence(log_p, with_hooks(model, hooks)))
        found.append(costs[node][0])  # 8-bit weights add next to nothing
    assert_foretold(found, true)


@torch.no_grad()  # type: ignore[untyped-decorator]
def test_a_rotating_method_is_measured_where_it_rounds(model_dir: Path) -> None:
    """In the method's coordinates, on the grids that its ops can say."""
    settings = CalibrationSettings("fast", nsamples=16, seqlen=512, seed=5, method=QqqSettings())
    tried = (
        QuantScheme("QQQGemm", "qqq", 4, 8, group_size=64, act_symmetric=True),
        *schemes(8, "qqq", 64),
    )
    job = measurement(model_dir, tried, settings)
    basis = find_method("qqq").block_method.basis(job.checkpoint, settings)
    rope = Rope.of(job.checkpoint, 48)
    blocks = [basis.load(job.checkpoint, index) for index in range(3)]
    table, gain, head = (
        basis.tensor(job.checkpoint, f"{name}.weight")
        for name in ("model.embed_tokens", "model.norm", "lm_head")
    )

    def logits(changed: dict[int, Any]) -> Tensor:
        x = table[torch.from_numpy(TOKENS)]
        for index, weights in enumerate(blocks):
            weights = weights | changed.get(index, {})
            block = job.checkpoint.decoder.blocks[index]
            x = block_output(x, weights, float_linear(weights, block), block, rope)
        return rms_norm(x, gain) @ head.T

    log_p = logits({}).log_softmax(-1)
    torch.testing.assert_close(
        log_p,
        whole_model(model_dir)(torch.from_numpy(TOKENS)).logits.log_softmax(-1),
        rtol=1e-3,
        atol=1e-3,
    )
    with torch.enable_grad():
        costs = measure(job)
    for at in (0, 2, 3):  # QQQGemm W4, ABQGemm W3 and W4
        true = []
        for index, weights in enumerate(blocks):
            for members in SITES.values():
                names = [f"{member}.weight" for member in members]
                values = [
                    search_grid(weights[name], tried[at]).round(
                        weights[name], torch.arange(weights[name].shape[1]) // 64
                    )[1]
                    for name in names
                ]
                true.append(
                    divergence(log_p, logits({index: dict(zip(names, values, strict=True))}))
                )
        assert_foretold([cost[at] for cost in costs.values()], true, 2.0)
    assert all(
        cost[1:] == sorted(cost[1:], reverse=True) for cost in costs.values()
    )  # more bits, less loss


# ---------------------------------------------------------------- the pass itself


def test_the_seed_fixes_it_and_room_changes_nothing(model_dir: Path, tmp_path: Path) -> None:
    job = measurement(model_dir, schemes(8))
    found = measure(job)
    assert (
        measure(replace(job, settings=CalibrationSettings(seed=5, max_memory=0), folder=tmp_path))
        == found
    )
    assert list(tmp_path.iterdir()) == []
    assert measure(replace(job, settings=CalibrationSettings(seed=6))) != found


def test_processes_share_the_windows(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Costs are sums over windows, so those of two processes that do not add up are parts of those
    of one.
    """
    job = measurement(model_dir, schemes(8))
    whole, parts = measure(job), []
    monkeypatch.setattr(Ranks, "sum", lambda self, tensors: None)
    for rank in range(2):
        parts.append(measure(replace(job, ranks=Ranks(rank, 2))))
    for node, costs in whole.items():
        np.testing.assert_allclose(np.add(parts[0][node], parts[1][node]), costs, rtol=1e-5)
        assert 0 < parts[0][node][0] < costs[0]


def test_progress_counts_blocks_forward_and_back(
    model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    measure(measurement(model_dir, schemes()[:1]), JsonProgress())
    notes = [
        event["note"]
        for line in capsys.readouterr().out.splitlines()
        if (event := json.loads(line))["event"] == "progress"
    ]
    assert notes == [
        *(f"forward, block {block} of 3" for block in (1, 2, 3)),
        *(f"back, block {block} of 3" for block in (3, 2, 1)),
    ]
