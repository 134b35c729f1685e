"""The report's part on what each node costs, from the data of exporter.proof.attribution."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from exporter.report.chart import bar, escape, table

__all__ = ["attribution_section"]

_SHOWN = 20  # nodes in the open table


def attribution_section(found: Mapping[str, Any] | None) -> str:
    """HTML of an Attribution as plain JSON; "" where nothing was measured."""
    if found is None:
        return ""
    kl = float(found["found"]["kl"])

    def gain(means: Mapping[str, Any]) -> float:
        return kl - float(means["kl"])

    def lines(items: Mapping[str, Any], left: int = 0) -> list[tuple[str, list[str]]]:
        ranked = sorted(items.items(), key=lambda item: -gain(item[1]))
        most = max([gain(means) for means in items.values()] + [1e-12])
        return [
            (
                "",
                [
                    escape(name),
                    f"{means['kl']:.4f}",
                    f"{gain(means):+.4f}",
                    bar(gain(means) / most, f"{gain(means):.4f} nats"),
                ],
            )
            for name, means in ranked[: left or None]
        ]

    head = ["in floating point", "KL left", "gain", ""]
    layers = {
        f"layer {first}" if first == last else f"layers {first} to {last}": means
        for first, last, means in found["layers"]
    }
    nodes = found["nodes"]
    parts = [
        f'<section><h2>What each node costs</h2><p class="soft">KL divergence of the next token from '
        f"the float model, in nats, on {found['windows']} windows of {found['seqlen']} tokens of "
        f"{escape(found['text'])}: {kl:.4f} of the model as it is, perplexity "
        f"{found['found']['ppl']:.3f} beside {found['float_ppl']:.3f}. What it gains where a part goes "
        "back to floating point while the rest stays; gains of several need not add up.</p>",
        table(head, lines(found["parts"]), "parts"),
    ]
    if nodes:
        parts.append(f"<h3>Nodes</h3>{table(head, lines(nodes, _SHOWN), 'nodes')}")
    if found["nodes_left"]:
        why = "where ranges of layers gain little" if found["finished"] else "for want of time"
        parts.append(
            f'<p class="soft">{found["nodes_left"]} nodes were not measured by themselves, {why}.</p>'
        )
    if len(nodes) > _SHOWN:
        parts.append(
            f"<details><summary>Every measured node</summary>{table(head, lines(nodes), 'all nodes')}"
            "</details>"
        )
    parts.append(
        f"<details><summary>Ranges of layers</summary>{table(head, lines(layers), 'layers')}</details>"
    )
    if (plan := found["plan"]) is not None:
        rules = "\n".join(map(escape, plan["lines"]))
        parts.append(
            f"<h3>Bits that would buy the most</h3><p>{plan['bits_before']:.2f} bits per weight become "
            f"{plan['bits_after']:.2f}; expected KL {plan['expected']:.4f}, found "
            f"<b>{plan['found']['kl']:.4f}</b>, perplexity {plan['found']['ppl']:.3f}, with these nodes "
            f"quantized anew. Lines for --bits-file, behind those there are:</p><pre>{rules}</pre>"
        )
    return "".join([*parts, "</section>"])
