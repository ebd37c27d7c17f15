"""What a nat of KL costs where the configuration leaves it to the loss: only what is in units of the rewards."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from references import online_content

from moalign import config, registry
from moalign.api import Objective
from moalign.errors import PluginError
from moalign.sweeps.plan import Plan, prepare

REGISTRY = registry.discover()


@pytest.mark.parametrize(
    ("name", "options", "price"),
    [
        ("rebel", {"beta": 0.3}, 0.3),
        ("adpo-pairwise", {"beta_r": 0.3, "tau": 0.5}, 0.6),
        ("trajectory-balance", {"beta": 0.3}, 0.3),
        ("rloo", {"beta": 0.3, "kl": "k3"}, 0.3),
        ("rejection-sampling", {"beta": 0.3}, 0.3),
        ("brain", {"beta": 0.3, "proposal": "sampler"}, 0.3),
        # the units of something else
        ("kto", {"beta": 0.3}, 0.0),
        ("grpo", {"beta": 0.3}, 0.0),
        ("grpo", {"beta": 0.3, "standardise": False}, 0.3),
        ("grpo", {"beta": 0.3, "kl": "reward"}, 0.3),  # standardised with what it is a price in
        ("gspo", {"beta": 0.3}, 0.0),
        ("ppo", {"beta": 0.3, "kl": "k3", "whiten": True}, 0.0),
        ("ppo", {"beta": 0.3, "kl": "reward", "whiten": True}, 0.3),
        ("adpo", {"beta": 0.3}, 0.3),
        ("adpo", {"beta": 0.3, "target": "best"}, 0.0),
        # no comparison with the reference
        ("adpo", {"beta": 0.3, "anchor": "sampler"}, 0.0),
        ("reward-weighted", {"beta": 0.3}, 0.0),
        ("rejection-sampling", {}, 0.0),
        ("filtered", {}, 0.0),
    ],
    ids=str,
)
def test_a_loss_says_whether_its_beta_is_a_price_in_rewards(name, options, price):
    objective: Any = REGISTRY.build("objective", name, options, "loss")
    assert objective.kl_price() == pytest.approx(price, rel=1e-12)


def planned(loss: Any, **evaluate: Any) -> Plan:
    content = online_content(loss=loss)
    return prepare(config.from_mapping(content | {"evaluate": content["evaluate"] | evaluate}), REGISTRY)


def test_auto_asks_the_loss_and_a_number_is_taken_as_it_is():
    assert planned({"name": "rebel", "beta": 0.1}).kl_price == 0.1
    assert planned("kto").kl_price == 0.0
    assert planned("kto", kl_price=0.2).kl_price == planned("rebel", kl_price=0.2).kl_price == 0.2


@pytest.mark.parametrize("price", [-0.1, float("nan"), float("inf"), "0.1", None])
def test_what_is_no_price_is_refused(price):
    class Odd(Objective):
        needs = frozenset({"groups", "reference"})

        def kl_price(self) -> Any:
            return price

    with pytest.raises(PluginError, match=r"in kl_price: it must return a finite number, not below 0, not"):
        _ = replace(planned("kto"), objective=Odd()).kl_price
