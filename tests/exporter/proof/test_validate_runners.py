"""Runners: a session behind Polygraphy, and a reference that follows its leader's tensors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from calibration.quant.folder import read_quant
from calibration.reference.model import quantised_model
from exporter.proof.runners import LockstepRunner, SessionRunner, gemm_nodes
from exporter.run.onnxruntime import load_model
from exporter.run.reference import TorchSession

IDS = np.array([[5, 300, 17, 42, 99, 7]], np.int64)
FEED = {"input_ids": IDS, "attention_mask": np.ones_like(IDS)}


def test_gemm_nodes_follow_the_family(tiny_export: Callable[..., Path]) -> None:
    out = tiny_export()
    nodes = gemm_nodes(load_model(out / "onnx"), read_quant(out / "quant").decoder)
    assert len(nodes) == 8
    assert (nodes[0].name, nodes[0].source) == (
        "model.layers.0.self_attn.qkv_proj",
        "model.embed_tokens",
    )
    assert [node.source for node in nodes[2::2]] == [
        "model.layers.0.residual",
        "model.layers.0.output",
        "model.layers.1.residual",
    ]
    assert [node.norm for node in nodes[4:]] == [
        "model.layers.1.input_layernorm",
        "",
        "model.layers.1.post_attention_layernorm",
        "",
    ]
    assert nodes[6].site.linears.names == ("mlp.gate_proj", "mlp.up_proj")


def test_gemm_nodes_may_have_their_norms_apart(tiny_export: Callable[..., Path]) -> None:
    out = tiny_export(fuse_norms=False)
    nodes = gemm_nodes(load_model(out / "onnx"), read_quant(out / "quant").decoder)
    assert (nodes[0].source, nodes[6].source) == (
        "model.layers.0.input_layernorm",
        "model.layers.1.post_attention_layernorm",
    )
    assert {node.norm for node in nodes} == {""}


def test_a_mask_without_past_starts_anew(tiny_export: Callable[..., Path]) -> None:
    model = quantised_model(read_quant(tiny_export() / "quant"))
    with SessionRunner("torch", lambda: TorchSession(model)) as runner:
        first = runner.infer(FEED)["logits"]
        runner.infer({"input_ids": IDS[:, :1], "attention_mask": np.ones((1, 7), np.int64)})
        assert runner.session.length == 7
        np.testing.assert_array_equal(runner.infer(FEED)["logits"], first)
        assert runner.session.length == 6 and runner.last_inference_time() > 0


@pytest.mark.parametrize("fuse_norms", [True, False])
def test_lockstep_takes_the_leaders_tensors(
    tiny_export: Callable[..., Path], fuse_norms: bool
) -> None:
    """What it reports is the reference's own result on the leader's inputs, and a wrong tensor does
    not travel on.
    """
    out = tiny_export(fuse_norms=fuse_norms)
    quant = read_quant(out / "quant")
    model, nodes = quantised_model(quant), gemm_nodes(load_model(out / "onnx"), quant.decoder)
    places = {
        ("norm" if node.norm else "input", node.norm or node.name): node.source for node in nodes
    }
    places |= {("output", node.name): node.result for node in nodes}
    tensors: dict[str, np.ndarray] = {}

    def keep(kind: str, name: str, value: Any) -> Any:
        if (kind, name) in places:
            tensors[places[kind, name]] = value.numpy().copy()
        return value

    ids = torch.from_numpy(IDS)
    model(ids, torch.ones_like(ids), tap=keep)
    with SessionRunner("leader", lambda: TorchSession(model)) as leader:
        own = leader.infer(FEED)
        leader.outputs = {**own, **tensors}
        with LockstepRunner("lockstep", model, leader, nodes) as lockstep:
            same = lockstep.infer(FEED)
            for name, array in tensors.items():
                np.testing.assert_array_equal(same[name], array)
            np.testing.assert_array_equal(same["logits"], own["logits"])
            wrong = nodes[1].result
            leader.outputs[wrong] = tensors[wrong] * 2
            found = lockstep.infer(FEED)
    np.testing.assert_array_equal(found[wrong], tensors[wrong])  # the reference's own result
    assert (
        np.abs(found[nodes[2].source] - tensors[nodes[2].source]).max() > 0.01
    )  # what follows saw the leader's
    np.testing.assert_array_equal(
        found[nodes[2].result], tensors[nodes[2].result]
    )  # and the next node the leader's input again
    np.testing.assert_array_equal(found["logits"], own["logits"])
