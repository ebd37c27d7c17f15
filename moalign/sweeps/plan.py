"""Everything that can be known, and refused, before a model is loaded. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from random import Random
from typing import Any

from moalign import door, preference
from moalign.api import (
    Combiner,
    Conditioner,
    Filter,
    Objective,
    Observer,
    Reader,
    Reference,
    Reward,
    Sampler,
    Search,
    Transform,
)
from moalign.config import Config, PluginChoice
from moalign.errors import ConfigError, PluginError, PreferenceError
from moalign.registry import Entry, Registry
from moalign.seeds import derive
from moalign.storage import safe_name
from moalign.sweeps import checks, comparing, conditions, directions, filters, guides
from moalign.sweeps.changes import Variant, variant
from moalign.sweeps.checks import references_of, transform_key
from moalign.types import Candidate, Outcome, Preference, Space


@dataclass(frozen=True)
class Plan:
    """A configuration with its plugins built and checked against each other."""

    config: Config
    objective: Objective
    combiner: Combiner
    search: Search
    rewards: Mapping[str, Reward]
    readers: Mapping[str, Reader]
    space: Space
    plugins: tuple[Entry, ...]
    observers: tuple[tuple[Entry, Observer], ...] = ()
    transforms: Mapping[str, tuple[Transform, ...]] = field(default_factory=dict)
    sampler: Sampler | None = None
    conditioner: Conditioner | None = None
    reference: Reference | None = None
    filter: Filter | None = None

    @property
    def objectives(self) -> tuple[str, ...]:
        return self.space.objectives

    @property
    def scored(self) -> bool:
        """Whether the loss learns from reward differences of any pairs, not from labelled pairs."""
        return "margins" in self.objective.wants

    @property
    def grouped(self) -> bool:
        """Whether the loss learns from responses one by one, sampled or, without rollouts, as the data scores them."""
        return "groups" in self.objective.wants

    @property
    def labels_rounds(self) -> bool:
        """Whether the loss learns from labelled pairs of sampled responses, which combined rewards label."""
        return self.config.rollouts is not None and not self.scored and not self.grouped

    @property
    def weighs_losses(self) -> bool:
        """Whether each step on labelled pairs weighs the objectives' losses anew."""
        return self.combiner.weighs_losses and not (self.grouped or self.scored or self.labels_rounds)

    @property
    def merges_judges(self) -> bool:
        """Whether two responses are one labelled pair for all objectives that judged them."""
        return self.combiner.merges_judges and not (self.grouped or self.scored or self.labels_rounds)

    @property
    def reads_levels(self) -> bool:
        """Whether the combiner reads rewards of labelled pairs that more than their differences must be known of."""
        by_pairs = not (self.grouped or self.scored or self.labels_rounds)
        return self.combiner.reads_levels and by_pairs and self.mixing_needs_margins

    @property
    def told_in_text(self) -> bool:
        """Whether prompts tell the model its preference."""
        return self.conditioner is not None and self.conditioner.by == "text"

    @property
    def base_samples(self) -> dict[str, int]:
        """How many of the base's responses to each prompt an objective's transforms compare with, where one does."""
        most = {name: max(map(references_of, chain)) for name, chain in self.transforms.items()}
        return {name: count for name, count in most.items() if count}

    @property
    def evaluation_kind(self) -> str:
        kind = self.config.evaluate.kind
        if kind != "auto":
            return kind
        return "generate" if set(self.rewards) == set(self.objectives) else "preference"

    def variant(self, changes: Mapping[str, Any]) -> Variant:
        """How a candidate with these changes is trained."""
        return variant(self.config, self.objective, changes)

    @property
    def mixing_needs_margins(self) -> bool:
        """Whether the combiner reads reward differences for a preference that no single objective fills."""
        share = 1.0 / len(self.objectives)
        return bool(self._combiner_needs(Preference("weights", dict.fromkeys(self.objectives, share))))

    def needs(self, candidate: Candidate) -> frozenset[str]:
        own = self.variant(candidate.changes).objective.wants
        if self.grouped or self.labels_rounds:  # the combiner works on rewards, not on pairs
            return own
        return own | self._combiner_needs(candidate.preference)

    def _combiner_needs(self, preferred: Preference) -> frozenset[str]:
        return door.call(self.combiner, "needs", preferred, then=frozenset)

    @property
    def kl_price(self) -> float:
        """What a nat of KL costs, in rewards; 0 where it is not measured, or nothing prices it."""
        settings = self.config.evaluate
        if self.evaluation_kind != "generate" or settings.temperature != 1.0:
            return 0.0
        if settings.kl_price != "auto":
            return settings.kl_price
        if self.reference is not None and not comparing.is_base(self.reference):
            return 0.0  # the loss prices the distance to another policy
        if not (self.scored or self.grouped):
            return 0.0
        price = door.call(self.objective, "kl_price")
        if not checks.finite(price) or price < 0:
            who = door.origin(self.objective).who
            raise PluginError(f"{who}, in kl_price: it must return a finite number, not below 0, not {price!r}")
        return float(price)

    def propose(self, history: Sequence[Outcome], space: Space | None = None) -> list[Candidate]:
        """The search's next candidates, checked. Raises PluginError where the search breaks its contract.

        ``space``: what is known by now; none: what the configuration says.
        """
        rng = Random(derive(self.config.seed, "search"))
        known = {outcome.id for outcome in history}
        # copies: what it does to them must not change the record of the run
        given = deepcopy((space or self.space, conditions.seen(history, self)))
        candidates = door.call(self.search, "propose", *given, rng, then=list)
        for candidate in candidates:
            if not isinstance(candidate, Candidate):
                raise PluginError(f"{self._proposed} {type(candidate).__name__}, not a moalign.api.Candidate")
            if not safe_name(candidate.id):
                raise PluginError(f"{self._proposed} the id {candidate.id!r}, which cannot name a folder")
            if candidate.id in known:
                raise PluginError(f"{self._proposed} '{candidate.id}' twice")
            known.add(candidate.id)
            self._check_changes(candidate, history)
            self._check_preference(candidate)
        return candidates if self.conditioner is None else conditions.asked_of_model(candidates, self, history)

    def check_later_changes(self) -> None:
        """Raise ConfigError where the search may come to changes that do not work."""
        for changes in door.call(self.search, "later_changes", self.space, then=list):
            if reason := self._why_not(changes):
                said = ", ".join(f"{key} {value}" for key, value in changes.items())
                raise ConfigError(f"search: '{self.config.search.name}' may come to {said}: {reason}")

    def check_later(self) -> None:
        """Raise PreferenceError where the search will come to preferences that the run has no meaning for, ConfigError
        where they would mean something else than what it takes them from."""
        first, *others = self.objectives
        made = {
            "thresholds": Preference("thresholds", dict.fromkeys(others, 0.0)),
            "direction": Preference("direction", {first: 1.0} | dict.fromkeys(others, 0.0)),
        }
        for kind in sorted(self.search.later_kinds & set(made) if others else ()):
            candidate = Candidate("later", made[kind])
            try:
                self._check_preference(candidate)
            except PreferenceError as error:
                reason = str(error).removeprefix("later: ")
                name = self.config.search.name
                raise PreferenceError(f"search '{name}' comes to {kind} later, and {reason}") from None
            if kind == "thresholds" and (self.evaluation_kind != "generate" or self.config.rollouts is None):
                raise ConfigError(
                    f"search '{self.config.search.name}' takes thresholds from what `evaluate` measures, and they are "
                    "kept on the rewards of sampled responses: that takes rollouts, and evaluate.kind: generate"
                )
            if self.conditioner is not None:
                conditions.asked_of_model([candidate], self, ())

    @property
    def _proposed(self) -> str:
        return f"{door.origin(self.search).who}, in propose: it proposed"

    def _check_changes(self, candidate: Candidate, history: Sequence[Outcome]) -> None:
        who = f"{self._proposed} '{candidate.id}'"
        done = {outcome.id for outcome in history if outcome.status == "done"}
        if len(candidate.parents) > 1 or not done.issuperset(candidate.parents):
            raise PluginError(f"{who} with the parents {candidate.parents}; there may be one, of those that are done")
        if candidate.shares:
            checks.check_shares(candidate, done, who)
        if reason := self._why_not(candidate.changes):
            raise PluginError(f"{who} with {reason}")
        changed = self.variant(candidate.changes)
        if candidate.kind == "trained":
            guides.check_candidate(changed.objective, candidate.id)
        if candidate.parents or candidate.shares:
            if changed.lora != self.config.model.lora:
                raise PluginError(f"{who} with a parent and changes of model.lora; it has the parent's rank and alpha")
            checks.check_start(candidate, history, self, who)

    def _why_not(self, changes: Mapping[str, Any]) -> str | None:
        """What is wrong with a candidate's changes; None where they work."""
        try:
            changed = self.variant(changes)
        except ConfigError as error:
            return f"changes that do not work: {error}"
        # rounds are sampled, and passes planned, for what the configuration's own loss wants
        if more := changed.objective.wants - self.objective.wants - {"entropy"}:
            return f"options of the loss that need {', '.join(sorted(more))} besides"
        if not guides.folders_of(changed.objective).items() <= guides.folders_of(self.objective).items():
            return "options of the loss that name another adapter"
        if changed.lora.r > self.config.model.lora.r:
            return f"model.lora.r {changed.lora.r}; the configuration has room for {self.config.model.lora.r}"
        return None

    def _check_preference(self, candidate: Candidate) -> None:
        try:
            meant = preference.from_json(preference.to_json(candidate.preference), self.objectives)
            if meant != candidate.preference:
                raise PreferenceError(f"write {meant}")
        except Exception as error:
            reason = f"with a preference that is none: {door.described(error)}"
            raise PluginError(f"{self._proposed} '{candidate.id}' {reason}") from None
        try:
            door.call(self.combiner, "check", deepcopy(candidate.preference))
            self.needs(candidate)
        except PreferenceError as error:
            raise PreferenceError(f"{candidate.id}: {error}") from None
        negative = [name for name, value in candidate.preference.values.items() if value < 0]
        if negative and not (self.scored or self.grouped or self.labels_rounds):
            raise PreferenceError(
                f"{candidate.id}: the component of {negative[0]} is negative, and a judgement of a pair cannot count "
                "less than nothing; use a loss on rewards: `moalign plugins list --kind objective`"
            )


def prepare(config: Config, registry: Registry) -> Plan:
    """Build and cross-check everything that the configuration names.

    Raises ConfigError, PreferenceError, UnknownPluginError, PluginError, ModelError (a directory that is no model).
    """
    deadline = config.plugin_deadline
    combiner = registry.build("combiner", config.combine.name, config.combine.options, "combine", deadline)
    plan = Plan(
        config=config,
        objective=registry.build("objective", config.loss.name, config.loss.options, "loss", deadline),
        combiner=combiner,
        search=registry.build("search", config.search.name, config.search.options, "search", deadline, ("budget",)),
        rewards=_rewards(config, registry),
        transforms=_transforms(config, registry),
        readers=readers_for(config.data.reader, registry, deadline),
        sampler=_sampler(config, registry),
        conditioner=conditions.conditioner_of(config, registry),
        reference=comparing.reference_of(config, registry),
        filter=filters.filter_of(config, registry),
        space=_space(config, combiner),
        plugins=_entries(config, registry),
        observers=_observers(config, registry),
    )
    checks.check_files(config)
    checks.check(plan)
    directions.check(config, plan.rewards)
    conditions.check(plan)
    comparing.check(plan)
    filters.check(plan)
    plan.check_later_changes()
    if not plan.propose(()):
        raise ConfigError(f"search: '{config.search.name}' proposes no candidate at all")
    plan.check_later()
    return plan


def _space(config: Config, combiner: Combiner) -> Space:
    """What is known of it before anything is measured."""
    together, point = config.train.together, config.evaluate.reference_point
    return Space(
        objectives=config.objective_names,
        preferences=_preferences(config),
        steps=config.train.steps,
        together=1 if together == "auto" else together,
        reference_point=dict(point) if isinstance(point, dict) else {},
        conditioned=config.condition is not None,
        weighted_sums=combiner.weighted_sums,
        seed=config.seed,
    )


def _rewards(config: Config, registry: Registry) -> dict[str, Reward]:
    return {
        name: registry.build(
            "reward", spec.reward.name, spec.reward.options, f"objectives.{name}.reward", config.plugin_deadline
        )
        for name, spec in sorted(config.objectives.items())
        if spec.reward is not None
    }


def _transforms(config: Config, registry: Registry) -> dict[str, tuple[Transform, ...]]:
    return {
        name: tuple(
            registry.build("transform", choice.name, choice.options, transform_key(name, place), config.plugin_deadline)
            for place, choice in enumerate(spec.transform)
        )
        for name, spec in sorted(config.objectives.items())
        if spec.transform
    }


def _observers(config: Config, registry: Registry) -> tuple[tuple[Entry, Observer], ...]:
    built = []
    for place, choice in enumerate(config.observers):
        observer = registry.build("observer", choice.name, choice.options, f"observers.{place}", config.plugin_deadline)
        built.append((registry.find("observer", choice.name), observer))
    return tuple(built)


def readers_for(choice: PluginChoice, registry: Registry, deadline: float | None = None) -> dict[str, Reader]:
    """The reader that is named, or for ``auto`` every reader that works without options, by name.

    ``deadline``: seconds that a call into one may take.
    """
    if choice.name != "auto":
        return {choice.name: registry.build("reader", choice.name, choice.options, "data.reader", deadline)}
    if choice.options:
        raise ConfigError(f"data.reader: options ({', '.join(choice.options)}) need a reader by name, not auto")
    readers: dict[str, Reader] = {}
    for entry in registry.of_kind("reader"):
        try:
            readers[entry.name] = registry.build("reader", entry.full_name, {}, "data.reader", deadline)
        except (ConfigError, PluginError):
            continue  # it has required options, or is broken: it must be named to be used, and is then reported
    return readers


def _sampler(config: Config, registry: Registry) -> Sampler | None:
    choice = None if config.rollouts is None else config.rollouts.sampler
    if choice is None:
        return None
    return registry.build("sampler", choice.name, choice.options, "rollouts.sampler", config.plugin_deadline)


def _preferences(config: Config) -> dict[str, Preference]:
    names = config.objective_names
    parsed: dict[str, Preference] = {}
    for name, value in config.preferences.items():
        if name == preference.EQUAL or name in names:
            raise ConfigError(f"preferences.{name}: that name is a preset that is always there; take another")
        if not name or any(letter in "=<>," or letter.isspace() for letter in name):
            raise ConfigError(f"preferences.{name}: a name without white space and = < > , can be asked for; rename it")
        parsed[name] = preference.parse(value, names, parsed, where=f"preferences.{name}")
    return parsed


def _entries(config: Config, registry: Registry) -> tuple[Entry, ...]:
    """The entries of all plugins that the configuration names, for the record in the run directory."""
    choices = [("objective", config.loss), ("combiner", config.combine), ("search", config.search)]
    choices += [("reward", spec.reward) for _, spec in sorted(config.objectives.items()) if spec.reward is not None]
    choices += [("transform", choice) for _, spec in sorted(config.objectives.items()) for choice in spec.transform]
    if config.data.reader.name != "auto":
        choices.append(("reader", config.data.reader))
    choices += [("observer", choice) for choice in config.observers]
    if config.rollouts is not None and config.rollouts.sampler is not None:
        choices.append(("sampler", config.rollouts.sampler))
    if config.rollouts is not None and config.rollouts.filter is not None:
        choices.append(("filter", config.rollouts.filter))
    if config.condition is not None:
        choices.append(("conditioner", config.condition))
    if config.reference is not None:
        choices.append(("reference", config.reference))
    return tuple(each for kind, choice in choices for each in registry.named(kind, choice.name, choice.options))
