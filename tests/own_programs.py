"""Random tensor-parallel programs with values that are a rank's own, as source text that can be read and kept.

`draw(seed)` gives a function `program(m, x, y, k, j, p, q)`: x is replicated, y is partial, k and p are a rank's own
numbers, j and q are the same on all ranks; `m` is a `Block`, whose attributes named `own` differ between ranks. A
program is a few rounds of: partial values, one to three sums of them, steps on each sum, an addition, steps on that, a
norm. Some rounds are sequence-parallel: each rank gets the sums of its own rows, and gathers what comes of them; some
sums are a reduce-scatter and an all-gather. Where a step takes a slice start, a size, a mask, a factor, a divisor, a
weight, it may be a rank's own or not. Gates come from inputs, buffers and weights, from what was gathered or summed,
from operators that may ask for the rank, and from an earlier norm, whose own operands may differ between ranks. All
ranks run the same collectives with the same shapes, so eager mode is right whatever is drawn.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch

from .own_parts import HIDDEN, ROWS
from .own_spellings import FIRST, spelled

OWN_INTS = ("dist.get_rank()", "R", "k", "m.own_int", "m.cfg.own_int")
SAME_INTS = ("1", "ONE", "j", "m.same_int", "m.cfg.same_int")
#: Into how many parts rows are viewed.
OWN_SIZES = ("(1 + R % 2)", "m.own_size")
SAME_SIZES = ("2", "m.same_size")
#: From this seed on all programs are trained, and are streams whose gradients are summed as well.
STREAMS = 2_000_000
SUMMED = ("Copied", "Selected", "Scaled")


@dataclass(frozen=True)
class Drawn:
    """A program, and how it is run."""

    seed: int
    text: str
    dtype: torch.dtype
    train: bool
    dynamic: bool
    two_calls: bool

    def __str__(self) -> str:
        how = f"{self.dtype}, train={self.train}, dynamic={self.dynamic}, two_calls={self.two_calls}"
        return f"# seed {self.seed}: {how}\n{self.text}"


def draw(seed: int, short: bool = False) -> Drawn:
    """The program with number `seed`; the same on every rank and in every process. `short`: one round, seldom trained,
    which compiles in a third of the time. From `own_spellings.FIRST` on they are those of own_spellings.py."""
    if seed >= STREAMS:
        return _stream(seed)
    if seed >= FIRST:
        text, dtype, train, dynamic = spelled(seed - FIRST)
        return Drawn(seed, text, dtype, train, dynamic, two_calls=False)
    rng = random.Random(seed)
    dtype = rng.choice([torch.float32] * 4 + [torch.bfloat16, torch.float16])
    # Of numbers of their own, so that the other programs do not depend on them.
    scattered = random.Random(f"rows of {seed}").random() < 0.25
    dynamic = rng.random() < 0.3
    two_calls = dynamic and rng.random() < 0.4
    if scattered:  # a symbolic number of rows in W parts costs minutes
        dynamic = two_calls = False
    train = rng.random() < (0.2 if short else 0.4)
    turns = 1 if short else rng.choice((1, 1, 2))
    writer = _Writer(rng, dtype, seed, sized=not two_calls)
    writer.scattered = scattered
    text = writer.program(turns)
    return Drawn(seed, text, dtype, train, dynamic, two_calls)


def _stream(seed: int) -> Drawn:
    """Two rounds of which the gradients are summed over the ranks as well: what each norm's backward pass reads is a
    sum, which it may be one operation with."""
    rng = random.Random(seed)
    dtype = rng.choice([torch.float32] * 4 + [torch.bfloat16, torch.float16])
    writer = _Writer(rng, dtype, seed, sized=True)
    writer.scattered = rng.random() < 0.4
    writer.copied = True
    return Drawn(seed, writer.program(2), dtype, train=True, dynamic=False, two_calls=False)


class _Writer:
    """Writes one program. `sized`: the number of rows is always ROWS, so that buffers of so many may be used."""

    def __init__(self, rng: random.Random, dtype: torch.dtype, seed: int, sized: bool):
        self.rng, self.dtype, self.sized = rng, dtype, sized
        #: For kinds that came later.
        self.more = random.Random(f"more of {seed}")
        #: Values of an earlier norm, with the shape of x.
        self.earlier: list[str] = []
        self.lines: list[str] = []
        self.count = 0
        #: Whether rows were chosen before: a second choice of them might find too few.
        self.few = False
        #: Whether a round may be sequence-parallel.
        self.scattered = False
        #: Whether the gradients of all that is read by a layer are summed.
        self.copied = False
        #: How much of what is drawn is a rank's own: in some programs nothing is, and there everything fuses.
        self.own_share = rng.choice((0.0, 0.3, 0.6))

    def own(self) -> bool:
        return self.rng.random() < self.own_share

    def let(self, text: str, name: str = "v") -> str:
        self.count += 1
        self.lines.append(f"{name}{self.count} = {text}")
        return f"{name}{self.count}"

    def program(self, turns: int) -> str:
        stream, source, out, cube, full = "x", "y", "", True, True
        given = []
        if self.more.random() < 0.3:
            stream = self._earlier_norm()
        for turn in range(turns):
            if turn:
                source = self._partial(out, cube)
            if self.scattered and cube and full:
                stream, out, sums = self._scattered_round(stream, source)
            else:
                stream, out, sums, cube, full = self._round(stream, source, cube, full)
            self.few = self.few or not full
            given += [*sums, stream]
            if cube and full:
                self.earlier += [stream, out]
        results = ["out0"]
        self.lines.append(f"out0 = {out} + {stream}" if self.rng.random() < 0.3 else f"out0 = {out}")
        if self.rng.random() < 0.3:
            results.append(self.rng.choice(given))
        lines = [*self.lines]
        if self.rng.random() < 0.25:
            # What one rank alone hands out: detached, so that its backward pass has the collectives of its peers'.
            extra = self.rng.choice(given)
            extra = self.rng.choice((f"{extra}.detach()", f"{extra}.detach().abs().sum()", f"{extra}.detach() * 2"))
            lines += [
                f"if {self.rng.choice(('R', 'dist.get_rank()'))} == {self.rng.choice((0, 1))}:",
                f"    return {', '.join([*results, extra])},",
            ]
        lines.append(f"return {', '.join(results)},")
        return "def program(m, x, y, k, j, p, q):\n" + "".join(f"    {line}\n" for line in lines)

    def _earlier_norm(self) -> str:
        """A boundary before the others; gives what their residual stream is."""
        total = self.let(f"ar(y.cos(), {self.more.choice((0, 0, 1))})", "s")
        residual = f"x * {self._number()}" if self.own() else "x"
        term = f" + {'m.own_bias' if self.own() else 'm.bias'}" if self.more.random() < 0.3 else ""
        hidden = self.let(f"{residual} + {total}{term}", "h")
        normed = self.let(self._norm(hidden), "e")
        self.earlier += [hidden, normed]
        return self.more.choice(("x", hidden, normed))

    def _partial(self, of: str, cube: bool) -> str:
        copied = f"Copied.apply({of})"
        layers = [f"m.partial({of})", f"m.second_of({of})", f"m.partial({copied})", f"m.second_of({of}).tanh()"]
        if cube:
            layers += [
                f"m.second_of(Copied.apply({of})) + m.partial(Copied.apply({of}))",
                f"m.second_of(Selected.apply({of})) + m.partial(Selected.apply({of}))",
                f"m.second_of(Scaled.apply({of})) * m.partial(Scaled.apply({of}))",
                f"m.second_of({of}) + Gather.apply({of}).unflatten(0, (W, -1)).mean(0).sin()"
                f" + Gather.apply({of})[: {of}.shape[0]]",
            ]
        if self.copied:
            layers = [layer for layer in layers if any(f"{kind}.apply({of})" in layer for kind in SUMMED)]
        return self.let(self.rng.choice(layers), "y")

    # -- values that are a rank's own, or not -------------------------------------------------------------------------

    def _int(self) -> str:
        return self.rng.choice(OWN_INTS if self.own() else SAME_INTS)

    def _number(self) -> str:
        own = self.own()
        name = "own" if own else "same"
        whole = self.rng.choice(OWN_INTS if own else SAME_INTS)
        return self.rng.choice((
            f"(1.0 + {whole})", f"({whole} + 1)", f"(0.5 + 0.25 * {whole})",
            f"m.{name}_float", f"m.cfg.{name}_float", "p" if own else "q",
        ))  # fmt: skip

    def _mask(self, of: str, full: bool) -> str:
        own = self.own()
        number = self.rng.choice(OWN_INTS if own else SAME_INTS)
        masks = [f"(torch.arange({of}.shape[-2]) % W == {number})[:, None]"]
        if full and self.sized:
            masks += [f"m.{'own' if own else 'same'}_mask"]
        if own:
            masks.append(f"({of if of == 'y' else 'y'}.mean(-1, keepdim=True) > 0)" if full else masks[0])
        return self.rng.choice(masks)

    def _later_gate(self, full: bool) -> str:
        """A gate of what was gathered or summed, of an operator that may ask for the rank, of an earlier norm."""
        own = self.own()
        i = self.more.choice(OWN_INTS if own else SAME_INTS)
        ask = "asked" if own else "unasked"
        if not full:
            vector = self.more.choice(("own_bias", "own_weight"))
            return self.more.choice((
                f"torch.sigmoid(ag(m.{vector}[None])[{i}])", f"ag(m.{vector}[None]).mean(0) * {self._number()}",
                f"{ask}(m.bias)", f"torch.sigmoid(ar(m.own_bias, {self.more.choice((0, 1))}))",
            ))  # fmt: skip
        rows = f"{self.more.choice('xy')}.mean(-1, keepdim=True)"
        gates = [
            f"torch.sigmoid(ag({rows}).unflatten(0, (W, -1))[{i}])",
            f"torch.sigmoid(ag({rows}).unflatten(0, (W, -1)).amax(0)) * {self._number()}",
            f"torch.sigmoid(ag({rows}).chunk(W)[{i}])",
            f"{ask}(x.mean(-1, keepdim=True))", f"{ask}({rows})",
            f"torch.sigmoid(ar(y.mean(-1, keepdim=True), {self.more.choice((0, 1, 2))}))",
        ]  # fmt: skip
        gates += [f"torch.sigmoid({e}.mean(-1, keepdim=True))" for e in self.earlier] * 2
        return self.more.choice(gates)

    def _gate(self, of: str, full: bool, like: str) -> str:
        own = self.own()
        gates = [f"torch.full(({of}.shape[-2], 1), {self._number()}, dtype={of}.dtype)"]
        gates.append("m.own_weight" if own else "m.weight")
        if full:
            gates += [f"torch.sigmoid({'y' if own else 'x'}.mean(-1, keepdim=True))"]
            if self.sized:
                name = "own" if own else "same"
                gates.append(f"m.{name}_gate.to({of}.dtype)")
                gates.append(f"m.up.weight[:{ROWS}, :1]" if own else gates[-1])
        elif not own:
            gates += [f"torch.sigmoid({like}.mean(-1, keepdim=True))"]
        return self.rng.choice(gates)

    # -- steps --------------------------------------------------------------------------------------------------------

    def _step(self, v: str, full: bool, like: str) -> str:
        """A step that keeps the shape."""
        kind = self.rng.choice(("number", "number", "divisor", "gate", "gate", "mask", "mask", "view", "cast", "neg"))
        if self.more.random() < 0.35:
            kind = self.more.choice(("later gate", "later gate", "size"))
        if kind == "number":
            text = f"{v} * {self._number()}" if self.rng.random() < 0.7 else f"{self._number()} * {v}"
        elif kind == "divisor":
            text = f"{v} / {self.rng.choice((self._number(), f'(1.0 + {self._mask(v, full)}.to({v}.dtype))'))}"
        elif kind == "gate":
            text = f"{v} * {self._gate(v, full, like)}"
        elif kind == "mask":
            mask = self._mask(v, full)
            text = self.rng.choice((
                f"{v} * {mask}.to({v}.dtype)", f"torch.where({mask}, {v}, 0.0)",
                f"{v}.masked_fill({mask}, 0.0)", f"{v} * {mask}", f"torch.where({mask}, {v}, {v} * 2)",
            ))  # fmt: skip
        elif kind == "later gate":
            text = f"{v} * {self._later_gate(full)}"
        elif kind == "size":
            n = self.more.choice(OWN_SIZES if self.own() else SAME_SIZES)
            text = self.more.choice((
                f"{v}.reshape({n}, -1, H).flip(0).reshape({v}.shape)",
                f"{v}.reshape({n}, -1, H).transpose(0, 1).reshape({v}.shape)",
                f"({v}.reshape({n}, -1, H) * torch.arange(1, 1 + {n}, dtype={v}.dtype)[:, None, None])"
                f".reshape({v}.shape)",
            ))  # fmt: skip
        elif kind == "view":
            text = self.rng.choice((f"{v}.reshape(-1, H).view({v}.shape)", f"{v}.transpose(0, -2).transpose(0, -2)",
                                    f"{v}.flip(0)", f"{v}.unsqueeze(0).squeeze(0)"))  # fmt: skip
        elif kind == "cast":
            text = f"({v}.to(ACC) * {self._number()}).to({v}.dtype)"
        else:
            text = f"-{v}"
        return self.let(text)

    def _selection(self) -> tuple[str, bool]:
        """A template for a choice of rows or a sum of them, and whether three dimensions are left."""
        i = self._int()
        rows = "own_rows" if self.own() else "same_rows"
        n = "($.shape[1] // W)"
        cubes = [
            f"$[:, {i} * {n} : {i} * {n} + {n}]", f"$.narrow(1, {i}, 2)", f"$[:, {i}::W]", f"$[:, {i} : {i} + 3]",
            f"$.index_select(1, torch.tensor([{i}, 2]))", f"$.chunk(W, 1)[{i}]", f"$.index_select(1, m.{rows})",
            f"$[:, m.{rows}]", "$[:, :-1]", f"$.unflatten(1, (W, -1))[:, {i}]", f"$.roll({i}, 1)",
        ]  # fmt: skip
        flats = [
            f"$.select(1, {i})", f"$[:, {i}]", "$[:, -1]", f"$[:, -1 - {i}]", "$.sum(1)", "$.mean(1)",
            f"$[:, :2].sum({i} % 2)", f"$[{i} % 2]",
        ]  # fmt: skip
        cube = self.rng.random() < 0.6
        return self.rng.choice(cubes if cube else flats), cube

    def _norm(self, h: str) -> str:
        weight = self.rng.choice(("m.own_weight" if self.own() else "m.weight", "m.weight", "None"))
        bias = self.rng.choice(("m.own_bias" if self.own() else "m.bias", "None"))
        eps = f"1e-5 * (1 + {self._int()})" if self.own() else "1e-5"
        return self.rng.choice((
            f"F.rms_norm({h}, ({HIDDEN},), {weight}, {eps})", f"F.rms_norm({h}, ({HIDDEN},), {weight}, {eps})",
            f"by_hand_rms({h}, {weight}, {eps}, ACC)", f"by_hand_layer({h}, {weight}, {bias}, {eps}, ACC)",
            f"F.layer_norm({h}, ({HIDDEN},), {weight}, {bias}, {eps})",
        ))  # fmt: skip

    def _round(self, stream: str, source: str, cube: bool, full: bool) -> tuple[str, str, list[str], bool, bool]:
        """(the residual stream, the normed value, the sums, whether they have three dimensions, all rows)"""
        sums = []
        for index in range(self.rng.choice((1, 1, 2, 2, 3))):
            partial = source if not index else f"{source}{self.rng.choice(('.sin()', '.flip(0)', ' * 2', '.flip(-1)'))}"
            if self.rng.random() < 0.25:
                partial = f"{partial} + m.apart"
            group = self.rng.choice((0, 0, 0, 1, 2))
            if cube and not self.few and self.sized and self.more.random() < 0.15:
                sums.append(self._in_two(partial, stream))
            else:
                sums.append(self.let(f"ar({partial}, {group})", "s"))
        paid = list(sums)
        selection, still = self._selection() if cube and not self.few and self.rng.random() < 0.35 else ("$", cube)
        early = self.rng.random() < 0.4
        selected = selection != "$"
        terms = []
        for v in sums:
            for _ in range(self.rng.choice((0, 1, 1, 2))):
                v = self._step(v, full, stream)
            terms.append(self.let(selection.replace("$", v)) if early and selected else v)
        base = stream
        if early and selected:
            base = self.let(selection.replace("$", stream))
        if self.own() and self.rng.random() < 0.5:
            terms.append(self.rng.choice(("m.own_bias", f"0.1 * {self._int()}", "m.own_weight * 0.5")))
        elif self.rng.random() < 0.2:
            terms.append("m.bias")
        if self.earlier and full and still and not selected and self.more.random() < 0.3:
            terms.append(f"0.5 * {self.more.choice(self.earlier)}")
        post = self.rng.random() < 0.1
        whole = terms[:] if post or self.rng.random() < 0.1 else [base, *terms]
        if self.rng.random() < 0.3:
            whole = [*whole[1:], whole[0]]
        if whole[0].startswith(("m.", "0.1")):
            whole = whole[::-1]
        text = whole[0]
        for term in whole[1:]:
            text += f" {self.rng.choice('++-')} {term}"
        h = self.let(text, "h")
        full_now = full and not (early and selected)
        if self.rng.random() < 0.2:
            h = self._step(h, full_now, base)
        if selected and not early:
            h = self.let(selection.replace("$", h), "h")
            base, full_now = self.let(selection.replace("$", base)), False
        out = self.let(self._norm(h), "n")
        if post:
            out = self.let(f"{base} + {out}")
        return (out if post else h), out, paid, still, full_now

    def _in_two(self, partial: str, like: str) -> str:
        """A sum that is scattered and gathered, with or without a step on a rank's rows in between."""
        v = self.let(f"rs(({partial}).flatten(0, 1))", "s")
        if self.more.random() < 0.5:
            v = self._step(v, False, f"{like}.flatten(0, 1).chunk(W)[R]")
        return self.let(f"ag({v}).view({like}.shape)", "s")

    def _scattered_round(self, stream: str, source: str) -> tuple[str, str, list[str]]:
        """A round on each rank's own rows, where steps may well be its own."""
        sums, terms = [], []
        base = self.let(f"{stream}.flatten(0, 1).chunk(W)[R]")
        for index in range(self.rng.choice((1, 1, 2))):
            partial = source if not index else f"{source}{self.rng.choice(('.sin()', '.flip(0)', ' * 2'))}"
            if self.rng.random() < 0.25:
                partial = f"{partial} + m.apart"
            rows = f"({partial}).flatten(0, 1)"
            if index and self.rng.random() < 0.5:
                sums.append(self.let(f"ar({rows}, 0)", "s"))
                v = self.let(f"{sums[-1]}.chunk(W)[R]")
            else:
                v = self.let(f"rs({rows})", "s")
                sums.append(v)
            for _ in range(self.rng.choice((0, 0, 1))):
                v = self._step(v, False, base)
            terms.append(v)
        h = self.let(f" {self.rng.choice('++-')} ".join(self.rng.sample([base, *terms], len(terms) + 1)), "h")
        if self.rng.random() < 0.2:
            h = self._step(h, False, base)
        n = self.let(self._norm(h), "n")
        whole = [self.let(f"ag({v}).unflatten(0, {stream}.shape[:2])") for v in (h, n)]
        return whole[0], whole[1], sums
