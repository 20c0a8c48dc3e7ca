"""GemLite asks for a CUDA device when it is imported; this names one, on which nothing ever runs."""

from types import SimpleNamespace

import torch
import triton


class _Driver:
    utils = SimpleNamespace(get_device_properties=lambda _index: {"max_shared_mem": 101376, "multiprocessor_count": 1})

    def get_current_target(self):
        return SimpleNamespace(backend="cuda", arch=80, warp_size=32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, *_):
        return 0

    def get_device_interface(self):
        return torch.cuda

    def get_benchmarker(self):
        raise AssertionError("GemLite measures candidates: our configuration was not found")

    def is_active(self):
        return True


def install() -> None:
    """Call before the first import of ``gemlite``, in a process of its own."""
    torch.cuda.get_device_capability = lambda *_: (8, 0)
    torch.cuda.get_device_properties = lambda *_: SimpleNamespace(
        name="stub", multi_processor_count=1, major=8, minor=0, total_memory=1 << 30)
    triton.runtime.driver.set_active(_Driver())
