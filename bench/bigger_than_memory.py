"""Fit and export a model of 12 GB in a process that may hold 3 GB, and prove its edit.

    python bench/bigger_than_memory.py FOLDER [--limit 3GB] [--layers 24] [--keep]

Writes a sharded checkpoint of Gemma 3's shape with random bfloat16 weights to FOLDER, then runs `perpend fit` and
`perpend apply` in a control group whose memory limit the kernel enforces (pages of files count there, and are given
back under pressure); where none can be made, under RLIMIT_DATA, which counts what a process allocates but not what it
maps read-only from files. FOLDER needs three times the size of the checkpoint and is removed afterwards, unless
`--keep` is given.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file

SHAPE = {
    "model_type": "gemma3_text",
    "architectures": ["Gemma3ForCausalLM"],
    "hidden_size": 3840,
    "intermediate_size": 15360,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "vocab_size": 262208,
    "sliding_window": 1024,
    "max_position_embeddings": 131072,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
    "dtype": "bfloat16",
    "tie_word_embeddings": True,
}
SHARD = 2 << 30


def write(folder: Path, layers: int) -> int:
    """Write the checkpoint; returns its bytes."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    import pico

    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({**SHAPE, "num_hidden_layers": layers}))
    pico.tokenizer().save_pretrained(folder)
    d, inner, q, kv = 3840, 15360, 4096, 2048
    norms = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")
    shapes = {"model.embed_tokens.weight": (SHAPE["vocab_size"], d), "model.norm.weight": (d,)}
    for k in range(layers):
        at = f"model.layers.{k}."
        shapes |= {f"{at}{n}.weight": (d,) for n in norms}
        shapes |= {f"{at}self_attn.{n}_norm.weight": (256,) for n in "qk"}
        attention = {"q": (q, d), "k": (kv, d), "v": (kv, d), "o": (d, q)}
        shapes |= {f"{at}self_attn.{n}_proj.weight": shape for n, shape in attention.items()}
        mlp = {"gate": (inner, d), "up": (inner, d), "down": (d, inner)}
        shapes |= {f"{at}mlp.{n}_proj.weight": shape for n, shape in mlp.items()}
    noise = torch.randn((1 << 26) + 8191, generator=torch.Generator().manual_seed(0)).bfloat16()
    index: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}
    total = number = 0

    def flush() -> None:
        nonlocal number
        number += 1
        save_file(shard, folder / f"model-{number:05d}.safetensors", {"format": "pt"})
        index.update(dict.fromkeys(shard, f"model-{number:05d}.safetensors"))
        shard.clear()

    for count, (name, shape) in enumerate(shapes.items()):
        size = torch.Size(shape).numel()
        if len(shape) == 1:
            tensor = torch.zeros(shape, dtype=torch.bfloat16)
        else:
            start, block = (count * 97) % 8191, 1 << 26
            pieces = [noise[start : start + min(block, size - k)] for k in range(0, size, block)]
            tensor = (torch.cat(pieces) * (0.7 * shape[-1] ** -0.5)).reshape(shape)
        shard[name] = tensor
        total += tensor.nbytes
        if sum(t.nbytes for t in shard.values()) > SHARD:
            flush()
    flush()
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(text)
    return total


ROOTS = {"/sys/fs/cgroup/memory": "memory.limit_in_bytes", "/sys/fs/cgroup": "memory.max"}


def limited(size: int) -> tuple[str, Callable[[], object], Path | None]:
    """Return what the limit is, what puts a process under it, and the folder of the control group if there is one."""
    for root, name in ROOTS.items():
        group = Path(root) / f"perpend-bench-{os.getpid()}"
        try:
            group.mkdir()
            (group / name).write_text(str(size))
        except OSError:
            if group.is_dir():
                group.rmdir()
            continue
        procs = group / "cgroup.procs"
        return f"control group, {name}", partial(_enter, procs), group
    return "RLIMIT_DATA", lambda: resource.setrlimit(resource.RLIMIT_DATA, (size, size)), None


def _enter(procs: Path) -> None:
    procs.write_text(str(os.getpid()))


def main() -> None:
    """Write, fit, apply, report."""
    from perpend.config import Machine

    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--limit", default="3GB")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--keep", action="store_true")
    asked = parser.parse_args()
    size = Machine.model_validate({"memory": asked.limit}).memory
    folder: Path = asked.folder
    model = folder / "model"
    began = time.monotonic()
    if not model.exists():
        total = write(model, asked.layers)
    else:
        total = sum(p.stat().st_size for p in model.glob("*.safetensors"))
    print(json.dumps({"checkpoint_bytes": total, "seconds": round(time.monotonic() - began, 1)}), flush=True)
    kind, enter, group = limited(size)
    common = ["--limit", str(asked.prompts), "--memory", asked.limit, "--device", "cpu", "--json"]
    steps = {
        "fit": [str(model), "-o", str(folder / "edit"), "--layer", "53%", "--no-filter", *common],
        "apply": [str(model), "--edit", str(folder / "edit"), "-o", str(folder / "out"), *common],
    }
    steps["apply"] += ["--max-new-tokens", "2", "--set", "export.gate_prompts=2", "--set", "eval.classifier=none"]
    for name, words in steps.items():
        if Path(words[words.index("-o") + 1]).exists():
            continue
        peaks = [group / n for n in ("memory.max_usage_in_bytes", "memory.peak")] if group else []
        used = next((path for path in peaks if path.exists()), None)
        if used is not None and used.name != "memory.peak":
            used.write_text("0")
        began = time.monotonic()
        done = subprocess.run([sys.executable, "-m", "perpend", name, *words], preexec_fn=enter, stdout=subprocess.PIPE)
        peak = int(used.read_text()) if used else resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
        row = {"step": name, "limit": size, "by": kind, "rc": done.returncode, "peak_memory": peak}
        row["seconds"] = round(time.monotonic() - began, 1)
        gate = json.loads(done.stdout).get("gate") if done.returncode == 0 else None
        if gate:
            row |= {"gate": {k: gate[k] for k in ("worst", "prompts", "same_labels", "same_replies", "likelihood")}}
            row |= {"modules": len(gate["leak"])}
        print(json.dumps(row), flush=True)
        if done.returncode:
            break
    if group is not None:
        group.rmdir()
    if not asked.keep:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
