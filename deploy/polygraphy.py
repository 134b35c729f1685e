"""python -m deploy polygraphy: all that somebody with Polygraphy and a GPU needs to check an artifact:
scripts, inputs, and golden outputs in Polygraphy's own format.
"""

from __future__ import annotations

import argparse
import math
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calibration.out.layout import DATA_FILE, ENGINE, ENGINE_FILE, MODEL_FILE, ONNX, QUANT
from deploy.command import Command, add_progress
from deploy.scripts import (
    WHICH,
    cache_arrays,
    command,
    engine_record,
    head,
    script,
    shape_words,
    write_scripts,
)
from deploy.target import check_target
from deploy.trtexec import tool_of
from exporter.engine.record import EngineRecord
from plugins.cli import whole_number
from plugins.errors import InputError

if TYPE_CHECKING:
    import numpy as np

    from calibration.progress import Progress
    from calibration.quant.folder import QuantModel

__all__ = ["COMMAND", "scripts", "write_case"]

_ENGINE = "trt.engine"  # that a script builds
_PHASES = ("prefill", "decode")
_LEFT = (  # what this command writes besides the scripts, and what they do
    *(name for phase in _PHASES for name in (f"{phase}.npz", f"golden_{phase}.json")),
    *("inputs.py", "with_plugins.py", "__pycache__", "lib", _ENGINE),
)
_ANY = -100.0  # decibels that any finite numbers have
_NOT_JUDGED = """if [ "${1:-}" != --force ]; then
    echo "Not judged: at these bits any difference may be honest. --force shows it." >&2
    exit 2
fi"""
_LOADER = '''"""The inputs of one call each, as ONNX Runtime had them; polygraphy --data-loader-script takes
inputs.py:prefill and inputs.py:decode."""

from pathlib import Path

import numpy

HERE = Path(__file__).resolve().parent


def prefill():
    yield dict(numpy.load(HERE / "prefill.npz"))


def decode():
    yield dict(numpy.load(HERE / "decode.npz"))
'''
# Polygraphy's --plugins only opens a library; ours hands its plugins to TensorRT's registry.
_DRIVER = '''"""polygraphy, where TensorRT's registry knows the plugins in the library PLUGINS."""

import os
import sys

if "PLUGINS" in os.environ:
    if os.environ.get("POLYGRAPHY_USE_TENSORRT_RTX") == "1":
        import tensorrt_rtx as trt
    else:
        import tensorrt as trt
    trt.get_plugin_registry().load_library(os.environ["PLUGINS"])

from polygraphy.tools import main

sys.exit(main())
'''
Case = dict[str, tuple[dict[str, Any], dict[str, Any]]]  # {phase: (inputs, outputs)}


def write_case(out: Path, folder: Path, tokens: int, progress: Progress) -> Case:
    """Run a prefill of the default text and a decode step in ONNX Runtime; write their inputs, with a
    script that loads them, and their outputs.

    Raises:
        InputError: the model is bfloat16, a stage is missing, or the text is too long.
    """
    import numpy as np
    from polygraphy.comparator import RunResults

    from exporter.engine.edition import captured_log

    with captured_log():
        found = _run(out, tokens, progress)
    folder.mkdir(parents=True, exist_ok=True)
    for phase, (inputs, outputs) in found.items():
        np.savez(folder / f"{phase}.npz", **inputs)
        results = RunResults()
        results.add([outputs], runner_name="onnxruntime")
        with captured_log():
            results.save(str(folder / f"golden_{phase}.json"))
    (folder / "inputs.py").write_text(_LOADER, encoding="utf-8")
    (folder / "with_plugins.py").write_text(_DRIVER, encoding="utf-8")
    return found


def _run(out: Path, tokens: int, progress: Progress) -> Case:
    import numpy as np

    from calibration.data import default_text, text_tokens
    from exporter.run.model import find_model
    from exporter.run.onnxruntime import OnnxSession

    model = find_model(out, "onnxruntime")
    description = model.description
    if description.dtype == "bfloat16":
        raise InputError(
            str(out),
            "got a bfloat16 model, expected float16 or float32: Polygraphy's files are numpy's, which "
            "has no such type",
            "Export with --dtype float16",
        )
    for name in (MODEL_FILE, DATA_FILE):
        model.folder.file(name)
    vocab = description.sizes["vocab_size"]
    ids = text_tokens(model.tokenizer(), default_text(), vocab, "the default text")[:tokens]
    found: Case = {}
    progress.start("golden outputs", len(_PHASES))
    with OnnxSession(model.folder.path, description.max_context) as session:
        calls = _recorded(session)
        for phase in _PHASES:
            logits = session.run(np.array([ids], np.int64), last_only=True)
            found[phase] = calls[-1]
            ids = logits[0, -1:].argmax(-1)
            progress.advance(note=phase)
    progress.finish()
    return found


def _recorded(session: Any) -> list[tuple[dict[str, np.ndarray], dict[str, np.ndarray]]]:
    """What the session's runner is given and gives, call by call, whatever form the cache has."""
    calls: list[tuple[dict[str, np.ndarray], dict[str, np.ndarray]]] = []
    infer = session._runner.infer

    def record(feeds: Mapping[str, np.ndarray], **options: Any) -> dict[str, np.ndarray]:
        outputs: dict[str, np.ndarray] = infer(feeds, **options)
        calls.append(
            tuple({name: array.copy() for name, array in part.items()} for part in (feeds, outputs))  # type: ignore[arg-type]
        )
        return outputs

    session._runner.infer = record
    return calls


# ---------------------------------------------------------------- scripts


def scripts(out: Path) -> dict[str, str]:
    """{name: bash script}: cpu and inspect, and, where there is an engine's record, convert, prefill,
    decode and engine.

    Raises:
        InputError: OUT has no quant folder, or the engine's record is damaged.
    """
    limit = _limit(out)
    judged = [] if limit is not None else [_NOT_JUDGED]
    accept = (
        f"--compare snr --snr-threshold {_ANY if limit is None else -20 * math.log10(limit):.1f}"
    )

    def runs(what: str, record: EngineRecord | None, *commands: list[str]) -> str:
        return script(
            *_start(out, what, record),
            *judged,
            *(command([*words, accept]) for words in commands),
        )

    cpu = (_run_words(phase, ["--onnxrt"]) for phase in _PHASES)
    inspect = f'polygraphy inspect model "$OUT"/{ONNX}/{MODEL_FILE} --show layers attrs'
    made = {
        "cpu": runs("ONNX Runtime on the CPU against the golden outputs", None, *cpu),
        "inspect": script(*_start(out, "What the graph is"), inspect),
    }
    if not (out / ENGINE).is_dir():
        return made
    record = engine_record(out)
    build = _build_words(record)
    made["convert"] = script(
        *_start(out, "Build an engine", record),
        command([f'polygraphy convert "$OUT"/{ONNX}/{MODEL_FILE}', f"-o {_ENGINE}", *build]),
    )
    engines = []
    for index, profile in enumerate(record["profiles"]):
        name, place = profile["name"], f"--optimization-profile {index}"
        words = _run_words(name, ["--trt", *build, place])
        made[name] = runs(f"TensorRT against the golden outputs, {name}", record, words)
        words = ["--trt", "--model-type engine", place]
        engines.append(_run_words(name, words, f"{ENGINE}/{ENGINE_FILE}"))
    made["engine"] = runs("The built engine against the golden outputs", record, *engines)
    return made


def _start(out: Path, what: str, record: EngineRecord | None = None) -> list[str]:
    lines = [
        *head(out, what),
        'cd "$(dirname "$0")"',
        'polygraphy() { "${PYTHON:-python3}" with_plugins.py "$@"; }',
    ]
    if record is None:
        return lines
    if record["edition"] == "tensorrt-rtx":
        lines += [
            "export POLYGRAPHY_USE_TENSORRT_RTX=1",
            "# The wheel has libtensorrt_rtx.so.1; the parser asks for the name without the number.",
            'libs=$("${PYTHON:-python3}" -c "import importlib.util as u; '
            "s = u.find_spec('tensorrt_rtx_libs'); "
            "print(s.submodule_search_locations[0] if s else '')\")",
            'if [ -n "$libs" ]; then',
            '    mkdir -p lib && ln -sf "$libs"/libtensorrt_rtx.so.1 lib/libtensorrt_rtx.so',
            '    export LD_LIBRARY_PATH="$PWD/lib:$libs${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"',
            "fi",
        ]
    library = shlex.quote(record["plugin_library"]["name"])
    lines.append(f'export PLUGINS="$OUT"/{ENGINE}/{library}')
    return [*lines, *cache_arrays(record)]


def _build_words(record: EngineRecord) -> list[str]:
    """Types, both profiles, and how attention is computed."""
    words = ["--strongly-typed"] if "--stronglyTyped" in tool_of(record).build else []
    for index in range(len(record["profiles"])):
        for which in WHICH:
            shapes = shape_words(
                record, index, which, lambda shape: str(list(shape)).replace(" ", "")
            )
            words.append(f"--trt-{which}-shapes {' '.join(shapes)}")
    if record.get("decomposable_attention"):
        words.append("--decomposable-attentions")
    return words


def _run_words(phase: str, words: list[str], model: str = f"{ONNX}/{MODEL_FILE}") -> list[str]:
    """polygraphy run on a phase's inputs, against its golden outputs."""
    return [
        f'polygraphy run "$OUT"/{model}',
        *words,
        f"--data-loader-script inputs.py:{phase}",
        f"--load-outputs golden_{phase}.json",
    ]


def _limit(out: Path) -> float | None:
    """How near the outputs have to be: the proof's limit of accumulated errors; None where any error
    may be honest.
    """
    from calibration.out.folder import open_stage
    from calibration.quant.folder import read_quant
    from exporter.proof.judge import Stack
    from exporter.proof.runners import gemm_nodes
    from exporter.run.onnxruntime import load_model

    quant: QuantModel = read_quant(
        open_stage(out, QUANT, "the limits of errors").path, verify=False
    )
    nodes = gemm_nodes(load_model(out / ONNX), quant.decoder)
    return Stack.of(quant, nodes).limit("kernel", "logits")


class Polygraphy(Command):
    """Writes a folder."""

    name = "polygraphy"
    help = "scripts, inputs and golden outputs for NVIDIA's Polygraphy"
    description = (
        "Write what checks the artifact with Polygraphy alone: inputs of a prefill and a decode "
        "step, ONNX Runtime's outputs, and scripts that run TensorRT against them (exit code 1 "
        "where they differ)."
    )

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Where, and how long a text."""
        add = parser.add_argument
        add("--to", type=Path, required=True, metavar="FOLDER", help="write it here")
        add(
            "--tokens",
            type=whole_number(1),
            default=64,
            metavar="N",
            help="of the prefill (default 64)",
        )
        add_progress(parser)

    def run(self, out: Path, args: argparse.Namespace) -> None:
        """Write and say what there is."""
        from calibration.progress import make_progress

        made = scripts(out)
        check_target(args.to, out, "polygraphy", [*(f"{name}.sh" for name in made), *_LEFT])
        progress = make_progress(args.progress)
        try:
            write_case(out, args.to, args.tokens, progress)
        finally:
            progress.close()
        for path in write_scripts(made, args.to):
            print(path)


COMMAND = Polygraphy()
