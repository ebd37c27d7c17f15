"""Prompt and response as a reward model of moalign reads them: ids are joined, never texts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from moalign.api import DataError

Lost = Literal["nothing", "beginning", "end"]


@dataclass(frozen=True)
class Joining:
    """``end``: the token that ends a response, whose hidden state is scored; ``where``: the model, for errors."""

    tokenizer: Any
    end: int
    where: str

    def ids(self, prompt: Any, response: str, limit: int, lose: Lost = "nothing") -> tuple[list[int], int] | None:
        """Ids, and how many are the prompt's; cut as ``lose`` says, but for the end token, which stays last.

        ``beginning`` is the prompt's, of which at least its last token stays, behind the token that begins a text. None
        where it does not fit, and for what is never trained on: an empty prompt, a response that is blank or holds a
        token that begins or ends a text.
        """
        own, answer = self._prompt(prompt), self._plain(response) if response.strip() else []
        eos, bos = self.tokenizer.eos_token_id, self.tokenizer.bos_token_id
        while answer and answer[-1] in (self.end, eos):
            answer.pop()
        if not own or not answer or not {self.end, eos, bos}.isdisjoint(answer):
            return None
        over = len(own) + len(answer) + 1 - limit
        if over > 0 and lose == "beginning":
            keep = int(own[0] == bos)
            loss = min(over, max(0, len(own) - keep - 1))
            own, over = own[:keep] + own[keep + loss :], over - loss
        if over > 0 and lose == "end":
            loss = min(over, len(answer) - 1)
            answer, over = answer[: len(answer) - loss], over - loss
        return None if over > 0 else ([*own, *answer, self.end], len(own))

    def _prompt(self, prompt: Any) -> list[int]:
        """Through the chat template where there is one; else with the token that begins a text, once."""
        from jinja2 import TemplateError

        bos = self.tokenizer.bos_token_id
        if not self.tokenizer.chat_template:
            if not isinstance(prompt, str):
                raise DataError(f"{self.where}: its tokenizer has no chat template, and the prompt is a conversation")
            ids = self._plain(prompt)
            return ids if bos is None or ids[:1] == [bos] else [bos, *ids]
        said = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(each) for each in prompt]
        try:
            ids = self._plain(self.tokenizer.apply_chat_template(said, add_generation_prompt=True, tokenize=False))
        except (TemplateError, ValueError) as error:
            raise DataError(f"{self.where}: its chat template does not take this conversation: {error}") from None
        return ids[1:] if bos is not None and ids[:2] == [bos] * 2 else ids

    def _plain(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
