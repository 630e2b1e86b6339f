"""A GGUF file of an edited checkpoint: by llama.cpp's converter, or by the GGUF file of its base model."""

from __future__ import annotations

import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from perpend.errors import UsageError
from perpend.export.beside import pages_of
from perpend.export.checkpoint import Checkpoint
from perpend.export.gguf import Change, bake_gguf, leak_rows, plan, untouched
from perpend.export.gguf_file import appearing, layouts, require_absent, targets, text_pairs, write
from perpend.export.gguf_from import Source
from perpend.export.llama_cpp import TYPES, Tools, call, shown
from perpend.export.shards import ExportResult
from perpend.export.verify import LeakRow, Untouched
from perpend.models.anatomy import Anatomy
from perpend.models.gguf import Layout, layout
from perpend.models.load import skeleton
from perpend.options.asked import path_of
from perpend.progress import note
from perpend.refs import ModelRef
from perpend.tasks.about import edit_facts, model_facts, origin, peak_memory, typed
from perpend.tasks.checkpoints import checkpoint_of
from perpend.tasks.earlier import beside_edit
from perpend.tasks.gate import require_untouched
from perpend.tasks.gguf import main_type, provenance, require_gguf, saved_file
from perpend.tasks.output import require_free, require_no_partial
from perpend.tasks.pages import names_beside, put_beside
from perpend.tasks.portable import named
from perpend.tasks.recipes import RECIPE, Written, read_recipe
from perpend.tasks.setup import versions


@dataclass(frozen=True)
class GgufExport:
    """A GGUF file of an edited checkpoint.

    Attributes:
        output: The file; of a base in parts `OUT-00001-of-0000N.gguf` and so on.
        source: The edited checkpoint.
        base: The GGUF file that everything else was taken from; None for the converter.
        commands: What was called, as it is typed.
        types: How many tensors are of which type.
        leak: A row per edited module; empty where the original is not here.
        untouched: What of the base is the same byte for byte; None for the converter.
        rounding: What rounding the edited matrices cost; empty for the converter.
        seconds: Duration.
        dry_run: Nothing was done.
        pages: Its report, beside it.
    """

    output: str
    source: str
    base: str | None
    commands: tuple[str, ...] = ()
    types: Mapping[str, int] = field(default_factory=dict)
    leak: tuple[LeakRow, ...] = ()
    untouched: Untouched | None = None
    rounding: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    dry_run: bool = False
    pages: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "task": "export_gguf",
            **vars(self),
            "commands": list(self.commands),
            "pages": list(self.pages),
            "leak": [row.to_json() for row in self.leak],
            "untouched": self.untouched.to_json() if self.untouched else None,
        }


def export_gguf(
    source: str | Path,
    *,
    output: str | Path,
    type: str | None = None,
    base: str | Path | None = None,
    llama_cpp: str | Path | None = None,
    allow_leak: bool = False,
    dry_run: bool = False,
) -> GgufExport:
    """Write a GGUF file of an output of `perpend apply` or `perpend run`, and prove the edit on its weights.

    Args:
        source: The output, with its `recipe.toml`.
        output: File to make.
        type: bf16 (the default), f16, q8_0 or q4_0, by llama.cpp's converter and quantiser.
        base: GGUF file of the model before the edit, of any types: the edited matrices go into a copy of it, in its own
            types and so that rounding keeps the edit; all else stays byte for byte. No converter is needed.
        llama_cpp: Checkout of llama.cpp; by default its tools are looked for on the PATH.
        allow_leak: Keep a file of which a module misses its weight factor.
        dry_run: Only say what would be called.

    Raises:
        UsageError: no such output, no converter, or a base of another model.
        RunFailed: the converter fails.
        GateFailed: the file is not the edit; it stays as `FILE.gguf.partial`.
    """
    started, source, output = time.monotonic(), Path(source), Path(output)
    base, llama_cpp = path_of(base), path_of(llama_cpp)
    require_gguf(output)
    require_free(output)
    require_no_partial(output)
    require_absent([output], pages_of(output))
    if not (source / RECIPE).is_file():
        raise UsageError(f"no {RECIPE}: not an output of perpend", where=str(source), hint="perpend apply")
    written = read_recipe(source / RECIPE)
    if base is not None and (type or llama_cpp):
        raise UsageError("types are those of the base", where="--base", hint="leave out --type and --llama-cpp")
    if type is not None and type not in TYPES:
        raise UsageError(f"unknown type '{type}'", where="--type", valid=", ".join(TYPES))
    steps: list[list[str]] = []
    if base is None:
        tools, kind = Tools.find(llama_cpp), type or "bf16"
        tools.require(source, output, kind)
        steps = tools.commands(source, _converted(output), kind)
    name = None if base is None else str(base)
    calls = tuple(map(shown, steps))
    made = GgufExport(str(output), str(source), name, calls, dry_run=dry_run, pages=names_beside(output))
    if dry_run:
        return made
    options = {"--base": base, "--type": type, "--llama-cpp": llama_cpp}
    given = [word for key, value in options.items() if value is not None for word in (key, value)]
    again = typed("export", "gguf", source, "-o", output.name, *given, *(["--allow-leak"] if allow_leak else []))
    work = _Work(source, output, written, allow_leak, again, started)
    return work.into(made, base) if base is not None else work.convert(made, steps)


def _converted(output: Path) -> Path:
    """Return where the converter writes, before provenance is added."""
    return output.with_name(f".{output.name}.converted")


def _named(step: str) -> str:
    """Return a command with the names of files instead of their folders, and without a program in one of its words."""
    return shlex.join("…" if "\n" in word else named(word) for word in shlex.split(step))


class _Work:
    """Either way of making the file."""

    def __init__(
        self, source: Path, output: Path, written: Written, allow_leak: bool, command: str, started: float
    ) -> None:
        self.source, self.command, self.started = source, command, started
        self.output, self.recipe, self.edit, self.allow_leak = output, written.recipe, written.edit, allow_leak
        self.model = self.recipe.model.id
        self.bare: nn.Module = skeleton(checkpoint_of(str(source)), str(source))
        self.anatomy = Anatomy.of(self.bare, self.recipe.edit.overrides or None)
        self.checkpoint = Checkpoint(source)
        self.said = provenance(self.edit, self.recipe, self.model)

    def into(self, made: GgufExport, base: Path) -> GgufExport:
        """Put the edited matrices into a copy of the base's GGUF file."""
        files, found = layouts(base), list[GgufExport]()

        def check(partial: list[Path], export: ExportResult, changes: list[Change]) -> None:
            after = [layout(path) for path in partial]
            same = untouched(files, after, export.edited)
            require_untouched(same, partial[0])
            leak = leak_rows(changes, after, self.anatomy, **self._asked())
            whole = replace(made, leak=tuple(leak), untouched=same, rounding=dict(export.rounding))
            found.append(self._reported(whole, after, base))

        wanted = Source(self.checkpoint, self.bare, self.anatomy).wanted
        rounding = "nearest" if self.recipe.export.rounding == "nearest" else "auto"
        bake_gguf(
            base,
            self.edit,
            self.anatomy,
            self.output,
            wanted=wanted,
            rounding=rounding,
            said=self.said,
            beside=pages_of(self.output),
            check=check,
        )
        return found[0]

    def convert(self, made: GgufExport, steps: Sequence[Sequence[str]]) -> GgufExport:
        """Call llama.cpp, add provenance, and measure the weight factors where the original is here."""
        converted = _converted(self.output)
        with appearing([self.output], pages_of(self.output)) as (partial,):
            try:
                call(steps)
                raw = layout(converted)
                write(raw, partial, {}, text_pairs(raw, self.said))
            finally:
                for path in (converted, converted.with_name(f"{converted.name}.bf16")):
                    path.unlink(missing_ok=True)
            after = layout(partial)
            leak = self._leak([after], plan([after], self.edit, self.anatomy))
            return self._reported(replace(made, leak=tuple(leak)), [after], None)

    def _reported(self, made: GgufExport, after: Sequence[Layout], base: Path | None) -> GgufExport:
        """Return the result with what the file says of itself, and write the report of it."""
        file = saved_file(after, targets(self.output, len(after)), base, made.rounding)
        made = replace(made, types=file["types"], seconds=round(time.monotonic() - self.started, 1))
        gate = {"leak": [row.to_json() for row in made.leak], "worst": max((r.miss for r in made.leak), default=0.0)}
        gate |= {"untouched": made.untouched.to_json()} if made.untouched else {}
        ref = self._ref()
        model = model_facts(ref, ref.revision, self.anatomy, self.bare.parameters(), main_type(after))
        put_beside(
            self.output,
            {
                "task": "export_gguf",
                "output": made.output,
                "model": ref.portable,
                "seconds": made.seconds,
                "versions": versions(),
                "about": origin("export_gguf", self.command, self.recipe, model) | {"peak_memory": peak_memory()},
                "edit": edit_facts(self.edit, self.anatomy),
                "file": file | {"commands": [_named(step) for step in made.commands]},
                **({"gate": gate} if made.leak or made.untouched else {}),
                **beside_edit(self.source, self.edit.sha256),
            },
        )
        return made

    def _ref(self) -> ModelRef:
        """Return which model was edited, which may be gone by now."""
        try:
            return ModelRef.parse(self.model)
        except UsageError:
            return ModelRef("dir", self.model)

    def _leak(self, after: Sequence[Any], changes: list[Change]) -> list[LeakRow]:
        try:
            original = checkpoint_of(self.model)
        except UsageError as error:
            note(f"weight factors are not measured, as the original is not here ({error})")
            return []
        before = Source(Checkpoint(original.path), self.bare, self.anatomy).whole
        return leak_rows(changes, after, self.anatomy, before=before, **self._asked())

    def _asked(self) -> dict[str, Any]:
        return {"through_post_norm": self.recipe.edit.through_post_norm, "allow_leak": self.allow_leak}
