"""Kernels over symmetric memory: one file a kernel, their workspaces, dispatch and time limits."""
