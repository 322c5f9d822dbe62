"""GRPO against SESA on the puzzles, with the tiny policy: base, floor and ceiling beside every result.

    python experiments/tasks.py                                  # run what is missing in tasks.jsonl, then draw
    python experiments/tasks.py --tasks countdown --seeds 0      # a part of it
    python experiments/tasks.py --draw                           # only draw, from the committed results

Every arm of a task starts from the same warm-started base and gets the same number of steps and of answers (128 a
step); what sketches cost in tokens and seconds is in the table. Success is that of the plain prompt, without a sketch,
on validation problems that are the same for all. One (task, arm, seed) is one run of train.py, resumed if it was
interrupted; its result is one line of tasks.jsonl.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
RESULTS, PICTURE, TABLE = HERE / "tasks.jsonl", HERE / "tasks.png", HERE / "tasks.md"
TASKS = {
    "countdown": ["--task", "countdown", "--task_options", "difficulty=easy"],
    "frozenlake": ["--task", "frozenlake", "--task_options", "slippery=false"],
    "sokoban": ["--task", "sokoban"],
    "sudoku": ["--task", "sudoku"],
}
ARMS = {
    "grpo": (["--method", "grpo"], "GRPO"),
    "sesa-drop": (["--sketch_context", "drop"], "SESA, sketch dropped in the loss (the paper)"),
    "sesa-keep": (["--sketch_context", "keep"], "SESA, sketch kept"),
}


def results() -> dict[tuple[str, str, int], dict]:
    lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    return {(row["task"], row["arm"], row["seed"]): row for row in map(json.loads, lines)}


def run(task: str, arm: str, seed: int, args: argparse.Namespace) -> None:
    folder = args.runs / f"{task}-{arm}-{seed}"
    flags = [*TASKS[task], *ARMS[arm][0], "--seed", str(seed), "--steps", str(args.steps)]
    flags += ["--warm_start_steps", str(args.warm_start_steps), "--learning_rate", str(args.learning_rate)]
    flags += ["--eval_problems", str(args.problems), "--eval_samples", "16", "--eval_every", "0"]
    command = [sys.executable, "train.py", *flags, "--output_dir", str(folder)]
    if any(folder.glob("checkpoints/step_*")):
        command.append("--resume")
    else:
        shutil.rmtree(folder, ignore_errors=True)
    with open(args.runs / f"{task}-{arm}-{seed}.log", "w") as log:
        subprocess.run(command, cwd=HERE.parent, stdout=log, stderr=log, check=True)
    summary = json.loads((folder / "summary.json").read_text())
    after, before = summary.pop("evaluation"), summary.pop("base_evaluation")
    row = dict(summary, task=task, arm=arm, flags=flags, problems=args.problems)
    row |= {
        f"{when}_{kind}": {name: e[kind][name] for name in ("avg@n", "pass@k", "unique_success", "valid")}
        for when, e in (("base", before), ("after", after))
        for kind in ("iid", "sequential")
    }
    for name in ("pass_at_k", "coverage", "base"):
        row.pop(name)
    with open(RESULTS, "a") as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")


def percent(values: list[float]) -> str:
    return f"{100 * statistics.fmean(values):.1f} ({', '.join(f'{100 * v:.1f}' for v in values)})"


def table(rows: dict) -> str:
    lines = [
        "| task (floor, ceiling) | arm | success, % | gain over base | gain over GRPO | pass@16, % |"
        " unique right of 16 | tokens | seconds |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for task in TASKS:
        mine = [row for (name, _, _), row in sorted(rows.items()) if name == task]
        if not mine:
            continue
        bounds = [f"{100 * v:.1f}" if v is not None else "-" for v in (mine[0]["floor"], mine[0]["ceiling"])]
        lines.append(cells(f"{task} ({', '.join(bounds)})", "base", mine[:1], "base", None))
        grpo = [row["after_iid"]["avg@n"] for row in mine if row["arm"] == "grpo"]
        for arm, (_, title) in ARMS.items():
            trained = [row for row in mine if row["arm"] == arm]
            if trained:
                lines.append(cells("", title, trained, "after", grpo))
    return "\n".join(lines) + "\n"


def cells(task: str, title: str, rows: list[dict], when: str, grpo: list[float] | None) -> str:
    success = [row[f"{when}_iid"]["avg@n"] for row in rows]
    gains, cost = ["-", "-"], ["-", "-"]
    if when == "after":
        base = rows[0]["base_iid"]["avg@n"]
        mean = statistics.fmean(success)
        gains[0] = f"{100 * (mean - base):+.1f} (x {mean / base:.2f})" if base else f"{100 * mean:+.1f}"
        if grpo:
            other = statistics.fmean(grpo)
            gains[1] = f"{100 * (mean - other):+.1f} (x {mean / other:.2f})" if other else f"{100 * mean:+.1f}"
        cost = [f"{statistics.fmean(r['generated_tokens'] for r in rows) / 1e3:.0f} k"]
        cost += [f"{statistics.fmean(r['seconds'] for r in rows):.0f}"]
    passed = percent([row[f"{when}_iid"]["pass@k"]["16"] for row in rows])
    unique = f"{statistics.fmean(row[f'{when}_iid']['unique_success'] for row in rows):.2f}"
    return "| " + " | ".join([task, title, percent(success), *gains, passed, unique, *cost]) + " |"


def draw(rows: dict) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    shown = [task for task in TASKS if any(name == task for name, _, _ in rows)]
    figure, axes = plt.subplots(1, len(shown), figsize=(3.4 * len(shown), 3.6), constrained_layout=True, squeeze=False)
    colors = {"base": "lightgray", "grpo": "tab:red", "sesa-drop": "tab:blue", "sesa-keep": "tab:cyan"}
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
    parser.add_argument("--tasks", nargs="+", default=["countdown", "frozenlake"], choices=list(TASKS))
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--warm_start_steps", type=int, default=600)
    parser.add_argument("--learning_rate", type=float, default=3e-4)
    parser.add_argument("--problems", type=int, default=1024, help="validation problems")
    parser.add_argument("--runs", type=Path, default=HERE.parent / "runs" / "tasks", help="where the runs are kept")
    parser.add_argument("--draw", action="store_true", help="run nothing")
    args = parser.parse_args()
    args.runs = args.runs.resolve()
    args.runs.mkdir(parents=True, exist_ok=True)
    if not args.draw:
        for task in args.tasks:
            for seed in args.seeds:
                for arm in args.arms:
                    if (task, arm, seed) not in results():
                        run(task, arm, seed, args)
    rows = results()
    TABLE.write_text(table(rows))
    draw(rows)
    print(TABLE.read_text())


if __name__ == "__main__":
    main()
