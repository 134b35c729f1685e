"""The TensorRT backend of the C++ runtime on a simulated TensorRT and a simulated GPU, whose steps
ONNX Runtime computes: profiles, shapes, addresses, streams, recorded steps, failures.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.deploy.engine_folder import add_engine

Run = Callable[..., Any]
NEW = 10
VERSIONS = {"10": "10.15.1.29", "11": "11.4.0.106", "rtx": "1.7.1.116"}


@pytest.fixture(scope="session")
def simulation(compiled: Callable[..., Path]) -> Path:
    """The library that plays TensorRT and the CUDA driver."""
    return compiled("tensorrt/simulation", shared=True)


@pytest.fixture
def gpu(simulation: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """gpu(version="10.15.1.29", **variables) puts the simulation in place for child processes."""

    def put(version: str = VERSIONS["10"], **variables: str) -> None:
        monkeypatch.setenv("ANYBIT_CUDA", str(simulation))
        monkeypatch.setenv("ANYBIT_TENSORRT", str(simulation))
        monkeypatch.setenv("ANYBIT_SIM_VERSION", version)
        for name, value in variables.items():
            monkeypatch.setenv(f"ANYBIT_SIM_{name.upper()}", value)

    return put


def built(
    model: Path, folder: Path, libraries: dict[str, str], version: str = VERSIONS["10"], **more: Any
) -> Path:
    """A copy of OUT with an engine that the simulation runs."""
    out = Path(shutil.copytree(model, folder / "out"))
    engine = {"onnx": str(out / "onnx" / "model.onnx"), **libraries}
    edition = "tensorrt-rtx" if version.startswith("1.") else "tensorrt"
    found = {"edition": edition, "version": version, "max_batch": 4, "max_seq": 128, **more}
    return add_engine(out, engine=engine, plugins=b"ABQGemm QQQGemm", **found)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    random = np.random.default_rng(1)
    return [random.integers(1, 500, random.integers(1, 60)).tolist() for _ in range(12)]


def requests(prompts: list[list[int]], **options: Any) -> list[dict[str, Any]]:
    return [
        {"tokens": prompt, "max_new_tokens": NEW, "ignore_end": True, **options}
        for prompt in prompts
    ]


def tokens(rounds: list[list[dict[str, Any]]]) -> list[list[list[int]]]:
    return [[answer["tokens"] for answer in answers] for answers in rounds]


@pytest.mark.parametrize("version", VERSIONS.values(), ids=VERSIONS.keys())
def test_greedy_tokens_are_those_of_onnxruntime(
    model: Path,
    tmp_path: Path,
    driver: Run,
    libraries: dict[str, str],
    gpu: Callable[..., None],
    prompts: list[list[int]],
    version: str,
) -> None:
    """12 prompts in 6 slots, of which a call takes 4, in chunks; then prompts that begin like what a
    slot holds and go on otherwise; then one alone. Odds too, to the bit.
    """
    gpu(version)
    out = built(model, tmp_path, libraries, version)
    branched = [[*prompt[: len(prompt) // 2], 7, 8, 9] for prompt in prompts]
    rounds = [requests(each, logprobs=1) for each in (prompts, branched, prompts[:1])]
    load = {"slots": 6, "chunk": 16}
    want = driver(out, rounds, {**load, "backend": "onnxruntime"})
    got = driver(out, rounds, {**load, "backend": "tensorrt"})
    assert tokens(got["rounds"]) == tokens(want["rounds"])
    for got_round, want_round in zip(got["rounds"], want["rounds"], strict=True):
        for one, other in zip(got_round, want_round, strict=True):
            assert one["logprobs"] == other["logprobs"]
    assert got["stats"]["failed"] == 0
    card = got["card"]
    title = "TensorRT-RTX" if version.startswith("1.") else "TensorRT"
    graphs = {"static": "CUDA graphs", "concat": "no CUDA graphs (its cache grows)"}
    assert card["backend"] == (
        f"{title} {version} on a simulated GPU, {graphs[card['cache_form']]}"
    )
    assert card["choice"] == ""
    assert card["threads"] == 0


@pytest.fixture(scope="module")
def static(tiny_model_dir: Path, export: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """OUT of a tiny model with a static cache. Do not change it."""
    out = tmp_path_factory.mktemp("static") / "out"
    return Path(export(tiny_model_dir, out, max_seq=128, static_cache=True))


@pytest.mark.parametrize("how", ["option", "variable", "refused"])
def test_without_cuda_graphs(
    static: Path,
    tmp_path: Path,
    driver: Run,
    libraries: dict[str, str],
    gpu: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    prompts: list[list[int]],
    how: str,
) -> None:
    """Turned off, or refused by the driver: the same tokens."""
    gpu(**({"no_capture": "1"} if how == "refused" else {}))
    if how == "variable":
        monkeypatch.setenv("ANYBIT_CUDA_GRAPHS", "0")
    out = built(static, tmp_path, libraries)
    rounds = [requests(prompts[:6])]
    want = driver(out, rounds, {"backend": "onnxruntime"})
    found = driver(out, rounds, {"backend": "tensorrt", "cuda_graphs": how != "option"})
    assert tokens(found["rounds"]) == tokens(want["rounds"])
    why = {
        "refused": 'cuStreamBeginCapture_v2: got "ERROR_801: a simulated failure", expected '
        "success. Look whether nvidia-smi shows the GPU in order."
    }.get(how, "turned off")
    assert found["card"]["backend"] == (
        f"TensorRT 10.15.1.29 on a simulated GPU, no CUDA graphs ({why})"
    )


def test_rows_that_do_not_begin_where_tensorrt_wants_them(
    tiny_model_dir: Path,
    tmp_path: Path,
    export: Run,
    driver: Run,
    libraries: dict[str, str],
    gpu: Callable[..., None],
    prompts: list[list[int]],
) -> None:
    """A row of 2 heads, 99 tokens and 16 numbers ends at no multiple of 256 bytes: each slot is
    computed alone.
    """
    gpu()
    odd = export(tiny_model_dir, tmp_path / "odd", max_seq=99, static_cache=True)
    out = built(odd, tmp_path, libraries, max_seq=99)
    rounds = [requests(prompts[:5])]
    want = driver(out, rounds, {"backend": "onnxruntime"})
    found = driver(out, rounds, {"backend": "tensorrt"})
    assert tokens(found["rounds"]) == tokens(want["rounds"])
    assert found["card"]["logits"] == 512 * 4


def test_the_memory_of_the_gpu(
    model: Path,
    tmp_path: Path,
    driver: Run,
    libraries: dict[str, str],
    gpu: Callable[..., None],
) -> None:
    """Caches of the slots, logits of the largest call, and what the engine says that it needs."""
    gpu()
    out = built(model, tmp_path, libraries)
    card = driver(out, [], {"backend": "tensorrt", "slots": 3})["card"]
    static = card["cache_form"] == "static"
    cache = 2 * 2 * 2 * 16 * 2 * 128
    assert card["cache"] == 3 * cache
    assert card["second_cache"] == (0 if static else cache)
    assert card["logits"] == (3 if static else 1) * 512 * 4
    # Of 3 slots, 6 ranges can be recorded; the simulation's contexts take 30 kB, its graphs 20 kB.
    assert card["graphs"] == (6 * 50_000 if static else 0)
    parts = ("cache", "second_cache", "logits", "graphs")
    assert card["total"] == sum(card[part] for part in parts) + 4096
    gpu(memory="100000")
    message = driver(out, [], {"backend": "tensorrt", "slots": 3}, fails=True)
    assert message.startswith("memory: got 0.1 MB, expected ")
    assert message.endswith(
        ", all on the GPU). Load with fewer slots, a smaller capacity or a smaller chunk."
    )


# ---------------------------------------------------------------- which backend


def test_auto_takes_the_engine_where_it_fits(
    static: Path,
    tmp_path: Path,
    driver: Run,
    libraries: dict[str, str],
    gpu: Callable[..., None],
    simulation: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else the ONNX file, and the card says why."""
    out = built(static, tmp_path, libraries, compute_capabilities=["9.0"])

    def chosen(folder: Path = out) -> tuple[str, str]:
        card = driver(folder, [], {"backend": "auto"})["card"]
        return card["backend"].split(" 1")[0], card["choice"]

    gpu()
    assert chosen() == ("TensorRT", "the engine fits this machine")
    assert chosen(out / "engine") == ("TensorRT", "the engine fits this machine")
    assert chosen(static) == ("ONNX Runtime", f"{static}: got no engine folder")
    gpu(gpu="8.6")
    assert chosen() == (
        "ONNX Runtime",
        f"{out}/engine/model.engine: got an engine for compute capability 9.0, expected 8.6 of a "
        "simulated GPU",
    )
    gpu(gpu="")
    assert chosen() == (
        "ONNX Runtime",
        'the CUDA driver: got "ERROR_100: a simulated failure", expected a GPU',
    )
    gpu("10.13.3.9", gpu="9.0")
    assert chosen() == (
        "ONNX Runtime",
        "TensorRT: got version 10.13.3.9, expected 10.15.1.29, which built the engine",
    )
    gpu()
    monkeypatch.setenv("ANYBIT_TENSORRT", str(tmp_path))
    assert chosen() == (
        "ONNX Runtime",
        f"ANYBIT_TENSORRT: got {tmp_path}, expected libnvinfer.so.10 or a folder that has it",
    )


def test_an_engine_folder_alone_that_does_not_fit(
    static: Path,
    tmp_path: Path,
    driver: Run,
    libraries: dict[str, str],
    gpu: Callable[..., None],
) -> None:
    """What is wrong with the engine, as there is nothing else to run."""
    out = built(static, tmp_path, libraries)
    gpu(gpu="")
    for backend in ("auto", "tensorrt"):
        assert driver(out / "engine", [], {"backend": backend}, fails=True) == (
            'the CUDA driver: got "ERROR_100: a simulated failure", expected a GPU. Look whether '
            "nvidia-smi shows one, or run the ONNX file (backend onnxruntime)."
        )


# ---------------------------------------------------------------- what does not fit

AGAIN = "Build the engine again"


def edit_record(out: Path, **changes: Any) -> None:
    """Change engine.json; the records follow."""
    path = out / "engine" / "engine.json"
    replace(out, path.name, json.dumps(json.loads(path.read_text()) | changes))


def replace(out: Path, name: str, text: str) -> None:
    """Change a file of the engine's folder, and its record."""
    (out / "engine" / name).write_text(text)
    from calibration.out.files import file_records, write_json

    manifest = json.loads((out / "manifest.json").read_text())
    manifest["stages"]["engine"]["files"] |= file_records(out / "engine", only=name)
    write_json(out / "manifest.json", manifest)


def test_engines_that_are_refused(
    static: Path,
    tmp_path: Path,
    driver: Run,
    libraries: dict[str, str],
    gpu: Callable[..., None],
) -> None:
    """Each with where, what was got and expected, and what to do; whichever backend was asked for."""
    gpu()
    out = built(static, tmp_path, libraries)
    folder = out / "engine"

    def refused(backend: str = "auto") -> str:
        return str(driver(out, [], {"backend": backend}, fails=True))

    whole = (folder / "model.engine").read_bytes()
    (folder / "model.engine").write_bytes(whole[:-1])
    assert refused() == (
        f"{folder}/model.engine: got {len(whole) - 1} bytes, expected {len(whole)}. The artifact is "
        "damaged: make this stage again."
    )
    (folder / "model.engine").write_bytes(whole)
    replace(out, "model.engine", "no engine")
    assert refused() == (
        f'{folder}/model.engine: got "the serialized engine is damaged" from TensorRT 10.15.1.29, '
        "expected an engine that it takes. Build the engine again on this machine."
    )
    replace(out, "model.engine", whole.decode())
    replace(out, "libanybit_plugins.so", "QQQGemm")
    assert refused() == (
        f"{folder}/libanybit_plugins.so: got no plugin ABQGemm, expected it. Build the engine again: "
        "its folder holds the library that it needs."
    )
    replace(out, "libanybit_plugins.so", "ABQGemm QQQGemm")
    edit_record(out, edition="tensorflow")
    assert refused() == (
        f"{folder}/engine.json, edition: got tensorflow, expected tensorrt or tensorrt-rtx. {AGAIN}."
    )
    edit_record(out, edition="tensorrt", version="9.3.0.1")
    gpu("9.3.0.1")
    assert refused("tensorrt").endswith(
        "got TensorRT 9.3.0.1, expected 10.1 to 11.x. Install such a version and build the engine "
        "with it."
    )


# ---------------------------------------------------------------- failures

# What is called once for each engine, before any step; a failure is the end of loading.
LOADING = [
    "cuInit",
    "cuDeviceGetCount",
    "cuDeviceGet",
    "cuDeviceGetName",
    "cuDeviceGetAttribute",
    "cuDevicePrimaryCtxRetain",
    "cuCtxGetCurrent",
    "cuCtxSetCurrent",
    "cuMemGetInfo_v2",
    "cuMemAlloc_v2",
    "cuMemHostAlloc",
    "cuStreamCreate",
    "cuMemsetD8Async",
    "getCreator",
    "createInferRuntime",
    "deserializeCudaEngine",
    "createExecutionContext",
    "setOptimizationProfileAsync",
]
# What a step calls; a failure ends the requests in it.
STEPS = [
    "cuCtxSetCurrent",
    "cuMemcpyHtoDAsync_v2",
    "cuMemcpyDtoHAsync_v2",
    "cuStreamSynchronize",
    "cuGraphLaunch",
    "setInputShape",
    "setTensorAddress",
    "enqueueV3",
]
# What records a step; a failure leaves steps that run as they come.
RECORDING = [
    "createExecutionContext",
    "cuStreamBeginCapture_v2",
    "cuStreamEndCapture",
    "cuGraphInstantiateWithFlags",
]
OUT_OF_MEMORY, NOT_PERMITTED, ILLEGAL_ADDRESS = 2, 800, 700


@pytest.fixture
def outcomes(
    static: Path,
    tmp_path: Path,
    compiled: Callable[..., Path],
    libraries: dict[str, str],
    gpu: Callable[..., None],
    simulation: Path,
    prompts: list[list[int]],
) -> Callable[..., list[dict[str, Any]]]:
    """What failures.cpp makes of faults, each {"function", "nth", "status", "sticky"}, and of a limit
    of the memory.
    """
    gpu()
    out = built(static, tmp_path, libraries)

    def run(steps: list[dict[str, Any]], variant: str = "") -> list[dict[str, Any]]:
        task = {
            "folder": str(out),
            "library": str(simulation),
            "prompts": [prompts[0][:20], prompts[1][:5]],
            "steps": steps,
        }
        done = subprocess.run(
            [compiled("tensorrt/failures", variant)],
            input=json.dumps(task),
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        found: list[dict[str, Any]] = json.loads(done.stdout)
        return found

    return run


def fault(function: str, nth: int = 1, status: int = NOT_PERMITTED, sticky: int = 0) -> Any:
    return {"function": function, "nth": nth, "status": status, "sticky": sticky}


def test_every_call_that_fails_is_told(
    outcomes: Callable[..., list[dict[str, Any]]],
) -> None:
    """In loading an error; in a step the end of its requests, after which the next ones get their
    tokens; in recording nothing. Nothing is left behind.
    """
    names = [*LOADING, *STEPS, *RECORDING]
    good = outcomes([fault("", 0), *(fault(name, 0) for name in dict.fromkeys(names))])
    want = [answer["tokens"] for answer in good[0]["during"]]
    counts = {one["function"]: (one["calls_to_load"], one["calls"]) for one in good}
    for one in good:
        assert [answer["tokens"] for answer in one["during"]] == want
        assert one["kept"] and one["kept_at_the_end"], "the thread's own context is lost"
    steps = [fault(name) for name in LOADING]
    for name in STEPS:
        loaded, all_calls = counts[name]
        assert all_calls > loaded, f"no step calls {name}"
        steps.append(fault(name, loaded + 1))
    steps += [fault(name, counts[name][0] + 1) for name in RECORDING]
    for found in outcomes(steps):
        where = str(found)
        assert found["live"] == 0, where
        name, nth = found["function"], found["nth"]
        if name in LOADING and nth == 1:
            assert ", expected " in found["load"], where
            continue
        answers = found["during"]
        assert [one["tokens"] for one in found["afterwards"]] == want, where
        failed = [one for one in answers if one["reason"] == "error"]
        assert (len(failed) == 0) == (name in RECORDING), where
        for one, tokens in zip(answers, want, strict=True):
            if one["reason"] == "error":
                assert name in one["detail"] or f"{name} fails as planned" in one["detail"], where
                assert one["tokens"] == tokens[: len(one["tokens"])], where
            else:
                assert one["tokens"] == tokens, where


def test_recorded_steps_stay_within_the_plan(
    outcomes: Callable[..., list[dict[str, Any]]], driver: Run, tmp_path: Path
) -> None:
    """Ranges of slots that the limit has no room for run as they come, with the same tokens."""
    record = fault("cuGraphInstantiateWithFlags", 0)
    (whole,) = outcomes([record])
    load = {"backend": "tensorrt", "slots": 3, "chunk": 16}
    card = driver(tmp_path / "out", [], load)["card"]
    assert card["graphs"] == 300_000
    limit = card["total"] - 300_000 + 60_000
    tight = driver(tmp_path / "out", [], {**load, "memory_limit": limit})["card"]
    assert (tight["graphs"], tight["total"]) == (60_000, limit)
    (found,) = outcomes([{**record, "memory_limit": limit}])
    assert found["during"] == whole["during"]
    assert found["calls"] == 1 < whole["calls"]
    limit -= 50_001  # none has room
    none = driver(tmp_path / "out", [], {**load, "memory_limit": limit})["card"]
    assert (none["graphs"], none["total"]) == (0, limit - 9999)
    assert none["backend"].endswith(
        ", no CUDA graphs (CUDA graphs: got 9999 bytes that the plan leaves, expected 50000 for one. "
        "Allow more memory, or fewer slots.)"
    )
    (found,) = outcomes([{**record, "memory_limit": limit}])
    assert found["during"] == whole["during"]


@pytest.mark.slow
def test_sanitizers(outcomes: Callable[..., list[dict[str, Any]]]) -> None:
    """Two failures of loading, steps and recording each, and a lost GPU."""
    steps = [fault("", 0), fault("cuMemAlloc_v2", 9), fault("createExecutionContext", 3)]
    steps += [fault(name, nth) for name in ("enqueueV3", "cuStreamEndCapture") for nth in (3, 5)]
    steps.append(fault("cuStreamSynchronize", 6, ILLEGAL_ADDRESS, sticky=1))
    found = outcomes(steps, "address,undefined")
    assert len(found) == len(steps)


def test_a_gpu_that_is_lost(
    outcomes: Callable[..., list[dict[str, Any]]],
) -> None:
    """After an illegal access every call fails: running requests end, and no more are taken."""
    gone = (
        'got "ERROR_700: a simulated failure" from every call of the GPU since one failed, expected '
        "success; the system's log may say why, and this process cannot use the GPU any more"
    )
    (found, memory) = outcomes(
        [
            fault("cuStreamSynchronize", 6, ILLEGAL_ADDRESS, sticky=1),
            fault("cuMemAlloc_v2", 3, OUT_OF_MEMORY),
        ]
    )
    first = found["during"][0]
    assert first["reason"] == "error"
    assert {one["reason"] for one in found["during"]} == {"error"}
    assert found["afterwards"] == [
        {
            "reason": "refused",
            "detail": f"engine: {gone}. Start a new process.",
            "tokens": [],
        }
    ]
    assert memory["load"] == (
        'cuMemAlloc_v2: got "ERROR_2: a simulated failure", expected memory of the GPU. Load with '
        "fewer slots or a smaller capacity, or end what else uses the GPU."
    )
