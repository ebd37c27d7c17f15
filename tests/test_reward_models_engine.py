"""What the engine gives to reward models: states at both ends of a sequence, rows as units, members side by side."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from judged_worlds import judged_config, scored_config, write_judgements, write_scores

from moalign import lora, registry
from moalign.config import ModelSettings
from moalign.data.tokenise import Sequence
from moalign.engine import model as models
from moalign.engine.layout import lay_out, row_length
from moalign.reward_models import config as configuration
from moalign.reward_models import training
from moalign.reward_models.plan import prepare
from moalign.sweeps.observe import Observer

SEQUENCES = [Sequence((1, 5, 6, 7, 2), 3), Sequence((1, 5, 6, 8, 9, 9, 2), 3), Sequence((1, 4, 2), 2)]
ROWS = [[0, 1], [2]]


def test_a_whole_layout_holds_the_last_tokens_and_predicts_the_same():
    usual, whole = (lay_out(SEQUENCES, ROWS, 0, whole=each) for each in (False, True))
    assert usual.final is None
    flat = whole.input_ids.flatten()
    assert flat[whole.final].tolist() == [2, 2, 2]
    assert flat[whole.context].tolist() == [6, 6, 4]
    assert whole.lengths == (3 + 2 + 4, 2 + 1) and usual.lengths == (3 + 1 + 3, 2)
    assert [row_length(SEQUENCES[:2], each) for each in (False, True)] == [7, 9]
    assert torch.equal(usual.labels, whole.labels) and torch.equal(usual.target, whole.target)
    for layout in (usual, whole):  # the tokens from which the response's are predicted
        assert layout.input_ids.flatten()[layout.source].tolist() == [6, 7, 6, 8, 9, 9, 4]
    assert whole.position_ids.flatten()[whole.final].tolist() == [4, 6, 2]


@pytest.fixture(scope="module")
def model(tiny_model_path):
    settings = ModelSettings.model_validate({"path": str(tiny_model_path), "lora": {"r": 4}})
    loaded = models.load(str(tiny_model_path), settings, torch.device("cpu"))
    return replace(loaded, packing=replace(loaded.packing, whole=True))


@torch.no_grad()
def test_the_states_at_the_ends_are_those_of_each_sequence_alone(model):
    layout = model.lay_out(SEQUENCES, ROWS)
    with lora.active(model.policy, None):
        states = model.hidden_states(layout)
        for index, sequence in enumerate(SEQUENCES):
            alone = model.base.base_model(input_ids=torch.tensor([sequence.ids])).last_hidden_state[0]
            assert torch.allclose(states[layout.final[index]], alone[-1], atol=1e-5)
            assert torch.allclose(states[layout.context[index]], alone[sequence.prompt_length - 1], atol=1e-5)


def shop_of(content):
    plan = prepare(configuration.from_mapping(content), registry.discover())
    return training.open_shop(plan, Observer())


@pytest.fixture(scope="module")
def shop(tiny_model_path, tmp_path_factory):
    file = write_judgements(tmp_path_factory.mktemp("judged") / "pairs.jsonl", prompts=16)
    train = {"steps": 4, "pairs_per_step": 6, "lr": 0.003}
    return shop_of(judged_config(tiny_model_path, file, members=3, train=train))


def test_a_member_trained_along_is_the_member_trained_alone(shop):
    together = training.train_members(shop, range(3), Observer())
    adapters = [lora.weights(shop.model.policy, member.slot) for member in together]
    assert not torch.equal(together[0].parameters["head.weight"], together[1].parameters["head.weight"])
    for number, adapter in enumerate(adapters):
        (alone,) = training.train_members(shop, [number], Observer())
        assert alone.name == together[number].name and alone.seed == together[number].seed
        own = lora.weights(shop.model.policy, alone.slot)
        for name, values in own.items():
            assert torch.allclose(values, adapter[name], atol=1e-5), name
        head, along = alone.parameters["head.weight"], together[number].parameters["head.weight"]
        assert torch.allclose(head, along, atol=1e-5)


def test_members_that_share_no_pass_are_the_same_members(shop):
    together = training.train_members(shop, range(3), Observer())
    adapters = [lora.weights(shop.model.policy, member.slot) for member in together]
    settings = shop.plan.config.train.model_copy(update={"together": 1})
    plan = replace(shop.plan, config=shop.plan.config.model_copy(update={"train": settings}))
    apart = training.train_members(replace(shop, plan=plan), range(3), Observer())
    assert [member.slot for member in apart] == [member.slot for member in together]
    for member, adapter, other in zip(apart, adapters, together, strict=True):
        for name, values in lora.weights(shop.model.policy, member.slot).items():
            assert torch.allclose(values, adapter[name], atol=1e-5), name
        assert torch.allclose(member.parameters["head.weight"], other.parameters["head.weight"], atol=1e-5)


def test_members_see_the_data_in_orders_of_their_own(shop):
    from moalign.data.batching import pair_indices

    orders = [pair_indices(shop.material.train, training.seed_of(0, number), 0, 6).tolist() for number in range(3)]
    assert len({tuple(order) for order in orders}) == 3


def test_a_pass_in_which_nobody_reads_log_probabilities_does_without_the_output_head(shop, monkeypatch):
    def never(*_, **__):
        raise AssertionError("the output head was asked")

    monkeypatch.setattr(models, "token_logps", never)
    (member,) = training.train_members(shop, [0], Observer())
    assert member.trained.skipped == 0


def test_forms_on_log_probabilities_get_them(tiny_model_path, tmp_path):
    file = write_judgements(tmp_path / "pairs.jsonl", prompts=12)
    content = judged_config(
        tiny_model_path,
        file,
        objectives={"letters": None},
        reward_model={"name": "implicit", "beta": 1.0},
        train={"steps": 3, "pairs_per_step": 4, "lr": 0.003},
    )
    lines = [row for row in file.read_text().splitlines() if '"letters"' in row]
    file.write_text("\n".join(lines) + "\n")
    (member,) = training.train_members(shop_of(content), [0], Observer())
    assert member.metrics[0]["loss"] == pytest.approx(np.log(2))  # the adapted model is its base still
    assert member.trained.skipped == 0 and member.parameters == {}


def test_a_score_that_is_missing_moves_nothing(tiny_model_path, tmp_path):
    """The head of an objective that no response of a step has a score for keeps its first values."""
    file = write_scores(tmp_path / "scores.jsonl", prompts=12)
    content = scored_config(tiny_model_path, file, train={"steps": 1, "pairs_per_step": 2, "lr": 0.01})
    shop = shop_of(content)
    train = shop.material.train
    assert np.isnan(train.rewards).any() and len(train.pairs) == 3 * 9  # no row is dropped for it
    only = np.array(train.rewards)
    only[:, 1] = np.nan
    less = replace(shop, material=replace(shop.material, train=replace(train, rewards=only)))
    (full,) = training.train_members(shop, [0], Observer())
    (part,) = training.train_members(less, [0], Observer())
    first = shop.plan.form.parameters(shop.model.width, shop.plan.objectives, _generator())["head.weight"]
    moved = [(member.parameters["head.weight"] - first).abs().amax(1) for member in (full, part)]
    assert (moved[0] > 0).all()
    assert moved[1][0] > 0 and moved[1][1] == 0


def _generator():
    from moalign.seeds import derive

    return torch.Generator().manual_seed(derive(0, "parameters"))


def test_a_step_on_rows_is_the_mean_over_rows(tiny_model_path, tmp_path):
    file = write_scores(tmp_path / "scores.jsonl", prompts=12)
    shop = shop_of(scored_config(tiny_model_path, file, train={"steps": 1, "pairs_per_step": 5, "lr": 1e-3}))
    (member,) = training.train_members(shop, [0], Observer())
    from moalign.data.batching import pair_indices
    from moalign.engine import judged

    rows = shop.material.train.pairs[pair_indices(shop.material.train, 0, 0, 5), 0]
    first = shop.plan.form.parameters(shop.model.width, shop.plan.objectives, _generator())
    chosen = [shop.material.train.sequences[row] for row in rows]
    lora.initialise(shop.model.policy, member.slot, 0)  # B is 0: the base
    scores = judged.scores(
        shop.model, member.slot, shop.plan.form, shop.plan.objectives, first, chosen, list(range(len(rows)))
    )
    labels = shop.material.train.rewards[rows]
    expected = np.mean([np.nanmean((own - label) ** 2) for own, label in zip(scores, labels, strict=True)])
    assert member.metrics[0]["loss"] == pytest.approx(expected, rel=1e-4)


def test_an_early_stop_looks_at_held_out_rows(tiny_model_path, tmp_path):
    file = write_scores(tmp_path / "scores.jsonl", prompts=12)
    stop = {"every": 2, "patience": 1}
    train = {"steps": 8, "pairs_per_step": 4, "lr": 0.3, "early_stop": stop}  # so large that it soon gets worse
    shop = shop_of(scored_config(tiny_model_path, file, train=train))
    assert (shop.material.looked_at.pairs[:, 0] == shop.material.looked_at.pairs[:, 1]).all()
    (member,) = training.train_members(shop, [0], Observer())
    looks = {line["step"]: line["held_out_loss"] for line in member.metrics if "held_out_loss" in line}
    assert min(looks, key=looks.get) == member.trained.best_step
