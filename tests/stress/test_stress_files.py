"""Whatever is read that is malformed, huge or hostile: one line each, and bounded memory."""

from __future__ import annotations

import json
import struct
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hostile import damaged, little_memory, outcome
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save

import perpend.config as config
import perpend.data as data
from perpend.config import Recipe, load
from perpend.core.directions import Directions
from perpend.core.edits import Edit, ModuleEdit
from perpend.data import PromptSet, load_prompts
from perpend.errors import UsageError
from perpend.models.gguf import Layout, layout
from perpend.models.headers import read_header
from perpend.tasks.config import commented
from perpend.tasks.earlier import beside_edit
from perpend.tasks.pages import WrittenPage, write_report
from perpend.tasks.recipes import beside, read_recipe
from perpend.tasks.vector import vector

often = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
DEEP = 100_000

RECIPE = commented(Recipe()).encode()
VALUES = (
    "nan", "inf", "-inf", "9" * 5000, "1e999", "[" * DEEP, '"' + "\\ud800" + '"', "1979-05-27", "{}", "[[]]", "true",
    '""', "'''x'''", "0x" + "f" * 400,
)  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ recipes


@often
@given(damaged(RECIPE))
def test_a_damaged_recipe_is_one_line_or_a_recipe(tmp_path, text):
    (tmp_path / "r.toml").write_bytes(text)
    found = outcome(lambda: load(tmp_path / "r.toml"))
    assert isinstance(found, Recipe | UsageError)
    if isinstance(found, UsageError):
        assert "r.toml" in str(found)


@pytest.mark.parametrize(
    "key", ["seed", "fit.layer", "edit.mlp", "edit.overrides", "prompts.limit", "edit.attention.kind"]
)
@pytest.mark.parametrize("value", VALUES, ids=lambda v: v[:8])
def test_a_hostile_value_is_one_line_or_a_recipe(tmp_path, key, value):
    path = tmp_path / "r.toml"
    path.write_text(f"{key} = {value}\n", encoding="utf-8")
    for read in (lambda: load(path), lambda: load(None, [f"{key}={value}"])):
        found = outcome(read)
        assert isinstance(found, Recipe | UsageError)


@pytest.mark.parametrize(
    "text",
    [
        "edit.overrides" + ".a" * DEEP + " = 1",
        "[edit.overrides" + ".a" * DEEP + "]",
        "edit.overrides = " + "[" * 900 + "]" * 900,
        "edit.overrides = " + "{a=" * 900 + "1" + "}" * 900,
        "edit.overrides = {x = 1979-05-27}",
        "a = 1\na = 2",
        "[fit]\n[fit]",
        "\x00",
        "\ufeffseed = 1",
        "[[edit]]\n[[edit]]",
        "edit = 3",
        'edit.mlp.kind = "normal"\nedit.mlp.peak_weight = "much"',
    ],
    ids=lambda text: text[:24],
)
def test_hostile_recipes(tmp_path, text):
    (tmp_path / "r.toml").write_text(text, encoding="utf-8")
    with little_memory():
        assert isinstance(outcome(lambda: load(tmp_path / "r.toml")), Recipe | UsageError)


def test_a_recipe_without_end_is_not_read_to_its_end(tmp_path, monkeypatch):
    monkeypatch.setattr(config, "MAX_TOML", 1000)
    (tmp_path / "r.toml").write_text("#" * 1001)
    with pytest.raises(UsageError, match=r"r\.toml: larger than 1000 bytes"):
        load(tmp_path / "r.toml")


# ------------------------------------------------------------------------------------------------------------ prompts

FILES = {
    "p.txt": "Tell me about bread.\nWhat is rain?\n\nWhy?\n",
    "p.jsonl": '{"text": "Tell me about bread.", "topic": "food"}\n{"text": "What is rain?"}\n',
    "p.json": '[{"text": "Tell me about bread."}, {"text": "What is rain?"}]',
    "p.csv": 'text,topic\n"Tell me, about bread.",food\nWhat is rain?,weather\n',
    "p.tsv": "text\ttopic\nTell me about bread.\tfood\nWhat is rain?\tweather\n",
}


@often
@given(st.data())
def test_a_damaged_prompts_file_is_one_line_or_prompts(tmp_path, data):
    name = data.draw(st.sampled_from(sorted(FILES)))
    (tmp_path / name).write_bytes(data.draw(damaged(FILES[name].encode())))
    found = outcome(lambda: load_prompts(str(tmp_path / name)))
    assert isinstance(found, PromptSet | UsageError)
    if isinstance(found, UsageError):
        assert name in str(found)
    else:
        assert all(len(prompt.id) == 16 and prompt.text.strip() for prompt in found)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("p.jsonl", "[" * DEEP, "line 1 is not JSON"),
        ("p.json", "[" * DEEP, "not JSON"),
        ("p.json", "9" * 5000, "not JSON"),
        ("p.jsonl", '{"text": ' + "9" * 5000 + "}", "not JSON"),
        ("p.jsonl", '{"text": NaN}', "holds float, not text"),
        ("p.jsonl", '{"text": "a \\ud800 b"}', "half a character"),
        ("p.json", '[{"text": "\\udc00"}]', "half a character"),
        ("p.csv", "text\n" + "x" * 200_000, "field larger than field limit"),
        ("p.csv", 'text\n"' + "x\n" * 100_000, "field larger than field limit"),
        ("p.csv", "text\n\x00\n", ""),
        ("p.csv", "text\nTell me, if you can.\n", "line 2 has more fields than the first"),
        ("p.jsonl", '{"text": "a", "image": "../../../etc/none"}', "no such image"),
    ],
    ids=lambda text: text[:16],
)
def test_hostile_prompts_files(tmp_path, name, content, says):
    (tmp_path / name).write_text(content, encoding="utf-8")
    with little_memory():
        found = outcome(lambda: load_prompts(str(tmp_path / name)))
    assert says in str(found)


@pytest.mark.parametrize("name", ["p.txt", "p.jsonl", "p.csv"])
def test_a_line_without_end_is_not_read_to_its_end(tmp_path, name):
    with (tmp_path / name).open("wb") as file:
        file.write(b"text\n")
        file.truncate(1 << 32)  # 4 GB of zeros that take no room on the disk
    with little_memory(), pytest.raises(UsageError) as caught:
        load_prompts(str(tmp_path / name))
    assert name in str(caught.value)


def test_a_json_file_that_is_too_large_says_what_to_use(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "MAX_JSON", 10)
    (tmp_path / "p.json").write_text('["What is rain?"]')
    with pytest.raises(UsageError, match=r"larger than 10 bytes; valid: a \.jsonl file"):
        load_prompts(str(tmp_path / "p.json"))


# -------------------------------------------------------------------------------------------------------- checkpoints


def safetensors(path: Path, header: bytes | dict[str, object], size: int = 0, length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + bytes(size))
    return path


GOOD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "size", "length"),
    [
        ({"a": GOOD}, 8, 1 << 60),
        ({"a": GOOD}, 8, (1 << 64) - 1),
        ({"a": GOOD}, 8, 90_000_000),
        ({"a": GOOD, "b": {**GOOD, "data_offsets": [4, 12]}}, 12, None),
        ({"a": GOOD, "b": GOOD}, 8, None),
        ({"a": {**GOOD, "shape": [float("nan")]}}, 8, None),
        ({"a": {**GOOD, "shape": [float("inf")]}}, 8, None),
        (b'{"a": {"dtype": "F32", "dtype": "F16", "shape": [2], "data_offsets": [0, 8]}}', 8, None),
        (b'{"a":' * DEEP, 0, None),
        (b"[" * DEEP + b"]" * DEEP, 0, None),
        ({"a": {**GOOD, "shape": [1 << 62, 1 << 62], "data_offsets": [0, 1 << 63]}}, 8, None),
        ({"a": {**GOOD, "shape": [0, 1 << 62], "data_offsets": [0, 0]}}, 8, None),
        ({"a" * 100_000: {**GOOD, "dtype": "F99"}}, 8, None),
        ({f"{k}": {**GOOD, "shape": [0], "data_offsets": [0, 0]} for k in range(20_000)}, 1, None),
    ],
)
def test_hostile_safetensors_headers(tmp_path, header, size, length):
    path = safetensors(tmp_path / "model.safetensors", header, size, length)
    with little_memory():
        found = outcome(lambda: read_header(path))
    assert isinstance(found, UsageError)
    assert "model.safetensors" in str(found)


def test_a_file_of_many_gigabytes_is_judged_by_its_header(tmp_path):
    path = safetensors(
        tmp_path / "model.safetensors", {"a": {**GOOD, "shape": [1 << 33], "data_offsets": [0, 1 << 35]}}
    )
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size + (1 << 35))
    with little_memory():
        (entry,) = read_header(path)
    assert entry.nbytes == 1 << 35


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def pair(key: bytes, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def tensor(name: bytes, shape: tuple[int, ...], kind: int = 0, offset: int = 0, dims: int | None = None) -> bytes:
    sizes = b"".join(struct.pack("<Q", n) for n in shape)
    return (
        text(name) + struct.pack("<I", len(shape) if dims is None else dims) + sizes + struct.pack("<IQ", kind, offset)
    )


def gguf(pairs: list[bytes], tensors: list[bytes], size: int = 0, *, counts: tuple[int, int] | None = None) -> bytes:
    many = counts or (len(tensors), len(pairs))
    whole = struct.pack("<4sIQQ", b"GGUF", 3, *many) + b"".join(pairs) + b"".join(tensors)
    return whole + bytes(-len(whole) % 32 + size)


NESTED = struct.pack("<IQ", 9, 1) * DEEP
SOUND = gguf(
    [pair(b"general.architecture", 8, text(b"llama"))], [tensor(b"a", (4, 2)), tensor(b"b", (8,), offset=32)], 64
)

GGUFS = {
    "many pairs": gguf([], [], counts=(0, 1 << 60)),
    "many tensors": gguf([], [], counts=(1 << 60, 0)),
    "long text": gguf([struct.pack("<Q", 1 << 60)], []),
    "text beyond the end": gguf([struct.pack("<Q", 1 << 20)], []),
    "long array": gguf([pair(b"k", 9, struct.pack("<IQ", 4, 1 << 62))], [tensor(b"a", (2,))], 8),
    "long array of texts": gguf([pair(b"k", 9, struct.pack("<IQ", 8, 1 << 62))], [], 64),
    "arrays within arrays": gguf([pair(b"k", 9, NESTED)], []),
    "unknown kind": gguf([pair(b"k", 99, b"")], []),
    "many dimensions": gguf([], [tensor(b"a", (), dims=1 << 31)], 64),
    "same tensor twice": gguf([], [tensor(b"a", (2,)), tensor(b"a", (2,), offset=32)], 64),
    "overlap": gguf([], [tensor(b"a", (2,)), tensor(b"b", (2,), offset=4)], 64),
    "beyond the end": gguf([], [tensor(b"a", (2,), offset=1 << 62)], 64),
    "too large": gguf([], [tensor(b"a", (1 << 40, 1 << 40))], 64),
    "unknown type": gguf([], [tensor(b"a", (2,), kind=77)], 64),
    "name that is no text": gguf([], [tensor(b"\xff\xfe", (2,))], 64),
    "alignment 0": gguf([pair(b"general.alignment", 4, struct.pack("<I", 0))], [tensor(b"a", (2,))], 64),
    "alignment below 0": gguf([pair(b"general.alignment", 5, struct.pack("<i", -32))], [tensor(b"a", (2,))], 64),
    "alignment NaN": gguf([pair(b"general.alignment", 6, struct.pack("<f", float("nan")))], [tensor(b"a", (2,))], 64),
    "alignment of 4 GB": gguf([pair(b"general.alignment", 4, struct.pack("<I", 0xFFFFFFFF))], [tensor(b"a", (2,))], 64),
    "version 9": struct.pack("<4sIQQ", b"GGUF", 9, 0, 0),
    "big-endian": struct.pack(">4sIQQ", b"GGUF", 3, 0, 0),
    "empty": b"",
}


@pytest.mark.parametrize("name", GGUFS)
def test_hostile_gguf_headers(tmp_path, name):
    pytest.importorskip("gguf")
    (tmp_path / "m.gguf").write_bytes(GGUFS[name])
    with little_memory():
        found = outcome(lambda: layout(tmp_path / "m.gguf"))
    assert isinstance(found, UsageError)
    assert "m.gguf" in str(found)


@often
@given(damaged(SOUND))
def test_a_damaged_gguf_header_is_one_line_or_fits_the_file(tmp_path, whole):
    pytest.importorskip("gguf")
    (tmp_path / "m.gguf").write_bytes(whole)
    found = outcome(lambda: layout(tmp_path / "m.gguf"))
    assert isinstance(found, Layout | UsageError)
    if isinstance(found, Layout):
        ranges = sorted((t.begin, t.begin + t.nbytes) for t in found.tensors.values())
        assert all(0 <= begin <= end <= len(whole) for begin, end in ranges)
        assert all(one[1] <= other[0] for one, other in pairwise(ranges))


def test_the_sound_one_is_read(tmp_path):
    pytest.importorskip("gguf")
    (tmp_path / "m.gguf").write_bytes(SOUND)
    assert {name: t.shape for name, t in layout(tmp_path / "m.gguf").tensors.items()} == {"a": (2, 4), "b": (8,)}


# ---------------------------------------------------------------------------------------------- edits and directions

EDIT = Edit({"a.down_proj": ModuleEdit(torch.eye(4)[:1], 1.5, "column")}, {"model": "m"})
DIRECTIONS = Directions(torch.eye(4)[None, :1], torch.ones(1), torch.zeros(1, 4), torch.ones(1, 4)).with_diagnostics(
    d=[1]
)


def stored(made: Edit | Directions, path: Path) -> tuple[bytes, str, dict[str, torch.Tensor]]:
    """Return the bytes of a file, its JSON and its tensors."""
    made.save(path)
    with safe_open(path, framework="pt") as file:
        return path.read_bytes(), file.metadata()["perpend"], {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


@often
@given(st.data(), st.sampled_from([EDIT, DIRECTIONS]), st.booleans())
def test_a_damaged_edit_or_direction_is_one_line_or_sound(tmp_path, data, made, inside):
    path = tmp_path / "made.safetensors"
    whole, about, tensors = stored(made, path)
    if inside:
        text = data.draw(damaged(about.encode())).decode("utf-8", "replace")
        path.write_bytes(save(tensors, {"perpend": text}))
    else:
        path.write_bytes(data.draw(damaged(whole)))
    found = outcome(lambda: type(made).load(path))
    assert isinstance(found, type(made) | UsageError)
    if isinstance(found, UsageError):
        assert "made.safetensors" in str(found)
    else:
        found.save(tmp_path / "again.safetensors")
        assert isinstance(type(made).load(tmp_path / "again.safetensors"), type(made))


def changed(about: str, key: str, value: str) -> str:
    """Put raw JSON in the place of a key of the content; the key may be dotted."""
    data = json.loads(about)
    at = data
    *above, last = key.split(".")
    for name in above:
        at = at[name] if name != "*" else next(iter(at.values()))
    at[last] = "HERE"
    return json.dumps(data).replace('"HERE"', value)


HOSTILE = ("[]", "{}", "null", "7", '"x"', "[[1]]", '{"a": 1}', "9" * 5000, "1" + "0" * 400, "NaN", "1e999",
           "[" * DEEP + "]" * DEEP, '"' + "x" * 100_000 + '"')  # fmt: skip


@pytest.mark.parametrize(
    ("made", "key"),
    [
        *((EDIT, f"content{key}") for key in ("", ".modules", ".provenance", ".modules.*", ".modules.*.directions")),
        *((EDIT, f"content.modules.*.{key}") for key in ("weight", "mode")),
        *((DIRECTIONS, f"content{key}") for key in ("", ".method", ".diagnostics", ".diagnostics.d", ".provenance")),
        *((made, key) for made in (EDIT, DIRECTIONS) for key in ("kind", "version")),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_hostile_content_of_an_edit_or_direction(tmp_path, made, key):
    path = tmp_path / "made.safetensors"
    _, about, tensors = stored(made, path)
    refused = 0
    for value in HOSTILE:
        path.write_bytes(save(tensors, {"perpend": changed(about, key, value)}))
        with little_memory():
            found = outcome(lambda: type(made).load(path))
        assert isinstance(found, type(made) | UsageError), value[:20]
        if isinstance(found, UsageError):
            assert "made.safetensors" in str(found)
            refused += 1
        else:
            found.save(tmp_path / "again.safetensors")
    assert refused >= 3


@pytest.mark.parametrize("about", HOSTILE, ids=lambda text: text[:8])
def test_hostile_metadata_of_an_edit(tmp_path, about):
    path = tmp_path / "made.safetensors"
    path.write_bytes(save({"a": torch.eye(2)}, {"perpend": about}))
    for made in (Edit, Directions):
        assert isinstance(outcome(lambda made=made: made.load(path)), UsageError)


@pytest.mark.parametrize("made", [EDIT, DIRECTIONS], ids=["edit", "directions"])
def test_tensors_that_are_not_those_of_an_edit_or_direction(tmp_path, made):
    path = tmp_path / "made.safetensors"
    _, about, tensors = stored(made, path)
    for name, tensor in tensors.items():
        for other in (None, tensor.long(), tensor.to(torch.complex64), tensor[..., None], tensor[:0], tensor.double()):
            new = {key: value for key, value in tensors.items() if key != name}
            path.write_bytes(save(new | ({} if other is None else {name: other.contiguous()}), {"perpend": about}))
            found = outcome(lambda: type(made).load(path))
            assert isinstance(found, UsageError) != (other is not None and other.dtype == torch.float64), other
            assert not isinstance(found, UsageError) or "made.safetensors" in str(found)


# ------------------------------------------------------------------------------------- recipes beside an edit, reports


@pytest.mark.parametrize("result", ['"edit"', "7", "[]", '["edit"]', "true", "{edit = 1}", '{edit = "../edit"}'])
def test_a_result_that_is_none_in_the_recipe_beside_an_edit(tmp_path, result):
    EDIT.save(tmp_path / "edit.safetensors")
    (tmp_path / "recipe.toml").write_text(f"result = {result}\n", encoding="utf-8")
    assert isinstance(outcome(lambda: read_recipe(tmp_path / "recipe.toml")), UsageError)
    assert outcome(lambda: beside(tmp_path, EDIT)) is None or "recipe.toml" in str(
        outcome(lambda: beside(tmp_path, EDIT))
    )


@pytest.mark.parametrize("name", ["report.json", "demo.json", "bench.json", "front.json", "a.gguf.report.json"])
@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: text[:8])
def test_hostile_reports(tmp_path, name, text):
    if name == "front.json":
        (tmp_path / "report.json").write_text('{"task": "fit"}')
    given = tmp_path / "a.gguf" if name.startswith("a.gguf") else tmp_path
    parts = ("run", "bench", "front", "fit", "file", "vector", "diff", "organism", "earlier")
    each = [f'{{"task": "fit", "model": "m", "{part}": {text}}}' for part in parts]
    for held in (text, f'{{"task": "fit", "run": {text}, "bench": {text}, "front": {text}, "fit": {text}}}', *each):
        (tmp_path / name).write_text(held)
        found = outcome(lambda: write_report(given, dry_run=True))
        assert isinstance(found, WrittenPage | UsageError)


APART = {
    "a layer that is not there": {"layer": 2, "diagnostics": {"auc": [0.5]}, "raw_norm": [1.0, 1.0, 1.0]},
    "lists of two lengths": {"layer": 0, "diagnostics": {"auc": [0.5, 0.6]}, "raw_norm": [1.0], "cosines": [[1.0], []]},
}


@pytest.mark.parametrize("fit", APART.values(), ids=APART)
def test_a_report_whose_parts_do_not_fit_together(tmp_path, fit):
    held = {"task": "fit", "model": "m", "fit": fit, "edit": {"sha256": "s", "modes": [], "rank": 1, "layers": 1}}
    held["edit"]["modules"] = []
    (tmp_path / "report.json").write_text(json.dumps(held))
    found = outcome(lambda: write_report(tmp_path, dry_run=True))
    assert isinstance(found, UsageError)
    assert "not a report: its parts do not fit together" in str(found)
    assert beside_edit(tmp_path, "s") == {}  # whoever uses that edit goes on without it


@pytest.mark.parametrize("layer", [*HOSTILE, "-1", "1e9"], ids=lambda text: text[:8])
def test_a_layer_that_is_none_in_the_report_of_a_fit(tmp_path, layer):
    DIRECTIONS.save(tmp_path / "directions.safetensors")
    (tmp_path / "report.json").write_text(f'{{"fit": {{"layer": {layer}}}}}')
    found = outcome(lambda: vector(tmp_path, output=tmp_path / "v.gguf", dry_run=True))
    assert isinstance(found, UsageError)
