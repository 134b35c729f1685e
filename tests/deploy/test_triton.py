"""Model repositories of Triton: config.pbtxt through Triton's own protobuf schema, against the inputs and
outputs of the ONNX file; what lies where; what is refused.
"""

from __future__ import annotations

import importlib.util
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest
from google.protobuf import text_format

from calibration.out.description import Description, read_description
from calibration.out.files import file_records, write_json
from calibration.out.json_file import read_json
from deploy.__main__ import main
from deploy.triton import BACKENDS, Deployment, config, write_repository
from exporter.run.native import native_session
from plugins.errors import InputError
from tests.exporter.conftest import tiny_export  # noqa: F401  (a fixture)

ELEMENTS = {"TYPE_INT64": 7, "TYPE_FP32": 1, "TYPE_FP16": 10, "TYPE_INT8": 3}


@pytest.fixture(scope="module")
def schema() -> ModuleType:
    """Triton's model_config.proto, compiled, of the package tritonclient; without what else is in it,
    which wants gRPC.
    """
    package = importlib.util.find_spec("tritonclient")
    if package is None or not package.submodule_search_locations:
        pytest.skip("tritonclient is not installed (the extra dev has it)")
    path = Path(package.submodule_search_locations[0]) / "grpc" / "model_config_pb2.py"
    spec = importlib.util.spec_from_file_location("model_config_pb2", path)
    assert spec is not None and spec.loader is not None
    if spec.name not in sys.modules:
        sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[spec.name])
    return sys.modules[spec.name]


def parsed(schema: ModuleType, text: str) -> Any:
    return text_format.Parse(text, schema.ModelConfig())


def sizes(tensor: Any) -> list[int]:
    """Behind the batch's, as the backend sees them."""
    return list(tensor.reshape.shape if tensor.HasField("reshape") else tensor.dims)


def about(out: Path) -> Description:
    return read_description(out / "onnx" / "model.json", "")[0]


@pytest.mark.parametrize(
    "made", [{}, {"static": 32}, {"kv_bits": 4}, {"kv_bits": 3, "static": 32}, {"dtype": "float32"}]
)
@pytest.mark.parametrize("sequences", [0, 5])
def test_the_config_is_that_of_the_graph(
    schema: ModuleType,
    tiny_export: Callable[..., Path],  # noqa: F811
    made: dict[str, Any],
    sequences: int,
) -> None:
    out = tiny_export(**made)
    deployment = Deployment(sequences=sequences, instances=3, max_batch=4, threads=2)
    found = parsed(schema, config("a-model", "onnxruntime", about(out), deployment, "/r/lib.so"))
    graph = onnx.load(out / "onnx" / "model.onnx", load_external_data=False).graph
    wanted = {
        value.name: (
            value.type.tensor_type.elem_type,
            [dim.dim_value or -1 for dim in value.type.tensor_type.shape.dim][1:],
        )
        for value in (*graph.input, *graph.output)
    }
    told = {
        tensor.name: (ELEMENTS[schema.DataType.Name(tensor.data_type)], sizes(tensor))
        for tensor in (*found.input, *found.output)
    }
    states = found.sequence_batching.state
    for state in states:
        kind = ELEMENTS[schema.DataType.Name(state.data_type)], list(state.dims)
        told |= {state.input_name: kind, state.output_name: kind}
        first = state.initial_state[0]
        assert first.zero_data and first.name and first.data_type == state.data_type
        assert list(first.dims) == [1 if size == -1 else size for size in state.dims]
    assert told == wanted
    assert (found.name, found.backend, found.max_batch_size) == (
        "a-model",
        "onnxruntime",
        1 if sequences else 4,
    )
    assert bool(states) == bool(sequences)
    assert found.sequence_batching.oldest.max_candidate_sequences == sequences
    group = found.instance_group[0]
    assert (group.count, schema.ModelInstanceGroup.Kind.Name(group.kind)) == (3, "KIND_CPU")
    assert list(found.model_operations.op_library_filename) == ["/r/lib.so"]
    assert found.parameters["intra_op_thread_count"].string_value == "2"


@pytest.mark.parametrize("made", [{}, {"kv_bits": 4}])
def test_a_sequence_may_begin_with_the_row_that_triton_gives_it(
    tiny_export: Callable[..., Path],  # noqa: F811
    made: dict[str, Any],
) -> None:
    out = tiny_export(**made)
    session = native_session(out / "onnx", "float16")
    types = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int8)": np.int8}
    past = [value for value in session.get_inputs() if value.name.startswith("past_key_values.")]
    found = []
    for rows in (0, 1):
        feeds: dict[str, Any] = {
            value.name: np.zeros((1, value.shape[1], rows, value.shape[3]), types[value.type])
            for value in past
        }
        feeds["input_ids"] = np.array([[5, 9, 300]])
        feeds["attention_mask"] = np.array([[0] * rows + [1, 1, 1]])
        feeds["position_ids"] = np.array([[0, 1, 2]])
        feeds["logits_indices"] = np.array([[0, 1, 2]])
        found.append(session.run(["logits"], feeds)[0])
    np.testing.assert_allclose(found[1], found[0], atol=1e-3 * np.abs(found[0]).max())


def test_an_engine_has_two_profiles(schema: ModuleType, artifact: Path) -> None:
    found = parsed(schema, config("m", "tensorrt", about(artifact), Deployment(max_batch=2)))
    assert (found.backend, found.default_model_filename) == ("tensorrt", "model.plan")
    group = found.instance_group[0]
    assert schema.ModelInstanceGroup.Kind.Name(group.kind) == "KIND_GPU"
    assert list(group.profile) == ["0", "1"] and not found.model_operations.op_library_filename


def test_names_are_quoted(schema: ModuleType, artifact: Path) -> None:
    name = 'a "b" \\ c/ü'
    assert parsed(schema, config(name, "onnxruntime", about(artifact), Deployment())).name == name


def test_a_repository_of_both(
    schema: ModuleType,
    engine_record: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, to = engine_record(edition="tensorrt", version="10.14"), tmp_path / "models"
    words = ["--to", str(to), "--at", "/models", "--max-batch", "8", "--instances", "2"]
    assert main(["triton", str(out), *words]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = [Path(line).name for line in lines[:2]]
    assert lines[2:] == [str(to / "serve.sh")]
    assert [name.rpartition("-")[2] for name in names] == [*BACKENDS]
    for name in names:
        found = parsed(schema, (to / name / "config.pbtxt").read_text())
        assert found.name == name and (to / name / "1" / found.default_model_filename).is_file()
        assert (to / name / "tokenizer" / "tokenizer.json").is_file()
        assert found.max_batch_size == (2 if found.backend == "tensorrt" else 8)
        for library in found.model_operations.op_library_filename:
            assert library == f"/models/{name}/1/libanybit_onnxruntime.so"
            assert (to / Path(library).relative_to("/models")).is_file()
    script = (to / "serve.sh").read_text()
    preload = f"/models/{names[0]}/1/libanybit_plugins.so"
    assert f"LD_PRELOAD={preload}" in script and "--model-repository=/models " in script
    assert (to / Path(preload).relative_to("/models")).is_file()
    before = file_records(to)
    assert main(["triton", str(out), *words]) == 0  # again, over itself
    assert file_records(to) == before
    # Other models are nobody's to replace, another artifact's among them, nor is a name alone enough.
    for model in ("resnet", "another-w4a8-onnxruntime"):
        shutil.copytree(to / names[0], to / model)
        with pytest.raises(InputError) as error:
            write_repository(out, to)
        assert str(error.value) == (
            f"--to {to}: got a folder with other files in it ({model}), expected a new one, or one that "
            "this command wrote before. Choose another --to."
        )
        shutil.rmtree(to / model)
    shutil.rmtree(to / names[1] / "tokenizer")
    with pytest.raises(InputError, match=f"other files in it .{names[1]}.,"):
        write_repository(out, to)
    assert (to / names[1] / "config.pbtxt").is_file()


def test_what_triton_does_not_run(
    engine_record: Callable[..., Path], copy: Path, tmp_path: Path
) -> None:
    out, to = engine_record(), tmp_path / "models"
    assert [name.rpartition("-")[2] for name in write_repository(out, to)] == ["onnxruntime"]
    assert "LD_PRELOAD" not in (to / "serve.sh").read_text()
    with pytest.raises(InputError) as error:
        write_repository(out, tmp_path / "other", ["tensorrt"])
    assert str(error.value) == (
        "--backend tensorrt: got an engine of tensorrt-rtx, expected one of tensorrt, which alone "
        "Triton has. Build it with --engine tensorrt, of the version in Triton's container, or serve "
        "--backend onnxruntime."
    )
    for path in (copy / "onnx" / "model.json", copy / "manifest.json"):
        data = read_json(path)
        if path.name == "model.json":
            data["dtype"] = data["cache"]["dtype"] = "bfloat16"
        else:
            data["stages"].pop("engine")
            data["stages"]["onnx"]["files"] |= file_records(copy / "onnx", only="model.json")
        write_json(path, data)
    with pytest.raises(InputError) as error:
        write_repository(copy, tmp_path / "other")
    assert str(error.value) == (
        "--backend onnxruntime: got a bfloat16 model, expected float16 or float32: ONNX Runtime has no "
        "such type on a CPU. Export with --dtype float16."
    )
    with pytest.raises(InputError) as error:
        write_repository(copy / "quant", tmp_path / "other")
    assert str(error.value) == (
        f"{copy / 'quant'}: got neither an onnx nor an engine folder, expected one. Export the model "
        "with: python -m exporter MODEL --wbits W --abits A --out DIR."
    )
    assert not (tmp_path / "other").exists()


def test_the_command_line(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        main(["triton", str(copy), "--to", "x", "--backend", "python"])
    assert error.value.code == 2
    assert (
        "got 'python', expected some of tensorrt,onnxruntime, separated by commas"
        in capsys.readouterr().err
    )
    assert main(["triton", str(copy), "--to", str(copy / "models")]) == 2
    assert "got a folder in or around the artifact" in capsys.readouterr().err
