"""Diagnostics of a run as tables and sentences for the terminal: what fits on a screen; the rest is in the JSON."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from moalign.report import wording

Found = Mapping[str, Any]
AGAINST = -0.1  # a cosine below this is called a conflict


def tables(found: Found) -> list[Table]:
    """Of pairs, where there are any, and of samples."""
    shown = []
    if found.get("pairs"):
        shown.append(_pairs(found))
    if found.get("samples"):
        shown.append(_samples(found))
        shown += [_rewards(found)] if found["rewards"] else []
        shown += [_bounds(found)] if found["proxies"] else []
    return shown


def lines(found: Found) -> list[str]:
    """What the tables mean, what else was found, and what is missing."""
    told = [
        *_about_pairs(found),
        *_about_samples(found),
        *_curves(found),
        *_balances(found),
        *_distances(found),
        *_conflicts(found),
    ]
    told += [
        f"ALARM, {each['along']}: from {each['from']} to {each['to']} {each['rising']} rises by "
        f"{wording.number(each['rise'])} while {each['falling']} falls by {wording.number(each['fall'])}"
        for each in found["alarms"]
    ]
    if not found["alarms"]:
        told.append("no alarm: nowhere does one figure rise beyond chance while what it stands for falls")
    return told + [f"missing: {each}" for each in found["missing"]]


# --- tables ---------------------------------------------------------------------------------------------------------


def _pairs(found: Found) -> Table:
    """A row for each policy; of one candidate alone, the objectives' columns are those of a few."""
    objectives = list(found["pairs"]["objectives"])
    table = _table("policy")
    for name in objectives:
        for column in ("ranks", "by token", "prefers", *(["explicit"] if _explicit(found, name) else [])):
            table.add_column(Text(f"{wording.printable(name, 16)}\n{column}"), justify="right")
    for policy, told in found["policies"].items():
        cells = []
        for name in objectives:
            own = told["ranking"][name]
            figures = [own["accuracy"], own["accuracy_by_token"], own["preference_accuracy"]]
            if _explicit(found, name):
                figures.append(told["explicit"][name][name]["accuracy"])
            cells += [wording.number(None) if each is None else f"{each['value']:.3f}" for each in figures]
        table.add_row(Text(wording.printable(policy)), *cells)
    return table


def _explicit(found: Found, name: str) -> bool:
    """Whether the objective has a reward of its own that has scored the pairs."""
    base = found["policies"]["base"]["explicit"] or {}
    return name in base.get(name, {})


def _samples(found: Found) -> Table:
    table = _table("policy")
    for column in ("KL", "√KL", "χ²", "samples it rests on", "tokens", "cut off"):
        table.add_column(column, justify="right")
    for policy, told in found["policies"].items():
        chi2, length = told["chi2"], told["lengths"]
        table.add_row(
            Text(wording.printable(policy)),
            wording.measure(told["kl"], told["kl_stderr"]),
            wording.number(told["kl_root"]),
            ("> " if policy in _few(found) else "") + wording.number(chi2["value"]),
            f"{chi2['effective_samples']:.0f} of {chi2['samples']}",
            f"{length['mean']:.1f}" + ("" if length["deviation"] is None else f" (sd {length['deviation']:.1f})"),
            wording.percent(length["truncated"]),
        )
    return table


def _rewards(found: Found) -> Table:
    table = _table("policy")
    for name in found["rewards"]:
        table.add_column(Text(wording.printable(name, 16)), justify="right")
        table.add_column("for a token more", justify="right")
    for policy, told in found["policies"].items():
        cells = [_figure(told[key][name]) for name in found["rewards"] for key in ("rewards", "slopes")]
        table.add_row(Text(wording.printable(policy)), *cells)
    return table


def _bounds(found: Found) -> Table:
    """What a proxy's gain promises of the gold reward, beside what was measured."""
    table = _table("policy")
    for column in ("proxy", "it gains", "correlation", f"{found['gold']} at least", "measured"):
        table.add_column(Text(wording.printable(column, 24)), justify="right")
    for policy, told in found["policies"].items():
        for proxy, bound in told["bounds"].items():
            keys = ("proxy_gain", "correlation", "gold_gain_at_least", "gold_gain")
            cells = [wording.number(None if bound is None else bound[key]) for key in keys]
            if policy != "base":
                table.add_row(Text(wording.printable(policy)), Text(wording.printable(proxy, 16)), *cells)
    return table


def _figure(figure: Mapping[str, Any] | None) -> str:
    return wording.number(None) if figure is None else wording.measure(figure["value"], figure["stderr"])


def _few(found: Found) -> list[str]:
    """The candidates whose chi2 is a matter of few samples."""
    return [name for name, told in found["policies"].items() if name != "base" and told["chi2"]["dominated"]]


def _table(first: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column(first, overflow="fold")
    return table


# --- sentences ------------------------------------------------------------------------------------------------------


def _about_pairs(found: Found) -> Iterator[str]:
    pairs = found.get("pairs")
    if not pairs:
        return
    yield (
        f"{pairs['pairs']} pairs ({pairs['from']}). ranks: share whose chosen response the policy itself finds "
        "likelier, by token: the mean token of it; prefers: share with the larger log-ratio to the base; equal counts "
        "a half"
    )
    for name, each in pairs["objectives"].items():
        ideal = ", ".join(f"{figure['value']:.3f} (beta {beta})" for beta, figure in each["idealised"].items())
        yield (
            f"{name}: with {wording.percent(pairs['share'])} of annotators for the chosen response the exact optimum "
            f"ranks {ideal}"
        )


def _about_samples(found: Found) -> Iterator[str]:
    samples = found.get("samples")
    if not samples:
        return
    yield (
        f"{samples['each']} samples of each of {samples['of_prompts']} prompts ({samples['from']}), temperature 1. "
        "for a token more: slope of the reward over length within prompts"
    )
    few = _few(found)
    if few:
        yield (
            f"χ² of {_listed(few)} rests on fewer than 10 samples: it is likely too small, and a bound by it too good; "
            "take more --samples"
        )


def _curves(found: Found) -> Iterator[str]:
    for name, curve in found["curves"].items():
        if curve["a"] is None:
            yield f"{name} over √KL: {curve['note']}"
            continue
        peak = "" if curve["peak_kl"] is None else f"; highest at KL {wording.number(curve['peak_kl'])}"
        both = f"a {wording.number(curve['a'])}, b {wording.number(curve['b'])}"
        missed = wording.number(curve["residual"])
        yield f"{name} over x = √KL: gains a x - b x log x with {both}, misses {missed}{peak}; {curve['note']}"


def _balances(found: Found) -> Iterator[str]:
    for policy, told in found["policies"].items():
        for proxy, each in (told.get("balance") or {}).items():
            asked = "" if each["score"] is None else f" at {each['threshold']:g} {wording.number(each['score'])},"
            yield (
                f"{policy}: balance of {proxy}{asked} best {wording.number(each['best_score'])} "
                f"at {wording.number(each['best_threshold'])}"
            )


def _distances(found: Found) -> Iterator[str]:
    """Under the base; 0: they ask for the same, 1: for the opposite."""
    base = found["policies"].get("base", {})
    if not base.get("distances"):
        return
    pairs = _above(found["rewards"], base["distances"])
    yield "distance of rewards (0: the same policies, 0.71: unrelated, 1: the opposite): " + ", ".join(pairs)


def _conflicts(found: Found) -> Iterator[str]:
    for policy, told in found["policies"].items():
        if told.get("conflict"):
            pairs = _above(found["objectives"], told["conflict"]["cosines"], signed=True)
            yield f"{policy}: cosine of gradients on {told['conflict']['on']}: {', '.join(pairs)}"


def _above(names: Sequence[str], matrix: Sequence[Sequence[float | None]], *, signed: bool = False) -> list[str]:
    """The entries above the diagonal, each with its two names."""
    told = []
    for i, first in enumerate(names):
        for j in range(i + 1, len(names)):
            value = matrix[i][j]
            against = " (against each other)" if signed and value is not None and value < AGAINST else ""
            told.append(f"{first} and {names[j]} {wording.number(value)}{against}")
    return told


def _listed(names: Sequence[str], most: int = 4) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
