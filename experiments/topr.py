"""A fork: what earned A > 0 is imitated by the plain prompt, and the rest pushed down there as TOPR has it (arXiv
2503.14286): by clip(pi(y|x) / pi_old(y|x,s), 0, 1) of the whole answer.

    python experiments/topr.py --task frozenlake --sketch_context is --is_cap 1 --is_level sequence --output_dir runs/t

All flags of train.py hold; these three make it TOPR.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import rl  # noqa: E402
import train  # noqa: E402

usual = rl.loss_inputs


def loss_inputs(rows, device, is_options=None):
    (advantages, weights, *old), sampled = usual(rows, device, is_options)
    if is_options:
        old[-1] = torch.where(advantages > 0, 1.0, old[-1])
    return [advantages, weights, *old], sampled


if __name__ == "__main__":
    rl.loss_inputs = loss_inputs
    train.start(train.parse())
