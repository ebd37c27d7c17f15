"""Which filter of sampled responses to use where a proxy is trained on and a better reward is known for some of them.

PF-PPO (arXiv 2409.06957) takes the rule on whose kept responses the proxy explains the true reward best, by R^2. Read
here as the R^2 of the best line through all kept responses, by their weights, which is the squared correlation; whether
the paper groups them by reward first has not been checked.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Generator, Tensor

from moalign import door
from moalign.api import Filter, Sampled
from moalign.engine.filtering import RESPONSES, checked
from moalign.errors import DataError
from moalign.seeds import derive


def r_squared(proxy: Tensor, gold: Tensor, weights: Tensor) -> float:
    """The share of the variance of ``gold`` [N] that the best line in ``proxy`` [N] explains, by ``weights`` [N].

    nan where one of the two is constant: there is no line, or nothing to explain.
    """
    share = weights.double() / weights.double().sum()
    first, second = (values.double() - share @ values.double() for values in (proxy, gold))
    known = [share @ each**2 for each in (first, second)]
    # what rounding makes of a constant is no variance
    sizes = [(share @ values.double() ** 2) * 1e-24 for values in (proxy, gold)]
    if any(float(variance) <= float(size) for variance, size in zip(known, sizes, strict=True)):
        return float("nan")
    return float((share @ (first * second)) ** 2 / (known[0] * known[1]))


def agreement(filters: Mapping[str, Filter], about: Sampled, gold: Tensor, seed: int = 0) -> dict[str, float]:
    """R^2 between ``about.signal`` and ``gold`` [N] on what each filter of responses keeps, by its name, best first.

    A rule that keeps few responses to few prompts has an R^2 that is a matter of chance; ask it of hundreds. Raises
    DataError where ``gold`` is not one finite number for each response, PluginError where a filter returns what it must
    not.
    """
    count = len(about.signal)
    if gold.shape != (count,) or not bool(gold.isfinite().all()):
        raise DataError(f"gold rewards must be {count} finite numbers, one for each response; they are {gold}")
    found = {}
    for name, plugin in filters.items():
        generator = Generator().manual_seed(derive(seed, "agreement"))
        kept = door.call(plugin, RESPONSES, about, generator)
        weights = checked(kept, count, f"{door.origin(plugin).who}, in {RESPONSES}").weights
        found[name] = r_squared(about.signal, gold, weights) if bool(weights.any()) else float("nan")
    ordered = sorted(found, key=lambda name: (-found[name] if found[name] == found[name] else torch.inf, name))
    return {name: found[name] for name in ordered}
