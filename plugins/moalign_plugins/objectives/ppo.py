"""Proximal policy optimisation with a value head."""

from __future__ import annotations

from moalign_plugins.objectives._value_head import ValueHead

REGISTRATION = {
    "name": "ppo",
    "class": "PPO",
    "summary": "clipped policy gradient with an advantage for each token, from a value head that is trained with it",
    "paper": "arXiv:1707.06347, arXiv:1506.02438, arXiv:2406.09279",
}


class PPO(ValueHead):
    """The advantage of a token is that of generalised advantage estimation, over values that the loss learns.

    The response's signal is the reward of its last token; with ``kl: reward`` each token pays beta times its log-ratio
    to the reference, so that the rewards of a response sum to signal - beta a(y). With V_t the value before token t, 0
    behind the end,
        delta_t = r_t + gamma V_{t+1} - V_t,   A_t = sum over k of (gamma lam)^k delta_{t+k}    (arXiv 1506.02438)
    and the loss adds to the clipped surrogate, for each token,
        value_weight / 2  max((V - R)^2, (clip(V, V_old - value_epsilon, V_old + value_epsilon) - R)^2),  R = A + V_old,
    with V_old and A as they are when the round was sampled.

    V is linear in the hidden state that predicts the token, in float32, and 0 at the start. Its error trains only the
    head unless ``value_trains_adapter``. With gamma = lam = 1 and nothing whitened the policy's expected gradient is
    that of E[signal] - beta KL at the policy that sampled, whatever the values are.

    Baseline recipe (arXiv 2406.09279): the defaults with ``whiten: true`` and ``missing_end: -10``.
    """
