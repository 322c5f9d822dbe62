"""kernels.py against float64, every implementation on the same inputs.

Without a GPU the Triton kernels run in Triton's interpreter (conftest.py), honest about bf16 by interp_shim.py. That
shows neither data races nor speed: `gpu` marks what only a GPU shows, and test_kernels_aot.py reads the machine code.
"""

import doctest
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kernels
from kernels import TokenStats, linear_policy_loss, linear_token_stats, scaled_logits, token_stats

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
ROOT = Path(__file__).parent.parent
IMPLS = ["torch", pytest.param("triton", marks=pytest.mark.skipif(kernels.triton is None, reason="no triton here"))]
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")  # numpy's, at infinities that are meant
if kernels.triton is not None:
    import interp_shim

    if not ON_GPU:
        interp_shim.install()


@pytest.fixture(autouse=True)
def few_threads():
    torch.set_num_threads(1)


@pytest.fixture(params=IMPLS)
def impl(request):
    return request.param


@pytest.fixture
def big_tiles(monkeypatch):
    """The interpreter's time goes with the number of tiles."""
    if not ON_GPU:
        monkeypatch.setattr(kernels, "BLOCK", 16384)


# ---------------------------------------------------------------------------------------------------------- oracle


def softcapped(x, softcap):
    return softcap * torch.tanh(x / softcap) if softcap else x


def oracle(x, targets, y=None, temperature=1.0, softcap=0.0, grads=(None, None, None)):
    """The four numbers and d(sum of g * numbers)/dx in float64, by the textbook; -inf and ignored rows included."""
    x, y = x.detach().double(), x.detach().double() if y is None else y.detach().double()
    alive = (targets >= 0).double()
    logp = (softcapped(x, softcap) / temperature).log_softmax(-1)
    logq = (softcapped(y, softcap) / temperature).log_softmax(-1)
    p, index = logp.exp(), targets.clamp(min=0)[:, None]
    zero = torch.zeros_like(p)
    entropy = -torch.where(p > 0, p * logp, zero).sum(-1)
    kl = torch.where(p > 0, p * (logp - logq), zero).sum(-1)
    stats = [logp.gather(1, index)[:, 0], entropy, kl, logq.gather(1, index)[:, 0]]
    g_logp, g_entropy, g_kl = (torch.zeros(len(x)).double().to(x.device) if g is None else g.double() for g in grads)
    d = g_logp[:, None] * (torch.nn.functional.one_hot(index[:, 0], x.shape[1]) - p)
    d -= g_entropy[:, None] * torch.where(p > 0, p * (logp + entropy[:, None]), zero)
    d += torch.where((p > 0) & (g_kl[:, None] != 0), g_kl[:, None] * p * (logp - logq - kl[:, None]), zero)
    if softcap:
        d *= 1 - torch.tanh(x / softcap) ** 2
    return [torch.where(targets >= 0, s, 0.0) for s in stats], torch.where(alive[:, None] > 0, d / temperature, zero)


def make_rows(n, v, dtype=torch.float32, seed=0, spread=2.0):
    """Logits, reference logits and targets; the last target is the last column, which sits in the ragged last tile."""
    gen = torch.Generator().manual_seed(seed)
    x = torch.randn(n, v, generator=gen) * spread
    y = x + torch.randn(n, v, generator=gen) * 0.5
    targets = torch.randint(0, v, (n,), generator=gen)
    targets[-1] = v - 1
    targets[0] = x[0].argmax()  # a likely token, not only unlikely ones
    return x.to(dtype).to(DEVICE), y.to(dtype).to(DEVICE), targets.to(DEVICE)


def make_grads(n, seed=1):
    return torch.randn(3, n, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def backpropagate(stats, grads):
    outputs = [(s, g) for s, g in zip(stats, grads, strict=False) if g is not None and s is not None]
    torch.autograd.backward([s for s, _ in outputs], [g for _, g in outputs])


def worst(stats, expected):
    return max((s.double() - e).abs().max().item() for s, e in zip(stats, expected, strict=True))


def relative(d, expected):
    return ((d.double() - expected).norm() / expected.norm()).item()


def test_oracle_gradient_is_autograds():
    x, y, targets = make_rows(5, 40)
    grads = make_grads(5)
    leaf = x.double().requires_grad_()
    logp = (softcapped(leaf, 6.0) / 0.7).log_softmax(-1)
    logq = (softcapped(y.double(), 6.0) / 0.7).log_softmax(-1)
    stats = logp.gather(1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1), (logp.exp() * (logp - logq)).sum(-1)
    backpropagate(stats, grads.double())
    expected, d = oracle(x, targets, y, 0.7, 6.0, grads)
    assert worst(stats, expected[:3]) < 1e-12 and relative(leaf.grad, d) < 1e-12


# ------------------------------------------------------------------------------------------------- rows of logits


@pytest.mark.parametrize("softcap", [0.0, 10.0])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("v", [7, 1000, 2053, 4099])
def test_rows_agree_with_float64(v, dtype, softcap, impl, monkeypatch):
    if v == 4099:  # few rows are split over many programs: here one program takes all five tiles of a row
        monkeypatch.setattr(kernels, "ROW_PROGRAMS", 1)
    n = 9
    x, y, targets = make_rows(n, v, DTYPES[dtype])
    x.requires_grad_()
    grads = make_grads(n)
    stats = token_stats(x, targets, y, 0.7, softcap, impl)
    backpropagate(stats, grads)
    expected, d = oracle(x, targets, y, 0.7, softcap, grads)
    assert all(s.dtype == torch.float32 and s.shape == (n,) for s in stats)
    assert worst(stats, expected) < 1e-5
    assert x.grad.dtype == x.dtype and relative(x.grad, d) < (1e-4 if dtype == "fp32" else 5e-3)


@pytest.mark.parametrize("v, dtype", [(50257, "bf16"), (151936, "bf16"), (151936, "fp32")])
def test_large_vocabularies_agree_with_float64(v, dtype, impl, big_tiles):
    x, y, targets = make_rows(4, v, DTYPES[dtype])
    x.requires_grad_()
    grads = make_grads(4)
    stats = token_stats(x, targets, y, 1.3, impl=impl)
    backpropagate(stats, grads)
    expected, d = oracle(x, targets, y, 1.3, 0.0, grads)
    assert worst(stats, expected) < 1e-5
    assert relative(x.grad, d) < (1e-4 if dtype == "fp32" else 5e-3)


@pytest.mark.parametrize("used", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)])
def test_each_gradient_alone(used, impl):
    x, y, targets = make_rows(6, 2053)
    x.requires_grad_()
    grads = [g if i in used else None for i, g in enumerate(make_grads(6))]
    backpropagate(token_stats(x, targets, y, 0.9, impl=impl), grads)
    assert relative(x.grad, oracle(x, targets, y, 0.9, 0.0, grads)[1]) < 1e-4


def test_without_a_reference_there_is_no_kl(impl):
    x, _, targets = make_rows(6, 1000)
    x.requires_grad_()
    grads = [*make_grads(6)[:2], None]
    stats = token_stats(x, targets, impl=impl)
    assert stats.kl is None and stats.ref_logp is None
    backpropagate(stats, grads)
    expected, d = oracle(x, targets, None, 1.0, 0.0, grads)
    assert worst(stats[:2], expected[:2]) < 1e-5 and relative(x.grad, d) < 1e-4


@pytest.mark.parametrize("shift, programs", [(-200.0, 1), (200.0, 1), (200.0, 4096)])
def test_shifted_rows_lose_no_digits(shift, programs, impl, monkeypatch):
    """lse - E[x] would cancel: centring keeps the error at the rounding of the logits themselves."""
    monkeypatch.setattr(kernels, "ROW_PROGRAMS", programs)
    x, y, targets = make_rows(6, 2053)
    x, y = x + shift, y - shift
    x[0, :1024] += 20.0  # tiles of different height, as the running maximum sees them
    x[1, 1024:] += 20.0
    x.requires_grad_()
    grads = make_grads(6)
    stats = token_stats(x, targets, y, 0.8, impl=impl)
    backpropagate(stats, grads)
    expected, d = oracle(x, targets, y, 0.8, 0.0, grads)
    assert worst(stats, expected) < 3e-5 and relative(x.grad, d) < 1e-4


def test_peaked_and_negative_rows_on_a_ragged_vocabulary(impl):
    """Masked lanes must not count as exp(0): next to all-negative logits that phantom mass once gave a logp of +123."""
    x, y, targets = make_rows(6, 2053)
    x, y = x - 60.0, y - 60.0
    x[torch.arange(6), targets] += 40.0
    stats = token_stats(x, targets, y, impl=impl)
    assert worst(stats, oracle(x, targets, y)[0]) < 1e-5
    assert (stats.logp <= 0).all() and stats.logp.min() > -1e-3


@pytest.mark.parametrize("programs", [1, 4096])
def test_masked_logits(programs, impl, monkeypatch):
    monkeypatch.setattr(kernels, "ROW_PROGRAMS", programs)
    x, y, targets = make_rows(8, 2053)
    allowed = torch.arange(2053, device=DEVICE) % 3 == 0
    both, only_policy, start, reference_only = slice(0, 2), slice(2, 4), slice(4, 6), slice(6, 8)
    targets = torch.full_like(targets, 1500)
    x[both, ~allowed] = -torch.inf
    y[both, ~allowed] = -torch.inf
    x[only_policy, ~allowed] = -torch.inf
    x[start, :1024] = -torch.inf  # a first tile without any mass
    y[reference_only, ~allowed] = -torch.inf
    x.requires_grad_()
    grads = make_grads(8)
    grads[2, reference_only] = 0.0
    stats = token_stats(x, targets, y, 0.7, impl=impl)
    backpropagate(stats, grads)
    expected, d = oracle(x, targets, y, 0.7, 0.0, grads)
    finite = slice(0, 6)
    assert worst([s[finite] for s in stats], [e[finite] for e in expected]) < 1e-5
    assert stats.kl[reference_only].isposinf().all() and expected[2][reference_only].isposinf().all()
    assert worst([stats.logp, stats.entropy, stats.ref_logp], [expected[i] for i in (0, 1, 3)]) < 1e-5
    assert relative(x.grad, d) < 1e-4 and (x.grad[:4, ~allowed] == 0).all()


@pytest.mark.parametrize("which", ["policy", "reference", "nan"])
def test_hopeless_rows_give_nan_and_spoil_no_other(which, impl):
    x, y, targets = make_rows(3, 1100)
    (y if which == "reference" else x)[1] = -torch.inf
    if which == "nan":
        x[1] = 0.0
        x[1, 1050] = torch.nan
    stats = token_stats(x, targets, y, impl=impl)
    assert stats.kl[1].isnan() and (stats.ref_logp if which == "reference" else stats.logp)[1].isnan()
    keep = [0, 2]
    assert worst([s[keep] for s in stats], oracle(x[keep], targets[keep], y[keep])[0]) < 1e-5


@pytest.mark.parametrize("v", [1000, 4099])
def test_kl_to_itself_is_exactly_zero_and_never_negative(v, impl):
    x, _, targets = make_rows(16, v, spread=4.0)
    x.requires_grad_()
    stats = token_stats(x, targets, x.detach().clone(), 0.7, impl=impl)
    assert (stats.kl == 0).all() and torch.equal(stats.logp, stats.ref_logp)
    stats.kl.sum().backward()
    assert (x.grad == 0).all()
    near = token_stats(x.detach(), targets, x.detach() + 1e-4 * torch.randn_like(x), impl=impl)
    assert (near.kl >= 0).all() and near.kl.max() < 1e-6


def test_certain_rows_are_exact(impl):
    x = torch.full((2, 1100), -1e4, device=DEVICE)
    x[:, 1050] = 300.0
    stats = token_stats(x, torch.tensor([1050, 3], device=DEVICE), impl=impl)
    assert stats.logp[0] == 0 and (stats.entropy == 0).all()
    assert stats.logp[1].item() == pytest.approx(-10300.0, rel=1e-6)


def test_ignored_rows_are_zero_whatever_they_hold(impl):
    x, y, targets = make_rows(6, 1100)
    targets[1], targets[4] = -100, -1
    x[1], y[4, 5] = torch.nan, torch.inf
    x.requires_grad_()
    grads = make_grads(6)
    stats = token_stats(x, targets, y, impl=impl)
    backpropagate(stats, grads)
    for s in stats:
        assert s[1] == 0 and s[4] == 0
    assert (x.grad[[1, 4]] == 0).all()
    keep = [0, 2, 3, 5]
    expected, d = oracle(x[keep], targets[keep], y[keep], grads=grads[:, keep])
    assert worst([s[keep] for s in stats], expected) < 1e-5 and relative(x.grad[keep], d) < 1e-4


def test_strides(impl):
    """A padded vocabulary, every second row, a column-major reference, an upstream gradient of one expanded number."""
    wide, y, targets = make_rows(12, 1100)
    wide.requires_grad_()
    x = wide[::2, :1003]
    y, targets = y[:6, :1003].t().contiguous().t(), targets[:6].clamp(max=1002)
    assert x.stride() == (2200, 1) and y.stride() == (1, 6)
    stats = token_stats(x, targets, y, impl=impl)
    (stats.logp.sum() + 2 * stats.kl.sum()).backward()
    ones = torch.ones(6, device=DEVICE)
    expected, d = oracle(x, targets, y, grads=(ones, None, 2 * ones))
    assert worst(stats, expected) < 1e-5 and relative(wide.grad[::2, :1003], d) < 1e-4
    assert (wide.grad[1::2] == 0).all() and (wide.grad[:, 1003:] == 0).all()


def test_column_major_logits(impl):
    x, y, targets = make_rows(6, 1100)
    x = x.t().contiguous().t().requires_grad_()
    grads = make_grads(6)
    stats = token_stats(x, targets, y, impl=impl)
    backpropagate(stats, grads)
    expected, d = oracle(x, targets, y, grads=grads)
    assert worst(stats, expected) < 1e-5 and relative(x.grad, d) < 1e-4


def test_writing_into_an_output_does_not_reach_the_backward(impl):
    x, y, targets = make_rows(6, 1100)
    x.requires_grad_()
    stats = token_stats(x, targets, y, impl=impl)
    loss = (stats.logp * 1.0).sum() + (stats.entropy * 1.0).sum() + (stats.kl * 1.0).sum()
    for s in stats:
        s.detach().fill_(1e9)
    loss.backward()
    ones = torch.ones(6, device=DEVICE)
    assert relative(x.grad, oracle(x, targets, y, grads=(ones, ones, ones))[1]) < 1e-4


@pytest.mark.parametrize("dtype", DTYPES)
def test_inplace_writes_the_gradient_over_the_logits(dtype, impl):
    x, y, targets = make_rows(6, 1100, DTYPES[dtype])
    grads = make_grads(6)
    expected = oracle(x, targets, y, grads=grads)[1]
    leaf = x.clone().requires_grad_()
    logits = leaf * 1  # the product of a head: nobody else reads it
    backpropagate(token_stats(logits, targets, y, impl=impl, inplace=True), grads)
    assert relative(logits.detach(), expected) < (1e-4 if dtype == "fp32" else 5e-3)
    assert torch.equal(leaf.grad, logits.detach())


def test_targets_of_any_integer_type_and_stride(impl):
    x, y, targets = make_rows(6, 1000)
    expected = token_stats(x, targets, y, impl=impl)
    strided = torch.stack([targets.int(), targets.int()], dim=1)[:, 0]
    for s, e in zip(token_stats(x, strided, y, impl=impl), expected, strict=True):
        assert torch.equal(s, e)


def test_repeats_are_bit_identical(impl):
    x, y, targets = make_rows(5, 4099, torch.bfloat16)
    runs = []
    for _ in range(2):
        leaf = x.clone().requires_grad_()
        stats = token_stats(leaf, targets, y, 0.7, impl=impl)
        backpropagate(stats, make_grads(5))
        runs.append([*stats, leaf.grad])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.skipif(kernels.triton is None, reason="no triton here")
@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("block, programs", [(1024, 1), (1024, 20), (512, 4096), (256, 16), (8192, 1)])
def test_splits_and_tiles_do_not_matter(block, programs, softcap, monkeypatch):
    monkeypatch.setattr(kernels, "BLOCK", block)
    monkeypatch.setattr(kernels, "ROW_PROGRAMS", programs)
    x, y, targets = make_rows(5, 4099)
    x[0, :2048] = -50.0 if softcap else -torch.inf  # whole splits without any mass
    targets[0] = 3000
    x.requires_grad_()
    grads = make_grads(5)
    stats = token_stats(x, targets, y, 0.7, softcap, impl="triton")
    backpropagate(stats, grads)
    expected, d = oracle(x, targets, y, 0.7, softcap, grads)
    assert worst(stats, expected) < 1e-5 and relative(x.grad, d) < 1e-4


@pytest.mark.skipif(kernels.triton is None, reason="no triton here")
def test_split_covers_every_tile_once():
    for rows in (1, 5, 131, 4224, 100_000):
        for vocab in (1, 1024, 1025, 50257, 151_936, 262_144):
            each, splits = kernels._split(rows, vocab)
            tiles = -(-vocab // kernels.BLOCK)
            assert 1 <= splits <= kernels.MAX_SPLITS and (splits - 1) * each < tiles <= splits * each
    assert kernels._split(8192, 151_936)[1] == 1 and kernels._split(1, 151_936)[1] > 32


OFFSETS = """
import sys
sys.path[:0] = ["{root}", "{root}/tests"]
import conftest, torch, kernels
torch.manual_seed(0)
kernels.BLOCK = 16384
far = torch.empty(4 << 30, dtype=torch.bfloat16)  # 8 GiB of address space, of which 160 KB are touched
x = far.as_strided((4, 20000), (1 << 30, 1)).copy_(torch.randn(4, 20000)).requires_grad_()
y, targets = torch.randn(4, 20000).bfloat16(), torch.tensor([5, 17000, 3, 19999])
near = x.detach().clone().requires_grad_()
expected = kernels.token_stats(near, targets, y, impl="torch")
stats = kernels.token_stats(x, targets, y, impl="{impl}", inplace=True)
assert all((a - b).abs().max() < 1e-5 for a, b in zip(stats, expected))
(stats.logp + stats.kl).sum().backward()
(expected.logp + expected.kl).sum().backward()
assert (x.detach()[3].float() - near.grad[3].float()).abs().max() < 0.01 * near.grad[3].float().abs().max()
print("passed")
"""


def test_offsets_beyond_2_to_the_31(impl):
    """row * stride in 32 bits wraps around and reads somewhere else, or dies: hence a process of its own."""
    code = OFFSETS.format(root=ROOT, impl=impl)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "passed" in done.stdout, done.stderr[-2000:]


# -------------------------------------------------------------------------------------------- from hidden states


def make_head(n, h, v, dtype=torch.float32, seed=0, ref=True):
    gen = torch.Generator().manual_seed(seed)
    hidden, weight = torch.randn(n, h, generator=gen), torch.randn(v, h, generator=gen) * 1.5 / h**0.5
    ref_hidden, ref_weight = hidden + 0.1 * torch.randn(n, h, generator=gen), weight + 0.1 * weight.flip(0)
    targets = torch.randint(0, v, (n,), generator=gen)
    targets[-1], targets[n // 2] = v - 1, -100
    tensors = [t.to(dtype).to(DEVICE) for t in (hidden, weight, ref_hidden, ref_weight)]
    return [tensors[0].requires_grad_(), tensors[1].requires_grad_(), *tensors[2:], targets.to(DEVICE)]


def grpo(stats: TokenStats, old_logp, advantage, weight):
    """Clip 0.2 / 0.28, exact KL, k3, an entropy bonus: every output, with a kink."""
    ratio = (stats.logp - old_logp).exp()
    surrogate = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.28) * advantage)
    k3 = (stats.ref_logp - stats.logp).exp() - (stats.ref_logp - stats.logp) - 1
    return (weight * (-surrogate + 0.05 * stats.kl + 0.01 * k3 - 0.02 * stats.entropy)).sum()


def grpo_extras(hidden, weight, targets, temperature):
    n = len(targets)
    gen = torch.Generator().manual_seed(7)
    logp = oracle(hidden.double() @ weight.double().t(), targets, temperature=temperature)[0][0].float()
    noise, advantage = torch.randn(2, n, generator=gen).to(DEVICE)
    return [logp + 0.2 * noise, advantage, torch.where(targets >= 0, 1 / n, 0.0)]


def float64_loss(hidden, weight, ref_hidden, ref_weight, targets, loss_fn, extras, temperature, softcap=0.0):
    """The loss, its gradients and the stats by float64 autograd on full logits."""
    h, w = (t.detach().double().requires_grad_() for t in (hidden, weight))
    alive, index = targets >= 0, targets.clamp(min=0)[:, None]
    logp = (softcapped(h @ w.t(), softcap) / temperature).log_softmax(-1)
    logq = (softcapped(ref_hidden.double() @ ref_weight.double().t(), softcap) / temperature).log_softmax(-1)
    stats = [logp.gather(1, index)[:, 0], -(logp.exp() * logp).sum(-1), (logp.exp() * (logp - logq)).sum(-1)]
    stats = TokenStats(*(torch.where(alive, s, 0.0) for s in [*stats, logq.gather(1, index)[:, 0]]))
    loss = loss_fn(stats, *extras)
    loss.backward()
    return loss.detach(), h.grad, w.grad, [s.detach() for s in stats]


SHAPES = [(37, 33, 1000, 16), (20, 64, 2053, 20), (10, 48, 4099, 3)]  # ragged in every dimension


@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize("n, h, v, chunk", SHAPES)
def test_linear_paths_agree_with_float64(n, h, v, chunk, softcap, impl):
    """linear_policy_loss goes by chunks of tokens; the backward of linear_token_stats by slices of the vocabulary."""
    hidden, weight, *ref, targets = make_head(n, h, v)
    extras = grpo_extras(hidden, weight, targets, 0.8)
    expected = float64_loss(hidden, weight, *ref, targets, grpo, extras, 0.8, softcap)
    loss, stats = linear_policy_loss(hidden, weight, targets, grpo, extras, *ref, 0.8, softcap, chunk, impl)
    loss.backward()
    assert worst(stats, expected[3]) < 2e-5 and not any(s.requires_grad for s in stats)
    assert abs(loss.item() - expected[0].item()) < 1e-5
    assert relative(hidden.grad, expected[1]) < 1e-4 and relative(weight.grad, expected[2]) < 1e-4
    hidden.grad = weight.grad = None
    stats = linear_token_stats(hidden, weight, targets, *ref, 0.8, softcap, chunk, impl)
    grpo(stats, *extras).backward()
    assert worst(stats, expected[3]) < 2e-5
    assert relative(hidden.grad, expected[1]) < 1e-4 and relative(weight.grad, expected[2]) < 1e-4


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_linear_paths_in_half_precision(dtype, impl):
    """Against float64 on the same rounded inputs. On a CPU the products are fp32; only the gradients are rounded."""
    hidden, weight, *ref, targets = make_head(20, 64, 1100, DTYPES[dtype])
    extras = grpo_extras(hidden, weight, targets, 1.0)
    expected = float64_loss(hidden, weight, *ref, targets, grpo, extras, 1.0)
    loss, stats = linear_policy_loss(hidden, weight, targets, grpo, extras, *ref, chunk_size=8, impl=impl)
    loss.backward()
    tolerance = 3e-2 if ON_GPU else 5e-3
    assert hidden.grad.dtype == weight.grad.dtype == DTYPES[dtype] and loss.dtype == torch.float32
    assert worst(stats, expected[3]) < 2e-5
    assert relative(hidden.grad, expected[1]) < tolerance and relative(weight.grad, expected[2]) < tolerance


@pytest.mark.parametrize("shift", [-200.0, 200.0])
def test_linear_path_under_shifts(shift, impl):
    """A head whose logits all sit at +-200: peaked rows on a ragged vocabulary."""
    hidden, weight, *ref, targets = make_head(20, 32, 2053)
    with torch.no_grad():
        hidden[:, 0], weight[:, 0] = 20.0, shift / 20
        ref[0][:, 0], ref[1][:, 0] = 20.0, shift / 20
        weight[:, 1:] *= 4
    stats = linear_token_stats(hidden, weight, targets, *ref, chunk_size=9, impl=impl)
    # the fp32 product rounds logits of 200 to 1.5e-5, which no later step can undo: compare on its result, chunk by chunk
    x, y = (torch.cat([t @ u.detach().t() for t in h.detach().split(9)]) for h, u in ((hidden, weight), ref))
    assert worst(stats, oracle(x, targets, y)[0]) < 3e-5


def test_the_loss_does_not_depend_on_the_chunk(impl):
    hidden, weight, *ref, targets = make_head(12, 32, 600)
    extras = grpo_extras(hidden, weight, targets, 1.0)
    runs = []
    for chunk in (12, 5, 1, None):
        hidden.grad = weight.grad = None
        loss, stats = linear_policy_loss(hidden, weight, targets, grpo, extras, *ref, chunk_size=chunk, impl=impl)
        loss.backward()
        runs.append([loss, *stats, hidden.grad, weight.grad])
    for run in runs[1:]:
        assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(run, runs[0], strict=True))


def test_linear_repeats_are_bit_identical(impl):
    hidden, weight, *ref, targets = make_head(12, 32, 600)
    extras = grpo_extras(hidden, weight, targets, 1.0)
    runs = []
    for _ in range(2):
        hidden.grad = weight.grad = None
        loss, stats = linear_policy_loss(hidden, weight, targets, grpo, extras, *ref, chunk_size=5, impl=impl)
        loss.backward()
        runs.append([loss, *stats, hidden.grad, weight.grad])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_kl_of_a_head_to_its_copy_is_exactly_zero(impl):
    hidden, weight, _, _, targets = make_head(20, 32, 1000)
    stats = linear_token_stats(
        hidden, weight, targets, hidden.detach().clone(), weight.detach().clone(), chunk_size=8, impl=impl
    )
    assert (stats.kl == 0).all()


def test_autocast_changes_nothing(impl):
    hidden, weight, *ref, targets = make_head(10, 16, 500)
    extras = grpo_extras(hidden, weight, targets, 1.0)
    runs = []
    for enabled in (False, True):
        hidden.grad = weight.grad = None
        with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=enabled):
            loss, stats = linear_policy_loss(hidden, weight, targets, grpo, extras, *ref, chunk_size=4, impl=impl)
            again = linear_token_stats(hidden, weight, targets, *ref, chunk_size=4, impl=impl)
        loss.backward()
        runs.append([loss, *stats, *again, hidden.grad, weight.grad])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_tied_head_adds_the_gradients_of_both_uses(impl):
    weight = torch.randn(300, 16, generator=torch.Generator().manual_seed(0)).to(DEVICE).requires_grad_()
    tokens, targets = torch.arange(12, device=DEVICE), torch.arange(12, device=DEVICE) + 5
    loss, _ = linear_policy_loss(weight[tokens], weight, targets, lambda s: -s.logp.sum(), chunk_size=5, impl=impl)
    loss.backward()
    w = weight.detach().double().requires_grad_()
    torch.nn.functional.cross_entropy(w[tokens] @ w.t(), targets, reduction="sum").backward()
    assert relative(weight.grad, w.grad) < 1e-4


@pytest.mark.parametrize("trained", ["hidden", "weight", "none"])
def test_frozen_parts_get_no_gradient(trained, impl):
    hidden, weight, *ref, targets = make_head(20, 16, 500)
    hidden.requires_grad_(trained == "hidden")
    weight.requires_grad_(trained == "weight")
    extras = grpo_extras(hidden, weight, targets, 1.0)
    expected = float64_loss(hidden, weight, *ref, targets, grpo, extras, 1.0)
    for call in ("loss", "stats"):
        hidden.grad = weight.grad = None
        if call == "loss":
            loss, _ = linear_policy_loss(hidden, weight, targets, grpo, extras, *ref, chunk_size=8, impl=impl)
        else:
            loss = grpo(linear_token_stats(hidden, weight, targets, *ref, chunk_size=8, impl=impl), *extras)
        assert loss.requires_grad == (trained != "none") and abs(loss.item() - expected[0].item()) < 1e-5
        if trained != "none":
            loss.backward()
        for name, leaf, grad in (("hidden", hidden, expected[1]), ("weight", weight, expected[2])):
            assert leaf.grad is None if name != trained else relative(leaf.grad, grad) < 1e-4


def test_no_grad_gives_the_same_loss_and_forms_no_gradient(impl, monkeypatch):
    hidden, weight, *ref, targets = make_head(20, 16, 500)
    extras = grpo_extras(hidden, weight, targets, 1.0)
    loss, _ = linear_policy_loss(hidden, weight, targets, grpo, extras, *ref, impl=impl)
    monkeypatch.setattr(kernels, "_backward", None)
    with torch.no_grad():
        again, stats = linear_policy_loss(hidden, weight, targets, grpo, extras, *ref, impl=impl)
    assert torch.equal(loss.detach(), again) and not again.requires_grad


def test_upstream_scale_reaches_the_gradients(impl):
    hidden, weight, _, _, targets = make_head(20, 16, 500)
    grads = []
    for scale in (1.0, -3.0):
        hidden.grad = weight.grad = None
        loss, _ = linear_policy_loss(hidden, weight, targets, lambda s: s.logp.sum(), chunk_size=8, impl=impl)
        (scale * loss).backward()
        grads.append((hidden.grad, weight.grad))
    assert torch.allclose(grads[1][0], -3 * grads[0][0]) and torch.allclose(grads[1][1], -3 * grads[0][1])


def test_a_second_backward_is_refused(impl):
    hidden, weight, _, _, targets = make_head(10, 16, 500)
    loss, _ = linear_policy_loss(hidden, weight, targets, lambda s: s.logp.sum(), impl=impl)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="compute the loss again"):
        loss.backward()


def test_a_loss_without_gradient_leaves_zeros(impl):
    """A group whose rewards are all equal has advantages of 0, and a loss_fn may drop its tokens altogether."""
    hidden, weight, _, _, targets = make_head(10, 16, 500)
    loss, _ = linear_policy_loss(hidden, weight, targets, lambda s: s.logp.detach().sum() * 0, chunk_size=4, impl=impl)
    loss.backward()
    assert (hidden.grad == 0).all() and (weight.grad == 0).all()


def test_no_tokens_at_all(impl):
    """A rank may hold no token of its own; its gradients are zeros, so that the collectives still match."""
    hidden, weight, *ref, targets = make_head(10, 16, 500)
    empty = hidden[:0]
    loss, stats = linear_policy_loss(empty, weight, targets[:0], lambda s: s.logp.sum() + s.kl.sum(), (),
                                     ref[0][:0], ref[1], impl=impl)  # fmt: skip
    loss.backward()
    assert loss == 0 and all(s.shape == (0,) for s in stats) and (weight.grad == 0).all()
    weight.grad = None
    linear_token_stats(empty, weight, targets[:0], impl=impl).logp.sum().backward()
    assert (weight.grad == 0).all()
    assert token_stats(torch.zeros(0, 5, device=DEVICE), targets[:0], impl=impl).logp.shape == (0,)


def test_a_sequence_ratio_in_two_calls(impl):
    """GSPO: one ratio per sequence couples its tokens. The docstring's recipe against autograd through all of them."""
    hidden, weight, _, _, targets = make_head(24, 16, 500)
    targets = targets.clamp(min=0)
    advantage = torch.tensor([1.0, -2.0, 0.5], device=DEVICE)
    old = oracle(hidden @ weight.t(), targets)[0][0].float() + 0.1 * make_grads(24)[0]

    def gspo(logp):
        ratio = (logp - old).view(3, 8).mean(-1).exp()  # [sequences]
        return -torch.minimum(ratio * advantage, ratio.clamp(0.9, 1.1) * advantage).sum()

    gspo(linear_token_stats(hidden, weight, targets, chunk_size=5, impl=impl).logp).backward()
    expected = hidden.grad, weight.grad
    hidden.grad = weight.grad = None
    with torch.no_grad():
        logp = linear_token_stats(hidden, weight, targets, chunk_size=5, impl=impl).logp
    (g,) = torch.autograd.grad(gspo(logp.requires_grad_()), logp)
    loss, _ = linear_policy_loss(
        hidden, weight, targets, lambda stats, g: (g * stats.logp).sum(), [g], chunk_size=5, impl=impl
    )
    loss.backward()
    assert torch.allclose(hidden.grad, expected[0], rtol=1e-4, atol=1e-6)
    assert torch.allclose(weight.grad, expected[1], rtol=1e-4, atol=1e-6)


MEMORY = """
import resource, sys, torch
sys.path.insert(0, "{root}")
import kernels
torch.set_num_threads(1)
n, h, v = 1024, 16, 32768
hidden, weight = torch.randn(n, h, requires_grad=True), torch.randn(v, h, requires_grad=True)
targets = torch.randint(0, v, (n,))
torch.mm(hidden[:8].detach(), weight.detach().t())  # the library's own buffers
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
if "{path}" == "plain":
    logp = (hidden @ weight.t()).log_softmax(-1)
    loss = logp.gather(1, targets[:, None]).sum() - (logp.exp() * logp).sum()
elif "{path}" == "loss":
    loss_fn = lambda s: s.logp.sum() + s.entropy.sum()
    loss, _ = kernels.linear_policy_loss(hidden, weight, targets, loss_fn, chunk_size=128)
else:
    stats = kernels.linear_token_stats(hidden, weight, targets, chunk_size=128)
    loss = stats.logp.sum() + stats.entropy.sum()
loss.backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ru_maxrss is in other units elsewhere")
def test_full_logits_are_never_held():
    def extra(path):
        code = MEMORY.format(root=ROOT, path=path)
        return int(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, timeout=120).stdout)

    plain = extra("plain")
    assert plain * 1024 > 0.8 * 1024 * 32768 * 4  # it does hold them, but for what the process had to spare
    for path in ("loss", "stats"):
        assert extra(path) < plain / 4


def run_benchmark(tmp_path, *options):
    command = [sys.executable, str(ROOT / "benchmarks" / "kernels.py"), "--cpu", "--json", str(tmp_path / "out.json")]
    subprocess.run([*command, *options], check=True, capture_output=True, timeout=1500)
    return json.loads((tmp_path / "out.json").read_text())["results"]


@pytest.mark.slow
@pytest.mark.parametrize("terms", ["logp[+]entropy$", "logp[+]entropy[+]kl$"])
def test_memory_and_time_of_the_training_default(terms, tmp_path):
    """N=4096 H=576 V=49152 in chunks of 512: under a quarter of the plain path's memory, at most 1.25 of its time."""
    plain, ours = run_benchmark(tmp_path, "--repeats", "1", "--only", f"H=576.*(plain|policy).*{terms}")
    assert plain["name"] == "plain torch" and ours["name"] == "ours, policy loss, torch"
    assert ours["peak"] < plain["peak"] / 4
    assert ours["forward"] + ours["backward"] < 1.25 * (plain["forward"] + plain["backward"])
    assert ours["error"] < 1e-5


@pytest.mark.slow
def test_the_benchmark_runs(tmp_path):
    pytest.importorskip("trl")
    pytest.importorskip("liger_kernel")
    results = run_benchmark(tmp_path, "--quick", "--repeats", "1", "--figure", str(tmp_path / "out.png"))
    assert len(results) == 14 and max(r["error"] for r in results) < 1e-5
    assert (tmp_path / "out.png").stat().st_size > 10_000


# --------------------------------------------------------------------------------------- one distribution, one switch


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_stats_are_those_of_the_scaled_logits(dtype, impl):
    """The sampler draws from softmax(scaled_logits): the log-probs that it records are those of the loss."""
    x, _, targets = make_rows(8, 1000, DTYPES[dtype])
    sampled = scaled_logits(x, 0.6, 20.0).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    assert torch.allclose(token_stats(x, targets, None, 0.6, 20.0, impl).logp, sampled, rtol=0, atol=1e-5)
    assert scaled_logits(x).dtype == torch.float32


def test_wrong_input_is_refused_with_a_remedy():
    x, y, targets = make_rows(4, 50)
    cases = [
        (lambda: token_stats(x[None], targets), "flatten"),
        (lambda: token_stats(x.double(), targets), "cast it"),
        (lambda: token_stats(x.long(), targets), "cast it"),
        (lambda: token_stats(x, targets, y[:, :40]), "one vocabulary"),
        (lambda: token_stats(x, targets[:2]), "a token id per row"),
        (lambda: token_stats(x, targets.float()), "a token id per row"),
        (lambda: token_stats(x, targets, temperature=0.0), "above 0"),
        (lambda: token_stats(x, targets, temperature=float("nan")), "above 0"),
        (lambda: token_stats(x, targets, softcap=-1.0), "softcap is -1.0"),
        (lambda: token_stats(x, targets, impl="cuda"), "use 'torch' or 'triton'"),
        (lambda: linear_token_stats(x, y, targets, ref_hidden=x), "both or neither"),
        (lambda: linear_token_stats(x, y[:, :9], targets), r"\[vocabulary, width\]"),
        (lambda: linear_token_stats(x, y.bfloat16(), targets), "one dtype"),
        (lambda: linear_token_stats(x, y, targets % 4, x[:3], y), "must be equal"),
        (lambda: linear_token_stats(x, y, targets % 4, x, y[:3]), "must be equal"),
        (lambda: linear_token_stats(x, y, targets % 4, chunk_size=0), "at least 1 token"),
        (lambda: linear_policy_loss(x, y, targets % 4, grpo, [x[:3, 0]]), r"extras\[0\]"),
        (lambda: linear_policy_loss(x, y, targets % 4, lambda s: s.logp), "must return a sum"),
    ]
    if not ON_GPU:
        cases += [(lambda: token_stats(x, targets + 50), "not below the vocabulary size 50")]
    for call, match in cases:
        with pytest.raises(ValueError, match=match):
            call()


def test_a_wrong_id_that_nobody_checked_gives_nan(impl):
    """On a GPU the check would wait for the device, so the kernels themselves must not return a number."""
    x, y, targets = make_rows(4, 1100)
    targets[2] = 1100
    stats = TokenStats(*kernels._forward(x, y, targets, kernels._Options(1.0, 0.0, impl, 1))[0])
    assert stats.logp[2].isnan() and not stats.logp[[0, 1, 3]].isnan().any()


def test_the_switch_is_the_argument_else_the_environment_else_torch(monkeypatch):
    choose, cpu, gpu = kernels.choose, torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(kernels, "triton", None)
    monkeypatch.delenv("SESA_KERNELS", raising=False)
    assert choose("auto", cpu) == choose("torch", cpu) == choose("auto", gpu) == choose("torch", gpu) == "torch"
    with pytest.raises(ValueError, match="'triton' but triton is not installed"):
        choose("triton", gpu)
    monkeypatch.setenv("SESA_KERNELS", "triton")
    with pytest.raises(ValueError, match="not installed: use 'torch'"):
        choose("auto", gpu)
    assert choose("torch", gpu) == "torch"
    monkeypatch.setenv("SESA_KERNELS", "cuda")
    with pytest.raises(ValueError, match="SESA_KERNELS is 'cuda'"):
        choose("auto", gpu)


@pytest.mark.skipif(kernels.triton is None, reason="no triton here")
def test_the_switch_turns_to_triton(monkeypatch):
    monkeypatch.setenv("SESA_KERNELS", "triton")
    assert kernels.choose("auto", torch.device("cuda")) == "triton"
    monkeypatch.setattr(kernels.triton, "JITFunction", type(kernels._forward_kernel))  # as if it were compiled
    for impl in ("triton", "auto"):
        with pytest.raises(ValueError, match="'cpu' is no GPU"):
            kernels.choose(impl, torch.device("cpu"))
    assert kernels.choose("triton", torch.device("cuda")) == "triton"


def test_without_triton_the_module_works():
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
sys.modules["triton"] = None
import doctest, kernels
assert kernels.triton is None
print(doctest.testmod(kernels).failed)
"""
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "SESA_KERNELS")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120)
    assert done.stdout.strip() == "0", done.stdout + done.stderr


def test_doctests():
    result = doctest.testmod(kernels)
    assert result.attempted >= 8 and result.failed == 0


@pytest.mark.skipif(kernels.triton is None, reason="no triton here")
def test_the_shim_rounds_to_even_and_refuses_bf16_arithmetic():
    x = torch.randn(10_000) * torch.logspace(-20, 20, 10_000)
    x[:3] = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, torch.inf])  # two ties and an infinity
    assert (interp_shim.bf16_bits(x.numpy()) == x.bfloat16().view(torch.int16).numpy().view("uint16")).all()
    back = torch.from_numpy(interp_shim.fp32_values(interp_shim.bf16_bits(x.numpy())))
    assert torch.equal(back, x.bfloat16().float())


# ------------------------------------------------------------------------------------------------ only on a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
def test_more_rows_than_a_grid_axis_may_have():
    x, _, targets = make_rows(70_000, 130, torch.bfloat16)
    stats = token_stats(x, targets, impl="triton")
    assert worst(stats[:2], oracle(x, targets)[0][:2]) < 1e-5


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
def test_torch_compile_around_the_kernels():
    x, y, targets = make_rows(16, 2053, torch.bfloat16)
    leaf = x.clone().requires_grad_()

    @torch.compile
    def loss(logits):
        stats = token_stats(logits, targets, y, 0.7, impl="triton")
        return (stats.logp + stats.entropy + stats.kl).sum()

    loss(leaf).backward()
    ones = torch.ones(16, device=DEVICE)
    assert relative(leaf.grad, oracle(x, targets, y, 0.7, grads=(ones, ones, ones))[1]) < 5e-3


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
@pytest.mark.parametrize("chosen", ["torch", "triton"])
def test_peak_memory_of_the_linear_loss_on_a_gpu(chosen):
    n, h, v, chunk = 8192, 1024, 65_536, 1024
    hidden = torch.randn(n, h, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(v, h, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.randint(0, v, (n,), device=DEVICE)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    linear_policy_loss(hidden, weight, targets, lambda s: s.logp.sum(), chunk_size=chunk, impl=chosen)[0].backward()
    peak = torch.cuda.max_memory_allocated() - before
    blocks = 4 * 2**26 * 4 if chosen == "torch" else 0  # the temporaries of a block of rows
    assert peak < 1.2 * (chunk * v * 6 + v * h * 6 + n * h * 6 + blocks)
