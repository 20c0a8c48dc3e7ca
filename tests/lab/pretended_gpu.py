"""A pretended CUDA device, for processes of their own: tensors that say ``cuda:0`` or ``cuda:1``, keep their numbers in
CPU memory and compute there.

What a GPU refuses is refused: operands on two devices. What a GPU lets happen is kept in :data:`record`: races (two
streams touch the same bytes and neither waits for the other, found with vector clocks), waits (the CPU waits for the
device), uploads, and the bytes that are live. The project's own custom operators run their Python body on these
tensors, so that what happens inside is seen too. PyTorch must be built for CUDA; no driver is needed.
"""

import torch
from comfy_kitchen.tensor import QuantizedTensor
from pretended_streams import (
    DEVICES,
    Stream,
    allocated,
    current_device,
    current_stream,
    indexed,
    on_device,
    record,
    set_device,
    stack,
    synchronize,
    touch,
)
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

aten = torch.ops.aten
_TO = (aten._to_copy.default, aten.to.device, aten.to.dtype, aten.to.dtype_layout, aten.to.other)
#: Operators that take operands on two devices.
_MIXED = (*_TO, aten.copy_.default, aten.index.Tensor, aten.index_put_.default)
_WAITING = (aten._local_scalar_dense.default, aten.item.default, aten.is_nonzero.default, aten.nonzero.default,
            aten.masked_select.default, aten.equal.default)
_new_parameter = torch.nn.Parameter.__new__
_compatible = torch._has_compatible_shallow_copy_type

#: Called with the operands of each of the project's own operators, before it runs.
before_operator: list = []


class DeviceTensor(torch.Tensor):
    """``held``, a CPU tensor, as a tensor of a pretended device."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held, device):
        self = torch.Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            device=device)
        self.held = held
        return self

    def data_ptr(self):
        return self.held.data_ptr()

    def untyped_storage(self):
        return self.held.untyped_storage()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, types, args, kwargs or {})


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, types, args, kwargs or {})


def _run(func, types, args, kwargs):
    if any(issubclass(kind, QuantizedTensor) for kind in types):
        return NotImplemented
    leaves = _leaves(args, kwargs)
    operands = [leaf for leaf in leaves if isinstance(leaf, DeviceTensor)]
    asked = kwargs.get("device") or next((leaf for leaf in leaves if isinstance(leaf, torch.device)), None)
    asked = None if asked is None else indexed(torch.device(asked))
    if not operands and (asked is None or asked.type != "cuda"):
        return func(*args, **kwargs)
    others = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and not isinstance(leaf, DeviceTensor)]
    used = {leaf.device for leaf in operands} | {leaf.device for leaf in others if leaf.dim()}
    if operands and len(used) > 1 and func not in _MIXED:
        raise RuntimeError(f"Expected all tensors to be on the same device: {func}")
    body = OPDEFS.get(func._schema.name) if func.namespace == "bonsai_image" else None
    if body is not None:
        with _Mode():
            for hook in list(before_operator):
                hook(*args)
            return body._init_fn(*args, **kwargs)
    if func in _WAITING:
        record.waits.append((str(func), stack()))
    source = args[1] if func is aten.copy_.default else args[0] if args else None
    target = args[0].device if func is aten.copy_.default else asked or (
        args[1].device if func is aten.to.other else operands[0].device)
    if func in (*_TO, aten.copy_.default) and source.device != target:
        return _transfer(func, source, target, args, kwargs)
    if target.type == "cpu":  # made like a tensor of the device, and without its numbers
        return func(*_held(args), **_held(kwargs))
    return _compute(func, args, kwargs, operands, target)


def _transfer(func, source, target, args, kwargs):
    """A copy from one device to another, into ``args[0]`` or a new tensor."""
    blocking = not (kwargs.get("non_blocking") or any(each is True for each in args))
    if source.device.type == "cpu":
        pinned = any(low <= source.data_ptr() < high for low, high in record.registered.items())
        record.uploads.append((source.nbytes, pinned, stack()))
    if blocking:
        record.waits.append((str(func), stack()))
    devices = [device for device in (source.device, target) if device.type == "cuda"]
    streams = [current_stream(device) for device in devices]
    for stream in streams:
        stream.clock[stream.cuda_stream] += 1
    if len(streams) == 2:  # torch makes each wait for the other
        streams[0].wait_stream(streams[1])
        streams[1].wait_stream(streams[0])
    held = getattr(source, "held", source)
    if func is aten.copy_.default:
        result = getattr(args[0], "held", args[0])
        with _disable_current_modes():
            _copy(result, held)
    else:
        dtype = kwargs.get("dtype") or next((a for a in args if isinstance(a, torch.dtype)), source.dtype)
        with _disable_current_modes():
            result = torch.empty_like(held, dtype=dtype)
            _copy(result, held)
        if target.type == "cuda":
            allocated(result, target)
    if isinstance(source, DeviceTensor):
        touch(held, streams[0], False, str(func))
    if target.type == "cuda":
        touch(result, streams[-1], True, str(func))
    if func is aten.copy_.default:
        return args[0]
    return result if target.type == "cpu" else DeviceTensor(result, target)


def _map(function, value):
    """``function`` of every leaf of an operator's operands or results (pytree's own is several times slower)."""
    if isinstance(value, (list, tuple)):
        return type(value)(_map(function, each) for each in value)
    if isinstance(value, dict):
        return {key: _map(function, each) for key, each in value.items()}
    return function(value)


def _leaves(*values) -> list:
    found: list = []
    _map(found.append, values)
    return found


def _held(operands):
    """``operands`` as the CPU has them."""
    return _map(lambda leaf: leaf.held if isinstance(leaf, DeviceTensor) else torch.device("cpu")
                if isinstance(leaf, torch.device) else leaf, operands)


def _compute(func, args, kwargs, operands, device):
    stream, name, schema = current_stream(device), str(func), func._schema
    stream.clock[stream.cuda_stream] += 1
    plain_args, plain_kwargs = _held(args), _held(kwargs)
    if "device" in plain_kwargs:
        plain_kwargs["device"] = torch.device("cpu")
    written = {a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write}
    view = any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)
    named = {**dict(zip((a.name for a in schema.arguments), args, strict=False)), **kwargs}
    for key, value in named.items():
        for leaf in _leaves(value):
            if isinstance(leaf, DeviceTensor) and not view:
                touch(leaf.held, stream, key in written, name)
    with _disable_current_modes():
        result = _evaluate(func, plain_args, plain_kwargs, bool(written), view)
    if written:
        return next(named[key] for key in named if key in written)
    known = {leaf.held.untyped_storage().data_ptr() for leaf in operands}

    def wrap(leaf):
        if not isinstance(leaf, torch.Tensor):
            return leaf
        if leaf.untyped_storage().data_ptr() not in known:
            allocated(leaf, device)
            touch(leaf, stream, True, name)
        # A view of a normal tensor is a normal tensor, in inference mode too.
        with torch.inference_mode(torch.is_inference_mode_enabled() and not (view and not operands[0].is_inference())):
            return DeviceTensor(leaf, device)

    return _map(wrap, result)


#: Bytes of a tensor from which on its numbers are left untouched (see :func:`count_only`); None computes everything.
_untouched_from: list[int | None] = [None]


def count_only(size: int = 1 << 16) -> None:
    """From now on, allocate results but do not compute those of operands of ``size`` bytes or more.

    Memory that is never touched costs nothing, so a model of full size fits. Numbers that steer a run, such as the
    noise schedule, are small and still right.
    """
    _untouched_from[0] = size


def computes() -> bool:
    return _untouched_from[0] is None


def _large(*tensors) -> bool:
    limit = _untouched_from[0]
    return limit is not None and any(isinstance(leaf, torch.Tensor) and leaf.nbytes >= limit for leaf in tensors)


def _copy(target: torch.Tensor, source: torch.Tensor) -> None:
    if not _large(source):
        target.copy_(source)


def _evaluate(func, args, kwargs, writes: bool, view: bool):
    leaves = _leaves(args, kwargs)
    if view or func in _WAITING or not _large(*leaves):
        return func(*args, **kwargs)
    if writes:
        return None

    def move(leaf, device):
        if isinstance(leaf, torch.device):
            return torch.device(device)
        if not isinstance(leaf, torch.Tensor):
            return leaf
        return torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device=device)

    meta_args, meta_kwargs = _map(lambda leaf: move(leaf, "meta"), (args, kwargs))
    return _map(lambda leaf: move(leaf, "cpu"), func(*meta_args, **meta_kwargs))


class _Driver:
    def cudaHostRegister(self, start, size, _flags):
        record.registered[start] = start + size
        return 0

    def cudaHostUnregister(self, start):
        return int(record.registered.pop(start, None) is None)


def _parameter(cls, data=None, requires_grad=True):
    if isinstance(data, DeviceTensor):
        with torch.inference_mode():
            result = DeviceTensor(data.held, data.device)
        result._is_param = True
        return result
    # In place of ``param.data = ``, which a real module does and which asks for nothing.
    inference = isinstance(data, torch.Tensor) and data.is_inference() and not torch.is_inference_mode_enabled()
    return _new_parameter(cls, data, requires_grad and not inference)


def _set_data(parameter, value):
    # torch cannot turn a parameter of the CPU into one of another type; only scalars of the host are moved like this.
    _data.__set__(parameter, getattr(value, "held", value))


_data = torch.Tensor.data


def install() -> None:
    """Make torch believe in :data:`DEVICES`, for the rest of this process."""
    torch._C._set_only_lift_cpu_tensors(True)
    torch._C._ensureCUDADeviceGuardSet()
    torch._has_compatible_shallow_copy_type = (
        lambda a, b: not (isinstance(a, DeviceTensor) or isinstance(b, DeviceTensor)) and _compatible(a, b))
    torch.nn.Parameter.__new__ = _parameter
    torch.nn.Parameter.data = property(_data.__get__, _set_data)
    cuda = torch.cuda
    cuda._lazy_init = lambda: None
    cuda.is_available = lambda: True
    cuda.device_count = lambda: len(DEVICES)
    cuda.Stream, cuda.stream, cuda.device = Stream, lambda stream: stream, on_device
    cuda.current_stream = lambda device=None: current_stream(indexed(torch.device(device or "cuda")))
    cuda.synchronize, cuda.cudart = synchronize, _Driver
    cuda.current_device = lambda: current_device().index
    cuda.set_device = set_device
    cuda.get_device_name = lambda _device=None: "pretended GPU"
    cuda.get_device_capability = lambda _device=None: (8, 9)
    cuda.is_bf16_supported = lambda including_emulation=True: True
    cuda.empty_cache = cuda.ipc_collect = lambda: None
    cuda.reset_peak_memory_stats = lambda device=None: record.clear()
    cuda.max_memory_allocated = lambda device=None: record.peak[indexed(torch.device(device or "cuda")).index]
    _Mode().__enter__()
