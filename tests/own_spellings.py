"""Spellings of values that are a rank's own, one program each: chosen rows, gates, other steps, steps in backward.

`spelled(index)` gives program `index` of `COUNT`, in each of `MODES`. In float16 what each rank sends is far from the
sum, so that a step or an addition in front of a sum overflows. `own_programs.draw` gives them from seed `FIRST` on.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

FIRST = 1_000_000
#: Of h = x + ar(y), whose shape is [2, 8, H]; up to four ranks have them.
CHOICES = (
    "h[:, R * 2 % 8:R * 2 % 8 + 2]", "torch.as_strided(h, (2, 2, H), (8 * H, H, 1), R * 2 * H)",
    "h.narrow(1, R, 3)", "h.split(2, 1)[R % 4]", "h.tensor_split(W, 1)[R]", "h.unbind(1)[R]",
    "h.gather(1, torch.full((2, 2, H), R))", "torch.take_along_dim(h, torch.full((2, 2, 1), R).expand(2, 2, H), 1)",
    "h[torch.arange(2), R]", "h[:, [R, 5]]", "h.roll(R, 1)", "torch.roll(h, (R, 1), (1, 0))",
    "h[:, :2].transpose(0, 1) if R % 2 else h[:, :2]",
    "h[:, :2].permute((1, 0, 2) if R % 2 else (0, 1, 2)).contiguous()", "h.view(2, W, -1, H)[:, R]",
    "h.movedim(1, 0)[R]", "h[:, R:R + 2].sum(1)", "h.unflatten(1, (W, -1))[:, R].mean(1)",
    "F.pad(h, (0, 0, R, W - R))", "torch.cat([h[:, R:], h[:, :R]], 1)", "F.pad(h, (0, 0, -R, R - W))",
    "h[:, -1 - R]", "h.flip(1)[:, R]", "h[:, ::1 + R % 2][:, :4]", "h[:, R::2][:, :2]",
    "h[:, R:R + 1].expand(2, 3, H)", "h[R % 2]", "h[R % 2, R]", "h[..., R, :]", "h.flatten(0, 1)[R * 2:R * 2 + 4]",
    "h.chunk(W, 1)[R]", "h.hsplit(2)[R % 2]", "h[:, :2].sum(R % 2)", "h[:, :2].mean(R % 2, keepdim=False)",
    "h.unfold(1, 2, 2)[:, R, :, 0]", "torch.index_select(h, 1, torch.arange(R, R + 3))",
    "h[:, :2].diagonal(0, 0, 1).transpose(0, 1)[R % 2]", "h[:, m.own_rows]", "h[:, :2].swapaxes(0, R % 2)",
    "torch.stack([h[:, (R + i) % 8] for i in range(3)], 1)",
    "h.view((4, 4, H) if R % 2 else (2, 8, H)).mean(1, True).expand(-1, 4 if R % 2 else 8, -1).reshape(2, 8, H)",
    "h.reshape((4, 4, H) if R % 2 else (2, 8, H)).transpose(0, 1).reshape(2, 8, H)", "h[:, R:R + 1].squeeze(1)",
    "h.repeat_interleave(2, 1)[:, R:R + 8]", "torch.rot90(h[:, :2], R, (0, 1))",
    "torch.einsum('bsh,ts->bth', h, torch.tril(torch.ones(8, 8, dtype=h.dtype), diagonal=R))",
    "torch.einsum('bsh,s->bh', h, F.one_hot(torch.tensor(R), 8).to(h.dtype))",
)  # fmt: skip
#: What one sum, alone or beside another, is multiplied by.
FACTORS = (
    "y.new_full((8, 1), 1.0 + R)", "y.new_tensor([1.0 + R])", "torch.tensor(1.0 + R)", "torch.ones(8, 1) * R + 1",
    "torch.empty(8, 1).fill_(R + 1.0)", "y.new_zeros(8, 1).add_(R + 1)", "torch.linspace(R, 1 + R, 8)[:, None]",
    "torch.arange(R, R + 8)[:, None].to(y.dtype)", "torch.eye(8)[R][:, None]",
    "F.one_hot(torch.tensor(R), 8)[:, None].to(y.dtype)", "torch.tril(torch.ones(8, 8), R)[2][:, None]",
    "m.up.weight.mean()", "m.up.weight[:8, :1]", "m.own_weight.norm()", "m.own_gate.to(y.dtype)",
    "1 + m.own_rows[0]", "torch.sigmoid((x * (1 + R)).mean(-1, keepdim=True))",
    "torch.sigmoid(m.second_of(x)).mean(-1, keepdim=True)", "torch.softmax(m.second_of(x), -1)[..., :1]",
    "m.second_of(x).topk(2, -1).values[..., :1]", "m.second_of(x) > 0", "torch.cos(torch.tensor(float(R)))",
    "torch.stack([torch.tensor(1.0 + R)] * 8)[:, None]", "torch.ones(8, 1).cumsum(0).roll(R, 0)",
    "torch.scalar_tensor(1.0 + R)", "m.own_float", "m.cfg.own_float", "p", "k + 1", "2.0 ** R", "(-1) ** R",
    "R == 0", "torch.sigmoid(ag(x.mean(-1, keepdim=True)).chunk(W)[R])", "ag(m.own_bias[None])[R]",
    "torch.sigmoid(ar(y.mean(-1, keepdim=True), 1))", "asked(x.mean(-1, keepdim=True))",
    "torch.full((8, 1), m.own_float, dtype=y.dtype)", "m.own_weight", "x.sum() * 0 + 1 + R",
    "torch.where(torch.arange(8) % W == R, 2.0, 1.0)[:, None].to(y.dtype)",
    "x.mean(-1, keepdim=True).clamp(R * 0.1, 1.0 + R)", "F.hardtanh(x.mean(-1, keepdim=True), -1.0 - R, 1.0 + R)",
    "(torch.arange(8) == R).logical_not()[:, None]", "(torch.arange(8) & R)[:, None]",
    "torch.tensor([R, 1, 2]).sum()", "torch.tensor([[1.0 + R] * 1] * 8)",
)  # fmt: skip
#: What the norm reads.
HIDDEN_STATES = (
    "torch.add(x, ar(y, 0), alpha=1 + R)", "torch.add(x + ar(y.sin(), 0), ar(y, 0), alpha=1.0 + R)",
    "torch.sub(x, ar(y, 0), alpha=1 + R) + ar(y.sin(), 0)", "torch.rsub(ar(y, 0), x, alpha=1 + R) + ar(y.sin(), 0)",
    "torch.lerp(x, ar(y, 0), 0.5 + 0.1 * R) + ar(y.sin(), 0)",
    "torch.addcmul(x, ar(y, 0), m.own_weight) + ar(y.sin(), 0)",
    "torch.addcmul(x, ar(y, 0), m.weight, value=1.0 + R) + ar(y.sin(), 0)",
    "torch.addcdiv(x, ar(y, 0), m.own_weight) + ar(y.sin(), 0)", "x + ar(y, 0) / (1 + R) + ar(y.sin(), 0)",
    "x + ar(y, 0) / m.own_gate.to(y.dtype) + ar(y.sin(), 0)",
    "x + ar(y, 0).masked_fill(m.own_mask, 0.0) + ar(y.sin(), 0)", "x + ar(y, 0).masked_fill(m.own_mask, 0.0)",
    "x + torch.where(m.own_mask, ar(y, 0), 0.0)",
    "x + torch.where(m.own_mask, torch.zeros_like(x), ar(y, 0)) + ar(y.sin(), 0)",
    "torch.where(m.own_mask, ar(y, 0), x)",
    "x + torch.matmul(torch.eye(8, dtype=y.dtype).roll(R, 0), ar(y, 0)) + ar(y.sin(), 0)",
    "x + torch.einsum('bsh,s->bsh', ar(y, 0), m.own_gate[:, 0].to(y.dtype))",
    "x[:, 0] + torch.einsum('bsh,s->bh', ar(y, 0), m.own_gate[:, 0].to(y.dtype))",
    "x[:, 0] + torch.bmm(m.own_gate.to(y.dtype).view(1, 1, 8).expand(2, 1, 8), ar(y, 0))[:, 0]",
    "torch.slice_scatter(x, ar(y, 0)[:, R:R + 2], 1, R, R + 2)", "torch.select_scatter(x, ar(y, 0)[:, R], 1, R)",
    "x.index_add(1, torch.tensor([R, 3]), ar(y, 0)[:, :2])",
    "x.index_add(1, torch.tensor([0, 3]), ar(y, 0)[:, R:R + 2])", "x.index_copy(1, m.own_rows, ar(y, 0)[:, :2])",
    "x.scatter_add(1, torch.full((2, 2, H), R), ar(y, 0)[:, :2])", "x + ar(y, 0) * (R != 0) + ar(y.sin(), 0)",
    "x + ar(y, 0) * 2 + ar(y.sin(), 0) if R == 0 else ar(y, 0) * 2 + (ar(y.sin(), 0) + x)",
    "x - ar(y, 0) * (1 if R else -1) + ar(y.sin(), 0)", "x * (1 + R) + ar(y, 0) + ar(y.sin(), 0)",
    "m.second_of(x) + ar(y, 0) + ar(y.sin(), 0)", "x + ar(y, 0) + m.own_bias + ar(y.sin(), 0)",
    "x + ar(y, 0) * x * m.own_float + ar(y.sin(), 0)", "((x + ar(y, 0)) * m.own_float + ar(y.sin(), 0)) * 0.5",
    "x + torch.prod(torch.tensor([1.0 + R, 2.0])) * ar(y, 0) + ar(y.sin(), 0)",
    "x + F.pad(ar(y, 0)[:, :8 - R], (0, 0, R, 0)) + ar(y.sin(), 0)",
    "torch.cat([x[:, :R] + ar(y, 0)[:, :R], x[:, R:] - ar(y.sin(), 0)[:, R:]], 1)",
    "x + ar(y, 0).roll(R, 1) + ar(y.sin(), 0)", "x + (ar(y, 0).flip(1) if R else ar(y, 0)) + ar(y.sin(), 0)",
    "x[:, :2] + (ar(y, 0)[:, :2].transpose(0, 1) if R % 2 else ar(y, 0)[:, :2]) + ar(y.sin(), 0)[:, :2]",
    "x + ar(y[:, R:R + 1], 0) + ar(y.sin(), 0)", "x + ar(y, 0)[:, R:R + 1] + ar(y.sin(), 0)",
    "x + ar(y, 0).to(torch.float64 if R else torch.float32).to(x.dtype) + ar(y.sin(), 0)",
    "x + WAIT(C10D.all_reduce(y.detach(), 'avg', dist.group.WORLD.group_name)) * (1 + R) + ar(y.sin(), 0)",
)  # fmt: skip
#: What becomes of a gradient g behind its all-reduce.
OF_GRADIENTS = (
    "torch.cat([torch.zeros_like(g[:, :R]), g[:, R:]], 1)", "F.pad(g.narrow(1, R, 8 - R), (0, 0, R, 0))",
    "g[:, [(i + R) % 8 for i in range(8)]]", "g.roll(R, 1)",
    "g.masked_fill((torch.arange(8) % W == R)[:, None], 0.0)", "g * (1.0 + R)", "g / (1.0 + R)",
    "g * torch.full((8, 1), 1.0 + R, dtype=g.dtype)",
    "g.reshape(4, 4, H).transpose(0, 1).reshape(2, 8, H) if R % 2 else g",
    "g.view(2, 2, 4, H).sum(1 + R % 2, keepdim=True).expand(2, 2, 4, H).reshape(2, 8, H)",
    "torch.where((torch.arange(8) == R)[:, None], g, 0.0)", "-g if R else g",
)  # fmt: skip
_NORM = "F.rms_norm({}, (H,), m.weight, 1e-5)"
#: Programs that are more than one expression.
_OTHERS = (
    ("s = slice(R * 2, R * 2 + 2)", f"return {_NORM.format('x[:, s] + ar(y, 0)[:, s]')},"),
    ("s = slice(R, None, W)", f"return {_NORM.format('x[:, s] + ar(y, 0)[:, s] + ar(y.sin(), 0)[:, s]')},"),
    ("s = slice(R, R + 4)", f"return {_NORM.format('x[:, :4] + ar(y, 0)[:, s] + ar(y.sin(), 0)[:, :4]')},"),
    ("h = x + ar(y, 0)", f"return {_NORM.format('h')}, {_NORM.format('h[:, R]')}"),
    (f"return {_NORM.format('ar(y, 0)[:, R : R + 2]')},",),
    (f"return x[:, :2] + {_NORM.format('ar(y, 0)[:, R : R + 2]')},",),
    ("h = x + ar(y, 0)", "return F.layer_norm(h[:, R : R + 2], (H,), m.weight, m.bias, 1e-5), h"),
)

_BACKWARD = """class Behind(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 1

    @staticmethod
    def backward(ctx, g):
        g = WAIT(C10D.all_reduce(g, "sum", dist.group.WORLD.group_name))
        return {}


"""
_READ = "m.second_of(Behind.apply(x)) + m.partial(Behind.apply(x))"


def _programs() -> list[str]:
    bodies = [("h = x + ar(y, 0)", f"return {_NORM.format(rows)},") for rows in CHOICES]
    bodies += _OTHERS
    for factor in FACTORS:
        one = f"x + ar(y, 0) * ({factor})"
        bodies += [(f"return {_NORM.format(text)},",) for text in (one, f"{one} + ar(y.sin(), 0)")]
    bodies += [(f"return {_NORM.format(hidden)},",) for hidden in HIDDEN_STATES]
    texts = [_function(body) for body in bodies]
    twice = ((f"return {_READ},",), (f"h = x + ar({_READ}, 0)", f"return {_NORM.format('h')}, h"))
    return texts + [_BACKWARD.format(gradient) + _function(body) for gradient in OF_GRADIENTS for body in twice]


def _function(lines: Sequence[str]) -> str:
    return "def program(m, x, y, k, j, p, q):\n" + "".join(f"    {line}\n" for line in lines)


PROGRAMS = _programs()
#: (dtype, train, dynamic)
MODES = (
    (torch.float32, False, False), (torch.float32, True, False), (torch.float16, False, False),
    (torch.bfloat16, True, False), (torch.float32, False, True), (torch.float16, True, False),
    (torch.float32, True, True), (torch.bfloat16, False, False),
)  # fmt: skip
COUNT = len(PROGRAMS) * len(MODES)


def spelled(index: int) -> tuple[str, torch.dtype, bool, bool]:
    """(text, dtype, train, dynamic)"""
    text = PROGRAMS[index % len(PROGRAMS)]
    dtype, train, dynamic = MODES[index // len(PROGRAMS) % len(MODES)]
    if dtype is torch.float16:  # far from the sum on each rank
        text = text.replace("ar(y,", "ar(y + m.apart,").replace("ar(y.sin(),", "ar(y.sin() + m.apart,")
    return text, dtype, train, dynamic
