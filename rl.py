"""The reinforcement learning of SESA: advantages, losses, KL estimators and the metrics of an update.

Pure functions of tensors: nothing here knows a text, a task, a model, a file or a process group, and nothing
changes its inputs, but for `set_token_weights`.

Legend: P problems, G answers in a group, C chains, K guesses in a chain, S sequences, N tokens.

Everything per token is flat, [N]: the tokens that the policy wrote (its stop tokens too), sequence after sequence, with
no padding between them. So a loss needs no mask, and its denominators, which are what goes wrong most often, live
in ONE vector: `weights` [N], made once per optimiser step from counts over all micro-batches and all ranks. The
loss is

    loss = sum_i weights_i * loss_i

over whatever tokens are at hand, and the sums of any split into micro-batches and ranks add up to the same loss and
the same gradient. (Gradients are therefore SUMMED over ranks; where DDP averages them, multiply by their number.)

One optimiser step, from top to bottom:

    advantages = group_advantages(rewards, success)                           # [P, G]
    weights = token_weights(lengths, "grpo", num_sequences=..., ...)          # [N]
    advantages = advantages.flatten().repeat_interleave(lengths)              # [N]
    loss = policy_loss(stats, advantages, weights, old_logp, kl_coef=0.001)   # scalar; stats from kernels.py
    sums = update_metrics(stats, advantages, weights, old_logp)               # add up, then mean_metrics(sums)

Two numbers that surprise: the loss is about 0 at the first minibatch of a rollout (the ratio is 1 there and advantages
have mean 0), and that is correct; its gradient is not 0. And a group that only failed, or only succeeded, gives
exactly no policy gradient: a collapsed policy stops learning.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels import TokenStats

# exp(20) is far outside any clip; exp(89) is inf, and inf * (advantage 0) is nan: a lost model.
MAX_LOG_RATIO = 20.0


def _require(name: str, value: str, options: Iterable[str]) -> None:
    if value not in options:
        raise ValueError(f"{name} is {value!r}, but must be one of {', '.join(options)}")


# ---------------------------------------------------------------------------------------------------------------------
# Advantages: from rewards to one number per answer


def group_advantages(rewards: Tensor, success: Tensor, scale="std", pass_k=8, eps=1e-4) -> Tensor:
    """How much better each answer is than the other answers to the same problem.

    rewards [..., G] float, success [..., G] bool; a group is the last dimension, G >= 2. Returns [..., G].

    scale: "std"    (r - mean) / (std + eps), std unbiased             GRPO, 2402.03300; as in TRL
           "none"   r - mean                                            Dr. GRPO, 2503.20783
           "loo"    r - mean of the other G - 1                         RLOO, 2402.14740
           "passk"  the gradient of pass@`pass_k`, from `success` alone  Pass@k training, 2508.10751

    A group is filtered on its outcome, not on its rewards: if all its answers succeed, or all fail, its advantages are
    exactly 0, whatever shaped rewards (0.1 for a good format, say) they hold. Otherwise a group of failures would be
    trained, at the full strength that division by std gives, to collect crumbs.

    Raises ValueError for an unknown scale, shapes that differ, G < 2, or pass_k outside 1..G.

    >>> rewards = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.1, 0.0, 0.0, 0.0]])
    >>> group_advantages(rewards, rewards == 1, scale="none")
    tensor([[ 0.7500, -0.2500, -0.2500, -0.2500],
            [ 0.0000,  0.0000,  0.0000,  0.0000]])
    >>> group_advantages(rewards[0], rewards[0] == 1, scale="loo")
    tensor([ 1.0000, -0.3333, -0.3333, -0.3333])
    """
    _require("scale", scale, ("std", "none", "loo", "passk"))
    if rewards.shape != success.shape:
        raise ValueError(f"rewards {list(rewards.shape)} and success {list(success.shape)} must have one shape")
    if scale == "passk":
        advantages = _pass_k_advantages(success, pass_k).to(rewards.dtype)  # [..., G]
    else:
        advantages = _centered(rewards, (-1,), scale, eps)  # [..., G]
    # r - (sum - r) / (G - 1) = (r - mean) * G / (G - 1)
    if scale == "loo":
        advantages = advantages * (rewards.shape[-1] / (rewards.shape[-1] - 1))
    decided = success.all(-1, keepdim=True) | ~success.any(-1, keepdim=True)  # [..., 1]
    return advantages.masked_fill(decided, 0.0)


def chain_advantages(rewards: Tensor, baseline="chain", scale="none", eps=1e-4) -> Tensor:
    """Advantages where the sketches are the answers: C chains of K guesses, each guess rewarded by itself.

    rewards [C, K] float: the chains of all ranks, or else the result depends on their number. Returns [C, K]. The
    baseline is the mean over

           "chain"     the K guesses of the same chain: compares early guesses with late ones
           "position"  the C chains at the same position: late guesses are harder (the easy treasures are in the
                       history and a repeat earns 0), and are compared with other late guesses only
           "batch"     all C * K guesses

    scale "none" leaves the difference as it is, "std" divides by the (unbiased) std over the same guesses. Where these
    have all the same reward, the advantages are exactly 0.

    Raises ValueError for an unknown baseline or scale, or where the baseline would be a mean of one reward.

    >>> chain_advantages(torch.tensor([[1.0, 1.0], [1.0, 0.0]]), baseline="position")
    tensor([[ 0.0000,  0.5000],
            [ 0.0000, -0.5000]])
    """
    dims = {"chain": (1,), "position": (0,), "batch": (0, 1)}
    _require("baseline", baseline, dims)
    _require("scale", scale, ("none", "std"))
    return _centered(rewards, dims[baseline], scale, eps)


def _centered(rewards: Tensor, dims: tuple[int, ...], scale: str, eps: float) -> Tensor:
    """rewards - mean over dims, divided by std + eps with "std"; exactly 0, not a rounding error, if all are equal."""
    size = math.prod(rewards.shape[dim] for dim in dims)
    if size < 2:
        raise ValueError(f"a baseline over {size} reward compares nothing; it needs 2 or more: sample more answers")
    advantages = rewards - rewards.mean(dims, keepdim=True)
    if scale == "std":
        advantages = advantages / (rewards.std(dims, keepdim=True) + eps)
    equal = rewards.amax(dims, keepdim=True) == rewards.amin(dims, keepdim=True)
    return advantages.masked_fill(equal, 0.0)


def _pass_k_advantages(success: Tensor, k: int) -> Tensor:
    """Advantages of the k-subsets of a group, each answer credited with the mean over the subsets that it is in.

    success [..., G] bool; returns float64 [..., G]. In 2508.10751: with n of N answers wrong, a subset succeeds with
    R = 1 - C(n,k)/C(N,k), s = sqrt(R(1-R)); A+ = (1-R)/s and A- = (1-R - C(n-1,k-1)/C(N-1,k-1))/s. Since
    C(n-1,k-1)/C(N-1,k-1) = (1-R) N/n, the second is -A+ (N-n)/n: the advantages of a group sum to 0. With n < k
    every subset succeeds, R = 1, and there is nothing left to learn for pass@k: all 0.
    """
    size = success.shape[-1]
    right = success.sum(-1, keepdim=True).double()  # [..., 1]
    rate = pass_at_k(size, right, k)  # [..., 1]   R
    # Where all succeed or all fail, group_advantages puts 0 in place of what is here.
    positive = torch.where(rate < 1, (1 - rate) / (rate * (1 - rate)).sqrt(), 0.0)  # [..., 1]
    return torch.where(success, positive, -positive * right / (size - right))


def pass_at_k(n: int, c: int | Tensor, k: int) -> float | Tensor:
    """Unbiased estimate of the chance that one of k samples is right, from n samples of which c were right.

    1 - C(n-c, k) / C(n, k), as a product that cannot overflow (2107.03374, section 2.1). c is an int, or a tensor of
    counts: then the result is float64 of its shape. Raises ValueError unless 1 <= k <= n.

    >>> pass_at_k(4, 1, 2)
    0.5
    >>> pass_at_k(4, torch.tensor([0, 1, 3]), 2)
    tensor([0.0000, 0.5000, 1.0000], dtype=torch.float64)
    """
    if not 1 <= k <= n:
        raise ValueError(f"k is {k}, but pass@k of {n} samples needs 1 <= k <= {n}; lower k")
    wrong = n - (c.double() if isinstance(c, Tensor) else c)
    # The product reaches an exact 0 at i = wrong, if wrong < k, and stays there.
    return 1.0 - math.prod((wrong - i) / (n - i) for i in range(k))


# ---------------------------------------------------------------------------------------------------------------------
# Weights: one number per token


def token_weights(
    lengths: Tensor, loss_type: str = "grpo", *, num_sequences: int, num_tokens: int, max_new_tokens: int
) -> Tensor:
    """The weight of each token in the loss: the one place where a denominator is.

    lengths [S] int: how many tokens the policy wrote in each of the S sequences at hand. num_sequences and num_tokens
    are the counts of the whole optimiser step, over all micro-batches AND all ranks; max_new_tokens is the most that a
    sequence can have (over all turns of an episode). Returns float32 [sum(lengths)], sequence after sequence.

    loss_type: "grpo"     1 / (num_sequences * length)          every sequence counts the same, 2402.03300
               "dapo"     1 / num_tokens                        every token counts the same, 2503.14476
               "dr_grpo"  1 / (num_sequences * max_new_tokens)  the same, and blind to the batch, 2503.20783

    Raises ValueError for an unknown loss_type.

    >>> token_weights(torch.tensor([1, 2]), "grpo", num_sequences=2, num_tokens=3, max_new_tokens=4)
    tensor([0.5000, 0.2500, 0.2500])
    """
    _require("loss_type", loss_type, ("grpo", "dapo", "dr_grpo"))
    ones = torch.ones_like(lengths)
    denominators = dict(
        grpo=num_sequences * lengths,
        dapo=num_tokens * ones,
        dr_grpo=num_sequences * max_new_tokens * ones,
    )  # [S] each
    # An empty sequence divides nothing by its 0.
    return 1.0 / denominators[loss_type].repeat_interleave(lengths)  # [N]


def importance_weight(
    logp: Tensor, sampled_logp: Tensor, cap: float = 2.0, level: str = "token", lengths: Tensor | None = None
) -> Tensor:
    """min(pi(y|loss context) / pi(y|sampled context), cap): truncated importance sampling, detached.

    logp [N]: the tokens under the context of the loss, by the policy before the update (old_logp). sampled_logp [N]:
    as they were recorded when sampled, under the context that held the sketch. Times the ratio pi / pi_old of
    `policy_loss` this is the whole ratio pi(y|x) / pi_old(y|x,s), which the published update leaves out. The cap bounds
    the variance and biases the weight downwards.

    level "token" weighs each token by itself (bounded, ignores that earlier tokens shape later ones); "sequence" gives
    all tokens of a sequence the product over the sequence, and needs lengths [S]. Returns [N].

    Raises ValueError for an unknown level, or a cap that is not positive.

    >>> importance_weight(torch.tensor([-1.0, -1.0]), torch.tensor([-1.0, -4.0]))
    tensor([1., 2.])
    """
    _require("level", level, ("token", "sequence"))
    if cap <= 0:
        raise ValueError(f"cap is {cap}, but must be positive; use inf for no cap")
    log_weight = (logp - sampled_logp).detach()  # [N]
    if level == "sequence":
        owner = torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths)  # [N]
        log_weight = log_weight.new_zeros(len(lengths)).index_add(0, owner, log_weight)[owner]  # [N]
    return log_weight.exp().clamp(max=cap)  # [N]


# ---------------------------------------------------------------------------------------------------------------------
# Rows: what the loss is computed on, before and after it is split


@dataclass
class TrainingSequence:
    """One row of the loss: token ids, which of them are trained, and what is known of each trained token.

    ids[t] is predicted from ids[:t], for t in targets. Of each target: its advantage, and its log-prob in the context
    that was sampled from; old_logps [targets] are those in this context, by the policy before the updates (where they
    are needed), token_weights [targets] those of `set_token_weights`.
    weight: of the row; with 0 it counts in the denominators, and that is all.
    answers: how many its tokens hold: K for a chain of K guesses.
    again: it is in the loss for a second time, in another context, and counts in no denominator.
    """

    ids: list[int]
    targets: list[int]
    advantages: list[float]
    sampled_logps: list[float]
    weight: float = 1.0
    answers: int = 1
    again: bool = False
    old_logps: Tensor | None = None
    token_weights: Tensor | None = None


def micro_batches(rows: Sequence[TrainingSequence], budget: int) -> Iterator[list[TrainingSequence]]:
    """Rows by length, in batches of at most `budget` tokens with padding; a longer row is a batch of its own, and a row
    of less than half the length of the longest begins a new one, so that less than half is padding.

    >>> rows = [TrainingSequence([0] * n, [], [], []) for n in (2, 4, 3)]
    >>> [[len(row.ids) for row in batch] for batch in micro_batches(rows, budget=8)]
    [[4, 3], [2]]
    """
    rows = sorted(rows, key=lambda row: -len(row.ids))
    while rows:
        longest = len(rows[0].ids)
        batch = [row for row in rows[: max(1, budget // longest)] if 2 * len(row.ids) >= longest]
        yield batch
        rows = rows[len(batch) :]


def set_token_weights(
    rows: Sequence[TrainingSequence], loss_type: str, max_new_tokens: int, count: Callable[[dict], dict]
) -> None:
    """Set row.token_weights for one optimiser step. `count` adds up a dict of numbers over all ranks.

    Every answer weighs the same, in whichever context it is trained (with "grpo" a guess in a chain by its share of the
    chain's tokens: the same where guesses are of one length): the denominators count
    the answers of the step and their tokens once, also of answers that are not trained (weight 0). A chain of K guesses
    is one row and K answers; what "distill" trains for a second time is divided by the same denominators.

    >>> chain = TrainingSequence([0] * 5, [1, 2, 3, 4], [1.0] * 4, [-1.0] * 4, answers=2)
    >>> guess = TrainingSequence([0] * 3, [1, 2], [1.0] * 2, [-1.0] * 2, weight=0.5, again=True)
    >>> set_token_weights([chain, guess], "grpo", 2, count=dict)
    >>> chain.token_weights, guess.token_weights       # a guess in the chain weighs 1/2, here half of that
    (tensor([0.2500, 0.2500, 0.2500, 0.2500]), tensor([0.1250, 0.1250]))
    """
    counted = [row for row in rows if not row.again]
    answers, tokens = sum(row.answers for row in counted), sum(len(row.targets) for row in counted)
    total = count(dict(num_sequences=answers, num_tokens=tokens))
    for kind in {(row.answers, row.again) for row in rows}:
        mine, answers = [row for row in rows if (row.answers, row.again) == kind], kind[0]
        lengths = torch.tensor([len(row.targets) for row in mine])  # [S]
        weights = token_weights(lengths, loss_type, **total, max_new_tokens=max_new_tokens * answers)  # [N]
        weights = weights * (1 if loss_type == "dapo" else answers)
        for row, part in zip(mine, weights.split(lengths.tolist()), strict=True):
            row.token_weights = row.weight * part


def loss_inputs(rows: Sequence[TrainingSequence], device, is_options: dict | None = None) -> tuple[list, Tensor]:
    """What `policy_loss` takes after the statistics, and the log-probs as sampled [N], for the rows' targets in order.

    The first are [advantages, weights], old_logp where the rows have it, and with is_options (cap, level) the
    importance weight; each [N].
    """
    lengths = torch.tensor([len(row.targets) for row in rows], device=device)  # [S]
    sampled = torch.tensor([x for row in rows for x in row.sampled_logps], device=device)  # [N]
    advantages = torch.tensor([x for row in rows for x in row.advantages], device=device)  # [N]
    inputs = [advantages, torch.cat([row.token_weights for row in rows]).to(device)]
    if rows[0].old_logps is not None:
        inputs.append(torch.cat([row.old_logps for row in rows]))
    if is_options is not None:
        inputs.append(importance_weight(inputs[-1], sampled, lengths=lengths, **is_options))
    return inputs, sampled


# ---------------------------------------------------------------------------------------------------------------------
# The loss


def kl_estimate(logp: Tensor, ref_logp: Tensor, kind: str) -> Tensor:
    """Estimates of KL(pi || ref) from the sampled token alone (joschu.net/blog/kl-approx.html). [N], [N] -> [N].

    With d = logp - ref_logp, and y ~ pi. A good estimate of a KL is not a good loss: its gradient as a loss is the
    mean of the gradients of the samples, which knows nothing of how the sampling moves with pi.

           value                 as an estimate             its expected gradient, as a loss
      k1   d                     unbiased, noisy, any sign  0: the mean of grad logp. It is noise, not a penalty
      k2   d^2 / 2               biased, low variance       that of KL(pi || ref), exactly
      k3   exp(-d) - 1 + d       unbiased, never negative   that of KL(ref || pi), the other direction

    k3 (or k1) times the ratio pi / pi_old has the gradient of KL(pi || ref); TRL offers that as a correction. The exact
    sum over the vocabulary, kl_type="exact" in `policy_loss`, has it too, without the noise, and is the default.

    >>> d = torch.tensor([0.0, 1.0])
    >>> [kl_estimate(d, torch.zeros(2), kind) for kind in ("k1", "k2", "k3")]
    [tensor([0., 1.]), tensor([0.0000, 0.5000]), tensor([0.0000, 0.3679])]
    """
    _require("kind", kind, ("k1", "k2", "k3"))
    difference = logp - ref_logp  # [N]
    # expm1: k3 is about d^2 / 2, which is lost to rounding in exp(-d) - 1 + d.
    estimates = dict(k1=difference, k2=difference.square() / 2, k3=torch.expm1(-difference) + difference)
    return estimates[kind]


def policy_loss(
    stats: TokenStats, advantages: Tensor, weights: Tensor,
    old_logp: Tensor | None = None, is_weight: Tensor | None = None,
    *, clip_low=0.2, clip_high=0.2, kl_coef=0.0, kl_type="exact", entropy_coef=0.0,
) -> Tensor:  # fmt: skip
    """The clipped policy-gradient loss with KL penalty and entropy bonus: the weighted SUM over the tokens at hand.

        -sum_i weights_i * ( is_weight_i * min(ratio_i A_i, clip(ratio_i, 1 - clip_low, 1 + clip_high) A_i)
                             - kl_coef KL_i + entropy_coef H_i ),       ratio_i = exp(logp_i - old_logp_i)

    (PPO, 1707.06347, equation 7; clip_high > clip_low is DAPO's clip-higher). Every tensor is [N]; gradients flow
    through `stats` alone. old_logp is that of the policy at the start of the rollout's updates, under the context of
    the loss; None stands for "now", ratio 1, and spares a forward where a rollout is used for one update only.
    is_weight (see `importance_weight`) scales the policy gradient, not the KL nor the entropy.

    KL and entropy are weighted like the tokens of the policy term. (TRL takes its entropy bonus as a plain mean over
    tokens whatever the loss type: that is the same for "dapo" only.)

    As `loss_fn` of kernels.linear_policy_loss: functools.partial(policy_loss, kl_coef=...), with extras
    (advantages, weights[, old_logp[, is_weight]]). Without old_logp the gradient is that of -A logp, so a distillation
    term -A * mean logp(y|x) is this loss on its own tokens, with weights = coefficient * token_weights(..., "grpo").

    Raises ValueError for an unknown kl_type, or a KL without a reference.

    >>> stats = TokenStats(torch.tensor([-1.0, -1.0]), torch.tensor([0.5, 0.5]), None, None)
    >>> ratio, clipped = torch.tensor([1.1, 1.5]), torch.tensor([1.0, 1.0])
    >>> policy_loss(stats, torch.ones(2), torch.full((2,), 0.5), stats.logp - ratio.log())  # -(1.1 + 1.2) / 2
    tensor(-1.1500)
    """
    ratio = _log_ratio(stats, old_logp).exp()  # [N]
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)  # [N]
    objective = torch.minimum(ratio * advantages, clipped * advantages)  # [N]
    if is_weight is not None:
        objective = objective * is_weight
    if kl_coef:
        _require("kl_type", kl_type, ("exact", "k1", "k2", "k3"))
        if stats.kl is None:
            raise ValueError("kl_coef is not 0, but the statistics hold no reference; give one, or set 0")
        kl = stats.kl if kl_type == "exact" else kl_estimate(stats.logp, stats.ref_logp, kl_type)  # [N]
        objective = objective - kl_coef * kl
    if entropy_coef:
        objective = objective + entropy_coef * stats.entropy
    return -(weights * objective).sum()


def _log_ratio(stats: TokenStats, old_logp: Tensor | None) -> Tensor:
    old_logp = stats.logp.detach() if old_logp is None else old_logp
    return (stats.logp - old_logp).clamp(max=MAX_LOG_RATIO)  # [N]


# ---------------------------------------------------------------------------------------------------------------------
# The metrics of an update, and its learning rate


@torch.no_grad()
def update_metrics(
    stats: TokenStats, advantages: Tensor, weights: Tensor,
    old_logp: Tensor | None = None, is_weight: Tensor | None = None,
    *, clip_low=0.2, clip_high=0.2,
) -> dict[str, Tensor]:  # fmt: skip
    """Sums over the tokens at hand, to be added up over micro-batches and ranks; then `mean_metrics`.

    Takes the same tensors as `policy_loss`. A token of weight 0 is filler and is counted nowhere. The names, which are
    those of TRL where it has them, and their means per token:

      tokens           the number of tokens: the denominator of all others
      entropy          of the policy, nats. Falls as it learns; near 0 is collapse
      kl               exact KL(pi || ref), nats; only with a reference
      ratio            pi / pi_old: 1 at the first minibatch and near 1 in health
      approx_kl        k3 of the old policy against the new one: how far this update has moved; above 0.1 is too far
      clip_ratio/low   share of tokens with ratio < 1 - clip_low and a negative advantage: they have no gradient
      clip_ratio/high  share of tokens with ratio > 1 + clip_high and a positive advantage; above 0.3 is too far
      is_weight        the importance weight; only with one. Far below 1: the loss's context disowns the samples
    """
    counted = weights != 0  # [N]
    log_ratio = _log_ratio(stats, old_logp)  # [N]
    ratio = log_ratio.exp()  # [N]
    metrics = {
        "tokens": torch.ones_like(ratio),
        "entropy": stats.entropy,
        "kl": stats.kl,
        "is_weight": is_weight,
        "ratio": ratio,
        "approx_kl": ratio - 1 - log_ratio,
        "clip_ratio/low": (ratio < 1 - clip_low) & (advantages < 0),
        "clip_ratio/high": (ratio > 1 + clip_high) & (advantages > 0),
    }
    return {name: x[counted].sum(dtype=torch.float64) for name, x in metrics.items() if x is not None}


def mean_metrics(sums: dict[str, Tensor]) -> dict[str, float]:
    """The means per token of sums from `update_metrics`, added up over micro-batches and ranks; 0 without any token.

    >>> mean_metrics({"tokens": torch.tensor(4.0), "entropy": torch.tensor(2.0)})
    {'entropy': 0.5}
    """
    tokens = max(float(sums.get("tokens", 0)), 1.0)
    return {name: float(total) / tokens for name, total in sums.items() if name != "tokens"}


def learning_rate(step: int, steps: int, warmup: int, base: float, schedule: str = "constant") -> float:
    """The rate of step 0 .. steps-1: linear warm-up over `warmup` steps, then "constant", "linear" or "cosine" decay.

    No step is wasted on a rate of 0: the warm-up starts at base / warmup, and the decay reaches 0 only at `steps`.
    Raises ValueError for an unknown schedule.

    >>> [learning_rate(step, 6, 2, 1.0, "linear") for step in range(6)]
    [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    """
    _require("schedule", schedule, ("constant", "linear", "cosine"))
    if step < warmup:
        return base * (step + 1) / warmup
    done = min((step - warmup) / max(steps - warmup, 1), 1.0)
    decay = {"constant": 1.0, "linear": 1.0 - done, "cosine": (1.0 + math.cos(math.pi * done)) / 2}
    return base * decay[schedule]
