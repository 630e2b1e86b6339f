"""What is done (`Recipe`) and how it is run (`Machine`).

The recipe is portable and hashed: two machines with one recipe are asked for the same edit. The machine section never
changes what is computed beyond rounding. Both are frozen and refuse unknown keys; `load` names the file, the key and
the nearest valid one.
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from perpend.complaints import explain
from perpend.core.kinds import Method as Method
from perpend.core.kinds import Mode as Mode
from perpend.core.schedule import Length, NormalKernel, Schedule
from perpend.errors import UsageError

S = TypeVar("S", bound=BaseModel)

Strategy = Literal["accumulate", "iterative"]
Rule = Literal["thrift", "published"]
Rounding = Literal["auto", "nearest", "q4_0", "q8_0"]
GgufType = Literal["q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "bf16", "f16", "f32"]

METHODS: dict[str, str] = {
    "mean": "difference of the mean residual of target and baseline prompts",
    "projected": "that difference without its component along the baseline mean of its own layer",
    "biprojected": "that difference without its component along the baseline mean of every layer it is written to",
}
MODES: dict[str, str] = {
    "plain": "W' = W - λ v vᵀW",
    "column": "plain, then every column of W' rescaled to its old norm; at λ = 1 nothing of v is left",
    "row": "the form common elsewhere: rows of unit norm are edited and rescaled; puts part of v back",
}
RULES: dict[str, str] = {
    "thrift": "most refusal taken away per drift, among layers that take away at least half of what the best one does",
    "published": "after Arditi et al. 2024: least refusal left, among all layers of the first 80 % that cost at most "
    "0.1 nats and induce refusal; refusal and drift are measured as docs/concepts.md says",
}


MAX_TOML = 16 << 20
"""Largest recipe that is read, in bytes: every expert of a large model named by hand is a tenth of it."""
_DEEP_KEY = re.compile(r"""(?<![\w"'-])[\w"'-]++(?:[ \t]*\.[ \t]*[\w"'-]++){64,}""")


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


class ModelSection(_Section):
    """Which model is edited."""

    id: str = ""
    """Hub id (`org/name@revision`), directory or GGUF file."""


class PromptsSection(_Section):
    """Which prompts are compared; see `perpend.data` for what a reference can be."""

    target: str = "perpend:target"
    """Prompts that the model refuses. One reference is split into fit, select and report by hash."""
    baseline: str = "perpend:baseline"
    """Prompts that the model answers."""
    target_select: str | None = None
    """Targets of the select split; None takes a share of `target`."""
    baseline_select: str | None = None
    """Baselines of the select split; None takes a share of `baseline`."""
    target_report: str | None = None
    """Targets of the report split; None takes a share of `target`."""
    baseline_report: str | None = None
    """Baselines of the report split; None takes a share of `baseline`."""
    system: str | None = None
    """System prompt; None leaves it to the chat template."""
    chat_template: str | None = None
    """Jinja file read in place of the model's own chat template; for a model that comes without one."""
    limit: int | None = Field(default=None, ge=1)
    """At most this many prompts of each class and split."""


class FitSection(_Section):
    """How the direction is measured."""

    method: Method = "mean"
    """How the direction is made."""
    layer: Literal["auto", "each"] | Length = "auto"
    """auto: chosen by forward passes; each: every layer its own; else one layer, interpolated if not whole."""
    choice: Rule = "thrift"
    """How a layer (and position) is chosen when it is `auto`."""
    position: Literal["auto"] | Annotated[int, Field(le=-1)] = -1
    """Token whose residual is read, counted from the end of the encoded prompt; -1 is the last template token, auto
    tries every template token after the request."""
    winsorize: float | None = Field(default=None, gt=0.5, lt=1.0)
    """Quantile at which each residual is clipped, per prompt and layer; for models with massive activations."""
    rank: int = Field(default=1, ge=1)
    """Directions removed per module (k)."""
    filter: bool = True
    """Fit only on targets that the model really refuses and baselines that it really answers."""
    strategy: Strategy = "accumulate"
    """accumulate: measure once and edit every module; iterative: edit some, measure again, go on."""
    modules_per_batch: int = Field(default=2, ge=1)
    """Iterative strategy: modules edited between two measurements."""
    refined: bool = False
    """Written by a search whose gradient steps turned the direction: it lies in the edit beside the recipe, from which
    `perpend apply` makes the same weights, and cannot be measured again."""


class EditSection(_Section):
    """Which modules are edited and how strongly."""

    mode: Mode = "plain"
    """How a direction v is taken out of a matrix W with the weight factor λ."""
    attention: Schedule = NormalKernel()
    """Weight factors of the attention out-projections (and of conv, state-space or linear-attention ones)."""
    mlp: Schedule = NormalKernel()
    """Weight factors of the MLP and expert down-projections."""
    through_post_norm: bool = False
    """Take the norm that follows the module into account (Gemma 2 and 3, OLMo 2); for study, see docs/gemma3.md."""
    allow_partial: bool = False
    """Go on although some layer has no editable module."""
    overrides: dict[str, Any] = Field(default_factory=dict)
    """Writers named by hand, as `perpend inspect` prints them."""


class EvalSection(_Section):
    """How replies are made and judged."""

    max_new_tokens: int = Field(default=128, ge=1)
    """Length of a reply; shorter ones hide late refusals, so at least 128 for a rate that is reported."""
    sample: bool = False
    """Sample with the model's own generation settings instead of greedy decoding."""
    classifier: str = "NousResearch/Minos-v1"
    """Second judge of the hybrid: hub id or directory of a sequence classifier, `perpend:small`,
    `endpoint:URL#model=NAME` for a model behind an OpenAI-style server, or `none` for the dictionary alone."""
    drift_tokens: int = Field(default=48, ge=1)
    """Tokens of the base model's own replies over which drift is measured."""
    control_prompts: int = Field(default=64, ge=0)
    """Target prompts that are answered once more under a random direction of equal drift; 0 leaves the control out."""


class ExportSection(_Section):
    """What the saved model must pass."""

    allow_leak: bool = False
    """Keep an output of which a module misses its weight factor by more than 0.05."""
    gate_prompts: int = Field(default=16, ge=0)
    """Prompts of each class on which the reloaded export is measured again."""
    reversible: bool = False
    """Keep in `original.undo` what restores the original bit for bit: a few per cent of the edited matrices."""
    rounding: Rounding = "auto"
    """How edited matrices are rounded: auto keeps the edit where the file's own type is a lattice (GGUF) and rounds to
    the nearest elsewhere; nearest; q4_0, q8_0: so that the edit survives a later plain pass of that type."""
    gguf_type: GgufType = "q8_0"
    """Type in which an edited tensor of a GGUF file is stored where its own cannot be written."""


class SearchSection(_Section):
    """How `perpend search` looks for an edit, and which one it takes."""

    trials: int = Field(default=160, ge=1)
    """Candidate edits that are scored, at most."""
    minutes: float | None = Field(default=None, gt=0)
    """What the whole search may take, about: trials end while there is time for replies, choice and proof, and have at
    least a quarter of the time that is left when they begin. None leaves it to `trials` and `patience`."""
    patience: int = Field(default=3, ge=0)
    """Generations in which the front must grow by 1 %, or the search ends; 0 goes on to the last trial."""
    generation: int = Field(default=16, ge=2)
    """Candidates that are asked for at once, from the results of all generations before."""
    batch: int = Field(default=8, ge=1)
    """Candidates of a generation that one worker scores together."""
    prompts: int = Field(default=48, ge=2)
    """Prompts of each class, of the select split, on which a candidate is scored."""
    delayed: bool = False
    """Whether the score also asks for refusals that come after a compliant beginning."""
    max_rank: int = Field(default=2, ge=1)
    """Most directions per module (k) that are tried."""
    refine: int = Field(default=20, ge=0)
    """Gradient steps from the best finalist; the result is taken only where held-out replies confirm it; 0 for none."""
    refine_from: int = Field(default=1, ge=1)
    """How many of the best finalists are refined, each for itself."""
    refine_kernel: bool = False
    """Project refined weight factors to the nearest normal kernel of each component, and judge that."""
    refine_direction: bool = False
    """Refine the direction too, where one layer's is taken out of all modules. The edit that is written holds it."""
    survivors: int = Field(default=8, ge=2)
    """Candidates of the front that generate shortly, so that the score is checked."""
    finalists: int = Field(default=4, ge=1)
    """Candidates that are labelled at full length by both judges on the select split."""
    max_drift: float | None = Field(default=None, gt=0)
    """Choose the most acceptance at a drift of at most so many nats per token; None with no `min_acceptance`: the
    knee of the front."""
    min_acceptance: float | None = Field(default=None, gt=0, le=1)
    """Choose the least drift with at least this acceptance rate on the select split."""
    max_broken: float = Field(default=0.1, ge=0, le=1)
    """Share by which broken replies (looping, garbled) of the chosen edit may exceed the untouched model's; a target
    is compared with the larger of the untouched model's shares on targets and on baselines, which it answers."""


BUDGET = (
    "trials",
    "minutes",
    "patience",
    "refine",
    "refine_from",
    "refine_kernel",
    "refine_direction",
    "survivors",
    "finalists",
    "max_drift",
    "min_acceptance",
    "max_broken",
)
"""Keys of the search that do not change what a trial is: they may change when a search goes on."""


class Recipe(_Section):
    """What is done: portable, hashed, saved beside the weights."""

    model: ModelSection = ModelSection()
    prompts: PromptsSection = PromptsSection()
    fit: FitSection = FitSection()
    edit: EditSection = EditSection()
    eval: EvalSection = EvalSection()
    export: ExportSection = ExportSection()
    search: SearchSection = SearchSection()
    seed: int = 0
    """Seed of everything random."""

    def for_model(self, model: str) -> Recipe:
        """Return the recipe with its model named; an empty name leaves it as it is."""
        return self.model_copy(update={"model": self.model.model_copy(update={"id": model or self.model.id})})

    def hash(self) -> str:
        """Return the first 16 hex digits of the SHA-256 of the recipe's canonical JSON."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def _batch(value: object) -> object:
    return int(value) if isinstance(value, str) and value.isdigit() else value


SIZES = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
SIZES |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def _size(value: object) -> object:
    """Read `3GB` or `500 MiB` as bytes."""
    if not isinstance(value, str):
        return value
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", value)
    if found is None or found[2].upper() not in SIZES:
        units = "KB, MB, GB, TB, KiB, MiB, GiB, TiB"
        raise ValueError(f"must be a number of bytes, or a number with {units}, such as 3GB")
    return int(float(found[1]) * SIZES[found[2].upper()])


class Machine(_Section):
    """How it is run: never changes what is computed beyond rounding, but for `quantization`."""

    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """auto: the checkpoint's own."""
    batch_size: Annotated[Literal["auto"] | Annotated[int, Field(ge=1)], BeforeValidator(_batch)] = "auto"
    memory: Annotated[Annotated[int, Field(ge=1)] | None, BeforeValidator(_size)] = None
    """Bytes of main memory, or text such as 3GB, that the process may take altogether; None for what is free."""
    offload: Literal["auto", "none", "disk"] = "auto"
    """auto: layers that do not fit stay in main memory (beside a GPU) or are read from the original files when they are
    needed; none: a model that does not fit is refused; disk: every layer is read when it is needed."""
    offload_folder: Path | None = None
    """Where tensors go that the files hold in another form than the model (experts stored one by one), while layers are
    offloaded; None for a temporary folder."""
    quantization: Literal["none", "8bit", "4bit"] = "none"
    """Load the weights quantised by bitsandbytes, to measure; an export is made from the original files."""
    device_map: str = "auto"
    """How several GPUs share a model that one cannot hold: auto, balanced, sequential, or a JSON file of modules."""
    tensor_parallel: int = Field(default=1, ge=1)
    """Processes, started by torchrun, that share every matrix."""
    engine: Literal["transformers", "vllm"] = "transformers"
    """What answers the prompts of `eval`."""
    trust_remote_code: tuple[str, ...] = ()
    """Models, by hub id or directory, whose own Python code may run. No recipe can say so, since a recipe may come from
    elsewhere; a judge is covered only by its own name."""


def keys(section: type[BaseModel], prefix: str = "") -> list[str]:
    """Return every key of a section tree in dotted form, schedules by their own keys."""
    found: list[str] = []
    for name, field in section.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            found += keys(kind, f"{prefix}{name}.")
        else:
            found.append(prefix + name)
    for part in ("attention", "mlp") if section is EditSection else ():
        found += [
            f"{prefix}{part}.{key}" for key in ("kind", "weight", "values", *NormalKernel.model_fields) if key != "kind"
        ]
        found.append(f"{prefix}{part}.kind")
    return found


def build(root: type[S], data: Mapping[str, Any], where: str) -> S:
    """Validate a mapping as `root`, or raise one line that names `where` and the key.

    Raises:
        UsageError: an unknown key or a value out of range.
    """
    try:
        return root.model_validate(data)
    except ValidationError as error:
        raise explain(error, where, keys(root), list(root.model_fields)) from None


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file.

    Raises:
        UsageError: no such file, or no TOML; says the line.
    """
    try:
        with path.open("rb") as file:
            text = file.read(MAX_TOML + 1)
        if len(text) > MAX_TOML:
            raise UsageError(f"larger than {MAX_TOML} bytes, which no recipe is", where=str(path))
        if _DEEP_KEY.search(decoded := text.decode("utf-8")):  # for which the parser takes the square of its length
            raise UsageError("a key of more than 64 parts", where=str(path))
        return tomllib.loads(decoded)
    except FileNotFoundError:
        raise UsageError("no such file", where=str(path), hint="perpend config init -o recipe.toml") from None
    except (ValueError, RecursionError) as error:  # TOML and UTF-8 errors, and numbers of thousands of digits
        raise UsageError(f"not valid TOML: {str(error)[:200]}", where=str(path)) from None
    except OSError as error:
        raise UsageError(f"cannot be read: {error.strerror}", where=str(path)) from None


def _value(text: str) -> Any:
    """Read the right-hand side of `key=value` as TOML; what is not TOML is a plain string."""
    try:
        return tomllib.loads(f"x = {text}")["x"]
    except (ValueError, RecursionError):
        return text


def assign(data: dict[str, Any], assignments: Iterable[str], where: str = "--set") -> dict[str, Any]:
    """Return `data` with `section.key=value` assignments laid over it.

    Raises:
        UsageError: an assignment without `=`, or one that goes through a value.
    """
    result = copy.deepcopy(data)
    for assignment in assignments:
        key, sign, text = assignment.partition("=")
        if not sign or not key.strip():
            raise UsageError(f"'{assignment}' is not key=value", where=where, hint="--set edit.mlp.peak_weight=0.8")
        *path, leaf = key.strip().split(".")
        node = result
        for part in path:
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                raise UsageError(f"'{key}' goes through a value", where=where)
        node[leaf] = _value(text.strip())
    return result


def defaults_filled(data: dict[str, Any]) -> dict[str, Any]:
    """Name the default schedule where a schedule table gives keys but no kind."""
    for part in ("attention", "mlp"):
        table = data.get("edit", {}).get(part) if isinstance(data.get("edit"), dict) else None
        if isinstance(table, dict) and "kind" not in table:
            table["kind"] = "normal"
    return data


def load(path: Path | None = None, assignments: Iterable[str] = (), base: Mapping[str, Any] | None = None) -> Recipe:
    """Build a recipe from defaults, then `base`, then a file, then `key=value` assignments, later ones winning.

    Args:
        path: A TOML file with the recipe's sections; a `[result]` table, written beside exported weights, is ignored.
        assignments: Such as `edit.mlp.peak_weight=0.8`.
        base: Sections to start from, such as what the command's own flags say.

    Raises:
        UsageError: names the file or flag, the key and the nearest valid key.
    """
    data: dict[str, Any] = read_toml(path) if path else {}
    data.pop("result", None)
    if path:  # so that an error in the file is not blamed on a flag
        build(Recipe, defaults_filled(data), str(path))
    for section, values in (base or {}).items():
        if isinstance(values, Mapping):
            data.setdefault(section, {}).update(values)
        else:
            data[section] = values
    data = assign(data, assignments)
    return build(Recipe, defaults_filled(data), "--set" if assignments else "recipe")


def to_toml(data: Mapping[str, Any]) -> str:
    """Write nested mappings as TOML; None values are left out, since TOML has no null."""
    lines: list[str] = []
    tables: list[tuple[str, Mapping[str, Any]]] = [("", data)]
    while tables:
        name, table = tables.pop(0)
        plain = {k: v for k, v in table.items() if not isinstance(v, Mapping) and v is not None}
        if name and (plain or not table):
            lines += ["", f"[{name}]"]
        lines += [f"{_toml_key(k)} = {_toml(v)}" for k, v in plain.items()]
        path = f"{name}." if name else ""
        inner = [(path + _toml_key(k), v) for k, v in table.items() if isinstance(v, Mapping)]
        tables = inner + tables
    return "\n".join(lines).strip() + "\n"


def _toml_key(key: str) -> str:
    bare = key.isascii() and key.replace("_", "").replace("-", "").isalnum()
    return key if bare else _toml(key)


def _toml(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_toml_key(k)} = {_toml(v)}" for k, v in value.items() if v is not None) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml(v) for v in value) + "]"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
