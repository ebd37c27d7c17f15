"""Whether a policy ranks the chosen response first, and whether its implicit reward does: two things, side by side.

With l(y) = log pi(y|x), summed over tokens, and l_ref likewise, a pair (y_w, y_l) has
    m = l(y_w) - l(y_l)                    the policy ranks y_w first where m > 0 (ranking accuracy)
    d = m - (l_ref(y_w) - l_ref(y_l))      the implicit reward does where d > 0 (preference accuracy)
so m = d - c with c = l_ref(y_l) - l_ref(y_w): what the reference has wrong by c nats is turned only where d > c.
arXiv 2405.19534. Where a number is exactly 0 neither response is first, and the pair counts a half; nothing is called a
tie because it is near one, and what is compared are log-probabilities by their difference, never by their ratio.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moalign.errors import MoalignError

SHARE = 0.75  # of annotators who prefer the chosen response, where the data does not say
BETAS = (0.01, 0.1, 1.0, 5.0, 10.0)

Array = NDArray[np.float64]


@dataclass(frozen=True)
class PairLogps:
    """Of P pairs: log-probabilities [P,2] under the policy and the reference, summed over tokens, chosen first; the
    numbers of tokens [P,2]."""

    policy: Array
    reference: Array
    tokens: Array

    @property
    def ranks(self) -> Array:
        """m [P] in nats."""
        return np.asarray(self.policy[:, 0] - self.policy[:, 1])

    @property
    def ranks_by_token(self) -> Array:
        """[P]: the same of mean log-probabilities of a token, in nats per token."""
        mean = self.policy / self.tokens
        return np.asarray(mean[:, 0] - mean[:, 1])

    @property
    def reference_ranks(self) -> Array:
        """-c [P] in nats: what m is for the reference."""
        return np.asarray(self.reference[:, 0] - self.reference[:, 1])

    @property
    def differences(self) -> Array:
        """d [P] in nats: of the log-ratios, which are the implicit reward over beta."""
        ratios = self.policy - self.reference
        return np.asarray(ratios[:, 0] - ratios[:, 1])


def idealised(reference_ranks: ArrayLike, beta: float, share: ArrayLike = SHARE) -> Array:
    """m* [P] of the policy that minimises the loss exactly: -c + (1 / beta) log(p / (1 - p)).

    p is the share of annotators who prefer the chosen response, one for all pairs or for each [P]; the optimum of the
    KL-regularised objective then has d = log(p / (1 - p)) / beta. arXiv 2405.19534, whose code divides one
    log-probability by another instead, which turns the order round. Raises MoalignError for a beta that is not positive
    or a share outside [0, 1].
    """
    given = np.asarray(share, dtype=np.float64)
    if not beta > 0:
        raise MoalignError(f"beta {beta}: the idealised policy exists for a beta above 0")
    if not ((given >= 0) & (given <= 1)).all():
        raise MoalignError(f"share {given}: the share of annotators is a probability, such as {SHARE}")
    with np.errstate(divide="ignore"):
        odds = np.log(given) - np.log1p(-given)
    return np.asarray(np.asarray(reference_ranks, dtype=np.float64) + odds / beta)


def loss_at_turn(reference_ranks: ArrayLike, beta: float) -> Array:
    """-log sigmoid(beta c) [P]: a pair is ranked rightly exactly where its logistic loss is below this.

    The loss is -log sigmoid(beta d), which falls in d, and the ranking is right where d > c.
    """
    return np.asarray(np.logaddexp(0.0, beta * np.asarray(reference_ranks, dtype=np.float64)))


def turned(ranks: ArrayLike, reference_ranks: ArrayLike) -> tuple[int, int]:
    """Of the pairs that the reference ranks wrongly (m < 0): how many the policy ranks rightly, and how many there
    are."""
    wrong = np.asarray(reference_ranks) < 0
    return int((np.asarray(ranks)[wrong] > 0).sum()), int(wrong.sum())
