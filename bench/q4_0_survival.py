"""Does an edit survive a real q4_0 quantisation by llama.cpp, on weights that lie on the q4_0 lattice?

    python bench/q4_0_survival.py ORGANISM --edit out/demo/edited --llama-cpp DIR --work DIR [--prompts 64] [--weights]

The organism is put on the lattice, and an edit of it, its largest weight factor scaled to 0.75, is written twice,
plainly and as by `--for q4_0`. Both are converted by llama.cpp's converter, quantised by its `llama_model_quantize`,
and answer by its own generation; `--weights` stops before that. What is in the work folder already is not made again.
Needs the package llama-cpp-python and a checkout of llama.cpp. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from llama_cpp_greedy import greedy
from safetensors.torch import load_file, save_file
from torch import nn

import perpend
from perpend.config import Recipe
from perpend.core.edits import Edit, edit_weight
from perpend.core.quant import simulate
from perpend.data import load_splits
from perpend.export.checkpoint import Checkpoint
from perpend.export.gguf import Change, leak_rows, plan, values
from perpend.export.gguf_file import layouts
from perpend.export.gguf_from import Source
from perpend.export.llama_cpp import PROGRAM, Tools, call
from perpend.export.shards import bake
from perpend.judges.panel import Judgement, Panel, compare
from perpend.models.load import load_model, skeleton
from perpend.models.recall import Recalled
from perpend.models.replies import Reply
from perpend.models.session import Session
from perpend.tasks.measure import cost, judge
from perpend.tasks.recipes import EDIT, find_edit, write_recipe

PEAK, DRIFT_TOKENS = 0.75, 32
FILES = {
    "base q4_0": "base.q4_0",
    "edit bf16": "plain.bf16",
    "plain q4_0": "plain.q4_0",
    "--for q4_0": "kept.q4_0",
    "export gguf --base": "into.q4_0",
    "apply FILE.gguf": "applied.q4_0",
}
"""What answers, and its file; the last two are the base's GGUF file with the edit, by a checkpoint and directly."""
BOTH = ("--for q4_0", "apply FILE.gguf")
"""Answer in transformers too."""


class Bench:
    """The steps, each of which is made once."""

    def __init__(self, asked: argparse.Namespace) -> None:
        self.asked, self.work = asked, Path(asked.work)
        self.work.mkdir(parents=True, exist_ok=True)
        self.recipe = Recipe.model_validate(
            {"model": {"id": str(self.work / "lattice")}, "eval": {"classifier": "perpend:small"}}
        )
        splits = load_splits(self.recipe.prompts)
        self.targets = splits.report.target.limited(asked.prompts).prompts
        self.baselines = splits.report.baseline.limited(asked.prompts // 2).prompts
        self.panel = Panel.load("perpend:small")

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """Return the JSON that a step gives, from the work folder where it is there."""
        path = self.work / f"{name}.json"
        if not path.exists():
            began = time.perf_counter()
            made = make()
            path.write_text(json.dumps(made))
            print(f"{name}: {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
        return json.loads(path.read_text())

    # -------------------------------------------------------------------------------------------------- files

    def lattice(self) -> Path:
        """Put the matrices of the organism's layers on the q4_0 lattice, kept in the dtype of the file."""
        out, unfinished = self.work / "lattice", self.work / "lattice.partial"
        if not out.exists():
            shutil.copytree(self.asked.organism, unfinished)
            weights = load_file(unfinished / "model.safetensors")
            for name, tensor in weights.items():
                if ".layers." in name and tensor.ndim == 2:
                    weights[name] = simulate(tensor, "q4_0").to(tensor.dtype)
            save_file(weights, unfinished / "model.safetensors", {"format": "pt"})
            unfinished.rename(out)
        return out

    def edit(self) -> Edit:
        """Return the edit, scaled."""
        found = find_edit(Path(self.asked.edit))
        return found.scaled(PEAK / max(part.weight for part in found.modules.values()))

    def bare(self) -> nn.Module:
        """Return the model without its weights."""
        source = str(self.lattice())
        return skeleton(perpend.ModelRef.parse(source).resolve(), source)

    def outputs(self) -> dict[str, Any]:
        """Write the edit both ways; returns what rounding cost."""
        made, model, edit = {}, self.bare(), self.edit()
        for name, rounding in (("plain", "auto"), ("kept", "q4_0")):
            shutil.rmtree(self.work / name, ignore_errors=True)
            done = bake(self.lattice(), edit, perpend.Anatomy.of(model), self.work / name, model, rounding=rounding)
            edit.save(self.work / name / EDIT)
            write_recipe(self.work / name, self.recipe, edit)
            made[name] = done.rounding
        return made

    def files(self) -> dict[str, int]:
        """Convert all three checkpoints and quantise them; returns sizes."""
        tools, sizes = Tools.find(Path(self.asked.llama_cpp)), {}
        for name in ("base", "plain", "kept"):
            folder = self.lattice() if name == "base" else self.work / name
            whole, small = self.work / f"{name}.bf16.gguf", self.work / f"{name}.q4_0.gguf"
            if not whole.exists():
                call(tools.commands(folder, whole, "bf16"))
            if not small.exists():
                subprocess.run([sys.executable, "-c", PROGRAM, whole, small, "q4_0"], check=True, capture_output=True)
            sizes |= {path.name: path.stat().st_size for path in (whole, small)}
        into = self.work / "into.q4_0.gguf"
        if not into.exists():
            perpend.export_gguf(self.work / "plain", output=into, base=self.work / "base.q4_0.gguf")
        applied = self.work / "applied.q4_0.gguf"
        if not applied.exists():  # by the command as it is, its gate with replies and all
            perpend.apply(str(self.work / "base.q4_0.gguf"), edit=self.work / "plain", output=applied)
        return sizes

    # ------------------------------------------------------------------------------------------------ weights

    def realised(self) -> dict[str, Any]:
        """Measure the weight factors that the edited files really hold."""
        model, edit = self.bare(), self.edit()
        anatomy = perpend.Anatomy.of(model)
        before = Source(Checkpoint(self.lattice()), model, anatomy)
        found = {}
        for name, stem in list(FILES.items())[1:]:
            files = layouts(self.work / f"{stem}.gguf")
            changes = plan(files, edit, anatomy)
            rows = leak_rows(changes, files, anatomy, before=before.whole, allow_leak=True)
            square = sum(row.asked**2 for row in rows)
            found[name] = {
                "modules": len(rows),
                "missed": sum(not row.ok for row in rows),
                "kept": sum(row.asked * row.realised for row in rows) / square,
                "noise": max(row.noise for row in rows),
                "rms": self._rms(changes, before, edit),
            }
        return found

    @staticmethod
    def _rms(changes: list[Change], before: Source, edit: Edit) -> float:
        """Return the RMS distance of what a file holds from the exact edit, relative to the exact edit."""
        own = whole = 0.0
        for change in changes:
            exact = edit_weight(before.whole(change), edit.modules[change.writer.name])
            own += float((values(change.file.path, change.tensor).double() - exact).square().sum())
            whole += float(exact.square().sum())
        return (own / whole) ** 0.5

    # ------------------------------------------------------------------------------------------------ replies

    def llama_cpp(self, name: str) -> list[list[int]]:
        """Let llama.cpp answer the target prompts with a file."""
        session = Session(load_model(str(self.lattice())))
        ends = session.model.generation_config.eos_token_id
        ids = session.chat.encode(self.targets)
        path = str(self.work / f"{FILES[name]}.gguf")
        return greedy(path, ids, ends if isinstance(ends, list) else [ends], self.asked.tokens, self.asked.threads)

    def transformers(self) -> dict[str, Any]:
        """Answer in transformers with the values of the files; drift from the lattice over its own answers."""
        base, other = (Session(load_model(str(self.lattice()))) for _ in range(2))
        edit = self.edit()
        replies = base.generate(self.baselines, max_new_tokens=DRIFT_TOKENS)
        asked = judge(self.baselines, replies, self.panel)
        found: dict[str, Any] = {}
        reference = Recalled(base)
        for name in list(FILES)[1:]:
            files = layouts(self.work / f"{FILES[name]}.gguf")
            for change in plan(files, edit, other.anatomy):
                whole = values(change.file.path, change.tensor)
                change.writer.assign(change.writer.weight(other.model).data, whole)
            moved = cost(other, None, asked, DRIFT_TOKENS, reference=reference, limit=len(self.baselines))
            found[name] = {"drift": {k: v for k, v in moved.to_json().items() if k != "per_prompt"}}
            if name in BOTH:
                replies = other.generate(self.targets, max_new_tokens=self.asked.tokens)
                found[name]["replies"] = [r.tokens[:-1] if r.finished else r.tokens for r in replies]
        return found

    def judged(self, tokens: list[list[int]], decode: Callable[[list[int]], str]) -> Judgement:
        """Label replies."""
        replies = [Reply(decode(t), tuple(t), len(t) < self.asked.tokens) for t in tokens]
        return judge(self.targets, replies, self.panel).judged

    def report(self) -> dict[str, Any]:
        """Return all figures."""
        rounding = self.once("rounding", self.outputs)
        sizes, weights = self.once("files", self.files), self.once("realised", self.realised)
        if self.asked.weights:
            return {"peak": PEAK, "rounding": rounding, "sizes": sizes, "weights": weights}
        said = {name: self.once(f"said.{FILES[name]}", lambda name=name: self.llama_cpp(name)) for name in FILES}
        here = self.once("transformers", self.transformers)
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(self.lattice() / "tokenizer.json"))
        labels = {name: self.judged(tokens, tokenizer.decode) for name, tokens in said.items()}
        again = {name: self.judged(here[name].pop("replies"), tokenizer.decode) for name in BOTH}
        kept = labels["--for q4_0"]
        return {
            "prompts": len(self.targets),
            "tokens": self.asked.tokens,
            "peak": PEAK,
            "rounding": rounding,
            "sizes": sizes,
            "weights": weights,
            "labels": {name: brief(judged) for name, judged in labels.items()},
            "plain → --for": compare(labels["plain q4_0"], kept).to_json(),
            "edit bf16 → --for": compare(labels["edit bf16"], kept).to_json(),
            "llama.cpp → transformers": {
                name: {
                    "transformers": brief(here_said),
                    "compared": compare(labels[name], here_said).to_json(),
                    "same labels": sum(a == b for a, b in zip(labels[name].labels, here_said.labels, strict=True)),
                }
                for name, here_said in again.items()
            },
            "drift": {name: row["drift"] for name, row in here.items()},
        }


def brief(judged: Judgement) -> dict[str, Any]:
    """Return rates without the single replies."""
    return {key: value for key, value in judged.to_json().items() if key in ("n", "acceptance", "labels", "kappa")}


def main() -> None:
    """Make everything and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("organism")
    parser.add_argument("--edit", required=True)
    parser.add_argument("--llama-cpp", required=True)
    parser.add_argument("--work", required=True)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--weights", action="store_true")
    print(json.dumps(Bench(parser.parse_args()).report(), indent=1))


if __name__ == "__main__":
    with torch.no_grad():
        main()
