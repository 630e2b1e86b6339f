"""Prompts: read from anywhere, identified by their text, split so that no split sees another's.

Three splits of each class: fit (directions), select (search) and report (read once, at the end). Two prompts that are
the same after `normalised` count as one; a prompt met in two places is an error, not a warning.
"""

from __future__ import annotations

import csv
import hashlib
import json
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Literal, overload

from perpend.config import PromptsSection
from perpend.errors import MissingExtra, UsageError, nearest
from perpend.refs import DataRef

SplitName = Literal["fit", "select", "report"]

SPLITS: tuple[SplitName, ...] = ("fit", "select", "report")
SHARES: dict[SplitName, float] = {"fit": 0.5, "select": 0.2, "report": 0.3}
"""Shares of the prompts when one source is split."""
COLUMNS = ("text", "prompt", "instruction", "question", "goal")
"""Columns looked for when none is named."""
MAX_LINE, MAX_JSON = 1 << 20, 1 << 28
"""Most characters of a line, and most bytes of a `.json` file, which is read at once."""
IMAGE = "image"
"""Column of images that is looked for in a file when none is named."""

_SHIPPED = Path(__file__).parent / "prompts"


def normalised(text: str) -> str:
    """Return `text` in NFKC, case folded, with runs of white space as one space: two prompts that agree are one."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


@dataclass(frozen=True)
class Prompt:
    """One request to the model.

    Attributes:
        text: What the user says.
        image: Path or URL of an image shown with it.
        topic: Label of what it is about.
        form: Label of how it is put, such as `question` or `imperative`.
    """

    text: str
    image: str | None = None
    topic: str = ""
    form: str = ""

    @cached_property
    def id(self) -> str:
        """First 16 hex digits of the SHA-256 of the normalised text, and of the image where there is one.

        An image counts by its bytes, wherever it lies and whatever it is called; by its name where it is no local file.
        """
        key = normalised(self.text) + (f"\n{_image_key(self.image)}" if self.image else "")
        return hashlib.sha256(key.encode()).hexdigest()[:16]


def _image_key(image: str) -> str:
    path = Path(image)
    return hashlib.sha256(path.read_bytes()).hexdigest() if "://" not in image and path.is_file() else image


@dataclass(frozen=True)
class PromptSet(Sequence[Prompt]):
    """Prompts of one class and split, each once.

    Attributes:
        name: What they are, such as `target.fit`.
        prompts: In the order of the source.
        source: The reference they were read from.
    """

    name: str
    prompts: tuple[Prompt, ...]
    source: str = ""

    def __len__(self) -> int:
        return len(self.prompts)

    def __iter__(self) -> Iterator[Prompt]:
        return iter(self.prompts)

    @overload
    def __getitem__(self, index: int) -> Prompt: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Prompt, ...]: ...
    def __getitem__(self, index: int | slice) -> Prompt | tuple[Prompt, ...]:
        return self.prompts[index]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the prompts' ids in order, 64 hex digits."""
        return hashlib.sha256("\n".join(p.id for p in self.prompts).encode()).hexdigest()

    def limited(self, limit: int | None) -> PromptSet:
        """Return at most `limit` prompts, chosen by hash, in the order of the source; smaller limits are subsets."""
        if limit is None or limit >= len(self):
            return self
        return self.subset(sorted(self.prompts, key=_rank)[:limit])

    def subset(self, prompts: Iterable[Prompt]) -> PromptSet:
        """Return the set of those of its prompts that are among the given ones, in the order of the source."""
        chosen = {p.id for p in prompts}
        return replace(self, prompts=tuple(p for p in self.prompts if p.id in chosen))


@dataclass(frozen=True)
class PromptPair:
    """The two classes of one split."""

    target: PromptSet
    baseline: PromptSet


@dataclass(frozen=True)
class Splits:
    """The three splits, disjoint by hash."""

    fit: PromptPair
    select: PromptPair
    report: PromptPair

    def sets(self) -> tuple[PromptSet, ...]:
        """Return the six sets, fit first, target before baseline."""
        return tuple(s for pair in (self.fit, self.select, self.report) for s in (pair.target, pair.baseline))


def _rank(prompt: Prompt) -> str:
    """Return a number, fixed by the text alone, that orders prompts as if shuffled."""
    return hashlib.sha256(f"split {prompt.id}".encode()).hexdigest()


def load_prompts(ref: DataRef | str, *, limit: int | None = None, name: str | None = None) -> PromptSet:
    """Read prompts; blank ones and repeats are left out.

    Args:
        ref: `perpend:target` (all three splits, or one with `#split=report`), a file, or a hub data set.
        limit: At most this many, chosen by hash.
        name: Name of the set; the reference by default.

    Raises:
        UsageError: cannot be read, no such column, or no prompts in it.
    """
    ref = DataRef.parse(ref) if isinstance(ref, str) else ref
    prompts = {p.id: p for p in reversed(list(_prompts(ref))) if p.text.strip()}
    if not prompts:
        raise UsageError("no prompts", where=str(ref))
    return PromptSet(name or str(ref), tuple(reversed(prompts.values())), str(ref)).limited(limit)


def load_splits(section: PromptsSection) -> Splits:
    """Read the prompts of a recipe.

    `perpend:target` and `perpend:baseline` come split. Of any other source, prompts are dealt by hash: half to fit, a
    fifth to select, the rest to report, in proportion where some of these have a source of their own. The limit holds
    for each class and split.

    Raises:
        UsageError: a source cannot be read or is too small to split, or a prompt appears twice: in two splits, or as
            target and as baseline.
    """
    parts = {
        "target": _class_splits("target", section.target, section.target_select, section.target_report),
        "baseline": _class_splits("baseline", section.baseline, section.baseline_select, section.baseline_report),
    }
    require_disjoint([*parts["target"].values(), *parts["baseline"].values()])
    pairs = {
        split: PromptPair(*(parts[kind][split].limited(section.limit) for kind in ("target", "baseline")))
        for split in SPLITS
    }
    return Splits(**pairs)


def _class_splits(kind: str, main: str, select: str | None, report: str | None) -> dict[SplitName, PromptSet]:
    own: dict[SplitName, str] = {s: r for s, r in (("select", select), ("report", report)) if r is not None}  # type: ignore[misc]
    try:
        ref = DataRef.parse(main)
    except UsageError as error:
        raise error.within(f"prompts.{kind}") from None
    rest = [s for s in SPLITS if s not in own]
    if ref.kind == "builtin" and ref.split is None:
        own = {s: str(replace(ref, split=s)) for s in rest} | own
        rest = []
    found = {s: load_prompts(r, name=f"{kind}.{s}") for s, r in own.items()}
    if rest:
        found |= split_by_hash(load_prompts(ref, name=kind), rest)
    return {s: found[s] for s in SPLITS}


def split_by_hash(prompts: PromptSet, splits: Sequence[SplitName] = SPLITS) -> dict[SplitName, PromptSet]:
    """Deal prompts to splits in the proportions of `SHARES`, in an order that their texts alone decide.

    Raises:
        UsageError: fewer prompts than splits.
    """
    if len(prompts) < len(splits):
        raise UsageError(f"{len(prompts)} prompts cannot be split into {', '.join(splits)}", where=prompts.source)
    ranked = sorted(prompts, key=_rank)
    total = sum(SHARES[s] for s in splits)
    home: dict[str, SplitName] = {}
    begin, share = 0, 0.0
    for k, split in enumerate(splits):
        share += SHARES[split]
        left = len(splits) - 1 - k
        end = min(max(round(len(ranked) * share / total), begin + 1), len(ranked) - left)
        home.update((p.id, split) for p in ranked[begin:end])
        begin = end
    return {
        s: PromptSet(f"{prompts.name}.{s}", tuple(p for p in prompts if home[p.id] == s), prompts.source)
        for s in splits
    }


def require_disjoint(sets: Sequence[PromptSet]) -> None:
    """Refuse sets that share a prompt.

    Raises:
        UsageError: names the two sets, how many prompts they share, and one of them.
    """
    for k, one in enumerate(sets):
        ids = {p.id for p in one}
        for other in sets[k + 1 :]:
            shared = [p for p in other if p.id in ids]
            if shared:
                example = " ".join(shared[0].text.split())[:60]
                raise UsageError(
                    f"{one.name} and {other.name} share {len(shared)} prompts, such as '{example}'",
                    where=" and ".join(dict.fromkeys(s.source for s in (one, other) if s.source)),
                    hint="remove them from one of the two",
                )


def near_duplicates(sets: Sequence[PromptSet], threshold: float = 0.6) -> list[tuple[float, Prompt, Prompt]]:
    """Find prompts of different sets that share many of their three-word runs.

    Args:
        sets: Compared with one another, not within.
        threshold: Smallest Jaccard index (size of the intersection over that of the union) that is reported.

    Returns:
        Similarity and the two prompts, most similar first.
    """
    rows = [(k, p, _runs(p.text)) for k, prompts in enumerate(sets) for p in prompts]
    where: dict[tuple[str, ...], list[int]] = defaultdict(list)
    found: list[tuple[float, Prompt, Prompt]] = []
    for row, (k, prompt, runs) in enumerate(rows):
        met: dict[int, int] = defaultdict(int)
        for run in runs:
            for other in where[run]:
                met[other] += 1
            where[run].append(row)
        for other, count in met.items():
            similarity = count / len(runs | rows[other][2])
            if rows[other][0] != k and similarity >= threshold:
                found.append((similarity, rows[other][1], prompt))
    return sorted(found, key=lambda item: -item[0])


def _runs(text: str) -> set[tuple[str, ...]]:
    words = "".join(c if c.isalnum() else " " for c in normalised(text)).split()
    return {tuple(words[k : k + 3]) for k in range(max(1, len(words) - 2))}


# ----------------------------------------------------------------------------------------------------- sources


def _prompts(ref: DataRef) -> Iterator[Prompt]:
    if ref.kind == "builtin":
        yield from _shipped(ref)
        return
    path = Path(ref.name).expanduser()
    rows = _hub_rows(ref) if ref.kind == "hub" else _file_rows(ref, path)
    first = next(rows, None)
    if first is None:
        return
    column = _column(first, ref.column, ref, "column")
    image = _column(first, ref.image, ref, "image") if ref.image else IMAGE if ref.kind == "file" else None
    yield _prompt(first, column, image, ref, path.parent)
    for row in rows:
        yield _prompt(row, column, image, ref, path.parent)


def _shipped(ref: DataRef) -> Iterator[Prompt]:
    named = re.fullmatch(r"(\w+)(?:\[(\d*):(\d*)\])?", ref.split or "")
    if ref.split is not None and (named is None or named[1] not in SPLITS):
        raise UsageError(f"no split '{ref.split}'", where=str(ref), valid=f"{', '.join(SPLITS)}, or fit[:100]")
    first, last = (int(n) if n else None for n in named.groups()[1:]) if named else (None, None)
    for split in [named[1]] if named else SPLITS:
        path = _SHIPPED / f"{ref.name}.{split}.jsonl"
        for row in islice(_file_rows(DataRef("file", str(path)), path), first, last):
            yield Prompt(row["text"], topic=row.get("topic", ""), form=row.get("form", ""))


def _column(row: Mapping[str, Any], wanted: str | None, ref: DataRef, option: str) -> str:
    if wanted is None:
        found = next((c for c in COLUMNS if c in row), None)
        if found is None:
            raise UsageError(
                "which column holds the prompts?", where=str(ref), valid=", ".join(row), hint="#column=..."
            )
        return found
    if wanted not in row:
        raise UsageError(f"no {option} '{wanted}'", where=str(ref), valid=", ".join(row), hint=nearest(wanted, row))
    return wanted


def _prompt(row: Mapping[str, Any], column: str, image: str | None, ref: DataRef, folder: Path) -> Prompt:
    text = row.get(column)
    if not isinstance(text, str):
        raise UsageError(f"column '{column}' holds {type(text).__name__}, not text", where=str(ref))
    if any("\ud800" <= c <= "\udfff" for c in text):
        raise UsageError(f"a prompt holds half a character, such as \\ud800: {text[:40]!a}", where=str(ref))
    shown = row.get(image) if image else None
    if isinstance(shown, str) and "://" not in shown and ref.kind == "file":
        shown = str(folder / shown)
        if not Path(shown).is_file():
            raise UsageError("no such image", where=shown, hint=f"paths are relative to {folder}")
    labels = {key: str(row.get(key) or "") for key in ("topic", "form")}
    return Prompt(text.strip(), str(shown) if shown else None, **labels)


def _file_rows(ref: DataRef, path: Path) -> Iterator[Mapping[str, Any]]:
    """Yield the rows of a file as mappings; a line of text is `{"text": line}`."""
    readers = {".txt": _text, ".jsonl": _jsonl, ".json": _json, ".csv": _table, ".tsv": _table, ".parquet": _parquet}
    try:
        for row in readers[path.suffix.lower()](path):
            if not isinstance(row, str | Mapping):
                raise UsageError("holds neither texts nor objects", where=str(ref))
            yield {"text": row} if isinstance(row, str) else row
    except UnicodeDecodeError:
        raise UsageError("not UTF-8 text", where=ref.name) from None
    except OSError as error:
        raise UsageError(f"cannot be read: {error.strerror or error}", where=ref.name) from None


def _text(path: Path, newline: str | None = None) -> Iterator[str]:
    """Yield the lines of a file; of a file without any, no more than one line is read."""
    with path.open(encoding="utf-8-sig", newline=newline) as file:
        number = 0
        while line := file.readline(MAX_LINE + 1):
            number += 1
            if len(line) > MAX_LINE:
                raise UsageError(f"line {number} is longer than {MAX_LINE} characters", where=str(path))
            yield line


def _jsonl(path: Path) -> Iterator[Any]:
    for number, line in enumerate(_text(path), 1):
        if line.strip():
            try:
                yield json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UsageError(f"line {number} is not JSON: {str(error)[:200]}", where=str(path)) from None


def _json(path: Path) -> Iterable[Any]:
    if path.stat().st_size > MAX_JSON:
        raise UsageError(f"larger than {MAX_JSON} bytes", where=str(path), valid="a .jsonl file, read line by line")
    text = path.read_text(encoding="utf-8-sig")
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"not JSON: {str(error)[:200]}", where=str(path)) from None
    if not isinstance(rows, list):
        raise UsageError("holds no list", where=str(path))
    return rows


def _table(path: Path) -> Iterator[Any]:
    rows = csv.DictReader(_text(path, ""), delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
    try:
        for row in rows:
            if None in row:
                problem = f"line {rows.line_num} has more fields than the first"
                raise UsageError(problem, where=str(path), hint="quote texts that hold the separator")
            yield row
    except csv.Error as error:
        raise UsageError(f"not a table: {error}", where=str(path)) from None


def _parquet(path: Path) -> Iterator[Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise MissingExtra("pyarrow", "parquet", f"reading {path.name}") from None
    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
            yield from batch.to_pylist()
    except pyarrow.ArrowException as error:
        raise UsageError(f"not a parquet file: {str(error).splitlines()[0]}", where=str(path)) from None


def _hub_rows(ref: DataRef) -> Iterator[Mapping[str, Any]]:
    import datasets

    where, bars = str(ref), datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        rows = datasets.load_dataset(ref.name, ref.config, revision=ref.revision, split=ref.split)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UsageError(f"cannot be loaded: {reason}", where=where) from None
    finally:
        if bars:
            datasets.enable_progress_bars()
    if isinstance(rows, dict):
        raise UsageError("which split?", where=where, valid=", ".join(rows), hint=f"{where}#split={next(iter(rows))}")
    if ref.image:
        raise UsageError("image columns are read from files only", where=where)
    yield from rows
