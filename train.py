"""Train a policy with SESA or GRPO:  torchrun train.py --task synthetic

One step of training, from top to bottom:

    groups = explorer.rollout(problems, plan, seed)      # sesa.py: sketches, solutions, outcomes
    rewards, advantages = sesa.credit(outcomes, ...)     # over the groups of all ranks
    rows = [row for g in groups for row in sesa.sequences(g, sketch_context)]
    update(policy, reference, rows, ...)                 # rl.policy_loss through kernels.linear_policy_loss

The same code runs on a CPU, a GPU, and several of either: problems are shared out over the ranks of torchrun, weights
are sharded by FSDP2, gradients are summed. Loss weights are made from global counts (rl.token_weights), so that nothing
depends on how the work is split. Every random number is a function of (seed, step, problem, index): a run that is
stopped and resumed draws the same tokens as one that is not.

A run lives in its folder: config.json, metrics.jsonl, samples.jsonl, summary.json, figures/, checkpoints/step_N/.
The file tells it in order: flags, policy, the loop, the update, evaluation, the run folder, ranks, figures, entry.
"""

from __future__ import annotations

import copy
import dataclasses
import fcntl
import hashlib
import importlib.util
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import count, islice, product
from pathlib import Path
from statistics import fmean
from typing import Literal

import tyro

# ---------------------------------------------------------------------------------------------------------------------
# Flags, in the groups of --help


@dataclass
class TaskFlags:
    task: str = "synthetic"
    """synthetic, countdown, sokoban, frozenlake, sudoku, math, jsonl:FILE, gym:NAME or FILE.py:CLASS"""
    task_options: tuple[str, ...] = ()
    """options of the task, such as difficulty=easy treasure_seed=1"""
    prompts: str | None = None
    """JSON file that replaces some of the prompts direct, sketch, next, list, solve, turn"""


@dataclass
class PolicyFlags:
    model: str = "tiny"
    """tiny (made and warm-started on the spot), a hub id, a folder, or a .gguf file"""
    reference: str | None = None
    """model of the KL term (tiny, a hub id, a folder, a .gguf file); the one that training starts from if not given"""
    tiny_width: int = 128
    """hidden width of the tiny policy"""
    tiny_layers: int = 2
    """layers of the tiny policy"""
    warm_start_steps: int | None = None
    """steps of maximum likelihood on demonstrations, tiny policy only"""
    warm_start_batch: int = 32
    """rows of demonstrations (a chain of sketches, a solution) per step"""
    warm_start_lr: float | None = None
    """peak learning rate of the warm start"""


@dataclass
class MethodFlags:
    method: Literal["sesa", "grpo"] = "sesa"
    """sesa: sketches one after another, then solutions in parallel; grpo: answers i.i.d."""
    problems_per_step: int | None = None
    """P: problems (or, where the sketches are the answers, chains) of a step, over all ranks"""
    num_sketches: int | None = None
    """K: sketches of a problem, or guesses of a chain"""
    num_solutions: int = 1
    """M: solutions of each sketch"""
    group_size: int | None = None
    """G: i.i.d. answers of a problem with --method grpo; those of a sesa group if not given, so that methods compare"""
    num_direct: int = 0
    """D: answers of a sesa group that are drawn without a sketch, beside the K*M"""
    explore: Literal["always", "stuck"] = "always"
    """stuck: sketches only for problems that none of the D direct answers solved, else more direct answers"""
    sketches: Literal["sequential", "iid", "list", "placebo"] = "sequential"
    """how Stage I draws: after the earlier sketches, with an empty history, all in one text, or another problem's"""
    sketch_context: Literal["keep", "drop", "is", "imitate", "distill"] | None = None
    """what the loss conditions on: keep the sketch; drop it, or with importance weights, wins only; keep + imitate"""
    distill_coef: float = 0.3
    """weight of imitate in distill"""
    advantage_scale: Literal["std", "none", "loo", "passk"] | None = None
    """divide by the group's std, do not, leave-one-out baseline, or the pass@k advantage"""
    pass_k: int = 8
    """k of the passk advantage"""
    pass_k_end: int | None = None
    """what k falls (or rises) to over the run; pass_k if not given"""
    baseline: Literal["chain", "position", "batch"] = "position"
    """where guesses in a chain are the answers: mean over the chain, over chains at one position, or over the batch"""
    repeats: Literal["zero", "full"] | None = None
    """what an answer earns that its group (or chain) already holds"""
    rarity: float | None = None
    """a success found by n groups of the batch earns n ** -rarity of its reward"""


@dataclass
class SamplingFlags:
    temperature: float = 1.0
    """of sampling in training, and of the trained distribution"""
    top_p: float = 1.0
    """nucleus sampling, in evaluation only: training needs the whole distribution"""
    max_sketch_tokens: int | None = None
    """limit of one sketch; the task's if not given"""
    max_new_tokens: int | None = None
    """limit of one solution, or of one turn of an episode; the task's if not given"""
    max_rows: int = 1024
    """sequences decoded at once; more wait their turn"""
    cache_gb: float | None = None
    """memory budget of the sampler's keys and values, in GB; what does not fit waits"""


@dataclass
class LossFlags:
    loss_type: Literal["grpo", "dr_grpo", "dapo"] = "grpo"
    """what a token weighs: 1/length of its sequence, a constant, or 1/all tokens"""
    clip_low: float = 0.2
    """lower clip of the ratio, 1 - clip_low"""
    clip_high: float = 0.2
    """upper clip of the ratio, 1 + clip_high"""
    kl_coef: float | None = None
    """weight of KL(policy || reference)"""
    kl_coef_end: float | None = None
    """what kl_coef falls to, linearly over the first 70 % of the steps; kl_coef if not given"""
    kl_type: Literal["exact", "k1", "k2", "k3"] = "exact"
    """sum over the vocabulary, or an estimate from the sampled token (rl.kl_estimate says what each is worth)"""
    entropy_coef: float = 0.0
    """weight of an entropy bonus"""
    is_cap: float = 2.0
    """importance weights are truncated here (--sketch_context is)"""
    is_level: Literal["token", "sequence"] = "token"
    """importance weight of each token, or of the sequence"""


@dataclass
class OptimisationFlags:
    steps: int | None = None
    """training steps, each one rollout"""
    learning_rate: float | None = None
    """peak rate of AdamW; 1e-6 for a pretrained model if not given"""
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """decay after the warm-up"""
    warmup_steps: int = 10
    """steps of linear warm-up"""
    weight_decay: float = 0.0
    """of AdamW"""
    max_grad_norm: float = 1.0
    """clip the gradient to this norm"""
    minibatches: int = 1
    """updates per rollout, each on its share of the problems; with 1 the ratio is 1 and the clip idle"""
    micro_batch_tokens: int | None = None
    """tokens, padding included, of one forward and backward; changes memory and speed, not results"""
    gradient_checkpointing: bool = False
    """recompute activations in the backward: less memory, more time"""
    shard_ranks: int | None = None
    """shard weights, gradients and optimizer over so many ranks and replicate over the rest; over all if not given"""


@dataclass
class EvaluationFlags:
    eval_only: bool = False
    """evaluate --model and write summary.json, without training"""
    eval_first: bool = True
    """evaluate before training, too"""
    eval_every: int = 50
    """steps between evaluations; 0 evaluates before and after training only"""
    eval_problems: int = 128
    """validation problems (one, where the task is one problem)"""
    eval_samples: int | None = None
    """samples per validation problem; 1,000 where the task is one problem"""
    eval_k: tuple[int, ...] = (1, 2, 4, 8, 16, 20, 100, 320, 1000)
    """k of pass@k and Coverage@k"""
    eval_temperature: float = 1.0
    """of sampling in evaluation"""


@dataclass
class RunFlags:
    seed: int = 0
    """of everything that is drawn"""
    output_dir: str | None = None
    """run folder; runs/<task>-<method>-<seed> if not given"""
    resume: bool = False
    """continue the run in output_dir from its last checkpoint"""
    resume_auto: bool = False
    """--resume where there is a checkpoint, else start: what torchrun --max-restarts needs"""
    dry_run: bool = False
    """print what would be done, with all derived sizes, and exit"""
    show: int = 0
    """print so many problems with prompts, demonstrations and outcomes, and exit"""
    checkpoint_every: int = 50
    """steps between checkpoints; one is written at the end, and on Ctrl-C or SIGTERM, in any case"""
    keep_checkpoints: int = 2
    """how many of the last checkpoints to keep, beside the best"""
    sample_every: int = 10
    """steps between the decoded samples in samples.jsonl"""
    device: Literal["cpu", "cuda"] | None = None
    """the GPU if there is one"""
    report_to: Literal["none", "tensorboard", "wandb", "trackio"] = "none"
    """send metrics, flags and samples there, too, under the names of metrics.jsonl"""
    push_to_hub: str | None = None
    """name of a model repository that is to get the best checkpoint at the end"""


@dataclass
class LookFlags:
    ask: str | None = None
    """a question to --model, without training: --num_sketches answers in sequence beside as many i.i.d.; -: on stdin"""
    two_stage: bool = False
    """of --ask: sketches in sequence, and an answer to each"""
    json: bool = False
    """of --ask: print one JSON object"""
    compare: tuple[str, ...] = ()
    """run folders: one picture, output_dir/compare.png (here if not given), and a table; seeds are put together"""


@dataclass
class Config(
    LookFlags, RunFlags, EvaluationFlags, OptimisationFlags, LossFlags, SamplingFlags, MethodFlags, PolicyFlags,
    TaskFlags,
):
    """Every flag. One left at None takes the value measured best for its kind of task and policy: see ANSWERS below."""


def command_line(
    task: TaskFlags, policy: PolicyFlags, method: MethodFlags, sampling: SamplingFlags, loss: LossFlags,
    optimisation: OptimisationFlags, evaluation: EvaluationFlags, run: RunFlags, look: LookFlags,
) -> Config:  # fmt: skip
    """Reinforcement learning with sequential-sampling exploration (SESA) or GRPO.

    A flag left at None takes the value that was measured best for its kind of task and policy; --dry_run shows it.
    """
    groups = (task, policy, method, sampling, loss, optimisation, evaluation, run, look)
    return Config(**{name: value for group in groups for name, value in vars(group).items()})


def parse() -> Config:
    return tyro.cli(command_line, config=(tyro.conf.OmitArgPrefixes,), use_underscores=True)


if __name__ == "__main__":  # before the slow imports: --help and a mistyped flag are answered at once
    COMMAND = parse()

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import transformers
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as dcp_state
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from tqdm import tqdm

import kernels
import rl
import sesa
import tasks
from sampler import Sampler, SamplingParams, output_scaling

# What None stands for. Where the sketches are the answers, measured by experiments/collapse.py; else the paper's, with
# what a tiny policy needs by experiments/LOG.md.
ANSWERS = dict(
    steps=400, problems_per_step=16, num_sketches=16,
    sketch_context="distill", advantage_scale="none", repeats="zero", rarity=0.5,
    kl_coef=0.1, kl_coef_end=0.02, learning_rate=3e-4, micro_batch_tokens=16384,
    warm_start_steps=1000, warm_start_lr=3e-3, eval_samples=1000,
)  # fmt: skip
TWO_STAGE = dict(
    steps=200, problems_per_step=8, num_sketches=16,
    sketch_context="drop", advantage_scale="std", repeats="full", rarity=0.0,
    kl_coef=0.001, kl_coef_end=None, learning_rate=1e-4, micro_batch_tokens=2048,
    warm_start_steps=1500, warm_start_lr=2e-3, eval_samples=16,
)  # fmt: skip
GRPO = dict(advantage_scale="std", repeats="full", rarity=0.0, learning_rate=3e-4)
PRETRAINED = dict(learning_rate=1e-6, micro_batch_tokens=None)  # of the tokens: see fitting_tokens


class UserError(ValueError):
    """What the user can mend: ends the program with this one line and exit code 2."""


@contextmanager
def user_errors() -> Iterator[None]:
    """Around what only fails where the input is wrong: a ValueError of the other modules is for the user to read."""
    try:
        yield
    except ValueError as error:
        raise UserError(str(error)) from error


def resolve(config: Config, task: tasks.Task) -> Config:
    """The config with every None that has a derived value filled in, checked."""
    defaults = dict(TWO_STAGE if task.two_stage else ANSWERS)
    defaults |= GRPO if config.method == "grpo" else {}
    defaults |= {} if is_tiny(config.model) else PRETRAINED
    defaults |= {} if config.kl_coef is None else dict(kl_coef_end=config.kl_coef)
    folder = f"runs/{re.sub(r'[^0-9A-Za-z]', '_', config.task)}-{config.method}-{config.seed}"
    config = filled(config, output_dir=folder + "-eval" * config.eval_only, **defaults)
    rest = dict(group_size=group_answers(config), kl_coef_end=config.kl_coef, pass_k_end=config.pass_k)
    config = filled(config, **rest)
    check((*ranges(config), *rules(config, task)))
    return config


def check(verdicts: Iterable[tuple[bool, str]]) -> None:
    for broken, line in verdicts:
        if broken:
            raise UserError(line)


def is_tiny(model: str) -> bool:
    """The tiny policy, or what a run of it has saved."""
    return model == "tiny" or notes(model).get("tiny", False)


def filled(config: Config, **defaults) -> Config:
    given = {name: value for name, value in defaults.items() if getattr(config, name) is None}
    return dataclasses.replace(config, **given)


def group_answers(config: Config) -> int:
    """Answers of a group: i.i.d., or direct and through sketches."""
    mixed = config.num_direct + config.num_sketches * config.num_solutions
    return config.group_size or mixed if config.method == "grpo" else mixed


POSITIVE = """problems_per_step num_sketches num_solutions group_size minibatches micro_batch_tokens
    max_sketch_tokens max_new_tokens cache_gb max_rows temperature learning_rate warmup_steps max_grad_norm
    distill_coef is_cap pass_k pass_k_end eval_problems eval_samples warm_start_batch warm_start_lr tiny_width
    tiny_layers keep_checkpoints sample_every shard_ranks"""
NOT_NEGATIVE = """steps seed num_direct kl_coef kl_coef_end entropy_coef rarity clip_low clip_high weight_decay
    eval_every checkpoint_every warm_start_steps eval_temperature show"""


def ranges(config: Config) -> Iterator[tuple[bool, str]]:
    """(is it broken, the line for the user) of each rule about one number."""
    for name in POSITIVE.split():
        value = getattr(config, name)
        sound = value is None or 0 < value < math.inf  # nan is neither
        yield not sound, f"--{name} {value}: must be above 0"
    for name in NOT_NEGATIVE.split():
        value = getattr(config, name)
        yield not 0 <= value < math.inf, f"--{name} {value}: must be 0 or more"


def rules(config: Config, task: tasks.Task) -> Iterator[tuple[bool, str]]:
    """(is it broken, the line for the user) of each rule about several flags, or a flag and the task."""
    c, grpo, chains, size = config, config.method == "grpo", chain_credit(config, task), group_answers(config)
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    sized = "--group_size" if grpo else "--num_sketches times --num_solutions (and --num_direct)"
    yield size < 2, f"{sized} is {size}: a group of one has nothing to be compared with; make it 2 or more"
    many = c.minibatches > c.problems_per_step
    yield many, f"--minibatches {c.minibatches}: at most the number of problems in a step, {c.problems_per_step}"
    alone = chains and c.baseline == "position" and c.problems_per_step < 2
    yield alone, "--problems_per_step 1: --baseline position compares chains; make it 2 or more"
    yield not 0 < c.top_p <= 1, f"--top_p {c.top_p}: must be above 0 and at most 1"
    cut = c.top_p < 1 and not c.eval_only
    yield cut, f"--top_p {c.top_p}: the loss trains the whole distribution; leave it at 1, or use it with --eval_only"
    beyond = c.advantage_scale == "passk" and max(c.pass_k, c.pass_k_end) > size
    yield beyond, f"--pass_k {c.pass_k}, --pass_k_end {c.pass_k_end}: at most the {size} answers of a group"
    unscaled = chains and c.advantage_scale in ("loo", "passk")
    yield unscaled, f"--advantage_scale {c.advantage_scale}: guesses in a chain take none or std"
    most_k = min(c.eval_samples, size) if task.two_stage else c.eval_samples
    unseen = not 1 <= min(c.eval_k, default=0) <= most_k
    yield unseen, f"--eval_k {c.eval_k}: the least must be from 1 to {most_k}, the samples of a problem"
    uneven = c.shard_ranks and ranks % c.shard_ranks
    yield uneven, f"--shard_ranks {c.shard_ranks}: must divide the number of ranks, {ranks}"
    drawn, listed = f"--sketches {c.sketches}:", c.sketches == "list"
    yield c.sketches != "sequential" and grpo, f"{drawn} there is no Stage I to vary with --method grpo"
    unpaired = c.sketches == "placebo" and (c.problems_per_step < 2 or ranks > 1)
    yield unpaired, f"{drawn} takes those of the problem before: needs --problems_per_step 2 or more, on one rank"
    yield listed and c.model == "tiny", f"{drawn} the tiny policy writes no lines; needs a pretrained model"
    answers = f"{drawn} where the sketches are the answers there are only sequential, iid and placebo"
    yield listed and not task.two_stage, answers
    unmixed = c.num_direct > 0 and (grpo or not task.two_stage)
    yield unmixed, f"--num_direct {c.num_direct}: mixes groups of --method sesa on a task with a solution stage only"
    blind = c.explore == "stuck" and not c.num_direct
    yield blind, "--explore stuck: needs --num_direct 1 or more, the answers that tell whether a problem is stuck"
    across = chains and task.num_problems("train") > 1 and (c.baseline != "chain" or c.rarity)
    yield across, "chains about different problems are not comparable: use --baseline chain --rarity 0"
    missing = c.report_to != "none" and not importlib.util.find_spec(c.report_to)
    yield missing, f"--report_to {c.report_to}: the package is not installed; pip install {c.report_to}"
    untrained = c.eval_only or not c.steps
    yield untrained and c.push_to_hub, f"--push_to_hub {c.push_to_hub}: nothing is trained; needs --steps above 0"
    yield untrained and not c.eval_first, "--eval_first False: nothing else would be evaluated; needs --steps above 0"


def chain_credit(config: Config, task: tasks.Task) -> bool:
    """Each guess of a chain is rewarded by itself."""
    return config.method == "sesa" and not task.two_stage


def parse_options(pairs: Sequence[str]) -> dict[str, str]:
    """("difficulty=easy", "chain=8") -> {"difficulty": "easy", "chain": "8"}; the task knows the types."""
    for pair in pairs:
        if "=" not in pair:
            raise UserError(f"--task_options {pair!r}: must be name=value")
    return dict(pair.split("=", 1) for pair in pairs)


# ---------------------------------------------------------------------------------------------------------------------
# Policy


@dataclass
class Policy:
    """A causal LM with its tokenizer, its prompts and the token limits of one sketch and one solution."""

    model: nn.Module
    tokenizer: object
    prompts: sesa.Prompts
    limits: dict[str, int]
    tiny: bool = False

    @property
    def stop_ids(self) -> list[int]:
        """What ends a turn: the generation config's ids, the one of the chat template first."""
        ids = self.model.generation_config.eos_token_id
        ids = [self.tokenizer.eos_token_id, *(ids if isinstance(ids, list) else [ids])]
        return [i for i in dict.fromkeys(ids) if i is not None]

    def chat(self) -> sesa.Chat:
        return sesa.Chat(self.tokenizer, self.stop_ids)

    def explorer(self, task: tasks.Task, **room) -> sesa.Explorer:
        """What draws from this policy; room: of the Sampler."""
        chat = self.chat()
        sampler = Sampler(self.model, self.stop_ids, decode=chat.decode, **room)
        return sesa.Explorer(sampler, task, chat, self.prompts)

    def token_limits(self, config: Config) -> dict[str, int]:
        given = dict(sketch=config.max_sketch_tokens, solution=config.max_new_tokens)
        return {kind: limit or self.limits[kind] for kind, limit in given.items()}

    def save(self, folder: Path) -> None:
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        extra = dict(prompts=vars(self.prompts), limits=self.limits, tiny=self.tiny)
        (folder / "sesa.json").write_text(json.dumps(extra, ensure_ascii=False, indent=1))


def notes(model: str) -> dict:
    """What `Policy.save` has left beside the weights; {} in a folder of others."""
    file = Path(model) / "sesa.json"
    return json.loads(file.read_text()) if file.exists() else {}


def load_policy(name: str, task: tasks.Task, prompts: str | None = None, weights: bool = True) -> Policy:
    """A policy from a hub id, a folder (of ours: with its prompts and limits) or a .gguf file, in fp32.

    Without weights nothing but its config and tokenizer is read (or downloaded).
    """
    path, remedy = Path(name), "give tiny, a hub id, a folder or a .gguf file"
    if not path.exists() and (name.startswith((".", "/", "~")) or name.endswith(".gguf")):
        raise UserError(f"--model {name}: there is no such file or folder; {remedy}")
    try:
        model, tokenizer = load_pretrained(path, weights)
    except Exception as error:  # a missing, damaged or foreign file raises whatever its bytes lead to
        raise UserError(f"--model {name}: cannot be loaded ({first_line(error)}); {remedy}") from None
    default = getattr(task, "prompts", sesa.default_prompts(False, task.two_stage))
    limits = dict(sketch=task.sketch_tokens, solution=task.solution_tokens)
    ours = dict(prompts=vars(default), limits=limits, tiny=False) | notes(name)
    ours["prompts"] = load_prompts(prompts, sesa.Prompts(**ours["prompts"]))
    policy = Policy(model, tokenizer, **ours)
    if getattr(model.get_output_embeddings(), "bias", None) is not None:
        raise UserError(f"--model {name}: its output head has a bias, which the fused loss does not compute")
    if not policy.stop_ids:
        raise UserError(f"--model {name}: its tokenizer names no end-of-sequence token; set one in its config")
    return policy


def load_pretrained(path: Path, weights: bool) -> tuple[nn.Module, object]:
    """(model, tokenizer) as transformers reads them; whatever goes wrong raises."""
    name, options, auto = str(path), {}, transformers.AutoModelForCausalLM
    if path.suffix == ".gguf":
        name, options = str(path.parent), dict(gguf_file=path.name)
    tokenizer = transformers.AutoTokenizer.from_pretrained(name, **options)
    if not weights:
        with torch.device("meta"):
            return auto.from_config(transformers.AutoConfig.from_pretrained(name, **options)), tokenizer
    if options:
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    return auto.from_pretrained(name, dtype=torch.float32, **options), tokenizer


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def load_prompts(path: str | None, default: sesa.Prompts) -> sesa.Prompts:
    if path is None:
        return default
    try:
        return default.replaced(json.loads(Path(path).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"--prompts {path}: {error}; must be a JSON object of texts") from None


def tiny_policy(config: Config, task: tasks.Task) -> Policy:
    """A Llama of under a million parameters with one token per word of the task, not yet trained."""
    if not task.words:
        raise UserError(f"--model tiny: {task.name} has no closed vocabulary; give a pretrained model")
    tokenizer, width = word_tokenizer([*sesa.TINY_WORDS, *task.words]), config.tiny_width
    shape = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=3 * width,
        num_hidden_layers=config.tiny_layers, num_attention_heads=max(1, width // 32), head_dim=32,
        max_position_embeddings=2048, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # one base, whatever the seed of training
        model = transformers.LlamaForCausalLM(shape)
    prompts = load_prompts(config.prompts, sesa.default_prompts(True, task.two_stage))
    return Policy(model, tokenizer, prompts, dict(task.tiny_tokens), tiny=True)


def word_tokenizer(words: Sequence[str]):
    """One token for each word between spaces."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    special = dict(pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    words = dict.fromkeys([*special.values(), *words])
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    options = dict(tokenizer_object=core, clean_up_tokenization_spaces=False)
    return transformers.PreTrainedTokenizerFast(**options, **special)


def starting_policy(name: str, config: Config, task: tasks.Task, ranks: Ranks) -> Policy:
    """Rank 0 reads it or makes it. The others get all but the weights, which `Ranks.shard` hands out."""

    def make() -> Policy:
        if name == "tiny":
            return warm_start(config, task, ranks.device)
        with patience(f"loading {name}"):
            return load_policy(name, task, config.prompts)

    return ranks.first(make, lambda policy: dataclasses.replace(policy, model=hollow(policy.model, device="meta")))


def hollow(model: nn.Module, **options) -> nn.Module:
    """The model with its buffers and without its weights: new parameters, tied as before, that hold nothing yet.

    options: device and dtype of the parameters.
    """
    empty = {id(p): nn.Parameter(torch.empty_like(p, **options), p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, empty)


def warm_start(config: Config, task: tasks.Task, device: torch.device) -> Policy:
    """The tiny policy after maximum likelihood on demonstrations; made once, cached by all that it depends on."""
    policy = tiny_policy(config, task)
    if config.warm_start_steps == 0:
        return policy
    cache = warm_start_cache(config, policy, task)
    if not cache.exists():
        demonstrate(config, policy, task, device)
        if not cache.exists():  # another run may have been faster
            write_folder(cache, policy.save, Ranks(0, 1, device))
    policy.model = load_policy(str(cache), task).model
    return policy


def warm_start_cache(config: Config, policy: Policy, task: tasks.Task) -> Path:
    """The folder of a warm-started policy, named by what makes it: recipe, model, words, prompts, demonstrations."""
    recipe = [config.warm_start_steps, config.warm_start_batch, config.warm_start_lr]
    recipe.append(policy.model.config.to_json_string(use_diff=False))
    recipe += [policy.tokenizer.get_vocab(), vars(policy.prompts)]
    rows = demonstration_rows(policy, task, 64, seed=0)
    recipe += [str(row.ids) for row in rows]
    text = json.dumps(recipe, sort_keys=True, default=str)
    key = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "sesa" / f"{task.name}-{key}"


def demonstration_rows(policy: Policy, task: tasks.Task, count: int, seed: int) -> Iterator[rl.TrainingSequence]:
    """The conversations of `count` demonstrations, as rows to be learnt by heart."""
    explorer = sesa.Explorer(None, task, policy.chat(), policy.prompts)
    demonstrations = task.demonstrations(random.Random(seed))
    for demonstration in islice(demonstrations, count):
        for trajectory in explorer.demonstration(demonstration):
            trajectory.advantages = [1.0]
            yield sesa.as_sampled(trajectory)


def demonstrate(config: Config, policy: Policy, task: tasks.Task, device: torch.device) -> None:
    """Maximum likelihood on the task's demonstrations."""
    model = policy.model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.95), weight_decay=0.01)
    steps, batch = config.warm_start_steps, config.warm_start_batch
    rows = demonstration_rows(policy, task, steps * batch, seed=1)
    progress = tqdm(range(steps), desc="warm start", disable=None)
    for step in progress:
        taken = list(islice(rows, batch))  # a demonstration is one row or more
        total = sum(len(row.targets) for row in taken)
        loss = 0.0
        for micro in rl.micro_batches(taken, config.micro_batch_tokens):
            part, _ = score(model, micro, device, lambda stats, total=total: -stats.logp.sum() / total)
            part.backward()
            loss += part.item()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        rate = rl.learning_rate(step, steps, min(50, steps), config.warm_start_lr, "cosine")
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        progress.set_postfix(loss=f"{loss:.3f}")


# ---------------------------------------------------------------------------------------------------------------------
# The loop


class Run:
    """What a training run holds: policy, reference, optimizer, sampler."""

    def __init__(self, config: Config, task: tasks.Task, policy: Policy, ranks: Ranks):
        whole, on_gpu = policy.model, ranks.device.type == "cuda"
        config = filled(config, micro_batch_tokens=fitting_tokens(whole, config, on_gpu))
        self.config, self.task, self.ranks = config, task, ranks
        self.model = ranks.shard(whole, config.shard_ranks)
        if config.gradient_checkpointing:
            self.model.gradient_checkpointing_enable(dict(use_reentrant=False))
        self.reference = None if config.eval_only else reference_policy(self, whole)
        decay = dict(weight_decay=config.weight_decay)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.0, **decay)
        # The weights are fp32. Rollouts run on a copy: in bf16 on a GPU, gathered where the weights are sharded. One
        # process on a CPU needs none.
        self.actor = self.model
        if ranks.size > 1 or on_gpu:
            dtype = torch.bfloat16 if on_gpu else torch.float32
            self.actor = hollow(whole, dtype=dtype, device=ranks.device).to(ranks.device)
            self.refresh_actor()
        self.policy = policy = dataclasses.replace(policy, model=self.actor)
        self.explorer = policy.explorer(task, max_rows=config.max_rows, memory_gb=config.cache_gb)
        self.sampler, self.limits = self.explorer.sampler, policy.token_limits(config)
        self.problems = task.problems("train", config.seed)
        # the most that the policy can write in one answer
        self.max_tokens = self.limits["solution"] * task.max_turns if task.two_stage else self.limits["sketch"]

    def train(self, folder: RunFolder, state: dict, log: Callable) -> None:
        """Train from where `state` is to the last step, or until asked to stop; log: of `reporting`."""
        config, began = self.config, time.perf_counter() - state["seconds"]
        quiet = None if self.ranks.rank == 0 else True  # None: where there is no terminal
        progress = tqdm(range(state["step"], config.steps), config.method, disable=quiet)
        skipped = 0
        with stop_signal(self.ranks) as asked_to_stop:
            for step in progress:
                groups, row = self.step(step)
                self.remember(state, groups, row)
                last = state["step"] == config.steps or asked_to_stop()
                if last or due(state["step"], config.eval_every):
                    row["eval"] = state["last"] = evaluate(self)
                    found = sesa.headline(state["last"])
                    if found > state["best"]:
                        state |= dict(best=found, best_step=state["step"])
                state["seconds"] = time.perf_counter() - began
                folder.append("metrics.jsonl", row)
                skipped = skipped + row["skipped_updates"] if row["skipped_updates"] == config.minibatches else 0
                if skipped >= 5:
                    line = f"step {state['step']}: {skipped} updates in a row had a loss or gradient that is not finite"
                    raise UserError(f"{line}; go on with a lower --learning_rate from a checkpoint in {folder.path}")
                records = []
                if last or step % config.sample_every == 0:
                    records = [sesa.sample_record(step + 1, g) for g in groups[:2]]
                    folder.append("samples.jsonl", *records)
                    if records and not progress.disable:
                        tqdm.write(in_colour(records[0]), file=sys.stderr)
                log(row, records)
                if last or due(state["step"], config.checkpoint_every):
                    folder.save(self, state)
                numbers = dict(reward=f"{row['reward']:.3f}", entropy=f"{row['entropy'] or 0:.2f}")
                progress.set_postfix(numbers, found=row["unique_found"] or None)
                if last:
                    break

    def step(self, step: int) -> tuple[list[sesa.Group], dict]:
        """One rollout and its updates. Returns this rank's groups and the step's row of metrics."""
        config, began, before = self.config, time.perf_counter(), dict(vars(self.sampler.stats))
        first = step * config.problems_per_step
        problems = [self.problems[first + i] for i in range(config.problems_per_step)]
        mine = self.ranks.share(problems)
        groups = self.explorer.rollout(mine, self.plan(config.temperature), (config.seed, step))
        rolled_out = time.perf_counter()

        outcomes = self.ranks.gather([g.outcomes() for g in groups])
        rewards, advantages = sesa.credit(outcomes, **self.credit_rule(step))
        rows = []
        for (place, _), group in zip(mine, groups, strict=True):
            sesa.assign(group, rewards[place], advantages[place])
            rows += [(place, row) for row in sesa.sequences(group, config.sketch_context, config.distill_coef)]

        rate = rl.learning_rate(step, config.steps, config.warmup_steps, config.learning_rate, config.lr_schedule)
        fallen = min(1.0, step / (0.7 * config.steps))
        kl_coef = config.kl_coef + (config.kl_coef_end - config.kl_coef) * fallen
        self.optimizer.param_groups[0]["lr"] = rate
        models = self.model, self.reference
        metrics = update(*models, rows, config, self.optimizer, kl_coef, self.max_tokens, self.ranks)
        self.refresh_actor()

        counts, now = Counter(), vars(self.sampler.stats)
        for group in groups:
            counts.update(group.counts())
        tokens = ("generated_tokens", "prefill_tokens")
        counts = self.ranks.sum(counts | {name: now[name] - before[name] for name in tokens})
        row = dict(step=step + 1) | sesa.group_metrics(outcomes, rewards) | sesa.text_metrics(counts)
        row |= dict(entropy=None, kl=None) | metrics
        row |= {name: int(counts[name]) for name in (*tokens, "sketch_tokens")}
        row |= dict(learning_rate=rate, kl_coef=kl_coef)
        row |= dict(rollout_time=rolled_out - began, step_time=time.perf_counter() - began)
        return groups, row

    def credit_rule(self, step: int) -> dict:
        c = self.config
        pass_k = round(c.pass_k + (c.pass_k_end - c.pass_k) * step / max(1, c.steps - 1))
        rule = dict(chains=chain_credit(c, self.task), scale=c.advantage_scale)
        return rule | dict(baseline=c.baseline, repeats=c.repeats, rarity=c.rarity, pass_k=pass_k)

    def plan(self, temperature: float, top_p: float = 1.0, **changes) -> sesa.Plan:
        return plan_of(self.config, self.limits, temperature, top_p, **changes)

    @torch.no_grad()
    def refresh_actor(self) -> None:
        """Give the sampler's copy, where it has one, the new weights: one at a time, cast before they travel."""
        if self.actor is not self.model:
            for ours, theirs in zip(self.actor.parameters(), self.model.parameters(), strict=True):
                ours.copy_(unsharded(theirs.to(ours.dtype)))

    def tensors(self) -> dict:
        """What a checkpoint holds of this rank: its part of the weights and of the optimizer's moments, by name."""
        return dict(zip(TENSORS, dcp_state.get_state_dict(self.model, self.optimizer), strict=True))

    def load(self, folder: Path) -> None:
        """Go on from a checkpoint, whatever the number of ranks that wrote it."""
        old = (folder / "training_state.pt").exists()
        options = dcp_state.StateDictOptions(full_state_dict=old, strict=not old)
        try:
            tensors = old_tensors(folder) if old else self.tensors()
            if not old:
                dcp.load(tensors, checkpoint_id=folder / "training_state")
            dcp_state.set_state_dict(self.model, self.optimizer, **tensors, options=options)
        except (Exception, CheckpointException) as error:  # a damaged file raises whatever the bytes lead to
            raise damaged(folder, error) from None
        self.refresh_actor()

    def remember(self, state: dict, groups: Sequence[sesa.Group], row: dict) -> None:
        """What is summed up over the steps: where we are, tokens, and which targets were ever found."""
        state["step"] = row["step"]
        state["generated_tokens"] += row["generated_tokens"]
        if self.task.targets:
            keys = [str(o.key) for g in groups for o in g.outcomes() if o.success]
            state["found"] = sorted({*state["found"], *self.ranks.gather(keys)})
        row["unique_found"] = len(state["found"])

    def summary(self, state: dict) -> dict:
        kib = 1 if sys.platform == "linux" else 1024  # ru_maxrss is in KiB on Linux, in bytes on macOS
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / kib / 1024
        versions = {library.__name__: library.__version__ for library in (torch, transformers)}
        return {name: getattr(self.config, name) for name in ("task", "method", "seed")} | dict(
            steps=state["step"],
            seconds=round(state["seconds"], 1),
            peak_rss_mb=round(memory),
            generated_tokens=state["generated_tokens"],
            unique_found=len(state["found"]),
            **sesa.measures(state["last"]),
            floor=self.task.floor(),
            ceiling=self.task.ceiling(),
            base=state["base"] and sesa.measures(state["base"]),
            evaluation=state["last"],
            base_evaluation=state["base"],
            versions=versions | dict(python=sys.version.split()[0]),
        )


def plan_of(config: Config, limits: dict[str, int], temperature: float, top_p: float, **changes) -> sesa.Plan:
    names = ("method", "num_sketches", "num_solutions", "group_size", "num_direct", "explore", "sketches")
    given = {name: getattr(config, name) for name in names}
    for kind, limit in limits.items():
        given[f"{kind}_params"] = SamplingParams(temperature, top_p, max_new_tokens=limit)
    return sesa.Plan(**given | changes)


def due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def reference_policy(run: Run, whole: nn.Module) -> nn.Module | None:
    """A frozen copy of the policy that training starts from, or of --reference; None without a KL term."""
    config = run.config
    if config.kl_coef == config.kl_coef_end == 0:
        return None
    if config.reference is not None:
        whole = starting_policy(config.reference, config, run.task, run.ranks).model
    elif run.ranks.size == 1:
        whole = copy.deepcopy(whole)
    if whole.config.vocab_size != run.model.config.vocab_size:
        raise UserError(f"--reference {config.reference}: its vocabulary is not that of the policy")
    return run.ranks.shard(whole.eval().requires_grad_(False), config.shard_ranks)


@contextmanager
def stop_signal(ranks: Ranks) -> Iterator[Callable[[], bool]]:
    """Was a clean stop asked for, by Ctrl-C or SIGTERM? All ranks hear it when one does. A second one stops at once."""
    heard = []

    def hear(number, frame):
        if heard:
            raise KeyboardInterrupt
        heard.append(number)

    before = {number: signal.signal(number, hear) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(ranks.gather(heard))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ---------------------------------------------------------------------------------------------------------------------
# The update


def update(
    policy: nn.Module, reference: nn.Module | None, rows: list[tuple[int, rl.TrainingSequence]], config: Config,
    optimizer: torch.optim.Optimizer, kl_coef: float, max_tokens: int, ranks: Ranks,
) -> dict[str, float]:  # fmt: skip
    """One rollout's updates. rows: (place of its problem in the step, row), this rank's. Returns metrics.

    Minibatch b holds the problems whose place is b modulo `minibatches`. The denominators are counted over all ranks
    once per minibatch; micro-batches only add up.
    """
    policy.train()
    if config.minibatches > 1 or config.sketch_context == "is":
        old_log_probs(policy, [row for _, row in rows], config, ranks)
    parameters = list(policy.parameters())
    sums, norms, skipped = Counter(), [], 0
    for b in range(config.minibatches):
        mine = [row for place, row in rows if place % config.minibatches == b]
        rl.set_token_weights(mine, config.loss_type, max_tokens, ranks.sum)
        mine = [row for row in mine if row.weight]
        for p in parameters:
            p.grad = torch.zeros_like(p)
        micros, loss = micro_batches(mine, config, ranks), 0.0
        for micro in micros:
            if isinstance(policy, FSDPModule):  # gradients travel once, when all have been added up
                policy.set_requires_gradient_sync(micro is micros[-1])
            part = backward(policy, reference, micro, config, kl_coef, ranks.device)
            loss += part["loss"]
            sums.update(part)
        norms.append(float(unsharded(nn.utils.clip_grad_norm_(parameters, config.max_grad_norm))))
        if all(ranks.gather([math.isfinite(loss + norms[-1])])):
            optimizer.step()
        else:  # on all ranks: one step with nan or inf would be the last
            skipped += 1
    sums = ranks.sum(dict(sums))
    loss = sums.pop("loss", 0.0) / config.minibatches
    means = dict(loss=loss, grad_norm=sum(norms) / len(norms), skipped_updates=skipped)
    return means | rl.mean_metrics(sums)


def micro_batches(rows: Sequence[rl.TrainingSequence], config: Config, ranks: Ranks) -> list:
    """As many on every rank, for each forward of a sharded model is a collective: the missing ones weigh nothing."""
    micros = list(rl.micro_batches(rows, config.micro_batch_tokens))
    most = max(ranks.gather([len(micros)]))
    nothing = torch.zeros(1, device=ranks.device)
    idle = rl.TrainingSequence([0, 0], [1], [0.0], [0.0], old_logps=nothing, token_weights=nothing)
    return micros + [[idle] for _ in range(most - len(micros))]


def backward(policy, reference, micro: list[rl.TrainingSequence], config: Config, kl_coef: float, device) -> dict:
    """Add one micro-batch's gradient to the policy's. Returns sums over its tokens, to be added up."""
    is_options = dict(cap=config.is_cap, level=config.is_level) if config.sketch_context == "is" else None
    inputs, sampled = rl.loss_inputs(micro, device, is_options)
    clips = dict(clip_low=config.clip_low, clip_high=config.clip_high)
    options = clips | dict(kl_coef=kl_coef, kl_type=config.kl_type, entropy_coef=config.entropy_coef)
    # The loss is computed in chunks of tokens: what is None is bound here, what is [N] is cut like the tokens.
    bound, extras = ([None], inputs[1:]) if inputs[0] is None else ([], inputs)
    loss, stats = score(
        policy, micro, device,
        lambda stats, *extras: rl.policy_loss(stats, *bound, *extras, **options),
        extras, reference, **distribution(policy, config),
    )  # fmt: skip
    loss.backward()
    metrics = rl.update_metrics(stats, *inputs, **clips)
    shift = (stats.logp if bound else inputs[0]) - sampled  # [N]
    metrics |= {"sampling/logp_difference": shift.abs().sum(), "sampling/logp_shift": shift.sum()}
    return {name: float(value) for name, value in metrics.items()} | dict(loss=loss.item())


def score(
    model: nn.Module, rows: Sequence[rl.TrainingSequence], device, loss_fn: Callable, extras: Sequence[Tensor] = (),
    reference: nn.Module | None = None, **options,
) -> tuple[Tensor, kernels.TokenStats]:  # fmt: skip
    """From token ids to the loss: (loss, statistics [N] of the rows' target tokens), [N, V] logits never being held.

    loss_fn, extras, options: see kernels.linear_policy_loss.
    """
    ref = ref_weight = None
    if reference is not None:
        with torch.no_grad():
            ref, _ = inside(reference, hidden_states, rows, device)  # [N, H]
        ref_weight = head(reference, ref)  # [V, H]

    def from_ids(model: nn.Module) -> tuple[Tensor, kernels.TokenStats]:
        hidden, targets = hidden_states(model, rows, device)  # [N, H], [N]
        weight = head(model, hidden)  # [V, H]
        return kernels.linear_policy_loss(hidden, weight, targets, loss_fn, extras, ref, ref_weight, **options)

    result = inside(model, from_ids)
    for done in (reference, None if torch.is_grad_enabled() else model):  # no backward will do it
        if isinstance(done, FSDPModule):
            done.reshard()
    return result


def inside(model: nn.Module, function: Callable, *args):
    """function(model, *args), as a forward of the model where that is sharded: its embedding and head, which belong to
    no block, are there (and their gradients are shared out) in a forward of the whole only."""
    return model.inside(function, *args) if isinstance(model, FSDPModule) else function(model, *args)


def hidden_states(model: nn.Module, rows: Sequence[rl.TrainingSequence], device) -> tuple[Tensor, Tensor]:
    """(hidden [N, H], targets [N]) of the rows' target tokens, row after row.

    Rows are padded on the right, where causal attention never looks from the left: no mask is needed, and no pad id
    can be mistaken for a token. Token t is predicted from the hidden state at t - 1.
    """
    longest = max(len(row.ids) for row in rows)
    ids = torch.tensor([row.ids + [0] * (longest - len(row.ids)) for row in rows], device=device)  # [B, T]
    owner = torch.tensor([b for b, row in enumerate(rows) for _ in row.targets], device=device)  # [N]
    place = torch.tensor([t for row in rows for t in row.targets], device=device)  # [N]
    on_gpu = device.type == "cuda"
    with torch.autocast(device.type, torch.bfloat16, enabled=on_gpu):
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state  # [B, T, H]
    hidden = hidden[owner, place - 1]  # [N, H]   fp32 even under autocast, which would make the head's product slow
    return hidden.bfloat16() if on_gpu else hidden, ids[owner, place]


def head(model: nn.Module, hidden: Tensor) -> Tensor:
    return model.get_output_embeddings().weight.to(hidden.dtype)  # [V, H]


def distribution(model: nn.Module, config: Config) -> dict:
    """What turns logits into the distribution that is sampled and trained."""
    scale, softcap = output_scaling(model.config)
    return dict(temperature=config.temperature / scale, softcap=softcap / scale)


@torch.no_grad()
def old_log_probs(model, rows: Sequence[rl.TrainingSequence], config: Config, ranks: Ranks) -> None:
    """Set row.old_logps: of the policy before the updates of this rollout, in the context of the loss."""
    for micro in micro_batches(rows, config, ranks):
        _, stats = score(model, micro, ranks.device, lambda stats: stats.logp.sum(), **distribution(model, config))
        lengths = [len(row.targets) for row in micro]
        for row, logps in zip(micro, stats.logp.split(lengths), strict=True):
            row.old_logps = logps


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation


def evaluate(run: Run) -> dict:
    """{"iid": metrics, "sequential": metrics} on validation problems, the same ones at every evaluation."""
    config, n, two_stage = run.config, run.config.eval_samples, run.task.two_stage
    problems = list(islice(run.task.problems("validation", 0), config.eval_problems))
    # in sequence: as many answers as a mixed group has, all of them through sketches
    sketches = config.num_sketches + config.num_direct // config.num_solutions
    ways = dict(
        iid=dict(method="grpo", group_size=n if two_stage else min(n, 50)),
        sequential=dict(method="sesa", sketches="sequential", num_sketches=sketches, num_direct=0, explore="always"),
    )
    found = {}
    for kind, changes in ways.items():
        plan = run.plan(config.eval_temperature, config.top_p, **changes)
        size = plan.group_size if kind == "iid" else plan.num_sketches * plan.num_solutions
        rounds = 1 if two_stage else math.ceil(n / size)
        mine = run.ranks.share([p for p in problems for _ in range(rounds)])
        with patience(f"evaluation, {kind}: {len(mine) * size:,} answers"):
            groups = run.explorer.rollout(mine, plan, (config.seed, "evaluation", kind))
        outcomes = run.ranks.gather([g.outcomes() for g in groups])
        if not two_stage:  # the rounds of a problem are one list of guesses
            outcomes = [sum(outcomes[i : i + rounds], [])[:n] for i in range(0, len(outcomes), rounds)]
        together = 1 if kind == "iid" else size
        found[kind] = sesa.evaluation_metrics(outcomes, config.eval_k, run.task.targets, together)
    found["sequential"]["transfer_gap"] = found["sequential"]["reward"] - found["iid"]["reward"]
    return found


# ---------------------------------------------------------------------------------------------------------------------
# The run folder


def write_folder(path: Path, write: Callable[[Path], None], ranks: Ranks, need: int = 0) -> None:
    """Make a folder whole or not at all: written under another name, flushed to the disk, then renamed.

    Every rank writes its part. UserError on all of them where one cannot; need: bytes of the whole, for its line.
    """
    temporary = ranks.first(lambda: path.with_name(f".{path.name}.{os.getpid()}"))
    problem = None
    try:
        temporary.mkdir(parents=True, exist_ok=True)
        write(temporary)
    except (Exception, CheckpointException) as error:  # a full disk has as many names as there are libraries
        problem = str(error).strip().splitlines()[-1]
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    if problems := [line for line in ranks.gather([problem]) if line]:
        shutil.rmtree(temporary, ignore_errors=True)
        free = shutil.disk_usage(temporary.parent).free
        room = f"it needs {need / 1e6:.1f} MB, {free / 1e6:.1f} MB are free"
        raise UserError(f"{path} cannot be written ({problems[0]}): {room}; make room, and go on with --resume")
    if ranks.rank == 0:
        os.sync()
        shutil.rmtree(path, ignore_errors=True)
        os.replace(temporary, path)
    ranks.gather([])  # no rank goes on before


def damaged(folder: Path, error: BaseException) -> UserError:
    line = str(error).strip().splitlines()[-1:] or [type(error).__name__]
    return UserError(f"{folder} is damaged ({line[0]}): remove it to resume from the one before it")


TENSORS = ("model_state_dict", "optim_state_dict")  # what torch calls them


def old_tensors(folder: Path) -> dict:
    """`Run.tensors` from a checkpoint of the time before they were sharded: moments by number, weights tied."""
    model, _ = load_pretrained(folder, weights=True)
    saved = torch.load(folder / "training_state.pt", weights_only=True, map_location="cpu")["optimizer"]
    names = [name for name, _ in model.named_parameters()]
    state = {names[i]: moments for i, moments in saved["state"].items()}
    groups = [group | dict(params=names) for group in saved["param_groups"]]
    both = model.state_dict(), dict(state=state, param_groups=groups)
    return dict(zip(TENSORS, both, strict=True))


class RunFolder:
    """What a run leaves behind. Only rank 0 looks and writes, but for the parts of a checkpoint."""

    # Flags that may change when a run goes on. `graphs` is one of an earlier version.
    FREE = """resume resume_auto output_dir steps checkpoint_every keep_checkpoints max_rows cache_gb device shard_ranks
        micro_batch_tokens report_to push_to_hub""".split()

    def __init__(self, config: Config, ranks: Ranks):
        self.config, self.ranks, self.path, self.held = config, ranks, Path(config.output_dir), None
        self.flags = json.loads(json.dumps(vars(config)))

    def open(self) -> dict | None:
        """None for a new run; to resume, the position of the last checkpoint. UserError if that cannot be."""
        steps, file = self.checkpoints(), self.path / "config.json"
        auto = self.config.resume_auto
        if not self.config.resume and not (auto and file.exists()):
            if self.path.is_file() or self.path.exists() and any(self.path.iterdir()):
                raise UserError(f"--output_dir {self.path} exists and is not empty: use --resume, or another folder")
            return None
        if not steps and not auto:
            raise UserError(f"--resume: {self.path} holds no checkpoint; start without --resume, in an empty folder")
        self.lock("a")
        if not steps:  # it ended before its first checkpoint
            self.check(file, json.loads(file.read_text() or "{}"))
            return None
        folder = self.checkpoint(steps[-1])
        try:
            if (folder / "training_state.pt").exists():
                state = torch.load(folder / "training_state.pt", weights_only=True)
                del state["optimizer"]
            else:
                state = json.loads((folder / "training_state" / "position.json").read_text(encoding="utf-8"))
            saved = state.pop("config")
        except Exception as error:  # a damaged file raises whatever the bytes lead to
            raise damaged(folder, error) from None
        self.check(folder, saved)
        return state

    def check(self, source: Path, saved: dict) -> None:
        """UserError where the run has flags of its own that the one to be continued had not."""
        old = {name: value for name, value in saved.items() if name in self.flags and name not in self.FREE}
        changes = [f"{n} {v!r} -> {self.flags[n]!r}" for n, v in old.items() if v != self.flags[n]]
        if changes:
            what = ", ".join(changes)
            raise UserError(f"{source} is from another config ({what}): use the same flags, or another --output_dir")

    def lock(self, mode: str) -> None:
        """Held until this process ends, however it does: one run at a time works in a folder."""
        self.held = open(self.path / "config.json", mode)
        try:
            fcntl.flock(self.held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"--output_dir {self.path}: another run is at work there; wait, or give another") from None

    def close(self) -> None:
        if self.held:
            self.held.close()

    def start(self, step: int) -> None:
        """Make the folder, or what was logged after `step` undone; from here on the run is seen."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if not self.held:
                self.lock("x")
        except OSError as error:
            raise UserError(f"--output_dir {self.path}: cannot be made ({error.strerror}); give another") from None
        if step == 0:
            (self.path / "config.json").write_text(json.dumps(self.flags, indent=1))
        for file in (self.path / "metrics.jsonl", self.path / "samples.jsonl"):
            kept = [row for row in read_rows(file) if row["step"] <= step]  # nor what a crash cut off
            file.write_text("".join(map(json_line, kept)), encoding="utf-8")

    def append(self, name: str, *rows: dict) -> None:
        if self.ranks.rank > 0:
            return
        try:
            with open(self.path / name, "a", encoding="utf-8") as file:
                file.writelines(map(json_line, rows))
        except OSError as error:
            raise UserError(f"{self.path / name}: {error.strerror}; make room, and go on with --resume") from None

    def checkpoint(self, step: int) -> Path:
        return self.path / "checkpoints" / f"step_{step}"

    def checkpoints(self) -> list[int]:
        names = [p.name.removeprefix("step_") for p in self.checkpoint(0).parent.glob("step_*")]
        return sorted(int(name) for name in names if name.isdigit())

    def save(self, run: Run, state: dict) -> None:
        """Write checkpoints/step_N, and remove all but the last few and the best."""

        def write(folder: Path) -> None:
            dcp.save(run.tensors(), checkpoint_id=folder / "training_state")
            if self.ranks.rank == 0:
                run.policy.save(folder)
                (folder / "README.md").write_text(model_card(run, state), encoding="utf-8")
                position = json.dumps(state | dict(config=self.flags), ensure_ascii=False)
                (folder / "training_state" / "position.json").write_text(position, encoding="utf-8")

        need = sum(12 * p.numel() for p in run.model.parameters())  # weights and two moments, and the policy
        need += sum(p.nbytes for p in run.actor.parameters())
        if self.ranks.rank == 0:
            for unfinished in self.checkpoint(0).parent.glob(".step_*"):  # of a run that was killed
                shutil.rmtree(unfinished)
        write_folder(self.checkpoint(state["step"]), write, self.ranks, need)
        if self.ranks.rank == 0:
            for step in self.checkpoints()[: -self.config.keep_checkpoints]:
                if step != state["best_step"]:
                    shutil.rmtree(self.checkpoint(step))


# ---------------------------------------------------------------------------------------------------------------------
# Ranks


@dataclass(frozen=True)
class Ranks:
    """This process among those of torchrun. Collectives are the same in number and order on every rank."""

    rank: int
    size: int
    device: torch.device

    @classmethod
    def start(cls, device: str | None) -> Ranks:
        rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        cuda = torch.cuda.is_available() if device is None else device == "cuda"
        if cuda and not torch.cuda.is_available():
            raise UserError(f"--device {device}: no CUDA device is visible; use --device cpu")
        local = torch.device("cpu")
        if cuda:
            local = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(local)
        if size > 1:
            # torchrun keeps its store when it restarts ranks that died: keys of an earlier attempt name dead addresses.
            # Attempts are counted alike on all ranks of one node only.
            store, *_ = next(dist.rendezvous("env://"))
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            one_node = os.environ.get("LOCAL_WORLD_SIZE") == str(size)
            store = dist.PrefixStore(attempt if one_node else "", store)
            backend = "nccl" if cuda else "gloo"
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timedelta(minutes=30))
        return cls(rank, size, local)

    def share(self, items: Sequence) -> list:
        """This rank's share of items, as (place, item): consecutive, so that gathered shares are in order."""
        placed = list(enumerate(items))
        return placed[self.rank * len(placed) // self.size : (self.rank + 1) * len(placed) // self.size]

    def gather(self, items: list) -> list:
        """The lists of all ranks, one after another, on every rank."""
        if self.size == 1:
            return items
        parts = [None] * self.size
        dist.all_gather_object(parts, items)
        return [item for part in parts for item in part]

    def sum(self, values: dict[str, float]) -> dict[str, float]:
        """The sums over all ranks, name by name."""
        parts = self.gather([values])
        names = dict.fromkeys(name for part in parts for name in part)
        return {name: sum(part.get(name, 0.0) for part in parts) for name in names}

    def first(self, make: Callable, send: Callable = lambda made: made):
        """make() of rank 0: the other ranks get send(it). What it raises for the user is raised on all."""
        made = error = None
        if self.rank == 0:
            try:
                made = make()
            except ValueError as caught:
                error = caught
        if self.size > 1:
            sent = [send(made) if self.rank == 0 and error is None else None, error]
            dist.broadcast_object_list(sent, src=0)
            made, error = (made if self.rank == 0 else sent[0]), sent[1]
        if error is not None:
            raise error
        return made

    def shard(self, whole: nn.Module, shard_ranks: int | None) -> nn.Module:
        """The model with its weights (so gradients and optimizer, too) shared out over the ranks, from those of rank 0;
        with one rank the model as it is.

        FSDP2: a forward gathers one block at a time. Gradients are summed, not averaged: loss weights are global.
        """
        if self.size == 1:
            return whole.to(self.device)
        model, kind, n = hollow(whole, device="meta"), self.device.type, shard_ranks or self.size
        mesh = init_device_mesh(kind, (self.size // n, n), mesh_dim_names=("replicate", "shard"))
        mesh = mesh["shard"] if n == self.size else mesh
        lists = (m for m in model.modules() if isinstance(m, nn.ModuleList))
        blocks = next(m for m in lists if len(m) == model.config.num_hidden_layers)
        for module in (*blocks, model):
            fully_shard(module, mesh=mesh)
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
        model.to_empty(device=self.device)
        for ours, theirs in zip(model.buffers(), whole.buffers(), strict=True):
            ours.copy_(theirs)
        weights = whole.state_dict() if self.rank == 0 else {}
        options = dcp_state.StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        dcp_state.set_model_state_dict(model, weights, options=options)
        model.inside = lambda function, *args: function(model, *args)
        register_fsdp_forward_method(model, "inside")
        return model


def unsharded(tensor: Tensor) -> Tensor:
    """The whole of a tensor, of which each rank may hold a part. A collective, then."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


# ---------------------------------------------------------------------------------------------------------------------
# Figures


def json_line(row: dict) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def read_rows(file: Path) -> list[dict]:
    """The rows of a file of one JSON object a line; [] without it. What is still being written is left out."""
    lines = file.read_text(encoding="utf-8").split("\n")[:-1] if file.exists() else []
    return list(map(json.loads, lines))


def read_run(path: Path) -> tuple[dict, list[dict]]:
    """(flags, rows) of a run folder: each step's metrics with the tokens and seconds so far, the base first."""
    try:
        flags = json.loads((path / "config.json").read_text())
        rows, file = read_rows(path / "metrics.jsonl"), path / "summary.json"
        base = json.loads(file.read_text())["base_evaluation"] if file.exists() else None
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path} cannot be read as a run folder ({first_line(error)})") from None
    rows[:0] = [dict(step=0, eval=base)] if base else []
    tokens = seconds = 0
    for row in rows:
        tokens += row.get("generated_tokens", 0)
        seconds += row.get("step_time", 0)
        row |= dict(tokens=tokens, seconds=seconds)
        for kind, result in row.get("eval", {}).items():
            row[kind] = found(result)[1]
    return flags, rows


def found(evaluation: dict) -> tuple[str, float]:
    """Different right answers where the targets are known, else the share of success: (of what, how much)."""
    if "coverage" not in evaluation:
        return "validation success", evaluation["avg@n"]
    counts = evaluation["unique@k"]
    k = "320" if "320" in counts else list(counts)[-1]
    return f"targets found in {k} guesses", counts[k]


def draw(groups: dict[str, list[list[dict]]], path: Path, levels: Sequence[float | None] = ()) -> str:
    """A picture of runs (rows of `read_run`): each group a colour, its seeds thin, their mean thick. Returns what the
    evaluations count.

    Evaluations over steps, tokens and seconds: solid in sequence, dashed i.i.d.; the rest over steps.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(3, 3, figsize=(13, 9), layout="constrained")
    evaluations = [row["eval"] for runs in groups.values() for rows in runs for row in rows if row.get("eval")]
    title = found(evaluations[-1]["iid"])[0] if evaluations else "no evaluation yet"
    panels = [(title, dict(sequential="-", iid="--"), across) for across in ("step", "tokens", "seconds")]
    for name in ("reward", "unique_success", "duplicate_rate", "entropy", "kl", "grad_norm"):
        panels.append((name, {name: "-"}, "step"))
    for axis, (name, columns, across) in zip(axes.flat, panels, strict=True):
        axis.set(title=name, xlabel=across)
        for (i, runs), (column, style) in product(enumerate(groups.values()), columns.items()):
            seeds = [{r["step"]: (r[across], r[column]) for r in rows if r.get(column) is not None} for rows in runs]
            shared = [step for step in seeds[0] if all(step in seed for seed in seeds)]
            mean = {step: [fmean(xy) for xy in zip(*(seed[step] for seed in seeds), strict=True)] for step in shared}
            for points, width in [(seed, 0.5) for seed in seeds] + [(mean, 1.8)]:
                x, y = ([point[part] for point in points.values()] for part in (0, 1))
                axis.plot(x, y, style, color=f"C{i}", linewidth=width)
    for i, label in enumerate(groups):
        axes[0, 0].plot([], color=f"C{i}", label=label)
    axes[0, 0].plot([], "k--", label="i.i.d.; solid: in sequence")
    figure.legend(loc="outside lower center", frameon=False)
    for level, axis in product(levels, axes[0]):
        if level is not None:
            axis.axhline(level, color="gray", linestyle=":")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return title


# ---------------------------------------------------------------------------------------------------------------------
# Ask, watch, compare, publish


@dataclass
class Question(tasks.Task):
    """A free question. No answer is right or wrong; two are equal if they have the same words."""

    text: str
    two_stage: bool = False

    name = "question"
    sketch_tokens, solution_tokens = 32, 256
    answer_hint = ""

    def __post_init__(self):
        if not self.text.strip():
            raise ValueError("--ask: the question is empty; give a text, or - to read it from stdin")
        self.prompts = sesa.QUESTION if self.two_stage else sesa.QUESTION_IN_TURN

    def num_problems(self, split: str) -> int:
        return 1

    def make(self, split: str, seed: int, i: int) -> tasks.Problem:
        return tasks.Problem(i, self.text, None)

    def score(self, data, text: str) -> tasks.Outcome:
        """
        >>> Question("Name a fruit.").score(None, " An apple!").key
        'an apple'
        """
        key = " ".join(re.findall(r"\w+", text.casefold()))
        return tasks.Outcome(0.0, False, key, True) if key else tasks.NOTHING


def ask(explorer: sesa.Explorer, plan: sesa.Plan, seed: int = 0) -> list[dict]:
    """Answers to a Question, each with its text, its sketch (None without one) and its key, in the order drawn.

    explorer: of `Policy.explorer`, with the question as its task. ValueError where the model cannot read the question.
    """
    [problem] = problems = explorer.task.problems("validation", 0)
    explorer.check_problems(problems, plan)
    [group] = explorer.rollout([(0, problem)], plan, (seed,))
    outcomes = iter(group.outcomes())
    texts = [(text, t.sketch) for t in group.trajectories for text in t.texts]
    return [dict(text=text, sketch=sketch, key=next(outcomes).key) for text, sketch in texts]


def answer(config: Config) -> None:
    """--ask: the chain as it is drawn, beside as many i.i.d. answers."""
    c = filled(config, **ANSWERS | dict(num_sketches=8))
    check(ranges(c))
    question = Question((sys.stdin.read() if c.ask == "-" else c.ask).strip(), c.two_stage)
    ranks = Ranks.start(c.device)
    policy = starting_policy(c.model, c, question, ranks)
    policy.model.to(ranks.device)
    if not c.two_stage:  # the sketches are the answers
        c = filled(c, max_sketch_tokens=c.max_new_tokens)
    n, explorer = c.num_sketches, policy.explorer(question)
    plan = plan_of(c, policy.token_limits(c), c.temperature, c.top_p, method="sesa", group_size=n)
    iid = ask(explorer, dataclasses.replace(plan, method="grpo"), c.seed)
    width, places = max(16, shutil.get_terminal_size().columns // 2 - 4), count()

    def beside(text: str) -> None:
        i = next(places) % n
        print(f"{i + 1:3}  {one_line(text, width):{width}} {one_line(iid[i]['text'], width)}", flush=True)

    if not c.json:
        print(f"     {'in sequence':{width}} i.i.d.")
        explorer.drawn = beside
    found = dict(sequential=ask(explorer, plan, c.seed), iid=iid)
    different = {kind: len({a["key"] for a in answers} - {None}) for kind, answers in found.items()}
    if c.json:
        given = dict(question=question.text, model=c.model, seed=c.seed, different=different)
        return print(json_line(given | found), end="")
    for solution in found["sequential"] if c.two_stage else ():
        beside(solution["text"])
    print(f"different: {different['sequential']} of {n} in sequence, {different['iid']} of {n} i.i.d.")


def one_line(text: str, width: int) -> str:
    """A text of the policy for a terminal: one line without control characters, cut to so many characters.

    >>> one_line("New\\n  York \\x1b[31m City", 12)
    'New York [3…'
    """
    text = "".join(c for c in " ".join(text.split()) if c.isprintable())
    return text if len(text) <= width else text[: width - 1] + "…"


COLOURS = dict(hit=32, repeat=33, miss=2, invalid=31)  # of a terminal: green, yellow, faint, red


def in_colour(record: dict) -> str:
    """A record of samples.jsonl for a terminal: the guesses of a chain, or each sketch (or answer) -> its reward."""
    shown = []
    for solution in record["solutions"]:
        for text, mark, reward in zip(solution["text"], solution["mark"], solution["reward"], strict=False):
            text = f"{one_line(solution['sketch'] or text, 60)} -> {reward:.2g}"
            shown.append(f"\033[{COLOURS[mark]}m{text}\033[0m")
    return f"step {record['step']}, {one_line(record['problem'], 60)}: " + " | ".join(shown)


def write_rollouts(folder: Path) -> None:
    """figures/rollouts.html: what was sampled over the run, in one page; no text in it can end the script it is in."""
    page = (Path(__file__).parent / "data" / "rollouts.html").read_text(encoding="utf-8")
    records = json.dumps(read_rows(folder / "samples.jsonl")).replace("<", "\\u003c")
    (folder / "figures").mkdir(exist_ok=True)
    (folder / "figures" / "rollouts.html").write_text(page.replace("@@RECORDS@@", records), encoding="utf-8")


ASIDE = {"seed", "sample_every", *RunFolder.FREE} - {"steps"}  # flags in which runs may differ and be alike


def compare(config: Config) -> None:
    """--compare: runs side by side, those that differ in nothing but the seed as one."""
    path = Path(config.output_dir or ".") / "compare.png"
    if path.exists():
        raise UserError(f"{path} exists: move it, or give another --output_dir")
    groups, standard = {}, json.loads(json.dumps(vars(Config())))
    for name in config.compare:
        flags, rows = read_run(Path(name))
        kept = {name: value for name, value in (standard | flags).items() if name not in ASIDE}
        groups.setdefault(json.dumps(kept, sort_keys=True), []).append(rows)
    flags = [json.loads(key) for key in groups]
    differ = [name for name in flags[0] if any(other.get(name) != flags[0][name] for other in flags)]
    labels = [" ".join(f"{name}={f.get(name)}" for name in differ) or f"{f['task']} {f['method']}" for f in flags]
    groups = dict(zip(labels, groups.values(), strict=True))
    title = draw(groups, path)
    names = ("step", "tokens", "seconds", "iid", "sequential", "reward", "entropy")
    print(("{:>11}" * 8).format("seeds", *names))
    for label, runs in groups.items():
        ends = [dict(item for row in rows for item in row.items() if item[1] is not None) for rows in runs]
        means = [fmean(end.get(name, math.nan) for end in ends) for name in names]
        print(f"{len(runs):11}" + "".join(f"{mean:11.4g}" for mean in means), "", label)
    print(f"iid, sequential: {title}; the picture is {path}")


@contextmanager
def reporting(config: Config, step: int) -> Iterator[Callable[[dict, Sequence[dict]], None]]:
    """log(row of metrics.jsonl, records of samples.jsonl) to where --report_to says; goes on after `step`."""
    name = config.report_to
    if name == "none":
        yield lambda row, records: None
    elif name == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        def log(row: dict, records: Sequence[dict]) -> None:
            for measure, value in flat(row).items():
                writer.add_scalar(measure, value, row["step"])
            writer.add_text("samples", "\n".join(map(json_line, records)), row["step"])

        with SummaryWriter(Path(config.output_dir) / name, purge_step=step + 1) as writer:
            flags = {flag: str(value) for flag, value in vars(config).items()}
            writer.add_hparams(flags, {}, run_name=".")
            yield log
    else:  # these two have one interface, but for wandb's id, by which it knows a run
        tracker, own = importlib.import_module(name), config.output_dir.strip("./").replace("/", "-")
        known = dict(name=own, id=own) if name == "wandb" else dict(name=own)

        def log(row: dict, records: Sequence[dict]) -> None:
            table = tracker.Table(columns=["record"], data=[[json_line(r)] for r in records])
            tracker.log(flat(row) | dict(samples=table), step=row["step"])

        tracker.init(project="sesa", config=vars(config), resume="allow", **known)
        try:
            yield log
        finally:
            tracker.finish()


def flat(row: dict, above: str = "") -> dict[str, float]:
    """
    >>> flat(dict(loss=0.5, eval=dict(iid={"pass@k": {"8": 1.0}}), kl=None))
    {'loss': 0.5, 'eval/iid/pass@8': 1.0}
    """
    found = {}
    for name, value in row.items():
        path = above[:-2] + name if above.endswith("@k/") else above + name
        found |= flat(value, path + "/") if isinstance(value, dict) else {} if value is None else {path: value}
    return found


def model_card(run: Run, state: dict) -> str:
    """README.md of a checkpoint, from data/model_card.md."""
    c, usual = run.config, vars(Config())
    given = {f"--{name}": value for name, value in vars(c).items() if name not in ASIDE and value != usual[name]}
    given = {name: " ".join(map(str, v)) if isinstance(v, tuple) else v for name, v in given.items()}
    hub = c.model != "tiny" and not Path(c.model).exists()
    base, last = (brief(state[which], c.num_sketches) for which in ("base", "last"))
    rows = [f"| {name} | {base.get(name, math.nan):.3f} | {value:.3f} |" for name, value in last.items()]
    template = Path(__file__).parent / "data" / "model_card.md"
    return template.read_text(encoding="utf-8").format(
        **vars(c) | state,
        base_model=f"base_model: {c.model}\n" if hub else "",
        given=" ".join(f"{name} {value}" for name, value in given.items()),
        asked="--two_stage" * run.task.two_stage,
        measures="\n".join(rows),
    )


def push(name: str, folder: RunFolder, best: int) -> None:
    """--push_to_hub: the best checkpoint that was kept, without what training would go on from."""
    from huggingface_hub import HfApi

    kept = folder.checkpoints()
    path, api = folder.checkpoint(best if best in kept else kept[-1]), HfApi()
    try:
        api.create_repo(name, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=path, ignore_patterns=["training_state/*"])
    except Exception as error:  # no network, no rights, no such owner: whatever it raises
        raise UserError(f"--push_to_hub {name}: {first_line(error)}; the checkpoint is in {path}") from None
    print(f"  {path} is at {name}")


@contextmanager
def patience(doing: str) -> Iterator[None]:
    """Says what is being waited for, where that takes over two seconds."""
    first = os.environ.get("RANK", "0") == "0"
    timer = threading.Timer(2.0, tqdm.write, [f"{doing} ..."], dict(file=sys.stderr))
    timer.daemon = True
    if first:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


# ---------------------------------------------------------------------------------------------------------------------
# Entry


def describe(config: Config, task: tasks.Task) -> None:
    """--dry_run: every value, and the sizes that follow from them."""
    name, ranks = config.model, int(os.environ.get("WORLD_SIZE", 1))
    policy = tiny_policy(config, task) if name == "tiny" else load_policy(name, task, config.prompts, weights=False)
    limits, answers, k = policy.token_limits(config), group_answers(config), config.num_sketches
    on_gpu = torch.cuda.is_available() and config.device != "cpu"
    config = filled(config, micro_batch_tokens=fitting_tokens(policy.model, config, on_gpu))
    solution, drafts = limits["sketch"], 0
    if task.two_stage:
        solution, drafts = limits["solution"] * task.max_turns, k * limits["sketch"] * (config.method == "sesa")
    tokens = config.problems_per_step * (answers * solution + drafts)
    sizes = dict(
        ranks=ranks,
        answers_per_step=config.problems_per_step * answers,
        most_tokens_per_step=tokens,
        updates=config.steps * config.minibatches,
        floor=task.floor(),
        ceiling=task.ceiling(),
    )
    for name, value in (vars(config) | sizes).items():
        print(f"  {name:24}{value}")
    longest = solution * k if chain_credit(config, task) else solution
    parts = memory(policy.model, config, tokens, longest, ranks, on_gpu)
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if on_gpu:
        there = torch.cuda.get_device_properties(0).total_memory
    print("memory of each rank, GB")
    for name, size in (parts | dict(together=sum(parts.values()), there_are=there)).items():
        print(f"  {name:24}{size / 1e9:.3f}")
    if sum(parts.values()) > there:
        print("  IT DOES NOT FIT: more ranks, --gradient_checkpointing, --cache_gb help")


def memory(model: nn.Module, config: Config, tokens: int, longest: int, ranks: int, on_gpu: bool) -> dict[str, float]:
    """Bytes that each part takes on each rank; tokens: those written in a step on all ranks, and in the longest row.

    Not counted: prompts, the process itself (0.5 GB on a CPU), and the blocks that FSDP has gathered for a moment.
    """
    weights, half = 4 * sum(p.numel() for p in model.parameters()), 2 if on_gpu else 1
    share = weights / (config.shard_ranks or ranks)
    kept, cached, logits = token_bytes(model, config, on_gpu)
    return dict(
        weights=share,
        gradients=weights if ranks > 1 else share,  # whole until the last micro-batch shares them out
        optimizer=2 * share,
        rollout_copy=weights / half if ranks > 1 or on_gpu else 0,
        reference=share if config.kl_coef or config.kl_coef_end else 0,
        cache=min(tokens / ranks * cached, 1e9 * (config.cache_gb or math.inf)),
        activations=max(config.micro_batch_tokens, longest) * kept + logits,  # a row is never cut
    )


def token_bytes(model: nn.Module, config: Config, on_gpu: bool) -> tuple[int, int, int]:
    """Bytes that a token keeps for the backward (counted on Llama, in fp32) and in the cache, and those of a chunk of
    logits with the reference's and their gradient."""
    shape, vocabulary = model.config, model.config.vocab_size
    layers, width, heads = shape.num_hidden_layers, shape.hidden_size, shape.num_attention_heads
    inner = getattr(shape, "intermediate_size", None) or 4 * width
    keys = getattr(shape, "head_dim", None) or width // heads
    keys *= getattr(shape, "num_key_value_heads", None) or heads
    layer = 8 * width + 4 * inner + 2 * keys
    kept = layers * width + layer if config.gradient_checkpointing else layers * layer
    chunk = 4096 if on_gpu else max(512, 2**21 // vocabulary)  # as kernels.py cuts them
    return 4 * kept, (2 if on_gpu else 4) * 2 * keys * layers, 12 * chunk * vocabulary


def fitting_tokens(model: nn.Module, config: Config, on_gpu: bool) -> int:
    """micro_batch_tokens of a pretrained model: activations of 8 GB on a GPU, 0.75 GB on a CPU."""
    kept, _, logits = token_bytes(model, config, on_gpu)
    room = (8e9 if on_gpu else 0.75e9) - logits
    return int(min(16384, max(128, room / kept)))


def show(config: Config, task: tasks.Task) -> None:
    """--show N: what the task looks like to a policy, and how it scores."""
    tasks.show(task, config.show)
    prompts = load_prompts(config.prompts, sesa.default_prompts(config.model == "tiny", task.two_stage))
    explorer, problem = sesa.Explorer(None, task, None, prompts), task.problems("train", config.seed)[0]
    for name in ("direct", "sketch", "next", "solve") if task.two_stage else ("sketch", "next"):
        text = explorer.text(getattr(prompts, name), problem=problem.text, sketch="<the sketch>")
        print(f"--- prompt '{name}'\n{text}\n")


def brief(evaluation: dict | None, size: int) -> dict[str, float]:
    """The measures of an evaluation that a person asks for first; {} without one."""
    if not evaluation:
        return {}
    known = sesa.measures(evaluation)
    values = {f"{name}, i.i.d.": known[name] for name in ("success", "valid")}
    part = "unique_at_k" if known["coverage"] else "pass_at_k"
    for kind, counts in known[part].items():
        shown = [k for k in counts if int(k) in (1, size, 320)] or list(counts)[:1]
        values |= {f"{part.replace('_', ' ')} {k}, {kind}": counts[k] for k in shown}
    return values


def report(summary: dict, config: Config) -> None:
    """The last lines of a run: before and after."""
    print(f"\n{config.task}, {config.method}, {summary['steps']} steps in {summary['seconds']:.0f} s:")
    known = dict(floor=summary["floor"], ceiling=summary["ceiling"])  # of a random policy, of a solver
    bounds = ", ".join(f"{name} {value:.3f}" for name, value in known.items() if value is not None)
    base, last = (brief(summary[name], config.num_sketches) for name in ("base_evaluation", "evaluation"))
    for name, after in last.items():
        beside = f"  ({bounds})" if name.startswith("success") and bounds else ""
        print(f"  {name:28} {base.get(name, math.nan):6.3f} -> {after:.3f}{beside}")
    print(f"  everything is in {config.output_dir}/")


def main(config: Config) -> None:
    transformers.utils.logging.disable_progress_bar()  # for every load and save
    # one process, as wanted; the new name is not yet in every version that we take
    warnings.filterwarnings("ignore", "torch.distributed is disabled|`gradient_checkpointing_enable` is deprecated")
    with user_errors():
        if config.ask is not None or config.compare:
            return compare(config) if config.compare else answer(config)
        task = tasks.make_task(config.task, **parse_options(config.task_options))
        config = resolve(config, task)
        if config.dry_run or config.show:
            look = describe if config.dry_run else show
            return look(config, task) if os.environ.get("RANK", "0") == "0" else None
        folder = RunFolder(config, Ranks.start(config.device))
    with closing(folder):
        work(config, task, folder)


def work(config: Config, task: tasks.Task, folder: RunFolder) -> None:
    """All of a run: from its folder, and to it."""
    ranks, path = folder.ranks, folder.path
    with user_errors():
        torch.manual_seed(config.seed)
        state = ranks.first(folder.open)
        run = Run(config, task, starting_policy(config.model, config, task, ranks), ranks)
        run.explorer.check_problems(run.problems, run.plan(config.temperature))
        if state is None:  # nothing is written before all that can be wrong with the input has been seen
            began, base = time.perf_counter(), evaluate(run) if config.eval_first else None
            state = dict(step=0, generated_tokens=0, found=[], best_step=0, best=-1.0, base=base, last=base)
            state["seconds"] = time.perf_counter() - began
        else:
            run.load(folder.checkpoint(state["step"]))
        ranks.first(lambda: folder.start(state["step"]))
    if not config.eval_only:
        reported = config if ranks.rank == 0 else dataclasses.replace(config, report_to="none")
        with reporting(reported, state["step"]) as log:
            run.train(folder, state, log)
    if ranks.rank == 0:
        summary = run.summary(state)
        (path / "summary.json").write_text(json.dumps(summary, ensure_ascii=False, indent=1))
        levels = () if task.targets else (task.floor(), task.ceiling())
        draw({config.method: [read_run(path)[1]]}, path / "figures" / "training.png", levels)
        write_rollouts(path)
        report(summary, config)
        if config.push_to_hub:
            push(config.push_to_hub, folder, state["best_step"])


def start(config: Config) -> None:
    """main, with what a person sees where it ends otherwise than well; for forks, too: see CONTRIBUTING.md."""
    try:
        main(config)
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted: the last checkpoint, if there is one, is whole", file=sys.stderr)
        sys.exit(130)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    start(COMMAND)
