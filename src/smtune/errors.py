"""The one error that means "your input, not our fault", and the wording that goes with it.

Imports nothing outside the standard library, so every layer may use it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Bad input from the user: says what was expected, what came and what to do next.

    The command line turns it into exit code 2 without a traceback.
    """


def did_you_mean(word: str, options: Iterable[str]) -> str:
    """`` Did you mean "x"?`` for the option closest to `word`, or an empty string if none is close."""
    close = difflib.get_close_matches(word, [option for option in options if option != word], n=1, cutoff=0.6)
    return f' Did you mean "{close[0]}"?' if close else ""
