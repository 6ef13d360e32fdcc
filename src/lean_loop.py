"""What Lightning's loop does around every step though nothing comes of it, made short or left out."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.profilers import PassThroughProfiler

F = TypeVar("F", bound=Callable[..., Any])

_NOTHING: AbstractContextManager[Any] = nullcontext()
_STEP_HOOKS = (
    *(f"on_{stage}_batch_{end}" for stage in ("train", "validation", "test", "predict") for end in ("start", "end")),
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
)
_KNOWN = ("src", "lightning")  # packages whose callbacks do not call their own empty hooks


class Unprofiled(PassThroughProfiler):
    """Hand out the same empty context each time; Lightning's own default makes a generator of each.

    A training step asks for some twenty-five, for hooks of callbacks and others: 0.2 µs instead of 1.0 each.
    """

    def profile(self, action_name: str) -> AbstractContextManager[Any]:  # type: ignore[override]
        return _NOTHING


def skip_empty_hooks(callbacks: Iterable[Callback]) -> None:
    """Have Lightning pass over the hooks of a step that a callback has not written.

    It calls every hook that is callable, each within a profiler's context, for which it makes a name first; that of a
    checkpoint's callback takes longest.
    """
    for callback in callbacks:
        if type(callback).__module__.partition(".")[0] in _KNOWN:
            for name in _STEP_HOOKS:
                if getattr(type(callback), name) is getattr(Callback, name):
                    vars(callback).setdefault(name, None)


def agree_on_signals_less_often(trainer: Trainer) -> None:
    """Have several processes not tell each other before every step that no signal came, and wait for the device so.

    Where signals are received otherwise than by Lightning's handler, they never hear of one in this way.
    """
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = _nothing_came  # type: ignore[method-assign]


def _nothing_came() -> None:
    pass


def remember_signature(step: F) -> F:
    """Keep a function's signature with it: Lightning asks for it at each step, and Python derives it anew."""
    step.__signature__ = inspect.signature(step)  # type: ignore[attr-defined]
    return step
