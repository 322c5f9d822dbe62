"""Puzzles, tiny policy: what each way of drawing and training buys in pass@1, and what it costs in pass@8.

    python experiments/tasks.py --workers 2                      # run what is missing in tasks.jsonl, then draw
    python experiments/tasks.py --tasks countdown --seeds 0      # a part of it
    python experiments/tasks.py --draw                           # only draw, from the committed results

Every arm of a task starts from the same warm-started base and gets the same number of steps and of answers, 16 problems
x 8 a step (or 32 x 4, 64 x 2); what sketches cost in tokens and seconds is in the table. Success is that of the plain
prompt, without a sketch, on 512 validation problems x 8 answers that are the same for all, at five points of training.
"In sequence": 8 answers to each problem, each after a sketch that sees the sketches before it; not measured where an
arm draws fewer. "Above GRPO": see `frontier`. "Transfer gap": success after sketches in sequence less that of the plain
prompt. One (task, arm, seed) is one run of train.py, resumed if it was interrupted; its result is one line of
tasks.jsonl, which counts as long as its flags are those below.
"""

import argparse
import math
import statistics
from operator import itemgetter
from pathlib import Path

import runs

HERE = Path(__file__).parent
RESULTS, PICTURE = HERE / "tasks.jsonl", HERE / "tasks.png"
TASKS = {
    "frozenlake": "--task frozenlake --task_options slippery=false --steps 160 --eval_every 40",
    "countdown": "--task countdown --task_options difficulty=easy --steps 400 --eval_every 100",
    "sudoku": "--task sudoku --steps 120 --eval_every 30",
    "sokoban": "--task sokoban --steps 120 --eval_every 30",
}
COMMON = "--problems_per_step 16 --eval_problems 512 --eval_samples 8 --eval_k 1 8 --learning_rate 3e-4"
GRPO = "--method grpo --num_sketches 8"
OF_4 = "--method grpo --num_sketches 4 --problems_per_step 32 --kl_coef 0.05"
OF_2 = "--method grpo --num_sketches 2 --problems_per_step 64 --kl_coef 0.05"
SESA = "--num_sketches 8 --kl_coef 0.05"
MIXED = "--num_direct 4 --num_sketches 4 --kl_coef 0.05"
HALF = "--sketch_context distill --distill_coef 0.1"
LATE = "--num_direct 6 --num_sketches 2 --kl_coef 0.05"
ARMS = {
    "grpo": (f"{GRPO} --kl_coef 0.05", "GRPO"),
    "grpo-kl0.001": (f"{GRPO} --kl_coef 0.001", "GRPO, KL 0.001"),
    "grpo-kl0.2": (f"{GRPO} --kl_coef 0.2", "GRPO, KL 0.2"),
    "grpo-passk": (f"{GRPO} --kl_coef 0.05 --advantage_scale passk --pass_k 4 --pass_k_end 1", "GRPO, pass@k, 4 to 1"),
    "grpo-zero": (f"{GRPO} --kl_coef 0.05 --repeats zero", "GRPO, repeats earn 0"),
    "grpo-zero-kl0.001": (f"{GRPO} --kl_coef 0.001 --repeats zero", "GRPO, repeats earn 0, KL 0.001"),
    "grpo-zero-4": (f"{OF_4} --repeats zero", "GRPO, repeats earn 0, G 4"),
    "grpo-zero-2": (f"{OF_2} --repeats zero", "GRPO, repeats earn 0, G 2"),
    "grpo-4": (OF_4, "GRPO, G 4"),
    "distill": (f"{SESA} --sketch_context distill --distill_coef 1", "SESA, distill"),
    "imitate": (f"{SESA} --sketch_context imitate", "SESA, imitate"),
    "is": (f"{SESA} --sketch_context is", "SESA, importance weights"),
    "keep": (f"{SESA} --sketch_context keep", "SESA, keep"),
    "drop": (f"{SESA} --sketch_context drop --learning_rate 1e-4", "SESA, drop (the paper)"),
    "mixed": (f"{MIXED} {HALF}", "half direct, half sketched (default)"),
    "mixed-kl0.2": (f"{MIXED} --kl_coef 0.2 {HALF}", "half sketched, KL 0.2"),
    "mixed-iid": (f"{MIXED} {HALF} --sketches iid", "half sketched, i.i.d. sketches"),
    "mixed-zero": (f"{MIXED} {HALF} --repeats zero", "half sketched, repeats earn 0"),
    "mixed-zero-iid": (f"{MIXED} {HALF} --repeats zero --sketches iid", "half sketched, i.i.d., repeats earn 0"),
    "mixed-zero-4": (
        f"{MIXED} {HALF} --repeats zero --num_direct 2 --num_sketches 2 --problems_per_step 32",
        "half sketched, repeats earn 0, G 4",
    ),
    "stuck": (f"{MIXED} --explore stuck --sketch_context imitate", "sketches where stuck, imitate"),
    "stuck-distill": (f"{MIXED} --explore stuck {HALF}", "sketches where stuck, distill 0.1"),
    "stuck-iid": (f"{MIXED} --explore stuck --sketch_context imitate --sketches iid", "where stuck, i.i.d. sketches"),
    "stuck-6": (f"{LATE} --explore stuck --sketch_context imitate", "2 sketches where 6 answers are stuck, imitate"),
}
# how an arm's name begins: its colour in the picture, and what these arms have in common
FAMILIES = {
    "grpo-zero": ("tab:green", "GRPO, a repeat earns 0"),
    "grpo": ("tab:blue", "GRPO"),
    "mixed-zero": ("tab:red", "SESA, half of a group through sketches, a repeat earns 0"),
    "mixed": ("tab:orange", "SESA, half of a group through sketches"),
    "stuck": ("tab:brown", "SESA, sketches where direct answers are stuck"),
    "": ("tab:purple", "SESA, all through sketches"),
}


def flags(task: str, arm: str, seed: int) -> list[str]:
    given = dict(pair for pair in pairs(f"{TASKS[task]} {COMMON} {ARMS[arm][0]} --seed {seed}"))
    return [word for name, values in given.items() for word in (name, *values)]


def pairs(text: str) -> list[tuple[str, list[str]]]:
    """("--eval_k 1 8 --seed 0") -> [("--eval_k", ["1", "8"]), ("--seed", ["0"])]; the last of a flag counts."""
    return [(f"--{part.split()[0]}", part.split()[1:]) for part in text.split("--") if part.strip()]


def results() -> dict[tuple[str, str, int], dict]:
    found = runs.results(RESULTS, ("task", "arm", "seed"))
    return {cell: row for cell, row in found.items() if cell[1] in ARMS and row["flags"] == flags(*cell)}


def run(task: str, arm: str, seed: int, folder: Path) -> None:
    row = runs.train(folder / f"{task}-{arm}-{seed}", flags(task, arm, seed))
    names = ("avg@n", "pass@k", "unique_success", "valid")
    if "curve" in row:
        row["curve"] = [
            dict(step=step) | {kind: {name: e[name] for name in names} for kind, e in evaluation.items()}
            for step, evaluation in row["curve"]
        ]
    runs.append(RESULTS, dict(task=task, arm=arm, seed=seed, flags=flags(task, arm, seed)) | row)


def line(rows: dict, task: str, arm: str) -> list[tuple[float, float]]:
    """(pass@1, pass@8), %, of an arm at each evaluation, in the mean over its seeds."""
    curves = [row["curve"] for (*cell, _), row in rows.items() if cell == [task, arm] and "curve" in row]
    points = ([point(evaluation) for evaluation in at_once] for at_once in zip(*curves, strict=True))
    return [tuple(map(statistics.fmean, zip(*seeds, strict=True))) for seeds in points]


def point(evaluation: dict) -> tuple[float, float]:
    return 100 * evaluation["iid"]["avg@n"], 100 * evaluation["iid"]["pass@k"]["8"]


def frontier(rows: dict, task: str) -> list[tuple[float, float]]:
    """What GRPO reaches without SESA's rewards: the upper hull of all points of the lines of its arms, from the highest
    one on. Between two of its corners lies a coin for each problem, which of two policies answers it: pass@1 and pass@8
    of that are means of theirs."""
    plain = {arm for t, arm, _ in rows if t == task and arm.startswith("grpo") and "zero" not in arm}
    hull: list[tuple[float, float]] = []
    for new in sorted({p for arm in plain for p in line(rows, task, arm)}):
        while len(hull) > 1 and is_below(hull[-1], hull[-2], new):
            hull.pop()
        hull.append(new)
    return hull[hull.index(max(hull, key=itemgetter(1))) :] if hull else []


def is_below(p: tuple[float, float], left: tuple[float, float], right: tuple[float, float]) -> bool:
    """Whether p is not above the straight line between the others."""
    return (p[1] - left[1]) * (right[0] - left[0]) <= (right[1] - left[1]) * (p[0] - left[0])


def above(hull: list[tuple[float, float]], x: float, y: float) -> float:
    """How far pass@8 = y is above the frontier at pass@1 = x; beyond its ends, above the nearest; nan without one.

    >>> above([(40.0, 90.0), (60.0, 80.0)], 50.0, 86.0)
    1.0
    """
    if not hull:
        return math.nan
    x = min(max(x, hull[0][0]), hull[-1][0])
    for (a, high), (b, low) in zip(hull, hull[1:], strict=False):
        if a <= x <= b:
            return y - high - (low - high) * (x - a) / (b - a)
    return y - hull[0][1]


def table(rows: dict) -> str:
    head = ["arm", "pass@1", "pass@8", "pass@8 above GRPO", "different right of 8", "pass@8 in sequence"]
    head += ["transfer gap", "valid", "tokens, k", "seconds"]
    parts = []
    for task in TASKS:
        lines, base, hull = [], {}, frontier(rows, task)
        for arm, (_, title) in ARMS.items():
            mine = {seed: row for (*cell, seed), row in sorted(rows.items()) if cell == [task, arm]}
            good = {seed: row for seed, row in mine.items() if "curve" in row}
            base = good | base
            command = f"`--tasks {task} --arms {arm}`"
            if good:
                cost = [f"{statistics.fmean(row['generated_tokens'] for row in good.values()) / 1e3:.0f}"]
                cost += [f"{statistics.fmean(row['seconds'] for row in good.values()):.0f}", command]
                lines.append([title, *cells([row["curve"][-1] for row in good.values()], hull), *cost])
            for seed, row in mine.items():
                if "failed" in row:
                    lines.append([f"{title}, seed {seed}", f"failed: {row['failed']}", *[""] * 8, command])
        if base:
            one = next(iter(base.values()))
            measured = cells([base[seed]["curve"][0] for seed in sorted(base)], hull)
            lines.insert(0, ["the base, before training", *measured, "-", "-", "-"])
            title = f"**{task}** (%; floor {100 * one['floor']:.1f}, ceiling {100 * one['ceiling']:.1f})"
            parts.append(f"{title}\n\n{runs.table([*head, 'again'], lines)}")
    return "\n".join(parts)


def cells(points: list[dict], hull: list[tuple[float, float]]) -> list[str]:
    once, of_8 = zip(*map(point, points), strict=True)
    measured = [
        (once, ".1f"),
        (of_8, ".1f"),
        ([above(hull, x, y) for x, y in zip(once, of_8, strict=True)], "+.1f"),
        ([p["iid"].get("unique_success", math.nan) for p in points], ".2f"),
        ([100 * p["sequential"]["pass@k"].get("8", math.nan) for p in points], ".1f"),
        ([100 * (p["sequential"]["avg@n"] - p["iid"]["avg@n"]) for p in points], "+.1f"),
        ([100 * p["iid"]["valid"] for p in points], ".0f"),
    ]
    known = [([v for v in values if not math.isnan(v)], form) for values, form in measured]
    return [runs.spread(values, form) if values else "-" for values, form in known]


def draw(rows: dict) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    shown = [task for task in TASKS if any(cell[0] == task for cell in rows)]
    tall = -(-len(shown) // 2)
    figure, axes = plt.subplots(tall, 2, figsize=(9, 1 + 4 * tall), layout="constrained", squeeze=False)
    names: dict = {}
    for axis, task in zip(axes.flat, shown, strict=False):
        names[axis], worse = [], []
        for arm in ARMS:
            seeds = sum(cell[:2] == (task, arm) and "curve" in row for cell, row in rows.items())
            if not seeds:
                continue
            points = list(zip(*line(rows, task, arm), strict=True))
            if points[0][-1] < points[0][0] - 1:
                worse.append(arm)
                continue
            color = next(color for start, (color, _) in FAMILIES.items() if arm.startswith(start))
            axis.plot(*points, "--" if "grpo" in arm else "-", color=color, linewidth=0.7, alpha=0.6)
            axis.plot(points[0][0], points[1][0], "k*", markersize=9)
            axis.plot(points[0][-1], points[1][-1], "o", color=color, markersize=5)
            name = arm if seeds > 2 else f"{arm}, seeds: {seeds}"
            names[axis].append((points[1][-1], points[0][-1], name))
        if hull := frontier(rows, task):
            axis.plot(*zip(*hull, strict=True), "k:", linewidth=1.5)
        below = f" (worse than the base, not shown: {', '.join(worse)})" if worse else ""
        axis.set(title=f"{task}, 3 seeds or more", xlabel=f"pass@1, %{below}", ylabel="pass@8, %")
        axis.margins(x=0.12)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes.flat[len(shown) :]:
        axis.remove()
    axes.flat[0].plot([], "k:", label="what GRPO's policies reach, and a coin between two of them")
    for color, title in FAMILIES.values():
        axes.flat[0].plot([], "o", color=color, label=title)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # from here on a point keeps its place on the page
    for axis, ends in names.items():
        write_names(axis, ends)
    figure.savefig(PICTURE, dpi=120)


def write_names(axis, ends: list[tuple[float, float, str]]) -> None:
    """Each name to the right of its (y, x), moved up until no other is in the way."""
    taken: list[tuple[float, float, float]] = []  # left, right and height in typographic points
    for y, x, name in sorted(ends):
        left, height = axis.transData.transform((x, y)) * 72 / axis.figure.dpi + (4, -3)
        right = left + 4 * len(name)
        while any(left < b and a < right and abs(height - other) < 7.5 for a, b, other in taken):
            height += 0.5
        taken.append((left, right, height))
        axis.annotate(name, (left, height), xycoords="figure points", fontsize=7)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=runs.ROOT / "runs" / "tasks", help="where the runs are kept")
    parser.add_argument("--workers", type=int, default=1, help="runs at a time, of one thread each if more than one")
    parser.add_argument("--draw", action="store_true", help="run nothing")
    args = parser.parse_args()
    jobs = [(t, a, s, args.runs.resolve()) for s in args.seeds for t in args.tasks for a in args.arms]
    runs.in_parallel(run, [j for j in jobs if j[:3] not in results()] if not args.draw else [], args.workers)
    draw(results())
    runs.publish("tasks", table(results()))


if __name__ == "__main__":
    main()
