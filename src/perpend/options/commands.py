"""Which of the shared options each command takes: its flags, and the keywords of its function.

The classes type the keywords (`**options: Unpack[FitOptions]`), and the command line reads its flags from them.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Annotated, Any, get_args, get_type_hints

from perpend.options.table import (
    MACHINE,
    DirectionOptions,
    ExportOptions,
    FileOptions,
    JudgeOptions,
    Limit,
    MachineOptions,
    Option,
    PromptOptions,
    RecipeOptions,
    ReplyOptions,
    Rounding,
    SourceOptions,
    StrategyOptions,
    StudyOptions,
    TemplateOptions,
    Trust,
)


class FitOptions(
    RecipeOptions, PromptOptions, DirectionOptions, StrategyOptions, SourceOptions, MachineOptions, total=False
):
    """Of `fit`."""


class ApplyOptions(
    RecipeOptions, PromptOptions, JudgeOptions, ExportOptions, SourceOptions, MachineOptions, total=False
):
    """Of `apply`."""


class EvalOptions(RecipeOptions, PromptOptions, ReplyOptions, SourceOptions, MachineOptions, total=False):
    """Of `eval`."""

    engine: Annotated[
        str,
        Option(
            "What answers the prompts: transformers, vllm.",
            MACHINE,
            machine="engine",
            default="transformers",
            metavar="NAME",
        ),
    ]


class SearchOptions(
    StudyOptions,
    RecipeOptions,
    PromptOptions,
    DirectionOptions,
    ReplyOptions,
    ExportOptions,
    SourceOptions,
    MachineOptions,
    total=False,
):
    """Of `search`, which chooses the strategy by itself."""


class RunOptions(
    StudyOptions,
    RecipeOptions,
    PromptOptions,
    DirectionOptions,
    StrategyOptions,
    ReplyOptions,
    ExportOptions,
    SourceOptions,
    MachineOptions,
    total=False,
):
    """Of `run`; those of a search together with `search` alone."""


class InspectOptions(FileOptions, TemplateOptions, SourceOptions, MachineOptions, total=False):
    """Of `inspect`."""


class TalkOptions(RecipeOptions, TemplateOptions, ReplyOptions, SourceOptions, MachineOptions, total=False):
    """Of `chat` and `serve`, which let a model and its edit answer a user."""


class DemoOptions(RecipeOptions, MachineOptions, total=False):
    """Of `demo`."""

    limit: Limit


class OrganismOptions(RecipeOptions, PromptOptions, SourceOptions, MachineOptions, total=False):
    """Of `organism`."""


class AdapterOptions(FileOptions, SourceOptions, MachineOptions, total=False):
    """Of `adapter`."""


class BenchOptions(RecipeOptions, SourceOptions, MachineOptions, total=False):
    """Of `bench`."""


class AuditOptions(FileOptions, total=False):
    """Of `audit`."""

    trust_remote_code: Trust


class QuantOptions(RecipeOptions, PromptOptions, ReplyOptions, SourceOptions, MachineOptions, total=False):
    """Of `quant check`."""

    rounding: Rounding


class ConfigOptions(
    RecipeOptions, PromptOptions, DirectionOptions, StrategyOptions, ReplyOptions, ExportOptions, total=False
):
    """Of `config show` and `config init`."""


@cache
def options_of(kind: Any) -> dict[str, Option]:
    """Return the options of a command by keyword, with their names and types as typed filled in.

    Args:
        kind: A class of this module or of the table.
    """
    found = {}
    for name, hint in get_type_hints(kind, include_extras=True).items():
        value, option = get_args(hint)
        names = option.names or (f"--{name.replace('_', '-')}",)
        found[name] = replace(option, kind=option.kind or value, names=names)
    return found


OPTIONS: dict[str, Option] = {
    name: option for kind in (RunOptions, EvalOptions) for name, option in options_of(kind).items()
}
"""All of them."""
