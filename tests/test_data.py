"""Prompts: every format gives the same set, splits are disjoint and fixed, what is wrong is one line."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import pytest

from perpend.config import PromptsSection
from perpend.data import (
    SPLITS,
    Prompt,
    PromptSet,
    load_prompts,
    load_splits,
    near_duplicates,
    normalised,
    require_disjoint,
    split_by_hash,
)
from perpend.errors import MissingExtra, UsageError

TEXTS = [f"Question number {n}, about „things“?" for n in range(20)]


def write(path: Path, texts=TEXTS, column: str = "text", **extra: str) -> str:
    rows = [{column: text, **extra} for text in texts]
    if path.suffix == ".txt":
        path.write_text("\n".join(texts) + "\n\n", encoding="utf-8")
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, rows[0], delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    return str(path)


@pytest.mark.parametrize("suffix", ["txt", "jsonl", "json", "csv", "tsv", "parquet"])
def test_every_format_gives_the_same_prompts(tmp_path: Path, suffix: str) -> None:
    found = load_prompts(write(tmp_path / f"p.{suffix}"))
    assert [p.text for p in found] == TEXTS
    assert found.fingerprint == PromptSet("", tuple(map(Prompt, TEXTS))).fingerprint


@pytest.mark.parametrize("column", ["text", "prompt", "instruction", "question", "goal"])
def test_usual_columns_are_found_and_others_named(tmp_path: Path, column: str) -> None:
    assert len(load_prompts(write(tmp_path / "p.jsonl", column=column, topic="x"))) == 20
    path = write(tmp_path / "q.jsonl", column="utterance")
    assert len(load_prompts(f"{path}#column=utterance")) == 20
    with pytest.raises(UsageError, match=r"which column .* utterance"):
        load_prompts(path)
    with pytest.raises(UsageError, match=r"no column 'utterence'.*valid: utterance.*did you mean 'utterance'"):
        load_prompts(f"{path}#column=utterence")


def test_labels_and_images_are_read(tmp_path: Path) -> None:
    (tmp_path / "cat.png").write_bytes(b"a cat")
    path = write(tmp_path / "p.jsonl", topic="cats", form="question", picture="cat.png")
    first = load_prompts(f"{path}#image=picture")[0]
    assert (first.topic, first.form, first.image) == ("cats", "question", str(tmp_path / "cat.png"))
    assert load_prompts(path)[0].image is None
    assert first.id != load_prompts(path)[0].id


def test_an_image_is_found_beside_the_file_and_counts_by_its_bytes(tmp_path: Path) -> None:
    for folder, name in (("a", "cat.png"), ("b", "tom.png")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_bytes(b"a cat")
        write(tmp_path / folder / "p.jsonl", image=name)
    one, other = (load_prompts(tmp_path_file) for tmp_path_file in (str(tmp_path / x / "p.jsonl") for x in "ab"))
    assert one[0].image == str(tmp_path / "a" / "cat.png")
    assert one.fingerprint == other.fingerprint
    (tmp_path / "b" / "tom.png").write_bytes(b"another cat")
    assert load_prompts(str(tmp_path / "b" / "p.jsonl")).fingerprint != one.fingerprint
    (tmp_path / "b" / "tom.png").unlink()
    with pytest.raises(UsageError, match="no such image"):
        load_prompts(str(tmp_path / "b" / "p.jsonl"))


def test_lists_of_texts_are_read(tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text(json.dumps(TEXTS))
    assert len(load_prompts(str(tmp_path / "p.json"))) == 20


def test_two_spellings_of_a_prompt_are_one(tmp_path: Path) -> None:
    texts = ["Hello  there", " hello there ", "HELLO\tTHERE", "ﬁne", "fine", "", "other"]
    found = load_prompts(write(tmp_path / "p.jsonl", texts))
    assert [p.text for p in found] == ["Hello  there", "ﬁne", "other"]
    assert normalised("ＡＢ  c\n") == "ab c"
    assert Prompt("A b").id == Prompt("a  B ", topic="x").id
    assert len(Prompt("a").id) == 16


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("p.jsonl", "", "no prompts"),
        ("p.txt", "\n \n", "no prompts"),
        ("p.jsonl", '{"text": "a"}\n{"text": \n', "line 2 is not JSON"),
        ("p.jsonl", '{"text": ["a"]}\n', "holds list, not text"),
        ("p.jsonl", "3\n", "neither texts nor objects"),
        ("p.json", "{}", "holds no list"),
        ("p.json", "[", "not JSON"),
        ("p.parquet", "hello", "not a parquet file"),
    ],
)
def test_what_cannot_be_read_is_one_line(tmp_path: Path, name: str, content: str, says: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UsageError, match=says) as caught:
        load_prompts(str(tmp_path / name))
    assert "\n" not in str(caught.value)
    assert name in str(caught.value)


def test_other_encodings_are_refused(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_bytes("Grüße".encode("latin-1"))
    with pytest.raises(UsageError, match="UTF-8"):
        load_prompts(str(tmp_path / "p.txt"))


def test_splits_are_disjoint_complete_and_fixed_by_the_texts() -> None:
    prompts = PromptSet("target", tuple(map(Prompt, TEXTS)))
    parts = split_by_hash(prompts)
    assert [len(parts[s]) for s in SPLITS] == [10, 4, 6]
    assert sorted(p.text for s in SPLITS for p in parts[s]) == sorted(TEXTS)
    again = split_by_hash(PromptSet("", tuple(map(Prompt, TEXTS[::-1]))))
    assert all({p.id for p in again[s]} == {p.id for p in parts[s]} for s in SPLITS)
    assert [p.text for p in parts["fit"]] != TEXTS[:10], "not by position"
    small = split_by_hash(PromptSet("", tuple(map(Prompt, TEXTS[:3]))))
    assert [len(small[s]) for s in SPLITS] == [1, 1, 1]
    with pytest.raises(UsageError, match="2 prompts cannot be split"):
        split_by_hash(PromptSet("", tuple(map(Prompt, TEXTS[:2]))))


def section(tmp_path: Path, **kwargs) -> PromptsSection:
    files = {
        "target": write(tmp_path / "t.txt", [f"target {n}" for n in range(20)]),
        "baseline": write(tmp_path / "b.txt", [f"baseline {n}" for n in range(20)]),
    }
    return PromptsSection(**{**files, **kwargs})


def test_one_source_of_each_class_is_split(tmp_path: Path) -> None:
    splits = load_splits(section(tmp_path))
    assert [len(s) for s in splits.sets()] == [10, 10, 4, 4, 6, 6]
    assert [s.name for s in splits.sets()][:3] == ["target.fit", "baseline.fit", "target.select"]
    require_disjoint(splits.sets())


def test_the_limit_holds_for_each_class_and_split_after_splitting(tmp_path: Path) -> None:
    whole, limited = load_splits(section(tmp_path)), load_splits(section(tmp_path, limit=5))
    assert [len(s) for s in limited.sets()] == [5, 5, 4, 4, 5, 5]
    for a, b in zip(whole.sets(), limited.sets(), strict=True):
        assert {p.id for p in b} <= {p.id for p in a}
    smaller = load_splits(section(tmp_path, limit=2))
    assert {p.id for p in smaller.fit.target} <= {p.id for p in limited.fit.target}


def test_a_set_is_a_sequence_with_subsets() -> None:
    whole = PromptSet("target.fit", tuple(map(Prompt, TEXTS)), "x")
    part = whole.subset([Prompt("else"), whole[7], whole[2]])
    assert list(part) == [whole[2], whole[7]]
    assert (part.name, part.source) == ("target.fit", "x")
    assert whole[:2] == (Prompt(TEXTS[0]), Prompt(TEXTS[1]))
    assert whole.fingerprint != part.fingerprint


def test_splits_with_sources_of_their_own(tmp_path: Path) -> None:
    own = write(tmp_path / "r.txt", [f"report {n}" for n in range(7)])
    more = write(tmp_path / "s.txt", [f"select {n}" for n in range(3)])
    both = load_splits(section(tmp_path, target_report=own, target_select=more))
    assert [len(pair.target) for pair in (both.fit, both.select, both.report)] == [20, 3, 7]
    one = load_splits(section(tmp_path, target_report=own))
    assert [len(pair.target) for pair in (one.fit, one.select, one.report)] == [14, 6, 7]
    assert len(one.fit.baseline) == 10


def test_overlap_is_refused_by_hash(tmp_path: Path) -> None:
    own = write(tmp_path / "r.txt", ["report 1", " TARGET  3"])
    with pytest.raises(UsageError, match=r"target\.\w+ and target\.report share 1 prompts, such as '.*3'"):
        load_splits(section(tmp_path, target_report=own))
    with pytest.raises(UsageError, match="share"):
        load_splits(section(tmp_path, baseline=str(tmp_path / "t.txt")))
    with pytest.raises(UsageError, match="share"):  # the limit does not hide it
        load_splits(section(tmp_path, target_report=own, limit=1))


def test_an_empty_class_is_refused(tmp_path: Path) -> None:
    (tmp_path / "e.txt").touch()
    with pytest.raises(UsageError, match=r"e\.txt: no prompts"):
        load_splits(section(tmp_path, baseline=str(tmp_path / "e.txt")))


def test_shipped_prompts_come_split() -> None:
    splits = load_splits(PromptsSection())
    for pair, least in ((splits.fit, 256), (splits.select, 128), (splits.report, 200)):
        assert len(pair.target) >= least
        assert len(pair.baseline) >= least
    assert len(load_prompts("perpend:target")) == sum(len(p.target) for p in (splits.fit, splits.select, splits.report))
    assert load_prompts("perpend:baseline#split=report").fingerprint == splits.report.baseline.fingerprint
    assert len(load_splits(PromptsSection(limit=4)).report.target) == 4
    with pytest.raises(UsageError, match="no split 'test'"):
        load_prompts("perpend:target#split=test")
    first = load_prompts("perpend:target#split=fit[:5]")
    assert first.prompts == splits.fit.target.prompts[:5]
    assert load_prompts("perpend:target#split=fit[5:7]").prompts == splits.fit.target.prompts[5:7]
    with pytest.raises(UsageError, match=r"no split 'fit\[a:\]'"):
        load_prompts("perpend:target#split=fit[a:]")


SHIPPED = {
    "target.fit": "19e43698a73d5d127fc4bd9b889e06a937a6b9803ebaa93c56ae74501b4ad407",
    "baseline.fit": "90fbb7950fa0be705498dd610265dd2369d602fb6e028e279ffdf488f3283ea3",
    "target.select": "f6ea066528fbe5172ebffee622406ac0fe5ac90788ba74d023fa436ebe018d7c",
    "baseline.select": "7b1e1b5fe1f98341c7c27bf887a06b32a0c7ff2311614300e57afe72594a1ee3",
    "target.report": "83f3c694e63e2dad960627fa09bd80465bd25a859d6c41a11845a0a1d31c6374",
    "baseline.report": "b0d18470171388fc64a0be2c233cd308ec93ee15b80d1a785ddc30d15facbaa8",
}
"""Figures are comparable only over the same prompts: change these together with the version of the package."""


def test_shipped_prompts_are_the_ones_that_figures_were_measured_on() -> None:
    assert {s.name: s.fingerprint for s in load_splits(PromptsSection()).sets()} == SHIPPED


def test_parquet_without_its_package_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "p.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingExtra, match=r"p\.parquet needs the package pyarrow.*perpend\[parquet\]"):
        load_prompts(str(tmp_path / "p.parquet"))


def test_shipped_splits_hold_no_near_duplicates() -> None:
    splits = load_splits(PromptsSection())
    assert near_duplicates([splits.report.target, splits.fit.target, splits.select.target], 0.5) == []
    assert near_duplicates([splits.report.baseline, splits.fit.baseline, splits.select.baseline], 0.5) == []


@pytest.mark.parametrize("name", ["target", "baseline"])
def test_prompts_to_teach_from_share_none_with_the_shipped_splits(name: str) -> None:
    splits = load_splits(PromptsSection())
    taught = load_prompts(str(Path(__file__).parents[1] / "examples" / "organism" / f"{name}.txt"))
    shipped = [getattr(split, name) for split in (splits.fit, splits.select, splits.report)]
    assert len(taught) == 4748
    assert [found for found in near_duplicates([*shipped, taught], 0.5) if found[2] in tuple(taught)] == []


def test_near_duplicates_are_found_between_sets_only() -> None:
    a, b = (
        Prompt("How do I bake a loaf of rye bread at home?"),
        Prompt("How do I bake a loaf of rye bread, at home today?"),
    )
    other = Prompt("Name three rivers.")
    ((similarity, first, second),) = near_duplicates([PromptSet("", (a, other)), PromptSet("", (b,))])
    assert (first, second) == (a, b)
    assert similarity == pytest.approx(9 / 10)
    assert near_duplicates([PromptSet("", (a, b, other))]) == []
    assert near_duplicates([PromptSet("", (a,)), PromptSet("", (b,))], 0.95) == []


def test_a_hub_set_is_read_by_split_and_column(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    calls: list[tuple] = []

    def load_dataset(name, config=None, *, revision=None, split=None):
        calls.append((name, config, revision, split))
        if split is None:
            return {"train": [], "test": []}
        if split == "none":
            raise ValueError("Unknown split\nmore")
        return iter([{"text": text, "n": 1} for text in TEXTS])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert len(load_prompts("org/set@abc#split=train[:400],column=text")) == 20
    assert calls == [("org/set", None, "abc", "train[:400]")]
    with pytest.raises(UsageError, match=r"which split\?.*valid: train, test.*#split=train"):
        load_prompts("org/set")
    with pytest.raises(UsageError, match=r"Unknown split$"):
        load_prompts("org/set#split=none")
    with pytest.raises(UsageError, match="no column 'txt'"):
        load_prompts("org/set#split=train,column=txt")
