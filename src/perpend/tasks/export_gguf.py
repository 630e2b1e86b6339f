"""A GGUF file of an edited checkpoint: by llama.cpp's converter, or by the GGUF file of its base model."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from perpend.errors import UsageError
from perpend.export.checkpoint import Checkpoint
from perpend.export.gguf import Change, bake_gguf, leak_rows, plan, untouched
from perpend.export.gguf_file import appearing, layouts, text_pairs, write
from perpend.export.gguf_from import Source
from perpend.export.llama_cpp import TYPES, Tools, call, shown
from perpend.export.shards import ExportResult
from perpend.export.verify import LeakRow, Untouched
from perpend.models.anatomy import Anatomy
from perpend.models.gguf import layout
from perpend.models.load import skeleton
from perpend.options.asked import path_of
from perpend.progress import note
from perpend.tasks.checkpoints import checkpoint_of
from perpend.tasks.gate import require_untouched
from perpend.tasks.gguf import provenance, require_gguf
from perpend.tasks.output import require_free, require_no_partial
from perpend.tasks.recipes import RECIPE, Written, read_recipe


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

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "task": "export_gguf",
            **vars(self),
            "commands": list(self.commands),
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
    made = GgufExport(str(output), str(source), name, tuple(map(shown, steps)), dry_run=dry_run)
    if dry_run:
        return made
    work = _Work(source, output, written, allow_leak)
    made = work.into(made, base) if base is not None else work.convert(made, steps)
    return replace(made, seconds=round(time.monotonic() - started, 1))


def _converted(output: Path) -> Path:
    """Return where the converter writes, before provenance is added."""
    return output.with_name(f".{output.name}.converted")


class _Work:
    """Either way of making the file."""

    def __init__(self, source: Path, output: Path, written: Written, allow_leak: bool) -> None:
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
            types = Counter(tensor.type for file in after for tensor in file.tensors.values())
            found.append(replace(made, types=types, leak=tuple(leak), untouched=same, rounding=dict(export.rounding)))

        wanted = Source(self.checkpoint, self.bare, self.anatomy).wanted
        rounding = "nearest" if self.recipe.export.rounding == "nearest" else "auto"
        bake_gguf(
            base, self.edit, self.anatomy, self.output, wanted=wanted, rounding=rounding, said=self.said, check=check
        )
        return found[0]

    def convert(self, made: GgufExport, steps: Sequence[Sequence[str]]) -> GgufExport:
        """Call llama.cpp, add provenance, and measure the weight factors where the original is here."""
        converted = _converted(self.output)
        with appearing([self.output]) as (partial,):
            try:
                call(steps)
                raw = layout(converted)
                write(raw, partial, {}, text_pairs(raw, self.said))
            finally:
                for path in (converted, converted.with_name(f"{converted.name}.bf16")):
                    path.unlink(missing_ok=True)
            after = layout(partial)
            leak = self._leak([after], plan([after], self.edit, self.anatomy))
        types = Counter(tensor.type for tensor in after.tensors.values())
        return replace(made, types=types, leak=tuple(leak))

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
