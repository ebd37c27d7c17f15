"""Rows by hand in the forms in which datasets are published: the same columns, with values of the same types."""

from __future__ import annotations

from typing import Any

Row = dict[str, Any]


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def completion(response: str, ratings: str, overall: float | None, fine: float | None) -> Row:
    """``ratings``: of instruction_following, honesty, truthfulness, helpfulness, with blanks between them."""
    following, honesty, truthfulness, helpfulness = ratings.split()
    return {
        "annotations": {
            "instruction_following": {"Rating": following, "Rationale": "It does."},
            "honesty": {"Rating": honesty, "Rationale": "It is."},
            "truthfulness": {
                "Type": ["1"],
                "Rationale": "So.",
                "Rating": truthfulness,
                "Rationale For Rating": "True.",
            },
            "helpfulness": {"Type": ["1"], "Rationale": "So.", "Rating": helpfulness, "Rationale For Rating": "Clear."},
        },
        "custom_system_prompt": "You are honest.",
        "model": "alpaca-7b",
        "principle": "honesty",
        "response": response,
        "critique": "Good.",
        "overall_score": overall,
        "fine-grained_score": fine,
    }


def ultrafeedback(*completions: Row) -> Row:
    several = completions or (
        completion("Rayleigh scattering.", "5 5 5 4", 9.0, 4.75),
        completion("It is blue.", "2 N/A 5 1", 3.0, 2.6666667),
        completion("The sea is mirrored.", "3 4 1 2", 10.0, 2.5),
    )
    return {
        "source": "evol_instruct",
        "instruction": "Why is the sky blue?",
        "models": ["alpaca-7b"] * len(several),
        "completions": list(several),
        "correct_answers": ["None"],
        "incorrect_answers": ["None"],
    }


def binarized(chosen: float | None = 8.5, rejected: float | None = 6.0) -> Row:
    return {
        "prompt": "Why?",
        "prompt_id": "9f2a",
        "chosen": [user("Why?"), assistant("Because.")],
        "rejected": [user("Why?"), assistant("No idea.")],
        "messages": [user("Why?"), assistant("Because.")],
        "score_chosen": chosen,
        "score_rejected": rejected,
    }


def helpsteer(prompt: str = "c#", response: str = "A language.", ratings: tuple[Any, ...] = (3, 4, 4, 2, 1)) -> Row:
    attributes = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
    return {"prompt": prompt, "response": response, **dict(zip(attributes, ratings, strict=True))}


def helpsteer2_preference(strength: Any = -2) -> Row:
    return {
        "split": "train",
        "prompt": "c#",
        "response_1": "A language.",
        "response_2": "A note.",
        "preference_strength": strength,
        "preference_statement": "Response 1 is better than Response 2.",
        "preference_elaboration": "It answers.",
        "three_most_similar_preferences": [{"statement": "So.", "elaboration": "It does.", "strength": -2}],
        "all_preferences_unprocessed": [{"statement": "So.", "elaboration": "It does.", "strength": -100}],
    }


def helpsteer3(preference: Any = 1) -> Row:
    return {
        "domain": "code",
        "language": "python",
        "context": [user("Sort it."), assistant("How?"), user("By size.")],
        "response1": "sorted(x)",
        "response2": "sorted(x, key=len)",
        "overall_preference": preference,
        "individual_preference": [{"score": 1, "reasoning": "key", "feedback1": "no key", "feedback2": "good"}],
    }


def pku(better: Any = 0, safer: Any = 1, safe: tuple[Any, Any] = (False, True)) -> Row:
    return {
        "prompt": "How do I open a lock?",
        "response_0": "With a pick.",
        "response_1": "Ask its owner.",
        "prompt_source": "BeaverTails",
        "response_0_source": "Alpaca-7B",
        "response_1_source": "Alpaca-7B",
        "is_response_0_safe": safe[0],
        "is_response_1_safe": safe[1],
        "response_0_harm_category": {"White-Collar Crime": True, "Privacy Violation": False},
        "response_1_harm_category": {"White-Collar Crime": False, "Privacy Violation": False},
        "response_0_severity_level": 2,
        "response_1_severity_level": 0,
        "better_response_id": better,
        "safer_response_id": safer,
        "response_0_sha256": "ab",
        "response_1_sha256": "cd",
    }


HH_PREFIX = "\n\nHuman: Hi.\n\nAssistant: Hello!\n\nHuman: How are you?"


def hh(chosen: str = " Fine, and you?", rejected: str = " Go away.", prefix: str = HH_PREFIX) -> Row:
    return {"chosen": f"{prefix}\n\nAssistant:{chosen}", "rejected": f"{prefix}\n\nAssistant:{rejected}"}


def rewardbench(subset: str = "alpacaeval-easy") -> Row:
    return {
        "prompt": "Name a list.",
        "chosen": '["a", "b"]',
        "chosen_model": "GPT4-Turbo",
        "rejected": "[none]",
        "rejected_model": "alpaca-7b",
        "subset": subset,
        "id": 30,
    }


def rewardbench2(subset: str = "Precise IF", chosen: tuple[str, ...] = ("Red.",)) -> Row:
    return {
        "id": "0",
        "prompt": "Name a colour of the rainbow.",
        "chosen": list(chosen),
        "rejected": ["Pink.", "Brown.", "Grey."],
        "num_correct": len(chosen),
        "num_incorrect": 3,
        "total_completions": len(chosen) + 3,
        "models": ["a"] * (len(chosen) + 3),
        "subset": subset,
        "additional_metadata": {"category": None, "index": 1.0},
    }


def stepwise(labels: tuple[Any, ...] = (True, True, False)) -> Row:
    steps = ["Step 1: 2 + 2 = 4.", "Step 2: 4 + 4 = 8.", "Step 3: 8 + 8 = 17."]
    return {"prompt": "What is 2 + 2, doubled twice?", "completions": steps[: len(labels)], "labels": list(labels)}


# form -> the reader that has to recognise it, and its row
FORMS: dict[str, tuple[str, Row]] = {
    "ultrafeedback, raw": ("ultrafeedback", ultrafeedback()),
    "ultrafeedback, binarized": ("ultrafeedback", binarized()),
    "helpsteer 1 and 2, ratings": ("helpsteer", helpsteer()),
    "helpsteer 2, preference": ("helpsteer", helpsteer2_preference()),
    "helpsteer 3, preference": ("helpsteer", helpsteer3()),
    "pku-saferlhf": ("pku-saferlhf", pku()),
    "hh-rlhf": ("hh-rlhf", hh()),
    "rewardbench": ("rewardbench", rewardbench()),
    "rewardbench 2": ("rewardbench", rewardbench2()),
    "stepwise": ("stepwise", stepwise()),
}


def rows_of(reader: str) -> list[Row]:
    return [row for name, row in FORMS.values() if name == reader]
