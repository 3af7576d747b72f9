"""Compile a kernel for Hopper on a machine without a GPU: Triton brings its own assembler."""

from __future__ import annotations

import re
import subprocess
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

NAMES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.float64: "*fp64",
    torch.int8: "*i8",
}


def compile_sm90(kernel: Any, args: tuple, constants: dict[str, Any], num_warps: int) -> Any:
    """The compiled kernel (`.asm`, `.metadata`) for the positional `args` and the constexpr `constants`: tensors are
    taken as 16-byte aligned, integers as unspecialised."""
    signature: dict[str, str] = {}
    constexprs: dict[Any, Any] = {}
    attrs: dict[Any, Any] = {}
    for index, (name, value) in enumerate(zip(kernel.arg_names, args, strict=False)):
        if value is None:
            signature[name] = "constexpr"
            constexprs[(index,)] = None
        elif isinstance(value, torch.Tensor):
            signature[name] = NAMES[value.dtype]
            attrs[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
    for name, value in constants.items():
        if isinstance(value, torch.Tensor):  # given by name
            signature[name] = NAMES[value.dtype]
            attrs[(kernel.arg_names.index(name),)] = [["tt.divisibility", 16]]
            continue
        signature[name] = "constexpr"
        constexprs[(kernel.arg_names.index(name),)] = value
    source = ASTSource(kernel, signature, constexprs, attrs)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": num_warps})


def stack_bytes(compiled: Any, directory: Any) -> int:
    """What a thread keeps in memory because it has too few registers, as the assembled kernel says; PTX does not show
    it. `directory`: for a file."""
    (directory / "kernel.cubin").write_bytes(compiled.asm["cubin"])
    command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", directory / "kernel.cubin"]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    [stack] = re.findall(r"STACK:(\d+)", said)
    return int(stack)
