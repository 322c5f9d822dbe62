"""rl.py against loops in float64, against exact distributions, and against TRL's own code."""

import doctest
import functools
import itertools
import math
import random
import statistics
from collections import defaultdict
from fractions import Fraction
from types import SimpleNamespace

import pytest
import torch

import kernels
import rl
from kernels import TokenStats

LOSS_TYPES = ("grpo", "dapo", "dr_grpo")
MAX_NEW_TOKENS = 9


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def random_stats(logits, targets, ref_logits):
    """TokenStats of logits [N, V] in their own precision, differentiable; shares nothing with kernels.py."""
    logp, ref_logp = logits.log_softmax(-1), ref_logits.log_softmax(-1)
    kl = (logp.exp() * (logp - ref_logp)).sum(-1)
    picked = [values.gather(-1, targets[:, None])[:, 0] for values in (logp, ref_logp)]
    return TokenStats(picked[0], -(logp.exp() * logp).sum(-1), kl, picked[1])


def random_batch(lengths, vocabulary=7, dtype=torch.float64):
    """Everything a loss takes, for sequences of these lengths: a policy that has moved away from the old one."""
    tokens = int(lengths.sum())
    logits = torch.randn(tokens, vocabulary, dtype=dtype).requires_grad_()
    targets = torch.randint(vocabulary, (tokens,))
    ref_logits = logits.detach() + 0.5 * torch.randn(tokens, vocabulary, dtype=dtype)
    stats = random_stats(logits, targets, ref_logits)
    old_logp = stats.logp.detach() + 0.4 * torch.randn(tokens, dtype=dtype)
    advantages = torch.randn(len(lengths), dtype=dtype).repeat_interleave(lengths)
    is_weight = torch.rand(tokens, dtype=dtype) * 2
    return SimpleNamespace(
        logits=logits, targets=targets, ref_logits=ref_logits, stats=stats, old_logp=old_logp,
        advantages=advantages, is_weight=is_weight, lengths=lengths, tokens=tokens,
    )  # fmt: skip


def weights_of(batch, loss_type):
    return rl.token_weights(
        batch.lengths, loss_type, num_sequences=len(batch.lengths), num_tokens=batch.tokens,
        max_new_tokens=MAX_NEW_TOKENS,
    )  # fmt: skip


def close(actual, expected, tolerance=1e-12):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance, check_dtype=False)


def test_the_examples_of_the_docstrings():
    results = doctest.testmod(rl)
    assert results.failed == 0 and results.attempted >= 10


# --- advantages ------------------------------------------------------------------------------------------------------


def random_groups(groups=40, size=6):
    """Rewards of 1 for success and crumbs for some failures; about one group in five is decided."""
    success = torch.rand(groups, size, dtype=torch.float64) < torch.rand(groups, 1) * 1.4 - 0.2
    crumbs = 0.1 * (torch.rand(groups, size) < 0.5)
    return torch.where(success, 1.0, crumbs).double(), success


def oracle_group(rewards, success, scale):
    if all(success) or not any(success):
        return [0.0] * len(rewards)
    mean = statistics.fmean(rewards)
    if scale == "std":
        return [(r - mean) / (statistics.stdev(rewards) + 1e-4) for r in rewards]
    if scale == "none":
        return [r - mean for r in rewards]
    return [r - statistics.fmean(rewards[:i] + rewards[i + 1 :]) for i, r in enumerate(rewards)]


@pytest.mark.parametrize("scale", ["std", "none", "loo"])
def test_group_advantages_equal_a_loop(scale):
    rewards, success = random_groups()
    expected = [oracle_group(r, s, scale) for r, s in zip(rewards.tolist(), success.tolist())]
    assert 2 < sum(not any(row) for row in expected) < 30  # the data has decided and undecided groups
    close(rl.group_advantages(rewards, success, scale), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("scale", ["std", "none", "loo", "passk"])
def test_a_group_that_only_failed_or_only_succeeded_gives_exactly_zero(scale):
    """Shaped rewards must not turn a group without outcome variance into a training signal."""
    rewards = torch.tensor([[0.1, 0.0, 0.1, 0.0], [1.0, 0.9, 1.0, 0.8], [1.0, 0.0, 0.1, 0.0]])
    success = torch.tensor([[False] * 4, [True] * 4, [True, False, False, False]])
    advantages = rl.group_advantages(rewards, success, scale, pass_k=2)
    assert advantages[:2].abs().max() == 0 and advantages[2].abs().min() > 0


def test_equal_rewards_give_exactly_zero_where_their_mean_is_rounded():
    rewards = torch.full((11,), 0.1)
    assert (rewards - rewards.mean()).abs().max() > 0  # what a naive baseline would divide by 1e-4
    success = torch.arange(11) < 5
    assert rl.group_advantages(rewards, success).abs().max() == 0
    assert rl.chain_advantages(rewards[None], "chain", "std").abs().max() == 0


def test_passk_advantages_are_the_means_over_all_subsets():
    """The definition in 2508.10751, by enumeration: the standardised reward of each k-subset, shared by its members."""
    for size, k in [(5, 1), (5, 2), (6, 3), (6, 6)]:
        for right in range(size + 1):
            success = torch.arange(size) < right
            subsets = list(itertools.combinations(range(size), k))
            rewards = [float(any(i < right for i in subset)) for subset in subsets]
            mean, std = statistics.fmean(rewards), statistics.pstdev(rewards)
            expected = [
                statistics.fmean([(r - mean) / std if std else 0.0 for r, s in zip(rewards, subsets) if i in s])
                for i in range(size)
            ]
            advantages = rl.group_advantages(success.double(), success, "passk", pass_k=k)
            close(advantages, torch.tensor(expected, dtype=torch.float64), 1e-9)


def test_passk_advantages_are_finite_where_the_failure_rate_is_below_rounding():
    """With 40 of 64 wrong and k = 40, one subset in 2.5e17 fails: 1 - R is lost to rounding and s is 0."""
    success = torch.arange(64) >= 40
    assert rl.group_advantages(success.float(), success, "passk", pass_k=40).isfinite().all()


def test_passk_advantages_equal_the_published_closed_form():
    size, k = 16, 4
    for wrong in range(1, size):
        success = torch.arange(size) >= wrong
        advantages = rl.group_advantages(torch.rand(size).double(), success, "passk", pass_k=k)
        rate = 1 - math.comb(wrong, k) / math.comb(size, k)
        std = math.sqrt(rate * (1 - rate))
        if wrong < k:  # every subset succeeds
            assert std == 0 and advantages.abs().max() == 0
            continue
        close(advantages[-1].item(), (1 - rate) / std)
        close(advantages[0].item(), (1 - rate - math.comb(wrong - 1, k - 1) / math.comb(size - 1, k - 1)) / std)


@pytest.mark.parametrize("scale", ["none", "std"])
@pytest.mark.parametrize("baseline", ["chain", "position", "batch"])
def test_chain_advantages_equal_a_loop(baseline, scale):
    rewards = (torch.rand(5, 4, dtype=torch.float64) < 0.4).double()
    rewards[2], rewards[:, 1] = 1.0, 1.0  # a chain and a position without variance
    rows = rewards.tolist()
    expected = torch.zeros(5, 4, dtype=torch.float64)
    for c, k in itertools.product(range(5), range(4)):
        peers = {"chain": rows[c], "position": [row[k] for row in rows], "batch": sum(rows, [])}[baseline]
        spread = statistics.stdev(peers) + 1e-4 if scale == "std" else 1.0
        expected[c, k] = (rows[c][k] - statistics.fmean(peers)) / spread
    advantages = rl.chain_advantages(rewards, baseline, scale)
    close(advantages, expected)
    if baseline != "batch":
        assert (advantages[2] if baseline == "chain" else advantages[:, 1]).abs().max() == 0


# --- pass@k ----------------------------------------------------------------------------------------------------------


def test_pass_at_k_is_the_share_of_subsets_that_hold_a_right_sample():
    for n in range(1, 7):
        for c, k in itertools.product(range(n + 1), range(1, n + 1)):
            subsets = list(itertools.combinations(range(n), k))
            share = sum(min(subset) < c for subset in subsets) / len(subsets)
            assert rl.pass_at_k(n, c, k) == pytest.approx(share, abs=1e-15)
            assert isinstance(rl.pass_at_k(n, c, k), float)


def test_pass_at_k_is_exact_where_binomials_overflow_a_float():
    n, k = 4000, 1000
    counts = torch.tensor([0, 1, 2, 5, 3000, 3001, 4000])
    assert math.comb(n, k) > 10**308
    expected = [float(1 - Fraction(math.comb(n - c, k), math.comb(n, k))) for c in counts.tolist()]
    close(rl.pass_at_k(n, counts, k), torch.tensor(expected, dtype=torch.float64))


# --- weights ---------------------------------------------------------------------------------------------------------


def test_token_weights_equal_a_loop_and_skip_empty_sequences():
    lengths = torch.tensor([3, 0, 1, 5])
    counts = {"num_sequences": 10, "num_tokens": 40, "max_new_tokens": 8}  # the step is larger than this micro-batch
    expected = {
        "grpo": [1 / (10 * length) for length in (3, 1, 5) for _ in range(length)],
        "dapo": [1 / 40] * 9,
        "dr_grpo": [1 / (10 * 8)] * 9,
    }
    for loss_type in LOSS_TYPES:
        close(rl.token_weights(lengths, loss_type, **counts), torch.tensor(expected[loss_type]), 1e-6)
        empty = rl.token_weights(lengths[:0], loss_type, num_sequences=0, num_tokens=0, max_new_tokens=8)
        assert empty.shape == (0,) and empty.dtype == torch.float32


def test_importance_weight_equals_a_loop_is_capped_and_is_detached():
    lengths = torch.tensor([3, 1, 0, 4])
    logp = torch.randn(8, dtype=torch.float64).requires_grad_()
    sampled = torch.randn(8, dtype=torch.float64)
    ratios = [math.exp(a - b) for a, b in zip(logp.tolist(), sampled.tolist())]
    by_token = rl.importance_weight(logp, sampled, cap=1.5)
    close(by_token, torch.tensor([min(r, 1.5) for r in ratios], dtype=torch.float64))
    products = [math.prod(ratios[:3]), ratios[3], math.prod(ratios[4:])]
    expected = [min(p, 1.5) for p, length in zip(products, (3, 1, 4)) for _ in range(length)]
    by_sequence = rl.importance_weight(logp, sampled, cap=1.5, level="sequence", lengths=lengths)
    close(by_sequence, torch.tensor(expected, dtype=torch.float64))
    assert not by_token.requires_grad and not by_sequence.requires_grad
    assert (by_token == 1.5).any() and (by_token < 1.5).any()
    assert rl.importance_weight(torch.tensor([0.0]), torch.tensor([-200.0])) == 2  # exp overflows, the cap holds


# --- the loss --------------------------------------------------------------------------------------------------------


def oracle_loss(batch, weights, is_weight, clip_low, clip_high, kl_coef, kl_type, entropy_coef):
    """The loss as its formula reads, one token after the other."""
    stats, total = batch.stats, 0.0
    for i in range(batch.tokens):
        ratio, a = (stats.logp[i] - batch.old_logp[i]).exp(), batch.advantages[i]
        clipped = 1 - clip_low if ratio < 1 - clip_low else 1 + clip_high if ratio > 1 + clip_high else ratio
        objective = min(ratio * a, clipped * a) * (1.0 if is_weight is None else is_weight[i])
        d = stats.ref_logp[i] - stats.logp[i]
        kl = {"exact": stats.kl[i], "k1": -d, "k2": d**2 / 2, "k3": d.exp() - d - 1}[kl_type]
        total = total - weights[i].double() * (objective - kl_coef * kl + entropy_coef * stats.entropy[i])
    return total


@pytest.mark.parametrize("kl_type", ["exact", "k1", "k2", "k3"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_policy_loss_and_its_gradient_equal_a_loop(loss_type, kl_type):
    batch = random_batch(torch.tensor([4, 1, 7, 3]))
    weights = weights_of(batch, loss_type)
    options = dict(clip_low=0.2, clip_high=0.28, kl_coef=0.3, kl_type=kl_type, entropy_coef=0.1)
    for is_weight in (None, batch.is_weight):
        loss = rl.policy_loss(batch.stats, batch.advantages, weights, batch.old_logp, is_weight, **options)
        expected = oracle_loss(batch, weights, is_weight, **options)
        close(loss, expected)
        (gradient,) = torch.autograd.grad(loss, batch.logits, retain_graph=True)
        (expected_gradient,) = torch.autograd.grad(expected, batch.logits, retain_graph=True)
        close(gradient, expected_gradient)


@pytest.mark.parametrize(
    "ratio, advantage, flows",
    [(1.0, 2.0, True), (1.0, -2.0, True), (1.1, 2.0, True), (0.9, -2.0, True)]  # inside the region
    + [(1.5, 2.0, False), (0.5, -2.0, False)]  # has already moved far enough the right way
    + [(1.5, -2.0, True), (0.5, 2.0, True)],  # has moved the wrong way: must be brought back
)
def test_gradient_of_the_clipped_loss(ratio, advantage, flows):
    logp = torch.tensor([-0.7], dtype=torch.float64).requires_grad_()
    stats = TokenStats(logp, torch.zeros(1), None, None)
    weight = torch.tensor([0.25], dtype=torch.float64)
    rl.policy_loss(stats, torch.tensor([advantage]).double(), weight, logp.detach() - math.log(ratio)).backward()
    close(logp.grad.item(), -0.25 * advantage * ratio if flows else 0.0)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_loss_and_gradient_do_not_depend_on_the_split_into_micro_batches(loss_type):
    """Five sequences at once, one by one, and 2 + 3: the denominators are those of the step, not of the micro-batch."""
    lengths = torch.tensor([4, 1, 8, 2, 5])
    batch = random_batch(lengths)
    options = dict(kl_coef=0.1, entropy_coef=0.01)

    def loss_and_gradient(split):
        losses, start = [], 0
        for part in lengths.split(split):
            token = slice(start, start := start + int(part.sum()))
            weights = rl.token_weights(
                part, loss_type, num_sequences=5, num_tokens=20, max_new_tokens=MAX_NEW_TOKENS
            )
            stats = TokenStats(*(values[token] for values in batch.stats))
            extras = (batch.advantages[token], weights, batch.old_logp[token], batch.is_weight[token])
            losses.append(rl.policy_loss(stats, *extras, **options))
        return sum(losses), torch.autograd.grad(sum(losses), batch.logits, retain_graph=True)[0]

    loss, gradient = loss_and_gradient([5])
    assert gradient.abs().max() > 1e-3
    for split in ([1] * 5, [2, 3]):
        other_loss, other_gradient = loss_and_gradient(split)
        close(other_loss, loss)
        close(other_gradient, gradient)


@pytest.mark.parametrize("scale", ["std", "none", "loo", "passk"])
def test_a_group_without_variance_has_exactly_no_gradient(scale):
    lengths = torch.tensor([2, 3, 1, 4, 2, 2, 5, 1])
    batch = random_batch(lengths)
    rewards = torch.tensor([[0.1, 0.0, 0.1, 0.0], [1.0, 0.0, 0.0, 0.1]])
    advantages = rl.group_advantages(rewards, rewards == 1, scale, pass_k=2).flatten().repeat_interleave(lengths)
    loss = rl.policy_loss(batch.stats, advantages, weights_of(batch, "grpo"), batch.old_logp)
    (gradient,) = torch.autograd.grad(loss, batch.logits)
    assert gradient[:10].abs().max() == 0 < gradient[10:].abs().max()


def test_without_old_logp_the_gradient_is_that_of_minus_a_logp():
    """Of the first update of a rollout, and of the distillation term: value -sum w A, gradient -sum w A grad logp."""
    batch = random_batch(torch.tensor([4, 2]))
    weights = weights_of(batch, "grpo")
    loss = rl.policy_loss(batch.stats, batch.advantages, weights)
    close(loss, -(weights * batch.advantages).sum())
    (gradient,) = torch.autograd.grad(loss, batch.logits, retain_graph=True)
    on_policy = rl.policy_loss(batch.stats, batch.advantages, weights, batch.stats.logp.detach())
    close(gradient, torch.autograd.grad(on_policy, batch.logits, retain_graph=True)[0])
    plain = -(weights * batch.advantages * batch.stats.logp).sum()
    close(gradient, torch.autograd.grad(plain, batch.logits)[0])


def test_a_ratio_that_overflows_leaves_no_nan():
    """exp(200) is inf; times an advantage of 0 it was nan, and one nan in a gradient loses the model."""
    logp = torch.tensor([-1.0, -1.0, -1.0]).requires_grad_()
    stats = TokenStats(logp, torch.zeros(3), None, None)
    old_logp, advantages = torch.full((3,), -201.0), torch.tensor([0.0, 1.0, -1.0])
    loss = rl.policy_loss(stats, advantages, torch.ones(3), old_logp)
    loss.backward()
    assert loss.isfinite() and logp.grad.isfinite().all()
    metrics = rl.update_metrics(stats, advantages, torch.ones(3), old_logp)
    assert all(value.isfinite() for value in metrics.values())


def test_policy_loss_is_a_loss_function_of_the_fused_kernel():
    """Through linear_policy_loss, chunk by chunk: the same loss and gradients as from whole logits."""
    lengths = torch.tensor([4, 1, 6])
    batch = random_batch(lengths, vocabulary=13, dtype=torch.float32)
    hidden, ref_hidden, weight = torch.randn(11, 8), torch.randn(11, 8), torch.randn(13, 8)
    extras = (batch.advantages, weights_of(batch, "grpo"), batch.old_logp, batch.is_weight)
    loss_fn = functools.partial(rl.policy_loss, kl_coef=0.2, kl_type="exact", entropy_coef=0.05)

    leaves = [tensor.clone().requires_grad_() for tensor in (hidden, weight)]
    loss, _ = kernels.linear_policy_loss(
        *leaves, batch.targets, loss_fn, extras, ref_hidden=ref_hidden, ref_weight=weight, chunk_size=4
    )
    doubles = [tensor.double().requires_grad_() for tensor in (hidden, weight)]
    logits, ref_logits = doubles[0] @ doubles[1].T, ref_hidden.double() @ weight.double().T
    expected = loss_fn(random_stats(logits, batch.targets, ref_logits), *extras)
    close(loss, expected, 1e-4)
    for gradient, exact in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, doubles)):
        close(gradient, exact, 1e-4)


# --- KL --------------------------------------------------------------------------------------------------------------


def test_kl_estimates_have_the_means_and_the_gradients_that_the_docstring_claims():
    """On 5 tokens every expectation is a sum: E_pi of the gradient of each estimate, against exact KL gradients."""
    logits = torch.randn(5, dtype=torch.float64).requires_grad_()
    logp, ref_logp = logits.log_softmax(-1), torch.randn(5, dtype=torch.float64).log_softmax(-1)
    policy = logp.exp().detach()

    def gradient(value):
        return torch.autograd.grad(value, logits, retain_graph=True)[0]

    reverse = (logp.exp() * (logp - ref_logp)).sum()  # KL(pi || ref)
    forward = (ref_logp.exp() * (ref_logp - logp)).sum()  # KL(ref || pi)
    k1, k2, k3 = (rl.kl_estimate(logp, ref_logp, kind) for kind in ("k1", "k2", "k3"))
    ratio = (logp - logp.detach()).exp()

    close((policy * k1).sum(), reverse)
    close((policy * k3).sum(), reverse)
    assert ((policy * k2).sum() - reverse).abs() > 1e-2 and k3.min() >= 0 > k1.min()

    close(gradient((policy * k1).sum()), torch.zeros(5))
    close(gradient((policy * k2).sum()), gradient(reverse))
    close(gradient((policy * k3).sum()), gradient(forward))
    assert (gradient(forward) - gradient(reverse)).abs().max() > 1e-2
    for estimate in (k1, k3):
        close(gradient((policy * ratio * estimate).sum()), gradient(reverse))


def test_the_exact_kl_of_the_loss_has_the_gradient_of_the_reverse_kl():
    batch = random_batch(torch.tensor([3]))
    loss = rl.policy_loss(batch.stats, torch.zeros(3), torch.ones(3), kl_coef=1.0, kl_type="exact")
    logp, ref_logp = batch.logits.log_softmax(-1), batch.ref_logits.log_softmax(-1)
    reverse = (logp.exp() * (logp - ref_logp)).sum()
    close(*(torch.autograd.grad(value, batch.logits, retain_graph=True)[0] for value in (loss, reverse)))


def test_k3_does_not_drown_in_rounding_where_the_policies_are_close():
    logp = torch.full((1,), -12.0).requires_grad_()
    estimate = rl.kl_estimate(logp, logp.detach() - 2**-13, "k3")  # a difference that float32 holds exactly here
    assert estimate.item() == pytest.approx(2**-27, rel=1e-2)


# --- metrics and schedule --------------------------------------------------------------------------------------------


def test_update_metrics_equal_a_loop_and_add_up_over_micro_batches():
    batch = random_batch(torch.tensor([2] * 10))
    weights = weights_of(batch, "dapo")
    weights[[3, 17]] = 0.0  # filler, to be counted nowhere
    options = dict(clip_low=0.1, clip_high=0.3)
    kept = [i for i in range(20) if i not in (3, 17)]
    ratios = (batch.stats.logp - batch.old_logp).exp().tolist()
    signs = batch.advantages.tolist()
    expected = {
        "entropy": statistics.fmean(batch.stats.entropy[i].item() for i in kept),
        "kl": statistics.fmean(batch.stats.kl[i].item() for i in kept),
        "ratio": statistics.fmean(ratios[i] for i in kept),
        "approx_kl": statistics.fmean(ratios[i] - 1 - math.log(ratios[i]) for i in kept),
        "clip_ratio/low": statistics.fmean(ratios[i] < 0.9 and signs[i] < 0 for i in kept),
        "clip_ratio/high": statistics.fmean(ratios[i] > 1.3 and signs[i] > 0 for i in kept),
        "is_weight": statistics.fmean(batch.is_weight[i].item() for i in kept),
    }
    assert expected["clip_ratio/low"] > 0 and expected["clip_ratio/high"] > 0
    extras = (batch.advantages, weights, batch.old_logp, batch.is_weight)
    sums = defaultdict(float)
    for part in (slice(0, 4), slice(4, 4), slice(4, 20)):  # a rank may have nothing to add
        stats = TokenStats(*(values[part] for values in batch.stats))
        for name, value in rl.update_metrics(stats, *(extra[part] for extra in extras), **options).items():
            assert not value.requires_grad
            sums[name] += value
    assert sums["tokens"] == 18
    assert rl.mean_metrics(sums) == pytest.approx(expected)
    without = rl.update_metrics(batch.stats._replace(kl=None, ref_logp=None), *extras[:3])
    assert {"kl", "is_weight"}.isdisjoint(without) and rl.mean_metrics({name: 0.0 for name in without})["ratio"] == 0


@pytest.mark.parametrize(
    "schedule, last", [("constant", 2.0), ("linear", 0.2), ("cosine", 1 + math.cos(0.9 * math.pi))]
)
def test_learning_rate_warms_up_then_decays_and_is_never_zero(schedule, last):
    rates = [rl.learning_rate(step, 15, 5, 2.0, schedule) for step in range(15)]
    assert rates[:6] == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0, 2.0]) and rates[-1] == pytest.approx(last)
    assert all(a >= b for a, b in zip(rates[5:], rates[6:])) and min(rates) > 0
    assert rl.learning_rate(0, 1, 0, 2.0, schedule) == 2.0
    assert rl.learning_rate(99, 15, 5, 2.0, schedule) == rl.learning_rate(15, 15, 5, 2.0, schedule)


# --- inputs ----------------------------------------------------------------------------------------------------------


def test_inputs_are_not_mutated():
    batch = random_batch(torch.tensor([3, 2, 4]))
    rewards, success = random_groups()
    weights = weights_of(batch, "grpo")
    extras = (batch.advantages, weights, batch.old_logp, batch.is_weight)
    tensors = [*batch.stats, *extras, batch.lengths, rewards, success]
    before = [tensor.detach().clone() for tensor in tensors]
    for scale in ("std", "none", "loo", "passk"):
        rl.group_advantages(rewards, success, scale, pass_k=3)
    for baseline, scale in itertools.product(("chain", "position", "batch"), ("none", "std")):
        rl.chain_advantages(rewards, baseline, scale)
    rl.importance_weight(batch.stats.logp, batch.old_logp, level="sequence", lengths=batch.lengths)
    rl.importance_weight(batch.stats.logp, batch.old_logp)
    for kl_type in ("exact", "k1", "k2", "k3"):
        rl.policy_loss(batch.stats, *extras, kl_coef=0.1, kl_type=kl_type, entropy_coef=0.1)
    rl.update_metrics(batch.stats, *extras)
    rl.pass_at_k(9, batch.lengths, 2)
    assert all(torch.equal(a, b) for a, b in zip(tensors, before))


ONES = torch.ones(2)
FLAT = TokenStats(ONES, ONES, None, None)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: rl.group_advantages(torch.zeros(4), torch.zeros(4).bool(), "mean"), "scale is 'mean'.*std, none, loo"),
        (lambda: rl.group_advantages(torch.zeros(4), torch.zeros(3).bool()), r"\[4\].*\[3\].*one shape"),
        (lambda: rl.group_advantages(torch.zeros(2, 1), torch.zeros(2, 1).bool()), "1 reward .*2 or more"),
        (lambda: rl.group_advantages(torch.zeros(4), torch.zeros(4).bool(), "passk"), "k is 8.*1 <= k <= 4"),
        (lambda: rl.chain_advantages(torch.zeros(2, 3), "mean"), "baseline is 'mean'.*chain, position, batch"),
        (lambda: rl.chain_advantages(torch.zeros(2, 3), scale="loo"), "scale is 'loo'.*none, std"),
        (lambda: rl.chain_advantages(torch.zeros(1, 3), "position"), "1 reward .*2 or more"),
        (lambda: rl.pass_at_k(4, 2, 0), "k is 0"),
        (lambda: token_weights_of([2], "bnpo"), "loss_type is 'bnpo'.*grpo, dapo, dr_grpo"),
        (lambda: rl.importance_weight(torch.zeros(2), torch.zeros(2), level="turn"), "level is 'turn'"),
        (lambda: rl.importance_weight(torch.zeros(2), torch.zeros(2), cap=0.0), "cap is 0.0.*positive"),
        (lambda: rl.kl_estimate(torch.zeros(2), torch.zeros(2), "k4"), "kind is 'k4'"),
        (lambda: rl.policy_loss(FLAT, ONES, ONES, kl_coef=1.0), "hold no reference"),
        (lambda: rl.policy_loss(FLAT, ONES, ONES, kl_coef=1.0, kl_type="k4"), "kl_type is 'k4'"),
        (lambda: rl.learning_rate(0, 1, 0, 1.0, "step"), "schedule is 'step'.*constant, linear, cosine"),
    ],
)
def test_wrong_input_is_named_in_one_line(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


def token_weights_of(lengths, loss_type="grpo"):
    counts = {"num_sequences": 2, "num_tokens": 10, "max_new_tokens": 6}
    return rl.token_weights(torch.tensor(lengths), loss_type, **counts)


# --- TRL, called ------------------------------------------------------------------------------------------------------


def trl_loss(batch, loss_type, clip_low, clip_high, kl_coef, entropy_coef, is_weight):
    """GRPOTrainer._compute_loss itself, on a stand-in trainer whose model gives the log-probs of the batch.

    TRL pads to [B, T]; the padding holds garbage, which a right mask keeps out of both the loss and the gradient.
    """
    grpo_trainer = pytest.importorskip("trl.trainer.grpo_trainer")
    sequences, longest = len(batch.lengths), int(batch.lengths.max())
    mask = torch.arange(longest) < batch.lengths[:, None]  # [B, T]

    def padded(values, filler):
        full = torch.full((sequences, longest), filler, dtype=values.dtype)
        return full.masked_scatter(mask, values)

    logps, entropies = padded(batch.stats.logp, -3.0), padded(batch.stats.entropy, 7.0)
    accelerator = SimpleNamespace(
        gather=lambda x: x, reduce=lambda x, reduction: x, num_processes=1, sync_gradients=True
    )  # fmt: skip
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *args, **kwargs: (logps, entropies, None),
        _entropy_bonus_enabled=entropy_coef != 0, _metrics=defaultdict(lambda: defaultdict(list)),
        accelerator=accelerator,
        args=SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1),
        aux_loss_enabled=False, beta=kl_coef, current_gradient_accumulation_steps=1, entropy_coef=entropy_coef,
        epsilon_high=clip_high, epsilon_low=clip_low, importance_sampling_level="token", loss_type=loss_type,
        max_completion_length=MAX_NEW_TOKENS, model=SimpleNamespace(training=True), off_policy_mask_threshold=None,
        top_entropy_quantile=1.0, use_adaptive_entropy=False, use_vllm=is_weight is not None,
        vllm_importance_sampling_correction=is_weight is not None,
    )  # fmt: skip
    starts = (batch.lengths.cumsum(0) - batch.lengths).tolist()
    inputs = {
        "prompt_ids": torch.zeros(sequences, 1, dtype=torch.long),
        "prompt_mask": torch.ones(sequences, 1, dtype=torch.long),
        "completion_ids": torch.zeros(sequences, longest, dtype=torch.long),
        "completion_mask": mask.long(),
        "advantages": batch.advantages[starts],
        "old_per_token_logps": padded(batch.old_logp, -2.0),
        "ref_per_token_logps": padded(batch.stats.ref_logp, -4.0),
        "num_items_in_batch": mask.sum(),
        "importance_sampling_ratio": None if is_weight is None else padded(is_weight, 5.0),
    }
    loss = grpo_trainer.GRPOTrainer._compute_loss(trainer, None, inputs)
    return loss, {name: values[0] for name, values in trainer._metrics["train"].items()}


@pytest.mark.parametrize("correction", [False, True])
@pytest.mark.parametrize("kl_coef", [0.0, 0.3])
@pytest.mark.parametrize("loss_type, entropy_coef", [("grpo", 0.0), ("dr_grpo", 0.0), ("dapo", 0.0), ("dapo", 0.05)])
def test_loss_gradient_and_metrics_equal_those_of_trl(loss_type, entropy_coef, kl_coef, correction):
    batch = random_batch(torch.tensor([4, 1, 9, 3, 6]))
    is_weight = batch.is_weight if correction else None
    options = dict(clip_low=0.2, clip_high=0.28)
    expected, trl_metrics = trl_loss(
        batch, loss_type, kl_coef=kl_coef, entropy_coef=entropy_coef, is_weight=is_weight, **options
    )
    extras = (batch.advantages, weights_of(batch, loss_type).double(), batch.old_logp, is_weight)
    loss = rl.policy_loss(batch.stats, *extras, kl_coef=kl_coef, kl_type="k3", entropy_coef=entropy_coef, **options)
    close(loss, expected, 1e-6)  # the weights are float32
    gradient, trl_gradient = (
        torch.autograd.grad(value, batch.logits, retain_graph=True)[0] for value in (loss, expected)
    )
    assert gradient.abs().max() > 1e-3
    close(gradient, trl_gradient, 1e-6)
    metrics = rl.mean_metrics(rl.update_metrics(batch.stats, *extras, **options))
    assert metrics["entropy"] == pytest.approx(trl_metrics["entropy"], rel=1e-5)
    for side in ("low", "high"):
        assert 0 < metrics[f"clip_ratio/{side}"] == pytest.approx(trl_metrics[f"clip_ratio/{side}_mean"], rel=1e-5)


def test_advantages_equal_those_of_trl():
    """Restated, for they are lines inside GRPOTrainer._generate_and_score_completions (scale_rewards "group", "none")
    and RLOOTrainer._generate_and_score_completions; the std is TRL's own nanstd."""
    nanstd = pytest.importorskip("trl.trainer.utils").nanstd
    generator = random.Random(0)
    rewards = torch.tensor([[generator.choice([0.0, 0.1, 1.0]) for _ in range(8)] for _ in range(30)])
    success = rewards == 1
    undecided = success.any(1) & ~success.all(1)
    assert undecided.sum() > 20
    flat = rewards.view(-1)
    mean = torch.nanmean(rewards, dim=1).repeat_interleave(8, dim=0)
    group = (flat - mean) / (nanstd(rewards, dim=1).repeat_interleave(8, dim=0) + 1e-4)
    leave_one_out = flat - ((torch.nansum(rewards, dim=1, keepdim=True) - rewards) / (8 - 1)).view(-1)
    for scale, expected in (("std", group), ("none", flat - mean), ("loo", leave_one_out)):
        advantages = rl.group_advantages(rewards, success, scale)
        close(advantages[undecided], expected.view(30, 8)[undecided], 1e-5)
