"""SESA: sequential sampling for exploration in reinforcement learning of language models.

    for x in batch:                                       # P problems
      S = []
      for i in 1..K:                                      # Stage I: serial in i, batched over problems
        s_i ~ pi(. | PromptSketch(x, S));  S += [s_i]
      y_ij ~ pi(. | PromptSolve(x, s_i))                  # Stage II: all K*M solutions in parallel
      r_ij = R(x, y_ij)
      A_ij = (r_ij - mean_x) / (std_x + eps)              # 0 where all of x's solutions succeed, or all fail
    update with a clipped policy gradient (rl.py); evaluate y ~ pi(. | x), without a sketch

Source: "The Road Less Traveled: Enhancing Exploration in LLMs via Sequential Sampling", arXiv 2510.15502. Where we
deviate from it, or chose what it leaves open:

 1. Loss context. The paper scores a solution under the prompt without its sketch, wins and losses alike, and does not
    correct for the change of context: `sketch_context="drop"`. "keep" trains in the context that was sampled from; "is"
    weighs the dropped context by pi(y|x) / pi_old(y|x,s), truncated; "imitate" drops it and trains what earned A > 0
    only, so that words which the plain prompt never says are not pushed down there; "distill" is "keep" and, with a
    coefficient, "imitate": on-policy where it was sampled, and what was found is taught to the plain prompt. Before
    these factors an answer weighs the same in either context (rl.set_token_weights). The KL is taken in the context of
    the loss. Sketches of a two-stage task are not trained.
 2. Where the sketches are the answers (the synthetic task), there is no Stage II. P chains of K guesses are drawn. A
    guess is trained in its chain, its finds also alone ("distill"; with "drop" the chain does not learn to spread); a
    repeat within a chain earns 0 (repeats="zero").
 3. There, the baseline is the mean over the chains at the same position, for late guesses are harder than early ones,
    and nothing is divided by the std.
 4. There, a success found by n chains of the batch earns n ** -rarity, so that what few chains found is not drowned by
    what all of them found. rarity=0 is the paper's reward. GRPO has neither this nor 2's zero by default; experiments
    give it both (--repeats zero --rarity 0.5).
 5. If all of a group succeed, or all fail, advantages are 0, whatever their shaped rewards (rl.group_advantages).
 6. A group is mixed: `num_direct` answers to the plain prompt beside those with a sketch, one baseline for all; 0 is
    the paper. explore="stuck" draws sketches only for problems that none of the direct answers solved; the others get
    more direct answers instead.
 7. Ablations of Stage I: `sketches="iid"` (empty history) and "placebo" (another problem's sketches; in chains, the
    history of another chain). experiments/list_sketches.py draws all K in one text.
 8. Token in, token out: what the policy wrote is put into later contexts as the ids that it wrote, never rendered or
    tokenised again. So a history is append-only for every chat template, and its cached keys and values stay valid.

Where to look. What is drawn: Explorer.answer (GRPO), explore (Stage I is draft, Stage II solve), guess (the sketches
are the answers); a prompt is forked in Explorer.branch. What is rewarded: earned, where a repeat earns 0; credit makes
advantages of it. What is trained: sequences, in a table of the contexts; without_context drops the sketch. The exact
KL is in kernels.py, its weight in rl.policy_loss.

This file knows no file and no process group. P problems, K sketches, M solutions per sketch, G answers in a group, C
chains.
"""

import hashlib
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import groupby, islice
from os.path import commonprefix
from statistics import fmean

import torch

import rl
from sampler import Completion, Sampler, SamplingParams
from tasks import Demonstration, Outcome, Problem, play

# A private-use character, stands for token ids in a rendered prompt.
SLOT = "\ue000"

Outcomes = Sequence[Outcome]


# ---------------------------------------------------------------------------------------------------------------------
# Prompts: from text to token ids

@dataclass(frozen=True)
class Prompts:
    """The texts around a problem. In braces: {answer_hint} {sketch_hint} in all, {problem} in `direct`, `sketch` and
    `solve`, {sketch} in `solve`, {observation} in `turn`. data/prompts.json has those in use. Where the sketches are
    the answers, only `sketch` and `next` are.

    `direct` and `sketch` should begin alike: what they share is computed once per problem and forked. With an empty
    `next` a chain goes on without being asked.
    """

    direct: str
    sketch: str
    next: str
    solve: str
    turn: str

    def __post_init__(self):
        if not all(isinstance(text, str) for text in vars(self).values()) or self.solve.count("{sketch}") != 1:
            raise ValueError("each prompt must be a text, and `solve` hold {sketch} once")


# What the prompts of the tiny policy add to the words of its task.
TINY_WORDS = ["<sketch>", "<solve>"]


class Chat:
    """Renders messages as token ids through the tokenizer's chat template, or as plain lines if it has none.

    The template is used only for what surrounds the policy's own tokens, cut out around a placeholder. So earlier turns
    are never rendered again (Qwen3's template, for one, would drop their <think> blocks), and contexts only grow.
    """

    def __init__(self, tokenizer, stop_ids: Sequence[int]):
        self.tokenizer, self.stop_ids = tokenizer, list(stop_ids)
        self.encode, self.following = map(lru_cache(10_000), (self._encode, self._following))

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"] if text else []

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids without the stop token that ends them."""
        ended = set(ids[-1:]) & set(self.stop_ids)
        return self.tokenizer.decode(ids[:-1] if ended else ids, skip_special_tokens=False)

    def render(self, *texts: str) -> str:
        """Of the user and the policy in turn, up to where the policy writes."""
        if not self.tokenizer.chat_template:
            return (self.tokenizer.bos_token or "") + "".join(text + "\n" for text in texts)
        messages = [dict(role=("user", "assistant")[i % 2], content=text) for i, text in enumerate(texts)]
        return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    def opening(self, text: str, insert: Sequence[int] = ()) -> list[int]:
        """A conversation that opens with the user's text; `insert` replaces SLOT."""
        before, *after = [self.encode(piece) for piece in self.render(text).split(SLOT)]
        return before + [i for piece in after for i in (*insert, *piece)]

    def _following(self, text: str) -> list[int]:
        """What comes between the policy's stop token and its next turn: the end of its turn and the user's text."""
        if not self.tokenizer.chat_template:
            return self.encode(text and f"\n{text}\n")
        _, *after = self.render("", SLOT, text).split(SLOT)
        if len(after) != 1:
            raise ValueError("the chat template does not show earlier answers as they were: use another")
        ids = self.encode(after[0].lstrip())
        return ids[1:] if ids and ids[0] in self.stop_ids else self.encode(after[0])


# ---------------------------------------------------------------------------------------------------------------------
# Records


@dataclass
class Trajectory:
    """One conversation, token by token: what the policy was shown and what it wrote.

    `prompt` is the context it was sampled under, `plain` the prompt of the same problem without a sketch. `body` is all
    that follows the prompt; spans[j] = (start, end) in body is the policy's j-th text, its stop token included; logps
    are those of all that it wrote, as sampled. An episode has one outcome, a chain of guesses one for each span;
    rewards and advantages go with the outcomes.
    """

    prompt: list[int]
    plain: list[int]
    seed: int = 0
    sketch: str | None = None
    body: list[int] = field(default_factory=list)
    spans: list[tuple[int, int]] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    truncated: list[bool] = field(default_factory=list)
    outcomes: list[Outcome] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    advantages: list[float] = field(default_factory=list)

    def wrote(self, completion: Completion, text: str) -> None:
        self.spans.append((len(self.body), len(self.body) + len(completion.ids)))
        self.body += completion.ids
        self.logps += completion.logps
        self.texts.append(text)
        self.truncated.append(completion.finish_reason == "length")


@dataclass
class Group:
    """What was found for one problem: its sketches (texts), and the trajectories that are compared with each other.

    stuck: the group is mixed, and none of the direct answers succeeded.
    """

    problem: Problem
    trajectories: list[Trajectory]
    sketches: list[str] = field(default_factory=list)
    sketch_tokens: int = 0
    stuck: bool = False

    def outcomes(self) -> list[Outcome]:
        return [o for t in self.trajectories for o in t.outcomes]

    def counts(self) -> dict[str, int]:
        """Of what was written, to be added up over groups and ranks: see `text_metrics`."""
        cut = [flag for t in self.trajectories for flag in t.truncated]
        return dict(
            groups=1,
            stuck=self.stuck,
            stuck_solved=self.stuck and any(o.success for o in self.outcomes()),
            trajectories=len(self.trajectories),
            turns=len(cut),
            clipped=sum(cut),
            tokens=sum(len(t.logps) for t in self.trajectories),
            sketches=len(self.sketches),
            distinct_sketches=len(set(self.sketches)),
            sketch_tokens=self.sketch_tokens,
        )


def derive_seed(*parts: Hashable) -> int:
    """A 63-bit seed for the random stream of one sequence, from (seed, step, problem, index, ...).

    >>> derive_seed(0, 1) == derive_seed(0, 1), derive_seed(0, 1) == derive_seed(1, 0)
    (True, False)
    """
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()) >> 1


def common_prefix(*contexts: Sequence[int]) -> int:
    """How many leading tokens they share, less one if one of them ends there (a branch has a token of its own)."""
    # os.path's function takes any sequences, not only strings.
    return min(len(commonprefix(contexts)), *(len(ids) - 1 for ids in contexts))


# ---------------------------------------------------------------------------------------------------------------------
# Rollout


@dataclass(frozen=True)
class Plan:
    """How to sample. method "grpo": group_size answers i.i.d.; "sesa": num_sketches x num_solutions, sketches first,
    and num_direct answers without any; explore is "always" or "stuck" (deviation 6), sketches are "sequential" or one
    of deviation 7."""

    method: str = "sesa"
    num_sketches: int = 16
    num_solutions: int = 1
    group_size: int = 16
    num_direct: int = 0
    explore: str = "always"
    sketches: str = "sequential"
    sketch_params: SamplingParams = SamplingParams(max_new_tokens=64)
    solution_params: SamplingParams = SamplingParams(max_new_tokens=512)


class Explorer:
    """Draws sketches and solutions for problems. Each problem is a program (a generator) that is written as if it were
    alone: it yields (rows, params, seeds) and is sent completions; Sampler.run batches all programs at every token.

    What takes (problem, plan, seed, ...) is such a program; its random streams derive from the tuple `seed`."""

    def __init__(self, sampler: Sampler, task, chat: Chat, prompts: Prompts):
        self.sampler, self.task, self.chat = sampler, task, chat
        # Where the sketches are the answers, the plain prompt is the sketch prompt with an empty history.
        self.prompts = prompts if task.two_stage else replace(prompts, direct=prompts.sketch)
        self.roots: dict[tuple, int] = {}
        # Called with each sketch, or guess, as soon as it is there.
        self.drawn = lambda text: None

    def text(self, template: str, **values) -> str:
        hints = dict(answer_hint=self.task.answer_hint, sketch_hint=self.task.sketch_hint, sketch=SLOT)
        for name, value in (hints | values).items():
            template = template.replace("{" + name + "}", value)
        return template.strip()

    def prompt(self, name: str, problem: Problem, sketch: Sequence[int] = ()) -> list[int]:
        """The "direct" prompt (of evaluation: no sketch), or the one to "sketch", or to "solve" with a sketch."""
        return self.chat.opening(self.text(getattr(self.prompts, name), problem=problem.text), sketch)

    def rollout(self, placed: Sequence[tuple[int, Problem]], plan: Plan, seed: tuple) -> list[Group]:
        """One Group for each (place, problem). Random streams derive from `seed` and the place in the whole batch, so
        that the result does not depend on how ranks share the work (placebo: one rank only)."""
        self.roots.clear()
        others = [None] * len(placed)
        draw, program = (self.draft, self.explore) if self.task.two_stage else [self.guess] * 2
        if plan.method == "grpo":
            program = self.answer
        elif plan.sketches == "placebo":
            # Those of the problem before, or its own if it is alone.
            alone = replace(plan, sketches="sequential")
            own = self.sampler.run([draw(p, alone, (*seed, i)) for i, p in placed])
            others = own[-1:] + own[:-1]
        programs = [program(p, plan, (*seed, i), other) for (i, p), other in zip(placed, others, strict=True)]
        groups = self.sampler.run(programs)
        self.sampler.release(self.roots.values())
        return groups

    # ------------------------------------------------------------------------------------------------ what is drawn

    def answer(self, problem, plan, seed, _=None):
        """GRPO: group_size answers i.i.d. to the plain prompt."""
        return Group(problem, (yield from self.direct(problem, plan, seed, range(plan.group_size))))

    def direct(self, problem, plan, seed, numbers):
        """Answers to the plain prompt, without a sketch."""
        plain = self.prompt("direct", problem)
        answers = [Trajectory(plain, plain, derive_seed(*seed, "answer", i)) for i in numbers]
        params = plan.solution_params if self.task.two_stage else plan.sketch_params
        return (yield from self.play(problem, answers, params))

    def explore(self, problem, plan, seed, drafts=None):
        """SESA on a task of two stages: direct answers if the group is mixed, sketches, and their solutions."""
        direct = yield from self.direct(problem, plan, seed, range(plan.num_direct))
        solved = any(t.outcomes[0].success for t in direct)
        if plan.explore == "stuck" and solved:
            rest = range(plan.num_direct, plan.num_direct + plan.num_sketches * plan.num_solutions)
            return Group(problem, direct + (yield from self.direct(problem, plan, seed, rest)))
        drafts = drafts or (yield from self.draft(problem, plan, seed))
        solutions = yield from self.solve(problem, plan, seed, drafts)
        sketches = [self.chat.decode(draft.ids) for draft in drafts]
        tokens = sum(len(draft.ids) for draft in drafts)
        return Group(problem, direct + solutions, sketches, tokens, stuck=bool(direct) and not solved)

    def draft(self, problem, plan, seed):
        """Stage I: K sketches, each after those before it; as an ablation after none of them."""
        apart = plan.num_sketches if plan.sketches == "iid" else 1
        chains = [Trajectory(self.prompt("sketch", problem), []) for _ in range(apart)]
        return (yield from self.write(problem, plan, seed, chains))

    def solve(self, problem, plan, seed, drafts):
        """Stage II: M solutions of every sketch, all in parallel."""
        plain, solutions = self.prompt("direct", problem), []
        for i, draft in enumerate(drafts):
            ids = draft.ids[:-1] if draft.finish_reason == "stop" else draft.ids
            prompt, sketch = self.prompt("solve", problem, ids), self.chat.decode(ids)
            for j in range(plan.num_solutions):
                solutions.append(Trajectory(prompt, plain, derive_seed(*seed, "solution", i, j), sketch))
        return (yield from self.play(problem, solutions, plan.solution_params))

    def guess(self, problem, plan, seed, other=None):
        """SESA where the sketches are the answers: a chain of K guesses, each with an outcome of its own; or as an
        ablation K guesses that do not see each other: each after an empty history ("iid"), or after the guesses of
        another chain ("placebo")."""
        plain = self.prompt("sketch", problem)
        if plan.sketches == "sequential":
            chain = Trajectory(plain, plain)
            yield from self.write(problem, plan, seed, [chain])
            chain.outcomes = [play(self.task, problem, [text]) for text in chain.texts]
            return Group(problem, [chain], chain.texts, len(chain.logps))
        histories = [[]] * plan.num_sketches
        if other:
            [chain] = other.trajectories
            histories = [chain.body[:start] for start, _ in chain.spans]
        guesses = [Trajectory(plain + h, plain, derive_seed(*seed, "guess", i)) for i, h in enumerate(histories)]
        return Group(problem, (yield from self.play(problem, guesses, plan.sketch_params)))

    # ------------------------------------------------------------------------------------------------ how it is drawn

    def write(self, problem, plan, seed, chains):
        """Let the policy write num_sketches texts: one into each chain, then the next into each, and so on."""
        rows, drafts = self.branch(problem, [chain.prompt for chain in chains]), []
        while len(drafts) < plan.num_sketches:
            for chain, row in zip(chains, rows, strict=True):
                self.observe(chain, row=row)
            seeds = [derive_seed(*seed, "sketch", len(drafts) + i) for i in range(len(chains))]
            drafts += yield rows, plan.sketch_params, seeds
            for chain, draft in zip(chains, drafts[-len(chains) :], strict=True):
                chain.wrote(draft, self.chat.decode(draft.ids))
                self.drawn(chain.texts[-1])
        self.sampler.release(rows)
        return drafts

    def play(self, problem, trajectories, params):
        """Play one episode for each trajectory to its end; those that are over leave, the others are shown more."""
        rows = self.branch(problem, [t.prompt for t in trajectories])
        alive = [(row, t, self.task.episode(problem)) for row, t in zip(rows, trajectories, strict=True)]
        while alive:
            seeds = [derive_seed(t.seed, len(t.texts)) for _, t, _ in alive]
            completions = yield [row for row, _, _ in alive], params, seeds
            for (row, trajectory, episode), completion in zip(alive, completions, strict=True):
                trajectory.wrote(completion, self.chat.decode(completion.ids))
                if episode.act(trajectory.texts[-1]):
                    trajectory.outcomes = [episode.outcome()]
                    self.sampler.release([row])
                else:
                    self.observe(trajectory, episode, row)
            alive = [one for one in alive if not one[1].outcomes]
        return trajectories

    def branch(self, problem, prompts: list[list[int]]) -> list[int]:
        """Rows that hold the prompts. What all prompts of a problem share is computed once and forked, and so is a
        prompt that comes several times in a row (for the M solutions of a sketch)."""
        plain = self.prompt("direct", problem)
        shared = common_prefix(plain, self.prompt("sketch", problem), *prompts)
        if not shared:
            return self.sampler.prefill(prompts)
        root = tuple(plain[:shared])
        if root not in self.roots:
            [self.roots[root]] = self.sampler.prefill([root])
        rows = []
        for prompt, same in groupby(prompts):
            stem = self.sampler.fork([self.roots[root]], 1)
            self.sampler.extend(stem, [prompt[shared:]])
            rows += self.sampler.fork(stem, len(list(same)))
            self.sampler.release(stem)
        return rows

    def observe(self, trajectory: Trajectory, episode=None, row: int | None = None) -> None:
        """The policy observes what follows its turn: the end of that, if it was cut, and what the episode says, or
        without an episode that another text is wanted. Before the first turn it is nothing. In its row, if it has one.
        """
        if trajectory.texts:
            template, seen = self.prompts.next, ""
            if episode is not None:
                template, seen = self.prompts.turn, episode.observe()
            more = self.chat.following(self.text(template, observation=seen))
            more = self.chat.stop_ids[:1] * trajectory.truncated[-1] + more
            trajectory.body += more
            if row is not None and more:
                self.sampler.extend([row], [more])

    # ------------------------------------------------------------------------------------------------ beside sampling

    def check_problems(self, problems: Sequence[Problem], plan: Plan) -> None:
        """ValueError for a problem that the model cannot read, or whose conversations do not fit it; of endless
        problems the first ones are looked at."""
        for problem in islice(problems, 100 if len(problems) > 20_000 else None):
            start, tokenizer = f"problem {problem.text[:40]!r}", self.chat.tokenizer
            if tokenizer.unk_token_id in self.chat.encode(problem.text):
                raise ValueError(f"{start} has words unknown to the model: use another --model")
            if (need := self.longest(problem, plan)) > self.sampler.max_positions:
                room = f"{need} tokens, the model has {self.sampler.max_positions} positions"
                raise ValueError(f"{start} takes up to {room}: shorten it, or lower --num_sketches or --max_*_tokens")

    def longest(self, problem: Problem, plan: Plan) -> int:
        """The most tokens that a conversation about the problem can take, in Stage I or II, or without sketches.
        Observations are counted as if they were as long as the problem."""
        sketch, again = plan.sketch_params.max_new_tokens, self.chat.following(self.text(self.prompts.next))
        turns = plan.num_sketches + plan.num_direct
        chain = len(self.prompt("sketch", problem)) + turns * (sketch + 1 + len(again))
        if not self.task.two_stage:
            return chain
        observed = self.chat.following(self.text(self.prompts.turn, observation=problem.text))
        episode = self.task.max_turns * (plan.solution_params.max_new_tokens + len(observed)) - len(observed)
        prompts = self.prompt("direct", problem), self.prompt("solve", problem, range(sketch))
        return max(chain, max(map(len, prompts)) + episode)

    def demonstration(self, demo: Demonstration) -> list[Trajectory]:
        """What a demonstration teaches: the chain of sketches, and the solution without and with a sketch."""
        plain = self.prompt("direct", demo.problem)
        chain = Trajectory(self.prompt("sketch", demo.problem), plain)
        for sketch in demo.sketches:
            self.recite(sketch, chain)
        guided = [self.prompt("solve", demo.problem, self.chat.encode(sketch)) for sketch in demo.sketches[:1]]
        solutions = [Trajectory(prompt, plain) for prompt in [plain, *guided]]
        for solution in solutions:
            episode = self.task.episode(demo.problem)
            for text in demo.turns:
                self.recite(text, solution, episode)
                episode.act(text)
        return [taught for taught in (chain, *solutions) if taught.texts]

    def recite(self, text: str, trajectory: Trajectory, episode=None) -> None:
        """As if the policy had been shown what follows its last turn, and had written the text."""
        self.observe(trajectory, episode)
        ids = self.chat.encode(text) + self.chat.stop_ids[:1]
        trajectory.wrote(Completion(ids, [0.0] * len(ids), "stop"), text)


# ---------------------------------------------------------------------------------------------------------------------
# Credit: from outcomes to advantages, and to what the loss is computed on


def marks(outcomes: Outcomes) -> list[str]:
    """Of each outcome in order: invalid (without a key), a repeat (of an earlier key), or else a hit or a miss.

    >>> hit, miss = Outcome(1.0, True, "a", True), Outcome(0.0, False, "b", True)
    >>> marks([hit, hit, miss, Outcome(0.0, False, None, False)])
    ['hit', 'repeat', 'miss', 'invalid']
    """
    found, seen = [], set()
    for outcome in outcomes:
        new = "hit" if outcome.success else "miss"
        known = "repeat" if outcome.key in seen else new
        found.append("invalid" if outcome.key is None else known)
        seen.add(outcome.key)
    return found


def earned(outcomes: Outcomes, repeats="full", counts: Counter | None = None, rarity=0.0):
    """The rewards of outcomes in the order in which they were drawn. Returns (rewards, successes), lists.

    repeats="zero": what has the key of an earlier outcome of the same list is no success, and earns 0 or its penalty.
    With counts (for each key, how many groups of the batch found it), a success is worth counts[key] ** -rarity of its
    reward.

    >>> hit = Outcome(1.0, True, "a", True)
    >>> earned([hit, hit], "zero", Counter(a=4), rarity=0.5)
    ([0.5, 0.0], [True, False])
    """
    rewards, successes = [], []
    for outcome, mark in zip(outcomes, marks(outcomes), strict=True):
        void = mark == "repeat" and repeats == "zero"
        share = counts[outcome.key] ** -rarity if counts and outcome.success else 1.0
        rewards.append(min(outcome.reward, 0.0) if void else outcome.reward * share)
        successes.append(outcome.success and not void)
    return rewards, successes


def credit(outcomes, *, chains: bool, baseline="position", scale="std", repeats="full", rarity=0.0, pass_k=8):
    """Rewards and advantages of a batch: outcomes[p] are those of group (or chain) p, in order, of ALL ranks.

    With chains=True each outcome is a guess of its own and rl.chain_advantages compares it over chain, position or
    batch (`baseline`); else rl.group_advantages compares the answers to one problem (`pass_k`). `repeats` and `rarity`
    are those of `earned`. Returns (rewards, advantages), floats in lists shaped like outcomes.

    >>> hit, miss = Outcome(1.0, True, "a", True), Outcome(0.0, False, "b", True)
    >>> credit([[hit, miss]], chains=False, scale="none")
    ([[1.0, 0.0]], [[0.5, -0.5]])
    """
    counts = Counter(key for group in outcomes for key in {o.key for o in group if o.success})
    rewards, successes = zip(*(earned(group, repeats, counts, rarity) for group in outcomes), strict=True)
    rewards = torch.tensor(rewards, dtype=torch.float64)  # [P, G]
    if chains:
        advantages = rl.chain_advantages(rewards, baseline, scale)  # [C, K]
    else:
        advantages = rl.group_advantages(rewards, torch.tensor(successes), scale, pass_k)  # [P, G]
    return rewards.tolist(), advantages.tolist()


def assign(group: Group, rewards: Sequence[float], advantages: Sequence[float]) -> None:
    """Hand the group's rewards and advantages to its trajectories, in the order of Group.outcomes()."""
    for trajectory in group.trajectories:
        size = len(trajectory.outcomes)
        trajectory.rewards, rewards = rewards[:size], rewards[size:]
        trajectory.advantages, advantages = advantages[:size], advantages[size:]


def sequences(group: Group, context: str, distill_coef: float = 1.0) -> list[rl.TrainingSequence]:
    """What the loss is computed on, in the context "keep", "drop", "is", "imitate" or "distill" (deviation 1)."""
    rows = []
    for trajectory in group.trajectories:
        kept, dropped = as_sampled(trajectory), without_context(trajectory)
        # What did not earn A > 0 weighs 0: it counts in the denominators, and that is all.
        wins = [replace(row, weight=float(row.advantages[0] > 0)) for row in dropped]
        again = [replace(row, weight=distill_coef * row.weight, again=True) for row in wins]
        trained = {"keep": [kept], "drop": dropped, "is": dropped, "imitate": wins, "distill": [kept, *again]}
        # A trajectory that was sampled without a context is trained once, win or loss.
        rows += [kept] if dropped == [kept] else trained[context]
    return rows


def as_sampled(trajectory: Trajectory) -> rl.TrainingSequence:
    """The trajectory in the context that it was sampled from: loss on what the policy wrote, and on nothing else."""
    first, targets, advantages = len(trajectory.prompt), [], []
    # The advantage of an episode counts for all its turns.
    turns = len(trajectory.spans) // len(trajectory.advantages)
    for i, (start, end) in enumerate(trajectory.spans):
        targets += range(first + start, first + end)
        advantages += [trajectory.advantages[i // turns]] * (end - start)
    ids, answers = trajectory.prompt + trajectory.body, len(trajectory.advantages)
    return rl.TrainingSequence(ids, targets, advantages, trajectory.logps, answers=answers)


def without_context(trajectory: Trajectory) -> list[rl.TrainingSequence]:
    """The same words under the plain prompt: an episode without its sketch, each guess without its chain."""
    plain = replace(trajectory, prompt=trajectory.plain)
    if len(trajectory.outcomes) == 1:
        return [as_sampled(plain)]
    rows, logps = [], iter(trajectory.logps)
    for (start, end), advantage in zip(trajectory.spans, trajectory.advantages, strict=True):
        alone = dict(body=trajectory.body[start:end], spans=[(0, end - start)], advantages=[advantage])
        rows.append(as_sampled(replace(plain, **alone, logps=list(islice(logps, end - start)))))
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# Metrics: coverage, unique counts and diversity of every task, from outcome keys alone


def diversity(outcomes: Outcomes) -> dict[str, float]:
    """Shares of success, of valid, and of duplicates among the valid; counts of unique successes and unique valid.

    >>> hit, miss = Outcome(1.0, True, "a", True), Outcome(0.0, False, "b", True)
    >>> diversity([hit, hit, miss, Outcome(0.0, False, None, False)])
    {'success': 0.5, 'valid': 0.75, 'unique_success': 1, 'unique_valid': 2, 'duplicate_rate': 0.3333333333333333}
    """
    valid = [o.key for o in outcomes if o.key is not None]
    return {
        "success": fmean(o.success for o in outcomes),
        "valid": fmean(o.valid for o in outcomes),
        "unique_success": len({o.key for o in outcomes if o.success}),
        "unique_valid": len(set(valid)),
        "duplicate_rate": (len(valid) - len(set(valid))) / len(valid) if valid else 0.0,
    }


def unique(outcomes: Outcomes, k: int, drawn_together: int = 1) -> float:
    """How many different successes k draws hold, in the mean over all windows of k that follow each other.

    Outcomes are in the order in which they were drawn; where `drawn_together` of them are a chain, every window begins
    with a chain: so k up to its length is the mean over the chains.

    >>> unique([Outcome(1.0, True, key, True) for key in "aabc"], 2)
    1.5
    """
    stride = -(-k // drawn_together) * drawn_together
    starts = range(0, len(outcomes) - k + 1, stride)
    return fmean(len({o.key for o in outcomes[i : i + k] if o.success}) for i in starts)


def mean(measures: Sequence[dict]) -> dict[str, float]:
    """The mean of each name."""
    return {name: fmean(m[name] for m in measures) for name in measures[0]}


def group_metrics(found: Sequence[Outcomes], rewards: Sequence[Sequence[float]]) -> dict[str, float]:
    """Means over the groups of a step: found[p] are the outcomes of group p, rewards[p] what they earned; [P, G].

    >>> hit, miss = Outcome(1.0, True, "a", True), Outcome(0.0, False, "b", True)
    >>> group_metrics([[hit, hit], [hit, miss]], [[1.0, 0.0], [1.0, 0.0]])["unique_success"]
    1.0
    """
    per_group = [diversity(outcomes) for outcomes in found]
    rates = [group["success"] for group in per_group]
    overall, size = fmean(rates), len(found[0])
    earnings = torch.tensor(rewards, dtype=torch.float64)  # [P, G]
    return mean(per_group) | dict(
        reward=earnings.mean().item(),
        reward_std=earnings.std(1).mean().item(),
        frac_reward_zero_std=fmean(len(set(group)) == 1 for group in rewards),
        frac_all_right=fmean(rate == 1 for rate in rates),
        frac_all_wrong=1 - fmean(rate > 0 for rate in rates),
        frac_decided_if_iid=overall**size + (1 - overall) ** size,
    )


def text_metrics(counts: dict[str, float]) -> dict[str, float]:
    """Shares and lengths of what was written, from the sums of `Group.counts`."""
    return {
        "sketch_distinct": counts["distinct_sketches"] / max(1, counts["sketches"]),
        "stuck": counts["stuck"] / counts["groups"],
        "stuck_solved": counts["stuck_solved"] / max(1, counts["stuck"]),
        "completions/mean_length": counts["tokens"] / counts["trajectories"],
        "completions/clipped_ratio": counts["clipped"] / counts["turns"],
    }


def evaluation_metrics(
    found: Sequence[Outcomes], ks: Sequence[int], targets: frozenset | None, drawn_together: int = 1
) -> dict:
    """pass@k, avg@n and unique@k per problem; where targets are known, Coverage@k, the share of them found in k draws,
    and how often each was named.

    found[p]: the outcomes of problem p, n each, in order; drawn_together: the length of their chains (see `unique`).

    >>> hit, miss = Outcome(1.0, True, "a", True), Outcome(0.0, False, "b", True)
    >>> evaluation_metrics([[hit, miss], [miss, miss]], (1, 2), None)["pass@k"]
    {'1': 0.25, '2': 0.5}
    """
    counts = [(len(outcomes), sum(o.success for o in outcomes)) for outcomes in found]
    smallest = min(map(len, found))
    ks = [k for k in ks if k <= smallest]
    diverse = mean([diversity(outcomes) for outcomes in found])
    metrics = diverse | {
        "n": smallest,
        "problems": len(found),
        "reward": fmean(o.reward for outcomes in found for o in outcomes),
        "avg@n": diverse["success"],
        "pass@k": {str(k): fmean(rl.pass_at_k(n, c, k) for n, c in counts) for k in ks},
        "unique@k": {str(k): fmean(unique(outcomes, k, drawn_together) for outcomes in found) for k in ks},
    }
    if targets is not None:
        metrics["coverage"] = {k: count / len(targets) for k, count in metrics["unique@k"].items()}
        metrics["named"] = dict(Counter(str(o.key) for outcomes in found for o in outcomes if o.key in targets))
    return metrics


def headline(evaluation: dict) -> float:
    """The one number by which checkpoints are compared: the better of the two ways of sampling."""
    return max(max(e["coverage"].values()) if "coverage" in e else e["avg@n"] for e in evaluation.values())


def measures(evaluation: dict) -> dict:
    """What was measured of the plain prompt, with pass@k, unique@k and coverage of both ways of sampling."""
    both = ("pass@k", "unique@k", "coverage")
    return evaluation["iid"] | {n: {kind: e.get(n, {}) for kind, e in evaluation.items()} for n in both}


def sample_record(step: int, group: Group) -> dict:
    """A group as a person reads it: its sketches, and what was written with which reward and mark."""
    mark = iter(marks(group.outcomes()))
    solutions = [
        dict(sketch=t.sketch, text=t.texts, reward=t.rewards, advantage=t.advantages)
        | dict(success=[o.success for o in t.outcomes], mark=[next(mark) for _ in t.outcomes])
        for t in group.trajectories
    ]
    return dict(step=step, problem=group.problem.text, sketches=group.sketches, solutions=solutions)
