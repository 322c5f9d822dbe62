"""One whole training step, ours against TRL's GRPOTrainer: samples per second, same weights, batch and lengths.

    python benchmarks/training_step.py                  # the tiny policy, needs trl (requirements-extra.txt)
    python benchmarks/training_step.py --model FOLDER --problems 2 --completion 32

A step: P prompts, G completions of each drawn i.i.d. (parallel sampling on both sides; nothing stops early), group
advantages of random rewards, one update with clipping and no KL term (loss `grpo`), gradient norm, AdamW. Both sides
hold fp32 weights on the same threads of the CPU. TRL samples with `generate` and no vLLM. The sides take turns in
blocks, the first step of each is left out, the best block counts. CPU seconds are those of all threads of the process:
with --threads 1 they are what an idle machine would take, however busy this one is.
"""

import sys
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

# The root, not this folder, whose kernels.py transformers would take for the package of that name.
sys.path[0] = str(Path(__file__).resolve().parent.parent)
# ruff: noqa: E402
import torch
import transformers
import tyro
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

import rl
import tasks
import train
from sampler import Sampler, SamplingParams


@dataclass(frozen=True)
class Options:
    model: str = "tiny"
    """`tiny` (0.8 M parameters, not warm-started), or a folder or hub id of a causal LM"""
    problems: int = 8
    """P prompts in a step"""
    group_size: int = 16
    """G completions of each"""
    prompt: int = 32
    """words in a prompt; both sides are given the same tokens"""
    completion: int = 32
    """tokens in a completion"""
    steps: int = 5
    """measured steps in a block"""
    blocks: int = 2
    """blocks of each side"""
    threads: int = torch.get_num_threads()
    """of torch"""


def load(options: Options) -> train.Policy:
    config, task = train.Config(), tasks.make_task("synthetic")
    torch.manual_seed(0)
    return train.tiny_policy(config, task) if options.model == "tiny" else train.load_policy(options.model, task)


def make_prompts(options: Options, policy: train.Policy) -> list[str]:
    """Prompts of random words that are one token each for the tiny policy."""
    words = [word for word in policy.tokenizer.get_vocab() if word.isalpha()]
    generator = torch.Generator().manual_seed(0)
    picks = torch.randint(len(words), (options.problems, options.prompt), generator=generator)
    return [" ".join(words[i] for i in row) for row in picks.tolist()]


def clocks() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def our_steps(options: Options, policy: train.Policy, prompts: list[str]) -> list[tuple[float, float]]:
    """The clocks at the end of every step: sampler, advantages and train.update, as train.py runs them."""
    model, config = policy.model, train.Config(kl_coef=0.0, loss_type="grpo", micro_batch_tokens=16384)
    sampler = Sampler(model, [])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    ranks = train.Ranks(0, 1, torch.device("cpu"))
    ids = [policy.tokenizer(prompt)["input_ids"] for prompt in prompts]
    params = SamplingParams(max_new_tokens=options.completion)

    def step(number: int) -> None:
        roots = sampler.prefill(ids)
        rows = sampler.fork(roots, options.group_size)
        seeds = [number * len(rows) + i for i in range(len(rows))]
        completions = sampler.sample(rows, params, seeds)
        sampler.release(roots + rows)
        rewards = torch.rand(options.problems, options.group_size)
        batch = []
        for p, prompt in enumerate(ids):
            advantages = rl.group_advantages(rewards[p], rewards[p] > 0.5)
            for g in range(options.group_size):
                completion = completions[p * options.group_size + g]
                targets = range(len(prompt), len(prompt) + len(completion.ids))
                each = [advantages[g].item()] * len(completion.ids)
                row = rl.TrainingSequence(prompt + completion.ids, list(targets), each, completion.logps)
                batch.append((p, row))
        train.update(model, None, batch, config, optimizer, 0.0, options.completion, ranks)

    ends = []
    for number in range(options.steps + 1):
        step(number)
        ends.append(clocks())
    return ends


class StepEnds(transformers.TrainerCallback):
    def __init__(self):
        self.ends = []

    def on_step_end(self, *_, **__):
        self.ends.append(clocks())


def trl_steps(options: Options, policy: train.Policy, prompts: list[str]) -> list[tuple[float, float]]:
    """The clocks at the end of every step of GRPOTrainer."""
    samples = options.problems * options.group_size
    policy.tokenizer.padding_side = "left"
    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            output_dir=folder, per_device_train_batch_size=samples, num_generations=options.group_size,
            max_completion_length=options.completion, generation_kwargs=dict(min_new_tokens=options.completion),
            max_steps=options.steps + 1, loss_type="grpo", beta=0.0, learning_rate=1e-6, use_cpu=True, bf16=False,
            gradient_checkpointing=False, report_to="none", save_strategy="no", logging_steps=1000, disable_tqdm=True,
        )  # fmt: skip
        times = StepEnds()
        trainer = GRPOTrainer(
            model=policy.model,
            reward_funcs=lambda completions, **_: torch.rand(len(completions)).tolist(),
            args=config,
            train_dataset=Dataset.from_dict(dict(prompt=prompts * (options.steps + 1))),
            processing_class=policy.tokenizer,
            callbacks=[times],
        )
        trainer.train()
    return times.ends


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning)
    policy = load(options)
    prompts = make_prompts(options, policy)
    sides = dict(ours=our_steps, trl=trl_steps)
    best = dict.fromkeys(sides, (float("inf"), float("inf")))
    for _ in range(options.blocks):
        for name, run in sides.items():
            ends = run(options, policy, prompts)
            seconds = [(last - first) / options.steps for first, last in zip(ends[0], ends[-1], strict=True)]
            best[name] = tuple(map(min, best[name], seconds))
    samples = options.problems * options.group_size
    print(f"P={options.problems} G={options.group_size} prompt={options.prompt} completion={options.completion}")
    for name, (wall, cpu) in best.items():
        print(f"{name:<6}{wall:9.3f} s a step{samples / wall:10.1f} samples/s{cpu:9.3f} CPU s a step")
    ratios = [theirs / mine for theirs, mine in zip(best["trl"], best["ours"], strict=True)]
    print(f"ours / trl in samples per second: {ratios[0]:.2f}, by CPU seconds {ratios[1]:.2f}")


if __name__ == "__main__":
    main()
