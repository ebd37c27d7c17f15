"""The untouched base as the reference."""

from __future__ import annotations

from typing import ClassVar

from moalign.api import Reference

REGISTRATION = {
    "name": "base",
    "class": "Base",
    "summary": "the untouched base, whose log-probabilities are computed once for all candidates; the default",
}


class Base(Reference):
    """pi_ref is the model that the adapters sit on, before any training, whatever a candidate starts from."""

    fixed: ClassVar[bool] = True
