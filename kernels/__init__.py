"""Triton kernels for the fused boundary, their references, and how a group of ranks meets."""
