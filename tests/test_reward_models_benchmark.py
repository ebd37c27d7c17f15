"""The tables of ``benchmarks.reward_models`` show what the reports say."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks import reward_models

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "reward_models_cpu"


def test_the_table_beside_the_json_is_made_of_it():
    report = json.loads(RESULTS.with_suffix(".json").read_text())
    assert RESULTS.with_suffix(".md").read_text() == reward_models.text_of(report)
    assert not any(word in json.dumps(report) for word in ("/tmp", "/work", "/home"))


def test_a_row_says_what_its_objective_reached():
    (result, *_) = json.loads(RESULTS.with_suffix(".json").read_text())["results"]
    table, agreement = reward_models.tables_of([result])
    found = result["report"]["per_objective"]
    assert [row[0] for row in table.rows] == [name for name in reward_models.ASPECTS if name in found]
    for row in table.rows:
        own, rules = found[row[0]], found[row[0]]["baselines"]
        assert row[1] == str(own["pairs"])
        assert row[4].startswith(f"{own['accuracy']['value']:.3f} ±")
        assert abs(float(row[5][:5]) + float(row[6][:5]) - 1) < 2e-3
        better = max(rule["value"] for rule in rules.values())
        assert abs(own["gain"]["value"] - (own["accuracy"]["value"] - better)) < 1e-9
    names = [row[0] for row in agreement.rows]
    for place, name in enumerate(names):  # the diagonal is accuracy
        assert agreement.rows[place][place + 1] == f"{found[name]['accuracy']['value']:.3f}"


def test_the_settings_are_a_configuration_for_all_aspects(tmp_path):
    from moalign.reward_models import config

    content = reward_models.settings_of(tmp_path, tmp_path, "{name: mixture, components: 3}", 3)
    settings = config.from_mapping(content, ["train.steps=5"])
    assert settings.objective_names == tuple(sorted(reward_models.ASPECTS))
    assert settings.reward_model.options == {"components": 3} and settings.members == 3


def test_all_settings_are_kept_without_the_folders_of_this_machine(tmp_path):
    content = reward_models.settings_of(tmp_path / "data", tmp_path / "base", "bradley-terry", 3)
    kept = reward_models.without_folders(content)
    assert kept["model"] == {"path": "base", "lora": {"r": 8}}
    assert kept["data"] == content["data"] | {"path": "feedback.json"}
    assert {key: kept[key] for key in content.keys() - {"model", "data"}} == {
        key: content[key] for key in content.keys() - {"model", "data"}
    }
    assert str(tmp_path) not in json.dumps(kept) and str(tmp_path) in json.dumps(content)
