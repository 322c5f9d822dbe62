"""Train a policy with SESA or GRPO:  torchrun train.py --task synthetic

One step of training, from top to bottom:

    groups = explorer.rollout(problems, plan, seed)      # sesa.py: sketches, solutions, outcomes
    rewards, advantages = sesa.credit(outcomes, ...)     # over the groups of all ranks
    rows = [row for g in groups for row in sesa.sequences(g, sketch_context)]
    update(policy, reference, rows, ...)                 # rl.policy_loss through kernels.linear_policy_loss

The same code runs on a CPU, a GPU, and several of either: problems are shared out over the ranks of torchrun, weights
are replicated, gradients are summed. Loss weights are made from global counts (rl.token_weights), so that nothing
depends on how the work is split. Every random number is a function of (seed, step, problem, index): a run that is
stopped and resumed draws the same tokens as one that is not.

A run lives in its folder: config.json, metrics.jsonl, samples.jsonl, summary.json, figures/, checkpoints/step_N/.
"""

import copy
import dataclasses
import hashlib
import json
import math
import os
import random
import resource
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from platform import python_version
from typing import Literal

import torch
import torch.distributed as dist
import tyro
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar

import kernels
import rl
import sesa
import tasks
from sampler import Sampler, SamplingParams

# ---------------------------------------------------------------------------------------------------------------------
# Config


@dataclass
class Config:
    """Reinforcement learning with sequential-sampling exploration (SESA) or GRPO.

    A flag left at None takes the value that was measured best for its kind of task and policy; --dry_run shows it.
    """

    task: str = "synthetic"
    """synthetic, countdown, sokoban, frozenlake, sudoku, math, jsonl:FILE, gym:NAME or FILE.py:CLASS"""
    task_options: tuple[str, ...] = ()
    """options of the task, such as difficulty=easy treasure_seed=1"""
    method: Literal["sesa", "grpo"] = "sesa"
    """sesa: sketches one after another, then solutions in parallel; grpo: answers i.i.d."""
    model: str = "tiny"
    """tiny (made and warm-started on the spot), a hub id, a folder, or a .gguf file"""
    seed: int = 0
    """of everything that is drawn"""
    steps: int | None = None
    """training steps, each one rollout"""
    output_dir: str | None = None
    """run folder; runs/<task>-<method>-<seed> if not given"""
    resume: bool = False
    """continue the run in output_dir from its last checkpoint"""
    eval_only: bool = False
    """evaluate --model and write summary.json, without training"""
    dry_run: bool = False
    """print what would be done, with all derived sizes, and exit"""
    show: int = 0
    """print so many problems with prompts, demonstrations and outcomes, and exit"""

    problems_per_step: int | None = None
    """P: problems (or, where the sketches are the answers, chains) of a step, over all ranks"""
    num_sketches: int | None = None
    """K: sketches of a problem, or guesses of a chain"""
    num_solutions: int = 1
    """M: solutions of each sketch"""
    group_size: int | None = None
    """G: i.i.d. answers of a problem with --method grpo; K*M if not given, so that methods compare at equal answers"""
    sketches: Literal["sequential", "iid", "list", "placebo"] = "sequential"
    """how Stage I draws: after the earlier sketches, with an empty history, all in one text, or another problem's"""
    sketch_context: Literal["keep", "drop", "is", "distill"] | None = None
    """what the loss conditions on: the sampled context, the plain prompt, that with importance weights, or both"""
    prompts: str | None = None
    """JSON file that replaces some of the prompts direct, sketch, next, list, solve, turn"""
    max_sketch_tokens: int | None = None
    """limit of one sketch; the task's if not given"""
    max_new_tokens: int | None = None
    """limit of one solution, or of one turn of an episode; the task's if not given"""
    temperature: float = 1.0
    """of sampling in training, and of the trained distribution"""
    top_p: float = 1.0
    """nucleus sampling, in evaluation only: training needs the whole distribution"""

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
    loss_type: Literal["grpo", "dr_grpo", "dapo"] = "grpo"
    """what a token weighs: 1/length of its sequence, a constant, or 1/all tokens"""
    advantage_scale: Literal["std", "none", "loo", "passk"] | None = None
    """divide by the group's std, do not, leave-one-out baseline, or the pass@k advantage"""
    pass_k: int = 8
    """k of the passk advantage"""
    baseline: Literal["chain", "position", "batch"] = "position"
    """where guesses in a chain are the answers: mean over the chain, over chains at one position, or over the batch"""
    repeats: Literal["zero", "full"] | None = None
    """what an answer earns that its group (or chain) already holds"""
    rarity: float | None = None
    """a success found by n groups of the batch earns n ** -rarity of its reward"""
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
    reference: str | None = None
    """model of the KL term (tiny, a hub id, a folder, a .gguf file); the one that training starts from if not given"""
    entropy_coef: float = 0.0
    """weight of an entropy bonus"""
    is_cap: float = 2.0
    """importance weights are truncated here (--sketch_context is)"""
    is_level: Literal["token", "sequence"] = "token"
    """importance weight of each token, or of the sequence"""

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

    warm_start_steps: int | None = None
    """steps of maximum likelihood on demonstrations, tiny policy only"""
    warm_start_batch: int = 32
    """rows of demonstrations (a chain of sketches, a solution) per step"""
    warm_start_lr: float | None = None
    """peak learning rate of the warm start"""
    tiny_width: int = 128
    """hidden width of the tiny policy"""
    tiny_layers: int = 2
    """layers of the tiny policy"""

    checkpoint_every: int = 50
    """steps between checkpoints; one is written at the end, and on Ctrl-C or SIGTERM, in any case"""
    keep_checkpoints: int = 2
    """how many of the last checkpoints to keep, beside the best"""
    max_rows: int = 1024
    """sequences decoded at once; more wait their turn"""
    cache_gb: float | None = None
    """memory budget of the sampler's keys and values, in GB; what does not fit waits"""
    graphs: Literal["off", "on", "compiled"] = "off"
    """decode with CUDA graphs, four tokens at a time; compiled: through torch.compile first. Not yet run on a GPU"""
    sample_every: int = 10
    """steps between the decoded samples in samples.jsonl"""
    gradient_checkpointing: bool = False
    """recompute activations in the backward: less memory, more time"""
    device: Literal["cpu", "cuda"] | None = None
    """the GPU if there is one"""


# What None stands for. Where the sketches are the answers, measured by experiments/collapse.py; else the paper's, with
# what a tiny policy needs by experiments/LOG.md.
ANSWERS = dict(
    steps=300, problems_per_step=16, num_sketches=16, sketch_context="keep", advantage_scale="none", repeats="zero",
    rarity=0.5, kl_coef=0.1, kl_coef_end=0.02, learning_rate=3e-4, warm_start_steps=1000, warm_start_lr=3e-3,
    eval_samples=1000, micro_batch_tokens=16384,
)  # fmt: skip
TWO_STAGE = dict(
    steps=200, problems_per_step=8, num_sketches=16, sketch_context="drop", advantage_scale="std", repeats="full",
    rarity=0.0, kl_coef=0.001, kl_coef_end=None, learning_rate=1e-4, warm_start_steps=1500, warm_start_lr=2e-3,
    eval_samples=16, micro_batch_tokens=2048,
)  # fmt: skip
GRPO = dict(advantage_scale="std", repeats="full", rarity=0.0, learning_rate=3e-4)
PRETRAINED = dict(learning_rate=1e-6, micro_batch_tokens=16384)


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
    """The config with every None that has a derived value filled in, checked: value, rule, remedy."""
    defaults = dict(TWO_STAGE if task.two_stage else ANSWERS)
    defaults |= (GRPO if config.method == "grpo" else {}) | (PRETRAINED if config.model != "tiny" else {})
    name = "".join(c if c.isalnum() else "_" for c in config.task)
    defaults |= dict(output_dir=f"runs/{name}-{config.method}-{config.seed}" + "-eval" * config.eval_only)
    defaults |= {} if config.kl_coef is None else dict(kl_coef_end=config.kl_coef)
    config = dataclasses.replace(config, **{k: v for k, v in defaults.items() if getattr(config, k) is None})
    answers = config.num_sketches * config.num_solutions
    derived = dict(group_size=answers, kl_coef_end=config.kl_coef)
    config = dataclasses.replace(config, **{k: v for k, v in derived.items() if getattr(config, k) is None})

    positive = """problems_per_step num_sketches num_solutions group_size minibatches micro_batch_tokens learning_rate
        warmup_steps max_grad_norm eval_problems eval_samples warm_start_batch warm_start_lr tiny_width tiny_layers
        keep_checkpoints max_rows sample_every temperature is_cap pass_k max_sketch_tokens max_new_tokens cache_gb """
    not_negative = """steps seed kl_coef kl_coef_end entropy_coef rarity clip_low clip_high weight_decay eval_every
        checkpoint_every warm_start_steps eval_temperature show"""
    grpo, chains = config.method == "grpo", chain_credit(config, task)
    size = config.group_size if grpo else answers
    sized = "--group_size" if grpo else "--num_sketches times --num_solutions"
    least_k = min(config.eval_k, default=0)
    most_k = min(config.eval_samples, answers) if task.two_stage else config.eval_samples
    unpaired = config.problems_per_step < 2 or int(os.environ.get("WORLD_SIZE", 1)) > 1
    alone = chains and config.baseline == "position" and config.problems_per_step < 2
    for name in (positive + not_negative).split():
        value, above = getattr(config, name), name in positive.split()
        if value is not None and not (0 < value < math.inf or value == 0 and not above):  # nan is neither
            raise UserError(f"--{name} {value}: must be {'above 0' if above else '0 or more'}")
    for wrong, line in (
        (size < 2, f"{sized} is {size}: a group of one has nothing to be compared with; make it 2 or more"),
        (config.minibatches > config.problems_per_step, f"--minibatches {config.minibatches}: at most the number of "
         f"problems in a step, {config.problems_per_step}"),
        (not 0 < config.top_p <= 1, f"--top_p {config.top_p}: must be above 0 and at most 1"),
        (config.top_p < 1 and not config.eval_only, f"--top_p {config.top_p}: the loss trains the whole distribution; "
         "leave it at 1, or use it with --eval_only"),
        (config.advantage_scale == "passk" and config.pass_k > size, f"--pass_k {config.pass_k}: at most the {size} "
         "answers of a group"),
        (chains and config.advantage_scale not in ("none", "std"), f"--advantage_scale {config.advantage_scale}: "
         "guesses in a chain take none or std"),
        (not 1 <= least_k <= most_k, f"--eval_k {config.eval_k}: the least must be from 1 to "
         f"{most_k}, the samples of a problem"),
        (config.sketches == "placebo" and unpaired, "--sketches placebo takes those of the problem before: needs "
         "--problems_per_step 2 or more, on one rank"),
        (config.sketches == "list" and config.model == "tiny", "--sketches list: the tiny policy writes no lines; "
         "needs a pretrained model"),
        (config.sketches != "sequential" and (grpo or not task.two_stage), f"--sketches {config.sketches}: there is no "
         "Stage I to vary; for guesses that do not see each other use --method grpo"),
        (chains and task.num_problems("train") > 1 and (config.baseline != "chain" or config.rarity), "chains about "
         "different problems are not comparable: use --baseline chain --rarity 0"),
        (config.tiny_width // max(1, config.tiny_width // 32) % 2, f"--tiny_width {config.tiny_width}: must be a "
         "multiple of 32, or even and below"),
        (config.graphs != "off" and not (torch.cuda.is_available() and config.device != "cpu"),
         f"--graphs {config.graphs}: needs a GPU; use --graphs off"),
        (alone, "--problems_per_step 1: --baseline position compares chains; make it 2 or more"),
    ):  # fmt: skip
        if wrong:
            raise UserError(line)
    return config


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
# Ranks


@dataclass(frozen=True)
class Ranks:
    """This process among those of torchrun. Collectives are the same in number and order on every rank."""

    rank: int
    size: int
    device: torch.device

    @classmethod
    def start(cls, device: str | None) -> "Ranks":
        rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        cuda = torch.cuda.is_available() if device is None else device == "cuda"
        if cuda and not torch.cuda.is_available():
            raise UserError(f"--device {device}: no CUDA device is visible; use --device cpu")
        local = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
        if cuda:
            torch.cuda.set_device(local)
        if size > 1:
            dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(minutes=30))
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
        return {name: sum(part.get(name, 0.0) for part in parts) for name in {n: 0 for part in parts for n in part}}

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """One collective over all gradients. Not DDP: its averaging and its count of backward passes per step are what
        global weights and token-budget micro-batches, of which ranks may have different numbers, do not want."""
        if self.size > 1:
            flat = torch.cat([p.grad.flatten() for p in parameters])
            dist.all_reduce(flat)
            for p, grad in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
                p.grad.copy_(grad.view_as(p))

    def broadcast(self, parameters: Iterable[nn.Parameter]) -> None:
        """Give all ranks the values of rank 0."""
        for p in parameters:
            if self.size > 1:
                dist.broadcast(p.data, src=0)

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()


# ---------------------------------------------------------------------------------------------------------------------
# Policy


@dataclass
class Policy:
    """A causal LM with its tokenizer, its prompts and the token limits of one sketch and one solution."""

    model: nn.Module
    tokenizer: object
    prompts: sesa.Prompts
    limits: dict[str, int]

    @property
    def stop_ids(self) -> list[int]:
        """What ends a turn: the generation config's ids, the one of the chat template first."""
        ids = self.model.generation_config.eos_token_id
        ids = [ids] if isinstance(ids, int) else list(ids or [])
        first = self.tokenizer.eos_token_id
        return [first] * (first is not None) + [i for i in ids if i != first]

    def chat(self) -> sesa.Chat:
        return sesa.Chat(self.tokenizer, self.stop_ids)

    def save(self, folder: Path) -> None:
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        extra = dict(prompts=dataclasses.asdict(self.prompts), limits=self.limits)
        (folder / "sesa.json").write_text(json.dumps(extra, ensure_ascii=False, indent=1))


def load_policy(name: str, task: tasks.Task, prompts: str | None = None) -> Policy:
    """A policy from a hub id, a folder (of ours: with its prompts and limits) or a .gguf file, in fp32."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path, options = Path(name), dict(dtype=torch.float32)
    remedy = "give tiny, a hub id, a folder or a .gguf file"
    if not path.exists() and (name.startswith((".", "/", "~")) or name.endswith(".gguf")):
        raise UserError(f"--model {name}: there is no such file or folder; {remedy}")
    if path.suffix == ".gguf":
        from transformers import GgufConfig

        name = str(path.parent)
        options |= dict(gguf_file=path.name, quantization_config=GgufConfig(dequantize=True))
    files = {k: v for k, v in options.items() if k == "gguf_file"}
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **files)
        model = AutoModelForCausalLM.from_pretrained(name, **options)
    except Exception as error:  # a missing, damaged or foreign file raises whatever its bytes lead to
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"--model {name}: cannot be loaded ({reason}); {remedy}") from None
    ours = json.loads((path / "sesa.json").read_text()) if (path / "sesa.json").exists() else {}
    limits = dict(sketch=task.sketch_tokens, solution=task.solution_tokens)
    texts = sesa.Prompts(**ours["prompts"]) if ours else sesa.default_prompts(False, task.two_stage)
    policy = Policy(model, tokenizer, load_prompts(prompts, texts), ours.get("limits", limits))
    if getattr(model.get_output_embeddings(), "bias", None) is not None:
        raise UserError(f"--model {name}: its output head has a bias, which the fused loss does not compute")
    if not policy.stop_ids:
        raise UserError(f"--model {name}: its tokenizer names no end-of-sequence token; set one in its config")
    return policy


def load_prompts(path: str | None, default: sesa.Prompts) -> sesa.Prompts:
    if path is None:
        return default
    try:
        return default.replaced(json.loads(Path(path).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"--prompts {path}: {error}; must be a JSON object of texts") from None


def tiny_policy(config: Config, task: tasks.Task) -> Policy:
    """A Llama of under a million parameters with one token per word of the task, not yet trained."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    if not task.words:
        raise UserError(f"--model tiny: {config.task} has no closed vocabulary; give a pretrained model")
    words = ["<pad>", "<eos>", "<unk>", *sesa.TINY_WORDS, *task.words]
    words = {word: i for i, word in enumerate(dict.fromkeys(words))}
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = dict(pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, clean_up_tokenization_spaces=False, **special)
    shape = dict(hidden_size=config.tiny_width, intermediate_size=3 * config.tiny_width)
    shape |= dict(num_hidden_layers=config.tiny_layers, num_attention_heads=max(1, config.tiny_width // 32))
    shape |= dict(vocab_size=len(words), max_position_embeddings=2048, tie_word_embeddings=True)
    ends = dict(bos_token_id=None, eos_token_id=words["<eos>"], pad_token_id=words["<pad>"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # one base, whatever the seed of training
        model = LlamaForCausalLM(LlamaConfig(**shape, **ends))
    prompts = load_prompts(config.prompts, sesa.default_prompts(True, task.two_stage))
    return Policy(model, tokenizer, prompts, dict(task.tiny_tokens))


def warm_start(config: Config, task: tasks.Task, ranks: Ranks) -> Policy:
    """The tiny policy after maximum likelihood on demonstrations; made once, cached by all that it depends on.

    Rank 0 trains it or finds it, and the others get its weights.
    """
    policy = tiny_policy(config, task)
    if config.warm_start_steps == 0:
        return policy
    recipe = [config.warm_start_steps, config.warm_start_batch, config.warm_start_lr]
    recipe += [policy.model.config.to_json_string(use_diff=False), policy.tokenizer.get_vocab(), vars(policy.prompts)]
    recipe += [str(t.ids) for t in list(demonstration_rows(policy, task, 64, seed=0))]
    key = hashlib.blake2b(json.dumps(recipe, sort_keys=True, default=str).encode(), digest_size=8).hexdigest()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sesa" / f"{task.name}-{key}"
    if ranks.rank == 0:
        if not cache.exists():
            demonstrate(config, policy, task, ranks.device)
            if not cache.exists():  # another run may have been faster
                write_folder(cache, policy.save)
        policy.model = load_policy(str(cache), task).model
    ranks.broadcast(policy.model.to(ranks.device).parameters())
    return policy


def starting_policy(name: str, config: Config, task: tasks.Task, ranks: Ranks) -> Policy:
    return warm_start(config, task, ranks) if name == "tiny" else load_policy(name, task, config.prompts)


def demonstration_rows(policy: Policy, task: tasks.Task, count: int, seed: int) -> Iterator[rl.TrainingSequence]:
    """The conversations of `count` demonstrations, as rows to be learnt by heart."""
    explorer = sesa.Explorer(None, task, policy.chat(), policy.prompts)
    demonstrations = task.demonstrations(random.Random(seed))
    for _ in range(count):
        for trajectory in explorer.demonstration(next(demonstrations)):
            trajectory.advantages = [1.0]
            yield sesa.as_sampled(trajectory)


def demonstrate(config: Config, policy: Policy, task: tasks.Task, device: torch.device) -> None:
    model = policy.model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.95), weight_decay=0.01)
    steps, batch = config.warm_start_steps, config.warm_start_batch
    rows = demonstration_rows(policy, task, steps * batch, seed=1)
    progress = tqdm(range(steps), desc="warm start", disable=None)
    for step in progress:
        taken = list(islice(rows, batch))  # a demonstration is one row or more
        for group in optimizer.param_groups:
            group["lr"] = rl.learning_rate(step, steps, min(50, steps), config.warm_start_lr, "cosine")
        total = sum(len(row.targets) for row in taken)
        loss = 0.0
        for micro in rl.micro_batches(taken, config.micro_batch_tokens):
            hidden, targets = hidden_states(model, micro, device)
            part, _ = kernels.linear_policy_loss(
                hidden, head(model, hidden), targets, lambda stats, total=total: -stats.logp.sum() / total
            )
            part.backward()
            loss += part.item()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        progress.set_postfix(loss=f"{loss:.3f}")


# ---------------------------------------------------------------------------------------------------------------------
# Update


def hidden_states(model: nn.Module, rows: Sequence[rl.TrainingSequence], device) -> tuple[Tensor, Tensor]:
    """(hidden [N, H], targets [N]) of the rows' target tokens, row after row.

    Rows are padded on the right, where causal attention never looks from the left: no mask is needed, and no pad id
    can be mistaken for a token. Token t is predicted from the hidden state at t - 1.
    """
    longest = max(len(row.ids) for row in rows)
    ids = torch.tensor([row.ids + [0] * (longest - len(row.ids)) for row in rows], device=device)  # [B, T]
    owner = torch.tensor([b for b, row in enumerate(rows) for _ in row.targets], device=device)  # [N]
    place = torch.tensor([t for row in rows for t in row.targets], device=device)  # [N]
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state  # [B, T, H]
    hidden = hidden[owner, place - 1]  # [N, H]   fp32 even under autocast, which would make the head's product slow
    return hidden.bfloat16() if device.type == "cuda" else hidden, ids[owner, place]


def head(model: nn.Module, hidden: Tensor) -> Tensor:
    return model.get_output_embeddings().weight.to(hidden.dtype)  # [V, H]


@torch.no_grad()
def old_log_probs(model, rows: Sequence, config: Config, device) -> None:
    """Set row.old_logps: of the policy before the updates of this rollout, in the context of the loss."""
    for micro in rl.micro_batches(rows, config.micro_batch_tokens):
        hidden, targets = hidden_states(model, micro, device)
        stats = kernels.linear_token_stats(hidden, head(model, hidden), targets, **distribution(model, config))
        for row, logps in zip(micro, stats.logp.split([len(row.targets) for row in micro]), strict=True):
            row.old_logps = logps


def distribution(model: nn.Module, config: Config) -> dict:
    """What turns logits into the distribution that is sampled and trained."""
    return dict(temperature=config.temperature, softcap=getattr(model.config, "final_logit_softcapping", None) or 0.0)


def update(
    policy: nn.Module, reference: nn.Module | None, rows: list[tuple[int, rl.TrainingSequence]], config: Config,
    optimizer: torch.optim.Optimizer, kl_coef: float, max_tokens: int, ranks: Ranks,
) -> dict[str, float]:  # fmt: skip
    """One rollout's updates. rows: (place of its problem in the step, row), this rank's. Returns metrics.

    Minibatch b holds the problems whose place is b modulo `minibatches`. The denominators are counted over all ranks
    once per minibatch; micro-batches only add up.
    """
    policy.train()
    is_options = dict(cap=config.is_cap, level=config.is_level) if config.sketch_context == "is" else None
    if config.minibatches > 1 or is_options:
        old_log_probs(policy, [row for _, row in rows], config, ranks.device)
    parameters = [p for p in policy.parameters() if p.requires_grad]
    clips = dict(clip_low=config.clip_low, clip_high=config.clip_high)
    options = clips | dict(kl_coef=kl_coef, kl_type=config.kl_type, entropy_coef=config.entropy_coef)
    sums, norms = Counter(), []
    for b in range(config.minibatches):
        mine = [row for place, row in rows if place % config.minibatches == b]
        rl.set_token_weights(mine, config.loss_type, max_tokens, ranks.sum)
        for p in parameters:
            p.grad = torch.zeros_like(p)
        for micro in rl.micro_batches(mine, config.micro_batch_tokens):
            inputs, sampled = rl.loss_inputs(micro, ranks.device, is_options)
            hidden, targets = hidden_states(policy, micro, ranks.device)  # [N, H], [N]
            with torch.no_grad():
                ref = None if reference is None else hidden_states(reference, micro, ranks.device)[0]  # [N, H]
            # The loss is computed in chunks of tokens: what is None is bound here, what is [N] is cut like the tokens.
            fixed, extras = ([None], inputs[1:]) if inputs[0] is None else ([], inputs)
            ref_weight = None if reference is None else head(reference, ref)
            loss, stats = kernels.linear_policy_loss(
                hidden, head(policy, hidden), targets,
                lambda stats, *extras, fixed=fixed: rl.policy_loss(stats, *fixed, *extras, **options),
                extras, ref, ref_weight, **distribution(policy, config),
            )  # fmt: skip
            loss.backward()
            metrics = rl.update_metrics(stats, *inputs, **clips)
            shift = (stats.logp if inputs[0] is None else inputs[0]) - sampled  # [N]
            metrics |= {"sampling/logp_difference": shift.abs().sum(), "sampling/logp_shift": shift.sum()}
            sums.update({name: float(value) for name, value in metrics.items()} | dict(loss=loss.item()))
        ranks.sum_gradients(parameters)
        norms.append(float(nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)))
        optimizer.step()
    sums = ranks.sum(dict(sums))
    loss = sums.pop("loss") / config.minibatches
    return dict(loss=loss, grad_norm=sum(norms) / len(norms)) | rl.mean_metrics(sums)


# ---------------------------------------------------------------------------------------------------------------------
# The run folder


def write_folder(path: Path, write: Callable[[Path], None]) -> None:
    """Make a folder whole or not at all: written under another name, flushed to the disk, then renamed."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    write(temporary)
    for file in (*temporary.rglob("*"), temporary):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    shutil.rmtree(path, ignore_errors=True)
    os.replace(temporary, path)


class RunFolder:
    """What a run leaves behind. Only rank 0 writes."""

    def __init__(self, config: Config, ranks: Ranks):
        self.path, self.config, self.ranks = Path(config.output_dir), config, ranks

    def open(self) -> dict | None:
        """None for a new run; to resume, the state of the last checkpoint. UserError if that cannot be."""
        if not self.config.resume:
            if self.path.is_file() or self.path.exists() and any(self.path.iterdir()):
                raise UserError(f"--output_dir {self.path} exists and is not empty: use --resume, or another folder")
            return None
        steps = self.checkpoints()
        if not steps:
            raise UserError(f"--resume: {self.path} holds no checkpoint; start without --resume, in an empty folder")
        folder = self.path / "checkpoints" / f"step_{steps[-1]}"
        try:
            state = torch.load(folder / "training_state.pt", weights_only=True, map_location="cpu")
            state["weights"], saved = load_file(folder / "model.safetensors"), state.pop("config")
        except Exception as error:  # a damaged file raises whatever the bytes lead to
            reason = str(error).strip().splitlines()[0] if str(error) else type(error).__name__
            raise UserError(f"{folder} is damaged ({reason}): remove it to resume from the one before it") from None
        now = json.loads(json.dumps(dataclasses.asdict(self.config)))
        free = "resume output_dir steps checkpoint_every keep_checkpoints max_rows cache_gb graphs device".split()
        differ = [name for name in now if name not in free and now[name] != saved.get(name)]
        if differ:
            what = ", ".join(f"{name} {saved.get(name)!r} -> {now[name]!r}" for name in differ)
            raise UserError(f"{folder} is from another config ({what}): use the same flags, or another --output_dir")
        if self.ranks.rank == 0:
            for name in ("metrics.jsonl", "samples.jsonl"):
                self.cut(name, state["step"])
        return state

    def create(self) -> None:
        self.ranks.barrier()  # all have seen that it was not there
        if self.ranks.rank == 0:
            try:
                self.path.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(f"--output_dir {self.path}: cannot be made ({error.strerror}); give another") from None
            (self.path / "config.json").write_text(json.dumps(dataclasses.asdict(self.config), indent=1))

    def cut(self, name: str, step: int) -> None:
        """Drop the rows after `step`, and a last row that was cut off by a crash."""
        file = self.path / name
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True) if file.exists() else []
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
        file.write_text("".join(kept), encoding="utf-8")

    def rows(self, name: str) -> list[dict]:
        file = self.path / name
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []

    def append(self, name: str, *rows: dict) -> None:
        if self.ranks.rank == 0:
            with open(self.path / name, "a", encoding="utf-8") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)

    def checkpoints(self) -> list[int]:
        names = [p.name.removeprefix("step_") for p in (self.path / "checkpoints").glob("step_*")]
        return sorted(int(name) for name in names if name.isdigit())

    def save(self, policy: Policy, optimizer: torch.optim.Optimizer, state: dict) -> None:
        """Write checkpoints/step_N, and remove all but the last few and the best."""
        if self.ranks.rank == 0:

            def write(folder: Path) -> None:
                policy.save(folder)
                torch.save(state | dict(optimizer=optimizer.state_dict()), folder / "training_state.pt")

            state = state | dict(config=json.loads(json.dumps(dataclasses.asdict(self.config))))
            write_folder(self.path / "checkpoints" / f"step_{state['step']}", write)
            for step in self.checkpoints()[: -self.config.keep_checkpoints]:
                if step != state["best_step"]:
                    shutil.rmtree(self.path / "checkpoints" / f"step_{step}")
        self.ranks.barrier()


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation


class Run:
    """What a training run holds: policy, reference, sampler and where it is."""

    def __init__(self, config: Config, task: tasks.Task, policy: Policy, ranks: Ranks):
        self.config, self.task, self.policy, self.ranks = config, task, policy, ranks
        policy.model.to(ranks.device)
        if config.gradient_checkpointing:
            older_name = policy.model.gradient_checkpointing_enable
            getattr(policy.model, "activation_checkpointing_enable", older_name)(dict(use_reentrant=False))
        self.reference = None if config.eval_only else self.make_reference()
        self.chat = policy.chat()
        # On a GPU the weights are fp32 and rollouts run on a bf16 copy of them; on a CPU on the weights themselves.
        self.actor = policy.model if ranks.device.type == "cpu" else copy.deepcopy(policy.model).bfloat16()
        limits = dict(max_rows=config.max_rows, memory_gb=config.cache_gb, graphs=config.graphs)
        self.sampler = Sampler(self.actor, policy.stop_ids, decode=self.chat.decode, **limits)
        self.explorer = sesa.Explorer(self.sampler, task, self.chat, policy.prompts)
        given = dict(sketch=config.max_sketch_tokens, solution=config.max_new_tokens)
        self.limits = {kind: limit or policy.limits[kind] for kind, limit in given.items()}

    def refresh_actor(self) -> None:
        if self.actor is not self.policy.model:
            with torch.no_grad():
                for ours, theirs in zip(self.actor.parameters(), self.policy.model.parameters(), strict=True):
                    ours.copy_(theirs)

    def plan(self, temperature: float, top_p: float = 1.0, **changes) -> sesa.Plan:
        sketch, solution = (
            SamplingParams(temperature, top_p, max_new_tokens=self.limits[kind]) for kind in ("sketch", "solution")
        )
        names = ("method", "num_sketches", "num_solutions", "group_size", "sketches")
        fields = {name: getattr(self.config, name) for name in names} | changes
        return sesa.Plan(**fields, sketch_params=sketch, solution_params=solution)

    def max_tokens(self) -> int:
        """The most that the policy can write in one row of the loss."""
        if self.task.two_stage:
            return self.limits["solution"] * self.task.max_turns
        chained = self.config.method == "sesa" and self.config.sketch_context in ("keep", "distill")
        return self.limits["sketch"] * (self.config.num_sketches if chained else 1)

    def evaluate(self) -> dict:
        """{"iid": metrics, "sequential": metrics} on validation problems, the same ones at every evaluation."""
        config, task, n = self.config, self.task, self.config.eval_samples
        problems = task.problems("validation", 0)
        problems = [problems[i] for i in range(min(config.eval_problems, len(problems)))]
        sampling = dict(temperature=config.eval_temperature, top_p=config.top_p)
        plans = dict(
            iid=self.plan(method="grpo", group_size=n if task.two_stage else min(n, 50), **sampling),
            sequential=self.plan(method="sesa", sketches="sequential", **sampling),
        )
        found = {}
        for kind, plan in plans.items():
            size = plan.group_size if kind == "iid" else plan.num_sketches * plan.num_solutions
            rounds = 1 if task.two_stage else math.ceil(n / size)
            mine = self.ranks.share([p for p in problems for _ in range(rounds)])
            groups = self.explorer.rollout(mine, plan, (config.seed, "evaluation", kind))
            outcomes = self.ranks.gather([g.outcomes() for g in groups])
            if not task.two_stage:  # the rounds of a problem are one list of guesses
                rounds = [outcomes[i : i + rounds] for i in range(0, len(outcomes), rounds)]
                outcomes = [[o for group in each for o in group][:n] for each in rounds]
            found[kind] = sesa.evaluation_metrics(outcomes, config.eval_k, task.targets)
        found["sequential"]["transfer_gap"] = found["sequential"]["reward"] - found["iid"]["reward"]
        return found

    # -----------------------------------------------------------------------------------------------------------------
    # Training

    def train(self, folder: RunFolder, state: dict) -> dict:
        """Train from where `state` is; returns the summary."""
        config, began = self.config, time.perf_counter()
        optimizer = torch.optim.AdamW(
            self.policy.model.parameters(), lr=0.0, betas=(0.9, 0.999), weight_decay=config.weight_decay
        )
        if "weights" in state:
            self.load_weights(state, optimizer)
        earlier = state["seconds"]
        problems = self.task.problems("train", config.seed)
        quiet = None if self.ranks.rank == 0 else True  # None: where there is no terminal
        progress = tqdm(range(state["step"], config.steps), config.method, disable=quiet)
        with StopSignal(self.ranks) as stop:
            for step in progress:
                groups, row = self.step(step, problems, optimizer)
                state["step"] = step + 1
                state["generated_tokens"] += row["generated_tokens"]
                found = self.ranks.gather([str(o.key) for g in groups for o in g.outcomes() if o.success])
                state["found"] = sorted(set(state["found"]) | set(found)) if self.task.targets else []
                row |= dict(unique_found=len(state["found"]))
                last = step + 1 == config.steps or stop.asked()
                if last or config.eval_every and (step + 1) % config.eval_every == 0:
                    row["eval"] = state["last"] = self.evaluate()
                    score = sesa.headline(state["last"])
                    if score > state["best"]:
                        state |= dict(best=score, best_step=step + 1)
                state["seconds"] = earlier + time.perf_counter() - began
                folder.append("metrics.jsonl", row)
                if step % config.sample_every == 0 or last:
                    folder.append("samples.jsonl", *(sesa.sample_record(step + 1, g) for g in groups[:2]))
                if last or config.checkpoint_every and (step + 1) % config.checkpoint_every == 0:
                    folder.save(self.policy, optimizer, state)
                progress.set_postfix(
                    reward=f"{row['reward']:.3f}", entropy=f"{row['entropy']:.2f}", found=row["unique_found"] or None
                )
                if last:
                    break
        return self.summary(state)

    def make_reference(self) -> nn.Module | None:
        """A frozen copy of the policy that training starts from, or of --reference; None without a KL term."""
        config = self.config
        if config.kl_coef == config.kl_coef_end == 0:
            return None
        if config.reference is None:
            reference = copy.deepcopy(self.policy.model)
        else:
            reference = starting_policy(config.reference, config, self.task, self.ranks).model.to(self.ranks.device)
        if reference.config.vocab_size != self.policy.model.config.vocab_size:
            raise UserError(f"--reference {config.reference}: its vocabulary is not that of the policy")
        return reference.eval().requires_grad_(False)

    def load_weights(self, state: dict, optimizer: torch.optim.Optimizer) -> None:
        model = self.policy.model
        missing, unexpected = model.load_state_dict(state.pop("weights"), strict=False)
        if unexpected or set(missing) - set(model.all_tied_weights_keys or ()):
            raise UserError(f"the checkpoint does not fit --model {self.config.model}: {[*missing, *unexpected][0]}")
        model.tie_weights()
        optimizer.load_state_dict(state.pop("optimizer"))
        self.refresh_actor()

    def step(self, step: int, problems, optimizer) -> tuple[list[sesa.Group], dict]:
        """One rollout and its updates. Returns this rank's groups and the step's row of metrics."""
        config, began, stats = self.config, time.perf_counter(), copy.copy(self.sampler.stats)
        first = step * config.problems_per_step
        mine = self.ranks.share([problems[first + i] for i in range(config.problems_per_step)])
        groups = self.explorer.rollout(mine, self.plan(config.temperature), (config.seed, step))
        rollout_seconds = time.perf_counter() - began

        outcomes = self.ranks.gather([g.outcomes() for g in groups])
        rule = {name: getattr(config, name) for name in ("baseline", "repeats", "rarity", "pass_k")}
        rule |= dict(chains=chain_credit(config, self.task), scale=config.advantage_scale)
        rewards, advantages = sesa.credit(outcomes, **rule)
        for (place, _), group in zip(mine, groups, strict=True):
            sesa.assign(group, rewards[place], advantages[place])

        decay = min(1.0, step / (0.7 * config.steps))
        kl_coef = config.kl_coef + (config.kl_coef_end - config.kl_coef) * decay
        rate = rl.learning_rate(step, config.steps, config.warmup_steps, config.learning_rate, config.lr_schedule)
        for group in optimizer.param_groups:
            group["lr"] = rate
        placed = zip([place for place, _ in mine], groups, strict=True)
        rows = [(place, row) for place, group in placed for row in sesa.sequences(group, config.sketch_context)]
        max_tokens = self.max_tokens()
        metrics = update(self.policy.model, self.reference, rows, config, optimizer, kl_coef, max_tokens, self.ranks)
        self.refresh_actor()

        counts = dict(
            generated_tokens=self.sampler.stats.generated_tokens - stats.generated_tokens,
            prefill_tokens=self.sampler.stats.prefill_tokens - stats.prefill_tokens,
            sketch_tokens=sum(g.sketch_tokens for g in groups),
        )
        sums = self.ranks.sum(sesa.group_metrics(groups))
        row = dict(step=step + 1) | sesa.mean_group_metrics(sums) | dict(kl=None) | metrics
        row |= {name: int(total) for name, total in self.ranks.sum(counts).items()}
        return groups, row | dict(
            learning_rate=rate, kl_coef=kl_coef, rollout_time=rollout_seconds, step_time=time.perf_counter() - began
        )

    def summary(self, state: dict) -> dict:
        kib = 1 if sys.platform == "linux" else 1024  # ru_maxrss is in KiB on Linux, in bytes on macOS
        return {name: getattr(self.config, name) for name in ("task", "method", "seed")} | dict(
            steps=state["step"],
            seconds=round(state["seconds"], 1),
            peak_rss_mb=round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / kib / 1024),
            generated_tokens=state["generated_tokens"],
            unique_found=len(state["found"]),
            **sesa.measures(state["last"]),
            floor=self.task.floor(),
            ceiling=self.task.ceiling(),
            base=sesa.measures(state["base"]),
            evaluation=state["last"],
            base_evaluation=state["base"],
            versions={name: version(name) for name in ("torch", "transformers")} | dict(python=python_version()),
        )


class StopSignal:
    """Asks for a clean stop on Ctrl-C or SIGTERM; all ranks hear it when one does. A second Ctrl-C stops at once."""

    def __init__(self, ranks: Ranks):
        self.ranks, self.heard = ranks, False

    def __enter__(self):
        self.before = {s: signal.signal(s, self.hear) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def hear(self, number, frame):
        if self.heard:
            raise KeyboardInterrupt
        self.heard = True

    def asked(self) -> bool:
        return any(self.ranks.gather([self.heard]))


# ---------------------------------------------------------------------------------------------------------------------
# Figures


def draw(folder: RunFolder, task: tasks.Task, base: dict) -> None:
    """figures/training.png: what a healthy and a sick run differ in, over the steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = folder.rows("metrics.jsonl")
    evals = [dict(step=0, eval=base)] + [r for r in rows if "eval" in r]
    shares, counts = ["reward", "success", "valid", "duplicate_rate"], ["unique_success", "unique_valid"]
    panels = [shares, counts, ["entropy"], ["kl"], ["grad_norm"]]
    figure, axes = plt.subplots(2, 3, figsize=(12, 6), constrained_layout=True)
    for axis, names in zip(axes.flat[1:], panels, strict=True):
        for name in names:
            points = [(r["step"], r[name]) for r in rows if r.get(name) is not None]
            if points:
                axis.plot(*zip(*points, strict=True), label=name, linewidth=1)
        axis.set_xlabel("step")
        if axis.lines:
            axis.legend(frameon=False)
    for kind in ("iid", "sequential"):
        if task.targets:
            known = base[kind]["coverage"]
            k = "320" if "320" in known else list(known)[-1]
            points = [(r["step"], r["eval"][kind]["coverage"][k] * len(task.targets)) for r in evals]
            axes.flat[0].set_title(f"targets found in {k} guesses, of {len(task.targets)}")
        else:
            points = [(r["step"], r["eval"][kind]["avg@n"]) for r in evals]
            axes.flat[0].set_title("validation success")
        axes.flat[0].plot(*zip(*points, strict=True), marker="o", markersize=3, label=kind)
    for value, style in ((task.floor(), ":"), (task.ceiling(), "--")):
        if value is not None and not task.targets:
            axes.flat[0].axhline(value, color="gray", linestyle=style)
    axes.flat[0].set_ylim(bottom=0)
    axes.flat[0].legend(frameon=False)
    (folder.path / "figures").mkdir(exist_ok=True)
    figure.savefig(folder.path / "figures" / "training.png", dpi=120)
    plt.close(figure)


# ---------------------------------------------------------------------------------------------------------------------
# Entry


def describe(config: Config, task: tasks.Task) -> None:
    """--dry_run: every value, and the sizes that follow from them."""
    limits = dict(sketch=task.sketch_tokens, solution=task.solution_tokens)
    limits = task.tiny_tokens if config.model == "tiny" else limits
    sketch = config.max_sketch_tokens or limits["sketch"]
    solution = (config.max_new_tokens or limits["solution"]) * task.max_turns if task.two_stage else sketch
    grpo = config.method == "grpo"
    answers = config.group_size if grpo else config.num_sketches * config.num_solutions
    tokens = answers * solution + (0 if grpo or not task.two_stage else config.num_sketches * sketch)
    sizes = dict(ranks=int(os.environ.get("WORLD_SIZE", 1)), answers_per_step=config.problems_per_step * answers)
    sizes |= dict(most_tokens_per_step=config.problems_per_step * tokens, updates=config.steps * config.minibatches)
    for name, value in (dataclasses.asdict(config) | sizes | dict(floor=task.floor(), ceiling=task.ceiling())).items():
        print(f"  {name:24}{value}")


def show(config: Config, task: tasks.Task) -> None:
    """--show N: what the task looks like to a policy, and how it scores."""
    tasks.show(task, config.show)
    problem = task.problems("train", config.seed)[0]
    prompts = load_prompts(config.prompts, sesa.default_prompts(config.model == "tiny", task.two_stage))
    explorer = sesa.Explorer(None, task, None, prompts)
    for name in ("direct", "sketch", "next", "solve") if task.two_stage else ("sketch", "next"):
        text = explorer.text(getattr(prompts, name), problem=problem.text, sketch="<the sketch>")
        print(f"--- prompt '{name}'\n{text}\n")


def report(summary: dict, config: Config) -> None:
    """The last lines of a run: before and after."""
    print(f"\n{config.task}, {config.method}, {summary['steps']} steps in {summary['seconds']:.0f} s:")
    known = dict(floor=summary["floor"], ceiling=summary["ceiling"])  # of a random policy, of a solver
    bounds = ", ".join(f"{name} {value:.3f}" for name, value in known.items() if value is not None)
    for name in ("success", "valid"):
        beside = f"  ({bounds})" if name == "success" and bounds else ""
        print(f"  {name + ', i.i.d.':24} {summary['base'][name]:.3f} -> {summary[name]:.3f}{beside}")
    for kind in summary["coverage"] or summary["pass_at_k"]:
        part = "coverage" if summary["coverage"] else "pass_at_k"
        for k, after in summary[part][kind].items():
            print(f"  {part + '@' + k + ', ' + kind:24} {summary['base'][part][kind][k]:.3f} -> {after:.3f}")
    print(f"  everything is in {config.output_dir}/")


def main(config: Config) -> None:
    disable_progress_bar()  # those of transformers, for every load and save
    with user_errors():
        ranks = Ranks.start(config.device)
        task = tasks.make_task(config.task, **parse_options(config.task_options))
        config = resolve(config, task)
        if config.dry_run or config.show:
            return (describe if config.dry_run else show)(config, task) if ranks.rank == 0 else None
        torch.manual_seed(config.seed)
        folder = RunFolder(config, ranks)
        state = folder.open()
        run = Run(config, task, starting_policy(config.model, config, task, ranks), ranks)
        run.explorer.check_problems(task.problems("train", config.seed), run.plan(config.temperature))
        if state is None:  # nothing is written before all that can be wrong with the input has been seen
            began, base = time.perf_counter(), run.evaluate()
            state = dict(step=0, generated_tokens=0, found=[], best_step=0, best=-1.0, base=base, last=base)
            state["seconds"] = time.perf_counter() - began
            folder.create()
    summary = run.summary(state) if config.eval_only else run.train(folder, state)
    if ranks.rank == 0:
        (folder.path / "summary.json").write_text(json.dumps(summary, ensure_ascii=False, indent=1))
        draw(folder, task, summary["base_evaluation"])
        report(summary, config)


if __name__ == "__main__":
    try:
        main(tyro.cli(Config, description=__doc__.split("\n")[0], use_underscores=True))
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
