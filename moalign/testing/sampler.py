"""Whether a sampler keeps to the contract of ``moalign.api.Sampler``: on a small model, beside moalign's numbers."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moalign.api import MoalignError, Sampler, SamplerInfo, Sampling, SamplingSession
from moalign.testing.review import Review, described, run, short

if TYPE_CHECKING:
    from torch import Tensor

    from moalign.engine.model import LanguageModel

SLOTS = ("candidate", "candidate1")  # two adapters that are far apart
PROMPTS = ("Advise me about fear.", "Hello.", "Tell me about wine, please.")
NEAR = 0.5  # nats that a token may be less likely than the likeliest one: another precision may prefer the other
DRAWS = 120  # samples of one token
DEVIATIONS = 6  # that a frequency may be away from its probability
Said = list[list[list[tuple[int, ...]]]]


def check_sampler(plugin: Sampler, *, model: str | None = None, seed: int = 0, exempt: Collection[str] = ()) -> None:
    """Check a sampler on a causal language model (default: moalign's tiny one) with two made-up adapters.

    ``exempt``: names of checks to leave out. Raises ConformanceError.
    """
    import torch

    from moalign import lora
    from moalign.config import BUILT_IN_DIRECTORY, BUILT_IN_MODEL, ModelSettings
    from moalign.engine import model as models

    path = model or str(BUILT_IN_DIRECTORY / BUILT_IN_MODEL)
    own = models.load(path, ModelSettings(dtype="float32"), torch.device("cpu"))
    lora.add_slots(own.policy, SLOTS)
    generator = torch.Generator().manual_seed(seed)
    for slot in SLOTS:
        for parameter in lora.parameters(own.policy, slot):
            parameter.data.normal_(std=0.15, generator=generator)
    review = Review("sampler", plugin)
    with tempfile.TemporaryDirectory() as place:
        folders = [Path(place, slot) for slot in SLOTS]
        for slot, folder in zip(SLOTS, folders, strict=True):
            folder.mkdir()
            lora.write(own.policy, slot, folder, own.fingerprint)
        info = SamplerInfo(path, "float32", own.head.weight.shape[0], 8)
        trial = Trial(review, plugin, own, info, folders, seed)
        try:
            run(CHECKS, trial, exempt)
        finally:
            if trial.started is not None:
                trial.started.close()


@dataclass
class Trial:
    review: Review
    plugin: Sampler
    own: LanguageModel
    info: SamplerInfo
    folders: Sequence[Path]
    seed: int
    started: SamplingSession | None = None

    @property
    def session(self) -> SamplingSession:
        """Started when the first request is made, as in a run."""
        if self.started is None:
            change = "make ready for any causal language model"
            found = _called(self.review, "start", change, self.plugin.start, self.info)
            change = "return a SamplingSession from start"
            self.review.require(isinstance(found, SamplingSession), "start", short(found), change)
            self.started = found
        return self.started

    @property
    def prompts(self) -> list[tuple[int, ...]]:
        return [tuple(self.own.tokeniser.prompt(prompt)) for prompt in PROMPTS]

    @property
    def how(self) -> Sampling:
        return Sampling(3, 1.0, 1.0, 6, tuple(sorted(self.own.end_ids)), self.seed + 1)

    def said(
        self, tried: str, adapters: Sequence[Path | None], prompts: Sequence[tuple[int, ...]], how: Sampling
    ) -> Said:
        """What the session returns, checked as a run does."""
        from moalign.engine.outside import responses

        change = "sample must answer every request"
        found = _called(self.review, tried, change, self.session.sample, tuple(adapters), tuple(prompts), how)
        try:
            return responses(found, (len(adapters), len(prompts), how.samples), how, self.own.head.weight.shape[0])
        except MoalignError as error:
            change = "return token ids by adapter, prompt and sample, with the stop token that ends a response"
            self.review.fail(tried, described(error), change, error)

    def scores(self, adapter: str | None, ids: tuple[int, ...]) -> Tensor:
        """Log-probabilities of every next token, [length,V], as moalign computes them."""
        import torch

        from moalign import lora

        with lora.active(self.own.policy, adapter):
            return self.own.base(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)


def declarations_are_known(t: Trial) -> None:
    value = t.plugin.deterministic
    t.review.require(isinstance(value, bool), "reading the class attributes", short(value), "True or False")


def every_request_is_answered(t: Trial) -> None:
    """So many adapters, prompts and samples as were asked for; ids of the vocabulary; ends as they should be."""
    first, second = t.folders
    t.said("two adapters and the base", [first, None, second], t.prompts, t.how)
    t.said("one prompt, one sample, one token", [first], t.prompts[:1], replace(t.how, samples=1, max_new_tokens=1))
    t.said("the same prompt twice", [None], t.prompts[:1] * 2, t.how)
    t.said("a temperature of 0.5", [first], t.prompts, replace(t.how, temperature=0.5))


def greedy_responses_are_the_policys(t: Trial) -> None:
    """With temperature 0 each token is the likeliest under that adapter, or as good as."""
    how = replace(t.how, samples=1, temperature=0.0)
    first, second = t.folders
    found = t.said("temperature 0", [first, None, second], t.prompts, how)
    change = "run the adapter that is asked for, over the whole prompt, and take the likeliest token"
    for adapter, mine in zip((SLOTS[0], None, SLOTS[1]), found, strict=True):
        who = "the base" if adapter is None else f"adapter {SLOTS.index(adapter)}"
        for prompt, (ids,) in zip(t.prompts, mine, strict=True):
            scores = t.scores(adapter, prompt + ids)[len(prompt) - 1 : -1]
            behind = [float(row.max() - row[token]) for row, token in zip(scores, ids, strict=True)]
            got = f"under {who} a token that is {max(behind):.2g} nats less likely than another"
            t.review.require(max(behind) <= NEAR, "temperature 0", got, change)
    t.review.require(found[0] != found[2], "temperature 0", "the same responses under two adapters", change)


def samples_follow_the_policy(t: Trial) -> None:
    """The first tokens of many samples are as frequent as they are likely."""
    _frequencies(t, "many samples", replace(t.how, samples=DRAWS, max_new_tokens=1))
    _frequencies(t, "many samples at temperature 0.5", replace(t.how, samples=DRAWS, max_new_tokens=1, temperature=0.5))


def a_nucleus_is_kept_to(t: Trial) -> None:
    """With a small top_p nothing but the likeliest token is left."""
    how = replace(t.how, top_p=1e-4)
    found = t.said("top_p 0.0001", [t.folders[0]], t.prompts, how)[0]
    change = "sample from the smallest set of likeliest tokens that have the mass top_p together"
    for prompt, mine in zip(t.prompts, found, strict=True):
        for ids in mine:
            scores = t.scores(SLOTS[0], prompt + ids)[len(prompt) - 1 : -1]
            behind = max(float(row.max() - row[token]) for row, token in zip(scores, ids, strict=True))
            got = f"a token that is {behind:.2g} nats less likely than another"
            t.review.require(behind <= NEAR, "top_p 0.0001", got, change)


def samples_differ(t: Trial) -> None:
    """Those of one prompt, and those of another seed."""
    how = replace(t.how, samples=6)
    found = t.said("6 samples", [t.folders[0]], t.prompts, how)
    change = "draw each sample for itself, from a generator that the seed decides"
    t.review.require(all(len(set(mine)) > 1 for mine in found[0]), "6 samples", "all of them alike", change)
    other = t.said("another seed", [t.folders[0]], t.prompts, replace(how, seed=how.seed + 12345))
    t.review.require(found != other, "another seed", "the same responses", change)


def deterministic_is_honest(t: Trial) -> None:
    if not t.plugin.deterministic:
        return
    first, second = t.folders
    before = t.said("a request", [first, second], t.prompts, t.how)
    t.said("something else", [None], t.prompts[:2], replace(t.how, seed=99))
    after = t.said("the request again", [first, second], t.prompts, t.how)
    change = "let what is drawn follow from the seed alone, or declare deterministic = False"
    t.review.require(before == after, "the same request again", "other responses", change)


CHECKS: tuple[Callable[[Trial], None], ...] = (
    declarations_are_known,
    every_request_is_answered,
    greedy_responses_are_the_policys,
    samples_follow_the_policy,
    a_nucleus_is_kept_to,
    samples_differ,
    deterministic_is_honest,
)


def _called(review: Review, tried: str, change: str, method: Callable[..., Any], *arguments: Any) -> Any:
    """Global generators are not watched: who loads a model draws its weights first, and moalign puts them back."""
    try:
        return method(*arguments)
    except Exception as error:
        review.fail(tried, described(error), change, error)


def _frequencies(t: Trial, tried: str, how: Sampling) -> None:
    import torch

    prompt = t.prompts[0]
    ((found,),) = t.said(tried, [t.folders[0]], [prompt], how)
    probabilities = (t.scores(SLOTS[0], prompt)[-1] / how.temperature).softmax(-1)
    frequencies = torch.bincount(torch.tensor([ids[0] for ids in found]), minlength=len(probabilities)) / len(found)
    allowed = DEVIATIONS * (probabilities * (1 - probabilities) / len(found)).sqrt() + 2 / len(found)
    away = (frequencies - probabilities).abs()
    worst = int((away - allowed).argmax())
    often, likely = float(frequencies[worst]), float(probabilities[worst])
    got = f"token {worst} first in {often:.3g} of {len(found)} samples, and its probability is {likely:.3g}"
    change = "sample from softmax(scores / temperature) of the adapter that is asked for, without penalties or top-k"
    t.review.require(bool((away <= allowed).all()), tried, got, change)
