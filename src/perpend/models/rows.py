"""Several edits in one forward pass: each row of the batch has its own, and what an edit cannot change is not redone.

All rows read the same tree of tokens. The untouched model runs over it once, in one row, and what enters some of its
layers is kept. A row joins the batch at the last of these layers that comes before its first edited one; layers before
the first row are not run at all; the untouched row joins behind the last layer, so that its logits cost one LM head.

Attention, norms and the rest are the model's own, in its own order: rows join by hooks, and a layer that is not run is
stood in for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from perpend.core.edits import Edit, HookMap
from perpend.core.linear import working
from perpend.errors import UsageError
from perpend.models import load
from perpend.models.anatomy import Anatomy
from perpend.models.hooks import hook_map
from perpend.models.session import Session
from perpend.models.tree import Tree

KEPT = 8
"""Layers at which a row can join, at most: what enters each of them is kept in memory."""


def joints(n_layers: int, most: int = KEPT) -> tuple[int, ...]:
    """Return the layers at which rows may join, from 0, evenly over the depth."""
    step = -(-n_layers // max(1, most))
    return tuple(range(0, n_layers, step))


def per_row(anatomy: Anatomy, edit: Edit) -> bool:
    """Return whether every module of an edit sees all rows of a batch, each in its place.

    An expert that is a module of its own sees the tokens that are sent to it, and an edit of fused experts that does
    not commute with the sum over them changes their tensors: neither can be another one in each row.
    """
    for name, part in edit.modules.items():
        writer = anatomy.writer(name)
        alone = writer.role == "expert_down" and writer.experts is None
        if part.weight and (alone or (writer.experts is not None and part.mode != "plain")):
            return False
    return True


@dataclass(frozen=True, eq=False)
class Stack:
    """The maps of one module, one per row; a map that is not there changes nothing.

    Attributes:
        read: `[R, k, d_out]` float32 (float64 for a float64 model).
        write: `[R, k, d_out]` with the weight factor.
        input_scale: `[R, 1, d_in]`, None when no row has one.
        output_scale: `[R, 1, d_out]`, likewise.
    """

    read: Tensor
    write: Tensor
    input_scale: Tensor | None
    output_scale: Tensor | None

    @classmethod
    def of(cls, maps: Sequence[HookMap | None]) -> Stack:
        """Stack maps, of which at least one is there; differentiable where they are."""
        some = next(m for m in maps if m is not None)
        rank = max(len(m.read) for m in maps if m is not None)

        def rows(made: HookMap | None, tensor: Callable[[HookMap], Tensor]) -> Tensor:
            if made is None:
                return some.read.new_zeros(rank, some.read.shape[1])
            return pad(tensor(made), (0, 0, 0, rank - len(made.read)))

        def scales(name: str) -> Tensor | None:
            found = [None if m is None else getattr(m, name) for m in maps]
            size = next((len(s) for s in found if s is not None), None)
            if size is None:
                return None
            return torch.stack([some.read.new_ones(size) if s is None else s for s in found])[:, None]

        read = torch.stack([rows(m, lambda m: m.read) for m in maps])
        write = torch.stack([rows(m, lambda m: m.factor * m.write) for m in maps])
        return cls(read, write, scales("input_scale"), scales("output_scale"))

    def keep(self, rows: Sequence[int]) -> Stack:
        """Return the maps of some of the rows."""
        scales = [None if x is None else x[list(rows)] for x in (self.input_scale, self.output_scale)]
        return Stack(self.read[list(rows)], self.write[list(rows)], *scales)

    def apply(self, y: Tensor, tokens: int) -> Tensor:
        """Return the edited output of the module for rows of `tokens` tokens, `[n, T, d]` or `[n · T, d]`."""
        z = _by_row(y, tokens)
        n = len(z)
        read = z @ self.read[:n].mT
        own = not torch.is_grad_enabled() and z.dtype != y.dtype  # a copy, which may be written to
        z = (z.baddbmm_ if own else z.baddbmm)(read, self.write[:n], alpha=-1)
        z = z if self.output_scale is None else z * self.output_scale[:n]
        return z.to(y.dtype).view(y.shape)

    def scale(self, x: Tensor, tokens: int) -> Tensor:
        """Return the scaled input of the module."""
        if self.input_scale is None:
            return x
        z = _by_row(x, tokens)
        return (z * self.input_scale[: len(z)]).to(x.dtype).view(x.shape)


def _by_row(x: Tensor, tokens: int) -> Tensor:
    if x.numel() % (tokens * x.shape[-1]):
        raise UsageError("a module does not see whole rows", hint="score one edit after the other")
    return x.to(working(x.dtype)).reshape(-1, tokens, x.shape[-1])


@dataclass(eq=False)
class Planted:
    """A tree on the session's device, and what the untouched model does with it.

    Attributes:
        tree: The sequences; its columns, places and tails on the device as well.
        inputs: Keyword arguments of the model, one row.
        entering: Residual `[1, T, d]` that enters a layer, by layer; behind the last one by the number of layers.
    """

    tree: Tree
    inputs: dict[str, Tensor]
    entering: dict[int, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, session: Session, tree: Tree) -> Planted:
        """Put a tree on the session's device.

        Raises:
            UsageError: the model takes no positions, so that a tree cannot be told from a text.
        """
        if not load.takes(session.model, "position_ids"):
            raise UsageError("the model takes no position_ids", where=type(session.model).__name__)
        dtype = session.loaded.dtype
        mask = torch.zeros(tree.sees.shape, dtype=dtype).masked_fill(~tree.sees, torch.finfo(dtype).min)
        inputs = {"input_ids": tree.tokens[None], "position_ids": tree.depths[None], "attention_mask": mask[None, None]}
        places, tails = (tuple(x.to(session.device) for x in each) for each in (tree.places, tree.tails))
        near = replace(tree, columns=tree.columns.to(session.device), places=places, tails=tails)
        return cls(near, {name: value.to(session.device) for name, value in inputs.items()})

    def logits(self, session: Session) -> Tensor:
        """Return logits `[R, P, V]` at the columns of the tree, in the model's dtype, under the hooks in place."""
        return load.logits_at(session.model, self.inputs, self.tree.columns)

    @torch.no_grad()
    def read(self, session: Session, at: Sequence[int]) -> Tensor:
        """Run the untouched model, keep what enters the layers `at` and leaves the last, and return its logits."""
        layers = session.anatomy.layer_modules(session.model)

        def keep(layer: int) -> Callable[..., None]:
            def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                self.entering[layer] = _stream(args, kwargs, len(self.tree))[1]

            return before

        def after(module: nn.Module, args: Any, output: Any) -> None:
            self.entering[len(layers)] = output[0] if isinstance(output, tuple) else output

        with ExitStack() as stack:
            for layer in at:
                stack.callback(layers[layer].register_forward_pre_hook(keep(layer), with_kwargs=True).remove)
            stack.callback(layers[-1].register_forward_hook(after).remove)
            return self.logits(session)


def _stream(args: tuple[Any, ...], kwargs: Mapping[str, Any], tokens: int) -> tuple[int | str, Tensor]:
    """Return where among the arguments of a layer the residual is, and the residual `[R, T, d]`."""
    items: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    for key, value in items:
        if isinstance(value, Tensor) and value.is_floating_point() and value.dim() == 3 and value.shape[1] == tokens:
            return key, value
    raise UsageError("no residual among the arguments of a decoder layer", valid="[rows, tokens, d]")


class Rows:
    """Edits that go through a model together, a row each, and with them the untouched model."""

    def __init__(
        self,
        session: Session,
        stacks: Sequence[tuple[nn.Module, Stack]],
        joins: Sequence[int] = (0,),
        order: Sequence[int] = (0,),
    ) -> None:
        """Take maps that are made.

        Args:
            session: The untouched model.
            stacks: Modules and their maps; differentiable where these are.
            joins: The layer before which each row joins, ascending; the number of layers stands for behind the last.
            order: Which edit is in each row.
        """
        self.session, self._stacks, self._joins, self._order = session, list(stacks), list(joins), list(order)

    @property
    def n(self) -> int:
        """Edits."""
        return len(self._order)

    @classmethod
    def of(cls, session: Session, edits: Sequence[Edit], at: Sequence[int]) -> Rows:
        """Prepare edits.

        Args:
            session: The untouched model.
            edits: Those of `per_row`.
            at: Layers at which rows may join, 0 among them.

        Raises:
            UsageError: an edit that names no writer.
        """
        anatomy = session.anatomy
        writers = {name: anatomy.writer(name) for edit in edits for name, p in edit.modules.items() if p.weight}
        first = [
            min((writers[name].layer for name, p in edit.modules.items() if p.weight), default=anatomy.n_layers)
            for edit in edits
        ]
        joins = [max(j for j in [*at, anatomy.n_layers] if j <= layer) for layer in first]
        order = sorted(range(len(edits)), key=lambda k: joins[k])
        stacks = []
        for name, writer in writers.items():
            module, parts = session.model.get_submodule(name), [edits[k].modules.get(name) for k in order]
            maps = [hook_map(module, writer, p) if p is not None and p.weight else None for p in parts]
            stacks.append((module, Stack.of(maps)))
        return cls(session, stacks, sorted(joins), order)

    def keep(self, edits: Sequence[int]) -> Rows:
        """Return the rows of some of the edits, ascending; they are counted anew."""
        rows = [row for row, edit in enumerate(self._order) if edit in set(edits)]
        order = [list(edits).index(self._order[row]) for row in rows]
        stacks = [(module, made.keep(rows)) for module, made in self._stacks]
        return Rows(self.session, stacks, [self._joins[row] for row in rows], order)

    def logits(self, planted: Planted, base: bool = True) -> Tensor:
        """Return logits at the columns of the tree, in the model's dtype.

        Args:
            planted: The tree, read by the untouched model.
            base: Add the untouched model as the last row.

        Returns:
            `[R + 1, P, V]`, or `[R, P, V]`; rows in the order of the edits.
        """
        with installed(self.session, self._stacks, len(planted.tree)), self._joined(planted, base):
            found = planted.logits(self.session)
        place = {edit: row for row, edit in enumerate(self._order)}
        rows = [*(place[k] for k in range(self.n)), *([self.n] if base else [])]
        return found if rows == sorted(rows) else found[rows]

    @contextmanager
    def _joined(self, planted: Planted, base: bool) -> Iterator[None]:
        layers = self.session.anatomy.layer_modules(self.session.model)
        last = len(layers)
        joining = {at: self._joins.count(at) for at in sorted(set(self._joins))}
        begin = min(joining, default=last)
        with ExitStack() as stack:
            for layer in layers[:begin]:
                stack.enter_context(_stood_in(layer, len(planted.tree)))
            for at, count in joining.items():
                if at < last:
                    hook = _join(planted.entering[at], count, at == begin)
                    stack.callback(layers[at].register_forward_pre_hook(hook, with_kwargs=True).remove)
            if behind := base + joining.get(last, 0):
                hook = _join_behind(planted.entering[last], behind, begin == last)
                stack.callback(layers[-1].register_forward_hook(hook).remove)
            yield


def _join(entering: Tensor, count: int, first: bool) -> Callable[..., Any]:
    """Return a hook that lets `count` rows join before a layer; the first of all take the place of the one row."""

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
        key, hidden = _stream(args, kwargs, entering.shape[1])
        joining = entering.expand(count, -1, -1)
        rows = joining if first else torch.cat([hidden, joining])
        args = tuple(rows if place == key else value for place, value in enumerate(args))
        return args, {name: rows if name == key else value for name, value in kwargs.items()}

    return before


def _join_behind(leaving: Tensor, count: int, alone: bool) -> Callable[..., Any]:
    """Return a hook that lets `count` rows join behind the last layer."""

    def after(module: nn.Module, args: Any, output: Any) -> Any:
        joining = leaving.expand(count, -1, -1)
        hidden = output[0] if isinstance(output, tuple) else output
        rows = joining if alone else torch.cat([hidden, joining])
        return (rows, *output[1:]) if isinstance(output, tuple) else rows

    return after


@contextmanager
def _stood_in(layer: nn.Module, tokens: int) -> Iterator[None]:
    """Let a layer hand on what enters it inside the block, without running."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        return _stream(args, kwargs, tokens)[1]

    own = layer.__dict__.get("forward")
    layer.forward = forward
    try:
        yield
    finally:
        del layer.forward
        if own is not None:
            layer.forward = own


@contextmanager
def installed(session: Session, stacks: Sequence[tuple[nn.Module, Stack]], tokens: int) -> Iterator[None]:
    """Put maps in place inside the block, for rows of `tokens` tokens."""

    def hooks(made: Stack) -> tuple[Callable[..., Any], Callable[..., Any]]:
        def after(module: nn.Module, args: Any, output: Any) -> Any:
            if isinstance(output, tuple):
                return (made.apply(output[0], tokens), *output[1:])
            return made.apply(output, tokens)

        def before(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return (made.scale(args[0], tokens), *args[1:])

        return after, before

    with ExitStack() as stack:
        for module, made in stacks:
            after, before = hooks(made)
            stack.callback(module.register_forward_hook(after).remove)
            if made.input_scale is not None:
                stack.callback(module.register_forward_pre_hook(before).remove)
        yield
