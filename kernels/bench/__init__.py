"""Measure the kernels: virtual and linked ranks, and dispatch tables from measurements."""
