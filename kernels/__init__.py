"""Triton kernels, their workspaces, dispatch and references."""
