"""A fork: sketches of a two-stage task are trained, too, each on the mean reward of its own solutions.

    python experiments/sketch_credit.py --task frozenlake --output_dir runs/credit

A sketch's advantage is that mean less the mean of its siblings' (those of the same problem), undivided; a sketch that
repeats an earlier one earns 0. It is trained in its chain and weighs as much as an answer. All flags of train.py hold.
"""

import sys
from pathlib import Path
from statistics import fmean

sys.path.insert(0, str(Path(__file__).parent.parent))
import sesa  # noqa: E402
import train  # noqa: E402

write, explore, sequences = sesa.Explorer.write, sesa.Explorer.explore, sesa.sequences


def write_and_keep(self, problem, plan, seed, chains):
    self.chains = getattr(self, "chains", {}) | {seed: chains}
    return (yield from write(self, problem, plan, seed, chains))


def explore_and_keep(self, problem, plan, seed, drafts=None):
    group = yield from explore(self, problem, plan, seed, drafts)
    group.chains = self.chains.pop(seed, []) if group.sketches else []
    return group


def sequences_and_sketches(group, context, distill_coef=1.0):
    rows = sequences(group, context, distill_coef)
    solutions = [t for t in group.trajectories if t.sketch is not None]
    if not getattr(group, "chains", ()):
        return rows
    each, seen, rewards = len(solutions) // len(group.sketches), set(), []
    for i, sketch in enumerate(group.sketches):
        earned = fmean(t.rewards[0] for t in solutions[i * each : (i + 1) * each])
        rewards.append(0.0 if sketch in seen else earned)
        seen.add(sketch)
    advantages = [reward - fmean(rewards) for reward in rewards]
    if any(advantages):
        for chain in group.chains:
            chain.advantages = [advantages.pop(0) for _ in chain.texts]
            rows.append(sesa.as_sampled(chain))
    return rows


sesa.Explorer.write, sesa.Explorer.explore = write_and_keep, explore_and_keep
sesa.sequences = sequences_and_sketches
if __name__ == "__main__":
    train.start(train.parse())
