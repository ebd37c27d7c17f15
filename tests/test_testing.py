"""The conformance kit: what ships passes it, what is wrong in one way does not, and the message says in which."""

from __future__ import annotations

import functools
import random
import re
import subprocess
import sys

import numpy
import pytest
import torch
from published import FORMS, rows_of
from wrong_plugins import (
    combiners,
    conditioners,
    decoders,
    filters,
    gating_conditioners,
    objectives,
    observers,
    other_reward_models,
    pair_combiners,
    readers,
    reading_objectives,
    references,
    reward_models,
    rewards,
    sampled_objectives,
    samplers,
    searches,
    token_objectives,
    transforms,
)

from moalign import testing
from moalign.api import Sample
from moalign.registry import KINDS, discover
from moalign.testing import (
    ConformanceError,
    check_combiner,
    check_conditioner,
    check_decoder,
    check_filter,
    check_objective,
    check_observer,
    check_reader,
    check_reference,
    check_reward,
    check_reward_model,
    check_sampler,
    check_search,
    check_transform,
    combiner,
    conditioner,
    decoder,
    filter,
    objective,
    observer,
    reader,
    reference,
    reward,
    reward_model,
    sampler,
    search,
    transform,
)

REGISTRY = discover()
PROMPT = "Advise me about fear."
PAIR = {"prompt": "Why?", "chosen": "Because.", "rejected": "No.", "objective": "kind", "score_chosen": 2}
SPEECH = [{"role": "user", "content": "Why?"}]
REPLY = {"role": "assistant", "content": "Because."}
QUESTION = {
    "question": "Why?",
    "passages": [["Title", "A sentence.", "Another one."]],
    **{f"prediction {number}": f"Answer {number}." for number in range(1, 5)},
    "preference": [0, 1, 2, 0, 1, 2],
    "feedback": {"errors": [{"error type": "Irrelevant"}], "missing-info": [], "corrected-prediction": "Better."},
}
ROWS = {
    "preference": [
        PAIR,
        {"objective": "kind", "prompt": SPEECH, "chosen": [REPLY], "rejected": [{**REPLY, "content": "No."}]},
        {"objective": "kind", "chosen": "Why? Because.", "rejected": "Why? No."},
    ],
    "columns": [{"prompt": "Why?", "a": "Because.", "b": "No.", "score": [1, None], "better": "tie", "by": -2}],
    "prompts": [{"prompt": "Why?"}, {"prompt": SPEECH}],
    "unpaired": [
        {"prompt": "Why?", "completion": "Because.", "label": True, "objective": "kind"},
        {"prompt": SPEECH, "completion": [REPLY], "label": "false", "objective": "kind"},
    ],
    "improvement": [PAIR, {"prompt": "Why?", "response": "So."}, {"prompt": SPEECH, "responses": ["So.", "No."]}],
    "qa-feedback": [QUESTION],
    **{name: rows_of(name) for name, _ in FORMS.values()},
}
OPTIONS = {
    "columns": {
        "responses": ["a", "b"],
        "scores": {"kind": "score"},
        "better": {"kind": "better"},
        "strength": {"kind": "by"},
    },
    "tiny-assistant": {"objective": "helpful"},
    "regex": {"pattern": "[a-z]"},
    "format": {"sections": ["a", "b"]},
    "gated": {"gates": [{"objective": "concise", "above": 0.2}]},
    "product": {"penalties": ["concise"]},
    "reward-robust": {"nominal": "concise"},
    "learned-weights": {"outer": "concise", "beta": 0.1},
    "par-margins": {"reference": 0.3},
    "log-sigmoid-margins": {"reference": -0.5},
    "auto": {"points": 5},  # all of its points: test_searches_auto.py
    "optimistic-linear-support": {"points": 5},
    "hyper-parameters": {"space": {"loss.beta": [0.1, 0.3]}, "configurations": 2, "seeds": 1, "points": 4},
    "margin": {"gap": 0.5},
    "reward-threshold": {"threshold": 0.0},
    "features": {"features": ["helpful", "honest"]},
    "tgdpo": {"guide": "a/folder"},
    "kdrl": {"teacher": "a/folder"},
    "rto": {"guide": "a/folder"},
    "clip-delta": {"guide": "a/folder"},
    "align-distil": {"teacher": "a/folder", "contrary": "another/folder"},
    "align-distil-simple": {"teacher": "a/folder"},
}
# It whitens the advantages of a round, and divides process rewards by the largest of it.
EXEMPT = {"prime": ("other_prompts_leave_advantages_alone",)}
# They need a file, a model, a server or another reward: test_rewards_*.py, test_improvement.py.
ELSEWHERE = {
    *("exact-answer", "sequence-classification", "implicit-reward", "http", "ensemble", "trained-reward-model"),
    "reward improvement",
}
OTHERWISE = [
    ("objective", "dpo", {"label_smoothing": 0.1}),
    ("objective", "ipo", {"average": True}),
    ("objective", "rpo", {"average": True, "eta": 0.2}),
    ("objective", "sft", {"average": False}),
    ("transform", "whiten", {"over": "batch"}),
    ("transform", "whiten", {"over": "running"}),
    ("transform", "log-sigmoid", {"reference": 0.4}),
    ("transform", "par", {"samples": 1, "k": 3}),
    ("transform", "length-penalty", {"limit": 5, "truncated": 1}),
    ("combiner", "gdpo", {"whole_round": False}),
    ("combiner", "log-sigmoid", {"reference": 0.5}),
    ("combiner", "uncertainty-weighted", {"lam": 1.0, "ddof": 1}),
    ("combiner", "heron", {"margin": 0.5}),
    ("combiner", "heron-pairs", {"delta": 0.4}),
    ("combiner", "smooth-chebyshev", {"memory": 0.5, "ideal_loss": 0.1}),
    ("combiner", "lagrangian", {"start": 1.0, "cap": 1.5, "rescale": False}),
    ("combiner", "interior-point", {"t": 1.0, "floor": 0.1, "rescale": False}),
    ("combiner", "dynamic-hypervolume", {"scale": 2.0}),
    ("combiner", "dynamic-gradient", {"max_norm": None, "floor": 0.0, "step": 1.0}),
    (
        "combiner",
        "learned-weights",
        {"outer": "concise", "beta": 0.05, "loss": "preference", "floor": 0.0, "rate": 1.0},
    ),
    ("combiner", "mgda", {"normalise": False, "sum_to_one": False}),
    ("combiner", "cagrad", {"normalise": True, "radius": 0.9}),
    ("combiner", "upgrad", {"normalise": True, "sum_to_one": False}),
    ("objective", "reinforce", {"baseline": "none", "kl": "k2", "length": 20}),
    ("objective", "grpo", {"kl": "forward", "epsilon_high": 0.28}),
    ("objective", "grpo", {"kl": "reward", "standardise": False, "length": 64}),
    ("objective", "grpo-care", {"kl": "reward", "beta": 0.1, "margin": 0.0}),
    ("objective", "gspo", {"kl": "k2"}),
    ("objective", "gspo", {"entropy": 0.2}),
    ("objective", "rloo", {"entropy": 0.2}),
    ("objective", "ppo", {"kl": "k3", "lam": 0.5, "value_trains_adapter": True, "value_epsilon": None}),
    ("objective", "ppo", {"kl": "k2", "gamma": 0.9, "lam": 1.0, "length": 20, "missing_end": -10}),
    ("objective", "p3o", {"clip": "separate", "epsilon": None}),
    ("objective", "drpo", {"longest": 4, "lam": 1.0, "tau": 0.5}),
    ("objective", "asymmetric-apo", {"beta": 0.1, "kl": "k3", "base": 1.1}),
    ("objective", "rapo", {"flattest": 0.0, "worst": -1.0, "entropy": 0.1}),
    ("objective", "rto", {"guide": "a/folder", "scale": 1.0, "bound": None, "reward_bound": None, "lam": 1.0}),
    ("objective", "rto", {"guide": "a/folder", "scale": 0}),
    ("objective", "clip-delta", {"guide": "a/folder", "step": None, "eta": None, "slope": 1.0}),
    ("objective", "clip-delta", {"guide": "a/folder", "delta": False, "kl": "k3"}),
    ("objective", "prime", {"whiten": False, "lowest": -0.5, "highest": 0.5, "gamma": 0.9}),
    ("objective", "prime", {"beta": 0.1, "kl": "k3", "process_beta": 1.0}),
    ("objective", "rejection-sampling", {"keep": 2, "average": False}),
    ("objective", "chi-squared", {"of": "square", "beta": 0.1}),
    ("objective", "superhf", {"beta": 0.0}),
    ("objective", "distribution-matching", {"divergence": "forward-kl"}),
    ("objective", "distribution-matching", {"divergence": "chi2", "baseline": False, "beta": 1.0}),
    ("objective", "kdrl", {"teacher": "a/folder", "beta": 0.1, "masking": "response"}),
    ("objective", "kto", {"reference_point": False, "desirable": 4 / 3, "threshold": 0.0}),
    ("objective", "filtered", {"average": False}),
    ("objective", "unlikelihood", {"alpha": 0.3, "average": False}),
    ("objective", "reward-weighted", {"average": False}),
    ("objective", "advantage-weighted", {"largest": 2.0}),
    ("objective", "adpo", {"target": "best", "average": True}),
    ("objective", "adpo", {"anchor": "sampler", "tau": 2.0}),
    ("objective", "brain", {"proposal": "sampler"}),
    ("objective", "order-preserving", {"relative": True}),
    ("objective", "trajectory-balance", {"log_z": "learned", "bins": 5, "width": 3}),
    ("objective", "trajectory-balance", {"log_z": "learned", "code": "weights", "width": 3}),
    ("search", "grid", {"warm_start": "neighbour"}),
    ("search", "grid", {"partitions": 4}),
    ("reward", "length", {"target": 9, "free": 2}),
    ("reader", "ultrafeedback", {"scale": "10-90", "tens": "unknown"}),
    ("reader", "helpsteer", {"scale": "10-90", "turns": "text"}),
    ("reader", "hh-rlhf", {"turns": "text", "objective": "helpful"}),
    ("reader", "rewardbench", {"by_subset": True}),
    ("reader", "stepwise", {"separator": " "}),
    ("reader", "improvement", {"better": "both", "objective": "kind"}),
    ("reader", "improvement", {"gaps": True}),
    ("reward", "format", {"keys": ["a"]}),
    ("decoder", "best-of-n", {"n": 9, "candidate": "second"}),
    ("decoder", "guidance", {"scale": -0.5, "towards": "second", "away": "first"}),
    ("decoder", "multi-objective", {"divergence": "forward-kl"}),
    ("decoder", "multi-objective", {"divergence": "jsd", "level": "prefix"}),
    ("decoder", "multi-objective", {"divergence": "alpha", "weights": {"third": 0.5, "first": 0.5}}),
    ("decoder", "value-augmented", {"top_k": None, "candidate": "second"}),
    ("decoder", "value-augmented", {"top_k": 3}),
    ("conditioner", "tags", {"of": "rewards", "ranges": {}}),
    ("conditioner", "prompt-text", {"written": "tally", "scale": 10, "template": "{weights} "}),
    ("conditioner", "prompt-text", {"angles": (-45, 90)}),
    ("conditioner", "hypernetwork", {"width": 3, "spread": 0.1, "concentration": 0.2}),
    ("reward-model", "bradley-terry", {"label_smoothing": 0.2}),
    ("reference", "previous-iterate", {"every": 4}),
    ("filter", "best", {"keep": 3}),
    ("filter", "best-random", {"resampled": True}),
    ("filter", "best-worst", {"resampled": True}),
    ("filter", "accuracy-band", {"objective": "objective_0", "right": 0.0}),
    ("filter", "reward-threshold", {"right_by": "objective_1", "right": 0.0, "grid": (-1, 1, 0.1)}),
    ("filter", "margin", {"gap": 0.5, "least": 0.1}),
    ("reference", "kl-triggered", {"measure": "log-ratio", "threshold": 0.2, "every": 3}),
    ("objective", "inpo", {"eta": 0.5, "base_share": 0.7}),
    ("reward-model", "regression", {"scale": 20, "shift": 10}),
    ("reward-model", "gaussian", {"heads": 1}),
    ("reward-model", "mixture", {"components": 3, "balance": 0.1}),
    ("reward-model", "features", {"features": ["honest"], "hidden": []}),
    ("reward-model", "implicit", {"label_smoothing": 0.2}),
]


def check_of(kind):
    return f"check_{kind.replace('-', '_')}"


def shipped():
    files = {*ELSEWHERE, "reference soup"}  # a reference of adapters: test_references_runs.py
    entries = [entry for entry in REGISTRY.entries if files.isdisjoint({entry.name, f"{entry.kind} {entry.name}"})]
    every = [(entry.kind, entry.name, OPTIONS.get(entry.name, {})) for entry in entries]
    return [pytest.param(*each, id=f"{each[0]}-{each[1]}-{number}") for number, each in enumerate(every + OTHERWISE)]


@pytest.mark.parametrize(("kind", "name", "options"), shipped())
def test_what_ships_conforms(kind, name, options):
    for module in REGISTRY.load(REGISTRY.find(kind, name)).requires:
        pytest.importorskip(module)
        if kind == "observer":
            pytest.skip("trackers are checked offline in test_trackers.py")
    plugin = REGISTRY.build(kind, name, options, kind)
    if kind == "reader":
        check_reader(plugin, ROWS[name])
    elif name == "tiny-assistant":
        from moalign.demo.grammar import PROMPTS, replies

        check_reward(plugin, samples=[Sample(PROMPTS[0], reply) for reply in replies(PROMPTS[0])[:5]])
    else:
        getattr(testing, check_of(kind))(plugin, exempt=EXEMPT.get(name, ()))


def test_there_is_a_check_for_every_kind():
    assert {check_of(kind) for kind in KINDS} == {name for name in testing.__all__ if name.startswith("check_")}


def check_answers(plugin):
    check_reader(plugin, readers.ROWS)


def check_about_primes(plugin):
    check_reward(plugin, samples=[Sample("Name a prime.", " 7"), Sample("Another prime?", " No.")])


CHECKS = {
    objectives: check_objective,
    sampled_objectives: check_objective,
    token_objectives: check_objective,
    reading_objectives: check_objective,
    combiners: check_combiner,
    pair_combiners: check_combiner,
    searches: check_search,
    rewards: check_about_primes,
    readers: check_answers,
    observers: check_observer,
    transforms: check_transform,
    samplers: check_sampler,
    decoders: check_decoder,
    conditioners: check_conditioner,
    gating_conditioners: check_conditioner,
    reward_models: check_reward_model,
    other_reward_models: check_reward_model,
    references: check_reference,
    filters: check_filter,
}
PARTS = {
    objectives: objective,
    sampled_objectives: objective,
    token_objectives: objective,
    reading_objectives: objective,
    combiners: combiner,
    pair_combiners: combiner,
    searches: search,
    rewards: reward,
    readers: reader,
    observers: observer,
    transforms: transform,
    samplers: sampler,
    decoders: decoder,
    conditioners: conditioner,
    gating_conditioners: conditioner,
    reward_models: reward_model,
    other_reward_models: reward_model,
    references: reference,
    filters: filter,
}
WRONG = [(check, plugin, words) for folder, check in CHECKS.items() for plugin, words in folder.WRONG.items()]
UNUSUAL = [(check, plugin) for folder, check in CHECKS.items() for plugin in folder.UNUSUAL]


@functools.cache
def review_of(check, plugin):
    with pytest.raises(ConformanceError) as caught:
        check(plugin())
    return str(caught.value)


@pytest.mark.parametrize(("check", "plugin", "words"), WRONG, ids=lambda each: getattr(each, "__name__", ""))
def test_what_is_wrong_in_one_way_is_caught_and_named(check, plugin, words):
    message = review_of(check, plugin)
    assert re.search(words, message), message
    assert plugin.__name__ in message
    assert all(f"\n  {part}" in message for part in ("tried:", "got:", "change:", "check:"))


@pytest.mark.parametrize(("check", "plugin"), UNUSUAL, ids=lambda each: getattr(each, "__name__", ""))
def test_what_is_unusual_and_right_conforms(check, plugin):
    check(plugin())


@pytest.mark.parametrize("part", dict.fromkeys(PARTS.values()), ids=lambda part: part.__name__)
def test_every_check_of_the_kit_catches_something(part):
    folders = [folder for folder in PARTS if PARTS[folder] is part]
    reviews = [review_of(CHECKS[folder], plugin) for folder in folders for plugin in folder.WRONG]
    names = {check.__name__ for check in part.CHECKS}
    assert {review.rpartition("check:  ")[2] for review in reviews} == names


@pytest.mark.parametrize("folder", CHECKS, ids=lambda folder: folder.__name__)
def test_every_class_of_the_folder_is_tried(folder):
    own = {
        each
        for each in vars(folder).values()
        if isinstance(each, type) and issubclass(each, tuple(KINDS.values())) and each.__module__ == folder.__name__
    }
    assert own == {*folder.WRONG, *folder.UNUSUAL}


def test_an_exempt_check_is_left_out_and_an_unknown_one_refused():
    check_objective(objectives.WrongSlope(), exempt={"gradient_is_the_derivative"})
    with pytest.raises(ValueError, match="no check 'gradcheck'"):
        check_objective(objectives.WrongSlope(), exempt={"gradcheck"})


@pytest.mark.parametrize(
    "sizes", [{"prompts": 2, "tokens": 1, "objectives": 1}, {"prompts": 5, "tokens": 9, "seed": 7}]
)
def test_sizes_and_seeds_are_free(sizes):
    check_objective(objectives.Logistic(), **sizes)


def test_global_random_state_is_given_back():
    def states():
        return random.getstate(), bytes(numpy.random.get_state()[1]), bytes(torch.get_rng_state().numpy())

    before = states()
    check_objective(objectives.Logistic())
    with pytest.raises(ConformanceError):
        check_objective(objectives.SeedsTheWorld())
    assert states() == before


def test_the_kit_is_imported_without_torch():
    code = "import sys, moalign.testing; print(*sorted({'torch', 'transformers', 'pymoo'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == []
