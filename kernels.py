"""Log-prob, entropy and exact KL of every token, from logits or straight from hidden states: plain torch and Triton.

The [N, V] logits are where RL of language models runs out of memory and time. A loss needs four numbers per token
(those and the reference's log-prob), so four are what this file returns; ratios, clipping, k1/k3 and advantages stay in
torch on [N].

Legend: N tokens, V vocabulary, H hidden width, C tokens of a chunk; x logits, t = softcap(x) / temperature the scaled
logits, p = softmax(t); u and q are t and p of the reference policy; y the target. For every row

    z_j = t_j - m   m = max t    e_j = exp z_j    s = sum e         p_j = e_j / s    log p_j = z_j - log s
    w_j = u_j - n   n = max u                     r = sum exp w                      log q_j = w_j - log r
    D_j = z_j - w_j              <f> = sum p f    so that <z> = sum(e z) / s and <D> = sum(e D) / s

    log p_y = z_y - log s        H = log s - <z>            KL(p||q) = <D> + log(r / s)

Subtracting the maximum leaves no lse - E[x] to cancel; averaging the *difference* D makes KL(x||x) exactly 0. In one
pass (online softmax) the maxima grow to m', n': with a = exp(m - m'), dm = m - m', dn = n - n' and the old s,
    sum(e z) -> a (sum(e z) + dm s)      sum(e D) -> a (sum(e D) + (dm - dn) s)      s -> a s      r -> exp(dn) r
which also merges the parts of a row. Backward: whatever the loss, its gradient is affine in z and D row by row,
    dt_j = p_j [ -g_logp - g_H (z_j - <z>) + g_KL (D_j - <D>) ] + g_logp 1{j = y}           dx_j = dt_j * dt_j/dx_j
so one elementwise kernel and five saved numbers per row (m, s, <z>, n, <D>) serve every loss.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

try:
    import triton
    import triton.language as tl
except ImportError:
    # macOS, Windows: the torch path
    triton = None
jit, constant = (triton.jit, tl.constexpr) if triton else (lambda kernel: kernel, float)

# Logits of a tile: one warp, 32 a lane, four 128-bit loads in bf16; more warps would pay for barriers.
BLOCK = 1024
# One-warp programs that fill the 132 multiprocessors of an H100 or H200.
ROW_PROGRAMS = 132 * 32
# parts of a row, when there are too few rows
MAX_SPLITS = 64

# z where p = 0: a product with it is 0, with -inf it would be NaN.
LOWEST = -1.0e30
# D where the reference has no mass, for the same reason; V of them still add up to a finite number.
HIGHEST = 1.0e33
# A KL above this can only stem from such a D: it is reported as +inf.
INFINITE = 1.0e15


class TokenStats(NamedTuple):
    """fp32 [N] each, zero where the target is negative; `kl` and `ref_logp` are None without a reference."""

    logp: Tensor
    entropy: Tensor
    kl: Tensor | None = None
    ref_logp: Tensor | None = None


class _Options(NamedTuple):
    temperature: float
    softcap: float
    impl: str
    chunk_size: int

    def scale(self, logits: Tensor) -> Tensor:
        if self.impl == "torch":
            return scaled_logits(logits, self.temperature, self.softcap)
        # rounded as in the kernels, or else a sure token would not have a logp of 0
        return scaled_logits(logits, softcap=self.softcap) * (1 / math.log(2) / self.temperature)

    @property
    def unit(self) -> float:
        """Nats of one unit of t: the Triton kernels count in bits (t * log2 e, exp2)."""
        return math.log(2) if self.impl == "triton" else 1.0


# ------------------------------------------------------------------------------------------------- public functions


def scaled_logits(logits: Tensor, temperature: float = 1.0, softcap: float = 0.0) -> Tensor:
    """softcap * tanh(logits / softcap) / temperature in fp32: the one definition of the distribution, everywhere.

    A fp32 input with temperature 1 and no soft cap is returned as it is, not copied: do not write into the result.

    >>> scaled_logits(torch.tensor([1.0, -2.0]), temperature=0.5)
    tensor([ 2., -4.])
    """
    x = logits.float()
    if softcap:
        x = torch.tanh(x / softcap) * softcap
    return x if temperature == 1.0 else x / temperature


def token_stats(
    logits: Tensor, targets: Tensor, ref_logits: Tensor | None = None,
    temperature: float = 1.0, softcap: float = 0.0, impl: str = "auto", inplace: bool = False,
) -> TokenStats:  # fmt: skip
    """Log-prob of the target, entropy, exact KL(policy || reference) and reference log-prob of every row of logits.

    logits [N, V] fp32, fp16 or bf16, rows of any stride; targets int [N], negative = ignored (zeros, zero gradient);
    ref_logits [N, V], a constant. Differentiable with respect to logits, once, through logp, entropy and kl; `inplace`
    lets the backward write the gradient over the logits. Truncated sampling (top-p, top-k, min-p) is not modelled
    here: mask the same logits with -inf, or refuse it. A logit of -inf has probability 0 (a soft cap would make it
    finite); where only the reference has none, kl is +inf (if p > 1e-18; huge below); a row of nothing but -inf gives
    NaN. `impl` is 'torch' or 'triton'; without it, what SESA_KERNELS says, or else torch. ValueError for wrong input.

    >>> stats = token_stats(torch.zeros(1, 4), torch.tensor([2]), ref_logits=torch.tensor([[0.0, 0.0, 0.0, 1.0]]))
    >>> [round(x.item(), 4) for x in stats]                     # ln(1/4), ln 4, ln((3 + e) / 4) - 1/4, -ln(3 + e)
    [-1.3863, 1.3863, 0.1074, -1.7437]
    """
    _require(logits.ndim == 2, f"logits has shape {tuple(logits.shape)}: flatten it to [tokens, vocabulary]")
    _require(logits.dtype in (torch.float32, torch.float16, torch.bfloat16),
             f"logits is {logits.dtype}, it must be float32, float16 or bfloat16: cast it")
    _require(ref_logits is None or ref_logits.shape == logits.shape,
             f"ref_logits is not {tuple(logits.shape)} like logits: give one vocabulary")
    options = _options(targets, *logits.shape, temperature, softcap, impl)
    logits, ref_logits = (x if x is None or x.stride(1) == 1 else x.contiguous() for x in (logits, ref_logits))
    return TokenStats(*_RowStats.apply(logits, ref_logits, targets, options, inplace))


def linear_token_stats(
    hidden: Tensor, weight: Tensor, targets: Tensor,
    ref_hidden: Tensor | None = None, ref_weight: Tensor | None = None,
    temperature: float = 1.0, softcap: float = 0.0, chunk_size: int | None = None, impl: str = "auto",
) -> TokenStats:  # fmt: skip
    """`token_stats(hidden @ weight.T, ...)` without ever holding [N, V]: for any loss on top, through autograd.

    hidden [N, H], weight [V, H]; ref_hidden [N, H'], ref_weight [V, H'] are constants. Holds chunk_size * V logits at
    a time, both ways. The backward computes the logits again (8NHV FLOPs in all, linear_policy_loss needs 6NHV) and
    adds the gradients up in fp32.

    >>> hidden, weight = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0], [0.0, -1.0]])
    >>> round(linear_token_stats(hidden, weight, torch.tensor([0])).logp.item(), 4)                       # ln(1/2)
    -0.6931
    """
    inputs = _linear_inputs(hidden, weight, ref_hidden, ref_weight, targets, temperature, softcap, chunk_size, impl)
    return TokenStats(*_LinearStats.apply(*inputs))


def linear_policy_loss(
    hidden: Tensor, weight: Tensor, targets: Tensor,
    loss_fn: Callable[..., Tensor], extras: Sequence[Tensor] = (),
    ref_hidden: Tensor | None = None, ref_weight: Tensor | None = None,
    temperature: float = 1.0, softcap: float = 0.0, chunk_size: int | None = None, impl: str = "auto",
) -> tuple[Tensor, TokenStats]:  # fmt: skip
    """The training default: loss = sum of loss_fn over chunks of tokens, and the detached stats of all tokens.

    `loss_fn(TokenStats of the chunk, *extras of the chunk) -> scalar` has to be a *sum* over its tokens: advantages,
    weights and denominators go into `extras`, [N] each, and the chunking cannot change the loss. The gradients of
    hidden and weight are formed while the logits of a chunk are alive (6NHV FLOPs, added up in fp32); the backward only
    scales them and gives them away, so a second one is a RuntimeError. What loss_fn closes over gets no gradient.
    A loss that couples tokens (a GSPO ratio per sequence) takes two calls: `linear_token_stats` under no_grad, the loss
    and its gradient g on those [N], then this function with `lambda stats, g: (g * stats.logp).sum()`.

    >>> hidden = torch.tensor([[1.0, 0.0]], requires_grad=True)
    >>> weight = torch.tensor([[0.0, 1.0], [0.0, -1.0]])
    >>> pg = lambda stats, advantage: -(advantage * stats.logp).sum()
    >>> loss, stats = linear_policy_loss(hidden, weight, torch.tensor([0]), pg, [torch.tensor([3.0])])
    >>> loss.backward(); round(loss.item(), 4), hidden.grad                                              # 3 ln 2
    (2.0794, tensor([[ 0., -3.]]))
    """
    inputs = _linear_inputs(hidden, weight, ref_hidden, ref_weight, targets, temperature, softcap, chunk_size, impl)
    for i, extra in enumerate(extras):
        _require(extra.shape[:1] == targets.shape,
                 f"extras[{i}] has shape {tuple(extra.shape)}, it must begin with {len(targets)} tokens")
    losses = []

    def gradients(stats: list[Tensor], rows: slice) -> Sequence:
        leaves = [x.detach().requires_grad_() for x in stats]
        with torch.enable_grad():
            loss = loss_fn(TokenStats(*leaves), *(extra[rows] for extra in extras))
        _require(loss.ndim == 0, f"loss_fn returned shape {tuple(loss.shape)}, it must return a sum over its tokens")
        losses.append(loss.detach())
        if not loss.requires_grad:
            return [None] * len(leaves)
        return torch.autograd.grad(loss, leaves, allow_unused=True)

    needed = [torch.is_grad_enabled() and x.requires_grad for x in (hidden, weight)]
    with torch.no_grad():
        stats, grads = _in_chunks(*inputs, gradients, needed)
    loss = _WithGradients.apply(torch.stack(losses).sum().float(), grads, hidden, weight)
    return loss, TokenStats(*stats)


# ----------------------------------------------------------------------------------------------- checks, the switch


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _linear_inputs(hidden, weight, ref_hidden, ref_weight, targets, temperature, softcap, chunk_size, impl) -> tuple:
    """Checked: the tensors and the options, as `_in_chunks` takes them."""
    _require((ref_hidden is None) == (ref_weight is None), "ref_hidden and ref_weight: give both or neither")
    for name, h, w in (("", hidden, weight), ("ref_", ref_hidden, ref_weight)):
        if h is None:
            break
        _require(h.ndim == w.ndim == 2 and h.shape[1] == w.shape[1] and h.dtype == w.dtype,
                 f"{name}hidden is {h.dtype} {tuple(h.shape)}, {name}weight {w.dtype} {tuple(w.shape)}, "
                 "flatten or cast to [tokens, width], [vocabulary, width] of one dtype")
        _require((len(h), len(w)) == (len(hidden), len(weight)),
                 f"the reference has {len(h)} tokens and a vocabulary of {len(w)}, the policy "
                 f"{len(hidden)} and {len(weight)}: they must be equal")
    if chunk_size is None:
        # GPUs want products of thousands of tokens; for a CPU 256 are enough, or 8 MB of logits
        chunk_size = 4096 if hidden.is_cuda else max(256, 2**21 // max(1, len(weight)))
    _require(chunk_size > 0, f"chunk_size is {chunk_size}, it must be at least 1 token")
    options = _options(targets, len(hidden), len(weight), temperature, softcap, impl, chunk_size)
    return hidden, weight, ref_hidden, ref_weight, targets, options


def _options(targets, n, v, temperature, softcap, impl, chunk_size=0) -> _Options:
    _require(temperature > 0, f"temperature is {temperature}, it must be above 0: 1.0 is usual")
    _require(softcap >= 0, f"softcap is {softcap}, it must be 0 (off) or above")
    _require(v > 0, "the vocabulary is empty: check the head")
    _require(targets.shape == (n,) and not targets.is_floating_point(),
             f"targets is {targets.dtype} {tuple(targets.shape)}, it must be int [{n}]: a token id per row")
    # a GPU would have to be waited for: there, a logp of NaN is what gives a wrong id away
    _require(targets.is_cuda or n == 0 or bool(targets.max() < v),
             f"targets holds an id that is not below the vocabulary size {v}: use the model's own tokenizer")
    return _Options(temperature, softcap, choose(impl, targets.device), chunk_size)


def choose(impl: str, device: torch.device) -> str:
    """The one switch: the argument, else SESA_KERNELS, else torch. The Triton kernels agree with float64 in the
    interpreter and compile for sm_80 and sm_90a, but have not yet run on a GPU: so they are used on request only."""
    impl = os.environ.get("SESA_KERNELS", impl) if impl == "auto" else impl
    _require(impl in ("auto", "torch", "triton"), f"impl or SESA_KERNELS is {impl!r}: use 'torch' or 'triton'")
    runs = triton and (device.type == "cuda" or not isinstance(_forward_kernel, triton.JITFunction))  # interpreted
    problem = f"{device.type!r} is no GPU" if triton else "triton is not installed"
    _require(impl != "triton" or runs, f"impl or SESA_KERNELS is 'triton' but {problem}: use 'torch'")
    return impl.replace("auto", "torch")


# ---------------------------------------------------------------------------------------------------- rows of logits


def _forward(logits, ref_logits, targets, options) -> tuple[list[Tensor], Tensor]:
    """logp, entropy and, with a reference, kl and ref_logp, [N] each; and what the backward needs: moments fp32
    [5, N], which are m, s, <z>, n and <D>."""
    # in bits, and in as many parts as there are splits of a row
    if options.impl == "triton":
        parts = torch.zeros(_split(*logits.shape)[1], 6, len(logits), device=logits.device)
        _launch(_forward_kernel, options, logits, ref_logits, targets, parts)
    else:
        parts = _sums_torch(logits, ref_logits, options)  # [P, 6, N]
    m_parts, s_parts, sz_parts, n_parts, r_parts, sd_parts = parts.unbind(1)  # [P, N]
    m, n = m_parts.amax(0), n_parts.amax(0)  # [N]
    dm, dn = m_parts - m, n_parts - n
    a = (dm * options.unit).exp()
    s = (a * s_parts).sum(0)
    mean_z = (a * (sz_parts + dm * s_parts)).sum(0) / s
    mean_d = (a * (sd_parts + (dm - dn) * s_parts)).sum(0) / s
    stats = [_logp(logits, m, s, targets, options), s.log() - mean_z * options.unit]
    if ref_logits is not None:
        r = ((dn * options.unit).exp() * r_parts).sum(0)
        kl = mean_d * options.unit + (r / s).log()
        # rounding leaves +-1e-7 around 0
        kl.clamp_(min=0.0)
        kl.masked_fill_(kl > INFINITE, torch.inf)
        # a reference row of nothing but -inf
        kl.masked_fill_(r == 0, torch.nan)
        stats += [kl, _logp(ref_logits, n, r, targets, options)]
    return [x.masked_fill_(targets < 0, 0.0) for x in stats], torch.stack([m, s, mean_z, n, mean_d])


def _logp(logits: Tensor, top: Tensor, mass: Tensor, targets: Tensor, options: _Options) -> Tensor:
    chosen = options.scale(logits.gather(1, _index(targets, logits))[:, 0])  # [N]
    # only on a GPU: a CPU has raised before
    chosen = chosen.masked_fill(targets >= logits.shape[1], torch.nan)
    return ((chosen - top) * options.unit - mass.log()).clamp_(max=0.0)


def _index(targets: Tensor, logits: Tensor) -> Tensor:
    return targets.clamp(0, logits.shape[1] - 1).long()[:, None]  # [N, 1]


def _backward(logits, ref_logits, targets, moments, grads, options, out) -> None:
    """Gradients [N] of the stats (None: not used) -> those of the logits [N, V], into `out` (may be `logits`).

    dx_j = e_j (a + b z_j + c D_j) + g 1{j = y}, times the slope of the soft cap, with factors [6, N]: m, n, a, b, c, g.
    """
    m, s, mean_z, n, mean_d = moments
    # of logp, entropy and kl
    grads = [*grads, None][:3]
    g, g_entropy, g_kl = (0 * s if x is None else x.float() / options.temperature for x in grads)
    b, c = -g_entropy * options.unit / s, g_kl * options.unit / s
    if grads[2] is None:
        ref_logits, mean_d = None, 0.0
    factors = torch.stack([m, n, -g / s - b * mean_z - c * mean_d, b, c, g])
    if options.impl == "triton":
        _launch(_backward_kernel, options, logits, ref_logits, targets, factors, out)
    else:
        _backward_torch(logits, ref_logits, targets, factors, grads[1] is not None, options, out)


class _RowStats(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, ref_logits, targets, options, inplace):
        stats, moments = _forward(logits, ref_logits, targets, options)
        ctx.save_for_backward(logits, ref_logits, targets, moments)
        ctx.options, ctx.inplace = options, inplace
        return _outputs(ctx, stats)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        logits, ref_logits, targets, moments = ctx.saved_tensors
        out = logits.detach() if ctx.inplace else torch.empty_like(logits)
        _backward(logits, ref_logits, targets, moments, grads, ctx.options, out)
        return out, None, None, None, None


def _outputs(ctx, stats: list[Tensor]) -> tuple:
    """The reference is a constant, and an output that the loss does not use sends back None, not zeros."""
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*stats[3:])
    return tuple(stats)


# ---------------------------------------------------------------------------------------------- rows, in plain torch


def _blocks(logits: Tensor) -> Iterator[slice]:
    """Blocks of rows whose temporaries stay in a CPU's second-level cache (1 MB each), or in 256 MB of a GPU."""
    step = max(1, (2**26 if logits.is_cuda else 2**18) // logits.shape[1])
    return (slice(i, i + step) for i in range(0, len(logits), step))


def _difference(z: Tensor, w: Tensor) -> Tensor:
    return torch.sub(z, w, out=w).clamp_(max=HIGHEST)  # [C, V], over w


def _sums_torch(logits, ref_logits, options) -> Tensor:
    """Sums fp32 [1, 6, N]: m, s, sum e z, n, r, sum e D."""
    sums = torch.zeros(1, 6, len(logits), device=logits.device)
    for rows in _blocks(logits):
        t = options.scale(logits[rows])  # [C, V]
        m = t.amax(-1)  # [C]
        z = (t - m[:, None]).clamp_(min=LOWEST)  # [C, V]
        e = z.exp()  # [C, V]
        block = [m, e.sum(-1), (e * z).sum(-1)]
        if ref_logits is not None:
            u = options.scale(ref_logits[rows])  # [C, V]
            n = u.amax(-1)  # [C]
            w = u - n[:, None]  # [C, V]
            block += [n, w.exp().sum(-1), e.mul_(_difference(z, w)).sum(-1)]
        sums[0, : len(block), rows] = torch.stack(block)
    return sums


def _backward_torch(logits, ref_logits, targets, factors, entropy, options, out) -> None:
    index = _index(targets, logits)
    for rows in _blocks(logits):
        m, n, a, b, c, g = factors[:, rows, None]  # [C, 1]
        t = options.scale(logits[rows])  # [C, V]
        z = (t - m).clamp_(min=LOWEST)  # [C, V]
        d = torch.addcmul(a, z, b) if entropy else a
        if ref_logits is not None:
            w = options.scale(ref_logits[rows]) - n  # [C, V]
            d = torch.addcmul(d, _difference(z, w), c)
        d = z.exp_().mul_(d)  # [C, V]
        d.scatter_add_(1, index[rows], g)
        if options.softcap:
            tanh = t * (options.temperature / options.softcap)
            d.mul_(1 - tanh.square_())
        out[rows] = d
    # whatever those rows hold, NaN included
    out.index_fill_(0, (targets < 0).nonzero()[:, 0], 0.0)


# --------------------------------------------------------------------------------------------------- rows, in Triton
# Everything is in bits. Logits become fp32 as they are loaded.

_LOWEST, _HIGHEST, _LOG2E = constant(LOWEST), constant(HIGHEST), constant(1 / math.log(2))


@jit
def _load(ROW, columns, end, softcap: tl.constexpr, MASKED: tl.constexpr):
    """Soft-capped logits, fp32; -inf beyond `end`, set after the cap, which would make -softcap of it."""
    mask = columns < end if MASKED else None
    x = tl.load(ROW + columns, mask=mask).to(tl.float32)
    if softcap > 0:
        # tanh, in what the interpreter has
        x = softcap * (2 * tl.sigmoid(x * (2 / softcap)) - 1)
    if MASKED:
        x = tl.where(mask, x, -float("inf"))
    return x


@jit
def _absorb(sums, X, Y, columns, end, scale, softcap: tl.constexpr, MASKED: tl.constexpr):
    """A tile into m, s = sum e, sz = sum e z, n, r, sd = sum e D. Exponentials see -inf and NaN, products do not."""
    m, s, sz, n, r, sd = sums
    x = _load(X, columns, end, softcap, MASKED)  # [BLOCK]
    m_new = tl.maximum(m, tl.max(x, 0) * scale)
    dm = m - m_new
    a = tl.exp2(dm)
    z = x * scale - m_new
    e = tl.exp2(z)
    z = tl.maximum(z, _LOWEST)
    if Y is not None:
        y = _load(Y, columns, end, softcap, MASKED)  # [BLOCK]
        n_new = tl.maximum(n, tl.max(y, 0) * scale)
        dn = n - n_new
        w = y * scale - n_new
        r = r * tl.exp2(dn) + tl.sum(tl.exp2(w), 0)
        sd = a * (sd + (dm - dn) * s) + tl.sum(e * tl.minimum(z - w, _HIGHEST), 0)
        n = n_new
    sz = a * (sz + dm * s) + tl.sum(e * z, 0)
    s = a * s + tl.sum(e, 0)
    return m_new, s, sz, n, r, sd


@jit
def _forward_kernel(
    X, Y, TARGETS, PARTS,
    stride_x, stride_y, num_rows, V, tiles,
    temperature: tl.constexpr, softcap: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (row, split): one pass over `tiles` tiles of a row that is not ignored, to six partial sums."""
    # row * stride passes 2^31 after 14,000 rows of 152k logits
    row = tl.program_id(0).to(tl.int64)
    if tl.load(TARGETS + row) < 0:
        return
    # as an argument, torch.compile would make it fp64
    scale: tl.constexpr = _LOG2E / temperature
    X += row * stride_x
    if Y is not None:
        Y += row * stride_y
    begin = tl.program_id(1) * tiles * BLOCK
    end = tl.minimum(begin + tiles * BLOCK, V)
    whole = begin + (end - begin) // BLOCK * BLOCK
    lane = tl.arange(0, BLOCK)
    # finite, so that no difference of maxima is NaN
    sums = (-1.0e30, 0.0, 0.0, -1.0e30, 0.0, 0.0)
    for start in range(begin, whole, BLOCK):
        sums = _absorb(sums, X, Y, start + lane, end, scale, softcap, False)
    # the ragged tail, peeled off: the loop needs no masks
    if whole < end:
        sums = _absorb(sums, X, Y, whole + lane, end, scale, softcap, True)
    PARTS += tl.program_id(1).to(tl.int64) * 6 * num_rows + row  # [splits, 6, N]
    for i in tl.static_range(6):
        tl.store(PARTS + i * num_rows, sums[i])


@jit
def _write(X, Y, DX, columns, end, target, factors, scale, softcap: tl.constexpr, MASKED: tl.constexpr):
    """One tile of dx = e (a + b z + c D) + g 1{target}, times the slope of the soft cap."""
    m, n, a, b, c, g = factors
    x = _load(X, columns, end, softcap, MASKED)  # [BLOCK]
    z = x * scale - m
    e = tl.exp2(z)
    z = tl.maximum(z, _LOWEST)
    f = a + b * z
    if Y is not None:
        w = _load(Y, columns, end, softcap, MASKED) * scale - n
        f = f + c * tl.minimum(z - w, _HIGHEST)
    dx = e * f + tl.where(columns == target, g, 0.0)
    if softcap > 0:
        dx = dx * (1 - (x / softcap) * (x / softcap))
    mask = columns < end if MASKED else None
    tl.store(DX + columns, dx.to(DX.dtype.element_ty), mask=mask)


@jit
def _backward_kernel(
    X, Y, TARGETS, FACTORS, DX,
    stride_x, stride_y, stride_dx, num_rows, V, tiles,
    temperature: tl.constexpr, softcap: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (row, split): elementwise from the row's factors [6, N], so DX may be X."""
    row = tl.program_id(0).to(tl.int64)
    X += row * stride_x
    DX += row * stride_dx
    FACTORS += row
    begin = tl.program_id(1) * tiles * BLOCK
    end = tl.minimum(begin + tiles * BLOCK, V)
    lane = tl.arange(0, BLOCK)
    target = tl.load(TARGETS + row).to(tl.int32)
    if target < 0:
        zero = tl.zeros([BLOCK], DX.dtype.element_ty)
        for start in range(begin, end, BLOCK):
            tl.store(DX + start + lane, zero, mask=start + lane < end)
        return
    if Y is not None:
        Y += row * stride_y
    scale: tl.constexpr = _LOG2E / temperature
    factors = [tl.load(FACTORS + i * num_rows) for i in (0, 1, 2, 3, 4, 5)]
    whole = begin + (end - begin) // BLOCK * BLOCK
    for start in range(begin, whole, BLOCK):
        _write(X, Y, DX, start + lane, end, target, factors, scale, softcap, False)
    if whole < end:
        _write(X, Y, DX, whole + lane, end, target, factors, scale, softcap, True)


def _split(num_rows: int, vocab: int) -> tuple[int, int]:
    """(tiles of a split, splits of a row): enough programs to fill the GPU, also for few rows."""
    tiles = triton.cdiv(vocab, BLOCK)
    each = triton.cdiv(tiles, min(MAX_SPLITS, tiles, triton.cdiv(ROW_PROGRAMS, max(1, num_rows))))
    return each, triton.cdiv(tiles, each)


def _launch(kernel, options, logits, ref_logits, targets, buffer, *out) -> None:
    """One program for each row and each of its splits; logits and `out` may have rows of any stride."""
    strides = [0 if rows is None else rows.stride(0) for rows in (logits, ref_logits, *out)]
    tiles, splits = _split(*logits.shape)
    tensors = logits, ref_logits, targets.contiguous(), buffer, *out
    constants = dict(temperature=options.temperature, softcap=options.softcap, BLOCK=BLOCK)
    with torch.cuda.device_of(logits):
        kernel[len(logits), splits](*tensors, *strides, *logits.shape, tiles, **constants, num_warps=1, num_stages=1)


# ---------------------------------------------------------------------------------------------- the head, in chunks


class _Head:
    """hidden @ weight.T of a chunk of tokens, fp32, in one buffer that every call overwrites."""

    def __init__(self, hidden: Tensor, weight: Tensor, chunk_size: int):
        # bf16 products with fp32 sums on a GPU; else fp32: fp16 gradients would underflow, and CPUs gain nothing
        self.dtype = hidden.dtype if hidden.is_cuda and hidden.dtype == torch.bfloat16 else torch.float32
        self.hidden, self.weight = hidden.to(self.dtype), weight.to(self.dtype)  # [N, H], [V, H]
        self.buffer = hidden.new_empty(min(chunk_size, len(hidden)), len(weight), dtype=torch.float32)

    def logits(self, rows: slice) -> Tensor:
        hidden = self.hidden[rows]
        return _product(hidden, self.weight.t(), self.buffer[: len(hidden)])  # [C, V]


def _product(a: Tensor, b: Tensor, out: Tensor, add: bool = False) -> Tensor:
    """out = a @ b, or out += a @ b, with fp32 `out` whatever the inputs are (and autocast leaves `out=` alone)."""
    dtype = {} if a.dtype == out.dtype else {"out_dtype": out.dtype}
    return torch.addmm(out, a, b, beta=int(add), **dtype, out=out)


def _in_chunks(
    hidden, weight, ref_hidden, ref_weight, targets, options, gradients=None, needed=(False, False)
) -> tuple:
    """The one loop over chunks of tokens: the stats of all, and fp32 gradients of hidden and weight where needed.

    gradients(stats of the chunk, its rows) -> the gradients [C] of logp, entropy and kl, or None for each.
    """
    head = _Head(hidden, weight, options.chunk_size)
    ref_head = ref_hidden is not None and _Head(ref_hidden, ref_weight, options.chunk_size)
    d_hidden = torch.zeros_like(hidden, dtype=torch.float32) if needed[0] else None
    d_weight = torch.zeros_like(weight, dtype=torch.float32) if needed[1] else None
    parts = []
    # an empty chunk if there is no token
    for begin in range(0, max(1, len(targets)), options.chunk_size):
        rows = slice(begin, begin + options.chunk_size)
        x = head.logits(rows)  # [C, V]
        y = ref_head.logits(rows) if ref_head else None
        stats, moments = _forward(x, y, targets[rows], options)
        parts.append(stats)
        grads = gradients and gradients(stats, rows)
        if any(needed):
            # over the logits, if they have the dtype of the products
            d = x if x.dtype == head.dtype else torch.empty_like(x, dtype=head.dtype)
            _backward(x, y, targets[rows], moments, grads, options, d)
        if needed[0]:
            _product(d, head.weight, d_hidden[rows])
        if needed[1]:
            _product(d.t(), head.hidden[rows], d_weight, add=True)
    stats = [torch.cat(column) for column in zip(*parts, strict=True)]
    return stats, [d if d is None else d.to(hidden.dtype) for d in (d_hidden, d_weight)]


class _LinearStats(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):
        ctx.save_for_backward(*inputs[:5])
        ctx.options = inputs[5]
        return _outputs(ctx, _in_chunks(*inputs)[0])

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        def gradients(_, rows):
            return [grad if grad is None else grad[rows] for grad in grads]

        _, out = _in_chunks(*ctx.saved_tensors, ctx.options, gradients, ctx.needs_input_grad[:2])
        return *out, None, None, None, None


class _WithGradients(torch.autograd.Function):
    """A loss whose gradients with respect to hidden and weight are known."""

    @staticmethod
    def forward(ctx, loss, grads, hidden, weight):
        ctx.grads = grads
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, g_loss):
        if ctx.grads is None:
            raise RuntimeError("linear_policy_loss gave its gradients to the first backward: compute the loss again")
        grads, ctx.grads = ctx.grads, None
        return None, None, *(d if d is None else d.mul_(g_loss) for d in grads)
