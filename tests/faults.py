"""Kill train.py (-9) at moments that nobody chose, and see that it goes on to the same curve.

    python tests/faults.py --kills 20              # a process of its own, started again each time
    python tests/faults.py --kills 20 --ranks 2    # one rank of two; torchrun --max-restarts starts both again

The moments are spread over a whole run: warm start, evaluations, steps and saves. Every run has a cache of its own, so
the warm start can be hit, too. What must be equal, bit for bit, to the run that nobody killed: every row of
metrics.jsonl but its times, and the weights.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
FLAGS = """--task countdown --task_options difficulty=easy --num_sketches 2 --num_solutions 2 --problems_per_step 3
    --steps 12 --checkpoint_every 2 --eval_every 4 --eval_problems 4 --eval_samples 4 --eval_k 1 --tiny_width 32
    --warm_start_steps 40 --learning_rate 1e-3 --entropy_coef 0.01 --resume_auto""".split()


def start(folder: Path, ranks: int, restarts: int = 0) -> subprocess.Popen:
    command = [sys.executable, "train.py"]
    if ranks > 1:
        elastic = f"--standalone --nproc_per_node {ranks} --max-restarts {restarts} --monitor-interval 0.1"
        command = [sys.executable, "-m", "torch.distributed.run", *elastic.split(), "train.py"]
    environment = os.environ | dict(XDG_CACHE_HOME=str(folder / "cache"), OMP_NUM_THREADS="1")
    return subprocess.Popen(
        [*command, *FLAGS, "--output_dir", str(folder / "run")], cwd=ROOT, env=environment, text=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip


def children(pid: int) -> list[int]:
    """The ranks of torchrun, which has no other children that run Python files."""
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in found if b"train.py" in Path(f"/proc/{child}/cmdline").read_bytes()]


def curve(folder: Path) -> tuple[list[dict], bytes]:
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    times = {"step_time", "rollout_time"}
    weights = (folder / "run" / "checkpoints" / "step_12" / "model.safetensors").read_bytes()
    return [{name: value for name, value in row.items() if name not in times} for row in rows], weights


def ends(process: subprocess.Popen, seconds: float = 300) -> None:
    try:
        _, error = process.communicate(timeout=seconds)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, error[-20000:]


def kill_alone(folder: Path, moments: list[float]) -> int:
    """How many hit: a run that goes on may have come to its end before the next moment."""
    hit = 0
    for moment in moments:
        process = start(folder, 1)
        time.sleep(moment)
        hit += process.poll() is None
        process.kill()
        process.communicate()
    ends(start(folder, 1))
    return hit


def kill_ranks(folder: Path, moments: list[float], ranks: int, chance: random.Random) -> int:
    process, hit = start(folder, ranks, restarts=len(moments)), 0
    for moment in moments:
        time.sleep(moment)
        alive = children(process.pid) if process.poll() is None else []
        if len(alive) < ranks:
            continue  # it is over, or torchrun is starting them
        os.kill(chance.choice(alive), signal.SIGKILL)
        hit += 1
        deadline = time.monotonic() + 40
        while set(children(process.pid)) & set(alive):  # the others end by themselves, or torchrun ends them
            assert time.monotonic() < deadline, "a rank outlived the death of another"
            time.sleep(0.05)
    ends(process)
    return hit


def survive(kills: int, ranks: int, seed: int, per_run: int = 4) -> tuple[int, int]:
    """(kills that hit, runs), until there are so many; AssertionError if a run does not come out as it should."""
    chance = random.Random(seed)
    with tempfile.TemporaryDirectory() as scratch:
        whole, began = Path(scratch) / "whole", time.monotonic()
        ends(start(whole, ranks))
        seconds, expected, hits, runs = time.monotonic() - began, curve(whole), 0, 0
        while hits < kills:
            runs += 1
            folder = Path(scratch) / f"killed-{runs}"
            moments = [chance.uniform(0.1, 0.9) * seconds for _ in range(min(per_run, kills - hits))]
            hits += kill_alone(folder, moments) if ranks == 1 else kill_ranks(folder, moments, ranks, chance)
            ours = curve(folder)
            assert ours[0] == expected[0], f"other metrics after kills at {moments}"
            assert ours[1] == expected[1], f"other weights after kills at {moments}"
    return hits, runs


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=2)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    hits, runs = survive(given.kills, given.ranks, given.seed)
    print(f"{hits} kills hit, in {runs} runs: the same curve each time")
