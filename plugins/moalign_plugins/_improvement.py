"""How a policy is asked to better an answer: a prompt that holds question and answer, and how it is taken apart again.
For PIT, arXiv 2310.00898; the wording is moalign's own."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from moalign.api import Message

Prompt = str | tuple[Message, ...]


class Template(BaseModel):
    """A text becomes ``{prompt}{between}{answer}{after}``. A conversation goes on with the answer, which is the
    assistant's message, and with the request ``ask``, which is the user's. Reader and reward must have the same."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    between: str = Field(default="\nAnswer:\n", min_length=1)
    """of a prompt that is text: what stands between it and the answer, and in no answer"""
    after: str = Field(default="\nBetter answer:\n", min_length=1)
    """of a prompt that is text: what stands behind the answer, and asks for a better one"""
    ask: str = Field(default="Give a better answer.", min_length=1)
    """of a conversation: the user's message behind the answer"""

    def asked(self, prompt: Prompt, answer: str) -> Prompt:
        """The prompt that asks for a better answer. Raises ValueError where it could not be taken apart again."""
        if not isinstance(prompt, str):
            return (*prompt, {"role": "assistant", "content": answer}, {"role": "user", "content": self.ask})
        asked = f"{prompt}{self.between}{answer}{self.after}"
        if self.taken_apart(asked) != (prompt, answer):
            raise ValueError(f"the answer holds what separates it from its prompt: between is {self.between!r}")
        return asked

    def taken_apart(self, asked: Prompt) -> tuple[Prompt, str]:
        """Prompt and answer of what ``asked`` returned. Raises ValueError for any other prompt, naming the options."""
        if isinstance(asked, str):
            prompt, found, answer = asked.removesuffix(self.after).rpartition(self.between)
            if found and asked.endswith(self.after):
                return prompt, answer
            form = f"prompt, between ({self.between!r}), answer, after ({self.after!r})"
            raise ValueError(f"the prompt holds no answer to better: it is not {form}")
        if len(asked) > 2 and dict(asked[-1]) == {"role": "user", "content": self.ask}:
            answered = asked[-2]
            if answered["role"] == "assistant":
                return asked[:-2], answered["content"]
        form = f"an answer of the assistant's and then ask ({self.ask!r})"
        raise ValueError(f"the prompt holds no answer to better: the conversation does not end with {form}")

    def compared(self, answer: str, response: str) -> str:
        """Both as one response to the prompt, which is what a model of gaps g(prompt, response, answer) scores."""
        return f"{answer}{self.after}{response}"
