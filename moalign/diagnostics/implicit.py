"""The implicit reward of a policy beside an explicit one, on the same pairs. arXiv 2409.03650.

The implicit reward is a(y) = log pi(y|x) - log pi_ref(y|x), up to a factor beta and a number for each prompt; only its
differences within a prompt mean anything, so only pairs are compared.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from moalign.reward_models import measures


def rank_correlation(differences: ArrayLike, others: ArrayLike) -> float | None:
    """Spearman correlation of two rewards' differences [P] over pairs; equal ones share the mean of their ranks.

    Each pair enters in both orders, (d, e) and (-d, -e), so that nothing depends on which response is called first; a
    number for each prompt that is added to a reward cancels. NaNs are left out with their pair. None with fewer than
    two pairs, or where a reward does not tell any two responses apart.
    """
    table = np.stack([np.asarray(differences, dtype=np.float64), np.asarray(others, dtype=np.float64)], axis=1)
    table = table[np.isfinite(table).all(1)]
    if len(table) < 2:
        return None
    return measures.spearman(np.concatenate([table, -table]))[0][1]
