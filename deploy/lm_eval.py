"""python -m deploy lm-eval: tasks of EleutherAI's lm-evaluation-harness on an artifact."""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploy.command import Command, add_progress, add_runner, check_file
from exporter.run.model import CPU
from plugins.cli import whole_number
from plugins.errors import InputError

if TYPE_CHECKING:
    from calibration.progress import Progress
    from deploy.scoring import Scorer

__all__ = ["COMMAND", "HarnessRequest", "adapter", "run_tasks"]


@dataclass(frozen=True, kw_only=True)
class HarnessRequest:
    """What is asked of the harness.

    Attributes:
        tasks: names, also with * in them.
        runner: who runs the model.
        folder: with task files of one's own.
        limit: documents of each task; 0 is all.
        shots: examples in front of each; None: as the task says.
        chat: put prompts into the model's chat template.
        add_bos: begin texts with the model's first token.
    """

    tasks: Sequence[str]
    runner: str = CPU
    folder: Path | None = None
    limit: int = 0
    shots: int | None = None
    chat: bool = False
    add_bos: bool = False


def adapter(scorer: Scorer, tokenizer: Any, progress: Progress) -> Any:
    """The harness's view of a model: an lm_eval.api.model.LM."""
    from lm_eval.api.model import LM

    class Artifact(LM):  # type: ignore[misc]
        """An artifact as the harness asks it."""

        def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
            progress.start("loglikelihood", len(requests))
            found = scorer.loglikelihood([request.args for request in requests])
            progress.finish()
            return found

        def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
            progress.start("rolling", len(requests))
            found = scorer.rolling([request.args[0] for request in requests])
            progress.finish()
            return found

        def generate_until(self, requests: Sequence[Any]) -> list[str]:
            progress.start("generate", len(requests))
            found = scorer.generate([request.args for request in requests])
            progress.finish()
            return found

        @property
        def tokenizer_name(self) -> str:
            return str(tokenizer.name_or_path)

        def chat_template(self, chat_template: bool | str = False) -> str | None:
            return tokenizer.get_chat_template() if chat_template else None

        def apply_chat_template(
            self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
        ) -> str:
            return str(
                tokenizer.apply_chat_template(
                    chat_history,
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                    continue_final_message=not add_generation_prompt,
                )
            )

    return Artifact()


def run_tasks(out: Path, request: HarnessRequest, progress: Progress) -> dict[str, Any]:
    """The harness's results, as its simple_evaluate gives them.

    Raises:
        InputError: the package lm_eval is missing, a task is unknown, its data cannot be had, or OUT
            is wrong. CheckError: the model computes NaN.
    """
    from deploy.scoring import Scorer
    from exporter.run.model import find_model

    _check_installed()
    model = find_model(out, request.runner)
    about, tokenizer = model.description, model.tokenizer()
    if request.chat and about.chat_template is None:
        raise InputError(
            "--chat",
            "got a model without a chat template, expected one with it",
            "Leave out --chat",
        )
    manager = _manager(request)
    from lm_eval.evaluator import simple_evaluate

    with model.open() as session:
        scorer = Scorer(
            session,
            tokenizer,
            about.eos_token_ids,
            about.bos_token_id,
            request.add_bos,
            lambda: progress.advance(1),
        )
        try:
            found = simple_evaluate(
                model=adapter(scorer, tokenizer, progress),
                tasks=list(request.tasks),
                num_fewshot=request.shots,
                limit=request.limit or None,
                apply_chat_template=request.chat,
                task_manager=manager,
                log_samples=False,
            )
        except OSError as error:  # those of the network are too
            raise InputError(
                f"--tasks {','.join(request.tasks)}",
                f"got {type(error).__name__}: {error}; expected the data sets of these tasks",
                "Check the network, or put the data where the harness looks for it",
            ) from error
    results: dict[str, Any] = found
    return results


def _check_installed() -> None:
    if importlib.util.find_spec("lm_eval") is None:
        raise InputError(
            "lm-eval",
            "got no package lm_eval, expected EleutherAI's lm-evaluation-harness",
            "Run `pip install lm_eval`",
        )


def _manager(request: HarnessRequest) -> Any:
    """The harness's tasks, with those of one's own.

    Raises:
        InputError: a name is of none.
    """
    from lm_eval.tasks import TaskManager

    if request.folder is not None and not request.folder.is_dir():
        raise InputError(
            f"--include {request.folder}", "got no such folder, expected one", "Check the path"
        )
    manager = TaskManager(include_path=None if request.folder is None else str(request.folder))
    for name in request.tasks:
        if not manager.match_tasks([name]):
            raise InputError(
                "--tasks",
                f"got {name!r}, expected a task, group or tag of the harness",
                "`lm_eval ls tasks` lists them; --include FOLDER adds your own",
            )
    return manager


def _tasks(text: str) -> tuple[str, ...]:
    """An argparse type: names separated by commas."""
    names = tuple(name for name in text.split(",") if name)
    if not names:
        raise argparse.ArgumentTypeError("got no name, expected some of the harness's tasks")
    return names


class LmEval(Command):
    """Prints the harness's table."""

    name = "lm-eval"
    takes_packs = True
    help = "tasks of EleutherAI's lm-evaluation-harness, where it is installed"
    description = (
        "Run tasks of EleutherAI's lm-evaluation-harness (pip install lm_eval) and print its table. "
        "Tasks load their data sets as the harness does, from the network unless they are at hand."
    )

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Which tasks, and how."""
        add = parser.add_argument
        add(
            "--tasks",
            required=True,
            type=_tasks,
            metavar="NAME,...",
            help="such as hellaswag,arc_easy",
        )
        add("--include", type=Path, metavar="FOLDER", help="with task files of your own")
        add(
            "--limit",
            type=whole_number(1),
            default=0,
            metavar="N",
            help="documents of each task (default: all)",
        )
        add(
            "--shots",
            type=whole_number(0),
            metavar="K",
            help="examples in front of each (default: as the task says)",
        )
        add("--chat", action="store_true", help="put prompts into the model's chat template")
        add("--add-bos", action="store_true", help="begin texts with the model's first token")
        add("--json", type=Path, metavar="FILE", help="write the results with all digits")
        add_runner(parser, default=CPU)
        add_progress(parser)

    def run(self, out: Path, args: argparse.Namespace) -> None:
        """Run, print and write."""
        from calibration.progress import make_progress

        if args.json is not None:
            check_file("--json", args.json)
        request = HarnessRequest(
            tasks=args.tasks,
            runner=args.runner,
            folder=args.include,
            limit=args.limit,
            shots=args.shots,
            chat=args.chat,
            add_bos=args.add_bos,
        )
        progress = make_progress(args.progress)
        try:
            found = run_tasks(out, request, progress)
        finally:
            progress.close()
        from lm_eval.utils import make_table

        print(make_table(found).rstrip())
        if "groups" in found:
            print(make_table(found, "groups").rstrip())
        if args.json is not None:
            args.json.write_text(json.dumps(found, indent=2, default=str) + "\n", encoding="utf-8")


COMMAND = LmEval()
