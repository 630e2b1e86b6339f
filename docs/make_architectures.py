"""Write the table of docs/architectures.md from the models that the tests run on; `--check` only compares."""

from __future__ import annotations

import re
import sys
from collections import Counter
from pathlib import Path

from perpend.models.anatomy import Anatomy, Writer
from perpend.models.quiet import silenced

TESTS = Path(__file__).parent.parent / "tests"
PAGE = Path(__file__).with_name("architectures.md")
BEGIN, END = "<!-- made by docs/make_architectures.py -->\n", "<!-- end -->\n"
ROLES = {
    "attention_out": "attention",
    "mixer_out": "mixer",
    "mlp_down": "MLP",
    "expert_down": "experts",
    "shared_expert_down": "shared expert",
}


def told(writer: Writer, layers: str) -> str:
    """Return a writer without its layer: role, path, layout of fused experts, norm that follows."""
    path = re.sub(r"\.\d+\.", ".*.", writer.name.removeprefix(f"{layers}.").partition(".")[2])
    layout = {None: "", 1: " `[E, out, in]`", 2: " `[E, in, out]`"}[writer.out_axis if writer.experts else None]
    bias = " with bias" if writer.bias else ""
    norm = " → norm" if writer.post_norm else ""
    return f"{ROLES[writer.role]} `{path}`{layout}{bias}{norm}"


def row(name: str, family: str) -> str:
    """Return the line of the table for one pico model."""
    import pico

    if family in pico.UNRUN:
        kind = pico.config(family).model_type
        return f"| {name} | `{kind}` | loaded as its text tower alone: as `{kind}_text` |"
    model = pico.build(family)
    anatomy = Anatomy.of(model)
    written = Counter(told(writer, anatomy.layers) for writer in anatomy.writers)
    assert not anatomy.gaps, (family, anatomy.gaps)
    return f"| {name} | `{model.config.model_type}` | {'; '.join(written)} |"


def table() -> str:
    """Return the table."""
    from test_every_family import ROWS

    rows = [row(name, family) for name, families in ROWS.items() for family in families]
    return "\n".join(["| family | `model_type` | what is edited |", "| --- | --- | --- |", *rows]) + "\n"


def main() -> int:
    """Put the table into the page, or say that it is out of date."""
    sys.path += [str(TESTS), str(TESTS / "home")]
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    with silenced():  # libraries name kernels that could be faster
        made = before + BEGIN + table() + END + rest.partition(END)[2]
    if "--check" not in sys.argv:
        PAGE.write_text(made, encoding="utf-8")
        return 0
    if text == made:
        return 0
    sys.stderr.write(f"{PAGE.name} is out of date; make docs\n")
    return 1


if __name__ == "__main__":
    sys.exit(main())
