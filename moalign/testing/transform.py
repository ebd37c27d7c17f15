"""Whether a transform keeps to the contract of ``moalign.api.Transform``."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from moalign.api import Responses, Transform
from moalign.testing.review import Review, run, short
from moalign.testing.states import State, begun, check_state, through_json
from moalign.testing.watched import changed_fields, copied, unchanged

if TYPE_CHECKING:
    from torch import Tensor

LONGEST = 600  # tokens of a made-up response


def check_transform(
    plugin: Transform, *, prompts: int = 4, samples: int = 5, seed: int = 0, exempt: Collection[str] = ()
) -> None:
    """Check a transform on made-up rewards of ``samples`` responses to each of ``prompts`` prompts, and on odd ones.

    ``exempt``: names of checks to leave out. Raises ConformanceError.
    """
    import torch  # noqa: F401  (so that the watch over random states sees torch's)

    run(CHECKS, Trial(Review("transform", plugin), plugin, prompts, samples, seed), exempt)


Case = tuple[str, "Tensor", Responses]  # what it is, rewards, about


@dataclass(frozen=True)
class Trial:
    review: Review
    plugin: Transform
    prompts: int
    samples: int
    seed: int

    def case(self, seed: int = 0) -> Case:
        """Rewards of both signs; lengths, ends and, where they are asked for, the base's rewards at random."""
        import torch

        generator = torch.Generator().manual_seed(self.seed + 1000 * seed)
        count = self.prompts * self.samples
        groups = torch.arange(self.prompts).repeat_interleave(self.samples)[torch.randperm(count, generator=generator)]
        reference = None
        if wanted := self.plugin.references():
            base = torch.randn((self.prompts, wanted), generator=generator, dtype=torch.float64)
            reference = base[groups]
        about = Responses(
            number=seed,
            groups=groups,
            lengths=torch.randint(1, LONGEST, (count,), generator=generator),
            ended=torch.rand(count, generator=generator) < 0.7,
            reference=reference,
        )
        return "rewards of both signs", torch.randn(count, generator=generator, dtype=torch.float64), about

    def cases(self) -> Iterator[Case]:
        """The ordinary one, and what occurs more rarely."""
        import torch

        what, rewards, about = self.case()
        yield what, rewards, about
        yield "rewards that are all alike", torch.full_like(rewards, 0.1), about
        yield "rewards that are all 0", torch.zeros_like(rewards), about
        yield "rewards of a million", 1e6 + rewards, about
        yield "rewards of both signs and a million in size", 1e6 * rewards, about
        yield "one response", rewards[:1], rows_of(about, torch.tensor([0]))
        each_own = replace(about, groups=torch.arange(len(rewards)) * 7)
        yield "a group of its own for each response", rewards, each_own
        if about.reference is not None:
            known = torch.zeros_like(about.reference, dtype=torch.bool)
            known[:, 0] = True
            abstained = replace(about, reference=about.reference.where(known, torch.nan))
            yield "a reward that abstained on all but one of the base's responses (NaN)", rewards, abstained

    def start(self) -> State:
        return begun(self.review, self.plugin.init)

    def apply(self, tried: str, rewards: Tensor, about: Responses, state: State) -> tuple[Tensor, State]:
        """Checked for shape, finiteness and state, with the inputs watched."""
        import torch

        given = copied(rewards), copied(about), copied(state)
        change = "apply must take the finite rewards of any round"
        found = self.review.answer(tried, change, self.plugin.apply, *given)
        plain = {"rewards": (rewards, given[0]), "state": (state, given[2])}
        touched = [name for name, pair in plain.items() if not unchanged(*pair)] + changed_fields(about, given[1])
        change = "compute new tensors and a new state; write into none that was handed over"
        self.review.require(not touched, tried, f"{', '.join(touched)} changed during the call", change)
        change = "return two things: the rewards as they are to count, and the state after this round"
        self.review.require(isinstance(found, tuple) and len(found) == 2, tried, short(found), change)
        values, after = found
        got = f"{values.dtype} {list(values.shape)}" if isinstance(values, torch.Tensor) else type(values).__name__
        good = isinstance(values, torch.Tensor) and values.shape == rewards.shape and values.dtype == rewards.dtype
        change = "return a float64 for each response, [N] like the rewards"
        self.review.require(good, f"{tried}, {len(rewards)} responses", got, change)
        bad = values[~values.isfinite()].tolist()
        change = "guard divisions by a deviation of 0, logarithms and exponentials; leave out what is NaN"
        self.review.require(not bad, tried, f"{bad[:1]}, which is not finite", change)
        check_state(self.review, tried, after)
        return values, after


def declarations_are_known(t: Trial) -> None:
    """``monotone`` and ``pointwise`` are said, and ``references`` is a count."""
    for name in ("monotone", "pointwise"):
        value = getattr(t.plugin, name)
        t.review.require(isinstance(value, bool), f"reading {name}", short(value), f"declare {name} as True or False")
    count = t.plugin.references()
    good = isinstance(count, int) and not isinstance(count, bool) and count >= 0
    t.review.require(good, "references()", short(count), "return how many of the base's responses it wants; 0: none")


def one_finite_number_per_response(t: Trial) -> None:
    for tried, rewards, about in t.cases():
        t.apply(tried, rewards, about, t.start())


def state_is_all_it_remembers(t: Trial) -> None:
    """Three rounds, twice, the second time with a state that went through JSON: the same to the last bit."""
    import torch

    results: list[list[Tensor]] = []
    for stored in (False, True):
        state, values = t.start(), []
        for number in range(3):
            _, rewards, about = t.case(number)
            found, state = t.apply(f"round {number}", rewards, about, state)
            values.append(found)
            state = through_json(state) if stored else state
        results.append(values)
    same = all(torch.equal(first, second) for first, second in zip(*results, strict=True))
    change = "keep what is remembered in the state that is returned, never in the plugin; draw nothing at random"
    t.review.require(same, "the same three rounds twice", "other rewards the second time", change)


def order_changes_nothing(t: Trial) -> None:
    """Responses in another order, and groups with other numbers."""
    import torch

    what, rewards, about = t.case()
    order = torch.randperm(len(rewards), generator=torch.Generator().manual_seed(t.seed))
    before, _ = t.apply(what, rewards, about, t.start())
    tried = "the same responses in another order"
    after, _ = t.apply(tried, rewards[order], rows_of(about, order), t.start())
    change = "treat the responses alike wherever they stand; those to one prompt need not stand side by side"
    t.review.require(_close(before[order], after), tried, "other rewards for the same responses", change)
    tried = "the same groups with other numbers"
    renumbered = replace(about, groups=90 - 7 * about.groups)
    after, _ = t.apply(tried, rewards, renumbered, t.start())
    change = "use the groups' numbers only to see which responses belong together"
    t.review.require(_close(before, after), tried, "other rewards", change)


def more_reward_is_never_less(t: Trial) -> None:
    """Within a group, among responses alike in all else; where ``monotone`` is declared."""
    import torch

    if not t.plugin.monotone:
        return
    what, rewards, about = t.case()
    alike = replace(about, lengths=torch.full_like(about.lengths, 20), ended=torch.ones_like(about.ended))
    for scale in (0.1, 1.0, 100.0):
        values, _ = t.apply(what, scale * rewards, alike, t.start())
        within = about.groups[:, None] == about.groups
        wrong = within & (rewards[:, None] > rewards) & (values[:, None] < values - 1e-9 * values.abs())
        tried = f"rewards {scale:g} times as large, of responses that end after 20 tokens"
        change = "let more reward never count less: it is larger is better; or declare monotone = False"
        t.review.require(not bool(wrong.any()), tried, "a response with more reward than another gets less", change)


def pointwise_is_honest(t: Trial) -> None:
    """What is declared pointwise gives each response what it gets alone, and keeps no state."""
    import torch

    if not t.plugin.pointwise:
        return
    what, rewards, about = t.case()
    state = t.start()
    together, after = t.apply(what, rewards, about, state)
    change = "declare pointwise = False: the transform looks at other responses or at earlier rounds"
    t.review.require(dict(after) == dict(state), what, f"another state after the round, {short(after)}", change)
    for row in range(len(rewards)):
        only = torch.tensor([row])
        alone, _ = t.apply("one of the responses alone", rewards[only], rows_of(about, only), state)
        got = f"{float(alone):g}, and {float(together[row]):g} beside others"
        t.review.require(_close(alone, together[only]), "one of the responses alone", got, change)


def references_are_used(t: Trial) -> None:
    """What the base got is asked for only where it changes something: sampling it costs."""
    import torch

    what, rewards, about = t.case()
    if about.reference is None:
        return
    before, _ = t.apply(what, rewards, about, t.start())
    other = replace(about, reference=about.reference + 1.5)
    after, _ = t.apply("other rewards of the base", rewards, other, t.start())
    change = "return 0 from references(): the base is sampled and scored for it"
    differs = not torch.equal(before, after)
    t.review.require(differs, "other rewards of the base", "the same result, though references() is not 0", change)


CHECKS: tuple[Callable[[Trial], None], ...] = (
    declarations_are_known,
    one_finite_number_per_response,
    state_is_all_it_remembers,
    order_changes_nothing,
    more_reward_is_never_less,
    pointwise_is_honest,
    references_are_used,
)


def rows_of(about: Responses, rows: Tensor) -> Responses:
    reference = None if about.reference is None else about.reference[rows]
    return Responses(about.number, about.groups[rows], about.lengths[rows], about.ended[rows], reference)


def _close(first: Tensor, second: Tensor) -> bool:
    import torch

    return bool(torch.isclose(first, second, rtol=1e-9, atol=1e-9).all())
