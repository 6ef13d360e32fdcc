"""Work of a GPU that is recorded once and repeated, as a CUDA graph: one launch instead of hundreds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

R = TypeVar("R")

_STREAMS = 8
_WARM_UP = 2  # calls in which libraries choose their ways and take their memory, which must not be recorded


class Replay(Generic[R]):
    """Call a function as it is at first; then record what it does on the GPU, and from then on repeat that.

    Each combination of shapes and of arguments that are no tensors is recorded by itself.

    Args:
        function: What to repeat. It must not wait for the device, nor depend on anything that changes but the content
            of its arguments and of tensors that stay where they are in memory; what it does to such tensors is
            repeated too. Only its work on the device is: Python's is not.
        settings: Gives what else it depends on; where that has changed, it is recorded anew.
    """

    def __init__(self, function: Callable[..., R], settings: Callable[[], Hashable] = lambda: None) -> None:
        self._function = function
        self._settings = settings
        self._last_settings: Hashable = None
        self._calls: Counter[Hashable] = Counter()
        self._recordings: dict[Hashable, _Recording[R]] = {}

    def __call__(self, *arguments: Any) -> R:
        """Do what the function does.

        Returns:
            What the function returned when it was recorded: the next call writes to the same tensors.
        """
        settings = self._settings()
        if settings != self._last_settings:  # what was recorded would never be used again, and takes memory
            self.forget()
            self._last_settings = settings
        key = tuple(_kind(argument) for argument in arguments)
        recording = self._recordings.get(key)
        if recording is None:
            self._calls[key] += 1
            if self._calls[key] <= _WARM_UP:
                return self._function(*arguments)
            recording = self._recordings[key] = _Recording(self._function, arguments)
        return recording.repeat(arguments)

    def forget(self) -> None:
        """Free all recordings, for what the function does will be something else."""
        self._calls.clear()
        self._recordings.clear()


class _Recording(Generic[R]):
    def __init__(self, function: Callable[..., R], arguments: tuple[Any, ...]) -> None:
        with _ordinary_tensors():
            own = [argument.clone() if isinstance(argument, Tensor) else argument for argument in arguments]
            self._replay, self._result = capture(lambda: function(*own))
        kinds: dict[torch.dtype, list[int]] = {}
        for position, argument in enumerate(own):
            if isinstance(argument, Tensor):
                kinds.setdefault(argument.dtype, []).append(position)
        # One launch copies all tensors of a type.
        self._copied = [(positions, [own[position] for position in positions]) for positions in kinds.values()]

    def repeat(self, arguments: tuple[Any, ...]) -> R:
        for positions, own in self._copied:
            torch._foreach_copy_(own, [arguments[position] for position in positions])
        self._replay()
        return self._result


def capture(work: Callable[[], R]) -> tuple[Callable[[], None], R]:
    """Record some work, which is not done yet.

    Returns:
        What does it, and what it returned: its tensors are filled whenever it is done.
    """
    graph = torch.cuda.CUDAGraph()
    stream = streams(torch.cuda.current_device()).recording
    torch.clear_autocast_cache()  # weights that were converted outside are not converted anew by the recording
    # Other threads may write a checkpoint meanwhile.
    try:
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            result = work()
    except RuntimeError as error:
        if isinstance(error.__context__, torch.OutOfMemoryError):  # which ended the recording before it could be ended
            raise error.__context__ from None
        raise
    torch.clear_autocast_cache()
    return graph.replay, result


@contextmanager
def _ordinary_tensors() -> Iterator[None]:
    """Have what is recorded within a validation write to tensors that others may write to as well."""
    gradients = torch.is_grad_enabled()
    with torch.inference_mode(False), torch.set_grad_enabled(gradients):
        yield


class Streams:
    """The streams that a GPU's work takes beside the usual one, made once.

    torch hands out the same 32 again and again: new ones for each recording would soon be those that another thread
    writes a checkpoint on, whose work would become part of the recording.
    """

    def __init__(self, device: int) -> None:
        self.recording, self.checkpoints, *self.side_by_side = (torch.cuda.Stream(device) for _ in range(2 + _STREAMS))


streams = cache(Streams)


def wait_for(device: torch.device) -> None:
    """Wait for a GPU to do what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def side_by_side(work: Callable[[Tensor], Tensor], tensors: Sequence[Tensor]) -> list[Tensor]:
    """Do the same to each of several tensors; within a recording on streams of their own, largest first."""
    if not (tensors and tensors[0].is_cuda and torch.cuda.is_current_stream_capturing()):
        return [work(tensor) for tensor in tensors]
    together, apart = torch.cuda.current_stream(), streams(torch.cuda.current_device()).side_by_side
    for stream in apart:
        stream.wait_stream(together)
    done: dict[int, Tensor] = {}
    try:
        for turn, number in enumerate(sorted(range(len(tensors)), key=lambda number: -tensors[number].numel())):
            with torch.cuda.stream(apart[turn % _STREAMS]):
                done[number] = work(tensors[number])
    finally:
        for stream in apart:
            together.wait_stream(stream)
    return [done[number] for number in range(len(tensors))]


def _kind(argument: object) -> Hashable:
    return (argument.shape, argument.dtype) if isinstance(argument, Tensor) else argument
