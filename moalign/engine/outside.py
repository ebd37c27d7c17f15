"""Responses from a plugin instead of moalign's own sampling: adapters go out as files, token ids come back, checked."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moalign import disk, door, lora
from moalign.api import Sampler, SamplingSession
from moalign.calls import SAMPLE
from moalign.engine.model import LanguageModel
from moalign.engine.rollouts import Rollout, rollout_of
from moalign.errors import PluginError
from moalign.types import SamplerInfo, Sampling

SHOWN = 12  # token ids in a message


@dataclass
class Outside:
    """A sampler at work for one run, with the arguments and results of ``rollouts.sample``.

    ``path``: of the untouched base, for its own loading. It is started when the first responses are wanted.
    """

    plugin: Sampler
    path: str
    _session: SamplingSession | None = None

    def sample(
        self,
        model: LanguageModel,
        adapters: Sequence[str | None],
        prompts: Sequence[tuple[int, ...]],
        *,
        samples: int,
        temperature: float,
        max_new_tokens: int,
        seed: int,
        top_p: float = 1.0,
        greedy: bool = False,
    ) -> list[list[Rollout]]:
        """Raises PluginError naming the plugin where it raises, or returns what the request does not ask for."""
        how = Sampling(samples, temperature, top_p, max_new_tokens, tuple(sorted(model.end_ids)), seed)
        with _written(model, adapters) as folders:
            found = self._rollouts(model, folders, prompts, how)
            if greedy:
                likeliest = replace(how, samples=1, temperature=0.0, top_p=1.0)
                for own, more in zip(found, self._rollouts(model, folders, prompts, likeliest), strict=True):
                    own += [replace(rollout, greedy=True) for rollout in more]
        return found

    def close(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            door.call(self.plugin, "close", on=session)

    def _rollouts(
        self, model: LanguageModel, folders: list[Path | None], prompts: Sequence[tuple[int, ...]], how: Sampling
    ) -> list[list[Rollout]]:
        if self._session is None:
            self._session = self._started(model)
        vocabulary = model.head.weight.shape[0]
        counts = (len(folders), len(prompts), how.samples)

        def checked(found: Any) -> list[list[list[tuple[int, ...]]]]:
            return responses(found, counts, how, vocabulary)

        found = door.call(self.plugin, SAMPLE, tuple(folders), tuple(prompts), how, then=checked, on=self._session)
        return [[rollout_of(prompt, ids, model) for prompt, said in enumerate(mine) for ids in said] for mine in found]

    def _started(self, model: LanguageModel) -> SamplingSession:
        ranks = [lora.room(model.policy, slot) for slot in model.policy.peft_config]  # whoever is in them now
        dtype, vocabulary = str(model.dtype).removeprefix("torch."), model.head.weight.shape[0]
        session = door.call(self.plugin, "start", SamplerInfo(self.path, dtype, vocabulary, max(ranks)))
        if not isinstance(session, SamplingSession):
            who = door.origin(self.plugin).who
            raise PluginError(f"{who}, in start: it must return a SamplingSession, not {type(session).__name__}")
        return session


def responses(
    found: Any, counts: tuple[int, int, int], how: Sampling, vocabulary: int
) -> list[list[list[tuple[int, ...]]]]:
    """What a session returned, as lists and tuples; ``counts``: of adapters, prompts and samples.

    Raises PluginError where it is not what was asked for.
    """
    adapters, prompts, samples = counts
    return [
        [
            [_response(ids, how, vocabulary) for ids in _parts(said, samples, "responses to a prompt")]
            for said in _parts(mine, prompts, "prompts, each with its responses,")
        ]
        for mine in _parts(found, adapters, "adapters")
    ]


def _parts(found: Any, count: int, what: str) -> list[Any]:
    if isinstance(found, str | bytes) or not isinstance(found, Iterable):
        raise PluginError(f"it returned {type(found).__name__} where a sequence of {count} {what} was asked for")
    parts = list(found)
    if len(parts) != count:
        raise PluginError(f"it returned {len(parts)} {what} where {count} were asked for")
    return parts


def _response(found: Any, how: Sampling, vocabulary: int) -> tuple[int, ...]:
    if isinstance(found, str | bytes) or not isinstance(found, Iterable):
        raise PluginError(f"a response is a sequence of token ids, not {type(found).__name__}")
    ids = tuple(found)
    wrong = next((each for each in ids if not isinstance(each, int) or isinstance(each, bool)), None)
    if wrong is not None:
        raise PluginError(f"a token id is a plain int, not {type(wrong).__name__} ({wrong!r})")
    outside = next((each for each in ids if not 0 <= each < vocabulary), None)
    if outside is not None:
        raise PluginError(f"the token id {outside} is not in the vocabulary of {vocabulary}")
    shown = f"{list(ids[:SHOWN])}{'...' if len(ids) > SHOWN else ''}"
    if not ids:
        raise PluginError("a response has no token; one that ends at once has the stop token")
    if len(ids) > how.max_new_tokens:
        raise PluginError(f"a response has {len(ids)} tokens, and at most {how.max_new_tokens} were asked for: {shown}")
    if any(each in how.stop_token_ids for each in ids[:-1]):
        raise PluginError(f"a response goes on after a stop token ({list(how.stop_token_ids)}): {shown}")
    if len(ids) < how.max_new_tokens and ids[-1] not in how.stop_token_ids:
        raise PluginError(
            f"a response of {len(ids)} tokens is shorter than {how.max_new_tokens} and does not end with a stop token "
            f"({list(how.stop_token_ids)}), which is a part of the response: {shown}"
        )
    return ids


@contextmanager
def _written(model: LanguageModel, adapters: Sequence[str | None]) -> Iterator[list[Path | None]]:
    """The adapters' folders as peft writes them, as long as the context lasts."""
    with disk.scratch() as place:
        folders: list[Path | None] = []
        for number, adapter in enumerate(adapters):
            folder = None if adapter is None else place / str(number)
            if folder is not None and adapter is not None:
                folder.mkdir()
                lora.write(model.policy, adapter, folder, model.fingerprint)
            folders.append(folder)
        yield folders
