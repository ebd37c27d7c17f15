"""Alignment at decoding time: decoders on trained adapters, in anybody's code.

``decode.build(NAME, OPTION=...)`` is a decoder by its name; ``decode.processor`` makes a LogitsProcessor of it, and
``decode.Decoding(...).generate`` samples with it. From a run directory: ``moalign.open_run(RUN).decoder(NAME, ...)``.
"""

from moalign.api import NextToken, Request
from moalign.decode.choice import build
from moalign.decode.processor import DecoderProcessor, processor
from moalign.decode.sampling import Decoding, Response
from moalign.decode.speakers import Speakers, hidden_states

__all__ = [
    "DecoderProcessor",
    "Decoding",
    "NextToken",
    "Request",
    "Response",
    "Speakers",
    "build",
    "hidden_states",
    "processor",
]
