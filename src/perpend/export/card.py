"""The model card: what was changed, what was measured, what was not, and how to make it again.

The front matter passes on what the base model's card says of licence, language and use; the text says what the edit
did and gives every rate with its n and 95 % Wilson interval.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from perpend._version import __version__
from perpend.core.stats import wilson
from perpend.errors import UsageError

if TYPE_CHECKING:
    from perpend.core.edits import Edit
    from perpend.models.anatomy import Anatomy

CARD = "README.md"
PASSED_ON = ("license", "license_name", "license_link", "library_name", "pipeline_tag", "language", "tags")
"""What the base model's front matter gives to the edited model's."""
TAGS = ("directional-ablation", "perpend")
GEMMA_TERMS = "https://ai.google.dev/gemma/terms"
GEMMA_POLICY = "https://ai.google.dev/gemma/prohibited_use_policy"
GEMMA_NOTICE = "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms"
"""The sentence that the terms ask for in a Notice file beside every copy (section 3.1)."""
NOT_MEASURED = (
    "general ability: no knowledge, mathematics or coding benchmark was run",
    "languages, topics and forms of request other than those of the prompts",
    "several turns, long contexts, tool use, other system prompts",
    "quantised forms of these weights: rounding can undo part of an edit",
)

_MODES = {
    "plain": "W' = W - λ v vᵀW",
    "column": "W' = (W - λ v vᵀW) diag(t), every column keeps its norm",
    "row": "rows of unit norm edited and rescaled, every row keeps its norm; part of the direction comes back",
}


@dataclass(frozen=True)
class Count:
    """k of n prompts."""

    k: int
    n: int

    def __str__(self) -> str:
        low, high = wilson(self.k, self.n)
        share = f"{100 * self.k / self.n:.1f} %" if self.n else "no prompts"
        return f"{self.k}/{self.n}, {share} [{100 * low:.1f}, {100 * high:.1f}]"


@dataclass(frozen=True)
class Measure:
    """A row of the before/after table; None where it was not measured."""

    name: str
    before: Count | None
    after: Count | None


@dataclass(frozen=True)
class Quantity:
    """A number, with its 95 % interval where there is one."""

    name: str
    value: float
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        interval = "" if self.low is None or self.high is None else f" [{self.low:.4g}, {self.high:.4g}]"
        return f"{self.value:.4g}{interval}"


@dataclass(frozen=True)
class Component:
    """What was edited of one component.

    Attributes:
        name: attention or mlp.
        edited: Modules with a weight factor other than 0.
        total: Modules of this component that write to the residual stream, with the gaps.
        layers: Such as `7-29`.
        weakest: Weight factor at the other end of the range from `strongest`.
        strongest: Weight factor that is largest in size; below 0 it strengthens what it is applied to.
        peak: Layer of the strongest.
    """

    name: str
    edited: int
    total: int
    layers: str
    weakest: float
    strongest: float
    peak: int


@dataclass(frozen=True)
class CardFacts:
    """Everything the card says that is not in the base model's card.

    Attributes:
        base: Hub id of the base model, or the name of a local one.
        on_hub: `base` is a hub id.
        components: From `describe`.
        n_layers: Decoder layers of the model.
        mode: Mode of the edit.
        method: How the direction was measured, in words.
        direction: Which layer's direction was taken out, in words.
        measures: Before/after table.
        prompts: What the prompts of that table are.
        refusal: The two prompt sets are the shipped ones: requests that models refuse, and requests that they answer.
        judge: Whether a classifier took part.
        judge_detail: Which classifier and revision, agreement; in words.
        command: What to type to make this model again.
        revision: Commit of the base model.
        sees: It has a vision tower; decides the pipeline tag where the base model's card has none.
        title: Name of the model; that of its folder by default.
        rank: Directions per module.
        schedule: Component → its schedule in words.
        drift: What the edit cost.
        packed: How the weights of the base model are stored, where they were widened to bfloat16; else empty.
        gaps: Parts of the model that write to the residual stream and could not be edited.
        leak: Largest difference between asked and realised weight factor in the saved file, None when not checked.
        modified: Files that hold edited tensors.
        leak_allowed: A module missed its weight factor and was kept on request.
        not_measured: Beyond `NOT_MEASURED`.
        recipe: The recipe as TOML.
        versions: Package → version.
    """

    base: str
    on_hub: bool
    components: tuple[Component, ...]
    n_layers: int
    mode: str
    method: str
    direction: str
    measures: tuple[Measure, ...]
    judge: Literal["hybrid", "dictionary only"]
    judge_detail: str
    command: str
    revision: str | None = None
    sees: bool = False
    title: str = ""
    prompts: str = "Prompts held out from fitting and search"
    refusal: bool = True
    rank: int = 1
    schedule: Mapping[str, str] = field(default_factory=dict)
    drift: tuple[Quantity, ...] = ()
    packed: str = ""
    gaps: tuple[str, ...] = ()
    leak: float | None = None
    modified: tuple[str, ...] = ()
    leak_allowed: bool = False
    not_measured: tuple[str, ...] = ()
    recipe: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def strengthened(self) -> bool:
        """Every weight factor is below 0: the direction was added to, not taken out."""
        weights = [weight for part in self.components for weight in (part.weakest, part.strongest)]
        return bool(weights) and max(weights) < 0


def describe(edit: Edit, anatomy: Anatomy) -> tuple[Component, ...]:
    """Summarise an edit by component, leaving out modules with weight factor 0."""
    found = []
    for name in ("attention", "mlp"):
        own = [writer for writer in anatomy.writers if writer.component == name]
        parts = [(edit.modules[w.name].weight, w.layer) for w in own if w.name in edit.modules]
        parts = [(weight, layer) for weight, layer in parts if weight != 0]
        if parts:
            strongest, peak = max(parts, key=lambda part: abs(part[0]))
            weakest = min((weight for weight, _ in parts), key=lambda weight: weight * strongest)
            layers = spans(layer for _, layer in parts)
            total = len(own) + sum(gap.component == name for gap in anatomy.gaps)
            found.append(Component(name, len(parts), total, layers, weakest, strongest, peak))
    return tuple(found)


def spans(numbers: Iterable[int]) -> str:
    """Write whole numbers as ranges: 1, 2, 3, 7 is `1-3, 7`."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def base_front_matter(folder: Path) -> dict[str, Any]:
    """Return the front matter of a folder's README.md; empty when there is none that can be read."""
    from huggingface_hub import metadata_load
    from yaml import YAMLError

    path = folder / CARD
    if not path.is_file():
        return {}
    try:
        found = metadata_load(path)
    except (ValueError, YAMLError, OSError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _front_matter(out: Path, base: Mapping[str, Any], facts: CardFacts) -> dict[str, Any]:
    data: dict[str, Any] = {key: base[key] for key in PASSED_ON if base.get(key)}
    link = data.get("license_link")
    if isinstance(link, str) and not re.match(r"https?://", link) and not (out / link).is_file():
        data.pop("license_link")
        if facts.on_hub:
            data["license_link"] = f"https://huggingface.co/{facts.base}/blob/main/{link}"
    tags = data.get("tags")
    own = [tag for tag in (tags if isinstance(tags, list) else [tags]) if isinstance(tag, str)]
    data["tags"] = list(dict.fromkeys([*own, *TAGS]))
    data.setdefault("library_name", "transformers")
    data.setdefault("pipeline_tag", "image-text-to-text" if facts.sees else "text-generation")
    return {"base_model": [facts.base], **data} if facts.on_hub else data


def _licence(base: Mapping[str, Any]) -> str:
    """Return the licence by name; of several, all."""
    found = base.get("license_name") or base.get("license")
    return ", ".join(str(item) for item in found) if isinstance(found, list) else str(found or "")


def write_card(out: Path, base_dir: Path, facts: CardFacts) -> list[Path]:
    """Write `README.md`, and for Gemma the `NOTICE` that its terms ask for.

    Args:
        out: Folder of the edited model.
        base_dir: Folder of the base model; its `README.md` is read where there is one.
        facts: What to say.

    Returns:
        The files written.

    Raises:
        UsageError: a file cannot be written.
    """
    out = Path(out)
    base = base_front_matter(Path(base_dir))
    gemma = str(base.get("license", "")).lower() == "gemma"
    title = facts.title or out.name.removesuffix(".partial")
    written = {CARD: render(out, base, facts, title=title, gemma=gemma)}
    if gemma:
        old = out / "NOTICE"
        kept = old.read_text(encoding="utf-8") + "\n" if old.is_file() else ""
        files = ", ".join(facts.modified)
        written["NOTICE"] = kept + f"{GEMMA_NOTICE}\n\nThese files were modified with Perpend {__version__}: {files}\n"
    try:
        for name, text in written.items():
            (out / name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot be written: {error.strerror}", where=str(out)) from None
    return [out / name for name in written]


def render(out: Path, base: Mapping[str, Any], facts: CardFacts, *, title: str, gemma: bool) -> str:
    """Return the text of the card; see `write_card`."""
    from huggingface_hub import ModelCardData
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("perpend.export"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    environment.filters |= {"cell": _cell, "fenced": _fenced}
    return environment.get_template("card.md.jinja").render(
        front_matter=ModelCardData(**_front_matter(out, base, facts)).to_yaml().strip(),
        title=title,
        facts=facts,
        formula=_MODES[facts.mode],
        licence=_licence(base),
        gemma=gemma,
        terms=GEMMA_TERMS,
        policy=GEMMA_POLICY,
        gemma_notice=GEMMA_NOTICE,
        not_measured=[*NOT_MEASURED, *facts.not_measured],
        version=__version__,
    )


def _cell(value: object) -> str:
    """Make a value fit into one cell of a table."""
    return "not measured" if value is None else " ".join(str(value).split()).replace("|", "\\|")


def _fenced(text: str, language: str = "") -> str:
    """Put text into a code block whose fence is longer than any in the text."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall(r"`+", text)), default=0))
    return f"{fence}{language}\n{text.strip()}\n{fence}"
