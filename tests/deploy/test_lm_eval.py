"""python -m deploy lm-eval on a task of two documents, without the network; what it says without the
harness.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from deploy import lm_eval
from deploy.__main__ import main

installed = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm_eval is not installed"
)
DOCUMENTS = [
    {"question": "The river is", "choices": ["wide", "a loud bird"], "answer": 0},
    {"question": "A stone is", "choices": ["made of", "hard"], "answer": 1},
]
TASKS = {
    "tiny_choice": """output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
doc_to_choice: "{{choices}}"
metric_list:
  - metric: acc
""",
    "tiny_rolling": """output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}} {{choices[0]}}"
metric_list:
  - metric: word_perplexity
  - metric: byte_perplexity
""",
    "tiny_answer": """output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[0]}}"
generation_kwargs:
  until: ["."]
  max_gen_toks: 6
metric_list:
  - metric: exact_match
""",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in DOCUMENTS))
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    for name, text in TASKS.items():
        head = f"task: {name}\ndataset_path: json\ntest_split: test\ndataset_kwargs:\n"
        files = f"  data_files:\n    test: {data}\n"
        (tasks / f"{name}.yaml").write_text(head + files + text)
    return tasks


@installed
def test_tasks_of_every_kind(
    artifact: Path,
    folder: Path,
    no_network: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    results = tmp_path / "results.json"
    words = ["--tasks", ",".join(TASKS), "--include", str(folder), "--json", str(results)]
    assert main(["lm-eval", str(artifact), *words, "--progress", "none"]) == 0
    table = capsys.readouterr().out
    assert all(f"|{name}" in table for name in TASKS) and "acc" in table
    found = json.loads(results.read_text())["results"]
    assert found["tiny_choice"]["acc,none"] in (0.0, 0.5, 1.0)
    assert found["tiny_rolling"]["word_perplexity,none"] > 1
    assert found["tiny_answer"]["exact_match,none"] == 0.0


@installed
def test_an_unknown_task(artifact: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--tasks", "tiny_choice,no_such_task_at_all", "--include", str(folder)]
    assert main(["lm-eval", str(artifact), *words]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "--tasks: got 'no_such_task_at_all', expected a task, group or tag of the harness. `lm_eval ls "
        "tasks` lists them; --include FOLDER adds your own."
    )
    assert main(["lm-eval", str(artifact), "--tasks", "a", "--include", "no/folder"]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "--include no/folder: got no such folder, expected one. Check the path."
    )


def test_data_that_cannot_be_had(
    artifact: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(**options: Any) -> None:
        raise ConnectionError("no route")

    monkeypatch.setitem(sys.modules, "lm_eval.evaluator", SimpleNamespace(simple_evaluate=fails))
    monkeypatch.setitem(sys.modules, "lm_eval", SimpleNamespace())
    monkeypatch.setattr(lm_eval, "_check_installed", lambda: None)
    monkeypatch.setattr(lm_eval, "_manager", lambda request: None)
    monkeypatch.setattr(lm_eval, "adapter", lambda *given: None)
    assert main(["lm-eval", str(artifact), "--tasks", "arc_easy,piqa"]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "--tasks arc_easy,piqa: got ConnectionError: no route; expected the data sets of these tasks. "
        "Check the network, or put the data where the harness looks for it."
    )
    with pytest.raises(SystemExit) as error:
        main(["lm-eval", str(artifact), "--tasks", ","])
    assert error.value.code == 2 and "got no name, expected some" in capsys.readouterr().err


def test_without_the_harness(
    artifact: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["lm-eval", str(artifact), "--tasks", "arc_easy"]) == 2
    assert capsys.readouterr().err == (
        "lm-eval: got no package lm_eval, expected EleutherAI's lm-evaluation-harness. Run `pip install "
        "lm_eval`.\n"
    )
