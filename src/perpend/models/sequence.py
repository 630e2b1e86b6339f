"""The decoder layers of a model, found by running it on four tokens: no names, no table of architectures.

They are the list of modules that run one after the other, each on what the one before returned. A vision or audio tower
does not run on text and is therefore never taken for them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from perpend.errors import UsageError, nearest

TOKENS = 4
"""Length of the probe sequence."""


@dataclass
class Call:
    """One recorded call of a module: arguments, and where among them the residual stream is."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any = None
    order: int = 0

    def stream_key(self) -> int | str | None:
        """Position or name of the argument that carries the residual: the first float tensor of the output's shape."""
        out = stream(self.output)
        items: list[tuple[int | str, Any]] = [*enumerate(self.args), *self.kwargs.items()]
        for key, value in items:
            if is_float(value) and out is not None and value.shape == out.shape:
                return key
        return None

    def entered(self) -> Tensor:
        """Return the residual that enters, `[..., T, d]`."""
        key = self.stream_key()
        if key is None:
            raise UsageError("no argument of a decoder layer has the shape of its output", valid="a residual stream")
        value: Tensor = self.args[key] if isinstance(key, int) else self.kwargs[key]
        return value

    def left(self) -> Tensor:
        """Return the residual that leaves, `[..., T, d]`."""
        return _required(self.output)

    def run(self, module: nn.Module, entering: Tensor) -> Tensor:
        """Call the module again with another residual and return the residual that leaves it."""
        key = self.stream_key()
        args = tuple(entering if k == key else value for k, value in enumerate(self.args))
        kwargs = {k: entering if k == key else value for k, value in self.kwargs.items()}
        return _required(module(*args, **kwargs))


def _required(value: Any) -> Tensor:
    found = stream(value)
    if found is None:
        raise UsageError("a decoder layer returns no tensor", valid="a residual stream")
    return found


def stream(value: Any) -> Tensor | None:
    """Return the residual in a layer's output: the tensor itself, or the first float tensor of a tuple."""
    candidates: Any = value if isinstance(value, list | tuple) else (value,)
    return next((item for item in candidates if is_float(item)), None)


def residual(model: nn.Module, output: Any) -> Tensor:
    """Return the residual stream `[B, T, d]` in the output of a decoder layer.

    Layers that carry several streams, `[S, B, T, d]` (Gemma 3n), work on one of them, which the configuration names.

    Raises:
        UsageError: several streams, and no one that the layers work on.
    """
    found = _required(output)
    if found.dim() == 3:
        return found
    active = getattr(text_config(model), "altup_active_idx", None)
    if found.dim() != 4 or active is None:
        raise UsageError(f"a residual of shape {list(found.shape)} cannot be read", where=type(model).__name__)
    return found[active]


def is_float(value: Any) -> bool:
    """Whether a value is a float tensor of at least two axes."""
    return isinstance(value, Tensor) and value.is_floating_point() and value.dim() >= 2


@contextmanager
def hooked() -> Iterator[Callable[[Any], None]]:
    """Yield a function that takes hook handles; all of them are removed on leaving."""
    handles: list[Any] = []
    try:
        yield handles.append
    finally:
        for handle in handles:
            handle.remove()


def text_config(model: nn.Module) -> Any:
    """Return the configuration of the text part of a model, or None for a model without one."""
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def hidden_size(model: nn.Module) -> int:
    """Return the width of the residual stream as configured, or that of the input embeddings."""
    return int(getattr(text_config(model), "hidden_size", None) or _embedding(model).shape[-1])


def _embedding(model: nn.Module) -> Tensor:
    own: Any = getattr(model, "get_input_embeddings", lambda: None)()
    found: Tensor | None = next((m.weight for m in [own, *model.modules()] if isinstance(m, nn.Embedding)), None)
    if found is None:
        raise UsageError("no token embeddings were found", where=type(model).__name__)
    return found


def probe_tokens(model: nn.Module) -> Tensor:
    """Return `[1, 4]` int64 token ids that are no special tokens of the configuration, on the model's device."""
    config = getattr(model, "config", None)
    special: set[int] = set()
    for part in (config, text_config(model)):
        for name, value in (vars(part) if part is not None else {}).items():
            if "token" in name:
                special |= {v for v in (value if isinstance(value, list) else [value]) if type(v) is int}
    vocabulary = int(getattr(text_config(model), "vocab_size", None) or _embedding(model).shape[0])
    ids = [i for i in range(vocabulary // 5, vocabulary) if i not in special] or [0]
    step = max(1, len(ids) // (TOKENS + 1))
    device = next((p.device for p in model.parameters() if p.device.type != "meta"), torch.device("cpu"))
    return torch.tensor([[ids[(k * step) % len(ids)] for k in range(TOKENS)]], device=device)


def forward(model: nn.Module) -> None:
    """Run the model once on the probe tokens, without a cache.

    Raises:
        UsageError: the model cannot be run on text alone.
    """
    ids = probe_tokens(model)
    accepted = inspect.signature(model.forward).parameters.values()
    cached = any(p.name == "use_cache" or p.kind is p.VAR_KEYWORD for p in accepted)
    try:
        with torch.no_grad():
            model(ids, **({"use_cache": False} if cached else {}))
    except Exception as error:
        raise UsageError(
            f"a forward pass over {TOKENS} tokens failed ({type(error).__name__}: {error})",
            where=type(model).__name__,
            hint="name layers and writers by hand in [edit.overrides]",
        ) from error


def decoder_layers(model: nn.Module, wanted: str | None = None) -> tuple[str, list[Call]]:
    """Find the list of decoder layers by running the model on text.

    Args:
        model: The model.
        wanted: Path of the list, when it is known.

    Returns:
        The path of the ModuleList, and the recorded call of each of its items in order. A vision or audio tower does
        not run on text and is therefore never found.

    Raises:
        UsageError: no list of modules runs in sequence; names the architecture.
    """
    every = {name: m for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) > 0}
    if wanted is not None and wanted not in every:
        raise UsageError(
            f"no list of modules '{wanted}'",
            where="edit.overrides.layers",
            valid=", ".join(list(every)[:8]),
            hint=nearest(wanted, every),
        )
    lists = every if wanted is None else {wanted: every[wanted]}
    calls: dict[int, list[Call]] = {}
    clock = iter(range(1 << 62))

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        held = tuple(a.detach().clone() if is_float(a) else a for a in args)
        calls.setdefault(id(module), []).append(Call(held, dict(kwargs), order=next(clock)))

    def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        calls[id(module)][-1].output = output

    items = {id(item): item for modules in lists.values() for item in modules}
    with hooked() as hold:
        for item in items.values():
            hold(item.register_forward_pre_hook(before, with_kwargs=True))
            hold(item.register_forward_hook(after, with_kwargs=True))
        forward(model)

    sequences = {name: run for name, modules in lists.items() if (run := _sequence(modules, calls))}
    outer = [n for n in sequences if not any(n.startswith(other + ".") for other in sequences if other != n)]
    if not outer:
        raise UsageError(
            "no list of decoder layers that run one after the other was found",
            where=type(model).__name__,
            valid="the path of a ModuleList: " + ", ".join(list(lists)[:8]),
            hint='edit.overrides.layers = "model.layers"',
        )
    best = max(outer, key=lambda name: len(sequences[name]))
    return best, sequences[best]


def _sequence(modules: nn.ModuleList, calls: Mapping[int, list[Call]]) -> list[Call] | None:
    """Return the calls of a list's items when each ran once, in order, on what the one before it returned."""
    run: list[Call] = []
    for module in modules:
        own = calls.get(id(module), [])
        if len(own) != 1 or own[0].stream_key() is None or (run and own[0].order < run[-1].order):
            return None
        run.append(own[0])
    linked = [_same(a.left(), b.entered()) for a, b in pairwise(run)]
    return run if not linked or sum(linked) * 2 > len(linked) else None


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a, b.to(a.device))
