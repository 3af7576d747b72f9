"""An operation on a rank's own rows and the gather of what it gives, one functional operation each.

    tpfuse::rows_norm_gather                       [*the results of rows_norm, y of all ranks]
    tpfuse::reduce_scatter_norm_gather             [*the results of reduce_scatter_norm, y of all ranks]
    tpfuse::reduce_scatter_norm_backward_gather    [*the results of reduce_scatter_norm_backward, dx of all ranks]

Arguments are those of the operation without the gather, and `swap`: b, where own rows are [a, b, H] and gathered as
[b, a, H]. y or dx: [own rows, H]; of all ranks: [ranks * own rows, H], in the order of the ranks. On every device they
are the functional collectives of the program, in its order: a compiled graph holds those
(passes/rewrite/take_apart.py).

The second and third are one call by copies (kernels/symmetric/exchanged.py) where two ranks can and `overlap` lets
them. A graph that is compiled holds the second then in the forms of lean.py, whose `y` is that of all ranks, and the
third as reduce_backward_ops.py has it; own rows are a part of that, or a copy where the graph returns both.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import backward_ops, ops
from ._torch_private import group_rank, group_size, register_local_tensor_rule
from .kernels.add_norm import add_norm
from .kernels.call import Call
from .kernels.entry import exchange_add_norm
from .lean import define as define_lean
from .product_ops import define as define_behind_product

_LIBRARY = torch.library.Library("tpfuse", "FRAGMENT")
_c10d = torch.ops._c10d_functional


def _define(name: str, arguments: str) -> None:
    operator = getattr(torch.ops.tpfuse, name).default

    def run(*operands: Tensor | None, swap: int | None = None, **options: Any) -> list[Tensor]:
        exchange = _EXCHANGES.get(name)
        if exchange is not None and options.get("overlap") and not swap:
            done = exchange(*operands, **options)
            if done is not None:
                own = done[0].chunk(group_size(options["group_name"]))[group_rank(options["group_name"])]
                return [own.clone(), *done[1:], done[0]]
        made = operator(*operands, **options)
        group_name = options["group_name"]
        rows = made[0]
        if swap:
            rows = rows.view(-1, swap, rows.shape[-1]).transpose(0, 1).reshape(rows.shape)
        pending = _c10d.all_gather_into_tensor(rows, group_size(group_name), group_name)
        return [*made, _c10d.wait_tensor(pending)]

    def fake(*operands: Tensor | None, swap: Any = None, **options: Any) -> list[Tensor]:
        made = operator(*operands, **options)
        rows, hidden = made[0].shape
        return [*made, made[0].new_empty((rows * group_size(options["group_name"]), hidden))]

    full_name = f"tpfuse::{name}_gather"
    arguments = arguments.replace(") -> Tensor[]", ", SymInt? swap=None) -> Tensor[]")
    _LIBRARY.define(f"{name}_gather{arguments}", tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(f"{name}_gather", run, "CompositeExplicitAutograd")
    torch.library.register_fake(full_name, fake, lib=_LIBRARY)
    register_local_tensor_rule(full_name, run)


def _exchange(call: Call, site: Any = None) -> list[Tensor] | None:
    """[y of all ranks, the other results]; None where no kernel does all of it, on all ranks alike."""
    done = exchange_add_norm(call, site)
    return None if done is None else ops._outputs(*done)


_EXCHANGES: dict[str, Any] = {
    "reduce_scatter_norm": lambda *operands, **options: _exchange(Call(*operands, **options)),
    "reduce_scatter_norm_backward": partial(backward_ops.by_copies, True),
}


def _lean(call: Call, site: Any) -> list[Tensor]:
    done = _exchange(call, site)
    if done is not None:
        return done
    call = call.multiplied()
    total = ops._own_share(call.x, call.group_name)
    out = None if call.out is None else replace(call.out, y=total.new_empty(total.shape, dtype=call.out_dtype))
    own = add_norm(replace(call, x=total, out=out))
    pending = _c10d.all_gather_into_tensor(own.y, group_size(call.group_name), call.group_name)
    return ops._outputs(replace(own, y=_c10d.wait_tensor(pending)), total if call.want_sum else None)


_define("rows_norm", ops.ARGUMENTS)
_define("reduce_scatter_norm", ops.ARGUMENTS)
_define("reduce_scatter_norm_backward", backward_ops.ARGUMENTS)
define_lean(_LIBRARY, "reduce_scatter_norm_gather", _lean)
define_behind_product(_LIBRARY, "reduce_scatter_norm_gather", _lean)
