"""The flags that commands share, each declared once.

A flag that sets a key of the recipe says so by `key`; it lies over the recipe file and under `--set`. Its value is
checked by the recipe itself, so that the file and the flag accept the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

RECIPE, PROMPTS, EDIT, REPLIES = "Recipe", "Prompts", "Direction and edit", "Replies and judges"
SEARCH, ALLOW, MACHINE, OUTPUT = "Search", "Exceptions", "Machine", "Output"


PATHS = ("--output", "--config", "--edit", "--offload-folder", "--chat-template")
"""Options that name a file or a folder, which the shell completes by itself."""


@dataclass(frozen=True)
class Flag:
    """One option.

    Attributes:
        names: As typed, the long one first.
        kind: Type of its value; bool for a switch.
        help: What it does, one line.
        panel: Group in the help.
        key: Dotted key of the recipe that it sets.
        machine: Key of the machine section that it sets.
        value: What a switch writes to `key`.
        default: The default as shown in the help; the recipe's own.
        also: What is valid beside the names that the recipe lists.
        listed: Names that the shell completes beside those that the recipe lists.
        metavar: What stands for the value in the help.
    """

    names: tuple[str, ...]
    kind: Any
    help: str
    panel: str
    key: str = ""
    machine: str = ""
    value: Any = True
    default: str = ""
    also: str = ""
    metavar: str | None = None
    listed: tuple[str, ...] = ()

    def option(self) -> Any:
        """Return the option as typer takes it."""
        text = f"{self.help} \\[default: {self.default}]" if self.default else self.help
        complete = self._completions if self.kind is not bool and self.names[0] not in PATHS else None
        return typer.Option(
            *self.names,
            help=text,
            rich_help_panel=self.panel,
            metavar=" " if self.kind is bool else self.metavar,
            show_default=False,
            autocompletion=complete,
        )

    def _completions(self, incomplete: str) -> list[str]:
        from perpend.tasks.config import choices, completed_assignments

        if self.names[0] == "--set":
            return completed_assignments(incomplete)
        listed = (*choices(self.key or self.machine, of_machine=bool(self.machine)), *self.listed)
        return [choice for choice in listed if choice.startswith(incomplete)]


FLAGS: dict[str, Flag] = {
    "output": Flag(
        ("--output", "-o"), Path, "Where the result goes; must not exist or be empty.", OUTPUT, metavar="PATH"
    ),
    "config": Flag(("--config", "-c"), Path, "Recipe to start from (TOML).", RECIPE, metavar="FILE"),
    "assignments": Flag(
        ("--set",),
        list[str],
        "Set any key of the recipe, such as edit.mlp.peak_weight=0.8.",
        RECIPE,
        metavar="KEY=VALUE",
    ),
    "seed": Flag(("--seed",), int, "Seed of everything random.", RECIPE, key="seed", default="0", metavar="N"),
    "target": Flag(
        ("--target",),
        str,
        "Prompts that the model refuses.",
        PROMPTS,
        key="prompts.target",
        default="perpend:target",
        metavar="DATA",
        listed=("perpend:target",),
    ),
    "baseline": Flag(
        ("--baseline",),
        str,
        "Prompts that the model answers.",
        PROMPTS,
        key="prompts.baseline",
        default="perpend:baseline",
        metavar="DATA",
        listed=("perpend:baseline",),
    ),
    "system": Flag(("--system",), str, "System prompt.", PROMPTS, key="prompts.system", metavar="TEXT"),
    "chat_template": Flag(
        ("--chat-template",),
        str,
        "Jinja file read in place of the model's own chat template.",
        PROMPTS,
        key="prompts.chat_template",
        metavar="FILE",
    ),
    "limit": Flag(
        ("--limit",),
        int,
        "At most this many prompts of each class and split.",
        PROMPTS,
        key="prompts.limit",
        metavar="N",
    ),
    "method": Flag(
        ("--method",),
        str,
        "How the direction is made: mean, projected, biprojected.",
        EDIT,
        key="fit.method",
        default="mean",
        metavar="NAME",
    ),
    "layer": Flag(
        ("--layer",),
        str,
        "Where the direction is read: auto, each, a layer such as 18, a depth such as 53%.",
        EDIT,
        key="fit.layer",
        default="auto",
        metavar="LAYER",
        also="a layer such as 18, a depth such as 53%",
    ),
    "no_filter": Flag(
        ("--no-filter",),
        bool,
        "Fit on all prompts, not only on refused targets and answered baselines.",
        EDIT,
        key="fit.filter",
        value=False,
    ),
    "strategy": Flag(
        ("--strategy",),
        str,
        "accumulate: measure once, edit all; iterative: edit, measure again, go on.",
        EDIT,
        key="fit.strategy",
        default="accumulate",
        metavar="NAME",
    ),
    "modules_per_batch": Flag(
        ("--modules-per-batch",),
        int,
        "Iterative strategy: modules edited between two measurements.",
        EDIT,
        key="fit.modules_per_batch",
        default="2",
        metavar="N",
    ),
    "mode": Flag(
        ("--mode",),
        str,
        "How it is taken out of a matrix: plain, column, row.",
        EDIT,
        key="edit.mode",
        default="plain",
        metavar="NAME",
    ),
    "sample": Flag(
        ("--sample",),
        bool,
        "Sample with the model's own settings instead of greedy decoding.",
        REPLIES,
        key="eval.sample",
    ),
    "max_new_tokens": Flag(
        ("--max-new-tokens",),
        int,
        "Length of a reply; at least 128 for a rate that is reported.",
        REPLIES,
        key="eval.max_new_tokens",
        default="128",
        metavar="N",
    ),
    "classifier": Flag(
        ("--classifier",),
        str,
        "Second judge beside the dictionary: hub id, directory, perpend:small, endpoint:URL#model=NAME or none.",
        REPLIES,
        key="eval.classifier",
        default="NousResearch/Minos-v1",
        metavar="NAME",
        listed=("NousResearch/Minos-v1", "perpend:small", "none", "endpoint:"),
    ),
    "rounding": Flag(
        ("--for",),
        str,
        "For weights on that lattice (QAT): keep the edit in a later plain pass, q4_0 or q8_0; see docs/gguf.md.",
        EDIT,
        key="export.rounding",
        default="auto",
        metavar="TYPE",
    ),
    "reversible": Flag(
        ("--reversible",),
        bool,
        "Also keep what restores the original bit for bit: see perpend apply --undo.",
        ALLOW,
        key="export.reversible",
    ),
    "revision": Flag(
        ("--revision",),
        str,
        "Branch, tag or commit of a model from the hub; the same as MODEL@REVISION.",
        RECIPE,
        metavar="NAME",
    ),
    "allow_leak": Flag(
        ("--allow-leak",),
        bool,
        "Keep an export of which a module misses its weight factor.",
        ALLOW,
        key="export.allow_leak",
    ),
    "allow_partial": Flag(
        ("--allow-partial",), bool, "Go on although some layer has no editable module.", ALLOW, key="edit.allow_partial"
    ),
    "trust_remote_code": Flag(
        ("--trust-remote-code",),
        list[str],
        "Run the Python code that comes with this model, and no other's; may be typed again.",
        ALLOW,
        machine="trust_remote_code",
        metavar="MODEL",
    ),
    "device": Flag(
        ("--device",), str, "auto, cpu, cuda, cuda:1, mps.", MACHINE, machine="device", default="auto", metavar="NAME"
    ),
    "dtype": Flag(
        ("--dtype",),
        str,
        "auto (the checkpoint's own), float32, bfloat16, float16.",
        MACHINE,
        machine="dtype",
        default="auto",
        metavar="NAME",
    ),
    "batch_size": Flag(
        ("--batch-size",),
        str,
        "Prompts at a time, or auto.",
        MACHINE,
        machine="batch_size",
        default="auto",
        metavar="N",
    ),
    "memory": Flag(
        ("--memory",),
        str,
        "Main memory that the process may take altogether, such as 3GB; None for what is free.",
        MACHINE,
        machine="memory",
        default="None",
        metavar="SIZE",
    ),
    "offload": Flag(
        ("--offload",),
        str,
        "Layers that do not fit: auto (read when needed), none (refuse), disk (read all of them when needed).",
        MACHINE,
        machine="offload",
        default="auto",
        metavar="NAME",
    ),
    "offload_folder": Flag(
        ("--offload-folder",),
        Path,
        "For tensors that cannot be read in place while layers are offloaded; None for a temporary folder.",
        MACHINE,
        machine="offload_folder",
        default="None",
        metavar="DIR",
    ),
    "quantization": Flag(
        ("--quantization",),
        str,
        "Load quantised to measure, by bitsandbytes: none, 8bit, 4bit.",
        MACHINE,
        machine="quantization",
        default="none",
        metavar="NAME",
    ),
    "device_map": Flag(
        ("--device-map",),
        str,
        "How GPUs share a model that one cannot hold: auto, balanced, sequential, or a JSON file.",
        MACHINE,
        machine="device_map",
        default="auto",
        metavar="NAME",
    ),
    "tensor_parallel": Flag(
        ("--tensor-parallel",),
        int,
        "Processes, started by torchrun, that share every matrix.",
        MACHINE,
        machine="tensor_parallel",
        default="1",
        metavar="N",
    ),
    "engine": Flag(
        ("--engine",),
        str,
        "What answers the prompts: transformers, vllm.",
        MACHINE,
        machine="engine",
        default="transformers",
        metavar="NAME",
    ),
    "edit": Flag(("--edit", "-e"), Path, "Edit made by `perpend fit`.", EDIT, metavar="FILE"),
    "search": Flag(("--search",), bool, "Search for the edit, as perpend search does.", SEARCH),
    "trials": Flag(
        ("--trials",),
        int,
        "Candidate edits that are scored, at most.",
        SEARCH,
        key="search.trials",
        default="160",
        metavar="N",
    ),
    "minutes": Flag(
        ("--minutes",),
        float,
        "Minutes for the whole search, about: trials leave time for replies, choice and proof.",
        SEARCH,
        key="search.minutes",
        metavar="N",
    ),
    "max_drift": Flag(
        ("--max-drift",),
        float,
        "Take the most acceptance at a drift of at most so many nats per token.",
        SEARCH,
        key="search.max_drift",
        metavar="NATS",
    ),
    "min_acceptance": Flag(
        ("--min-acceptance",),
        float,
        "Take the least drift with at least this acceptance rate; without both: the knee of the front.",
        SEARCH,
        key="search.min_acceptance",
        metavar="SHARE",
    ),
    "refine": Flag(
        ("--refine",),
        int,
        "Gradient steps from the best candidate; taken only where held-out replies confirm it. 0 for none.",
        SEARCH,
        key="search.refine",
        default="20",
        metavar="STEPS",
    ),
    "storage": Flag(
        ("--storage",),
        str,
        "Journal file or postgresql:// URL for machines that share trials, also by PERPEND_STORAGE; without -o: join.",
        SEARCH,
        metavar="WHERE",
    ),
    "workers": Flag(
        ("--workers",),
        int,
        "Processes on this machine, each on a device of its own.",
        SEARCH,
        default="1",
        metavar="N",
    ),
    "dry_run": Flag(("--dry-run",), bool, "Check everything that can be checked and say what would be done.", OUTPUT),
    "json": Flag(("--json",), bool, "Print the result as JSON on stdout.", OUTPUT),
    "quiet": Flag(("--quiet", "-q"), bool, "Print nothing but the path of what was written, and errors.", OUTPUT),
    "verbose": Flag(("--verbose", "-v"), bool, "Also show what the libraries underneath have to say.", OUTPUT),
    "debug": Flag(("--debug",), bool, "Print the traceback of an error.", OUTPUT),
}

EVERYWHERE = ("json", "quiet", "verbose", "debug")
PROMPT_FLAGS = ("target", "baseline", "system", "chat_template", "limit")
FIT_FLAGS = ("method", "layer", "strategy", "modules_per_batch", "no_filter", "mode", "allow_partial")
REPLY_FLAGS = ("sample", "max_new_tokens", "classifier")
SEARCH_FLAGS = ("trials", "minutes", "max_drift", "min_acceptance", "refine", "storage", "workers")
RECIPE_FLAGS = ("config", "assignments", "seed")
MACHINE_FLAGS = (
    "device",
    "dtype",
    "batch_size",
    "memory",
    "offload",
    "offload_folder",
    "quantization",
    "device_map",
    "tensor_parallel",
)
TALK_FLAGS = (
    "edit",
    "dry_run",
    "config",
    "assignments",
    "system",
    "chat_template",
    "sample",
    "max_new_tokens",
    "classifier",
    "seed",
    "revision",
    "trust_remote_code",
    *MACHINE_FLAGS,
)
"""Of the commands that let a model and its edit answer a user."""
