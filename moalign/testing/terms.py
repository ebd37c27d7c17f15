"""Whether a loss leaves to combiner and engine what is theirs."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from moalign.api import MoalignError
from moalign.testing.batch import agrees, plain_terms
from moalign.testing.review import described
from moalign.testing.watched import copied

if TYPE_CHECKING:
    from moalign.testing.objective import Trial


def shiftable_is_honest(t: Trial) -> None:
    """Whether a combiner reaches the loss through scale and margin, as ``shiftable`` says."""
    batch = t.batch()
    terms = plain_terms(batch)
    before = t.loss("a batch", batch, terms)
    shifts = {"scale": replace(terms, scale=terms.scale * 1.5), "margin": replace(terms, margin=terms.margin + 0.25)}
    for name, shifted in shifts.items():
        tried = f"another terms.{name}"
        if t.plugin.shiftable:
            change = f"let the loss read terms.{name} (moalign.api.pair_logits does), or declare shiftable = False"
            same = agrees(before, t.loss(tried, batch, shifted))
            t.review.require(not same, tried, "the same losses, though shiftable is True", change)
            continue
        try:
            after = t.plugin.loss(copied(t.told(batch)), copied(shifted))
        except MoalignError:
            continue  # refused with a reason, which is an answer
        except Exception as error:
            t.review.fail(tried, described(error), "refuse such terms with a PluginError, or ignore them", error)
        change = "declare shiftable = True"
        t.review.require(agrees(before, after), tried, "other losses, though shiftable is False", change)


def weight_is_left_to_the_engine(t: Trial) -> None:
    tried, batch = "another terms.weight", t.batch()
    terms = plain_terms(batch)
    after = t.loss(tried, batch, replace(terms, weight=terms.weight * 0.5))
    change = "leave terms.weight alone: the engine multiplies by it, and it would count twice"
    t.review.require(agrees(t.loss(tried, batch, terms), after), tried, "other losses", change)
