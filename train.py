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
import fcntl
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
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from itertools import cycle, islice, product
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
    """JSON file that replaces some of the prompts direct, sketch, next, solve, turn; see data/prompts.json"""


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
    num_direct: int | None = None
    """D: answers of a group that are drawn without a sketch, beside the K*M; 0 where --num_sketches is given"""
    explore: Literal["always", "stuck"] = "always"
    """stuck: sketches only for problems that none of the D direct answers solved, else more direct answers"""
    sketches: Literal["sequential", "iid", "placebo"] = "sequential"
    """how Stage I draws: after the earlier sketches, with an empty history, or another problem's"""
    sketch_context: Literal["keep", "drop", "is", "imitate", "distill"] | None = None
    """what the loss conditions on: keep the sketch; drop it, or with importance weights, wins only; keep + imitate"""
    distill_coef: float | None = None
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
    """what kl_coef falls to, linearly over the first 70 % of the steps; kl_coef if that was given"""
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
    """samples per validation problem; 1,000 where the sketches are the answers"""
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
    """steps between checkpoints; one is written at the end, and after the step of a Ctrl-C or SIGTERM, in any case"""
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
    """Every flag. One left at None takes a value for its kind of task and policy: see ANSWERS below."""


def command_line(
    task: TaskFlags, policy: PolicyFlags, method: MethodFlags, sampling: SamplingFlags, loss: LossFlags,
    optimisation: OptimisationFlags, evaluation: EvaluationFlags, run: RunFlags, look: LookFlags,
) -> Config:  # fmt: skip
    """Reinforcement learning with sequential-sampling exploration (SESA) or GRPO.

    A flag left at None takes a value for its kind of task and policy, measured on the tiny one; --dry_run shows it.
    """
    groups = (task, policy, method, sampling, loss, optimisation, evaluation, run, look)
    return Config(**{name: value for group in groups for name, value in vars(group).items()})


def parse() -> Config:
    return tyro.cli(command_line, config=(tyro.conf.OmitArgPrefixes,), use_underscores=True)


# Before the slow imports: --help and a mistyped flag are answered at once.
if __name__ == "__main__":
    COMMAND = parse()

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import transformers
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as dcp_state
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from tqdm import tqdm

import kernels
import rl
import sesa
import tasks
from rl import TrainingSequence as Row
from sampler import Sampler, SamplingParams, Stats, output_scaling

DATA = Path(__file__).parent / "data"
# What None stands for. Where sketches are the answers, measured by experiments/collapse.py; else by
# experiments/tasks.py, with what a tiny policy needs by experiments/LOG.md.
ANSWERS = dict(
    steps=400, problems_per_step=16, num_sketches=16, num_direct=0,
    sketch_context="distill", distill_coef=0.3, advantage_scale="none", repeats="zero", rarity=0.5,
    kl_coef=0.1, kl_coef_end=0.02, learning_rate=3e-4, micro_batch_tokens=16384,
    warm_start_steps=1000, warm_start_lr=3e-3, eval_samples=1000,
)  # fmt: skip
TWO_STAGE = dict(
    steps=200, problems_per_step=8, num_sketches=8, num_direct=8,
    sketch_context="distill", distill_coef=0.1, advantage_scale="std", repeats="full", rarity=0.0,
    kl_coef=0.05, learning_rate=3e-4, micro_batch_tokens=2048,
    warm_start_steps=1500, warm_start_lr=2e-3, eval_samples=16,
)  # fmt: skip
GRPO = dict(advantage_scale="std", repeats="full", rarity=0.0)
# As is usual, not measured here. Its micro_batch_tokens are `fitting_tokens`.
PRETRAINED = dict(learning_rate=1e-6, kl_coef=0.001, kl_coef_end=None, micro_batch_tokens=None)


class UserError(ValueError):
    """What the user can mend: ends the program with this one line and exit code 2."""


@contextmanager
def user_errors() -> Iterator[None]:
    """Around what only fails where the input is wrong: a ValueError of the other modules is for the user to read."""
    try:
        yield
    except ValueError as error:
        raise UserError(line_of(error, False)) from error


@contextmanager
def told(what: str, remedy: str, last: bool = False) -> Iterator[None]:
    """Whatever is raised inside becomes one line for the user, with the first (or last) line that it says.

    Damaged and foreign files, full disks and networks have as many names for it as there are libraries.
    """
    try:
        yield
    except UserError:
        raise
    except (Exception, dcp.CheckpointException) as error:
        raise UserError(f"{what} ({line_of(error, last)}): {remedy}") from error


def line_of(error: BaseException, last: bool) -> str:
    text = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
    return text.splitlines()[-1 if last else 0]


def resolve(config: Config, task: tasks.Task) -> Config:
    """The config with every None that has a derived value filled in, checked."""
    defaults = dict(TWO_STAGE if task.two_stage else ANSWERS)
    defaults |= GRPO if config.method == "grpo" else {}
    # who says how many sketches gets nothing beside them
    defaults |= dict(num_direct=0) if config.num_sketches else {}
    # the tiny policy, or what a run of it has saved
    defaults |= {} if config.model == "tiny" or notes(config.model).get("tiny") else PRETRAINED
    name = re.sub(r"[^0-9A-Za-z]", "_", config.task)
    folder = f"runs/{name}-{config.method}-{config.seed}" + "-eval" * config.eval_only
    # A coefficient that was given stays; one that was not falls as the defaults say.
    config = filled(config, output_dir=folder, pass_k_end=config.pass_k, kl_coef_end=config.kl_coef)
    config = filled(config, **defaults)
    config = filled(config, group_size=group_answers(config), kl_coef_end=config.kl_coef)
    check(config, ranges(config))
    check(config, rules(config, task))
    return config


# (is the rule broken, the flags that it is about, the rule)
Verdicts = Iterator[tuple[bool, str, str]]


def check(config: Config, verdicts: Verdicts) -> None:
    """UserError for the first rule that is broken."""
    for broken, names, rule in verdicts:
        if broken:
            given = [f"--{name} {getattr(config, name)}" for name in names.split()]
            raise UserError(f"{', '.join(given)}: {rule}")


def filled(config: Config, **defaults) -> Config:
    """The config with these values where it holds None."""
    missing = {name: value for name, value in defaults.items() if getattr(config, name) is None}
    return replace(config, **missing)


def group_answers(config: Config) -> int:
    """Answers of a group: i.i.d., or direct and through sketches."""
    mixed = config.num_direct + config.num_sketches * config.num_solutions
    return config.group_size or mixed if config.method == "grpo" else mixed


MAY_BE_0 = """steps seed num_direct kl_coef kl_coef_end entropy_coef rarity clip_low clip_high weight_decay
    eval_every checkpoint_every warm_start_steps eval_temperature show""".split()


def ranges(config: Config) -> Verdicts:
    """The rules about one number; nan breaks all of them."""
    for name, value in vars(config).items():
        if type(value) in (int, float):
            zero = name in MAY_BE_0
            sound = 0 < value < math.inf or zero and value == 0
            yield not sound, name, "must be 0 or more" if zero else "must be above 0"


def rules(config: Config, task: tasks.Task) -> Verdicts:
    """The rules about several flags, or a flag and the task."""
    c, size, ranks = config, group_answers(config), environ("WORLD_SIZE", 1)
    grpo, chains, single = c.method == "grpo", chain_credit(c, task), c.problems_per_step < 2
    group = "group_size" if grpo else "num_sketches num_solutions num_direct"
    yield size < 2, group, f"a group of {size} has nothing to be compared with"
    yield c.minibatches > c.problems_per_step, "minibatches", "at most --problems_per_step"
    alone = chains and c.baseline == "position" and single
    yield alone, "problems_per_step", "--baseline position compares chains: 2 or more"
    yield c.top_p > 1 or c.top_p < 1 and not c.eval_only, "top_p", "at most 1; less needs --eval_only"
    beyond = c.advantage_scale == "passk" and max(c.pass_k, c.pass_k_end) > size
    yield beyond, "pass_k pass_k_end", f"at most the {size} answers of a group"
    unscaled = chains and c.advantage_scale in ("loo", "passk")
    yield unscaled, "advantage_scale", "guesses in a chain take none or std"
    most_k = min(c.eval_samples, size) if task.two_stage else c.eval_samples
    unseen = not 1 <= min(c.eval_k, default=0) <= most_k
    yield unseen, "eval_k", f"the least must be 1 to {most_k}, a problem's samples"
    uneven = c.shard_ranks and ranks % c.shard_ranks
    yield uneven, "shard_ranks", f"must divide the {ranks} ranks"
    varied = grpo and c.sketches != "sequential"
    yield varied, "sketches", "--method grpo has no Stage I to vary"
    unpaired = c.sketches == "placebo" and (single or ranks > 1)
    yield unpaired, "sketches", "takes another problem's: two, on one rank"
    beside = (c.num_direct or c.num_solutions > 1) and not task.two_stage
    yield beside, "num_direct num_solutions", "needs two stages"
    blind = c.explore == "stuck" and (grpo or not c.num_direct)
    yield blind, "explore", "needs --num_direct 1 or more, --method sesa"
    across = task.num_problems("train") > 1 and (c.rarity or chains and c.baseline != "chain")
    yield across, "baseline rarity", "different problems are not comparable; use chain and 0"
    missing = c.report_to != "none" and not importlib.util.find_spec(c.report_to)
    yield missing, "report_to", f"first pip install {c.report_to}"
    idle = (c.eval_only or not c.steps) and (c.push_to_hub or not c.eval_first)
    yield idle, "push_to_hub eval_first", "nothing is trained; needs --steps"


def chain_credit(config: Config, task: tasks.Task) -> bool:
    """Each guess of a chain is rewarded by itself."""
    return config.method == "sesa" and not task.two_stage


def environ(name: str, default: int = 0) -> int:
    """A number that torchrun tells its processes."""
    return int(os.environ.get(name, default))


def parse_options(pairs: Sequence[str]) -> dict[str, str]:
    """("difficulty=easy", "chain=8") -> {"difficulty": "easy", "chain": "8"}; the task knows the types."""
    if wrong := [pair for pair in pairs if "=" not in pair]:
        raise UserError(f"--task_options {wrong[0]}: must be name=value")
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
        return sesa.Explorer(Sampler(self.model, self.stop_ids, **room), task, self.chat(), self.prompts)

    def token_limits(self, config: Config) -> dict[str, int]:
        given = dict(sketch=config.max_sketch_tokens, solution=config.max_new_tokens)
        return {kind: limit or self.limits[kind] for kind, limit in given.items()}

    def save(self, folder: Path) -> None:
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        notes = dict(prompts=vars(self.prompts), limits=self.limits, tiny=self.tiny)
        write_json(folder / "sesa.json", notes)


def notes(model: str) -> dict:
    """What `Policy.save` has left beside the weights; {} in a folder of others."""
    file = Path(model) / "sesa.json"
    return read_json(file) if file.exists() else {}


def load_policy(name: str, task: tasks.Task, prompts: str | None = None, weights: bool = True) -> Policy:
    """A policy from a hub id, a folder (of ours: with its prompts and limits) or a .gguf file, in fp32.

    Without weights nothing but its config and tokenizer is read (or downloaded).
    """
    path = Path(name)
    with told(f"--model {name} cannot be loaded", "give tiny, a hub id, a folder or a .gguf file"):
        if not path.exists() and (name.startswith((".", "/", "~")) or path.suffix == ".gguf"):
            raise FileNotFoundError("no such file or folder")
        model, tokenizer = load_pretrained(path, weights)
    default = vars(default_prompts(task, tiny=False))
    limits = dict(sketch=task.sketch_tokens, solution=task.solution_tokens)
    ours = dict(prompts=default, limits=limits) | notes(name)
    ours["prompts"] = load_prompts(prompts, sesa.Prompts(**{u: ours["prompts"].get(u, t) for u, t in default.items()}))
    policy = Policy(model, tokenizer, **ours)
    if getattr(model.get_output_embeddings(), "bias", None) is not None:
        raise UserError(f"--model {name}: its output head has a bias, which the loss lacks")
    if not policy.stop_ids:
        raise UserError(f"--model {name}: its tokenizer has no end-of-sequence token")
    return policy


def load_pretrained(path: Path, weights: bool) -> tuple[nn.Module, object]:
    """(model, tokenizer) as transformers reads them; whatever goes wrong raises."""
    name, options, auto = str(path), {}, transformers.AutoModelForCausalLM
    if path.suffix == ".gguf":
        name, options = str(path.parent), dict(gguf_file=path.name)
    tokenizer = transformers.AutoTokenizer.from_pretrained(name, **options)
    shape = transformers.AutoConfig.from_pretrained(name, **options)
    # what is updated is what was sampled from
    vars(shape).update({key: 0.0 for key in vars(shape) if "drop" in key})
    if not weights:
        with torch.device("meta"):
            return auto.from_config(shape), tokenizer
    if options:
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    return auto.from_pretrained(name, config=shape, dtype=torch.float32, **options), tokenizer


def default_prompts(task: tasks.Task, tiny: bool) -> sesa.Prompts:
    """Those of data/prompts.json; what is not said for a kind of task is as for "solutions"."""
    kind = getattr(task, "prompts", "solutions" if task.two_stage else "answers")
    texts = read_json(DATA / "prompts.json")
    return sesa.Prompts(**texts["solutions"] | texts["tiny " * tiny + kind])


def load_prompts(path: str | None, default: sesa.Prompts) -> sesa.Prompts:
    with told(f"--prompts {path}", f"must be a JSON object of some of the texts {', '.join(vars(default))}"):
        return replace(default, **read_json(Path(path))) if path else default


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
        # one base, whatever the seed of training
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(shape)
    prompts = load_prompts(config.prompts, default_prompts(task, tiny=True))
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
        path = str(warm_start(config, task, ranks.device)) if name == "tiny" else name
        with patience(f"loading {path}"):
            return load_policy(path, task, config.prompts)

    return ranks.first(make, lambda made: replace(made, model=hollow(made.model, device="meta")))


def hollow(model: nn.Module, **options) -> nn.Module:
    """The model with its buffers and without its weights: new parameters, tied as before, that hold nothing yet.

    options: device and dtype of the parameters.
    """
    empty = {id(p): nn.Parameter(torch.empty_like(p, **options), p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, empty)


def warm_start(config: Config, task: tasks.Task, device: torch.device) -> Path:
    """The folder of the tiny policy after maximum likelihood on demonstrations, made once for all it depends on."""
    policy = tiny_policy(config, task)
    cache = warm_start_cache(config, policy, task)
    if not cache.exists():
        demonstrate(config, policy, task, device)
        # another run may have been faster
        if not cache.exists():
            write_folder(cache, policy.save, Ranks(0, 1, device))
    return cache


def warm_start_cache(config: Config, policy: Policy, task: tasks.Task) -> Path:
    """The folder of a warm-started policy, named by what makes it: recipe, model, words, prompts, demonstrations."""
    c, shape = config, policy.model.config.to_json_string(use_diff=False)
    words = sorted(policy.tokenizer.get_vocab().items())
    rows = [row.ids for row in demonstration_rows(policy, task, 64, seed=0)]
    recipe = [c.warm_start_steps, c.warm_start_batch, c.warm_start_lr]
    return tasks.cached(f"tiny-{task.name}", [*recipe, shape, words, policy.prompts, policy.limits, rows])


def demonstration_rows(policy: Policy, task: tasks.Task, n: int, seed: int) -> Iterator[Row]:
    """The conversations of n demonstrations, as rows to be learnt by heart."""
    explorer = sesa.Explorer(None, task, policy.chat(), policy.prompts)
    for demo in islice(task.demonstrations(random.Random(seed)), n):
        for trajectory in explorer.demonstration(demo):
            trajectory.advantages = [1.0]
            yield sesa.as_sampled(trajectory)


def demonstrate(config: Config, policy: Policy, task: tasks.Task, device: torch.device) -> None:
    """Maximum likelihood on the task's demonstrations: the update of a step, with advantage 1 for all of them."""
    model, ranks = policy.model.to(device), Ranks(0, 1, device)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.01)
    steps, batch = config.warm_start_steps, config.warm_start_batch
    rows = demonstration_rows(policy, task, steps * batch, seed=1)
    learn = Config(sketch_context="keep", loss_type="dapo", micro_batch_tokens=config.micro_batch_tokens)
    progress = tqdm(range(steps), desc="warm start", disable=None)
    for step in progress:
        # a demonstration is one row or more
        taken = [(0, row) for row in islice(rows, batch)]
        rate = rl.learning_rate(step, steps, min(50, steps), config.warm_start_lr, "cosine")
        optimizer.param_groups[0]["lr"] = rate
        metrics = update(model, None, taken, learn, optimizer, 0.0, 1, ranks)
        # recited at log-prob 0
        progress.set_postfix(loss=f"{-metrics['sampling/logp_shift']:.3f}")


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
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.0, weight_decay=config.weight_decay)
        # The weights are fp32. Rollouts run on a copy: in bf16 on a GPU, gathered where the weights are sharded. One
        # process on a CPU needs none.
        self.policy = policy
        if ranks.size > 1 or on_gpu:
            dtype = torch.bfloat16 if on_gpu else torch.float32
            policy.model = hollow(whole, dtype=dtype, device=ranks.device).to(ranks.device)
            self.refresh_actor()
        room = dict(max_rows=config.max_rows, memory_gb=config.cache_gb)
        self.explorer, self.limits = policy.explorer(task, **room), policy.token_limits(config)
        self.plan = plan_of(config, self.limits, config.temperature)
        self.problems = task.problems("train", config.seed)

    def train(self, folder: RunFolder, state: dict, log: Callable) -> None:
        """Train from where `state` is to the last step, or until asked to stop; log: of `reporting`."""
        config, began = self.config, time.perf_counter() - state["seconds"]
        # None: quiet where there is no terminal
        quiet = None if self.ranks.rank == 0 else True
        progress = tqdm(range(state["step"], config.steps), config.method, disable=quiet)
        skipped = 0
        with stop_signal(self.ranks) as asked_to_stop:
            for step in progress:
                groups, row = self.step(step)
                self.remember(state, groups, row)
                last = step + 1 == config.steps or asked_to_stop()
                if step + 1 == config.steps or due(step + 1, config.eval_every):
                    row["eval"] = state["last"] = evaluate(self)
                    found = sesa.headline(state["last"])
                    if found > state["best"] and (last or due(step + 1, config.checkpoint_every)):
                        state |= dict(best=found, best_step=step + 1)
                state["seconds"] = time.perf_counter() - began
                folder.append("metrics.jsonl", row)
                lost = row["skipped_updates"]
                skipped = skipped + lost if lost == config.minibatches else 0
                if skipped >= 5:
                    rule = f"{skipped} updates in a row were not finite; lower --learning_rate"
                    raise UserError(f"step {step + 1}: {rule}")
                sampled = 2 if last or due(step, config.sample_every) else 0
                records = [sesa.sample_record(step + 1, g) for g in groups[:sampled]]
                folder.append("samples.jsonl", *records)
                if records and not progress.disable:
                    tqdm.write(in_colour(records[0]), file=sys.stderr)
                log(row, records)
                if last or due(step + 1, config.checkpoint_every):
                    folder.save(self, state)
                shown = ("reward", "entropy", "unique_found")
                progress.set_postfix({name: row[name] or 0.0 for name in shown})
                if last:
                    break

    def step(self, step: int) -> tuple[list[sesa.Group], dict]:
        """One rollout and its updates. Returns this rank's groups and the step's row of metrics."""
        c, ranks, stats = self.config, self.ranks, vars(self.explorer.sampler.stats)
        began, before = time.perf_counter(), dict(stats)
        places = range(step * c.problems_per_step, (step + 1) * c.problems_per_step)
        mine = ranks.share([self.problems[i] for i in places])
        groups = self.explorer.rollout(mine, self.plan, (c.seed, step))
        rolled_out = time.perf_counter()

        outcomes = ranks.gather([g.outcomes() for g in groups])
        pass_k = c.pass_k + (c.pass_k_end - c.pass_k) * step / max(1, c.steps - 1)
        rule = dict(chains=chain_credit(c, self.task), baseline=c.baseline, pass_k=round(pass_k))
        rule |= dict(scale=c.advantage_scale, repeats=c.repeats, rarity=c.rarity)
        rewards, advantages = sesa.credit(outcomes, **rule)
        rows = []
        for (place, _), group in zip(mine, groups, strict=True):
            sesa.assign(group, rewards[place], advantages[place])
            rows += [(place, row) for row in sesa.sequences(group, c.sketch_context, c.distill_coef)]

        rate = rl.learning_rate(step, c.steps, c.warmup_steps, c.learning_rate, c.lr_schedule)
        self.optimizer.param_groups[0]["lr"] = rate
        kl_coef = c.kl_coef + (c.kl_coef_end - c.kl_coef) * min(1.0, step / (0.7 * c.steps))
        models, longest = (self.model, self.reference), longest_answer(self.limits, self.task)
        metrics = update(*models, rows, c, self.optimizer, kl_coef, longest, ranks)
        self.refresh_actor()

        counts, tokens = Counter(), ("generated_tokens", "prefill_tokens")
        for group in groups:
            counts.update(group.counts())
        counts = ranks.sum(counts | {name: stats[name] - before[name] for name in tokens})
        row = dict(step=step + 1) | sesa.group_metrics(outcomes, rewards)
        row |= sesa.text_metrics(counts) | dict(entropy=None, kl=None) | metrics
        row |= {name: int(counts[name]) for name in (*tokens, "sketch_tokens")}
        row |= dict(learning_rate=rate, kl_coef=kl_coef, rollout_time=rolled_out - began)
        return groups, row | dict(step_time=time.perf_counter() - began)

    @torch.no_grad()
    def refresh_actor(self) -> None:
        """Give the sampler's copy, where it has one, the new weights: one at a time, cast before they travel."""
        copied, model = self.policy.model, self.model
        if copied is not model:
            for ours, theirs in zip(copied.parameters(), model.parameters(), strict=True):
                ours.copy_(unsharded(theirs.to(ours.dtype)))

    def tensors(self) -> dict:
        """What a checkpoint holds of this rank: its part of the weights and of the optimizer's moments, by name."""
        weights, moments = dcp_state.get_state_dict(self.model, self.optimizer)
        return dict(model_state_dict=weights, optim_state_dict=moments)

    def load(self, folder: Path) -> None:
        """Go on from a checkpoint, whatever the number of ranks that wrote it."""
        with told(f"{folder} is damaged", DAMAGED, last=True):
            tensors = self.tensors()
            dcp.load(tensors, checkpoint_id=folder / "training_state")
            dcp_state.set_state_dict(self.model, self.optimizer, **tensors)
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
        c, task, base, last = self.config, self.task, state["base"], state["last"]
        # ru_maxrss is in KiB on Linux, in bytes on macOS
        mb = 2**10 if sys.platform == "linux" else 2**20
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / mb
        result = dict(task=c.task, method=c.method, seed=c.seed, steps=state["step"])
        result |= dict(seconds=round(state["seconds"], 1), peak_rss_mb=round(memory))
        result |= dict(generated_tokens=state["generated_tokens"], unique_found=len(state["found"]))
        result |= (sesa.measures(last) if last else {}) | dict(floor=task.floor(), ceiling=task.ceiling())
        result |= dict(base=base and sesa.measures(base), evaluation=last, base_evaluation=base)
        versions = {m.__name__: m.__version__ for m in (torch, transformers)}
        return result | dict(versions=versions | dict(python=sys.version.split()[0]))


def plan_of(config: Config, limits: dict[str, int], temperature: float, **changes) -> sesa.Plan:
    """How groups are drawn; limits: of `Policy.token_limits`."""
    for kind, limit in limits.items():
        changes[f"{kind}_params"] = SamplingParams(temperature, config.top_p, max_new_tokens=limit)
    names = vars(sesa.Plan()).keys() & vars(config).keys()
    return sesa.Plan(**{name: getattr(config, name) for name in names} | changes)


def longest_answer(limits: dict[str, int], task: tasks.Task) -> int:
    """The most tokens that the policy can write in one answer."""
    return limits["solution"] * task.max_turns if task.two_stage else limits["sketch"]


def due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def reference_policy(run: Run, whole: nn.Module) -> nn.Module | None:
    """A frozen copy of the policy that training starts from, or of --reference; None without a KL term."""
    config, ranks, name = run.config, run.ranks, run.config.reference
    if config.kl_coef == config.kl_coef_end == 0:
        return None
    if name is not None:
        whole = starting_policy(name, config, run.task, ranks).model
    elif ranks.size == 1:
        whole = copy.deepcopy(whole)
    if whole.config.vocab_size != run.model.config.vocab_size:
        raise UserError(f"--reference {name}: its vocabulary is not that of the policy")
    return ranks.shard(whole.eval().requires_grad_(False), config.shard_ranks)


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
    policy: nn.Module, reference: nn.Module | None, rows: Sequence[tuple[int, Row]],
    config: Config, optimizer: torch.optim.Optimizer, kl_coef: float, max_tokens: int, ranks: Ranks,
) -> dict[str, float]:  # fmt: skip
    """One rollout's updates. rows: (place of its problem in the step, row), this rank's. Returns metrics.

    Minibatch b holds the problems whose place is b modulo `minibatches`. The denominators are counted over all ranks
    once per minibatch; micro-batches only add up.
    """
    # no dropout: the distribution that was sampled from is trained; without that mode nothing is recomputed
    policy.train(config.gradient_checkpointing)
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
            # gradients travel once, when all have been added up
            if isinstance(policy, FSDPModule):
                policy.set_requires_gradient_sync(micro is micros[-1])
            part = backward(policy, reference, micro, config, kl_coef, ranks.device)
            loss += part["loss"]
            sums.update(part)
        norm = nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
        norms.append(float(unsharded(norm)))
        # on all ranks or on none: one step with nan or inf would be the last
        if all(ranks.gather([math.isfinite(loss + norms[-1])])):
            optimizer.step()
        else:
            skipped += 1
    sums = ranks.sum(sums)
    loss = sums.pop("loss", 0.0) / config.minibatches
    means = dict(loss=loss, grad_norm=sum(norms) / len(norms), skipped_updates=skipped)
    return means | rl.mean_metrics(sums)


def micro_batches(rows: Sequence[Row], config: Config, ranks: Ranks) -> list[list[Row]]:
    """As many on every rank, for each forward of a sharded model is a collective: the missing ones weigh nothing."""
    micros = list(rl.micro_batches(rows, config.micro_batch_tokens))
    most = max(ranks.gather([len(micros)]))
    nothing = torch.zeros(1, device=ranks.device)
    idle = Row([0, 0], [1], [0.0], [0.0], old_logps=nothing, token_weights=nothing)
    return micros + [[idle] for _ in range(most - len(micros))]


def backward(policy, reference, micro: list[Row], config: Config, kl_coef: float, device) -> dict:
    """Add one micro-batch's gradient to the policy's. Returns sums over its tokens, to be added up."""
    c = config
    is_options = dict(cap=c.is_cap, level=c.is_level) if c.sketch_context == "is" else None
    inputs, sampled = rl.loss_inputs(micro, device, is_options)
    clips = dict(clip_low=c.clip_low, clip_high=c.clip_high)
    options = clips | dict(kl_coef=kl_coef, kl_type=c.kl_type, entropy_coef=c.entropy_coef)
    loss_fn = partial(rl.policy_loss, **options)
    loss, stats = score(policy, micro, device, loss_fn, inputs, reference, c.temperature)
    loss.backward()
    metrics = rl.update_metrics(stats, *inputs, **clips)
    shift = (inputs[2] if len(inputs) > 2 else stats.logp) - sampled  # [N]
    metrics |= {"sampling/logp_difference": shift.abs().sum(), "sampling/logp_shift": shift.sum()}
    return {name: float(value) for name, value in metrics.items()} | dict(loss=loss.item())


def score(
    model: nn.Module, rows: Sequence[Row], device, loss_fn: Callable, extras: Sequence[Tensor] = (),
    reference: nn.Module | None = None, temperature: float = 1.0,
) -> tuple[Tensor, kernels.TokenStats]:  # fmt: skip
    """From token ids to the loss: (loss, statistics [N] of the rows' target tokens), [N, V] logits never being held.

    loss_fn, extras: see kernels.linear_policy_loss.
    """
    ref = ref_head = None
    if reference is not None:
        with torch.no_grad():
            ref, ref_head, _ = inside(reference, last_layer, rows, device)  # [N, H], [V, H]
    scale, softcap = output_scaling(model.config)

    def from_ids(model: nn.Module) -> tuple[Tensor, kernels.TokenStats]:
        hidden, head, targets = last_layer(model, rows, device)
        tensors = hidden, head, targets, loss_fn, extras, ref, ref_head
        return kernels.linear_policy_loss(*tensors, temperature / scale, softcap / scale)

    result = inside(model, from_ids)
    # no backward will do it
    for done in (reference, None if torch.is_grad_enabled() else model):
        if isinstance(done, FSDPModule):
            done.reshard()
    return result


def inside(model: nn.Module, function: Callable, *args):
    """function(model, *args), as a forward of the model where that is sharded: its embedding and head, which belong to
    no block, are there (and their gradients are shared out) in a forward of the whole only."""
    return model.inside(function, *args) if isinstance(model, FSDPModule) else function(model, *args)


def last_layer(model: nn.Module, rows: Sequence[Row], device) -> tuple[Tensor, Tensor, Tensor]:
    """(hidden [N, H], head [V, H], targets [N]) of the rows' target tokens, row after row; bf16 on a GPU.

    Rows are padded on the right, where causal attention never looks from the left: no mask is needed, and no pad id
    can be mistaken for a token. Token t is predicted from the hidden state at t - 1.
    """
    on_gpu, longest = device.type == "cuda", max(len(row.ids) for row in rows)
    padded = [row.ids + [0] * (longest - len(row.ids)) for row in rows]
    places = [(b, t) for b, row in enumerate(rows) for t in row.targets]
    ids = torch.tensor(padded, device=device)  # [B, T]
    owner, place = torch.tensor(places, device=device).T  # [N], [N]
    with torch.autocast(device.type, torch.bfloat16, enabled=on_gpu):
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state  # [B, T, H]
    # hidden is fp32 even under autocast, which would make the head's product slow
    hidden, head = hidden[owner, place - 1], model.get_output_embeddings().weight
    if on_gpu:
        hidden, head = hidden.bfloat16(), head.bfloat16()
    return hidden, head, ids[owner, place]


@torch.no_grad()
def old_log_probs(model: nn.Module, rows: Sequence[Row], config: Config, ranks: Ranks) -> None:
    """Set row.old_logps: of the policy before the updates of this rollout, in the context of the loss."""
    options = dict(loss_fn=lambda stats: stats.logp.sum(), temperature=config.temperature)
    for micro in micro_batches(rows, config, ranks):
        _, stats = score(model, micro, ranks.device, **options)
        lengths = [len(row.targets) for row in micro]
        for row, logps in zip(micro, stats.logp.split(lengths), strict=True):
            row.old_logps = logps


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation


def evaluate(run: Run) -> dict:
    """{"iid": metrics, "sequential": metrics} on validation problems, the same ones at every evaluation."""
    c, task, n = run.config, run.task, run.config.eval_samples
    problems = list(islice(task.problems("validation", 0), c.eval_problems))
    # in sequence: as many answers as a mixed group has, all of them through sketches
    sketches = c.num_sketches + c.num_direct // c.num_solutions
    chain = dict(method="sesa", sketches="sequential", explore="always", num_direct=0)
    chain |= dict(num_sketches=sketches, group_size=sketches * c.num_solutions)
    alone = dict(method="grpo", group_size=n if task.two_stage else min(n, 50))
    found = {}
    for kind, changes in dict(iid=alone, sequential=chain).items():
        plan = plan_of(c, run.limits, c.eval_temperature, **changes)
        size = plan.group_size
        rounds = 1 if task.two_stage else math.ceil(n / size)
        mine = run.ranks.share([p for p in problems for _ in range(rounds)])
        answers, stats = len(mine) * size, run.explorer.sampler.stats
        most = answers * longest_answer(run.limits, task)
        with patience(f"evaluation, {kind}: {answers:,} answers", stats, most):
            groups = run.explorer.rollout(mine, plan, (c.seed, "evaluation", kind))
        outcomes = run.ranks.gather([g.outcomes() for g in groups])
        # the rounds of a problem are one list of guesses
        if not task.two_stage:
            starts = range(0, len(outcomes), rounds)
            outcomes = [sum(outcomes[i : i + rounds], [])[:n] for i in starts]
        found[kind] = sesa.evaluation_metrics(outcomes, c.eval_k, task.targets, 1 if kind == "iid" else size)
    found["sequential"]["transfer_gap"] = found["sequential"]["reward"] - found["iid"]["reward"]
    return found


# ---------------------------------------------------------------------------------------------------------------------
# The run folder


def write_folder(path: Path, write: Callable[[Path], None], ranks: Ranks, need: int = 0) -> None:
    """Make a folder whole or not at all: written under another name, flushed to the disk, then renamed.

    Every rank writes its part. UserError on all of them where one cannot; need: bytes of the whole, for its line.
    """
    temporary = ranks.first(lambda: path.with_name(f".{path.name}.{os.getpid()}"))
    problems = []
    try:
        temporary.mkdir(parents=True, exist_ok=True)
        write(temporary)
    except (Exception, dcp.CheckpointException) as error:
        problems = [line_of(error, last=True)]
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    if problems := ranks.gather(problems):
        shutil.rmtree(temporary, ignore_errors=True)
        free = shutil.disk_usage(temporary.parent).free
        room = f"it needs {need / 1e6:.1f} MB, {free / 1e6:.1f} MB are free; {ROOM}"
        raise UserError(f"{path} cannot be written ({problems[0]}): {room}")
    if ranks.rank == 0:
        os.sync()
        # another run may have been faster: one warm start serves all
        shutil.rmtree(temporary) if path.exists() else os.replace(temporary, path)
    # no rank goes on before
    ranks.gather([])


ROOM = "make room, and go on with --resume"
DAMAGED = "remove it to resume from the one before it"


def position(folder: Path) -> dict:
    """What a checkpoint holds beside tensors: where the run was."""
    if (folder / "training_state.pt").exists():
        raise UserError(f"{folder} is of the first version: python experiments/upgrade.py {folder}")
    with told(f"{folder} is damaged", DAMAGED, last=True):
        return read_json(folder / "training_state" / "position.json")


class RunFolder:
    """What a run leaves behind. Only rank 0 looks and writes, but for the parts of a checkpoint."""

    # Flags that may change when a run goes on.
    FREE = """resume resume_auto output_dir steps checkpoint_every keep_checkpoints max_rows cache_gb device shard_ranks
        micro_batch_tokens gradient_checkpointing report_to push_to_hub""".split()

    def __init__(self, config: Config, ranks: Ranks):
        self.config, self.ranks, self.held = config, ranks, None
        self.path, self.flags = Path(config.output_dir), json.loads(json.dumps(vars(config)))
        self.file = self.path / "config.json"

    def error(self, rule: str) -> UserError:
        return UserError(f"--output_dir {self.path} {rule}")

    def open(self) -> dict | None:
        """None for a new run; to resume, the position of the last checkpoint. UserError if that cannot be."""
        steps, auto, path = self.checkpoints(), self.config.resume_auto, self.path
        if not self.config.resume and not (auto and self.file.exists()):
            if path.is_file() or path.exists() and any(path.iterdir()):
                raise self.error("is not empty: use --resume, or another folder")
            return None
        if not steps and not auto:
            raise self.error("holds no checkpoint: start without --resume")
        with told(f"{self.file} cannot be read", "use another --output_dir"):
            self.lock("rb")
            # nothing, where it ended before it began
            saved = json.loads(self.held.read() or "{}")
        state = position(self.checkpoint(steps[-1])) if steps else None
        now = saved | {n: v for n, v in self.flags.items() if n in saved and n not in self.FREE}
        if changes := [f"{n} {old!r} -> {now[n]!r}" for n, old in saved.items() if now[n] != old]:
            raise self.error(f"is from another config ({', '.join(changes)}): use its flags, or another")
        return state

    def lock(self, mode: str) -> None:
        """Held until this process ends, however it does: one run at a time works in a folder."""
        self.held = open(self.file, mode)
        try:
            fcntl.flock(self.held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise self.error("another run is at work there; wait, or give another") from None

    def close(self) -> None:
        if self.held:
            self.held.close()

    def start(self, step: int) -> None:
        """Make the folder, or what was logged after `step` undone; from here on the run is seen."""
        with told(f"--output_dir {self.path} cannot be made", "give another"):
            (self.path / "figures").mkdir(parents=True, exist_ok=True)
            if not self.held:
                self.lock("xb")
        write_json(self.file, self.flags)
        for file in (self.path / "metrics.jsonl", self.path / "samples.jsonl"):
            # nor what a crash cut off
            kept = [json_line(row) for row in read_rows(file) if row["step"] <= step]
            with open(file, "a") as out:
                out.truncate(len("".join(kept).encode()))

    def append(self, name: str, *rows: dict) -> None:
        if self.ranks.rank > 0:
            return
        file = self.path / name
        with told(f"{file} cannot be written", ROOM), open(file, "a", encoding="utf-8") as out:
            out.writelines(map(json_line, rows))

    def checkpoint(self, step: int) -> Path:
        return self.path / "checkpoints" / f"step_{step}"

    def checkpoints(self) -> list[int]:
        names = [p.name.removeprefix("step_") for p in self.checkpoint(0).parent.glob("step_*")]
        return sorted(int(name) for name in names if name.isdigit())

    def save(self, run: Run, state: dict) -> None:
        """Write checkpoints/step_N, and remove all but the last few and the best."""

        def write(folder: Path) -> None:
            dcp.save(run.tensors(), checkpoint_id=folder / "training_state")
            if first:
                run.policy.save(folder)
                (folder / "README.md").write_text(model_card(run, state), encoding="utf-8")
                write_json(folder / "training_state" / "position.json", state)

        first, checkpoint = self.ranks.rank == 0, self.checkpoint(state["step"])
        # weights and two moments, and the policy
        need = sum(12 * p.numel() for p in run.model.parameters())
        need += sum(p.nbytes for p in run.policy.model.parameters())
        # of a run that was killed
        for unfinished in checkpoint.parent.glob(".step_*") if first else ():
            shutil.rmtree(unfinished)
        write_folder(checkpoint, write, self.ranks, need)
        for step in self.checkpoints()[: -self.config.keep_checkpoints] if first else ():
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
        rank, size, local = environ("RANK"), environ("WORLD_SIZE", 1), torch.device("cpu")
        there = torch.cuda.is_available()
        cuda = there if device is None else device == "cuda"
        if cuda and not there:
            raise UserError("--device cuda: none is visible; use --device cpu")
        if cuda:
            local = torch.device("cuda", environ("LOCAL_RANK"))
            torch.cuda.set_device(local)
        if size > 1:
            # torchrun keeps its store when it restarts ranks that died: keys of an earlier attempt name dead addresses.
            # Attempts are counted alike on all ranks of one node only.
            store, *_ = next(dist.rendezvous("env://"))
            one_node = environ("LOCAL_WORLD_SIZE") == size
            attempt = str(environ("TORCHELASTIC_RESTART_COUNT")) if one_node else ""
            place = dict(store=dist.PrefixStore(attempt, store), rank=rank, world_size=size)
            backend, patient = "nccl" if cuda else "gloo", timedelta(minutes=30)
            dist.init_process_group(backend, timeout=patient, **place)
        return cls(rank, size, local)

    def share(self, items: Sequence) -> list:
        """This rank's share of items, as (place, item): consecutive, so that gathered shares are in order."""
        ends = [rank * len(items) // self.size for rank in (self.rank, self.rank + 1)]
        return list(enumerate(items))[slice(*ends)]

    def gather(self, items: list) -> list:
        """The lists of all ranks, one after another, on every rank."""
        if self.size == 1:
            return items
        parts = [None] * self.size
        dist.all_gather_object(parts, items)
        return [item for part in parts for item in part]

    def sum(self, values: dict[str, float]) -> dict[str, float]:
        """The sums over all ranks, name by name."""
        total = Counter()
        for part in self.gather([values]):
            total.update(part)
        return total

    def first(self, make: Callable, send: Callable = lambda made: made):
        """make() of rank 0: the other ranks get send(it). What it raises for the user is raised on all."""
        made, sent = None, [None, None]
        if self.rank == 0:
            try:
                made = make()
                sent[0] = send(made) if self.size > 1 else made
            except ValueError as error:
                sent[1] = error
        if self.size > 1:
            dist.broadcast_object_list(sent, src=0)
        if sent[1] is not None:
            raise sent[1]
        return made if self.rank == 0 else sent[0]

    def shard(self, whole: nn.Module, shard_ranks: int | None) -> nn.Module:
        """The model with its weights (so gradients and optimizer, too) shared out over the ranks, from those of rank 0;
        with one rank the model as it is.

        FSDP2: a forward gathers one block at a time. Gradients are summed, not averaged: loss weights are global.
        """
        if self.size == 1:
            return whole.to(self.device)
        model, kind, n = hollow(whole, device="meta"), self.device.type, shard_ranks or self.size
        mesh = dist.init_device_mesh(kind, (self.size // n, n), mesh_dim_names=("replicate", "shard"))
        mesh = mesh["shard"] if n == self.size else mesh
        lists = [m for m in model.modules() if isinstance(m, nn.ModuleList)]
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


def read_json(file: Path) -> dict:
    return json.loads(file.read_text(encoding="utf-8"))


def write_json(file: Path, value: dict) -> None:
    file.write_text(json.dumps(value, ensure_ascii=False, indent=1), encoding="utf-8")


def json_line(row: dict) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def read_rows(file: Path) -> list[dict]:
    """The rows of a file of one JSON object a line; [] without it. What is still being written is left out."""
    lines = file.read_bytes().split(b"\n")[:-1] if file.exists() else []
    return list(map(json.loads, lines))


def read_run(path: Path) -> tuple[dict, list[dict]]:
    """(flags, rows) of a run folder: each step's metrics with the tokens and seconds so far, the base first."""
    with told(f"{path} cannot be read as a run folder", "give a run's folder"):
        flags, rows = read_json(path / "config.json"), read_rows(path / "metrics.jsonl")
        file = path / "summary.json"
        base = read_json(file)["base_evaluation"] if file.exists() else None
    rows[:0] = [dict(step=0, eval=base)] if base else []
    tokens = seconds = 0
    for row in rows:
        tokens += row.get("generated_tokens", 0)
        seconds += row.get("step_time", 0)
        row |= dict(tokens=tokens, seconds=seconds)
        for kind, result in row.get("eval", {}).items():
            row[kind] = right_answers(result)[1]
    return flags, rows


def right_answers(evaluation: dict) -> tuple[str, float]:
    """Different right answers where the targets are known, else the share of success: (of what, how much)."""
    if "coverage" not in evaluation:
        return "validation success", evaluation["avg@n"]
    counts = evaluation["unique@k"]
    k = "320" if "320" in counts else list(counts)[-1]
    return f"targets found in {k} guesses", counts[k]


def draw(groups: dict[str, list[list[dict]]], path: Path) -> str:
    """A picture of runs (rows of `read_run`): each group a colour, its seeds thin, their mean thick. Returns what the
    evaluations count.

    Evaluations over steps, tokens and seconds: solid in sequence, dashed i.i.d.; the rest over steps.
    """
    import numpy as np
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 9), dpi=120, layout="constrained")
    axes = figure.subplots(3, 3)
    evaluations = [row["eval"] for runs in groups.values() for rows in runs for row in rows if row.get("eval")]
    title = right_answers(evaluations[-1]["iid"])[0] if evaluations else "no evaluation yet"
    panels = [(title, dict(sequential="-", iid="--"), across) for across in ("step", "tokens", "seconds")]
    for name in ("reward", "unique_success", "duplicate_rate", "entropy", "kl", "grad_norm"):
        panels.append((name, {name: "-"}, "step"))
    for axis, (name, columns, across) in zip(axes.flat, panels, strict=True):
        axis.set(title=name, xlabel=across)
        axis.locator_params(nbins=6)
        for (i, runs), (column, style) in product(enumerate(groups.values()), columns.items()):
            seeds = [{r["step"]: (r[across], r[column]) for r in rows if r.get(column) is not None} for rows in runs]
            shared = [step for step in seeds[0] if all(step in seed for seed in seeds)]
            mean = np.mean([[seed[step] for step in shared] for seed in seeds], axis=0)
            for points, width in [(list(seed.values()), 0.5) for seed in seeds] + [(mean, 1.8)]:
                x, y = np.reshape(points, (-1, 2)).T
                axis.plot(x, y, style, color=f"C{i}", linewidth=width)
    for i, label in enumerate(groups):
        axes[0, 0].plot([], color=f"C{i}", label=label)
    axes[0, 0].plot([], "k--", label="i.i.d.; solid: in sequence")
    figure.legend(loc="outside lower center", frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return title


# ---------------------------------------------------------------------------------------------------------------------
# Ask, watch, compare, publish


@dataclass
class Question(tasks.Task):
    """A free question. No answer is right or wrong; two are equal if they have the same words."""

    only_problem: str
    two_stage: bool = False

    name = "question"
    sketch_tokens, solution_tokens = 32, 256
    answer_hint = ""

    def __post_init__(self):
        if not self.only_problem.strip():
            raise ValueError("--ask: the question is empty; give a text, or - for stdin")
        self.prompts = "solutions" if self.two_stage else "question"

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
    keys = (outcome.key for outcome in group.outcomes())
    texts = [(text, t.sketch) for t in group.trajectories for text in t.texts]
    return [dict(text=text, sketch=sketch, key=next(keys)) for text, sketch in texts]


def answer(config: Config) -> None:
    """--ask: the chain as it is drawn, beside as many i.i.d. answers."""
    plain = replace(config, num_direct=0, num_solutions=1, sketches="sequential")
    c = filled(plain, **ANSWERS | dict(num_sketches=8))
    check(c, ranges(c))
    question = Question((sys.stdin.read() if c.ask == "-" else c.ask).strip(), c.two_stage)
    ranks = Ranks.start(c.device)
    policy = starting_policy(c.model, c, question, ranks)
    policy.model.to(ranks.device)
    # the sketches are the answers
    if not c.two_stage:
        c = filled(c, max_sketch_tokens=c.max_new_tokens)
    n, explorer = c.num_sketches, policy.explorer(question)
    plan = plan_of(c, policy.token_limits(c), c.temperature, method="sesa", group_size=n)
    iid = ask(explorer, replace(plan, method="grpo"), c.seed)
    width = max(16, shutil.get_terminal_size().columns // 2 - 4)
    places = cycle(enumerate(iid, 1))

    def beside(text: str) -> None:
        i, other = next(places)
        both = (one_line(line, width).ljust(width) for line in (text, other["text"]))
        print(f"{i:3} ", *both, flush=True)

    if not c.json:
        print(f"     {'in sequence':{width}} i.i.d.")
        explorer.drawn = beside
    found = dict(sequential=ask(explorer, plan, c.seed), iid=iid)
    different = {way: len({a["key"] for a in found[way]} - {None}) for way in found}
    if c.json:
        given = dict(question=question.only_problem, model=c.model, seed=c.seed, different=different)
        return print(json_line(given | found), end="")
    for solution in found["sequential"] if c.two_stage else ():
        beside(solution["text"])
    chain, alone = different.values()
    print(f"different: {chain} of {n} in sequence, {alone} of {n} i.i.d.")


def one_line(text: str, width: int) -> str:
    """A text of the policy for a terminal: one line without control characters, cut to so many characters.

    >>> one_line("New\\n  York \\x1b[31m City", 12)
    'New York [3…'
    """
    text = "".join(c for c in " ".join(text.split()) if c.isprintable())
    return text if len(text) <= width else text[: width - 1] + "…"


# of a terminal: green, yellow, faint, red
COLOURS = dict(hit=32, repeat=33, miss=2, invalid=31)


def in_colour(record: dict) -> str:
    """A record of samples.jsonl for a terminal: the guesses of a chain, or each sketch (or answer) -> its reward."""
    shown = []
    for solution in record["solutions"]:
        parts = (solution[name] for name in ("text", "mark", "reward"))
        for text, mark, reward in zip(*parts, strict=False):
            text = one_line(solution["sketch"] or text, 60)
            shown.append(f"\033[{COLOURS[mark]}m{text} -> {reward:.2g}\033[0m")
    return f"step {record['step']}, {one_line(record['problem'], 60)}: " + " | ".join(shown)


def write_rollouts(folder: Path) -> None:
    """figures/rollouts.html: what was sampled over the run, in one page; no text in it can end the script it is in."""
    page, file = DATA / "rollouts.html", folder / "figures" / "rollouts.html"
    records = json.dumps(read_rows(folder / "samples.jsonl")).replace("<", "\\u003c")
    text = page.read_text(encoding="utf-8").replace("@@RECORDS@@", records)
    file.write_text(text, encoding="utf-8")


# flags in which runs may differ and be alike
ASIDE = {"seed", "sample_every", "eval_first", *RunFolder.FREE} - {"steps"}


def compare(config: Config) -> None:
    """--compare: runs side by side, those that differ in nothing but the seed as one."""
    path = Path(config.output_dir or ".") / "compare.png"
    if path.exists() or path.parent.is_file():
        raise UserError(f"{path} exists, or is below a file: give another --output_dir")
    groups, standard = {}, json.loads(json.dumps(vars(Config())))
    for name in config.compare:
        flags, rows = read_run(Path(name))
        kept = {n: v for n, v in (standard | flags).items() if n not in ASIDE}
        groups.setdefault(json.dumps(kept, sort_keys=True), []).append(rows)
    flags = [json.loads(key) for key in groups]
    differ = [n for n in flags[0] if any(f.get(n) != flags[0][n] for f in flags)]
    labels = [" ".join(f"{name}={f.get(name)}" for name in differ or ["task", "method"]) for f in flags]
    groups = dict(zip(labels, groups.values(), strict=True))
    title = draw(groups, path)
    names = "step tokens seconds iid sequential reward entropy".split()
    print(("{:>11}" * 8).format("seeds", *names))
    for label, runs in groups.items():
        # of each run the last values that are known
        ends = [{n: row[n] for row in rows for n in names if row.get(n) is not None} for rows in runs]
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
            writer.add_hparams({flag: str(value) for flag, value in vars(config).items()}, {}, run_name=".")
            yield log
    else:
        # These two have one interface, but for wandb's id, by which it knows a run.
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
        if isinstance(value, dict):
            found |= flat(value, path + "/")
        elif value is not None:
            found[path] = value
    return found


def model_card(run: Run, state: dict) -> str:
    """README.md of a checkpoint, from data/model_card.md."""
    c, usual = run.config, vars(Config())
    given = {n: v for n, v in vars(c).items() if n not in ASIDE and v != usual[n]}
    given = {n: " ".join(map(str, v)) if isinstance(v, tuple) else v for n, v in given.items()}
    values = dict(given=" ".join(f"--{name} {value}" for name, value in given.items()))
    values["base_model"] = "" if c.model == "tiny" or Path(c.model).exists() else f"base_model: {c.model}\n"
    rows = [f"| {name} | {before:.3f} | {after:.3f} |" for name, before, after in progress(state, c.num_sketches)]
    values |= dict(asked="--two_stage" * run.task.two_stage, measures="\n".join(rows))
    return (DATA / "model_card.md").read_text(encoding="utf-8").format(**vars(c) | state | values)


def push(name: str, folder: RunFolder, best: int) -> None:
    """--push_to_hub: the best checkpoint that was kept, without what training would go on from."""
    from huggingface_hub import HfApi

    kept, api = folder.checkpoints(), HfApi()
    path = folder.checkpoint(best if best in kept else kept[-1])
    with told(f"--push_to_hub {name}", f"the checkpoint is in {path}"):
        api.create_repo(name, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=path, ignore_patterns=["training_state/*"])
    print(f"  {path} is at {name}")


@contextmanager
def patience(doing: str, stats: Stats | None = None, tokens: int = 0) -> Iterator[None]:
    """Says what is being waited for, where that takes over two seconds; and about how long, for so many tokens."""
    stats = stats or Stats()
    began = stats.generated_tokens

    def tell():
        drawn = stats.generated_tokens - began
        expected = f", about {2 * tokens / drawn:.0f} s" if drawn else ""
        tqdm.write(f"{doing}{expected} ...", file=sys.stderr)

    timer = threading.Timer(2.0, tell)
    timer.daemon = True
    if environ("RANK") == 0:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


# ---------------------------------------------------------------------------------------------------------------------
# Entry


def describe(config: Config, task: tasks.Task) -> None:
    """--dry_run: every value, and the sizes that follow from them."""
    c, ranks, chains = config, environ("WORLD_SIZE", 1), chain_credit(config, task)
    policy = tiny_policy(c, task) if c.model == "tiny" else load_policy(c.model, task, c.prompts, weights=False)
    limits, answers = policy.token_limits(c), c.problems_per_step * group_answers(c)
    longest = longest_answer(limits, task)
    tokens = answers * longest
    if c.method == "sesa" and not chains:
        tokens += c.problems_per_step * c.num_sketches * limits["sketch"]
    on_gpu = torch.cuda.is_available() and c.device != "cpu"
    c = filled(c, micro_batch_tokens=fitting_tokens(policy.model, c, on_gpu))
    sizes = dict(ranks=ranks, answers_per_step=answers, most_tokens_per_step=tokens)
    sizes |= dict(updates=c.steps * c.minibatches, floor=task.floor(), ceiling=task.ceiling())
    for name, value in (vars(c) | sizes).items():
        print(f"  {name:24}{value}")
    longest *= c.num_sketches if chains else 1
    parts = memory(policy.model, c, tokens, longest, ranks, on_gpu)
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // environ("LOCAL_WORLD_SIZE", 1)
    if on_gpu:
        there = torch.cuda.get_device_properties(0).total_memory
    together = sum(parts.values())
    print("memory of each rank, GB")
    for name, size in (parts | dict(together=together, there_are=there)).items():
        print(f"  {name:24}{size / 1e9:.3f}")
    if together > there:
        print("  IT DOES NOT FIT: more ranks, --gradient_checkpointing, --cache_gb help")


def memory(model: nn.Module, config: Config, tokens: int, longest: int, ranks: int, on_gpu: bool) -> dict:
    """Bytes that each part takes on each rank; tokens: those written in a step on all ranks, and in the longest row.

    Not counted: prompts, the process itself (0.5 GB on a CPU), and the blocks that FSDP has gathered for a moment.
    """
    weights, half = 4 * sum(p.numel() for p in model.parameters()), 2 if on_gpu else 1
    share = weights / (config.shard_ranks or ranks)
    kept, cached, logits = token_bytes(model, config, on_gpu)
    return dict(
        weights=share,
        # whole until the last micro-batch shares them out
        gradients=weights if ranks > 1 else share,
        optimizer=2 * share,
        rollout_copy=weights / half if ranks > 1 or on_gpu else 0,
        reference=share if config.kl_coef or config.kl_coef_end else 0,
        cache=min(tokens / ranks * cached, 1e9 * (config.cache_gb or math.inf)),
        # a row is never cut
        activations=max(config.micro_batch_tokens, longest) * kept + logits,
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
    # as kernels.py cuts them
    chunk = 4096 if on_gpu else max(256, 2**21 // vocabulary)
    return 4 * kept, (2 if on_gpu else 4) * 2 * keys * layers, 12 * chunk * vocabulary


def fitting_tokens(model: nn.Module, config: Config, on_gpu: bool) -> int:
    """micro_batch_tokens of a pretrained model: activations of 8 GB on a GPU, 0.5 GB on a CPU."""
    kept, _, logits = token_bytes(model, config, on_gpu)
    room = (8e9 if on_gpu else 0.5e9) - logits
    return int(min(16384, max(128, room / kept)))


def show(config: Config, task: tasks.Task) -> None:
    """--show N: what the task looks like to a policy, and how it scores."""
    prompts = load_prompts(config.prompts, default_prompts(task, config.model == "tiny"))
    explorer, problems = sesa.Explorer(None, task, None, prompts), task.problems("train", config.seed)
    for name in ("direct", "sketch", "next", "solve") if task.two_stage else ("sketch", "next"):
        text = explorer.text(getattr(prompts, name), problem=problems[0].text, sketch="<the sketch>")
        print(f"--- prompt '{name}'\n{text}\n")
    rng = random.Random(config.seed)
    for problem, sketches, turns in (task.demonstrate(problems[i], rng) for i in range(config.show)):
        print(f"--- {task.name}, problem {problem.index}", problem.text, "sketches:", *sketches, sep="\n")
        for texts in (turns or sketches[:1], ["<answer> I do not know </answer>"]):
            print(f"written: {' ... '.join(texts)}\n  {tasks.play(task, problem, texts)}")


def brief(evaluation: dict, size: int) -> dict[str, float]:
    """The measures of an evaluation that a person asks for first."""
    iid = evaluation["iid"]
    part = "unique@k" if "coverage" in iid else "pass@k"
    measures = {"success, i.i.d.": iid["avg@n"], "valid, i.i.d.": iid["valid"]}
    for kind, found in evaluation.items():
        shown = [k for k in found[part] if int(k) in (1, size, 320)] or list(found[part])[:1]
        measures |= {part.replace("k", f"{k}, {kind}"): found[part][k] for k in shown}
    return measures


def progress(state: dict, size: int) -> list[tuple[str, float, float]]:
    """(measure, before, after) of a run, as far as it was evaluated."""
    base, last = (brief(e, size) if e else {} for e in (state["base"], state["last"]))
    return [(name, base.get(name, math.nan), after) for name, after in last.items()]


def report(run: Run, state: dict) -> None:
    """The last lines of a run: before and after."""
    c, task = run.config, run.task
    print(f"\n{c.task}, {c.method}, {state['step']} steps in {state['seconds']:.0f} s:")
    for name, before, after in progress(state, c.num_sketches):
        print(f"  {name:28} {before:6.3f} -> {after:.3f}")
    # of a random policy, of a solver
    for name, success in dict(floor=task.floor(), ceiling=task.ceiling()).items():
        if success is not None:
            print(f"  {name:28} {success:6.3f}")
    print(f"  everything is in {c.output_dir}/")


def main(config: Config) -> None:
    # for every load and save
    transformers.utils.logging.disable_progress_bar()
    # one process, as wanted; the new name is not yet in every version that we take
    warnings.filterwarnings("ignore", "torch.distributed is disabled|`gradient_checkpointing_enable`")
    with user_errors():
        if config.ask is not None or config.compare:
            return compare(config) if config.compare else answer(config)
        with patience(f"making the task {config.task}"):
            task = tasks.make_task(config.task, **parse_options(config.task_options))
        config = resolve(config, task)
        if config.dry_run or config.show:
            look = describe if config.dry_run else show
            return look(config, task) if environ("RANK") == 0 else None
        folder = RunFolder(config, Ranks.start(config.device))
    with closing(folder):
        work(config, task, folder)


def work(config: Config, task: tasks.Task, folder: RunFolder) -> None:
    """All of a run: from its folder, and to it."""
    ranks, path, first = folder.ranks, folder.path, folder.ranks.rank == 0
    with user_errors():
        torch.manual_seed(config.seed)
        kernels.choose("auto", ranks.device)
        state = ranks.first(folder.open)
        run = Run(config, task, starting_policy(config.model, config, task, ranks), ranks)
        run.explorer.check_problems(run.problems, run.plan)
        if state is None:
            began, base = time.perf_counter(), evaluate(run) if config.eval_first else None
            state = dict(step=0, generated_tokens=0, found=[], best_step=0, best=-1.0)
            state |= dict(base=base, last=base, seconds=time.perf_counter() - began)
        else:
            run.load(folder.checkpoint(state["step"]))
        # Nothing is written before all that can be wrong with the input has been seen.
        ranks.first(lambda: folder.start(state["step"]))
    if not config.eval_only:
        reported = config if first else replace(config, report_to="none")
        with reporting(reported, state["step"]) as log:
            run.train(folder, state, log)
    if first:
        write_json(path / "summary.json", run.summary(state))
        draw({config.method: [read_run(path)[1]]}, path / "figures" / "training.png")
        write_rollouts(path)
        report(run, state)
        if config.push_to_hub:
            push(config.push_to_hub, folder, state["best_step"])


def start(config: Config) -> None:
    """main, with what a person sees where it ends otherwise than well; for forks, too: see CONTRIBUTING.md."""
    try:
        main(config)
    except UserError as error:
        if environ("RANK") == 0:
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted: the last checkpoint, if any, is whole", file=sys.stderr)
        sys.exit(130)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    start(COMMAND)
