"""Whole sweeps: the run directory, resuming, what one bad candidate may do to the others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from interruptions import StopAfterCandidates, StopAfterSteps, break_off_and_resume, kill_and_resume
from sweeps import contents, small_config, write_pairs

from moalign import config, registry, storage
from moalign.errors import ConfigError, CorruptFileError, DataError, RunError, TrainingError
from moalign.sweeps import front, journal, run
from moalign.sweeps.observe import Observer
from moalign.sweeps.plan import prepare
from moalign.sweeps.workshop import open_workshop


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("data") / "pairs.jsonl")


@pytest.fixture(scope="module")
def settings(tiny_model_path, pairs) -> config.Config:
    return small_config(tiny_model_path, pairs, combine="modpo")


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, settings) -> Path:
    directory = tmp_path_factory.mktemp("runs") / "unbroken"
    run.start(settings, directory, registry.discover(), Observer())
    return directory


def test_a_run_leaves_what_the_design_says(unbroken):
    assert {item.name for item in unbroken.iterdir()} >= {"run.json", "journal.jsonl", "front.json", "candidates"}
    record = front.read_record(unbroken)
    assert record["plugins"]["combiner moalign:modpo"]
    assert record["margins"] == {"harmless": "implicit", "helpful": "implicit"}
    for folder in (unbroken / "candidates").iterdir():
        assert storage.verify(folder) == []
        assert {file.name for file in folder.iterdir()} == {
            "adapter_model.safetensors",
            "adapter_config.json",
            "metrics.jsonl",
            "samples.jsonl",
            "outcome.json",
            "MANIFEST.json",
        }
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == list(range(6))
        assert {"loss", "kl_estimate", "gradient_norm"} <= set(lines[0])
    result = storage.read_json(unbroken / "front.json")
    assert result["base"]["scores"] == {"harmless": 0.5, "helpful": 0.5}
    assert result["reference_point"] == result["base"]["scores"]
    assert len(result["points"]) == 3
    assert result == front.read(unbroken)


def test_one_hot_candidates_come_first_and_serve_as_rewards(unbroken):
    events = [event for event in journal.read(unbroken / "journal.jsonl") if event["event"] == "outcome"]
    assert [sorted(event["preference"]["values"].values()) for event in events] == [[0, 1], [0, 1], [0.5, 0.5]]


@pytest.mark.parametrize("after", [1, 6, 7, 15, 18])
def test_interrupted_and_resumed_equals_unbroken_byte_for_byte(settings, unbroken, tmp_path, after):
    with pytest.raises(KeyboardInterrupt):
        run.start(settings, tmp_path / "run", registry.discover(), StopAfterSteps(after))
    assert not list((tmp_path / "run").rglob(".partial-*"))
    run.resume(tmp_path / "run", registry.discover(), Observer())
    assert contents(tmp_path / "run") == contents(unbroken)


def test_sigkill_in_the_middle_and_resume(settings, unbroken, tmp_path):
    assert contents(kill_and_resume(settings, tmp_path)) == contents(unbroken)


def test_a_finished_candidate_that_is_not_in_the_journal_is_not_trained_again(settings, unbroken, tmp_path):
    directory = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        run.start(settings, directory, registry.discover(), StopAfterCandidates())
    file = directory / "journal.jsonl"
    file.write_bytes(b"".join(file.read_bytes().splitlines(keepends=True)[:-1]))  # killed before the append
    started = []

    class Watch(Observer):
        def on_candidate_start(self, candidate):
            started.append(candidate.id)

    run.resume(directory, registry.discover(), Watch())
    assert len(started) == 2
    assert contents(directory) == contents(unbroken)


def test_a_second_start_and_a_run_in_use_are_refused(settings, unbroken):
    with pytest.raises(RunError, match="already holds a run; `moalign resume"):
        run.start(settings, unbroken, registry.discover(), Observer())
    with storage.lock(unbroken), pytest.raises(RunError, match="is in use by process"):
        run.resume(unbroken, registry.discover(), Observer())


def test_a_folder_with_other_things_in_it_is_refused(settings, tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(RunError, match="not empty"):
        run.start(settings, tmp_path, registry.discover(), Observer())


def test_changed_data_is_refused_at_resume(tiny_model_path, tmp_path):
    data = write_pairs(tmp_path / "pairs.jsonl")
    with pytest.raises(KeyboardInterrupt):
        run.start(small_config(tiny_model_path, data), tmp_path / "run", registry.discover(), StopAfterSteps(1))
    write_pairs(data, seed=1)
    with pytest.raises(RunError, match="the data changed since this run was started"):
        run.resume(tmp_path / "run", registry.discover(), Observer())


def test_a_damaged_candidate_is_named(settings, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run.start(settings, tmp_path / "run", registry.discover(), StopAfterCandidates())
    adapter = next((tmp_path / "run").glob("candidates/*/adapter_model.safetensors"))
    data = bytearray(adapter.read_bytes())
    data[100] ^= 4
    adapter.write_bytes(data)
    with pytest.raises(CorruptFileError, match=r"adapter_model\.safetensors"):
        run.resume(tmp_path / "run", registry.discover(), Observer())


def test_no_run_directory(tmp_path):
    with pytest.raises(RunError, match="this is not a run directory"):
        run.resume(tmp_path, registry.discover(), Observer())


def test_one_diverging_candidate_does_not_stop_the_others(tiny_model_path, pairs, tmp_path, monkeypatch):
    from moalign_plugins.objectives.dpo import DPO

    healthy = DPO.loss

    def loss(self, batch, terms):
        value = healthy(self, batch, terms)
        return value * float("nan") if batch.preference[0, 0] == 1.0 else value

    monkeypatch.setattr(DPO, "loss", loss)
    result = run.start(small_config(tiny_model_path, pairs), tmp_path / "run", registry.discover(), Observer())
    assert [failed["id"] for failed in result["failed"]] == ["w-1.00-0.00"]
    assert "loss is nan" in result["failed"][0]["error"]
    assert len(result["points"]) == 2
    assert not (tmp_path / "run" / "candidates" / "w-1.00-0.00").exists()


def test_when_all_fail_the_run_says_so(tiny_model_path, pairs, tmp_path, monkeypatch):
    from moalign_plugins.objectives.dpo import DPO

    monkeypatch.setattr(DPO, "loss", lambda self, batch, terms: 1 / 0)
    with pytest.raises(TrainingError, match=r"every candidate failed.*'dpo' of moalign .*, in loss: ZeroDivisionError"):
        run.start(small_config(tiny_model_path, pairs), tmp_path / "run", registry.discover(), Observer())


def test_rewards_from_scores_and_from_a_plugin_are_the_same(tiny_model_path, tmp_path):
    responses = ["a b c", "a b", "c", "a b c d e"]
    materials = []
    for kind in ("scores", "reward"):
        rows = [
            {"prompt": f"q{number}: ", "response": text} | ({"short": -len(text.split())} if kind == "scores" else {})
            for number in range(6)
            for text in responses
        ]
        file = tmp_path / f"{kind}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        reader = {"name": "columns"} | ({"scores": {"short": "short"}} if kind == "scores" else {})
        settings = small_config(
            tiny_model_path,
            file,
            objectives={"short": {"reward": None if kind == "scores" else "length"}},
            data={"path": str(file), "held_out": 0.2, "reader": reader},
            loss={"name": "rebel", "beta": 0.1},
            search={"name": "grid", "points": 1},
        )
        plan = prepare(settings, registry.discover())
        materials.append(open_workshop(plan, tmp_path, Observer(), keep_cache=False).material)
    scores, reward = materials
    assert scores.margins == {"short": "scores"} and reward.margins == {"short": "reward"}
    assert scores.train.content_hash == reward.train.content_hash
    assert sorted(set(scores.train.rewards[:, 0])) == [-5, -3, -2, -1]
    assert len(scores.train.pairs) == 5 * 6  # prompts x pairs of four responses


def test_rollouts_without_a_reward_are_refused_before_anything_is_loaded(tiny_model_path, pairs, tmp_path):
    settings = small_config(tiny_model_path, pairs, rollouts={"rounds": 1}, loss={"name": "rebel"})
    with pytest.raises(ConfigError, match=r"objectives\.harmless has no reward; add objectives\.harmless\.reward"):
        run.start(settings, tmp_path / "run", registry.discover(), Observer())
    assert not (tmp_path / "run").exists()


def test_malformed_rows_stop_or_are_counted(tiny_model_path, tmp_path):
    data = write_pairs(tmp_path / "pairs.jsonl")
    good = data.read_text()
    data.write_text(good + json.dumps({"prompt": "q: ", "chosen": 3, "rejected": "x", "objective": "helpful"}) + "\n")
    with pytest.raises(DataError, match=r"pairs\.jsonl:41: .*data\.malformed=skip"):
        run.start(small_config(tiny_model_path, data), tmp_path / "strict", registry.discover(), Observer())
    skipping = small_config(tiny_model_path, data, data={"path": str(data), "held_out": 0.2, "malformed": "skip"})
    run.start(skipping, tmp_path / "skip", registry.discover(), Observer())
    assert any("skipped" in reason for reason in front.read_record(tmp_path / "skip")["data_counts"])


def test_an_adaptive_search_is_asked_the_same_after_a_crash(tiny_model_path, pairs, tmp_path, monkeypatch):
    """The search sees the history only between its batches, also where a batch was interrupted."""
    from moalign.types import Candidate, Preference
    from moalign_plugins.searches.grid import Grid

    asked: list[tuple[str, ...]] = []

    def propose(self, space, history, rng):
        asked.append(tuple(outcome.id for outcome in history))
        if len(history) >= 4:
            return []
        shares = [0.1 + 0.2 * (len(history) + offset) for offset in range(2)]
        return [
            Candidate(f"{len(history)}-{number}", Preference("weights", {"harmless": share, "helpful": 1 - share}))
            for number, share in enumerate(shares)
        ]

    monkeypatch.setattr(Grid, "propose", propose)
    settings = small_config(tiny_model_path, pairs, train={"steps": 1, "pairs_per_step": 4})
    run.start(settings, tmp_path / "whole", registry.discover(), Observer())
    expected = sorted(set(asked))
    asked.clear()
    break_off_and_resume(settings, tmp_path / "broken", StopAfterSteps(2))
    assert sorted(set(asked)) == expected == sorted({(), ("0-0", "0-1"), ("0-0", "0-1", "2-0", "2-1")})
    assert contents(tmp_path / "broken") == contents(tmp_path / "whole")


def test_an_error_outside_a_plugin_fails_the_candidate_and_not_the_sweep(tiny_model_path, pairs, tmp_path, monkeypatch):
    from moalign_plugins.combiners.linear import Linear

    healthy = Linear.pair_terms

    def pair_terms(self, batch):
        return None if batch.preference[0, 0] == 1.0 else healthy(self, batch)

    monkeypatch.setattr(Linear, "pair_terms", pair_terms)
    result = run.start(small_config(tiny_model_path, pairs), tmp_path / "run", registry.discover(), Observer())
    assert [failed["id"] for failed in result["failed"]] == ["w-1.00-0.00"]
    assert "combiner 'linear' of moalign 0.1.0, in pair_terms: scale must be" in result["failed"][0]["error"]


def test_a_soup_is_evaluated_not_trained_and_marked(tiny_model_path, pairs, tmp_path):
    settings = small_config(tiny_model_path, pairs, search={"name": "soup", "trained": 2, "points": 5})
    result = run.start(settings, tmp_path / "run", registry.discover(), Observer())
    points = {point["id"]: point for point in result["points"]}
    assert len(points) == 5 and sorted(point["kind"] for point in points.values()) == ["mixed"] * 3 + ["trained"] * 2
    middle = points["mix-w-0.50-0.50"]
    assert middle["tokens"] == 0
    assert middle["parents"] == pytest.approx({"w-1.00-0.00": 0.5, "w-0.00-1.00": 0.5})
    assert 0 < middle["details"]["lost to rank"] < 1
    assert (tmp_path / "run" / "candidates" / "mix-w-0.50-0.50" / "adapter_model.safetensors").exists()

    class Watch(Observer):
        def on_candidate_start(self, candidate):
            raise AssertionError(candidate)

    before = contents(tmp_path / "run")
    run.resume(tmp_path / "run", registry.discover(), Watch())
    assert contents(tmp_path / "run") == before


def test_an_interrupted_soup_goes_on(tiny_model_path, pairs, tmp_path):
    settings = small_config(tiny_model_path, pairs, search={"name": "soup", "trained": 2, "points": 4})
    run.start(settings, tmp_path / "whole", registry.discover(), Observer())

    class StopAtMix(Observer):
        def on_candidate_end(self, outcome):
            if outcome.kind == "mixed":
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.start(settings, tmp_path / "run", registry.discover(), StopAtMix())
    run.resume(tmp_path / "run", registry.discover(), Observer())
    assert contents(tmp_path / "run") == contents(tmp_path / "whole")
