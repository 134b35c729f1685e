"""What a validation found."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from exporter.proof.judge import LayerReport

__all__ = ["ValidationResult"]


@dataclass(frozen=True)
class ValidationResult:
    """What was measured.

    Attributes:
        rows: one per level, phase and layer, then the logits.
        first_failure: where the first error above its limit is, or "".
        notes: what could not be run, and why.
        warnings: what a user ought to know of an export that is within tolerance.
        facts: text, tokens, seconds, and what of a failed layer differs from quant/ in the ONNX file.
    """

    rows: tuple[LayerReport, ...]
    first_failure: str
    notes: tuple[str, ...]
    warnings: tuple[str, ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether everything is within tolerance."""
        return not self.first_failure

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON form."""
        rows = [asdict(row) | {"ok": row.ok} for row in self.rows]
        return {
            "ok": self.ok,
            "first_failure": self.first_failure,
            "notes": list(self.notes),
            "warnings": list(self.warnings),
            **self.facts,
            "rows": rows,
        }
