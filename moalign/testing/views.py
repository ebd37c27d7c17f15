"""Whether a loss says soundly which further sequences and which other policies it reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from moalign.api import Objective, Sample
from moalign.testing.review import short

if TYPE_CHECKING:
    from moalign.testing.objective import Trial

REFERENCE = "reference"  # the view that a need brings
TALK = ({"role": "user", "content": "Name three colours of autumn leaves."},)
ANSWERS = ("They are red, yellow, and brown, as far as I remember.", "Green, purple, violet: all of them, always.")
PAIRS = [(Sample("Why is the sky blue?", first), Sample("Why is the sky blue?", other)) for first, other in [ANSWERS]]
PAIRS += [(other, first) for first, other in PAIRS] + [(Sample(TALK, ANSWERS[0]), Sample(TALK, ANSWERS[1]))]


def folders(t: Trial) -> dict[str, str]:
    """Those that the loss reads guides from."""
    change = "return folders by name, both text, from guides; an empty mapping where there are none"
    found: Any = t.review.answer("guides()", change, t.plugin.guides)
    good = isinstance(found, Mapping) and all(isinstance(text, str) for pair in found.items() for text in pair)
    t.review.require(good, "guides()", short(found), change)
    return dict(found)


def folders_follow_from_options(t: Trial) -> None:
    """The same twice, each under the name of the option that holds it."""
    found, fields = folders(t), set(type(t.plugin).model_fields)
    t.review.require(found == folders(t), "guides() twice", "other folders", "let them follow from the options alone")
    strange = sorted(found.keys() - fields)
    change = "name a guide as the option that holds its folder, so that a message can say which it is"
    t.review.require(not strange, "guides()", f"the names {strange}, which are no options", change)


def names_of_views(t: Trial) -> list[str]:
    """Of all views of a pair, those that needs bring among them."""
    brought = [REFERENCE] if "reference_responses" in t.plugin.wants else []
    return [*brought, *(name for name in _views(t, *PAIRS[0]))]


def views_are_texts(t: Trial) -> None:
    """A prompt and a response each, the same twice, by the same names for any pair, conversations among them."""
    names = set(_views(t, *PAIRS[0]))
    change = "leave that name to the engine, which gives it to responses of the reference"
    t.review.require(REFERENCE not in names, "views of a pair", f"a view called '{REFERENCE}'", change)
    change = 'declare "pairs" or "margins": single responses have no views'
    alone = "groups" in t.plugin.wants and bool(names_of_views(t))
    t.review.require(not alone, "views of a pair", 'views, though `needs` has "groups"', change)
    for chosen, rejected in PAIRS:
        tried = f"views of a pair behind the prompt {short(chosen.prompt)}"
        found = _views(t, chosen, rejected)
        same = found == _views(t, chosen, rejected)
        t.review.require(same, f"{tried}, twice", "other views", "make them a function of the pair alone")
        change = "give every pair the same names; leave one out only where a pair has no such view"
        t.review.require(set(found) == names, tried, f"{sorted(found)}, not {sorted(names)}", change)
        empty = sorted(name for name, view in found.items() if not view.response.strip())
        change = "leave out a view without a response: nothing can be trained on it"
        t.review.require(not empty, tried, f"no response in {empty}", change)


def _views(t: Trial, chosen: Sample, rejected: Sample) -> dict[str, Sample]:
    change = "return moalign.api.Sample by name from views: a prompt, and a response, which is text"
    if type(t.plugin).views is Objective.views:
        return {}
    found: Any = t.review.answer("views of a pair", change, t.plugin.views, chosen, rejected)
    good = isinstance(found, Mapping) and all(
        isinstance(name, str) and isinstance(view, Sample) and isinstance(view.response, str)
        for name, view in found.items()
    )
    t.review.require(good, "views of a pair", short(found), change)
    return dict(found)
