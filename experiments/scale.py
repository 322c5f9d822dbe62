"""What a step would take on 1 to 512 GPUs: a plan from counts of bytes and operations, not a measurement.

    python experiments/scale.py                          # writes experiments/scale.md
    python experiments/scale.py --memory_tbs 4.8         # other hardware
    python experiments/scale.py --no_check               # without the runs on 1, 2 and 4 processes

A step is a chain of parts, each as long as its slowest resource; none of them overlap:

    Stage I    K * L_s forwards, one after another, of the P / N chains of a GPU: reads the weights each time
    Stage II   L_y forwards of P / N * K * M rows: reads weights and keys, or computes
    update     forward and backward of the rows' tokens, forward of the reference
    travel     FSDP2: in every micro-batch all weights twice (the embedding and head once), those of the reference
               once; the gradients once a step; the weights in bf16 once more for the next rollout

The counts of the last line are checked on gloo processes: the same train.py, a tiny model, every collective counted.
"""

import json
import math
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)  # not this folder
# ruff: noqa: E402
import torch
import tyro
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Qwen2Config, Qwen2ForCausalLM

import train

SHAPES = {  # of Qwen2.5: layers, width, inner width, heads, key heads, vocabulary, is the head the embedding
    "1.5B": (28, 1536, 8960, 12, 2, 151936, True),
    "7B": (28, 3584, 18944, 28, 4, 152064, False),
    "32B": (64, 5120, 27648, 40, 8, 152064, False),
}
LAYOUTS = ((1, 1), (8, 8), (64, 64), (64, 8), (512, 512), (512, 8))  # GPUs, and over how many of them to shard


@dataclass(frozen=True)
class Plan:
    memory_tbs: float = 3.35
    """bandwidth of a GPU's memory, TB/s"""
    tflops: float = 990.0
    """dense bf16 operations, 10**12 / s"""
    efficiency: float = 0.4
    """share of tflops that the update and large decode batches reach"""
    link_gbs: float = 450.0
    """GB/s of each GPU to the others of its node"""
    network_gbs: float = 50.0
    """GB/s of each GPU to other nodes"""
    forward_ms: float = 5.0
    """least time of one decode forward: launches and the host"""
    gpu_gb: float = 80.0
    """memory of a GPU"""
    problems_per_gpu: int = 4
    """P / N"""
    num_sketches: int = 16
    """K"""
    num_solutions: int = 1
    """M"""
    sketch_tokens: int = 32
    """L_s"""
    solution_tokens: int = 400
    """L_y"""
    prompt_tokens: int = 200
    """of a problem"""
    no_check: bool = False
    """leave out the runs on 1, 2 and 4 processes"""


def model_of(name: str) -> torch.nn.Module:
    layers, width, inner, heads, keys, vocabulary, tied = SHAPES[name]
    shape = Qwen2Config(
        num_hidden_layers=layers, hidden_size=width, intermediate_size=inner, num_attention_heads=heads,
        num_key_value_heads=keys, vocab_size=vocabulary, tie_word_embeddings=tied,
    )  # fmt: skip
    with torch.device("meta"):
        return Qwen2ForCausalLM(shape)


def decode(plan: Plan, model, rows: int, steps: int, context: int) -> float:
    """Seconds of `steps` forwards of one token in each of `rows` rows, which hold `context` tokens on the average."""
    weights = sum(p.numel() for p in model.parameters())
    _, cached, _ = train.token_bytes(model, train.Config(), on_gpu=True)
    cache = rows * context * cached
    reading = (2 * weights + cache) / (plan.memory_tbs * 1e12)
    computing = 2 * weights * rows / (plan.tflops * 1e12 * plan.efficiency)
    return steps * max(reading, computing, plan.forward_ms / 1e3)


def seconds(plan: Plan, model, gpus: int, problems: int, shards: int) -> dict[str, float]:
    """Of each part of a step, with so many problems on each GPU, sharded over so many of them."""
    weights = sum(p.numel() for p in model.parameters())
    answers = problems * plan.num_sketches * plan.num_solutions
    history = plan.prompt_tokens + plan.num_sketches * plan.sketch_tokens / 2
    whole = plan.prompt_tokens + plan.solution_tokens
    config = train.Config(kl_coef=0.001, gradient_checkpointing=True)
    micros = math.ceil(answers * whole / train.fitting_tokens(model, config, on_gpu=True))
    shards = min(shards, gpus)
    bandwidth = (plan.link_gbs if shards <= 8 else plan.network_gbs) * 1e9
    travelling = (shards - 1) / shards * weights / bandwidth
    replicas = 2 * 4 * (1 - shards / gpus) * weights / shards / (plan.network_gbs * 1e9)  # the all-reduce between them
    return {
        "Stage I": decode(plan, model, problems, plan.num_sketches * plan.sketch_tokens, history),
        "Stage II": decode(plan, model, answers, plan.solution_tokens, plan.prompt_tokens + plan.solution_tokens / 2),
        "update": (8 + 2) * weights * answers * whole / (plan.tflops * 1e12 * plan.efficiency),  # one forward again
        "gather": (3 * 4 * micros + 2) * travelling,
        "reduce": 4 * travelling + replicas,
    }


def enough_problems(plan: Plan, model, gpus: int, shards: int, share: float = 0.1) -> int:
    """The least number of problems on each GPU with which Stage I is less than `share` of the step."""
    problems = 1
    while (parts := seconds(plan, model, gpus, problems, shards))["Stage I"] >= share * sum(parts.values()):
        problems += 1
    return problems


def planned(plan: Plan) -> list[str]:
    lines = [
        "| model | GPUs | sharded over | problems a step | Stage I | Stage II | update | gather | reduce | step, s "
        "| GB a GPU | Stage I below 10 % from P |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name in SHAPES:
        model = model_of(name)
        for gpus, shards in LAYOUTS:
            config = train.Config(kl_coef=0.001, gradient_checkpointing=True, shard_ranks=shards)
            config.micro_batch_tokens = train.fitting_tokens(model, config, on_gpu=True)
            parts = seconds(plan, model, gpus, plan.problems_per_gpu, shards)
            answers = plan.problems_per_gpu * plan.num_sketches * plan.num_solutions
            drafts = plan.num_sketches * plan.sketch_tokens
            tokens = gpus * (answers * plan.solution_tokens + plan.problems_per_gpu * (drafts + plan.prompt_tokens))
            held = sum(train.memory(model, config, tokens, plan.solution_tokens, gpus, on_gpu=True).values()) / 1e9
            fits = f"{held:.0f}" + (" (does not fit)" if held > plan.gpu_gb else "")
            times = " | ".join(f"{value:.1f}" for value in parts.values())
            problems = gpus * enough_problems(plan, model, gpus, shards)
            lines.append(
                f"| {name} | {gpus} | {shards} | {gpus * plan.problems_per_gpu} | {times} | {sum(parts.values()):.1f} "
                f"| {fits} | {problems} |"
            )
    return lines


# ---------------------------------------------------------------------------------------------------------------------
# The check


class Collectives(TorchDispatchMode):
    """Counts calls, and bytes of the whole tensors, of all-gathers and reduce-scatters of tensors."""

    NAMES = {"allgather": "gather", "all_gather": "gather", "reduce_scatter": "reduce"}

    def __init__(self):
        super().__init__()
        self.calls, self.bytes = Counter(), Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        name = str(function)
        kind = next((kind for part, kind in self.NAMES.items() if part in name and "wait" not in name), None)
        tensors = [t for t in tree_leaves([args, out]) if torch.is_tensor(t) and t.is_floating_point()]  # no objects
        if kind and tensors and name.startswith(("c10d", "_c10d")):
            self.calls[kind] += 1
            self.bytes[kind] += max(t.nbytes for t in tensors)
        return out


FLAGS = dict(
    task="countdown", task_options=("difficulty=easy",), num_sketches=4, problems_per_step=8, steps=1, tiny_width=64,
    tiny_layers=4, warm_start_steps=0, eval_problems=1, eval_samples=1, eval_k=(1,), eval_every=0, kl_coef=0.1,
    sketch_context="drop",  # "is" needs one more forward of the policy
)  # fmt: skip


def counting(folder: str) -> None:
    """On each rank of torchrun: one step of train.py, what travelled in it, and what was held."""
    update, refresh, found = train.update, train.Run.refresh_actor, {}

    def counted(name, function):
        def run(*args):
            with Collectives() as mode:
                result = function(*args)
            found[name] = dict(calls=dict(mode.calls), bytes=dict(mode.bytes))
            return result

        return run

    def micro_batches(*args, wrapped=train.micro_batches):
        micros = wrapped(*args)
        found["micros"] = len(micros)
        return micros

    train.draw, train.micro_batches = lambda *args: None, micro_batches
    train.update, train.Run.refresh_actor = counted("update", update), counted("refresh", refresh)
    save = train.RunFolder.save

    def held(self, run, state):
        parameters = list(run.model.parameters())
        found["parameters"] = [sum(p.numel() for p in parameters), len(parameters)]
        found["blocks"] = sum(p.numel() for name, p in run.model.named_parameters() if ".layers." in name)
        found["held"] = sum(getattr(p, "to_local", lambda p=p: p)().nbytes for p in parameters)
        save(self, run, state)

    train.RunFolder.save = held
    train.main(train.Config(**FLAGS, output_dir=f"{folder}/run"))
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        [row] = map(json.loads, Path(folder, "run", "metrics.jsonl").read_text().splitlines())
        Path(folder, "found.json").write_text(json.dumps(found | dict(tokens=row["generated_tokens"])))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def checked() -> list[str]:
    """Measured on gloo against what the plan's formulas count, for one update of m micro-batches and L layers."""
    lines = [
        "| processes | tokens | micro-batches m | all-gathers in the update: counted, measured | their bytes: counted, "
        "measured | reduce-scatters | their bytes | all-gathers after it | their bytes | weights a process, bytes |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for ranks in (1, 2, 4):
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
            quiet = dict(cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            subprocess.run([*command, __file__, "--count", folder], check=True, **quiet)
            found = json.loads(Path(folder, "found.json").read_text())
        weights, tensors = found["parameters"]
        micros, layers = found["micros"], FLAGS["tiny_layers"]
        many = ranks > 1
        # a forward gathers every block and the root; the backward the blocks again; the reference has a forward only
        calls = many * micros * (3 * layers + 2)
        update, refresh = found["update"], found.get("refresh", dict(calls={}, bytes={}))
        expected = many * micros * 4 * (2 * weights + found["blocks"])
        lines.append(
            f"| {ranks} | {found['tokens']} | {micros} | {calls}, {update['calls'].get('gather', 0)} "
            f"| {expected:,}, {update['bytes'].get('gather', 0):,} "
            f"| {many * (layers + 1)}, {update['calls'].get('reduce', 0)} "
            f"| {many * 4 * weights:,}, {update['bytes'].get('reduce', 0):,} "
            f"| {many * tensors}, {refresh['calls'].get('gather', 0)} "
            f"| {many * 4 * weights:,}, {refresh['bytes'].get('gather', 0):,} | {found['held']:,} |"
        )
    return lines


INTRODUCTION = """# Plan for scale

**A plan, not a measurement.** Made by `python experiments/scale.py` from counts of bytes and operations: nccl, bf16 and
these models have not been run. Seconds of a step, part by part, none of them overlapping. {problems_per_gpu} problems
a GPU, K {num_sketches}, M {num_solutions}, {prompt_tokens} prompt tokens, {sketch_tokens} of a sketch,
{solution_tokens} of a solution; memory {memory_tbs} TB/s, {tflops:.0f} Tflop/s at {efficiency:.0%},
{link_gbs:.0f} GB/s in a node of 8 and {network_gbs:.0f} GB/s beyond, {forward_ms:g} ms for a decode forward at least.
Weights travel in fp32 in the update; gradient checkpointing; micro-batches of the derived size.
"""
CONCLUSION = """
The serial stage reads the weights K * L_s times, however few problems a GPU has; the rest of the step grows with them
until the rows of a GPU make a forward compute-bound. The last column is the P (of all GPUs) from which Stage I takes
less than a tenth of the step. Gathering the weights in every micro-batch is half of a step of 7B within a node and nine
tenths of it beyond: shard within a node (`--shard_ranks 8`) or raise `--micro_batch_tokens`. Gradients are counted
whole, for they are added up over micro-batches before they travel once: that, and the whole copy that samples, is what
does not fit for 32B.
"""
CHECK = """
## Checked: what travels, measured on gloo processes of this machine

One step of a policy of 4 layers, width 64; whole tensors of floats. Tokens are the same on any number of
processes; weights a process fall as 1/N.
"""


def main() -> None:
    plan = tyro.cli(Plan, description=__doc__, use_underscores=True)
    text = [INTRODUCTION.format(**vars(plan)), *planned(plan), CONCLUSION]
    if not plan.no_check:
        text += [CHECK, *checked()]
    (ROOT / "experiments" / "scale.md").write_text("\n".join(text) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--count"]:
        counting(sys.argv[2])
    else:
        main()
