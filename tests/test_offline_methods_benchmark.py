"""The benchmark of offline losses: all that it names can be trained, and as many labels are wrong as it says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import offline_data, offline_methods
from benchmarks.offline_methods import Request, requests, ways
from moalign import registry
from moalign.demo import grammar
from moalign.sweeps import guides
from moalign.sweeps.plan import prepare
from moalign_plugins.objectives._policy_gradient import PolicyGradient

PROMPTS = grammar.TRAIN_PROMPTS[:12]


def test_every_loss_that_a_file_suffices_for_is_a_method():
    named = {Request(name, 0.0, 1, 0).settings("data.path=x.jsonl").loss.name for name in ways()["methods"]}
    known = registry.discover()
    of_samples = set()
    for entry in known.of_kind("objective"):
        loss = known.load(entry)
        if loss.needs & {"old_logps", "greedy", "token_advantages"} or issubclass(loss, PolicyGradient):
            of_samples.add(entry.name)
    shipped = {entry.name for entry in known.of_kind("objective")}
    assert shipped - named - of_samples == set()


@pytest.mark.parametrize("method", list(ways()["methods"]))
def test_what_it_compares_is_a_configuration(method, tmp_path):
    file = tmp_path / "data.jsonl"
    file.touch()
    kind = ways()["methods"][method]["data"]
    request = Request(method, 0.25, 4, seed=1)
    for folder in (tmp_path / "candidates" / name for name in ("w-1.00-0.00", "w-0.50-0.50", "w-0.00-1.00")):
        folder.mkdir(parents=True)
        for name in guides.FILES:
            (folder / name).touch()
    runs = dict.fromkeys(request.guides, tmp_path)
    settings = request.settings(f"data.path={file}", f"data.reader={offline_data.READERS[kind]}", **runs)
    assert settings.train.steps == 600 and settings.seed == 1
    assert len(prepare(settings, registry.discover()).propose(())) == offline_methods.POINTS


def test_pairs_are_labelled_by_judges_and_so_many_are_turned():
    judges = offline_methods.judges(seed=0)
    right, wrong = (list(offline_data.labelled(judges, PROMPTS, 8, 3, noise)) for noise in (0.0, 0.25))
    turned = [
        (row["chosen"], row["rejected"]) != (other["chosen"], other["rejected"])
        for row, other in zip(right, wrong, strict=True)
    ]
    assert all(row["objective"] == other["objective"] for row, other in zip(right, wrong, strict=True))
    spread = (0.25 * 0.75 / len(turned)) ** 0.5
    assert sum(turned) / len(turned) == pytest.approx(0.25, abs=4 * spread)
    better = [grammar.score(row["prompt"], row["chosen"])[row["objective"]] for row in right]
    worse = [grammar.score(row["prompt"], row["rejected"])[row["objective"]] for row in right]
    assert sum(better) > sum(worse)


def test_swapped_labels_are_the_other_of_each_pair_noise_and_all():
    judges = offline_methods.judges(seed=0)
    as_judged, swapped = (
        list(offline_data.labelled(judges, PROMPTS, 8, 3, 0.25, swapped=turned)) for turned in (False, True)
    )
    assert [(row["rejected"], row["chosen"]) for row in swapped] == [
        (row["chosen"], row["rejected"]) for row in as_judged
    ]


def test_guides_are_trained_once_on_the_same_pairs_and_cost_what_they_cost(monkeypatch):
    """AlignDistil's contrary learns from swapped labels; each candidate hears the one of its own preference."""
    ran = []

    def train(settings, directory):
        ran.append((settings, directory))
        return offline_methods.Spent(100, 2.0)

    def reached(settings, directory, before=()):
        return {"options": settings.loss.options, "before": sum(before, ())}

    class Parent:
        def __init__(self):
            self.heard = []

        def send(self, message):
            self.heard.append(message[1])

    monkeypatch.setattr(offline_methods, "train", train)
    monkeypatch.setattr(offline_methods, "reached", reached)
    monkeypatch.setattr(offline_data, "write", lambda *about, swapped=False: (f"data.path=swapped-{swapped}",))
    monkeypatch.setattr(offline_methods, "make_quiet", lambda assignment: None)
    parent = Parent()
    offline_methods.work([Request(name, 0.0, 1, 0) for name in ("dpo", "tgdpo", "align-distil")], parent)
    (dpo, first), (swapped, second) = ran
    assert [Path(each.data.path).name for each in (dpo, swapped)] == ["swapped-False", "swapped-True"]
    assert {dpo.loss.name, swapped.loss.name} == {"dpo"}
    plain, tgdpo, distil = parent.heard
    assert plain["before"] == () and tgdpo["before"] == (100, 2.0) and distil["before"] == (100, 2.0) * 2
    assert tgdpo["options"]["guide"] == distil["options"]["teacher"] == f"{first}/candidates/{{candidate}}"
    assert distil["options"]["contrary"] == f"{second}/candidates/{{candidate}}"


def test_scores_are_true_but_for_those_of_another_response():
    judges = offline_methods.judges(seed=0)
    right, wrong = (list(offline_data.scored(judges, PROMPTS, 8, 3, noise)) for noise in (0.0, 0.25))
    for row, other in zip(right, wrong, strict=True):
        assert len(set(row["responses"])) == len(row["responses"]) and row["responses"] == other["responses"]
        for objective in ("helpful", "harmless"):
            assert row[objective] == [grammar.score(row["prompt"], text)[objective] for text in row["responses"]]
            assert set(other[objective]) <= set(row[objective])
    assert right != wrong and json.dumps(right[0])


def test_short_ones_come_first_and_what_is_there_is_not_run_again():
    asked = requests(["dpo", "ipo"], None, None, [0, 1])
    assert [(each.seed, each.longer) for each in asked[:4]] == [(0, 1)] * 4 and len(asked) == 16
    founds = [
        {
            "front_share": 0.5,
            "front_share_worst": 0.4,
            "tokens": 2000,
            "seconds": 3.0,
            "failed": {},
            "points": [{"well_formed": 0.9, "kl": 0.2}],
            "hardware": {},
        }
        | each.identity
        for each in asked[:4]
    ]
    tables = offline_methods.tables_of({"results": founds})
    assert [len(table.rows) for table in tables] == [2, 2]
    assert tables[1].title == "25% of the labels wrong" and tables[0].rows[0][:3] == ["dpo", "pairs", "0.500"]
