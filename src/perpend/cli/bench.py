"""`perpend bench`: lm-eval before and after."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import perpend
from perpend.cli import views
from perpend.cli.options import MEASURE, Model, Request, command
from perpend.options.commands import BenchOptions, options_of

Tasks = Annotated[str, typer.Option("--tasks", help="Names of lm-eval tasks, with commas.", metavar="A,B")]
Include = Annotated[
    Path | None,
    typer.Option("--include", help="Folder with task files of your own.", metavar="DIR", show_default=False),
]
Questions = Annotated[
    int | None,
    typer.Option(
        "--questions", min=1, help="At most this many questions of each task.", metavar="N", show_default=False
    ),
]
Shots = Annotated[
    int | None,
    typer.Option("--fewshot", min=0, help="Worked examples before each question.", metavar="N", show_default=False),
]
Chat = Annotated[bool, typer.Option("--chat", help="Put questions in the chat template.", metavar=" ")]


@command(
    "bench",
    options=("output", "edit", "dry_run", *options_of(BenchOptions)),
    examples=(
        "bench google/gemma-3-4b-it --edit edit --tasks arc_easy,hellaswag --questions 500 -o bench",
        "bench ./model --edit out --tasks mine --include ./tasks",
    ),
    panel=MEASURE,
)
def bench(
    model: Model = None,
    tasks: Tasks = "",
    include: Include = None,
    questions: Questions = None,
    fewshot: Shots = None,
    chat: Chat = False,
    *,
    request: Request,
) -> None:
    """Run lm-eval before and after an edit.

    The same questions and settings both times, compared question by question, with the smallest difference that so
    many questions would show. Needs the extra `bench`.
    """
    output, edit, recipe = request.optional_output, request.edit, request.recipe(model)
    result = perpend.bench(
        recipe.model.id,
        tasks=tasks,
        edit=edit,
        include=include,
        questions=questions,
        fewshot=fewshot,
        chat=chat,
        output=output,
        recipe=recipe,
        machine=request.machine(),
        dry_run=request.dry_run,
    )
    request.out.result(result, views.planned if request.dry_run else views.benchmarks)
