"""The sequential sampler: rows of tokens over a key/value cache that we own. Knows no task and no text.

Every token's keys and values are computed once and stored once. A row is a leaf of a tree of segments; `fork` adds
leaves below a row and copies nothing, so a prompt forked 64 ways is one prompt in memory. `prefill`, `extend` and
`fork` only write down what is to be done: the next sampling step computes all that is pending in one packed forward
(no padding between rows). `run` lets many programs share one running batch: a row that has finished leaves at once,
and the next request of its program joins the rows that are still being decoded.

Reading order: Sampler.sample -> run (the loop) -> _advance (draw a token of every row) -> _compute (which tokens need a
forward) -> _Forward (one forward: where keys are written, what each token attends to) -> _Piece (one batched attention)
-> _Arena (memory).

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
import math
import time
from collections import defaultdict, deque
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface

from kernels import LlamaBlocks, draw_tokens, scaled_logits, stream, uniform

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
    evictions: int = 0  # rows whose keys and values were given up because the memory budget was full
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

    >>> _ = torch.manual_seed(0)
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> shape = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    >>> config = LlamaConfig(**shape, vocab_size=50)
    >>> sampler = Sampler(LlamaForCausalLM(config), stop_ids=[2])
    >>> [prompt] = sampler.prefill([[1, 5, 6, 7]])
    >>> first, second = sampler.sample(sampler.fork([prompt], 2), SamplingParams(max_new_tokens=3), seeds=[0, 1])
    >>> len(first.ids), len(first.logps), second.finish_reason, sampler.stats.prefill_tokens  # the prompt once
    (3, 3, 'length', 4)
    >>> [third] = sampler.sample([prompt], SamplingParams(max_new_tokens=3), seeds=[0])
    >>> third.ids == first.ids, sampler.length(prompt)
    (True, 7)
    """

    def __init__(
        self, model: torch.nn.Module, stop_ids: Iterable[int], pad_id: int | None = None,
        decode: Callable[[list[int]], str] | None = None, max_rows: int = 256, memory_gb: float | None = None,
        max_forward_tokens: int = 4096, share_from: int = 33,
    ):  # fmt: skip
        if min(max_rows, max_forward_tokens) < 1:
            raise ValueError(f"max_rows={max_rows}, max_forward_tokens={max_forward_tokens}: must be at least 1")
        self.stop_ids, self.decode, self.max_rows = frozenset(), decode, max_rows  # nothing stops the checks
        self.max_forward_tokens, self.share_from, self.stats = max_forward_tokens, share_from, Stats()
        self._twin = _make_twin(model)
        self._head, config = self._twin.get_output_embeddings(), self._twin.config
        self._vocab, self._softcap = len(self._head.weight), getattr(config, "final_logit_softcapping", None) or 0.0
        self.max_positions = getattr(config, "max_position_embeddings", None) or math.inf
        self._arena = _Arena(self._twin, memory_gb)
        self._rows: dict[int, _Segment] = {}
        self._forward: _Forward | None = None  # the last forward, kept for as long as its rows decode in step
        self._next_row = 0
        self._check_model()
        self.stop_ids = frozenset(stop_ids)

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
            self._leaf(row).ids.extend(more)
        self._forward = None
        return list(rows)

    def fork(self, rows: Sequence[int], n: int) -> list[int]:
        """n new rows that continue each row, sharing its history: those of rows[i] are kids[i * n : (i + 1) * n].

        The forked rows stay valid and may go on by themselves.
        """
        if n < 1:
            raise ValueError(f"fork into n={n}: must be at least 1")
        return [self._add(self._leaf(row).branch()) for row in rows for _ in range(n)]

    def rewind(self, rows: Sequence[int], lengths: Sequence[int]) -> None:
        """Cut rows back to their first `length` tokens. The last kept token is computed again at the next step."""
        for row, length in zip(rows, lengths, strict=True):
            leaf = self._leaf(row)
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
            self._drop(self._leaf(row))
            del self._rows[row]

    def length(self, row: int) -> int:
        """Tokens of a row so far, given and sampled."""
        return self._leaf(row, busy=True).length

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
        active, room = _Batch([]), self.max_rows
        try:
            for job in jobs:
                waiting.extend(self._resume(job, None))
            while waiting or active.drafts:
                if waiting and len(active.drafts) < room:
                    joining = [waiting.popleft() for _ in range(min(room - len(active.drafts), len(waiting)))]
                    active = _Batch(active.drafts + joining)
                try:
                    done = self._advance(active)
                except _NoRoom:
                    if not self._evict_one(active.leaves):
                        if len(active.drafts) == 1:
                            raise
                        waiting.appendleft(active.drafts[-1])
                        active = _Batch(active.drafts[:-1])
                        room = len(active.drafts)  # no new rows until one has finished
                    continue
                if done:
                    room, active = self.max_rows, _Batch([d for d in active.drafts if not d.finish_reason])
                for job in dict.fromkeys(draft.job for draft in done):
                    if all(draft.finish_reason for draft in job.drafts):
                        waiting.extend(self._resume(job, [draft.completion() for draft in job.drafts]))
        except BaseException:
            self._forward = None
            for draft in [draft for job in jobs for draft in job.drafts]:
                draft.leaf.busy = False
            for job in jobs:
                job.program.close()
            self.release([row for row in self._rows if row >= first_row])
            raise
        finally:
            self.stats.seconds += time.perf_counter() - began
        return [job.result for job in jobs]

    def _resume(self, job: _Job, completions: list[Completion] | None) -> list[_Draft]:
        """Hand a program its completions; returns the drafts of its next request (none when it has returned)."""
        job.drafts = []
        while not job.drafts:  # a request for no rows is complete at once
            try:
                rows, params, seeds = job.program.send(completions)
            except StopIteration as stop:
                job.result = stop.value
                return []
            if len(rows) != len(seeds):
                raise ValueError(f"{len(rows)} rows but {len(seeds)} seeds: every row needs a seed of its own")
            if params.stop and self.decode is None:
                raise ValueError("stop texts need Sampler(decode=...), a function from ids to text")
            for row, seed in zip(rows, seeds, strict=True):
                job.drafts.append(_Draft(job, self._leaf(row), params, stream(int(seed))))
                self._check_length(row, params)
                job.drafts[-1].leaf.busy = True
            completions = []
        return job.drafts

    @torch.inference_mode()
    def _advance(self, active: _Batch) -> list[_Draft]:
        """Draw the next token of every row; returns the rows that end."""
        hidden, done = self._compute(active.leaves), []  # [R, E]
        for distribution, members in active.groups:
            drafts = [active.drafts[i] for i in members]
            states = hidden if len(active.groups) == 1 else hidden[members]
            u = torch.tensor([uniform(d.stream, len(d.ids)) for d in drafts], dtype=torch.float64, device=states.device)
            tokens, logps = draw_tokens(self._head(states), u, *distribution, self._softcap)
            done += self._accept(drafts, tokens.tolist(), logps.tolist())
        self.stats.decode_steps += 1
        return done

    def _accept(self, drafts: list[_Draft], tokens: list[int], logps: list[float]) -> list[_Draft]:
        """Append a token to every row; returns the rows that end with it."""
        if not math.isfinite(sum(logps)):
            raise ValueError("the model gave logits that are not finite: its weights hold inf or nan, or overflow")
        for draft, token, logp in zip(drafts, tokens, logps, strict=True):
            draft.ids.append(token)
            draft.logps.append(logp)
            draft.leaf.ids.append(token)
            draft.leaf.drawn = 1
            if token in self.stop_ids or (draft.params.stop and self._ends_with_text(draft)):
                draft.finish_reason = "stop"
            elif len(draft.ids) == draft.params.max_new_tokens:
                draft.finish_reason = "length"
        self.stats.generated_tokens += len(drafts)
        return [draft for draft in drafts if draft.finish_reason]

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
        self._arena.reserve([(leaf, len(leaf.ids) + visible) for _, leaf, visible in copies])
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
        self._arena.reserve(todo)
        complete = len(todo) == len(segments)
        while todo:
            batch, room = [], self.max_forward_tokens  # a long segment is computed in several forwards
            for segment, stop in todo:
                if room:
                    batch.append((segment, min(stop, segment.cached + room)))
                    room -= batch[-1][1] - segment.cached
            self._forward = _Forward(batch, self._arena, segments)
            last = self._run_forward(self._forward)  # [len(batch), E]
            for (segment, _), state in zip(batch, last.unbind(), strict=True):
                segment.hidden = state
            todo = [(segment, stop) for segment, stop in todo if segment.cached < stop]
            complete = complete and len(batch) == len(segments) and not todo
        return last if complete else torch.stack([segment.hidden for segment in segments])

    def _run_forward(self, forward: _Forward) -> Tensor:
        if self._blocks:
            hidden = self._blocks.forward(forward)  # [N, E]
        else:
            ids, positions = forward.input_ids[None], forward.positions[None]  # [1, N]
            out = self._twin.base_model(input_ids=ids, position_ids=positions, use_cache=False, tree=forward)
            hidden = out.last_hidden_state[0]  # [N, E]
        drawn, stats = forward.commit(), self.stats
        stats.forwards += 1
        stats.decode_tokens += drawn
        stats.prefill_tokens += len(hidden) - drawn
        return hidden[forward.last]  # [R, E]

    # ------------------------------------------------------------------------------------------------ checks

    def _leaf(self, row: int, busy: bool = False) -> _Segment:
        leaf = self._rows.get(row)
        if leaf is None:
            raise ValueError(f"row {row!r} does not exist: it was never made by prefill or fork, or it was released")
        if leaf.busy and not busy:
            raise ValueError(f"row {row} is being sampled: wait until its request is complete, or fork it beforehand")
        return leaf

    def _add(self, segment: _Segment) -> int:
        row, self._next_row = self._next_row, self._next_row + 1
        self._rows[row] = segment
        return row

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

    def _evict_one(self, running: list[_Segment]) -> bool:
        """Free what one row holds that is not running; its tokens are known and are computed again when needed."""
        for leaf in self._rows.values():
            if leaf.slab and leaf.users == 1 and leaf not in running:
                self._arena.free(leaf)
                leaf.cached, leaf.hidden, self._forward = 0, None, None
                self.stats.evictions += 1
                return True
        return False

    def _check_ids(self, ids: Sequence[int]) -> None:
        if len(ids) and not (min(ids) >= 0 and max(ids) < self._vocab):
            bad = next(i for i in ids if not 0 <= i < self._vocab)
            raise ValueError(f"token id {bad}: the model's vocabulary has ids 0 to {self._vocab - 1}")

    def _check_length(self, row: int, params: SamplingParams) -> None:
        length, new = self.length(row), params.max_new_tokens
        if length + new > self.max_positions:
            raise ValueError(
                f"row {row} has {length} tokens and max_new_tokens is {new}, together {length + new}: the model has "
                f"{self.max_positions} positions; shorten the prompt or max_new_tokens"
            )

    @torch.inference_mode()
    def _check_model(self) -> None:
        """Compare with the model's own logits, after a prompt that is prefilled, forked, shared and extended."""
        twin, share_from = self._twin, self.share_from
        ids = [i % self._vocab for i in range(11)]
        theirs = twin(input_ids=torch.tensor([ids], device=twin.device), use_cache=False).logits[0, -1].float()  # [V]
        largest = theirs.abs().max().item()
        twin.set_attn_implementation(ATTENTION)
        self.share_from = 0
        for self._blocks in [LlamaBlocks.of(twin), None]:  # ours if it agrees, or else the model's own forward
            rows = self.prefill([ids[:6]])
            rows += self.fork(rows, 2)
            self.extend(rows[1:], [ids[6:]] * 2)
            logits = self._head(self._compute([self._rows[row] for row in rows[1:]]))
            gap = (scaled_logits(logits, softcap=self._softcap)[0] - theirs).abs().max().item()
            self.release(rows)
            if gap <= (1e-3 if twin.dtype == torch.float32 else 0.1) * largest + 1e-6:
                break
        else:
            raise ValueError(
                f"{type(twin).__name__}: our logits differ from the model's own by {gap:.3g} (largest {largest:.3g}); "
                "the sampler supports full attention with rotary or learnt positions, and finite weights"
            )
        self.share_from, self.stats = share_from, Stats()

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
    drawn: int = 0  # 1 if the first token that is not cached was sampled here
    hidden: Tensor | None = None  # last hidden state [E] of token cached - 1 (if ids is empty: of the parent's last)
    slab: _Slab | None = None
    slot: int = 0
    busy: bool = False  # in a running batch

    @property
    def length(self) -> int:
        return self.base + len(self.ids)

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
        owner, count = self.owner(length)
        return _below(self, length - 1, [owner.ids[count - 1]])

    def owner(self, length: int) -> tuple[_Segment | None, int]:
        """The segment that holds the last of the row's first `length` tokens, and how many of its own they are."""
        segment: _Segment | None = self
        while segment is not None and length <= segment.base:
            segment = segment.parent
        return (segment, length - segment.base) if segment else (None, 0)

    def take_back_one(self) -> None:
        """An empty segment takes the last token of its parent, to be computed again: its hidden state is not known."""
        self.base -= 1
        self.ids = [self.parent.ids[self.visible - 1]]
        self.parent, self.visible = self.parent.owner(self.base)
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


class _Batch:
    """The rows that run together; a new one is made whenever a row joins or leaves."""

    def __init__(self, drafts: list[_Draft]):
        self.drafts = drafts
        self.leaves = [draft.leaf for draft in drafts]
        groups: dict[tuple, list[int]] = defaultdict(list)  # rows that are drawn from alike
        for i, draft in enumerate(drafts):
            params = draft.params
            groups[params.temperature, params.top_p, params.top_k, params.min_p].append(i)
        self.groups = list(groups.items())

@dataclass(eq=False)
class _Draft:
    """A row that is being sampled."""

    job: _Job
    leaf: _Segment
    params: SamplingParams
    stream: int
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
    attention (`_Piece`) per slab of memory and level of the tree, not per row. A shared prefix is read once for all
    rows below it; one softmax goes over a token's scores in all levels.
    """

    def __init__(self, batch: list[tuple[_Segment, int]], arena: _Arena, leaves: list[_Segment]):
        self.batch, self.device = batch, arena.device
        tokens: list[int] = []
        positions: list[int] = []
        last = [0] * len(batch)
        pieces: dict[tuple, list] = defaultdict(list)
        above: dict[tuple, tuple[list, list]] = defaultdict(lambda: ([], []))
        # piece after piece in the order of memory, so that attention reads the cache without gathering it
        self.order = sorted(range(len(batch)), key=lambda i: self._place(*batch[i]))
        for i in self.order:
            segment, stop = batch[i]
            start, count = segment.cached, stop - segment.cached
            queries = range(len(tokens), len(tokens) + count)
            tokens += segment.ids[start:stop]
            positions += range(segment.base + start, segment.base + stop)
            last[i] = len(tokens) - 1
            _, bucket, fresh, slot = self._place(segment, stop)
            pieces[0, segment.slab, bucket, fresh].append((slot, queries, range(start + 1, stop + 1)))
            level, ancestor, visible = 1, segment.parent, segment.visible
            while ancestor is not None:
                above[level, ancestor][0].extend(queries)
                above[level, ancestor][1].extend([visible] * count)
                level, ancestor, visible = level + 1, ancestor.parent, ancestor.visible
        for (level, ancestor), (queries, limits) in above.items():
            pieces[level, ancestor.slab, _bucket(len(queries)), False].append((ancestor.slot, queries, limits))
        self.levels: list[list[_Piece]] = [[] for _ in range(1 + max(level for level, *_ in pieces))]
        for (level, slab, _, fresh), entries in pieces.items():
            self.levels[level].append(_Piece(slab, entries, arena, level == 0, fresh))
        self.input_ids, self.positions = torch.tensor([tokens, positions], device=self.device)  # [N]
        self.reach = max(positions) + 1
        self.last = _index(last, arena.device)  # [R]
        one_each = len(tokens) == len(batch) and [segment for segment, _ in batch] == leaves
        self.leaves = leaves if one_each else None
        self.room = min(segment.slab.capacity - stop for segment, stop in batch)

    @staticmethod
    def _place(segment: _Segment, stop: int) -> tuple[int, int, bool, int]:
        """Segments that agree but for the last number, the slot, share a piece."""
        count = stop - segment.cached
        fresh = segment.cached == 0 and segment.parent is None and count > 1
        return segment.slab.number, _bucket(count), fresh, segment.slot

    def advance(self, leaves: list[_Segment]) -> bool:
        """Become the forward of the next token if this one was a decode step of the same rows and all can grow."""
        if leaves != self.leaves or self.room == 0 or any(leaf.cached + 1 != len(leaf.ids) for leaf in leaves):
            return False
        self.room -= 1
        self.batch = [(leaf, stop + 1) for leaf, stop in self.batch]
        self.input_ids = torch.tensor([leaves[i].ids[-1] for i in self.order], device=self.device)
        self.positions += 1
        self.reach += 1
        for piece in self.levels[0]:
            piece.advance()
        return True

    def commit(self) -> int:
        """Note that the tokens are cached; returns how many of them had been sampled."""
        drawn = 0
        for segment, stop in self.batch:
            drawn += segment.drawn
            segment.cached, segment.drawn, segment.hidden = stop, 0, None
        return drawn

    def attend(self, layer: int, query: Tensor, kv: Tensor, scale: float) -> Tensor:
        """Store keys and values [N, 2J, D], attend with query [N, H, D]; returns [N, H, D]."""
        own = self.levels[0]
        for piece in own:
            piece.store(layer, kv)
        if len(self.levels) == 1:
            parts = [piece.attend(layer, query, scale) for piece in own]
            return torch.cat(parts) if len(parts) > 1 else parts[0]
        scores = torch.cat([self._scores(level, layer, query, scale) for level in self.levels], -1)  # [N, H, L]
        probs, out, begin = scores.softmax(-1).to(query.dtype), torch.zeros_like(query), 0
        for level in self.levels:
            for piece in level:
                out[piece.tokens] += piece.values(layer, probs[piece.tokens, :, begin : begin + piece.width])
            begin += max(piece.width for piece in level)
        return out

    def _scores(self, level: list[_Piece], layer: int, query: Tensor, scale: float) -> Tensor:
        """Scores against one level of the tree, fp32 [N, H, L]; -inf where a token has nothing there."""
        if len(level) == 1 and level[0].tokens == slice(0, len(query)):
            return level[0].scores(layer, query, scale)
        width = max(piece.width for piece in level)
        scores = query.new_full((*query.shape[:2], width), -torch.inf, dtype=torch.float32)
        for piece in level:
            scores[piece.tokens, :, : piece.width] = piece.scores(layer, query, scale)
        return scores


class _Piece:
    """Attention of some tokens to some segments of one slab: F segments of L keys, M queries each (padded).

    entries: (slot, query tokens, number of keys that each of them sees) per segment. The keys are a view of the slab
    if the slots lie close together (what lies between is computed and not read), and gathered otherwise. `own` keys
    grow with every decode step: L is some steps ahead, so that views and bias last, and the bias hides the rest.
    limits: how many keys each query sees, [F * J, M * G, 1].
    """

    AHEAD = 8

    def __init__(self, slab: _Slab, entries: list, arena: _Arena, own: bool = False, fresh: bool = False):
        self.slab, self.heads, self.fresh = slab, arena.kv_heads, fresh
        entries.sort(key=lambda entry: entry[0])
        slots = [slot for slot, _, _ in entries]
        dense = slots[-1] + 1 - slots[0] <= 2 * len(slots)
        heads = torch.arange(self.heads, device=arena.device)
        if dense:
            self.where = slice(slots[0] * self.heads, (slots[-1] + 1) * self.heads)
        else:
            self.where = (torch.tensor(slots, device=arena.device)[:, None] * self.heads + heads).flatten()  # [F * J]
        self.segments = slots[-1] + 1 - slots[0] if dense else len(slots)
        self.queries = max(len(mine) for _, mine, _ in entries)
        spread = [0] * (self.segments * self.queries)
        limits, back, tokens, rows = [1] * len(spread), [], [], []
        for i, (slot, mine, sees) in enumerate(entries):
            begin = (slot - slots[0] if dense else i) * self.queries
            spread[begin : begin + len(mine)] = range(len(tokens), len(tokens) + len(mine))
            limits[begin : begin + len(mine)] = sees
            back += range(begin, begin + len(mine))
            tokens += mine
            rows += [slot * self.heads * slab.capacity + seen - 1 for seen in sees]
        self.tokens, self.spread, self.back = (_index(x, arena.device) for x in (tokens, spread, back))
        self.limits = torch.tensor(limits, device=arena.device).view(self.segments, 1, self.queries, 1)
        self.limits = self.limits.repeat(1, self.heads, 1, arena.group).view(-1, self.queries * arena.group, 1)
        self.mask: Tensor | None = None
        self.longest = max(limits)
        self._set_width(self.longest + self.AHEAD * (own and self.queries == 1))
        if own:  # where keys and values of `tokens` go, in the slab seen as [2 * slots * J * capacity, D]
            heads = torch.cat((heads, heads + slab.slots * self.heads)) * slab.capacity
            self.rows = (torch.tensor(rows, device=arena.device)[:, None] + heads).flatten()  # [n * 2J]

    def _set_width(self, width: int) -> None:
        self.width, self.bias = min(width, self.slab.capacity), None
        if isinstance(self.where, slice):
            self.views = [[x[self.where, : self.width] for x in layer] for layer in self.slab.heads]

    def advance(self) -> None:
        self.longest += 1
        if self.longest > self.width:
            self._set_width(self.longest + self.AHEAD)
        elif self.bias is not None:
            self.bias.scatter_(-1, self.limits, 0.0)
        self.limits += 1
        self.rows += 1

    def store(self, layer: int, kv: Tensor) -> None:
        """Write keys and values [N, 2J, D] of this piece's tokens."""
        self.slab.flat[layer].index_copy_(0, self.rows, kv[self.tokens].reshape(-1, kv.shape[-1]))

    def attend(self, layer: int, query: Tensor, scale: float) -> Tensor:
        """Attention to this piece alone: query [N, H, D] -> [n, H, D]."""
        if self.queries == 1:
            return self.values(layer, self.scores(layer, query, scale).softmax(-1).to(query.dtype))
        # a prefill, which never holds scores of [M, L]
        query = query[self.tokens][self.spread].unflatten(0, (self.segments, -1)).transpose(1, 2)  # [F, H, M, D]
        keys, values = (self._cached(layer, i).unflatten(0, (self.segments, -1)) for i in (0, 1))  # [F, J, L, D]
        if self.mask is None and not self.fresh:
            limits = self.limits.view(self.segments, self.heads, self.queries, -1)[:, :1, :, :1]  # [F, 1, M, 1]
            self.mask = torch.arange(self.width, device=limits.device) < limits  # [F, 1, M, L]
        out = F.scaled_dot_product_attention(
            query, keys, values, self.mask, is_causal=self.fresh, scale=scale, enable_gqa=query.shape[1] > self.heads
        )
        return out.transpose(1, 2).flatten(0, 1)[self.back]

    def scores(self, layer: int, query: Tensor, scale: float) -> Tensor:
        """query [N, H, D] -> fp32 [n, H, L], -inf where a token must not look."""
        if self.bias is None:
            hidden = torch.arange(self.width, device=self.limits.device) >= self.limits  # [F * J, M * G, L]
            self.bias = torch.zeros(hidden.shape, dtype=query.dtype, device=query.device)
            self.bias.masked_fill_(hidden, -torch.inf)
        packed, keys = self._pack(query[self.tokens]), self._cached(layer, 0).transpose(1, 2)
        return self._unpack(torch.baddbmm(self.bias, packed, keys, alpha=scale).float())

    def values(self, layer: int, probs: Tensor) -> Tensor:
        """probs [n, H, L] -> [n, H, D]"""
        return self._unpack(torch.bmm(self._pack(probs), self._cached(layer, 1)))

    def _cached(self, layer: int, which: int) -> Tensor:
        """Keys (0) or values (1) of the segments, [F * J, L, D]."""
        if isinstance(self.where, slice):
            return self.views[layer][which]
        return self.slab.heads[layer][which][self.where, : self.width]

    def _pack(self, x: Tensor) -> Tensor:
        """[n, H, x] -> [F * J, M * G, x]"""
        x, last = x[self.spread], x.shape[-1]
        if self.queries > 1:
            x = x.view(self.segments, self.queries, self.heads, -1, last).transpose(1, 2)  # [F, J, M, G, x]
        return x.reshape(self.segments * self.heads, -1, last)

    def _unpack(self, packed: Tensor) -> Tensor:
        """[F * J, M * G, x] -> [n, H, x]"""
        last = packed.shape[-1]
        if self.queries > 1:
            packed = packed.view(self.segments, self.heads, self.queries, -1, last).transpose(1, 2)  # [F, M, J, G, x]
        return packed.reshape(self.segments * self.queries, -1, last)[self.back]


def _index(values: list[int], device: torch.device) -> Tensor | slice:
    """An index that selects `values`: without a copy if they follow each other."""
    first, count = values[0], len(values)
    if values == list(range(first, first + count)):
        return slice(first, first + count)
    return torch.tensor(values, device=device)


def _bucket(count: int) -> int:
    """Segments whose numbers of queries agree within 4 x share a piece: 1 | 2-4 | 5-16 | 17-64 | ..."""
    return ((count - 1).bit_length() + 1) // 2


def _tree_attention(module, query, key, value, attention_mask, scaling=None, tree: _Forward = None, **kwargs):
    """The attention function that transformers' models call: query [1, H, N, D], key and value [1, J, N, D]."""
    unknown = [k for k in ("sliding_window", "softcap", "s_aux", "position_bias") if kwargs.get(k) is not None]
    if unknown:
        raise ValueError(f"{type(module).__name__} uses {', '.join(unknown)}: only plain full attention is supported")
    query, kv = query[0].transpose(0, 1), torch.cat((key[0], value[0])).transpose(0, 1)  # [N, H, D], [N, 2J, D]
    return tree.attend(module.layer_idx, query, kv, scaling).unsqueeze(0), None  # [1, N, H, D]


AttentionInterface.register(ATTENTION, _tree_attention)


# ---------------------------------------------------------------------------------------------------- memory


class _NoRoom(ValueError):
    """The memory budget is full."""


@dataclass(eq=False)
class _Slab:
    """Keys and values of `slots` segments of up to `capacity` tokens. Its address never changes."""

    number: int
    capacity: int
    kv: Tensor  # [layers, 2, slots, J, capacity, D]
    free: list[int]

    def __post_init__(self):
        self.slots = self.kv.shape[2]
        self.heads = [layer.flatten(1, 2).unbind(0) for layer in self.kv]  # keys and values, [slots * J, capacity, D]
        self.flat = [layer.flatten(0, 3) for layer in self.kv]  # [2 * slots * J * capacity, D]

class _Arena:
    """Memory for segments, in slabs of equal capacity: a segment that outgrows its slot moves to the next capacity.

    Capacities are 16, 32, ... 256, 512, 768, ...: what is allocated follows the tokens of each segment, not the longest
    one. A slab goes back to the system as soon as its last segment has gone.
    """

    def __init__(self, model: torch.nn.Module, memory_gb: float | None):
        config = model.config
        self.layers, self.device, self.dtype = config.num_hidden_layers, model.device, model.dtype
        self.kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        self.group = config.num_attention_heads // self.kv_heads
        self.head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.budget = None if memory_gb is None else int(memory_gb * 1e9)
        self.bytes, self.spare = 0, math.inf  # allocated; what may be taken beyond what is asked for
        self.slabs: dict[int, list[_Slab]] = defaultdict(list)
        self.made = 0

    def reserve(self, wishes: list[tuple[_Segment, int]]) -> None:
        """Give every segment a slot for `length` tokens; what it has cached moves along. All or none (_NoRoom)."""
        wanted: dict[int, list[_Segment]] = defaultdict(list)
        for segment, length in wishes:
            if segment.slab is None or segment.slab.capacity < length:
                wanted[_round_up(length, 16, 256)].append(segment)
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
            length, sources, targets = max(counts), _index(sources, self.device), _index(targets, self.device)
            target.kv[:, :, targets, :, :length] = source.kv[:, :, sources, :, :length]

    def free(self, segment: _Segment) -> None:
        slab, segment.slab = segment.slab, None
        if slab is None:
            return
        heapq.heappush(slab.free, segment.slot)
        if len(slab.free) == slab.slots:
            self.slabs[slab.capacity].remove(slab)
            self.bytes -= slab.kv.nbytes

    def _take(self, capacity: int, count: int) -> Iterable[tuple[_Slab, int]]:
        """`count` free slots, the lowest ones of old slabs first, then of a new slab."""
        for slab in self.slabs[capacity]:
            while slab.free and count:
                count -= 1
                yield slab, heapq.heappop(slab.free)
        if count:
            so_far = sum(slab.slots for slab in self.slabs[capacity])
            slots = max(count, so_far // 2, 512 // capacity)  # few slabs, few pieces
            if (slots - count) * self._slot_bytes(capacity) > self.spare:
                slots = count
            self.spare -= (slots - count) * self._slot_bytes(capacity)
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
        self.spare = self.budget / 2 - self.bytes - more


def _round_up(count: int, least: int, step: int) -> int:
    """To a power of two from `least` to `step`, or to a multiple of `step`."""
    return max(least, 1 << (count - 1).bit_length()) if count <= step else -(-count // step) * step


# ---------------------------------------------------------------------------------------------------- the model


def _make_twin(model: torch.nn.Module) -> torch.nn.Module:
    """A copy of the module tree over the same weights (in-place updates are seen), in eval mode."""
    config = model.config
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:
        raise ValueError(f"{type(model).__name__} has layers of type {', '.join(sorted(kinds))}: must all be full")
    if "position_ids" not in inspect.signature(model.base_model.forward).parameters:
        raise ValueError(f"{type(model).__name__} takes no position_ids: rows of different lengths cannot be packed")
    if model.get_output_embeddings() is None:
        raise ValueError(f"{type(model).__name__} has no output embeddings: load it with AutoModelForCausalLM")
    weights = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in weights}).eval()
