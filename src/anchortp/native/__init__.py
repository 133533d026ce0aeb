"""Kernels of ours for CPUs, compiled where they run."""

from anchortp.native.build import build_kernels, cpu_flags
from anchortp.native.library import GroupMemory, Layer, Library, Rows, Shapes

__all__ = ["GroupMemory", "Layer", "Library", "Rows", "Shapes", "build_kernels", "cpu_flags"]
