"""The sequential sampler: rows of tokens over a key/value cache that we own. Knows no task and no text.

Rows are the leaves of a tree of segments. Every token's keys and values are computed once and stored once:

    position  0                                 40              56        62
    A         pppppppppppppppppppppppppppppppppp                               row 0: a prompt
              |
              +--------------------------------- B sssssssssssss,tttttt?       row 1 = fork(row 0): sketches so far
              |
              +--------------------------------- C sssssssssssss yyy?          row 2 = fork(row 0), extended, sampled

    One forward computes what is pending (?) in all running rows: a token of B and one of C, packed, without padding.
    Each attends to its own segment, one batched product over B and C, which lie side by side in memory, and to the
    first 40 tokens of A, which are read once for both. One softmax goes over a token's scores in all segments.
    `fork` copies nothing, `rewind` cuts a leaf or starts a new one, `release` frees what no other row needs.

`prefill`, `extend` and `fork` only write down what is to be done: the next sampling step computes it. `run` lets many
programs share one running batch: a row that has finished leaves at once, the next request of its program joins.

Reading order: Sampler.sample -> run (the loop) -> _draw (a token for every row) -> _compute (which tokens need a
forward) -> _Forward (what each token attends to) -> _Piece (one batched attention) -> _Memory -> the model.

Legend: N tokens of a forward, R rows, H query heads, J key heads, G = H / J query heads per key head, D head size,
F segments of a piece, M queries per segment, L keys per segment, V vocabulary, E width.

The weights are shared with the model that was given, the module tree is not: sampling runs on a private twin with its
own attention function and its own eval mode, so a model that is being trained is never touched. After an update of the
weights, release all rows: what is cached belongs to the old weights.
"""

from __future__ import annotations

import contextlib
import copy
import heapq
import inspect
import math
from collections import Counter, defaultdict, deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from kernels import scaled_logits

# our name in transformers' public registry of attention functions
ATTENTION = "sesa_tree"


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are drawn: temperature, then top-k, top-p and min-p (each on what the one before it left).

    temperature 0 is greedy. `top_k` 0, `top_p` 1 and `min_p` 0 are off. A row ends at a stop id of the sampler or after
    `max_new_tokens`.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    max_new_tokens: int = 256

    def __post_init__(self):
        for holds, name, rule in [
            (self.temperature >= 0, "temperature", "must be >= 0 (0 is greedy)"),
            (0 < self.top_p <= 1, "top_p", "must be in (0, 1] (1 is off)"),
            (self.top_k >= 0, "top_k", "must be >= 0 (0 is off)"),
            (0 <= self.min_p < 1, "min_p", "must be in [0, 1) (0 is off)"),
            (self.max_new_tokens >= 1, "max_new_tokens", "must be >= 1"),
        ]:
            if not holds:
                raise ValueError(f"{name}={getattr(self, name)!r}: {rule}")


class Completion(NamedTuple):
    """What one row sampled. `ids` keep the stop token; `logps[t]` is the log-prob of ids[t] in the distribution that it
    was drawn from, after temperature and truncation (greedy: in the distribution of temperature 1)."""

    ids: list[int]
    logps: list[float]
    # "stop" | "length"
    finish_reason: str


@dataclass
class Stats:
    """Counters since the sampler was made. A token is computed at most once unless it was rewound or evicted."""

    # given tokens that went through a forward
    prefill_tokens: int = 0
    # sampled tokens that went through a forward
    decode_tokens: int = 0
    # sampled tokens, the last one of each row included (it is computed only if needed)
    generated_tokens: int = 0
    # times that a token was drawn for every running row
    decode_steps: int = 0
    forwards: int = 0
    # rows whose keys and values were given up because the memory budget was full
    evictions: int = 0


Program = Generator[tuple[Sequence[int], SamplingParams, Sequence[int]], list[Completion], Any]


class Sampler:
    """Prefill, extend, sample, fork, rewind, release for a transformers causal LM with full attention.

    model: Llama, Qwen2, Qwen2.5, Qwen3, SmolLM and the like; any dtype; its weights are shared, nothing else.
    stop_ids: token ids that end a row; nothing is ever padded, so pad == eos is harmless.
    max_rows: rows decoded at once, more of them wait.
    memory_gb: budget for keys and values; rows that do not fit wait, and are computed again when they come back.
    max_forward_tokens: longer prefills are cut into several forwards.
    share_from: a fork of fewer tokens than this copies them instead of sharing (one attention call less per layer).
    ValueError for a model whose logits our attention does not reproduce (ALiBi, soft-capped scores, states).

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
        self, model: torch.nn.Module, stop_ids: Iterable[int], max_rows: int = 256,
        memory_gb: float | None = None, max_forward_tokens: int = 4096, share_from: int = 33,
    ):  # fmt: skip
        if min(max_rows, max_forward_tokens) < 1:
            raise ValueError(f"max_rows={max_rows}, max_forward_tokens={max_forward_tokens}: give 1 or more")
        self.stop_ids = frozenset(stop_ids)
        self.max_rows, self.max_forward_tokens = max_rows, max_forward_tokens
        # so that the check shares
        self.share_from = 0
        self._twin = _make_twin(model)
        self._head = self._twin.get_output_embeddings()
        self._vocab = len(self._head.weight)
        self._scale, self._softcap = output_scaling(model.config)
        positions = getattr(model.config, "max_position_embeddings", None) or math.inf
        # up to there a window hides nothing
        window = getattr(model.config, "sliding_window", None) or math.inf
        self.max_positions, self._limit = min((positions, "positions"), (window, "tokens in its sliding window"))
        self._memory = _Memory(self._twin, memory_gb)
        self._rows: dict[int, _Segment] = {}
        # rows in a running batch
        self._busy: set[int] = set()
        self._next_row = 0
        # the last forward, kept for as long as its rows decode in step
        self._forward: _Forward | None = None
        self.stats = Stats()
        self._check_model()
        self.share_from, self.stats = share_from, Stats()

    # ------------------------------------------------------------------------------------------------ rows

    def prefill(self, prompts: Sequence[Sequence[int]]) -> list[int]:
        """One new row per prompt. Nothing is computed before the first sampling step."""
        for i, prompt in enumerate(prompts):
            if len(prompt) == 0:
                raise ValueError(f"prompt {i} is empty: give a token")
            self._check_ids(prompt)
        return [self._add(_Segment(list(prompt), base=0)) for prompt in prompts]

    def extend(self, rows: Sequence[int], ids: Sequence[Sequence[int]]) -> list[int]:
        """Append given tokens to rows, in place; returns the same rows."""
        for row, more in zip(rows, ids, strict=True):
            self._check_ids(more)
            self._leaf(row).ids.extend(more)
        return list(rows)

    def fork(self, rows: Sequence[int], n: int) -> list[int]:
        """n new rows that continue each row, sharing its history: those of rows[i] are kids[i * n : (i + 1) * n].

        The forked rows stay valid and may go on by themselves.
        """
        if n < 1:
            raise ValueError(f"fork into n={n}: give 1 or more")
        leaves = [self._leaf(row) for row in rows for _ in range(n)]
        return [self._add(leaf.below(leaf.length, [])) for leaf in leaves]

    def rewind(self, rows: Sequence[int], lengths: Sequence[int]) -> None:
        """Cut rows back to their first `length` tokens. The last kept token is computed again at the next step."""
        for row, length in zip(rows, lengths, strict=True):
            now = self._leaf(row).length
            if not 1 <= length <= now:
                raise ValueError(f"rewind row {row} to length {length}: keep 1 to {now}")
            if length < now:
                self._cut(row, length)

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
        return self._memory.bytes

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
        first_row, room = self._next_row, self.max_rows
        results = [None] * len(programs)
        # by program: the drafts that it waits for, None before it has begun
        requests: dict[int, list[_Draft] | None] = dict.fromkeys(range(len(programs)))
        waiting, active, drawn = deque(), [], -1  # drafts, and tokens when all was last evicted
        try:
            while requests:
                for i in [i for i, drafts in requests.items() if all(d.finish_reason for d in drafts or ())]:
                    try:
                        requests[i] = self._resume(programs[i], requests[i])
                        waiting.extend(requests[i])
                    except StopIteration as stop:
                        results[i] = stop.value
                        del requests[i]
                if any(draft.finish_reason for draft in active):
                    room, active = self.max_rows, [draft for draft in active if not draft.finish_reason]
                while waiting and len(active) < room:
                    active.append(waiting.popleft())
                try:
                    if active:
                        self._draw(active)
                except _NoRoom:
                    idle = self._rows.keys() - {draft.row for draft in active}
                    idle = [leaf for leaf in map(self._rows.get, idle) if leaf.slab and leaf.users == 1]
                    if idle:
                        self._evict(idle[:1])
                    elif len(active) > 1:
                        waiting.appendleft(active.pop())
                        # no new rows until one has finished
                        room = len(active)
                    # nothing was drawn since all was evicted
                    elif drawn == (drawn := self.stats.generated_tokens):
                        raise
                    else:
                        # what rows share, too, with the free slots beside it
                        self._evict([s for leaf in self._rows.values() for s, _ in leaf.path()])
        except BaseException:
            self._busy, self._forward = set(), None
            for program in programs:
                program.close()
            self.release([row for row in self._rows if row >= first_row])
            raise
        return results

    def _resume(self, program: Program, drafts: list[_Draft] | None) -> list[_Draft]:
        """Hand a program its completions (None begins it); returns the drafts of its next request.

        StopIteration when the program has returned.
        """
        self._busy.difference_update(draft.row for draft in drafts or ())
        completions = drafts and [Completion(draft.ids, draft.logps, draft.finish_reason) for draft in drafts]
        rows, params, seeds = program.send(completions)
        if len(rows) != len(seeds):
            raise ValueError(f"{len(seeds)} seeds for {len(rows)} rows: one for each")
        for row in rows:
            self._check_length(row, params)
            self._busy.add(row)
        return [_Draft(row, params, stream(int(seed))) for row, seed in zip(rows, seeds, strict=True)]

    @torch.inference_mode()
    def _draw(self, active: list[_Draft]) -> None:
        """Draw the next token of every row."""
        hidden = self._compute([draft.row for draft in active])  # [R, E]
        # rows that are drawn from alike
        groups = defaultdict(list)
        for i, draft in enumerate(active):
            groups[draft.params].append(i)
        for p, members in groups.items():
            drafts = [active[i] for i in members]
            u = [uniform(draft.stream, len(draft.ids)) for draft in drafts]
            u = torch.tensor(u, dtype=torch.float64, device=hidden.device)
            logits = self._logits(hidden[members])
            ids, logps = draw_tokens(logits, u, p.temperature, p.top_p, p.top_k, p.min_p, self._softcap)
            for draft, token, logp in zip(drafts, ids.tolist(), logps.tolist(), strict=True):
                self._accept(draft, token, logp)
        self.stats.generated_tokens += len(active)
        self.stats.decode_steps += 1

    def _accept(self, draft: _Draft, token: int, logp: float) -> None:
        """Append a token to a row, and note if it ends there."""
        if not math.isfinite(logp):
            raise ValueError("logits are not finite: weights hold inf or nan")
        draft.ids.append(token)
        draft.logps.append(logp)
        leaf = self._rows[draft.row]
        leaf.ids.append(token)
        leaf.drawn = True
        if token in self.stop_ids:
            draft.finish_reason = "stop"
        elif len(draft.ids) == draft.params.max_new_tokens:
            draft.finish_reason = "length"

    def _logits(self, hidden: Tensor) -> Tensor:
        """What the head gives, times the model's own scale, before the soft cap: [R, V]."""
        logits = self._head(hidden)
        return logits if self._scale == 1 else logits.float() * self._scale

    # ------------------------------------------------------------------------------------------------ computing

    @torch.inference_mode()
    def _compute(self, rows: list[int]) -> Tensor:
        """Compute every pending token of `rows`; returns the hidden state of the last token of each, [R, E]."""
        leaves = [self._rows[row] for row in rows]
        # the usual case: one more token for each
        if self._forward and self._forward.advance(leaves):
            self._run_forward()
        else:
            self._compute_bases(leaves)
            self._place(rows)
            leaves = [self._rows[row] for row in rows]
            self._compute_pending([(leaf, len(leaf.ids)) for leaf in leaves])
        return torch.stack([leaf.hidden for leaf in leaves])

    def _compute_bases(self, segments: list[_Segment]) -> None:
        """Compute what segments stand on: rows that were forked before they were computed, the root first."""
        bases = dict.fromkeys(s.parent for s in segments if s.parent and s.parent.cached < s.visible)
        if bases:
            self._compute_bases(list(bases))
            self._compute_pending([(base, base.shared) for base in bases])

    def _place(self, rows: list[int]) -> None:
        """Give new forks a place: a short history is copied, a long one stays shared, none is computed again."""
        short = []
        for row in rows:
            leaf = self._rows[row]
            if not leaf.ids and leaf.hidden is None and leaf.parent.cached == leaf.visible:
                leaf.hidden = leaf.parent.hidden
            # its last token is computed again
            if not leaf.ids and leaf.hidden is None:
                leaf = self._cut(row, leaf.length)
            if leaf.parent and leaf.ids and not (leaf.cached or leaf.shared) and leaf.visible < self.share_from:
                short.append(leaf)
        self._memory.reserve([(leaf, leaf.visible + len(leaf.ids)) for leaf in short])
        for leaf in short:
            parent, count = leaf.parent, leaf.visible
            leaf.kv[:, :, :, :count] = parent.kv[:, :, :, :count]
            leaf.ids[:0], leaf.base, leaf.cached = parent.ids[:count], parent.base, count
            leaf.parent, leaf.visible = parent.parent, parent.visible
            if leaf.parent:
                leaf.parent.users += 1
            self._drop(parent)

    def _compute_pending(self, wanted: list[tuple[_Segment, int]]) -> None:
        """Forward ids[cached:stop] of every (segment, stop); a long one is computed in several forwards."""
        while todo := [(segment, stop) for segment, stop in wanted if segment.cached < stop]:
            self._memory.reserve(todo)
            batch, room = [], self.max_forward_tokens
            for segment, stop in todo:
                if room:
                    batch.append((segment, min(stop, segment.cached + room)))
                    room -= batch[-1][1] - segment.cached
            self._forward = _Forward(batch)
            self._run_forward()

    def _run_forward(self) -> None:
        batch, states = self._forward.batch, self._decode(self._forward)[self._forward.last]  # [R, E]
        for (segment, stop), state in zip(batch, states.unbind(), strict=True):
            self.stats.decode_tokens += segment.drawn
            self.stats.prefill_tokens += stop - segment.cached - segment.drawn
            segment.cached, segment.drawn, segment.hidden = stop, False, state
        self.stats.forwards += 1

    def _twin_states(self, tree: _Forward) -> Tensor:
        """Hidden states after the last norm, [N, E], from the model's own forward."""
        ids, positions = tree.input_ids[None], tree.positions[None]  # [1, N]
        out = self._twin.base_model(input_ids=ids, position_ids=positions, use_cache=False, tree=tree)
        return out.last_hidden_state[0]

    # ------------------------------------------------------------------------------------------------ the tree

    def _leaf(self, row: int, busy: bool = False) -> _Segment:
        if row not in self._rows:
            raise ValueError(f"row {row!r} was never made, or was released")
        if row in self._busy and not busy:
            raise ValueError(f"row {row} is being sampled: wait, or fork it")
        return self._rows[row]

    def _add(self, segment: _Segment) -> int:
        row, self._next_row = self._next_row, self._next_row + 1
        self._rows[row] = segment
        return row

    def _cut(self, row: int, length: int) -> _Segment:
        """Keep a row's first `length` tokens, the last of which is pending again; returns its leaf."""
        leaf, self._forward = self._rows[row], None
        if length > leaf.base + leaf.shared:
            del leaf.ids[length - leaf.base :]
            leaf.cached, leaf.drawn, leaf.hidden = min(leaf.cached, len(leaf.ids) - 1), False, None
        else:
            # forks see what would be overwritten
            owner, count = leaf.owner(length)
            self._rows[row] = leaf.below(length - 1, [owner.ids[count - 1]])
            self._drop(leaf)
        return self._rows[row]

    def _drop(self, segment: _Segment | None) -> None:
        """One user less; memory of segments that nobody uses any more is freed, towards the root."""
        self._forward = None
        while segment and segment.users == 1:
            self._memory.free(segment)
            segment = segment.parent
        if segment:
            segment.users -= 1

    def _evict(self, segments: list[_Segment]) -> None:
        """Free what segments hold; their tokens are known and are computed again when needed."""
        for segment in segments:
            self._memory.free(segment)
            segment.cached, segment.hidden, self._forward = 0, None, None
        self.stats.evictions += 1

    # ------------------------------------------------------------------------------------------------ checks

    def _check_ids(self, ids: Sequence[int]) -> None:
        if bad := [i for i in ids if not 0 <= i < self._vocab]:
            raise ValueError(f"token id {bad[0]}: the model's vocabulary has ids 0 to {self._vocab - 1}")

    def _check_length(self, row: int, params: SamplingParams) -> None:
        length, new = self._leaf(row).length, params.max_new_tokens
        if length + new > self.max_positions:
            have = f"{length} tokens and {new} new ones, of {self.max_positions} {self._limit}"
            raise ValueError(f"row {row} needs {have}: shorten the prompt or lower max_new_tokens")

    @torch.inference_mode()
    def _check_model(self) -> None:
        """Compare with the model's own logits, after a prompt that is prefilled, forked, shared and extended."""
        twin = self._twin
        ids = [i % self._vocab for i in range(11)]
        theirs = twin(input_ids=torch.tensor([ids], device=twin.device), use_cache=False).logits[0, -1].float()  # [V]
        largest = theirs.abs().max().item()
        twin.set_attn_implementation(ATTENTION)
        ways = [self._twin_states]
        with contextlib.suppress(AttributeError):
            ways = [LlamaDecoder(twin.base_model).forward, *ways]
        # ours if it agrees, or else the model's own
        for self._decode in ways:
            rows = self.prefill([ids[:6]])
            rows += self.fork(rows, 2)
            self.extend(rows[1:], [ids[6:]] * 2)
            logits = self._logits(self._compute(rows[1:]))
            self.release(rows)
            gap = (scaled_logits(logits, softcap=self._softcap)[0] - theirs).abs().max().item()
            if gap <= (1e-3 if twin.dtype == torch.float32 else 0.1) * largest + 1e-6:
                return
        differ = f"our logits differ from the model's own by {gap:.3g}"
        supported = "full attention or a window above 10, finite weights"
        raise ValueError(f"{type(twin).__name__}: {differ}; the sampler supports {supported}")


@dataclass(eq=False)
class _Draft:
    """A row that is being sampled."""

    row: int
    params: SamplingParams
    stream: int
    ids: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    finish_reason: str = ""


# ---------------------------------------------------------------------------------------------------- the draw


def output_scaling(config: Any) -> tuple[float, float]:
    """(scale, softcap) of a model's head: logits = softcap * tanh(scale * x / softcap), x = hidden @ weight.T.

    Cohere multiplies by `logit_scale`, Granite divides by `logits_scaling`, Gemma 2 caps; a soft cap of 0 is none. The
    loss gets the same from kernels.py with temperature / scale and softcap / scale.

    >>> from transformers import CohereConfig
    >>> output_scaling(CohereConfig(logit_scale=0.25))
    (0.25, 0.0)
    """
    scale = getattr(config, "logit_scale", None) or 1.0
    scale /= getattr(config, "logits_scaling", None) or 1.0
    return scale, getattr(config, "final_logit_softcapping", None) or 0.0


def draw_tokens(
    logits: Tensor, u: Tensor, temperature: float = 1.0,
    top_p: float = 1.0, top_k: int = 0, min_p: float = 0.0, softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Draw one token per row of logits [R, V] with the uniforms u fp64 [R]; returns ids int64 [R], log-probs fp32 [R].

    The token is where the running sum of the probabilities (in fp64, in the order of ids) passes u; one of probability
    0 is never drawn. The log-prob is that of the distribution drawn from, after `truncate`; temperature 0 takes the
    most likely token and reports the log-prob at temperature 1.

    >>> logits = torch.tensor([[0.2, 0.7, 0.1]]).log()
    >>> ids, logps = draw_tokens(logits, torch.tensor([0.5]))
    >>> ids.tolist(), [round(x, 4) for x in logps.exp().tolist()]
    ([1], [0.7])
    """
    scores = scaled_logits(logits, temperature or 1.0, softcap)  # [R, V]
    if temperature and (top_k or top_p < 1 or min_p):
        scores = truncate(scores, top_p, top_k, min_p)
    probs = scores.softmax(-1)
    if temperature:
        running = probs.cumsum(-1, dtype=torch.float64)
        ids = torch.searchsorted(running, u[:, None] * running[:, -1:], right=True)  # [R, 1]
        # only for a row of nan, which the caller refuses
        ids.clamp_(max=probs.shape[-1] - 1)
    else:
        ids = scores.argmax(-1, keepdim=True)
    return ids.squeeze(-1), probs.gather(-1, ids).squeeze(-1).log()  # [R], [R]


def truncate(scores: Tensor, top_p: float = 1.0, top_k: int = 0, min_p: float = 0.0) -> Tensor:
    """Scores [R, V] with -inf where top-k, then top-p, then min-p leave nothing. At least one token stays.

    transformers' own warpers, in fp64: top-k keeps the k largest; top-p the most likely tokens, as few as reach the
    probability top_p among those kept by top-k; min-p those of at least min_p times the largest probability.

    >>> truncate(torch.tensor([[0.5, 0.3, 0.2]]).log(), top_p=0.7).exp()
    tensor([[0.5000, 0.3000, 0.0000]])
    """
    exact = scores.double()
    if top_k:
        exact = TopKLogitsWarper(top_k)(None, exact)
    if top_p < 1:
        exact = TopPLogitsWarper(top_p)(None, exact)
    if min_p:
        exact = MinPLogitsWarper(min_p)(None, exact)
    return scores.masked_fill(exact.isneginf(), -torch.inf)


def stream(seed: int) -> int:
    """The stream of random numbers of `seed`, any int modulo 2^64: the finaliser of splitmix64."""
    x = seed & 2**64 - 1
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return x ^ x >> 31


def uniform(state: int, t: int) -> float:
    """Number t of a stream, uniform in (0, 1).

    splitmix64 (Steele, Lea and Flood 2014) of seed and counter: stateless, so that a row's t-th number does not depend
    on what else is in the batch.

    >>> [round(uniform(stream(seed), t), 4) for seed in (0, 1) for t in (0, 1)]
    [0.8833, 0.4315, 0.7497, 0.3724]
    """
    return ((stream(state + (t + 1) * 0x9E3779B97F4A7C15) >> 16) + 0.5) * 2.0**-48


# ---------------------------------------------------------------------------------------------------- one forward


@dataclass(eq=False)
class _Segment:
    """A run of tokens of the tree, its keys and values stored once. A row is a segment without a row below it, or one
    that goes on growing while forks see its first tokens."""

    ids: list[int]
    # position of ids[0] in the row
    base: int
    parent: _Segment | None = None
    # tokens of the parent that are part of this row
    visible: int = 0
    # tokens of ids with keys and values
    cached: int = 0
    # tokens of ids that forks may see, which are therefore never overwritten
    shared: int = 0
    # the row itself and the segments below
    users: int = 1
    # whether the first token that is not cached was sampled here
    drawn: bool = False
    # last hidden state [E] of token cached - 1 (if ids is empty: of the parent's last)
    hidden: Tensor | None = None
    # where keys and values are
    slab: _Slab | None = None
    slot: int = 0

    @property
    def length(self) -> int:
        return self.base + len(self.ids)

    @property
    def kv(self) -> Tensor:
        return self.slab.kv[:, :, self.slot]  # [layers, 2, J, capacity, D]

    def below(self, length: int, ids: list[int]) -> _Segment:
        """A new segment with `ids` after the first `length` tokens of this row."""
        parent, visible = self.owner(length)
        if parent is not None:
            parent.users += 1
            parent.shared = max(parent.shared, visible)
        kid = _Segment(ids, length, parent, visible)
        if length == self.length and self.cached == len(self.ids):
            # used if `ids` is empty
            kid.hidden = self.hidden
        return kid

    def owner(self, length: int) -> tuple[_Segment | None, int]:
        """The segment that holds the last of the row's first `length` tokens, and how many of its own they are."""
        return next(((s, length - s.base) for s, _ in self.path() if length > s.base), (None, 0))

    def path(self) -> Iterator[tuple[_Segment, int]]:
        """The segments from this one to the root, each with the number of its tokens that this row sees."""
        segment, visible = self, len(self.ids)
        while segment is not None:
            yield segment, visible
            segment, visible = segment.parent, segment.visible


class _Forward:
    """The tokens of one packed forward, where their keys go and which cached keys each of them attends to.

    Tokens of one row see their own segment up to themselves, and the visible part of each segment above: one batched
    attention (`_Piece`) per slab of memory and level of the tree, not per row. A shared prefix is read once for all
    rows below it; one softmax goes over a token's scores in all levels.
    """

    def __init__(self, batch: list[tuple[_Segment, int]]):
        """batch: segments, of which the tokens from `cached` to the number given are computed."""
        self.batch, self.device = batch, batch[0][0].slab.kv.device
        tokens, positions, last = [], [], [0] * len(batch)
        levels: dict[int, dict] = defaultdict(lambda: defaultdict(lambda: ([], [])))
        # in the order of memory, so that attention reads the cache without gathering it
        for i in sorted(range(len(batch)), key=lambda i: (batch[i][0].slab.number, batch[i][0].slot)):
            segment, stop = batch[i]
            places = range(segment.base + segment.cached, segment.base + stop)
            for level, (ancestor, visible) in enumerate(segment.path()):
                queries, seen = levels[level][ancestor]
                queries += range(len(tokens), len(tokens) + len(places))
                # a token sees up to itself
                seen += [min(visible, place + 1 - ancestor.base) for place in places]
            tokens += segment.ids[segment.cached : stop]
            positions += places
            last[i] = len(tokens) - 1
        self.input_ids, self.positions = torch.tensor([tokens, positions], device=self.device)  # [N]
        self.last = _index(last, self.device)  # [R]
        self.levels: list[list[_Piece]] = []
        self.width = 0
        for level in levels.values():
            groups = defaultdict(list)
            for segment, (queries, seen) in level.items():
                # 1 | 2 | 3-4 | 5-8 | ... queries, padded
                group = segment.slab, (len(queries) - 1).bit_length()
                groups[group].append((segment, queries, seen))
            self.levels.append([_Piece(entries, self.width) for entries in groups.values()])
            self.width += max(slab.capacity for slab, _ in groups)

    def advance(self, leaves: list[_Segment]) -> bool:
        """Become the forward of the next token if this one was a decode step of the same rows and all can grow."""
        in_step = leaves == [segment for segment, _ in self.batch] and len(self.positions) == len(leaves)
        if not in_step or any(len(x.ids) != x.cached + 1 or x.cached == x.slab.capacity for x in leaves):
            return False
        self.batch = [(leaf, len(leaf.ids)) for leaf in leaves]
        self.input_ids[self.last] = torch.tensor([leaf.ids[-1] for leaf in leaves], device=self.device)
        self.positions += 1
        # one more key for each query
        for piece in self.levels[0]:
            piece.bias.scatter_(-1, piece.ends[:, None, None], 0.0)
            piece.ends += 1
        return True

    def attend(self, layer: int, query: Tensor, kv: Tensor, scale: float) -> Tensor:
        """Store keys and values [N, 2J, D], attend with query [N, H, D]; returns [N, H, D]."""
        own, *above = self.levels
        for piece in own:
            piece.store(layer, kv)
        # the usual decode step: its tokens are in the order of memory
        if not above and len(own) == 1:
            return own[0].attend(layer, query, scale)
        out = torch.zeros_like(query)
        if not above:
            for piece in own:
                out[piece.tokens] = piece.attend(layer, query, scale)
            return out
        pieces = sum(above, own)
        scores = query.new_full((*query.shape[:2], self.width), -torch.inf, dtype=torch.float32)
        for piece in pieces:
            scores[piece.tokens, :, piece.columns] = piece.scores(layer, query, scale)
        probs = scores.softmax(-1).to(query.dtype)
        for piece in pieces:
            out[piece.tokens] += piece.values(layer, probs[piece.tokens, :, piece.columns])
        return out


class _Piece:
    """Attention of n tokens to F segments of one slab: M queries each (padded), L keys, of which a bias hides what a
    query must not see.

    entries: (segment, its query tokens, how many keys each of them sees). The keys are a view of the slab if the slots
    lie close together (what lies between is computed and not read), and gathered otherwise. The scores stand from
    column `begin` on among those of all pieces.
    """

    def __init__(self, entries: list[tuple[_Segment, list[int], list[int]]], begin: int):
        entries.sort(key=lambda entry: entry[0].slot)
        slots = [segment.slot for segment, _, _ in entries]
        everything = range(slots[0], slots[-1] + 1)
        places = everything if len(everything) <= 2 * len(slots) else slots
        self.slab = entries[0][0].slab
        device, width = self.slab.kv.device, self.slab.capacity
        most = max(len(queries) for _, queries, _ in entries)
        begins = {slot: i * most for i, slot in enumerate(places)}
        tokens = [token for _, queries, _ in entries for token in queries]
        owners = [segment.slot for segment, queries, _ in entries for _ in queries]
        ends = [count for _, _, seen in entries for count in seen]
        back = [begins[segment.slot] + i for segment, queries, _ in entries for i in range(len(queries))]
        # places without a query repeat the first one
        spread = dict.fromkeys(range(len(places) * most), 0)
        spread |= {place: i for i, place in enumerate(back)}
        self.shape = len(places), most, self.slab.kv.shape[3]  # F, M, J
        self.columns = slice(begin, begin + width)
        self.where, self.tokens = _index(list(places), device), _index(tokens, device)
        self.spread, self.back = _index([*spread.values()], device), _index(back, device)
        self.owners, self.ends = torch.tensor([owners, ends], device=device)  # [n]
        hidden = torch.arange(width, device=device) >= self.ends[:, None, None]  # [n, 1, L]
        self.bias = torch.zeros_like(hidden, dtype=self.slab.kv.dtype).masked_fill_(hidden, -torch.inf)

    def store(self, layer: int, kv: Tensor) -> None:
        """Write keys and values [N, 2J, D] of this piece's tokens."""
        kv = kv[self.tokens].unflatten(1, (2, -1))  # [n, 2, J, D]
        self.slab.kv[layer][:, self.owners, :, self.ends - 1] = kv

    def attend(self, layer: int, query: Tensor, scale: float) -> Tensor:
        """Attention to this piece alone: query [N, H, D] -> [n, H, D]."""
        if self.shape[1] == 1:
            return self.values(layer, self.scores(layer, query, scale).softmax(-1).to(query.dtype))
        # a prefill, which never holds scores of [M, L]
        query, bias = (
            x[self.spread].unflatten(0, self.shape[:2]).transpose(1, 2) for x in (query[self.tokens], self.bias)
        )  # [F, H, M, D], [F, 1, M, L]
        keys, values = self.slab.kv[layer][:, self.where]  # [F, J, L, D]
        grouped = query.shape[1] > keys.shape[1]
        out = F.scaled_dot_product_attention(query, keys, values, bias, scale=scale, enable_gqa=grouped)
        return out.transpose(1, 2).flatten(0, 1)[self.back]

    def scores(self, layer: int, query: Tensor, scale: float) -> Tensor:
        """query [N, H, D] -> fp32 [n, H, L], -inf where a token must not look."""
        scores = self._unpack(self._pack(query[self.tokens]) @ self.slab.kv[layer, 0, self.where].mT)
        return torch.add(self.bias, scores.float(), alpha=scale)

    def values(self, layer: int, probs: Tensor) -> Tensor:
        """probs [n, H, L] -> [n, H, D]"""
        return self._unpack(self._pack(probs) @ self.slab.kv[layer, 1, self.where])

    def _pack(self, x: Tensor) -> Tensor:
        """[n, H, x] -> [F, J, M * G, x]"""
        x = x[self.spread].view(*self.shape, -1, x.shape[-1])  # [F, M, J, G, x]
        return x.transpose(1, 2).flatten(2, 3)

    def _unpack(self, x: Tensor) -> Tensor:
        """[F, J, M * G, x] -> [n, H, x]"""
        x = x.unflatten(2, (self.shape[1], -1)).transpose(1, 2)  # [F, M, J, G, x]
        return x.flatten(2, 3).flatten(0, 1)[self.back]


def _index(values: list[int], device: torch.device) -> Tensor | slice:
    """An index that selects `values`: without a copy if they follow each other."""
    first, count = values[0], len(values)
    if values == list(range(first, first + count)):
        return slice(first, first + count)
    return torch.tensor(values, device=device)


# ---------------------------------------------------------------------------------------------------- memory


class _NoRoom(ValueError):
    """The memory budget is full."""


class _Slab:
    """Keys and values of several segments of up to `capacity` tokens."""

    def __init__(self, number: int, kv: Tensor):
        self.number, self.kv = number, kv  # [layers, 2, slots, J, capacity, D]
        self.slots, self.capacity = kv.shape[2], kv.shape[4]
        self.free = list(range(self.slots))


class _Memory:
    """Memory for segments, in slabs of equal capacity: a segment that outgrows its slot moves to the next capacity.

    Capacities are 16, 32, ... 256, 512, 768, ...: what is allocated follows the tokens of each segment, not the longest
    one. A slab goes back to the system as soon as its last segment has gone.
    """

    def __init__(self, model: torch.nn.Module, memory_gb: float | None):
        config = model.config
        heads = config.num_attention_heads
        self.layers, self.device, self.dtype = config.num_hidden_layers, model.device, model.dtype
        self.kv_heads = getattr(config, "num_key_value_heads", None) or heads
        self.head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
        self.budget = math.inf if memory_gb is None else int(memory_gb * 1e9)
        self.token_bytes = 2 * self.layers * self.kv_heads * self.head_size * self.dtype.itemsize
        self.bytes = self.made = 0
        self.slabs: dict[int, list[_Slab]] = defaultdict(list)

    def reserve(self, wishes: list[tuple[_Segment, int]]) -> None:
        """Give every segment a slot for `length` tokens; what it has cached moves along. All or none (_NoRoom)."""
        wanted: dict[int, list[_Segment]] = defaultdict(list)
        for segment, length in wishes:
            if segment.slab is None or segment.slab.capacity < length:
                wanted[_round_up(length)].append(segment)
        self._grow({capacity: len(movers) for capacity, movers in wanted.items()})
        # upwards, for a slab whose last segment has moved goes, with the free slots that _grow counted on
        for capacity, movers in sorted(wanted.items()):
            for segment in movers:
                before = copy.copy(segment)
                segment.slab = next(slab for slab in self.slabs[capacity] if slab.free)
                # side by side, as far as can be
                segment.slot = heapq.heappop(segment.slab.free)
                if before.slab:
                    segment.kv[:, :, :, : segment.cached] = before.kv[:, :, :, : segment.cached]
                    self.free(before)

    def free(self, segment: _Segment) -> None:
        slab, segment.slab = segment.slab, None
        if slab is None:
            return
        heapq.heappush(slab.free, segment.slot)
        if len(slab.free) == slab.slots:
            self.slabs[slab.capacity].remove(slab)
            self.bytes -= slab.kv.nbytes

    def _grow(self, wanted: dict[int, int]) -> None:
        """Make slabs, so that there are as many free slots of each capacity as are wanted."""
        slots = {capacity: sum(len(slab.free) for slab in self.slabs[capacity]) for capacity in wanted}
        # counts above 0
        missing = Counter(wanted) - Counter(slots)
        planned = self.bytes + sum(count * capacity * self.token_bytes for capacity, count in missing.items())
        if planned > self.budget:
            raise _NoRoom(f"--cache_gb {self.budget / 1e9:.3g}: a row needs {planned / 1e9:.3g}; raise it")
        for capacity, count in missing.items():
            so_far = sum(slab.slots for slab in self.slabs[capacity])
            # few slabs, few pieces
            spare = max(0, so_far // 2 - count, 512 // capacity - count)
            if planned + spare * capacity * self.token_bytes <= self.budget / 2:
                planned += spare * capacity * self.token_bytes
                count += spare
            shape = self.layers, 2, count, self.kv_heads, capacity, self.head_size
            # zeros, not empty: what no query may see is weighted with 0, and 0 * nan is nan
            slab = _Slab(self.made, torch.zeros(shape, dtype=self.dtype, device=self.device))
            self.slabs[capacity].append(slab)
            self.bytes += slab.kv.nbytes
            self.made += 1


def _round_up(count: int) -> int:
    """To a power of two from 16 to 256, or to a multiple of 256."""
    return max(16, 1 << (count - 1).bit_length()) if count <= 256 else -(-count // 256) * 256


# ---------------------------------------------------------------------------------------------------- the model


def _make_twin(model: torch.nn.Module) -> torch.nn.Module:
    """A copy of the module tree over the same weights (in-place updates are seen), in eval mode."""
    kinds = set(getattr(model.config, "layer_types", None) or ["full_attention"])
    if kinds - {"full_attention", "sliding_attention"}:
        raise ValueError(f"{type(model).__name__} has layers of type {', '.join(sorted(kinds))}: must all be attention")
    if "position_ids" not in inspect.signature(model.base_model.forward).parameters:
        raise ValueError(f"{type(model).__name__} takes no position_ids: rows of different lengths cannot be packed")
    if model.get_output_embeddings() is None:
        raise ValueError(f"{type(model).__name__} has no output embeddings: load it with AutoModelForCausalLM")
    return copy.deepcopy(model, {id(x): x for x in [*model.parameters(), *model.buffers()]}).eval()


def _tree_attention(module, query, key, value, attention_mask, scaling=None, tree: _Forward = None, **kwargs):
    """The attention function that transformers' models call: query [1, H, N, D], key and value [1, J, N, D]."""
    if unknown := [k for k in ("softcap", "s_aux", "position_bias") if kwargs.get(k) is not None]:
        raise ValueError(f"{type(module).__name__} uses {', '.join(unknown)}: only plain full attention is supported")
    if tree is None:
        raise ValueError(f"{type(module).__name__} hands no arguments on to its attention: not supported")
    query, kv = query[0].transpose(0, 1), torch.cat((key[0], value[0])).transpose(0, 1)  # [N, H, D], [N, 2J, D]
    return tree.attend(module.layer_idx, query, kv, scaling).unsqueeze(0), None  # [1, N, H, D]


AttentionInterface.register(ATTENTION, _tree_attention)


class LlamaDecoder:
    """The decoder of Llama, Qwen2, Qwen2.5, Qwen3 and SmolLM written out on [N, E]: half the time of a decode step of a
    small model is the module tree around its matrix products. Used where the parts are there under their usual names
    and the logits agree with the model's own (Sampler checks); everything else takes transformers' forward.
    """

    def __init__(self, decoder: torch.nn.Module):
        self.embed, self.norm, self.rotary = decoder.embed_tokens, decoder.norm, decoder.rotary_emb
        if self.rotary.rope_type not in ("default", "linear", "llama3", "yarn"):
            raise AttributeError("the angles depend on the length of the row")
        inverse = self.rotary.inv_freq.float()
        self.frequencies = torch.cat((-inverse, inverse))  # [D]
        self.eps, self.kv_heads = self.norm.variance_epsilon, decoder.config.num_key_value_heads
        self.layers = []
        for layer in decoder.layers:
            attn, mlp = layer.self_attn, layer.mlp
            norms = [layer.input_layernorm, layer.post_attention_layernorm]
            head_norms = [getattr(attn, name) for name in ("q_norm", "k_norm") if hasattr(attn, name)]
            linear = [attn.q_proj, attn.k_proj, attn.v_proj, attn.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj]
            # adapters, quantised weights
            if any(type(module) is not torch.nn.Linear for module in linear):
                raise AttributeError("a projection is not a plain linear layer")
            weights = [(module.weight, module.bias) for module in linear]
            self.layers.append((norms, head_norms, weights[:3], weights[3:], mlp.act_fn, attn.scaling))

    def forward(self, tree: _Forward) -> Tensor:
        """Hidden states after the last norm, [N, E]."""
        x = self.embed(tree.input_ids)  # [N, E]
        angles = tree.positions[:, None, None] * self.frequencies  # [N, 1, D]
        cos, sin = ((y * self.rotary.attention_scaling).to(x.dtype) for y in (angles.cos(), angles.sin()))
        size = len(self.frequencies)
        for i, (norms, head_norms, qkv, (o, gate, up, down), act, scale) in enumerate(self.layers):
            h = self._rms(norms[0], x)
            both = torch.cat([F.linear(h, *w) for w in qkv], -1).view(len(x), -1, size)  # [N, H + 2J, D]
            # queries and keys
            turned = both[:, : -self.kv_heads]
            for norm, part in zip(head_norms, turned.tensor_split([-self.kv_heads], 1), strict=False):
                part.copy_(self._rms(norm, part))
            # x cos + (-x2, x1) sin, for the halves x1, x2 of each head; the sign is in `sin`
            swapped = turned.roll(size // 2, -1)
            turned.mul_(cos).addcmul_(swapped, sin)
            query, kv = both.tensor_split([-2 * self.kv_heads], 1)
            x = x + F.linear(tree.attend(i, query, kv, scale).flatten(1), *o)
            h = self._rms(norms[1], x)
            x = x + F.linear(act(F.linear(h, *gate)).mul_(F.linear(h, *up)), *down)
        return self._rms(self.norm, x)

    def _rms(self, norm: torch.nn.Module, x: Tensor) -> Tensor:
        return torch.rms_norm(x, x.shape[-1:], norm.weight, self.eps)
