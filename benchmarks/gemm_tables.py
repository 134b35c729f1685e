"""Tables of benchmarks/gemm.py's rows: speed-ups against their targets, and the rows of
plugins/core/host/measured.inc.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.gemm_cases import SCHEMES, TARGET_SHAPE, Scheme

__all__ = ["measured_rows", "merged_table", "target_table"]

_TABLE_HEADER = (
    "// Rows of kMeasured (core/host/measured.h): python -m benchmarks.gemm --tactics --table FILE"
)


def target_table(
    rows: Sequence[dict[str, Any]], schemes: Sequence[Scheme] = SCHEMES, tokens: Sequence[int] = ()
) -> tuple[str, int]:
    """Speed-up over fp16 at the target shape, against the targets; and how many of those were
    missed, or not measured.

    Args:
        tokens: for which the targets of `schemes` were to be measured.
    """
    lines, missed = [f"{TARGET_SHAPE}: speed-up over fp16 (target)"], 0
    for scheme in schemes:
        mine = [
            row
            for row in rows
            if row["shape"] == TARGET_SHAPE and row["scheme"] == scheme.name and row.get("chosen")
        ]
        cells = []
        for row in mine:
            target = scheme.target(row["m"])
            short = target is not None and row["speedup"] < target
            missed += short
            cells.append(
                f"M={row['m']}: {row['speedup']:.2f}"
                + (f" ({target}{' MISSED' if short else ''})" if target else "")
            )
        if cells:
            lines.append(f"{scheme.name:<12} " + "  ".join(cells))
    measured = {
        (row["scheme"], row["m"])
        for row in rows
        if row["shape"] == TARGET_SHAPE and row.get("chosen")
    }
    wanted = {
        (scheme.name, m) for scheme in schemes for m in tokens if scheme.target(m) is not None
    }
    if absent := wanted - measured:
        lines.append(f"NOT MEASURED: {len(absent)} of {len(wanted)} targets")
    return "\n".join(lines), missed + len(absent)


def measured_rows(result: dict[str, Any], schemes: Sequence[Scheme]) -> list[str]:
    """Rows of plugins/core/host/measured.inc: for each scheme, shape and number of tokens the
    tactic with the smallest median.

    A case of which not every kernel was timed gets none: another might have been faster.
    """
    lines, gpu = [], f"{result['capability'].replace('.', '')}, {result['multiprocessors']}"
    for scheme in schemes:
        best: dict[tuple[int, int, int], dict[str, Any]] = {}
        for row in result["rows"]:
            if row["scheme"] != scheme.name or not row.get("complete"):
                continue
            place = row["n"], row["k"], row["m"]
            margin = (
                0.98 if row.get("other_shares") else 1
            )  # other shares than the usual must be worth it
            if place not in best or row["median"] < margin * best[place]["median"]:
                best[place] = row
        for (n, k, m), row in sorted(best.items()):
            numbers = ", ".join(
                map(str, (scheme.wbits, scheme.levels, scheme.abits, scheme.group_size, n, k, m))
            )
            lines.append(
                f'{{{gpu}, "{scheme.op}", {numbers}, "{row["kernel"]}", {row["tactic"] % 64}}},'
                f"  // {result['device']}, {result['date']}"
            )
    return lines


def merged_table(old: str, rows: Sequence[str]) -> str:
    """The table `old` with `rows` in place of those for the same GPU, weights and tokens; what was
    measured elsewhere stays.
    """
    known = [line for line in old.splitlines() if line.startswith("{")]
    merged = {
        line.partition("  //")[0].rsplit(", ", 2)[0]: line for line in [*known, *rows]
    }  # by all but kernel and shares
    return "\n".join([_TABLE_HEADER, *merged.values()]) + "\n"
