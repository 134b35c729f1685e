"""A proof that is gone on with: what is done is not done again, and what it says is what an undisturbed
one says.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import ml_dtypes
import numpy as np
import pytest

from calibration.out.pieces import Pieces
from calibration.progress import NullProgress
from exporter.proof.metrics import TensorError
from exporter.proof.options import ValidateOptions
from exporter.proof.perplexity import EvalRequest
from exporter.proof.prove import prove
from exporter.proof.result import ValidationResult
from exporter.proof.saved import SavedResults
from exporter.proof.validate import _Parts, _run

LEVELS = ["weights", "bodies", "native", "users", "reference", "float", "loss"]
LEVELS += ["perplexity 0", "perplexity 1", "quality"]


class Told(NullProgress):
    """Keeps the warnings."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warning(self, text: str) -> None:
        self.warnings.append(text)


@dataclass(frozen=True)
class Mixed:
    """Types of results."""

    arrays: list[dict[str, np.ndarray]]
    errors: dict[tuple[str, str], TensorError]
    number: float | None


def _mixed() -> Mixed:
    rng = np.random.default_rng(0)
    types = (np.float16, np.float32, np.int64, np.int8, bool, ml_dtypes.bfloat16)
    arrays = {str(np.dtype(kind)): rng.integers(0, 2, (2, 3, 4)).astype(kind) for kind in types}
    channels = rng.standard_normal(3)
    error = TensorError(3, np.inf, np.nan, np.float64(1 / 3), 0, channels, channels, True, 2.0)
    return Mixed(
        [{**arrays, "none": np.zeros((0, 4), np.float32)}, {"turned": arrays["float32"].T}],
        {("a", "b"): error},
        None,
    )


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, np.ndarray):
        return (one.dtype, one.shape, one.tobytes()) == (other.dtype, other.shape, other.tobytes())
    if isinstance(one, dict):
        return list(one) == list(other) and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    if hasattr(one, "__dataclass_fields__"):
        return type(one) is type(other) and _same(vars(one), vars(other))
    return bool(one == other or (one != one and other != other))


def test_results_come_back_as_they_were(tmp_path: Path) -> None:
    def saved(fingerprint: str = "print", keep: bool = True) -> SavedResults:
        return SavedResults(Pieces(tmp_path / "work", fingerprint, keep))

    assert _same(saved().once("a", Mixed, _mixed), _mixed())
    assert _same(saved().once("a", Mixed, pytest.fail), _mixed())
    assert saved().once("a", Mixed, lambda: replace(_mixed(), number=1.0), made_of="x").number == 1
    assert saved().once("a", Mixed, pytest.fail, made_of="x").number == 1
    path = tmp_path / "work" / "a.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert saved().once("a", float, lambda: 0.5, made_of="x") == 0.5
    assert saved("another").once("a", float, lambda: 0.25) == 0.25
    assert saved("another", keep=False).once("a", float, lambda: 0.75) == 0.75


def test_a_full_disk_is_told_of_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = Told()
    saved = SavedResults(Pieces(tmp_path / "work", "print"), told)
    saved.once("a", float, lambda: 1.0)

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("exporter.proof.saved.SafetensorsWriter.write", full)
        assert [saved.once(name, float, lambda: 2.0) for name in "bc"] == [2, 2]
    assert told.warnings == [
        f"{tmp_path / 'work' / 'b.safetensors'}: got No space left on device while writing. The proof "
        "goes on; should it be interrupted, --resume begins here."
    ]
    left = sorted(path.name for path in (tmp_path / "work").iterdir())
    assert left == ["a.safetensors", "state.json"]


class Asked(SavedResults):
    """Has every level, and keeps what each was said to be made of."""

    def __init__(self, bodies: str = "") -> None:
        super().__init__()
        self.bodies, self.made_of = bodies, dict[str, str]()

    def once(
        self, name: str, kind: Any, work: Callable[[], Any], steps: int = 1, made_of: str = ""
    ) -> Any:
        self.made_of[name] = made_of
        return [], None

    def digest(self, name: str) -> str:
        return self.bodies


def test_a_level_depends_on_what_takes_part_and_on_the_calls() -> None:
    proof: Any = SimpleNamespace(
        scope=SimpleNamespace(steps=1), apart=pytest.fail, add=lambda found: None
    )
    parts = _Parts(Path("library"), None, None, [], None, True, None)

    def levels(parts: _Parts = parts, folded: bool = False, bodies: str = "") -> dict[str, str]:
        saved = Asked(bodies)
        _run(proof, parts, folded, saved)
        return saved.made_of

    plain, floats = levels(), replace(parts, floats=cast(Any, object()))
    assert list(plain) == ["bodies", "native", "users", "reference"] and plain == levels()
    for other in (levels(folded=True), levels(floats), levels(replace(parts, library=None))):
        assert all(other[name] != made_of for name, made_of in plain.items() if name in other)
    calls = levels(bodies="another record")
    assert calls.pop("bodies") == plain.pop("bodies")
    assert calls.keys() == plain.keys() and not {*calls.values()} & {*plain.values()}


@pytest.mark.slow
def test_a_proof_that_is_stopped_goes_on(
    tiny_export: Callable[..., Path],
    tiny_model_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out, once = tiny_export(), SavedResults.once
    text = tmp_path / "text.txt"
    text.write_text("The river runs to the sea. " * 20)
    scored = EvalRequest(text, seqlen=16, first=2)
    options = ValidateOptions(tokens=8, steps=1, model=str(tiny_model_dir))

    def proven(saved: SavedResults | None) -> tuple[ValidationResult, dict[str, Any]]:
        result, data = prove(out, {}, options, scored, NullProgress(), saved)
        for timed in (result.facts, data["validation"], data["perplexity"]):
            del timed["seconds"]
        return result, data

    worked: list[str] = []

    def stop_behind_some(
        self: SavedResults, name: str, kind: Any, work: Callable[[], Any], *rest: Any, **named: Any
    ) -> Any:
        def told() -> Any:
            worked.append(name)
            return work()

        before = len(worked)
        result = once(self, name, kind, told, *rest, **named)
        if len(worked) > before and name in ("users", "perplexity 0"):
            raise KeyboardInterrupt
        return result

    with monkeypatch.context() as patch:
        patch.setattr(SavedResults, "once", stop_behind_some)
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                proven(SavedResults(Pieces(tmp_path / "work", "print")))
        again = proven(SavedResults(Pieces(tmp_path / "work", "print")))
    assert worked == LEVELS
    assert again == proven(None)
