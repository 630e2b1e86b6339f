"""The page in a real browser: nothing fetched, no complaint, filters that work; and the JSON against its schema."""

from __future__ import annotations

import base64
import json
import re
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from markupsafe import escape

sys.path.insert(0, str(Path(__file__).parent.parent / "tasks"))

from task_cases import MACHINE, a_recipe

from perpend.errors import UsageError
from perpend.judges.corrections import corrections
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
CHANGES = [
    ("refuse", "comply"),
    ("refuse", "refuse"),
    ("refuse", "broken"),
    ("evade", "comply"),
    *[("comply",) * 2] * 8,
]
"""Labels of the pairs on the page, before and after."""
FILTERS = (
    {"before": "refuse"},
    {"after": "comply"},
    {"changed": 1},
    {"before": "refuse", "changed": 1, "class": "target"},
)
KEYS = {"class": "class", "before": "label_before", "after": "label_after"}
"""Of a pair in the JSON, by the name of a filter."""
ROLES = (
    *("image", "region", "button", "combobox", "checkbox", "searchbox"),
    *("link", "columnheader", "rowheader"),
)
ORDER = (
    *('href="#labels"', 'href="#provenance"', 'aria-label="Labels', 'aria-label="Drift"', "<summary>Write-leak"),
    *('name="class"', 'name="before"', 'name="after"', 'name="words"', 'name="changed"', 'id="open"', 'id="fold"'),
    *('type="reset"', '<summary><span class="q">', "<pre"),
)
"""What the tabulator key reaches, in this order."""
DOCS = Path(__file__).parent.parent.parent / "docs"


@pytest.fixture(scope="module")
def made(tmp_path_factory, pico_dir):
    """The folder of a run with a control, one of whose replies is hostile, and a front beside it."""
    folder = tmp_path_factory.mktemp("page")
    recipe = a_recipe(folder, eval={"control_prompts": 3}, prompts={"limit": 6})
    run(str(pico_dir("llama")), output=folder / "out", recipe=recipe, machine=MACHINE)
    path = folder / "out" / "report.json"
    data = json.loads(path.read_text())
    for pair, (before, after) in zip(data["report"]["pairs"], CHANGES, strict=True):
        pair |= {"label_before": before, "label_after": after}
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


@pytest.fixture(scope="module")
def judged(tmp_path_factory, pico_dir):
    """The folder of a run whose replies a dictionary and a classifier have judged."""
    folder = tmp_path_factory.mktemp("judged")
    recipe = a_recipe(folder, eval={"classifier": "perpend:small"}, prompts={"limit": 3})
    run(str(pico_dir("llama")), output=folder / "out", recipe=recipe, machine=MACHINE)
    return folder / "out"


def test_the_agreement_of_two_judges_is_a_matrix_per_class_and_side(judged):
    data = json.loads((judged / "report.json").read_text())
    page = (judged / "report.html").read_text()
    for when in ("before", "after"):
        for kind in ("target", "baseline"):
            side = data["report"][when][kind]
            table = page.split(f'aria-label="Agreement, {kind} prompts, {when}"')[1].split("</table>")[0]
            assert f"Agree on refused or not: {100 * side['agreement']['share']:.1f}\u202f%" in table
            counts = [int(n) for n in re.findall(r"<td>(\d+)</td>", table)]
            assert sum(counts) == len(side["replies"]) == 3
            rows = re.findall(r'scope="row">(\w+)', table)
            names = {"accepted": "comply", "refused": "refuse", "evaded": "evade", "broken": "broken"}
            assert {names[row] for row in rows} == {reply["dictionary"]["label"] for reply in side["replies"]}
    assert "Dictionary only" not in page


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
    sides = [data["report"][when]["target"] for when in ("before", "after")]
    (told,) = corrections(*sides)
    for when, side in zip(("before", "after"), sides, strict=True):
        assert side["language"] == "en"
        right, complying = side["corrected"]["accepted_of_complying"]
        assert f"{right} of {complying} replies that comply" in side["correction"]
        low, high = side["corrected"]["interval"]
        assert f"{side['corrected']['share']:.1%} [{low:.1%}, {high:.1%}] {when}" in told
    assert str(escape(f"{told[0].upper()}{told[1:]}.")) in (made / "report.html").read_text()
    assert told in (made / "README.md").read_text()


def test_the_page_shows_the_corrected_rate_of_both_sides_or_why_one_has_none(made):
    data = json.loads((made / "report.json").read_text())
    old, new = (data["report"][when]["target"] for when in ("before", "after"))
    new["corrected"] |= {"share": 0.314, "interval": [0.1, 0.7]}
    row = render(read(data, "report.json")).split("corrected for the judges’ error</th>")[1].split("</tr>")[0]
    assert row.count("<td>") == 2
    assert f"{100 * old['corrected']['share']:.1f}" in row.split("<td>")[1]
    assert "31.4" in row.split("<td>")[2]
    old |= {"corrected": None, "correction": "not corrected: <b>too few</b>"}
    page = render(read(data, "report.json"))
    notes = re.findall(r'<p class="note">(.*?)</p>', page.split("</section>")[0])
    assert notes[0] == "Before: not corrected: &lt;b&gt;too few&lt;/b&gt;."
    assert notes[1].startswith("After: accepted, corrected for the judges")


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
    assert wide(browser) == []


def wide(browser) -> list[str]:
    """The parts of the page that cannot be read without scrolling them sideways."""
    return browser.execute_script("""
        return [...document.querySelectorAll('.scroll, pre')].filter(x => x.checkVisibility())
            .filter(x => x.scrollWidth > x.clientWidth + 1).map(x => x.getAttribute('aria-label') || x.textContent)""")


def shown(browser) -> int:
    return browser.execute_script(
        "return [...document.querySelectorAll('#pairs>details')].filter(x => x.checkVisibility()).length"
    )


def test_filters_show_what_they_name_and_can_be_cleared(made, browser, look):
    from selenium.webdriver.support.ui import WebDriverWait

    look(390, "dark")
    browser.get((made / "report.html").as_uri())
    pairs = json.loads((made / "report.json").read_text())["report"]["pairs"]
    whole = len(pairs)
    assert shown(browser) == whole == len(CHANGES)
    assert not browser.find_elements("css selector", "#pairs > details[open]")
    browser.find_element("name", "words").send_keys("onerror")
    assert shown(browser) == 1
    assert browser.find_element("id", "count").text == f"1 of {whole} prompts"
    browser.find_element("id", "open").click()
    assert len(browser.find_elements("css selector", "#pairs > details[open]")) == 1
    browser.find_element("id", "fold").click()
    assert not browser.find_elements("css selector", "#pairs > details[open]")
    clear = browser.find_element("css selector", "#filter button[type=reset]")
    clear.click()
    WebDriverWait(browser, 5).until(lambda b: shown(b) == whole)  # the page looks once the fields are empty
    for asked in FILTERS:
        for name, value in asked.items():
            field = browser.find_element("name", name)
            if name == "changed":
                field.click()
            else:
                field.send_keys(field.find_element("css selector", f"option[value={value}]").text)
        expected = [
            pair
            for pair in pairs
            if all(pair[key] == asked.get(name, pair[key]) for name, key in KEYS.items())
            and ("changed" not in asked or pair["label_before"] != pair["label_after"])
        ]
        assert 0 < len(expected) < whole, asked
        assert shown(browser) == len(expected), asked
        clear.click()
        WebDriverWait(browser, 5).until(lambda b: shown(b) == whole)


def test_everything_can_be_reached_and_opened_by_keyboard(made, browser, look):
    from selenium.webdriver.common.keys import Keys

    look(1100, "light")
    browser.get((made / "report.html").as_uri())

    def here():
        return browser.execute_script("return document.activeElement.outerHTML.slice(0, 90)")

    browser.find_element("css selector", "body").send_keys(Keys.TAB)
    assert 'class="skip"' in here()
    assert browser.execute_script("return document.activeElement.getBoundingClientRect().left >= 0")
    reached = []
    while len(reached) < 200 and "<body" not in here():
        reached.append(here())
        assert browser.execute_script("return getComputedStyle(document.activeElement).outlineStyle") == "solid", here()
        browser.switch_to.active_element.send_keys(Keys.TAB)
    order = [next((k for k, found in enumerate(reached) if mark in found), -1) for mark in ORDER]
    assert order == sorted(order), list(zip(ORDER, order, strict=True))
    assert order[0] > 0
    assert sum('<summary><span class="q">' in found for found in reached) == len(CHANGES)
    first = browser.find_element("css selector", "#pairs summary")
    first.send_keys(Keys.ENTER)
    assert browser.find_element("css selector", "#pairs details[open] .reply").is_displayed()


def test_a_screen_reader_is_told_what_every_part_is(judged, made, browser, look):
    look(390, "light")
    for folder in (judged, made):
        browser.get((folder / "report.html").as_uri())
        browser.execute_script("document.querySelectorAll('details').forEach(x => x.open = true)")
        nodes = [n for n in browser.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"] if not n["ignored"]]

        def named(role, nodes=nodes):
            found = [n for n in nodes if n["role"]["value"] == role]
            return [n.get("name", {}).get("value", "") for n in found]

        for role in ("banner", "navigation", "main", "contentinfo", "form", "status"):
            assert len(named(role)) == 1, role
        figures = len(browser.find_elements("css selector", "svg.fig"))
        assert len(named("image")) == figures > 4
        for role in ROLES:
            assert named(role), role
            assert "" not in named(role), role
        assert len(named("table")) == len(browser.find_elements("css selector", "table"))
        levels = browser.execute_script("return [...document.querySelectorAll('h1,h2,h3,h4')].map(x => +x.tagName[1])")
        assert levels[0] == 1
        assert levels.count(1) == 1
        assert all(b <= a + 1 for a, b in pairwise(levels)), levels


def test_on_paper_nothing_is_dark_or_cut_off(judged, browser, look):
    look(688, "dark")  # A4 between its margins
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia",
        {"media": "print", "features": [{"name": "prefers-color-scheme", "value": "dark"}]},
    )
    browser.get((judged / "report.html").as_uri())
    browser.execute_script("document.querySelectorAll('details').forEach(x => x.open = true)")
    assert browser.execute_script("return getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert wide(browser) == []
    for hidden in ("nav", "#filter"):
        assert not browser.find_element("css selector", hidden).is_displayed()
    size = "return parseFloat(getComputedStyle(document.querySelector(arguments[0])).fontSize)"
    body, *smaller = (browser.execute_script(size, part) for part in ("body", ".note", "td", ".verdict span"))
    assert max(smaller) <= body < 14
    made = browser.execute_cdp_cmd("Page.printToPDF", {"preferCSSPageSize": True})["data"]
    assert base64.b64decode(made).startswith(b"%PDF")
