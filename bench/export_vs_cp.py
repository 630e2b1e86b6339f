"""Export against `cp`: time as a multiple of copying the same files, and peak memory against the largest edited matrix.

    python bench/export_vs_cp.py [--gb 2.2] [--folder /tmp] [--repeats 3] [--mode plain]

Writes a synthetic sharded Llama checkpoint in bfloat16 below `--folder`, exports it with every out- and down-projection
edited, in a process of its own, and copies it with `cp -r`; both with and without flushing to the disk for `cp` (the
export always flushes). Prints JSON, removes what it wrote. Peak memory is what the export adds to a process in which
the libraries are loaded already; the resident size of the whole process is given beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HIDDEN, INTERMEDIATE, HEADS, VOCABULARY = 3072, 8192, 24, 32_000
SHARD = 800_000_000


def model_on_meta(layers: int) -> Any:
    """Return a Llama without values, as wide as a 3B one."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=8,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        return LlamaForCausalLM(config).to(torch.bfloat16)


def write_checkpoint(folder: Path, size: float) -> int:
    """Write shards, index and configuration of at least `size` bytes; return the number of layers."""
    import torch
    from safetensors.torch import save_file

    per_layer = 2 * sum(p.numel() for n, p in model_on_meta(1).named_parameters() if ".layers.0." in n)
    layers = int(size / per_layer) + 1
    model = model_on_meta(layers)
    pool = torch.randn(HIDDEN * INTERMEDIATE, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    shards: list[dict[str, torch.Tensor]] = [{}]
    held = 0
    for name, parameter in model.named_parameters():
        if held + parameter.nbytes > SHARD and shards[-1]:
            shards.append({})
            held = 0
        shards[-1][name] = pool.repeat(-(-parameter.numel() // len(pool)))[: parameter.numel()].view(parameter.shape)
        held += parameter.nbytes
    mapping = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(dict(shard), folder / file, {"format": "pt"})
        mapping |= dict.fromkeys(shard, file)
        shard.clear()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": mapping}))
    model.config.save_pretrained(folder)
    return layers


def memory(field: str) -> int:
    """Return a memory field of this process in bytes, such as VmRSS or VmHWM."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    return int(line.split()[1]) * 1024


def export(source: Path, out: Path, layers: int, mode: Any) -> None:
    """Export once and print the time, the peak of memory above what was there before, and what was edited."""
    import torch

    from perpend.core.edits import Edit, ModuleEdit
    from perpend.export.checkpoint import Checkpoint
    from perpend.export.shards import bake
    from perpend.models.anatomy import Anatomy

    model = model_on_meta(layers)
    anatomy = Anatomy.of(model)
    direction = torch.nn.functional.normalize(torch.randn(1, HIDDEN, generator=torch.Generator().manual_seed(1)))
    edit = Edit({writer.name: ModuleEdit(direction, 0.8, mode) for writer in anatomy.writers})
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before, began, worked = memory("VmRSS"), time.perf_counter(), time.process_time()
    result = bake(source, edit, anatomy, out, model)
    seconds, cpu = time.perf_counter() - began, time.process_time() - worked
    tensors = Checkpoint(source).tensors
    edited = [tensors[name].nbytes for name in result.edited]
    print(
        json.dumps(
            {
                "seconds": seconds,
                "cpu_seconds": cpu,
                "peak_bytes": memory("VmHWM") - before,
                "rss_bytes": memory("VmHWM"),
                "largest_edited_bytes": max(edited),
                "edited_bytes": sum(edited),
                "bytes": result.bytes,
            }
        )
    )


def timed(command: list[str]) -> tuple[float, float]:
    """Run a command on a quiet disk and return its wall and processor seconds."""
    os.sync()
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, check=True)
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def measure(arguments: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Write the checkpoint, then alternate export and copies."""
    source, out = work / "source", work / "out"
    source.mkdir()
    layers = write_checkpoint(source, arguments.gb * 1e9)
    copies: list[tuple[float, float]] = []
    flushed: list[tuple[float, float]] = []
    exports: list[dict[str, Any]] = []
    for _ in range(arguments.repeats):
        copies.append(timed(["cp", "-r", str(source), str(out)]))
        shutil.rmtree(out)
        flushed.append(timed(["sh", "-c", f"cp -r {source} {out} && sync {out}/*"]))
        shutil.rmtree(out)
        os.sync()
        command = [sys.executable, __file__, "--export", str(source), str(out), str(layers), arguments.mode]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        exports.append(json.loads(done.stdout))
        shutil.rmtree(out)
    wall = {
        "export": [run["seconds"] for run in exports],
        "cp": [seconds for seconds, _ in copies],
        "cp_flushed": [seconds for seconds, _ in flushed],
    }
    middle = {name: statistics.median(values) for name, values in wall.items()}
    cpu = {"export": [run["cpu_seconds"] for run in exports], "cp_flushed": [worked for _, worked in flushed]}
    peak, largest = max(run["peak_bytes"] for run in exports), exports[0]["largest_edited_bytes"]
    return {
        "mode": arguments.mode,
        "bytes": exports[0]["bytes"],
        "edited_bytes": exports[0]["edited_bytes"],
        "times_cp": middle["export"] / middle["cp"],
        "times_cp_flushed": middle["export"] / middle["cp_flushed"],
        "cpu_times_cp_flushed": min(cpu["export"]) / min(cpu["cp_flushed"]),
        "peak_bytes": peak,
        "rss_bytes": max(run["rss_bytes"] for run in exports),
        "largest_edited_bytes": largest,
        "peak_times_largest": peak / largest,
        "wall_seconds": wall,
        "cpu_seconds": cpu,
        "load": os.getloadavg()[0],
        "machine": f"{os.cpu_count()} cores, {platform.system()} {platform.machine()}",
    }


def main() -> None:
    """Parse the command line; the form with `--export` is for the measured process."""
    if sys.argv[1:2] == ["--export"]:
        source, out, layers, mode = sys.argv[2:]
        export(Path(source), Path(out), int(layers), mode)
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=2.2, help="size of the checkpoint in 10⁹ bytes")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where to write")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--mode", choices=["plain", "column", "row"], default="plain")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="perpend-bench-") as work:
        print(json.dumps(measure(arguments, Path(work)), indent=1))


if __name__ == "__main__":
    main()
