"""What no policy exceeds, by everybody's samples: of small worlds by enumeration, and as a run keeps them."""

from __future__ import annotations

import json

import numpy as np
import pytest
from sweeps import short_rebel

from moalign import storage
from moalign.engine.optimum import Optimum
from moalign.errors import CorruptFileError
from moalign.sweeps import front, optima
from moalign.sweeps.optima import Sampled

PRICE = 0.3
GOOD = np.array([[0.0, 0.2, 0.5, 0.9, 1.0], [0.7, 0.1, 0.3, 0.0, 0.4]])  # two prompts, five replies
REWARDS = np.stack([GOOD, 1 - GOOD**2], -1)
REFERENCE = np.log(np.array([[0.4, 0.3, 0.2, 0.05, 0.05], [0.1, 0.2, 0.3, 0.2, 0.2]]))
ALONE = np.array([1.0, 0.0])


def best(weights):
    return PRICE * np.log((np.exp(REFERENCE) * np.exp(REWARDS @ weights / PRICE)).sum(1)).mean()


def normalised(logits):
    return logits - np.log(np.exp(logits).sum(1, keepdims=True))


def tilted(strength, weights=ALONE):
    return normalised(REFERENCE + strength * (REWARDS @ weights) / PRICE)


COLLAPSED = normalised(REFERENCE + 40 * np.eye(5)[[1, 2]])  # says one reply to each prompt, and not the best


def sampled(policy, rng, samples=24):
    places = [rng.choice(5, samples, p=np.exp(logps) / np.exp(logps).sum()) for logps in policy]
    rewards = np.concatenate([REWARDS[prompt, drawn] for prompt, drawn in enumerate(places)])
    ratios = np.concatenate([(policy - REFERENCE)[prompt, drawn] for prompt, drawn in enumerate(places)])
    return Sampled(rewards, ratios, tuple(np.repeat([0, 1], samples).tolist()))


def test_a_policy_that_says_one_thing_alone_does_not_know_what_it_misses_and_others_do():
    rng = np.random.default_rng(0)
    astray, other = sampled(COLLAPSED, rng), sampled(tilted(0.6), rng)
    assert astray.about(ALONE, PRICE).deviation < 1e-9  # it could not be surer
    assert optima.bounds({"astray": ALONE}, {"astray": astray}, PRICE)["astray"] < best(ALONE) - 0.1
    for asked in ({"astray": astray, "other": other}, {"other": other, "astray": astray}):
        value, error = other.about(ALONE, PRICE).bound
        found = optima.bounds({"astray": ALONE}, asked, PRICE)["astray"]
        assert found == pytest.approx(value + optima.ERRORS * error, rel=1e-12) and found > best(ALONE)


def test_the_base_contradicts_by_its_estimate_and_others_by_two_standard_errors_less():
    def estimate(value, error, deviation):
        return Optimum(value, error, value - 1, error, deviation, error)

    surest, next_to_it = estimate(1.0, 0.1, 0.5), estimate(1.2, 0.2, 0.6)
    allowed = 1.0 + optima.ERRORS * 0.1
    for who, value, believed in (
        (None, allowed, True),
        (None, allowed + 1e-9, False),
        ("third", allowed + optima.CONTRADICTED * 0.3 - 1e-9, True),
        ("third", allowed + optima.CONTRADICTED * 0.3 + 1e-9, False),
    ):
        said = {"surest": surest, "next": next_to_it, who: estimate(value, 0.3, 9.0)}
        assert optima._believed(said) == pytest.approx(allowed if believed else 1.2 + optima.ERRORS * 0.2, rel=1e-12)
    last = {"surest": surest, "next": next_to_it, None: estimate(9.0, 0.5, 9.0)}
    assert optima._believed(last) == 9.0 + optima.ERRORS * 0.5


def test_whose_samples_vary_least_is_believed():
    """The best policy's own estimate is exact, whoever else is asked; one policy for each of four weights."""
    rng = np.random.default_rng(1)
    weights = {str(first): np.array([first, 1 - first]) for first in (0.0, 0.3, 0.8, 1.0)}
    everybody = {name: sampled(tilted(1.0, each), rng) for name, each in weights.items()}
    found = optima.bounds(weights, everybody, PRICE)
    assert found == {name: pytest.approx(best(each), abs=1e-9) for name, each in weights.items()}


def test_the_bounds_of_policies_far_and_near_are_rarely_missed():
    rng, tries, missed = np.random.default_rng(2), 300, 0
    for _ in range(tries):
        policies = {"far": tilted(0.0), "near": tilted(0.8), "other": tilted(1.0, np.array([0.2, 0.8]))}
        everybody = {name: sampled(policy, rng) for name, policy in policies.items()}
        missed += optima.bounds({"far": ALONE}, everybody, PRICE)["far"] < best(ALONE)
    assert missed / tries < 0.02 + 3 * np.sqrt(0.02 * 0.98 / tries)


def test_an_objective_that_abstains_matters_to_those_alone_who_want_it():
    rng = np.random.default_rng(3)
    known = sampled(tilted(1.0), rng)
    rewards = known.rewards.copy()
    rewards[0, 1] = np.nan
    found = optima.bounds({"a": ALONE, "b": np.array([0.5, 0.5])}, {"a": Sampled(rewards, *_rest(known))}, PRICE)
    assert found == {"a": pytest.approx(best(ALONE), abs=1e-9)}


def test_errors_are_those_of_the_means_over_these_prompts():
    rng, weights = np.random.default_rng(4), np.array([[1.0, 0.0], [0.3, 0.7], [0.0, 1.0]])
    known = sampled(tilted(0.7), rng, samples=6)
    for place, wanted in enumerate(weights):
        each = (known.rewards @ wanted - PRICE * known.log_ratios).reshape(2, 6)
        error = np.sqrt((each.var(1, ddof=1) / 6).sum()) / 2
        assert known.errors(weights, PRICE)[place] == pytest.approx(error, rel=1e-12)
    best_for_one = sampled(tilted(1.0), rng).errors(weights, PRICE)
    assert best_for_one[0] == pytest.approx(0, abs=1e-8) and (best_for_one[1:] > 0.01).all(), "sure of itself alone"
    assert sampled(tilted(1.0), rng, samples=1).errors(weights, PRICE) is None
    rewards = known.rewards.copy()
    rewards[0, 1] = np.nan
    assert Sampled(rewards, *_rest(known)).errors(weights, PRICE) is None


def _rest(known):
    return known.log_ratios, known.prompts


# --- as a run keeps them --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return short_rebel(
        tmp_path_factory.mktemp("rebel") / "run", "train.steps=2", "rollouts.rounds=2", "search.points=3"
    )


def test_samples_are_kept_with_what_they_are_worth(made):
    points = front.read(made)["points"]
    everybody = optima.read(made, [point["id"] for point in points], ("harmless", "helpful"))
    assert list(everybody) == [None, *(point["id"] for point in points)] and len(points) == 3
    untouched = everybody[None]
    assert untouched.rewards.mean(0) == pytest.approx(list(front.read(made)["base"]["scores"].values()))
    assert not untouched.log_ratios.any()
    for point in points:
        mine = everybody[point["id"]]
        assert mine.rewards.mean(0) == pytest.approx([point["scores"][name] for name in ("harmless", "helpful")])
        assert mine.log_ratios.mean() == pytest.approx(point["kl"])
        weights = np.array([point["preference"]["values"][name] for name in ("harmless", "helpful")])
        assert mine.about(weights, 0.08).bound[0] == pytest.approx(point["details"]["optimum"], rel=1e-9)


def test_the_front_is_bounded_by_all_of_them_and_by_each_ones_own_where_others_say_nothing(made):
    whole, kept = front.read(made), {file: file.read_bytes() for file in made.rglob("samples.jsonl")}

    def bounds(change):
        """With the samples of the candidate for harmless alone changed."""
        file = made / "candidates/w-1.00-0.00/samples.jsonl"
        rows = [json.loads(line) for line in kept[file].splitlines()]
        file.write_text("".join(json.dumps(change(place, row)) + "\n" for place, row in enumerate(rows)))
        storage.write_manifest(file.parent)  # as if they had been written so
        return front.read(made)["analysis"]["bounds"]

    own = whole["analysis"]["bounds"]  # here each is the surest of itself
    try:
        without = bounds(lambda place, row: {"prompt": row["prompt"]})  # as runs of before have it: others are asked
        assert without != own
        assert bounds(lambda place, row: row | {"log_ratio": row["log_ratio"] + 5 * (-1) ** place}) != own
        assert bounds(lambda place, row: row) == own
        with pytest.raises(CorruptFileError, match=r"samples\.jsonl: a line is not the sample"):
            bounds(lambda place, row: 7)
        for file in kept:
            file.unlink(missing_ok=True)
        alone = front.read(made)["analysis"]["bounds"]
        assert alone["hypervolume_at_most"] == pytest.approx(own["hypervolume_at_most"], rel=1e-9)
    finally:
        for file, content in kept.items():
            file.write_bytes(content)
        storage.write_manifest(made / "candidates/w-1.00-0.00")
    assert front.read(made) == whole
