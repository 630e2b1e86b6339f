"""What a command is: its own arguments, the flags it shares, and the request that they amount to."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.markup import escape

from perpend.cli.flags import EVERYWHERE, FLAGS, typed
from perpend.cli.output import Output, Style
from perpend.errors import UsageError
from perpend.launched import require_single

if TYPE_CHECKING:
    from perpend.config import Machine, Recipe

MAKE, MEASURE, TRY, LOOK = "Edit a model", "Measure a model", "Try it without a model of your own", "Look up"

Model = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
        help="Hub id (org/name or org/name@revision), directory or .gguf file; may come from the recipe.",
        show_default=False,
    ),
]


_ITEM = re.compile(r"\s*(?:[-*•]|\d+[.)])\s")
"""How an item of a list begins in a help text."""


class Request:
    """What the user asked for: the values of the shared options.

    Attributes:
        out: Where results, notes and errors are printed.
    """

    def __init__(self, values: dict[str, Any]) -> None:
        self._values = values
        style: Style = "json" if values.get("json") else "quiet" if values.get("quiet") else "human"
        self.out = Output(style, verbose=bool(values.get("verbose")), debug=bool(values.get("debug")))

    def __getitem__(self, name: str) -> Any:
        return self._values[name]

    @cached_property
    def output(self) -> Path:
        """Where the result goes.

        Raises:
            UsageError: none was given, or something is there already.
        """
        path = self.optional_output
        return self.place if path is None else path

    @property
    def place(self) -> Path:
        """Where the result goes, for a task that looks itself at what is there.

        Raises:
            UsageError: none was given.
        """
        path: Path | None = self._values["output"]
        if path is None:
            raise UsageError("no place for the result was given", where="--output", hint="-o out")
        return path

    @cached_property
    def optional_output(self) -> Path | None:
        """Where the result goes, None when it is only printed.

        Raises:
            UsageError: something is there already.
        """
        path: Path | None = self._values["output"]
        if path is None:
            return None
        from perpend.tasks.output import require_free

        require_free(path)
        return path

    @cached_property
    def edit(self) -> Path | None:
        """The edit file that was named, if any.

        Raises:
            UsageError: it is not there.
        """
        path: Path | None = self._values["edit"]
        if path is not None and not path.exists():
            raise UsageError(f"{path}: no such file", where="--edit", hint="perpend fit MODEL -o edit")
        return path

    @property
    def dry_run(self) -> bool:
        """Whether only to say what would be done."""
        return bool(self._values.get("dry_run"))

    def recipe(self, model: str | None = None, file: Path | None = None, *, needs_model: bool = True) -> Recipe:
        """Return the recipe: defaults, then the file, then flags, then `--set`.

        Args:
            model: The model as typed; None takes the recipe's.
            file: A recipe named otherwise than by `--config`.
            needs_model: Refuse a recipe without a model.

        Raises:
            UsageError: names the flag, or the file and the key, and what is valid.
        """
        from perpend.options.asked import recipe_of
        from perpend.refs import DataRef, ModelRef

        recipe = recipe_of(self._given, model, file=file, needs_model=needs_model)
        if recipe.model.id:
            ModelRef.parse(recipe.model.id)
        for side in ("target", "baseline") if "target" in self._values else ():
            try:
                DataRef.parse(getattr(recipe.prompts, side))
            except UsageError as error:
                raise error.within(f"prompts.{side}") from None
        return recipe

    def machine(self) -> Machine:
        """Return how it is run.

        Raises:
            UsageError: names the flag and what is valid.
        """
        from perpend.options.asked import machine_of

        return machine_of(self._given)

    def require_no_search(self) -> None:
        """Refuse options of a search where none was asked for.

        Raises:
            UsageError: names the first.
        """
        from perpend.options.asked import require_no_search

        require_no_search(self._given)

    @property
    def _given(self) -> dict[str, Any]:
        """The options that were typed; a switch that was not is no answer."""
        values = self._values.items()
        return {name: value for name, value in values if value is not None and value is not False and value != []}


def parameters(names: Iterable[str]) -> list[inspect.Parameter]:
    """Return the shared options as keyword parameters that typer reads."""
    found = []
    for name in names:
        flag = FLAGS[name]
        default: Any = False if flag.kind is bool else None
        annotation: Any = Annotated[flag.kind if flag.kind is bool else flag.kind | None, typed(flag)]
        found.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation))
    return found


@dataclass(frozen=True)
class Command:
    """A command of the program, before it is part of an application.

    Attributes:
        name: As typed.
        run: Takes parsed values by name; what typer calls.
        examples: Command lines for the help.
        panel: Group in the list of commands.
    """

    name: str
    run: Callable[..., None]
    examples: tuple[str, ...]
    panel: str | None

    def add_to(self, app: typer.Typer) -> None:
        """Register the command."""
        app.command(self.name, epilog=epilog(self.examples), rich_help_panel=self.panel)(self.run)


def flowing(text: str) -> str:
    """Return a docstring as a help text: a line for each paragraph and each item of a list, to be wrapped once."""
    paragraphs = []
    for paragraph in inspect.cleandoc(text).split("\n\n"):
        lines: list[str] = []
        for line in paragraph.splitlines():
            if lines and not _ITEM.match(line):
                lines[-1] += f" {line.strip()}"
            else:
                lines.append(line.rstrip())
        paragraphs.append("\n".join(lines))
    return "\n\n".join(paragraphs)


def epilog(examples: Iterable[str]) -> str:
    """Return the end of a help text: command lines, given without the leading `perpend`."""
    return "Examples\n\n" + "\n\n".join(f"  [cyan]perpend {escape(example)}[/cyan]" for example in examples)


def group(name: str, about: str, commands: Iterable[Command], *, also: tuple[str, ...] = ()) -> typer.Typer:
    """Return commands as one group, whose help shows the first example of each, and `also`.

    Args:
        name: As typed before the commands.
        about: What the commands have in common.
        commands: The commands.
        also: More examples for the help, where a group has one command only.
    """
    members = tuple(commands)
    examples = (*(member.examples[0] for member in members), *also)
    app = typer.Typer(name=name, no_args_is_help=True, rich_markup_mode="rich", help=about, epilog=epilog(examples))
    app.callback()(lambda: None)  # without it a group of one command would be that command
    for member in members:
        member.add_to(app)
    return app


def command(
    name: str,
    *,
    options: Iterable[str] = (),
    examples: tuple[str, ...],
    panel: str | None = None,
    processes: Literal["one", "several"] = "one",
) -> Callable[[Callable[..., None]], Command]:
    """Make a function a command that takes shared options.

    The function's own parameters stay; its `request` parameter is filled with a `Request` of the shared options.

    Args:
        name: Name of the command.
        options: Names of `FLAGS`, without those that every command has.
        examples: Command lines for the help, without the leading `perpend`.
        panel: Group in the list of commands.
        processes: Whether `torchrun` may start it several times over; else that is refused before anything is done.
    """
    names = [*options, *EVERYWHERE]
    instead = " or ".join(f"--{one.replace('_', '-')}" for one in ("device_map", "workers") if one in names)

    def make(function: Callable[..., None]) -> Command:
        own = [p for p in inspect.signature(function, eval_str=True).parameters.values() if p.name != "request"]

        def run(**values: Any) -> None:
            request = Request({key: values.pop(key) for key in names})
            if processes == "one":
                require_single(name, instead)
            with request.out.working():
                function(**values, request=request)

        shared = parameters(names)
        run.__name__, run.__doc__ = function.__name__, flowing(function.__doc__ or "")
        run.__signature__ = inspect.Signature([*own, *shared])  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in (*own, *shared)}
        return Command(name, run, examples, panel)

    return make
