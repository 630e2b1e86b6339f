"""The page in a real browser: two answers grow, the scale changes one of them, and nothing is fetched elsewhere."""

from __future__ import annotations

import json
import time

import pytest
from served import a_duet, listening

HOSTILE = '<img src="http://example.invalid/x.png" onerror="document.title=1"><script>document.title=2</script> '


@pytest.fixture(scope="module")
def duet(pico_dir):
    return a_duet(pico_dir("llama"))


@pytest.fixture
def url(duet, monkeypatch):
    """A server whose answers have markup in them."""
    decode = duet.session.chat.decode
    monkeypatch.setattr(duet.session.chat, "decode", lambda ids: HOSTILE + decode(ids))
    with listening(duet, max_new_tokens=40) as found:
        yield found


def until(browser, script, *arguments):
    end = time.monotonic() + 20
    while time.monotonic() < end:
        if found := browser.execute_script(f"return {script}", *arguments):
            return found
        time.sleep(0.03)
    raise AssertionError(f"never: {script}; {browser.find_element('id', 'alert').text}")


def cards(browser) -> dict[str, dict[str, str]]:
    """The last answers by side: heading, text, label, note."""
    return browser.execute_script("""
        const text = (node, part) => node.querySelector(part).textContent, found = {};
        for (const x of [...document.querySelectorAll('.turn')].at(-1).querySelectorAll('.answer'))
            found[x.classList[1]] = {heading: text(x, 'h3'), text: text(x, '.text'), label: text(x, '.chip'),
                note: text(x, '.note')};
        return found""")


READY = "document.getElementById('about').textContent.includes('pico')"
WATCH = """
    window.grown = [];
    new MutationObserver(() => {
        const busy = [...document.querySelectorAll('.answer[aria-busy=true] .text')].map(x => x.textContent.length);
        if (busy.length == 2) window.grown.push(busy);
    }).observe(document.getElementById('talk'), {subtree: true, childList: true, characterData: true})"""
DONE = """!document.querySelector('.answer[aria-busy=true]') && !document.getElementById('send').hidden
          && document.getElementById('status').textContent"""


def ask(browser, words):
    browser.find_element("id", "words").send_keys(words)


@pytest.mark.parametrize(("width", "scheme"), [(390, "light"), (1100, "dark")])
def test_two_answers_grow_side_by_side_and_the_scale_changes_one(url, duet, browser, look, width, scheme):
    from selenium.webdriver.common.keys import Keys

    look(width, scheme)
    browser.get("about:blank")
    browser.get_log("performance")  # what the browser's own first page asked for
    browser.get(url)
    until(browser, READY)
    assert browser.switch_to.active_element.get_attribute("id") == "words"
    browser.execute_script(WATCH)
    ask(browser, "What is <b>bread</b>?" + Keys.ENTER)
    until(browser, DONE)
    first = cards(browser)
    grown = browser.execute_script("return window.grown")
    assert len({base for base, _ in grown}) > 5
    assert len({edited for _, edited in grown}) > 5
    assert any(
        0 < base < len(first["base"]["text"]) and 0 < edited < len(first["edited"]["text"]) for base, edited in grown
    )
    assert first["base"]["text"].startswith(HOSTILE.strip()[:40])
    assert first["base"]["text"] != first["edited"]["text"]
    assert first["edited"]["heading"] == "edited × 1"
    assert {found["label"] for found in first.values()} <= {"comply", "refuse", "evade", "broken"}
    assert "dictionary: " in first["edited"]["note"]
    assert browser.find_element("css selector", ".said").text == "What is <b>bread</b>?"
    assert until(browser, "document.getElementById('status').textContent").startswith("base: ")

    scale = browser.find_element("id", "scale")
    scale.send_keys(Keys.ARROW_LEFT * 4)
    until(browser, "document.querySelector('.answer.edited h3').textContent == 'edited × 0.80'")
    until(browser, DONE)
    second = cards(browser)
    assert second["base"] == first["base"]
    assert second["edited"]["text"] != first["edited"]["text"]
    assert scale.get_attribute("aria-valuetext") == "0.80 times the edit"
    scale.send_keys(Keys.HOME)
    until(browser, "document.querySelector('.answer.edited h3').textContent == 'edited × −1'")
    until(browser, DONE)
    scale.send_keys(Keys.ARROW_RIGHT * 20)
    until(browser, "document.querySelector('.answer.edited h3').textContent == 'edited × 0'")
    until(browser, DONE)
    third = cards(browser)
    assert third["edited"]["text"] == third["base"]["text"]

    ask(browser, "And water?" + Keys.ENTER)
    until(browser, "document.querySelectorAll('.answer').length == 4")
    until(browser, DONE)
    assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth"), (
        "the page scrolls sideways"
    )
    background = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(19, 21, 23)") == (scheme == "dark")
    assert browser.title.startswith("Base and edited")
    assert [x["message"] for x in browser.get_log("browser")] == []
    messages = [json.loads(x["message"])["message"] for x in browser.get_log("performance")]
    asked = {m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"}
    expected = {f"{url}/{path}" for path in ("", "page.css", "page.js", "about", "compare")}
    assert {found for found in asked if not found.startswith("data:")} == expected


def test_stop_and_start_over(url, duet, browser, look, monkeypatch):
    forward = duet.session.model.forward

    def slowly(*args, **kwargs):
        time.sleep(0.05)
        return forward(*args, **kwargs)

    monkeypatch.setattr(duet.session.model, "forward", slowly)
    look(1100, "light")
    browser.get(url)
    until(browser, READY)
    browser.execute_script("document.getElementById('length').value = 400")
    browser.find_element("css selector", ".idea").click()
    until(browser, "document.querySelectorAll('.answer[aria-busy=true]').length == 2")
    browser.find_element("id", "stop").click()
    until(browser, DONE)
    assert {found["note"] for found in cards(browser).values()} == {"broken off"}
    browser.find_element("id", "reset").click()
    assert not browser.find_elements("css selector", ".turn")
    assert browser.find_element("id", "start").is_displayed()
    with duet.session.edited(None):
        pass


def test_every_control_has_a_name_and_can_be_reached_by_keyboard(url, browser, look):
    from selenium.webdriver.common.keys import Keys

    look(390, "dark")
    browser.get(url)
    until(browser, READY)
    browser.find_element("css selector", "summary").click()
    tree = browser.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    controls = [n for n in tree if n.get("role", {}).get("value") in ("button", "textbox", "slider", "spinbutton")]
    assert len(controls) >= 8
    assert [n for n in controls if not n.get("name", {}).get("value")] == []
    assert {n["role"]["value"] for n in tree if "role" in n} >= {"main", "status", "alert", "heading", "slider"}
    browser.find_element("css selector", "body").send_keys(Keys.TAB)
    reached = set()
    for _ in range(20):
        element = browser.switch_to.active_element
        reached.add(element.get_attribute("id") or element.get_attribute("class") or element.tag_name)
        element.send_keys(Keys.TAB)
    assert {"scale", "words", "send", "summary", "system", "temperature", "length", "idea"} <= reached


def test_a_key_is_asked_for_and_errors_are_shown(duet, browser, look, monkeypatch):
    look(390, "light")
    with listening(duet, key="secret", max_new_tokens=8) as url:
        browser.get(url)
        until(browser, "!document.getElementById('lock').hidden")
        browser.find_element("id", "key").send_keys("wrong\n")
        assert "API key" in until(browser, "document.getElementById('alert').textContent")
        browser.find_element("id", "key").clear()
        browser.find_element("id", "key").send_keys("secret\n")
        until(browser, READY)
        assert not browser.find_element("id", "lock").is_displayed()
        assert browser.find_element("id", "alert").text == ""
        ask(browser, "bread " * 300 + "\n")
        assert "context ends at 512" in until(browser, "document.getElementById('alert').textContent")
        until(browser, "!document.getElementById('send').hidden")


def test_without_an_edit_there_is_one_answer(pico_dir, browser, look):
    look(1100, "light")
    with listening(a_duet(pico_dir("llama"), edited=False), max_new_tokens=8) as url:
        browser.get(url)
        until(browser, READY)
        assert not browser.find_element("id", "dial").is_displayed()
        ask(browser, "Bread?\n")
        until(browser, "document.querySelectorAll('.answer').length == 1 && " + DONE)
        assert list(cards(browser)) == ["base"]
