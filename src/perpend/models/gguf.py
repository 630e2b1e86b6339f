"""What a GGUF file says beside its tensors: facts that transformers leaves out when it reads one.

Only the header is read. The format: magic, version, number of tensors, number of key-value pairs, then the pairs, then
name, shape, type and place of every tensor (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from perpend.errors import MissingExtra, UsageError

_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9

MAX_DIMS, MAX_NESTING, MAX_ALIGNMENT = 8, 8, 1 << 20
"""Bounds on what a hostile or damaged file may claim; the format itself knows at most 4 dimensions."""
MAX_TEXT = 1 << 26
"""Longest text that is read, in bytes: a chat template or a licence, not the vocabulary, which is skipped."""

TURN_ENDS = ("<end_of_turn>", "<|im_end|>", "<|eot_id|>")
"""Tokens that end a turn although a file names another end token, or none."""

LARGEST_GEMMA3 = 62
"""Layers of Gemma 3 27B, whose queries are scaled by hidden size over heads and not by the size of a head."""


def metadata(path: Path) -> dict[str, Any]:
    """Return the numbers and texts of a GGUF header; arrays are left out.

    Raises:
        UsageError: not a GGUF file, or cut short.
    """
    with _opened(path) as (file, _, pairs):
        return _pairs(file, pairs)


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies.

    Attributes:
        name: Such as `blk.3.ffn_down.weight`.
        shape: Row-major, the reverse of what the file says: `[d_out, d_in]`, `[E, d_out, d_in]`.
        type: Name of its type, such as `Q4_0`.
        begin: First byte, counted from the start of the file.
        nbytes: Size in bytes.
    """

    name: str
    shape: tuple[int, ...]
    type: str
    begin: int
    nbytes: int


@dataclass(frozen=True)
class Layout:
    """What a file says of itself.

    Attributes:
        path: The file.
        version: Of the format.
        facts: Numbers and texts of the header, as `metadata` has them.
        pairs: Number of key-value pairs, arrays included.
        pairs_end: One past their last byte; the first is at 24.
        tensors: By name, in the order of the header.
        alignment: Of the data.
    """

    path: Path
    version: int
    facts: dict[str, Any]
    pairs: int
    pairs_end: int
    tensors: dict[str, TensorInfo]
    alignment: int


def layout(path: Path) -> Layout:
    """Return where everything lies, once it is sure that the file holds the bytes of every tensor.

    Raises:
        UsageError: not a GGUF file, cut short, or with a tensor twice.
        MissingExtra: the package `gguf`, which knows the sizes of quantised types, is not installed.
    """
    try:
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
    except ImportError:
        raise MissingExtra("gguf", "gguf", f"reading {path.name}") from None
    with _opened(path) as (file, count, pairs):
        facts = _pairs(file, pairs)
        align, pairs_end = _alignment(facts), file.tell()
        found: dict[str, TensorInfo] = {}
        for _ in range(count):
            name, dims = _text(file), _number(file, "I")
            if name in found:
                raise ValueError("a tensor comes twice")
            if dims > MAX_DIMS:
                raise ValueError(f"a tensor of {dims} dimensions")
            shape = tuple(_number(file, "Q") for _ in range(dims))[::-1]
            kind = GGMLQuantizationType(_number(file, "I"))
            block, size = GGML_QUANT_SIZES[kind]
            found[name] = TensorInfo(name, shape, kind.name, _number(file, "Q"), math.prod(shape) // block * size)
        data, have = -(-file.tell() // align) * align, path.stat().st_size
        placed = {t.name: replace(t, begin=data + t.begin) for t in found.values()}
        _require_apart(placed.values(), data, have)
        file.seek(4)
        return Layout(path, _number(file, "I"), facts, pairs, pairs_end, placed, align)


def _alignment(facts: Mapping[str, Any]) -> int:
    align = facts.get("general.alignment", 32)
    if type(align) is not int or not 1 <= align <= MAX_ALIGNMENT:
        raise ValueError(f"an alignment of {str(align)[:40]}")
    return align


def _require_apart(tensors: Iterable[TensorInfo], data: int, have: int) -> None:
    """Refuse data that the file does not hold, or that two tensors share."""
    at = data
    for tensor in sorted(tensors, key=lambda t: (t.begin, t.nbytes)):
        if tensor.begin < at:
            raise ValueError(f"tensor {tensor.name[:200]!r} overlaps the one before it")
        at = tensor.begin + tensor.nbytes
        if at > have:
            raise ValueError(f"{have} bytes of {at}")


def elements(path: Path) -> int:
    """Return the number of elements of all tensors, once it is sure that the file holds their bytes.

    Raises:
        UsageError: not a GGUF file, or cut short.
        MissingExtra: the package `gguf`, which knows the sizes of quantised types, is not installed.
    """
    return sum(math.prod(tensor.shape) for tensor in layout(path).tensors.values())


@contextmanager
def _opened(path: Path) -> Iterator[tuple[BinaryIO, int, int]]:
    """Give an open file behind its first fields, the number of its tensors and that of its pairs."""
    try:
        with path.open("rb") as file:
            magic, version, tensors, pairs = struct.unpack("<4sIQQ", file.read(24))
            if magic != b"GGUF" or not 2 <= version <= 3:
                raise ValueError("not a GGUF file of version 2 or 3")
            yield file, tensors, pairs
    except (struct.error, OSError, KeyError, ValueError, MemoryError, OverflowError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UsageError(f"truncated or corrupt: {reason}", where=str(path), hint="download the file again") from None


def _pairs(file: BinaryIO, count: int) -> dict[str, Any]:
    found = {}
    for _ in range(count):
        key = _text(file)
        value = _value(file, _number(file, "I"))
        if value is not None:
            found[key] = value
    return found


@contextmanager
def read_once() -> Iterator[None]:
    """Let transformers parse a file once inside the block, where it would for configuration, tokenizer and weights.

    For a vocabulary of 262,144 tokens each time takes more than ten seconds of one core.
    """
    try:
        import gguf
    except ImportError:  # transformers says so itself
        yield
        return
    library: Any = gguf
    reader, made = library.GGUFReader, dict[str, Any]()

    def once(path: Any, *options: Any) -> Any:
        if (key := str(path)) not in made:
            made[key] = reader(path, *options)
        return made[key]

    library.GGUFReader = once
    try:
        yield
    finally:
        library.GGUFReader = reader


def _number(file: BinaryIO, kind: str) -> Any:
    return struct.unpack(f"<{kind}", file.read(struct.calcsize(f"<{kind}")))[0]


def _text(file: BinaryIO) -> str:
    length = _number(file, "Q")
    if length > MAX_TEXT:
        raise ValueError(f"claims a text of {length} bytes")
    data = file.read(length)
    if len(data) < length:
        raise ValueError("ends within a text")
    return data.decode("utf-8")


def _value(file: BinaryIO, kind: int, depth: int = 0) -> Any:
    """Return a value of the header, None for an array, which is skipped."""
    if kind == _STRING:
        return _text(file)
    if kind != _ARRAY:
        return _number(file, _NUMBERS[kind])
    inner, length = _number(file, "I"), _number(file, "Q")
    if depth > MAX_NESTING:
        raise ValueError("arrays within arrays")
    if inner in _NUMBERS:
        file.seek(length * struct.calcsize(f"<{_NUMBERS[inner]}"), 1)
        return None
    for _ in range(length):
        if inner == _STRING:
            file.seek(_number(file, "Q"), 1)
        else:
            _value(file, inner, depth + 1)
    return None


def complete(config: Any, facts: Mapping[str, Any]) -> None:
    """Put into a Gemma 3 configuration what transformers does not take from the file.

    These are the scaling of positions in layers of full attention (4B and larger) and the scaling of queries (27B);
    without them the model is another one, and nothing says so.

    Args:
        config: Configuration that transformers made of the file; changed in place.
        facts: From `metadata`.
    """
    if config.model_type != "gemma3_text":
        return
    kind, factor = facts.get("gemma3.rope.scaling.type"), facts.get("gemma3.rope.scaling.factor")
    if kind == "linear" and factor:
        config.rope_parameters["full_attention"] |= {"rope_type": "linear", "factor": float(factor)}
    if config.num_hidden_layers == LARGEST_GEMMA3:
        config.query_pre_attn_scalar = config.hidden_size // config.num_attention_heads


def complete_generation(settings: Any, facts: Mapping[str, Any], tokenizer: Any) -> None:
    """Put end tokens and sampling settings of a file into a generation configuration, in place.

    Args:
        settings: The model's generation configuration.
        facts: From `metadata`.
        tokenizer: Of the same file.
    """
    vocabulary = tokenizer.get_vocab()
    keys = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id")
    ends = [facts[key] for key in keys if key in facts] + [vocabulary[end] for end in TURN_ENDS if end in vocabulary]
    if ends:
        settings.eos_token_id = list(dict.fromkeys(ends))
    for name, key in (("temperature", "temp"), ("top_k", "top_k"), ("top_p", "top_p")):
        value = facts.get(f"general.sampling.{key}")
        if value is not None:
            setattr(settings, name, value)
            settings.do_sample = True


def front_matter(facts: Mapping[str, Any]) -> str:
    """Return a README that passes on the licence that a file names; empty when it names none."""
    keys = ("license", "license.name", "license.link")
    lines = [f"{key.replace('.', '_')}: {facts[f'general.{key}']}" for key in keys if facts.get(f"general.{key}")]
    return "\n".join(["---", *lines, "---", ""]) if lines else ""
