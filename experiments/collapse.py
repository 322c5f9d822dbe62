"""Does parallel sampling collapse, and sequential sampling not? The README's first picture and table.

    python experiments/collapse.py              # run what is missing in collapse.jsonl, then draw
    python experiments/collapse.py --draw       # only draw, from the committed results
    python experiments/collapse.py --arms sesa grpo --seeds 0 --workers 2

Every arm starts from the same warm-started base, has the same KL coefficient and reference, the same number of steps
and of guesses a step (256), and is evaluated in the same way. A seed is both the draw of the treasures and the seed of
training. The learning rate of GRPO is searched (arms grpo-lr*). Recovery: the GRPO policy of the same seed, taken at
the first evaluation at which 95 % of its guesses hit, goes on with each arm for another 300 steps; the reference of
the KL term is the original base.

One (arm, seed) is one run of train.py; it is resumed if it was interrupted, and its result is one line of
collapse.jsonl. Nothing is measured twice.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
RESULTS, PICTURE, TABLE = HERE / "collapse.jsonl", HERE / "collapse.png", HERE / "collapse.md"
HITS = 0.95  # a policy is called collapsed when this share of its i.i.d. guesses hits

GRPO = ["--method", "grpo"]
ARMS = {
    "sesa": ([], "SESA"),
    "sesa-no-rarity": (["--rarity", "0"], "SESA, rarity 0 (the plain reward)"),
    "grpo": (GRPO, "GRPO"),
    "grpo-lr1e-4": ([*GRPO, "--learning_rate", "1e-4"], "GRPO, learning rate 1e-4"),
    "grpo-lr1e-3": ([*GRPO, "--learning_rate", "1e-3"], "GRPO, learning rate 1e-3"),
    "grpo-hot": ([*GRPO, "--temperature", "1.2", "--entropy_coef", "0.01"], "GRPO, T 1.2, entropy bonus 0.01"),
    "grpo-passk": ([*GRPO, "--advantage_scale", "passk"], "GRPO, pass@8 advantage"),
    "grpo-unique": ([*GRPO, "--repeats", "zero"], "GRPO, a duplicate in the group earns 0"),
    "grpo-unique-rarity": (
        [*GRPO, "--repeats", "zero", "--rarity", "0.5", "--advantage_scale", "none"],
        "GRPO with both of SESA's rewards: duplicates earn 0, rarity 0.5",
    ),
}
RECOVERY = {
    "recover-grpo": (GRPO, "collapsed GRPO, then GRPO"),
    "recover-grpo-hot": ([*GRPO, "--temperature", "1.2"], "collapsed GRPO, then GRPO at T 1.2"),
    "recover-grpo-unique-rarity": (ARMS["grpo-unique-rarity"][0], "collapsed GRPO, then GRPO with both rewards"),
    "recover-sesa": ([], "collapsed GRPO, then SESA"),
}


def results() -> dict[tuple[str, int], dict]:
    lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    return {(row["arm"], row["seed"]): row for row in map(json.loads, lines)}


def collapsed_checkpoint(folder: Path) -> Path:
    """The first checkpoint of a GRPO run whose evaluation says that 95 % of the guesses hit."""
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        checkpoint = folder / "checkpoints" / f"step_{row['step']}"
        if "eval" in row and row["eval"]["iid"]["avg@n"] >= HITS and checkpoint.exists():
            return checkpoint
    raise SystemExit(f"{folder}: no checkpoint at which {HITS:.0%} of the guesses hit; train it longer")


def run(arm: str, seed: int, steps: int, runs: Path) -> None:
    flags = list((ARMS | RECOVERY)[arm][0])
    start = None
    if arm in RECOVERY:
        start = collapsed_checkpoint(runs / f"grpo-{seed}")
        flags += ["--model", os.path.relpath(start, HERE.parent), "--reference", "tiny", "--learning_rate", "3e-4"]
    folder = runs / f"{arm}-{seed}"
    if any(folder.glob("checkpoints/step_*")):
        flags.append("--resume")
    elif folder.exists():
        subprocess.run(["rm", "-r", str(folder)], check=True)
    command = [sys.executable, "train.py", "--task", "synthetic", "--task_options", f"treasure_seed={seed}"]
    command += ["--seed", str(seed), "--steps", str(steps), "--eval_every", "25", "--checkpoint_every", "25"]
    command += ["--keep_checkpoints", "99" if arm == "grpo" else "2", "--output_dir", str(folder), *flags]
    with open(runs / f"{arm}-{seed}.log", "w") as log:
        subprocess.run(command, cwd=HERE.parent, stdout=log, stderr=log, check=True)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((folder / "summary.json").read_text())
    first = summary.pop("base_evaluation")
    summary.pop("evaluation")
    evals = [(0, first)] + [(row["step"], row["eval"]) for row in rows if "eval" in row]
    row = summary | dict(
        arm=arm,
        seed=seed,
        flags=flags,
        start=start and start.name,
        guesses=256 * steps,
        curve=[
            dict(step=step, hits=e["iid"]["avg@n"])
            | {kind: e[kind]["coverage"].get("320") for kind in ("iid", "sequential")}
            for step, e in evals
        ],
    )
    with open(RESULTS, "a") as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")


def spread(values: list[float]) -> str:
    return f"{statistics.fmean(values):.1f} ({', '.join(f'{v:g}' for v in values)})"


def table(rows: dict) -> str:
    lines = [
        "| arm | found of 20 in 320 i.i.d. guesses | in 320 sequential | in 20 sequential | i.i.d. hits | valid |"
        " found in training | tokens | seconds |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    base = [row["base"] for (arm, _), row in sorted(rows.items()) if arm == "sesa"]
    for arm, (_, title) in (ARMS | RECOVERY).items():
        mine = [row for (name, _), row in sorted(rows.items()) if name == arm]
        if arm == "sesa" and base:
            lines.append(cells("the base, before training", base, None))
        if arm == next(iter(RECOVERY)) and mine:
            lines.append(cells("the collapsed GRPO policy that recovery starts from", [r["base"] for r in mine], None))
        if mine:
            lines.append(cells(title, mine, mine))
    return "\n".join(lines) + "\n"


def cells(title: str, measured: list[dict], trained: list[dict] | None) -> str:
    found = [spread([20 * m["coverage"][kind][k] for m in measured]) for kind, k in
             (("iid", "320"), ("sequential", "320"), ("sequential", "20"))]  # fmt: skip
    shares = [f"{100 * statistics.fmean(m[name] for m in measured):.0f} %" for name in ("success", "valid")]
    cost = ["-"] * 3
    if trained:
        cost = [spread([m["unique_found"] for m in trained])]
        cost += [f"{statistics.fmean(m['generated_tokens'] for m in trained) / 1e3:.0f} k"]
        cost += [f"{statistics.fmean(m['seconds'] for m in trained):.0f}"]
    return "| " + " | ".join([title, *found, *shares, *cost]) + " |"


def draw(rows: dict) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(13, 4.3), layout="constrained", width_ratios=[1.2, 1, 1.2])
    styles = {
        "sesa": ("tab:blue", "SESA"),
        "grpo": ("tab:red", "GRPO"),
        "grpo-unique": ("tab:orange", "GRPO, duplicates earn 0"),
        "grpo-unique-rarity": ("tab:green", "GRPO with both of SESA's rewards"),
        "recover-sesa": ("tab:blue", None),
        "recover-grpo": ("tab:red", None),
        "recover-grpo-unique-rarity": ("tab:green", None),
        "recover-grpo-hot": ("tab:purple", "GRPO at temperature 1.2"),
    }
    trained = [arm for arm in styles if arm in ARMS]
    panels = [(trained, "best"), (trained, "hits"), (list(RECOVERY), "best")]
    for axis, (arms, metric) in zip(axes, panels, strict=True):
        for arm in arms:
            curves = [row["curve"] for (name, _), row in sorted(rows.items()) if name == arm]
            if not curves:
                continue
            color, label = styles[arm]
            label = label if axis is not axes[1] else None
            values = [
                [20 * max(p["iid"], p["sequential"]) if metric == "best" else 100 * p["hits"] for p in curve]
                for curve in curves
            ]
            steps = [point["step"] for point in curves[0]]
            for curve in values:
                axis.plot(steps, curve, color=color, alpha=0.25, linewidth=1)
            axis.plot(steps, [statistics.fmean(v) for v in zip(*values, strict=True)], color=color, label=label)
        axis.set_xlabel("step (256 guesses each)")
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_ylim(0, 20.5 if metric == "best" else 102)
    axes[0].set_title("treasures found in 320 guesses, of 20")
    axes[1].set_title("share of i.i.d. guesses that hit, %")
    axes[2].set_title("a collapsed GRPO policy, trained on: found")
    figure.legend(loc="outside lower center", ncols=5, frameon=False)
    figure.savefig(PICTURE, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", default=[*ARMS, *RECOVERY], choices=[*ARMS, *RECOVERY])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--runs", type=Path, default=HERE.parent / "runs" / "collapse", help="where the runs are kept")
    parser.add_argument("--workers", type=int, default=1, help="runs at a time, of one thread each if more than one")
    parser.add_argument("--draw", action="store_true", help="run nothing")
    args = parser.parse_args()
    args.runs.mkdir(parents=True, exist_ok=True)
    args.runs = args.runs.resolve()
    if args.workers > 1:
        os.environ["OMP_NUM_THREADS"] = "1"
    if not args.draw:
        for stage in (ARMS, RECOVERY):  # recovery starts from what GRPO left
            todo = [(a, s) for s in args.seeds for a in args.arms if a in stage and (a, s) not in results()]
            with ThreadPoolExecutor(args.workers) as pool:
                list(pool.map(lambda job: run(*job, args.steps, args.runs), todo))
    rows = results()
    TABLE.write_text(table(rows))
    draw(rows)
    print(TABLE.read_text())


if __name__ == "__main__":
    main()
