"""What the terminal shows while a sweep runs, and before one does."""

from __future__ import annotations

import io
from types import SimpleNamespace
from typing import Any, cast

import pytest
import yaml
from rich.console import Console

from moalign import config, recipes, registry
from moalign.progress import ConsoleObserver
from moalign.report.table import summary_table
from moalign.sweeps.estimate import _goes_on
from moalign.sweeps.plan import prepare
from moalign.types import Candidate, Outcome, Preference


def test_the_bar_counts_what_will_be_trained():
    equal = Preference("weights", {"a": 1.0})
    candidates = [Candidate(name, equal) for name in ("p", "q", "r")] + [Candidate("m", equal, mixed=True)]
    plan: Any = SimpleNamespace(config=SimpleNamespace(train=SimpleNamespace(steps=6)))
    material: Any = SimpleNamespace(counts={}, warnings=())
    observer = ConsoleObserver(Console(file=io.StringIO(), force_terminal=True))
    observer.on_run_start(plan, material, 2)
    assert observer._bar is not None
    task = observer._bar.tasks[0]
    assert task.total is None, "nothing is proposed yet"
    for proposed, total in ((candidates[:2], 12), (candidates[2:], 18)):
        observer.on_proposed(proposed)
        assert task.total == total
        for candidate in proposed:
            observer.on_candidate_start(candidate)
            if candidate.kind == "trained":
                observer.on_step(candidate, 5, {})
            observer.on_candidate_end(Outcome(candidate.id, "done", equal, kind=candidate.kind))
        assert (task.completed, task.total) == (total, total)
    observer.close()


def test_without_a_terminal_lines_say_what_is_left_of_what_was_proposed_and_are_lines():
    output, [first, second] = io.StringIO(), [Candidate(name * 30, Preference("weights", {"a": 1.0})) for name in "pq"]
    plan: Any = SimpleNamespace(config=SimpleNamespace(train=SimpleNamespace(steps=4)))
    observer = ConsoleObserver(Console(file=output, width=40))
    observer.on_run_start(plan, cast(Any, SimpleNamespace(counts={}, warnings=())), 0)
    observer.on_phase("[/INST] is no markup, and longer than forty letters")
    for candidate in (first, second):
        observer.on_proposed([candidate])
        observer.on_candidate_start(candidate)
        observer.on_step(candidate, 3, {"loss": 0.5})
        observer.on_candidate_end(Outcome(candidate.id, "done", candidate.preference, {"a": 1.0}))
    assert output.getvalue().splitlines() == [
        "[/INST] is no markup, and longer than forty letters …",
        f"{first.id}: step 4 of 4, loss 0.5000, about 0 s left for the 1 proposed so far",
        f"done   {first.id}: a 1.000",
        f"{second.id}: step 4 of 4, loss 0.5000, about 0 s left for the 2 proposed so far",
        f"done   {second.id}: a 1.000",
    ]


# --- before it runs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("search", "more"),
    [
        ({"name": "grid"}, False),
        ({"name": "sobol"}, False),
        ({"name": "random"}, False),
        ({"name": "auto"}, True),
        ({"name": "optimistic-linear-support"}, True),
        ({"name": "soup"}, True),
        ({"name": "evolution"}, True),
        ({"name": "successive-halving"}, True),
        ({"name": "layer-averaging"}, True),
        ({"name": "grid", "warm_start": "neighbour", "fresh": 3}, True),
    ],
)
def test_it_is_known_whether_a_search_proposes_again(search, more):
    plan = prepare(config.from_mapping(yaml.safe_load(recipes.read("rebel")) | {"search": search}), registry.discover())
    assert _goes_on(plan.propose(()), plan, plan.space) == more


def test_a_search_that_needs_true_scores_may_go_on():
    def propose(history, space):
        raise KeyError("optimum")

    plan: Any = SimpleNamespace(objectives=("a",), propose=propose)
    assert _goes_on([Candidate("p", Preference("weights", {"a": 1.0}))], plan, cast(Any, None))


def test_what_users_have_named_is_no_markup():
    output = io.StringIO()
    Console(file=output, width=80).print(summary_table([("model", "/data/[old]/base [/x]")]))
    assert output.getvalue().split() == ["model", "/data/[old]/base", "[/x]"]
