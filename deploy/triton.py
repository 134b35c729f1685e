"""python -m deploy triton: a model repository of Triton Inference Server."""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from calibration.out.layout import (
    CHAT_FILE,
    DATA_FILE,
    DESCRIPTION,
    ENGINE,
    ENGINE_FILE,
    MODEL_FILE,
    ONNX,
)
from deploy.command import Command, add_progress
from deploy.target import check_target
from plugins.cli import whole_number
from plugins.errors import InputError
from plugins.text import printable

if TYPE_CHECKING:
    from calibration.out.description import Description
    from calibration.out.folder import StageFolder
    from calibration.progress import Progress

__all__ = ["COMMAND", "BACKENDS", "Deployment", "config", "write_repository"]

_PLAN = "model.plan"  # what Triton's TensorRT backend opens
_SCRIPT = "serve.sh"
_VERSION = "1"  # of a model in the repository
_TOKENIZER = "tokenizer"  # a folder beside the versions, which Triton passes over
_TYPES = {
    "float16": "TYPE_FP16",
    "bfloat16": "TYPE_BF16",
    "float32": "TYPE_FP32",
    "int8": "TYPE_INT8",
    "int64": "TYPE_INT64",
}
_ANY = -1  # a size that requests choose
# Triton gives the first request of a sequence one row of a state whose length it does not know.
_FIRST_ROW = 1


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """How a model is served.

    Attributes:
        sequences: so many at a time keep their KV cache in Triton; 0: requests bring it and get it back.
        instances: of the model on each machine, or on each GPU of it.
        max_batch: rows of a request; of an engine at most what it was built for.
        threads: of an instance on a CPU; 0 leaves it to ONNX Runtime, which takes every core.
        at: where the repository lies on the machines; None: where it is written.
    """

    sequences: int = 0
    instances: int = 1
    max_batch: int = 1
    threads: int = 0
    at: Path | None = None


@dataclass(frozen=True)
class _Backend:
    """How Triton runs a stage.

    Attributes:
        name: of Triton's backend.
        stage: whose folder it runs.
        kind: of its instances.
        file: that it opens.
    """

    name: str
    stage: str
    kind: str
    file: str


BACKENDS = {
    backend.name: backend
    for backend in (
        _Backend("tensorrt", ENGINE, "KIND_GPU", _PLAN),
        _Backend("onnxruntime", ONNX, "KIND_CPU", MODEL_FILE),
    )
}


@dataclass(frozen=True)
class _Tensor:
    """An input or output: its type as Triton calls it, and sizes behind the batch's."""

    name: str
    dtype: str
    dims: tuple[int, ...]


# ---------------------------------------------------------------- config.pbtxt


def config(
    name: str, backend: str, description: Description, deployment: Deployment, library: str = ""
) -> str:
    """The text of a model's config.pbtxt.

    Args:
        name: of the model.
        backend: a key of BACKENDS.
        description: of its folder.
        deployment: how it is served.
        library: path of the native library on the machines, of the ONNX Runtime backend.
    """
    found = BACKENDS[backend]
    batch = 1 if deployment.sequences else deployment.max_batch
    lines = [
        f"name: {_quoted(name)}",
        f"backend: {_quoted(found.name)}",
        f"default_model_filename: {_quoted(found.file)}",
        f"max_batch_size: {batch}",
    ]
    past, present = list(_cache(description, False)), list(_cache(description, True))
    kept = bool(deployment.sequences)
    for tensor in [*_inputs(description), *([] if kept else past)]:
        lines += _block("input", _tensor(tensor))
    for tensor in [_logits(description), *([] if kept else present)]:
        lines += _block("output", _tensor(tensor))
    group = [f"kind: {found.kind}", f"count: {deployment.instances}"]
    if found.stage == ENGINE:  # Triton takes the profile that a request fits
        group += [f"profile: {_quoted(str(index))}" for index in range(2)]
    lines += _block("instance_group", group)
    if kept:
        states = [_state(*pair) for pair in zip(past, present, strict=True)]
        oldest = _block("oldest", [f"max_candidate_sequences: {deployment.sequences}"])
        lines += _block(
            "sequence_batching", [*oldest, *(line for state in states for line in state)]
        )
    if library:
        lines += _block("model_operations", [f"op_library_filename: {_quoted(library)}"])
    if found.stage == ONNX:
        threads = _block("value", [f"string_value: {_quoted(str(deployment.threads))}"])
        lines += _block("parameters", ['key: "intra_op_thread_count"', *threads])
    return "\n".join([*lines, ""])


def _quoted(text: str) -> str:
    return json.dumps(text)


def _block(name: str, lines: Sequence[str]) -> list[str]:
    return [f"{name} {{", *(f"  {line}" for line in lines), "}"]


def _tensor(tensor: _Tensor) -> list[str]:
    lines = [f"name: {_quoted(tensor.name)}", f"data_type: {tensor.dtype}"]
    if tensor.dims:
        return [*lines, f"dims: [ {', '.join(map(str, tensor.dims))} ]"]
    return [*lines, "dims: [ 1 ]", *_block("reshape", ["shape: [ ]"])]


def _state(past: _Tensor, present: _Tensor) -> list[str]:
    first = [_FIRST_ROW if size == _ANY else size for size in past.dims]
    initial = [
        f"name: {_quoted('empty')}",
        f"data_type: {past.dtype}",
        f"dims: [ {', '.join(map(str, first))} ]",
        "zero_data: true",
    ]
    return _block(
        "state",
        [
            f"input_name: {_quoted(past.name)}",
            f"output_name: {_quoted(present.name)}",
            f"data_type: {past.dtype}",
            f"dims: [ {', '.join(map(str, past.dims))} ]",
            *_block("initial_state", initial),
        ],
    )


def _inputs(description: Description) -> Iterator[_Tensor]:
    """Besides the cache."""
    from exporter.graph.names import WRITE_INDICES
    from exporter.run.forms import Growing, Static

    form = Static if description.cache.form == "static" else Growing
    for name in form.inputs:
        yield _Tensor(name, _TYPES["int64"], () if name == WRITE_INDICES else (_ANY,))


def _logits(description: Description) -> _Tensor:
    return _Tensor("logits", _TYPES["float32"], (_ANY, description.sizes["vocab_size"]))


def _cache(description: Description, out: bool) -> Iterator[_Tensor]:
    """What comes in as past, or out as present."""
    from calibration.quant.scheme import FLOAT_BITS

    cache = description.cache
    rows = _ANY if cache.capacity is None else cache.capacity
    name = cache.present if out else cache.past
    low = cache.bits < FLOAT_BITS
    for layer in range(cache.layers):
        for part in cache.parts:
            dtype, width = str(cache.dtype), cache.head_dim
            if part.endswith("_scale"):
                dtype, width = "float32", 2
            elif low:
                dtype, width = "int8", cache.bits * cache.head_dim // 8
            place = name.format(layer=layer, part=part)
            yield _Tensor(place, _TYPES[dtype], (cache.heads, rows, width))


# ---------------------------------------------------------------- the repository


def write_repository(
    out: Path,
    to: Path,
    backends: Sequence[str] = (),
    deployment: Deployment | None = None,
    progress: Progress | None = None,
) -> list[str]:
    """Write a model repository, whole or not at all.

    Args:
        out: the artifact folder, or its onnx or engine folder alone.
        to: a new folder, or one that this wrote before with models of the same names.
        backends: keys of BACKENDS; none: those whose stage is there and can be served.
        deployment: how it is served.
        progress: advanced once a model.

    Returns:
        The models in it.

    Raises:
        InputError: a stage is missing, damaged, or made for what Triton does not run; or the folder has
            other files in it.
    """
    from calibration.checkpoints.sources import model_slug
    from calibration.out.files import StageWriter
    from calibration.out.folder import open_stage, stages_in
    from calibration.progress import NullProgress

    deployment = deployment or Deployment()
    chosen = [BACKENDS[name] for name in backends]
    if not chosen:
        stages = stages_in(out)
        there = [backend for backend in BACKENDS.values() if backend.stage in stages]
        chosen = [backend for backend in there if _objection(out, backend) is None] or there
    if not chosen:
        raise InputError(
            str(out),
            "got neither an onnx nor an engine folder, expected one",
            "Export the model with: python -m exporter MODEL --wbits W --abits A --out DIR",
        )
    for backend in chosen:
        if (objection := _objection(out, backend)) is not None:
            raise objection
    folders = [open_stage(out, backend.stage, f"--backend {backend.name}") for backend in chosen]
    names = [
        f"{model_slug(about.model)}-{about.scheme.replace('*', 'b')}-{backend.name}"
        for backend, about in zip(chosen, (one.description() for one in folders), strict=True)
    ]
    # The whole folder is replaced: another model in it, whoever wrote it, would be lost.
    check_target(to, out, "triton", {_SCRIPT, *(name for name in names if _is_ours(to / name))})
    at = deployment.at or to.resolve()
    plugins: list[Path] = []
    progress = progress or NullProgress()
    progress.start("triton", len(chosen))
    with StageWriter(to.parent, to.name, 2 * sum(map(_size, folders))) as writer:
        for name, backend, folder in zip(names, chosen, folders, strict=True):
            about, model = folder.description(), writer.path / name
            library = at / name / _copy(model, backend, folder, about)
            if backend.stage == ENGINE:
                plugins.append(library)
            own = "" if backend.stage == ENGINE else str(library)
            text = config(name, backend.name, about, _within(deployment, about), own)
            (model / "config.pbtxt").write_text(text, encoding="utf-8")
            progress.advance(1, name)
        script = writer.path / _SCRIPT
        script.write_text(_script(at, plugins), encoding="utf-8")
        script.chmod(0o755)
    progress.finish()
    return names


def _objection(out: Path, backend: _Backend) -> InputError | None:
    """Why Triton cannot run a stage that is there."""
    from calibration.out.folder import open_stage
    from exporter.engine.record import read_engine_record

    where = f"--backend {backend.name}"
    folder = open_stage(out, backend.stage, where)
    if backend.stage == ENGINE:
        edition = read_engine_record(folder.path)["edition"]
        if edition != "tensorrt":
            return InputError(
                where,
                f"got an engine of {edition}, expected one of tensorrt, which alone Triton has",
                "Build it with --engine tensorrt, of the version in Triton's container, or serve "
                "--backend onnxruntime",
            )
    elif folder.description().dtype == "bfloat16":
        return InputError(
            where,
            "got a bfloat16 model, expected float16 or float32: ONNX Runtime has no such type on a CPU",
            "Export with --dtype float16",
        )
    return None


def _is_ours(model: Path) -> bool:
    """Whether an earlier call wrote a model's folder."""
    return (model / "config.pbtxt").is_file() and (model / _TOKENIZER / DESCRIPTION).is_file()


def _size(folder: StageFolder) -> int:
    return sum(path.stat().st_size for path in folder.path.rglob("*") if path.is_file())


def _within(deployment: Deployment, description: Description) -> Deployment:
    most = description.max_batch
    if most is None or deployment.max_batch <= most:
        return deployment
    return replace(deployment, max_batch=most)


def _copy(model: Path, backend: _Backend, folder: StageFolder, description: Description) -> str:
    """Put a stage's files into a model's folder; returns the library among them."""
    import shutil

    from exporter.engine.record import read_engine_record
    from exporter.run.native import native_library

    version = model / _VERSION
    version.mkdir(parents=True)
    for name in (*description.tokenizer, DESCRIPTION, CHAT_FILE):
        if name in folder.names:
            target = model / _TOKENIZER / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder.file(name), target)
    if backend.stage == ENGINE:
        shutil.copyfile(folder.file(ENGINE_FILE), version / backend.file)
        library = folder.file(read_engine_record(folder.path)["plugin_library"]["name"])
    else:
        for name in (MODEL_FILE, DATA_FILE):
            shutil.copyfile(folder.file(name), version / name)
        found = native_library()
        if not isinstance(found, Path):
            raise found
        library = found
    shutil.copyfile(library, version / library.name)
    return f"{_VERSION}/{library.name}"


def _script(at: Path, plugins: Sequence[Path]) -> str:
    preload = ":".join(shlex.quote(str(path)) for path in plugins)
    start = f"LD_PRELOAD={preload}${{LD_PRELOAD:+:$LD_PRELOAD}} " if plugins else ""
    return "\n".join(
        [
            "#!/usr/bin/env bash",
            "# Start Triton Inference Server on this repository; further options are passed on.",
            "set -euo pipefail",
            f'{start}exec tritonserver --model-repository={shlex.quote(str(at))} "$@"',
            "",
        ]
    )


def _backends(text: str) -> tuple[str, ...]:
    """An argparse type: names of backends, separated by commas."""
    names = tuple(dict.fromkeys(text.split(",")))
    if unknown := [name for name in names if name not in BACKENDS]:
        raise argparse.ArgumentTypeError(
            f"got {unknown[0]!r}, expected some of {','.join(BACKENDS)}, separated by commas"
        )
    return names


class Triton(Command):
    """Writes the repository."""

    name = "triton"
    help = "a model repository of Triton Inference Server"
    description = (
        "Write a model repository for any number of machines with Triton Inference Server: the engine "
        "for its TensorRT backend with the plugin library, the ONNX file for its ONNX Runtime backend "
        "with the native library on CPUs."
    )

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Where to, for which backends, and how it is served."""
        add = parser.add_argument
        add(
            "--to",
            required=True,
            type=Path,
            metavar="REPO",
            help="a new folder, or an earlier one of the same models",
        )
        add(
            "--backend",
            type=_backends,
            default=(),
            metavar="NAME,...",
            help=f"of {', '.join(BACKENDS)} (default: those that OUT has something for)",
        )
        add(
            "--sequences",
            type=whole_number(0),
            default=0,
            metavar="N",
            help="so many sequences at a time keep their KV cache in Triton (default 0: requests bring "
            "it and get it back)",
        )
        add(
            "--instances",
            type=whole_number(1),
            default=1,
            metavar="N",
            help="of the model on each machine or GPU (default 1)",
        )
        add(
            "--max-batch",
            type=whole_number(1),
            default=1,
            metavar="B",
            help="rows of a request (default 1); of an engine at most what it was built for",
        )
        add(
            "--threads",
            type=whole_number(0),
            default=0,
            metavar="N",
            help="of an instance on a CPU (default 0: every core)",
        )
        add(
            "--at",
            type=Path,
            metavar="PATH",
            help="where the repository lies on the machines (default: where it is written)",
        )
        add_progress(parser)

    def run(self, out: Path, args: argparse.Namespace) -> None:
        """Write, and say how to start it."""
        from calibration.progress import make_progress

        deployment = Deployment(
            sequences=args.sequences,
            instances=args.instances,
            max_batch=args.max_batch,
            threads=args.threads,
            at=args.at,
        )
        progress = make_progress(args.progress)
        try:
            names = write_repository(out, args.to, args.backend, deployment, progress)
        finally:
            progress.close()
        for name in names:
            print(printable(str(args.to / name)))
        print(printable(shlex.quote(str(args.to / _SCRIPT))))


COMMAND = Triton()
