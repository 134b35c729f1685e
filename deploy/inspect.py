"""python -m deploy inspect: what an artifact, one of its folders or files, or any ONNX file is."""

from __future__ import annotations

import argparse
import json
import shlex
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calibration.out.layout import (
    DESCRIPTION,
    ENGINE,
    ENGINE_FILE,
    ENGINE_RECORD,
    HTML_FILE,
    JSON_FILE,
    MANIFEST,
    MODEL_FILE,
    ONNX,
    QUANT,
    REPORT,
)
from deploy.command import Command
from plugins.errors import InputError

if TYPE_CHECKING:
    import onnx

    from calibration.out.description import Description

__all__ = ["COMMAND", "inspect", "text"]

_OURS = {  # files that stand for their folders, and what is there then too
    MODEL_FILE: DESCRIPTION,
    ENGINE_FILE: ENGINE_RECORD,
    DESCRIPTION: DESCRIPTION,
    MANIFEST: MANIFEST,
}


def inspect(path: Path) -> dict[str, Any]:
    """What lies at a path, as plain JSON: "kind", and what can be said of that kind. No weights are
    read, and no checksum is compared.

    Raises:
        InputError: there is nothing, or nothing that is known.
    """
    from calibration.out.folder import stages_in
    from calibration.out.pack import is_pack

    if is_pack(path):
        return _of_pack(path)
    if path.is_file():
        if path.name in _OURS and (path.parent / _OURS[path.name]).is_file():
            return inspect(path.parent)
        if path.suffix == ".onnx":
            return {"kind": "ONNX file", **_graph(path)}
    stages = () if path.is_file() else stages_in(path)
    if not stages:
        raise InputError(
            str(path),
            "got neither an artifact nor an ONNX file, expected an OUT folder, its quant, onnx or "
            "engine folder, a pack, or FILE.onnx",
            "Check the path",
        )
    folders = {stage: path / stage if (path / stage).is_dir() else path for stage in stages}
    whole = path not in folders.values()
    kind = "artifact" if whole else f"{stages[0]} folder"
    return {"kind": kind, **_of_folders(folders), "run": [*_commands(path, folders, whole)]}


def _of_folders(folders: Mapping[str, Path]) -> dict[str, Any]:
    """What the folders of the stages say."""
    found = _model(folders)
    if ONNX in folders:
        graph = _graph(folders[ONNX] / MODEL_FILE)
        found |= {key: graph[key] for key in ("nodes", "floats", "opset")}
    elif QUANT in folders:
        found |= _quant_nodes(folders[QUANT])
    if ENGINE in folders:
        found["engine"] = _engine(folders[ENGINE])
    found["bytes"] = {stage: _bytes(folder) for stage, folder in folders.items()}
    found["proof"] = _proof(folders.get(REPORT))
    return found


def _of_pack(path: Path) -> dict[str, Any]:
    """By its small files: the index is checked, and of members what is read."""
    from tempfile import TemporaryDirectory

    from calibration.out.pack import LINKED, Pack

    pack = Pack(path)
    sizes = Counter[str]()
    for name, member in pack.members.items():
        sizes[name.partition("/")[0]] += member.bytes
    del sizes[MANIFEST]
    exported = ONNX in sizes or ENGINE in sizes
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name in pack.members:
            passed = name in (MANIFEST, LINKED, f"{ENGINE}/{ENGINE_FILE}")
            if not passed and not (exported and name.startswith(f"{QUANT}/")):
                pack.extract(name, folder)
        folders = {stage: folder / stage for stage in sizes if (folder / stage).is_dir()}
        found = _of_folders(folders)
    found["bytes"] = dict(sizes)
    if found["proof"] is not None:
        found["proof"]["page"] = f"{REPORT}/{HTML_FILE}"
    deploy = ["python", "-m", "deploy"]
    run = [[*deploy, "unpack", str(path), "--to", path.stem]]
    if exported:
        run.insert(0, [*deploy, "generate", str(path), "--prompt", "Once upon a time"])
    return {"kind": "pack", **found, "run": [*map(shlex.join, run)]}


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _model(folders: Mapping[str, Path]) -> dict[str, Any]:
    """Of model.json, or of a quant folder alone."""
    from calibration.out.description import read_description
    from calibration.quant.describe import describe
    from calibration.quant.folder import read_quant

    description: Description
    for stage in (ONNX, ENGINE):
        if stage in folders:
            description, _ = read_description(folders[stage] / DESCRIPTION, "Export it again")
            break
    else:
        description = describe(read_quant(folders[QUANT], verify=False))
    cache = description.cache
    return {
        "model": description.model,
        "family": description.family,
        "scheme": description.scheme,
        "method": description.method,
        "dtype": description.dtype,
        "sizes": {**description.sizes, "num_hidden_layers": cache.layers},
        "context": description.max_context,
        "cache": {
            "heads": cache.heads,
            "head_dim": cache.head_dim,
            "bits": cache.bits,
            "token_bytes": cache.token_bytes,
        },
        "tokenizer": list(description.tokenizer),
        "chat_template": description.chat_template is not None,
        "end_tokens": list(description.eos_token_ids),
    }


def _graph(path: Path) -> dict[str, Any]:
    """Of any ONNX file: inputs, outputs, ops, of custom nodes their bits, and the weights in floating
    point that others multiply with.
    """
    import onnx
    from google.protobuf.message import DecodeError

    from plugins.core.op_spec import is_custom

    try:
        model = onnx.load(path, load_external_data=False)
    except (DecodeError, OSError) as error:
        raise InputError(
            str(path), f"got a file that is not ONNX ({error})", "Check the path"
        ) from None
    custom = [node for node in model.graph.node if is_custom(node.domain)]
    weights = {tensor.name for tensor in model.graph.initializer}
    turned = {
        node.output[0]: node.input[0] for node in model.graph.node if node.op_type == "Transpose"
    }
    products = [node.input[1] for node in model.graph.node if node.op_type == "MatMul"]
    tables = [turned.get(name, name) for name in products]
    return {
        "opset": next((item.version for item in model.opset_import if not item.domain), None),
        "inputs": [_value(value) for value in model.graph.input],
        "outputs": [_value(value) for value in model.graph.output],
        "ops": dict(Counter(node.op_type for node in model.graph.node).most_common()),
        "weights": len(model.graph.initializer),
        "nodes": {node.name: _bits(node) for node in custom},
        "floats": [name.removesuffix(".weight") for name in tables if name in weights],
    }


def _value(value: onnx.ValueInfoProto) -> str:
    import onnx

    tensor = value.type.tensor_type
    dims = [dim.dim_param or str(dim.dim_value) for dim in tensor.shape.dim]
    dtype = onnx.TensorProto.DataType.Name(tensor.elem_type).lower()
    return f"{value.name} {dtype}[{', '.join(dims)}]"


def _bits(node: onnx.NodeProto) -> str:
    """Such as "QQQGemm w4a8 g128 [576, 1536]"."""
    found = {item.name: item.i for item in node.attribute}
    sizes = [found[key] for key in ("in_features", "out_features") if key in found]
    words = [node.op_type]
    if {"wbits", "abits"} <= found.keys():
        words.append(f"w{found['wbits']}a{found['abits']}")
    if found.get("group_size"):
        words.append(f"g{found['group_size']}")
    return " ".join([*words, str(sizes)] if sizes else words)


def _quant_nodes(folder: Path) -> dict[str, Any]:
    from calibration.quant.folder import read_quant

    quant = read_quant(folder, verify=False)
    decoder, schemes = quant.decoder, {node: quant.scheme_of(node) for node in quant.decoder.nodes}
    return {
        "nodes": {node: f"{scheme.op} {scheme.label}" for node, scheme in schemes.items()},
        "floats": [*decoder.floats, *([] if decoder.head.quantized else [decoder.head_table()])],
    }


def _engine(folder: Path) -> dict[str, Any]:
    from exporter.engine.limits import engine_limits
    from exporter.engine.record import read_engine_record

    record = read_engine_record(folder)
    limits = engine_limits(record)
    return {
        "edition": f"{record['edition']} {record['version']}",
        "compute_capabilities": record["compute_capabilities"],
        "plugin_layers": record["layers"].get("PLUGIN_V3", 0),
        "max_batch": limits.max_batch,
        "max_tokens": limits.max_tokens,
        "max_context": limits.max_context,
    }


def _proof(folder: Path | None) -> dict[str, Any] | None:
    """What the report says; None without one."""
    from calibration.out.json_file import read_json

    if folder is None or not (folder / JSON_FILE).is_file():
        return None
    data = read_json(folder / JSON_FILE, "Make the report again")
    validation, quality = data.get("validation", {}), data.get("quality") or {}
    return {
        "ok": validation.get("ok"),
        "first_failure": validation.get("first_failure", ""),
        "page": str(folder / HTML_FILE),
        **{
            key: quality[key]
            for key in ("text", "ppl", "float_ppl", "kl", "top1")
            if key in quality
        },
    }


def _commands(path: Path, folders: Mapping[str, Path], whole: bool) -> Iterator[str]:
    def deploy(command: str, *options: str) -> str:
        return shlex.join(["python", "-m", "deploy", command, str(path), *options])

    if ONNX in folders or ENGINE in folders:
        yield deploy("generate", "--prompt", "Once upon a time")
    else:
        yield deploy("generate", "--runner", "torch", "--prompt", "Once upon a time")
    if whole and {QUANT, ONNX} <= folders.keys():
        yield deploy("prove")
    if whole and ENGINE in folders:
        yield deploy("trtexec")


# ---------------------------------------------------------------- text


def text(found: Mapping[str, Any], nodes: bool) -> str:
    """Lines for people; every node of its own with `nodes`, else by their bits."""
    lines: list[str] = []
    for name, value in found.items():
        if name == "nodes":
            lines += _node_lines(value, nodes)
        elif name in _SENTENCES and value is not None:
            lines.append(f"{name}: {_SENTENCES[name](value)}")
        elif isinstance(value, list) and name in ("run", "inputs", "outputs"):
            lines += [f"{name}:", *(f"  {item}" for item in value)]
        elif isinstance(value, Mapping):
            lines.append(f"{name}: {', '.join(f'{key} {item}' for key, item in value.items())}")
        elif isinstance(value, list):
            lines.append(f"{name}: {', '.join(map(str, value)) or 'none'}")
        else:
            lines.append(f"{name}: {_word(value)}")
    return "\n".join(lines)


def _cache_words(cache: Mapping[str, Any]) -> str:
    kinds = f"{cache['heads']} heads of {cache['head_dim']} in {cache['bits']} bits"
    return f"{kinds}, {cache['token_bytes']} bytes a token"


def _engine_words(engine: Mapping[str, Any]) -> str:
    gpus, count = engine["compute_capabilities"], engine["max_batch"]
    made_for = f" for compute capability {', '.join(gpus)}" if gpus else ""
    return (
        f"{engine['edition']}{made_for}, {engine['plugin_layers']} plugin layers, at most "
        f"{count} sequence{'s' * (count != 1)}, {engine['max_tokens']} tokens at once, "
        f"{engine['max_context']} in all"
    )


def _bytes_words(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {size / 1e6:.1f} MB" for name, size in sizes.items())


def _proof_words(proof: Mapping[str, Any]) -> str:
    words = ["every layer within tolerance" if proof["ok"] else f"failed, {proof['first_failure']}"]
    if "ppl" in proof:
        words.append(
            f"perplexity {proof['ppl']:.2f} on {proof['text']}, the float model's "
            f"{proof['float_ppl']:.2f}; KL {proof['kl']:.3f} nats, same next token {proof['top1']:.0%}"
        )
    return "; ".join([*words, str(proof["page"])])


def _floats_words(names: Sequence[str]) -> str:
    from plugins.text import some

    return some(names) or "none"


_SENTENCES: dict[str, Callable[[Any], str]] = {
    "floats": _floats_words,
    "cache": _cache_words,
    "engine": _engine_words,
    "bytes": _bytes_words,
    "proof": _proof_words,
}


def _word(value: object) -> str:
    if value is None:
        return "none"
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def _node_lines(found: Mapping[str, str], every: bool) -> Iterator[str]:
    yield f"nodes: {len(found)} custom"
    if every:
        yield from (f"  {name}: {bits}" for name, bits in found.items())
    else:
        for bits, count in Counter(value.split(" [")[0] for value in found.values()).items():
            yield f"  {count} {bits}"


class Inspect(Command):
    """Prints what it is."""

    name = "inspect"
    help = "what an artifact, a folder of it, a pack, an engine or an ONNX file is"
    description = (
        "Show architecture, bits of the nodes, sizes, tokenizer, proof and how to run it. Nothing is "
        "verified: prove does that."
    )
    out_help = (
        "artifact folder, its quant, onnx or engine folder, a file in these, a pack, or FILE.onnx"
    )

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """How much, and how."""
        add = parser.add_argument
        add("--nodes", action="store_true", help="every custom node with its bits and sizes")
        add("--json", action="store_true", help="print one line of JSON")

    def run(self, out: Path, args: argparse.Namespace) -> None:
        """Look and print."""
        from plugins.text import printable

        found = inspect(out)
        print(json.dumps(found) if args.json else printable(text(found, args.nodes), keep="\n"))


COMMAND = Inspect()
