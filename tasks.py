"""Problems, episodes, verifiers and demonstrations. Knows no tensor and no policy.

A task gives problems, plays them and scores what a policy writes. The flow of one episode:

    task = make_task("countdown", difficulty="easy")
    problem = task.problems("train", seed=0)[7]        # a function of (seed, split, 7) alone
    episode = task.episode(problem)
    while not over: over = episode.act(policy(episode.observe()))
    reward, success, key, valid = episode.outcome()

Two promises hold for every task. *Verifiers are total*: any string of any length gives an Outcome in bounded time, the
scan is linear, an extracted answer over 4 KB is invalid unread, and nothing a policy wrote is ever executed. *Splits
are disjoint by construction*: a hash of the canonical problem decides whether it belongs to train or to validation,
whatever the seed.

Texts have white space between all words of `task.words`, so that a tiny policy with one token per word can read and
write them; verifiers ignore white space where it means nothing.
"""

import ast
import hashlib
import importlib.util
import inspect
import json
import os
import random
import re
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache, cached_property
from itertools import accumulate, count, islice
from math import isqrt
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

MAX_ANSWER = 4096  # characters; a longer answer is invalid unread
DIVISIONS = Path(__file__).parent / "data" / "china_divisions.tsv"


class Problem(NamedTuple):
    index: int
    text: str  # as shown to a policy
    data: Any  # what the task needs to play and score it


class Outcome(NamedTuple):
    reward: float
    success: bool
    key: Hashable | None  # canonical form of what was found, equal for equal answers; None if nothing valid was found
    valid: bool  # everything the policy wrote followed the answer format


class Demonstration(NamedTuple):
    problem: Problem
    sketches: list[str]  # distinct; the turns follow the first
    turns: list[str]  # what the policy writes in one successful episode; [] where the sketches are the answers


NOTHING = Outcome(0.0, False, None, False)


class Problems(Sequence):
    """`size` problems made on demand; for records an index beyond the end is in the next epoch."""

    def __init__(self, make: Callable[[int], Problem], size: int):
        self.make, self.size = make, size

    def __len__(self):
        return self.size

    def __getitem__(self, i):
        if isinstance(i, slice):
            return [self.make(j) for j in range(*i.indices(self.size))]
        if i < 0:
            raise IndexError(f"problem {i}: the index must not be negative; count from 0")
        return self.make(i)

    def __iter__(self):
        return map(self.make, range(self.size))


class SingleTurn:
    """An episode of one answer: observe() is the problem's text, the first act() decides the outcome."""

    def __init__(self, problem: Problem, score: Callable[[Any, str], Outcome]):
        self.problem, self.score, self.result = problem, score, None

    def observe(self) -> str:
        return self.problem.text

    def act(self, text: str) -> bool:
        if self.result is None:
            self.result = self.score(self.problem.data, text)
        return True

    def outcome(self) -> Outcome:
        return self.result or NOTHING


class Task:
    """What every task has. One that is answered in a single turn is complete with draw, score, demonstrate and words."""

    name = "task"
    two_stage = True  # False: the sketches are the answers, there is no solution stage
    max_turns = 1
    sketch_tokens, solution_tokens = 64, 512  # limits per text for a language model
    tiny_tokens = dict(sketch=8, solution=32)  # the same for the tiny policy, its stop token included
    targets: frozenset | None = None  # the keys that Coverage counts, where they are known
    sketch_hint = "a short plan: the approach to take, not the answer"
    answer_hint = "Write the answer as <answer> ... </answer>."
    words: list[str] = []
    num_problems = 2**31

    def draw(self, rng: random.Random, keep: Callable[[Hashable], bool]) -> tuple[str, Any] | None:
        """One candidate (text, data), or None; keep(canonical): does this problem belong to the split being drawn?"""
        raise NotImplementedError

    def score(self, data: Any, text: str) -> Outcome:
        raise NotImplementedError

    def guess(self, problem: Problem, rng: random.Random) -> list[str] | None:
        """The turns of a random policy, well-formed and blind to the goal; None where there is no natural one."""
        return None

    def demonstrate(self, problem: Problem, rng: random.Random) -> Demonstration:
        raise NotImplementedError

    def problems(self, split: str, seed: int) -> Problems:
        """The problems of a split ("train" or "validation"); item i is a function of (seed, split, i) alone."""
        check_split(split)

        def make(i):
            rng = random.Random(f"{self.name} {split} {seed} {i}")
            for _ in range(10_000):
                if drawn := self.draw(rng, lambda canonical: split_of(canonical) == split):
                    return Problem(i, *drawn)
            raise ValueError(f"{self}: 10,000 draws gave no {split} problem; choose easier options")

        return Problems(make, self.num_problems)

    def episode(self, problem: Problem):
        return SingleTurn(problem, self.score)

    def demonstrations(self, rng: random.Random) -> Iterator[Demonstration]:
        """Endless demonstrations on training problems, without those that fail (on slippery ice)."""
        problems = self.problems("train", rng.getrandbits(32))
        failed = 0
        for i in count():
            demonstration = self.demonstrate(problems[i], rng)
            if not demonstration.turns or play(self, demonstration.problem, demonstration.turns).success:
                failed = 0
                yield demonstration
            elif (failed := failed + 1) > 1000:
                raise ValueError(f"{self}: 1,000 demonstrations in a row failed; choose easier options")

    def floor(self) -> float | None:
        """Success rate of a random policy on 2,000 fixed validation problems, computed once and cached."""
        if self.guess(self.problems("validation", 0)[0], random.Random(0)) is None:
            return None
        return self.measured(
            "floor", lambda p, rng: fmean(play(self, p, self.guess(p, rng)).success for _ in range(20))
        )

    def ceiling(self) -> float | None:
        """Success rate of a solver on the same problems, computed once and cached."""
        return self.measured("ceiling", lambda p, rng: play(self, p, self.demonstrate(p, rng).turns).success)

    def measured(self, what: str, rate: Callable[[Problem, random.Random], float], n: int = 2000) -> float:
        """The mean of rate(problem, rng) over the first n validation problems of seed 0. It is kept in the user's cache,
        under a hash of this file and of all options, so it can never be stale."""
        recipe = f"{type(self).__name__} {sorted(vars(self).items(), key=str)} {what} {n}".encode()
        digest = hashlib.blake2b(Path(inspect.getfile(type(self))).read_bytes() + recipe, digest_size=12).hexdigest()
        file = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sesa" / f"{what}-{digest}.json"
        try:
            return json.loads(file.read_text())
        except (OSError, ValueError):
            problems, rng = self.problems("validation", 0), random.Random(0)
            result = fmean(rate(problems[i], rng) for i in range(min(n, len(problems))))
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(result))
        except OSError:
            pass  # a cache that cannot be written only costs time
        return result


# ------------------------------------------------------------------------------------------------------- shared helpers


def check_split(split: str):
    if split not in ("train", "validation"):
        raise ValueError(f"split {split!r}: must be 'train' or 'validation'")


def share_of(canonical: Hashable) -> float:
    """A hash of a canonical problem as a number in [0, 1), the same in every process."""
    return int.from_bytes(hashlib.blake2b(repr(canonical).encode(), digest_size=6).digest()) / 2**48


def split_of(canonical: Hashable) -> str:
    """Half of all problems are for validation: they are endless, and even halves are the cheapest to draw from."""
    return "validation" if share_of(canonical) < 0.5 else "train"


def play(task: Task, problem: Problem, turns: Sequence[str]) -> Outcome:
    """Feed the texts to a fresh episode, as far as it goes."""
    episode = task.episode(problem)
    any(episode.act(text) for text in turns)
    return episode.outcome()


def extract_answer(text: str) -> str | None:
    """What stands in the last complete <answer>...</answer>; None without one, or if it is over 4 KB.

    >>> extract_answer("<think> 1 + 1 </think> <answer> 2 </answer>")
    '2'
    """
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, max(end, 0))
    if start < 0 or end - start - len("<answer>") > MAX_ANSWER:
        return None
    return text[start + len("<answer>") : end].strip()


# ------------------------------------------------------------------------------------------ synthetic: path exploration


@dataclass
class Synthetic(Task):
    """Find the hidden treasures among all Province-City-District paths of China. One problem; sketches are guesses.

    A guess earns 1 if it names a treasure; that a repeat within a chain earns 0 is the business of the credit.
    """

    treasures: int = 20
    treasure_seed: int = 0
    chain: int = 16  # guesses in a demonstration
    skew: float = 0.5

    name = "synthetic"
    two_stage = False
    sketch_tokens, solution_tokens = 32, 32
    tiny_tokens = dict(sketch=4, solution=4)
    sketch_hint = "one guess: a province, a city and a district of China in Chinese, separated by spaces"
    answer_hint = "Write only the three names, separated by spaces."
    num_problems = 1

    def __post_init__(self):
        self.paths = [tuple(line.split("\t")) for line in DIVISIONS.read_text(encoding="utf-8").splitlines()]
        self.real = frozenset(self.paths)
        for option, top in ("treasures", len(self.paths)), ("chain", len(self.paths) // 4):
            if not 1 <= getattr(self, option) <= top:
                raise ValueError(f"{option} {getattr(self, option)}: must be between 1 and {top}")
        if not 0 <= self.skew <= 2:
            raise ValueError(f"skew {self.skew}: must be between 0 (even at each level) and 2")
        self.targets = frozenset(random.Random(f"treasures {self.treasure_seed}").sample(self.paths, self.treasures))

    @cached_property
    def words(self):
        return "Find the treasures of China.".split() + sorted({name for path in self.paths for name in path})

    @cached_property
    def prior(self) -> list[float]:
        """The skewed prior of the demonstrations, one probability per path: at each level the child of rank r (in file
        order, from 0) has weight 1 / (r + 1) ** skew among its siblings, and a path the product of its three shares."""
        siblings = {}  # parent -> its children in file order; a node is a prefix of a path
        for path in self.paths:
            for depth in range(3):
                siblings.setdefault(path[:depth], {})[path[: depth + 1]] = None
        share = {}
        for children in siblings.values():
            weights = [(rank + 1) ** -self.skew for rank in range(len(children))]
            share.update((child, w / sum(weights)) for child, w in zip(children, weights, strict=True))
        return [share[path[:1]] * share[path[:2]] * share[path] for path in self.paths]

    def problems(self, split, seed):
        check_split(split)
        return Problems(lambda i: Problem(i, "Find the treasures of China.", None), self.num_problems)

    def score(self, data, text):
        path = tuple(re.split(r"[\s/>-]+", text.strip())) if len(text) <= MAX_ANSWER else ()
        found = path in self.targets
        return Outcome(float(found), found, path, True) if path in self.real else NOTHING

    def guess(self, problem, rng):
        return [" ".join(rng.choice(self.paths))]

    def demonstrate(self, problem, rng):
        """Non-repeating guesses from the prior: a chain teaches not to repeat, and knows nothing of the treasures."""
        chain = {}
        while len(chain) < self.chain:
            chain.update(dict.fromkeys(rng.choices(self.paths, cum_weights=self.cumulative)))
        return Demonstration(problem, [" ".join(path) for path in chain], [])

    @cached_property
    def cumulative(self):
        return list(accumulate(self.prior))

    def floor(self):
        return self.treasures / len(self.paths)

    def ceiling(self):
        return 1.0


# ------------------------------------------------------------------------------------------------------------ countdown

OPERATORS = (ast.Add, ast.Sub, ast.Mult, ast.Div)
DIFFICULTIES = {  # counts of numbers, largest number, largest target
    "easy": ((3,), 9, 99),
    "normal": ((3, 4), 20, 100),
    "hard": ((4,), 99, 999),
}


def combinations(numbers: tuple) -> Iterator[tuple[tuple, str]]:
    """All ways to join two (value, text) by one operation with a positive whole value: (the shorter tuple, operation)."""
    for i, (a, left) in enumerate(numbers):
        for j, (b, right) in enumerate(numbers):
            if i == j:
                continue
            rest = tuple(n for k, n in enumerate(numbers) if k not in (i, j))
            if i < j:
                yield ((a + b, f"( {left} + {right} )"), *rest), f"{left} + {right}"
                yield ((a * b, f"( {left} * {right} )"), *rest), f"{left} * {right}"
            if a > b:
                yield ((a - b, f"( {left} - {right} )"), *rest), f"{left} - {right}"
            if a % b == 0:
                yield ((a // b, f"( {left} / {right} )"), *rest), f"{left} / {right}"


def solve_countdown(numbers: Sequence[int], target: int) -> dict[str, str]:
    """Exhaustive search over positive whole values: {first operation: one full solution that begins with it}.

    >>> solve_countdown([3, 5, 7], 56)
    {'3 + 5': '( 3 + 5 ) * 7'}
    """

    def solve(pool):
        if len(pool) == 1:
            return pool[0][1] if pool[0][0] == target else None
        return next((text for shorter, _ in combinations(pool) if (text := solve(shorter))), None)

    pool = tuple((n, str(n)) for n in numbers)
    found = {first: solve(shorter) for shorter, first in combinations(pool)}
    return {first: text[2:-2] for first, text in found.items() if text}


def parse_expression(text: str) -> ast.expr | None:
    """The syntax tree of a sum of integers with + - * / and brackets; None for anything else. Nothing is evaluated."""
    text = " ".join(text.translate(str.maketrans("×÷−", "*/-")).split())
    if len(text) > 256 or not re.fullmatch(r"[0-9+*/() -]+", text):
        return None
    try:
        tree = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    for node in ast.walk(tree):
        operation = isinstance(node, ast.BinOp) and isinstance(node.op, OPERATORS)
        number = isinstance(node, ast.Constant) and type(node.value) is int
        if not (operation or number or isinstance(node, OPERATORS)):
            return None
    return tree


def evaluate(node: ast.expr) -> Fraction | None:
    """The exact value of a tree from parse_expression; None where it divides by zero."""
    if isinstance(node, ast.Constant):
        return Fraction(node.value)
    left, right = evaluate(node.left), evaluate(node.right)
    if left is None or right is None or (right == 0 and isinstance(node.op, ast.Div)):
        return None
    operation = {ast.Add: left.__add__, ast.Sub: left.__sub__, ast.Mult: left.__mul__, ast.Div: left.__truediv__}
    return operation[type(node.op)](right)


def canonical(node: ast.expr) -> str:
    """One spelling for all expressions that differ by order or brackets only.

    >>> canonical(parse_expression("7*(5+3)")), canonical(parse_expression("9-(2-1)"))
    ('(3+5)*7', '1+9-2')
    """
    if isinstance(node, ast.Constant):
        return str(node.value)
    family, signs = next(
        f for f in (((ast.Add, ast.Sub), "+-"), ((ast.Mult, ast.Div), "*/")) if isinstance(node.op, f[0])
    )

    def flatten(part, inverted):
        if isinstance(part, ast.BinOp) and isinstance(part.op, family):
            yield from flatten(part.left, inverted)
            yield from flatten(part.right, inverted ^ isinstance(part.op, family[1]))
        else:
            text = canonical(part)
            yield inverted, f"({text})" if isinstance(part, ast.BinOp) else text

    parts = sorted(flatten(node, False))
    return "".join(signs[inverted] + text for inverted, text in parts)[1:]


@dataclass
class Countdown(Task):
    """Make the target from three or four numbers, each used once. Reward 1; 0.1 for the right numbers, wrong value."""

    difficulty: str = "normal"

    name = "countdown"
    tiny_tokens = dict(sketch=4, solution=20)
    sketch_hint = "the first combination to try: two of the numbers joined by one operation, such as 3 + 5"
    answer_hint = (
        "Use each number exactly once, with + - * / and brackets. You may think first inside <think> </think>; "
        "then give the expression, such as <answer> ( 3 + 5 ) * 7 </answer>."
    )

    def __post_init__(self):
        if self.difficulty not in DIFFICULTIES:
            raise ValueError(f"difficulty {self.difficulty!r}: must be one of {', '.join(DIFFICULTIES)}")
        self.counts, self.largest, self.top = DIFFICULTIES[self.difficulty]

    @cached_property
    def words(self):
        tags = ["Numbers:", "Target:", "<answer>", "</answer>"]
        return tags + list("+-*/()") + [str(n) for n in range(1, max(self.largest, self.top) + 1)]

    def draw(self, rng, keep):
        numbers = [rng.randint(1, self.largest) for _ in range(rng.choice(self.counts))]
        pool = tuple((n, "") for n in numbers)
        while len(pool) > 1:  # a random walk of the solver: the target can be reached
            pool = rng.choice([shorter for shorter, _ in combinations(pool)])
        target = pool[0][0]
        if target > self.top or target in numbers or not keep((sorted(numbers), target)):
            return None
        return f"Numbers: {' '.join(map(str, numbers))} Target: {target}", (tuple(numbers), target)

    def score(self, data, text):
        """
        >>> task = Countdown()
        >>> task.score(((3, 5, 7), 56), "<answer> 7 * (3 + 5) = 56 </answer>")
        Outcome(reward=1.0, success=True, key='(3+5)*7', valid=True)
        >>> task.score(((3, 5, 7), 56), "<answer> 7 + 3 + 5 </answer>").reward
        0.1
        """
        numbers, target = data
        expression, equals, claimed = (extract_answer(text) or "").partition("=")
        tree = parse_expression(expression)
        if tree is None or (equals and claimed.strip() != str(target)):
            return NOTHING
        used = Counter(node.value for node in ast.walk(tree) if isinstance(node, ast.Constant))
        if used != Counter(numbers) or (value := evaluate(tree)) is None:
            return NOTHING
        return Outcome(1.0 if value == target else 0.1, value == target, canonical(tree), True)

    def guess(self, problem, rng):
        pool = [str(n) for n in problem.data[0]]
        while len(pool) > 1:
            rng.shuffle(pool)
            pool.append(f"( {pool.pop()} {rng.choice('+-*/')} {pool.pop()} )")
        return [f"<answer> {pool[0][2:-2]} </answer>"]

    def demonstrate(self, problem, rng):
        """All first combinations that lead to a solution, one at random first, then combinations that do not."""
        numbers, target = problem.data
        solutions = solve_countdown(numbers, target)
        first = rng.sample(list(solutions), len(solutions))
        others = [text for _, text in combinations(tuple((n, str(n)) for n in numbers)) if text not in solutions]
        rest = rng.sample(others, len(others))
        return Demonstration(
            problem, list(dict.fromkeys(first + rest))[:8], [f"<answer> {solutions[first[0]]} </answer>"]
        )


# ------------------------------------------------------------------------------ agents on a grid: Sokoban and FrozenLake


class GridEpisode:
    """Up to max_turns turns of up to turn_actions actions: `<think>...</think><answer>Up || Left</answer>`.

    A turn without an answer, or with an unknown action in it, does nothing and costs the format penalty; actions beyond
    turn_actions are dropped, as RAGEN does. The key is the string of the actions that were carried out.
    """

    def __init__(self, task: "Grid", problem: Problem):
        self.task, (self.board, self.state, seed) = task, problem.data
        self.rng = random.Random(seed)  # of the ice; equal for all episodes of a problem
        self.turns, self.taken, self.reward, self.valid, self.note = 0, [], 0.0, True, ""

    @property
    def done(self) -> bool:
        return self.task.ended(self.board, self.state) is not None or len(self.taken) >= self.task.max_actions

    @property
    def over(self) -> bool:
        return self.done or self.turns >= self.task.max_turns

    def observe(self) -> str:
        return self.note + self.task.picture(self.board, self.state, self.task.max_actions - len(self.taken))

    def act(self, text: str) -> bool:
        if self.over:
            return True
        actions = self.task.read_actions(text)
        self.note = "" if actions else "Invalid answer.\n"
        if not actions:
            self.reward, self.valid = self.reward - 0.1, False
        for action in actions[: self.task.turn_actions]:
            if self.done:
                break
            before = self.state
            chances, states = zip(*self.task.moves(self.board, before, action), strict=True)
            self.state = self.rng.choices(states, chances)[0]
            self.reward += self.task.reward(self.board, before, self.state)
            self.taken.append(self.task.actions[action])
        self.turns += 1
        return self.over

    def outcome(self) -> Outcome:
        success = self.task.ended(self.board, self.state) is True
        return Outcome(round(self.reward, 6), success, " ".join(self.taken) or None, self.valid and bool(self.taken))


@dataclass
class Grid(Task):
    """What Sokoban and FrozenLake share. A position is (board, state): a string that stays, and what moves on it."""

    max_turns: int = 5
    turn_actions: int = 5
    max_actions: int = 10

    solution_tokens = 400
    tiny_tokens = dict(sketch=12, solution=16)
    side = 4
    actions, sketch_words = (), ()
    glyphs = ""

    def __post_init__(self):
        for option in "max_turns", "turn_actions", "max_actions":
            if getattr(self, option) < 1:
                raise ValueError(f"{option} {getattr(self, option)}: must be at least 1")

    @cached_property
    def words(self):
        numbers = map(str, range(self.max_actions + 1))
        return [
            *"<answer> </answer> || actions left Invalid answer.".split(),
            *self.glyphs,
            *self.sketch_words,
            *numbers,
        ]

    def move(self, board: str, state: Hashable, action: int) -> Hashable:
        """The state after an action that does what it says."""
        raise NotImplementedError

    def moves(self, board: str, state: Hashable, action: int) -> list[tuple[float, Hashable]]:
        """All (probability, next state)."""
        return [(1.0, self.move(board, state, action))]

    def ended(self, board: str, state: Hashable) -> bool | None:
        """True: reached the goal, False: lost, None: goes on."""
        raise NotImplementedError

    def reward(self, board: str, before: Hashable, after: Hashable) -> float:
        raise NotImplementedError

    def glyph(self, board: str, state: Hashable, cell: int) -> str:
        raise NotImplementedError

    def sketch(self, board: str, state: Hashable, plan: Sequence[int]) -> str:
        """The method of a plan in a few words; "" if there is nothing to say."""
        raise NotImplementedError

    def step_of(self, action: int) -> int:
        return {"Up": -self.side, "Down": self.side, "Left": -1, "Right": 1}[self.actions[action]]

    def picture(self, board: str, state: Hashable, left: int) -> str:
        glyphs = [self.glyph(board, state, cell) for cell in range(self.side**2)]
        rows = [" ".join(glyphs[at : at + self.side]) for at in range(0, self.side**2, self.side)]
        return "\n".join([*rows, f"{left} actions left"])

    def episode(self, problem):
        return GridEpisode(self, problem)

    def read_actions(self, text: str) -> list[int]:
        """The actions of the last answer; [] if there is none or one of them is unknown."""
        numbers = {name.lower(): number for number, name in enumerate(self.actions)}
        found = [numbers.get(part.strip().lower()) for part in (extract_answer(text) or "").split("||")]
        return [] if None in found else found

    def write_actions(self, actions: Sequence[int]) -> str:
        return f"<answer> {' || '.join(self.actions[action] for action in actions)} </answer>"

    def plan(self, board: str, state: Hashable, rng: random.Random) -> list[int] | None:
        """A shortest list of actions to the goal by breadth-first search (ties by rng), as if all moves did what they say;
        None if max_actions are not enough."""
        came, frontier = {state: None}, [state]
        for _ in range(self.max_actions):
            reached = []
            for before in frontier:
                for action in rng.sample(range(4), 4):
                    after = self.move(board, before, action)
                    if after in came:
                        continue
                    came[after] = before, action
                    if (end := self.ended(board, after)) is None:
                        reached.append(after)
                    elif end:
                        actions = []
                        while came[after]:
                            after, action = came[after]
                            actions.append(action)
                        return actions[::-1]
            frontier = reached
        return None

    def value(self, board: str, pick: Callable[[list[float]], float]) -> Callable[[Hashable, int], float]:
        """v(state, n): the exact chance of success within n actions, for pick = max the best policy's, for pick = fmean
        that of a uniformly random one."""

        @cache
        def v(state, n):
            if (end := self.ended(board, state)) is not None or not n:
                return float(bool(end))
            return pick([sum(p * v(after, n - 1) for p, after in self.moves(board, state, a)) for a in range(4)])

        return v

    def floor(self):
        """The exact success rate of uniformly random actions, on 2,000 fixed validation problems."""
        return self.measured("floor", lambda p, _: self.value(p.data[0], fmean)(p.data[1], self.max_actions))

    def ceiling(self):
        """The exact success rate of the best policy, which sees the result of each action before it chooses the next."""
        return self.measured("ceiling", lambda p, _: self.value(p.data[0], max)(p.data[1], self.max_actions))

    def guess(self, problem, rng):
        return [self.write_actions(rng.choices(range(4), k=self.turn_actions)) for _ in range(self.max_turns)]

    def choose(self, episode: GridEpisode, rng: random.Random) -> list[int]:
        """The actions of a solver's next turn."""
        return self.plan(episode.board, episode.state, rng)[: self.turn_actions]

    def demonstrate(self, problem, rng):
        board, start, _ = problem.data
        plan = self.plan(board, start, rng)
        sketches = {self.sketch(board, start, plan): None}
        for attempt in range(12):  # other plans, good and bad
            wild = rng.choices(range(4), k=rng.randint(3, self.max_actions))
            sketches[self.sketch(board, start, wild if attempt % 2 else self.plan(board, start, rng))] = None
        episode, turns = self.episode(problem), []
        while not episode.over:
            turns.append(self.write_actions(self.choose(episode, rng)))
            episode.act(turns[-1])
        return Demonstration(problem, [text for text in sketches if text][:6], turns)


@dataclass
class Sokoban(Grid):
    """Push every box onto a target within 10 moves. Each room is solvable within them, checked by search.

    Board: `#` wall, `O` target, `_` floor. State: (the player's cell, the set of the boxes' cells). Rewards: -0.1 a move,
    +1 for a box onto a target and -1 off it, +10 when all are on.
    """

    size: int = 6
    boxes: int = 1
    density: float = 0.2  # share of walls inside the room

    name = "sokoban"
    actions = "Up", "Down", "Left", "Right"
    glyphs = "#_O√XPS"
    sides = dict(Up="Below", Down="Above", Left="Right", Right="Left")
    sketch_words = [*actions, "Below", "Above", "from", "then"]
    sketch_hint = (
        "the sides to push the box from, in order, such as 'from Left then Below' (from Left: stand on its left and push "
        "it to the right)"
    )

    def __post_init__(self):
        super().__post_init__()
        if not 5 <= self.size <= 12 or not 1 <= self.boxes <= 4 or not 0 <= self.density <= 0.5:
            rule = "size must be between 5 and 12, boxes between 1 and 4, density between 0 and 0.5"
            raise ValueError(f"sokoban with size {self.size}, boxes {self.boxes}, density {self.density}: {rule}")
        self.side = self.size

    @property
    def answer_hint(self):
        return (
            "Push all boxes onto the targets. # wall, _ floor, O target, X box, √ box on a target, P you, S you on a target. "
            f"Each turn give 1 to {self.turn_actions} of the actions Up, Down, Left, Right, separated by ||, as "
            "<think> ... </think> <answer> Up || Left </answer>. Moving into a box pushes it."
        )

    def move(self, board, state, action):
        player, boxes = state
        step = self.step_of(action)
        to, beyond = player + step, player + 2 * step
        if board[to] == "#":
            return state
        if to in boxes:
            if board[beyond] == "#" or beyond in boxes:
                return state
            boxes = boxes - {to} | {beyond}
        return to, boxes

    def ended(self, board, state):
        return True if all(board[box] == "O" for box in state[1]) else None

    def reward(self, board, before, after):
        on_target = [sum(board[box] == "O" for box in boxes) for _, boxes in (before, after)]
        return -0.1 + on_target[1] - on_target[0] + (10.0 if self.ended(board, after) else 0.0)

    def glyph(self, board, state, cell):
        player, boxes = state
        target = board[cell] == "O"
        return "PS"[target] if cell == player else "X√"[target] if cell in boxes else board[cell]

    def sketch(self, board, state, plan):
        sides = []
        for action in plan:
            after = self.move(board, state, action)
            side = self.sides[self.actions[action]]
            if after[1] != state[1] and sides[-1:] != [side]:
                sides.append(side)
            state = after
        return f"from {' then '.join(sides[:5])}" if sides else ""

    def draw(self, rng, keep):
        inside = [r * self.size + c for r in range(1, self.size - 1) for c in range(1, self.size - 1)]
        board = ["#"] * self.size**2
        for cell in inside:
            board[cell] = "#" if rng.random() < self.density else "_"
        free = [cell for cell in inside if board[cell] == "_"]
        if len(free) < 2 * self.boxes + 1:
            return None
        player, *rest = rng.sample(free, 2 * self.boxes + 1)
        for cell in rest[: self.boxes]:
            board[cell] = "O"
        board, state = "".join(board), (player, frozenset(rest[self.boxes :]))
        if not keep((board, player, sorted(state[1]))) or self.plan(board, state, rng) is None:
            return None
        return self.picture(board, state, self.max_actions), (board, state, rng.getrandbits(32))


@dataclass
class FrozenLake(Grid):
    """Walk to the goal over a frozen lake with holes; on slippery ice only a third of the moves go where they should.

    Dynamics of gymnasium's FrozenLake, on maps with a random start and goal and a path between them. Board: `_` ice,
    `O` hole, `G` goal. State: the player's cell. Reward: 1 at the goal.
    """

    slippery: bool = True
    size: int = 4
    frozen: float = 0.8  # share of ice

    name = "frozenlake"
    actions = "Left", "Down", "Right", "Up"  # gymnasium's order: neighbours in it are at right angles
    glyphs = "P_OGX√"
    sketch_words = actions
    sketch_hint = "the route to walk, such as 'Right Right Down'"

    def __post_init__(self):
        super().__post_init__()
        if not 2 <= self.size <= 12 or not 0.3 <= self.frozen <= 1:
            rule = "size must be between 2 and 12, frozen between 0.3 and 1"
            raise ValueError(f"frozenlake with size {self.size}, frozen {self.frozen}: {rule}")
        self.side = self.size

    @property
    def answer_hint(self):
        slip = " The ice is slippery: a move may go to either side instead." if self.slippery else ""
        return (
            "Walk to the goal, not into a hole. P you, _ ice, O hole, G goal, X you in a hole, √ you at the goal. "
            f"Each turn give 1 to {self.turn_actions} of the actions Left, Down, Right, Up, separated by ||, as "
            f"<think> ... </think> <answer> Right || Down </answer>.{slip}"
        )

    def move(self, board, state, action):
        if self.ended(board, state) is not None:
            return state
        column, step = state % self.size, self.step_of(action)
        at_edge = (column == 0, column == self.size - 1)[step == 1] if abs(step) == 1 else False
        return state if at_edge or not 0 <= state + step < self.size**2 else state + step

    def moves(self, board, state, action):
        if not self.slippery:
            return [(1.0, self.move(board, state, action))]
        return [(1 / 3, self.move(board, state, a % 4)) for a in (action - 1, action, action + 1)]

    def ended(self, board, state):
        return {"G": True, "O": False}.get(board[state])

    def reward(self, board, before, after):
        return float(board[after] == "G")

    def glyph(self, board, state, cell):
        return {"_": "P", "O": "X", "G": "√"}[board[cell]] if cell == state else board[cell]

    def sketch(self, board, state, plan):
        route = []
        for action in plan:
            after = self.move(board, state, action)
            if after != state and board[after] != "O":
                route.append(self.actions[action])
                state = after
        return " ".join(route)

    def draw(self, rng, keep):
        board = rng.choices("_O", (self.frozen, 1 - self.frozen), k=self.size**2)
        start, goal = rng.sample(range(self.size**2), 2)
        board[start], board[goal] = "_", "G"
        board = "".join(board)
        if not keep((board, start)) or self.plan(board, start, rng) is None:
            return None
        return self.picture(board, start, self.max_actions), (board, start, rng.getrandbits(32))

    def choose(self, episode, rng):
        """On slippery ice the actions of a turn cannot react to it: each is the best for where the player may be by then."""
        if not self.slippery:
            return super().choose(episode, rng)
        board, left = episode.board, self.max_actions - len(episode.taken)
        belief, chosen, v = {episode.state: 1.0}, [], self.value(episode.board, max)
        while len(chosen) < min(self.turn_actions, -(-left // (self.max_turns - episode.turns))):
            nexts = []
            for action in range(4):
                spread = Counter()
                for state, p in belief.items():
                    for q, after in self.moves(board, state, action):
                        spread[after] += p * q
                nexts.append((sum(p * v(s, left - len(chosen) - 1) for s, p in spread.items()), action, spread))
            _, action, belief = max(nexts, key=lambda n: n[:2])
            chosen.append(action)
        return chosen


# -------------------------------------------------------------------------------------------------------------- sudoku


def solve_sudoku(grid: Sequence[int], rng: random.Random | None = None) -> Iterator[list[int]]:
    """All completions of a grid of size**2 numbers (0: blank), by search on the blank with the fewest candidates; with an
    rng in random order.

    >>> next(solve_sudoku([1, 0, 3, 4, 3, 4, 1, 2, 2, 1, 4, 3, 4, 3, 2, 0]))
    [1, 2, 3, 4, 3, 4, 1, 2, 2, 1, 4, 3, 4, 3, 2, 1]
    """
    size = isqrt(len(grid))
    units, grid = sudoku_units(size), list(grid)
    used = [0] * (3 * size)  # bit sets of the numbers in each row, column and box
    blanks = set()
    for cell, number in enumerate(grid):
        if not number:
            blanks.add(cell)
        for unit in units[cell]:
            if number and used[unit] >> number & 1:
                return
            used[unit] |= 1 << number

    def search():
        if not blanks:
            yield list(grid)
            return
        fewest, best = size + 1, None
        for cell in blanks:
            row, column, box = units[cell]
            taken = used[row] | used[column] | used[box] | 1
            if (candidates := size + 1 - taken.bit_count()) < fewest:
                fewest, best, best_taken = candidates, cell, taken
                if candidates <= 1:
                    break
        blanks.remove(best)
        numbers = [number for number in range(1, size + 1) if not best_taken >> number & 1]
        if rng:
            rng.shuffle(numbers)
        for number in numbers:
            grid[best] = number
            for unit in units[best]:
                used[unit] ^= 1 << number
            yield from search()
            for unit in units[best]:
                used[unit] ^= 1 << number
        blanks.add(best)

    return search()


@cache
def sudoku_units(size: int) -> list[tuple[int, int, int]]:
    """The row, the column and the box of each cell, numbered from 0, size and 2 * size."""
    box = isqrt(size)
    cells = [divmod(cell, size) for cell in range(size**2)]
    return [(row, size + column, 2 * size + row // box * box + column // box) for row, column in cells]


@cache
def sudoku_peers(size: int) -> list[list[int]]:
    """The other cells in the row, the column and the box of each cell."""
    units = [set(of_cell) for of_cell in sudoku_units(size)]
    return [[b for b in range(size**2) if b != a and units[a] & units[b]] for a in range(size**2)]


@dataclass
class Sudoku(Task):
    """Fill the blanks of a 4x4 or 9x9 grid, which has one solution."""

    size: int = 4
    blanks: int = 0  # 0: 6 of 16 cells, or 36 of 81

    name = "sudoku"
    solution_tokens = 1024
    sketch_hint = "the order in which to fill the blanks, such as 'r1c2 r3c4' (row 1 column 2, then row 3 column 4)"
    answer_hint = (
        "Fill the blanks _ so that each row, column and box holds each number once. You may think first inside "
        "<think> </think>; then give the whole grid, row by row, as <answer> ... </answer>."
    )

    def __post_init__(self):
        if self.size not in (4, 9):
            raise ValueError(f"size {self.size}: must be 4 or 9")
        most = {4: 10, 9: 50}[self.size]
        self.blanks = self.blanks or {4: 6, 9: 36}[self.size]
        if not 1 <= self.blanks <= most:
            raise ValueError(f"blanks {self.blanks}: must be between 1 and {most} for size {self.size}")
        self.tiny_tokens = dict(sketch=min(self.blanks, 8) + 1, solution=self.size**2 + 2 * self.blanks + 5)

    @cached_property
    def words(self):
        cells = [self.cell_name(cell) for cell in range(self.size**2)]
        return ["<think>", "</think>", "<answer>", "</answer>", "_", *map(str, range(1, self.size + 1)), *cells]

    def cell_name(self, cell: int) -> str:
        return f"r{cell // self.size + 1}c{cell % self.size + 1}"

    def write(self, grid: Sequence[int]) -> str:
        rows = [grid[at : at + self.size] for at in range(0, self.size**2, self.size)]
        return "\n".join(" ".join(str(number or "_") for number in row) for row in rows)

    def draw(self, rng, keep):
        """Blanks are taken one by one from a random full grid. A cell whose number is the only candidate left can always
        go; for another cell a search says whether the solution stays the only one."""
        solution = next(solve_sudoku([0] * self.size**2, rng))
        grid, left = list(solution), self.blanks
        for cell in rng.sample(range(self.size**2), self.size**2):
            number, grid[cell] = grid[cell], 0
            if len(self.candidates(grid, cell)) == 1 or len(list(islice(solve_sudoku(grid), 2))) == 1:
                left -= 1
                if not left:
                    return (self.write(grid), (tuple(grid), tuple(solution))) if keep(tuple(grid)) else None
            else:
                grid[cell] = number
        return None

    def candidates(self, grid: Sequence[int], cell: int) -> list[int]:
        taken = {grid[peer] for peer in sudoku_peers(self.size)[cell]}
        return [number for number in range(1, self.size + 1) if number not in taken]

    def score(self, data, text):
        grid, solution = data
        digits = re.sub(r"[\s|+-]+", "", extract_answer(text) or "")
        if len(digits) != len(grid) or not set(digits) <= set("123456789"[: self.size]):
            return NOTHING
        if any(given and given != int(digit) for given, digit in zip(grid, digits, strict=True)):
            return NOTHING
        success = digits == "".join(map(str, solution))
        return Outcome(float(success), success, digits, True)

    def guess(self, problem, rng):
        filled = [number or rng.randint(1, self.size) for number in problem.data[0]]
        return [f"<answer> {self.write(filled)} </answer>"]

    def floor(self):
        return self.size**-self.blanks

    def order(self, problem: Problem, rng: random.Random) -> list[int]:
        """The blanks in an order of filling that follows from the grid: first a cell with the fewest candidates."""
        grid, solution = list(problem.data[0]), problem.data[1]
        order = []
        while len(order) < self.blanks:
            blanks = [cell for cell in range(self.size**2) if not grid[cell]]
            cell = min(rng.sample(blanks, len(blanks)), key=lambda cell: len(self.candidates(grid, cell)))
            grid[cell] = solution[cell]
            order.append(cell)
        return order

    def demonstrate(self, problem, rng):
        orders = [self.order(problem, rng) for _ in range(6)]
        sketches = [" ".join(map(self.cell_name, order[:8])) for order in orders]
        steps = " ".join(f"{self.cell_name(cell)} {problem.data[1][cell]}" for cell in orders[0])
        turn = f"<think> {steps} </think> <answer> {self.write(problem.data[1])} </answer>"
        return Demonstration(problem, list(dict.fromkeys(sketches)), [turn])


# ---------------------------------------------------------------------------------------------- records of a JSONL file


def read_records(path: str) -> list[tuple[str, str]]:
    """(question, answer) of each line of a JSONL file; ValueError that names file, line and rule for a broken one."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read as UTF-8 text ({error}); give a JSONL file") from None
    records = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            question, answer = record["question"], record["answer"]
            if not isinstance(question, str) or not isinstance(answer, str | int | float) or not question.strip():
                raise TypeError
        except (ValueError, KeyError, TypeError, RecursionError):
            rule = 'must be a JSON object {"question": text, "answer": text or number}'
            raise ValueError(f"{path}, line {number}: {rule}") from None
        records.append((question.strip(), str(answer).strip()))
    if not records:
        raise ValueError(f"{path}: holds no record; give one JSON object per line")
    return records


@dataclass
class Records(Task):
    """Questions with one right answer each, from a JSONL file; right is the same text, case and spacing aside."""

    path: str
    validation: str = ""  # a second file; without one a tenth of the questions, chosen by hash, is kept for validation

    answer_hint = "You may think first inside <think> </think>; then give only the answer, as <answer> ... </answer>."

    def __post_init__(self):
        self.name = f"jsonl-{Path(self.path).stem}"
        records = read_records(self.path)
        if self.validation:
            held_out = read_records(self.validation)
            asked = {question for question, _ in held_out}
            self.records = {"train": [r for r in records if r[0] not in asked], "validation": held_out}
        else:
            self.records = {"train": [], "validation": []}
            for record in records:
                self.records["validation" if share_of(record[0]) < 0.1 else "train"].append(record)
        for split, found in self.records.items():
            if not found:
                rule = f"{len(records)} records leave none for {split}; give more, or the option validation=<file>"
                raise ValueError(f"{self.path}: {rule}")
        self.tiny_tokens = dict(sketch=8, solution=3 + max(len(answer.split()) for _, answer in records))

    @cached_property
    def words(self):
        texts = [text for records in self.records.values() for record in records for text in record]
        return sorted({word for text in [*texts, "<answer> </answer> answer directly"] for word in text.split()})

    def problems(self, split, seed):
        """The records of a split, shuffled anew for each epoch."""
        check_split(split)
        records = self.records[split]

        def make(i):
            epoch, at = divmod(i, len(records))
            order = random.Random(f"{self.name} {split} {seed} {epoch}").sample(range(len(records)), len(records))
            return Problem(i, *records[order[at]])

        return Problems(make, len(records))

    def score(self, data, text):
        answer = extract_answer(text)
        if not answer:
            return NOTHING
        key = " ".join(answer.casefold().split())
        success = key == " ".join(data.casefold().split())
        return Outcome(float(success), success, key, True)

    def guess(self, problem, rng):
        return [f"<answer> {rng.choice(self.records['train'])[1]} </answer>"]

    def demonstrate(self, problem, rng):
        return Demonstration(problem, ["answer directly"], [f"<answer> {problem.data} </answer>"])


# ---------------------------------------------------------------------------------------------------------- make a task

TASKS = {
    "synthetic": Synthetic,
    "countdown": Countdown,
    "sokoban": Sokoban,
    "frozenlake": FrozenLake,
    "sudoku": Sudoku,
}


def load_class(spec: str) -> type:
    """`path/to/file.py:ClassName`, a task of the user's own."""
    path, _, name = spec.rpartition(":")
    if not Path(path).is_file():
        raise ValueError(f"task {spec!r}: there is no file {path!r}; give path/to/file.py:ClassName")
    module_spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    if not inspect.isclass(getattr(module, name, None)):
        raise ValueError(f"task {spec!r}: {path} defines no class {name!r}")
    return getattr(module, name)


def make_task(name: str, **options) -> Task:
    """A task by name: one of TASKS, jsonl:<path>, or path/to/file.py:ClassName. Raises ValueError that lists the names
    for an unknown name, and the options for an unknown option.

    >>> make_task("countdown", difficulty="easy").problems("train", seed=0)[0].text.split()[0]
    'Numbers:'
    """
    if name.startswith("jsonl:"):
        cls, options = Records, {"path": name.removeprefix("jsonl:"), **options}
    elif re.search(r"\.py:\w+$", name):
        cls = load_class(name)
    elif name in TASKS:
        cls = TASKS[name]
    else:
        raise ValueError(f"task {name!r}: must be one of {', '.join(TASKS)}, jsonl:<path>, path/to/file.py:ClassName")
    parameters = inspect.signature(cls).parameters
    for option, value in options.items():
        if option not in parameters:
            raise ValueError(f"task {name!r} has no option {option!r}: it has {', '.join(parameters) or 'none'}")
        options[option] = coerce(name, option, value, parameters[option].default)
    return cls(**options)


def coerce(name: str, option: str, value: Any, default: Any) -> Any:
    """An option given as text on a command line becomes the type of its default."""
    if not isinstance(value, str) or default is inspect.Parameter.empty or isinstance(default, str):
        return value
    try:
        return {"true": True, "false": False}[value.lower()] if isinstance(default, bool) else type(default)(value)
    except (ValueError, KeyError):
        raise ValueError(f"task {name!r}, option {option} = {value!r}: must be {type(default).__name__}") from None


def show(task: Task, n: int = 3, seed: int = 0) -> None:
    """Print n problems, each with a demonstration and a random guess, and what they earn."""
    rng = random.Random(seed)
    for demonstration in islice(task.demonstrations(rng), n):
        problem = demonstration.problem
        print(f"--- {task.name}, problem {problem.index}", problem.text, "sketches:", sep="\n")
        print(*(f"  {sketch}" for sketch in demonstration.sketches), sep="\n")
        right = demonstration.turns or demonstration.sketches[:1]
        for kind, turns in ("demonstration", right), ("random guess", task.guess(problem, rng)):
            print(f"{kind}: {' ... '.join(turns)}\n  {play(task, problem, turns)}")
