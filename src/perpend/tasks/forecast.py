"""What a task would read, run, write and edit, from file headers and a model without weights."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from perpend.config import Machine, Recipe
from perpend.data import Splits
from perpend.errors import UsageError
from perpend.export.checkpoint import files
from perpend.fitting.behaviour import TOKENS
from perpend.fitting.plan import weight_factors
from perpend.models.anatomy import Anatomy
from perpend.models.headers import read_range
from perpend.models.load import skeleton
from perpend.models.memory import free_memory, pick_device
from perpend.models.places import ROOM, Plan, parts, plan
from perpend.models.quantised import WIDTH, packed_as, wide_size
from perpend.progress import note
from perpend.refs import ModelRef
from perpend.tasks.checks import Wanted, local, require_of, require_sound
from perpend.tasks.survivors import OTHERS

PROMPT_TOKENS = 64
"""Assumed length of an encoded prompt: no tokenizer is loaded for a forecast."""
LAYERS_TRIED, PASSES_PER_LAYER = 14, 6
"""Candidates of `fit.layer = "auto"`, and how often each runs the model: likelihoods, and drift batch by batch."""
LEARNING = 2
"""What the way back costs beside the way forward, in passes: at most, since frozen matrices have no gradient."""
SMALL = 1 << 20
"""Bytes that an output without a checkpoint is taken to have."""
SLOWER = {"cpu": 4.0, "cuda": 8.0, "mps": 6.0}
"""How many times slower than one large matrix product the whole is taken to be, generation included."""


@dataclass(frozen=True)
class Forecast:
    """What a task would do; sizes in bytes, None where the model is not on this machine yet."""

    reads: int | None
    """Bytes of the model's files."""
    writes: int | None
    """Bytes of the output."""
    disk_free: int
    """Bytes that are free where the output goes."""
    memory: int | None
    """Bytes of the weights in the dtype they run in; activations come on top."""
    memory_free: int
    parameters: int | None
    edited_modules: int | None
    edited_parameters: int | None
    prompts: int
    """Prompts that are run, over all passes."""
    new_tokens: int
    """Tokens generated at most."""
    seconds: float | None
    """Rough: two operations per parameter and token at the speed of a matrix product timed just now, slowed down,
    what is read at the speed of a part of the files read just now, a checkpoint at that of a file written just now."""
    read_when_needed: int = 0
    """Bytes of layers that do not fit into memory, read once in every pass."""
    passes: int = 0
    """Passes over them."""
    bytes_read: int | None = None
    """Bytes read altogether: the files once, or their layers in every pass, and what an export compares."""
    peak_memory: int | None = None
    """Weights that are kept, two of the largest layers where layers are read, and room for what is computed."""

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class Work:
    """What a task runs beside what a recipe says.

    Attributes:
        prompts: Prompts that are run.
        new_tokens: Tokens generated at most.
        learnt: Prompts that are run forward and back, each with a short reply.
    """

    prompts: int = 0
    new_tokens: int = 0
    learnt: int = 0


@dataclass(frozen=True)
class Planned:
    """What a task would do whose result has no place for it."""

    task: str
    model: str
    output: str | None
    forecast: Forecast
    dry_run: bool = True
    pages: tuple[str, ...] = ()
    """The report beside an output that is one file."""

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return dict(vars(self)) | {"forecast": self.forecast.to_json(), "pages": list(self.pages)}


def forecast(
    model: str,
    recipe: Recipe,
    machine: Machine,
    wanted: Wanted | None = None,
    *,
    splits: Splits | None = None,
    output: Path | None = None,
    measures: int = 0,
    bakes: bool = False,
    also: Work | None = None,
) -> Forecast:
    """Say what a task would do, without loading weights or fetching anything.

    Args:
        model: Hub id, directory or GGUF file; of a model that is not on this machine, sizes are unknown.
        recipe: What would be done.
        machine: Where.
        wanted: What is done with the model, which is checked; None for what only looks at it.
        splits: The prompts; None for a task that runs none.
        output: Where the result would go; None where nothing is written.
        measures: How many times the report split would be answered.
        bakes: Whether a checkpoint would be written.
        also: What is run beside that to teach a model, which is written and not edited.

    Raises:
        UsageError: the model's configuration cannot be read, or the work would be refused before weights are read.
    """
    wanted = wanted or Wanted()
    require_sound(recipe, wanted)
    ref, device = ModelRef.parse(model), pick_device(machine.device)
    bare, size = bare_model(ref, machine)
    wide = _wide(ref, size)
    passes, tokens = (0, 0) if splits is None else replies_and_tokens(recipe, splits, wanted.fits, measures, bakes)
    if also is not None:
        passes, tokens = passes + also.prompts + also.learnt, tokens + also.new_tokens
    if wanted.searches and splits is not None:
        scored, written = _trials(recipe, splits)
        passes, tokens = passes + scored, tokens + written
    parameters = sum(p.numel() for p in bare.parameters()) if bare is not None else None
    width = 4 if machine.dtype == "float32" else 2
    memory = None if parameters is None else parameters * width if machine.dtype != "auto" or not wide else wide
    modules, edited = _edited(bare, recipe, wanted)
    placed = _placed(bare, memory, machine, device, model)
    times = _passes(recipe, wanted.fits, measures, bakes) if placed is not None and placed.read else 0
    read = None if size is None or placed is None else (placed.read * times or size) + (4 * (wide or 0) if bakes else 0)
    whole, back = bakes or also is not None, 0 if also is None else LEARNING * also.learnt * PROMPT_TOKENS
    slow = 0.0 if read is None else read / reading_rate(ref)
    slow += wide / writing_rate(output, wide) if whole and wide else 0.0
    return Forecast(
        reads=size,
        writes=wide if whole else 0 if output is None else SMALL,
        disk_free=disk_free(output),
        memory=memory,
        memory_free=free_memory(device, machine.memory),
        parameters=parameters,
        edited_modules=modules,
        edited_parameters=edited,
        prompts=passes,
        new_tokens=tokens,
        seconds=None
        if parameters is None
        else round(_seconds(parameters, passes * PROMPT_TOKENS + tokens + back, device) + slow, 1),
        read_when_needed=placed.read if placed else 0,
        passes=times,
        bytes_read=read,
        peak_memory=None if placed is None else placed.kept + 2 * placed.unit + ROOM,
    )


def writing_rate(output: Path | None, size: int) -> float:
    """Return the bytes per second at which at most 64 MB are written and flushed now, where an output would go.

    Args:
        output: The output; the nearest folder above it that is there is taken.
        size: Bytes that would be written.
    """
    size = max(1, min(size, 64 << 20))
    block = os.urandom(min(size, 1 << 20))
    began = time.perf_counter()
    with tempfile.TemporaryFile(dir=_above(output)) as file:
        for start in range(0, size, len(block)):
            file.write(block[: size - start])
        file.flush()
        os.fsync(file.fileno())
    return max(1.0, size / max(1e-6, time.perf_counter() - began))


def disk_free(output: Path | None) -> int:
    """Return the bytes that are free where an output would go."""
    return shutil.disk_usage(_above(output)).free


def _above(output: Path | None) -> Path:
    return next(p for p in (output or Path()).absolute().parents if p.exists())


def bare_model(ref: ModelRef, machine: Machine) -> tuple[torch.nn.Module | None, int | None]:
    """Return the model on the meta device and the bytes of its files; None and None when it is not here yet."""
    source = local(ref)
    if source is None:
        return None, None
    model = skeleton(source, ref, machine)
    if source.gguf_file:
        return model, 2 * sum(p.numel() for p in model.parameters())
    return model, sum(path.stat().st_size for path in files(source.path))


def _wide(ref: ModelRef, size: int | None) -> int | None:
    """Return the bytes that the files of a model take when FP8 and MXFP4 weights are widened to bfloat16."""
    source = local(ref)
    if source is None or source.gguf_file or not packed_as(source.path):
        return size
    return wide_size(source.path, packed_as(source.path).lower())


def _placed(
    bare: torch.nn.Module | None, memory: int | None, machine: Machine, device: torch.device, where: str
) -> Plan | None:
    """Return where the parts of the model would go; None for one that is not here, or that would be refused."""
    if bare is None or memory is None:
        return None
    width = memory / max(1, sum(p.numel() for p in bare.parameters()))
    try:
        return plan(parts(bare, WIDTH.get(machine.quantization, width)), device, machine, where)
    except UsageError as error:
        note(f"would be refused: {error.what}")
        return None


def _passes(recipe: Recipe, fits: bool, measures: int, bakes: bool) -> int:
    """Return how often every layer is read: all prompts of a set travel together, and replies token by token."""
    found = 2  # to find the layers and their writers
    if fits:
        found += 4 + TOKENS * (recipe.fit.filter + (recipe.fit.layer == "auto"))
    if fits and recipe.fit.layer == "auto":
        found += LAYERS_TRIED * PASSES_PER_LAYER
    return found + (measures + 2 * bakes) * recipe.eval.max_new_tokens + 2 * bakes + 2 * (measures > 1)


def reading_rate(ref: ModelRef) -> float:
    """Return the bytes per second at which a part of the model's files is read now, from the disk where that can be."""
    path = max(files(ref.resolve(fetch=False).path), key=lambda p: p.stat().st_size)
    end = path.stat().st_size
    size = min(end, 64 << 20)
    if hasattr(os, "posix_fadvise"):  # pages of the file that are in memory would be read from there
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), end - size, size, os.POSIX_FADV_DONTNEED)
    began = time.perf_counter()
    read_range(path, end - size, end)
    return max(1.0, size / max(1e-6, time.perf_counter() - began))


def replies_and_tokens(
    recipe: Recipe, splits: Splits, fits: bool = False, measures: int = 0, bakes: bool = False
) -> tuple[int, int]:
    """Return prompts run and tokens generated at most, but for those of a search; arguments as of `forecast`."""
    sizes = {name: sum(len(side) for side in (pair.target, pair.baseline)) for name, pair in vars(splits).items()}
    runs, tokens = 0, 0
    if fits:
        observed = sizes["fit"] * recipe.fit.filter + sizes["select"] * (recipe.fit.layer == "auto")
        runs += observed + sizes["fit"] + sizes["select"]
        tokens += observed * TOKENS
    control = min(recipe.eval.control_prompts, len(splits.report.target)) if measures > 1 else 0
    replies = measures * sizes["report"] + control + bakes * 4 * recipe.export.gate_prompts
    return runs + replies, tokens + replies * recipe.eval.max_new_tokens


def candidate_replies(recipe: Recipe, splits: Splits) -> tuple[int, int]:
    """Return how many replies the candidates of a search give, short ones and those at full length."""
    search, targets = recipe.search, len(splits.select.target)
    read = targets + min(search.prompts, len(splits.select.baseline))
    refined = min(search.refine_from, search.finalists) if search.refine else 0
    replying = search.survivors + OTHERS + search.survivors // 2
    return replying * min(search.prompts, targets), (search.finalists + refined) * read


def _trials(recipe: Recipe, splits: Splits) -> tuple[int, int]:
    """Return prompts that trials and candidates read, and tokens that are generated at most."""
    search, targets = recipe.search, len(splits.select.target)
    shortly, fully = candidate_replies(recipe, splits)
    fully += targets + min(search.prompts, len(splits.select.baseline))  # the untouched model too
    runs = 2 * search.trials * min(search.prompts, targets) + shortly + fully
    return runs, shortly * TOKENS + fully * recipe.eval.max_new_tokens


def _edited(bare: torch.nn.Module | None, recipe: Recipe, wanted: Wanted) -> tuple[int | None, int | None]:
    """Return how many modules and parameters would be edited; None where none is.

    Raises:
        UsageError: it would be refused for this model.
    """
    edit = wanted.edit
    if bare is None or not wanted.changes:
        return (len(edit), None) if edit is not None else (None, None)
    anatomy = Anatomy.of(bare, recipe.edit.overrides or None)
    require_of(anatomy, recipe, wanted)
    if edit is not None:
        chosen = [w for w in anatomy.writers if w.name in edit.modules]
    else:
        factors = weight_factors(anatomy, recipe.edit)
        chosen = [w for w in anatomy.writers if factors[w.component][w.layer] != 0]
    return len(chosen), sum(w.parameters for w in chosen)


def _seconds(parameters: int, tokens: int, device: torch.device) -> float:
    """Return a rough time from a matrix product timed now."""
    size = 1024 if device.type == "cpu" else 4096
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    (a @ a).sum().item()
    began = time.perf_counter()
    for _ in range(4):
        (a @ a).sum().item()
    rate = 4 * 2 * size**3 / (time.perf_counter() - began)
    return round(SLOWER.get(device.type, 8.0) * 2 * parameters * tokens / rate, 1)
