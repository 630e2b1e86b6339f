"""Loading: the one place that calls what changes between versions of transformers.

Everything that can be wrong with a checkpoint is looked for before a tensor is read: configuration, index, every
shard's header and size, dtype, memory. What the Hugging Face libraries print on the way is kept off the terminal.
"""

from __future__ import annotations

import inspect
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from perpend.config import Machine
from perpend.errors import MissingExtra, RunFailed, UsageError
from perpend.models import gguf, quantised
from perpend.models.files import check_files, require_config
from perpend.models.memory import free_memory, pick_device
from perpend.models.offload import Shelf, require_finite
from perpend.models.packed import whole_blocks
from perpend.models.parallel import World
from perpend.models.places import OFFLOAD, READ, WHOLE, Part, Plan, parts, plan
from perpend.models.quiet import silenced
from perpend.models.trust import FLAG, require_own_code, trusted
from perpend.progress import note
from perpend.refs import ModelRef, Resolved

OVERFLOWS_IN_FLOAT16 = "gemma3"
"""Model types with this prefix have residuals beyond 65,504, the largest float16."""

BLIND = ("llama4",)
"""Model types that see and are loaded as their text tower alone: their image-text class fails in every forward pass,
with pictures or without (transformers 5.24)."""

_FAILURES = (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, RuntimeError)


@dataclass(frozen=True)
class Loaded:
    """A model ready to run, in evaluation mode, its parameters without gradients.

    Attributes:
        model: The model with its LM head.
        tokenizer: Its tokenizer.
        processor: Its processor where it takes images, else None.
        source: The files that it came from.
        dtype: Floating type of its parameters.
        ref: The reference that it was loaded by.
        device: Where it takes its input.
        shelf: Reads the layers that are not in memory; None when all are.
    """

    model: nn.Module
    tokenizer: Any
    processor: Any | None
    source: Resolved
    dtype: torch.dtype
    ref: ModelRef
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    shelf: Shelf | None = None


def load_model(
    ref: ModelRef | str | Path, machine: Machine | None = None, *, copy_of: ModelRef | None = None
) -> Loaded:
    """Load a model with its tokenizer.

    A model with a vision tower is loaded with it. A GGUF file is dequantised, in bfloat16 unless the machine section
    says otherwise. Several GPUs share a model that one of them cannot hold, when the device is `auto`.

    Args:
        ref: Hub id, directory or GGUF file.
        machine: Device, dtype, and models whose own Python code may run.
        copy_of: The model that an edited copy was made from, whose code it carries.

    Raises:
        UsageError: the reference, the files, the dtype or the device cannot be used, said before weights are read; or
            weights that are not finite.
    """
    import transformers

    hf: Any = transformers
    machine = machine or Machine()
    ref = ref if isinstance(ref, ModelRef) else ModelRef.parse(str(ref))
    source, where = ref.resolve(), str(ref)
    World.of(machine)  # before the device is picked: each process has its own
    device = pick_device(machine.device)
    size = check_files(source, where)
    stored = None if source.gguf_file else quantised.require_usable(source.path, where, machine)
    common = _common(source, copy_of or ref, machine)
    with silenced(), gguf.read_once(), whole_blocks():
        config = _attempt(where, hf.AutoConfig.from_pretrained, source.path, **common)
        facts = gguf.metadata(source.path / source.gguf_file) if source.gguf_file else {}
        gguf.complete(config, facts)
        dtype = _dtype(config, machine, source, where)
        sees = _sees(config, source)
        processor = _processor(where, source, common) if sees else None
        tokenizer = (
            processor.tokenizer
            if processor
            else _attempt(where, hf.AutoTokenizer.from_pretrained, source.path, **common)
        )
        tokenizer.padding_side = "left"
        packing = quantised.settings(machine, stored, device, where)
        size = quantised.in_memory(source.path, size, packing)
        width = quantised.WIDTH.get(machine.quantization) or _width(dtype, config)
        placed = _placement(config, source, device, machine, size, width, copy_of or ref)
        if source.gguf_file:
            packing = hf.GgufConfig(dequantize=True)
        auto = hf.AutoModelForImageTextToText if sees else hf.AutoModelForCausalLM
        options = {"dtype": dtype, "output_loading_info": True, **common}
        options |= {"quantization_config": packing} if packing is not None else {}
        options |= {"config": config} if source.gguf_file else {}
        if machine.tensor_parallel > 1:
            options |= {"distributed_config": _distributed(machine)}
        else:
            options |= {"device_map": placed.map}
        model, report = _loaded(where, auto, source, machine, placed, options)
    _refuse_float16(config, model.dtype, where)  # a configuration need not say its dtype
    missing = sorted(report["missing_keys"])
    if missing:
        raise UsageError(
            f"{len(missing)} tensors of the model are not in the checkpoint, such as {missing[0]}", where=where
        )
    require_finite(model, where)
    if source.gguf_file:
        gguf.complete_generation(model.generation_config, facts, tokenizer)
    model.eval().requires_grad_(False)
    at, shelf = _device(model, device), _shelf(model, device)
    return Loaded(model, tokenizer, processor, source, model.dtype, ref, at, shelf)


def _width(dtype: torch.dtype | str, config: Any) -> int:
    """Return the bytes of a parameter."""
    own = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
    found = own if dtype == "auto" else dtype
    return found.itemsize if isinstance(found, torch.dtype) else 4


def _distributed(machine: Machine) -> Any:
    """Return how transformers shares every matrix among the processes, by the plan of the model's own family."""
    from transformers.distributed.configuration_utils import DistributedConfig

    return DistributedConfig(tp_size=machine.tensor_parallel)


def _loaded(
    where: str, auto: Any, source: Resolved, machine: Machine, placed: Plan, options: dict[str, Any]
) -> tuple[Any, Any]:
    """Load the model; offloaded tensors that cannot be read in place are written to a folder that goes with it."""
    if not placed.read:
        model, report = _attempt(where, auto.from_pretrained, source.path, **options)
        return model, report
    folder = tempfile.mkdtemp(prefix="perpend-", dir=machine.offload_folder)
    try:
        options = {**options, "offload_folder": folder}
        model, report = _attempt(where, auto.from_pretrained, source.path, **options)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    copied = sum(path.stat().st_size for path in Path(folder).iterdir())
    if copied:
        note(f"{where}: {copied / 2**30:.1f} GiB of experts are kept in {folder} in the form the model has them")
    weakref.finalize(model, shutil.rmtree, folder, True)
    return model, report


def _device(model: Any, device: torch.device) -> torch.device:
    """Return where a model takes its input."""
    own: Tensor = model.get_input_embeddings().weight
    return device if own.is_meta else own.device


def _shelf(model: Any, device: torch.device) -> Shelf | None:
    """Return what reads the layers that accelerate has offloaded; None when all are in memory."""
    found: dict[str, Any] = getattr(model, "hf_device_map", None) or {}
    away = any(place == READ or (place == "cpu" and device.type != "cpu") for place in found.values())
    model.shelf = Shelf(model, found, device) if away else None
    return cast("Shelf | None", model.shelf)


def _sees(config: Any, source: Resolved) -> bool:
    """Whether a model is loaded with its vision tower."""
    return (
        getattr(config, "vision_config", None) is not None and not source.gguf_file and config.model_type not in BLIND
    )


def _processor(where: str, source: Resolved, options: dict[str, Any]) -> Any | None:
    """Return what reads pictures; None, which is said, where it cannot be had: text can be edited all the same."""
    import transformers

    hf: Any = transformers
    try:
        return _attempt(where, hf.AutoProcessor.from_pretrained, source.path, **options)
    except MissingExtra:
        raise
    except UsageError as error:
        note(f"{where}: no pictures can be read ({error.what.removeprefix('cannot be loaded: ').split('. ')[0]})")
        return None


def _attempt(where: str, call: Any, *args: Any, **kwargs: Any) -> Any:
    """Call a loader of transformers; whatever it complains about becomes one line."""
    from safetensors import SafetensorError

    try:
        return call(*args, **kwargs)
    except (torch.OutOfMemoryError, MemoryError):
        raise RunFailed("out of memory while loading", where=where, hint="--dtype bfloat16") from None
    except (*_FAILURES, SafetensorError) as error:
        text = str(error)
        if "trust_remote_code" in text:
            hint = f"{FLAG} {where}, after reading that code"
            raise UsageError("needs Python code that comes with the model", where=where, hint=hint) from None
        for package, extra in (("gguf", "gguf"), ("PIL", "vision"), ("Pillow", "vision"), ("pillow", "vision")):
            if isinstance(error, ImportError) and package in text:
                raise MissingExtra(package.lower(), extra, f"loading {where}") from None
        lines = [line for line in text.splitlines() if line.strip()]
        reason = lines[0] if lines else type(error).__name__
        raise UsageError(f"cannot be loaded: {reason}", where=where) from None


def _dtype(config: Any, machine: Machine, source: Resolved, where: str) -> torch.dtype | str:
    """Return the dtype to load in: `auto` is the checkpoint's own."""
    if machine.dtype != "auto":
        dtype: Any = getattr(torch, machine.dtype)
    elif source.gguf_file:
        dtype = torch.bfloat16
    else:
        dtype = "auto"
    own = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
    _refuse_float16(config, own if dtype == "auto" else dtype, where)
    return cast("torch.dtype | str", dtype)


def _refuse_float16(config: Any, dtype: Any, where: str) -> None:
    """Refuse float16 where the family's residuals overflow it.

    Raises:
        UsageError: says why.
    """
    kinds = (config.get_text_config().model_type, config.model_type)
    half = str(dtype).removeprefix("torch.") == "float16"
    if half and any(kind.startswith(OVERFLOWS_IN_FLOAT16) for kind in kinds):
        reason = "its residual stream exceeds 65,504, the largest float16, and turns into infinities"
        raise UsageError(f"float16 cannot hold this model: {reason}", where=where, hint="--dtype bfloat16")


def _placement(
    config: Any, source: Resolved, device: torch.device, machine: Machine, size: int, width: float, ref: ModelRef
) -> Plan:
    """Say where the parts of a model go; its skeleton is only made where one device may not do.

    Raises:
        UsageError: the weights are larger than the memory that is free, and may not be offloaded.
    """
    whole, where = [Part("", size, "rest")], str(ref)
    fits = device.type == "mps" or size <= free_memory(device, machine.memory)
    if machine.offload == "none" or source.gguf_file or (fits and machine.offload == "auto"):
        offload = machine.model_copy(update={"offload": "none"})
        return plan(whole, device, offload, where, WHOLE if source.gguf_file else OFFLOAD)
    if machine.quantization != "none":
        raise UsageError(
            "layers that are read when they are needed cannot be quantised on the way",
            where=where,
            valid="--offload none",
        )
    return plan(parts(_meta(config, source, where, trusted(ref, machine)), width), device, machine, where)


# ------------------------------------------------------------------------------------------- the model's own calls


def takes(model: nn.Module, argument: str) -> bool:
    """Whether the model's forward pass names an argument."""
    return argument in inspect.signature(model.forward).parameters


def with_positions(model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the inputs with `position_ids` that count tokens and skip padding, made the model's own way.

    Models that take no `position_ids` (ALiBi, state spaces) get none.
    """
    if not takes(model, "position_ids"):
        return dict(inputs)
    own = getattr(model, "_prepare_position_ids_for_generation", None)
    if own is not None:
        return {**inputs, "position_ids": own(inputs["input_ids"], dict(inputs))}
    mask = inputs["attention_mask"].long()
    return {**inputs, "position_ids": (mask.cumsum(-1) - 1).clamp_min(0)}


def logits_at(model: Any, inputs: Mapping[str, Tensor], columns: Tensor) -> Tensor:
    """Return the logits `[B, n, V]` of columns `[n]` of a forward pass without cache, in the model's dtype.

    Only these columns reach the LM head, and what the model does behind it (Gemma's soft cap) is the model's own doing.
    """
    if takes(model, "logits_to_keep"):
        kept: Tensor = model(**inputs, use_cache=False, logits_to_keep=columns).logits
        return kept
    every: Tensor = model(**inputs, use_cache=False).logits
    return every[:, columns]


@contextmanager
def eager_attention(model: Any) -> Iterator[None]:
    """Attend without a fused kernel inside: on a CPU, PyTorch's own is slower backwards in bfloat16 than in float32."""
    before = model.config._attn_implementation
    if model.device.type == "cpu":
        model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def body(model: Any) -> nn.Module:
    """Return the model without its LM head; the model itself where it has no such part."""
    inner = getattr(model, getattr(model, "base_model_prefix", "") or "", None)
    return inner if isinstance(inner, nn.Module) else model


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Return the ids that end an answer: the model's own and the tokenizer's."""
    own = model.generation_config.eos_token_id
    ids = {*(own if isinstance(own, list | tuple) else [own]), tokenizer.eos_token_id} - {None}
    return sorted(ids)


def stopping(criteria: Any) -> Any:
    """Return functions of `(tokens, scores)` in the form in which `generate` takes stopping criteria."""
    import transformers

    wrapped: Any = transformers.StoppingCriteriaList
    return wrapped(criteria)


@contextmanager
def generation(model: Any, **settings: Any) -> Iterator[Any]:
    """Yield a generation configuration that holds these settings and none of the model's own, such as its penalties.

    The LM head gets contiguous input inside the block: `generate` hands it a slice of the last position, and for a
    strided slice PyTorch copies the whole matrix once per row of the batch.
    """
    import transformers

    configuration: Any = transformers.GenerationConfig

    def contiguous(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0].contiguous(), *args[1:]) if args else args

    own, head = model.generation_config, model.get_output_embeddings()
    handle = head.register_forward_pre_hook(contiguous) if head is not None else None
    model.generation_config = configuration()
    try:
        with silenced():
            yield configuration(**settings)
    finally:
        model.generation_config = own
        if handle is not None:
            handle.remove()


def growing_cache(model: Any) -> dict[str, Any]:
    """Return an empty cache from which rows can be dropped, under the name by which the model takes it.

    Empty for a model that keeps more of a row than keys and values: states that do not grow, or a shift of positions.
    """
    import transformers

    own = getattr(model, "_supports_default_dynamic_cache", None)
    name = next((name for name in ("cache", "past_key_values") if takes(model, name)), None)
    if name is None or own is None or not own() or any(hasattr(part, "rope_deltas") for part in model.modules()):
        return {}
    made: Any = transformers.DynamicCache(config=model.config.get_text_config())
    grows = [hasattr(x, "batch_select_indices") and not hasattr(x, "update_conv_state") for x in made.layers]
    return {name: made} if grows and all(grows) else {}


def _common(source: Resolved, ref: ModelRef, machine: Machine) -> dict[str, Any]:
    """Return what every loader of transformers is told."""
    trust = trusted(ref, machine)
    if trust:
        require_own_code(source, str(ref), machine)
    found: dict[str, Any] = {"trust_remote_code": trust, "local_files_only": True}
    return found | ({"gguf_file": source.gguf_file} if source.gguf_file else {})


def skeleton(source: Resolved, ref: ModelRef | str, machine: Machine | None = None) -> nn.Module:
    """Return the model that a checkpoint holds, without its weights, on the meta device.

    Args:
        source: Its files.
        ref: Its name.
        machine: Names the models whose own Python code may run.

    Raises:
        UsageError: the configuration cannot be read.
    """
    from transformers import AutoConfig

    ref = ref if isinstance(ref, ModelRef) else ModelRef.parse(ref)
    require_config(source, str(ref))
    common = _common(source, ref, machine or Machine())
    with silenced(), gguf.read_once():
        config = _attempt(str(ref), AutoConfig.from_pretrained, source.path, **common)
        return _meta(config, source, str(ref), common["trust_remote_code"])


def unloaded(ref: ModelRef, machine: Machine) -> Loaded:
    """Return a model without its weights, with its tokenizer, for an engine that loads the weights itself.

    Raises:
        UsageError: the reference or the files cannot be used, or a GGUF file.
    """
    import transformers

    hf: Any = transformers
    source, where = ref.resolve(), str(ref)
    if source.gguf_file:
        raise UsageError(
            "a GGUF file cannot be handed to another engine", where=where, valid="a safetensors checkpoint"
        )
    check_files(source, where)
    model: Any = skeleton(source, ref, machine)
    with silenced():
        tokenizer = _attempt(where, hf.AutoTokenizer.from_pretrained, source.path, **_common(source, ref, machine))
        if (source.path / "generation_config.json").is_file():
            model.generation_config = _attempt(where, hf.GenerationConfig.from_pretrained, source.path)
    tokenizer.padding_side = "left"
    return Loaded(model, tokenizer, None, source, model.dtype, ref)


def _meta(config: Any, source: Resolved, where: str, trust: bool) -> nn.Module:
    import transformers

    hf: Any = transformers
    with torch.device("meta"):
        auto = hf.AutoModelForImageTextToText if _sees(config, source) else hf.AutoModelForCausalLM
        model: nn.Module = _attempt(where, auto.from_config, config, trust_remote_code=trust)
    return model.eval().requires_grad_(False)
