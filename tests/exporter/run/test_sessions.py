"""Sessions: three runtimes with one face, their caches, padding, limits and errors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from calibration.quant.folder import read_quant
from exporter.run.model import open_session
from exporter.run.onnxruntime import OnnxSession
from exporter.run.reference import TorchSession
from exporter.run.sessions import DecoderSession
from plugins.errors import InputError

IDS = np.array([[5, 300, 17, 42, 99, 7, 256, 3, 444, 12, 13]], np.int64)


def relative(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


@pytest.mark.parametrize("dtype, limit", [("float32", 1e-3), ("float16", 0.05), ("bfloat16", 0.2)])
def test_onnxruntime_equals_torch(
    tiny_export: Callable[..., Path], dtype: str, limit: float
) -> None:
    out = tiny_export(abits=8, dtype=dtype)
    with open_session("torch", out) as torch, open_session("onnxruntime", out) as onnx:
        for ids in (IDS, IDS[:, :1], IDS[:, 3:7]):
            want, got = torch.run(ids), onnx.run(ids)
            assert (
                got.shape == want.shape == (1, ids.shape[1], 512)
                and got.dtype == want.dtype == np.float32
            )
            assert relative(got, want) < limit
        assert torch.length == onnx.length == 16


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_every_custom_op_sees_rounded_inputs(tiny_export: Callable[..., Path], dtype: str) -> None:
    """ONNX Runtime alone drops casts between two fp16 ops; then the reference, given the marked
    tensors, would differ.
    """
    from plugins import op_spec

    out = tiny_export(abits=8, dtype=dtype)
    quant = read_quant(out / "quant")
    names = ["model.layers.1.mlp.product", "model.layers.1.mlp.down_proj.output"]
    session = OnnxSession(out / "onnx", quant.config["max_position_embeddings"], names)
    outputs = session.step(IDS, np.ones_like(IDS))
    session.close()
    linear = next(linear for linear in quant.groups(1) if linear.name.endswith("down_proj"))
    spec = op_spec(linear.scheme.op)
    kind = quant.tensor("model.norm.weight").dtype
    x, got = (outputs[name][0].astype(kind) for name in names)
    np.testing.assert_array_equal(
        x.astype(outputs[names[0]].dtype), outputs[names[0]][0]
    )  # it was rounded already
    want = spec.reference(
        x, spec.pack(linear.arrays, linear.attributes, linear.name), linear.attributes
    )
    np.testing.assert_array_equal(got.astype(np.float32), want.astype(np.float32))


@pytest.mark.parametrize("kind", ["torch", "onnxruntime", "native"])
def test_cache_chunks_and_last_only_change_nothing(
    tiny_export: Callable[..., Path], kind: str
) -> None:
    with open_session(kind, tiny_export(abits=8, dtype="float32")) as session:
        whole = session.run(IDS)
        pieces = [
            session.run(IDS[:, :4], reset=True),
            *(session.run(IDS[:, i : i + 1]) for i in range(4, IDS.shape[1])),
        ]
        assert relative(np.concatenate(pieces, 1), whole) < 1e-3
        session.max_tokens = 3
        assert relative(session.run(IDS, reset=True), whole) < 1e-3
        last = session.run(IDS, reset=True, last_only=True)
        assert last.shape == (1, 1, 512) and relative(last, whole[:, -1:]) < 1e-3


@pytest.mark.parametrize("kind", ["torch", "onnxruntime", "native"])
def test_logits_are_of_the_wanted_tokens(tiny_export: Callable[..., Path], kind: str) -> None:
    with open_session(kind, tiny_export(abits=8, dtype="float32")) as session:
        ids, wanted = np.concatenate([IDS, IDS[:, ::-1]]), np.array([[10, 0], [3, 4]])
        ones = np.ones_like(ids)
        every = session.step(ids, ones)["logits"]
        session.reset()
        some = session.step(ids, ones, wanted)["logits"]
        assert some.shape == (2, 2, 512)
        assert relative(some, np.take_along_axis(every, wanted[..., None], 1)) < 1e-5


@pytest.mark.parametrize("kind", ["torch", "onnxruntime", "native"])
def test_a_wanted_token_that_is_not_there(tiny_export: Callable[..., Path], kind: str) -> None:
    with open_session(kind, tiny_export(abits=8, dtype="float32")) as session:
        ones = np.ones_like(IDS)
        for index in (11, -1):
            with pytest.raises(InputError) as caught:
                session.step(IDS, ones, np.array([[3, index]]))
            assert str(caught.value) == (
                f"logits_indices: got index {index}, expected 0 to 10, the new tokens. Count "
                f"from the first new token of the call, padding included."
            )
        for shape in ((1, 0), (2, 1), (1,)):
            with pytest.raises(InputError) as caught:
                session.step(IDS, ones, np.zeros(shape, np.int64))
            assert str(caught.value) == (
                f"logits_indices: got shape {list(shape)}, expected [1, wanted] with at least "
                f"one index. Give as many indices for every sequence of the batch."
            )
        assert session.length == 0


@pytest.mark.parametrize("kind", ["torch", "onnxruntime", "native"])
def test_left_padding_changes_nothing(tiny_export: Callable[..., Path], kind: str) -> None:
    with open_session(kind, tiny_export(abits=8, dtype="float32")) as session:
        alone = session.run(IDS)
        step = session.run(IDS[:, :1])
        padded = np.concatenate([np.zeros((1, 3), np.int64), IDS], 1)
        mask = np.ones((2, 14), np.int64)
        mask[0, :3] = 0
        logits = session.run(np.concatenate([padded, padded[:, ::-1]]), mask, reset=True)
        assert relative(logits[:1, 3:], alone) < 1e-3
        assert relative(session.run(np.repeat(IDS[:, :1], 2, 0))[:1], step) < 1e-3


def test_the_whole_mask_may_be_given(tiny_export: Callable[..., Path]) -> None:
    with open_session("onnxruntime", tiny_export(abits=8, dtype="float32")) as session:
        session.run(IDS)
        step = session.run(IDS[:, :1])
        session.run(IDS, reset=True)
        np.testing.assert_array_equal(session.run(IDS[:, :1], np.ones((1, 12), np.int64)), step)


STATIC = pytest.mark.parametrize("kind", ["onnxruntime", "native"])


@STATIC
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_static_cache_gives_the_same_logits(
    tiny_export: Callable[..., Path], kind: str, dtype: str
) -> None:
    """In pieces, in a batch with padding, and after a reset that leaves old rows behind."""
    grown, fixed = (tiny_export(abits=8, dtype=dtype, static=size) for size in (0, 40))
    limit = {"float32": 1e-5, "float16": 0.05, "bfloat16": 0.2}[dtype]
    mask = np.ones((2, 11), np.int64)
    mask[0, :3] = 0
    with open_session(kind, grown) as growing, open_session(kind, fixed) as static:
        for session in (growing, static):
            session.max_tokens = 4
        assert static.max_context == 40
        for _ in range(2):
            want, got = (
                session.run(np.concatenate([IDS, IDS[:, ::-1]]), mask, reset=True)
                for session in (growing, static)
            )
            assert got.shape == want.shape and relative(got[mask > 0], want[mask > 0]) < limit
            for ids in (IDS[:, :1], IDS[:, :6]):
                want, got = (session.run(np.repeat(ids, 2, 0)) for session in (growing, static))
                assert relative(got, want) < limit
        assert static.length == growing.length == 18


def test_a_static_cache_shows_tokens_where_they_came_from(
    tiny_export: Callable[..., Path],
) -> None:
    """Inner tensors and the cache of a padded batch, as the proof compares them."""
    name = "model.layers.1.output"
    ids, mask = np.concatenate([IDS, IDS[:, ::-1]]), np.ones((2, 12), np.int64)
    mask[0, :3] = 0
    found = []
    for size in (0, 40):
        folder = tiny_export(abits=8, dtype="float32", static=size) / "onnx"
        with OnnxSession(folder, 40, [name]) as session:
            session.step(ids[:, :7], mask[:, :7])
            found.append(session.step(ids[:, 6:], mask))
    want, got = found
    real = mask > 0
    assert relative(got[name], want[name]) < 1e-5
    for part in ("present.1.key", "present.1.value"):
        rows, old = (np.moveaxis(outputs[part], 2, 1)[real] for outputs in (got, want))
        assert got[part].shape == want[part].shape and relative(rows, old) < 1e-5


def test_a_static_cache_ends_at_its_capacity(tiny_export: Callable[..., Path]) -> None:
    with open_session("native", tiny_export(abits=8, dtype="float32", static=40)) as session:
        session.run(IDS)
        assert message(session, np.zeros((1, 30), np.int64)) == (
            "input_ids: got a context of 41 tokens, expected at most 40. Give less text, or reset "
            "the session."
        )


def message(session: DecoderSession, ids: np.ndarray, mask: np.ndarray | None = None) -> str:
    with pytest.raises(InputError) as caught:
        session.run(ids, mask)
    return str(caught.value)


def test_bad_shapes_are_named(tiny_export: Callable[..., Path]) -> None:
    with open_session("onnxruntime", tiny_export(abits=8, dtype="float32")) as session:
        session.run(IDS)
        assert message(session, np.zeros((1, 0), np.int64)) == (
            "input_ids: got shape [1, 0], expected [batch, tokens] with at least one token. "
            "Reset the session to start new sequences."
        )
        assert message(session, np.zeros((2, 3), np.int64)) == (
            "input_ids: got a batch of 2, expected 1 as in the cache. Reset the session to "
            "start new sequences."
        )
        with pytest.raises(InputError, match="got a batch of 2, expected 1 as in the cache"):
            session.step(np.zeros((2, 1), np.int64), np.ones((2, 12), np.int64))
        assert message(session, IDS[:, :2], np.ones((1, 5), np.int64)) == (
            "attention_mask: got shape [1, 5], expected [1, 2] or [1, 13]. Reset the session to "
            "start new sequences."
        )
        assert message(session, np.zeros((1, 246), np.int64)) == (
            "input_ids: got a context of 257 tokens, expected at most 256. Give less text, or "
            "reset the session."
        )
        assert session.length == 11


def test_unknown_kind() -> None:
    with pytest.raises(InputError) as caught:
        open_session("tpu", Path("nowhere"))
    assert (
        str(caught.value)
        == "--runner: got 'tpu', expected torch, native, onnxruntime, tensorrt. Choose one of these."
    )


def test_torch_session_shows_layers_and_cache(tiny_export: Callable[..., Path]) -> None:
    from calibration.reference.model import quantised_model

    session = TorchSession(
        quantised_model(read_quant(tiny_export(abits=8, dtype="float32") / "quant"))
    )
    outputs = session.step(IDS, np.ones_like(IDS))
    assert sorted(outputs) == sorted(
        [
            "logits",
            *(f"model.layers.{i}.output" for i in range(2)),
            *(f"present.{i}.{kind}" for i in range(2) for kind in ("key", "value")),
        ]
    )
    assert outputs["model.layers.1.output"].shape == (1, 11, 64) and outputs[
        "present.0.key"
    ].shape == (1, 2, 11, 16)
