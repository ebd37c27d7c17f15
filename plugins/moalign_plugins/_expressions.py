"""Options that are regular expressions, refused with a reason where they are none."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator


def _compiles(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f"not a regular expression: {error}") from None
    return text


Expression = Annotated[str, AfterValidator(_compiles)]
