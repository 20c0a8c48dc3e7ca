"""Functions in LLVM IR, made with llvmlite and compiled on this machine: what the kernels beside are written in.

A kernel is a Python function that appends instructions to a :class:`Builder`. IR in one paragraph: ``<16 x i32>`` is a
vector, whatever registers the machine has for it. ``shufflevector`` picks lanes of two vectors, ``lshr`` shifts right,
``bitcast`` reinterprets. Names that begin with ``llvm.`` are intrinsics, which become one instruction or a few. BF16 is
handled as ``i16``, the upper half of a float.
"""

import ctypes
import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir

F32, I8, I16, I32, I64, POINTER = ir.FloatType(), *map(ir.IntType, (8, 16, 32, 64)), ir.PointerType()
VECTOR = ir.VectorType


def const(lanes: int, kind: ir.Type, values: Any) -> ir.Constant:
    """A constant vector: one value in all lanes, or one for each."""
    return ir.Constant(VECTOR(kind, lanes), list(values) if isinstance(values, Iterable) else [values] * lanes)


def number(value: ir.Value | int) -> ir.Value:
    return I64(value) if isinstance(value, int) else value


class Builder(ir.IRBuilder):
    """llvmlite's builder of instructions, with loops, variables, vectors and arithmetic on indices."""

    def plus(self, *terms: ir.Value | int) -> ir.Value:
        return functools.reduce(self.add, map(number, terms))

    def times(self, *factors: ir.Value | int) -> ir.Value:
        return functools.reduce(self.mul, map(number, factors))

    def least(self, a: ir.Value, b: ir.Value) -> ir.Value:
        return self.select(self.icmp_signed("<", a, b), a, b)

    def at(self, base: ir.Value, element: ir.Type, index: ir.Value | int) -> ir.Value:
        """``&base[index]``, counted in ``element``."""
        return self.gep(base, [number(index)], source_etype=element)

    def read(self, base: ir.Value, element: ir.Type, index: ir.Value | int, lanes: int = 0) -> ir.Value:
        """``base[index]``, or a vector of so many ``lanes`` from there."""
        return self.load(self.at(base, element, index), typ=VECTOR(element, lanes) if lanes else element, align=1)

    def write(self, value: ir.Value, base: ir.Value, element: ir.Type, index: ir.Value | int) -> None:
        self.store(value, self.at(base, element, index), align=1)

    def splat(self, value: ir.Value, lanes: int) -> ir.Value:
        one = self.insert_element(ir.Constant(VECTOR(value.type, lanes), ir.Undefined), value, I32(0))
        return self.shuffle(one, one, [0] * lanes)

    def shuffle(self, a: ir.Value, b: ir.Value, lanes: list[int]) -> ir.Value:
        return self.shuffle_vector(a, b, const(len(lanes), I32, lanes))

    def intrinsic(self, name: str, result: ir.Type, *args: ir.Value) -> ir.Value:
        kind = ir.FunctionType(result, [arg.type for arg in args])
        return self.call(self.module.globals.get(name) or ir.Function(self.module, kind, name), args)

    def variable(self, start: ir.Value) -> ir.Value:
        """A slot that :meth:`get` and ``store`` use; LLVM turns it into a register."""
        with self.goto_entry_block():
            slot = self.alloca(start.type)
        self.store(start, slot)
        return slot

    def get(self, slot: ir.Value) -> ir.Value:
        """The value in a variable."""
        return self.load(slot, typ=slot.allocated_type)

    @contextmanager
    def loop(self, stop: ir.Value | int, step: int = 1) -> Iterator[ir.Value]:
        """``for index in range(0, stop, step)``, at least once."""
        slot, body, end = self.variable(I64(0)), self.append_basic_block(), self.append_basic_block()
        self.branch(body)
        self.position_at_end(body)
        index = self.get(slot)
        yield index
        following = self.plus(index, step)
        self.store(following, slot)
        self.cbranch(self.icmp_signed("<", following, number(stop)), body, end)
        self.position_at_end(end)

    def bfloat16(self, value: ir.Value) -> ir.Value:
        """A vector of floats as BF16, half to even. In integers: not every CPU has an instruction, and those that have
        one make zeros of subnormal numbers. NaN stays NaN unless its low bits are all set, which no arithmetic does."""
        lanes = value.type.count
        bits = self.bitcast(value, VECTOR(I32, lanes))
        odd = self.and_(self.lshr(bits, const(lanes, I32, 16)), const(lanes, I32, 1))
        bits = self.add(self.add(bits, const(lanes, I32, 0x7FFF)), odd)
        return self.trunc(self.lshr(bits, const(lanes, I32, 16)), VECTOR(I16, lanes))


#: A job in memory, 64-bit words: the next piece, the number of pieces, the next worker, then the arguments.
JOB_HEADER = 3
#: A compiled kernel, called with the address of a job. The GIL is released meanwhile.
KERNEL = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def assemble(kernel: Callable[..., None], **constants: Any) -> str:
    """The IR of ``kernel`` as text: a function of a job, which takes one piece after the other until none is left.

    Threads that are given the same job share its pieces. The annotations of ``kernel`` are the types of its arguments;
    the first two are the number of the thread, in the order in which they come, and that of the piece.
    """
    kinds = [hint.__metadata__[0] for hint in kernel.__annotations__.values() if hasattr(hint, "__metadata__")]
    module = ir.Module()
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [POINTER]), "kernel")
    b, job = Builder(function.append_basic_block()), function.args[0]
    worker = b.atomic_rmw("add", b.at(job, I64, 2), I64(1), "monotonic")
    arguments = [b.read(job, kind, JOB_HEADER + i) for i, kind in enumerate(kinds[2:])]
    following, body, end = (b.append_basic_block() for _ in range(3))
    b.branch(following)
    b.position_at_end(following)
    piece = b.atomic_rmw("add", job, I64(1), "monotonic")
    b.cbranch(b.icmp_signed("<", piece, b.read(job, I64, 1)), body, end)
    b.position_at_end(body)
    kernel(b, worker, piece, *arguments, **constants)
    b.branch(following)
    b.position_at_end(end)
    b.ret_void()
    return str(module)


def target(cpu: str, features: str) -> llvm.TargetMachine:
    """The machine to compile for by LLVM's names; no ``cpu``: this one."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    if not cpu:
        cpu, features = llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten()
    return llvm.Target.from_default_triple().create_target_machine(cpu=cpu, features=features, opt=3)


def build(text: str, machine: llvm.TargetMachine) -> Callable[[Any], None]:
    """What :func:`assemble` returns as a :data:`KERNEL`.

    Of LLVM's passes over IR only the one that turns variables into registers is needed.
    """
    module = llvm.parse_assembly(text)
    module.verify()
    passes = llvm.create_new_module_pass_manager()
    passes.add_sroa_pass()
    passes.run(module, llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options()))
    engine = llvm.create_mcjit_compiler(module, machine)
    engine.finalize_object()
    function = KERNEL(engine.get_function_address("kernel"))
    function.engine = engine  # type: ignore[attr-defined]  # owns the code
    return function


@functools.cache
def compiled(kernel: Callable[..., None], cpu: str, features: str, **constants: Any) -> Callable[[Any], None]:
    """``kernel`` as a function for such a machine, compiled once a process in some 20 ms."""
    return build(assemble(kernel, **constants), target(cpu, features))
