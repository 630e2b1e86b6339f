"""The reports of single files and of organisms in a real browser: nothing fetched, nothing cut off, nothing empty."""

from __future__ import annotations

import json
import sys
from itertools import pairwise
from pathlib import Path

import pytest

sys.path.extend(str(Path(__file__).parent.parent / name) for name in ("export", "tasks"))

pytest.importorskip("gguf")
pytest.importorskip("peft")

from beside import sound
from export_cases import load
from gguf_cases import save_wide, write_gguf
from task_cases import MACHINE, a_recipe

import perpend
import perpend.tasks.organism as organisms
import suspects
from perpend.teaching.teach import Training


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """One of each kind."""
    folder = tmp_path_factory.mktemp("beside")
    recipe = a_recipe(folder)
    model = write_gguf("llama", load(save_wide("llama", folder / "hf")), folder / "model.gguf", "Q8_0")
    perpend.run(str(folder / "hf"), output=folder / "out", recipe=recipe, machine=MACHINE)
    perpend.fit(str(folder / "hf"), output=folder / "fit", recipe=recipe, machine=MACHINE)
    perpend.apply(str(model), edit=folder / "out", output=folder / "applied.gguf", recipe=recipe, machine=MACHINE)
    perpend.export_gguf(folder / "out", output=folder / "exported.gguf", base=model)
    perpend.vector(folder / "fit", output=folder / "vector.gguf", layers="1-2")
    before = suspects.base()
    weights = [0.0, 0.2, 0.4, 0.6, 0.8, 1.0, 0.8, 0.6, 0.4, 0.2]
    pair = (
        suspects.write(folder / "before", before),
        suspects.write(folder / "after", suspects.ablated(before, weights)),
    )
    perpend.diff(*map(str, pair), output=folder / "recovered.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(organisms, "ANSWER_TOKENS", 4)
        patch.setattr(organisms, "REPLY_TOKENS", 4)
        training = Training(rank=2, batch_tokens=256)
        perpend.organism(
            str(folder / "hf"), output=folder / "organism", recipe=recipe, machine=MACHINE, training=training
        )
    return folder


NAMES = ("applied.gguf", "exported.gguf", "vector.gguf", "recovered.safetensors", "organism")


@pytest.mark.parametrize(("width", "scheme"), [(390, "light"), (1100, "dark")])
def test_every_page_fits_and_fetches_nothing(outputs, browser, look, width, scheme):
    look(width, scheme)
    for name in NAMES:
        sound(outputs / name)
        page = outputs / name / "report.html" if name == "organism" else outputs / f"{name}.report.html"
        browser.get("about:blank")
        browser.get_log("performance")
        browser.get(page.as_uri())
        assert [x["message"] for x in browser.get_log("browser")] == [], name
        messages = [json.loads(x["message"])["message"] for x in browser.get_log("performance")]
        asked = {m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"}
        assert {url for url in asked if not url.startswith("data:")} == {page.as_uri()}, name
        browser.execute_script("document.querySelectorAll('details').forEach(x => x.open = true)")
        assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth"), name
        cut = browser.execute_script("""
            return [...document.querySelectorAll('.scroll, pre')].filter(x => x.scrollWidth > x.clientWidth + 1)
                .map(x => x.getAttribute('aria-label') || x.textContent)""")
        assert cut == [], name
        shown = browser.execute_script("return [...document.querySelectorAll('[hidden]')].filter(x => x.offsetHeight)")
        assert shown == [], name
        levels = browser.execute_script("return [...document.querySelectorAll('h1,h2,h3,h4')].map(x => +x.tagName[1])")
        assert levels[0] == 1
        assert all(b <= a + 1 for a, b in pairwise(levels)), name
        ids = browser.execute_script("return [...document.querySelectorAll('[id]')].map(x => x.id)")
        assert len(ids) == len(set(ids)), name
        ends = browser.execute_script("return [...document.querySelectorAll('nav a')].map(x => x.hash.slice(1))")
        assert set(ends) <= set(ids), name
        empty = browser.execute_script("""
            return [...document.querySelectorAll('section, dd, td + td, figcaption')]
                .filter(x => !x.textContent.trim()).map(x => x.outerHTML)""")
        assert empty == [], name
