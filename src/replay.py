"""Work of a GPU that is recorded once and repeated, as a CUDA graph: one launch instead of hundreds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Generic, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")

_STREAMS = 8
_WARM_UP = 2  # calls in which libraries choose their ways and take their memory, which must not be recorded


class Replay(Generic[P, R]):
    """Call a function as it is at first; then record what it does on the GPU, and from then on repeat that.

    Each combination of shapes and of arguments that are no tensors is recorded by itself.

    Args:
        function: What to repeat. It must not wait for the device, nor depend on anything that changes but the content
            of its arguments and of tensors that stay where they are in memory; what it does to such tensors is
            repeated too. Only its work on the device is: Python's is not.
    """

    def __init__(self, function: Callable[P, R]) -> None:
        self._function = function
        self._calls: Counter[Hashable] = Counter()
        self._recordings: dict[Hashable, _Recording[R]] = {}

    def __call__(self, *arguments: P.args, **_: P.kwargs) -> R:
        """Do what the function does.

        Returns:
            What the function returned when it was recorded: the next call writes to the same tensors.
        """
        place = tuple(_kind(argument) for argument in arguments)
        recording = self._recordings.get(place)
        if recording is None:
            self._calls[place] += 1
            if self._calls[place] <= _WARM_UP:
                return self._function(*arguments)  # type: ignore[call-arg]
            recording = self._recordings[place] = _Recording(self._function, arguments)
        return recording.repeat(arguments)

    def forget(self) -> None:
        """Free all recordings, for what the function does will be something else."""
        self._calls.clear()
        self._recordings.clear()


class _Recording(Generic[R]):
    def __init__(self, function: Callable[..., R], arguments: tuple[Any, ...]) -> None:
        own = [argument.clone() if isinstance(argument, Tensor) else argument for argument in arguments]
        self._replay, self._result = capture(lambda: function(*own))
        kinds: dict[torch.dtype, list[int]] = {}
        for place, argument in enumerate(own):
            if isinstance(argument, Tensor):
                kinds.setdefault(argument.dtype, []).append(place)
        # One launch copies all tensors of a type.
        self._copied = [(places, [own[place] for place in places]) for places in kinds.values()]

    def repeat(self, arguments: tuple[Any, ...]) -> R:
        for places, own in self._copied:
            torch._foreach_copy_(own, [arguments[place] for place in places])
        self._replay()
        return self._result


def capture(work: Callable[[], R]) -> tuple[Callable[[], None], R]:
    """Record some work, which is not done yet.

    Returns:
        What does it, and what it returned: its tensors are filled whenever it is done.
    """
    graph = torch.cuda.CUDAGraph()
    torch.clear_autocast_cache()  # weights that were converted outside are not converted anew by the recording
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # others may write a checkpoint meanwhile
        result = work()
    torch.clear_autocast_cache()
    return graph.replay, result


def side_by_side(work: Callable[[Tensor], Tensor], tensors: Sequence[Tensor]) -> list[Tensor]:
    """Do the same to each of several tensors; within a recording on streams of their own, largest first."""
    if not (tensors and tensors[0].is_cuda and torch.cuda.is_current_stream_capturing()):
        return [work(tensor) for tensor in tensors]
    device = tensors[0].device
    together, streams = torch.cuda.current_stream(device), [torch.cuda.Stream(device) for _ in range(_STREAMS)]
    for stream in streams:
        stream.wait_stream(together)
    done: dict[int, Tensor] = {}
    for turn, place in enumerate(sorted(range(len(tensors)), key=lambda place: -tensors[place].numel())):
        with torch.cuda.stream(streams[turn % _STREAMS]):
            done[place] = work(tensors[place])
    for stream in streams:
        together.wait_stream(stream)
    return [done[place] for place in range(len(tensors))]


def _kind(argument: object) -> Hashable:
    return (argument.shape, argument.dtype) if isinstance(argument, Tensor) else argument
