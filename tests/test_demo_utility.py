"""The second world: middle replies that no weights prefer, and the share of a per-reply utility; by enumeration."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from moalign.api import Sample
from moalign.demo import ceiling, utility
from moalign.demo import world as worlds
from moalign.demo.enumeration import enumerate_replies, reply_logps
from moalign.demo.reward import TinyAssistant
from moalign.errors import MoalignError


@pytest.fixture(scope="module")
def second() -> worlds.World:
    return utility.second_world()


@pytest.fixture(scope="module")
def reference(second) -> torch.Tensor:
    directory = ceiling.MODEL_DIRECTORY
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.no_grad():
        return reply_logps(model, enumerate_replies(AutoTokenizer.from_pretrained(directory), second.prompts))


@pytest.mark.parametrize("targets", utility.TARGETS)
def test_no_linear_weighting_prefers_a_reply_that_the_utility_does(second, targets):
    """Some mixture of two replies has more of both objectives, so that for any weights one of the two has more."""
    rewards, worth = second.rewards[0], utility.utilities(second, targets)[0]
    ends = rewards[rewards.argmax(0)]
    assert worth[rewards.argmax(0)].max() < 0.1
    mixtures = torch.stack([part * ends[0] + (1 - part) * ends[1] for part in torch.linspace(0, 1, 101).double()])
    middle = rewards[worth > 0.95 * worth.max()]
    assert len(middle) >= 1
    assert (mixtures[None] > middle[:, None] + 0.01).all(-1).any(-1).all()


def test_the_utility_counts_single_replies_and_not_means():
    """Half of each end meets the targets on average, and no reply of it meets any."""
    ends = [[1.0, 0.0], [0.0, 1.0], [0.4, 0.4], [0.0, 0.0]]
    toy = worlds.World(("?",), ("a", "b"), torch.tensor([ends], dtype=torch.float64), beta=0.1)
    even = torch.full((1, 4), 0.25, dtype=torch.float64).log()
    assert utility.utilities(toy, (0.4, 0.4)).tolist() == [[0.0, 0.0, pytest.approx(1.0), 0.0]]
    assert utility.utilities(toy, (0.8, 0.4))[0, 2].item() == pytest.approx(0.5)
    log_z = math.log(0.75 + 0.25 * math.exp(1 / 0.1))
    assert utility.most(toy, (0.4, 0.4), even) == pytest.approx(0.1 * log_z, abs=1e-12)
    best = utility.optimum(toy, (0.4, 0.4), even)
    assert best.exp()[0, 2].item() == pytest.approx(0.25 * math.exp(1 / 0.1) / math.exp(log_z), abs=1e-12)
    assert utility.value(toy, (0.4, 0.4), best, even) == pytest.approx(0.1 * log_z, abs=1e-12)
    mixed = torch.tensor([[0.5, 0.5, 0.0, 0.0]], dtype=torch.float64).clamp(min=1e-300).log()
    assert utility.value(toy, (0.4, 0.4), mixed, even) == pytest.approx(-0.1 * math.log(2), abs=1e-12)
    # of the replies alone; the rest of 1 is anything else, 0.25 under the reference and 0.01 under the policy
    gain = utility.share(toy, (0.4, 0.4), torch.tensor([[0.25, 0.25, 0.49]]).log(), even[:, :3])
    kl = 0.49 * math.log(0.49 / 0.25) + 0.01 * math.log(0.01 / 0.25)
    assert gain == pytest.approx((0.49 - 0.1 * kl - 0.25) / (0.1 * log_z - 0.25), abs=1e-6)


@pytest.mark.parametrize("targets", utility.TARGETS)
def test_the_optimum_has_all_and_what_weights_reach_is_little(second, reference, targets):
    base = worlds.outcomes(reference)
    best = utility.optimum(second, targets, base)
    assert utility.share(second, targets, best[:, :-1], reference) == pytest.approx(1, abs=1e-9)
    assert utility.share(second, targets, reference, reference) == 0
    for seed in range(3):
        noise = torch.randn(best.shape, generator=torch.Generator().manual_seed(seed)).double()
        other = (best + noise).log_softmax(-1)[:, :-1]
        assert utility.share(second, targets, other, reference) < 1
    linear = utility.most_of_linear(second, targets, reference)
    assert 0 < linear.share < 0.15
    assert utility.most_of_linear(second, targets, reference, strengths=(1.0,)).share < 0.05
    finer = utility.most_of_linear(second, targets, reference, divisions=40)
    assert linear.share <= finer.share < linear.share + 0.02


def test_where_one_objective_is_all_there_is_weights_reach_everything(reference):
    """The utility is linear then, so that nothing is left over."""
    one = worlds.tiny_world(objectives=("brilliant",))
    found = utility.most_of_linear(one, (0.5,), reference, strengths=(1.0, 2.0))
    assert found.share == pytest.approx(1, abs=1e-9) and found.weights == (2.0,)


@pytest.mark.parametrize("targets", utility.TARGETS)
def test_the_preference_of_targets_ranks_replies_as_the_utility_does(second, targets):
    weights = utility.weights_of(targets)
    assert sum(weights) == pytest.approx(1, abs=1e-12)
    weighted = (second.rewards * torch.tensor(weights, dtype=torch.float64)).min(-1).values
    scale = sum(1 / target for target in targets)
    torch.testing.assert_close(scale * weighted, utility.utilities(second, targets), rtol=1e-12, atol=1e-12)


def test_the_reward_plugin_knows_the_second_world(second):
    from moalign.demo import grammar

    prompt = second.prompts[0]
    samples = [Sample(prompt, reply) for reply in grammar.replies(prompt)[:50]]
    for column, name in enumerate(utility.OBJECTIVES):
        assert TinyAssistant(objective=name).score(samples) == second.rewards[0, :50, column].tolist()
        assert TinyAssistant(objective=name).score([Sample(prompt, "no reply")]) == [grammar.WORST]


@pytest.mark.parametrize("targets", [(0.5,), (0.5, 0.0), (0.5, -1.0)])
def test_targets_that_are_none_are_refused(second, targets):
    with pytest.raises(MoalignError, match="one number above 0"):
        utility.utilities(second, targets)
