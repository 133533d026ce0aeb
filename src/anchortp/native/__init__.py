"""Kernels of ours for CPUs, compiled where they run."""

from anchortp.native.build import build_kernels, cpu_flags

__all__ = ["build_kernels", "cpu_flags"]
