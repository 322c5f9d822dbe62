"""Problems, episodes, verifiers and demonstrations. Knows no tensor and no policy.

A task gives problems, plays them and scores what a policy writes. One episode:

    task = make_task("countdown", difficulty="easy")
    problem = task.problems("train", seed=0)[7]        # a function of (seed, split, 7) alone
    episode = task.episode(problem)
    while not over: over = episode.act(policy(episode.observe()))
    reward, success, key, valid = episode.outcome()

Two promises hold for every task. *Verifiers are total*: any string of any length gives an Outcome in bounded time, the
scan is linear, an extracted answer over 4 KB is invalid unread, and nothing a policy wrote is ever executed. *Splits
are disjoint by construction*, where there is more than one problem: a hash of the canonical problem decides whether it
belongs to train or to validation, whatever the seed; from records, what a validation source asks is left out of train.

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
import signal
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from functools import cache, partial
from itertools import accumulate, count, islice, permutations, product, takewhile
from math import isfinite, isqrt
from operator import add, eq, itemgetter, mul, sub, truediv
from pathlib import Path
from statistics import fmean
from subprocess import DEVNULL, PIPE, Popen
from typing import Any, NamedTuple

# characters; a longer answer is invalid unread
MAX_ANSWER = 4096
SOURCE = Path(__file__).read_text(encoding="utf-8")
DIVISIONS = Path(__file__).parent / "data" / "china_divisions.tsv"


class Problem(NamedTuple):
    """text: as shown to a policy. data: what the task needs to play and score it."""

    index: int
    text: str
    data: Any


class Outcome(NamedTuple):
    """key: canonical form of what was found, equal for equal answers; None if nothing valid was found.
    valid: everything the policy wrote followed the answer format."""

    reward: float
    success: bool
    key: Hashable | None
    valid: bool


class Demonstration(NamedTuple):
    """sketches: distinct; the turns follow the first.
    turns: what the policy writes in one successful episode; [] where the sketches are the answers."""

    problem: Problem
    sketches: list[str]
    turns: list[str]


NOTHING = Outcome(0.0, False, None, False)


def judged(key: Hashable, reward: float) -> Outcome:
    """Of an answer, a success if its reward is 1; NOTHING if its key is empty."""
    return Outcome(float(reward), reward == 1, key, True) if key else NOTHING


class Problems(Sequence):
    """Problems made on demand; generated tasks and records go on beyond `len`, records with the next epoch."""

    def __init__(self, make: Callable[[int], Problem], size: int):
        self.make, self.size = make, size

    def __len__(self):
        return self.size

    def __getitem__(self, i):
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
        self.result = self.result or self.score(self.problem.data, text)
        if not isinstance(self.result, Outcome) or not isfinite(self.result.reward):
            raise ValueError(f"score returned {self.result!r}, no finite Outcome")
        return True

    def outcome(self) -> Outcome:
        return self.result or NOTHING


class Task:
    """What every task has. One that is answered in a single turn is complete with `words` and these three, the first of
    which it does not need where it has an `only_problem`:

    draw(rng, keep) -> (text, data) | None    one candidate; keep(canonical) says whether it is of the split being drawn
    score(data, text) -> Outcome              the verifier
    demonstrate(problem, rng) -> Demonstration
    """

    name = "task"
    # False: the sketches are the answers, there is no solution stage
    two_stage = True
    max_turns = 1
    # limits per text for a language model, and for the tiny policy, its stop token included
    sketch_tokens, solution_tokens = 64, 512
    tiny_tokens = dict(sketch=8, solution=32)
    # the keys that Coverage counts, where they are known
    targets: frozenset | None = None
    sketch_hint = "a short plan: the approach to take, not the answer"
    answer_hint = "You may think first inside <think> </think>; then give only the answer, as <answer> ... </answer>."
    # the closed vocabulary of all its texts; [] for tasks that have none
    words: list[str] = []
    # its text, where there is only one problem
    only_problem = ""

    def problems(self, split: str, seed: int) -> Problems:
        """The problems of a split ("train" or "validation"); item i is a function of (seed, split, i) alone. Half of
        all generated problems are for validation: they are endless, and even halves are the cheapest to draw."""
        if split not in ("train", "validation"):
            raise ValueError(f"split {split!r}: must be 'train' or 'validation'")
        return Problems(partial(self.make, split, seed), self.num_problems(split))

    def num_problems(self, split: str) -> int:
        return 1 if self.only_problem else 2**31

    def make(self, split: str, seed: int, i: int) -> Problem:
        if self.only_problem:
            return Problem(i, self.only_problem, None)
        wanted = split == "train"
        rng = random.Random(f"{self.name} {split} {seed} {i}")
        for _ in range(10_000):
            if drawn := self.draw(rng, lambda canonical: (share_of(canonical) < 0.5) == wanted):
                return Problem(i, *drawn)
        raise ValueError(f"{self}: 10,000 draws gave no {split} problem; choose easier options")

    def episode(self, problem: Problem):
        return SingleTurn(problem, self.score)

    def demonstrations(self, rng: random.Random) -> Iterator[Demonstration]:
        """Endless demonstrations on training problems, without those that fail (on slippery ice)."""
        problems, last = self.problems("train", rng.getrandbits(32)), -1
        for i in count():
            found = self.demonstrate(problems[i], rng)
            if not found.turns or play(self, found.problem, found.turns).success:
                last = i
                yield found
            elif i == last + 1000:
                raise ValueError(f"{self}: 1,000 demonstrations in a row failed; choose easier options")

    def floor(self) -> float | None:
        """Success rate of a random policy, well-formed and blind to the goal; None where none is natural."""

    def ceiling(self) -> float | None:
        """Success rate of the best policy: 1 where demonstrations always succeed."""
        return 1.0

    def measured(self, what: str, rate: Callable) -> float:
        """The mean of rate(data, rng) over the first 2,000 validation problems of seed 0. It is kept in the user's
        cache, under a hash of the source and of the options, so that it cannot be stale; not for a class from
        elsewhere, whose source may change while it runs."""
        file = cached(what, [SOURCE, str(self)]) if type(self).__module__ == __name__ else Path(os.devnull)
        with suppress(OSError, ValueError):
            return json.loads(file.read_text())
        rng = random.Random(0)
        result = fmean(rate(p.data, rng) for p in islice(self.problems("validation", 0), 2000))
        # a cache that cannot be written only costs time
        with suppress(OSError):
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(str(result))
        return result


# ------------------------------------------------------------------------------------------------------- shared helpers


def share_of(canonical: Hashable) -> float:
    """A hash of a canonical problem as a number in [0, 1), the same in every process."""
    return int.from_bytes(hashlib.blake2b(repr(canonical).encode(), digest_size=6).digest()) / 2**48


def cached(name: str, recipe: list) -> Path:
    """A place in the user's cache for what is made by the recipe."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home, "sesa", f"{name}-{share_of(recipe)}")


def check_range(task: Task, **limits: tuple[float, float]):
    for option, (low, high) in limits.items():
        if not low <= (value := getattr(task, option)) <= high:
            raise ValueError(f"{task.name}: {option} {value}: must be between {low} and {high}")


def play(task: Task, problem: Problem, turns: Sequence[str]) -> Outcome:
    """Feed the texts to a fresh episode, as far as it goes."""
    episode = task.episode(problem)
    any(episode.act(text) for text in turns)
    return episode.outcome()


def write_answer(answer: str, thought: str = "", form: str = "<answer> {} </answer>") -> str:
    return f"<think> {thought} </think> " * bool(thought) + form.format(answer)


def write_grid(cells: Sequence[str], size: int) -> str:
    """Words in rows of `size`, a line each."""
    return "\n".join(" ".join(cells[at : at + size]) for at in range(0, len(cells), size))


def extract_answer(text: str) -> str:
    """What stands in the last complete <answer>...</answer>; "" without one, or if it is over 4 KB.

    >>> extract_answer("<think> 1 + 1 </think> <answer> 2 </answer>")
    '2'
    """
    before, _, _ = text.rpartition("</answer>")
    _, opened, answer = before.rpartition("<answer>")
    return answer.strip() if opened and len(answer) <= MAX_ANSWER else ""


# ------------------------------------------------------------------------------------------ synthetic: path exploration


@dataclass
class Synthetic(Task):
    """Find the hidden treasures among all Province-City-District paths of China. One problem; sketches are guesses.

    A guess earns 1 if it names a treasure; that a repeat within a chain earns 0 is the business of the credit.
    The demonstrations have `chain` guesses; see `demonstrate` for skew (0: even at each level) and fade (1: what they
    have visited may be visited again as if it had not been).
    """

    treasures: int = 20
    treasure_seed: int = 0
    chain: int = 16
    skew: float = 0.5
    fade: float = 0.1

    name, two_stage = "synthetic", False
    only_problem = "Find the treasures of China."
    sketch_tokens, solution_tokens = 32, 32
    tiny_tokens = dict(sketch=4, solution=4)
    sketch_hint = "one guess: a province, a city and a district of China in Chinese, separated by spaces"
    answer_hint = "Write only the three names, separated by spaces."

    def __post_init__(self):
        lines = DIVISIONS.read_text(encoding="utf-8").splitlines()
        paths = self.paths = [tuple(line.split("\t")) for line in lines]
        check_range(self, treasures=(1, len(paths)), chain=(1, len(paths) // 4), skew=(0, 2), fade=(0.001, 1))
        self.real = frozenset(paths)
        rng = random.Random(f"treasures {self.treasure_seed}")
        self.targets = frozenset(rng.sample(paths, self.treasures))
        self.words = [*self.only_problem.split(), *sorted({name for path in paths for name in path})]
        # the tree: for every beginning of a path those one name longer, in file order
        self.children = defaultdict(dict)
        for path, depth in product(paths, range(3)):
            self.children[path[:depth]][path[: depth + 1]] = None
        # of the child of rank r, from 1
        self.prior = [rank**-self.skew for rank in range(1, 1 + len(paths))]

    def score(self, data, text):
        path = tuple(re.split(r"[\s/>-]+", text.strip())) if len(text) <= MAX_ANSWER else ()
        return judged(path, path in self.targets) if path in self.real else NOTHING

    def demonstrate(self, problem, rng):
        """A chain that spreads and does not repeat, and knows nothing of the treasures.

        At each level the child of rank r (in file order, from 0) is drawn with weight (r + 1) ** -skew * fade ** n,
        where n is how often the chain has been there: where it has been is what the policy learns to look back for.
        """
        visits, chain = Counter(), []
        while len(chain) < self.chain:
            node = ()
            for _ in range(3):
                below = list(self.children[node])
                fades = [self.fade ** visits.get(child, 0) for child in below]
                [node] = rng.choices(below, list(map(mul, self.prior, fades)))
            if not visits[node]:
                visits.update(node[:depth] for depth in (1, 2, 3))
                chain.append(" ".join(node))
        return Demonstration(problem, chain, [])

    def floor(self):
        return self.treasures / len(self.paths)


# ----------------------------------------------------------------------------------------------------------- countdown

OPERATORS = {ast.Add: add, ast.Sub: sub, ast.Mult: mul, ast.Div: truediv}
# the signs of what comes second, and of what comes second within something subtracted or divided by
SIGNS = {ast.Add: "+-", ast.Sub: "-+", ast.Mult: "*/", ast.Div: "/*"}
# difficulty: counts of numbers, the largest number, the largest value of the target and of the steps to it
DIFFICULTIES = dict(easy=((3,), 12, 99), normal=((3, 4), 20, 100), hard=((4,), 99, 999))


def combinations(pool: list, top: int) -> Iterator[tuple[list, str]]:
    """All ways to join two (value, text) by an operation that gives a whole number of 1 to top: (shorter, step)."""
    for (i, (a, left)), (j, (b, right)) in permutations(enumerate(pool), 2):
        values = {"+": a + b, "*": a * b} if i < j else {}
        values |= {"-": a - b, "/": 0 if a % b else a // b}
        rest = [other for k, other in enumerate(pool) if k not in (i, j)]
        for operator, value in values.items():
            if 0 < value <= top:
                joined = value, f"( {left} {operator} {right} )"
                yield [joined, *rest], f"{a} {operator} {b} = {value}"


def combine_at_random(numbers: Sequence[int], top: int, rng: random.Random) -> tuple[int, str]:
    """(value, text) of random combinations that use up all numbers."""
    pool = [(n, str(n)) for n in numbers]
    while len(pool) > 1:
        pool, _ = rng.choice(list(combinations(pool, top)))
    return pool[0][0], pool[0][1][2:-2]


def solve_countdown(numbers: Sequence[int], target: int, top: int = 999) -> dict:
    """Exhaustive search over positive whole values: {first step: one full solution that begins with it and its steps,
    None if there is none}.

    >>> solve_countdown([3, 5], 8)
    {'3 + 5 = 8': ('3 + 5', '3 + 5 = 8'), '3 * 5 = 15': None, '5 - 3 = 2': None}
    """

    def solve(pool, steps):
        if len(pool) == 1:
            return (pool[0][1][2:-2], steps) if pool[0][0] == target else None
        tries = (solve(shorter, f"{steps} {step}") for shorter, step in combinations(pool, top))
        return next(filter(None, tries), None)

    pool = [(n, str(n)) for n in numbers]
    return {step: solve(shorter, step) for shorter, step in combinations(pool, top)}


def parse_expression(text: str) -> ast.expr | None:
    """The syntax tree of whole numbers joined by + - * / and brackets; None for anything else. Nothing is evaluated."""
    text = " ".join(text.translate(str.maketrans("×÷−", "*/-")).split())
    # an operator is a node of its own
    allowed = ast.BinOp, ast.Constant, *OPERATORS
    with suppress(SyntaxError, ValueError, RecursionError, MemoryError):
        if re.fullmatch(r"[0-9+*/() -]{1,256}", text):
            tree = ast.parse(text, mode="eval").body
            return tree if all(isinstance(node, allowed) for node in ast.walk(tree)) else None


def evaluate(node: ast.expr) -> Fraction:
    """The exact value of a tree from parse_expression; ZeroDivisionError where there is none."""
    if isinstance(node, ast.BinOp):
        return OPERATORS[type(node.op)](evaluate(node.left), evaluate(node.right))
    return Fraction(node.value)


def canonical(node: ast.expr) -> str:
    """One spelling for all expressions that differ by order or brackets only.

    >>> canonical(parse_expression("7*(5+3)")), canonical(parse_expression("9-(2-1)"))
    ('(3+5)*7', '1+9-2')
    """
    if isinstance(node, ast.Constant):
        return str(node.value)

    def parts(part, sign):
        signs = SIGNS.get(type(getattr(part, "op", None)), "")
        if sign in signs:
            return parts(part.left, sign) + parts(part.right, signs[sign in "-/"])
        text = canonical(part)
        return [sign + (text if text.isdigit() else f"({text})")]

    return "".join(sorted(parts(node, min(SIGNS[type(node.op)]))))[1:]


@dataclass
class Countdown(Task):
    """Make the target from three or four numbers, each used once. Reward 1; 0.1 for the right numbers, wrong value."""

    difficulty: str = "normal"

    name = "countdown"
    tiny_tokens = dict(sketch=4, solution=32)
    sketch_hint = "the first combination to try: two of the numbers joined by one operation, such as 3 + 5"
    answer_hint = "Use each number exactly once, with + - * / and brackets. You may think inside <think> </think>, then"
    answer_hint += " give the expression, such as <answer> ( 3 + 5 ) * 7 </answer>."

    def __post_init__(self):
        if self.difficulty not in DIFFICULTIES:
            raise ValueError(f"difficulty {self.difficulty!r}: must be one of {', '.join(DIFFICULTIES)}")
        self.counts, self.largest, self.top = DIFFICULTIES[self.difficulty]
        fixed = "Numbers: Target: <think> </think> <answer> </answer> + - * / ( ) ="
        self.words = [*fixed.split(), *map(str, range(1, self.top + 1))]

    def draw(self, rng, keep):
        numbers = [rng.randint(1, self.largest) for _ in range(rng.choice(self.counts))]
        # so that it can be reached
        target, _ = combine_at_random(numbers, self.top, rng)
        if target not in numbers and keep((sorted(numbers), target)):
            shown = " ".join(map(str, numbers))
            return f"Numbers: {shown} Target: {target}", (tuple(numbers), target)

    def score(self, data, text):
        """
        >>> task = Countdown()
        >>> task.score(((3, 5, 7), 56), "<answer> 7 * (3 + 5) = 56 </answer>")
        Outcome(reward=1.0, success=True, key='(3+5)*7', valid=True)
        >>> task.score(((3, 5, 7), 56), "<answer> 7 + 3 + 5 </answer>").reward
        0.1
        """
        numbers, target = data
        # a claimed value has to be the target; any other = makes no expression
        expression = re.sub(rf"=\s*{target}$", "", extract_answer(text))
        tree, used = parse_expression(expression), re.findall("[0-9]+", expression)
        if tree and sorted(map(int, used)) == sorted(numbers):
            with suppress(ZeroDivisionError):
                return judged(canonical(tree), 1.0 if evaluate(tree) == target else 0.1)
        return NOTHING

    def floor(self):
        """Success rate of random combinations of all numbers, four for each problem."""

        def rate(data, rng):
            return fmean(combine_at_random(data[0], self.top, rng)[0] == data[1] for _ in range(4))

        return self.measured("floor", rate)

    def demonstrate(self, problem, rng):
        """A solution step by step. Sketches: all first combinations that lead to one, then combinations that do not."""
        solutions = solve_countdown(*problem.data, self.top)
        firsts = sorted(solutions, key=lambda first: (not solutions[first], rng.random()))[:8]
        sketches = [first.split(" =")[0] for first in firsts]
        return Demonstration(problem, sketches, [write_answer(*solutions[firsts[0]])])


# ----------------------------------------------------------------------------- agents on a grid: Sokoban and FrozenLake


class GridEpisode:
    """Up to max_turns turns of up to turn_actions actions each: `<think>...</think><answer>Up || Left</answer>`.

    A turn without an answer, or with an unknown action in it, does nothing and costs the format penalty; actions beyond
    turn_actions are dropped, as RAGEN does; the thought may be left out. The key is the actions of the way without its
    loops: what did not move, or led back to where one had been, makes no other answer.
    """

    def __init__(self, task: "Grid", problem: Problem):
        self.task, (self.board, self.state, seed) = task, problem.data
        # of the ice: equal for all episodes of a problem
        self.rng = random.Random(seed)
        # of each turn, was it valid?; the actions carried out; {state: the action that led on from it}; what was earned
        self.turns, self.taken, self.way, self.reward = [], [], {}, 0.0

    @property
    def over(self) -> bool:
        spent = len(self.turns) >= self.task.max_turns or len(self.taken) >= self.task.max_actions
        return spent or self.task.ended(self.board, self.state) is not None

    def observe(self) -> str:
        note = "Invalid answer.\n" if self.turns[-1:] == [False] else ""
        return note + self.task.picture(self.board, self.state, self.task.max_actions - len(self.taken))

    def act(self, text: str) -> bool:
        if self.over:
            return True
        actions = self.task.read_actions(text)
        for action in actions[: self.task.turn_actions]:
            if not self.over:
                before = self.state
                [self.state] = self.rng.choices(self.task.moves(self.board, before, action))
                self.reward += self.task.reward(self.board, before, self.state)
                self.taken.append(self.task.actions[action])
                way = [*self.way.items(), (before, self.taken[-1])]
                self.way = dict(takewhile(lambda s: s[0] != self.state, way))
        self.turns.append(bool(actions))
        return self.over

    def outcome(self) -> Outcome:
        reward = round(self.reward - 0.1 * self.turns.count(False), 6)
        success = self.task.ended(self.board, self.state) is True
        key = " ".join(self.way.values()) if self.taken else None
        return Outcome(reward, success, key, bool(self.taken) and all(self.turns))


@dataclass
class Grid(Task):
    """What Sokoban and FrozenLake share. A position is (board, state): a string that stays, and what moves on it.

    room(rng) -> (board, state)                 a random position to start from, solvable or not
    move(board, state, action) -> state         what the action does when it does what it says
    ended(board, state) -> True | False | None  reached the goal, lost, goes on
    reward(board, before, after) -> float
    glyph(board, state, cell) -> str            the picture of a cell
    sketch(board, state, plan) -> str           the method of a plan in a few words, "" if there is nothing to say
    actions, vocabulary, rules, limits          names, all words beside those of the form, text, ranges of the options
    drift                                       what may be added to an action instead of doing it, equally likely
    """

    size: int = 4
    max_turns: int = 5
    turn_actions: int = 5
    max_actions: int = 10

    solution_tokens = 400
    drift = (0,)
    steps = dict(Up=(-1, 0), Down=(1, 0), Left=(0, -1), Right=(0, 1))

    def __post_init__(self):
        check_range(self, max_turns=(1, 100), turn_actions=(1, 100), max_actions=(1, 100), **self.limits)
        self.tiny_tokens = dict(sketch=self.max_actions + 2, solution=2 * self.turn_actions + 4)
        fixed = f"<answer> </answer> || actions left Invalid answer. {self.vocabulary}"
        self.words = [*fixed.split(), *map(str, range(self.max_actions + 1))]
        form = f"Each turn give 1 to {self.turn_actions} of the actions {', '.join(self.actions)}, separated by ||, as"
        self.answer_hint = f"{self.rules} {form} <think> ... </think> <answer> Right || Down </answer>."

    def moves(self, board, state, action) -> list[Hashable]:
        """The next states that may follow, equally likely."""
        return [self.move(board, state, (action + turn) % 4) for turn in self.drift]

    def beside(self, cell: int, action: int) -> int | None:
        """The neighbouring cell in the direction of the action, None beyond the edge."""
        down, right = self.steps[self.actions[action]]
        row, column = cell // self.size + down, cell % self.size + right
        return row * self.size + column if 0 <= row < self.size and 0 <= column < self.size else None

    def picture(self, board, state, left: int) -> str:
        cells = [self.glyph(board, state, cell) for cell in range(self.size**2)]
        return f"{write_grid(cells, self.size)}\n{left} actions left"

    def draw(self, rng, keep):
        board, state = self.room(rng)
        text = self.picture(board, state, self.max_actions)
        if keep(text) and self.plan(board, state, rng):
            return text, (board, state, rng.getrandbits(32))

    def episode(self, problem):
        return GridEpisode(self, problem)

    def read_actions(self, text: str) -> list[int]:
        """The actions of the last answer; [] if there is none or one of them is unknown."""
        names = [part.strip().capitalize() for part in extract_answer(text).split("||")]
        return [self.actions.index(name) for name in names] if set(names) <= set(self.actions) else []

    def plan(self, board, state, rng) -> list[int]:
        """A shortest list of actions to the goal by breadth-first search (ties by rng), as if all moves did what they
        say; [] if max_actions or 50,000 states are not enough."""
        seen, frontier = {state}, [(state, [])]
        # it grows while it is read, until there are too many states
        for before, path in frontier:
            for action in rng.sample(range(4), 4) if len(path) < self.max_actions and len(seen) < 50_000 else ():
                after = self.move(board, before, action)
                if self.ended(board, after):
                    return [*path, action]
                if after not in seen:
                    seen.add(after)
                    frontier.append((after, [*path, action]))
        return []

    def value(self, board: str, pick: Callable) -> Callable:
        """v(state, n): the exact chance of success within n actions; with pick = max the best policy's, with
        pick = fmean that of a uniformly random one."""
        moves = cache(lambda state: [self.moves(board, state, action) for action in range(4)])

        @cache
        def v(state, n):
            if not n or self.ended(board, state) is not None:
                return float(self.ended(board, state) or 0)
            return pick([sum(v(after, n - 1) for after in spread) / len(spread) for spread in moves(state)])

        return v

    def floor(self):
        """The exact success rate of uniformly random actions, on 2,000 fixed validation problems."""
        return self.measured("floor", lambda data, _: self.value(data[0], fmean)(data[1], self.max_actions))

    def ceiling(self):
        """The exact success rate of the best policy that sees the result of each action before it chooses the next."""
        return self.measured("ceiling", lambda data, _: self.value(data[0], max)(data[1], self.max_actions))

    def demonstrate(self, problem, rng):
        """A shortest way, planned anew each turn; the sketches are of this plan, then of others, good and bad."""
        board, start, _ = problem.data
        plans = [self.plan(board, start, rng) for _ in range(6)]
        wild = [rng.choices(range(4), k=rng.randint(min(3, self.max_actions), self.max_actions)) for _ in range(6)]
        sketches = dict.fromkeys(self.sketch(board, start, plan) for plan in [*plans, *wild])
        # on slippery ice as few actions a turn as use up all of them
        stride = self.turn_actions if len(self.drift) == 1 else -(-self.max_actions // self.max_turns)
        episode, turns = self.episode(problem), []
        while not episode.over:
            plan = self.plan(board, episode.state, rng) if turns else plans[0]
            names = [self.actions[action] for action in plan[:stride] or [0]]
            turns.append(write_answer(" || ".join(names)))
            episode.act(turns[-1])
        return Demonstration(problem, [text for text in sketches if text][:6], turns)


@dataclass
class Sokoban(Grid):
    """Push every box onto a target within 10 moves. Each room is solvable within them, checked by search.

    Board: `#` wall, `O` target, `_` floor. State: (the player's cell, the set of the boxes' cells). Rewards: -0.1 a
    move, +1 for a box onto a target and -1 off it, +10 when all are on.
    """

    size: int = 6
    boxes: int = 1
    # share of walls inside the room
    density: float = 0.45

    name = "sokoban"
    actions = "Up", "Down", "Left", "Right"
    # where the player stands to push so
    sides = "Below", "Above", "Right", "Left"
    limits = dict(size=(5, 12), boxes=(1, 4), density=(0, 0.8))
    vocabulary = "# _ O √ X P S Up Down Left Right Below Above from then"
    rules = "Push all boxes X onto targets O by moving into them. # wall, _ floor, P you, S you and √ box on a target."
    sketch_hint = "the sides to push the box from, in order, such as 'from Left then Below' (from Left pushes it right)"

    def room(self, rng):
        """A random walk digs the room, so it is connected."""
        inside = {r * self.size + c for r, c in product(range(1, self.size - 1), repeat=2)}
        room = {cell := rng.choice(sorted(inside))}
        while len(room) < max(2 * self.boxes + 1, round((1 - self.density) * len(inside))):
            if (to := self.beside(cell, rng.randrange(4))) in inside:
                room.add(cell := to)
        player, *places = rng.sample(sorted(room), 2 * self.boxes + 1)
        glyphs = dict.fromkeys(room, "_") | dict.fromkeys(places[: self.boxes], "O")
        board = "".join(glyphs.get(cell, "#") for cell in range(self.size**2))
        return board, (player, frozenset(places[self.boxes :]))

    def move(self, board, state, action):
        player, boxes = state
        to = self.beside(player, action)
        if to in boxes:
            beyond = self.beside(to, action)
            return state if board[beyond] == "#" or beyond in boxes else (to, boxes - {to} | {beyond})
        return state if board[to] == "#" else (to, boxes)

    def ended(self, board, state):
        return all(board[box] == "O" for box in state[1]) or None

    def reward(self, board, before, after):
        was_on, is_on = (sum(board[box] == "O" for box in boxes) for _, boxes in (before, after))
        return -0.1 + is_on - was_on + 10.0 * (is_on == len(after[1]))

    def glyph(self, board, state, cell):
        target = board[cell] == "O"
        return "PS"[target] if cell == state[0] else "X√"[target] if cell in state[1] else board[cell]

    def sketch(self, board, state, plan):
        sides = []
        for action in plan:
            before, state = state, self.move(board, state, action)
            if before[1] != state[1] and sides[-1:] != [self.sides[action]]:
                sides.append(self.sides[action])
        return f"from {' then '.join(sides[:5])}" if sides else ""


@dataclass
class FrozenLake(Grid):
    """Walk to the goal over a frozen lake with holes; on slippery ice only a third of the moves go where they should.

    Dynamics of gymnasium's FrozenLake, on maps with a random start and goal and a path between them. Board: `_` ice,
    `O` hole, `G` goal. State: the player's cell. Reward: 1 at the goal.
    """

    slippery: bool = True
    # share of ice
    frozen: float = 0.8

    name = "frozenlake"
    # gymnasium's order: neighbours in it are at right angles
    actions = "Left", "Down", "Right", "Up"
    vocabulary = "P _ O G X √ Left Down Right Up"
    limits = dict(size=(2, 12), frozen=(0.3, 1))
    sketch_hint = "the route to walk, such as 'Right Right Down'"

    def __post_init__(self):
        slip = "The ice is slippery: a move may go to either side instead." if self.slippery else ""
        self.drift = (-1, 0, 1) if self.slippery else (0,)
        self.rules = f"Walk to the goal G, not into a hole O. P you, _ ice, X you in a hole, √ you at the goal. {slip}"
        super().__post_init__()

    def room(self, rng):
        board = rng.choices("_O", (self.frozen, 1 - self.frozen), k=self.size**2)
        start, goal = rng.sample(range(self.size**2), 2)
        board[start], board[goal] = "_", "G"
        return "".join(board), start

    def move(self, board, state, action):
        to = self.beside(state, action)
        return state if to is None or self.ended(board, state) is not None else to

    def ended(self, board, state):
        return {"G": True, "O": False}.get(board[state])

    def reward(self, board, before, after):
        return float(board[after] == "G")

    def glyph(self, board, state, cell):
        return {"_": "P", "O": "X", "G": "√"}[board[cell]] if cell == state else board[cell]

    def sketch(self, board, state, plan):
        return " ".join(self.actions[action] for action in plan)


# -------------------------------------------------------------------------------------------------------------- sudoku


@cache
def sudoku_peers(size: int) -> list[itemgetter]:
    """For each cell the function that takes the other cells of its row, its column and its box out of a grid."""
    box = isqrt(size)
    places = [(row, col, (row // box, col // box)) for row, col in product(range(size), repeat=2)]
    return [itemgetter(*(b for b, q in enumerate(places) if p != q and any(map(eq, p, q)))) for p in places]


def candidates(grid: Sequence[int], cell: int) -> set[int]:
    """The numbers that no other cell of its row, column and box holds."""
    size = isqrt(len(grid))
    return set(range(1, size + 1)).difference(sudoku_peers(size)[cell](grid))


def solve_sudoku(grid: list[int], rng: random.Random) -> Iterator[list[int]]:
    """All completions of a grid (0: blank) in random order, by search on a blank with the fewest candidates.

    >>> next(solve_sudoku([1, 0, 3, 4, 3, 4, 1, 2, 2, 1, 4, 3, 4, 3, 2, 0], random.Random(0)))
    [1, 2, 3, 4, 3, 4, 1, 2, 2, 1, 4, 3, 4, 3, 2, 1]
    """
    best, options = None, range(len(grid))
    for cell, number in enumerate(grid):
        if not number and len(found := candidates(grid, cell)) < len(options):
            best, options = cell, found
            if len(found) < 2:
                break
    if best is None:
        yield list(grid)
    for number in rng.sample(sorted(options), len(options)) if best is not None else ():
        yield from solve_sudoku([*grid[:best], number, *grid[best + 1 :]], rng)


@dataclass
class Sudoku(Task):
    """Fill the blanks of a 4x4 or 9x9 grid, which has one solution."""

    size: int = 4
    # 0: 6 of 16 cells, or 32 of 81
    blanks: int = 0

    name = "sudoku"
    solution_tokens = 1024
    sketch_hint = "the order in which to fill the blanks, such as 'r1c2 r3c4' (row 1 column 2, then row 3 column 4)"
    answer_hint = "Fill the blanks _ so that each row, column and box holds each number once. You may think first "
    answer_hint += "inside <think> </think>; then give the whole grid, row by row, as <answer> ... </answer>."

    def __post_init__(self):
        if self.size not in (4, 9):
            raise ValueError(f"sudoku: size {self.size}: must be 4 or 9")
        self.blanks = self.blanks or 2 * self.size**2 // 5
        check_range(self, blanks=(1, 5 * self.size**2 // 8))
        self.tiny_tokens = dict(sketch=min(self.blanks, 8) + 1, solution=self.size**2 + 2 * self.blanks + 5)
        self.numbers = "123456789"[: self.size]
        self.cells = [f"r{row}c{column}" for row, column in product(self.numbers, repeat=2)]
        self.words = [*"<think> </think> <answer> </answer> _".split(), *self.numbers, *self.cells]

    def write(self, grid: Sequence[int]) -> str:
        return write_grid([str(number or "_") for number in grid], self.size)

    def draw(self, rng, keep):
        """Blanks are taken one by one from a random full grid. A cell whose number is the only candidate left can go;
        for another cell a search says whether the solution stays the only one."""
        solution = next(solve_sudoku([0] * self.size**2, rng))
        grid = list(solution)
        for cell in rng.sample(range(len(grid)), len(grid)):
            if grid.count(0) < self.blanks:
                grid[cell] = 0
                if len(candidates(grid, cell)) > 1 and len([*islice(solve_sudoku(grid, rng), 2)]) > 1:
                    grid[cell] = solution[cell]
        if grid.count(0) == self.blanks and keep(grid):
            return self.write(grid), (grid, solution)

    def score(self, data, text):
        digits = re.sub(r"[\s|+-]+", "", extract_answer(text))
        form = "".join(str(number or f"[1-{self.size}]") for number in data[0])
        key = re.fullmatch(form, digits) and digits
        return judged(key, digits == "".join(map(str, data[1])))

    def floor(self):
        return self.size**-self.blanks

    def order(self, problem: Problem, rng: random.Random) -> list[int]:
        """The blanks in an order of filling that follows from the grid: next a cell with the fewest candidates."""
        grid, order = list(problem.data[0]), []
        while 0 in grid:
            blanks = [cell for cell, number in enumerate(grid) if not number]
            order.append(min(blanks, key=lambda cell: (len(candidates(grid, cell)), rng.random())))
            grid[order[-1]] = problem.data[1][order[-1]]
        return order

    def demonstrate(self, problem, rng):
        orders = [self.order(problem, rng) for _ in range(6)]
        sketches = dict.fromkeys(" ".join(self.cells[c] for c in order[:8]) for order in orders)
        steps = " ".join(f"{self.cells[cell]} {problem.data[1][cell]}" for cell in orders[0])
        return Demonstration(problem, list(sketches), [write_answer(self.write(problem.data[1]), steps)])


# ---------------------------------------------------------- records: JSONL, hub, reasoning-gym; exact or mathematical


class Record(NamedTuple):
    r"""answer: the reference, what stands in \boxed{} or after ####, or all of it.
    worked: the worked solution, "" if the record has none."""

    question: str
    answer: str
    worked: str


def read_records(source: str) -> list[Record]:
    """The records of a JSONL file; of a data set on the hub or in a folder, owner/name[:config[:split]]; or of one of
    reasoning-gym, gym:name:{its options as JSON}. Read are the forms of GSM8K, MATH or AIME: question or problem, and
    answer or solution, in any case. ValueError that names file, line and rule for a broken one."""
    try:
        if source.startswith("gym:"):
            rows = read_gym(*source.split(":", 2)[1:])
        elif source.endswith((".json", ".jsonl")) or Path(source).is_file():
            rows = map(str.strip, Path(source).read_text(encoding="utf-8-sig").split("\n"))
        else:
            from datasets import load_dataset

            name, config, split = (source.split(":") + ["", ""])[:3]
            rows = load_dataset(name, config or None, split=split or "train")
    except Exception as error:
        # datasets raises what it likes
        if source.startswith("gym:") or isinstance(error, ImportError):
            raise
        raise ValueError(f"{source}: must be a .jsonl file, folder or hub id ({error.__cause__ or error})") from None
    records = [read_record(f"{source}, line {i}", row) for i, row in enumerate(rows, 1) if row]
    if not records:
        raise ValueError(f"{source}: holds no record; give questions with answers")
    return records


def read_gym(name: str, options: str = "{}") -> list[dict]:
    """The problems of a data set of reasoning-gym that have an answer. Right is this answer, even where others would
    do: the data sets' verifiers are never asked, some of them run what they are given as a program."""
    from reasoning_gym.factory import DATASETS, create_dataset

    if name not in DATASETS:
        raise ValueError(f"task gym:{name}: must be one of gym: {', '.join(sorted(DATASETS))}")
    options = check_options(f"gym:{name}", DATASETS[name][1], json.loads(options))
    try:
        rows = create_dataset(name, **dict(seed=0, size=1000) | options)
        found = [row | dict(answer=str(row["answer"])) for row in rows if row["answer"] is not None]
        return [row for row in found if 0 < len(row["answer"].strip()) <= MAX_ANSWER]
    except Exception as error:
        # its data sets assert, or raise what they like
        raise ValueError(f"task gym:{name} with {options}: {error}") from None


def read_record(where: str, row: dict | str) -> Record:
    with suppress(ValueError, TypeError, AttributeError, RecursionError):
        row = json.loads(row) if isinstance(row, str) else row
        row = {key.lower(): value for key, value in row.items()}
        question = row.get("question", row.get("problem"))
        answer = row.get("answer", row.get("solution"))
        final = extract_final(str(answer)) or str(answer).strip()
        if isinstance(question, str) and type(answer) in (str, int, float) and 0 < len(final) <= MAX_ANSWER:
            worked = str(row.get("solution") or answer).strip()
            return Record(question.strip(), final, "" if worked == final else worked)
    raise ValueError(f'{where}: must be a JSON object {{"question": text, "answer": text or number, up to 4 KB}}')


def extract_final(text: str) -> str | None:
    r"""What stands in the last \boxed{...} (braces balanced) or after the last ####; None if neither, or over 4 KB.

    >>> extract_final(r"so \boxed{\frac{1}{2}}."), extract_final("3 + 4 = 7\n#### 7")
    ('\\frac{1}{2}', '7')
    """
    _, boxed, rest = text.rpartition("\\boxed{")
    if boxed:
        depths = list(accumulate({"{": 1, "}": -1}.get(c, 0) for c in rest[: MAX_ANSWER + 1]))
        return rest[: depths.index(-1)].strip() if -1 in depths else None
    _, marked, rest = text.rpartition("####")
    line = rest.partition("\n")[0]
    return line.strip() if marked and len(line) <= MAX_ANSWER else None


# spaces, but for those between digits, and the signs around a number
MATH_NOISE = r"\\[,;!: ]|\\?[$%]|(?<![0-9])\s|\s+(?![0-9\s])"
NUMBER = re.compile(r"-?(?:[0-9]+(?:/0*[1-9][0-9]*|\.[0-9]*)?|\.[0-9]+)")


def plain_text(answer: str) -> str:
    return " ".join(answer.casefold().split())


def plain_math(answer: str) -> str:
    r"""An answer without the spelling that carries no meaning; a number is given in lowest terms.

    >>> [plain_math(a) for a in (r"$1,234.50$", "2/4", "(3, 4)", r"50\%.", "3 and 4")]
    ['2469/2', '1/2', '(3,4)', '50', '3and4']
    """
    text = re.sub(MATH_NOISE, "", answer).rstrip(".")
    if re.fullmatch(r"-?[0-9]{1,3}(,[0-9]{3})+(\.[0-9]+)?", text):
        text = text.replace(",", "")
    return str(Fraction(text)) if NUMBER.fullmatch(text) else text


@cache
def shuffled(n: int, seed: str) -> list[int]:
    return random.Random(seed).sample(range(n), n)


@dataclass
class Records(Task):
    """Questions with one right answer each, from a source of `read_records`.

    exact=True: right is the same text, case and spacing aside. exact=False: right is an equivalent expression, first by
    a plain normaliser, then by math-verify in a process that is killed if it takes too long. validation="": a tenth of
    the questions of train, chosen by hash, is held out.
    """

    train: str = "openai/gsm8k:main:train"
    validation: str = "openai/gsm8k:main:test"
    exact: bool = False

    name = "math"
    sketch_tokens, solution_tokens = 96, 1024
    sketch_hint = "the approach: which method to use and why, in a sentence or two, without carrying it out"

    def __post_init__(self):
        if self.exact:
            kind, _, name = self.train.partition(":")
            self.name = f"gym-{name.partition(':')[0]}" if kind == "gym" else f"jsonl-{Path(self.train).stem}"
        else:
            self.answer_hint = "Reason step by step, and end with the final answer as \\boxed{ ... }."
            importlib.import_module("math_verify")
        every = read_records(self.train)
        tenth = [r for r in every if share_of(plain_text(r.question)) < 0.1]
        held_out = read_records(self.validation) if self.validation else tenth
        asked = {plain_text(r.question) for r in held_out}
        self.records = dict(train=[r for r in every if plain_text(r.question) not in asked], validation=held_out)
        if not all(self.records.values()):
            raise ValueError(f"{self.train}: {len(every)} records leave none for train or for validation; give more")
        shown = (self.demonstrate(Problem(0, r.question, r), random) for r in every + held_out)
        texts = (" ".join([p.text, *sketches, *turns]) for p, sketches, turns in shown)
        self.words = sorted(set(" ".join(texts).split()))
        longest = max(len(f"{r.worked} {r.answer}".split()) for r in every)
        self.tiny_tokens = dict(sketch=16, solution=5 + longest)

    def num_problems(self, split):
        return len(self.records[split])

    def make(self, split, seed, i):
        """The records of a split, shuffled anew for each epoch."""
        records = self.records[split]
        epoch, at = divmod(i, len(records))
        record = records[shuffled(len(records), f"{self.name} {split} {seed} {epoch}")[at]]
        return Problem(i, record.question, record)

    def score(self, data, text):
        answer = not self.exact and extract_final(text) or extract_answer(text)
        key, right = map(plain_text if self.exact else plain_math, (answer, data.answer))
        plain = self.exact or key in ("", right) or NUMBER.fullmatch(key) and NUMBER.fullmatch(right)
        same = key == right if plain else equivalent(data.answer, answer)
        return judged(right if same else key, same)

    def demonstrate(self, problem, rng):
        """The approach is the first sentence of the worked solution, where there is one."""
        _, answer, worked = problem.data
        form = "<answer> {} </answer>" if self.exact else "\\boxed{{ {} }}"
        sketch = " ".join(re.split(r"\. |\n", worked)[0].split()[:15]) or "answer directly"
        return Demonstration(problem, [sketch], [write_answer(answer, worked, form)])


# ------------------------------------------------------------- equivalent expressions, judged in a killable process


# seconds of computing, seconds in all, bytes
TIME_LIMIT, WAIT_LIMIT, MEMORY_LIMIT = 1.5, 10, 4 << 30


@cache
def judge() -> Popen:
    """The process of serve_judge, started when first needed."""
    return Popen([sys.executable, __file__], stdin=PIPE, stdout=PIPE, stderr=DEVNULL, text=True)


def equivalent(right: str, answer: str) -> bool:
    """What math-verify says of two answers; False if that was not found in time."""
    with suppress(OSError, ValueError):
        print(json.dumps([right, answer]), file=judge().stdin, flush=True)
        return int(judge().stdout.readline()) == 1
    judge().kill()
    judge.cache_clear()
    return False


def serve_judge():
    """Two answers as a JSON list per line in, 1 or 0 per line out, for as long as there are lines.

    Nobody bounds the running time of math-verify. It is imported once, and a fork answers each question: the kernel's
    timers kill it when it has taken too long, whatever it is doing; a limit on memory stops the other kind of bomb. Its
    exit code is the verdict.
    """
    import resource

    # libraries may print
    replies, sys.stdout = sys.stdout, sys.stderr
    from math_verify import LatexExtractionConfig, parse, verify

    # LaTeX only: the other extractor of math-verify hands its text to a parser that evaluates
    options = dict(extraction_config=[LatexExtractionConfig()], fallback_mode="no_fallback", parsing_timeout=None)

    def same(answers):
        sides = [parse(f"${text.replace('$', '')}$", **options) for text in answers]
        return all(sides) and verify(*sides, timeout_seconds=None)

    # fills the caches of the parser before the first fork
    same(["\\frac{1}{2}", "0.5"])
    for line in sys.stdin:
        if not (child := os.fork()):
            # no clean-up and no traceback: this is a copy of the server
            with suppress(BaseException):
                resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
                signal.setitimer(signal.ITIMER_PROF, TIME_LIMIT)
                signal.alarm(WAIT_LIMIT)
                os._exit(same(json.loads(line)))
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(max(0, status), file=replies, flush=True)


# ---------------------------------------------------------------------------------------------------------- make a task

TASKS = {task.name: task for task in (Synthetic, Countdown, Sokoban, FrozenLake, Sudoku, Records)}


def make_task(name: str, /, **options) -> Task:
    """A task by name: one of TASKS, jsonl:FILE, gym:NAME or FILE.py:CLASS. ValueError lists the names for an unknown
    name, and the options for an unknown option.

    >>> make_task("countdown", difficulty="easy").problems("train", seed=0)[0].text.split()[0]
    'Numbers:'
    """
    kind, _, source = name.partition(":")
    try:
        # its options travel in the name of the source
        if kind == "gym" and source:
            source, options = f"{name}:{json.dumps(options)}", {}
        if kind in ("jsonl", "gym") and source:
            cls = partial(Records, train=source, validation="", exact=True)
        elif file := re.fullmatch(r"(.*\.py):?(\w*)", name):
            cls = load_class(*file.groups())
        elif not (cls := TASKS.get(name)):
            names = f"{', '.join(TASKS)}, jsonl:FILE, gym:NAME, FILE.py:CLASS"
            raise ValueError(f"task {name!r}: must be one of {names}")
        return cls(**check_options(name, cls, options))
    except (ImportError, SyntaxError) as error:
        raise ValueError(f"task {name!r}: {error}; mend it, or pip install it") from None


def load_class(path: str, name: str) -> type:
    """A task of the user's own."""
    if Path(path).is_file():
        spec = importlib.util.spec_from_file_location(f"task_{Path(path).stem}", path)
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        if Task in getattr(found := getattr(module, name, None), "__mro__", ()):
            return found
    raise ValueError(f"task {path}:{name}: no such file or Task")


def check_options(name: str, cls: Callable, options: dict) -> dict[str, Any]:
    """The options of a task by the signature of its class; a command line's text becomes the type of the default."""
    parameters, checked = inspect.signature(cls).parameters, dict(options)
    for option, value in options.items():
        if option not in parameters:
            raise ValueError(f"task {name!r} has no option {option!r}: it has {', '.join(parameters) or 'none'}")
        kind = type(parameters[option].default)
        if isinstance(value, str) and kind in (bool, int, float):
            try:
                checked[option] = dict(true=True, false=False)[value.lower()] if kind is bool else kind(value)
            except (ValueError, KeyError):
                raise ValueError(f"task {name!r}, option {option}={value!r}: must be {kind.__name__}") from None
    return checked


if __name__ == "__main__":
    serve_judge()
