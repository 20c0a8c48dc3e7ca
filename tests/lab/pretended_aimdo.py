"""comfy-aimdo over CPU memory, and the switches that make ComfyUI believe in the pretended GPU.

A reservation (VBAR) is address space: its pages come when they are asked for, stay while pinned, and hold garbage once
they are taken away. The rules are those of comfy-aimdo's ``model-vbar.c``, with smaller pages. Import the host first.
"""

import ctypes
import itertools
import weakref
from collections import Counter

import comfy.memory_management
import comfy.model_base
import comfy.model_management as management
import comfy.model_patcher
import comfy_aimdo.host_buffer
import comfy_aimdo.model_vbar
import comfy_aimdo.torch
import comfy_aimdo.vram_buffer
import pretended_gpu
import torch
from comfy.cli_args import args
from pretended_gpu import DEVICES, DeviceTensor, record

#: Bytes of a page (32 MB on a GPU, which is more than a whole test model).
PAGE = 1 << 16
_GARBAGE = 0xCD
#: How ComfyUI holds the weights. ``partial``: the old patcher with room for about half of the model.
MODES = ("dynamic", "resident", "partial", "novram", "highvram")
#: Bytes there are for weights on each device, under the key ``bytes``.
room = {"bytes": 20 << 30}


def _memory(size: int) -> torch.Tensor:
    with torch.inference_mode(False):
        return torch.empty(max(int(size), 1), dtype=torch.uint8)


class Reservation:
    """``comfy_aimdo.model_vbar.ModelVBAR``."""

    every: weakref.WeakSet = weakref.WeakSet()
    _priorities = itertools.count()

    def __init__(self, size, device):
        self.bytes, self.device, self.used, self.max_size = _memory(size), device, 0, int(size)
        self.base_addr = self.bytes.data_ptr()
        self.prioritize()
        self.resident: set[int] = set()
        self.pins: Counter[int] = Counter()
        self.serials: Counter[int] = Counter()
        self.every.add(self)

    def __del__(self):
        record.live[self.device] -= len(self.resident) * PAGE

    def alloc(self, size):
        start = -(-self.used // 512) * 512
        self.used = start + size
        return self, self.base_addr + start, size

    def prioritize(self, *_):
        self.limit = -(-self.max_size // PAGE)
        self.priority = next(self._priorities)

    def loaded_size(self):
        return len(self.resident) * PAGE

    def pages(self, start, size):
        return range((start - self.base_addr) // PAGE, -(-(start - self.base_addr + size) // PAGE))

    def drop(self, page):
        if page not in self.resident or self.pins[page]:
            return 0
        self.resident.discard(page)
        record.allocate(DEVICES[self.device], -PAGE)
        if pretended_gpu.computes():
            self.bytes[page * PAGE : (page + 1) * PAGE] = _GARBAGE
        return 1

    def free_memory(self, size):
        pretended_gpu.synchronize()
        freed = 0
        while freed * PAGE < size and self.limit:
            self.limit -= 1
            freed += self.drop(self.limit)
        return freed * PAGE

    def fault(self, start, size):
        pages = self.pages(start, size)
        if pages.stop > self.limit:
            return None
        for page in pages:
            if page not in self.resident:
                self.make_room(len([each for each in pages if each not in self.resident]), page)
                if page >= self.limit:
                    return None
                self.resident.add(page)
                self.serials[page] += 1
                record.allocate(DEVICES[self.device], PAGE)
        self.pins.update(pages)
        return (ctypes.c_uint32 * len(pages))(*(self.serials[page] for page in pages))

    def make_room(self, missing, page):
        """Take pages of others, then those above ``page``: from the end, and never to be had again this prompt."""
        there = sorted((each for each in self.every if each.device == self.device), key=lambda each: each.priority)
        missing -= room["bytes"] // PAGE - sum(len(each.resident) for each in there)
        for each in there:
            while missing > 0 and self.limit > page and each.limit:
                each.limit -= 1
                missing -= each.drop(each.limit)

    def unpin(self, start, size):
        for page in self.pages(start, size):
            self.pins[page] = max(0, self.pins[page] - 1)
            if page >= self.limit:
                self.drop(page)


class HostBuffer:
    """``comfy_aimdo.host_buffer.HostBuffer``: CPU memory that grows in place."""

    def __init__(self, size, prewarm=0, max_grow_size=0, *_):
        self.bytes, self.size = _memory(max(int(max_grow_size), 1 << 20)), 0
        self.base_addr = self.bytes.data_ptr()

    def extend(self, size, **_):
        self.size += size

    def truncate(self, size, **_):
        for start in [start for start in record.registered if 0 <= start - self.base_addr - size < self.size]:
            record.registered.pop(start)
        self.size = size

    def get_raw_address(self):
        return self.base_addr


class DeviceBuffer:
    """``comfy_aimdo.vram_buffer.VRAMBuffer``: where a weight goes that found no room in its reservation."""

    def __init__(self, size, device):
        self.bytes, self.device, self.used = _memory(size), device, 0
        self.base_addr = self.bytes.data_ptr()

    def __del__(self):
        record.live[self.device] -= self.used

    def size(self):
        return self.used

    def get(self, size, offset=0):
        grown = max(self.used, -(-(int(size) + int(offset)) // (16 << 20)) * (16 << 20))
        record.allocate(DEVICES[self.device], grown - self.used)
        self.used = grown
        return self, self.base_addr + offset, size


def _free(device=None, torch_free_too=False):
    device = device or DEVICES[0]
    loaded = sum(each.model.loaded_size() for each in management.current_loaded_models
                 if each.model is not None and each.device == device)
    free = 100 << 30 if device.type == "cpu" else max(0, room["bytes"] - loaded)
    return (free, free) if torch_free_too else free


def pinned_pages() -> int:
    return sum(bool(count) for each in Reservation.every for count in each.pins.values())


def unpin_all() -> None:
    """Forget what was left pinned, so that one fault shows once."""
    for each in list(Reservation.every):
        each.pins.clear()


def evict(*_) -> None:
    """What another model that needs the room does: every page goes that no layer holds."""
    for each in list(Reservation.every):
        each.free_memory(1 << 60)
        each.prioritize()


def install(mode: str) -> None:
    """Start ``mode``, one of :data:`MODES`, in this process."""
    vbar = comfy_aimdo.model_vbar
    vbar.ModelVBAR = Reservation
    vbar.vbar_fault = lambda part: part[0].fault(*part[1:])
    vbar.vbar_unpin = lambda part: part[0].unpin(*part[1:])
    vbar.vbars_analyze = lambda device=None: 0
    comfy_aimdo.host_buffer.HostBuffer = HostBuffer
    comfy_aimdo.vram_buffer.VRAMBuffer = DeviceBuffer
    comfy_aimdo.torch.hostbuf_to_tensor = lambda buffer: buffer.bytes[: buffer.size]
    comfy_aimdo.torch.aimdo_to_tensor = lambda part, device: DeviceTensor(
        part[0].bytes[part[1] - part[0].base_addr :][: part[2]], torch.device(device))
    args.cpu, args.highvram = False, mode == "highvram"
    states = management.VRAMState
    management.cpu_state = management.CPUState.GPU
    management.vram_state = {"novram": states.NO_VRAM, "highvram": states.HIGH_VRAM}.get(mode, states.NORMAL_VRAM)
    management.lowvram_available = True
    management.get_torch_device = lambda: DEVICES[0]
    management.get_all_torch_devices = lambda exclude_current=False: list(DEVICES[exclude_current:])
    management.get_free_memory = _free
    management.get_total_memory = lambda device=None, torch_total_too=False: (
        (24 << 30, 24 << 30) if torch_total_too else 24 << 30)
    management.should_use_fp16 = management.should_use_bf16 = lambda *_, **__: True
    management.soft_empty_cache = lambda force=False: None
    management.synchronize = pretended_gpu.synchronize
    # All the room is for weights.
    management.MIN_WEIGHT_MEMORY_RATIO = 0.0
    management.minimum_inference_memory = management.extra_reserved_memory = lambda: 0
    comfy.model_base.BaseModel.memory_required = lambda *_, **__: 0
    management.MAX_PINNED_MEMORY = 4 << 30
    management.NUM_STREAMS = 2
    comfy.memory_management.aimdo_enabled = mode == "dynamic"
    if mode == "dynamic":
        comfy.model_patcher.CoreModelPatcher = comfy.model_patcher.ModelPatcherDynamic
    pretended_gpu.install()
