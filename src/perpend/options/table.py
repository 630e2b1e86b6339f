"""The options that commands share, each declared once: flags of the command line and keywords of the functions.

An option says which key of the recipe or of the machine it sets; that section checks its value, so that a file, a flag
and a keyword accept the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypedDict

RECIPE, PROMPTS, EDIT, REPLIES = "Recipe", "Prompts", "Direction and edit", "Replies and judges"
SEARCH, ALLOW, MACHINE, OUTPUT = "Search", "Exceptions", "Machine", "Output"


@dataclass(frozen=True)
class Option:
    """One option.

    Attributes:
        help: What it does, one line.
        panel: Group in the help.
        key: Dotted key of the recipe that it sets.
        machine: Key of the machine section that it sets.
        kind: Type of its value as it is typed; bool for a switch. None: that of the keyword.
        value: What a switch writes to its key.
        default: The default as shown in the help; the recipe's own.
        also: What is valid beside the names that the recipe lists.
        metavar: What stands for the value in the help.
        listed: Names that the shell completes beside those that the recipe lists.
        names: As typed, the long one first; empty: made from the name of the keyword.
    """

    help: str
    panel: str
    key: str = ""
    machine: str = ""
    kind: Any = None
    value: Any = True
    default: str = ""
    also: str = ""
    metavar: str | None = None
    listed: tuple[str, ...] = ()
    names: tuple[str, ...] = ()


Text = str | Path
Limit = Annotated[
    int, Option("At most this many prompts of each class and split.", PROMPTS, "prompts.limit", metavar="N")
]
Rounding = Annotated[
    str,
    Option(
        "For weights on that lattice (QAT): keep the edit in a later plain pass, q4_0 or q8_0; see docs/gguf.md.",
        EDIT,
        "export.rounding",
        default="auto",
        metavar="TYPE",
        names=("--for",),
    ),
]
Trust = Annotated[
    str | Sequence[str],
    Option(
        "Run the Python code that comes with this model, and no other's; may be typed again.",
        ALLOW,
        machine="trust_remote_code",
        kind=list[str],
        metavar="MODEL",
    ),
]


class FileOptions(TypedDict, total=False):
    """Where a recipe comes from."""

    config: Annotated[
        Text, Option("Recipe to start from (TOML).", RECIPE, kind=Path, metavar="FILE", names=("--config", "-c"))
    ]
    set: Annotated[
        str | Sequence[str],
        Option(
            "Set any key of the recipe, such as edit.mlp.peak_weight=0.8.", RECIPE, kind=list[str], metavar="KEY=VALUE"
        ),
    ]


class RecipeOptions(FileOptions, total=False):
    """A recipe, and the seed."""

    seed: Annotated[int, Option("Seed of everything random.", RECIPE, "seed", default="0", metavar="N")]


class TemplateOptions(TypedDict, total=False):
    """How a prompt is put."""

    system: Annotated[str, Option("System prompt.", PROMPTS, "prompts.system", metavar="TEXT")]
    chat_template: Annotated[
        Text,
        Option(
            "Jinja file read in place of the model's own chat template.",
            PROMPTS,
            "prompts.chat_template",
            kind=str,
            metavar="FILE",
        ),
    ]


class SetOptions(TypedDict, total=False):
    """Which prompts are compared."""

    target: Annotated[
        Text,
        Option(
            "Prompts that the model refuses.",
            PROMPTS,
            "prompts.target",
            kind=str,
            default="perpend:target",
            metavar="DATA",
            listed=("perpend:target",),
        ),
    ]
    baseline: Annotated[
        Text,
        Option(
            "Prompts that the model answers.",
            PROMPTS,
            "prompts.baseline",
            kind=str,
            default="perpend:baseline",
            metavar="DATA",
            listed=("perpend:baseline",),
        ),
    ]


class PromptOptions(SetOptions, TemplateOptions, total=False):
    """The prompts, how they are put, and how many."""

    limit: Limit


class DirectionOptions(TypedDict, total=False):
    """How the direction is made and taken out."""

    method: Annotated[
        str,
        Option(
            "How the direction is made: mean, projected, biprojected.",
            EDIT,
            "fit.method",
            default="mean",
            metavar="NAME",
        ),
    ]
    layer: Annotated[
        float | str,
        Option(
            "Where the direction is read: auto, each, a layer such as 18, a depth such as 53%.",
            EDIT,
            "fit.layer",
            kind=str,
            default="auto",
            also="a layer such as 18, a depth such as 53%",
            metavar="LAYER",
        ),
    ]
    no_filter: Annotated[
        bool,
        Option(
            "Fit on all prompts, not only on refused targets and answered baselines.", EDIT, "fit.filter", value=False
        ),
    ]
    mode: Annotated[
        str,
        Option(
            "How it is taken out of a matrix: plain, column, row.", EDIT, "edit.mode", default="plain", metavar="NAME"
        ),
    ]
    allow_partial: Annotated[
        bool, Option("Go on although some layer has no editable module.", ALLOW, "edit.allow_partial")
    ]


class StrategyOptions(TypedDict, total=False):
    """Whether the model is measured once, or again as it is edited."""

    strategy: Annotated[
        str,
        Option(
            "accumulate: measure once, edit all; iterative: edit, measure again, go on.",
            EDIT,
            "fit.strategy",
            default="accumulate",
            metavar="NAME",
        ),
    ]
    modules_per_batch: Annotated[
        int,
        Option(
            "Iterative strategy: modules edited between two measurements.",
            EDIT,
            "fit.modules_per_batch",
            default="2",
            metavar="N",
        ),
    ]


class JudgeOptions(TypedDict, total=False):
    """How long replies are, and what judges them beside the dictionary."""

    max_new_tokens: Annotated[
        int,
        Option(
            "Length of a reply; at least 128 for a rate that is reported.",
            REPLIES,
            "eval.max_new_tokens",
            default="128",
            metavar="N",
        ),
    ]
    classifier: Annotated[
        Text,
        Option(
            "Second judge beside the dictionary: hub id, directory, perpend:small, endpoint:URL#model=NAME or none.",
            REPLIES,
            "eval.classifier",
            kind=str,
            default="NousResearch/Minos-v1",
            metavar="NAME",
            listed=("NousResearch/Minos-v1", "perpend:small", "none", "endpoint:"),
        ),
    ]


class ReplyOptions(JudgeOptions, total=False):
    """How replies are made and judged."""

    sample: Annotated[
        bool, Option("Sample with the model's own settings instead of greedy decoding.", REPLIES, "eval.sample")
    ]


class ExportOptions(TypedDict, total=False):
    """What is written, and what it must pass."""

    rounding: Rounding
    reversible: Annotated[
        bool,
        Option(
            "Also keep what restores the original bit for bit: see perpend apply --undo.", ALLOW, "export.reversible"
        ),
    ]
    allow_leak: Annotated[
        bool, Option("Keep an export of which a module misses its weight factor.", ALLOW, "export.allow_leak")
    ]


class StudyOptions(TypedDict, total=False):
    """How long a search goes on, and which edit it takes."""

    trials: Annotated[
        int,
        Option("Candidate edits that are scored, at most.", SEARCH, "search.trials", default="160", metavar="N"),
    ]
    minutes: Annotated[
        float,
        Option(
            "Minutes for the whole search, about: trials leave time for replies, choice and proof.",
            SEARCH,
            "search.minutes",
            metavar="N",
        ),
    ]
    max_drift: Annotated[
        float,
        Option(
            "Take the most acceptance at a drift of at most so many nats per token.",
            SEARCH,
            "search.max_drift",
            metavar="NATS",
        ),
    ]
    min_acceptance: Annotated[
        float,
        Option(
            "Take the least drift with at least this acceptance rate; without both: the knee of the front.",
            SEARCH,
            "search.min_acceptance",
            metavar="SHARE",
        ),
    ]
    refine: Annotated[
        int,
        Option(
            "Gradient steps from the best candidate; taken only where held-out replies confirm it. 0 for none.",
            SEARCH,
            "search.refine",
            default="20",
            metavar="STEPS",
        ),
    ]


class SourceOptions(TypedDict, total=False):
    """Which files of a model are read, and what of them may run."""

    revision: Annotated[
        str,
        Option("Branch, tag or commit of a model from the hub; the same as MODEL@REVISION.", RECIPE, metavar="NAME"),
    ]
    trust_remote_code: Trust


class MachineOptions(TypedDict, total=False):
    """How it is run."""

    device: Annotated[
        str, Option("auto, cpu, cuda, cuda:1, mps.", MACHINE, machine="device", default="auto", metavar="NAME")
    ]
    dtype: Annotated[
        str,
        Option(
            "auto (the checkpoint's own), float32, bfloat16, float16.",
            MACHINE,
            machine="dtype",
            default="auto",
            metavar="NAME",
        ),
    ]
    batch_size: Annotated[
        int | str,
        Option("Prompts at a time, or auto.", MACHINE, machine="batch_size", kind=str, default="auto", metavar="N"),
    ]
    memory: Annotated[
        int | str,
        Option(
            "Main memory that the process may take altogether, such as 3GB; None for what is free.",
            MACHINE,
            machine="memory",
            kind=str,
            default="None",
            metavar="SIZE",
        ),
    ]
    offload: Annotated[
        str,
        Option(
            "Layers that do not fit: auto (read when needed), none (refuse), disk (read all of them when needed).",
            MACHINE,
            machine="offload",
            default="auto",
            metavar="NAME",
        ),
    ]
    offload_folder: Annotated[
        Text,
        Option(
            "For tensors that cannot be read in place while layers are offloaded; None for a temporary folder.",
            MACHINE,
            machine="offload_folder",
            kind=Path,
            default="None",
            metavar="DIR",
        ),
    ]
    quantization: Annotated[
        str,
        Option(
            "Load quantised to measure, by bitsandbytes: none, 8bit, 4bit.",
            MACHINE,
            machine="quantization",
            default="none",
            metavar="NAME",
        ),
    ]
    device_map: Annotated[
        Text,
        Option(
            "How GPUs share a model that one cannot hold: auto, balanced, sequential, or a JSON file.",
            MACHINE,
            machine="device_map",
            kind=str,
            default="auto",
            metavar="NAME",
        ),
    ]
    tensor_parallel: Annotated[
        int,
        Option(
            "Processes, started by torchrun, that share every matrix.",
            MACHINE,
            machine="tensor_parallel",
            default="1",
            metavar="N",
        ),
    ]
