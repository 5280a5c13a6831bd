"""The endpoint, asked by OpenAI's own client over a socket."""

from __future__ import annotations

import base64
import json
import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import requests

from ilvr_ds.data.sample import Sample, Turn
from ilvr_ds.generation.generate import Generator
from ilvr_ds.generation.loading import Reasoner
from ilvr_ds.generation.settings import GenerationSettings
from ilvr_ds.serving.batches import Job
from ilvr_ds.serving.limits import Limits
from ilvr_ds.serving.server import address_of, listen, own_names
from tests.conftest import LATENT_QUESTION
from tests.data.packing import image_bytes, png_bomb
from tests.evaluation.latent_model import LATENT_SIZE
from tests.ranks import ROOT
from tests.serving.jobs import that_speak, until

openai = pytest.importorskip("openai")
uvicorn = pytest.importorskip("uvicorn")

TOKEN = "secret-1"
SETTINGS = GenerationSettings(max_new_tokens=12)
LIMITS = Limits(images=2, image_bytes=20_000, image_pixels=10_000, waiting=3, generation=SETTINGS)
PICTURE = image_bytes(size=(60, 40))
WAIT_S = 120


def data_url(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


def shown(text: str, *urls: str) -> list[dict[str, Any]]:
    """A user's message with images before its text."""
    images = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [{"role": "user", "content": [*images, {"type": "text", "text": text}]}]


def said(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


@pytest.fixture(scope="module")
def pictures() -> Iterator[str]:
    """A server with a picture, and a redirection to it."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(302 if self.path == "/moved" else 200)
            self.send_header("Location", "/a.png")
            self.end_headers()
            self.wfile.write(PICTURE if self.path == "/a.png" else bytes(30_000))

        def log_message(self, *said: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def endpoint(latent_reasoner: Reasoner) -> Any:
    from ilvr_ds.serving.endpoint import Access, Endpoint

    access = Access(TOKEN, own_names("127.0.0.1"), ("http://page.example",))
    return Endpoint(latent_reasoner, "tiny", replace(LIMITS, url_hosts=frozenset({"127.0.0.1"})), access)


@pytest.fixture(scope="module")
def address(endpoint: Any) -> Iterator[str]:
    with listen("127.0.0.1", 0) as listening:
        server = uvicorn.Server(uvicorn.Config(endpoint.app(), log_config=None))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        until(lambda: server.started)
        yield address_of(listening)
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def client(address: str) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{address}/v1", api_key=TOKEN, max_retries=0, timeout=WAIT_S) as client:
        yield client


def test_the_model_is_listed(client: Any, address: str) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "ilvr_ds"
    with pytest.raises(openai.NotFoundError, match="the model 'tinny' does not exist; did you mean 'tiny'"):
        client.chat.completions.create(model="tinny", messages=said("?"))
    assert requests.get(f"{address}/health", timeout=WAIT_S).json()["status"] == "ok"


def test_a_chat_with_an_image_is_answered_as_generation_does(client: Any, latent_reasoner: Reasoner) -> None:
    """Catches an image or a turn that is lost on the way, and latents that are not counted."""
    sample = Sample("s", LATENT_QUESTION, (), (PICTURE,))
    [expected] = Generator(latent_reasoner, SETTINGS)([latent_reasoner.encoder.prompt(sample)]).answers
    completion = client.chat.completions.create(model="tiny", messages=shown(LATENT_QUESTION, data_url(PICTURE)))
    [choice] = completion.choices
    assert choice.message.content == expected.text and choice.message.role == "assistant"
    assert choice.finish_reason == ("length" if expected.hit_limit else "stop")
    assert choice.latent_steps == list(expected.steps) and choice.latent_steps[0] == LATENT_SIZE
    assert completion.usage.completion_tokens == len(expected.tokens)
    assert completion.usage.completion_tokens_details.reasoning_tokens == sum(expected.steps)

    history = (Turn("system", "Be brief."), Turn("user", "<image>What?"), Turn("assistant", "A cat."))
    prompt = latent_reasoner.encoder.prompt(Sample("s", "Why?", (), (PICTURE,), history=history))
    [later] = Generator(latent_reasoner, SETTINGS)([prompt]).answers
    messages = [{"role": "developer", "content": "Be brief."}, *shown("What?", data_url(PICTURE))]
    messages += [{"role": "assistant", "content": "A cat.", "reasoning_content": "It has whiskers."}, *said("Why?")]
    completion = client.chat.completions.create(model="tiny", messages=messages, user="u", n=1, presence_penalty=0)
    assert completion.choices[0].message.content == later.text
    assert completion.usage.prompt_tokens == len(prompt.input_ids)


def test_a_stream_brings_the_same_words_in_pieces(client: Any) -> None:
    asked = {"model": "tiny", "messages": shown(LATENT_QUESTION, data_url(PICTURE))}
    whole = client.chat.completions.create(**asked)
    stream = client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    *chunks, usage = list(stream)
    words = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices[0].delta.content]
    assert "".join(words) == whole.choices[0].message.content and len(words) > 1
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].choices[0].latent_steps == whole.choices[0].latent_steps
    assert usage.usage == whole.usage and not usage.choices


def test_a_seed_gives_the_same_answer_again(client: Any) -> None:
    def drawn(**asked: Any) -> str:
        completion = client.chat.completions.create(model="tiny", messages=said("?"), temperature=2, **asked)
        return str(completion.choices[0].message.content)

    assert drawn(seed=7) == drawn(seed=7) != drawn(seed=8)
    assert drawn() != drawn()


def test_requests_that_wait_are_answered_as_one_batch_and_no_more_than_allowed_wait(
    client: Any, endpoint: Any, latent_reasoner: Reasoner
) -> None:
    """A job that holds the decoding thread makes three requests wait; a fourth is refused."""
    go, batches = threading.Event(), endpoint.batches
    prompt = latent_reasoner.encoder.prompt(Sample("s", "?", ()))
    held = threading.Event()

    def hold(piece: str) -> None:
        held.set()
        go.wait(WAIT_S)

    batches.submit(Job(prompt, that_speak(latent_reasoner, GenerationSettings(max_new_tokens=2)), hold))
    assert held.wait(WAIT_S)
    done = batches.counts.batches
    with ThreadPoolExecutor(3) as pool:
        asked = [
            pool.submit(client.chat.completions.create, model="tiny", messages=said(text)) for text in ("a", "b", "c")
        ]
        until(lambda: batches.waiting == 3)
        with pytest.raises(openai.RateLimitError, match="3 requests waiting") as refused:
            client.chat.completions.create(model="tiny", messages=said("d"))
        go.set()
        answers = [future.result(WAIT_S) for future in asked]
    assert refused.value.code == "queue_full"
    assert batches.counts.batches == done + 1, "one for all three"
    assert all(answer.choices[0].message.content is not None for answer in answers)


def test_a_wrong_token_is_refused(address: str) -> None:
    with (
        openai.OpenAI(base_url=f"{address}/v1", api_key="secret-2", max_retries=0) as stranger,
        pytest.raises(openai.AuthenticationError, match="the token is missing or wrong"),
    ):
        stranger.models.list()
    odd = requests.get(f"{address}/v1/models", headers={"Authorization": "Bearer s\xe9cret"}, timeout=WAIT_S)
    assert odd.status_code == 401
    assert requests.post(f"{address}/v1/chat/completions", timeout=WAIT_S).status_code == 401


def test_images_are_fetched_from_allowed_hosts_alone(client: Any, pictures: str) -> None:
    """Nor by a redirection, which may lead anywhere."""

    def ask(url: str) -> str:
        return str(client.chat.completions.create(model="tiny", messages=shown("?", url)).choices[0].message.content)

    assert ask(f"{pictures}/a.png") == ask(data_url(PICTURE))
    for url, words in (
        (pictures.replace("127.0.0.1", "localhost") + "/a.png", "images are not fetched from 'localhost'; send a data"),
        (f"{pictures}/moved", "answered with status 302"),
        (f"{pictures}/large", "more than the 20000 bytes"),
        ("http://127.0.0.1:1/a.png", "cannot be fetched"),
        ("file:///etc/hostname", "an image is no data: URL"),
        ("/etc/hostname", "an image is no data: URL"),
        ("data:text/plain;base64,AAAA", "an image is no data: URL of a picture"),
        ("data:image/png;base64,AAA%", "an image in base64 is damaged"),
        ("data:image/png;base64,AAAA", "not a JPEG, PNG, WEBP image"),
    ):
        with pytest.raises(openai.BadRequestError, match=words) as refused:
            ask(url)
        assert refused.value.param == "messages"


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"messages": shown("?", data_url(PICTURE + bytes(20_000)))}, "an image of .* bytes, 20000 are allowed"),
        ({"messages": shown("?", data_url(png_bomb()))}, "above the limit of 10000 pixels"),
        ({"messages": shown("?", *[data_url(PICTURE)] * 3)}, "3 images, 2 are allowed"),
        ({"messages": said("<image>")}, "1 <image> markers"),
        ({"messages": said("<|im_end|>")}, "the reserved token"),
        ({"messages": said(" ")}, "turn 1: 'content' is empty"),
        ({"messages": [*said("?"), {"role": "assistant", "content": "a"}]}, "the last message is not the user's"),
        ({"messages": [*said("?"), *said("?")]}, "do not alternate"),
        ({"messages": [{"role": "tool", "content": "?"}]}, "turn 1: its role 'tool'"),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "a part of type 'input_audio'"),
        ({"messages": []}, "messages: "),
        ({"max_tokens": 13}, "max_tokens: 13, the server's --max-new-tokens allows 12"),
        ({"max_completion_tokens": 0}, "max_completion_tokens: "),
        ({"temperature": -1}, "temperature: "),
        ({"stop": [""]}, "stop: holds an empty text"),
        ({"n": 2}, "n: is not supported here"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools: is not supported here"),
        ({"extra_body": {"temprature": 1}}, "temprature: is unknown; did you mean 'temperature'"),
    ],
)
def test_what_cannot_be_answered_is_refused_in_a_line(client: Any, asked: dict[str, Any], words: str) -> None:
    with pytest.raises(openai.BadRequestError, match=words) as refused:
        client.chat.completions.create(**{"model": "tiny", "messages": said("?"), **asked})
    assert refused.value.type == "invalid_request_error"


def test_raw_requests_are_refused_in_openai_s_form(address: str) -> None:
    """Among them what a web page can send by itself: text, and by a name that was made to lead here."""
    known = {"Authorization": f"Bearer {TOKEN}"}
    as_json = {**known, "Content-Type": "application/json"}

    def post(body: bytes, headers: dict[str, str]) -> tuple[int, Any]:
        reply = requests.post(f"{address}/v1/chat/completions", data=body, headers=headers, timeout=WAIT_S)
        return reply.status_code, reply.json()["error"]["message"]

    good = json.dumps({"model": "tiny", "messages": said("?")}).encode()
    assert post(good, {**known, "Content-Type": "text/plain"}) == (415, "the body must be application/json")
    assert post(b"{", as_json)[0] == 400
    status, message = post(bytes(LIMITS.body_bytes + 1), as_json)
    assert status == 413 and "fewer or smaller images" in message
    missing = requests.get(f"{address}/v1/nothing", headers=known, timeout=WAIT_S)
    assert (missing.status_code, missing.json()["error"]["message"]) == (404, "GET /v1/nothing: Not Found")
    foreign = {**known, "Host": "evil.example"}
    assert requests.get(f"{address}/v1/models", headers=foreign, timeout=WAIT_S).status_code == 400


def test_only_a_page_that_is_named_may_read_answers(address: str) -> None:
    def allowed(origin: str) -> str | None:
        asks = {"Origin": origin, "Access-Control-Request-Method": "POST"}
        reply = requests.options(f"{address}/v1/chat/completions", headers=asks, timeout=WAIT_S)
        return reply.headers.get("Access-Control-Allow-Origin")

    assert allowed("http://page.example") == "http://page.example" and allowed("http://evil.example") is None


def test_the_page_s_program_runs(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    [program] = re.findall(r"```python\n(.*?)```", (ROOT / "docs/serving.md").read_text(), re.DOTALL)
    for there, here in (("http://127.0.0.1:8000", address), ('"none"', repr(TOKEN)), ("comt_7b", "tiny")):
        assert there in program
        program = program.replace(there, here)
    (tmp_path / "a.png").write_bytes(PICTURE)
    monkeypatch.chdir(tmp_path)
    exec(program, {})
    assert f"[{LATENT_SIZE}" in capsys.readouterr().out
