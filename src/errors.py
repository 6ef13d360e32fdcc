"""The one exception that means "the user can fix this", and how messages are written and told."""

from __future__ import annotations

import argparse
import errno
import os
import sys
from collections.abc import Sequence
from io import TextIOWrapper
from typing import Any, NoReturn, TextIO


class UserError(Exception):
    """State a mistake in one line: what was wrong, where, and what to do.

    The command line prints the message without a traceback and exits with code 1.
    """


FEW = 10  # names in a message


def shorten(names: Sequence[str]) -> str:
    """Join names for a message, the first few if they are many."""
    more = f" and {len(names) - FEW} more" if len(names) > FEW else ""
    return ", ".join(names[:FEW]) + more


class OneLineParser(argparse.ArgumentParser):
    """Take wrong words for a UserError, instead of printing the whole usage.

    Args:
        example: A command that works.
    """

    def __init__(self, example: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.example = example

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}. For example: {self.example}")


def replace_unknown_characters() -> None:
    """Print a question mark for what the terminal's encoding lacks, instead of ending with an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")


def say(text: str, stream: TextIO | None = None) -> None:
    """Print a line, and go on in silence if nobody reads any more.

    Ctrl-C also ends the `tee` of `… | tee log`, and a terminal may have been closed.

    Args:
        text: The line.
        stream: Where to; None for standard output.
    """
    stream = sys.stdout if stream is None else stream
    try:
        print(text, file=stream, flush=True)
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.EIO):
            raise
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), stream.fileno())  # else Python would try once more when it ends
