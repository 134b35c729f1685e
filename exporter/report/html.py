"""The report's page: sections of plain HTML from the report's data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from calibration.quant.scheme import FLOAT_BITS
from exporter.report.attribution import attribution_section
from exporter.report.calibration import calibration_section
from exporter.report.chart import Chart, Series, bar, escape, line_chart, table
from exporter.report.quality import quality_section, verdicts
from exporter.report.style import STYLE

__all__ = ["page"]

Data = Mapping[str, Any]
_MOST_DB = 60  # upper edge of the chart of signal to noise ratios
_LEVELS = {
    "weights": "Weights: the tensors in quant/ against the float model's",
    "export": "Export: ONNX Runtime against the fake-quantised torch reference",
    "native": "Native: the CPU kernels against the function bodies",
    "as run": "As run: the ONNX file as users run it against the rounded graph",
    "kernel": "Kernel: the TensorRT engine against ONNX Runtime",
    "engine": "Engine: TensorRT with inner tensors as outputs, layer by layer",
    "against": "Against: another artifact against this one, both in ONNX Runtime",
    "quantisation": "Quantisation: the fake-quantised torch reference against the float model",
}
_STYLES = {
    ("export", "prefill"): "a",
    ("export", "decode"): "b",
    ("quantisation", "prefill"): "c",
    ("quantisation", "decode"): "d",
}


def page(data: Data) -> str:
    """The whole document."""
    title = f"{data['model']} {data['label']}"
    parts = (
        _header(data),
        verdicts(data, _export_facts(data)),
        _tiles(data),
        quality_section(data),
        attribution_section(data.get("attribution")),
        _operators(data),
        _accumulated(data),
        _costs(data),
        _bits(data),
        calibration_section(data.get("calibration", {})),
        _made(data),
        _tables(data),
        _environment(data),
        _next(data),
        "<footer>anybit-trt; the numbers are in report.json.</footer>",
    )
    body = "\n".join(part for part in parts if part)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}: export "
        f"report</title><style>{STYLE}</style></head>\n<body><main>\n{body}\n</main></body></html>\n"
    )


# ---------------------------------------------------------------- top


def _header(data: Data) -> str:
    scheme = data["scheme"]
    mixed = data["mixed"]
    differ = (
        f"Mixed, {data['sizes']['bits_per_weight']:.1f} bits per weight on average, scales "
        f"included: {mixed['exceptions']} of "
        f"{mixed['nodes']} GEMM nodes differ from "
        if mixed
        else ""
    )
    weights = f"{scheme['wbits']}-bit{' balanced' if scheme['balanced'] else ''} weights"
    acts = (
        f"{scheme['dtype']} activations"
        if scheme["abits"] == 16
        else f"{scheme['abits']}-bit activations"
    )
    groups = (
        f"groups of {scheme['group_size']}"
        if scheme["group_size"]
        else "one scale per output channel"
    )
    groups += f", {scheme['kv_bits']}-bit KV cache" if scheme["kv_bits"] < FLOAT_BITS else ""
    return (
        f"<header><h1>{escape(data['model'])}</h1>"
        f'<p class="soft">{differ}{weights}, {acts}, {groups}; {escape(scheme["op"])}, method '
        f"{escape(scheme['method'])}.</p></header>"
    )


def _tiles(data: Data) -> str:
    sizes, engine = data["sizes"], data["engine"]
    before, after = sizes["model_float_bytes"], sizes["model_quant_bytes"]
    tiles = [
        (
            f"{sizes['bits_per_weight']:.2f}",
            "bits per weight",
            f"linear layers{' and head' if data['head'] else ''}, scales included",
        ),
        (
            f"{after / 1e6:.0f} MB",
            "model",
            f"{before / 1e6:.0f} MB before, {before / after:.2f}× smaller",
        ),
    ]
    if engine:
        nodes = sum(engine["custom_nodes"].values())
        tiles.append(
            (
                str(engine["layers"].get("PLUGIN_V3", 0)),
                "plugin layers in the engine",
                f"for {nodes} custom nodes",
            )
        )
    return (
        '<div class="tiles">'
        + "".join(
            f'<div class="tile"><small>{name}</small><b>{value}</b><small>{note}</small></div>'
            for value, name, note in tiles
        )
        + "</div>"
    )


def _export_facts(data: Data) -> list[tuple[str, str]]:
    """Numbers of the export's verdict."""
    facts = []
    rows = [row for row in data["validation"]["rows"] if row["level"] == "export"]
    if shares := [share for row in rows if (share := _share(row)) is not None]:
        worst = f"{max(shares):.0%}" if max(shares) < 10 else f"{max(shares):.0f}×"
        facts.append((worst, "of its limit, the worst operator"))
    if agreements := [row["agreement"] for row in rows if row["agreement"] is not None]:
        same = f"{agreements[0]:.0%}"
        facts.append((same, "same next token, ONNX Runtime and torch reference"))
    return facts


# ---------------------------------------------------------------- charts


def _rows(data: Data, level: str, phase: str) -> list[Data]:
    return [
        row for row in data["validation"]["rows"] if row["level"] == level and row["phase"] == phase
    ]


def _share(row: Data) -> float | None:
    """Error of a row's worst operator in units of its limit."""
    error = row["operator_error"]
    return error / row["operator_limit"] if row["operator_limit"] and error is not None else None


def _labels(rows: Sequence[Data]) -> list[str]:
    return [
        next((part for part in row["tensor"].split(".") if part.isdigit()), row["tensor"])
        for row in rows
    ]


def _operators(data: Data) -> str:
    phases = [
        (phase, rows) for phase in ("prefill", "decode") if (rows := _rows(data, "export", phase))
    ]
    if not phases:
        return ""
    series = [
        Series(
            f"{phase}, worst operator of the layer",
            _STYLES["export", phase],
            [_share(row) for row in rows],
        )
        for phase, rows in phases
    ]
    rows = phases[0][1]
    series.append(Series("limit", "limit", [1.0] * len(rows)))
    chart = Chart(
        "Error each layer makes by itself",
        "Error of the worst operator of every layer, in units of its limit, when it is given "
        "exactly the inputs that ONNX Runtime gave it; lower is better, 1 is the limit.",
        "error / limit",
        _labels(rows),
        log=True,
    )
    return (
        f'<section><h2>{chart.title}</h2><p class="soft">Every operator of the torch reference '
        f"is given the very tensors that ONNX "
        "Runtime computed before it, so errors do not add up: a wrong scale, zero point or "
        "packed weight stands out at its own layer."
        f"</p>{line_chart(chart, series, 'operators')}</section>"
    )


def _drawn(snr_db: float | None) -> float | None:
    """Tensors that are equal would squeeze all others into the lowest part of the chart."""
    return None if snr_db is None else min(snr_db, _MOST_DB)


def _accumulated(data: Data) -> str:
    found = [
        (level, phase, rows) for level, phase in _STYLES if (rows := _rows(data, level, phase))
    ]
    if not found:
        return ""
    names = {
        "export": "ONNX against fake-quantised",
        "quantisation": "fake-quantised against float",
    }
    series = [
        Series(
            f"{names[level]}, {phase}",
            _STYLES[level, phase],
            [_drawn(row["snr_db"]) for row in rows],
        )
        for level, phase, rows in found
    ]
    chart = Chart(
        "Signal to noise ratio through the model",
        "Signal to noise ratio in decibels after every decoder layer and of the "
        "logits; higher is better. Against float it shows the cost of the bit widths, else that "
        "of running in ONNX Runtime. "
        f"{_MOST_DB} dB stands for more, up to equal tensors.",
        "SNR in dB",
        _labels(found[0][2]),
    )
    return (
        f'<section><h2>{chart.title}</h2><p class="soft">Each side runs on its own numbers, so '
        f"errors add up. 20 dB is an error of "
        f"10 %; {_MOST_DB} dB stands for more, up to equal tensors. Honest runs can drift "
        f"apart, since a last-bit difference can move "
        "an activation code by one step.</p>"
        f"{line_chart(chart, series, 'snr')}</section>"
    )


# ---------------------------------------------------------------- lists and tables


def _list(pairs: Iterable[tuple[str, Any]]) -> str:
    return (
        "<dl>"
        + "".join(f"<dt>{escape(name)}</dt><dd>{escape(str(value))}</dd>" for name, value in pairs)
        + "</dl>"
    )


def _costs(data: Data) -> str:
    sizes, stages = data["sizes"], [*data["stages"]]
    rows = [
        ("linear layers", sizes["linear_float_bytes"], sizes["linear_quant_bits"] / 8),
        ("embedding, norms, head", sizes["rest_bytes"], sizes["rest_bytes"]),
        ("whole model", sizes["model_float_bytes"], sizes["model_quant_bytes"]),
    ]
    size = table(
        ["", "before, MB", "after, MB", "left"],
        [
            (
                "",
                [
                    name,
                    f"{before / 1e6:.1f}",
                    f"{after / 1e6:.1f}",
                    bar(after / before, f"{after / before:.0%} left"),
                ],
            )
            for name, before, after in rows
        ],
        "sizes",
    )
    longest = max(
        [stage["seconds"] for stage in stages] + [data["validation"].get("seconds", 0), 1e-9]
    )
    lines = [
        (
            "",
            [
                escape(stage["name"]),
                f"{stage['seconds']:.1f}",
                bar(stage["seconds"] / longest, f"{stage['seconds']:.1f} seconds"),
                f"{stage['peak_rss'] / 1e6:.0f}",
                f"{stage['bytes'] / 1e6:.1f}",
            ],
        )
        for stage in stages
    ]
    if "seconds" in data["validation"]:
        seconds = data["validation"]["seconds"]
        lines.append(
            (
                "",
                [
                    "validation",
                    f"{seconds:.1f}",
                    bar(seconds / longest, f"{seconds:.1f} seconds"),
                    "",
                    "",
                ],
            )
        )
    time = table(["stage", "seconds", "", "peak MB", "files, MB"], lines, "stages")
    return (
        f'<div class="two"><section><h2>Size</h2><p class="soft">Before in '
        f"{escape(data['scheme']['dtype'])}; after with scales and "
        f'zero points.</p>{size}</section><section><h2>Stages</h2><p class="soft">Wall time and '
        f"peak resident memory.</p>{time}"
        "</section></div>"
    )


def _activations(scheme: Data) -> str:
    if scheme["abits"] == 16:
        return str(scheme["dtype"])
    return f"{scheme['abits']} bits, {'symmetric' if scheme['act_symmetric'] else 'asymmetric'} per token"


def _cache(scheme: Data) -> str:
    return (
        str(scheme["dtype"])
        if scheme["kv_bits"] == FLOAT_BITS
        else f"{scheme['kv_bits']} bits, asymmetric per token and head"
    )


def _bits(data: Data) -> str:
    """Mixed precision: what each scheme holds, and the bits of every node."""
    mixed = data["mixed"]
    if mixed is None:
        return ""
    total = sum(scheme["weights"] for scheme in mixed["schemes"])
    rows = [
        (
            "",
            [
                escape(scheme["label"]),
                escape(scheme["op"]),
                escape(_activations(scheme)),
                str(scheme["nodes"]),
                f"{scheme['weights'] / 1e6:.2f}",
                bar(share := scheme["weights"] / total, f"{share:.0%} of the weights"),
            ],
        )
        for scheme in mixed["schemes"]
    ]
    shares = table(
        ["bits", "operator", "activations", "nodes", "weights, M", "share"], rows, "bits"
    )
    grid = table(
        ["layer", *map(escape, mixed["layers"][0])],
        [
            ("", [str(index), *map(escape, labels.values())])
            for index, labels in enumerate(mixed["layers"])
        ],
        "bits by layer",
    )
    return (
        f"<section><h2>Bits</h2>{shares}<details><summary>Layer by "
        f"layer</summary>{grid}</details></section>"
    )


def _head(data: Data) -> str:
    """Its bits, and what calibration measured them to cost."""
    kept, measured = data["head"], data.get("calibration", {}).get("head")
    now = kept or data["scheme"]["dtype"]
    if measured is None or None in measured.values():
        return str(now)
    loss = measured["loss_quantized"] - measured["loss_float"]
    cost = (
        f"{measured['rise']:+.2%} perplexity by KL divergence on {measured['tokens']} calibration "
        f"tokens (their loss {loss:+.4f}, standard error {measured['loss_error']:.4f})"
    )
    return f"{now}, {cost}" if kept else f"{now}, since {measured['bits']} would cost {cost}"


def _calibration(data: Data) -> str:
    kept = data.get("calibration", {}).get("kept")
    if kept:
        return f"none: the codes are those of the {kept} checkpoint"
    return str(data["request"].get("calib", "default"))


def _made(data: Data) -> str:
    scheme, request, shape, engine = data["scheme"], data["request"], data["shape"], data["engine"]
    others = (
        [
            (
                "mixed precision",
                f"{data['mixed']['exceptions']} nodes differ from the following, see Bits",
            )
        ]
        if data["mixed"]
        else []
    )
    settings = [
        ("model", request.get("model", data["model"])),
        ("fingerprint", data["source"]["fingerprint"][:16]),
        *others,
        ("method", scheme["method"]),
        ("operator", scheme["op"]),
        ("weights", f"{scheme['wbits']} bits" + (" balanced" if scheme["balanced"] else "")),
        ("activations", _activations(scheme)),
        ("group size", scheme["group_size"] or "one group per output channel"),
        ("KV cache", _cache(scheme)),
        ("head", _head(data)),
        ("type of the rest", scheme["dtype"]),
        (
            "decoder",
            f"{shape['num_hidden_layers']} layers, width {shape['hidden_size']}, "
            f"{shape['num_attention_heads']} heads "
            f"({shape['num_key_value_heads']} key-value), vocabulary {shape['vocab_size']}",
        ),
        ("calibration", _calibration(data)),
    ]
    left = f"<section><h2>Settings</h2>{_list(settings)}</section>"
    if engine is None:
        return (
            f'<div class="two">{left}<section><h2>Engine</h2><p class="soft">No engine was '
            f"built.</p></section></div>"
        )
    profiles = [
        (
            f"profile {profile['name']}",
            "; ".join(
                f"{name} {limits['min']} to {limits['max']}"
                for name, limits in profile["inputs"].items()
                if name in ("input_ids", "past_key_values.0.key")
            ),
        )
        for profile in engine["profiles"]
    ]
    layers = ", ".join(
        f"{count} {name}"
        for name, count in sorted(engine["layers"].items(), key=lambda item: -item[1])[:6]
    )
    facts = [
        ("edition", f"{engine['edition']} {engine['version']}"),
        ("size", f"{engine['bytes'] / 1e6:.1f} MB"),
        ("parse and build", f"{engine['parse_seconds']:.1f} s and {engine['build_seconds']:.1f} s"),
        (
            "plugin layers",
            f"{engine['layers'].get('PLUGIN_V3', 0)} PLUGIN_V3 for "
            f"{sum(engine['custom_nodes'].values())} custom nodes ("
            + ", ".join(f"{count} {name}" for name, count in engine["custom_nodes"].items())
            + ")",
        ),
        ("network", layers),
        *profiles,
    ]
    return f'<div class="two">{left}<section><h2>Engine</h2>{_list(facts)}</section></div>'


def _value(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


_WORST = {
    "export": ["worst operator", "its error", "its limit"],
    "native": ["worst operator", "its error", "its limit"],
    "as run": ["worst operator", "its error", "its limit"],
    "engine": ["worst operator", "its error", "its limit"],
    "weights": ["worst row", "its error", "its limit"],
}


def _cells(row: Data) -> list[str]:
    snr = "equal" if row["relative"] == 0 else _value(row["snr_db"], ".1f")
    cells = [
        escape(row["tensor"]),
        _value(row["cosine"], ".6f"),
        snr,
        _value(row["max_abs"], ".3g"),
        _value(row["relative"], ".2e"),
        _value(row["limit"], ".2e"),
    ]
    if row["level"] in _WORST:
        cells += [
            escape(row["operator"]),
            _value(row["operator_error"], ".1e"),
            _value(row["operator_limit"], ".1e"),
        ]
    return cells


def _tables(data: Data) -> str:
    parts: list[str] = []
    for level, words in _LEVELS.items():
        phases = dict.fromkeys(
            row["phase"] for row in data["validation"]["rows"] if row["level"] == level
        )
        for phase in phases:
            rows = _rows(data, level, phase)
            head = [
                "tensor",
                "cosine",
                "SNR dB",
                "max |error|",
                "relative",
                "limit",
                *_WORST.get(level, []),
            ]
            lines = [("" if row["ok"] else "bad", _cells(row)) for row in rows]
            remark = next(
                (
                    f"Same next token: {row['agreement']:.1%}."
                    for row in rows
                    if row["agreement"] is not None
                ),
                "",
            )
            remark = _weights_remark(rows) if level == "weights" else remark
            first = level == "export" and not any("<details open" in part for part in parts)
            opened = " open" if first or any(not row["ok"] for row in rows) else ""
            title = ", ".join(word for word in (words, phase) if word)
            parts.append(
                f'<details{opened}><summary>{escape(title)}</summary><p class="soft">{remark}</p>'
                f"{table(head, lines, ', '.join(word for word in (level, phase) if word))}</details>"
            )
    return (
        '<section class="long"><h2>Layer by layer</h2><p class="soft">Cosine and SNR are taken '
        "token by token in fp64. A dash as the "
        "limit means that any accumulated error may be honest at these bit widths, or where "
        "experts are chosen anew; where a worst operator is shown with a limit, it is judged.</p>"
        f"{''.join(parts)}</section>"
    )


def _weights_remark(rows: Sequence[Data]) -> str:
    if any(row["limit"] is not None for row in rows):
        return (
            "Relative Frobenius errors of whole tensors and of their worst rows. The limit is "
            "half a step of the float weights' own "
            "range, for weights that are not quantised their rounding."
        )
    return "This method may transform the weights, so their errors are shown and not judged."


def _environment(data: Data) -> str:
    machine, validation = data["environment"], data["validation"]
    notes = "".join(f"<li>{escape(note)}</li>" for note in validation["notes"])
    not_run = f'<h3>Not run</h3><ul class="notes">{notes}</ul>' if notes else ""
    pairs = [
        ("processor", machine["cpu"]),
        ("GPU", machine["gpu"]),
        ("system", machine["system"]),
        (
            "versions",
            ", ".join(f"{name} {version}" for name, version in machine["versions"].items()),
        ),
        (
            "text",
            f"{validation.get('text', '')}, {validation.get('tokens', 0)} tokens and "
            f"{validation.get('steps', 0)} decode steps",
        ),
    ]
    command = f"<h3>Command</h3><pre>{escape(data['command'])}</pre>" if data["command"] else ""
    return f"<section><h2>Environment</h2>{_list(pairs)}{not_run}{command}</section>"


def _next(data: Data) -> str:
    """The commands that come next."""
    commands = "".join(
        f"<h3>{escape(what)}</h3><pre>{escape(command)}</pre>" for command, what in data["next"]
    )
    return f"<section><h2>Next</h2>{commands}</section>"
