"""UltraFeedback (arXiv:2310.01377), raw or binarized.

Raw (openbmb/UltraFeedback): ``instruction``, and ``completions``, each with ``response``, ``overall_score`` (1 to 10),
``fine-grained_score`` (the mean of the aspects) and ``annotations``: aspect -> ``Rating``, which is text, "1" to "5" or
"N/A". It offers the aspects, ``overall`` and ``fine-grained``; "N/A" and null are not known. A completion's own system
prompt (``custom_system_prompt``) is left out: all of a row are taken as answers to the instruction alone.

Binarized (HuggingFaceH4/ultrafeedback_binarized): ``prompt``, ``chosen`` and ``rejected`` as whole conversations,
``score_chosen`` and ``score_rejected``. It offers ``overall``; the strength of a pair is the difference of the scores,
and equal scores are a tie.

The first release gave 10 to completions whose critic had said 1 (OpenBMB/UltraFeedback, issue 8). Its authors set such
a 10 back to 1 where the fine-grained score is at most 2, and so does ``tens: one``; the default refuses the row.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

from pydantic import Field

from moalign.api import Pair, Reader, Record, Refusal, Row
from moalign_plugins.readers._dialogue import messages, parted
from moalign_plugins.readers._fields import entries, number, records, signed, spread, text
from moalign_plugins.readers._judges import asked_for

REGISTRATION = {
    "name": "ultrafeedback",
    "class": "UltraFeedback",
    "summary": "UltraFeedback: ratings of four completions by aspect, or the binarized pairs",
    "paper": "arXiv:2310.01377",
}

ASPECTS = ("instruction_following", "honesty", "truthfulness", "helpfulness")
OVERALL, FINE = "overall", "fine-grained"
OFFERED = (*ASPECTS, OVERALL, FINE)
ASPECT_SCALE, OVERALL_SCALE = (1.0, 5.0), (1.0, 10.0)
CLEARLY_BAD = 2.0  # a fine-grained score at which a 10 is the known fault


class UltraFeedback(Reader):
    """Ratings of completions by aspect, or the binarized pairs.

    Offers ``instruction_following``, ``honesty``, ``truthfulness``, ``helpfulness``, ``overall`` and ``fine-grained``;
    binarized, ``overall`` alone.
    """

    names: dict[str, str] = Field(default_factory=dict)
    """objective -> what the file calls it, where the configuration has another name for it"""
    scale: Literal["file", "10-90"] = "file"
    """10-90: both ends of every scale (1 to 5, 1 to 10) at 10 and 90, to train beside other datasets"""
    tens: Literal["refuse", "keep", "unknown", "one"] = "refuse"
    """an overall score of 10 beside aspects of 2 or less: refuse the row, keep it, take it as not known, or as 1"""

    def recognises(self, row: Mapping[str, Any]) -> bool:
        binarized = {"prompt", "prompt_id", "chosen", "rejected", "score_chosen", "score_rejected"}
        return {"instruction", "completions"} <= row.keys() or binarized <= row.keys()

    def read(self, rows: Iterable[Row], objectives: Sequence[str]) -> Iterator[Record | Refusal]:
        def record(row: Mapping[str, Any], file: str, line: int) -> Record:
            raw = "completions" in row
            asked = asked_for(OFFERED if raw else (OVERALL,), self.names, objectives, file, line, known=OFFERED)
            return (self._rated if raw else self._binarized)(row, asked, file, line)

        return records(rows, record)

    def _rated(self, row: Mapping[str, Any], asked: Mapping[str, str], file: str, line: int) -> Record:
        completions = entries(row, "completions")
        if not completions:
            raise ValueError("the row has no completions")
        prompt = text(row, "instruction")
        responses = tuple(text(completion, "response") for completion in completions)
        scores = {
            name: tuple(self._score(completion, inner) for completion in completions) for name, inner in asked.items()
        }
        return Record(prompt, responses, scores=scores, group=prompt, file=file, line=line)

    def _score(self, completion: Mapping[str, Any], inner: str) -> float | None:
        if inner == OVERALL:
            return self._scaled(self._overall(completion), OVERALL_SCALE)
        if inner == FINE:
            return self._scaled(_number(completion, "fine-grained_score", ASPECT_SCALE), ASPECT_SCALE)
        annotations = completion.get("annotations")
        annotation = annotations.get(inner) if isinstance(annotations, Mapping) else None
        if annotation is None:
            return None
        if not isinstance(annotation, Mapping):
            raise ValueError(f"an annotation is not an object: {inner}")
        return self._scaled(number(annotation.get("Rating"), f"{inner} Rating", *ASPECT_SCALE), ASPECT_SCALE)

    def _overall(self, completion: Mapping[str, Any]) -> float | None:
        score = _number(completion, "overall_score", OVERALL_SCALE)
        fine = _number(completion, "fine-grained_score", ASPECT_SCALE)
        if score != OVERALL_SCALE[1] or fine is None or fine > CLEARLY_BAD or self.tens == "keep":
            return score
        if self.tens == "refuse":
            fault = f"an overall score of 10 that should be 1: its fine-grained score is {fine:g}"
            raise ValueError(f"{fault}; set the reader's tens to one, unknown or keep")
        return 1.0 if self.tens == "one" else None

    def _binarized(self, row: Mapping[str, Any], asked: Mapping[str, str], file: str, line: int) -> Record:
        chosen, rejected = (messages(entries(row, column), column) for column in ("chosen", "rejected"))
        prompt, *responses = parted(text(row, "prompt"), chosen, rejected)
        scores = [number(row.get(column), column, *OVERALL_SCALE) for column in ("score_chosen", "score_rejected")]
        better, worse = scores
        pair = Pair(0, 1)
        if better is not None and worse is not None:
            if better < worse:
                raise ValueError(f"the chosen response has the lower score: {better:g} against {worse:g}")
            pair = signed(worse - better)
        scaled = tuple(self._scaled(score, OVERALL_SCALE) for score in scores)
        return Record(
            prompt=prompt,
            responses=tuple(responses),
            scores={} if scaled == (None, None) else dict.fromkeys(asked, scaled),
            pairs=dict.fromkeys(asked, (pair,)),
            group=text(row, "prompt"),
            file=file,
            line=line,
        )

    def _scaled(self, value: float | None, scale: tuple[float, float]) -> float | None:
        return value if self.scale == "file" else spread(value, *scale)


def _number(completion: Mapping[str, Any], key: str, scale: tuple[float, float]) -> float | None:
    return number(completion.get(key), key, *scale)
