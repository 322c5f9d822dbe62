"""The sequential sampler: rows of tokens over a key/value cache that we own. Knows no task and no text.

Every token's keys and values are computed once and stored once. A row is a leaf of a tree of segments; `fork` adds
leaves below a row and copies nothing, so a prompt forked 64 ways is one prompt in memory. `prefill`, `extend` and
`fork` only write down what is to be done: the next sampling step computes all that is pending in one packed forward
(no padding between rows). `run` lets many programs share one running batch: a row that has finished leaves at once,
and the next request of its program joins the rows that are still being decoded.

Reading order: Sampler.sample -> run (the loop) -> _compute (which tokens need a forward) -> _Forward (one forward:
where keys are written, what each token attends to) -> _Piece (one batched attention) -> _Arena (memory).

Legend: N tokens of a forward, R rows, H query heads, J key heads, G = H / J query heads per key head, D head size,
F segments of a piece, M queries per segment, L keys per segment, V vocabulary, E width.

The weights are shared with the model that was given, the module tree is not: sampling runs on a private twin with its
own attention function and its own eval mode, so a model that is being trained is never touched. After an update of the
weights, release all rows: what is cached belongs to the old weights.
"""

from __future__ import annotations

import copy
import heapq
import inspect
import time
from collections import defaultdict, deque
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface

from kernels import scaled_logits

ATTENTION = "sesa_tree"  # our name in transformers' public registry of attention functions


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are drawn: temperature, then top-k, top-p and min-p (each on what the one before it left).

    temperature 0 is greedy. `top_k` 0, `top_p` 1 and `min_p` 0 are off. A row ends at a stop id of the sampler, at a
    text of `stop`, or after `max_new_tokens`.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    max_new_tokens: int = 256
    stop: tuple[str, ...] = ()

    def __post_init__(self):
        rules = [
            (self.temperature >= 0, "temperature", "must be >= 0 (0 is greedy)"),
            (0 < self.top_p <= 1, "top_p", "must be in (0, 1] (1 is off)"),
            (self.top_k >= 0, "top_k", "must be >= 0 (0 is off)"),
            (0 <= self.min_p < 1, "min_p", "must be in [0, 1) (0 is off)"),
            (self.max_new_tokens >= 1, "max_new_tokens", "must be >= 1"),
            (not isinstance(self.stop, str) and all(self.stop), "stop", "must be a tuple of non-empty texts"),
        ]
        for holds, name, rule in rules:
            if not holds:
                raise ValueError(f"{name}={getattr(self, name)!r}: {rule}")

    @property
    def distribution(self) -> tuple:
        """What decides the probabilities: rows that agree here are drawn together."""
        return self.temperature, self.top_p, self.top_k, self.min_p


class Completion(NamedTuple):
    """What one row sampled. `ids` keep the stop token; `logps[t]` is the log-prob of ids[t] in the distribution that it
    was drawn from, after temperature and truncation (greedy: in the distribution of temperature 1)."""

    ids: list[int]
    logps: list[float]
    finish_reason: str  # "stop" | "length"


@dataclass
class Stats:
    """Counters since the sampler was made. A token is computed at most once unless it was rewound or evicted."""

    prefill_tokens: int = 0  # given tokens that went through a forward
    decode_tokens: int = 0  # sampled tokens that went through a forward
    generated_tokens: int = 0  # sampled tokens, the last one of each row included (it is computed only if needed)
    decode_steps: int = 0  # times that a token was drawn for every running row
    forwards: int = 0
    preemptions: int = 0  # rows put back because the memory budget was full
    seconds: float = 0.0  # inside `run` and `sample`, the programs' own time included


Program = Generator[tuple[Sequence[int], SamplingParams, Sequence[int]], list[Completion], Any]


class Sampler:
    """Prefill, extend, sample, fork, rewind, release for a transformers causal LM with full attention.

    model: Llama, Qwen2, Qwen2.5, Qwen3, SmolLM and the like; any dtype; its weights are shared, nothing else.
    stop_ids: token ids that end a row. pad_id: not used, since nothing is ever padded; so pad == eos is harmless.
    decode: ids -> text, needed for `SamplingParams.stop` only. max_rows: rows decoded at once, more of them wait.
    memory_gb: budget for keys and values; rows that do not fit wait, and are computed again when they come back.
    max_forward_tokens: longer prefills are cut into several forwards.
    share_from: a fork of fewer tokens than this copies them instead of sharing (one attention call less per layer).
    ValueError for a model whose logits our attention does not reproduce (sliding windows, ALiBi, soft-capped scores).
    """

    def __init__(
        self,
        model: torch.nn.Module,
        stop_ids: Iterable[int],
        pad_id: int | None = None,
        decode: Callable[[list[int]], str] | None = None,
        max_rows: int = 256,
        memory_gb: float | None = None,
        max_forward_tokens: int = 8192,
        share_from: int = 33,
    ):
        for name, value in [("max_rows", max_rows), ("max_forward_tokens", max_forward_tokens)]:
            if value < 1:
                raise ValueError(f"{name}={value}: must be at least 1")
        self.stop_ids, self.decode, self.max_rows = frozenset(stop_ids), decode, max_rows
        self.max_forward_tokens, self.share_from = max_forward_tokens, share_from
        self.stats = Stats()
        self._twin = _make_twin(model)
        self._head = self._twin.get_output_embeddings()
        if self._head is None:
            raise ValueError(f"{type(model).__name__} has no output embeddings: load it with AutoModelForCausalLM")
        self._softcap = getattr(self._twin.config, "final_logit_softcapping", None) or 0.0
        self._max_positions = getattr(self._twin.config, "max_position_embeddings", None)
        self._arena = _Arena(self._twin, memory_gb)
        self._rows: dict[int, _Segment] = {}
        self._next_row = 0
        self._forward: _Forward | None = None  # the last forward, kept for as long as its rows decode in step
        self._check_model()

    # ------------------------------------------------------------------------------------------------ rows

    def prefill(self, prompts: Sequence[Sequence[int]]) -> list[int]:
        """One new row per prompt. Nothing is computed before the first sampling step."""
        for i, prompt in enumerate(prompts):
            if len(prompt) == 0:
                raise ValueError(f"prompt {i} is empty: a row needs at least one token, such as the model's bos")
            self._check_ids(prompt)
        return [self._add(_Segment(list(prompt), base=0)) for prompt in prompts]

    def extend(self, rows: Sequence[int], ids: Sequence[Sequence[int]]) -> list[int]:
        """Append given tokens to rows, in place; returns the same rows."""
        for row, more in zip(rows, ids, strict=True):
            self._check_ids(more)
            self._idle(row).ids.extend(more)
        self._forward = None
        return list(rows)

    def fork(self, rows: Sequence[int], n: int) -> list[int]:
        """n new rows that continue each row, sharing its history: those of rows[i] are kids[i * n : (i + 1) * n].

        The forked rows stay valid and may go on by themselves.
        """
        if n < 1:
            raise ValueError(f"fork into n={n}: must be at least 1")
        return [self._add(self._idle(row).branch()) for row in rows for _ in range(n)]

    def rewind(self, rows: Sequence[int], lengths: Sequence[int]) -> None:
        """Cut rows back to their first `length` tokens. The last kept token is computed again at the next step."""
        for row, length in zip(rows, lengths, strict=True):
            leaf = self._idle(row)
            if not 1 <= length <= leaf.length:
                raise ValueError(f"rewind row {row} to length {length}: it has {leaf.length} tokens, keep 1 or more")
            if length < leaf.length:
                self._rows[row] = leaf.cut(length)
                if self._rows[row] is not leaf:
                    self._drop(leaf)
        self._forward = None

    def release(self, rows: Iterable[int]) -> None:
        """Forget rows; memory is freed once no fork needs it."""
        for row in rows:
            self._drop(self._idle(row))
            del self._rows[row]

    def length(self, row: int) -> int:
        """Tokens of a row so far, given and sampled."""
        return self._leaf(row).length

    @property
    def cache_bytes(self) -> int:
        """Bytes now allocated for keys and values."""
        return self._arena.bytes

    # ------------------------------------------------------------------------------------------------ sampling

    def sample(self, rows: Sequence[int], params: SamplingParams, seeds: Sequence[int]) -> list[Completion]:
        """Sample one continuation per row; the rows then hold the sampled tokens too.

        The t-th token of a row depends on the row's tokens, the weights, `params` and (seeds[i], t) alone, not on the
        other rows, their order or `max_rows` (in fp32 on a CPU; in bf16 rounding may differ with the batch).
        """

        def program() -> Program:
            return (yield rows, params, seeds)

        return self.run([program()])[0]

    def run(self, programs: Sequence[Program]) -> list[Any]:
        """Run generators that `yield (rows, params, seeds)` and are sent their list of `Completion`s.

        The requests of all programs share one running batch; a program resumes as soon as its own request is complete,
        and what it yields next joins the batch. Returns what each program returned. If anything is raised (Ctrl-C
        included) the programs are closed and the rows made since the call are released.
        """
        began, first_row = time.perf_counter(), self._next_row
        jobs = [_Job(program) for program in programs]
        waiting: deque[_Draft] = deque()
        active: list[_Draft] = []
        leaves: list[_Segment] = []  # of `active`; the same list object for as long as the same rows run
        room = self.max_rows
        try:
            for job in jobs:
                waiting.extend(self._resume(job, None))
            while waiting or active:
                while waiting and len(active) < room:
                    active.append(waiting.popleft())
                if len(leaves) != len(active):
                    leaves = [draft.leaf for draft in active]
                try:
                    hidden = self._compute(leaves)  # [R, E]
                except _NoRoom as error:
                    if len(active) == 1:
                        raise ValueError(error.text) from None
                    waiting.appendleft(self._evict(active.pop()))
                    room = len(active)  # no new rows until one has finished
                    continue
                self._draw(hidden, active)
                done = [draft for draft in active if draft.finish_reason]
                if done:
                    room, leaves = self.max_rows, []
                    active = [draft for draft in active if not draft.finish_reason]
                for job in dict.fromkeys(draft.job for draft in done):
                    if all(draft.finish_reason for draft in job.drafts):
                        waiting.extend(self._resume(job, [draft.completion() for draft in job.drafts]))
        except BaseException:
            for job in jobs:
                for draft in job.drafts:
                    draft.leaf.busy = False
                job.program.close()
            self.release([row for row in self._rows if row >= first_row])
            raise
        finally:
            self.stats.seconds += time.perf_counter() - began
        return [job.result for job in jobs]

    def _resume(self, job: _Job, completions: list[Completion] | None) -> list[_Draft]:
        """Hand a program its completions; returns the drafts of its next request (none when it has returned)."""
        try:
            while True:
                rows, params, seeds = job.program.send(completions)
                if len(rows) != len(seeds):
                    raise ValueError(f"{len(rows)} rows but {len(seeds)} seeds: every row needs a seed of its own")
                job.drafts = [_Draft(job, self._leaf(row), params, seed) for row, seed in zip(rows, seeds, strict=True)]
                if job.drafts:
                    break
                completions = []
        except StopIteration as stop:
            job.result, job.drafts = stop.value, []
            return []
        self._check_request(job.drafts, rows, params)
        return job.drafts

    @torch.inference_mode()
    def _draw(self, hidden: Tensor, active: list[_Draft]) -> None:
        """Draw the next token of every active row from its last hidden state [R, E]; mark the rows that end."""
        groups: dict[tuple, list[int]] = defaultdict(list)
        for i, draft in enumerate(active):
            groups[draft.params.distribution].append(i)
        for distribution, members in groups.items():
            drafts = [active[i] for i in members]
            mine = hidden if len(groups) == 1 else hidden[members]
            seeds, counts = [draft.seed for draft in drafts], [len(draft.ids) for draft in drafts]
            tokens, logps = draw_tokens(self._head(mine), uniforms(seeds, counts), *distribution, self._softcap)
            if not logps.isfinite().all():
                raise ValueError("the model gave logits that are not finite: its weights hold inf or nan, or overflow")
            for draft, token, logp in zip(drafts, tokens.tolist(), logps.tolist(), strict=True):
                draft.ids.append(token)
                draft.logps.append(logp)
                draft.leaf.ids.append(token)
                draft.leaf.drawn += 1
                if token in self.stop_ids or (draft.params.stop and self._ends_with_text(draft)):
                    draft.finish_reason = "stop"
                elif len(draft.ids) == draft.params.max_new_tokens:
                    draft.finish_reason = "length"
        self.stats.decode_steps += 1
        self.stats.generated_tokens += len(active)

    def _ends_with_text(self, draft: _Draft) -> bool:
        # A new match ends at the last token, and no token is shorter than a byte; the 4 spare tokens are for decoders
        # that strip the head of what they are given.
        tail = max(len(text.encode()) for text in draft.params.stop) + 4
        text = self.decode(draft.ids[-tail:])
        return any(stop in text for stop in draft.params.stop)

    # ------------------------------------------------------------------------------------------------ computing

    @torch.inference_mode()
    def _compute(self, leaves: list[_Segment]) -> Tensor:
        """Compute every pending token of `leaves`; returns the hidden state of the last token of each, [R, E]."""
        if self._forward is not None and self._forward.advance(leaves):  # the usual case: one more token for each
            return self._run_forward(self._forward)
        self._compute_bases(leaves)
        self._root(leaves)
        return self._compute_pending(leaves, [len(leaf.ids) for leaf in leaves])

    def _compute_bases(self, segments: list[_Segment]) -> None:
        """Compute what segments stand on: rows that were forked before they were computed, the root first."""
        bases = dict.fromkeys(s.parent for s in segments if s.parent and s.parent.cached < s.visible)
        if bases:
            self._compute_bases(list(bases))
            self._compute_pending(list(bases), [base.shared for base in bases])

    def _root(self, leaves: list[_Segment]) -> None:
        """Give new forks a place: a short history is copied, a long one stays shared, none is computed again."""
        copies = []
        for leaf in leaves:
            parent = leaf.parent
            if not leaf.ids and leaf.hidden is None:
                if parent.cached == leaf.visible and parent.hidden is not None:
                    leaf.hidden = parent.hidden
                else:
                    leaf.take_back_one()
                    self._drop(parent)
            if leaf.parent and leaf.ids and not (leaf.cached or leaf.shared) and leaf.visible < self.share_from:
                copies.append((leaf.parent, leaf, leaf.visible))
        self._arena.reserve([leaf for _, leaf, _ in copies], [len(leaf.ids) + visible for _, leaf, visible in copies])
        self._arena.copy(copies)
        for parent, leaf, visible in copies:
            leaf.ids[:0], leaf.base, leaf.cached = parent.ids[:visible], parent.base, visible
            leaf.parent, leaf.visible = parent.parent, parent.visible
            if leaf.parent:
                leaf.parent.users += 1
            self._drop(parent)

    def _compute_pending(self, segments: list[_Segment], stops: list[int]) -> Tensor:
        """Forward ids[cached:stop] of every segment; returns the last hidden state of each, [R, E]."""
        todo = [(segment, stop) for segment, stop in zip(segments, stops, strict=True) if segment.cached < stop]
        self._arena.reserve(*zip(*todo, strict=True)) if todo else None
        for batch in self._batches(todo):
            self._forward = _Forward(batch, self._arena, segments)
            last = self._run_forward(self._forward)  # [len(batch), E]
            for i, (segment, _) in enumerate(batch):
                segment.hidden = (last, i)
        states, indices = zip(*(segment.hidden for segment in segments), strict=True)
        if all(state is states[0] for state in states):
            return states[0] if indices == tuple(range(len(states[0]))) else states[0][list(indices)]
        return torch.stack([state[i] for state, i in zip(states, indices, strict=True)])

    def _batches(self, todo: list[tuple[_Segment, int]]) -> Iterable[list[tuple[_Segment, int]]]:
        """Cut the work into forwards of at most `max_forward_tokens`; a long segment is computed in several."""
        batch, tokens = [], 0
        for segment, stop in todo:
            begin = segment.cached
            while begin < stop:
                if tokens == self.max_forward_tokens:
                    yield batch
                    batch, tokens = [], 0
                end = min(stop, begin + self.max_forward_tokens - tokens)
                batch.append((segment, end))
                tokens += end - begin
                begin = end
        if batch:
            yield batch

    def _run_forward(self, forward: _Forward) -> Tensor:
        decoder, stats = self._twin.base_model, self.stats
        hidden = decoder(
            input_ids=forward.input_ids, position_ids=forward.positions, use_cache=False, tree=forward
        ).last_hidden_state[0]  # [N, E]
        drawn = forward.commit()
        stats.forwards += 1
        stats.decode_tokens += drawn
        stats.prefill_tokens += len(hidden) - drawn
        return hidden[forward.last]  # [R, E]

    # ------------------------------------------------------------------------------------------------ checks

    def _leaf(self, row: int) -> _Segment:
        leaf = self._rows.get(row)
        if leaf is None:
            raise ValueError(f"row {row!r} does not exist: it was never made by prefill or fork, or it was released")
        return leaf

    def _idle(self, row: int) -> _Segment:
        leaf = self._leaf(row)
        if leaf.busy:
            raise ValueError(f"row {row} is being sampled: extend, fork, rewind or release it when that is complete")
        return leaf

    def _add(self, segment: _Segment) -> int:
        self._next_row += 1
        self._rows[self._next_row] = segment
        return self._next_row

    def _drop(self, segment: _Segment) -> None:
        """One user less; memory of segments that nobody uses any more is freed, towards the root."""
        self._forward = None
        current: _Segment | None = segment
        while current is not None:
            current.users -= 1
            if current.users:
                return
            self._arena.free(current)
            current = current.parent

    def _evict(self, draft: _Draft) -> _Draft:
        """Free what a waiting row holds; its tokens are known and will be computed again."""
        self.stats.preemptions += 1
        self._forward = None
        leaf = draft.leaf
        if leaf.users == 1:
            self._arena.free(leaf)
            leaf.cached, leaf.hidden = 0, None
        return draft

    def _check_ids(self, ids: Sequence[int]) -> None:
        vocab = self._head.weight.shape[0]
        if len(ids) and not (min(ids) >= 0 and max(ids) < vocab):
            bad = next(i for i in ids if not 0 <= i < vocab)
            raise ValueError(f"token id {bad}: the model's vocabulary has ids 0 to {vocab - 1}")

    def _check_request(self, drafts: list[_Draft], rows: Sequence[int], params: SamplingParams) -> None:
        if params.stop and self.decode is None:
            raise ValueError("stop texts need Sampler(decode=...), a function from ids to text")
        for row, draft in zip(rows, drafts, strict=True):
            if draft.leaf.busy:
                raise ValueError(f"row {row} is already being sampled: fork it to sample it twice")
            draft.leaf.busy = True
            total = draft.leaf.length + params.max_new_tokens
            if self._max_positions and total > self._max_positions:
                raise ValueError(
                    f"row {row} has {draft.leaf.length} tokens and max_new_tokens is {params.max_new_tokens}, together "
                    f"{total}: the model has {self._max_positions} positions; shorten the prompt or max_new_tokens"
                )

    @torch.inference_mode()
    def _check_model(self) -> None:
        """Refuse a model whose own forward disagrees with ours, on a prompt that is prefilled, forked and extended."""
        twin = self._twin
        ids = [i % self._head.weight.shape[0] for i in range(11)]
        theirs = twin(input_ids=torch.tensor([ids], device=twin.device), use_cache=False).logits[0, -1].float()  # [V]
        twin.set_attn_implementation(ATTENTION)
        share_from, self.share_from = self.share_from, 0
        rows = self.prefill([ids[:6]])
        kids = self.fork(rows, 2)
        self.extend(kids, [ids[6:]] * 2)
        hidden = self._compute([self._rows[kid] for kid in kids])
        ours = scaled_logits(self._head(hidden), softcap=self._softcap)[0]  # [V]
        self.release(rows + kids)
        self.share_from, self.stats = share_from, Stats()
        gap, scale = (ours - theirs).abs().max().item(), theirs.abs().max().item()
        if not gap <= scale * (1e-3 if theirs.dtype == twin.dtype else 0.1) + 1e-6:
            raise ValueError(
                f"{type(twin).__name__}: our logits differ from the model's own by {gap:.3g} (largest {scale:.3g}); "
                "the sampler supports full attention with rotary or learnt positions, and finite weights"
            )


# ---------------------------------------------------------------------------------------------------- distribution


def draw_tokens(
    logits: Tensor, u: Tensor, temperature: float, top_p: float, top_k: int, min_p: float, softcap: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Draw one token per row of logits [R, V] with the uniforms u fp64 [R]; returns ids int64 [R], log-probs fp32 [R].

    The log-prob is that of the distribution drawn from; greedy (temperature 0) reports the one of temperature 1.

    >>> logits = torch.tensor([[0.0, 1.0, -1.0]]).log_softmax(-1)
    >>> ids, logps = draw_tokens(logits, torch.tensor([0.5]), 1.0, 1.0, 0, 0.0)
    >>> ids.tolist(), [round(x, 4) for x in logps.tolist()]      # probabilities 0.2447, 0.6652, 0.0900
    ([1], [-0.4076])
    """
    scores = scaled_logits(logits, temperature or 1.0, softcap)  # [R, V]
    if temperature > 0 and (top_k or top_p < 1 or min_p):
        scores = truncate(scores, top_p, top_k, min_p)
    probs = scores.softmax(-1)
    tokens = _inverse_cdf(probs, u.to(probs.device)) if temperature > 0 else scores.argmax(-1)
    return tokens, probs.gather(-1, tokens[:, None]).squeeze(-1).log()  # [R], [R]


def truncate(scores: Tensor, top_p: float = 1.0, top_k: int = 0, min_p: float = 0.0) -> Tensor:
    """Scores [R, V] with -inf where top-k, then top-p, then min-p leave nothing. At least one token stays.

    top-k keeps the k largest; top-p the most likely tokens, as few as reach the probability top_p among those kept by
    top-k; min-p those of at least min_p times the largest probability. Ties with the last one that is kept stay too.

    >>> truncate(torch.tensor([[0.5, 0.3, 0.2]]).log(), top_p=0.7).exp()
    tensor([[0.5000, 0.3000, 0.0000]])
    """
    vocab = scores.shape[-1]
    if 0 < top_k < vocab:
        scores = scores.masked_fill(scores < scores.topk(top_k, dim=-1).values[:, -1:], -torch.inf)
    if top_p < 1:
        probs = scores.double().softmax(-1)
        for k in (min(256, vocab), vocab):  # a full sort only for a row that is as flat as to need it
            ranked = probs.topk(k, dim=-1).values  # [R, k]
            enough = (ranked.cumsum(-1) < top_p).sum(-1, keepdim=True)  # [R, 1]
            if k == vocab or (enough < k).all():
                break
        scores = scores.masked_fill(probs < ranked.gather(-1, enough.clamp(max=k - 1)), -torch.inf)
    if min_p:
        scores = scores.masked_fill((scores - scores.amax(-1, keepdim=True)).double().exp() < min_p, -torch.inf)
    return scores


def _inverse_cdf(probs: Tensor, u: Tensor, block: int = 64) -> Tensor:
    """The token at which the running sum of probs fp32 [R, V] passes u fp64 [R]. int64 [R].

    In two levels, first the block of 64 tokens and then the token, both summed in fp64: a running sum over the whole
    vocabulary in fp64 costs more than a small model's forward. A token of probability 0 is never drawn.
    """
    vocab, whole = probs.shape[-1], probs.shape[-1] // block * block
    sums = probs[:, :whole].unflatten(-1, (-1, block)).sum(-1), probs[:, whole:].sum(-1, keepdim=True)
    edges = torch.cat(sums, -1).double().cumsum(-1)  # [R, V / 64 + 1]
    target = u[:, None] * edges[:, -1:]  # [R, 1]
    at = torch.searchsorted(edges, target, right=True).clamp(max=whole // block)  # [R, 1]; the clamp is for nan
    index = at * block + torch.arange(block, device=probs.device)  # [R, 64]
    inside = probs.gather(-1, index.clamp(max=vocab - 1)).double().masked_fill(index >= vocab, 0.0)
    running = inside.cumsum(-1)
    # fp32 block sums and fp64 sums of the same tokens differ by rounding: stay inside the block
    rest = (target - edges.gather(-1, at) + running[:, -1:]).clamp(min=0)
    rest = torch.minimum(rest, running[:, -1:] * (1 - 2.0**-50))
    return (at * block + torch.searchsorted(running, rest, right=True)).clamp(max=vocab - 1)[:, 0]


def uniforms(seeds: Sequence[int], counts: Sequence[int]) -> Tensor:
    """The uniform number of (seed, count), in (0, 1), fp64: splitmix64, a counter-based generator (Steele et al. 2014).

    Stateless, so the t-th number of a row does not depend on what else is in the batch. Any int is a seed, mod 2^64.

    >>> uniforms([0, 0, 1], [0, 1, 0])
    tensor([0.8149, 0.1667, 0.4048], dtype=torch.float64)
    """
    wrapped = [(seed + 2**63) % 2**64 - 2**63 for seed in seeds]
    state = _mix(torch.tensor(wrapped, dtype=torch.int64)) + (torch.tensor(counts, dtype=torch.int64) + 1) * _GOLDEN
    bits = (_mix(state) >> 16) & (2**48 - 1)
    return (bits.double() + 0.5) * 2.0**-48  # [R]


_GOLDEN, _MIX_1, _MIX_2 = (c - 2**64 for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def _mix(x: Tensor) -> Tensor:
    """The finaliser of splitmix64 on int64 (products wrap; >> is made logical by the mask)."""
    x = (x ^ ((x >> 30) & (2**34 - 1))) * _MIX_1
    x = (x ^ ((x >> 27) & (2**37 - 1))) * _MIX_2
    return x ^ ((x >> 31) & (2**33 - 1))


# ---------------------------------------------------------------------------------------------------- records


@dataclass(eq=False)
class _Segment:
    """A run of tokens of the tree, its keys and values stored once. A row is a segment without a row below it, or one
    that goes on growing while forks see its first tokens."""

    ids: list[int]
    base: int  # position of ids[0] in the row
    parent: _Segment | None = None
    visible: int = 0  # tokens of the parent that are part of this row
    cached: int = 0  # tokens of ids with keys and values
    shared: int = 0  # tokens of ids that forks may see, which are therefore never overwritten
    users: int = 1  # the row itself and the segments below
    drawn: int = 0  # sampled tokens at the end of ids that are not computed yet
    hidden: tuple[Tensor, int] | None = None  # hidden state of token `cached - 1` (of the parent's last one if empty)
    slab: _Slab | None = None
    slot: int = 0
    busy: bool = False  # in a running batch

    @property
    def length(self) -> int:
        return self.base + len(self.ids)

    @property
    def place(self) -> tuple[int, int]:
        return self.slab.number, self.slot

    def branch(self) -> _Segment:
        """An empty segment below this one, at its end."""
        kid = _below(self, self.length, [])
        if self.cached == len(self.ids):
            kid.hidden = self.hidden
        return kid

    def cut(self, length: int) -> _Segment:
        """The row's first `length` tokens, of which the last is pending again: this segment, or a new one if forks
        see what would be overwritten."""
        if length > self.base + self.shared:
            del self.ids[length - self.base :]
            self.cached, self.drawn, self.hidden = min(self.cached, len(self.ids) - 1), 0, None
            return self
        return _below(self, length - 1, [self.token(length - 1)])

    def token(self, position: int) -> int:
        owner, _ = self.owner(position + 1)
        return owner.ids[position - owner.base]

    def owner(self, length: int) -> tuple[_Segment | None, int]:
        """The segment that holds the last of the row's first `length` tokens, and how many of its own they are."""
        segment: _Segment | None = self
        while segment is not None and length <= segment.base:
            segment = segment.parent
        return (segment, length - segment.base) if segment else (None, 0)

    def take_back_one(self) -> None:
        """An empty segment takes the last token of its parent, to be computed again: its hidden state is not known."""
        position = self.base - 1
        self.ids, self.base = [self.token(position)], position
        self.parent, self.visible = self.parent.owner(position)
        if self.parent:
            self.parent.users += 1


def _below(segment: _Segment, length: int, ids: list[int]) -> _Segment:
    """A new segment with `ids` after the first `length` tokens of the row of `segment`."""
    parent, visible = segment.owner(length)
    if parent is not None:
        parent.users += 1
        parent.shared = max(parent.shared, visible)
    return _Segment(ids, length, parent, visible)


@dataclass(eq=False)
class _Job:
    """A program and its current request."""

    program: Program
    drafts: list[_Draft] = field(default_factory=list)
    result: Any = None


@dataclass(eq=False)
class _Draft:
    """A row that is being sampled."""

    job: _Job
    leaf: _Segment
    params: SamplingParams
    seed: int
    ids: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    finish_reason: str = ""

    def completion(self) -> Completion:
        self.leaf.busy = False
        return Completion(self.ids, self.logps, self.finish_reason)


# ---------------------------------------------------------------------------------------------------- one forward


class _Forward:
    """The tokens of one packed forward, where their keys go and which cached keys each of them attends to.

    Tokens of one row see their own segment up to themselves, and the visible part of each segment above: one batched
    attention (`_Piece`) per slab of memory and level of the tree, not per row. A token's pieces are merged by their
    log-sum-exp, so that a shared prefix is read once for all rows below it.
    """

    def __init__(self, batch: list[tuple[_Segment, int]], arena: _Arena, leaves: list[_Segment]):
        self.batch, self.device = batch, arena.device
        tokens: list[int] = []
        positions: list[int] = []
        last = [0] * len(batch)
        own: dict[tuple, list] = defaultdict(list)
        above: dict[tuple, tuple[list, list]] = defaultdict(lambda: ([], []))
        # in the order of memory, so that attention reads the cache without gathering it
        for i in sorted(range(len(batch)), key=lambda i: batch[i][0].place):
            segment, stop = batch[i]
            start, count = segment.cached, stop - segment.cached
            queries = range(len(tokens), len(tokens) + count)
            tokens += segment.ids[start:stop]
            positions += range(segment.base + start, segment.base + stop)
            last[i] = len(tokens) - 1
            fresh = start == 0 and segment.parent is None and count > 1
            own[segment.slab, _bucket(count), fresh].append((segment.slot, queries, range(start + 1, stop + 1)))
            level, ancestor, visible = 0, segment.parent, segment.visible
            while ancestor is not None:
                above[level, ancestor][0].extend(queries)
                above[level, ancestor][1].extend([visible] * count)
                level, ancestor, visible = level + 1, ancestor.parent, ancestor.visible
        shared: dict[tuple, list] = defaultdict(list)
        for (level, ancestor), (queries, limits) in above.items():
            shared[level, ancestor.slab, _bucket(len(queries))].append((ancestor.slot, queries, limits))
        size = len(tokens)
        self.own = [_Piece(slab, entries, arena, size, True, fresh) for (slab, _, fresh), entries in own.items()]
        self.shared = [_Piece(slab, entries, arena, size) for (_, slab, _), entries in shared.items()]
        self.input_ids, self.positions = self._tensor([tokens]), self._tensor([positions])  # [1, N]
        self.order, self.last = last, _index(last, size, arena.device)  # [R]
        one_each = size == len(batch) and [segment for segment, _ in batch] == leaves
        self.leaves = leaves if one_each else None
        self.room = min(segment.slab.capacity - stop for segment, stop in batch)

    def _tensor(self, values) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.device)

    def advance(self, leaves: list[_Segment]) -> bool:
        """Become the forward of the next token if this one was a decode step of the same rows and all can grow."""
        if leaves is not self.leaves or self.room == 0:
            return False
        self.room -= 1
        self.batch = [(leaf, stop + 1) for leaf, stop in self.batch]
        tokens = [0] * len(leaves)
        for leaf, i in zip(leaves, self.order, strict=True):
            tokens[i] = leaf.ids[-1]
        self.input_ids = self._tensor([tokens])
        self.positions = self.positions + 1
        for piece in self.own:
            piece.advance()
        return True

    def commit(self) -> int:
        """Note that the tokens are cached; returns how many of them had been sampled."""
        drawn = 0
        for segment, stop in self.batch:
            if segment.drawn:
                mine = max(0, segment.drawn - (len(segment.ids) - stop))
                segment.drawn -= mine
                drawn += mine
            segment.cached, segment.hidden = stop, None
        return drawn

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Store key, value [J, N, D] and attend with query [H, N, D]; returns [N, H, D]."""
        query, merge = query.transpose(0, 1), bool(self.shared)  # [N, H, D]
        for piece in self.own:
            piece.store(layer, key, value)
        if len(self.own) == 1 and not merge:
            return self.own[0].attend(layer, query, scale, False)[0]
        out = torch.empty_like(query)
        weight = query.new_empty(query.shape[0], query.shape[1], 1, dtype=torch.float32)  # log-sum-exp, [N, H, 1]
        for piece in self.own:
            out[piece.tokens], mass = piece.attend(layer, query, scale, merge)
            if mass is not None:
                weight[piece.tokens] = mass
        for piece in self.shared:
            part, mass = piece.attend(layer, query, scale, True)
            rest = weight[piece.tokens]
            out[piece.tokens] = torch.lerp(out[piece.tokens], part, torch.sigmoid(mass - rest).to(part.dtype))
            weight[piece.tokens] = torch.logaddexp(rest, mass)
        return out


class _Piece:
    """Attention of some tokens to some segments of one slab: F segments of L keys, M queries each (padded).

    entries: (slot, query tokens, number of keys that each of them sees) per segment. The keys are a view of the slab
    if the slots lie close together (what lies between is computed and not read), and gathered otherwise.
    """

    def __init__(self, slab: _Slab, entries: list, arena: _Arena, size: int, own: bool = False, fresh: bool = False):
        self.slab, self.heads, self.fresh = slab, arena.kv_heads, fresh
        entries.sort(key=lambda entry: entry[0])
        slots = [slot for slot, _, _ in entries]
        dense = slots[-1] + 1 - slots[0] <= 2 * len(slots)
        self.where = slice(slots[0], slots[-1] + 1) if dense else torch.tensor(slots, device=arena.device)
        self.segments = slots[-1] + 1 - slots[0] if dense else len(slots)
        self.queries = max(len(mine) for _, mine, _ in entries)
        take, limits, back, tokens, rows = [0] * (self.segments * self.queries), [], [], [], []
        limits = [1] * len(take)
        for i, (slot, mine, sees) in enumerate(entries):
            begin = (slot - slots[0] if dense else i) * self.queries
            take[begin : begin + len(mine)] = mine
            limits[begin : begin + len(mine)] = sees
            back += range(begin, begin + len(mine))
            tokens += mine
            rows += [slot * self.heads * slab.capacity + seen - 1 for seen in sees]
        self.longest = max(limits)
        self.limits = torch.tensor(limits, device=arena.device).view(self.segments, 1, self.queries, 1, 1)
        self.bias: Tensor | None = None
        self.tokens = _index(tokens, size, arena.device)
        self.take = _index(take, size, arena.device)  # tokens -> padded queries
        self.back = _index(back, len(take), arena.device)  # padded queries -> tokens
        if own:  # where the keys of `tokens` go, in the slab seen as [slots * J * capacity, D]
            heads = torch.arange(self.heads, device=arena.device)[:, None] * slab.capacity
            self.rows = (heads + torch.tensor(rows, device=arena.device)).flatten()  # [J * n]

    def advance(self) -> None:
        self.limits += 1
        self.rows += 1
        self.longest += 1
        self.bias = None

    def store(self, layer: int, *new: Tensor) -> None:
        """Write keys and values [J, N, D] of this piece's tokens."""
        for cache, states in zip(self.slab.layer(layer), new, strict=True):
            size = cache.shape[-1]
            cache.view(-1, size).index_copy_(0, self.rows, states[:, self.tokens].reshape(-1, size))

    def attend(self, layer: int, query: Tensor, scale: float, merge: bool) -> tuple[Tensor, Tensor | None]:
        """query [N, H, D] -> output [n, H, D] and, to merge, log-sum-exp fp32 [n, H, 1] of this piece's n tokens."""
        heads, size, segments, queries = self.heads, query.shape[-1], self.segments, self.queries
        keys, values = (cache[:, :, : self.longest][self.where] for cache in self.slab.layer(layer))  # [F, J, L, D]
        query = query[self.take].view(segments, queries, -1, size)  # [F, M, H, D]
        if self.fresh:  # prompts at their beginning: plain causal attention, which holds no [M, L] scores
            out = F.scaled_dot_product_attention(
                query.transpose(1, 2), keys, values, is_causal=True, scale=scale, enable_gqa=query.shape[2] != heads
            )
            return out.transpose(1, 2).reshape(segments * queries, -1, size)[self.back], None
        group = query.shape[2] // heads
        packed = query.view(segments, queries, heads, group, size).transpose(1, 2)  # [F, J, M, G, D]
        packed = packed.reshape(segments * heads, queries * group, size)
        if self.bias is None:
            sees = torch.arange(self.longest, device=query.device) < self.limits  # [F, 1, M, 1, L]
            bias = torch.zeros(sees.shape, dtype=query.dtype, device=query.device).masked_fill_(~sees, -torch.inf)
            self.bias = bias.expand(-1, heads, -1, group, -1).reshape(segments * heads, queries * group, -1)
        keys, values = keys.flatten(0, 1), values.flatten(0, 1)  # [F * J, L, D]
        scores = torch.baddbmm(self.bias, packed, keys.transpose(1, 2), alpha=scale).float()  # [F * J, M * G, L]
        mass = scores.logsumexp(-1, keepdim=True) if merge else None
        probs = torch.exp(scores - mass) if merge else scores.softmax(-1)
        out = self._unpack(torch.bmm(probs.to(values.dtype), values))
        return out, self._unpack(mass) if merge else None

    def _unpack(self, packed: Tensor) -> Tensor:
        """[F * J, M * G, x] -> [n, H, x]"""
        last = packed.shape[-1]
        shaped = packed.view(self.segments, self.heads, self.queries, -1, last).transpose(1, 2)  # [F, M, J, G, x]
        return shaped.reshape(self.segments * self.queries, -1, last)[self.back]


def _index(values: list[int], total: int, device: torch.device) -> Tensor | slice:
    """An index that selects `values`: everything, without a copy, if they are 0 .. total - 1."""
    return slice(None) if values == list(range(total)) else torch.tensor(values, device=device)


def _bucket(count: int) -> int:
    """Segments whose numbers of queries agree within 4 x share a piece: 1 | 2-4 | 5-16 | 17-64 | ..."""
    return ((count - 1).bit_length() + 1) // 2


def _tree_attention(module, query, key, value, attention_mask, scaling=None, tree: _Forward = None, **kwargs):
    """The attention function that transformers' models call: query [1, H, N, D], key and value [1, J, N, D]."""
    unknown = [k for k in ("sliding_window", "softcap", "s_aux", "position_bias") if kwargs.get(k) is not None]
    if unknown:
        found = ", ".join(unknown)
        raise ValueError(f"{type(module).__name__} uses {found}: the sampler supports plain full attention")
    return tree.attend(module.layer_idx, query[0], key[0], value[0], scaling).unsqueeze(0), None  # [1, N, H, D]


AttentionInterface.register(ATTENTION, _tree_attention)


# ---------------------------------------------------------------------------------------------------- memory


class _NoRoom(Exception):
    def __init__(self, text: str):
        super().__init__(text)
        self.text = text


@dataclass(eq=False)
class _Slab:
    """Keys and values of `slots` segments of up to `capacity` tokens. Its address never changes."""

    number: int
    capacity: int
    kv: Tensor  # [layers, 2, slots, J, capacity, D]
    free: list[int]

    def layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values [slots, J, capacity, D]"""
        return self.kv[layer].unbind(0)


class _Arena:
    """Memory for segments, in slabs of equal capacity: a segment that outgrows its slot moves to the next capacity.

    Capacities are 16, 32, ... 256, 512, 768, ...: what is allocated follows the tokens of each segment, not the longest
    one. A slab goes back to the system as soon as its last segment has gone.
    """

    def __init__(self, model: torch.nn.Module, memory_gb: float | None):
        config = model.config
        self.layers, self.device, self.dtype = config.num_hidden_layers, model.device, model.dtype
        self.kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        self.head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.budget = None if memory_gb is None else int(memory_gb * 1e9)
        self.bytes = 0
        self.slabs: dict[int, list[_Slab]] = defaultdict(list)
        self.made = 0

    def reserve(self, segments: list[_Segment], lengths: list[int]) -> None:
        """Give every segment a slot for `length` tokens; what it has cached moves along. All or none (_NoRoom)."""
        wanted: dict[int, list[_Segment]] = defaultdict(list)
        for segment, length in zip(segments, lengths, strict=True):
            if segment.slab is None or segment.slab.capacity < length:
                wanted[_capacity(length)].append(segment)
        self._check_budget(wanted)
        for capacity, movers in wanted.items():
            moves = []
            for segment, (slab, slot) in zip(movers, self._take(capacity, len(movers)), strict=True):
                old = copy.copy(segment)  # remembers the old place
                segment.slab, segment.slot = slab, slot
                moves.append((old, segment, segment.cached))
            self.copy([move for move in moves if move[0].slab is not None])
            for old, _, _ in moves:
                self.free(old)

    def copy(self, moves: list[tuple[_Segment, _Segment, int]]) -> None:
        """Copy the first n tokens' keys and values from one segment to another, for many (from, to, n) at once."""
        groups: dict[tuple, list] = defaultdict(list)
        for source, target, count in moves:
            if count:
                groups[source.slab, target.slab].append((source.slot, target.slot, count))
        for (source, target), entries in groups.items():
            sources, targets, counts = (list(column) for column in zip(*entries, strict=True))
            length = max(counts)
            target.kv[:, :, targets, :, :length] = source.kv[:, :, sources, :, :length]

    def free(self, segment: _Segment) -> None:
        slab, segment.slab = segment.slab, None
        if slab is None:
            return
        heapq.heappush(slab.free, segment.slot)
        if len(slab.free) == slab.kv.shape[2]:
            self.slabs[slab.capacity].remove(slab)
            self.bytes -= slab.kv.nbytes

    def _take(self, capacity: int, count: int) -> Iterable[tuple[_Slab, int]]:
        """`count` free slots, the lowest ones of old slabs first, then of a new slab."""
        for slab in self.slabs[capacity]:
            while slab.free and count:
                count -= 1
                yield slab, heapq.heappop(slab.free)
        if count:
            slots = max(count, sum(slab.kv.shape[2] for slab in self.slabs[capacity]) // 2)  # few slabs, few pieces
            if self.budget is not None and self.bytes + slots * self._slot_bytes(capacity) > self.budget:
                slots = count
            shape = (self.layers, 2, slots, self.kv_heads, capacity, self.head_size)
            # zeros, not empty: what no query may see is weighted with 0, and 0 * nan is nan
            kv = torch.zeros(shape, dtype=self.dtype, device=self.device)
            slab = _Slab(self.made, capacity, kv, list(range(slots)))
            self.made += 1
            self.slabs[capacity].append(slab)
            self.bytes += slab.kv.nbytes
            for _ in range(count):
                yield slab, heapq.heappop(slab.free)

    def _slot_bytes(self, capacity: int) -> int:
        return self.layers * 2 * self.kv_heads * capacity * self.head_size * self.dtype.itemsize

    def _check_budget(self, wanted: dict[int, list[_Segment]]) -> None:
        if self.budget is None:
            return
        more = 0
        for capacity, movers in wanted.items():
            free = sum(len(slab.free) for slab in self.slabs[capacity])
            more += max(0, len(movers) - free) * self._slot_bytes(capacity)
        if self.bytes + more > self.budget:
            raise _NoRoom(
                f"memory budget of {self.budget / 1e9:.3g} GB is too small: {self.bytes / 1e9:.3g} GB hold keys and "
                f"values and one more row needs {more / 1e9:.3g} GB; raise memory_gb or release rows"
            )


def _capacity(length: int) -> int:
    """Tokens that a slot for `length` tokens holds: 16, 32, 64, 128, 256, then multiples of 256."""
    return max(16, 1 << (length - 1).bit_length()) if length <= 256 else -(-length // 256) * 256


# ---------------------------------------------------------------------------------------------------- the model


def _make_twin(model: torch.nn.Module) -> torch.nn.Module:
    """A copy of the module tree over the same weights (in-place updates are seen), in eval mode."""
    config = model.config
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:
        found = ", ".join(sorted(kinds))
        raise ValueError(f"{type(model).__name__} has layers of type {found}: only full_attention is supported")
    if "position_ids" not in inspect.signature(model.base_model.forward).parameters:
        raise ValueError(f"{type(model).__name__} takes no position_ids: rows of different lengths cannot be packed")
    weights = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in weights}).eval()
