"""References in sweeps: by one line of a configuration, adapters that are given, what is refused, resumed runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from interruptions import StopAfterCandidates, break_off_and_resume
from references import HALF, deltas, offline, online, online_content, opened, same, trained
from safetensors.torch import load_file, save_file
from sweeps import Warned, contents, small_config, write_pairs

from moalign import config, lora, recipes, registry
from moalign.engine.model import TRAINED
from moalign.engine.reference_policy import BASE
from moalign.engine.scoring import logps_under
from moalign.errors import ConfigError, RunError
from moalign.lora import frozen
from moalign.sweeps import run
from moalign.sweeps.candidate import job_of
from moalign.sweeps.observe import Observer
from moalign.sweeps.plan import prepare
from moalign.sweeps.workshop import open_workshop

ROUNDS = {"rounds": 2, "prompts": 4, "samples": 4, "prompts_per_step": 2, "max_new_tokens": 8}
FEW: tuple[str, ...] = (
    *("train.steps=2", "search.points=2", "evaluate.samples=1", "evaluate.prompts=2"),
    *(f"rollouts.{key}={value}" for key, value in ROUNDS.items()),
)


@pytest.mark.parametrize(
    "reference",
    [
        "base",
        "previous-iterate",
        {"name": "snapshot", "every": 1},
        {"name": "moving-average", "every": 1, "decay": 0.9},
        {"name": "kl-triggered", "every": 1, "threshold": 0},
    ],
    ids=lambda each: each if isinstance(each, str) else each["name"],
)
def test_one_line_of_a_configuration_is_enough(reference):
    workshop = online(reference=reference, train={"steps": 3, "lr": 1e-2})
    plugin = job_of(HALF, workshop, ()).reference
    ((_, told),) = trained(workshop, plugin)
    assert len(told.steps) == 3 and all(isinstance(loss, float) for loss in told.losses)
    moved = told.of("reference/moves")[-1]
    assert moved is None if reference == "base" else moved >= 1
    assert [entry.kind for entry in workshop.plan.plugins].count("reference") == 1


# --- adapters that are given -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapters(tiny_model_path, tmp_path_factory) -> tuple[Path, Path]:
    """Two that were trained on pairs, from other seeds."""
    folder = tmp_path_factory.mktemp("adapters")
    workshop = offline(tiny_model_path, folder)
    made = []
    for seed in (0, 1):
        trained(workshop, None, seed=seed)
        made.append(folder / f"adapter{seed}")
        made[-1].mkdir()
        lora.write(workshop.model.policy, TRAINED, made[-1], workshop.model.fingerprint)
    return made[0], made[1]


def soup(tiny_model_path, folder: Path, shares: dict[str, float], **changes):
    return offline(tiny_model_path, folder, reference={"name": "soup", "shares": shares}, **changes)


def test_a_soup_of_one_adapter_is_that_adapter(tiny_model_path, tmp_path, adapters):
    workshop = soup(tiny_model_path, tmp_path, {str(adapters[0]): 1.0})
    policy, train = workshop.model.policy, workshop.material.train
    lora.add_slots(policy, ["one"])
    lora.read(policy, "one", adapters[0], workshop.model.fingerprint)
    slot = workshop.compared_with.adapter
    assert same(lora.weights(policy, slot), lora.weights(policy, "one"))
    under = logps_under(workshop.model, train.sequences, train.groups.tolist(), (slot, "one", None))
    assert all((mine == other).all() for mine, other in zip(*under[:2], strict=True))
    assert any((mine != other).any() for mine, other in zip(under[0], under[2], strict=True))
    other = open_workshop(workshop.plan, tmp_path, Observer(), keep_cache=False)
    assert other.compared_with == workshop.compared_with  # the same identity, by which values are found in the cache


def test_a_soup_is_the_sum_of_what_its_adapters_add(tiny_model_path, tmp_path, adapters):
    workshop = soup(tiny_model_path, tmp_path, {str(adapters[0]): 0.25, str(adapters[1]): 0.75})
    policy = workshop.model.policy
    found = deltas(lora.weights(policy, "reference"), frozen.scaling(policy, "reference"))
    each = [load_file(folder / "adapter_model.safetensors") for folder in adapters]
    first, second = (deltas(tensors, 8 / 4) for tensors in each)
    for name, value in found.items():
        torch.testing.assert_close(value, 0.25 * first[name] + 0.75 * second[name], rtol=0, atol=1e-6)
    averaged = {name: 0.25 * value + 0.75 * each[1][name] for name, value in each[0].items()}
    naive = deltas(averaged, 2)
    assert any((naive[name] - value).abs().max() > 0.1 * value.abs().max() for name, value in found.items())


def test_a_fixed_reference_is_computed_once_for_all(tiny_model_path, tmp_path, adapters):
    workshop = soup(tiny_model_path, tmp_path, {str(adapters[0]): 0.5})
    ((_, told),) = trained(workshop, None, begins_with=workshop.compared_with)
    assert workshop.compared_with.identity in workshop.cache._known and "" not in workshop.cache._known
    assert told.of("kl_estimate")[0] > 0  # of the base, as which the policy begins, from the soup
    assert job_of(HALF, workshop, ()).begins_with == workshop.compared_with != BASE


def test_adapters_of_peft_itself_are_taken_with_a_warning(tiny_model_path, tmp_path, adapters):
    plain = tmp_path / "plain"
    plain.mkdir()
    tensors = load_file(adapters[0] / "adapter_model.safetensors")
    save_file(tensors, plain / "adapter_model.safetensors")
    (plain / "adapter_config.json").write_text((adapters[0] / "adapter_config.json").read_text())
    pairs = write_pairs(tmp_path / "pairs.jsonl")
    settings = small_config(tiny_model_path, pairs, reference={"name": "soup", "shares": {str(plain): 1.0}})
    observer = Warned()
    workshop = open_workshop(prepare(settings, registry.discover()), tmp_path, observer, keep_cache=False)
    assert same(lora.weights(workshop.model.policy, "reference"), tensors)
    assert any("does not say on which weights it was trained" in each for each in observer.warnings)


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        ({"r": 2, "targets": ["q_proj"]}, r"reference: 'soup': .*adapts .*, and the run does not; name it in model"),
        ({"r": 2, "alpha": 1.0}, None),
    ],
)
def test_an_adapter_need_not_have_the_runs_rank_but_its_layers(tiny_model_path, tmp_path, adapters, adapter, message):
    model = {"path": str(tiny_model_path), "lora": adapter}
    if message is None:
        workshop = soup(tiny_model_path, tmp_path, {str(adapters[0]): 1.0}, model=model)
        assert lora.room(workshop.model.policy, "reference") == 4
        return
    with pytest.raises(RunError, match=message):
        soup(tiny_model_path, tmp_path, {str(adapters[0]): 1.0}, model=model)


def test_an_adapter_of_another_base_is_refused(tiny_model_path, tmp_path, adapters):
    other = tmp_path / "other"
    other.mkdir()
    workshop = offline(tiny_model_path, tmp_path)
    lora.write(workshop.model.policy, TRAINED, other, "somebody else")
    with pytest.raises(RunError, match=f"reference: 'soup': {other}: this adapter was trained on another base model"):
        soup(tiny_model_path, tmp_path, {str(other): 1.0})


# --- what does not go together ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reference": {"name": "previous-iterate"}}, r"reference\.every: there are no rollouts"),
        ({"reference": "snapshot", "loss": "sft"}, r"'snapshot' would be read by nobody: loss 'sft' compares with no"),
        ({"reference": "snapshot", "train": {"early_stop": {}}}, r"train\.early_stop: with reference: 'snapshot' the"),
        ({"reference": "snapshot", "condition": "soup"}, r"reference: 'snapshot' does not go with condition"),
        (
            {"reference": "snapshot", "combine": "modpo", "data": {"margins": "implicit"}},
            r"data\.margins: an implicit reward is a log-ratio to the reference .* 'snapshot' moves",
        ),
        ({"reference": {"name": "soup", "shares": {"nowhere": 1.0}}}, r"no directory with an adapter_config\.json"),
        ({"reference": {"name": "soup", "shares": {}}}, "name adapters with a share that is not 0"),
        ({"reference": {"name": "moving-average", "decay": 1.5}}, r"reference\.decay: .*less than or equal to 1"),
    ],
)
def test_what_does_not_go_together_is_refused(tiny_model_path, tmp_path, changes, message):
    pairs = write_pairs(tmp_path / "pairs.jsonl")
    changes = changes | {"data": {"path": str(pairs)} | changes.get("data", {})}
    with pytest.raises(ConfigError, match=message):
        prepare(small_config(tiny_model_path, pairs, **changes), registry.discover())


def test_only_a_loss_that_compares_with_the_base_prices_the_distance_from_it():
    prices = []
    for reference in (None, "base", "previous-iterate"):
        settings = config.from_mapping(online_content(reference=reference))
        prices.append(prepare(settings, registry.discover()).kl_price)
    assert prices == [0.1, 0.1, 0.0]


def test_rounds_are_the_iterates_where_there_are_rounds():
    settings = config.from_mapping(online_content(reference={"name": "previous-iterate", "every": 3}))
    with pytest.raises(ConfigError, match=r"reference\.every: a round of sampled responses is an iterate"):
        prepare(settings, registry.discover())


def test_implicit_rewards_and_a_reference_that_moves_are_refused(tiny_model_path, tmp_path):
    with pytest.raises(ConfigError, match=r"combine: 'modpo' needs rewards, and an implicit reward is a log-ratio"):
        offline(tiny_model_path, tmp_path, combine="modpo", reference={"name": "snapshot", "every": 2})


# --- whole runs -------------------------------------------------------------------------------------------------------


def test_an_interrupted_run_goes_on_as_the_unbroken_one(tmp_path):
    """Iterated DPO by the recipe, with a moving average, which remembers most."""
    reference = {"name": "moving-average", "every": 1, "decay": 0.5}
    overrides = (*FEW, "train.steps=4", "train.together=1", f"reference={json.dumps(reference)}")
    (tmp_path / "sweep.yaml").write_text(recipes.read("iterated"))
    settings = config.load(tmp_path / "sweep.yaml", overrides)
    run.start(settings, tmp_path / "whole", registry.discover(), Observer())
    resumed = break_off_and_resume(settings, tmp_path / "run", StopAfterCandidates(1))
    assert contents(resumed) == contents(tmp_path / "whole")
    lines = (tmp_path / "run/candidates/w-0.00-1.00/metrics.jsonl").read_text().splitlines()
    told = [json.loads(line) for line in lines]
    assert told[-1]["reference/moves"] == 2.0 and told[0]["pairs"] > 0 and "reference/norm" in told[-1]
    assert {"pairs/ties", "pairs/close", "pairs/gap"} <= told[0].keys()
    assert "moving-average" in json.dumps(json.loads((tmp_path / "run/run.json").read_text())["plugins"])


@pytest.mark.parametrize(
    "changes",
    [('loss={"name": "inpo", "eta": 0.1, "base_share": 0.333}',), ("rollouts.gap=0.05", "rollouts.pairs=all")],
    ids=["inpo", "dno"],
)
def test_the_recipe_runs_with_its_other_lines(tmp_path, changes):
    (tmp_path / "sweep.yaml").write_text(recipes.read("iterated"))
    settings = config.load(tmp_path / "sweep.yaml", (*FEW, *changes))
    ((_, told),) = trained(opened(settings), job_of(HALF, opened(settings), ()).reference)
    assert told.of("kl_estimate") == [0.0, 0.0] and told.of("reference/moves") == [1.0, 2.0]
