"""What rounding to q4_0 alone does on the prompts of the gate, beside what it does to an edit.

    python bench/rounding_gate.py ORGANISM [--lattice DIR] [--gguf FILE] [--tokens 64] > rounding_gate.json

For ordinary weights, weights on the q4_0 lattice and a GGUF file: the figures that the gate compares (labels that
differ, likelihood and KL per token over the same replies), first for the untouched model with the matrices that an edit
would touch rounded plainly, then for the edit as it is saved. Limits are left out, so that all figures are seen.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

import perpend
import perpend.tasks.gate as gate
from perpend.config import Machine, Recipe
from perpend.core.edits import Edit
from perpend.core.quant import simulate
from perpend.data import load_splits
from perpend.export.verify import Untouched
from perpend.judges.panel import Panel
from perpend.models.load import load_model
from perpend.models.session import Session
from perpend.refs import ModelRef

NOTHING = Untouched(0, 0, 0, ())


def recipe(rounding: str, tokens: int) -> Recipe:
    """Return one schedule of peak 0.75 and the layer of the demo."""
    schedule = {"kind": "normal", "peak_weight": 0.75}
    return Recipe.model_validate(
        {
            "prompts": {"limit": 128},
            "fit": {"layer": 17, "filter": False},
            "edit": {"attention": schedule, "mlp": schedule},
            "eval": {"classifier": "perpend:small", "max_new_tokens": tokens},
            "export": {"rounding": rounding},
        }
    )


def alone(model: str, edit: Edit, asked: Recipe) -> dict[str, Any]:
    """Round the matrices that an edit would touch, plainly and without the edit, and measure as the gate does."""
    session: Any = Session(load_model(model), Machine())
    held = gate.Asked(session, Edit({}), asked, Machine(), Panel.load("perpend:small"))
    seen = gate.reference(held, load_splits(asked.prompts).select)
    with tempfile.TemporaryDirectory() as folder:
        for name in edit.modules:
            writer = session.anatomy.writer(name)
            weight = writer.weight(session.model)
            writer.assign(weight.data, simulate(writer.matrix(weight.data).contiguous(), "q4_0"))
        session.model.save_pretrained(folder)
        session.loaded.tokenizer.save_pretrained(folder)
        return figures(gate.proven(held, seen, ModelRef("dir", folder), [], NOTHING))


def edited(model: str, edit: Path, asked: Recipe, out: str) -> dict[str, Any]:
    """Apply the edit and return what the gate measured."""
    with tempfile.TemporaryDirectory() as folder:
        made: Any = perpend.apply(model, edit=edit, output=Path(folder) / out, recipe=asked.for_model(model))
        return figures(made.gate) | {"rounding": made.export.rounding}


def figures(found: gate.Gate) -> dict[str, Any]:
    """Return what the gate compares."""
    moved = abs(found.likelihood[0] - found.likelihood[1])
    return {
        "prompts": found.prompts,
        "labels that differ": found.prompts - found.same_labels,
        "likelihood": moved,
        "kl": found.kl,
        "largest miss": found.worst,
    }


def main() -> None:
    """Measure and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("organism")
    parser.add_argument("--lattice")
    parser.add_argument("--gguf")
    parser.add_argument("--tokens", type=int, default=64)
    asked = parser.parse_args()
    gate.require_same = lambda found, folder, rounding: None
    models = {"ordinary": asked.organism, "on the lattice": asked.lattice, "GGUF": asked.gguf}
    made: dict[str, Any] = {}
    for name, model in models.items():
        if not model:
            continue
        with tempfile.TemporaryDirectory() as folder:
            fit, plain, kept = Path(folder) / "fit", recipe("auto", asked.tokens), recipe("q4_0", asked.tokens)
            perpend.fit(model, output=fit, recipe=plain.for_model(model))
            if name == "GGUF":
                made["edit in the file's own types, GGUF"] = edited(model, fit, plain, "out.gguf")
            else:
                edit = Edit.load(fit / "edit.safetensors")
                made[f"untouched, rounded to q4_0, {name}"] = alone(model, edit, plain)
                made[f"edit, --for q4_0, {name}"] = edited(model, fit, kept, "out")
        print(json.dumps(made), file=sys.stderr, flush=True)
    print(json.dumps(made, indent=1))


if __name__ == "__main__":
    with torch.no_grad():
        main()
