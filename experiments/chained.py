"""Puzzles whose answers are drawn in sequence: a chain of answers to one problem, where a repeat earns 0.

    python train.py --task experiments/chained.py:FrozenLake --num_sketches 8 --baseline chain --rarity 0

In tasks.py the sketches of a puzzle are plans, and each is solved. Here the answers themselves see those before them,
as the guesses of the synthetic task do: so a chain of K answers costs as many tokens as K i.i.d. ones. What changes is
the number of stages and the demonstrations: chains of different answers, the shortest way (or a right expression)
first, so that the first answer of a chain is a good one and the plain prompt is its beginning.
"""

from dataclasses import dataclass

import tasks
from tasks import Demonstration, write_answer

CHAIN = 8


@dataclass
class FrozenLake(tasks.FrozenLake):
    """The whole walk in one answer; the ice is not slippery. A chain: shortest walks, then any others."""

    slippery: bool = False
    max_turns: int = 1
    turn_actions: int = 10

    name, two_stage = "chained-frozenlake", False

    def __post_init__(self):
        super().__post_init__()
        self.tiny_tokens = dict(sketch=2 * self.turn_actions + 3, solution=2 * self.turn_actions + 3)

    def demonstrate(self, problem, rng):
        board, start, _ = problem.data
        plans = [self.plan(board, start, rng) for _ in range(6)]
        wild = [rng.choices(range(4), k=rng.randint(3, self.max_actions)) for _ in range(CHAIN)]
        walks = [*dict.fromkeys(map(tuple, plans + wild))][:CHAIN]
        answers = [write_answer(" || ".join(self.actions[action] for action in walk)) for walk in walks]
        return Demonstration(problem, answers, [])


@dataclass
class Countdown(tasks.Countdown):
    """A chain: all right expressions that differ by more than order and brackets, then tries that miss the target."""

    difficulty: str = "easy"

    name, two_stage = "chained-countdown", False
    tiny_tokens = dict(sketch=32, solution=32)

    def ways(self, pool: list, steps: tuple = ()):
        """All combinations of the numbers: (value, expression, steps)."""
        if len(pool) == 1:
            yield pool[0][0], pool[0][1][2:-2], " ".join(steps)
        for shorter, step in tasks.combinations(pool, self.top) if len(pool) > 1 else ():
            yield from self.ways(shorter, (*steps, step))

    def demonstrate(self, problem, rng):
        numbers, target = problem.data
        found = list(self.ways([(n, str(n)) for n in numbers]))
        chain = {}
        for value, expression, steps in sorted(found, key=lambda way: (way[0] != target, rng.random())):
            if len(chain) < CHAIN:
                key = tasks.canonical(tasks.parse_expression(expression))
                chain.setdefault(key, write_answer(expression, steps))
        return Demonstration(problem, list(chain.values()), [])
