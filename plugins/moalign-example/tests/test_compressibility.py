from __future__ import annotations

from moalign.api import Sample
from moalign.testing import check_reward

from moalign_example.compressibility import Compressibility


def score(*responses: str) -> list[float | None]:
    return Compressibility().score([Sample("Why?", response) for response in responses])


def test_conformance():
    check_reward(Compressibility())


def test_repetition_costs():
    """Deflate stores a text once and a reference of a few bytes for each repetition, of at most 258 bytes."""
    sentence = "The sky is blue because air scatters blue light."
    once, often = score(sentence, sentence * 20)
    assert once is not None and often is not None
    references = 20 * len(sentence) / 258
    assert often * 20 * len(sentence) <= once * len(sentence) + 3 * (references + 2)
    assert often < once / 10


def test_of_equal_length_the_varied_response_is_better():
    varied, repeated = "so it has to be, I think", "no no no no no no no no "
    assert len(varied) == len(repeated)
    better, worse = score(varied, repeated)
    assert better is not None and worse is not None and better > worse


def test_nothing_is_not_judged():
    assert score("", "x")[0] is None
