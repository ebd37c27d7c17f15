"""Scores from a server of one's own, asked over HTTP."""

from __future__ import annotations

import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from http.client import HTTPException
from random import Random
from typing import Any
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from moalign.api import ConfigError, PluginError, Reward, Sample

REGISTRATION = {
    "name": "http",
    "class": "HTTP",
    "summary": "scores from a server: POST of prompts and responses as JSON, with time-out and retries",
}
MOST_BYTES = 2**26  # of an answer
WORTH_ANOTHER_TRY = {408, 425, 429, 500, 502, 503, 504}


class HTTP(Reward):
    """POST {"samples": [{"prompt": text or messages, "response": text}, ...]}; the answer is {"scores": [...]}, with a
    number or null for each sample.

    Tried again: no connection, a time-out, and the statuses that may pass (408, 425, 429, 500, 502, 503, 504).
    Redirects are followed within the host only.
    """

    url: str
    """http:// or https://"""
    timeout: float = Field(default=30.0, gt=0)
    """seconds without a byte from the server"""
    retries: int = Field(default=4, ge=0)
    """further tries of a request"""
    wait: float = Field(default=0.5, ge=0)
    """seconds before the second try at most; the most doubles with each, and a share of it is drawn"""
    batch_size: int = Field(default=32, ge=1)
    """samples in a request"""
    headers: Mapping[str, str] = Field(default_factory=dict)
    """written into the run directory like all options, so no place for secrets"""
    token_variable: str | None = None
    """the environment variable with a secret that is sent as a bearer token"""
    seed: int = 0
    """of the waiting times"""

    @field_validator("url")
    @classmethod
    def _is_http(cls, url: str) -> str:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"an address with http:// or https:// and a host, not {url}")
        return url

    def score(self, samples: Sequence[Sample]) -> list[float | None]:
        rng = Random(self.seed)
        found: list[float | None] = []
        for start in range(0, len(samples), self.batch_size):
            found += self._answer(samples[start : start + self.batch_size], rng)
        return found

    def _answer(self, samples: Sequence[Sample], rng: Random) -> list[float | None]:
        asked = [{"prompt": _plain(sample.prompt), "response": sample.response} for sample in samples]
        body = json.dumps({"samples": asked}).encode()
        try:
            scores = json.loads(self._posted(body, rng))["scores"]
        except (ValueError, RecursionError, KeyError, TypeError) as error:
            raise PluginError(f'{self.url}: the answer must be JSON, {{"scores": [...]}}: {error!r}') from None
        if not isinstance(scores, list) or len(scores) != len(samples):
            got = f"{len(scores)} scores" if isinstance(scores, list) else repr(scores)[:100]
            raise PluginError(f"{self.url}: it answered {len(samples)} samples with {got}")
        return scores

    def _posted(self, body: bytes, rng: Random) -> bytes:
        """The body of the answer. Raises PluginError with the status, or what kept the server from giving one."""
        for tried in range(self.retries + 1):
            if tried:
                time.sleep(rng.random() * self.wait * 2 ** (tried - 1))
            try:
                return self._once(body)
            except urllib.error.HTTPError as error:
                with error:
                    problem = f"status {error.code} {error.reason}: {error.read(200).decode(errors='replace')}".strip()
                if error.code not in WORTH_ANOTHER_TRY:
                    raise PluginError(f"{self.url}: {problem}") from None
            except (OSError, HTTPException) as error:  # URLError and TimeoutError among them
                problem = str(getattr(error, "reason", error)) or type(error).__name__
        raise PluginError(f"{self.url}: {problem}; tried {self.retries + 1} times")

    def _once(self, body: bytes) -> bytes:
        headers = {"Content-Type": "application/json", "Accept": "application/json"} | dict(self.headers)
        if self.token_variable is not None:
            if self.token_variable not in os.environ:
                raise ConfigError(f"token_variable: the environment has no {self.token_variable}")
            headers["Authorization"] = f"Bearer {os.environ[self.token_variable]}"
        request = urllib.request.Request(self.url, data=body, headers=headers, method="POST")
        with urllib.request.build_opener(_WithinTheHost).open(request, timeout=self.timeout) as answer:
            content: bytes = answer.read(MOST_BYTES + 1)
        if len(content) > MOST_BYTES:
            raise PluginError(f"{self.url}: an answer of more than {MOST_BYTES} bytes")
        return content


class _WithinTheHost(urllib.request.HTTPRedirectHandler):
    """Repeats the POST where 307 or 308 point to the same scheme, host and port; the others would make it a GET."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        old, new = urlsplit(req.full_url), urlsplit(newurl)
        if (old.scheme, old.netloc) != (new.scheme, new.netloc):
            raise PluginError(f"{req.full_url}: redirects to {new.scheme}://{new.netloc}, which is another host")
        if code not in (307, 308):
            raise PluginError(f"{req.full_url}: status {code} redirects a POST to {newurl}; give that address")
        return urllib.request.Request(newurl, data=req.data, headers=dict(req.header_items()), method="POST")


def _plain(prompt: Any) -> Any:
    return prompt if isinstance(prompt, str) else [dict(message) for message in prompt]
