"""A decoder in the place that an adapter has in ``moalign generate``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from moalign import registry
from moalign.data.tokenise import Tokeniser
from moalign.decode import Decoding
from moalign.engine.replies import Manner, Reply
from moalign.errors import ConfigError
from moalign.seeds import derive
from moalign.sweeps.archive import Archive
from moalign.sweeps.decoding import open_decoding


@dataclass(frozen=True)
class Decoded:
    """What ``replies.Speaker`` is, with a decoder behind it."""

    decoding: Decoding
    manner: Manner

    @property
    def has_template(self) -> bool:
        return Tokeniser.of(self.decoding.tokenizer).has_template

    def reply(self, prompt: str, number: int = 0, sample: int = 0) -> Reply:
        """A reply to prompt ``number`` of a session, whole."""
        (said,) = self.decoding.generate([prompt], **self._how(number, sample))
        return Reply(said.text, len(said.ids), said.ended)

    def stream(self, prompt: str, number: int, sample: int, write: Callable[[str], None]) -> None:
        """The same, piece by piece; in one where the decoder chooses among several."""
        for piece in self.decoding.stream(prompt, **self._how(number, sample)):
            write(piece)

    def _how(self, number: int, sample: int) -> dict[str, Any]:
        seed = derive(self.manner.seed, "generate", number, sample)
        return {"max_new_tokens": self.manner.max_new_tokens, "temperature": self.manner.temperature, "seed": seed}


def opened(
    archive: Archive, name: str, settings: Sequence[str], prefer: str, manner: Manner, base: str | None, device: str
) -> Decoded:
    """The decoder of that name, with ``settings`` KEY=VALUE, on the run. Raises as ``open_decoding`` does."""
    found = open_decoding(
        archive.directory, registry.discover(), name, _options(settings), prefer, base=base, device=device
    )
    return Decoded(found, manner)


def _options(settings: Sequence[str]) -> Mapping[str, Any]:
    found: dict[str, Any] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"--set {setting}: write it as key=value, for example n=8")
        try:
            found[key.strip()] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ConfigError(f"--set {setting}: the value is not valid YAML: {error}") from None
    return found
