"""What lies beside a checkpoint's weights: generation_config.json, and what the tokenizer reads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers

from calibration.checkpoints import side_files
from calibration.checkpoints.checkpoint import open_checkpoint
from calibration.checkpoints.side_files import Generation, read_generation
from calibration.out.description import SamplingDefaults
from calibration.out.files import StageWriter
from calibration.out.layout import QUANT
from calibration.progress import NullProgress
from calibration.quant.describe import describe
from calibration.quant.folder import QuantModel, read_quant
from calibration.quant.quantize import QuantizeOptions, quantize_model
from calibration.quant.scheme import QuantScheme
from plugins.errors import InputError
from plugins.text import shown

FIX = "Correct the field, or take the file away"


def _write(folder: Path, **fields: Any) -> Path:
    path = folder / "generation_config.json"
    path.write_text(json.dumps(fields))
    return path


@pytest.fixture
def model(tiny_model_dir: Path, tmp_path: Path) -> Path:
    """A model that a test may change."""
    return Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))


class _Told(NullProgress):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def message(self, text: str) -> None:
        self.notes.append(text)

    warning = message


def _quantised(model: Path, out: Path, progress: _Told | None = None) -> QuantModel:
    with StageWriter(out, QUANT) as writer:
        quantize_model(
            open_checkpoint(str(model), offline=True),
            QuantScheme("ABQGemm", "rtn", 8, 8),
            QuantizeOptions(),
            writer.path,
            progress,
        )
    return read_quant(out / QUANT)


# ---------------------------------------------------------------- generation_config.json


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        ({}, Generation()),
        ({"eos_token_id": None, "top_k": None, "transformers_version": "5"}, Generation()),
        ({"eos_token_id": 7}, Generation((7,))),
        ({"eos_token_id": [7, 9]}, Generation((7, 9))),
        ({"do_sample": False}, Generation((), SamplingDefaults())),
        ({"temperature": 1, "top_p": 1}, Generation((), SamplingDefaults())),
        (
            {"repetition_penalty": 1.2, "temperature": 0},
            Generation((), SamplingDefaults(repetition_penalty=1.2, temperature=0)),
        ),
        (
            {"do_sample": True, "temperature": 0.6, "top_p": 0.9},
            Generation((), SamplingDefaults(do_sample=True, temperature=0.6, top_p=0.9, top_k=50)),
        ),
        (
            {"do_sample": True, "top_k": 0},
            Generation((), SamplingDefaults(do_sample=True)),
        ),
        (
            {"min_p": 0.05, "num_beams": 4, "typical_p": 1.0, "no_repeat_ngram_size": 0},
            Generation((), None, ("min_p 0.05", "num_beams 4")),
        ),
        (
            {"forced_eos_token_id": 1, "no_repeat_ngram_size": 1, "guidance_scale": 0, "min_p": 0},
            Generation(
                (), None, ("forced_eos_token_id 1", "guidance_scale 0", "no_repeat_ngram_size 1")
            ),
        ),
        (
            {"watermarking_config": {"bias": 2}, "max_length": 9, "max_time": 1, "num_beams": 1},
            Generation((), None, ('watermarking_config {"bias": 2}',)),
        ),
        ({"eos_token_id": -1}, Generation()),
        ({"eos_token_id": [7, -1]}, Generation((7,))),
        ({"do_sample": True, "top_k": -1}, Generation((), SamplingDefaults(do_sample=True))),
        (
            {"do_sample": True, "top_k": 40.0},
            Generation((), SamplingDefaults(do_sample=True, top_k=40)),
        ),
        (  # nothing is drawn, and no draw could be made with the first and the last
            {"top_p": 0.0, "temperature": 0.7, "top_k": "all"},
            Generation((), SamplingDefaults(temperature=0.7)),
        ),
    ],
)
def test_what_the_file_says(tmp_path: Path, fields: dict[str, Any], found: Generation) -> None:
    assert read_generation(tmp_path) == Generation()
    _write(tmp_path, **fields)
    assert read_generation(tmp_path) == found


def test_what_changes_nothing_is_transformers_default() -> None:
    defaults = transformers.GenerationConfig._get_default_generation_params()
    for name, neutral in side_files._NOT_FOLLOWED.items():
        assert name in vars(transformers.GenerationConfig())
        assert defaults.get(name) in (None, neutral)


def test_transformers_draws_among_fifty_where_the_file_gives_no_number() -> None:
    defaults = transformers.GenerationConfig._get_default_generation_params()
    assert defaults["top_k"] == 50
    ours = SamplingDefaults(top_k=50)
    assert all(defaults[name] == getattr(ours, name) for name in ours.__dataclass_fields__)


@pytest.mark.parametrize(
    ("field", "value", "problem"),
    [
        ("eos_token_id", "</s>", 'got "</s>", expected a whole number or a list'),
        ("eos_token_id", [3, True], "got true, expected a whole number"),
        ("do_sample", "yes", 'got "yes", expected true or false'),
        ("temperature", -0.1, "got -0.1, expected at least 0"),
        ("temperature", "0.6", 'got "0.6", expected a number'),
        ("top_k", 1.5, "got 1.5, expected a whole number"),
        ("top_k", -2, "got -2, expected at least 0"),
        ("top_p", 0, "got 0, expected more than 0"),
        ("top_p", 1.1, "got 1.1, expected at most 1"),
        ("repetition_penalty", 0, "got 0, expected at least 0.01"),
        ("repetition_penalty", 1e300, "got 1e+300, expected at most 100"),
        ("temperature", 1e300, "got 1e+300, expected at most 100"),
    ],
)
def test_values_that_no_text_is_made_with(
    model: Path, field: str, value: Any, problem: str
) -> None:
    path = _write(model, **{"do_sample": True, field: value})
    with pytest.raises(InputError) as caught:
        open_checkpoint(str(model), offline=True)
    assert caught.value.exit_code == 2
    place = f"{field}[1]" if isinstance(value, list) else field
    assert str(caught.value) == f"{path}, {place}: {problem}. {FIX}."


def test_a_draw_at_temperature_0(tmp_path: Path) -> None:
    path = _write(tmp_path, do_sample=True, temperature=0.0)
    with pytest.raises(InputError) as caught:
        read_generation(tmp_path)
    assert str(caught.value) == (
        f"{path}, temperature: got 0, expected more than 0 where do_sample is true. {FIX}."
    )


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"top_p": NaN}'])
def test_a_damaged_file(tmp_path: Path, content: str) -> None:
    path = tmp_path / "generation_config.json"
    path.write_text(content)
    with pytest.raises(InputError) as caught:
        read_generation(tmp_path)
    assert caught.value.where == str(path) and caught.value.fix == FIX


@pytest.mark.parametrize(
    ("config", "file", "stored"),
    [
        (0, {}, 0),
        (0, {"eos_token_id": 0}, 0),
        ([0, 3], {"eos_token_id": [3]}, [0, 3]),
        (0, {"eos_token_id": [5, 3]}, [0, 5, 3]),
        (None, {}, [0]),  # the tokenizer's own
        (4, {}, [4, 0]),
    ],
)
def test_every_end_token_comes_along(
    model: Path, tmp_path: Path, config: Any, file: dict[str, Any], stored: Any
) -> None:
    """The union of the config's, the file's and the tokenizer's; as it was where that adds none."""
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": config}))
    _write(model, **file)
    quant = _quantised(model, tmp_path / "out")
    assert quant.config["eos_token_id"] == stored
    assert quant.config["hf"]["eos_token_id"] == config and "sampling" not in quant.config
    assert describe(quant).eos_token_ids == tuple(stored if isinstance(stored, list) else [stored])


def test_sampling_comes_along_and_what_is_not_followed_is_told(model: Path, tmp_path: Path) -> None:
    _write(model, do_sample=True, temperature=0.6, top_p=0.9, min_p=0.1, guidance_scale=2)
    told = _Told()
    quant = _quantised(model, tmp_path / "out", told)
    assert describe(quant).sampling == SamplingDefaults(
        do_sample=True, temperature=0.6, top_p=0.9, top_k=50
    )
    assert told.notes == [
        "generation_config.json asks for guidance_scale 2, min_p 0.1, which python -m deploy does "
        "not follow."
    ]


# ---------------------------------------------------------------- files of the tokenizer


def _change(path: Path, **fields: Any) -> None:
    config = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({name: one for name, one in config.items() if one is not None}))


def _special_tokens(model: Path) -> None:
    _change(model / "tokenizer_config.json", eos_token=None, pad_token=None)
    (model / "special_tokens_map.json").write_text('{"eos_token": "a", "pad_token": "<|pad|>"}')


def _added_tokens(model: Path) -> None:
    (model / "added_tokens.json").write_text('{"<|im_start|>": 500, "<|im_end|>": 501}')


def _template(model: Path) -> None:
    (model / "chat_template.jinja").write_text("{{ messages }}")


def _more_templates(model: Path) -> None:
    _template(model)
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")


def _template_field(model: Path) -> None:
    _change(model / "tokenizer_config.json", chat_template="{{ field }}")


def _template_list(model: Path) -> None:
    templates = [
        {"name": "default", "template": "{{ one }}"},
        {"name": "rag", "template": "{{ d }}"},
    ]
    _change(model / "tokenizer_config.json", chat_template=templates)


def _processors_template(model: Path) -> None:
    (model / "chat_template.json").write_text('{"chat_template": "{{ processor }}"}')


@pytest.mark.parametrize(
    ("change", "template"),
    [
        (_special_tokens, None),
        (_added_tokens, None),
        (_template, "{{ messages }}"),
        (_more_templates, "{{ messages }}"),
        (_template_field, "{{ field }}"),
        (_template_list, "{{ one }}"),
        (_processors_template, None),  # of multimodal models; transformers' tokenizers leave it
    ],
)
def test_what_transformers_makes_of_the_tokenizers_files(
    model: Path, tmp_path: Path, change: Callable[[Path], None], template: str | None
) -> None:
    """Is what OUT's own tokenizer is, and what model.json says."""
    change(model)
    wanted = transformers.AutoTokenizer.from_pretrained(str(model))
    quant = _quantised(model, tmp_path / "out")
    got, description = quant.tokenizer(), describe(quant)
    assert got.chat_template == wanted.chat_template and len(got) == len(wanted)
    assert got.special_tokens_map == wanted.special_tokens_map
    text = "Bread <|im_start|><|end|> a <|pad|>"
    assert got(text)["input_ids"] == wanted(text)["input_ids"]
    assert description.chat_template == template
    assert wanted.eos_token_id in description.eos_token_ids
    names = {str(path.relative_to(quant.path)) for path in quant.path.rglob("*.jinja")}
    assert names <= set(description.tokenizer)


@pytest.mark.parametrize("name", ["../up", "a/b", "", "x" * 200, ".hidden", "a\nb"])
def test_a_chat_template_has_the_name_of_a_file(model: Path, tmp_path: Path, name: str) -> None:
    """It is refused before any work, since it will be saved as one."""
    _change(model / "tokenizer_config.json", chat_template=[{"name": name, "template": "{{ x }}"}])
    with pytest.raises(InputError) as caught:
        open_checkpoint(str(model), offline=True).tokenizer()
    assert str(caught.value) == (
        f"{model}, chat templates: got {shown(name)!r}, expected the name of a template, such as "
        "tool_use. Put the model's tokenizer.json and tokenizer_config.json beside its weights."
    )


def test_a_tokenizer_that_cannot_be_saved_is_told_before_any_work(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: Any, **options: Any) -> None:
        raise ValueError("no such\nkind")

    monkeypatch.setattr(transformers.PreTrainedTokenizerBase, "save_pretrained", refuse)
    monkeypatch.setattr("calibration.quant.quantize.open_source", None)  # the work
    with pytest.raises(InputError) as caught:
        _quantised(model, tmp_path / "out")
    assert str(caught.value) == (
        "the model's tokenizer: got one that transformers cannot save (no such kind). Put another "
        "tokenizer.json and tokenizer_config.json beside the weights."
    )


def test_more_chat_templates_count_as_the_models_files(model: Path) -> None:
    _more_templates(model)
    path = model / "additional_chat_templates" / "tool_use.jinja"
    checkpoint = open_checkpoint(str(model), offline=True)
    before = checkpoint.stamp()
    path.write_text("{{ other }}")
    assert checkpoint.stamp() != before


@pytest.mark.parametrize(("more", "said"), [(1, "1 token"), (2, "2 tokens")])
def test_tokens_beyond_the_embedding_are_told(
    model: Path, tmp_path: Path, more: int, said: str
) -> None:
    _change(model / "config.json")
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(model))
    count = 512 + more - len(tokenizer)
    tokenizer.add_tokens([f"<|extra_{index}|>" for index in range(count)])
    tokenizer.save_pretrained(model)
    told = _Told()
    _quantised(model, tmp_path / "out", told)
    assert told.notes == [
        f"The tokenizer has {said} beyond the model's vocab_size of 512, the first "
        f"'<|extra_{count - more}|>' with id 512: a text with one of them will be refused."
    ]


def test_end_tokens_beyond_the_embedding_are_told(model: Path, tmp_path: Path) -> None:
    _write(model, eos_token_id=[0, 600, 512])
    told = _Told()
    _quantised(model, tmp_path / "out", told)
    assert told.notes == [
        "End tokens beyond the model's vocab_size of 512 (512, 600) will never end a text."
    ]
