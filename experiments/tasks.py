"""GRPO against SESA on the puzzles, with the tiny policy: base, floor and ceiling beside every result.

    python experiments/tasks.py                                  # run what is missing in tasks.jsonl, then draw
    python experiments/tasks.py --tasks countdown --seeds 0      # a part of it
    python experiments/tasks.py --draw                           # only draw, from the committed results

Every arm of a task starts from the same warm-started base and gets the same number of steps and of answers (16
problems x 8 a step); what sketches cost in tokens and seconds is in the table. Learning rate and KL are the best of a
small search (LOG.md): with the sketch dropped, 3e-4 collapses. Success is that of the plain prompt, without a sketch,
on 1,024 validation problems that are the same for all. One (task, arm, seed) is one run of train.py, resumed if it was
interrupted; its result is one line of tasks.jsonl, which counts as long as its flags are those below.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

HERE = Path(__file__).parent
RESULTS, PICTURE, TABLE = HERE / "tasks.jsonl", HERE / "tasks.png", HERE / "tasks.md"
TASKS = {
    "countdown": "--task countdown --task_options difficulty=easy --steps 400",
    "frozenlake": "--task frozenlake --task_options slippery=false --steps 150",
    "sudoku": "--task sudoku --steps 100",
    "sokoban": "--task sokoban --steps 100",
}
COMMON = "--problems_per_step 16 --num_sketches 8 --kl_coef 0.05 --eval_problems 1024 --eval_samples 8 --eval_every 0"
ARMS = {
    "grpo": ("--method grpo --learning_rate 3e-4", "GRPO"),
    "sesa-drop": ("--sketch_context drop --learning_rate 1e-4", "SESA, sketch dropped in the loss (the paper)"),
    "sesa-is": ("--sketch_context is --learning_rate 3e-4", "SESA, sketch dropped with importance weights"),
    "sesa-keep": ("--sketch_context keep --learning_rate 3e-4", "SESA, sketch kept"),
}


def flags(task: str, arm: str, seed: int) -> list[str]:
    return f"{TASKS[task]} {COMMON} {ARMS[arm][0]} --seed {seed}".split()


def results() -> dict[tuple[str, str, int], dict]:
    rows = map(json.loads, RESULTS.read_text().splitlines() if RESULTS.exists() else [])
    found = {(row["task"], row["arm"], row["seed"]): row for row in rows}
    return {cell: row for cell, row in found.items() if row["flags"] == flags(*cell)}


def run(task: str, arm: str, seed: int, runs: Path) -> None:
    folder = runs / f"{task}-{arm}-{seed}"
    command = [sys.executable, "train.py", *flags(task, arm, seed), "--output_dir", str(folder)]
    if any(folder.glob("checkpoints/step_*")):
        command.append("--resume")
    else:
        shutil.rmtree(folder, ignore_errors=True)
    with open(runs / f"{task}-{arm}-{seed}.log", "w") as log:
        subprocess.run(command, cwd=HERE.parent, stdout=log, stderr=log, check=True)
    summary = json.loads((folder / "summary.json").read_text())
    after, before = summary.pop("evaluation"), summary.pop("base_evaluation")
    row = dict(summary, task=task, arm=arm, flags=flags(task, arm, seed))
    row |= {
        f"{when}_{kind}": {name: e[kind][name] for name in ("problems", "avg@n", "pass@k", "unique_success", "valid")}
        for when, e in (("base", before), ("after", after))
        for kind in ("iid", "sequential")
    }
    for name in ("pass_at_k", "coverage", "base"):
        row.pop(name)
    with open(RESULTS, "a") as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")


def percent(values: Iterable[float], form: str = ".1f") -> str:
    """The mean in percent, and the single values."""
    values = [100 * value for value in values]
    return f"{statistics.fmean(values):{form}} ({', '.join(f'{value:{form}}' for value in values)})"


def gain(ours: dict[int, float], theirs: dict[int, float]) -> str:
    """Seed by seed the difference, and the ratio of the means."""
    pairs = [(ours[seed], theirs[seed]) for seed in ours if seed in theirs]
    if not pairs:
        return "-"
    mine, other = (statistics.fmean(side) for side in zip(*pairs, strict=True))
    return percent((a - b for a, b in pairs), "+.1f") + (f", x {mine / other:.2f}" if other else "")


def table(rows: dict) -> str:
    lines = [
        "| task (floor, ceiling) | arm | success, % | gain over base | gain over GRPO | pass@8, % |"
        " unique right of 8 | tokens | seconds |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for task in TASKS:
        arms = {arm: {seed: row for (*cell, seed), row in sorted(rows.items()) if cell == [task, arm]} for arm in ARMS}
        every = {seed: row for arm in arms.values() for seed, row in arm.items()}
        if not every:
            continue
        some = next(iter(every.values()))
        bounds = [f"{100 * v:.1f}" if v is not None else "-" for v in (some["floor"], some["ceiling"])]
        lines.append(line(f"{task} ({', '.join(bounds)})", "base", "base", dict(sorted(every.items())), {}))
        for arm, (_, title) in ARMS.items():
            if arms[arm]:
                lines.append(line("", title, "after", arms[arm], arms["grpo"] if arm != "grpo" else {}))
    return "\n".join(lines) + "\n"


def line(task: str, title: str, when: str, rows: dict[int, dict], grpo: dict[int, dict]) -> str:
    """One arm, or (when="base") what all of them started from; rows by seed."""
    trained = rows if when == "after" else {}
    gains = [gain(success(trained, "after"), success(other, at)) for other, at in ((trained, "base"), (grpo, "after"))]
    every = list(rows.values())
    passed = percent(row[f"{when}_iid"]["pass@k"]["8"] for row in every)
    unique = f"{statistics.fmean(row[f'{when}_iid']['unique_success'] for row in every):.2f}"
    tokens, seconds = (statistics.fmean(row[name] for row in every) for name in ("generated_tokens", "seconds"))
    cost = [f"{tokens / 1e3:.0f} k", f"{seconds:.0f}"] if trained else ["-", "-"]
    return "| " + " | ".join([task, title, percent(success(rows, when).values()), *gains, passed, unique, *cost]) + " |"


def success(rows: dict[int, dict], when: str) -> dict[int, float]:
    return {seed: row[f"{when}_iid"]["avg@n"] for seed, row in rows.items()}


def draw(rows: dict) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    shown = [task for task in TASKS if any(name == task for name, _, _ in rows)]
    figure, axes = plt.subplots(1, len(shown), figsize=(3.4 * len(shown), 3.6), constrained_layout=True, squeeze=False)
    colors = {"base": "lightgray", "grpo": "tab:red", "sesa-drop": "tab:blue"}
    colors |= {"sesa-is": "tab:green", "sesa-keep": "tab:cyan"}
    for axis, task in zip(axes[0], shown, strict=True):
        mine = [row for (name, _, _), row in sorted(rows.items()) if name == task]
        bars = {"base": [mine[0]["base_iid"]["avg@n"]]}
        bars |= {arm: [r["after_iid"]["avg@n"] for r in mine if r["arm"] == arm] for arm in ARMS}
        bars = {arm: values for arm, values in bars.items() if values}
        for i, (arm, values) in enumerate(bars.items()):
            axis.bar(i, 100 * statistics.fmean(values), color=colors[arm])
            axis.plot([i] * len(values), [100 * v for v in values], "k.", markersize=4)
        for value, style in ((mine[0]["floor"], ":"), (mine[0]["ceiling"], "--")):
            if value is not None:
                axis.axhline(100 * value, color="gray", linestyle=style, linewidth=1)
        axis.set_xticks(range(len(bars)), bars, rotation=20)
        axis.set_title(task)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("validation success, %\n(dotted: random policy, dashed: solver)")
    figure.savefig(PICTURE, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--runs", type=Path, default=HERE.parent / "runs" / "tasks", help="where the runs are kept")
    parser.add_argument("--draw", action="store_true", help="run nothing")
    args = parser.parse_args()
    args.runs.mkdir(parents=True, exist_ok=True)
    if not args.draw:
        for task in args.tasks:
            for seed in args.seeds:
                for arm in args.arms:
                    if (task, arm, seed) not in results():
                        run(task, arm, seed, args.runs.resolve())
    rows = results()
    TABLE.write_text(table(rows))
    draw(rows)
    print(TABLE.read_text())


if __name__ == "__main__":
    main()
