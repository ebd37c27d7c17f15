"""The length of what a reward model reads, within what its base can read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from moalign.errors import ConfigError
from moalign.reward_models.plan import Plan


def within(plan: Plan, room: int | None) -> Plan:
    """The plan with data.max_length at most ``room``, the tokens that the base takes (None: any number).

    A length that the configuration states is refused with ConfigError instead, since it would not be the one in use.
    """
    data = plan.config.data
    if room is None or data.max_length <= room:
        return plan
    if "max_length" in data.model_fields_set:
        raise ConfigError(
            f"data.max_length: {data.max_length} is more than the {room} tokens that {plan.config.model.path} takes "
            f"(max_position_embeddings in its config.json); set at most {room}"
        )
    config = plan.config.model_copy(update={"data": data.model_copy(update={"max_length": room})})
    return replace(plan, config=config)


def warnings(plan: Plan, counts: Mapping[str, int]) -> Iterator[str]:
    """Of a plan that was brought within: that something did not fit, where something did not."""
    if any(word in reason for reason in counts for word in ("truncated response", "longer than max_length")):
        limit = plan.config.data.max_length
        yield f"{plan.config.model.path} takes {limit} tokens, so data.max_length is {limit} and longer texts are cut"
