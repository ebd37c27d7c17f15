"""What a sweep makes of its data: rewards, held-out prompts, what is counted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from sweeps import small_config, write_pairs

from moalign import registry
from moalign.engine.rollouts import sample
from moalign.engine.train import train
from moalign.errors import ConfigError, DataError
from moalign.sweeps import run
from moalign.sweeps.candidate import batch_source, job_of
from moalign.sweeps.observe import Observer
from moalign.sweeps.plan import Plan, prepare
from moalign.sweeps.workshop import open_workshop
from moalign.types import Candidate, Preference

ROLLOUTS = {"rounds": 2, "samples": 3, "prompts": 5, "prompts_per_step": 2, "max_new_tokens": 5}


def plan_with(model: Path, pairs: Path, **changes) -> Plan:
    objectives = {"short": {"reward": "length"}}
    return prepare(
        small_config(model, pairs, objectives=objectives, search={"name": "grid", "points": 1}, **changes),
        registry.discover(),
    )


@pytest.fixture
def prompts(tmp_path) -> Path:
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"q{number}: "}) + "\n" for number in range(10)))
    return file


def test_sampling_is_a_function_of_the_seed_and_leaves_the_generator_alone(tiny_model_path, prompts):
    import torch

    plan = plan_with(tiny_model_path, prompts, loss="rebel", rollouts=ROLLOUTS)
    shop = open_workshop(plan, Path(), Observer(), keep_cache=False)
    arguments = {"samples": 3, "temperature": 1.0, "max_new_tokens": 6}
    state = torch.get_rng_state()
    (first,) = sample(shop.model, [None], shop.material.prompts, seed=3, **arguments)
    assert torch.equal(state, torch.get_rng_state())
    torch.rand(5)
    assert sample(shop.model, [None], shop.material.prompts, seed=3, **arguments) == [first]
    assert sample(shop.model, [None], shop.material.prompts, seed=4, **arguments) != [first]
    assert [rollout.prompt for rollout in first] == [p for p in range(len(shop.material.prompts)) for _ in range(3)]
    ends = shop.model.end_ids
    for rollout in first:
        assert rollout.ended == (rollout.ids[-1] in ends)
        assert not ends.intersection(rollout.ids[:-1])
        assert len(rollout.ids) <= 6


def test_a_rollout_source_pairs_within_groups_and_shares_its_first_round(tiny_model_path, prompts):
    plan = plan_with(tiny_model_path, prompts, loss="rebel", rollouts=ROLLOUTS)
    shop = open_workshop(plan, Path(), Observer(), keep_cache=False)
    candidate = Candidate("short", Preference("weights", {"short": 1.0}))
    source = batch_source(candidate, shop)
    dataset, chosen = source.at(0)
    pairs = dataset.pairs[chosen]
    assert (dataset.groups[pairs[:, 0]] == dataset.groups[pairs[:, 1]]).all()
    assert len(set(dataset.groups[pairs[:, 0]])) == ROLLOUTS["prompts_per_step"]
    assert (dataset.pair_objective == -1).all()
    assert dataset is batch_source(candidate, shop).at(0)[0]  # sampled once from the base, for every candidate
    later, _ = source.at(3)  # steps 3 to 5 are the second round
    assert later is not dataset
    words = [-len(s.response.split()) for s in dataset.samples]
    assert dataset.rewards[:, 0].tolist() == words


def test_when_every_reward_abstains_the_candidate_fails_with_the_reason(
    tiny_model_path, prompts, tmp_path, monkeypatch
):
    from moalign.errors import TrainingError
    from moalign_plugins.rewards.length import Length

    monkeypatch.setattr(Length, "score", lambda self, samples: [None] * len(samples))
    settings = plan_with(tiny_model_path, prompts, loss="rebel", rollouts=ROLLOUTS).config
    with pytest.raises(TrainingError, match=r"nothing held out scores short"):
        run.start(settings, tmp_path / "run", registry.discover(), Observer())


def test_the_held_out_file_may_not_share_prompts(tiny_model_path, tmp_path):
    pairs = write_pairs(tmp_path / "pairs.jsonl")
    data = {"path": str(pairs), "held_out_path": str(pairs)}
    plan = prepare(small_config(tiny_model_path, pairs, data=data), registry.discover())
    with pytest.raises(DataError, match=r"pairs\.jsonl:1: this prompt is in the training file too"):
        open_workshop(plan, Path(), Observer(), keep_cache=False)


def test_a_held_out_file_is_all_held_out(tiny_model_path, tmp_path):
    pairs = write_pairs(tmp_path / "pairs.jsonl")
    other = tmp_path / "other.jsonl"
    other.write_text(write_pairs(tmp_path / "more.jsonl", prompts=3).read_text().replace("q", "other "))
    plan = prepare(
        small_config(tiny_model_path, pairs, data={"path": str(pairs), "held_out_path": str(other)}),
        registry.discover(),
    )
    material = open_workshop(plan, Path(), Observer(), keep_cache=False).material
    assert material.counts["training pairs"] == 40
    assert material.counts["held-out pairs"] == 6 and material.counts["held-out prompts"] == 3


def test_an_objective_that_nothing_judges_is_named(tiny_model_path, tmp_path):
    pairs = write_pairs(tmp_path / "pairs.jsonl")
    objectives = {"helpful": None, "harmless": None, "brief": None}
    plan = prepare(small_config(tiny_model_path, pairs, objectives=objectives), registry.discover())
    advice = ", ".join(f"give objectives.{name}.reward" for name in plan.objectives)
    with pytest.raises(ConfigError, match=rf"no held-out pair is judged for brief; .* or {advice}, and rewards"):
        open_workshop(plan, Path(), Observer(), keep_cache=False)
    rewarded = {name: {"reward": "length"} for name in objectives}
    plan = prepare(
        small_config(tiny_model_path, pairs, objectives=rewarded, evaluate={"kind": "preference"}), registry.discover()
    )
    with pytest.raises(ConfigError, match=r"or leave evaluate\.kind out, and rewards score responses$"):
        open_workshop(plan, Path(), Observer(), keep_cache=False)


def test_rewards_far_apart_in_scale_are_pointed_out(tiny_model_path, tmp_path):
    rows = [
        {"prompt": f"q{number}: ", "response": text, "a": index, "b": index * 1e8}
        for number in range(6)
        for index, text in enumerate(["x", "y", "z"])
    ]
    file = tmp_path / "scores.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = small_config(
        tiny_model_path,
        file,
        objectives={"a": None, "b": None},
        data={"path": str(file), "reader": {"name": "columns", "scores": {"a": "a", "b": "b"}}, "held_out": 0.2},
        loss="rebel",
    )
    material = open_workshop(prepare(settings, registry.discover()), Path(), Observer(), keep_cache=False).material
    assert any("b varies" in warning and "rescale" in warning for warning in material.warnings)


def test_the_models_own_generation_settings_do_not_touch_samples(tiny_model_path, prompts, tmp_path):
    """A repetition penalty in the model's files would make rollouts of another policy than the one that is scored."""
    import shutil

    copy = Path(shutil.copytree(tiny_model_path, tmp_path / "penalised"))
    settings = json.loads((copy / "generation_config.json").read_text())
    (copy / "generation_config.json").write_text(json.dumps(settings | {"repetition_penalty": 50.0, "top_k": 1}))
    sampled = []
    for path in (tiny_model_path, copy):
        plan = plan_with(path, prompts, loss="rebel", rollouts=ROLLOUTS)
        shop = open_workshop(plan, Path(), Observer(), keep_cache=False)
        arguments = {"samples": 2, "temperature": 1.0, "max_new_tokens": 8, "seed": 0}
        sampled.append(sample(shop.model, [None], shop.material.prompts, **arguments))
    assert sampled[0] == sampled[1]


def test_an_early_stop_needs_held_out_pairs_of_every_objective_that_judged_training_pairs(tiny_model_path, tmp_path):
    """Where responses are scored, evaluation needs no pairs, but the held-out loss does."""
    pairs, held_out = write_pairs(tmp_path / "pairs.jsonl"), tmp_path / "held_out.jsonl"
    rows = write_pairs(tmp_path / "other.jsonl", 3).read_text().replace("q", "other ").splitlines(keepends=True)
    held_out.write_text("".join(row for row in rows if '"helpful"' in row))
    changes = {
        "objectives": {"helpful": {"reward": "length"}, "harmless": {"reward": "length"}},
        "data": {"path": str(pairs), "held_out_path": str(held_out)},
    }
    plain = prepare(small_config(tiny_model_path, pairs, **changes), registry.discover())
    assert open_workshop(plain, Path(), Observer(), keep_cache=False).material.looked_at is None
    changes["train"] = {"early_stop": {}}
    plan = prepare(small_config(tiny_model_path, pairs, **changes), registry.discover())
    with pytest.raises(ConfigError, match=r"train\.early_stop: no held-out pair is judged for harmless; .* leave"):
        open_workshop(plan, Path(), Observer(), keep_cache=False)


@pytest.mark.parametrize("source", ["scores", "reward"])
def test_margins_of_held_out_pairs_come_from_where_those_of_training_pairs_do(tiny_model_path, tmp_path, source):
    """One objective judges the pairs, the rewards of the other are in the data or from a plugin, which is the same."""
    texts = ["a b c", "a b", "c", "a b c d"]
    rows = []
    for number in range(9):
        for index, text in enumerate(texts):
            scores = {"good": index} | ({"short": -len(text.split())} if source == "scores" else {})
            rows.append({"prompt": f"q{number}: ", "response": text} | scores)
    if source == "scores":
        del rows[-1]["short"]  # three of the last prompt's six pairs
    file, held_out = tmp_path / "train.jsonl", tmp_path / "held_out.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows[:20]))
    held_out.write_text("".join(json.dumps(row) + "\n" for row in rows[20:]))
    columns = {"good": "good"} | ({"short": "short"} if source == "scores" else {})
    reader = {"name": "columns", "scores": columns}
    settings = small_config(
        tiny_model_path,
        file,
        data={"path": str(file), "held_out_path": str(held_out), "reader": reader},
        objectives={"good": {"reward": "length"}, "short": {"reward": "length"}},
        combine="modpo",
        train={"steps": 4, "pairs_per_step": 6, "early_stop": {"every": 2}},
    )
    workshop = open_workshop(prepare(settings, registry.discover()), Path(), Observer(), keep_cache=False)
    material = workshop.material
    assert material.margins == {"good": "scores", "short": source}
    assert material.looked_at is not None and material.held_out.pairs is not None
    rewards, asked = material.looked_at.rewards[:, 1], [s.response for s in material.looked_at.samples]
    known = [-len(text.split()) for text in asked]
    named = sorted(set(material.looked_at.pairs.flatten()))
    assert [rewards[index] for index in named] == [known[index] for index in named]
    by_good = material.looked_at.pair_objective == 0
    assert by_good.sum() == 4 * 6 - (3 if source == "scores" else 0)
    assert (material.held_out.pairs.pair_objective == 0).sum() == 4 * 6  # evaluation has them all
    name = "early stop: held-out pair lacks a reward"
    assert material.counts.get(name, 0) == len(material.held_out.pairs.pairs) - len(material.looked_at.pairs)
    both = Candidate("c1", Preference("weights", {"good": 0.6, "short": 0.4}))
    looks: list[bool] = []
    train(
        workshop.model,
        batch_source(both, workshop),
        job_of(both, workshop, ()),
        workshop.cache,
        workshop.accelerator,
        lambda step, values: looks.append(isinstance(values.get("held_out_loss"), float)),
    )
    assert looks == [False, True, False, True]
