"""Streams of a pretended GPU, and the record of what a GPU lets happen: races, waits, uploads, live bytes."""

import itertools
import sys
import weakref
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

DEVICES = (torch.device("cuda", 0), torch.device("cuda", 1))
#: torch's allocator for CUDA rounds up to it.
_ROUNDING = 512

#: Frames of a call, innermost first, without torch's and those of the pretended device: (file, function).
Stack = tuple[tuple[str, str], ...]


def stack() -> Stack:
    frames, frame = [], sys._getframe(1)
    while frame is not None and len(frames) < 40:
        name = frame.f_code.co_filename
        if "/torch/" not in name and "pretended_" not in name and "comfy_kitchen" not in name:
            frames.append((name, frame.f_code.co_name))
        frame = frame.f_back
    return tuple(frames)


@dataclass
class Record:
    """What happened since :meth:`clear`. ``uploads`` holds (bytes, whether from registered memory, stack)."""

    races: list[tuple[str, str, Stack]] = field(default_factory=list)
    waits: list[tuple[str, Stack]] = field(default_factory=list)
    uploads: list[tuple[int, bool, Stack]] = field(default_factory=list)
    #: Start -> end of CPU memory that is registered with the driver (page-locked).
    registered: dict[int, int] = field(default_factory=dict)
    live: Counter[int] = field(default_factory=Counter)
    peak: Counter[int] = field(default_factory=Counter)

    def clear(self) -> None:
        self.races.clear()
        self.waits.clear()
        self.uploads.clear()
        self.peak = Counter(self.live)

    def allocate(self, device: torch.device, size: int) -> None:
        """``size`` bytes more (or, negative, fewer) are in use on ``device``."""
        self.live[device.index] += size
        self.peak[device.index] = max(self.peak[device.index], self.live[device.index])


record = Record()


class Stream:
    """A stream with a vector clock: how far it has waited for every other."""

    _numbers = itertools.count()
    every: list["Stream"] = []

    def __init__(self, device=None, priority=0):
        self.device = torch.device(device or DEVICES[0])
        self.cuda_stream = next(self._numbers)
        self.clock: Counter[int] = Counter()
        self.every.append(self)

    def wait_stream(self, other: "Stream") -> None:
        self.clock |= other.clock

    def synchronize(self) -> None:
        synchronize()

    def __enter__(self):
        _active[self.device].append(self)

    def __exit__(self, *_):
        _active[self.device].pop()


_active: dict[torch.device, list[Stream]] = {device: [Stream(device)] for device in DEVICES}
_current = [DEVICES[0]]


def current_stream(device: torch.device) -> Stream:
    return _active[device][-1]


def current_device() -> torch.device:
    return _current[-1]


def set_device(device) -> None:
    _current[-1] = indexed(torch.device(device))


@contextmanager
def on_device(device):
    _current.append(torch.device("cuda", device) if isinstance(device, int) else torch.device(device))
    try:
        yield
    finally:
        _current.pop()


def synchronize(*_) -> None:
    """The CPU waits for everything."""
    record.waits.append(("synchronize", stack()))
    for one, other in itertools.permutations(Stream.every, 2):
        one.wait_stream(other)


class _Touches(dict):
    """What one stream did to a storage: (first byte, end, whether written) -> (time, operator)."""

    latest = 0


#: Storage -> stream -> its touches.
_touched: dict[int, dict[int, _Touches]] = {}


def touch(tensor: torch.Tensor, stream: Stream, written: bool, name: str) -> None:
    if tensor.numel() == 0:
        return
    start, streams = tensor.data_ptr(), _touched.setdefault(tensor.untyped_storage().data_ptr(), {})
    end = start + tensor.element_size() * (
        1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True)))
    for other, touches in streams.items():
        # Nothing of a stream can race that this one has waited for.
        if other == stream.cuda_stream or touches.latest <= stream.clock[other]:
            continue
        for (low, high, wrote), (time, operator) in touches.items():
            if (wrote or written) and low < end and start < high and stream.clock[other] < time:
                record.races.append((operator, name, stack()))
    touches = streams.setdefault(stream.cuda_stream, _Touches())
    touches.latest = stream.clock[stream.cuda_stream]
    touches[start, end, written] = touches.latest, name


def indexed(device: torch.device) -> torch.device:
    return _current[-1] if device.type == "cuda" and device.index is None else device


def allocated(held: torch.Tensor, device: torch.device) -> None:
    """Count a new storage until it dies."""
    storage = held.untyped_storage()
    _touched.pop(storage.data_ptr(), None)
    size = -(-storage.nbytes() // _ROUNDING) * _ROUNDING
    record.allocate(device, size)
    weakref.finalize(storage, record.allocate, device, -size).atexit = False
