"""Writes report.json and index.html: what was made, how exact it is, what it cost, and what was not
run.
"""

from __future__ import annotations

import platform
import shlex
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calibration.out.files import write_json
from calibration.out.fingerprint import digest
from calibration.out.json_file import read_json
from calibration.out.layout import ATTRIBUTION, ENGINE, HTML_FILE, JSON_FILE, QUANT, REPORT
from calibration.quant.scheme import FLOAT_BITS
from calibration.quant.sizes import node_weights
from exporter.engine.edition import gpu_capabilities
from exporter.engine.record import read_engine_record
from exporter.graph.names import layer_of
from exporter.report.html import page
from exporter.report.quality import loses
from plugins.errors import InputError

if TYPE_CHECKING:
    from calibration.quant.folder import QuantModel
    from exporter.proof.result import ValidationResult

__all__ = ["report_data", "write_report"]


def report_data(out: Path, manifest: Mapping[str, Any], result: ValidationResult) -> dict[str, Any]:
    """Gather everything the report shows, as plain JSON.

    Args:
        out: the artefact folder.
        manifest: of the stages so far; "perplexity" and "quality" in it are shown.
        result: from exporter.proof.validate.
    """
    from calibration.quant.folder import read_quant

    quant = read_quant(out / QUANT, verify=False)
    engine = read_engine_record(out / ENGINE) if ENGINE in manifest.get("stages", {}) else None
    stages = [
        {
            "name": name,
            "seconds": record["seconds"],
            "peak_rss": record["peak_rss"],
            "bytes": sum(file["bytes"] for file in record["files"].values()),
        }
        for name, record in manifest.get("stages", {}).items()
        if name != REPORT
    ]  # an older report's record says nothing about this one
    validation = result.as_dict()
    return {
        "format": 1,
        "model": quant.source["name"],
        "source": quant.source,
        "label": quant.label,
        "scheme": quant.scheme.as_dict(),
        "mixed": _mixed(quant),
        "head": None if quant.head is None else quant.head.label,
        "shape": {key: value for key, value in quant.config.items() if key != "hf"},
        "sizes": quant.sizes,
        "request": dict(manifest.get("request", {})),
        "command": shlex.join(manifest.get("command", [])),
        "stages": stages,
        "engine": engine,
        "validation": validation,
        "calibration": quant.calibration,
        "perplexity": manifest.get("perplexity"),
        "quality": manifest.get("quality"),
        "attribution": _attribution(out, quant),
        "next": _next_commands(out, result, manifest.get("quality"), engine is not None),
        "environment": environment(manifest.get("versions", {})),
    }


def _attribution(out: Path, quant: QuantModel) -> dict[str, Any] | None:
    """What python -m deploy attribute found of this very quantized model."""
    with suppress(InputError):  # it was not run, or its record is damaged
        record = read_json(out / ATTRIBUTION)
        if record.get("quant") == digest(quant.files) and (found := record.get("found")):
            return dict(found)
    return None


def _next_commands(
    out: Path, result: ValidationResult, quality: Mapping[str, Any] | None, has_engine: bool
) -> list[tuple[str, str]]:
    """(command, what it does) of what comes after this report."""

    def deploy(command: str, *options: str) -> str:
        return shlex.join(["python", "-m", "deploy", command, str(out), *options])

    if not result.ok:
        layers = [layer_of(row.tensor) for row in result.rows if not row.ok]
        layer = next((layer for layer in layers if layer is not None), None)
        near = () if layer is None else ("--layers", f"{layer}:{layer + 1}")
        again = deploy("prove", *near, "--to", f"{out}-proof")
        return [(again, "Look at the first bad layer alone")]
    found = [
        (deploy("generate", "--prompt", "Once upon a time"), "Let it write"),
        (deploy("eval", "--text", "FILE"), "Score a text of yours"),
        (deploy("prove", "--text", "FILE", "--to", f"{out}-proof"), "Prove it on another text"),
    ]
    if loses(quality):
        found.append((deploy("attribute", "--minutes", "10"), "See which nodes cost the quality"))
    if has_engine:
        found.append((deploy("trtexec"), "Time the engine with NVIDIA's own tool"))
    return found


def _mixed(quant: QuantModel) -> dict[str, Any] | None:
    """Which node has which bits, and each scheme's share; None where all have one scheme."""
    products, dtype = quant.decoder.products.values(), quant.scheme.dtype
    floats = [site.linears for site in products if site.linears.floats]
    if not quant.exceptions and not floats:
        return None
    weights = quant.weights()
    nodes = Counter(map(quant.scheme_of, quant.decoder.nodes))
    layers = [
        {
            node: dtype if site.linears.floats else quant.scheme_of(block.name(node)).label
            for node, site in block.sites.items()
        }
        for block in quant.decoder.blocks
    ]
    schemes = [
        {
            **scheme.as_dict(),
            "label": scheme.label,
            "nodes": nodes[scheme],
            "weights": weights[scheme],
        }
        for scheme in nodes
    ]
    if floats:
        kind = {"label": dtype, "op": "MatMul", "abits": FLOAT_BITS, "dtype": dtype}
        size = sum(map(node_weights, floats))
        schemes.append({**kind, "nodes": len(floats), "weights": size})
    return {
        "exceptions": len(quant.exceptions) + len(floats),
        "nodes": nodes.total() + len(floats),
        "schemes": schemes,
        "layers": layers,
    }


def environment(versions: Mapping[str, str]) -> dict[str, Any]:
    """This machine: system, processor, GPU, versions."""
    gpus = gpu_capabilities()
    gpu = ", ".join(f"compute capability {item}" for item in gpus) if gpus else "no GPU"
    return {
        "system": f"{platform.system()} {platform.release()}",
        "cpu": _cpu_name(),
        "gpu": gpu,
        "versions": dict(versions),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]} ({len(names)} threads)" if names else platform.machine()


def write_report(folder: Path, data: Mapping[str, Any]) -> None:
    """Write JSON_FILE and HTML_FILE, which needs no network, into `folder`."""
    write_json(folder / JSON_FILE, dict(data))
    (folder / HTML_FILE).write_text(page(data), encoding="utf-8")
