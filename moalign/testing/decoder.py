"""Whether a decoder keeps to the contract of ``moalign.api.Decoder``."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from moalign.api import Decoder, NextToken, Request, UserError
from moalign.testing.review import Review, described, run, short

if TYPE_CHECKING:
    from torch import Tensor

VOCABULARY, WIDTH, ROWS = 17, 6, 5
MOST_RESPONSES = 1000  # that are made up for ``keep``
CLOSE = 1e-4  # float32 logits of a few units
NAMES = ("first", "second", "third")


def check_decoder(
    plugin: Decoder, *, requests: Sequence[Request] = (), seed: int = 0, exempt: Collection[str] = ()
) -> None:
    """Check a decoder on made-up logits of candidates called first, second and third, and on rewards of two objectives.

    ``requests``: what it is asked for, where it needs candidates or values of other names; else one candidate alone,
    two and three of them mixed. At least one of them it must answer; the others it may refuse with a UserError.
    ``exempt``: names of checks to leave out. Raises ConformanceError.
    """
    import torch  # noqa: F401  (so that the watch over random states sees torch's)

    asked = tuple(requests) or _requests()
    run(CHECKS, Trial(Review("decoder", plugin), plugin, asked, seed), exempt)


def _requests() -> tuple[Request, ...]:
    values: Mapping[str, Callable[[Tensor], Tensor]] = {
        "helpful": lambda hidden: hidden.mean(-1),
        "harmless": lambda hidden: hidden[..., 0] ** 2,
    }
    shares = ({"first": 1.0}, {"first": 0.3, "second": 0.7}, {"first": 0.2, "second": 0.3, "third": 0.5})
    weights = ((1.0, 0.0), (0.25, 0.75), (0.5, 0.5))
    return tuple(
        Request({"helpful": first, "harmless": second}, share, values)
        for share, (first, second) in zip(shares, weights, strict=True)
    )


@dataclass
class Trial:
    review: Review
    plugin: Decoder
    requests: Sequence[Request]
    seed: int
    answered: list[tuple[Request, list[str | None]]] = field(default_factory=list)

    def steps(self) -> Iterator[tuple[str, Request, NextToken]]:
        """Every request that is answered, with logits as they occur: flat, peaked, of one row, with some forbidden."""
        import torch

        generator = torch.Generator().manual_seed(self.seed)
        for request, names in self.answered:
            logits = torch.randn(len(names), ROWS, VOCABULARY, generator=generator)
            yield "ordinary logits", request, self.at(logits)
            yield "logits of one row", request, self.at(logits[:, :1])
            yield "logits that are all alike", request, self.at(torch.zeros_like(logits))
            yield "peaked logits", request, self.at(30 * logits)
            forbidden = logits.clone()
            forbidden[..., ::4] = -torch.inf
            yield "logits of which some are -inf", request, self.at(forbidden)

    def at(self, logits: Tensor) -> NextToken:
        """A step with these logits, three tokens into the response."""
        import torch

        rows = logits.shape[1]
        ids = torch.arange(rows)[:, None] + torch.arange(4)
        past = -torch.arange(1.0, 1 + len(logits) * rows, dtype=torch.float64).view(len(logits), rows) / rows
        states = torch.randn(VOCABULARY, WIDTH, generator=torch.Generator().manual_seed(self.seed + 1))

        def ahead(tokens: Tensor) -> Tensor:
            return states[tokens]

        return NextToken(ids, logits, past, ahead)

    def scores(self, tried: str, request: Request, at: NextToken) -> Tensor:
        """Checked for shape, type and value, with the inputs watched."""
        import torch

        given = replace(at, ids=at.ids.clone(), logits=at.logits.clone(), past=at.past.clone())
        change = "scores must take the logits of any step"
        try:
            found = self.review.call(tried, change, self.plugin.scores, request, given)
        except UserError as error:
            self.review.fail(tried, described(error), "refuse a request in speakers, before a model is loaded", error)
        touched = [
            name for name in ("ids", "logits", "past") if not torch.equal(getattr(at, name), getattr(given, name))
        ]
        change = "compute new tensors; write into none that was handed over"
        self.review.require(not touched, tried, f"{', '.join(touched)} changed during the call", change)
        got = f"{found.dtype} {list(found.shape)}" if isinstance(found, torch.Tensor) else type(found).__name__
        good = isinstance(found, torch.Tensor) and found.shape == at.logits.shape[1:] and found.is_floating_point()
        change = "return a floating-point score for each token of each row, [N,V]"
        self.review.require(good, f"{tried}, {list(at.logits.shape)}", got, change)
        wrong = found.isnan() | (found == torch.inf)
        change = "guard -inf - -inf and divisions; -inf forbids a token, NaN and inf mean nothing"
        self.review.require(not bool(wrong.any()), tried, short(found[wrong][:1].tolist()), change)
        nothing = found.isneginf().all(-1)
        self.review.require(not bool(nothing.any()), tried, "a row whose every token is forbidden", "leave one token")
        return found

    def keep(self, tried: str, request: Request, rewards: Tensor) -> int:
        given = rewards.clone()
        change = "keep must take the rewards of any responses, NaN where unknown"
        kept = self.review.call(tried, change, self.plugin.keep, request, given)
        same = bool(((given == rewards) | (given.isnan() & rewards.isnan())).all())
        self.review.require(same, tried, "the rewards changed during the call", "write into nothing that was given")
        good = isinstance(kept, int) and not isinstance(kept, bool) and 0 <= kept < len(rewards)
        change = "return the number of the response that is kept, a plain int from 0"
        self.review.require(good, f"{tried}, {len(rewards)} responses", short(kept), change)
        return kept


def speakers_are_named(t: Trial) -> None:
    """A list of candidates' names, None for the base; or a UserError for a request that has no meaning here."""
    refused = ""
    for request in t.requests:
        tried = f"the request {short(dict(request.shares))}, {short(dict(request.preference))}"
        change = "return the candidates' names in a list, None for the base; refuse with a PreferenceError"
        try:
            found = t.review.call(tried, change, t.plugin.speakers, request)
        except UserError as error:
            refused = described(error)
            continue
        names = not isinstance(found, str) and all(name is None or isinstance(name, str) for name in found)
        t.review.require(names and len(found) > 0, tried, short(found), change)
        t.answered.append((request, list(found)))
    change = "answer some request; one that needs names or values of its own is checked with `requests` of these"
    t.review.require(bool(t.answered), f"{len(t.requests)} requests", f"each refused, the last: {refused}", change)


def one_score_for_each_token(t: Trial) -> None:
    for tried, request, at in t.steps():
        t.scores(tried, request, at)


def same_twice(t: Trial) -> None:
    import torch

    for tried, request, at in t.steps():
        first, second = t.scores(tried, request, at), t.scores(tried, request, at)
        change = "keep nothing between calls, in the plugin or elsewhere; draw nothing at random, the host samples"
        t.review.require(torch.equal(first, second), f"{tried}, twice", "other scores the second time", change)


def rows_stand_alone(t: Trial) -> None:
    """Each row has the scores that it has in another order, or alone."""
    for tried, request, at in t.steps():
        together = t.scores(tried, request, at)
        for row in range(len(at.ids)):
            only = NextToken(at.ids[[row]], at.logits[:, [row]], at.past[:, [row]], at.ahead)
            alone = t.scores(f"{tried}, one row alone", request, only)
            change = "score every row by itself: no mean, ranking or normalising over rows"
            t.review.require(_close(alone[0], together[row]), f"{tried}, one row alone", "other scores", change)


def constants_mean_nothing(t: Trial) -> None:
    """Logits are defined up to a constant for each speaker and row; so are the probabilities that come of them."""
    import torch

    for tried, request, at in t.steps():
        shifts = torch.linspace(-2.0, 3.0, at.logits.shape[0] * len(at.ids)).view(len(at.logits), len(at.ids), 1)
        before = t.scores(tried, request, at).double().log_softmax(-1)
        moved = t.scores(tried, request, replace(at, logits=at.logits + shifts)).double().log_softmax(-1)
        change = "take differences of logits, or log_softmax of them; a model's logits may all be higher by anything"
        t.review.require(_close(before, moved), f"{tried}, each speaker's raised by a constant", "others", change)


def one_response_is_kept(t: Trial) -> None:
    """Where several are sampled: always one of them, and none that another beats in every objective with weight."""
    import torch

    count = t.plugin.responses()
    good = isinstance(count, int) and not isinstance(count, bool) and count >= 1
    t.review.require(good, "responses()", short(count), "return how many responses are sampled, at least 1")
    if count == 1:
        return
    count = min(count, MOST_RESPONSES)
    generator = torch.Generator().manual_seed(t.seed)
    for request, _ in t.answered:
        objectives = len(request.preference)
        rewards = torch.randn(count, objectives, generator=generator, dtype=torch.float64)
        for tried, given in (
            ("rewards of both signs", rewards),
            ("rewards that are all alike", torch.ones_like(rewards)),
            ("rewards of a million", 1e6 + rewards),
            (
                "rewards of which the first is unknown",
                torch.cat([torch.full_like(rewards[:1], torch.nan), rewards[1:]]),
            ),
        ):
            kept, again = t.keep(tried, request, given), t.keep(tried, request, given)
            t.review.require(kept == again, f"{tried}, twice", f"{kept}, then {again}", "choose without chance")
            carried = [place for place, weight in enumerate(request.preference.values()) if weight > 0]
            better = (given[:, carried] > given[kept, carried]).all(-1)
            got = f"response {kept}, though {int(better.sum())} others are better in every objective with weight"
            t.review.require(not bool(better.any()), tried, got, "rewards are larger is better, in every objective")


CHECKS: tuple[Callable[[Trial], None], ...] = (
    speakers_are_named,
    one_score_for_each_token,
    same_twice,
    rows_stand_alone,
    constants_mean_nothing,
    one_response_is_kept,
)


def _close(first: Tensor, second: Tensor) -> bool:
    """Where both are numbers; -inf may be a float32's rounding of a small one."""
    import torch

    likely = (first > -40) | (second > -40)
    return bool(torch.isclose(first, second, rtol=CLOSE, atol=CLOSE)[likely].all())
