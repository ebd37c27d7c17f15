"""In which precision a run's point may be written; without torch, so that what is refused is refused at once."""

from __future__ import annotations

from moalign.errors import UserError

DTYPES = ("stored", "float32", "bfloat16", "float16")


def check(dtype: str, merge: bool) -> None:
    """Raise UserError for a precision that there is none of, or that adapters are not written in."""
    if dtype not in DTYPES:
        raise UserError(f"dtype: '{dtype}' is none of {', '.join(DTYPES)}")
    if dtype != "stored" and not merge:
        raise UserError(
            f"dtype: '{dtype}' is for merged models, adapters are always float32; add --merge (from Python merge=True)"
        )
