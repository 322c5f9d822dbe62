"""Log-prob, entropy and exact KL of every token, from logits or straight from hidden states: plain torch and Triton.

The [N, V] logits are where RL of language models runs out of memory and time. A loss needs four numbers per token, so
four numbers per token are what this file returns; ratios, clipping, k1/k3 and advantages stay in torch on [N].

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

import functools
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

try:
    import triton
    import triton.language as tl
except ImportError:  # macOS, Windows: the torch path
    triton = None
jit, constant = (triton.jit, tl.constexpr) if triton else (lambda kernel: kernel, float)

# Where impl="auto" goes on a GPU. The Triton kernels agree with float64 in the interpreter and compile for sm_80 and
# sm_90a, but have not yet run on a GPU: until they have, they are used on request only (SESA_KERNELS=triton).
AUTO_ON_GPU = "torch"

BLOCK = 1024  # logits of a tile: one warp, 32 a lane, four 128-bit loads in bf16; more warps would pay for barriers
ROW_PROGRAMS = 132 * 32  # one-warp programs that fill the 132 multiprocessors of an H100 or H200
MAX_SPLITS = 64  # parts of a row, when there are too few rows

LOWEST = -1.0e30  # z where p = 0: a product with it is 0, with -inf it would be NaN
HIGHEST = 1.0e33  # D where the reference has no mass, for the same reason; V of them still add up to a finite number
INFINITE = 1.0e15  # a KL above this can only stem from such a D: it is reported as +inf


class TokenStats(NamedTuple):
    """fp32 [N] each, zero where the target is negative; `kl` and `ref_logp` are None without a reference."""

    logp: Tensor
    entropy: Tensor
    kl: Tensor | None
    ref_logp: Tensor | None


class _Options(NamedTuple):
    temperature: float
    softcap: float
    impl: str
    chunk_size: int


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


def token_stats(logits: Tensor, targets: Tensor, ref_logits: Tensor | None = None, temperature: float = 1.0,
                softcap: float = 0.0, impl: str = "auto", inplace: bool = False) -> TokenStats:
    """Log-prob of the target, entropy, exact KL(policy || reference) and reference log-prob of every row of logits.

    logits [N, V] fp32, fp16 or bf16, rows of any stride; targets int [N], negative = ignored (zeros, zero gradient);
    ref_logits [N, V], a constant. Differentiable with respect to logits, once, through logp, entropy and kl; `inplace`
    lets the backward write the gradient over the logits. Truncated sampling (top-p, top-k, min-p) is not modelled
    here: mask the same logits with -inf, or refuse it. A logit of -inf has probability 0 (a soft cap would make it
    finite); where only the reference has none, kl is +inf (if p > 1e-18; huge below); a row of nothing but -inf gives
    NaN. ValueError for wrong input.

    >>> stats = token_stats(torch.zeros(1, 4), torch.tensor([2]), ref_logits=torch.tensor([[0.0, 0.0, 0.0, 1.0]]))
    >>> [round(x.item(), 4) for x in stats]                     # ln(1/4), ln 4, ln((3 + e) / 4) - 1/4, -ln(3 + e)
    [-1.3863, 1.3863, 0.1074, -1.7437]
    """
    _require(logits.ndim == 2, f"logits has shape {tuple(logits.shape)}, it must be [tokens, vocabulary]: flatten it")
    _require(logits.dtype in (torch.float32, torch.float16, torch.bfloat16),
             f"logits is {logits.dtype}, it must be float32, float16 or bfloat16: cast it")
    _require(ref_logits is None or ref_logits.shape == logits.shape,
             f"ref_logits must have the shape of logits, {tuple(logits.shape)}: same tokens, same vocabulary")
    options = _options(temperature, softcap, impl, None, targets, *logits.shape, logits.device)
    return TokenStats(*_RowStats.apply(logits, ref_logits, targets, options, inplace))


def linear_token_stats(hidden: Tensor, weight: Tensor, targets: Tensor, ref_hidden: Tensor | None = None,
                       ref_weight: Tensor | None = None, temperature: float = 1.0, softcap: float = 0.0,
                       chunk_size: int | None = None, impl: str = "auto") -> TokenStats:
    """`token_stats(hidden @ weight.T, ...)` without ever holding [N, V]: for any loss on top, through autograd.

    hidden [N, H], weight [V, H]; ref_hidden [N, H'], ref_weight [V, H'] are constants. Holds chunk_size * V logits at
    a time, both ways. The backward computes the logits again (8NHV FLOPs in all, linear_policy_loss needs 6NHV), in
    slices of the vocabulary, so that the gradient of the weight is written once and needs no fp32 copy.

    >>> hidden, weight = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0], [0.0, -1.0]])
    >>> round(linear_token_stats(hidden, weight, torch.tensor([0])).logp.item(), 4)                       # ln(1/2)
    -0.6931
    """
    options = _linear_options(hidden, weight, targets, ref_hidden, ref_weight, temperature, softcap, chunk_size, impl)
    return TokenStats(*_LinearStats.apply(hidden, weight, ref_hidden, ref_weight, targets, options))


def linear_policy_loss(hidden: Tensor, weight: Tensor, targets: Tensor, loss_fn: Callable[..., Tensor],
                       extras: Sequence[Tensor] = (), ref_hidden: Tensor | None = None,
                       ref_weight: Tensor | None = None, temperature: float = 1.0, softcap: float = 0.0,
                       chunk_size: int | None = None, impl: str = "auto") -> tuple[Tensor, TokenStats]:
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
    options = _linear_options(hidden, weight, targets, ref_hidden, ref_weight, temperature, softcap, chunk_size, impl)
    for i, extra in enumerate(extras):
        shape = tuple(extra.shape)
        _require(shape[:1] == targets.shape, f"extras[{i}] has shape {shape}, it must begin with {len(targets)} tokens")
    loss, *stats = _LinearLoss.apply(hidden, weight, ref_hidden, ref_weight, targets, loss_fn, extras, options,
                                     torch.is_grad_enabled())
    return loss, TokenStats(*stats)


# ----------------------------------------------------------------------------------------------- checks, the switch


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _linear_options(hidden, weight, targets, ref_hidden, ref_weight, temperature, softcap, chunk_size, impl):
    _require((ref_hidden is None) == (ref_weight is None), "ref_hidden and ref_weight: give both or neither")
    heads = [("", hidden, weight)] + ([] if ref_hidden is None else [("ref_", ref_hidden, ref_weight)])
    for name, h, w in heads:
        _require(h.ndim == w.ndim == 2 and h.shape[1] == w.shape[1] and h.dtype == w.dtype,
                 f"{name}hidden is {h.dtype} {tuple(h.shape)}, {name}weight {w.dtype} {tuple(w.shape)}, they must be "
                 "[tokens, width] and [vocabulary, width] of one dtype: flatten or cast them")
        _require((h.shape[0], w.shape[0]) == (hidden.shape[0], weight.shape[0]),
                 f"the reference has {h.shape[0]} tokens and a vocabulary of {w.shape[0]}, the policy "
                 f"{hidden.shape[0]} and {weight.shape[0]}: they must be equal")
    return _options(temperature, softcap, impl, chunk_size, targets, len(hidden), len(weight), hidden.device)


def _options(temperature, softcap, impl, chunk_size, targets: Tensor, n: int, v: int, device) -> _Options:
    _require(temperature > 0, f"temperature is {temperature}, it must be above 0: 1.0 is the model's own distribution")
    _require(softcap >= 0, f"softcap is {softcap}, it must be 0 (off) or above")
    _require(v > 0, "the vocabulary is empty: check the head")
    _require(chunk_size is None or chunk_size > 0, f"chunk_size is {chunk_size}, it must be at least 1 token")
    _require(targets.shape == (n,) and not targets.is_floating_point(),
             f"targets is {targets.dtype} {tuple(targets.shape)}, it must be int [{n}]: a token id per row")
    # a GPU would have to be waited for: there, a logp of NaN is what gives a wrong id away
    _require(targets.is_cuda or n == 0 or bool(targets.max() < v),
             f"targets holds an id that is not below the vocabulary size {v}: use the model's own tokenizer")
    # GPUs want products of thousands of tokens; for a CPU 512 are enough, or 8 MB of logits
    chunk_size = chunk_size or (4096 if device.type == "cuda" else max(512, 2**21 // v))
    return _Options(float(temperature), float(softcap), _choose(impl, device), chunk_size)


def _choose(impl: str, device: torch.device) -> str:
    """The one switch between torch and Triton: the argument, else SESA_KERNELS, else torch on a CPU, AUTO_ON_GPU."""
    wish = os.environ.get("SESA_KERNELS", "auto") if impl == "auto" else impl
    _require(wish in ("auto", "torch", "triton"), f"impl or SESA_KERNELS is {wish!r}: use 'auto', 'torch' or 'triton'")
    on_gpu = device.type == "cuda"
    if wish == "auto" and on_gpu and AUTO_ON_GPU == "torch":
        _say_once("plain torch on a GPU, as the Triton kernels have not run on one yet; SESA_KERNELS=triton tries them")
    wish = wish if wish != "auto" else AUTO_ON_GPU if on_gpu else "torch"
    if wish == "torch" or triton_runs(device):
        return wish
    problem = f"the tensors are on {device.type!r}, not on a GPU" if triton else "the triton package is not installed"
    _require(impl != "triton", f"impl is 'triton' but {problem}: use 'auto' or 'torch'")
    _say_once(f"plain torch instead of Triton: {problem}")
    return "torch"


def triton_runs(device: torch.device) -> bool:
    """Whether Triton kernels can be used on tensors of `device`: a GPU, or TRITON_INTERPRET=1 at the import."""
    return bool(triton) and (device.type == "cuda" or not isinstance(_forward_kernel, triton.JITFunction))


@functools.cache
def _say_once(line: str) -> None:
    warnings.warn(f"kernels: {line}", stacklevel=5)


def _rows(options: _Options) -> tuple[Callable, Callable]:
    """(forward, backward) of rows of logits."""
    return (_forward_triton, _backward_triton) if options.impl == "triton" else (_forward_torch, _backward_torch)


# ---------------------------------------------------------------------------------------------- rows, in plain torch


def _blocks(logits: Tensor) -> Iterator[slice]:
    """Blocks of rows whose temporaries stay in a CPU's second-level cache (1 MB each), or in 256 MB of a GPU."""
    step = max(1, (2**26 if logits.is_cuda else 2**18) // logits.shape[1])
    return (slice(i, i + step) for i in range(0, logits.shape[0], step))


def _difference(z: Tensor, w: Tensor) -> Tensor:
    return torch.sub(z, w, out=w).clamp_(max=HIGHEST)  # [C, V], over w


def _forward_torch(logits, ref_logits, targets, options) -> tuple[TokenStats, Tensor]:
    """The stats, and what the backward needs: moments fp32 [5, N] (m, s, <z>, n, <D>), [3, N] without a reference."""
    n, v = logits.shape
    moments = torch.empty(3 if ref_logits is None else 5, n, device=logits.device)
    target_z, target_w, ref_mass = torch.empty(3, n, device=logits.device)
    index = targets.clamp(0, v - 1).long()[:, None]  # [N, 1]
    for rows in _blocks(logits):
        t = scaled_logits(logits[rows], options.temperature, options.softcap)  # [C, V]
        peak = t.amax(-1)  # [C]
        z = (t - peak[:, None]).clamp_(min=LOWEST)  # [C, V]
        e = z.exp()  # [C, V]
        mass = e.sum(-1)  # [C]
        block = [peak, mass, (e * z).sum(-1) / mass]
        target_z[rows] = z.gather(1, index[rows])[:, 0]
        if ref_logits is not None:
            u = scaled_logits(ref_logits[rows], options.temperature, options.softcap)  # [C, V]
            ref_peak = u.amax(-1)  # [C]
            w = u - ref_peak[:, None]  # [C, V]
            target_w[rows] = w.gather(1, index[rows])[:, 0]
            ref_mass[rows] = w.exp().sum(-1)
            block += [ref_peak, e.mul_(_difference(z, w)).sum(-1) / mass]
        moments[:, rows] = torch.stack(block)
    mass, mean_z = moments[1:3]
    target_z.masked_fill_(targets >= v, torch.nan)  # only on a GPU: a CPU has raised before
    stats = [target_z - mass.log(), mass.log() - mean_z]
    if ref_logits is not None:
        kl = (moments[4] + (ref_mass / mass).log()).clamp_(min=0.0)  # rounding leaves +-1e-7 around 0
        stats += [kl.masked_fill_(kl > INFINITE, torch.inf), target_w - ref_mass.log()]
    stats = [x.masked_fill_(targets < 0, 0.0) for x in stats]
    return TokenStats(*stats, *[None] * (4 - len(stats))), moments


def _backward_torch(logits, ref_logits, targets, moments, grads, options, out, first=0) -> None:
    """Gradients [N] of logp, entropy, kl (None: not used) -> those of the logits [N, V], into `out` (may be `logits`).

    The logits may be the columns from `first` on of a larger vocabulary; the moments are those of all of it.
    """
    g_logp, g_entropy, g_kl = (None if g is None else g.float() / options.temperature for g in grads)  # [N]
    peak, mass, mean_z = moments[:3]  # 1 / s goes into the coefficients of e (a + b z + c D)
    a = torch.zeros_like(mass) if g_logp is None else -g_logp / mass
    if g_entropy is not None:
        b = -g_entropy / mass
        a = a - b * mean_z
    if g_kl is not None:
        c = g_kl / mass
        a = a - c * moments[4]
    for rows in _blocks(logits):
        t = scaled_logits(logits[rows], options.temperature, options.softcap)  # [C, V]
        z = (t - peak[rows, None]).clamp_(min=LOWEST)  # [C, V]
        d = a[rows, None] if g_entropy is None else torch.addcmul(a[rows, None], z, b[rows, None])
        if g_kl is not None:
            u = scaled_logits(ref_logits[rows], options.temperature, options.softcap)  # [C, V]
            d = torch.addcmul(d, _difference(z, u - moments[3, rows, None]), c[rows, None])
        d = z.exp_().mul_(d)  # [C, V]
        if g_logp is not None:
            column = targets[rows] - first  # in a slice of the vocabulary only some targets are present
            value = torch.where((column >= 0) & (column < d.shape[1]), g_logp[rows], 0.0)
            d.scatter_add_(1, column.clamp(0, d.shape[1] - 1).long()[:, None], value[:, None])
        if options.softcap:
            tanh = t * (options.temperature / options.softcap)
            d.mul_(torch.addcmul(torch.ones_like(tanh), tanh, tanh, value=-1))
        out[rows] = d
    if (targets < 0).any():
        out.index_fill_(0, (targets < 0).nonzero()[:, 0], 0.0)  # whatever those rows hold, NaN included


# --------------------------------------------------------------------------------------------------- rows, in Triton
# Everything is in bits (t * log2 e, exp2) until the combine kernel. Logits become fp32 as they are loaded.

_LOWEST, _HIGHEST, _INFINITE = constant(LOWEST), constant(HIGHEST), constant(INFINITE)
_LOG2E, _LN2 = constant(1 / math.log(2)), constant(math.log(2))


@jit
def _load(ROW, columns, end, softcap: tl.constexpr, MASKED: tl.constexpr):
    """Soft-capped logits, fp32; -inf beyond `end`, set after the cap, which would make -softcap of it."""
    if MASKED:
        x = tl.load(ROW + columns, mask=columns < end, other=0.0).to(tl.float32)
    else:
        x = tl.load(ROW + columns).to(tl.float32)
    if softcap > 0:
        x = softcap * (2 * tl.sigmoid(x * (2 / softcap)) - 1)  # tanh, in what the interpreter has
    if MASKED:
        x = tl.where(columns < end, x, -float("inf"))
    return x


@jit
def _absorb(m, s, sz, n, r, sd, X, Y, columns, end, scale, softcap: tl.constexpr, MASKED: tl.constexpr):
    """A tile into m, s = sum e, sz = sum e z, n, r, sd = sum e D. Exponentials see -inf and NaN, products do not."""
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
def _forward_kernel(X, Y, TARGETS, PARTS, TARGET_XY, stride_x, stride_y, num_rows, V, tiles,
                    temperature: tl.constexpr, softcap: tl.constexpr, BLOCK: tl.constexpr):
    """Program (row, split): one pass over `tiles` tiles of a row; six partial sums, and the target's logit if here."""
    row = tl.program_id(0).to(tl.int64)  # row * stride passes 2^31 after 14,000 rows of 152k logits
    target = tl.load(TARGETS + row)
    if target < 0:
        return
    scale: tl.constexpr = _LOG2E / temperature  # as an argument, torch.compile would make it fp64
    X += row * stride_x
    if Y is not None:
        Y += row * stride_y
    begin = tl.program_id(1) * tiles * BLOCK
    end = tl.minimum(begin + tiles * BLOCK, V)
    whole = begin + (end - begin) // BLOCK * BLOCK
    lane = tl.arange(0, BLOCK)
    m, s, sz = -1.0e30, 0.0, 0.0  # finite, so that no difference of maxima is NaN
    n, r, sd = -1.0e30, 0.0, 0.0
    for start in range(begin, whole, BLOCK):
        m, s, sz, n, r, sd = _absorb(m, s, sz, n, r, sd, X, Y, start + lane, end, scale, softcap, False)
    if whole < end:  # the ragged tail, peeled off: the loop needs no masks
        m, s, sz, n, r, sd = _absorb(m, s, sz, n, r, sd, X, Y, whole + lane, end, scale, softcap, True)
    PARTS += tl.program_id(1).to(tl.int64) * 6 * num_rows + row  # [splits, 6, N]
    tl.store(PARTS, m)
    tl.store(PARTS + num_rows, s)
    tl.store(PARTS + 2 * num_rows, sz)
    if Y is not None:
        tl.store(PARTS + 3 * num_rows, n)
        tl.store(PARTS + 4 * num_rows, r)
        tl.store(PARTS + 5 * num_rows, sd)
    if (target >= begin) & (target < end):
        tl.store(TARGET_XY + row, _load(X, target, end, softcap, False))
        if Y is not None:
            tl.store(TARGET_XY + num_rows + row, _load(Y, target, end, softcap, False))


@jit
def _combine_kernel(PARTS, TARGET_XY, TARGETS, LOGP, ENTROPY, KL, REF_LOGP, MOMENTS, num_rows, V, splits,
                    temperature: tl.constexpr, SPLITS: tl.constexpr, ROWS: tl.constexpr):
    """Merge the splits of ROWS rows in a fixed order (no atomics), and turn bits into nats."""
    scale: tl.constexpr = _LOG2E / temperature
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = rows < num_rows
    target = tl.load(TARGETS + rows, mask=inside, other=-1)
    ignored = target < 0
    wrong = tl.where(target < V, 0.0, float("nan"))  # an id beyond the vocabulary must not pass for a number
    split = tl.arange(0, SPLITS)[:, None]
    mask = (split < splits) & inside[None, :]
    PARTS += split.to(tl.int64) * 6 * num_rows + rows[None, :]
    m_parts = tl.load(PARTS, mask=mask, other=-1.0e30)  # [SPLITS, ROWS]
    s_parts = tl.load(PARTS + num_rows, mask=mask, other=0.0)
    sz_parts = tl.load(PARTS + 2 * num_rows, mask=mask, other=0.0)
    m = tl.max(m_parts, 0)  # [ROWS]
    dm = m_parts - m[None, :]
    a = tl.exp2(dm)
    s = tl.sum(a * s_parts, 0)
    mean_z = tl.sum(a * (sz_parts + dm * s_parts), 0) / s
    target_x = tl.load(TARGET_XY + rows, mask=inside, other=0.0)
    logp = (target_x * scale - m - tl.log2(s)) * _LN2 + wrong
    logp = tl.where(logp > 0, 0.0, logp)  # not a minimum, which would swallow NaN
    tl.store(LOGP + rows, tl.where(ignored, 0.0, logp), mask=inside)
    tl.store(ENTROPY + rows, tl.where(ignored, 0.0, (tl.log2(s) - mean_z) * _LN2), mask=inside)
    tl.store(MOMENTS + rows, m, mask=inside)
    tl.store(MOMENTS + num_rows + rows, s, mask=inside)
    tl.store(MOMENTS + 2 * num_rows + rows, mean_z, mask=inside)
    if KL is not None:
        n_parts = tl.load(PARTS + 3 * num_rows, mask=mask, other=-1.0e30)
        r_parts = tl.load(PARTS + 4 * num_rows, mask=mask, other=0.0)
        sd_parts = tl.load(PARTS + 5 * num_rows, mask=mask, other=0.0)
        n = tl.max(n_parts, 0)
        dn = n_parts - n[None, :]
        r = tl.sum(tl.exp2(dn) * r_parts, 0)
        mean_d = tl.sum(a * (sd_parts + (dm - dn) * s_parts), 0) / s
        kl = (mean_d + tl.log2(r / s)) * _LN2
        kl = tl.where(kl < 0, 0.0, tl.where(kl > _INFINITE, float("inf"), kl))
        kl = tl.where(r == 0, float("nan"), kl)  # a reference row of nothing but -inf
        target_y = tl.load(TARGET_XY + num_rows + rows, mask=inside, other=0.0)
        ref_logp = (target_y * scale - n - tl.log2(r)) * _LN2 + wrong
        ref_logp = tl.where(ref_logp > 0, 0.0, ref_logp)
        tl.store(KL + rows, tl.where(ignored, 0.0, kl), mask=inside)
        tl.store(REF_LOGP + rows, tl.where(ignored, 0.0, ref_logp), mask=inside)
        tl.store(MOMENTS + 3 * num_rows + rows, n, mask=inside)
        tl.store(MOMENTS + 4 * num_rows + rows, mean_d, mask=inside)


@jit
def _write_gradient(X, Y, DX, start, lane, end, target, m, n, a, b, c, g, scale,
                    HAS_B: tl.constexpr, softcap: tl.constexpr, MASKED: tl.constexpr):
    """One tile of dx = e (a + b z + c D) + g 1{target}, times the slope of the soft cap."""
    columns = start + lane
    x = _load(X, columns, end, softcap, MASKED)  # [BLOCK]
    z = x * scale - m
    e = tl.exp2(z)
    z = tl.maximum(z, _LOWEST)
    f = a
    if HAS_B:
        f = f + b * z
    if Y is not None:
        w = _load(Y, columns, end, softcap, MASKED) * scale - n
        f = f + c * tl.minimum(z - w, _HIGHEST)
    dx = e * f
    if (target >= start) & (target < end):
        dx = dx + tl.where(columns == target, g, 0.0)
    if softcap > 0:
        dx = dx * (1 - (x / softcap) * (x / softcap))
    if MASKED:
        tl.store(DX + columns, dx.to(DX.dtype.element_ty), mask=columns < end)
    else:
        tl.store(DX + columns, dx.to(DX.dtype.element_ty))


@jit
def _backward_kernel(X, Y, TARGETS, MOMENTS, G_LOGP, G_ENTROPY, G_KL, DX, stride_x, stride_y, stride_dx, num_rows, V,
                     first, tiles, temperature: tl.constexpr, softcap: tl.constexpr, BLOCK: tl.constexpr):
    """Program (row, split): a row's coefficients from its moments, then elementwise, so DX may be X."""
    row = tl.program_id(0).to(tl.int64)
    X += row * stride_x
    DX += row * stride_dx
    MOMENTS += row
    begin = tl.program_id(1) * tiles * BLOCK
    end = tl.minimum(begin + tiles * BLOCK, V)
    lane = tl.arange(0, BLOCK)
    target = tl.load(TARGETS + row)
    if target < 0:
        for start in range(begin, end, BLOCK):
            tl.store(DX + start + lane, tl.zeros([BLOCK], DX.dtype.element_ty), mask=start + lane < end)
        return
    target = (target - first).to(tl.int32)
    scale: tl.constexpr = _LOG2E / temperature
    m = tl.load(MOMENTS)
    inverse = 1 / (temperature * tl.load(MOMENTS + num_rows))
    n, a, b, c, g = 0.0, 0.0, 0.0, 0.0, 0.0
    if G_LOGP is not None:
        g = tl.load(G_LOGP + row) / temperature
        a = -tl.load(G_LOGP + row) * inverse
    if G_ENTROPY is not None:
        b = -tl.load(G_ENTROPY + row) * inverse * _LN2
        a = a - b * tl.load(MOMENTS + 2 * num_rows)
    if Y is not None:
        Y += row * stride_y
        n = tl.load(MOMENTS + 3 * num_rows)
        c = tl.load(G_KL + row) * inverse * _LN2
        a = a - c * tl.load(MOMENTS + 4 * num_rows)
    HAS_B: tl.constexpr = G_ENTROPY is not None
    whole = begin + (end - begin) // BLOCK * BLOCK
    for start in range(begin, whole, BLOCK):
        _write_gradient(X, Y, DX, start, lane, start + BLOCK, target, m, n, a, b, c, g, scale, HAS_B, softcap, False)
    if whole < end:
        _write_gradient(X, Y, DX, whole, lane, end, target, m, n, a, b, c, g, scale, HAS_B, softcap, True)


def _split(num_rows: int, vocab: int) -> tuple[int, int]:
    """(tiles of a split, splits of a row): enough programs to fill the GPU, also for few rows."""
    tiles = triton.cdiv(vocab, BLOCK)
    each = triton.cdiv(tiles, min(MAX_SPLITS, tiles, triton.cdiv(ROW_PROGRAMS, num_rows)))
    return each, triton.cdiv(tiles, each)


def _unit_stride(x: Tensor | None) -> Tensor | None:
    return x if x is None or x.stride(1) == 1 else x.contiguous()


def _forward_triton(logits, ref_logits, targets, options) -> tuple[TokenStats, Tensor]:
    """As `_forward_torch`, with the moments in bits."""
    x, y, targets = _unit_stride(logits), _unit_stride(ref_logits), targets.contiguous()
    n, v = x.shape
    stats = TokenStats(*(torch.empty(n, device=x.device) if i < 2 or y is not None else None for i in range(4)))
    moments = torch.empty(3 if y is None else 5, n, device=x.device)
    if n == 0:
        return stats, moments
    tiles, splits = _split(n, v)
    parts, target_xy = torch.empty(splits, 6, n, device=x.device), torch.empty(2, n, device=x.device)
    strides = x.stride(0), 0 if y is None else y.stride(0)
    with torch.cuda.device_of(x):
        _forward_kernel[n, splits](x, y, targets, parts, target_xy, *strides, n, v, tiles, options.temperature,
                                   options.softcap, BLOCK, num_warps=1, num_stages=1)
        _combine_kernel[(triton.cdiv(n, 32),)](parts, target_xy, targets, *stats, moments, n, v, splits,
                                               options.temperature, triton.next_power_of_2(splits), 32)
    return stats, moments


def _backward_triton(logits, ref_logits, targets, moments, grads, options, out, first=0) -> None:
    """As `_backward_torch`."""
    g_logp, g_entropy, g_kl = (g if g is None else g.float().contiguous() for g in grads)
    x, y, targets = _unit_stride(logits), None if g_kl is None else _unit_stride(ref_logits), targets.contiguous()
    dx = out if out.stride(1) == 1 else torch.empty_like(out, memory_format=torch.contiguous_format)
    (n, v), strides = x.shape, (x.stride(0), 0 if y is None else y.stride(0), dx.stride(0))
    if n:
        tiles, splits = _split(n, v)
        with torch.cuda.device_of(x):
            _backward_kernel[n, splits](x, y, targets, moments, g_logp, g_entropy, g_kl, dx, *strides, n, v, first,
                                        tiles, options.temperature, options.softcap, BLOCK, num_warps=1, num_stages=1)
    if dx is not out:
        out.copy_(dx)


class _RowStats(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, ref_logits, targets, options, inplace):
        stats, moments = _rows(options)[0](logits, ref_logits, targets, options)
        ctx.save_for_backward(logits, ref_logits, targets, moments)
        ctx.options, ctx.inplace = options, inplace
        _mark_outputs(ctx, stats)
        return tuple(stats)

    @staticmethod
    @once_differentiable
    def backward(ctx, g_logp, g_entropy, g_kl, _):
        logits, ref_logits, targets, moments = ctx.saved_tensors
        out = logits.detach() if ctx.inplace else torch.empty_like(logits)
        grads = (g_logp, g_entropy, g_kl)
        _rows(ctx.options)[1](logits, ref_logits, targets, moments, grads, ctx.options, out)
        return out, None, None, None, None


def _mark_outputs(ctx, stats: Sequence[Tensor | None]) -> None:
    """The reference is a constant, and an output that the loss does not use sends back None, not zeros."""
    ctx.set_materialize_grads(False)
    if stats[3] is not None:
        ctx.mark_non_differentiable(stats[3])


# ---------------------------------------------------------------------------------------------- the head, in chunks


class _Head:
    """hidden @ weight.T of some tokens and columns, fp32, in one buffer that every call overwrites."""

    def __init__(self, hidden: Tensor, weight: Tensor):
        # bf16 products with fp32 sums on a GPU; else fp32: fp16 gradients would underflow, and CPUs gain nothing
        self.dtype = torch.bfloat16 if hidden.is_cuda and hidden.dtype == torch.bfloat16 else torch.float32
        self.hidden, self.weight = hidden.to(self.dtype), weight.to(self.dtype)  # [N, H], [V, H]
        self.buffer = hidden.new_empty(0, dtype=torch.float32)

    def logits(self, rows: slice, columns: slice = slice(None)) -> Tensor:
        h, w = self.hidden[rows], self.weight[columns]
        if self.buffer.numel() < len(h) * len(w):
            self.buffer = self.buffer.new_empty(len(h) * len(w))
        out = self.buffer[: len(h) * len(w)].view(len(h), len(w))
        return _product(h, w.t(), out)  # [C, V]

    def gradient_buffer(self, logits: Tensor) -> Tensor:
        """Where d loss / d logits goes, in the dtype of the products: over the logits, if they have it."""
        return logits if logits.dtype == self.dtype else torch.empty_like(logits, dtype=self.dtype)


def _product(a: Tensor, b: Tensor, out: Tensor, add: bool = False) -> Tensor:
    """out = a @ b, or out += a @ b, with fp32 `out` whatever the inputs are (and autocast leaves `out=` alone)."""
    dtype = {} if a.dtype == out.dtype else {"out_dtype": out.dtype}
    return torch.addmm(out, a, b, **dtype, out=out) if add else torch.mm(a, b, **dtype, out=out)


def _chunks(total: int, size: int) -> Iterator[slice]:
    """Slices of `size`; one empty slice for a total of 0, so that a rank without tokens returns empty stats."""
    return (slice(i, min(i + size, total)) for i in range(0, max(total, 1), size))


def _heads(hidden, weight, ref_hidden, ref_weight) -> tuple[_Head, _Head | None]:
    return _Head(hidden, weight), None if ref_hidden is None else _Head(ref_hidden, ref_weight)


def _concat(parts: Sequence[tuple]) -> tuple:
    return tuple(None if column[0] is None else torch.cat(column, dim=-1) for column in zip(*parts, strict=True))


class _LinearStats(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, ref_hidden, ref_weight, targets, options):
        head, ref_head = _heads(hidden, weight, ref_hidden, ref_weight)
        parts = []
        for rows in _chunks(len(targets), options.chunk_size):
            y = None if ref_head is None else ref_head.logits(rows)
            stats, moments = _rows(options)[0](head.logits(rows), y, targets[rows], options)
            parts.append((*stats, moments))
        *stats, moments = _concat(parts)
        ctx.save_for_backward(hidden, weight, ref_hidden, ref_weight, targets, moments)
        ctx.options = options
        _mark_outputs(ctx, stats)
        return tuple(stats)

    @staticmethod
    @once_differentiable
    def backward(ctx, g_logp, g_entropy, g_kl, _):
        hidden, weight, ref_hidden, ref_weight, targets, moments = ctx.saved_tensors
        head, ref_head = _heads(hidden, weight, None if g_kl is None else ref_hidden, ref_weight)
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        d_hidden = torch.zeros_like(hidden, dtype=torch.float32) if need_hidden else None
        d_weight = torch.empty_like(weight) if need_weight else None
        everything, width = slice(None), max(1, ctx.options.chunk_size * len(weight) // max(1, len(hidden)))
        for columns in _chunks(len(weight), width):
            x = head.logits(everything, columns)  # [N, C V / N]
            y = None if ref_head is None else ref_head.logits(everything, columns)
            d, grads = head.gradient_buffer(x), (g_logp, g_entropy, g_kl)
            _rows(ctx.options)[1](x, y, targets, moments, grads, ctx.options, d, columns.start)
            if need_weight:
                d_weight[columns] = d.t() @ head.hidden
            if need_hidden:
                _product(d, head.weight[columns], d_hidden, add=True)
        return None if d_hidden is None else d_hidden.to(hidden.dtype), d_weight, None, None, None, None


class _LinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, ref_hidden, ref_weight, targets, loss_fn, extras, options, grad_enabled):
        forward, backward = _rows(options)
        head, ref_head = _heads(hidden, weight, ref_hidden, ref_weight)
        need_hidden, need_weight = (need and grad_enabled for need in ctx.needs_input_grad[:2])
        loss = torch.zeros((), device=hidden.device)
        d_hidden = torch.zeros_like(hidden, dtype=torch.float32) if need_hidden else None
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        parts = []
        for rows in _chunks(len(targets), options.chunk_size):
            x = head.logits(rows)  # [C, V]
            y = None if ref_head is None else ref_head.logits(rows)
            stats, moments = forward(x, y, targets[rows], options)
            chunk_loss, grads = _loss_and_gradients(loss_fn, stats, [extra[rows] for extra in extras])
            loss += chunk_loss
            parts.append(stats)
            if need_hidden or need_weight:
                d = head.gradient_buffer(x)
                backward(x, y, targets[rows], moments, grads, options, d)
            if need_hidden:
                _product(d, head.weight, d_hidden[rows])
            if need_weight:
                _product(d.t(), head.hidden[rows], d_weight, add=True)
        ctx.grads = [None if d is None else d.to(hidden.dtype) for d in (d_hidden, d_weight)]
        stats = _concat(parts)
        ctx.mark_non_differentiable(*(x for x in stats if x is not None))
        ctx.set_materialize_grads(False)
        return loss, *stats

    @staticmethod
    @once_differentiable
    def backward(ctx, g_loss, *_):
        if ctx.grads is None:
            raise RuntimeError("linear_policy_loss gave its gradients to the first backward: compute the loss again")
        grads, ctx.grads = ctx.grads, None
        return *(None if d is None else d.mul_(g_loss) for d in grads), *[None] * 7


def _loss_and_gradients(loss_fn, stats: TokenStats, extras: list[Tensor]) -> tuple[Tensor, list[Tensor | None]]:
    """The chunk's loss, and its gradients with respect to logp, entropy and kl, [C] or None."""
    leaves = [None if x is None else x.detach().requires_grad_() for x in stats[:3]]
    with torch.enable_grad():
        loss = loss_fn(TokenStats(*leaves, stats.ref_logp), *extras)
    _require(loss.ndim == 0, f"loss_fn returned shape {tuple(loss.shape)}, it must return a sum over its tokens")
    used = [x for x in leaves if x is not None]
    grads = torch.autograd.grad(loss, used, allow_unused=True) if loss.requires_grad else [None] * len(used)
    return loss.detach(), [*grads, *[None] * (3 - len(used))]
