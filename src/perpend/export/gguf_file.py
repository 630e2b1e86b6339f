"""Write a GGUF file anew with some tensors replaced: every key-value pair kept as its bytes, every other tensor too.

The header grows by the keys that are added, so data moves; where no replaced tensor changes its size, the data of a
file stays in its order and at its offsets.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from perpend.errors import GateFailed, RunFailed, UsageError
from perpend.export.beside import PART
from perpend.models.gguf import Layout, TensorInfo, layout
from perpend.models.headers import read_range
from perpend.whole import Taken, claimed, flush, name_all, occupied, partial_of, unfinished

_CHUNK = 8 << 20
_STRING = 8
_FIRST_PAIR = 24


@dataclass(frozen=True)
class Replacement:
    """What stands in the place of a tensor.

    Attributes:
        type: Name of its type, such as `Q4_0`.
        nbytes: Size.
        make: Returns the bytes.
    """

    type: str
    nbytes: int
    make: Callable[[], bytes]


def parts(path: Path) -> list[Path]:
    """Return all files of a model of which `path` is one: itself, or the numbered parts in order.

    Raises:
        UsageError: a part is missing.
    """
    found = PART.fullmatch(path.name)
    if found is None:
        return [path]
    names = [f"{found['stem']}-{k:05d}-of-{found['count']}.gguf" for k in range(1, int(found["count"]) + 1)]
    for name in names:
        if not path.with_name(name).is_file():
            raise UsageError("a part of the model is missing", where=str(path.with_name(name)))
    return [path.with_name(name) for name in names]


def targets(path: Path, count: int) -> list[Path]:
    """Return the files that an output of so many parts has: `OUT.gguf`, or `OUT-00001-of-0000N.gguf` and so on."""
    stem = path.name[: -len(".gguf")]
    numbered = [f"{stem}-{k:05d}-of-{count:05d}.gguf" for k in range(1, count + 1)]
    return [path] if count == 1 else [path.with_name(name) for name in numbered]


def layouts(path: Path) -> list[Layout]:
    """Return the layout of every part of a language model.

    Raises:
        UsageError: cut short, or a vision tower (`mmproj`), which is not edited.
    """
    found = [layout(part) for part in parts(path)]
    facts = found[0].facts
    if facts.get("general.type") == "mmproj" or facts.get("general.architecture") == "clip":
        raise UsageError(
            "holds the vision tower, which is not edited",
            where=str(path),
            hint="name the file of the language model; the edited one takes the same mmproj file",
        )
    return found


def text_pairs(existing: Layout, values: Mapping[str, str]) -> dict[str, str]:
    """Return provenance under keys that the file does not have yet: `perpend.`, or `perpend.2.` on the second edit."""
    number, pairs = 1, read_range(existing.path, _FIRST_PAIR, existing.pairs_end)
    while (f"perpend.{number}." if number > 1 else "perpend.version").encode() in pairs:
        number += 1
    prefix = "perpend." if number == 1 else f"perpend.{number}."
    return {prefix + key: value for key, value in values.items()}


def write(source: Layout, target: Path, replaced: Mapping[str, Replacement], added: Mapping[str, str]) -> None:
    """Write a file with some tensors replaced and some texts added to its metadata.

    Args:
        source: The original.
        target: File to write.
        replaced: By tensor name.
        added: Keys and texts; none of them in the source.

    Raises:
        RunFailed: the file cannot be written, or the source changed meanwhile.
    """
    try:
        with target.open("wb") as file:
            data = file.write(_header(source, replaced, added))
            for tensor in source.tensors.values():
                file.write(b"\0" * (-(file.tell() - data) % source.alignment))
                own = replaced.get(tensor.name)
                if own is None:
                    _copy(source.path, tensor, file)
                    continue
                made = own.make()
                if len(made) != own.nbytes:
                    raise RunFailed(f"{len(made)} bytes for {own.nbytes}", where=tensor.name)
                file.write(made)
            file.write(b"\0" * (-(file.tell() - data) % source.alignment))
    except OSError as error:
        raise RunFailed(f"cannot be written: {error.strerror}", where=str(target)) from error


def _header(source: Layout, replaced: Mapping[str, Replacement], added: Mapping[str, str]) -> bytes:
    """Return everything before the data, padded."""
    made = bytearray(struct.pack("<4sIQQ", b"GGUF", source.version, len(source.tensors), source.pairs + len(added)))
    made += read_range(source.path, _FIRST_PAIR, source.pairs_end)
    for key, value in added.items():
        made += _text(key) + struct.pack("<I", _STRING) + _text(value)
    at = 0
    for tensor in source.tensors.values():
        own = replaced.get(tensor.name)
        at += -at % source.alignment
        made += _text(tensor.name) + struct.pack("<I", len(tensor.shape))
        made += struct.pack(f"<{len(tensor.shape)}Q", *reversed(tensor.shape))
        made += struct.pack("<IQ", type_number(own.type if own else tensor.type), at)
        at += own.nbytes if own else tensor.nbytes
    return bytes(made) + b"\0" * (-len(made) % source.alignment)


def type_number(name: str) -> int:
    """Return the number of a type such as `Q4_0`."""
    from gguf.constants import GGMLQuantizationType

    return int(GGMLQuantizationType[name])


def _text(text: str) -> bytes:
    data = text.encode("utf-8")
    return struct.pack("<Q", len(data)) + data


def _copy(source: Path, tensor: TensorInfo, file: BinaryIO) -> None:
    for begin in range(tensor.begin, tensor.begin + tensor.nbytes, _CHUNK):
        file.write(read_range(source, begin, min(begin + _CHUNK, tensor.begin + tensor.nbytes)))


def require_absent(files: Sequence[Path], beside: Sequence[Path] = (), *, anew: bool = True) -> list[Path]:
    """Return what files are called until they are complete.

    Args:
        files: What is to be made.
        beside: What is to be made with it; what a killed process left of that is not in the way.
        anew: Refuse unfinished `files`, too.

    Raises:
        UsageError: one of them is there already, under either name.
    """
    for path in (*files, *beside):
        if path.exists() and not (path in beside and unfinished(path)):
            raise UsageError("already exists", where=str(path), hint="choose another -o/--output, or remove it")
    partial = [partial_of(file) for file in files]
    for path in partial if anew else ():
        if path.exists():
            raise occupied(path)
    return partial


@contextmanager
def appearing(files: Sequence[Path], beside: Sequence[Path] = (), *, anew: bool = True) -> Iterator[list[Path]]:
    """Give a `.partial` file for each file, empty and held for this process; name all when the block ends well.

    What a failure leaves is kept only if it says so: a gate that fails keeps the files for inspection.

    Args:
        files: What is made; where they are, so is all that is made with them.
        beside: What is made with them, such as their report, named first; the block fills their `.partial` files, too.
        anew: Refuse what a killed process left of `files`. Otherwise it is taken over, as that of `beside` always is.

    Raises:
        UsageError: one of them is there already, or another process is writing it.
        RunFailed: one of them appeared meanwhile.
    """
    partial = require_absent(files, beside, anew=anew)
    try:
        files[0].absolute().parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot be written: {error.strerror}", where=str(files[0])) from None
    with ExitStack() as stack:
        for path in partial:
            stack.enter_context(claimed(path, anew=anew, kept=(GateFailed, Taken)))
        for path in beside:
            if unfinished(path):
                path.unlink()
            stack.enter_context(claimed(partial_of(path), anew=False, kept=(Taken,)))
        yield partial
        whole = [*(partial_of(path) for path in beside), *partial]
        for path in whole:
            flush(path)
        name_all(whole, [*beside, *files])
