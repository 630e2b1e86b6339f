"""The endpoint, asked by the real OpenAI client: the answers of the session, and errors that a client understands."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest
from served import a_duet, an_edit, listening, raw

from perpend.data import Prompt
from perpend.models.session import Sampling, Session
from perpend.serving import app

PROMPT = "What is the capital of France?"
ASKED = [{"role": "user", "content": PROMPT}]


@pytest.fixture(scope="module")
def duet(pico_dir):
    return a_duet(pico_dir("llama"))


@pytest.fixture(scope="module")
def url(duet):
    with listening(duet) as found:
        yield found


@pytest.fixture(scope="module")
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60) as found:
        yield found


def ask(client, model="edited", messages=ASKED, **options):
    return client.chat.completions.create(model=model, messages=messages, **options)


def generated(duet, scale, max_new_tokens=16):
    session = duet.session
    with session.edited(duet.at(scale)):
        return session.generate([Prompt(PROMPT)], max_new_tokens=max_new_tokens)[0]


def test_models_are_the_base_and_the_edit_at_any_scale(client, duet):
    assert [model.id for model in client.models.list()] == ["base", "edited", "edited@0.5"]
    assert client.models.retrieve("edited@-1.25").id == "edited@-1.25"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4")


@pytest.mark.parametrize(("model", "scale"), [("base", 0), ("edited", 1), ("edited@0.5", 0.5), ("edited@-1", -1)])
def test_greedy_answers_are_those_of_the_session(client, duet, model, scale):
    expected = generated(duet, scale)
    said = ask(client, model)
    assert said.choices[0].message.content == expected.text
    assert said.choices[0].message.role == "assistant"
    assert said.choices[0].finish_reason == ("stop" if expected.finished else "length")
    assert said.model == model
    assert said.usage.completion_tokens == len(expected.tokens)
    assert said.usage.prompt_tokens == len(duet.session.chat.encode([Prompt(PROMPT)])[0])
    assert said.usage.total_tokens == said.usage.prompt_tokens + said.usage.completion_tokens
    assert ask(client, model, temperature=0).choices[0].message.content == expected.text


def test_base_and_edited_differ(duet):
    assert len({generated(duet, scale).text for scale in (0, 0.5, 1)}) == 3


@pytest.mark.parametrize("options", [{}, {"temperature": 0.8, "top_p": 0.9, "seed": 7}], ids=["greedy", "sampled"])
def test_a_stream_is_the_same_in_pieces(client, options):
    whole = ask(client, max_tokens=24, **options)
    chunks = list(ask(client, max_tokens=24, stream=True, stream_options={"include_usage": True}, **options))
    *parts, last = chunks
    assert "".join(chunk.choices[0].delta.content or "" for chunk in parts) == whole.choices[0].message.content
    assert len([chunk for chunk in parts if chunk.choices[0].delta.content]) > 3
    assert parts[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in parts[-2:]] == [None, whole.choices[0].finish_reason]
    assert last.choices == []
    assert last.usage == whole.usage
    assert {chunk.id for chunk in chunks} == {chunks[0].id}
    assert all(chunk.usage is None for chunk in ask(client, max_tokens=2, stream=True))


def test_sampling_follows_the_request_and_its_seed(client):
    texts = [ask(client, temperature=1.0, seed=seed).choices[0].message.content for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    greedy = ask(client).choices[0].message.content
    assert ask(client, temperature=1.0, extra_body={"top_k": 1}).choices[0].message.content == greedy


def test_what_a_request_leaves_open_is_as_the_server_was_started(pico_dir):
    one = a_duet(pico_dir("llama"), edited=False)
    with (
        listening(one, sampling=Sampling(temperature=1.3), seed=5, max_new_tokens=9) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        assert [model.id for model in client.models.list()] == ["base"]
        said = ask(client, "base")
        assert said.usage.completion_tokens <= 9
        same = ask(client, "base", temperature=1.3, seed=5, max_tokens=9)
        assert said.choices[0].message.content == same.choices[0].message.content
        assert said.choices[0].message.content != ask(client, "base", temperature=0).choices[0].message.content
        with pytest.raises(openai.NotFoundError, match="no model 'edited'; valid: base"):
            ask(client, "edited")


def test_given_texts_end_an_answer(client, duet):
    text = generated(duet, 1, 24).text
    stop = text[len(text) // 2 :][:3]
    said = ask(client, max_tokens=24, stop=[stop, "never said"])
    assert said.choices[0].message.content == text[: text.index(stop)]
    assert said.choices[0].finish_reason == "stop"
    pieces = list(ask(client, max_tokens=24, stop=stop, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in pieces) == text[: text.index(stop)]
    assert pieces[-1].choices[0].finish_reason == "stop"


def test_the_whole_conversation_is_read(client, duet):
    turns = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Bread?"}]},
        {"role": "assistant", "content": "Flour."},
        *ASKED,
    ]
    expected = duet.session.chat.conversation(
        [{**turns[0], "role": "system"}, {**turns[1], "content": "Bread?"}, *turns[2:]]
    )
    assert ask(client, messages=turns).usage.prompt_tokens == expected["input_ids"].shape[1]


def test_many_clients_are_answered_one_after_the_other(client, duet):
    names = ["base", "edited", "edited@0.5", "edited@-1"] * 3
    expected = {name: generated(duet, duet.scale_of(name)).text for name in set(names)}
    with ThreadPoolExecutor(12) as pool:
        said = list(pool.map(lambda name: (name, ask(client, name).choices[0].message.content), names))
    assert [text for _, text in said] == [expected[name] for name, _ in said]


WRONG = [
    ({"model": "gpt-4"}, openai.NotFoundError, "no model 'gpt-4'; valid: base, edited, edited@0.5, edited@X"),
    ({"model": "edit"}, openai.NotFoundError, "did you mean 'edited'"),
    ({"model": "edited@many"}, openai.NotFoundError, "'many' is no scale"),
    ({"model": "edited@nan"}, openai.NotFoundError, "is no scale"),
    ({"messages": []}, openai.BadRequestError, "messages"),
    ({"messages": [{"role": "tool", "content": "a"}]}, openai.BadRequestError, "messages.0.role"),
    ({"messages": [*ASKED, {"role": "assistant", "content": "a"}]}, openai.BadRequestError, "must be the user's"),
    ({"messages": [{"role": "user", "content": "bread " * 900}]}, openai.BadRequestError, "context ends at 512"),
    ({"temperature": 3}, openai.BadRequestError, "temperature"),
    ({"max_tokens": 0}, openai.BadRequestError, "max_tokens"),
    ({"n": 2}, openai.BadRequestError, "n"),
    ({"logprobs": True}, openai.BadRequestError, "logprobs"),
    ({"presence_penalty": 0.5}, openai.BadRequestError, "presence_penalty"),
    ({"response_format": {"type": "json_object"}}, openai.BadRequestError, "response_format"),
    ({"extra_body": {"temprature": 1}}, openai.BadRequestError, "did you mean 'temperature'"),
]


@pytest.mark.parametrize(("options", "error", "message"), WRONG)
@pytest.mark.parametrize("stream", [False, True])
def test_errors_are_in_the_form_that_clients_know(client, options, error, message, stream):
    with pytest.raises(error) as caught:
        ask(client, **{"stream": stream, **options})
    assert message in caught.value.body["message"]
    assert caught.value.body["type"] == "invalid_request_error"
    assert "\n" not in caught.value.body["message"]


def test_neutral_and_idle_parameters_are_taken(client):
    said = ask(client, n=1, presence_penalty=0, logprobs=False, user="u", metadata={"a": "b"}, tools=[], max_tokens=2)
    assert said.choices[0].finish_reason == "length"


def test_no_image_is_fetched_or_read_from_disk(client, pico_dir, tmp_path):
    pillow = pytest.importorskip("PIL.Image")
    pillow.new("RGB", (30, 30), (200, 0, 0)).save(tmp_path / "a.png")
    data = base64.b64encode((tmp_path / "a.png").read_bytes()).decode()

    def seen(url):
        return [
            {
                "role": "user",
                "content": [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "?"}],
            }
        ]

    with pytest.raises(openai.BadRequestError, match="takes no images"):
        ask(client, messages=seen(f"data:image/png;base64,{data}"))
    with (
        listening(a_duet(pico_dir("gemma3"))) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as sees,
    ):
        assert ask(sees, messages=seen(f"data:image/png;base64,{data}"), max_tokens=3).usage.prompt_tokens > 10
        for bad in (str(tmp_path / "a.png"), "file:///etc/hostname", f"{url}/page.js", "data:image/png;base64,AAAA"):
            with pytest.raises(openai.BadRequestError, match=r"must be in the request|cannot be read"):
                ask(sees, messages=seen(bad))
        bomb = io.BytesIO()
        pillow.new("1", (9000, 9000)).save(bomb, "png")
        with pytest.raises(openai.BadRequestError, match="pixels"):
            ask(sees, messages=seen("data:image/png;base64," + base64.b64encode(bomb.getvalue()).decode()))


def busy() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if "_work" in thread.name]


def settled() -> bool:
    end = time.monotonic() + 10
    while busy() and time.monotonic() < end:
        time.sleep(0.02)
    return not busy()


@pytest.fixture
def slow(monkeypatch, duet):
    """Every token takes a while, so that there is time to go away."""
    forward = duet.session.model.forward

    def slowly(*args, **kwargs):
        time.sleep(0.02)
        return forward(*args, **kwargs)

    monkeypatch.setattr(duet.session.model, "forward", slowly)


def test_an_answer_stops_when_the_client_goes(client, duet, slow):
    stream = ask(client, max_tokens=400, stream=True)
    next(iter(stream))
    stream.close()
    assert settled()
    began = time.monotonic()
    with pytest.raises(openai.APITimeoutError):
        ask(client.with_options(timeout=0.3), max_tokens=400)
    assert settled()
    assert time.monotonic() - began < 8  # 400 tokens take longer
    with duet.session.edited(an_edit(duet.session)):  # nothing is in place any more
        pass


def test_one_who_waits_and_goes_is_forgotten(client, duet, slow):
    first = ask(client, max_tokens=60, stream=True)
    next(iter(first))
    with pytest.raises(openai.APITimeoutError):
        ask(client.with_options(timeout=0.2), "base", max_tokens=400)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in first) == generated(duet, 1, 60).text.removeprefix(
        ""
    )
    assert settled()


def test_when_too_many_wait_one_is_told_to_come_back(duet, slow, monkeypatch):
    monkeypatch.setattr(app.Queue.__init__, "__defaults__", (2,))
    with (
        listening(duet) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
        ThreadPoolExecutor(8) as pool,
    ):
        done = list(pool.map(lambda _: _status(client), range(8)))
    assert done.count(200) >= 3
    assert done.count(429) >= 1
    assert set(done) == {200, 429}


def _status(client) -> int:
    try:
        ask(client, max_tokens=50)
    except openai.APIStatusError as error:
        return error.status_code
    return 200


def test_a_failure_while_answering_is_told_and_the_server_goes_on(client, duet, monkeypatch):
    def broken(**kwargs):
        raise RuntimeError("out of luck\nsecond line")

    with monkeypatch.context() as patch:
        patch.setattr(duet.session.model, "generate", broken)
        with pytest.raises(openai.InternalServerError, match="the answer failed: out of luck") as caught:
            ask(client)
        assert "second line" not in str(caught.value)
        with pytest.raises(openai.APIError, match="out of luck"):
            list(ask(client, stream=True))
    assert ask(client, max_tokens=2).choices[0].message.content is not None


def test_a_page_elsewhere_cannot_use_the_server(url):
    body = json.dumps({"model": "base", "messages": ASKED, "max_tokens": 1})
    port = url.rpartition(":")[2]

    def status(**headers):
        return httpx.post(f"{url}/v1/chat/completions", content=body, headers=headers, timeout=60)

    usual = {"content-type": "application/json"}
    assert status(**usual).status_code == 200
    assert status(**usual, origin=url).status_code == 200
    for host in (f"localhost:{port}", f"[::1]:{port}", "127.0.0.1", "192.168.0.4:80"):
        assert status(**usual, host=host).status_code == 200
    for host in (
        "evil.example",
        f"evil.example:{port}",
        "localhost.evil.example",
        "127.0.0.1.evil.example",
        "a@127.0.0.1",
        "",
    ):
        answer = status(**usual, host=host)
        assert answer.status_code == 403, host
        assert answer.json()["error"]["code"] == "unknown_host"
    for origin in ("https://evil.example", "null", f"http://localhost:{port}", "http://127.0.0.1"):
        assert status(**usual, origin=origin).json()["error"]["code"] == "unknown_origin"
    for kind in ("text/plain", "application/x-www-form-urlencoded", "application/jsonp", ""):
        assert status(**{"content-type": kind}).status_code == 415
    answer = httpx.options(f"{url}/v1/models", headers={"origin": "https://evil.example"})
    assert "access-control-allow-origin" not in answer.headers


def test_known_names_and_origins_may_ask(duet):
    with listening(duet, hosts=("model.example",), origins=("https://notes.example",)) as url:
        assert httpx.get(f"{url}/v1/models", headers={"host": "model.example:80"}).status_code == 200
        answer = httpx.get(f"{url}/v1/models", headers={"origin": "https://notes.example"})
        assert answer.headers["access-control-allow-origin"] == "https://notes.example"
        assert httpx.get(f"{url}/v1/models", headers={"origin": "https://other.example"}).status_code == 403


def test_a_key_is_asked_for_everything_but_the_page(duet):
    with listening(duet, key="secret") as url:
        for path in ("/v1/models", "/about", "/nowhere"):
            assert httpx.get(f"{url}{path}").json()["error"]["code"] == "invalid_api_key"
        for path in ("/", "/page.js", "/page.css"):
            assert httpx.get(f"{url}{path}").status_code == 200
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=f"{url}/v1", api_key="Secret", max_retries=0).models.list()
        assert openai.OpenAI(base_url=f"{url}/v1", api_key="secret", max_retries=0).models.list().data


def test_a_body_is_json_of_limited_size(url):
    def post(content, **headers):
        return httpx.post(
            f"{url}/v1/chat/completions", content=content, headers={"content-type": "application/json", **headers}
        )

    for bad in (b"", b"{", b"[1]", b"\xff\xfe", b"[" * 100_000, b'{"model": "base", "messages": "a"}'):
        answer = post(bad)
        assert answer.status_code == 400, bad[:20]
        assert answer.json()["error"]["type"] == "invalid_request_error"
    assert post(b" " * (9 << 20)).status_code == 413
    assert post(b" " * (1 << 20) for _ in range(9)).status_code == 413  # chunked: nobody said how long
    assert "413" in raw(
        url, "POST /compare HTTP/1.1\nHost: localhost\nContent-Type: application/json\nContent-Length: 99999999999\n\n"
    )
    assert httpx.get(f"{url}/nowhere").json()["error"]["message"] == "get /nowhere: not found"
    assert httpx.get(f"{url}/v1/chat/completions").status_code == 405
    assert httpx.get(f"{url}/v1/models").headers["content-security-policy"].startswith("default-src 'none'")


def events(url, **body):
    with httpx.stream("POST", f"{url}/compare", json=body, timeout=60) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream"), answer.read()
        return [json.loads(line.removeprefix("data: ")) for line in answer.iter_lines() if line]


def test_a_comparison_streams_both_sides_in_turn_and_labels_them(url, duet):
    found = events(url, base=ASKED, edited=ASKED, scale=0.5, max_tokens=20)
    for side, scale in (("base", 0), ("edited", 0.5)):
        own = [event for event in found if event["side"] == side]
        assert "".join(event.get("text", "") for event in own) == generated(duet, scale, 20).text
        assert own[-2]["finish"] in ("stop", "length")
        assert own[-1]["label"]["label"] in ("comply", "refuse", "evade", "broken")
        assert own[-1]["label"]["kind"] == "dictionary only"
    order = [event["side"] for event in found if event.get("text")]
    assert order[:6].count("base") == order[:6].count("edited") == 3
    assert {event["side"] for event in events(url, edited=ASKED, max_tokens=3)} == {"edited"}
    assert httpx.post(f"{url}/compare", json={}).json()["error"]["message"] == "nobody is to answer"
    assert httpx.post(f"{url}/compare", json={"base": ASKED, "scale": 1e9}).status_code == 400


def test_hostile_words_stay_words(client, duet, monkeypatch):
    monkeypatch.setattr(
        duet.session.chat, "decode", lambda ids: "</script>\n\ndata: [DONE]\n\n\x1b[2J" + "é" * len(ids)
    )
    pieces = list(ask(client, max_tokens=3, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in pieces).startswith(
        "</script>\n\ndata: [DONE]\n\n\x1b[2J"
    )


def test_the_examples_in_the_documentation_work(url, duet, capsys):
    text = (Path(__file__).parent.parent.parent / "docs" / "serve.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```(sh|python)\n(.*?)```", text.replace("http://127.0.0.1:8000", url), re.DOTALL)
    (program,) = (block for kind, block in blocks if kind == "python")
    exec(program, {})
    said = capsys.readouterr().out
    assert said.startswith("base ")
    assert "\nedited@0.5 " in said
    (command,) = (block for kind, block in blocks if block.startswith("curl"))
    if shutil.which("curl"):
        done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
        assert done.stdout.endswith("data: [DONE]\n\n")


def test_session_is_as_it_was(duet, pico_dir):
    fresh = Session(duet.session.loaded)
    with fresh.edited(None):
        assert fresh.generate([Prompt(PROMPT)], max_new_tokens=8)[0].text == generated(duet, 0, 8).text
