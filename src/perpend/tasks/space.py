"""Whether the disk has room for an edited checkpoint: said from the sizes of files, before any is loaded."""

from __future__ import annotations

from pathlib import Path

from perpend.config import Machine
from perpend.errors import UsageError
from perpend.export.checkpoint import files
from perpend.export.gguf_file import layouts
from perpend.export.staging import nearest_folder, require_space
from perpend.models.gguf import elements
from perpend.models.quantised import packed_as, wide_size
from perpend.refs import ModelRef, Resolved


def require_room(model: str, output: Path, machine: Machine, *, copies: int | None = None) -> None:
    """Refuse an output for which the disk has no room, before the model is loaded, or fetched where that is to come.

    Args:
        model: Hub id, directory or GGUF file. Of one that is not here yet the hub says how large it is; where it does
            not, nothing is refused.
        output: Folder that the model's files would be copied to; a GGUF file would be a copy of the model's own.
        machine: Says the dtype in which a GGUF file is written out.
        copies: How many checkpoints of this size lie there at the same time; by default one, and two of a GGUF file and
            of FP8 or MXFP4 weights, which are written out in plain numbers before they are edited.

    Raises:
        UsageError: says how much is needed and how much is free; or there is no such model.
    """
    ref, out = ModelRef.parse(model), output.expanduser().absolute()
    source = _here(ref)
    if source is not None:
        size, usual = _copied(source, out, machine)
        require_space(out, (copies or usual) * size)
        return
    fetched, cache = ref.size(), _cache()
    if fetched is None:
        return
    together = nearest_folder(out).stat().st_dev == nearest_folder(cache).stat().st_dev
    require_space(out, ((copies or 1) + together) * fetched)
    require_space(cache, fetched)


def _here(ref: ModelRef) -> Resolved | None:
    """Return the files of a model; None where they are to be fetched first, or some of them."""
    if ref.kind != "hub":
        return ref.resolve()
    try:
        found = ref.resolve(fetch=False)
        list(files(found.path))
    except UsageError:
        return None
    return found


def _copied(source: Resolved, output: Path, machine: Machine) -> tuple[int, int]:
    """Return the bytes of a checkpoint, and how many such are there while an edited one is made."""
    if source.gguf_file is None:
        packed = packed_as(source.path)
        size = sum(path.stat().st_size for path in files(source.path))
        return (wide_size(source.path, packed.lower()), 2) if packed else (size, 1)
    whole = source.path / source.gguf_file
    if output.suffix.lower() == ".gguf":
        return sum(part.path.stat().st_size for part in layouts(whole)), 1
    return elements(whole) * (4 if machine.dtype == "float32" else 2), 2


def _cache() -> Path:
    """Return the folder into which the hub's client fetches."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE).expanduser().absolute()
