"""Losses on guides, views and distributions by one line of a configuration, on the model that comes with moalign."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from sweeps import small_config

from moalign import registry
from moalign.sweeps import run
from moalign.sweeps.observe import Observer

KIND, CURT = "Talk to a friend about it and sleep well.", "No. I do not know what to say."
TRAIN = {"steps": 2, "pairs_per_step": 4, "together": 2, "lr": 1e-3}


def trained(folder: Path, loss, pairs: Path) -> list[float]:
    """The losses of a candidate's two steps."""
    search = {"name": "grid", "points": 2}
    settings = small_config(Path("tiny-assistant"), pairs, loss=loss, train=TRAIN, search=search)
    front = run.start(settings, folder, registry.discover(), Observer())
    assert len(front["points"]) == 2
    lines = (folder / "candidates/w-1.00-0.00/metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    rows = [
        {"prompt": f"Advise me about fear {number}.", "objective": name, "chosen": chosen, "rejected": rejected}
        for number in range(12)
        for name, chosen, rejected in (("helpful", KIND, CURT), ("harmless", CURT, KIND))
    ]
    file = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="module")
def earlier(tmp_path_factory, pairs) -> Path:
    folder = tmp_path_factory.mktemp("earlier") / "run"
    trained(folder, "dpo", pairs)
    return folder / "candidates"


@pytest.mark.parametrize(
    ("loss", "at_start"),
    [
        ("selm", math.log(2)),
        ("xpo", None),
        ({"name": "vpo", "optimistic": True}, math.log(2)),
        ("srpo", 0.25),
        ("spo", math.log(2) + 0.2 * math.log(3)),
    ],
    ids=str,
)
def test_views(loss, at_start, pairs, tmp_path):
    first, second = trained(tmp_path / "run", loss, pairs)
    assert second < first and (at_start is None or first == pytest.approx(at_start, rel=1e-5))


@pytest.mark.parametrize("name", ["tgdpo", "align-distil", "align-distil-simple"])
def test_guides(name, earlier, pairs, tmp_path):
    helpful, harmless = (str(earlier / folder) for folder in ("w-1.00-0.00", "w-0.00-1.00"))
    options = {
        "tgdpo": {"guide": helpful},
        "align-distil": {"teacher": helpful, "contrary": harmless},
        "align-distil-simple": {"teacher": helpful},
    }
    first, second = trained(tmp_path / "run", {"name": name} | options[name], pairs)
    assert second < first
