"""Bake an edit into a copy of a GGUF file, and prove it on the saved file."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perpend import __version__
from perpend.config import Machine, Recipe, to_toml
from perpend.core.edits import Edit
from perpend.data import Splits
from perpend.errors import GateFailed, UsageError
from perpend.export.beside import pages_of
from perpend.export.gguf import Change, bake_gguf, leak_rows, untouched
from perpend.export.gguf_file import layouts, targets
from perpend.export.shards import ExportResult
from perpend.export.verify import LeakRow, Untouched
from perpend.models.anatomy import Anatomy
from perpend.models.gguf import Layout, layout
from perpend.models.load import skeleton
from perpend.models.memory import free_memory, pick_device
from perpend.models.session import Session
from perpend.progress import note
from perpend.refs import ModelRef
from perpend.tasks.about import about, edit_facts, model_facts, origin, peak_memory
from perpend.tasks.gate import Asked, Gate, Reference, proven, reference, require_untouched
from perpend.tasks.portable import without_folders
from perpend.tasks.setup import open_panel, open_session, require_fitting
from perpend.units import size

SUFFIX = ".gguf"


def is_gguf(output: Path) -> bool:
    """Whether an output is a GGUF file and not a folder."""
    return output.suffix.lower() == SUFFIX


def require_gguf(output: Path) -> None:
    """Refuse a name that no GGUF file has.

    Raises:
        UsageError: it does not end in .gguf.
    """
    if not is_gguf(output):
        hint = f"-o {output.with_suffix(SUFFIX)}" if output.name.strip(".") else "-o NAME.gguf"
        raise UsageError("not the name of a GGUF file", where=str(output), valid="NAME.gguf", hint=hint)


def require_folder(output: Path) -> None:
    """Refuse the name of a GGUF file for an output that is a folder.

    Raises:
        UsageError: it ends in .gguf.
    """
    if is_gguf(output):
        hint = f"-o {output.with_suffix('')}"
        raise UsageError("the name of a GGUF file, and a folder is made", where=str(output), hint=hint)


def require_roundable(recipe: Recipe, output: Path | None = None) -> None:
    """Refuse an export that must be taken back bit for bit and cannot be: one of codes, or rounded for them.

    Args:
        recipe: What is asked.
        output: What is made; None for a folder.

    Raises:
        UsageError: says which keys.
    """
    if recipe.export.reversible and output is not None and is_gguf(output):
        raise UsageError(
            "a GGUF output cannot be taken back bit for bit: edited tensors are rounded to the codes of their type, "
            "which the kept numbers do not lead back from",
            where="export.reversible",
            valid="an output folder; the GGUF file that is edited stays as it is, keep it",
        )
    if recipe.export.rounding in ("q4_0", "q8_0") and recipe.export.reversible:
        raise UsageError(
            f"an edit rounded for {recipe.export.rounding} cannot be taken back bit for bit",
            where="export.reversible",
            valid="export.rounding = auto or nearest",
        )


def provenance(edit: Edit, recipe: Recipe, model: str) -> dict[str, str]:
    """Return what the keys `perpend.…` of an edited file say; local paths are reduced to names."""
    shown = without_folders(recipe.for_model(model))
    return {
        "version": __version__,
        "base": shown.model.id,
        "edit.sha256": edit.sha256,
        "edit.modules": str(len(edit)),
        "recipe_hash": recipe.hash(),
        "recipe": to_toml(shown.model_dump(mode="json")),
    }


def require_gguf_source(model: str, output: Path) -> ModelRef:
    """Return a model that is a GGUF file, or refuse another for an output that is one.

    Raises:
        UsageError: a hub id or a directory.
    """
    ref = ModelRef.parse(model)
    if ref.kind != "gguf":
        raise UsageError(
            "a GGUF file is edited directly only from a GGUF file",
            where=str(output),
            hint=f"perpend apply {model} -o FOLDER",
        )
    return ref


def _cannot_run(files: Sequence[Layout], machine: Machine) -> str:
    """Return why a GGUF model cannot be run here to prove its edit; empty where it can."""
    if len(files) > 1:
        return "a model in parts cannot be run here"
    width = 4 if machine.dtype == "float32" else 2
    need = width * sum(math.prod(tensor.shape) for file in files for tensor in file.tensors.values())
    device = pick_device(machine.device)
    free = free_memory(device, machine.memory)
    if need <= free:
        return ""
    return f"dequantised, the model takes {size(need)} where {size(free)} are free on {device}"


def saved_file(
    written: Sequence[Layout], names: Sequence[Path], base: Path | None, rounding: Mapping[str, Any]
) -> dict[str, Any]:
    """Return what a report says of a GGUF file, as plain JSON values.

    Args:
        written: Its parts.
        names: What they will be called.
        base: The file that everything but the edited matrices is of; None for a converter.
        rounding: What rounding the edited matrices cost.
    """
    return {
        "names": [path.name for path in names],
        "bytes": sum(file.path.stat().st_size for file in written),
        "types": dict(Counter(tensor.type for file in written for tensor in file.tensors.values()).most_common()),
        "base": base.name if base else None,
        "rounding": dict(rounding),
    }


def main_type(files: Sequence[Layout]) -> str:
    """Return the type that most numbers of a model are stored in."""
    sizes: Counter[str] = Counter()
    for tensor in (tensor for file in files for tensor in file.tensors.values()):
        sizes[tensor.type] += math.prod(tensor.shape)
    return sizes.most_common(1)[0][0]


@dataclass(frozen=True)
class Baked:
    """An edited GGUF file that passed its gate.

    Attributes:
        export: What was written.
        gate: What it says of the edit.
        edit: Weight factors of the edit.
        about: Where it came from.
        file: Its parts, types and rounding.
    """

    export: ExportResult
    gate: Gate
    edit: Mapping[str, Any]
    about: Mapping[str, Any]
    file: Mapping[str, Any]


def _without_weights(
    ref: ModelRef, files: Sequence[Layout], recipe: Recipe, command: str
) -> tuple[Anatomy, dict[str, Any]]:
    """Return the anatomy of a model whose weights are not loaded, and where its edit comes from."""
    bare = skeleton(ModelRef("gguf", str(files[0].path)).resolve(), str(ref))
    anatomy = Anatomy.of(bare, recipe.edit.overrides or None)
    model = model_facts(ref, None, anatomy, bare.parameters(), main_type(files))
    return anatomy, origin("apply", command, recipe, model)


def write_gguf(
    model: str,
    edit: Edit,
    output: Path,
    recipe: Recipe,
    machine: Machine,
    splits: Splits,
    *,
    command: str,
    finish: Callable[[Baked], None],
) -> None:
    """Edit a GGUF file; the result gets its name, with its report, only when it has passed the gate.

    Args:
        model: The file, or one of its numbered parts.
        edit: What to bake.
        output: File to make.
        recipe: Rounding and gate.
        machine: Device and dtype in which the gate runs.
        splits: The gate measures on a fixed subset of the select split.
        command: What to type to have it again.
        finish: Is told what passed, and writes the report of it.

    Raises:
        UsageError: the model is no GGUF file, or the edit is of another one.
        GateFailed: the saved file is not the edit; it stays as `OUT.gguf.partial`.
    """
    ref = require_gguf_source(model, output)
    source = Path(ref.name).expanduser()
    files = layouts(source)
    session = None
    lacking = _cannot_run(files, machine) if recipe.export.gate_prompts else ""
    if recipe.export.gate_prompts and not lacking:
        session = open_session(model, recipe, machine)
        require_fitting(session, edit)
        anatomy = session.anatomy
        facts = about("apply", session, recipe, machine, command)
    else:
        if lacking:
            note(f"{lacking}: the gate reads its weights alone")
        anatomy, facts = _without_weights(ref, files, recipe, command)
    held = Asked(session, edit, recipe, machine, open_panel(recipe, machine)) if session else None
    seen = reference(held, splits.select) if held else None

    def check(partial: list[Path], export: ExportResult, changes: list[Change]) -> None:
        written = [layout(path) for path in partial]
        leak = _leak(changes, written, anatomy, session, recipe)
        same = untouched(files, written, export.edited)
        require_untouched(same, partial[0])
        gate = Gate(tuple(leak), same, 0, 0, 0, (0.0, 0.0))
        if held and seen:
            gate = _run(partial[0], held, seen, leak, same)
        file = saved_file(written, targets(output, len(files)), source, export.rounding)
        finish(Baked(export, gate, edit_facts(edit, anatomy), facts | {"peak_memory": peak_memory()}, file))

    bake_gguf(
        source,
        edit,
        anatomy,
        output,
        model=session.model if session else None,
        rounding=recipe.export.rounding,
        fallback=recipe.export.gguf_type,
        said=provenance(edit, recipe, model),
        beside=pages_of(output),
        check=check,
    )


def _leak(
    changes: list[Change], written: Sequence[Layout], anatomy: Anatomy, session: Session | None, recipe: Recipe
) -> list[LeakRow]:
    """Return the weight factor of every edited module of the saved file; see `leak_rows`."""
    return leak_rows(
        changes,
        written,
        anatomy,
        session.model if session else None,
        through_post_norm=recipe.edit.through_post_norm,
        allow_leak=recipe.export.allow_leak,
        rounding=recipe.export.rounding,
    )


def _run(partial: Path, held: Asked, seen: Reference, leak: list[LeakRow], same: Untouched) -> Gate:
    """Run the saved file under a name that says that it is a GGUF file; the name is gone afterwards."""
    named = partial.with_name(f".{partial.name}{SUFFIX}")
    named.unlink(missing_ok=True)  # of a killed process: the partial file itself is held
    named.symlink_to(partial.name)
    try:
        return proven(held, seen, ModelRef("gguf", str(named)), leak, same)
    except GateFailed as error:
        raise GateFailed(error.what, where=str(partial), valid=error.valid, hint=error.hint) from None
    finally:
        named.unlink()
