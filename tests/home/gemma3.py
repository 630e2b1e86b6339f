"""What tests of Gemma 3 share: the way its turns are written, and checkpoints with all that the real ones have."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

TEMPLATE = """\
{{ bos_token }}
{%- for message in messages -%}
{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\\n' }}
{{- message['content'] | trim + '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<start_of_turn>model\\n' }}
{%- endif -%}
"""

GENERATION = {"do_sample": True, "temperature": 1.0, "top_k": 64, "top_p": 0.95}
"""The sampling settings that the real instruction-tuned models ship."""

CARD = """\
---
license: gemma
library_name: transformers
pipeline_tag: image-text-to-text
base_model: google/gemma-3-4b-pt
---

# A base card
"""


def as_shipped(source: Path, folder: Path) -> Path:
    """Copy a pico checkpoint and give it the files that a real Gemma 3 repository has beside the weights."""
    shutil.copytree(source, folder)
    settings = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
    _write(folder / "generation_config.json", settings | GENERATION)
    (folder / "README.md").write_text(CARD, encoding="utf-8")
    (folder / "added_tokens.json").write_text('{"<image_soft_token>": 7}\n', encoding="utf-8")
    return folder


def _write(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
