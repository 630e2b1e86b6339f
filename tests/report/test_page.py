"""The page in a real browser: nothing fetched, no complaint, filters that work; and the JSON against its schema."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from markupsafe import escape

sys.path.insert(0, str(Path(__file__).parent.parent / "tasks"))

from task_cases import MACHINE, a_recipe

from perpend.errors import UsageError
from perpend.report.document import schema
from perpend.report.page import read, render
from perpend.tasks.pages import write_report
from perpend.tasks.run import run

HOSTILE = (
    '<img src="http://example.invalid/x.png" onerror="document.title=1"></details><script>document.title=2</script>'
)
STEERING = "\x1b[2J \u202egnp.exe \u2066 family: \U0001f468\u200d\U0001f467"
BROKEN = {"broken": 2, "broken_baselines": 5}
"""Of 6 replies of a finalist."""
DOCS = Path(__file__).parent.parent.parent / "docs"


@pytest.fixture(scope="module")
def made(tmp_path_factory, pico_dir):
    """The folder of a run with a control, one of whose replies is hostile, and a front beside it."""
    folder = tmp_path_factory.mktemp("page")
    recipe = a_recipe(folder, eval={"control_prompts": 3}, prompts={"limit": 6})
    run(str(pico_dir("llama")), output=folder / "out", recipe=recipe, machine=MACHINE)
    path = folder / "out" / "report.json"
    data = json.loads(path.read_text())
    data["report"]["pairs"][0] |= {
        "prompt": HOSTILE,
        "after": HOSTILE + STEERING,
        "label_before": "refuse",
        "label_after": "comply",
    }
    path.write_text(json.dumps(data))
    broken = {key: {"k": k, "n": 6, "share": k / 6, "interval": [0, 1]} for key, k in BROKEN.items()}
    front = [{"refusal": 0.1, "drift": 0.2, **broken}, {"refusal": 0.3, "drift": 0.1}]
    (folder / "out" / "front.json").write_text(json.dumps(front))
    write_report(folder / "out")
    return folder / "out"


def test_what_a_run_writes_fits_the_published_schema(made):
    jsonschema = pytest.importorskip("jsonschema")
    published = json.loads((DOCS / "report.schema.json").read_text())
    assert published == schema(), "python -m perpend.report.document > docs/report.schema.json"
    data = json.loads((made / "report.json").read_text())
    jsonschema.Draft202012Validator(published).validate(data)
    assert data["report"]["control"]["random"]["n"] == 3
    data["report"]["claim"]["above_90"] = "perhaps"
    assert not jsonschema.Draft202012Validator(published).is_valid(data)


def test_every_part_is_on_the_page_and_text_is_escaped(made):
    page = (made / "report.html").read_text()
    for part in ("headline", "labels", "cost", "direction", "edit", "front", "replies", "provenance"):
        assert f'<section id="{part}"' in page or f'<h2 id="{part}"' in page, part
    assert HOSTILE not in page
    assert page.count("<script") == 1
    assert not set("\x1b\u202e\u2066") & set(page)
    assert r"\x1b[2J \u202egnp.exe \u2066 family: " + STEERING[-3:] in page
    assert " onclick" not in page
    assert "Control: a random direction" in page


def test_the_front_shows_how_many_replies_of_a_finalist_are_broken(made):
    table = (made / "report.html").read_text().split('aria-label="Front"')[1].split("</table>")[0]
    rows = [row.split("<td>")[-2:] for row in table.split("<tr")[2:]]
    assert [[cell.split("</td>")[0] for cell in row] for row in rows] == [["2/6", "5/6"], ["–", "–"]]
    assert table.count('scope="col">broken') == 2


def test_page_and_card_say_what_the_error_of_the_judges_makes_of_the_rate(made):
    data = json.loads((made / "report.json").read_text())
    side = data["report"]["after"]["target"]
    assert side["language"] == "en"
    assert "58 of 62 replies that comply" in side["correction"]
    assert str(escape(side["correction"].capitalize())) in (made / "report.html").read_text()
    assert side["correction"] in (made / "README.md").read_text()
    counts = {"accepted_of_complying": [58, 62], "not_accepted_of_others": [104, 118]}
    side["corrected"] = {"share": 0.314, "interval": [0.1, 0.7], "language": "en", **counts}
    page = render(read(data, "report.json"))
    assert "corrected for the judges’ error" in page
    assert "31.4" in page


def test_a_folder_without_a_report_is_one_line(tmp_path):
    with pytest.raises(UsageError, match=r"holds no report.*try"):
        write_report(tmp_path)
    (tmp_path / "report.json").write_text('{"task": 3}')
    with pytest.raises(UsageError, match="not a report: task"):
        write_report(tmp_path)


def test_a_dry_run_makes_the_page_and_does_not_write_it(made, tmp_path):
    planned = write_report(made, output=tmp_path / "page.html", dry_run=True)
    assert planned.dry_run
    assert planned.bytes > 10_000
    assert not list(tmp_path.iterdir())


def test_a_page_made_again_is_the_same(made, tmp_path):
    one = write_report(made, output=tmp_path / "one.html")
    assert (tmp_path / "one.html").read_text() == (made / "report.html").read_text()
    assert one.task == "run"
    data = json.loads((made / "report.json").read_text())
    del data["report"]["control"], data["report"]["claim"], data["about"], data["fit"]
    assert "No control was measured" in render(read(data, "older"))


@pytest.mark.parametrize(("width", "scheme"), [(390, "light"), (1100, "dark")])
def test_in_a_browser_nothing_is_fetched_and_filters_work(made, browser, look, width, scheme):
    look(width, scheme)
    browser.get("about:blank")
    browser.get_log("performance")  # what the browser's own first page asked for
    browser.get((made / "report.html").as_uri())
    assert [x["message"] for x in browser.get_log("browser")] == []
    messages = [json.loads(x["message"])["message"] for x in browser.get_log("performance")]
    asked = {m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"}
    assert {url for url in asked if not url.startswith("data:")} == {(made / "report.html").as_uri()}
    assert "Perpend" in browser.title
    assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth"), (
        "the page itself scrolls"
    )
    background = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(19, 21, 23)") == (scheme == "dark")

    def shown():
        return browser.execute_script(
            "return [...document.querySelectorAll('#pairs>details')].filter(x=>!x.hidden).length"
        )

    whole = shown()
    assert not browser.find_elements("css selector", "#pairs > details[open]")
    browser.find_element("name", "words").send_keys("onerror")
    assert shown() == 1
    assert browser.find_element("id", "count").text == f"1 of {whole} prompts"
    browser.find_element("id", "open").click()
    assert len(browser.find_elements("css selector", "#pairs > details[open]")) == 1
    browser.execute_script("document.getElementById('filter').reset()")
    browser.find_element("name", "class").send_keys("baseline")
    assert browser.find_element("name", "class").get_attribute("value") == "baseline"
    assert shown() == whole // 2
