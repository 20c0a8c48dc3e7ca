"""Kernels for CPUs, compiled on the machine by llvmlite: the backend, and what it compiles."""
