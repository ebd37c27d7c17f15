"""The preferences that the user named."""

from __future__ import annotations

import re
from collections.abc import Sequence
from random import Random

from moalign.api import Candidate, Outcome, PreferenceError, Search, Space

REGISTRATION = {
    "name": "listed",
    "class": "Listed",
    "summary": "exactly the preferences named in the configuration",
}

_FOLDER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=-]{0,99}")


class Listed(Search):
    """Exactly the preferences under ``preferences:`` in the configuration, in that order; the name is the id."""

    def propose(self, space: Space, history: Sequence[Outcome], rng: Random) -> list[Candidate]:
        if not space.preferences:
            raise PreferenceError("search 'listed' trains the preferences under `preferences:`, and there are none")
        for name in space.preferences:
            if not _FOLDER.fullmatch(name):
                raise PreferenceError(
                    f"preference {name!r} cannot name a folder; use a-z, A-Z, 0-9 and . = - _, a letter or digit first"
                )
        seen = {outcome.id for outcome in history}
        return [Candidate(name, preference) for name, preference in space.preferences.items() if name not in seen]
