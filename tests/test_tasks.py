"""Tasks against independent oracles, hostile strings, and the promises of tasks.py."""

import builtins
import doctest
import json
import random
import subprocess
import sys
import time
from collections import Counter, deque
from fractions import Fraction
from itertools import islice, product
from math import comb
from pathlib import Path
from statistics import fmean, median

import pytest

import tasks
from tasks import NOTHING, Outcome, Problem, Record, make_task, play

ROOT = Path(__file__).parent.parent
GENERATED = [
    ("countdown", {}), ("countdown", {"difficulty": "easy"}), ("countdown", {"difficulty": "hard"}), ("sokoban", {}),
    ("sokoban", {"boxes": 2}), ("frozenlake", {}), ("frozenlake", {"slippery": False}), ("sudoku", {}),
    ("sudoku", {"size": 9}),
]
IDS = ["-".join([name, *map(str, options.values())]) for name, options in GENERATED]
every_generated = pytest.mark.parametrize("name, options", GENERATED, ids=IDS)
RECORDS = [{"question": f"What is {i} + {i}?", "answer": f"Add them.\n#### {2 * i}"} for i in range(60)]


def first(task, n, split="validation", seed=0):
    problems = task.problems(split, seed)
    return [problems[i] for i in range(n)]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def math_task(tmp_path):
    pytest.importorskip("math_verify")
    task = make_task("math", train=write_jsonl(tmp_path / "train.jsonl", RECORDS), validation="")
    yield task
    tasks.judge().kill()
    tasks.judge.cache_clear()


def test_the_examples_in_the_docstrings():
    assert doctest.testmod(tasks).attempted >= 10
    assert doctest.testmod(tasks).failed == 0


def test_tasks_load_no_tensor_library():
    code = "import sys, tasks; tasks.make_task('countdown'); print('torch' in sys.modules, 'numpy' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True).split() == ["False", "False"]


# ---------------------------------------------------------------------------------- problems, splits and demonstrations


@every_generated
def test_a_problem_is_a_function_of_seed_split_and_index(name, options):
    forwards, backwards = make_task(name, **options), make_task(name, **options)
    ahead = first(forwards, 12, "train", 3)
    back = [backwards.problems("train", 3)[i] for i in reversed(range(12))]
    assert ahead == back[::-1]
    assert [p.text for p in ahead] != [p.text for p in first(forwards, 12, "train", 4)]
    assert len({p.text for p in ahead}) > 6


@every_generated
def test_train_and_validation_share_no_problem(name, options):
    task, n = make_task(name, **options), 25 if options.get("size") == 9 or name == "sokoban" else 400

    def canonical(problem):
        return (tuple(sorted(problem.data[0])), problem.data[1]) if name == "countdown" else problem.text

    train = {canonical(p) for seed in (0, 1) for p in first(task, n, "train", seed)}
    assert train.isdisjoint(canonical(p) for seed in (0, 1) for p in first(task, n, "validation", seed))


@pytest.mark.parametrize("share", [0.1, pytest.param(1, marks=pytest.mark.slow)])
@every_generated
def test_1000_problems_are_made_in_5_seconds_or_30(name, options, share):
    start = time.process_time()
    first(make_task(name, **options), int(1000 * share))
    assert time.process_time() - start < share * (30 if name == "sokoban" or options.get("size") == 9 else 5)


@every_generated
def test_demonstrations_succeed_in_the_words_and_limits_of_the_task(name, options):
    task, words = make_task(name, **options), set(make_task(name, **options).words)
    training = task.problems("train", random.Random(7).getrandbits(32))
    for problem, sketches, turns in islice(task.demonstrations(random.Random(7)), 15):
        assert problem == training[problem.index]
        assert play(task, problem, turns).success and 1 <= len(turns) <= task.max_turns
        assert len(set(sketches)) == len(sketches) >= 1
        assert {word for text in (problem.text, *sketches, *turns) for word in text.split()} <= words
        assert max(len(sketch.split()) for sketch in sketches) < task.tiny_tokens["sketch"]
        assert max(len(turn.split()) for turn in turns) < task.tiny_tokens["solution"]
        assert play(task, problem, [" ".join(turn.split()) for turn in turns]).success  # as a tiny policy writes it


def random_turn(task, rng, data=None):
    """Of a policy that is well-formed and blind to the goal."""
    if task.name == "sudoku":
        return f"<answer>{task.write([number or rng.randint(1, task.size) for number in data[0]])}</answer>"
    if task.name == "countdown":
        return f"<answer>{tasks.combine_at_random(data[0], task.top, rng)[1]}</answer>"
    return f"<answer>{' || '.join(rng.choices(task.actions, k=task.turn_actions))}</answer>"


def test_observations_stay_in_the_vocabulary():
    for name in "sokoban", "frozenlake":
        task, rng = make_task(name), random.Random(0)
        for problem in first(task, 40):
            episode, over = task.episode(problem), False
            assert episode.observe() == problem.text
            while not over:
                over = episode.act(rng.choice([random_turn(task, rng), "no answer"]))
                assert set(episode.observe().split()) <= set(task.words)


def test_solver_demonstrations_that_always_fail_end_in_an_error():
    task = make_task("countdown", difficulty="easy")
    task.score = lambda data, text: NOTHING
    with pytest.raises(ValueError, match="1,000 demonstrations in a row failed"):
        next(task.demonstrations(random.Random(0)))


# ----------------------------------------------------------------------------------------------------- hostile strings


def hostile(flag: Path) -> list[str]:
    """Strings made to fool, crash or stall a verifier; the code in them would create the file `flag`."""
    code = f"__import__('pathlib').Path({str(flag)!r}).touch()"
    inner = [
        "", " ", "\0", "\ud800", "½ + ¼", "１２ + ３", "٣ + ٤", "1 ⁄ 2", "3 ＋ 5", "Ⅷ", "1e999999999", "nan", "0x10",
        "1_0", "9**9**9**9", "9^{9^{9^{9}}}", "1/0", "8/(3-3)", "--1", "+1", "3 5", "3(5)", "3//5", "3 % 5", "007",
        "1." * 999, "(" * 3000, ")" * 3000, "(" * 3000 + "1" + ")" * 3000, "-" * 4000 + "1", "1" + "+1" * 2000,
        "[" * 999, "{" * 999, "9" * 4096, "9" * 4097, "9" * 4096 + "x", "1" + ",111" * 1000, "\\frac{" * 600,
        "\\text{" * 600, "\\sqrt{" * 600, code, f"[{code}]", f"eval({code!r})", f"{{{code}}}", f"lambda: {code}",
        f"@{code}", f"`touch {flag}`", f"$({code})", "Up ||" * 800, "|| || ||", "Up | Left", "UP||left",
        "Up\nLeft", "Up || Sideways", "Up || ", "r1c1 4", "_ " * 81, "1 2 3 4 " * 4, "1" * 16, "1" * 81, "0" * 81,
        "¹" * 16, "<answer>", "</answer>", "</think>", "None", "#### 4",
    ]
    outer = ["<answer>{}</answer>", "<answer>{}", "{}</answer>", "\\boxed{{{}}}", "\\boxed{{{}", "#### {}", "{}"]
    outer += ["</answer>{}<answer>", "<answer><answer>{}</answer></answer>", "<answer>1</answer><answer>{}</answer>"]
    return [form.format(text) for form in outer for text in inner]


def huge() -> list[str]:
    size = 10**7
    pieces = ["a", " ", "\0", "9", "<answer>", "</answer>", "</answer", "<answer>1</answer>", "\\boxed{", "####", "||"]
    return [piece * (size // len(piece)) for piece in pieces] + [f"<answer>{'(' * size}</answer>", "٣" * size]


def mutate(text: str, rng: random.Random) -> str:
    for _ in range(rng.randint(1, 4)):
        at, to = sorted(rng.choices(range(len(text) + 1), k=2))
        insert = rng.choice(
            ["", text[at:to], "\0", "٣", "**", "(", "</answer>", "<answer>", "||", "=", chr(rng.randrange(1, 0xD7FF))]
        )
        text = text[:at] + insert + text[rng.choice([at, to]) :]
    return text


def attack(task, n: int, flag: Path, limit: float, clock=time.process_time, giants: int = 13):
    """n hostile, mutated and huge strings, each scored at once as an Outcome within the limit, in seconds."""
    rng = random.Random(0)
    problems = first(task, 20, "train")
    shown = [demonstration for demonstration in (task.demonstrate(problem, rng) for problem in problems)]
    good = [text for demonstration in shown for text in demonstration.turns or demonstration.sketches]
    fixed = huge()[:giants] + hostile(flag)
    for i in range(n):
        text = fixed[i] if i < giants else rng.choice(fixed[giants:]) if i % 2 else mutate(rng.choice(good), rng)
        episode = task.episode(rng.choice(problems))
        start = clock()
        over = episode.act(text)
        assert clock() - start < limit, text[:80]
        outcome = episode.outcome()
        assert type(over) is bool and type(outcome) is Outcome
        assert type(outcome.reward) is float and type(outcome.success) is bool and type(outcome.valid) is bool
        assert outcome.key is not None or not (outcome.valid or outcome.success)
        hash(outcome.key)
    assert not flag.exists()


@pytest.fixture
def no_evaluation(monkeypatch):
    def refuse(*_):
        raise AssertionError("a verifier called eval or exec")

    "".encode("utf-8-sig")  # so that its codec is loaded, which takes an exec
    monkeypatch.setattr(builtins, "eval", refuse)
    monkeypatch.setattr(builtins, "exec", refuse)


@pytest.mark.parametrize("n", [1000, pytest.param(10_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["synthetic", "countdown", "sokoban", "frozenlake", "sudoku", "jsonl"])
def test_hostile_strings_give_an_outcome_in_time(name, n, tmp_path, no_evaluation):
    source = f"jsonl:{write_jsonl(tmp_path / 'r.jsonl', RECORDS)}" if name == "jsonl" else name
    attack(make_task(source), n, tmp_path / "flag", 0.05)


def test_hostile_strings_against_math(math_task, tmp_path, monkeypatch):
    """The scan, the extraction and the normaliser on 1,000 strings; whatever is then unsure is for the judge, below."""
    monkeypatch.setattr(tasks, "equivalent", lambda right, answer: False)
    attack(math_task, 1000, tmp_path / "flag", 2.0)


@pytest.mark.slow
def test_hostile_strings_against_math_and_its_judge(math_task, tmp_path):
    assert tasks.equivalent("1", "1")  # loads the library, which takes longer
    # by the clock on the wall, which other work may slow down; of computing it gets 1.5 s
    attack(math_task, 1000, tmp_path / "flag", tasks.WAIT_LIMIT + 1, time.monotonic)


slow = pytest.mark.slow


@pytest.mark.parametrize("name", ["decimal_arithmetic", "countdown", "puzzle24", "polynomial_multiplication"])
def test_hostile_strings_against_reasoning_gym(name, tmp_path, monkeypatch):
    """Some of these sets have verifiers that run text as a program: they are never asked."""
    data_set, _ = pytest.importorskip("reasoning_gym.factory").DATASETS[name]
    monkeypatch.setattr(data_set, "score_answer", lambda *_: pytest.fail("a verifier of theirs was asked"))
    task = make_task(f"gym:{name}", size=50)
    attack(task, 1000, tmp_path / "flag", 0.05)


def test_an_answer_over_4_kb_is_invalid_unread():
    task = make_task("countdown")
    data = ((3, 5, 7), 56)
    assert task.score(data, f"<answer>(3+5)*7{' ' * 4000}</answer>").success
    assert task.score(data, f"<answer>(3+5)*7{' ' * 4090}</answer>") == NOTHING
    assert tasks.extract_final("\\boxed{" + "9" * 4096 + "}") and tasks.extract_final("#### " + "9" * 4090)
    assert tasks.extract_final("\\boxed{" + "9" * 4097 + "}") is tasks.extract_final("#### " + "9" * 4097) is None


# ------------------------------------------------------------------------------------------------------------- synthetic


def test_the_paths_of_china():
    task = make_task("synthetic", treasure_seed=1)
    assert len(task.real) == 3056 and len({p[:2] for p in task.real}) == 342 and len({p[0] for p in task.real}) == 31
    assert len(task.targets) == 20 and task.targets <= task.real
    assert task.targets == make_task("synthetic", treasure_seed=1).targets != make_task("synthetic").targets
    assert not task.two_stage and len(task.problems("train", 0)) == 1
    assert task.floor() == 20 / 3056
    treasure = next(iter(task.targets))
    problem = task.problems("train", 5)[0]
    for text in " ".join(treasure), " - ".join(treasure), " / ".join(treasure), f"\n{'  '.join(treasure)}\t":
        assert play(task, problem, [text]) == Outcome(1.0, True, treasure, True)
    other = next(iter(task.real - task.targets))
    assert play(task, problem, [" ".join(other)]) == Outcome(0.0, False, other, True)
    for text in "", treasure[0], " ".join(treasure[:2]), " ".join([*treasure, "x"]), " ".join(treasure[::-1]):
        assert play(task, problem, [text]) == NOTHING


@pytest.mark.parametrize("skew", [0.0, 0.5, 1.0])
def test_demonstrated_chains_follow_the_prior_and_do_not_repeat(skew):
    task = make_task("synthetic", skew=skew, fade=1)
    provinces, seen = list(dict.fromkeys(path[0] for path in task.paths)), Counter()
    for _, sketches, turns in islice(task.demonstrations(random.Random(0)), 600):
        assert turns == [] and len(set(sketches)) == 16
        assert all(play(task, Problem(0, "", None), [sketch]).valid for sketch in sketches)
        seen.update(sketch.split()[0] for sketch in sketches)
    weights = [(rank + 1) ** -skew for rank in range(31)]
    assert seen[provinces[4]] / 9600 == pytest.approx(weights[4] / sum(weights), rel=0.2)
    assert seen[provinces[30]] / 9600 == pytest.approx(weights[30] / sum(weights), rel=0.25)


def test_demonstrated_chains_spread_out():
    """Of 16 independent draws from the prior some 4 would be of a province visited before."""

    def provinces(fade):
        chains = islice(make_task("synthetic", fade=fade).demonstrations(random.Random(0)), 300)
        return fmean(len({sketch.split()[0] for sketch in chain.sketches}) for chain in chains)

    assert provinces(1) < 12.5 < 14.5 < provinces(0.1) < provinces(0.01)


# ------------------------------------------------------------------------------------------------------------- countdown


def reachable(numbers: tuple[Fraction, ...]) -> dict[Fraction, int]:
    """All values of all expressions that use each number once; an oracle that shares no code with the solver."""
    if len(numbers) == 1:
        return {numbers[0]: 1}
    found = Counter()
    for bits in range(1, 2 ** len(numbers) - 1):
        left = tuple(n for i, n in enumerate(numbers) if bits >> i & 1)
        right = tuple(n for i, n in enumerate(numbers) if not bits >> i & 1)
        for a, b in product(reachable(left), reachable(right)):
            found.update([a + b, a - b, a * b] + ([a / b] if b else []))
    return found


@pytest.mark.parametrize("difficulty", tasks.DIFFICULTIES)
def test_countdown_agrees_with_exhaustive_search(difficulty):
    task = make_task("countdown", difficulty=difficulty)
    rng = random.Random(0)
    for problem in first(task, 30):
        numbers, target = problem.data
        values = reachable(tuple(map(Fraction, numbers)))
        assert target in values
        solutions = tasks.solve_countdown(numbers, target, task.top)
        assert any(solutions.values())
        for start, (expression, steps) in ((start, found) for start, found in solutions.items() if found):
            assert task.score(problem.data, f"<answer>{expression}</answer>").success
            sides = [side.split() for side in steps.split(" = ")]  # a + b, value c * d, ..., target
            parts = [" ".join(side[-3:]) for side in sides[:-1]]
            values_of_steps = [int(side[0]) for side in sides[1:]]
            assert [tasks.evaluate(tasks.parse_expression(part)) for part in parts] == values_of_steps
            assert steps.startswith(start) and values_of_steps[-1] == target
            assert len(parts) == len(numbers) - 1 and max(values_of_steps) <= task.top
        impossible = next(n for n in range(1, 10**6) if n not in values)
        assert not any(tasks.solve_countdown(numbers, impossible).values())
        for _ in range(20):
            tree, value = random_tree([Fraction(n) for n in numbers], rng)
            outcome = task.score(problem.data, f"<answer>{tree}</answer>")
            if value is None:
                assert outcome == NOTHING
            else:
                assert value in values and outcome.success == (value == target)
                assert outcome.reward == (1.0 if value == target else 0.1)
                assert task.score((numbers, impossible), f"<answer>{tree}</answer>").reward == 0.1


def random_tree(numbers, rng):
    """(text, value) of a random expression, with brackets everywhere; value None if it divides by zero."""
    if len(numbers) == 1:
        return str(numbers[0]), numbers[0]
    rng.shuffle(numbers)
    at = rng.randrange(1, len(numbers))
    (left, a), (right, b) = random_tree(numbers[:at], rng), random_tree(numbers[at:], rng)
    operator = rng.choice("+-*/")
    text = f"({left}{operator}{right})"
    if a is None or b is None or (operator == "/" and b == 0):
        return text, None
    return text, {"+": a + b, "-": a - b, "*": a * b, "/": a / b if b else None}[operator]


@pytest.mark.parametrize(
    "answer, reward",
    [
        ("( 3 + 5 ) * 7", 1.0), ("(3+5)*7=56", 1.0), ("(3+5)×7 = 56", 1.0), ("7*(5+3) = 57", 0.0),
        ("(3+5)*7 = 8*7 = 56", 0.0), ("3+5*7", 0.1), ("3*7/5", 0.1), ("(3+5)*7*1", 0.0), ("(3+5)*(7)", 1.0),
        ("3+5", 0.0), ("(3+3)*7", 0.0), ("35 + 7", 0.0), ("3 5 + 7", 0.0), ("-(3+5)*-7", 0.0), ("3**5*7", 0.0),
        ("3//5*7", 0.0), ("5 * 7 / (3 - 3)", 0.0), ("3.0+5+7", 0.0), ("", 0.0),
    ],
)
def test_countdown_rewards(answer, reward):
    score = make_task("countdown").score
    assert score(((3, 5, 7), 56), f"<think>so</think><answer>{answer}</answer>").reward == reward
    assert score(((3, 5, 7), 56), f"<answer>3+5+7</answer> no: <answer>{answer}</answer>").reward == reward
    assert score(((3, 5, 7), 56), answer) == NOTHING  # without the tags
    assert score(((3, 3, 7), 1), "<answer>7/(3-3)</answer>") == NOTHING  # the right numbers, no value, no exception


def test_countdown_keys_are_equal_for_equal_expressions():
    def key(text):
        return tasks.canonical(tasks.parse_expression(text))

    for a, b in ("1+2+3", "3+(2+1)"), ("4-(1-2)", "2+4-1"), ("8/(4/2)", "8*2/4"), ("(1+2)*3", "3*(2+1)"):
        assert key(a) == key(b)
    for a, b in ("1-2", "2-1"), ("1+2*3", "(1+2)*3"), ("8/4/2", "8/(4/2)"), ("1*2+3*4", "1*3+2*4"):
        assert key(a) != key(b)


# ------------------------------------------------------------------------------------------------- Sokoban and FrozenLake


class Warehouse:
    """Sokoban a second time, on a board of characters."""

    MOVES = {"Up": (-1, 0), "Down": (1, 0), "Left": (0, -1), "Right": (0, 1)}

    def __init__(self, picture: str):
        self.rows = [row.split() for row in picture.split("\n") if row[0] in "#_OXP√S"]

    def find(self, glyphs):
        return [(r, c) for r, row in enumerate(self.rows) for c, glyph in enumerate(row) if glyph in glyphs]

    def put(self, at, normal, on_target):
        self.rows[at[0]][at[1]] = on_target if self.rows[at[0]][at[1]] in "O√S" else normal

    def move(self, name) -> float:
        dr, dc = self.MOVES[name]
        (r, c), was = self.find("PS")[0], len(self.find("√"))
        ahead, behind = (r + dr, c + dc), (r + 2 * dr, c + 2 * dc)
        glyph = self.rows[ahead[0]][ahead[1]]
        if glyph != "#" and (glyph not in "X√" or self.rows[behind[0]][behind[1]] in "_O"):
            if glyph in "X√":
                self.put(behind, "X", "√")
            self.put(ahead, "P", "S")
            self.put((r, c), "_", "O")
        return -0.1 + len(self.find("√")) - was + (0 if self.find("X") else 10)

    def shortest(self) -> int:
        """Moves of a shortest solution, by breadth-first search over pictures."""
        queue, seen = deque([(self.rows, 0)]), set()
        while queue:
            rows, depth = queue.popleft()
            for name in self.MOVES:
                self.rows = [list(row) for row in rows]
                self.move(name)
                if not self.find("X"):
                    return depth + 1
                if (now := str(self.rows)) not in seen:
                    seen.add(now)
                    queue.append((self.rows, depth + 1))
        return 99


@pytest.mark.parametrize("boxes", [1, 2])
def test_sokoban_agrees_with_a_second_simulator_and_breadth_first_search(boxes):
    task, rng = make_task("sokoban", boxes=boxes), random.Random(0)
    for problem in first(task, 60 // boxes**2):
        board, state, _ = problem.data
        assert len(task.plan(board, state, rng)) == Warehouse(problem.text).shortest() <= 10
        for _ in range(4):
            episode, second, total = task.episode(problem), Warehouse(problem.text), 0.0
            names = rng.choices(task.actions, k=10)
            for turn in range(0, 10, 5):
                episode.act(f"<think>x</think><answer>{' || '.join(names[turn : turn + 5])}</answer>")
            for name in episode.taken:
                assert second.find("X")
                total += second.move(name)
            assert episode.observe().split("\n")[:-1] == [" ".join(row) for row in second.rows]
            assert episode.outcome().reward == pytest.approx(total)
            assert episode.outcome().success == (not second.find("X"))


def test_sokoban_is_about_as_hard_as_ragens():
    task = make_task("sokoban")
    problems = first(task, 300)
    assert 3 <= median(len(task.plan(*p.data[:2], random.Random(0))) for p in problems) <= 6
    assert 0.14 <= fmean(task.value(p.data[0], fmean)(p.data[1], 10) for p in problems) <= 0.24
    assert all(task.value(p.data[0], max)(p.data[1], 10) == 1 for p in problems[:50])


@pytest.mark.slow
def test_floor_and_ceiling_of_sokoban(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert 0.14 <= make_task("sokoban").floor() <= 0.24
    assert make_task("sokoban").ceiling() == 1.0


ROOM = "# # # # # #\n# P X _ O #\n# _ _ _ _ #\n# _ _ _ _ #\n# _ _ _ _ #\n# # # # # #"


def room(text=ROOM):
    cells = text.split()
    at = {glyph: [i for i, cell in enumerate(cells) if cell == glyph] for glyph in "PX"}
    board = "".join("_" if cell in "PX" else cell for cell in cells)
    return Problem(0, "", (board, (at["P"][0], frozenset(at["X"])), 0))


def test_turns_of_an_agent():
    task = make_task("sokoban")
    right = Outcome(10.8, True, "Right Right", True)
    assert play(task, room(), ["<think> push </think> <answer> Right || Right </answer>"]) == right
    assert play(task, room(), ["<answer>RIGHT||right||Up||Up</answer>"]) == right  # over at the goal
    assert play(task, room(), ["<answer> Right </answer>", "<answer> Right </answer>"]) == right
    # a turn without an answer, or with one unknown action, does nothing, costs 0.1 and a turn
    for bad in (
        "Right || Right", "<answer> Right || Jump </answer>", "<answer></answer>", "<answer> Right Right </answer>",
    ):
        outcome = play(task, room(), [bad, "<answer> Right || Right </answer>"])
        assert outcome == Outcome(10.7, True, "Right Right", False)
        episode = task.episode(room())
        episode.act(bad)
        assert episode.observe().startswith("Invalid answer.\n# # #") and episode.observe().endswith("10 actions left")
    assert play(task, room(), ["x"] * 9) == Outcome(-0.5, False, None, False)  # five turns
    # a turn ends after five actions, an episode after ten
    seven = "<answer>" + "||".join(["Down"] * 7) + "</answer>"
    episode = task.episode(room())
    assert not episode.act(seven) and episode.taken == ["Down"] * 5
    assert episode.act(seven) and episode.act("anything") and episode.taken == ["Down"] * 10
    assert episode.outcome() == Outcome(-1.0, False, "Down Down Down", True)  # the fourth is into the wall
    # a box pushed off its target
    off = play(task, room(ROOM.replace("P X _ O", "P _ X O")), ["<answer>Right||Right||Left||Left</answer>"])
    assert off.reward == pytest.approx(-0.1 * 2 + 1 + 10)
    two = ROOM.replace("P X _ O", "P X O _").replace("# _ _ _ _ #\n# # #", "# _ X O _ #\n# # #")
    assert play(make_task("sokoban", boxes=2), room(two), ["<answer>Right||Right</answer>"]).reward == pytest.approx(
        -0.2
    )


@pytest.mark.parametrize(
    "ways, key",
    [
        (["Right || Right", "Up || Right || Up || Right", "Right || Left || Right || Right"], "Right Right"),
        (["Right || Down || Up || Right", "Down || Up || Right || Right"], "Right Right"),
        (["Down || Right || Right || Up", "Down || Left || Right || Right || Up"], "Down Right Right Up"),
        (["Left", "Up || Up", "Right || Left", ""], ""),
    ],
)
def test_bumps_and_loops_do_not_make_another_answer(ways, key):
    """P _ G in the first row: what hits the edge, or comes back to where it was, is no other way to the goal."""
    task = make_task("frozenlake", slippery=False, size=3)
    for way in ways:
        outcome = play(task, Problem(0, "", ("__G______", 0, 0)), [f"<answer>{way}</answer>"] if way else [])
        assert outcome.success == bool(key) and outcome.key == (key if way else None)


def test_the_search_for_a_plan_gives_up():
    """Four boxes in an open room of 10 x 10 have millions of positions."""
    task, cells = make_task("sokoban", size=12, boxes=4, density=0, max_actions=100), range(144)
    board = "".join("_" if 0 < c // 12 < 11 and 0 < c % 12 < 11 else "#" for c in cells)
    assert task.plan(board, (13, frozenset((40, 42, 64, 66))), random.Random(0)) == []


@pytest.mark.parametrize("name", ["frozenlake", "sokoban"])
@pytest.mark.parametrize("most", [1, 2])
def test_a_grid_that_allows_one_or_two_actions_has_demonstrations(name, most):
    task = make_task(name, max_actions=most)
    shown = next(task.demonstrations(random.Random(0)))
    assert play(task, shown.problem, shown.turns).success


def test_frozenlake_has_gymnasiums_transitions():
    toy_text = pytest.importorskip("gymnasium.envs.toy_text.frozen_lake")
    for slippery, size in product([True, False], [4, 5]):
        task = make_task("frozenlake", slippery=slippery, size=size)
        for problem in first(task, 15):
            board, start, _ = problem.data
            cells = board[:start] + "S" + board[start + 1 :]
            desc = [cells[at : at + size].replace("_", "F").replace("O", "H") for at in range(0, size**2, size)]
            theirs = toy_text.FrozenLakeEnv(desc=desc, is_slippery=slippery).unwrapped.P
            for state, action in product(range(size**2), range(4)):
                expected, found, rewards = Counter(), Counter(), {}
                for probability, after, reward, _ in theirs[state][action]:
                    expected[after] += probability
                    rewards[after] = reward
                ends = task.moves(board, state, action)
                for after in ends:
                    found[after] += 1 / len(ends)
                    if task.ended(board, state) is None:
                        assert task.reward(board, state, after) == rewards[after]
                assert found.keys() == expected.keys()
                assert all(found[after] == pytest.approx(expected[after]) for after in found)


def test_frozenlake_floor_and_ceiling_and_their_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    slippery, firm = make_task("frozenlake"), make_task("frozenlake", slippery=False)
    assert abs(slippery.floor() - 0.212) < 0.02 and abs(firm.floor() - 0.212) < 0.02
    assert abs(slippery.ceiling() - 0.483) < 0.02 and firm.ceiling() == 1.0
    found = slippery.floor()
    monkeypatch.setattr(tasks.FrozenLake, "value", None)  # from now on only the cache can answer
    assert make_task("frozenlake").floor() == found and len(list(tmp_path.glob("sesa/*"))) == 4
    with pytest.raises(TypeError):
        make_task("frozenlake", frozen=0.7).floor()


def test_a_task_whose_file_is_gone_or_edited_has_a_floor_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    file = tmp_path / "lake.py"
    source = "import tasks\nclass Lake(tasks.FrozenLake):\n    def measured(self, what, rate):\n"
    source += "        return super().measured(what, lambda data, rng: {})\n"
    # of different lengths: Python takes a file of the same second and size for the one that it has compiled
    for value in (0.25, 0.5):
        file.write_text(source.replace("{}", str(value)))
        task = make_task(f"{file}:Lake")
        file.unlink()
        assert task.floor() == value


def test_floors_are_what_random_policies_reach():
    rng = random.Random(0)
    for name, options in ("frozenlake", {}), ("sokoban", {}), ("sudoku", {"blanks": 2}):
        task = make_task(name, **options)
        problem = first(task, 1)[0]
        if name == "sudoku":
            exact = task.floor()
            assert exact == 1 / 16
        else:
            exact = task.value(problem.data[0], fmean)(problem.data[1], 10)
        seeds = iter(range(10**6))  # other ice each time
        tries = [
            Problem(0, "", (*problem.data[:2], next(seeds)) if name != "sudoku" else problem.data) for _ in range(3000)
        ]
        turns = [[random_turn(task, rng, p.data) for _ in range(task.max_turns)] for p in tries]
        assert fmean(play(task, *tried).success for tried in zip(tries, turns)) == pytest.approx(exact, abs=0.03)


def test_the_floor_of_countdown_is_what_the_verifier_says(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    task, rng = make_task("countdown", difficulty="easy"), random.Random(5)
    problems = first(task, 1000, seed=9) * 2
    again = fmean(play(task, p, [random_turn(task, rng, p.data)]).success for p in problems)
    assert 0.02 < task.floor() < 0.2 and task.floor() == pytest.approx(again, abs=0.02)
    assert task.ceiling() == 1.0


def test_slippery_ice_is_the_same_for_all_episodes_of_a_problem_and_slips_two_times_in_three():
    task, went = make_task("frozenlake", frozen=1.0, size=9), Counter()
    for problem in first(task, 600):
        board, start, seed = problem.data
        centre = Problem(0, "", ("_" * 80 + "G", 40, seed))
        ends = []
        for _ in range(2):
            episode = task.episode(centre)
            episode.act("<answer>Left</answer>")
            ends.append(episode.state)
        assert ends[0] == ends[1]
        went[ends[0]] += 1
    assert set(went) == {39, 31, 49} and all(abs(n - 200) < 60 for n in went.values())


# ---------------------------------------------------------------------------------------------------------------- sudoku


def fill_in_order(grid, size, cell=0):
    """All completions, cell by cell from the first: slow, plain, and nothing like the solver of tasks.py."""
    if cell == size**2:
        yield list(grid)
        return
    box = int(size**0.5)
    for number in [grid[cell]] if grid[cell] else range(1, size + 1):
        row, column = divmod(cell, size)
        clashes = (
            grid[other] == number
            for other in range(size**2)
            if other != cell
            and (
                other // size == row
                or other % size == column
                or (other // size // box, other % size // box) == (row // box, column // box)
            )
        )
        if not any(clashes):
            kept, grid[cell] = grid[cell], number
            yield from fill_in_order(grid, size, cell + 1)
            grid[cell] = kept


@pytest.mark.parametrize("size, blanks, n", [(4, 6, 150), (4, 10, 100), (9, 32, 6), (9, 50, 2)])
def test_sudoku_has_one_solution_by_a_second_solver(size, blanks, n):
    task = make_task("sudoku", size=size, blanks=blanks)
    for problem in first(task, n):
        grid, solution = problem.data
        assert grid.count(0) == blanks == problem.text.split().count("_")
        assert list(fill_in_order(list(grid), size)) == [solution]
        answer = "<answer>\n" + " | ".join(map(str, solution)) + "\n</answer>"
        assert play(task, problem, [answer]) == Outcome(1.0, True, "".join(map(str, solution)), True)


def test_sudoku_scores_every_filling_of_a_grid():
    task = make_task("sudoku", blanks=4)
    problem = first(task, 1)[0]
    grid, solution = problem.data
    blanks, right = [cell for cell, number in enumerate(grid) if not number], 0
    for numbers in product(range(1, 5), repeat=4):
        filled = list(grid)
        for cell, number in zip(blanks, numbers, strict=True):
            filled[cell] = number
        outcome = play(task, problem, [f"<answer>{task.write(filled)}</answer>"])
        assert outcome.valid and outcome.success == (filled == solution) == any(fill_in_order(list(filled), 4))
        right += outcome.success
    assert right == 1
    given = next(cell for cell, number in enumerate(grid) if number)
    changed = [*solution[:given], solution[given] % 4 + 1, *solution[given + 1 :]]
    for text in task.write(changed), problem.text, "1 2 3", "5" * 16, task.write(solution) + " 1":
        assert play(task, problem, [f"<answer>{text}</answer>"]) == NOTHING


# --------------------------------------------------------------------------------------------------------- records, maths


def test_records_of_a_file_are_split_shuffled_and_repeated(tmp_path):
    rows = [{"question": f"q{i} \u2028 ?", "answer": i} for i in range(200)]
    task = make_task(f"jsonl:{write_jsonl(tmp_path / 'my records.jsonl', rows)}")
    train, validation = task.problems("train", 0), task.problems("validation", 0)
    assert len(train) + len(validation) == 200 and 5 < len(validation) < 50 and task.name == "jsonl-my records"
    assert {p.text for p in train}.isdisjoint(p.text for p in validation)
    epochs = [[train[epoch * len(train) + i].text for i in range(len(train))] for epoch in (0, 1)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted({p.text for p in train}) and epochs[0] != epochs[1]
    assert epochs[0] != [p.text for p in task.problems("train", 1)]
    problem = train[0]
    assert play(task, problem, [f"<think>?</think><answer> {problem.data.answer}\n</answer>"]).success
    assert not play(task, problem, ["<answer>-1</answer>"]).success and not play(task, problem, ["-1"]).valid
    assert set(problem.text.split()) <= set(task.words)


def test_a_question_spelt_otherwise_does_not_leak_into_validation(tmp_path):
    forms = [form for i in range(100) for form in (f"What is {i} + 1?", f"what is {i}  + 1?")]
    file = write_jsonl(tmp_path / "twice.jsonl", [{"question": form, "answer": "x"} for form in forms])
    sums = [{r.question.split()[2] for r in part} for part in make_task(f"jsonl:{file}").records.values()]
    assert all(sums) and not set.intersection(*sums)


@pytest.mark.parametrize("returned", [0.0, Outcome(float("nan"), False, "a", True)])
def test_a_score_that_cannot_be_trained_on_is_named(returned):
    class Mine(tasks.Countdown):
        def score(self, data, text):
            return returned  # would be taken for nothing found, or skip every update, for ever

    task = Mine()
    with pytest.raises(ValueError, match="score returned .*, no finite Outcome"):
        play(task, task.problems("train", 0)[0], ["<answer> 1 </answer>"])


def test_a_validation_file_is_kept_apart(tmp_path):
    train = write_jsonl(tmp_path / "a.jsonl", [{"question": f"q{i}", "answer": "Yes"} for i in range(20)])
    held = write_jsonl(tmp_path / "b.jsonl", [{"question": f"q{i}", "answer": "yes"} for i in range(15, 25)])
    task = make_task(f"jsonl:{train}", validation=held)
    assert len(task.problems("train", 0)) == 15 and len(task.problems("validation", 0)) == 10
    assert play(task, task.problems("train", 0)[0], ["<answer> YES </answer>"]) == Outcome(1.0, True, "yes", True)


@pytest.mark.parametrize(
    "line",
    [
        "{", "[]", "5", '{"question": "q"}', '{"answer": "a"}', '{"question": 1, "answer": "a"}',
        '{"question": "q", "answer": null}',
    ]
    + ['{"question": "q", "answer": true}', '{"question": "q", "answer": ["a"]}', "[" * 5000, "nonsense"],
)
def test_a_broken_line_is_named(line, tmp_path):
    file = tmp_path / "broken.jsonl"
    file.write_text('{"question": "q", "answer": "a"}\n\n' + line + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r'broken\.jsonl, line 3: must be a JSON object {"question"'):
        make_task(f"jsonl:{file}")


def test_files_that_cannot_be_records(tmp_path):
    empty, binary = tmp_path / "empty.jsonl", tmp_path / "binary.jsonl"
    empty.write_text("\n")
    binary.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="empty.jsonl: holds no record"):
        make_task(f"jsonl:{empty}")
    with pytest.raises(ValueError, match="binary.jsonl: must be a .jsonl file"):
        make_task(f"jsonl:{binary}")
    with pytest.raises(ValueError, match="missing.jsonl: must be a .jsonl file"):
        make_task(f"jsonl:{tmp_path / 'missing.jsonl'}")
    one = write_jsonl(tmp_path / "one.jsonl", RECORDS[:1])
    with pytest.raises(ValueError, match="leave none for train or for validation"):
        make_task(f"jsonl:{one}")


def test_the_forms_of_gsm8k_math_and_aime(tmp_path):
    rows = [
        {"question": "gsm8k", "answer": "She has 3 + 4 = <<3+4=7>>7.\n#### 7"},
        {"problem": "math", "level": 1, "solution": "First. Thus $x = \\boxed{\\frac{1}{2}}$."},
        {"ID": "2024-I-1", "Problem": "aime", "Solution": "Walk. \\boxed{204}", "Answer": 204},
    ]
    records = {r.question: r for r in tasks.read_records(write_jsonl(tmp_path / "forms.jsonl", rows))}
    assert records["gsm8k"] == Record("gsm8k", "7", rows[0]["answer"])
    assert records["math"] == Record("math", "\\frac{1}{2}", rows[1]["solution"])
    assert records["aime"] == Record("aime", "204", rows[2]["Solution"])


def test_records_of_a_folder(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [{"question": "one", "answer": "#### 7"}, {"question": "two", "answer": "Add.\n#### 8"}]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "mine" / "train.parquet")
    assert tasks.read_records(str(tmp_path / "mine"))[1] == Record("two", "8", rows[1]["answer"])
    (tmp_path / "broken").mkdir()
    write_jsonl(tmp_path / "broken" / "train.jsonl", rows)
    with open(tmp_path / "broken" / "train.jsonl", "a") as file:
        file.write('{"question": ')
    with pytest.raises(ValueError, match=r"broken: must be a \.jsonl file, folder or hub id \(JSON"):
        tasks.read_records(str(tmp_path / "broken"))


def equivalent_pairs() -> list[tuple[str, str]]:
    pairs = [
        (str(n), form.format(n)) for n in range(3, 13) for form in ("{}.0", "${}$", "\\frac{{{0}0}}{{10}}", "x = {}")
    ]
    pairs += [(f"\\sqrt{{{n * n * 3}}}", f"{n}\\sqrt{{3}}") for n in range(2, 8)]
    pairs += [(f"\\frac{{1}}{{\\sqrt{{{n}}}}}", f"\\frac{{\\sqrt{{{n}}}}}{{{n}}}") for n in (2, 3, 5, 7)]
    pairs += [(f"(x+{n})^2", f"x^2+{2 * n}x+{n * n}") for n in range(1, 9)]
    pairs += [(f"{n}\\pi", f"\\pi \\cdot {n}") for n in range(2, 8)] + [
        (f"10^{{{n}}}", "1" + "0" * n) for n in range(2, 8)
    ]
    pairs += [(f"\\binom{{{n}}}{{2}}", str(comb(n, 2))) for n in range(4, 8)]
    pairs += [
        (f"\\frac{{{n}}}{{4}}", form) for n in (1, 3, 5) for form in (str(n / 4), f"{n}/4", f"\\dfrac{{{n * 2}}}{{8}}")
    ]
    pairs += [
        ("1,234", "1234"), ("12\\text{ cm}", "12"), ("(1, 2)", "\\left(1,2\\right)"), ("90^\\circ", "90"),
        ("50\\%", "50"),
    ]
    pairs += [
        ("\\{1, 2, 3\\}", "\\{3, 1, 2\\}"), ("2^{10}", "1024"), ("e^{2\\ln 3}", "9"), ("\\sin^2 x + \\cos^2 x", "1"),
    ]
    pairs += [
        ("x^2 - 1", "(x-1)(x+1)"), ("\\frac{x+1}{2}", "\\frac{x}{2}+\\frac{1}{2}"),
        ("-\\frac{1}{3}", "\\frac{-1}{3}"),
    ]
    pairs += [
        ("[0, 1)", "[0,1)"), ("0.5", ".5"), ("\\frac12", "0.5"), ("a+b", "b+a"), ("2(a+b)", "2a+2b"), ("7.", "7"),
        ("-0", "0"),
    ]
    pairs += [
        ("2\\frac{1}{2}", "2.5"), ("\\text{Evelyn}", "\\text{Evelyn}"), ("(\\text{A})", "(A)"),
        ("3 \\text{ or } 4", "4 \\text{ or } 3"), ("5", "4+1"), ("1\\,234", "1234"),
    ]  # fmt: skip
    return pairs


def test_math_agrees_with_200_pairs_of_answers(math_task):
    same = equivalent_pairs()
    different = [(a, f"{b} + 1") for a, b in same if not set(b) & set("=[{(\\")][:60]
    different += [(str(n), str(n + 1)) for n in range(30)] + [
        (f"\\frac{{1}}{{{n}}}", f"\\frac{{1}}{{{n + 1}}}") for n in range(2, 12)
    ]
    different += [
        ("2\\frac{1}{2}", "10.5"), ("\\frac{21}{2}", "2\\frac{1}{2}"), ("(\\text{A})", "(\\text{B})"), ("34", "3 4"),
        ("3 \\text{ and } 4", "34"),
    ]  # fmt: skip
    different += [
        ("x+1", "x+2"), ("\\sqrt{2}", "\\sqrt{3}"), ("(1, 2)", "(2, 1)"), ("[0, 1)", "(0, 1]"), ("a+b", "a-b"),
    ]
    different += [
        ("\\pi", "3.14"), ("1/3", "0.33"), ("\\{1, 2\\}", "\\{1, 3\\}"), ("x^2", "x^3"), ("12", "twelve"), ("7", ""),
    ]
    assert len(same) >= 100 and len(different) >= 100

    def judged(right, answer):
        return math_task.score(Record("?", right, ""), f"so \\boxed{{1}}, no: \\boxed{{{answer}}}").success

    assert math_task.score(Record("?", "5", ""), "\\boxed{4+1}").key == "5"  # no other answer than 5 itself
    wrongly_refused = [pair for pair in same if not judged(*pair)]
    wrongly_accepted = [pair for pair in different if judged(*pair)]
    assert not wrongly_refused and not wrongly_accepted


def test_the_judge_kills_what_takes_too_long_and_recovers(math_task):
    assert tasks.equivalent("\\sqrt{8}", "2\\sqrt{2}")
    helper = tasks.judge()
    for bomb in "9^{9^{9^{9}}}", "100000000000!", "(" * 2000:
        start = time.monotonic()
        assert not tasks.equivalent("\\sqrt{8}", bomb)
        assert time.monotonic() - start < tasks.WAIT_LIMIT  # on a busy machine 1.5 s of computing take longer
    assert tasks.equivalent("\\sqrt{8}", "2\\sqrt{2}") and tasks.judge() is helper  # only forks were killed
    helper.kill()
    helper.wait()
    assert not tasks.equivalent("1", "1")  # the helper was lost: this answer is, too
    assert tasks.equivalent("\\sqrt{8}", "2\\sqrt{2}")


def test_the_judge_kills_what_only_waits():
    """No verifier of ours does; the clock of the wall is for those that would."""
    pytest.importorskip("math_verify")
    serve = "import math_verify, tasks, time; tasks.WAIT_LIMIT = 1; usual = math_verify.parse; "
    serve += "math_verify.parse = lambda text, **how: time.sleep(60) if text == '$7$' else usual(text, **how); "
    start, lines = time.monotonic(), '["1", "1"]\n["1", "7"]\n["1", "1"]\n'
    command = [sys.executable, "-c", serve + "tasks.serve_judge()"]
    done = subprocess.run(command, input=lines, capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.stdout == "1\n0\n1\n" and time.monotonic() - start < 20


# ---------------------------------------------------------------------------------------------------------- reasoning-gym


def test_problems_of_a_set_that_cannot_be_used_are_left_out(monkeypatch):
    factory = pytest.importorskip("reasoning_gym.factory")
    answers = ["two", 3, None, "", " ", "x" * 5000, 0]
    rows = [dict(question=f"q {i}", answer=answer) for i, answer in enumerate(answers)]
    monkeypatch.setattr(factory, "create_dataset", lambda name, **options: rows)
    assert [row["answer"] for row in tasks.read_gym("chain_sum")] == ["two", "3", "0"]


@pytest.mark.parametrize("name", ["word_sorting", "knights_knaves", "codeio"])
def test_right_is_the_answer_of_the_data_set(name):
    pytest.importorskip("reasoning_gym")
    task = make_task(f"gym:{name}", size=200)
    train, validation = first(task, 30, "train"), first(task, 30)
    assert {p.text for p in train}.isdisjoint(p.text for p in validation)
    assert all(play(task, p, task.demonstrate(p, None).turns).success for p in train)
    assert task.name == f"gym-{name}" and {word for p in train + validation for word in p.text.split()} <= set(task.words)
    assert play(task, train[0], [f"<answer>  {train[0].data.answer.upper()} </answer>"]).success
    for problem in train[:5]:
        wrong = play(task, problem, ["<answer> surely not </answer>"])
        assert (wrong.reward, wrong.success, wrong.valid) == (0.0, False, True)


def test_options_of_reasoning_gym():
    pytest.importorskip("reasoning_gym")
    task = make_task("gym:fraction_simplification", size="40", min_value="29", max_value=30)
    problems = [problem for split in ("train", "validation") for problem in task.problems(split, 0)]
    assert len(problems) == 40 and all("29" in p.data.answer and "30" in p.data.answer for p in problems)
    for options, text in (
        ({"nonsense": 1}, "has no option 'nonsense'"), ({"min_value": "x"}, "must be int"),
        ({"min_value": -5}, "with"),
    ):
        with pytest.raises(ValueError, match=text):
            make_task("gym:fraction_simplification", **options)
    with pytest.raises(ValueError, match="must be one of gym: ab, acre"):
        make_task("gym:nonsense")


# ------------------------------------------------------------------------------------------- options and tasks of your own


@pytest.mark.parametrize(
    "name, options, text",
    [
        ("chess", {}, "must be one of synthetic, countdown, sokoban, frozenlake, sudoku, math, jsonl:FILE, gym:"),
        ("countdown", {"level": 1}, "task 'countdown' has no option 'level': it has difficulty"),
        ("countdown", {"difficulty": "x"}, "difficulty 'x': must be one of easy, normal, hard"),
        ("synthetic", {"treasures": 0}, "treasures 0: must be between 1 and 3056"),
        ("synthetic", {"skew": "-1"}, "skew -1.0: must be between 0 and 2"),
        ("sokoban", {"size": 3}, "size 3: must be between 5 and 12"),
        ("sokoban", {"boxes": "two"}, "option boxes='two': must be int"),
        ("frozenlake", {"slippery": "maybe"}, "option slippery='maybe': must be bool"),
        ("frozenlake", {"max_turns": 0}, "max_turns 0: must be between 1 and 100"),
        ("sudoku", {"size": 6}, "size 6: must be 4 or 9"),
        ("sudoku", {"blanks": 16}, "blanks 16: must be between 1 and 10"),
        ("nowhere.py:Mine", {}, "no such file"),
        ("train.py:Config", {}, "task train.py:Config: no such file or Task"),
    ],
)
def test_wrong_options_say_what_is_right(name, options, text):
    with pytest.raises(ValueError) as error:
        make_task(name, **options)
    assert text in str(error.value) and "\n" not in str(error.value)


def test_options_come_as_text_from_a_command_line():
    assert make_task("frozenlake", slippery="false", frozen="0.9", size="5") == make_task(
        "frozenlake", slippery=False, frozen=0.9, size=5
    )
    with pytest.raises(ValueError, match="split 'test': must be 'train' or 'validation'"):
        make_task("countdown").problems("test", 0)


EXAMPLE = '''
from dataclasses import dataclass

from tasks import NOTHING, Demonstration, Outcome, Task, extract_answer


@dataclass
class Reverse(Task):
    """Write a few letters backwards."""

    length: int = 5  # an option: --task_options length=7

    name = "reverse"
    sketch_hint = "the letters that the answer begins with"
    tiny_tokens = dict(sketch=3, solution=12)

    def __post_init__(self):
        self.words = ["Reverse:", "<answer>", "</answer>", *"abcdefgh"]

    def draw(self, rng, keep):
        letters = rng.choices("abcdefgh", k=self.length)
        return (f"Reverse: {' '.join(letters)}", letters) if keep(letters) else None

    def score(self, data, text):
        found = (extract_answer(text) or "").split()
        right = found == data[::-1]
        return Outcome(float(right), right, " ".join(found), True) if len(found) == len(data) else NOTHING

    def demonstrate(self, problem, rng):
        answer = problem.data[::-1]
        return Demonstration(problem, [" ".join(answer[:2])], [f"<answer> {' '.join(answer)} </answer>"])
'''


def test_the_readme_shows_this_example():
    assert EXAMPLE.strip() in (ROOT / "README.md").read_text(encoding="utf-8") and len(EXAMPLE.split("\n")) < 40


def test_a_task_of_your_own(tmp_path):
    file = tmp_path / "my_task.py"
    file.write_text(EXAMPLE)
    task = make_task(f"{file}:Reverse", length="4")
    assert task.length == 4 and task.floor() is None and task.ceiling() == 1.0
    train, validation = first(task, 200, "train"), first(task, 200)
    assert {p.text for p in train}.isdisjoint(p.text for p in validation)
    for problem, sketches, turns in islice(task.demonstrations(random.Random(0)), 20):
        assert play(task, problem, turns).success and not play(task, problem, ["<answer> a </answer>"]).valid
        assert {word for text in (problem.text, *sketches, *turns) for word in text.split()} <= set(task.words)
    with pytest.raises(ValueError, match="Missing: no such file or Task"):
        make_task(f"{file}:Missing")


def test_a_task_that_python_cannot_read_is_named_with_its_line(tmp_path):
    (file := tmp_path / "mine.py").write_text("class Mine\n    pass\n")
    with pytest.raises(ValueError, match="mine.py:Mine.*mine.py, line 1"):
        make_task(f"{file}:Mine")
