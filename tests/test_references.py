"""References that follow the policy: what they coincide with in their limits, to the last bit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from references import HALF, built, deltas, norm, offline, online, same, trained

from moalign import lora
from moalign.api import Move, Objective, Progress, Reference
from moalign.engine.model import TRAINED
from moalign.engine.reference_policy import BASE, FrozenPolicy, MovingReference
from moalign.errors import PluginError
from moalign.lora import frozen
from moalign.sweeps.candidate import job_of


@pytest.fixture(scope="module")
def pairs(tiny_model_path, tmp_path_factory):
    return offline(tiny_model_path, tmp_path_factory.mktemp("pairs"))


@pytest.fixture(scope="module")
def rounds():
    return online()


@pytest.mark.parametrize("world", ["pairs", "rounds"])
def test_the_base_is_what_a_configuration_that_is_silent_gets(world, request):
    workshop = request.getfixturevalue(world)
    ((plain, told),) = trained(workshop, None)
    ((named, also),) = trained(workshop, built("base"))
    assert same(plain, named) and told.steps == also.steps
    assert any(any(value.flatten().tolist()) for name, value in plain.items() if "lora_B" in name)


@pytest.mark.parametrize(
    ("frozen_one", "options"),
    [
        ("moving-average", {"decay": 1.0, "every": 1}),
        ("snapshot", {"every": 1000}),
        ("kl-triggered", {"threshold": 1e9, "every": 2}),
    ],
)
@pytest.mark.parametrize("world", ["pairs", "rounds"])
def test_what_never_leaves_the_start_is_the_base(frozen_one, options, world, request):
    workshop = request.getfixturevalue(world)
    ((plain, told),) = trained(workshop, None)
    ((found, also),) = trained(workshop, built(frozen_one, **options))
    assert same(plain, found) and told.losses == also.losses


def test_one_round_has_the_base_as_its_previous_iterate(rounds):
    settings = rounds.plan.config.rollouts.model_copy(update={"rounds": 1})
    changed = rounds.plan.config.model_copy(update={"rollouts": settings})
    single = replace(rounds, plan=replace(rounds.plan, config=changed))
    ((plain, _),) = trained(single, None)
    ((found, _),) = trained(single, built("previous-iterate"))
    ((more, _),) = trained(rounds, built("previous-iterate"))
    ((base, _),) = trained(rounds, None)
    assert same(plain, found) and not same(more, base)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("moving-average", {"decay": 0.0, "every": 1}),
        ("kl-triggered", {"threshold": 0.0, "every": 1}),
        ("previous-iterate", {"every": 1}),
    ],
)
def test_what_follows_every_step_is_the_policy_itself(pairs, name, options):
    ((plain, told),) = trained(pairs, built("snapshot", every=1))
    ((found, also),) = trained(pairs, built(name, **options))
    assert same(plain, found) and told.losses == also.losses
    assert also.of("kl_estimate") == [0.0] * 6


def test_a_snapshot_is_the_policy_of_its_step(pairs):
    """The policy meets itself at even steps, to the last bit, and an older self at odd ones."""
    ((_, told),) = trained(pairs, built("snapshot", every=2))
    kl = told.of("kl_estimate")
    assert kl[::2] == [0.0] * 3 and all(value > 0 for value in kl[1::2])
    assert told.of("reference/moved_at") == [0.0, 0.0, 2.0, 2.0, 4.0, 4.0]


def test_the_previous_iterate_is_that_of_the_round(rounds):
    ((_, told),) = trained(rounds, built("previous-iterate"))
    kl = told.of("kl_estimate")
    assert kl[::2] == [0.0] * 3 and all(value > 0 for value in kl[1::2])


def test_what_is_known_of_a_round_is_under_its_reference():
    """The policy that sampled a round is its previous iterate, so log-ratios are 0; from the base they are not."""
    workshop = online(loss={"name": "grpo", "beta": 0.1, "kl": "reward"})
    (_, told), (_, also) = trained(workshop, built("previous-iterate"), None)
    assert told.of("kl_sampled") == [0.0] * 6
    assert also.of("kl_sampled")[0] == 0.0 and all(value != 0 for value in also.of("kl_sampled")[2:])
    kl = told.of("kl_estimate")  # of other passes than those of the round: equal to rounding
    assert all(abs(value) < 1e-9 for value in kl[::2]) and all(value > 1e-6 for value in kl[1::2])


def test_an_anchor_is_moved_where_the_policy_is_too_far(pairs):
    ((_, told),) = trained(pairs, built("snapshot", every=1000))
    far = told.of("kl_estimate")
    ((_, also),) = trained(pairs, built("kl-triggered", threshold=far[2] / 2, every=1))
    moved = also.of("reference/moved_at")
    assert moved[0] == 0.0 and max(moved) > 0 and also.of("kl_estimate")[int(max(moved))] == 0.0
    assert also.steps[int(max(moved))]["reference/kl"] > far[2] / 2


def test_each_of_a_pass_has_a_reference_of_its_own(pairs):
    references = [built("snapshot", every=2), None, built("moving-average", decay=0.5, every=1)]
    together = trained(pairs, *references)
    alone = [trained(pairs, each)[0] for each in references]
    for (mine, told), (own, also) in zip(together, alone, strict=True):
        for name, value in own.items():
            torch.testing.assert_close(mine[name], value, rtol=0, atol=1e-5)
        assert told.of("reference/moved_at") == also.of("reference/moved_at")
    assert not same(together[0][0], together[1][0])


def test_log_probabilities_of_what_moves_are_not_kept(pairs):
    before = set(pairs.cache._known)
    trained(pairs, built("snapshot", every=2))
    assert set(pairs.cache._known) == before | {""}


class Looking(Objective):
    """Sums of log-probabilities, and what the batches held."""

    needs = frozenset({"pairs", "reference", "base"})

    def loss(self, batch, terms):
        SEEN.append((batch.logps.detach().clone(), batch.ref_logps.clone(), batch.base_logps.clone()))
        return batch.logps.sum(-1)[batch.pairs[:, 1]] - batch.logps.sum(-1)[batch.pairs[:, 0]]


SEEN: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []


def test_a_loss_may_see_the_base_beside_the_reference(pairs):
    """At even steps the reference is the policy; the base is what it was at step 0."""
    SEEN.clear()
    job = {"objective": Looking(), "needs": Looking.needs}
    trained(pairs, built("snapshot", every=2), **job)
    assert len(SEEN) == 6
    for step, (own, reference, base) in enumerate(SEEN):
        assert torch.equal(own, reference) == (step % 2 == 0)
        assert torch.equal(own, base) == (step == 0)
    seen = [base for _, _, base in SEEN]
    SEEN.clear()
    trained(pairs, None, **job)
    for before, (_, reference, base) in zip(seen, SEEN, strict=True):
        assert torch.equal(reference, base) and torch.equal(before, base)


def test_a_warm_start_begins_with_itself_as_the_iterate(pairs, tmp_path):
    """Nothing is learned: the policy stays the parent's adapter, from which the base differs."""
    trained(pairs, None)
    lora.write(pairs.model.policy, TRAINED, tmp_path, pairs.model.fingerprint)
    still = job_of(HALF, pairs, ()).settings.model_copy(update={"lr": 0.0, "steps": 2})
    ((_, base),) = trained(pairs, None, parent=tmp_path, settings=still)
    ((_, told),) = trained(pairs, built("previous-iterate", every=9), parent=tmp_path, settings=still)
    assert all(value > 0 for value in base.of("kl_estimate")) and told.of("kl_estimate") == [0.0, 0.0]


# --- sums in delta space ---------------------------------------------------------------------------------------------


def some_slots(workshop, count: int) -> list[str]:
    """Adapters with weights everywhere."""
    names = [f"some{place}" for place in range(count)]
    lora.add_slots(workshop.model.policy, names)
    generator = torch.Generator().manual_seed(0)
    for name in names:
        for parameter in lora.parameters(workshop.model.policy, name):
            parameter.data = torch.randn(parameter.shape, generator=generator) / 8
    return names


def test_a_sum_is_one_of_products_and_not_of_factors(pairs):
    policy = pairs.model.policy
    one, other = some_slots(pairs, 2)
    each = [deltas(lora.weights(policy, slot), frozen.scaling(policy, slot)) for slot in (one, other)]
    factors = [lora.weights(policy, slot) for slot in (one, other)]
    lora.add_slots(policy, ["sum"])
    size = frozen.add_up(policy, "sum", {one: 0.3, other: 0.7}, None)
    found = deltas(lora.weights(policy, "sum"), frozen.scaling(policy, "sum"))
    wanted = {name: 0.3 * value + 0.7 * each[1][name] for name, value in each[0].items()}
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-6)
    assert size.cut == 0 and size.kept == pytest.approx(norm(wanted), rel=1e-6)
    averaged = {name: 0.3 * value + 0.7 * factors[1][name] for name, value in factors[0].items()}
    naive = deltas(averaged, frozen.scaling(policy, one))
    apart = norm({name: naive[name] - value for name, value in wanted.items()})
    assert apart > 0.3 * norm(wanted)


@pytest.mark.parametrize("rank", [3, 6, 100])
def test_a_moving_average_is_exact_but_for_what_it_reports(pairs, rank):
    """Against the average of the products; what is missing is within the bound, and nothing where the rank suffices."""
    policy, decay = pairs.model.policy, 0.8
    lora.add_slots(policy, [TRAINED])
    moving = MovingReference(built("moving-average", decay=decay, every=1, rank=rank), pairs.model, TRAINED)
    lora.initialise(policy, TRAINED, 0)
    moving.before(0, None, lambda adapter: (0.0, 0.0))
    assert moving.now == BASE
    generator = torch.Generator().manual_seed(1)
    exact: dict[str, torch.Tensor] = {}
    for step in range(1, 6):
        for parameter in lora.parameters(policy, TRAINED):
            parameter.data = parameter.data + 0.02 * torch.randn(parameter.shape, generator=generator)
        moving.before(step, None, lambda adapter: (0.0, 0.0))
        now = deltas(lora.weights(policy, TRAINED), frozen.scaling(policy, TRAINED))
        exact = {name: (1 - decay) * value + decay * exact.get(name, 0 * value) for name, value in now.items()}
    found = deltas(lora.weights(policy, moving.slot), frozen.scaling(policy, moving.slot))
    missing = norm({name: found[name] - value for name, value in exact.items()}) / norm(found)
    lost = moving.figures["reference/lost"]
    assert moving.figures["reference/norm"] == pytest.approx(norm(found), rel=1e-5)
    assert missing <= lost + 1e-6
    assert lost == 0 if rank == 100 else lost > 1e-3


def test_a_copy_is_one_to_the_last_bit_whatever_the_rank(pairs):
    policy = pairs.model.policy
    (one,) = some_slots(pairs, 1)
    lora.add_slots(policy, ["copy"])
    cut = {name: value[:2] if "lora_A" in name else value[:, :2] for name, value in lora.weights(policy, one).items()}
    frozen.place(policy, "copy", cut)
    assert lora.room(policy, "copy") == 2
    frozen.duplicate(policy, one, "copy")
    assert same(lora.weights(policy, one), lora.weights(policy, "copy"))
    assert frozen.scaling(policy, one) == frozen.scaling(policy, "copy")
    assert not frozen.adds_nothing(policy, "copy")
    lora.initialise(policy, one, 0)
    assert frozen.adds_nothing(policy, one) and not frozen.adds_nothing(policy, "copy")


class Scripted(Reference):
    """Returns what it is told to."""

    result: object = None

    def moves(self, at, state):
        return self.result


class Forgetful(Reference):
    def init(self):
        return None


SHARED: dict[str, list[int]] = {"looks": []}


class Writing(Reference):
    """Hands out one state to all, and writes into it."""

    def init(self):
        return SHARED

    def moves(self, at, state):
        state["looks"].append(at.step)
        return None, state


WORD: Any = "all"
TENSOR: Any = torch.ones(2)


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (Move(), r"in moves: it must return a Move or None, and the state"),
        ((1.0, {}), r"in moves: float is no moalign\.api\.Move"),
        ((Move(policy=float("nan")), {}), r"in moves: Move\(policy=nan.* is not finite"),
        ((Move(reference=WORD), {}), r"in moves: Move\(policy=1\.0, reference='all'\) has what is no number"),
        ((Move(policy=TENSOR), {}), r"in moves: Move\(policy=tensor.* has what is no number"),
        ((Move(policy=True), {}), r"in moves: Move\(policy=True, .* has what is no number"),
    ],
)
def test_what_is_no_move_is_refused(pairs, result, message):
    moving = MovingReference(Scripted(result=result), pairs.model, TRAINED)
    with pytest.raises(PluginError, match=message):
        moving.before(0, None, lambda adapter: (0.0, 0.0))


def test_a_state_that_is_none_is_refused(pairs):
    with pytest.raises(PluginError, match=r"in init: it must return a mapping, not None"):
        MovingReference(Forgetful(), pairs.model, TRAINED)


def test_what_it_does_to_its_state_stays_with_it(pairs):
    """Else candidates whose states are one object would meet."""
    first, second = (MovingReference(Writing(), pairs.model, TRAINED) for _ in range(2))
    assert first.state is second.state
    first.before(0, None, lambda adapter: (0.0, 0.0))
    assert first.state == {"looks": [0]} and second.state == {"looks": []}


def test_a_step_is_asked_about_once(pairs):
    lora.initialise(pairs.model.policy, TRAINED, 0)
    moving = MovingReference(built("snapshot", every=1), pairs.model, TRAINED)
    for _ in range(2):
        moving.before(4, 2, lambda adapter: (0.0, 0.0))
    assert moving.figures["reference/moves"] == 1 and moving.state == {"step": 4}


def test_what_begins_with_an_adapter_moves_from_there(pairs):
    """Half of the policy, which adds nothing yet, and half of the adapter so far."""
    (one,) = some_slots(pairs, 1)
    policy = pairs.model.policy
    lora.initialise(policy, TRAINED, 0)
    start = FrozenPolicy(one, "some adapter")
    moving = MovingReference(Scripted(result=(Move(0.5, 0.5), {})), pairs.model, TRAINED, start)
    moving.before(0, None, lambda adapter: (0.0, 0.0))
    half = deltas(lora.weights(policy, moving.slot), frozen.scaling(policy, moving.slot))
    for name, value in deltas(lora.weights(policy, one), frozen.scaling(policy, one)).items():
        torch.testing.assert_close(half[name], value / 2, rtol=0, atol=1e-6)
    assert moving.now.adapter == moving.slot and not moving.now.fixed


def test_what_is_measured_is_told(pairs):
    reference = built("kl-triggered", threshold=1.0, every=5)
    assert not reference.measures(Progress(0), reference.init())
    move, state = reference.moves(Progress(0), reference.init())
    assert move == Move() and not reference.measures(Progress(4), state) and reference.measures(Progress(5), state)
    assert reference.moves(Progress(5, None, 1.0, 9.0), state) == (None, {"step": 5})
    assert reference.moves(Progress(5, None, 1.01, -9.0), state) == (Move(), {"step": 5})
    signed = built("kl-triggered", threshold=1.0, every=5, measure="log-ratio")
    assert signed.moves(Progress(5, None, 9.0, -9.0), state)[0] is None
