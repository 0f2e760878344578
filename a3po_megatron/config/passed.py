"""Options that are passed through to a library are held against that library's own names."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable

from ..errors import RequestError


def check_passed(
    option: str, given: Iterable[str], fields: Iterable[str], owned: Collection[str], library: str
) -> None:
    """Raises RequestError for a name in `given` that is no field of the library's, with the nearest that may be given,
    and for one that is ours to decide (`owned`)."""
    free = [field for field in fields if field not in owned]
    for name in given:
        if name in owned:
            raise RequestError(f"{option}.{name}: this follows from the model and the other options")
        if name not in free:
            close = difflib.get_close_matches(name, free, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise RequestError(f"{option}.{name}: {library} has no such field{hint}")
