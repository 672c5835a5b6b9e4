"""CPU kernels in C: built by the system's compiler when first needed (about two seconds, kept in the user's cache), checked
against torch's own operations before they are trusted, and None where any of that fails.

Why C and not `torch.compile`: a cold compile takes longer than many runs, and shapes here change every step
(docs/decisions/0002). Why at all: decoding small rows and the head's pass over a vocabulary are bound by reading memory,
and torch reads it once an operation.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

SOURCE = Path(__file__).with_name("kernels.c")
OFF = "BURNISH_NO_KERNELS"  # set: use torch's operations throughout
FLAGS = (
    *("-O3", "-march=native", "-shared", "-fPIC", "-fopenmp", "-std=gnu11"),
    # what vector sums need of -ffast-math; the whole of it would switch denormal numbers off for the process
    *("-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-fassociative-math"),
)
_SUFFIX = {torch.float32: "f32", torch.bfloat16: "bf16"}
# sampling is in float32; a master in two parts is a bf16 weight's; halved weights are read by float32 rows
_ONLY = {"draw": "f32", "adamw": "bf16", "few_rows_halved": "f32"}
FEW = 4  # rows of `few_rows`
_POINTER, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "overwrite_exp": (_POINTER, _INT, _INT, _FLOAT, _FLOAT, _FLOAT, ctypes.c_int, _POINTER, _POINTER),
    "block_lse": (_POINTER, _INT, _INT, _INT, _FLOAT, _FLOAT, _FLOAT, _POINTER, _POINTER),
    "add_norm": (_POINTER, _POINTER, _POINTER, _POINTER, _INT, _INT, _FLOAT, ctypes.c_int, _POINTER),
    "gated": (_POINTER, _INT, _INT, ctypes.c_int, _POINTER),
    "norm": (_POINTER, _POINTER, _INT, _INT, _FLOAT, ctypes.c_int, _POINTER, _POINTER),
    "norm_backward": (_POINTER, _POINTER, _POINTER, _POINTER, _INT, _INT, ctypes.c_int, _POINTER, _POINTER),
    "gate": (_POINTER, _POINTER, _INT, ctypes.c_int, _POINTER),
    "gate_backward": (_POINTER, _POINTER, _POINTER, _INT, ctypes.c_int, _POINTER, _POINTER),
    **dict.fromkeys(("few_rows", "few_rows_halved"), (_POINTER, _INT, _INT, _INT, _POINTER, _POINTER, _POINTER, _POINTER)),
    "adamw": (*(_POINTER,) * 5, _INT, *(_FLOAT,) * 8),
    "draw_blocks": (_POINTER, _INT, _INT, _INT, _FLOAT, _FLOAT, _FLOAT, *(_POINTER,) * 5, _INT, _INT, _POINTER, _POINTER, _POINTER),
    "draw": (_POINTER, _INT, _INT, _POINTER, _POINTER, _POINTER, _INT, _FLOAT, _POINTER, _POINTER, _POINTER),
    "decode": (
        *(_POINTER, _POINTER, _FLOAT, ctypes.c_int, _POINTER, _POINTER, _POINTER, _POINTER, _POINTER),
        *(_INT, _INT, _INT, _INT, _INT, _FLOAT, _INT, _FLOAT, _POINTER, _POINTER, _POINTER),
    ),
}


def _pointer(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def halves(master: Tensor) -> tuple[Tensor, Tensor]:
    """A float32 tensor as the bf16 one nearest to it (a tie goes away from zero) and the int16 by which their bits differ."""
    bits = master.contiguous().view(torch.int32)
    high = (bits + 0x8000) >> 16
    return high.to(torch.int16).view(torch.bfloat16), (bits - (high << 16)).to(torch.int16)


def whole(high: Tensor, low: Tensor) -> Tensor:
    """The inverse of `halves`."""
    return ((high.view(torch.int16).to(torch.int32) << 16) + low).view(torch.float32)


class Kernels:
    """The library for one dtype. Tensors must be contiguous, on the CPU, and of that dtype unless said otherwise."""

    def __init__(self, library: ctypes.CDLL, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._run: dict[str, Any] = {}
        for name, signature in _SIGNATURES.items():
            function = getattr(library, f"{name}_{_ONLY.get(name, _SUFFIX[dtype])}")
            function.argtypes, function.restype = signature, None
            self._run[name] = function

    def overwrite_exp(self, z: Tensor, scale: float, softcap: float | None, temperature: float, keep: bool) -> tuple[Tensor, Tensor]:
        """z [n, v] becomes exp(y - top), y = softcap(scale z) / temperature, times dy/dz where that varies and `keep`;
        -> top and mass [n, 1] in float32: the largest y and the sum of exp(y - top)."""
        top = torch.empty(len(z), 1)
        mass = torch.empty(len(z), 1)
        self._run["overwrite_exp"](z.data_ptr(), *z.shape, scale, softcap or 0.0, temperature, keep, top.data_ptr(), mass.data_ptr())
        return top, mass

    def block_lse(self, z: Tensor, width: int, scale: float, softcap: float | None, temperature: float) -> tuple[Tensor, Tensor]:
        """log sum exp of each `width` of y [n, v] (the last block short), y = softcap(scale z), and of y / temperature."""
        blocks = -(-z.shape[1] // width)
        own = torch.empty(len(z), blocks)
        warm = own if temperature == 1.0 else torch.empty_like(own)
        self._run["block_lse"](
            z.data_ptr(), *z.shape, width, scale, softcap or 0.0, temperature, own.data_ptr(), None if warm is own else warm.data_ptr()
        )
        return own, warm

    def add_norm(
        self, x: Tensor, y: Tensor | None, after: Tensor | None, before: Tensor | None, epsilon: float, late: bool, out: Tensor | None
    ) -> None:
        """x [n, h] += y, or += norm(y) with weights `after` [h]; then out = norm(x) with weights `before`. Weights float32.

        late: normalised rows are rounded before the weight is multiplied in."""
        self._run["add_norm"](x.data_ptr(), _pointer(y), _pointer(after), _pointer(before), *x.shape, epsilon, late, _pointer(out))

    def norm(self, x: Tensor, weight: Tensor, epsilon: float, late: bool) -> tuple[Tensor, Tensor]:
        """(norm(x) of x [n, h] with weights [h] in float32, 1 / root mean square [n] in float32); `late` as in `add_norm`."""
        out, rstd = torch.empty_like(x), torch.empty(len(x))
        self._run["norm"](x.data_ptr(), weight.data_ptr(), *x.shape, epsilon, late, out.data_ptr(), rstd.data_ptr())
        return out, rstd

    def norm_backward(self, dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, late: bool, trained: bool) -> tuple[Tensor, Tensor | None]:
        """The gradients of `norm` to x [n, h] and, where `trained`, to the weights [h] in float32."""
        dx, dweight = torch.empty_like(x), torch.empty(x.shape[1]) if trained else None
        self._run["norm_backward"](
            dy.data_ptr(), x.data_ptr(), weight.data_ptr(), rstd.data_ptr(), *x.shape, late, dx.data_ptr(), _pointer(dweight)
        )
        return dx, dweight

    def gate(self, gate: Tensor, up: Tensor, gelu: bool) -> Tensor:
        """act(gate) * up, of one shape; act as in `gated`."""
        out = torch.empty_like(up)
        self._run["gate"](gate.data_ptr(), up.data_ptr(), up.numel(), gelu, out.data_ptr())
        return out

    def gate_backward(self, dy: Tensor, gate: Tensor, up: Tensor, gelu: bool) -> tuple[Tensor, Tensor]:
        """The gradients of `gate` to both."""
        dgate, dup = torch.empty_like(gate), torch.empty_like(up)
        self._run["gate_backward"](dy.data_ptr(), gate.data_ptr(), up.data_ptr(), up.numel(), gelu, dgate.data_ptr(), dup.data_ptr())
        return dgate, dup

    def gated(self, both: Tensor, gelu: bool) -> Tensor:
        """act(both[:, :h]) * both[:, h:], both [n, 2 h]; act is silu, or gelu in its tanh form."""
        n, width = both.shape
        out = torch.empty(n, width // 2, dtype=self.dtype)
        self._run["gated"](both.data_ptr(), n, width // 2, gelu, out.data_ptr())
        return out

    def few_rows(self, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Callable[[Tensor], Tensor]:
        """x [n, in] -> [n, sum of out], n at most FEW: the products with weights [out, in] side by side, read once where they lie.

        Rows and biases in float32 may have weights in bfloat16. About as fast as memory is: 1.2 to 1.4 times mkldnn's products of one row in bf16 (docs/notebook.md)."""
        kept, count = [w.detach() for w in weights], len(weights)  # keeps the storages alive: C holds their addresses
        where = (_POINTER * count)(*(w.data_ptr() for w in kept))
        added = (_POINTER * count)(*(None if b is None else b.data_ptr() for b in biases))
        outs = (_INT * count)(*(len(w) for w in kept))
        total, width, few = sum(outs), kept[0].shape[1], self._run["few_rows" if kept[0].dtype == self.dtype else "few_rows_halved"]

        def run(x: Tensor) -> Tensor:
            n = x.shape[0]
            out = torch.empty(n, total, dtype=self.dtype)
            few(x.data_ptr(), n, width, count, where, added, outs, out.data_ptr())
            return out

        run.__dict__["holds"] = kept, list(biases)
        return run

    def adamw(
        self, high: Tensor, low: Tensor, gradient: Tensor, first: Tensor, second: Tensor, *, step: int, rate: float, betas: tuple[float, float],
        epsilon: float, decay: float, divide: float,
    ) -> None:  # fmt: skip
        """Step `step` (the first is 1) of AdamW on a master in two parts (`halves`): bf16 and int16, of one shape with the gradient,
        which is divided by `divide`, and the moments, all float32 and changed in place."""
        c1, c2 = 1.0 - betas[0] ** step, (1.0 - betas[1] ** step) ** 0.5
        self._run["adamw"](
            high.data_ptr(), low.data_ptr(), gradient.data_ptr(), first.data_ptr(), second.data_ptr(), high.numel(), rate, *betas,
            epsilon, decay, c1, c2, divide,
        )  # fmt: skip

    def draw(self, z: Tensor, row: Tensor, key: Tensor, position: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """tokens [m] = argmax of z[row] / temperature + Gumbel noise of (key, position, lane), and their log-probabilities
        at temperature 1. z [n, v] float32; row, key, position [m] int64; the noise is engines.local.sampling.gumbel's, up
        to the rounding of a logarithm."""
        token = torch.empty(len(row), dtype=torch.int64)
        logprob, lse = torch.empty(len(row)), torch.empty(len(z))
        self._run["draw"](
            z.data_ptr(), *z.shape, row.data_ptr(), key.data_ptr(), position.data_ptr(), len(row), temperature, lse.data_ptr(),
            token.data_ptr(), logprob.data_ptr(),
        )  # fmt: skip
        return token, logprob

    def draw_blocks(
        self, z: Tensor, width: int, scale: float, softcap: float | None, temperature: float, own: Tensor, warm: Tensor, row: Tensor, key: Tensor,
        position: Tensor, second: int,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """As `draw`, in two levels: the block by `block_lse`'s own and warm [n, blocks], then the token in it, with noise of the lanes
        from `second` on. z [n, v] as it was given to `block_lse`, temperature above 0."""
        n, m = z.shape[0], row.shape[0]
        token = torch.empty(m, dtype=torch.int64)
        logprob, lse = torch.empty(m), torch.empty(n)
        self._run["draw_blocks"](
            z.data_ptr(), n, z.shape[1], width, scale, softcap or 0.0, temperature, own.data_ptr(), warm.data_ptr(), row.data_ptr(), key.data_ptr(),
            position.data_ptr(), m, second, lse.data_ptr(), token.data_ptr(), logprob.data_ptr(),
        )  # fmt: skip
        return token, logprob

    def decode(
        self, qkv: Tensor, weights: Tensor | None, epsilon: float, late: bool, cos: Tensor | None, sin: Tensor | None,
        keys: Tensor, values: Tensor, length: Tensor, heads: int, scale: float, window: int | None, softcap: float | None, merged: bool,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """Attention of n rows, one token each, to their own slots, which the token joins.

        qkv [n, (H + 2 Hk) D], normed (weights [(H + Hk), D] float32 or None) and rotated (cos, sin [n, D]; sin negative in
        its first half; or None) in place. keys, values [R, Hk, S, D]; length [n] int64, the keys each slot holds before.
        -> out [n, H, D] and, where `merged`, in float32 with lse [n, H], to be merged with blocks of other keys."""
        kv_heads, size, width = keys.shape[1:]
        n = qkv.shape[0]
        out = torch.empty(n, heads, width, dtype=torch.float32 if merged else qkv.dtype)
        lse = torch.empty(n, heads) if merged else None
        self._run["decode"](
            qkv.data_ptr(), _pointer(weights), epsilon, late, _pointer(cos), _pointer(sin), keys.data_ptr(), values.data_ptr(),
            length.data_ptr(), n, heads, kv_heads, width, size, scale, window or 0, softcap or 0.0,
            out.data_ptr() if merged else None, _pointer(lse), None if merged else out.data_ptr(),
        )  # fmt: skip
        return out, lse


# ---- building ---------------------------------------------------------------------------------------------------------


def _cache() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(root) / "burnish" / "kernels"


def _cpu() -> str:
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="ignore") as lines:
            return "".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))
    except OSError:
        return sys.platform


@cache
def library() -> tuple[ctypes.CDLL | None, str]:
    """(the loaded library or None, why). Built for this processor and this source, once a user."""
    if os.environ.get(OFF):
        return None, f"{OFF} is set"
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return None, "no C compiler (cc, gcc or clang) on the path"
    # one OpenMP runtime a process: the one torch brought
    runtime = sorted(Path(torch.__file__).parent.joinpath("lib").glob("libgomp*.so*"))
    name = hashlib.sha256(b"\0".join([SOURCE.read_bytes(), repr((compiler, FLAGS, [p.name for p in runtime])).encode(), _cpu().encode()])).hexdigest()[:24]
    for folder in (_cache(), Path(tempfile.gettempdir()) / f"burnish-{os.getuid() if hasattr(os, 'getuid') else 0}"):
        target = folder / f"{name}.so"
        try:
            if not target.exists():
                folder.mkdir(parents=True, exist_ok=True, mode=0o700)
                unfinished = folder / f".{name}.{os.getpid()}.so"
                line = [*compiler.split(), *FLAGS, str(SOURCE), "-o", str(unfinished), *map(str, runtime[:1]), "-lm"]
                done = subprocess.run(line, capture_output=True, text=True, timeout=120)
                if done.returncode:
                    return None, f"{compiler} failed: {done.stderr.strip().splitlines()[-1] if done.stderr.strip() else done.returncode}"
                os.replace(unfinished, target)
            if target.stat().st_uid not in (0, os.getuid()):
                continue  # somebody else's file is not loaded
            return ctypes.CDLL(str(target)), f"built by {compiler}"
        except (OSError, subprocess.SubprocessError) as error:
            why = str(error)
    return None, f"cannot build or load it: {why}"  # pyright: ignore[reportPossiblyUnboundVariable]


def kernels_for(dtype: torch.dtype, device: str = "cpu") -> Kernels | None:
    """The kernels for this dtype, where they exist and agree with torch on a small problem."""
    return _checked(dtype) if device == "cpu" and dtype in _SUFFIX else None


@cache
def _checked(dtype: torch.dtype) -> Kernels | None:
    found, _ = library()
    if found is None:
        return None
    try:
        kernels = Kernels(found, dtype)
        with torch.inference_mode(False), torch.enable_grad():  # it may be asked for where gradients are off
            return kernels if all(_agrees(kernels, dtype)) else None
    except (AttributeError, OSError):
        return None


def _agrees(kernels: Kernels, dtype: torch.dtype) -> list[bool]:
    """Each kernel against torch on a small problem, in this dtype's rounding."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    def close(a: Tensor, b: Tensor) -> bool:
        return bool(((a.float() - b.float()).abs() <= 16 * torch.finfo(dtype).eps * (1 + b.float().abs())).all())

    agree: list[bool] = []
    z = 4 * random(5, 70)
    for cap in (None, 3.0):
        y: Callable[[Tensor], Tensor] = lambda x, c=cap: (0.5 * x if c is None else c * torch.tanh(0.5 * x / c)) / 0.7  # noqa: E731
        mine = z.clone()
        top, mass = kernels.overwrite_exp(mine, 0.5, cap, 0.7, False)
        want = y(z.float())
        agree += [close(top, want.amax(1, True)), close(mass, (want - top).exp().sum(1, True)), close(mine, (want - top).exp())]
        own, warm = kernels.block_lse(z, 16, 0.5, cap, 0.7)
        agree += [close(b, F.pad(x, (0, 10), value=-torch.inf).unflatten(1, (5, 16)).logsumexp(-1)) for b, x in ((own, 0.7 * want), (warm, want))]
    x, more, w = random(6, 24), random(6, 24), torch.rand(24, generator=generator) + 0.5
    mine, out = x.clone(), torch.empty_like(x)
    kernels.add_norm(mine, more, w, w, 1e-6, False, out)
    total = (x.float() + F.rms_norm(more.float(), (24,), w, 1e-6).to(dtype).float()).to(dtype)
    agree += [close(mine, total), close(out, F.rms_norm(total.float(), (24,), w, 1e-6))]
    both = 3 * random(6, 48)
    gate, up = both.float().chunk(2, -1)
    agree += [close(kernels.gated(both, False), F.silu(gate) * up), close(kernels.gated(both, True), F.gelu(gate, approximate="tanh") * up)]
    for gelu in (False, True):
        gate, up, dy = (3 * random(5, 24)).requires_grad_(), random(5, 24).requires_grad_(), random(5, 24)
        want = (F.gelu(gate.float(), approximate="tanh") if gelu else F.silu(gate.float())) * up.float()
        found = kernels.gate(gate, up, gelu), *kernels.gate_backward(dy, gate, up, gelu)
        agree += [close(p, q) for p, q in zip(found, (want, *torch.autograd.grad(want, (gate, up), dy.float())))]
    x, scale, dy = random(6, 24).requires_grad_(), (torch.rand(24, generator=generator) + 0.5).requires_grad_(), random(6, 24)
    want = F.rms_norm(x.float(), (24,), scale, 1e-6)
    got, rstd = kernels.norm(x, scale, 1e-6, False)
    dx, dscale = kernels.norm_backward(dy, x, scale, rstd, False, True)
    agree += [dscale is not None] + [close(p, q) for p, q in zip((got, dx, dscale), (want, *torch.autograd.grad(want, (x, scale), dy.float()))) if p is not None]
    a, b, bias = random(21, 40), random(9, 40), random(9)
    for n in range(1, FEW + 1):
        x = random(n, 40)
        got = kernels.few_rows((a, b), (None, bias))(x)
        agree += [close(got, torch.cat([F.linear(x.float(), a.float()), F.linear(x.float(), b.float(), bias.float())], -1))]
        if dtype == torch.float32:
            agree += [close(kernels.few_rows((a.bfloat16(),), (None,))(x), F.linear(x, a.bfloat16().float()))]
    plain = z.float()
    token, logprob = kernels.draw(plain, torch.tensor([0, 2, 2, 4]), torch.arange(4), torch.full((4,), 7), 0.7)
    agree += [close(logprob, plain.log_softmax(-1)[torch.tensor([0, 2, 2, 4]), token])]
    own, warm = kernels.block_lse(z, 16, 1.0, None, 0.7)
    token, logprob = kernels.draw_blocks(z, 16, 1.0, None, 0.7, own, warm, torch.tensor([0, 2, 2, 4]), torch.arange(4), torch.full((4,), 7), 1 << 32)
    agree += [close(logprob, plain.log_softmax(-1)[torch.tensor([0, 2, 2, 4]), token])]
    weight, gradient = plain + 1e-3, plain.flip(0)
    high, low = halves(weight)
    first, second = torch.rand(2, *weight.shape, generator=generator)
    m, v = first + (gradient / 2 - first) * 0.2, 0.9 * second + 0.1 * (gradient / 2) ** 2
    want = 0.98 * weight - 0.1 / (1 - 0.8**3) * m / ((v / (1 - 0.9**3)).sqrt() + 1e-6)
    kernels.adamw(high, low, gradient, first, second, step=3, rate=0.1, betas=(0.8, 0.9), epsilon=1e-6, decay=0.2, divide=2.0)
    agree += [bool(torch.allclose(x, y, rtol=1e-5, atol=1e-6)) for x, y in ((whole(high, low), want), (first, m), (second, v))]
    qkv, keys, values = random(3, 8 * 16), random(4, 2, 9, 16), random(4, 2, 9, 16)
    length = torch.tensor([0, 4, 8])
    q, k, v = qkv.clone().view(3, 8, 16).split([4, 2, 2], 1)
    got, lse = kernels.decode(qkv.clone(), None, 1e-6, False, None, None, keys, values, length, 4, 0.3, 5, None, True)
    for i, end in enumerate(length.tolist()):
        agree += [close(keys[i, :, end], k[i]), close(values[i, :, end], v[i])]
        path = slice(max(0, end - 4), end + 1)
        s = 0.3 * torch.einsum("hgd,hsd->hgs", q[i].float().view(2, 2, 16), keys[i, :, path].float())
        agree += [close(got[i], torch.einsum("hgs,hsd->hgd", s.softmax(-1), values[i, :, path].float()).flatten(0, 1))]
        agree += [lse is not None and close(lse[i], s.logsumexp(-1).flatten())]
    return agree
