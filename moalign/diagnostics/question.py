"""What is asked of a run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from pydantic import ValidationError

from moalign.config import PluginChoice
from moalign.diagnostics import balance, ranking
from moalign.errors import ConfigError, UserError
from moalign.validation import nearest


@dataclass(frozen=True)
class Question:
    """``candidate``: one alone, by its id; None: all that are finished. The base is always there.

    ``data``: a file of labelled pairs in place of what the run held out. ``rewards``: reward plugins by name, in place
    of an objective's own, or beside the objectives. ``gold``: the name of the reward that is meant, ``proxy`` of the
    one that stands for it (None: every other one). ``threshold``: proxy reward from which a response is kept,
    ``correct``: gold reward from which it is right, ``wished``: right answers to a prompt that are enough.
    ``share``: of annotators who prefer the chosen response. ``samples``: responses to each prompt (None: as the run
    evaluates). ``base``: where the base model is now, if not where the run says.
    """

    candidate: str | None = None
    data: Path | None = None
    rewards: Mapping[str, PluginChoice] = field(default_factory=dict)
    proxy: str | None = None
    gold: str | None = None
    threshold: float | None = None
    correct: float | None = None
    wished: int = balance.WISHED
    share: float = ranking.SHARE
    betas: tuple[float, ...] = ranking.BETAS
    samples: int | None = None
    seed: int | None = None
    base: str | None = None
    device: str = "cpu"

    def check(self, objectives: Sequence[str], rewards: Sequence[str]) -> None:
        """Raise UserError for what does not go together, or names no reward. ``rewards``: those that there are."""
        if not 0.5 <= self.share <= 1:
            raise UserError(
                f"--share {self.share}: a share of annotators from 0.5 to 1; more than half chose the chosen"
            )
        if not all(0 < beta < math.inf for beta in self.betas):
            raise UserError("--beta: each is a number above 0")
        for key, name in (("--proxy", self.proxy), ("--gold", self.gold)):
            if name is not None and name not in rewards:
                known = f"there are {', '.join(rewards)}" if rewards else "there is none"
                cure = f"; give it one: --reward {name}=PLUGIN" if name in objectives else nearest(name, rewards)
                raise UserError(f"{key} {name}: no reward has this name; {known}{cure}")
        if self.proxy is not None and self.gold is None:
            raise UserError(f"--proxy {self.proxy}: say as well which reward is meant, with --gold")
        if self.proxy is not None and self.proxy == self.gold:
            raise UserError(f"--proxy {self.proxy}: it is the gold reward itself")
        if (self.threshold is not None or self.correct is not None) and self.gold is None:
            raise UserError("--threshold, --correct: responses are right by a gold reward; name it with --gold")
        if self.threshold is not None and self.correct is None:
            raise UserError("--threshold: say as well from which gold reward a response is right, with --correct")

    def proxies(self, rewards: Sequence[str]) -> list[str]:
        """The rewards that stand for the gold one."""
        if self.gold is None:
            return []
        return [self.proxy] if self.proxy is not None else [name for name in rewards if name != self.gold]


def rewards_of(settings: Sequence[str]) -> dict[str, PluginChoice]:
    """From NAME=PLUGIN, the plugin as a configuration has it: a name, or {name: ..., option: ...}.

    Raises ConfigError naming the setting.
    """
    found: dict[str, PluginChoice] = {}
    for setting in settings:
        name, equals, text = (part.strip() for part in setting.partition("="))
        if not equals or not name or not text:
            raise ConfigError(f"--reward {setting}: write NAME=PLUGIN, such as gold={{name: regex, pattern: please}}")
        if name in found:
            raise ConfigError(f"--reward {setting}: '{name}' is given twice")
        try:
            value = yaml.safe_load(text)
            found[name] = PluginChoice.model_validate({"name": value} if isinstance(value, str) else value)
        except (yaml.YAMLError, ValidationError):
            raise ConfigError(
                f"--reward {setting}: the plugin is a name, or {{name: ..., option: ...}} as in a configuration"
            ) from None
    return found
