"""What `perpend diff` and `perpend audit` say of things that were done to one model: tables of docs/forensics.md.

    python bench/forensics.py [MODEL] --work DIR [--original FOLDER] [--other FOLDER] [--only WORDS] [--no-cases]
    python bench/forensics.py [MODEL] --work DIR --strengths

Of MODEL, a folder with one safetensors file, the script makes: edits in every mode, with two directions and by
`fit --strategy iterative`, a merged LoRA, two fine-tunes of all weights and their average, one at a rate that leaves
little of the weights, a round trip through q4_0, and white noise. Without MODEL a Llama of 12 layers, 256 wide, of
random weights is made, beside it another one and a Gemma 3 that are no relation; its directions are random, its
training is on random tokens, and nothing can be fitted to it. `--original` is what MODEL was made from by an adapter;
`--other`, which may be typed again, a model that another tool made of MODEL. Each is compared with MODEL by
`perpend diff`, and its writers are asked by `perpend audit`: along the direction of the edit (of another tool's model,
along what `diff` recovered), and for directions that neighbours avoid together. What is in the work folder already is
not made again. Prints both tables, and a line of JSON for every row. With `--strengths` it prints how strong an edit
along a random direction must be for `audit` to find it untold.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

import perpend
from perpend.config import load
from perpend.core.edits import Edit, ModuleEdit
from perpend.core.linear import orthonormalise
from perpend.core.quant import simulate
from perpend.core.schedule import NormalKernel
from perpend.data import load_splits
from perpend.export.shards import bake
from perpend.forensics.avoided import most
from perpend.models.load import load_model
from perpend.models.session import Session
from perpend.tasks.audit import Audit
from perpend.tasks.diff import Diff
from perpend.tasks.recipes import EDIT

WEIGHTS = "model.safetensors"
PEAK, PLACE, SPREAD, NOISE = 0.9, "53%", "15%", 0.02
"""Weight factor at the peak; where that is and how wide, as shares of the layers; noise as a share of a matrix."""
ADAPTER = "the adapter that made it"
CONSTANT, PEAKS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.9), (0.6, 0.7, 0.8, 0.9, 1.0, 1.25, 1.5, 2.0)
"""Weight factors in every layer, and at the peak of a kernel, for `--strengths`."""
RATE, HEAVY = 5e-3, "fine-tune of all weights at a hundred times the rate"
BATCH, RANK, WORDS = 2, 8, 512
"""Prompts per training step, rank of the LoRA, tokens of the Llama of random weights."""


class Bench:
    """The cases, each made once."""

    def __init__(self, asked: argparse.Namespace) -> None:
        self.asked, self.work = asked, Path(asked.work)
        self.work.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(0)
        self.bare = asked.model is None
        self.model = self.once("llama", random_llama) if self.bare else Path(asked.model)

    def once(self, name: str, make: Callable[[Path], None]) -> Path:
        """Return the folder of a case, from the work folder where it is there."""
        out, unfinished = self.work / name, self.work / f"{name}.partial"
        if not out.exists():
            shutil.rmtree(unfinished, ignore_errors=True)
            began = time.perf_counter()
            make(unfinished)
            unfinished.rename(out)
            print(f"{name}: {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
        return out

    def store(self, out: Path, tensors: Mapping[str, Tensor]) -> None:
        """Write the model with other tensors, in the dtypes of its own."""
        old = load_file(self.model / WEIGHTS)
        shutil.copytree(self.model, out)
        new = {name: tensors.get(name, tensor).to(tensor.dtype).contiguous() for name, tensor in old.items()}
        save_file(new, out / WEIGHTS, {"format": "pt"})

    def matrices(self) -> dict[str, Tensor]:
        """Return the matrices of the layers."""
        return {n: t for n, t in load_file(self.model / WEIGHTS).items() if ".layers." in n and t.ndim == 2}

    # ------------------------------------------------------------------------------------------------- edits

    def load(self) -> Any:
        """Return the model."""
        return LlamaForCausalLM.from_pretrained(self.model) if self.bare else load_model(str(self.model)).model

    def drawn(self, rank: int) -> Edit:
        """Return an edit along random directions."""
        anatomy = perpend.Anatomy.of(self.load())
        kernel = NormalKernel(peak_weight=PEAK, peak_layer=PLACE, spread=SPREAD).weights(anatomy.n_layers)
        v = orthonormalise(torch.randn(rank, anatomy.hidden_size))
        return Edit({w.name: ModuleEdit(v, kernel[w.layer]) for w in anatomy.writers if kernel[w.layer]})

    def fitted(self, name: str, *assignments: str) -> Edit:
        """Return the edit that `perpend fit` makes of the model."""
        if self.bare:
            return self.drawn(2 if "fit.rank=2" in assignments else 1)
        kernel = [
            f"edit.{part}.{key}={value}"
            for part in ("attention", "mlp")
            for key, value in (("peak_weight", PEAK), ("peak_layer", PLACE), ("spread", SPREAD))
        ]
        limits = [f"prompts.limit={self.asked.prompts}", f"fit.layer={self.asked.layer}", "fit.filter=false"]
        recipe = load(None, [*kernel, *limits, *assignments], {"model": {"id": str(self.model)}})
        folder = self.work / f"fit-{name}"
        if not folder.exists():
            perpend.fit(str(self.model), output=folder, recipe=recipe)
        return Edit.load(folder / EDIT)

    def baked(self, edit: Edit, out: Path) -> None:
        """Write the edited model and the edit beside it."""
        model = self.load()
        bake(self.model, edit, perpend.Anatomy.of(model), out, model)
        edit.save(out / EDIT)

    def in_mode(self, mode: str) -> Edit:
        """Return the edit along one direction in another mode."""
        edit = Edit.load(self.asked_along())
        return replace(edit, modules={n: replace(part, mode=mode) for n, part in edit.modules.items()})

    # ---------------------------------------------------------------------------------------------- training

    def rows(self) -> list[list[int]]:
        """Return what is trained on: the shipped prompts, or random tokens."""
        if self.bare:
            return torch.randint(0, WORDS, (64, 48), generator=torch.Generator().manual_seed(0)).tolist()
        pair = load_splits(load().prompts).fit
        session = Session(load_model(str(self.model)))
        return session.chat.encode([*pair.target.prompts, *pair.baseline.prompts])

    def trained(self, out: Path, lora: bool, seed: int, rate: float = 5e-5) -> None:
        """Train on text, a LoRA or all weights, and write what comes of it."""
        rows, model = self.rows(), self.load().float().train()
        if lora:
            from peft import LoraConfig, get_peft_model

            model = get_peft_model(model, LoraConfig(r=RANK, target_modules="all-linear"))
        chosen = [p.requires_grad_() for n, p in model.named_parameters() if not lora or "lora_" in n]
        optimiser = torch.optim.AdamW(chosen, lr=1e-3 if lora else rate)
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
        for step in range(self.asked.steps):
            for k in range(BATCH * step, BATCH * (step + 1)):
                ids = torch.tensor([rows[order[k % len(order)]]])
                model(input_ids=ids, labels=ids).loss.backward()
            optimiser.step()
            optimiser.zero_grad()
        finished: nn.Module = model.merge_and_unload() if lora else model
        self.store(out, {name: tensor.detach() for name, tensor in finished.state_dict().items()})

    def averaged(self, out: Path, one: Path, other: Path) -> None:
        """Write the average of two models."""
        a, b = load_file(one / WEIGHTS), load_file(other / WEIGHTS)
        self.store(out, {name: (a[name].float() + b[name].float()) / 2 for name in a})

    def noisy(self, out: Path) -> None:
        """Add white noise to every matrix."""
        added = {}
        for name, w in self.matrices().items():
            added[name] = w.float() + NOISE * w.float().square().mean().sqrt() * torch.randn(w.shape)
        self.store(out, added)

    def strengths(self) -> Iterator[tuple[str, Audit]]:
        """Yield how strongly one random direction was taken out, and what is found without being told of it."""
        anatomy = perpend.Anatomy.of(self.load())
        v = orthonormalise(torch.randn(1, anatomy.hidden_size))
        schedules = {f"{weight} in every layer": [weight] * anatomy.n_layers for weight in CONSTANT}
        for peak in PEAKS:
            kernel = NormalKernel(peak_weight=peak, peak_layer=PLACE, spread=SPREAD).weights(anatomy.n_layers)
            schedules[f"kernel of peak {peak}"] = kernel
        for name, weights in schedules.items():
            edit = Edit({w.name: ModuleEdit(v, weights[w.layer]) for w in anatomy.writers if weights[w.layer]})
            out = self.work / "strength"
            shutil.rmtree(out, ignore_errors=True)
            self.baked(edit, out)
            yield name, perpend.audit(str(out))
            shutil.rmtree(out)

    # ------------------------------------------------------------------------------------------------- rows

    def cases(self) -> Iterator[tuple[str, Path, Path, Path | None]]:
        """Yield what was done: words, base, other, and third model if one is named."""
        base = self.model

        def tuned(k: int) -> Path:
            return self.once(f"tuned-{k}", lambda out: self.trained(out, False, k))

        def average() -> Path:
            one, other = tuned(1), tuned(2)
            return self.once("average", lambda out: self.averaged(out, one, other))

        def edited(name: str, *keys: str) -> Path:
            return self.once(name, lambda out: self.baked(self.fitted(name, *keys), out))

        makes: dict[str, Callable[[], Path]] = {
            "nothing": lambda: base,
            **{
                f"ablation, `{mode}`": lambda m=mode: self.once(m, lambda out: self.baked(self.in_mode(m), out))
                for mode in ("plain", "column", "row")
            },
            "the same with two directions": lambda: edited("two", "fit.rank=2"),
            "LoRA of rank 8, merged in": lambda: self.once("lora", lambda out: self.trained(out, True, 0)),
            "fine-tune of all weights": lambda: tuned(1),
            HEAVY: lambda: self.once("heavy", lambda out: self.trained(out, False, 1, RATE)),
            "average of two fine-tunes, from the base": average,
            "q4_0 and back": lambda: self.once("q4_0", lambda out: self.store(out, self.rounded())),
            "white noise, 2 % of each matrix": lambda: self.once("noise", self.noisy),
        }
        if self.bare:
            makes["another Llama of these sizes"] = lambda: self.once("stranger", random_llama)
            makes["a Gemma 3 of these sizes"] = lambda: self.once("gemma", random_gemma)
        else:
            keys = ("fit.strategy=iterative", "fit.modules_per_batch=12")
            makes["`fit --strategy iterative`"] = lambda: edited("iterative", *keys)
        for name, make in makes.items():
            if self.wanted(name):
                yield name, base, make(), None
        if self.wanted("the same, from one parent, `--third` the other"):
            yield "the same, from one parent, `--third` the other", tuned(1), average(), tuned(2)
        if self.asked.original and self.wanted(ADAPTER):
            yield ADAPTER, Path(self.asked.original), base, None
        for path in self.asked.other:
            yield f"another tool: {path.name}", base, path, None

    def wanted(self, name: str) -> bool:
        """Return whether a row was asked for."""
        if self.asked.no_cases:
            return name == ADAPTER
        return not self.asked.only or any(words in name for words in self.asked.only)

    def rounded(self) -> dict[str, Tensor]:
        """Return the matrices after a round trip through q4_0."""
        return {name: simulate(w, "q4_0") for name, w in self.matrices().items()}

    def asked_along(self) -> Path:
        """Return the file of the edit along one direction, whose writers are asked where there is no other."""
        path = Path(self.asked.directions) if self.asked.directions else self.work / "one.safetensors"
        if not path.exists():
            self.fitted("one").save(path)
        return path

    def read_by(self, compared: Diff, base: Path, out: Path) -> None:
        """Write what an edit on rows of unit norm n leaves less of, v ⊘ n, for `diff -o` has no mode to write it in."""
        old, parts = load_file(base / WEIGHTS), {}
        for change in compared.found.changes:
            if change.ablation and change.ablation.side == "output" and change.ablation.explained > 0:
                v, norms = change.ablation.directions, old[change.tensor].float().norm(dim=1)
                parts[change.tensor.removesuffix(".weight")] = ModuleEdit(orthonormalise(v / norms), 1.0)
        if parts:
            Edit(parts).save(out)

    def row(self, name: str, base: Path, other: Path, third: Path | None) -> dict[str, Any]:
        """Return what `diff` and `audit` say of a case."""
        recovered = self.work / "recovered.safetensors"
        for left_over in self.work.glob(f"{recovered.name}*"):
            left_over.unlink()
        compared = perpend.diff(str(base), str(other), third=str(third) if third else None, output=recovered)
        if other in self.asked.other and compared.output is None:
            self.read_by(compared, base, recovered)
        found = compared.to_json()
        own = other / EDIT
        along = recovered if other in self.asked.other and recovered.exists() else self.asked_along()
        row = {
            "case": name,
            "verdict": found["verdict"],
            "ablation": found["ablation"],
            "kernels": {k: {x: v for x, v in row.items() if x != "weights"} for k, row in found["kernels"].items()},
            "seconds": {"diff": found["seconds"]},
        }
        if found["verdict"]["name"] == "unrelated":  # the direction is none of this model's
            return row
        asked = perpend.audit(str(other), directions=own if own.exists() else along, base=str(base)).to_json()
        looked = perpend.audit(str(other))
        left = {x["module"]: x["left"] for x in asked["writers"]}
        edit = Edit.load(own) if own.exists() else None
        misses = [abs(left[n] - abs(1 - part.weight)) for n, part in edit.modules.items()] if edit else []
        return {
            **row,
            "along": "its own" if edit else "recovered" if along == recovered else "the first edit's",
            "missing": asked["missing"],
            "writers": len(left),
            "least_left": min(left.values()),
            "median_left": median(left.values()),
            "off_by": max(misses, default=None),
            "looked": sought(looked),
            "search": [window.to_json() for window in looked.search if window.found],
            "seconds": {"diff": found["seconds"], "audit": asked["seconds"], "look": looked.seconds},
        }


def random_llama(out: Path) -> None:
    """Write a Llama of random weights."""
    sizes = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 12, "num_attention_heads": 8}
    LlamaForCausalLM(LlamaConfig(vocab_size=WORDS, **sizes)).bfloat16().save_pretrained(out)


def random_gemma(out: Path) -> None:
    """Write a Gemma 3 of the sizes of that Llama, of random weights."""
    sizes = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 12, "num_attention_heads": 8}
    heads = {"num_key_value_heads": 8, "head_dim": 32}
    Gemma3ForCausalLM(Gemma3TextConfig(vocab_size=WORDS, **sizes, **heads)).bfloat16().save_pretrained(out)


def said(row: Mapping[str, Any]) -> str:
    """Return what `diff` found of an ablation, in words."""
    made = row["ablation"]
    if row["verdict"]["name"] != "ablation" or not made:
        return ""
    parts = [made["mode"], made["scope"], *([f"rank {made['rank']}"] if made["rank"] > 1 else [])]
    for kind, k in row["kernels"].items():
        numbers = [f"{k[x]:.3g}" for x in ("peak_weight", "peak_layer", "spread") if k[x] is not None]
        parts.append(f"{kind.split('.')[-1]} {k['kind']} {' / '.join(numbers)}, off by {k['rms']:.2g}")
    return "; ".join(parts)


def sought(looked: Audit) -> str:
    """Return what was found without a direction to ask for, or what came nearest."""
    best = most(looked.search)
    if best is None:
        return "nothing"
    first, last = best.layers
    where = f"{best.ratio:.3f} at {first}" + (f"–{last}" if last > first else "")
    kind = f", {best.component}" if best.component else ""
    if not best.found:
        return f"nothing, {where}{kind}"
    return f"found, {where}{kind}; rank {best.rank}; {looked.missing} of {len(looked.rows)} writers"


def tables(rows: list[dict[str, Any]]) -> str:
    """Return both tables in Markdown."""
    lines = ["| what was done | told | confidence | matrices | what else was said |", "|---|---|---|---|---|"]
    for row in rows:
        told = row["verdict"]
        count = f"{told['passed']} of {told['told']}"
        lines.append(f"| {row['case']} | {told['detail']} | {told['confidence']:.2f} | {count} | {said(row)} |")
    lines += [
        "",
        "| what was done | asked along | missing from | left, least and median | off by | looked for |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        if "along" not in row:
            continue
        off = "" if row["off_by"] is None else f"{row['off_by']:.3f}"
        missing, left = f"{row['missing']} of {row['writers']}", f"{row['least_left']:.3f}, {row['median_left']:.3f}"
        lines.append(f"| {row['case']} | {row['along']} | {missing} | {left} | {off} | {row['looked']} |")
    return "\n".join(lines)


def main() -> None:
    """Make the cases, ask, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--work", required=True)
    parser.add_argument("--original", help="what MODEL was made from by an adapter")
    parser.add_argument(
        "--other",
        type=Path,
        action="append",
        default=[],
        metavar="FOLDER",
        help="what another tool made of MODEL, or perpend did; may be typed again, each is a row whatever --only says",
    )
    parser.add_argument("--only", action="append", default=[], help="rows that have these words; may be typed again")
    parser.add_argument("--no-cases", action="store_true", help="rows of --other and --original alone, nothing is made")
    parser.add_argument(
        "--strengths",
        action="store_true",
        help="only a table of how strong an edit must be for audit to find it untold",
    )
    parser.add_argument("--directions", help="edit.safetensors to ask along in place of one that is fitted to MODEL")
    parser.add_argument("--layer", default="17", help="layer whose direction is taken out")
    parser.add_argument("--prompts", type=int, default=32, help="prompts of each class to fit on")
    parser.add_argument("--steps", type=int, default=40, help="steps of every training")
    bench = Bench(parser.parse_args())
    if bench.asked.strengths:
        print("| taken out | looked for |\n|---|---|")
        for name, looked in bench.strengths():
            print(f"| {name} | {sought(looked)} |", flush=True)
        return
    rows = []
    for case in bench.cases():
        rows.append(bench.row(*case))
        print(json.dumps(rows[-1]), flush=True)
    print(f"\n{tables(rows)}")


if __name__ == "__main__":
    main()
