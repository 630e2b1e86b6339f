"""An export holds at most three times the largest matrix that it edits, whatever the mode."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import json, shutil, sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from perpend.core.edits import Edit, ModuleEdit
from perpend.export.shards import bake
from perpend.models.anatomy import Anatomy

HIDDEN, WIDE = 2048, 16384


def memory(field):
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    return int(line.split()[1]) * 1024


work, pool = Path(sys.argv[1]), torch.randn(1 << 20).mul_(0.02).bfloat16()
config = LlamaConfig(vocab_size=64, hidden_size=HIDDEN, intermediate_size=WIDE, num_hidden_layers=2,
                     num_attention_heads=16, num_key_value_heads=1, tie_word_embeddings=True)
with torch.device("meta"):
    model = LlamaForCausalLM(config).to(torch.bfloat16)
(work / "source").mkdir()
config.save_pretrained(work / "source")
tensors = {n: pool.repeat(-(-p.numel() // len(pool)))[: p.numel()].view(p.shape) for n, p in model.named_parameters()
           if "gate_proj" not in n and "up_proj" not in n}
tensors |= {n: torch.zeros(1, dtype=torch.bfloat16).expand(p.shape).contiguous() for n, p in model.named_parameters()
            if n not in tensors}
save_file(tensors, work / "source" / "model.safetensors", {"format": "pt"})
largest = max(t.nbytes for n, t in tensors.items() if "down_proj" in n)
del tensors
anatomy, direction = Anatomy.of(model), torch.nn.functional.normalize(torch.randn(1, HIDDEN))
found = {"largest": largest, "peaks": {}}
before = memory("VmRSS")
for mode in ("plain", "column", "row"):
    edit = Edit({writer.name: ModuleEdit(direction, 0.8, mode) for writer in anatomy.writers})
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    bake(work / "source", edit, anatomy, work / mode, model)
    found["peaks"][mode] = memory("VmHWM") - before
    shutil.rmtree(work / mode)
shutil.rmtree(work / "source")
print(json.dumps(found))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of memory is read from /proc")
def test_an_export_holds_at_most_three_times_the_largest_edited_tensor(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(tmp_path)], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert found["largest"] == 2 * 2048 * 16384
    assert {
        mode: round(peak / found["largest"], 2) for mode, peak in found["peaks"].items() if peak > 3 * found["largest"]
    } == {}
    assert all(peak > found["largest"] for peak in found["peaks"].values())  # the matrix itself is seen
