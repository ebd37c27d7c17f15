"""What the rules that need weights share: refusing other preferences, and options that differ by objective."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from moalign.api import Preference, PreferenceError

INSTEAD = {
    "direction": "'linear' and 'gdpo' follow directions",
    "thresholds": "'lagrangian' and 'interior-point' keep thresholds",
}


def needs_weights(preference: Preference, name: str) -> None:
    """Raise PreferenceError for directions and thresholds. ``name``: of the combiner."""
    if preference.kind != "weights":
        raise PreferenceError(
            f"combiner '{name}' has no meaning for {_shown(preference)}; give weights, or another rule: "
            f"{INSTEAD[preference.kind]}"
        )


def needs_no_thresholds(preference: Preference, name: str) -> None:
    """Raise PreferenceError for thresholds."""
    if preference.kind == "thresholds":
        needs_weights(preference, name)


def needs_no_direction(preference: Preference, name: str) -> None:
    """Raise PreferenceError for directions."""
    if preference.kind == "direction":
        raise PreferenceError(
            f"combiner '{name}' has no meaning for {_shown(preference)}; give thresholds or weights, or another rule: "
            f"{INSTEAD[preference.kind]}"
        )


def needs_equal_weights(preference: Preference, name: str) -> None:
    """Raise PreferenceError unless all weights that are not 0 are equal: the members of an ensemble have no rank."""
    needs_weights(preference, name)
    carrying = [value for value in preference.values.values() if value != 0]
    if max(carrying) - min(carrying) > 1e-6:
        raise PreferenceError(
            f"combiner '{name}' takes the objectives for estimates of one reward, which count alike: give those that "
            f"belong to it equal weights and the others 0, not {_shown(preference)}"
        )


def needs_objectives(named: Iterable[str], preference: Preference, name: str, key: str) -> None:
    """Raise PreferenceError where an option names what is no objective."""
    for each in named:
        if each not in preference.values:
            known = ", ".join(preference.values)
            raise PreferenceError(f"combiner '{name}', {key}: there is no objective '{each}'; known: {known}")


def by_objective(option: float | Mapping[str, float], preference: Preference, name: str, key: str) -> list[float]:
    """One number for each objective, in their order. Raises PreferenceError where a mapping names others or too few."""
    names = list(preference.values)
    if not isinstance(option, Mapping):
        return [option] * len(names)
    needs_objectives(option, preference, name, key)
    missing = [each for each in names if each not in option]
    if missing:
        raise PreferenceError(f"combiner '{name}', {key}: nothing is said of {', '.join(missing)}")
    return [option[each] for each in names]


def _shown(preference: Preference) -> str:
    sign = " >= " if preference.kind == "thresholds" else " "
    return f"{preference.kind} ({', '.join(f'{key}{sign}{value:g}' for key, value in preference.values.items())})"
