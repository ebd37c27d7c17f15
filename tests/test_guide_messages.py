"""The messages of runs that the authors' guide quotes (its blocks ``text run``), each provoked here."""

from __future__ import annotations

import random
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from distributions import install
from documents import ROOT, blocks_of
from guide import pattern_of
from guide_of_models import Doubling, Thurstone, Worldly, some_judgements, some_preferences
from pydantic import Field
from sweeps import small_config, write_pairs

from moalign import registry
from moalign.api import (
    AdapterShape,
    Candidate,
    Combiner,
    Decoder,
    Objective,
    Observer,
    PairTerms,
    Plugin,
    Preference,
    Reader,
    Record,
    Reward,
    Sample,
    Search,
    pair_logits,
)
from moalign.errors import MoalignError, TrainingError
from moalign.registry import Entry, Registry

GUIDE = ROOT / "docs" / "plugins"


class Place:
    """An empty folder with pairs in it, a random model, and whatever is installed there."""

    def __init__(self, folder: Path, model: Path):
        self.folder, self.model = folder, model
        self.pairs = write_pairs(folder / "pairs.jsonl")

    def config(self, **changes: Any) -> Any:
        train = {"steps": 12, "pairs_per_step": 4, "together": 1}
        return small_config(
            self.model, self.pairs, **{"train": train, "search": {"name": "grid", "points": 2}} | changes
        )

    def run(self, kind: str, name: str, plugin: type[Plugin], **changes: Any) -> str:
        """Warnings of the run, and why its candidates failed."""
        from moalign.sweeps import run
        from moalign.sweeps.observe import Observer as Shown

        class Heard(Shown):
            def on_warning(self, what: str) -> None:
                said.append(what)

        said: list[str] = []
        try:
            run.start(self.config(**changes), self.folder / "run", with_plugin(kind, name, plugin), Heard())
        except TrainingError as error:  # every candidate failed
            said.append(str(error))
        return "\n".join(said)

    def plan(self, kind: str, name: str, plugin: type[Plugin], **changes: Any) -> Any:
        from moalign.sweeps.plan import prepare

        return prepare(self.config(**changes), with_plugin(kind, name, plugin))


def with_plugin(kind: str, name: str, plugin: type[Plugin]) -> Registry:
    entry = Entry(kind, name, plugin, "", "", f"moalign-{name}", "0.1.0")
    return Registry((*registry.discover().entries, entry))


def refused(function: Callable[[], Any]) -> str:
    with pytest.raises(MoalignError) as caught:
        function()
    return str(caught.value)


# --- objectives and combiners ---------------------------------------------------------------------------------------


class Hinge(Objective):
    needs = frozenset({"pairs", "reference"})

    def loss(self, batch, terms):
        return (1 - pair_logits(batch, terms, 0.1)).relu()


class Reduced(Hinge):
    def loss(self, batch, terms):
        return super().loss(batch, terms).mean()


class Detached(Hinge):
    def loss(self, batch, terms):
        return super().loss(batch, terms).detach()


class Writing(Hinge):
    def loss(self, batch, terms):
        terms.margin.add_(1)
        return super().loss(batch, terms)


class Drawing(Hinge):
    def loss(self, batch, terms):
        import torch

        return super().loss(batch, terms) + torch.rand(())


class Raising(Hinge):
    def loss(self, batch, terms):
        return {}["reward"]


class Doubled(Hinge):
    def parameters(self, width, generator):
        import torch

        return {"scale": torch.ones(1).double()}


class Unknown(Hinge):
    def loss(self, batch, terms):
        return super().loss(batch, terms) * float("nan")


class OneForAll(Combiner):
    def pair_terms(self, batch):
        one = batch.strength.new_ones(len(batch.pairs))
        return PairTerms(one, 0 * one, one.mean())


def fails(plugin: type[Objective]) -> Callable[[Place], str]:
    return lambda place: place.run("objective", "my-loss", plugin, loss="my-loss")


def fails_to_combine(place: Place) -> str:
    return place.run("combiner", "one-for-all", OneForAll, combine="one-for-all")


# --- rewards --------------------------------------------------------------------------------------------------------


class Scoring(Reward):
    scores: Any = ()

    def score(self, samples):
        return self.scores if self.scores else [1 / len(sample.response) for sample in samples]


def scores(*returned: float) -> Callable[[Place], str]:
    def provoke(place: Place) -> str:
        from moalign.engine.rewards import Scorer

        reward = {"name": "wanted-words", "scores": list(returned)}
        objectives = {"helpful": {"reward": reward}, "harmless": {"reward": {"name": "length"}}}
        plan = place.plan("reward", "wanted-words", Scoring, objectives=objectives)
        scorer = Scorer("helpful", plan.rewards["helpful"], plan.config.objectives["helpful"], print)
        samples = [Sample("Why?", "so " * number) for number in range(4 if len(returned) == 1 else 2)]
        return refused(lambda: scorer.score(samples))

    return provoke


# --- searches -------------------------------------------------------------------------------------------------------


class Proposing(Search):
    id: str
    times: int = 1
    changes: dict[str, Any] = Field(default_factory=dict)

    def propose(self, space, history, rng):
        equal = Preference("weights", {name: 0.5 for name in space.objectives})
        return [Candidate(self.id, equal, changes=self.changes)] * self.times


def proposes(**options: Any) -> Callable[[Place], str]:
    return lambda place: refused(lambda: place.plan("search", "bisect", Proposing, search={"name": "bisect"} | options))


# --- readers --------------------------------------------------------------------------------------------------------


class Trusting(Reader):
    def read(self, rows, objectives):
        for file, line, row in rows:
            yield Record(row["question"], tuple(row["ranking"]), file=file, line=line)


class OfItsOwn(Reader):
    def read(self, rows, objectives):
        for file, line, row in rows:
            yield Record(row["frage"], ("ja", "nein"), scores={row["antwort"]: (1, 0)}, file=file, line=line)


def reads(*readers: Reader) -> Callable[[Place], str]:
    """The first row of a file through these, or through those that are installed."""

    def provoke(place: Place) -> str:
        from moalign.config import PluginChoice
        from moalign.data.loading import read_file
        from moalign.sweeps.plan import readers_for

        Path("ranked.jsonl").write_text('{"frage": "?", "antwort": "kind"}\n{"frage": "?", "antwort": "helpful"}\n')
        named: Mapping[str, Any] = {type(each).__name__: each for each in readers}
        chosen = named or readers_for(PluginChoice(name="auto"), registry.discover())
        return refused(lambda: read_file("ranked.jsonl", chosen, ["harmless", "helpful"]))

    return provoke


# --- observers ------------------------------------------------------------------------------------------------------


class Silent(Observer):
    def on_run_start(self, run):
        return None


def is_switched_off(place: Place) -> str:
    return place.run("observer", "outcomes", Silent, observers=["outcomes"])


# --- publishing -----------------------------------------------------------------------------------------------------

HINGE = """
from moalign.api import Objective, hookimpl

@hookimpl
def register_objectives(register):
    register("hinge", "{module}:Hinge", summary="hinge")
"""


def reason(source: str) -> Callable[[Place], str]:
    """Why a distribution cannot be loaded."""

    def provoke(place: Place) -> str:
        install(place.folder, "moalign-broken", source)
        (broken,) = registry.discover().broken
        return broken.reason

    return provoke


def is_claimed_twice(place: Place) -> str:
    install(place.folder, "moalign-hinge", HINGE, "1.0")
    install(place.folder, "moalign-other", HINGE, "2.0")
    return refused(lambda: registry.discover().build("objective", "hinge", {}, "loss"))


def is_broken(place: Place) -> str:
    install(place.folder, "moalign-broken", "import not_there\n")
    return refused(lambda: registry.discover().find("objective", "hinge"))


class Readable(Reward):
    requires = {"textstat_of_mine": "moalign-readable[textstat]"}  # noqa: RUF012


def lacks_a_library(place: Place) -> str:
    installed = with_plugin("reward", "readable", Readable)
    return refused(lambda: installed.build("reward", "readable", {}, "objectives.helpful.reward"))


def changed(version: str, sha256: str) -> Callable[[Place], str]:
    def provoke(place: Place) -> str:
        from moalign.sweeps import provenance

        name, before = "objective moalign-my-loss:my-loss", {"distribution": "moalign-my-loss", "version": "0.1.0"}
        now = {name: before | {"version": version, "sha256": sha256}}
        differing = provenance.changes({name: before | {"sha256": "0" * 64}}, (), now)
        return str(provenance.refuse(Path("runs/sweep"), differing))

    return provoke


def asked(kind: str, name: str, plugin: type[Plugin], hook: str, *arguments: Any) -> Callable[[Place], str]:
    """What everybody who asks the plugin is told."""

    def provoke(place: Place) -> str:
        from moalign import door

        built = with_plugin(kind, name, plugin).build(kind, name, {}, "key")
        return refused(lambda: door.call(built, hook, *(each() for each in arguments)))

    return provoke


def decodes(place: Place) -> str:
    """On a model without adapters."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from moalign.decode import Decoding, Request

    class Contrast(Decoder):
        def speakers(self, request):
            return [None]

        def scores(self, request, at):
            return at.logits[0] * float("nan")

    decoder = with_plugin("decoder", "contrast", Contrast).build("decoder", "contrast", {}, "decoder")
    model, tokenizer = (kind.from_pretrained(place.model) for kind in (AutoModelForCausalLM, AutoTokenizer))
    return refused(lambda: Decoding(decoder, Request(), model, tokenizer).generate(["hello"]))


PROVOKED: dict[str, list[Callable[[Place], str]]] = {
    "objective.md": [fails(kind) for kind in (Reduced, Doubled, Detached, Writing, Drawing, Raising, Unknown)],
    "combiner.md": [fails_to_combine],
    "reward.md": [scores(1.0), scores(1.0, float("nan")), scores()],
    "search.md": [
        proposes(id="at-0.0", times=2),
        proposes(id="a/b"),
        proposes(id="first", changes={"train.lrr": 1}),
    ],
    "reader.md": [reads(Trusting()), reads(OfItsOwn()), reads()],
    "observer.md": [is_switched_off],
    "decoder.md": [decodes],
    "conditioner.md": [
        asked("conditioner", "percent", Worldly, "draw", lambda: ("harmless", "helpful"), random.Random),
        asked("conditioner", "percent", Doubling, "gates", some_preferences, dict, lambda: AdapterShape(1, 2, 2)),
    ],
    "reward-model.md": [
        asked("reward-model", "thurstone", Thurstone, "loss", some_judgements),
        asked("reward-model", "thurstone", Thurstone, "scores", some_judgements),
    ],
    "publishing.md": [
        reason("moalign_api_version = 6\n"),
        reason(HINGE.replace("register_objectives", "register_objektives")),
        reason(HINGE.replace("(register)", "(registry)")),
        reason(HINGE.replace("@hookimpl", "")),
        lacks_a_library,
        is_claimed_twice,
        is_broken,
        changed("0.2.0", "1" * 64),
        changed("0.1.0", "1" * 64),
    ],
}
CASES = [(page, number) for page, provoked in PROVOKED.items() for number in range(len(provoked))]


@pytest.mark.parametrize(("page", "number"), CASES)
def test_the_message_is_what_a_run_says(page, number, tmp_path, tiny_model_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("moalign_broken", "moalign_hinge", "moalign_other"):  # of an earlier place
        sys.modules.pop(name, None)
    quoted = [block.text for block in blocks_of(GUIDE / page) if block.language == "text run"][number]
    said = " ".join(PROVOKED[page][number](Place(tmp_path, tiny_model_path)).split())
    assert re.search(pattern_of(quoted), said), said


def test_every_quoted_message_is_provoked():
    pages = {
        page.name: [block for block in blocks_of(page) if block.language == "text run"] for page in GUIDE.glob("*.md")
    }
    assert {name: len(found) for name, found in pages.items() if found} == {
        page: len(provoked) for page, provoked in PROVOKED.items()
    }
