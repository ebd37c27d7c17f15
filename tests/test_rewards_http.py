"""The reward `http` against a server in a thread."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from random import Random
from typing import Any

import pytest
from pydantic import ValidationError

from moalign.api import ConfigError, PluginError, Sample
from moalign.config import ObjectiveSettings
from moalign.engine.rewards import Scorer
from moalign.testing import check_reward
from moalign_plugins.rewards.http import HTTP

Reply = tuple[int, bytes]
SAMPLES = [Sample("q", "one"), Sample(({"role": "user", "content": "q"},), "two words"), Sample("q", "")]


class Server(ThreadingHTTPServer):
    """Answers with words, or null for none, after the ``replies`` that it is given; keeps what it was sent."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.replies: list[Callable[[Handler], Reply]] = []
        self.sent: list[dict[str, Any]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/score"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.sent.append(asked | {"token": self.headers["Authorization"]})
        words = [len(sample["response"].split()) or None for sample in asked["samples"]]
        reply = self.server.replies.pop(0) if self.server.replies else lambda handler: (200, _scores(words))
        self.location = ""
        status, body = reply(self)
        self.send_response(status)
        if self.location:
            self.send_header("Location", self.location)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def handle_one_request(self) -> None:
        with suppress(BrokenPipeError):  # nobody waits for a slow answer any more
            super().handle_one_request()

    def log_message(self, *arguments: Any) -> None: ...


def _scores(values: Any) -> bytes:
    return json.dumps({"scores": values}).encode()


def status(code: int, body: bytes = b"busy", location: str = "") -> Callable[[Handler], Reply]:
    def reply(handler: Handler) -> Reply:
        handler.location = location
        return code, body

    return reply


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def reward(server: Server, **options: Any) -> HTTP:
    return HTTP.model_validate({"url": server.url, "wait": 0.0, "timeout": 5.0} | options)


def test_scores_arrive_in_order_and_in_batches(server):
    assert reward(server, batch_size=2).score(SAMPLES) == [1, 2, None]
    prompts = [[sample["prompt"] for sample in sent["samples"]] for sent in server.sent]
    assert prompts == [["q", [{"role": "user", "content": "q"}]], ["q"]]
    assert reward(server).score([]) == []


def test_it_conforms(server):
    check_reward(reward(server))


def test_what_may_pass_is_tried_again(server):
    server.replies = [status(503), status(429)]
    assert reward(server, retries=2).score(SAMPLES) == [1, 2, None]
    assert len(server.sent) == 3


def test_after_the_last_try_the_status_is_named(server):
    server.replies = [status(500, b"no model")] * 3
    with pytest.raises(PluginError, match=r"/score: status 500 .*: no model; tried 3 times"):
        reward(server, retries=2).score(SAMPLES)


def test_what_does_not_pass_is_not_tried_again(server):
    server.replies = [status(404, b"no such page")]
    with pytest.raises(PluginError, match=r"status 404 Not Found: no such page"):
        reward(server).score(SAMPLES)
    assert len(server.sent) == 1


def test_a_server_that_takes_too_long(server):
    def slow(handler: Handler) -> Reply:
        time.sleep(0.3)
        return 200, _scores([1, 1, 1])

    server.replies = [slow, slow]
    with pytest.raises(PluginError, match=r"timed out; tried 2 times"):
        reward(server, retries=1, timeout=0.05).score(SAMPLES)


def test_nobody_there():
    with Server() as closed:
        url = closed.url
    with pytest.raises(PluginError, match=r"[Rr]efused; tried 2 times"):
        HTTP(url=url, retries=1, wait=0.0).score(SAMPLES)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"fine", "must be JSON"),
        (b"\xff", "must be JSON"),
        (b"{}", "KeyError"),
        (b"[1, 2, 3]", "must be JSON"),
        (_scores([1, 2]), "3 samples with 2 scores"),
        (_scores("123"), "3 samples with '123'"),
    ],
)
def test_an_answer_that_makes_no_sense(server, body, message):
    server.replies = [status(200, body)]
    with pytest.raises(PluginError, match=message):
        reward(server).score(SAMPLES)


def test_the_policy_finds_the_sample_that_the_server_cannot_score(server):
    server.replies = [status(400), status(200, _scores([5])), status(400), status(200, b'{"scores": [NaN]}')]
    warned: list[str] = []
    scorer = Scorer("odd", reward(server), ObjectiveSettings(on_error="skip_sample"), warned.append)
    column = scorer.score(SAMPLES)
    assert column.values[0] == 5.0 and column.failed == 2 and len(warned) == 1


def test_a_secret_comes_from_the_environment(server, monkeypatch):
    monkeypatch.setenv("SCORES_TOKEN", "open sesame")
    reward(server, token_variable="SCORES_TOKEN").score(SAMPLES)
    assert server.sent[0]["token"] == "Bearer open sesame"
    with pytest.raises(ConfigError, match="the environment has no NOT_THERE"):
        reward(server, token_variable="NOT_THERE").score(SAMPLES)


def test_redirects_stay_within_the_host(server):
    server.replies = [status(307, location="/elsewhere")]
    assert reward(server).score(SAMPLES) == [1, 2, None]
    with Server() as other:
        for location, message in ((other.url, "another host"), ("file:///etc/hosts", "not allowed")):
            server.replies = [status(307, location=location)]
            with pytest.raises(PluginError, match=message):
                reward(server).score(SAMPLES)
        assert other.sent == []
    server.replies = [status(302, location="/elsewhere")]
    with pytest.raises(PluginError, match="status 302 redirects a POST"):
        reward(server).score(SAMPLES)


def test_waiting_doubles_and_is_drawn_from_the_seed(server, monkeypatch):
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    server.replies = [status(500)] * 3
    reward(server, wait=2.0, retries=3, seed=7).score(SAMPLES)
    rng = Random(7)
    assert waited == [rng.random() * most for most in (2.0, 4.0, 8.0)]


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://host/x", "host/x", "http://", "https:///x"])
def test_other_addresses_are_refused(url):
    with pytest.raises(ValidationError, match="http:// or https://"):
        HTTP(url=url)
