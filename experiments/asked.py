"""After training: the same policies, asked for 8 answers in ten ways. What is the order of the sketches worth?

    python experiments/tasks.py --tasks frozenlake                # leaves the policies
    python experiments/asked.py runs/tasks/frozenlake-*           # asks what is missing in asked.jsonl, then the table
    python experiments/asked.py                                   # only the table, from the committed results

Takes run folders of tasks of two stages. Solved: at least one answer of a problem is right, on 512 validation problems.
The controls: as many tokens spent on more answers, higher temperatures, both, sketches that do not see each other, at
three temperatures, and sketches that were drawn in sequence but for another problem.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import runs  # noqa: E402
import sesa  # noqa: E402
import tasks  # noqa: E402
import train  # noqa: E402

RESULTS = HERE / "asked.jsonl"
SIZE = 8
SKETCHED = dict(method="sesa", num_sketches=SIZE, num_solutions=1, num_direct=0, explore="always")
# (title, changes of the plan, temperature of the sketches or, where there are none, of the answers)
WAYS = {
    "direct": ("i.i.d.", dict(method="grpo", group_size=SIZE), 1.0),
    "hot": ("i.i.d., temperature 1.5", dict(method="grpo", group_size=SIZE), 1.5),
    "hotter": ("i.i.d., temperature 2", dict(method="grpo", group_size=SIZE), 2.0),
    "more": ("16 i.i.d.", dict(method="grpo", group_size=2 * SIZE), 1.0),
    "more-hot": ("16 i.i.d., temperature 1.5", dict(method="grpo", group_size=2 * SIZE), 1.5),
    "iid": ("each after a sketch of its own", SKETCHED | dict(sketches="iid"), 1.0),
    "iid-hot": ("each after a sketch of its own, at temperature 1.5", SKETCHED | dict(sketches="iid"), 1.5),
    "iid-hotter": ("each after a sketch of its own, at temperature 2", SKETCHED | dict(sketches="iid"), 2.0),
    "placebo": ("after another problem's sketches, in sequence", SKETCHED | dict(sketches="placebo"), 1.0),
    "sequential": ("after sketches in sequence", SKETCHED | dict(sketches="sequential"), 1.0),
}


def results() -> dict[tuple[str, int, str], dict]:
    return runs.results(RESULTS, ("policy", "seed", "way"))


def ask(folder: Path, n: int) -> None:
    """Ask the last checkpoint of a run in all ways, and, once for a task, the base that it started from."""
    flags, _ = train.read_run(folder)
    task = tasks.make_task(flags["task"], **train.parse_options(flags["task_options"]))
    name, _, seed = folder.name.rpartition("-")
    [*_, last] = sorted(folder.glob("checkpoints/step_*"), key=lambda path: int(path.name.removeprefix("step_")))
    ranks = train.Ranks(0, 1, torch.device("cpu"))
    config = train.resolve(train.Config(**flags), task)
    for policy, number, model in ((f"{name.split('-')[0]}-base", 0, "tiny"), (name, int(seed), str(last))):
        missing = [way for way in WAYS if (policy, number, way) not in results()]
        if missing:
            loaded = train.starting_policy(model, config, task, ranks)
            explorer, limits = loaded.explorer(task, max_rows=1024), loaded.token_limits(config)
        for way in missing:
            _, changes, temperature = WAYS[way]
            plan = train.plan_of(config, limits, temperature, **changes)
            if changes["method"] == "sesa":
                plan = replace(plan, solution_params=replace(plan.solution_params, temperature=1.0))
            problems = list(enumerate(task.problems("validation", 0)[i] for i in range(n)))
            groups = explorer.rollout(problems, plan, ("asked", way))
            outcomes = [group.outcomes() for group in groups]
            found = sesa.evaluation_metrics(outcomes, (1, len(outcomes[0])), None)
            tokens = sum(g.sketch_tokens + sum(len(t.logps) for t in g.trajectories) for g in groups)
            distinct = fmean(len(set(g.sketches)) / max(1, len(g.sketches)) for g in groups)
            row = dict(policy=policy, seed=number, way=way, right=found["avg@n"], tokens=tokens / n)
            row |= dict(solved=list(found["pass@k"].values())[-1], different=found["unique_success"])
            runs.append(RESULTS, row | dict(distinct_sketches=distinct))


def table(rows: dict) -> str:
    head = ["policy", "8 answers", "solved, %", "different right answers", "right, %", "distinct sketches, %", "tokens"]
    lines = []
    for policy in dict.fromkeys(policy for policy, _, _ in rows):
        for way, (title, _, _) in WAYS.items():
            mine = [row for key, row in sorted(rows.items()) if (key[0], key[2]) == (policy, way)]
            if mine:
                solved = runs.spread([100 * row["solved"] for row in mine])
                different = runs.spread([row["different"] for row in mine], ".2f")
                right, sketches = (f"{100 * fmean(r[k] for r in mine):.0f}" for k in ("right", "distinct_sketches"))
                sketches = sketches if "sketch" in title else "-"
                tokens = f"{fmean(row['tokens'] for row in mine):.0f}"
                lines.append([policy, title, solved, different, right, sketches, tokens])
    return runs.table(head, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path, help="runs of experiments/tasks.py")
    parser.add_argument("--problems", type=int, default=512)
    args = parser.parse_args()
    torch.set_num_threads(1)
    for folder in sorted(args.folders):
        if (folder / "summary.json").exists():
            ask(folder, args.problems)
    runs.publish("asked", table(results()))


if __name__ == "__main__":
    main()
