"""The bad-behaviour matrix: what a plugin of each kind may do, what then happens, and sweeps in which it does so.

The tests in test_isolation_*.py take their cases from the table, and one of them sees to it that the table is whole.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import distributions

from moalign.registry import KINDS

NAME, VERSION = "misbehaving", "2.5"

# Whatever happens, the message names kind, plugin, distribution, version and hook.
REPORTED = "reported as broken, by whoever lists plugins and where a run names it; the others load"
REFUSED = "the run is refused"
FAILS = "the candidate fails; the others finish"
ENDS = "the run ends; what was finished is kept"
WITHOUT = "the run goes on without it"
TOLD = "whoever asked for a response gets the error"
STOPS = "the training, which is of one model, fails by its name; nothing is left that looks whole"
HARMLESS = "changes nothing: it was given a copy, or what it changed is put back"
NO_TENSORS = "cannot occur: it returns plain data"
CONSTANT = "cannot occur: what it returns is constant"
NOTHING = "cannot occur: nobody uses what it returns"

ORDER = (
    *("objective", "combiner", "reward", "transform", "search", "reader", "observer", "sampler", "decoder"),
    *("conditioner", "reward-model", "reference", "filter"),
)
TABLE: dict[str, tuple[str, ...]] = {
    # when it is loaded
    "import error": (REPORTED,) * 13,
    "exits at import": (REPORTED,) * 13,
    "missing dependency": (REPORTED,) * 13,
    "name clash": (REPORTED,) * 13,
    "wrong signature": (REPORTED,) * 13,
    "its constructor raises": (REPORTED,) * 13,
    "dies at import": (REPORTED,) * 13,
    "hangs at import": (REPORTED,) * 13,
    # in the middle
    "raises": (*[FAILS] * 4, ENDS, REFUSED, WITHOUT, FAILS, TOLD, STOPS, STOPS, FAILS, FAILS),
    "exits": (*[FAILS] * 4, ENDS, REFUSED, WITHOUT, FAILS, TOLD, STOPS, STOPS, FAILS, FAILS),
    "raises no Exception": (*[FAILS] * 4, ENDS, REFUSED, WITHOUT, FAILS, TOLD, STOPS, STOPS, FAILS, FAILS),
    "raises what cannot be shown": (*[FAILS] * 4, ENDS, REFUSED, WITHOUT, FAILS, TOLD, STOPS, STOPS, FAILS, FAILS),
    "hangs": (*[FAILS] * 4, ENDS, REFUSED, WITHOUT, FAILS, TOLD, STOPS, STOPS, FAILS, FAILS),
    "dies by a signal": (*[FAILS] * 4, ENDS, REFUSED, WITHOUT, FAILS, TOLD, STOPS, STOPS, FAILS, FAILS),
    "ends the process": (*[FAILS] * 4, ENDS, REFUSED, WITHOUT, FAILS, TOLD, STOPS, STOPS, FAILS, FAILS),
    # what it returns
    "NaN": (*[FAILS] * 4, ENDS, REFUSED, NOTHING, FAILS, TOLD, STOPS, STOPS, FAILS, FAILS),
    "wrong shape": (*[FAILS] * 4, ENDS, REFUSED, NOTHING, FAILS, TOLD, STOPS, STOPS, FAILS, FAILS),
    "wrong dtype": (*[FAILS] * 4, ENDS, REFUSED, WITHOUT, FAILS, TOLD, STOPS, STOPS, FAILS, FAILS),
    "wrong device": (*[FAILS] * 4, *[NO_TENSORS] * 3, FAILS, TOLD, STOPS, STOPS, NO_TENSORS, FAILS),
    "detached graph": (
        *(FAILS, CONSTANT, NO_TENSORS, CONSTANT, NO_TENSORS, NO_TENSORS, NO_TENSORS, NO_TENSORS, CONSTANT),
        *(STOPS, STOPS, NO_TENSORS, CONSTANT),
    ),
    # what it does beside that
    "mutates inputs": (FAILS, FAILS, HARMLESS, FAILS, *[HARMLESS] * 4, TOLD, STOPS, STOPS, HARMLESS, FAILS),
    "reseeds generators": (FAILS, FAILS, HARMLESS, FAILS, ENDS, *[HARMLESS] * 3, TOLD, STOPS, STOPS, FAILS, FAILS),
}
HOOKS = dict(
    zip(
        ORDER,
        (
            *("loss", "pair_terms", "score", "apply", "propose", "read", "on_step", "sample", "scores", "gates"),
            *("loss", "moves", "keep_responses"),
        ),
        strict=True,
    )
)
LOADING = tuple(TABLE)[:8]
IN_A_PROCESS_OF_ITS_OWN = ("hangs", "dies by a signal", "ends the process")


def expected(kind: str, behaviour: str) -> str:
    return TABLE[behaviour][ORDER.index(kind)]


def cases(*outcomes: str, behaviours: tuple[str, ...] | None = None) -> list[tuple[str, str]]:
    """(kind, behaviour) of all cells with these outcomes."""
    chosen = [name for name in TABLE if name not in LOADING] if behaviours is None else behaviours
    return [(kind, name) for name in chosen for kind in ORDER if expected(kind, name) in outcomes]


def install(folder: Path) -> Path:
    """The distribution with a bad plugin of every kind."""
    folder.mkdir(parents=True, exist_ok=True)
    for module in (NAME, f"{NAME}_one_model"):
        (folder / f"{module}.py").write_text(Path(__file__).with_name(f"{module}.py").read_text())
    distributions.register(folder, NAME, NAME, VERSION)
    return folder


def content(model: Path, pairs: Path, **changes: Any) -> dict[str, Any]:
    """A configuration of three candidates, all of them together; without the changes nobody misbehaves."""
    plain: dict[str, Any] = {
        "model": {"path": str(model), "lora": {"r": 4, "alpha": 8}},
        "objectives": {"helpful": None, "harmless": None},
        "data": {"path": str(pairs), "held_out": 0.2, "reader": "bad"},
        "loss": "bad",
        "combine": "bad",
        "search": "bad",
        "train": {"steps": 3, "pairs_per_step": 4, "lr": 1e-2, "together": 4},
        "evaluate": {"samples": 1, "max_new_tokens": 3, "prompts": 3},
    }
    return plain | changes


def rewarded(**options: Any) -> dict[str, Any]:
    """Objectives of which one has the bad reward; asked of the data, the base and each candidate."""
    return {"helpful": {"reward": {"name": "bad"} | options}, "harmless": {"reward": "length"}}


assert tuple(KINDS) == ORDER


# --- changes of a configuration with which the bad plugin is asked about sampled responses ---------------------------


def shaping(queue):
    """Sampled responses of one round; the bad transform is asked once for each candidate."""
    return {
        "objectives": {"helpful": {"reward": "length", "transform": {"name": "bad", "queue": str(queue)}}}
        | {"harmless": {"reward": "length", "direction": "min"}},
        "rollouts": {"rounds": 1, "prompts": 4, "samples": 3, "prompts_per_step": 2, "max_new_tokens": 4},
        "loss": "rebel",
        "combine": "linear",
    }


def choosing(queue):
    """The same with the bad filter, asked once for each candidate likewise."""
    changes = shaping(queue)
    plain = changes["objectives"]["harmless"]
    return changes | {
        "objectives": {"helpful": {"reward": "length"}, "harmless": plain},
        "rollouts": changes["rollouts"] | {"filter": {"name": "bad", "queue": str(queue)}},
    }


def sampling(queue, **rollouts):
    """Responses from the bad sampler, asked for once for each round: the first one all candidates share."""
    changes = shaping(queue)
    plain = {"reward": "length", "direction": "min"}
    sampled = {"rounds": 1, "sampler": {"name": "bad", "queue": str(queue)}} | rollouts
    return changes | {
        "objectives": {"helpful": {"reward": "length"}, "harmless": plain},
        "rollouts": changes["rollouts"] | sampled,
    }


def comparing(queue):
    """The bad loss compares with the bad reference, which each candidate asks from its first step on."""
    return {"reference": {"name": "bad", "queue": str(queue)}}
