"""Group relative policy optimisation."""

from __future__ import annotations

from moalign_plugins.objectives._group_relative import GroupRelative

REGISTRATION = {
    "name": "grpo",
    "class": "GRPO",
    "summary": "clipped policy gradient with rewards standardised within the responses to each prompt",
    "paper": "arXiv:2402.03300, arXiv:2503.20783, arXiv:2503.14476, arXiv:2503.21819",
}


class GRPO(GroupRelative):
    """The advantage is (r_i - mean) / (deviation + 1e-4) over the responses to the prompt. arXiv 2402.03300.

    The deviation has the divisor G - 1. It makes prompts alike whose rewards spread differently, so that the expected
    gradient is not that of E[signal], and a factor common to all rewards is lost.

    Variants: the paper's KL is ``kl: forward``. Dr. GRPO (arXiv 2503.20783) is ``standardise: false`` with a constant
    ``length``, the most tokens that a response may have. DAPO (arXiv 2503.14476) raises ``epsilon_high`` to 0.28, with
    ``beta: 0``, and divides by the tokens of all responses of a step, which a constant ``length`` does on average.
    MO-GRPO (arXiv 2503.21819) is this with ``combine: linear``, as in the recipe "mo-grpo": the weighted sum of rewards
    is standardised, so that a reward that spreads more counts more; with ``combine: gdpo`` it does not.
    """
