"""Further sequences of pairs: as data, and in runs of losses that read them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from interruptions import StopAfterCandidates, break_off_and_resume
from sweeps import contents, small_config

from moalign import registry
from moalign.api import Objective, Record, Sample
from moalign.data.dataset import judged_by
from moalign.data.pairing import labelled
from moalign.data.tokenise import Tokeniser
from moalign.data.views import encoded, texts_of, with_views
from moalign.engine import train as loop
from moalign.engine.batches import OfflineSource
from moalign.engine.model import load_tokenizer
from moalign.engine.scoring import logps_under
from moalign.errors import DataError, TrainingError
from moalign.sweeps import plan, run, views
from moalign.sweeps.candidate import job_of
from moalign.sweeps.observe import Observer
from moalign.sweeps.workshop import open_workshop
from moalign.types import Candidate, Pair, Preference

# --- as data --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokeniser(tiny_model_path):
    return Tokeniser.of(load_tokenizer(str(tiny_model_path)))


def records(*responses, prompt="what? "):
    better = tuple(Pair(0, other) for other in range(1, len(responses)))
    return [Record(prompt, responses, pairs={"helpful": better}, group=prompt)]


def viewed(tokeniser, data, asked, max_length=100):
    dataset = labelled(data, tokeniser, ["helpful"], max_length=max_length)
    return with_views(dataset, encoded(dataset, [asked(*pair) for pair in texts_of(dataset)], tokeniser, max_length))


def test_views_are_rows_of_their_own_that_pairs_share(tokeniser):
    data = records("abc", "b", "c") + records("d", "e", prompt="who? ")
    plain = labelled(data, tokeniser, ["helpful"], max_length=100)
    found = viewed(tokeniser, data, lambda c, r: {"twice": Sample(c.prompt, c.response * 2), "own": r})
    assert np.array_equal(found.pairs, plain.pairs) and found.content_hash != plain.content_hash
    assert found.views["twice"].tolist() == [5, 5, 6] and found.views["own"].tolist() == found.pairs[:, 1].tolist()
    assert tokeniser.tokenizer.decode(found.sequences[5].ids[1:-1]) == "what? abcabc"
    assert found.groups[5:].tolist() == [found.groups[0], found.groups[3]] and np.isnan(found.rewards[5:]).all()
    assert found.rows_of(np.array([2, 0])).tolist() == [3, 4, 6, 4, 0, 1, 5, 1]
    assert judged_by(found, [0]) is found and found.samples[6] == Sample("who? ", "dd")


def test_the_pair_s_own_prompt_stays_as_it_was_cut_and_another_is_cut_as_a_pair_s(tokeniser):
    long = "0123456789" * 2
    asked = lambda c, r: {"own": Sample(c.prompt, "z"), "other": Sample(c.prompt + "!", "zz")}  # noqa: E731
    found = viewed(tokeniser, records("abc", "b", prompt=long), asked, max_length=12)
    own, other = (found.sequences[found.views[name][0]] for name in ("own", "other"))
    assert own.prompt == found.sequences[0].prompt and len(own.ids) == len(own.prompt) + 2 < 12
    assert len(other.ids) == 12 and other.ids[0] == tokeniser.bos_id and other.truncated
    assert found.counts["views that lost the beginning of their prompt, or their end"] == 1


def test_what_a_side_of_the_pair_says_keeps_its_tokens(tokeniser):
    """As a policy sampled them: cut before its end, spelt in another way, or nothing but the end."""
    dataset = labelled(records("abc", "b"), tokeniser, ["helpful"], max_length=100)
    plain, prompt = dataset.sequences[0].response, dataset.sequences[0].prompt
    for text, ids in (("abc", plain[:-1]), ("abc", (*plain[1::-1], *plain[2:])), ("", plain[-1:])):
        sampled = dataclasses.replace(dataset.sequences[0], ids=prompt + ids)
        changed = dataclasses.replace(
            dataset,
            sequences=(sampled, dataset.sequences[1]),
            samples=(dataclasses.replace(dataset.samples[0], response=text), dataset.samples[1]),
        )
        asked = {"own": Sample("what? ", text), "other": Sample("who? ", text), "new": Sample("who? ", "c")}
        (found,) = encoded(changed, [asked], tokeniser, 100)
        assert found["own"].sequence.ids == sampled.ids
        assert found["other"].sequence.response == ids and found["other"].sequence.prompt == tokeniser.prompt("who? ")
        assert found["new"].sequence.response == tokeniser.response("c")


def test_pairs_without_a_view_are_left_out_and_counted(tokeniser):
    data = records("abc", "b", "c", "d" * 40)

    def asked(chosen, rejected):
        if rejected.response == "b":
            return {}
        return {"more": Sample(chosen.prompt, " " if rejected.response == "c" else rejected.response * 2)}

    with pytest.raises(DataError, match=r"no pair has all further sequences that the loss asks for(.|\n)*1 x .*empty"):
        viewed(tokeniser, data, asked, max_length=60)
    found = viewed(tokeniser, data, asked)
    assert len(found.pairs) == 1 and {name: count for name, count in found.counts.items() if "view" in name} == {
        "dropped pair: it has no view 'more'": 1,
        "dropped pair: view 'more': empty completion": 1,
        "views that lost the beginning of their prompt, or their end": 0,
    }


# --- in runs --------------------------------------------------------------------------------------------------------


def settings_of(model_path, folder: Path, loss, **changes):
    rng, rows = Random(0), []
    for number in range(16):
        letters, digits = (
            " ".join("".join(rng.choice(of) for _ in range(rng.randint(1, 3))) for _ in range(4))
            for of in ("abc", "123")
        )
        for objective, chosen, rejected in (("helpful", letters, digits), ("harmless", digits, letters)):
            row = {"prompt": f"q{number}: ", "chosen": chosen, "rejected": rejected, "objective": objective}
            rows.append(json.dumps(row) + "\n")
    file = folder / "pairs.jsonl"
    file.write_text("".join(rows))
    train = {"steps": 2, "pairs_per_step": 4, "lr": 1e-2, "together": 2}
    search = {"name": "grid", "points": 2}
    return small_config(model_path, file, loss=loss, **{"train": train, "search": search} | changes)


@pytest.mark.parametrize("loss", ["srpo", "spo"])
def test_one_line_of_a_configuration_trains_with_it_and_resumes_bitwise(loss, tiny_model_path, tmp_path):
    settings, registered = settings_of(tiny_model_path, tmp_path, loss), registry.discover()
    run.start(settings, tmp_path / "whole", registered, Observer())

    parts = break_off_and_resume(settings, tmp_path / "parts", StopAfterCandidates())
    assert contents(parts) == contents(tmp_path / "whole")
    assert (tmp_path / "whole/candidates/w-1.00-0.00/objective.safetensors").exists() == (loss == "spo")


def test_the_rows_of_views_have_the_log_probabilities_of_their_texts(tiny_model_path, tmp_path, monkeypatch):
    """Those of the base on each text alone, at step 0; in one pass, and cut into passes of one prompt each."""
    settings = settings_of(tiny_model_path, tmp_path, "srpo")
    prepared = plan.prepare(settings, registry.discover())
    workshop = open_workshop(prepared, Path(), Observer(), keep_cache=False)
    train, model = workshop.material.train, workshop.model
    rows = np.concatenate([train.pairs, np.stack(list(train.views.values()), 1)], 1)
    (found,) = logps_under(model, train.sequences, range(len(train.sequences)), [None])
    expected = torch.tensor([float(values.sum()) for values in found])[torch.from_numpy(rows)]  # [pairs, 6]
    weights = Preference("weights", {"helpful": 0.5, "harmless": 0.5})
    parts, seen = {}, []

    def looking(batch, job, *others):
        seen.append(batch)
        return loss_of(batch, job, *others)

    loss_of = loop.loss_of
    monkeypatch.setattr(loop, "loss_of", looking)
    for limit in (None, 1):
        seen.clear()
        job = job_of(Candidate("c", weights), workshop, ())
        job = dataclasses.replace(job, settings=job.settings.model_copy(update={"steps": 1, "tokens_per_pass": limit}))
        source = OfflineSource(workshop.pairs_for(Candidate("c", weights)), 0, 5)
        told: list = []
        trained = lambda step, line, told=told: told.append(line)  # noqa: E731
        loop.train(model, source, job, workshop.cache, workshop.accelerator, trained)
        parts[limit] = len(seen)
        assert told[0]["loss"] == pytest.approx(0.5 * 0.25, rel=1e-5)  # linear: half the weight
        assert sum(len(batch.pairs) for batch in seen) == 5
        for batch in seen:
            sums = batch.logps.detach().sum(-1)
            places = torch.cat([batch.pairs, torch.stack(list(batch.views.values()), 1)], 1)
            assert list(batch.views) == list(train.views)
            nearest = (sums[places][:, None] - expected).abs().amax(-1).amin(-1)
            assert float(nearest.max()) < 1e-3
    assert parts[1] > parts[None] == 1
    apart = (expected[:, None] - expected).abs().amax(-1) + torch.eye(len(expected))
    assert float(apart.min()) > 1e-2  # so that the nearest is the pair itself


def test_candidates_may_change_options_that_leave_the_views_as_they_are(tiny_model_path, tmp_path):
    settings = settings_of(tiny_model_path, tmp_path, "spo")
    prepared = plan.prepare(settings, registry.discover())
    workshop = open_workshop(prepared, Path(), Observer(), keep_cache=False)
    train = workshop.material.train
    for changes, fine in (({"loss.beta": 0.5}, True), ({"loss.levels": 2}, False)):
        candidate = Candidate("c", Preference("weights", {"helpful": 0.5, "harmless": 0.5}), changes=changes)
        objective = prepared.variant(candidate.changes).objective
        assert isinstance(objective, Objective)
        if fine:
            views.check_same(prepared, objective, train)
            continue
        with pytest.raises(TrainingError, match=r"ask for other views than those of the configuration"):
            views.check_same(prepared, objective, train)
