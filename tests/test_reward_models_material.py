"""What a reward model learns from: judgements of one prompt, wherever their rows stand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from judged_worlds import judged_config

from moalign import registry
from moalign.data.tokenise import Tokeniser
from moalign.engine import model as models
from moalign.errors import ConfigError, DataError
from moalign.reward_models import config as configuration
from moalign.reward_models.material import Material, gather
from moalign.reward_models.plan import prepare

ATTRIBUTES = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")


def gathered(model: Path, file: Path, **changes) -> Material:
    content = judged_config(model, file) | changes
    plan = prepare(configuration.from_mapping(content), registry.discover())
    return gather(plan, Tokeniser.of(models.load_tokenizer(str(model))))


def helpsteer(file: Path, prompts: int = 16) -> Path:
    """One rated response a row, as HelpSteer has it; the two of a prompt stand far apart."""
    rows = [
        {"prompt": f"say {number}:", "response": text} | dict.fromkeys(ATTRIBUTES, 2) | {"helpfulness": score}
        for text, score in (("ab", 4), ("xyz", 1))
        for number in range(prompts)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_one_scored_response_a_row_makes_pairs_of_a_prompt(tiny_model_path, tmp_path):
    found = gathered(tiny_model_path, helpsteer(tmp_path / "hs.jsonl"), objectives={"helpfulness": None})
    assert found.held_out is not None and len(found.train.pairs) + len(found.held_out.pairs) == 16
    chosen = {found.train.samples[row].response for row in found.train.pairs[:, 0]}
    assert chosen == {"ab"}


def test_forms_that_learn_from_scores_are_measured_on_the_pairs_of_such_rows(tiny_model_path, tmp_path):
    file = helpsteer(tmp_path / "hs.jsonl")
    found = gathered(tiny_model_path, file, objectives={"helpfulness": None}, reward_model={"name": "regression"})
    assert found.held_out is not None and len(found.held_out.pairs) == 16 - len(found.train.pairs) // 2 > 0


def test_ties_alone_are_refused_with_their_file(tiny_model_path, tmp_path):
    file = tmp_path / "ties.jsonl"
    rows = [{"prompt": f"say {n}:", "chosen": "ab", "rejected": "xy", "strength": 0} for n in range(8)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=r"ties\.jsonl.*(?s:no pair is left to train on.*tie for good)"):
        gathered(tiny_model_path, file, objectives={"good": None})


def test_pairs_that_a_direction_would_not_turn_are_refused(tiny_model_path, tmp_path):
    file = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"say {n}:", "chosen": "ab", "rejected": "xy"} for n in range(8)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ConfigError, match=r"objectives\.good\.direction: min negates scores, and .* has judged pairs"):
        gathered(tiny_model_path, file, objectives={"good": {"direction": "min"}})


def test_scores_that_a_direction_turns_are_turned(tiny_model_path, tmp_path):
    file = helpsteer(tmp_path / "hs.jsonl")
    found = gathered(tiny_model_path, file, objectives={"helpfulness": {"direction": "min"}})
    assert {found.train.samples[row].response for row in found.train.pairs[:, 0]} == {"xyz"}
    assert not any("direction" in warning for warning in found.train.warnings)


def test_a_sweep_is_warned_of_a_direction_that_turns_nothing(tiny_model_path):
    from moalign.data.pairing import labelled
    from moalign.types import Pair, Record

    judged = [Record("say:", ("ab", "xy"), pairs={"good": (Pair(0, 1),)})]
    tokeniser = Tokeniser.of(models.load_tokenizer(str(tiny_model_path)))
    turned, usual = (labelled(judged, tokeniser, ["good"], directions={"good": each}) for each in ("min", "max"))
    assert turned.warnings == ("good: direction min negates scores; its 1 judged pairs keep chosen above rejected",)
    assert turned.pairs.tolist() == usual.pairs.tolist() and usual.warnings == ()
