"""Checkpoints of the first version, so that their runs can go on:  python experiments/upgrade.py RUN/checkpoints/step_N

They held position and moments in one file, training_state.pt, the moments by number. This reads it, and writes the
folder training_state in its place. Weights need no upgrade: such a folder has always been good for --model.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from transformers import AutoModelForCausalLM


def upgrade(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    state = torch.load(folder / "training_state.pt", weights_only=True, map_location="cpu")
    saved, names = state.pop("optimizer"), [name for name, _ in model.named_parameters()]
    moments = {names[i]: moments for i, moments in saved["state"].items()}
    groups = [group | dict(params=names) for group in saved["param_groups"]]
    tensors = dict(
        model_state_dict=model.state_dict(), optim_state_dict=dict(state=moments, param_groups=groups)
    )
    dcp.save(tensors, checkpoint_id=folder / "training_state")
    (folder / "training_state" / "position.json").write_text(json.dumps(state), encoding="utf-8")
    (folder / "training_state.pt").unlink()


if __name__ == "__main__":
    for name in sys.argv[1:]:
        upgrade(Path(name))
