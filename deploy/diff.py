"""python -m deploy diff: what two artifacts have in common and what not, from settings to perplexity."""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calibration.out.layout import (
    DATA_FILE,
    JSON_FILE,
    MANIFEST,
    MODEL_FILE,
    ONNX,
    QUANT,
    REPORT,
)
from deploy.command import Command, add_progress
from plugins.cli import whole_number
from plugins.errors import CheckError, InputError

if TYPE_CHECKING:
    import numpy as np
    import onnx

    from calibration.progress import Progress
    from calibration.quant.folder import QuantModel

__all__ = ["COMMAND", "SECTIONS", "Difference", "differences", "text"]

_NOTHING = "nothing"
_LAYER = re.compile(r"\.(\d+)\.")  # in a name
_IGNORED = ("content",)  # of the request: fingerprints, which its other entries name


@dataclass(frozen=True)
class Difference:
    """One thing that is not the same.

    Attributes:
        name: what.
        first, second: how it is in either artifact, "nothing" where it is not there.
    """

    name: str
    first: str
    second: str


def _pairs(first: Mapping[str, Any], second: Mapping[str, Any]) -> Iterator[Difference]:
    """What differs in two mappings, by their keys in order."""
    for name in dict.fromkeys((*first, *second)):
        one, other = first.get(name), second.get(name)
        if one != other:
            yield Difference(name, _shown(one), _shown(other))


def _shown(value: Any) -> str:
    if value is None:
        return _NOTHING
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested mappings under dotted names."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _flat(item, f"{name}.{key}" if name else str(key))
    else:
        yield name, value


# ---------------------------------------------------------------- sections


def _settings(out: Path) -> dict[str, Any]:
    from calibration.out.manifest import read_manifest

    manifest = read_manifest(out / MANIFEST)
    request = {key: value for key, value in manifest["request"].items() if key not in _IGNORED}
    return dict(_flat(request)) | dict(_flat(manifest.get("versions", {}), "versions"))


def _same_settings(first: Path, second: Path) -> Iterator[Difference]:
    """What was asked for, and the versions of what made it."""
    yield from _pairs(_settings(first), _settings(second))


def _model(out: Path) -> onnx.ModelProto:
    import onnx

    from calibration.out.folder import open_stage

    path = open_stage(out, ONNX, "the comparison").file(MODEL_FILE)
    return onnx.load(path, load_external_data=False)


def _graph(model: onnx.ModelProto) -> dict[str, str]:
    """Everything of a graph but its weights: {what: its description}."""
    import onnx

    found = {f"opset {item.domain or 'ai.onnx'}": str(item.version) for item in model.opset_import}
    for kind, values in (("input", model.graph.input), ("output", model.graph.output)):
        for value in values:
            tensor = value.type.tensor_type
            dims = [dim.dim_param or str(dim.dim_value) for dim in tensor.shape.dim]
            dtype = onnx.TensorProto.DataType.Name(tensor.elem_type)
            found[f"{kind} {value.name}"] = f"{dtype}[{', '.join(dims)}]"
    for node in model.graph.node:
        name = node.name or next(iter(node.output), "")
        found[f"node {name}"] = _node(node)
    for function in model.functions:
        body = "; ".join(map(_node, function.node))
        found[f"function {function.domain}.{function.name}"] = body
    for tensor in model.graph.initializer:
        dtype = onnx.TensorProto.DataType.Name(tensor.data_type)
        found[f"initializer {tensor.name}"] = f"{dtype}{list(tensor.dims)}"
    return found


def _node(node: onnx.NodeProto) -> str:
    import onnx

    attributes = ", ".join(
        onnx.helper.printable_attribute(item) for item in sorted(node.attribute, key=_name)
    )
    op = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
    return f"{op}({', '.join(node.input)}) -> {', '.join(node.output)} {{{attributes}}}"


def _name(attribute: onnx.AttributeProto) -> str:
    return str(attribute.name)


def _same_graph(first: Path, second: Path) -> Iterator[Difference]:
    """Inputs, outputs, nodes, functions, and types and shapes of the weights."""
    yield from _pairs(_graph(_model(first)), _graph(_model(second)))


def _arrays(out: Path) -> dict[str, np.ndarray]:
    from calibration.out.folder import open_stage
    from exporter.proof.diagnose import initializers

    data = open_stage(out, ONNX, "the comparison").file(DATA_FILE)
    return initializers(data.parent, _model(out))


def _same_weights(first: Path, second: Path) -> Iterator[Difference]:
    """Every linear as it is dequantized, and every array of the ONNX file: the largest difference. Of
    weights in other coordinates nothing but that: their numbers have nothing to do with each other.
    """
    from exporter.proof.basis import basis_name
    from exporter.proof.diagnose import same_bytes

    quants = _quant(first), _quant(second)
    bases = [basis_name(quant) for quant in quants]
    if bases[0] != bases[1]:
        yield Difference("all, in other coordinates and not compared", *bases)
        return
    yield from _linears(*quants)
    one, other = _arrays(first), _arrays(second)
    for name in dict.fromkeys((*one, *other)):
        mine, theirs = one.get(name), other.get(name)
        if mine is None or theirs is None or mine.shape != theirs.shape:
            yield Difference(f"onnx {name}", *map(_kind, (mine, theirs)))
        elif not same_bytes(mine, theirs):
            yield Difference(f"onnx {name}", _kind(mine), _by(mine, theirs))


def _kind(array: np.ndarray | None) -> str:
    return _NOTHING if array is None else f"{array.dtype}{list(array.shape)}"


def _by(one: np.ndarray, other: np.ndarray) -> str:
    """How far two arrays of one shape are apart."""
    import numpy as np

    if one.dtype.kind in "iu":
        return f"{int(np.count_nonzero(one != other))} of {one.size} words differ"
    wide = one.astype(np.float32), other.astype(np.float32)
    return f"differs by at most {float(np.abs(wide[0] - wide[1]).max()):.3g}"


def _quant(out: Path) -> QuantModel:
    from calibration.out.folder import open_stage
    from calibration.quant.folder import read_quant

    return read_quant(open_stage(out, QUANT, "the comparison").path, verify=False)


def _linears(first: QuantModel, second: QuantModel) -> Iterator[Difference]:
    import numpy as np

    mine, theirs = first.decoder.linears, second.decoder.linears
    for name in dict.fromkeys((*mine, *theirs)):
        if name not in mine or name not in theirs:
            yield Difference(name, *(_linear_words(quant, name) for quant in (first, second)))
            continue
        one, other = first.linear(name), second.linear(name)
        if one.arrays.codes.shape != other.arrays.codes.shape:
            yield Difference(name, *(_kind(item.arrays.codes) for item in (one, other)))
            continue
        a, b = one.dequantize(), other.dequantize()
        largest = float(np.abs(a - b).max())
        if largest or one.scheme != other.scheme:
            most = float(np.abs(a).max()) or math.inf
            by = f"{other.scheme.label}, differs by at most {largest:.3g}, {largest / most:.1%}"
            yield Difference(name, f"{one.scheme.label}, at most {most:.3g}", by)


def _linear_words(quant: QuantModel, name: str) -> str:
    """What one artifact has of a linear that the other has no codes of."""
    if name in quant.decoder.linears:
        return "a linear"
    return f"a linear in {quant.scheme.dtype}" if name in quant.decoder.floats else _NOTHING


def _sizes(out: Path) -> dict[str, Any]:
    from calibration.out.manifest import read_manifest

    stages = read_manifest(out / MANIFEST)["stages"]
    files = {
        f"{stage}/ bytes": sum(item["bytes"] for item in record["files"].values())
        for stage, record in stages.items()
        if stage != REPORT  # which holds times
    }
    return {**_quant(out).sizes, **files}


def _same_sizes(first: Path, second: Path) -> Iterator[Difference]:
    """Bits per weight, and bytes before, after, and of every stage."""
    yield from _pairs(_sizes(first), _sizes(second))


def _report(out: Path) -> dict[str, Any]:
    from calibration.out.json_file import read_json

    path = out / REPORT / JSON_FILE
    return read_json(path, "Make the report again") if path.is_file() else {}


class _NothingThereError(Exception):
    """Neither artifact has what a section compares."""


def _there(*found: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    if not any(found):
        raise _NothingThereError
    return found


def _same_layers(first: Path, second: Path) -> Iterator[Difference]:
    """The relative error of every row of the reports, to 3 digits."""

    def rows(out: Path) -> dict[str, str]:
        return {
            " ".join(filter(None, (row["level"], row["phase"], row["tensor"]))): (
                "not finite" if row["relative"] is None else f"{row['relative']:.3g}"
            )
            for row in _report(out).get("validation", {}).get("rows", ())
        }

    yield from _pairs(*_there(rows(first), rows(second)))


def _same_quality(first: Path, second: Path) -> Iterator[Difference]:
    """Perplexity, KL and top-1 agreement of the reports, and their texts."""

    def found(out: Path) -> dict[str, Any]:
        data = _report(out)
        scored = {
            key: value for key, value in (data.get("perplexity") or {}).items() if key != "seconds"
        }
        return dict(_flat(data.get("quality") or {})) | dict(_flat(scored, "export"))

    yield from _pairs(*_there(found(first), found(second)))


SECTIONS: dict[str, Callable[[Path, Path], Iterator[Difference]]] = {
    "settings": _same_settings,
    "graph": _same_graph,
    "weights": _same_weights,
    "sizes": _same_sizes,
    "layers": _same_layers,
    "quality": _same_quality,
}


# ---------------------------------------------------------------- command


def differences(
    first: Path, second: Path, progress: Progress | None = None
) -> dict[str, list[Difference] | None]:
    """{section: what differs}, for every section; None where neither has what it compares. The
    progress is advanced once a section.

    Raises:
        InputError: one of them is no artifact with quant/ and onnx/, or is damaged.
    """
    from calibration.out.folder import stages_in
    from calibration.progress import NullProgress

    progress = progress or NullProgress()
    for out in (first, second):
        if not {QUANT, ONNX} <= set(stages_in(out)):
            raise InputError(
                str(out),
                f"got {', '.join(stages_in(out)) or 'no stage'}, expected an artifact with {QUANT} "
                f"and {ONNX}",
                "Give the whole OUT folder",
            )
    found: dict[str, list[Difference] | None] = {}
    progress.start("diff", len(SECTIONS))
    for name, section in SECTIONS.items():
        try:
            found[name] = list(section(first, second))
        except _NothingThereError:
            found[name] = None
        progress.advance(1, name)
    progress.finish()
    return found


def text(found: Mapping[str, list[Difference] | None], most: int) -> str:
    """What differs, section by section; at most `most` lines of each, 0 for all."""
    lines = []
    for name, items in found.items():
        if items is None:
            lines.append(f"{name}: not there")
            continue
        count = f"{len(items)} difference{'s' if len(items) > 1 else ''}"
        lines.append(f"{name}: {count if items else 'same'}")
        alike = list(_alike(items)) if most else [[item] for item in items]
        shown = alike[:most] if most else alike
        lines += [
            f"  {_label(group)}: {_cut(group[0].first)} | {_cut(group[0].second)}"
            for group in shown
        ]
        if left := sum(map(len, alike[len(shown) :])):
            lines.append(f"  and {left} more")
    return "\n".join(lines)


def _alike(items: Sequence[Difference]) -> Iterable[list[Difference]]:
    """Differences that are the same in several layers, together; by first use."""
    found: dict[tuple[str, ...], list[Difference]] = {}
    for item in items:
        name = _LAYER.sub(".*.", item.name, 1)
        found.setdefault((name, item.first, item.second), []).append(item)
    return found.values()


def _label(group: Sequence[Difference]) -> str:
    """Of one, or of all by the numbers of their layers: a.{0..3,7}.b."""
    if len(group) == 1:
        return group[0].name
    runs: list[list[int]] = []
    for number in sorted(int(found[1]) for item in group if (found := _LAYER.search(item.name))):
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    numbers = ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}..{run[-1]}" for run in runs)
    return _LAYER.sub(f".{{{numbers}}}.", group[0].name, 1)


def _cut(value: str) -> str:
    from plugins.text import printable, shown

    return shown(printable(value), 160)


def _sections(names: str) -> tuple[str, ...]:
    """An argparse type: sections, separated by commas."""
    wanted = tuple(dict.fromkeys(names.split(",")))
    if unknown := [name for name in wanted if name not in SECTIONS]:
        raise argparse.ArgumentTypeError(
            f"got {unknown[0]!r}, expected some of {','.join(SECTIONS)}, separated by commas"
        )
    return wanted


class Diff(Command):
    """Prints what differs."""

    name = "diff"
    help = "compare two artifacts"
    description = (
        "Compare two artifacts: settings, graph, weights (largest difference), sizes, the layers' "
        "errors and the quality in their reports."
    )

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """The other one, and what has to be the same."""
        add = parser.add_argument
        add("other", metavar="OUT2", type=Path, help="the other artifact folder")
        add(
            "--same",
            type=_sections,
            default=(),
            metavar="WHAT,...",
            help=f"exit with 3 if they differ in one of: {', '.join(SECTIONS)}",
        )
        add(
            "--lines",
            type=whole_number(0),
            default=10,
            metavar="N",
            help="of each section; 0: all (default 10)",
        )
        add("--json", action="store_true", help="print all of it as one line of JSON")
        add_progress(parser)

    def run(self, out: Path, args: argparse.Namespace) -> None:
        """Compare and print; an InputError where what --same names is in neither, a CheckError where
        they differ in it.
        """
        from calibration.progress import make_progress

        progress = make_progress(args.progress)
        try:
            found = differences(out, args.other, progress)
        finally:
            progress.close()
        if args.json:
            plain = {
                name: None if items is None else [asdict(item) for item in items]
                for name, items in found.items()
            }
            print(json.dumps(plain))
        else:
            print(text(found, args.lines))
        from calibration.out.folder import command_for

        if missing := [name for name in args.same if found[name] is None]:
            raise InputError(
                f"--same {','.join(args.same)}",
                f"got no {' and no '.join(missing)} in either artifact, expected a report that has "
                "them",
                f"Leave them out, or make the reports: {command_for(out, REPORT)}",
            )
        if bad := {name: differing for name in args.same if (differing := found[name])}:
            first = next(iter(bad.values()))[0]
            raise CheckError(
                f"{out} and {args.other}",
                f"got other {', '.join(bad)} (first: {first.name}, {_cut(first.first)} and "
                f"{_cut(first.second)}), expected the same",
                "--lines 0 shows all that differs",
            )


COMMAND = Diff()
