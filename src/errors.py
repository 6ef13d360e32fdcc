"""The one exception that means "the user can fix this", and how a small command tells it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn


class UserError(Exception):
    """State a mistake in one line: what was wrong, where, and what to do.

    The command line prints the message without a traceback and exits with code 1.
    """


class OneLineParser(argparse.ArgumentParser):
    """Take wrong words for a UserError, instead of printing the whole usage.

    Args:
        example: A command that works.
    """

    def __init__(self, *args: Any, example: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.example = example

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}. For example: {self.example}")


@contextmanager
def told_in_one_line() -> Iterator[None]:
    """Print a UserError on standard error, and end the process with code 1; Ctrl-C ends it with 130."""
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print("stopped by SIGINT", file=sys.stderr)
        raise SystemExit(130) from None
