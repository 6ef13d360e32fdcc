"""Say in one plain line what the command line's libraries say in many."""

from __future__ import annotations

from collections.abc import Collection


def plain(message: str, options: Collection[str]) -> str:
    return " ".join(message.split())
