"""Path exploration: what collapses, what the credit does, what the normalisation does, what the order does.

    python experiments/collapse.py --workers 2        # run what is missing in collapse.jsonl, then draw
    python experiments/collapse.py --draw             # only draw, from the committed results
    python experiments/collapse.py --arms sesa grpo --seeds 0

All arms start from one warm-started base, draw 256 guesses a step and are evaluated in the same way. A seed is both the
draw of the treasures and the seed of training. The unit is the number of different treasures, of 20, in k guesses, in
the mean over all windows of k guesses of an evaluation (1,000 guesses, 62 chains of 16). k i.i.d. guesses cannot find
more than 20 (1 - (1 - 1/20)^k), whatever they are drawn from: 11.2 in 16.

    base      400 steps from the base, which is also the reference of the KL term
    recover   from what GRPO ended with, 150 steps, without the base: no KL, no reference
    anchored  the same with the base as the reference, as in `base`
    depth     as `recover`, from GRPO after 25, 50, 100 steps, and after 400 without a KL term
    length    as `base`, the same guesses in chains of other lengths than 16: what they buy, what they cost in time

One (stage, arm, seed) is one run of train.py; it is resumed if it was interrupted, and its result is one line of
collapse.jsonl. Nothing is measured twice.
"""

import argparse
import statistics
from pathlib import Path

import runs

HERE = Path(__file__).parent
RESULTS, PICTURE = HERE / "collapse.jsonl", HERE / "collapse.png"
DRAWS = [1, 2, 4, 8, 12, 16, 20, 24, 32, 40, 320]
COMMON = ["--task", "synthetic", "--eval_k", *map(str, DRAWS), "--keep_checkpoints", "1"]

GRPO = "--method grpo"
BOTH = f"{GRPO} --repeats zero --rarity 0.5"
RECOVER = "--steps 150 --eval_every 50 --checkpoint_every 50 --learning_rate 3e-4"
ALONE = f"{RECOVER} --kl_coef 0"
ANCHORED = f"{RECOVER} --reference tiny"
EVERY = "--steps 400 --eval_every 25 --checkpoint_every 25 --keep_checkpoints 99"
DISTILL = "--sketch_context distill --distill_coef 1"
KEEP = "--sketch_context keep"
BASE = "--steps 400 --eval_every 100 --checkpoint_every 100"

# stage: {arm: (flags, what it is, start: (arm of `base`, step) or None)}
LAST = ("grpo", 400)
ARMS = {
    "base": {
        "sesa": (BASE, "**SESA**: chains of 16, each guess sees those before it; `distill`, coefficient 0.3", None),
        "sesa-keep": (f"{BASE} {KEEP}", "SESA, `keep`: trained in the chain only", None),
        "sesa-drop": (f"{BASE} --sketch_context drop", "SESA, `drop`: trained without the chain (the paper)", None),
        "sesa-distill-1": (f"{BASE} --distill_coef 1", "SESA, `distill`, coefficient 1", None),
        "sesa-iid": (f"{BASE} {KEEP} --sketches iid", "order control: `keep`, but no guess sees another", None),
        "sesa-placebo": (f"{BASE} {KEEP} --sketches placebo", "order control: `keep`, each sees another chain's", None),
        "sesa-distill-placebo": (f"{BASE} --sketches placebo", "order control: SESA, each sees another chain's", None),
        "sesa-no-rarity": (f"{BASE} --rarity 0", "SESA, rarity 0 (the plain reward)", None),
        "sesa-long": (f"{BASE} --steps 1000", "SESA, 1,000 steps", None),
        "grpo": (f"{EVERY} {GRPO}", "**GRPO**", None),
        "grpo-lr1e-4": (f"{BASE} {GRPO} --learning_rate 1e-4", "GRPO, learning rate 1e-4", None),
        "grpo-lr1e-3": (f"{BASE} {GRPO} --learning_rate 1e-3", "GRPO, learning rate 1e-3", None),
        "grpo-hot": (f"{BASE} {GRPO} --temperature 1.2 --entropy_coef 0.01", "GRPO, T 1.2, entropy bonus 0.01", None),
        "grpo-passk": (f"{BASE} {GRPO} --advantage_scale passk", "GRPO, pass@8 advantage", None),
        "grpo-passk-annealed": (
            f"{BASE} {GRPO} --advantage_scale passk --pass_k_end 1", "GRPO, pass@k advantage, k from 8 to 1", None),
        "grpo-unique": (f"{BASE} {GRPO} --repeats zero", "GRPO, a duplicate in the group earns 0", None),
        "grpo-both-std": (f"{BASE} {BOTH}", "GRPO, both of SESA's rewards, divided by the std", None),
        "grpo-both": (f"{BASE} {BOTH} --advantage_scale none", "GRPO, both of SESA's rewards, not divided", None),
        "grpo-both-kl": (
            f"{BASE} {BOTH} --advantage_scale none --kl_coef_end 0.1", "the same, KL 0.1 to the end", None),
        "grpo-both-lr1e-4": (
            f"{BASE} {BOTH} --advantage_scale none --learning_rate 1e-4", "the same, learning rate 1e-4", None),
        "grpo-no-kl": (f"{BASE} {GRPO} --kl_coef 0", "GRPO without a KL term", None),
    },
    "recover": {
        "distill": (f"{ALONE} {DISTILL}", "**SESA, `distill`**", LAST),
        "imitate": (f"{ALONE} --sketch_context imitate", "SESA, `imitate`", LAST),
        "keep": (f"{ALONE} {KEEP}", "SESA, `keep`", LAST),
        "distill-placebo": (
            f"{ALONE} {DISTILL} --sketches placebo", "order control: another chain's history", LAST),
        "iid": (f"{ALONE} {KEEP} --sketches iid", "order control: no history, the same credit", LAST),
        "grpo-both": (f"{ALONE} {BOTH} --advantage_scale none", "GRPO, both rewards, not divided", LAST),
        "grpo-both-hot": (
            f"{ALONE} {BOTH} --advantage_scale none --temperature 1.2", "the same at temperature 1.2", LAST),
        "grpo-both-std": (f"{ALONE} {BOTH}", "GRPO, both rewards, divided by the std", LAST),
        "grpo": (f"{ALONE} {GRPO}", "GRPO", LAST),
    },
    "anchored": {
        "sesa": (ANCHORED, "SESA", LAST),
        "grpo-both": (f"{ANCHORED} {BOTH} --advantage_scale none", "GRPO, both rewards, not divided", LAST),
        "grpo": (f"{ANCHORED} {GRPO}", "GRPO", LAST),
    },
    "depth": {
        f"{arm}-{start}-{step}": (f"{ALONE} {flags}", f"{title}, from {start} after {step} steps", (start, step))
        for start, step in (("grpo", 25), ("grpo", 50), ("grpo", 100), ("grpo-no-kl", 400))
        for arm, flags, title in (
            ("distill", DISTILL, "SESA, `distill`"),
            ("distill-placebo", f"{DISTILL} --sketches placebo", "order control: another chain's history"),
            ("grpo-both", f"{BOTH} --advantage_scale none", "GRPO, both rewards, not divided"),
        )
    },
    "length": {
        f"chains-{k}": (f"{BASE} --num_sketches {k} --problems_per_step {256 // k}", f"SESA, chains of {k}", None)
        for k in (4, 8, 32)
    },
}  # fmt: skip
CELLS = ("stage", "arm", "seed")


def results() -> dict[tuple[str, str, int], dict]:
    return runs.results(RESULTS, CELLS)


def trained(stage: str, arm: str, seed: int, folder: Path) -> dict:
    flags, _, start = ARMS[stage][arm]
    command = [*COMMON, "--task_options", f"treasure_seed={seed}", "--seed", str(seed), *flags.split()]
    if start:
        model = folder / f"base-{start[0]}-{seed}" / "checkpoints" / f"step_{start[1]}"
        if not model.exists():  # its result may be there without it
            trained("base", start[0], seed, folder)
        command += ["--model", str(model)]
    return runs.train(folder / f"{stage}-{arm}-{seed}", command)


def run(stage: str, arm: str, seed: int, folder: Path) -> None:
    flags, _, start = ARMS[stage][arm]
    row = trained(stage, arm, seed, folder)
    if "curve" in row:
        row["curve"] = [brief(step, evaluation) for step, evaluation in row["curve"]]
    runs.append(RESULTS, dict(stage=stage, arm=arm, seed=seed, flags=flags, start=start) | row)


def brief(step: int, evaluation: dict) -> dict:
    return dict(step=step) | {
        kind: dict(hits=e["avg@n"], valid=e["valid"], found=e["unique@k"]) for kind, e in evaluation.items()
    }


def table(rows: dict) -> str:
    parts = []
    head = ["arm", "in 16, in sequence", "in 16, i.i.d.", "in 320, i.i.d.", "in 320, in sequence"]
    head += ["hits, i.i.d. / in sequence, %", "tokens, k", "seconds"]
    base = [row for (stage, arm, _), row in sorted(rows.items()) if (stage, arm) == ("base", "sesa") and "curve" in row]
    if base:
        line = cells("the base, before training", [row["curve"][0] for row in base]) + ["-", "-", "-"]
        parts.append(("base", head, [line]))
    for stage, arms in ARMS.items():
        lines = []
        for arm, (_, title, _) in arms.items():
            mine = [rows[stage, arm, seed] for seed in range(9) if (stage, arm, seed) in rows]
            command = f"`--stages {stage} --arms {arm}`"
            if failed := [row["failed"] for row in mine if "failed" in row]:
                lines.append([title, f"failed: {failed[0]}", *[""] * (len(head) - 2), command])
            elif mine and stage in ("base", "anchored"):
                cost = [f"{statistics.fmean(row['generated_tokens'] for row in mine) / 1e3:.0f}"]
                cost += [f"{statistics.fmean(row['seconds'] for row in mine):.0f}", command]
                lines.append(cells(title, [row["curve"][-1] for row in mine]) + cost)
            elif mine and stage == "length":
                last = [row["curve"][-1] for row in mine]
                found = [runs.spread([p["sequential"]["found"][k] for p in last]) for k in ("4", "8", "16", "32")]
                found.append(runs.spread([p["iid"]["found"]["320"] for p in last]))
                drawn = [100 * row["rollout_share"] for row in mine]
                step = [row["seconds"] / row["steps"] for row in mine]
                cost = [f"{statistics.fmean(drawn):.0f}", f"{statistics.fmean(step):.2f}"]
                lines.append([title, *found, hits(last), *cost, command])
            elif mine:
                points = [[row["curve"][i] for row in mine] for i in range(4)]
                line = [title, *(runs.spread([p["iid"]["found"]["320"] for p in at], ".0f") for at in points)]
                line.append(runs.spread([p["sequential"]["found"]["320"] for p in points[-1]], ".0f"))
                lines.append([*line, hits(points[-1]), command])
        if lines and stage == "base" and parts:
            parts[0][2].extend(lines)
        elif lines and stage == "anchored":
            parts.append((stage, head, lines))
        elif lines and stage == "length":
            columns = ["arm", *(f"in {k}, in sequence" for k in (4, 8, 16, 32)), "in 320, i.i.d."]
            columns += ["hits, i.i.d. / in sequence, %", "time that goes into drawing, %", "seconds a step"]
            parts.append((stage, columns, lines))
        elif lines:
            steps = [f"i.i.d., {step} steps" for step in (0, 50, 100, 150)]
            parts.append((stage, ["arm", *steps, "in sequence, 150", "hits, %"], lines))
    return "\n".join(f"**{stage}**\n\n{runs.table([*head, 'again'], lines)}" for stage, head, lines in parts)


def cells(title: str, points: list[dict]) -> list[str]:
    kinds = (("sequential", "16", ".1f"), ("iid", "16", ".1f"), ("iid", "320", ".1f"), ("sequential", "320", ".1f"))
    found = [runs.spread([p[kind]["found"][k] for p in points], form) for kind, k, form in kinds]
    return [title, *found, hits(points)]


def hits(points: list[dict]) -> str:
    shares = (100 * statistics.fmean(p[kind]["hits"] for p in points) for kind in ("iid", "sequential"))
    return " / ".join(f"{share:.0f}" for share in shares)


def draw(rows: dict) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = {cell: row for cell, row in rows.items() if "curve" in row}
    figure, (left, right) = plt.subplots(1, 2, figsize=(11.5, 4.4), layout="constrained")
    draws = [k for k in DRAWS if k <= 40]
    ceiling = [20 * (1 - 0.95**k) for k in draws]
    left.fill_between(draws, ceiling, 20, color="0.93", linewidth=0)
    left.plot(draws, ceiling, "k--", linewidth=1)
    left.text(2, 17.3, "no i.i.d. policy\ngets here", color="0.35")
    for arm, kind, color, style, label in (
        ("sesa", "sequential", "tab:blue", "-", "SESA, asked in sequence"),
        ("grpo-both", "iid", "tab:green", "-", "GRPO with SESA's rewards, i.i.d."),
        ("grpo-both", "sequential", "tab:green", ":", "the same, asked in sequence"),
        ("grpo", "iid", "tab:red", "-", "GRPO, i.i.d."),
        ("grpo", "sequential", "tab:red", ":", "the same, asked in sequence"),
    ):
        curves = [row["curve"][-1][kind]["found"] for (s, a, _), row in rows.items() if (s, a) == ("base", arm)]
        many(left, draws, [[found[str(k)] for k in draws] for found in curves], color, style, label)
    left.set(xlabel="answers drawn", title="different right answers found, of 20", ylim=(0, 20.3), xlim=(0, 41))
    for arm, color, label in (
        ("distill", "tab:blue", "SESA, finds taught to the plain prompt"),
        ("distill-placebo", "tab:cyan", "the same, with another chain's history"),
        ("grpo-both", "tab:green", "GRPO with SESA's rewards"),
        ("grpo-both-std", "tab:olive", "the same, divided by the std"),
        ("grpo", "tab:red", "GRPO"),
    ):
        curves = [row["curve"] for (s, a, _), row in rows.items() if (s, a) == ("recover", arm)]
        found = [[p["iid"]["found"]["320"] for p in curve] for curve in curves]
        many(right, [0, 50, 100, 150], found, color, "-", label)
    right.set(xlabel="step", title="a collapsed policy, trained on: found in 320 i.i.d. draws", ylim=(0, 20.3))
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=8)
    figure.savefig(PICTURE, dpi=130)


def many(axis, x: list, curves: list[list], color: str, style: str, label: str) -> None:
    """Every seed thin, their mean thick."""
    for curve in curves:
        axis.plot(x, curve, style, color=color, alpha=0.25, linewidth=0.8)
    if curves:
        axis.plot(x, [statistics.fmean(at) for at in zip(*curves, strict=True)], style, color=color, label=label)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--arms", nargs="+", help="of these stages; all if not given")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=runs.ROOT / "runs" / "collapse", help="where the runs are kept")
    parser.add_argument("--workers", type=int, default=1, help="runs at a time, of one thread each if more than one")
    parser.add_argument("--draw", action="store_true", help="run nothing")
    args = parser.parse_args()
    for stage in args.stages if not args.draw else []:  # the others start from what `base` left
        arms = [arm for arm in ARMS[stage] if args.arms is None or arm in args.arms]
        jobs = [(stage, arm, s, args.runs.resolve()) for arm in arms for s in args.seeds]
        runs.in_parallel(run, [job for job in jobs if job[:3] not in results()], args.workers)
    rows = results()
    draw(rows)
    runs.publish("collapse", table(rows))


if __name__ == "__main__":
    main()
