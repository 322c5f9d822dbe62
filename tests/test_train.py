"""The program from its command line: every run here goes through train.main, most of them on tasks of a few words.

What must not matter (ranks, micro-batches, a crash) is compared run against run; what must hold (the gradient) against
the textbook's loss, written once more below without batches, padding, chunks or caches.
"""

import copy
import doctest
import itertools
import json
import math
import os
import random
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import fmean

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, OPTConfig

import rl
import sesa
import tasks
import train
from sampler import Completion
from train import Config, main

ROOT = Path(__file__).parent.parent
TIMES = {"step_time", "rollout_time"}

# Random policies of a few words: in `Letters` the sketches are the answers, in `Talk` episodes have two turns.
TOY_TASKS = '''
from tasks import Demonstration, Outcome, Problem, Task


class Letters(Task):
    name, two_stage, targets, words = "letters", False, frozenset("abc"), ["go", *"abcdefgh"]
    tiny_tokens = dict(sketch=3, solution=3)

    def num_problems(self, split):
        return 1

    def make(self, split, seed, i):
        return Problem(i, "go", None)

    def score(self, data, text):
        key = text.split()[0] if text.split() else None
        return Outcome(float(key in self.targets), key in self.targets, key, key is not None)

    def demonstrate(self, problem, rng):
        return Demonstration(problem, rng.sample("abcdefgh", 4), [])

    def ceiling(self):
        return None


class Talk(Task):
    name, max_turns, words = "talk", 2, ["more", *"abcdefgh"]
    tiny_tokens = dict(sketch=3, solution=4)

    def draw(self, rng, keep):
        text = " ".join(rng.choice("abcdefgh") for _ in range(3))
        return (text, text) if keep(text) else None

    def episode(self, problem):
        return Dialogue(problem)

    def demonstrate(self, problem, rng):
        return Demonstration(problem, ["a b"], ["a a", "a a"])

    def ceiling(self):
        return None


class Dialogue:
    def __init__(self, problem):
        self.problem, self.texts = problem, []

    def observe(self):
        return "more " + self.texts[-1]

    def act(self, text):
        self.texts.append(text)
        return len(self.texts) == 2

    def outcome(self):
        words = " ".join(self.texts).split()
        vowels = sum(word in "ae" for word in words)
        return Outcome(0.1 * len(words) + vowels, vowels > 0, " ".join(sorted(words)), True)
'''


@pytest.fixture(scope="module", autouse=True)
def no_figures_and_no_network(one_thread_and_a_cache_of_its_own):
    patch = one_thread_and_a_cache_of_its_own
    patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # the variable is read at the import
    patch.setattr(train, "draw", lambda *args: None)  # two thirds of the time of these runs; `command` does draw


@pytest.fixture(scope="module")
def toys(tmp_path_factory) -> dict[str, dict]:
    """Options of a short run for each of the toy tasks."""
    file = tmp_path_factory.mktemp("tasks") / "toys.py"
    file.write_text(TOY_TASKS)
    both = dict(
        steps=4, problems_per_step=4, learning_rate=1e-2, warmup_steps=1, eval_every=2, checkpoint_every=2,
        sample_every=1, eval_problems=3, eval_samples=20, eval_k=(1, 4, 20), tiny_width=32, tiny_layers=1,
        warm_start_steps=0,
    )  # fmt: skip
    return dict(
        letters=both | dict(task=f"{file}:Letters", num_sketches=4),
        talk=both | dict(task=f"{file}:Talk", num_sketches=2, num_solutions=2, kl_coef=0.05),
    )


def run(folder: Path, **options) -> Path:
    main(Config(output_dir=str(folder), **options))
    return folder


def flags(options: dict) -> list[str]:
    """The same options as they are typed."""
    words = []
    for name, value in options.items():
        values = [] if value is True else value if isinstance(value, tuple) else [value]
        words += [f"--{name}", *map(str, values)]
    return words


def rows(folder: Path, name: str = "metrics.jsonl") -> list[dict]:
    return [json.loads(line) for line in (folder / name).read_text(encoding="utf-8").splitlines()]


def untimed(row: dict) -> dict:
    return {name: value for name, value in row.items() if name not in TIMES}


def weights(folder: Path) -> bytes:
    """Those of the last checkpoint."""
    last = max((folder / "checkpoints").glob("step_*"), key=lambda path: int(path.name.removeprefix("step_")))
    return (last / "model.safetensors").read_bytes()


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def assert_same_metrics(ours: list[dict], theirs: list[dict], tolerance: float = 1e-5) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.keys() == other.keys()
        for name in mine.keys() - TIMES - {"eval"}:
            assert mine[name] == pytest.approx(other[name], rel=tolerance, abs=tolerance), (mine["step"], name)
        assert mine.get("eval") == other.get("eval")


def test_defaults_follow_what_is_given():
    task = tasks.make_task("synthetic")
    assert train.resolve(Config(), task).kl_coef_end == 0.02 < train.resolve(Config(), task).kl_coef
    assert train.resolve(Config(kl_coef=0.0), task).kl_coef_end == 0.0
    assert train.resolve(Config(eval_k=(20, 100), eval_samples=100), task).eval_k == (20, 100)
    chains, grpo = train.resolve(Config(), task), train.resolve(Config(method="grpo"), task)
    assert (chains.sketch_context, chains.distill_coef, chains.repeats, chains.rarity) == ("distill", 0.3, "zero", 0.5)
    assert (grpo.repeats, grpo.rarity, grpo.advantage_scale) == ("full", 0.0, "std")
    countdown = tasks.make_task("countdown")
    mixed, grpo, sketched = (
        train.resolve(Config(task="countdown", **changes), countdown)
        for changes in ({}, dict(method="grpo"), dict(num_sketches=16))
    )
    assert (mixed.sketch_context, mixed.distill_coef) == ("distill", 0.1)
    assert (mixed.num_direct, mixed.num_sketches, sketched.num_direct, sketched.num_sketches) == (8, 8, 0, 16)
    assert mixed.group_size == grpo.group_size == sketched.group_size == 16


@pytest.fixture
def rollouts(monkeypatch) -> list[tuple]:
    """(plan, groups) of every rollout."""
    seen, rollout = [], sesa.Explorer.rollout
    monkeypatch.setattr(
        sesa.Explorer, "rollout",
        lambda self, placed, plan, seed: seen.append((plan, rollout(self, placed, plan, seed))) or seen[-1][1],
    )  # fmt: skip
    return seen


def test_an_evaluation_has_a_temperature_of_its_own_and_the_nucleus(toys, tmp_path, rollouts):
    given = dict(eval_temperature=0.7, temperature=1.3)
    run(tmp_path / "run", **toys["letters"] | given | dict(steps=1, eval_first=False))
    drawn = [(plan.method, plan.sketch_params.temperature, plan.solution_params.temperature) for plan, _ in rollouts]
    assert drawn == [("sesa", 1.3, 1.3), ("grpo", 0.7, 0.7), ("sesa", 0.7, 0.7)]
    rollouts.clear()
    run(tmp_path / "only", **toys["talk"] | given | dict(eval_only=True, top_p=0.5, eval_k=(1,)))
    assert [(p.sketch_params.top_p, p.solution_params.top_p) for p, _ in rollouts] == [(0.5, 0.5)] * 2


def test_windows_of_an_evaluation_in_sequence_begin_with_a_chain(toys, tmp_path, rollouts):
    out = run(tmp_path / "run", **toys["letters"] | dict(eval_only=True, eval_k=(1, 2, 3, 4, 6)))
    chains = [[o for o in group.outcomes()] for _, groups in rollouts[1:] for group in groups]
    assert [len(chain) for chain in chains] == [4] * 5
    evaluation = json.loads((out / "summary.json").read_text())["evaluation"]
    for k in (1, 2, 3, 4):  # each chain's first k guesses
        found = fmean(len({o.key for o in chain[:k] if o.success}) for chain in chains)
        assert evaluation["sequential"]["unique@k"][str(k)] == pytest.approx(found)
    pairs = [chains[i] + chains[i + 1][:2] for i in (0, 2)]
    found = fmean(len({o.key for o in guesses if o.success}) for guesses in pairs)
    assert evaluation["sequential"]["unique@k"]["6"] == pytest.approx(found)


def test_what_takes_long_says_so_and_what_does_not_is_silent(monkeypatch, capsys):
    timer = train.threading.Timer
    monkeypatch.setattr(train.threading, "Timer", lambda wait, *args: timer(wait / 20, *args))
    with train.patience("something short"):
        pass
    with train.patience("something long"):
        time.sleep(0.3)
    # at 100 tokens in two seconds
    stats = train.Stats(generated_tokens=7)
    with train.patience("answers", stats, 1000):
        stats.generated_tokens += 100
        time.sleep(0.3)
    assert capsys.readouterr().err.splitlines() == ["something long ...", "answers, about 20 s ..."]


def test_an_update_sees_the_distribution_that_was_sampled_from_and_no_dropout():
    shape = GPT2Config(vocab_size=50, n_positions=32, n_embd=16, n_layer=1, n_head=2)
    assert shape.resid_pdrop > 0
    model, row = GPT2LMHeadModel(shape), train.Row([1, 2, 3, 4], [1, 2, 3], [1.0] * 3, [-1.0] * 3)
    config, ranks = train.Config(sketch_context="keep", micro_batch_tokens=64), train.Ranks(0, 1, torch.device("cpu"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    seen = [train.update(model, None, [(0, row)], config, optimizer, 0.0, 4, ranks)["entropy"] for _ in range(3)]
    assert len(set(seen)) == 1


def test_a_pretrained_model_is_loaded_without_dropout(tmp_path):
    """Recomputation needs the mode of training, in which OPT's layers drop out by themselves."""
    for shape in (
        GPT2Config(vocab_size=50, n_positions=32, n_embd=16, n_layer=1, n_head=2),
        OPTConfig(vocab_size=50, max_position_embeddings=32, hidden_size=16, ffn_dim=16, num_hidden_layers=1,
                  num_attention_heads=2, word_embed_proj_dim=16),
    ):  # fmt: skip
        AutoModelForCausalLM.from_config(shape).save_pretrained(tmp_path / shape.model_type)
        train.word_tokenizer(["a"]).save_pretrained(tmp_path / shape.model_type)
        model, _ = train.load_pretrained(tmp_path / shape.model_type, weights=True)
        ids = torch.arange(20)[None]
        model.gradient_checkpointing_enable(dict(use_reentrant=False))
        assert torch.equal(model.train()(ids).logits, model.eval()(ids).logits), shape.model_type


def test_guesses_at_several_problems_are_evaluated_problem_by_problem(toys, tmp_path):
    many = tmp_path / "many.py"
    text = Path(toys["letters"]["task"].partition(":")[0]).read_text()
    many.write_text(text.replace("        return 1\n", "        return 5\n", 1))
    options = toys["letters"] | dict(task=f"{many}:Letters", steps=1)
    with pytest.raises(train.UserError, match="different problems are not comparable"):
        run(tmp_path / "refused", **options)
    out = run(tmp_path / "run", **options, baseline="chain", rarity=0.0)
    evaluation = json.loads((out / "summary.json").read_text())["evaluation"]
    assert all(evaluation[kind]["problems"] == 3 and evaluation[kind]["n"] == 20 for kind in ("iid", "sequential"))


@pytest.fixture
def steps(monkeypatch) -> list:
    """What each step saw and did: (policy before, groups, row of metrics, gradients), in order."""
    seen, step = [], train.Run.step

    def record(self, *args):
        before = copy.deepcopy(self.policy.model)
        groups, row = step(self, *args)
        seen.append((before, groups, row, [p.grad.clone() for p in self.policy.model.parameters()]))
        return groups, row

    monkeypatch.setattr(train.Run, "step", record)
    return seen


# ---------------------------------------------------------------------------------------------------------------------
# The real entry point, and what a run leaves behind


def command(*words, cwd: Path, monkeypatch) -> int | str | None:
    """`python train.py words...`, in this process; returns the exit code."""
    monkeypatch.chdir(cwd)
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, words)])
    try:
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    except SystemExit as stop:
        return stop.code
    return 0


SYNTHETIC = "--task synthetic --task_options treasures=1500 chain=4 --num_sketches 4 --problems_per_step 4 --steps 3"
COUNTDOWN = "--task countdown --task_options difficulty=easy --num_sketches 2 --num_solutions 2 --problems_per_step 3"
COUNTDOWN += " --warm_start_steps 0"
TINY = "--tiny_width 32 --tiny_layers 1 --eval_samples 20 --eval_k 1 4 20 --eval_problems 3 --sample_every 1"
TINY += " --entropy_coef 0.01 --learning_rate 1e-3 --warmup_steps 1"  # such a policy solves nothing: the bonus moves it
ENTRIES = {
    "synthetic-sesa": SYNTHETIC + " --warm_start_steps 10",
    "synthetic-grpo": SYNTHETIC + " --warm_start_steps 10 --method grpo",
    "countdown-keep": COUNTDOWN + " --steps 2 --sketch_context keep --minibatches 3",
    "countdown-drop": COUNTDOWN + " --steps 2 --sketch_context drop",
    "countdown-is": COUNTDOWN + " --steps 2 --sketch_context is --minibatches 2",
    "countdown-distill": COUNTDOWN + " --steps 2 --sketch_context distill",
}
STEP_METRICS = """step reward loss grad_norm entropy kl generated_tokens step_time reward_std frac_reward_zero_std
    success valid unique_success unique_valid duplicate_rate sketch_distinct completions/mean_length
    completions/clipped_ratio
    clip_ratio/low clip_ratio/high sampling/logp_difference sampling/logp_shift prefill_tokens sketch_tokens
    learning_rate unique_found""".split()
SUMMARY = "task method seed steps seconds peak_rss_mb generated_tokens coverage unique_found reward valid base versions"


@pytest.mark.parametrize("entry", ENTRIES)
def test_the_command_trains_and_leaves_a_complete_folder(entry, tmp_path, monkeypatch, capsys):
    words = ENTRIES[entry].split() + TINY.split()
    assert command(*words, "--output_dir", "out", cwd=tmp_path, monkeypatch=monkeypatch) == 0
    out, steps = tmp_path / "out", 3 if "synthetic" in entry else 2
    assert "Traceback" not in capsys.readouterr().err

    metrics = rows(out)
    assert [row["step"] for row in metrics] == list(range(1, steps + 1))
    for row in metrics:
        assert not set(STEP_METRICS) - row.keys()
        assert row["generated_tokens"] > 0 and row["grad_norm"] > 0 and row["entropy"] > 0 and row["step_time"] > 0
    assert set(metrics[-1]["eval"]) == {"iid", "sequential"}

    config = json.loads((out / "config.json").read_text())
    assert config["steps"] == steps and None not in (config["num_sketches"], config["learning_rate"], config["rarity"])
    summary = json.loads((out / "summary.json").read_text())
    assert not set(SUMMARY.split()) - summary.keys() and summary["steps"] == steps
    assert summary["generated_tokens"] == sum(row["generated_tokens"] for row in metrics)
    assert summary["peak_rss_mb"] > 50 and {"torch", "transformers", "python"} <= summary["versions"].keys()
    assert not {"coverage", "reward", "valid"} - summary["base"].keys()
    if "synthetic" in entry:
        for coverage in (summary["coverage"], summary["base"]["coverage"]):
            assert [list(coverage[kind]) for kind in ("iid", "sequential")] == [["1", "4", "20"]] * 2

    samples = rows(out, "samples.jsonl")
    assert {row["step"] for row in samples} == set(range(1, steps + 1))
    for group in samples:
        for solution in group["solutions"]:
            assert all(isinstance(text, str) for text in solution["text"])
            assert len(solution["reward"]) == len(solution["advantage"]) == len(solution["success"])
        if "grpo" not in entry:
            assert len(group["sketches"]) == config["num_sketches"]

    assert (out / "figures" / "training.png").read_bytes().startswith(b"\x89PNG")
    checkpoint = out / "checkpoints" / f"step_{steps}"
    files = {"config.json", "model.safetensors", "tokenizer.json", "sesa.json", "training_state"}
    assert files <= {p.name for p in checkpoint.iterdir()}
    assert not [p for p in out.rglob(".*") if p.is_dir()]  # no temporary folder is left


def test_parameters_move_and_a_checkpoint_holds_them(toys, tmp_path, steps):
    from transformers import AutoModelForCausalLM

    out = run(tmp_path / "run", **toys["talk"])
    final = AutoModelForCausalLM.from_pretrained(out / "checkpoints" / "step_4").state_dict()
    for name, before in steps[0][0].state_dict().items():
        assert not torch.equal(before, final[name]), name
    moved = [torch.equal(a, b) for a, b in zip(steps[0][0].parameters(), steps[3][0].parameters(), strict=True)]
    assert not any(moved)


def test_only_the_last_checkpoints_and_the_best_are_kept(toys, tmp_path):
    options = toys["letters"] | dict(steps=6, checkpoint_every=1, keep_checkpoints=2, eval_every=1)
    out = run(tmp_path / "run", **options)
    scores = [max(max(e["coverage"].values()) for e in row["eval"].values()) for row in rows(out)]
    best = scores.index(max(scores)) + 1
    kept = {int(p.name.removeprefix("step_")) for p in (out / "checkpoints").iterdir()}
    assert kept == {5, 6, best}
    # the best is one of those that were saved
    out = run(tmp_path / "seldom", **options | dict(checkpoint_every=4, keep_checkpoints=1))
    saved = {int(p.name.removeprefix("step_")) for p in (out / "checkpoints").iterdir()}
    state = json.loads((out / "checkpoints" / "step_6" / "training_state" / "position.json").read_text())
    assert state["best_step"] in saved <= {4, 6}


def test_evaluating_a_checkpoint_gives_the_numbers_of_the_run(toys, tmp_path):
    for name in ("letters", "talk"):
        out = run(tmp_path / name, **toys[name])
        alone = toys[name] | dict(model=str(out / "checkpoints" / "step_4"), eval_only=True)
        again = json.loads((run(tmp_path / f"{name}-eval", **alone) / "summary.json").read_text())
        summary = json.loads((out / "summary.json").read_text())
        assert again["evaluation"] == summary["evaluation"] != summary["base_evaluation"]
        assert not (tmp_path / f"{name}-eval" / "checkpoints").exists()


def test_zero_steps_only_evaluate(toys, tmp_path):
    out = run(tmp_path / "run", **toys["letters"] | dict(steps=0))
    summary = json.loads((out / "summary.json").read_text())
    assert summary["steps"] == 0 and summary["evaluation"] == summary["base_evaluation"]


# ---------------------------------------------------------------------------------------------------------------------
# The gradient


def contexts(trajectory, context: str):
    """(prompt, tokens after it, spans, sampled log-probs by span, advantages by span) of each row of the loss."""
    ends = [0]
    for start, end in trajectory.spans:
        ends.append(ends[-1] + end - start)
    logps = [trajectory.logps[a:b] for a, b in zip(ends, ends[1:], strict=False)]
    advantages = trajectory.advantages * (len(trajectory.spans) // len(trajectory.advantages))
    if context == "prompt" or len(trajectory.advantages) == 1:
        yield getattr(trajectory, context), trajectory.body, trajectory.spans, logps, advantages
    else:  # each guess of a chain without the guesses before it
        for (start, end), sampled, advantage in zip(trajectory.spans, logps, advantages, strict=True):
            yield trajectory.plain, trajectory.body[start:end], [(0, end - start)], [sampled], [advantage]


def textbook(model, before, reference, groups, config: Config, longest: int) -> tuple[torch.Tensor, dict[str, float]]:
    """The loss of one update, token by token, and the means over tokens of what is reported. `before` is the policy
    that the rollout was drawn from; it is `model` itself at the first update."""
    terms = {"keep": [("prompt", 1.0)], "drop": [("plain", 1.0)], "is": [("plain", 1.0)], "imitate": [("plain", 1.0)]}
    terms["distill"] = [("prompt", 1.0), ("plain", config.distill_coef)]
    trajectories = [t for g in groups for t in g.trajectories]
    answers, tokens = sum(len(t.outcomes) for t in trajectories), sum(len(t.logps) for t in trajectories)
    loss, entropies, kls = torch.zeros(()), [], []
    for context, coefficient in terms[config.sketch_context]:
        sequences = [(t, row) for t in trajectories for row in contexts(t, context)]
        if context == "plain" and config.sketch_context in ("imitate", "distill"):  # what was sampled there stays whole
            direct = config.sketch_context == "imitate" and config.num_direct
            if config.sketch_context == "distill":  # and is not trained again
                sequences = [(t, row) for t, row in sequences if t.prompt != t.plain or len(t.outcomes) > 1]
            sequences = [(t, row) for t, row in sequences if row[-1][0] > 0 or direct and t.prompt == t.plain]
        sequences = [row for _, row in sequences]
        for prompt, body, spans, logps, advantages in sequences:
            ids = torch.tensor([prompt + body])
            models = (model, before, reference)
            ours, first, theirs = ((m(ids).logits[0] / config.temperature).log_softmax(-1) for m in models)
            mine = sum(map(len, logps))
            held = len(spans) if longest == 3 and context == "prompt" else 1  # a chain of guesses: as many answers
            weight = coefficient * {
                "grpo": held / (answers * mine), "dapo": 1 / tokens, "dr_grpo": 1 / (answers * longest)
            }[config.loss_type]  # fmt: skip
            for (start, end), sampled, advantage in zip(spans, logps, advantages, strict=True):
                for place, old in zip(range(len(prompt) + start, len(prompt) + end), sampled, strict=True):
                    now, ref, token = ours[place - 1], theirs[place - 1].detach(), ids[0, place]
                    start_of_rollout = first[place - 1, token].detach()
                    ratio = (now[token] - start_of_rollout).exp()
                    clipped = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
                    gain = torch.minimum(ratio * advantage, clipped * advantage)
                    if config.sketch_context == "is":
                        gain = gain * min(math.exp(start_of_rollout.item() - old), config.is_cap)
                    d = now[token] - ref[token]
                    exact, entropy = (now.exp() * (now - ref)).sum(), -(now.exp() * now).sum()
                    kl = {"exact": exact, "k1": d, "k2": d**2 / 2, "k3": (-d).exp() - 1 + d}[config.kl_type]
                    loss = loss - weight * (gain - config.kl_coef * kl + config.entropy_coef * entropy)
                    entropies.append(entropy.item())
                    kls.append(exact.item())
    return loss, dict(entropy=fmean(entropies), kl=fmean(kls))


@pytest.mark.parametrize(
    "toy, changes",
    [
        ("talk", dict(sketch_context="keep", loss_type="grpo", temperature=0.8)),
        ("talk", dict(sketch_context="drop", loss_type="dapo", kl_type="k3", entropy_coef=0.02)),
        ("talk", dict(sketch_context="is", loss_type="dr_grpo", kl_type="k2", is_cap=1.1)),
        ("talk", dict(sketch_context="distill", loss_type="grpo", kl_type="k1", temperature=1.4, distill_coef=0.3)),
        ("talk", dict(sketch_context="imitate", loss_type="grpo", num_direct=2)),
        ("talk", dict(loss_type="dapo", num_direct=3)),  # the default: distill 0.1
        ("talk", dict(sketch_context="keep", loss_type="dapo", num_direct=2, explore="stuck")),
        ("letters", dict(sketch_context="imitate", loss_type="dr_grpo")),
        ("talk", dict(sketch_context="drop", method="grpo")),
        ("letters", dict(sketch_context="keep", loss_type="dr_grpo", temperature=1.3, kl_coef=0.3, kl_coef_end=0.3)),
        ("letters", dict(sketch_context="distill", loss_type="dapo")),
        ("letters", dict(sketch_context="drop", micro_batch_tokens=1)),
    ],
)
def test_the_gradient_is_the_textbooks(toy, changes, toys, tmp_path, steps):
    """At the second step, where the policy has left the reference; micro-batches of 40 tokens, so there are several."""
    options = toys[toy] | dict(steps=2, max_grad_norm=1e9, micro_batch_tokens=40) | changes
    run(tmp_path / "run", **options)
    resolved = Config(**json.loads((tmp_path / "run" / "config.json").read_text()))
    reference, (model, groups, row, gradients) = steps[0][0], steps[1]
    resolved.kl_coef = row["kl_coef"]
    longest = {"talk": 2 * 4, "letters": 3}[toy]  # of an answer: its turns times the limit of each
    loss, means = textbook(model, model, reference, groups, resolved, longest)
    loss.backward()
    for ours, parameter in zip(gradients, model.parameters(), strict=True):
        torch.testing.assert_close(ours, parameter.grad, rtol=1e-4, atol=1e-6)
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm().item()
    assert norm > 1e-3 and row["grad_norm"] == pytest.approx(norm, rel=1e-4)
    assert row["loss"] == pytest.approx(loss.item(), rel=1e-4, abs=1e-6)
    assert row["entropy"] == pytest.approx(means["entropy"], rel=1e-4)
    assert row["kl"] == pytest.approx(means["kl"], rel=1e-3) and row["kl"] > 1e-6


@pytest.mark.parametrize("context", ["keep", "is", "distill"])
def test_several_updates_of_one_rollout_are_clipped_from_its_start(context, toys, tmp_path, steps, monkeypatch):
    """Each update has its own problems and denominators; the ratio is to the policy that the rollout was drawn from."""
    updates, step = [], torch.optim.AdamW.step

    def record(self, *args, **kwargs):
        parameters = [p for group in self.param_groups for p in group["params"]]
        updates.append([(p.detach().clone(), p.grad.clone()) for p in parameters])
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", record)
    small = dict(steps=1, minibatches=2, problems_per_step=3, max_grad_norm=1e9, clip_low=0.02, clip_high=0.05)
    run(tmp_path / "run", **toys["talk"] | small | dict(sketch_context=context))
    config = Config(**json.loads((tmp_path / "run" / "config.json").read_text()))
    [(before, groups, row, _)] = steps
    losses = []
    for i, update in enumerate(updates):
        model = copy.deepcopy(before)
        for parameter, (value, _) in zip(model.parameters(), update, strict=True):
            parameter.data.copy_(value)
        loss, _ = textbook(model, before, before, groups[i::2], config, longest=8)
        loss.backward()
        for parameter, (_, gradient) in zip(model.parameters(), update, strict=True):
            torch.testing.assert_close(gradient, parameter.grad, rtol=1e-4, atol=1e-6)
        losses.append(loss.item())
    assert len(losses) == 2 and row["loss"] == pytest.approx(fmean(losses), rel=1e-4, abs=1e-6)
    assert 0 < row["clip_ratio/low"] + row["clip_ratio/high"] < 1


def test_every_step_has_fresh_problems_and_fresh_random_numbers(toys, tmp_path, steps):
    still = dict(learning_rate=1e-12, eval_every=0, steps=3)
    run(tmp_path / "talk", **toys["talk"] | still)
    assert len({g.problem for _, groups, _, _ in steps for g in groups}) == 3 * 4
    assert [g.problem.index for _, groups, _, _ in steps for g in groups] == list(range(12))
    run(tmp_path / "letters", **toys["letters"] | still)
    run(tmp_path / "other", **toys["letters"] | still | dict(seed=1))
    drawn = {str([t.body for g in groups for t in g.trajectories]) for _, groups, _, _ in steps}
    assert len(drawn) == 9


def test_the_learning_rate_and_the_kl_follow_their_schedules(toys, tmp_path, steps):
    options = dict(steps=10, warmup_steps=4, lr_schedule="linear", kl_coef=0.2, kl_coef_end=0.06, eval_every=0)
    out = run(tmp_path / "run", **toys["letters"] | options)
    rates, coefs = zip(*[(row["learning_rate"], row["kl_coef"]) for row in rows(out)], strict=True)
    assert rates == pytest.approx([rl.learning_rate(i, 10, 4, 1e-2, "linear") for i in range(10)])
    assert rates[:4] == pytest.approx([0.0025, 0.005, 0.0075, 0.01]) and list(rates[4:]) == sorted(rates[4:])[::-1]
    assert coefs == pytest.approx([0.2, 0.18, 0.16, 0.14, 0.12, 0.1, 0.08, 0.06, 0.06, 0.06])
    first, second = (torch.cat([p.flatten() for p in steps[i][0].parameters()]) for i in (0, 1))
    assert (first - second).abs().max().item() == pytest.approx(rates[0], rel=0.01)  # Adam's first step is the rate


def test_the_stop_token_is_trained(toys, tmp_path, steps):
    """Every text that ended did so with the stop token, and what is counted as trained includes it."""
    run(tmp_path / "run", **toys["letters"] | dict(steps=1))
    _, groups, row, _ = steps[0]
    chains = [t for group in groups for t in group.trajectories]
    ends = [c.body[end - 1] for c in chains for (_, end), cut in zip(c.spans, c.truncated, strict=True) if not cut]
    assert ends and set(ends) == {1}  # <eos>
    assert sum(len(sesa.as_sampled(c).targets) for c in chains) == row["generated_tokens"]


@pytest.mark.parametrize("temperature", [0.6, 1.7])
def test_the_sampler_and_the_loss_agree_on_log_probs(temperature, toys, tmp_path):
    short = dict(temperature=temperature, eval_every=0, steps=3)
    for name in ("letters", "talk"):
        out = run(tmp_path / name, **toys[name] | short | dict(sketch_context="keep"))
        for row in rows(out):
            assert row["sampling/logp_difference"] < 1e-4
    dropped = run(tmp_path / "dropped", **toys["talk"] | short | dict(sketch_context="drop"))
    assert rows(dropped)[-1]["sampling/logp_difference"] > 1e-3  # so the number can tell


@pytest.mark.parametrize(
    "toy, changes",
    [
        ("letters", dict()),
        ("talk", dict(sketch_context="is", minibatches=2, loss_type="dapo")),
        ("talk", dict(sketch_context="distill", loss_type="dr_grpo")),
    ],
)
def test_micro_batches_rows_at_once_and_recomputation_change_nothing(toy, changes, toys, tmp_path):
    options = toys[toy] | changes
    options |= dict(steps=2, eval_every=0)
    whole = rows(run(tmp_path / "whole", **options))
    for split in (dict(micro_batch_tokens=1, max_rows=3), dict(micro_batch_tokens=50, gradient_checkpointing=True)):
        assert_same_metrics(rows(run(tmp_path / str(split), **options | split)), whole)


def start(command: list[str]) -> subprocess.Popen:
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


# ---------------------------------------------------------------------------------------------------------------------
# Stopping and going on


def wait_for(condition, process: subprocess.Popen, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if process.poll() is not None:
            pytest.fail(f"train.py ended early: {process.stderr.read()[-2000:]}")
        if time.monotonic() > deadline:
            process.kill()
            pytest.fail(f"train.py did not get that far in {seconds} s")
        time.sleep(0.01)


def assert_same_run(ours: Path, theirs: Path) -> None:
    assert weights(ours) == weights(theirs)
    assert [untimed(row) for row in rows(ours)] == [untimed(row) for row in rows(theirs)]
    assert rows(ours, "samples.jsonl") == rows(theirs, "samples.jsonl")
    mine, other = (json.loads((f / "summary.json").read_text()) for f in (ours, theirs))
    for summary in (mine, other):
        summary.pop("seconds"), summary.pop("peak_rss_mb")
    assert mine == other


def test_killed_at_any_moment_a_run_goes_on_as_if_nothing_had_happened(toys, tmp_path):
    options = toys["talk"] | dict(steps=30, eval_every=7, checkpoint_every=5, minibatches=2)
    whole = run(tmp_path / "whole", **options)
    out = tmp_path / "killed"
    process = start([sys.executable, "train.py", *flags(options | dict(output_dir=str(out)))])
    at = 6 + int.from_bytes(os.urandom(1)) % 15  # a step that nobody chose
    written = out / "metrics.jsonl"
    wait_for(lambda: written.exists() and len(written.read_bytes().splitlines()) >= at, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (out / "summary.json").exists(), f"it had finished before it was killed, after step {at}"
    run(out, **options | dict(resume=True))
    assert_same_run(out, whole)


def test_what_a_crash_left_half_written_is_dropped(toys, tmp_path, monkeypatch):
    """Killed while a checkpoint was being written, with half a line at the end of the logs."""
    whole = run(tmp_path / "whole", **toys["letters"])
    save = train.dcp.save

    def crash(tensors, checkpoint_id):
        save(tensors, checkpoint_id=checkpoint_id)
        if "step_4" in str(checkpoint_id):
            cut(checkpoint_id / "__0_0.distcp")
            raise SystemExit("power cut")

    monkeypatch.setattr(train.dcp, "save", crash)
    with pytest.raises(SystemExit):
        run(tmp_path / "run", **toys["letters"])
    monkeypatch.undo()
    for name in ("metrics.jsonl", "samples.jsonl"):
        with open(tmp_path / "run" / name, "ab") as file:
            file.write('{"step": 4, "text": "京'.encode()[:-1])  # within a character
    assert_same_run(run(tmp_path / "run", **toys["letters"] | dict(resume=True)), whole)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop_a_run_ends_cleanly_and_can_go_on(number, toys, tmp_path, monkeypatch):
    options = toys["letters"] | dict(steps=5, eval_every=2, checkpoint_every=100, eval_first=False)
    whole = run(tmp_path / "whole", **options)
    step, handlers = train.Run.step, [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]

    def interrupted(self, at, *args):
        if at == 2:
            os.kill(os.getpid(), number)
        return step(self, at, *args)

    monkeypatch.setattr(train.Run, "step", interrupted)
    out = run(tmp_path / "run", **options)
    monkeypatch.undo()
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert [row["step"] for row in rows(out)] == [1, 2, 3] and (out / "checkpoints" / "step_3").is_dir()
    assert json.loads((out / "summary.json").read_text())["steps"] == 3
    run(out, **options | dict(resume=True))
    assert weights(out) == weights(whole)
    # it did not stop to evaluate, either
    assert [untimed(row) for row in rows(out)] == [untimed(row) for row in rows(whole)]


def test_a_finished_run_can_be_resumed_for_more_steps(toys, tmp_path):
    out = run(tmp_path / "run", **toys["letters"])
    before = rows(out)
    run(out, **toys["letters"] | dict(resume=True))
    assert rows(out) == before  # there was nothing to do
    run(out, **toys["letters"] | dict(resume=True, steps=6))
    assert rows(out)[:4] == before and [row["step"] for row in rows(out)] == [1, 2, 3, 4, 5, 6]
    assert json.loads((out / "summary.json").read_text())["steps"] == 6
    assert json.loads((out / "config.json").read_text())["steps"] == 6  # --compare takes it for no seed of shorter runs


# ---------------------------------------------------------------------------------------------------------------------
# Golden numbers


@pytest.mark.parametrize("toy", ["letters", "talk"])
def test_golden_first_losses(toys, tmp_path, toy):
    """A chain, and episodes of two turns with a KL term, else as it comes: what they learn from in five steps.

    From random weights: processors round differently, and a warm start would make that visible.
    To make the numbers anew, after a change that is meant to change them, print `found` below.
    """
    out = run(tmp_path / "run", **toys[toy] | dict(steps=5))
    found = [(row["loss"], row["grad_norm"], row["reward"]) for row in rows(out)]
    for ours, golden in zip(found, GOLDEN[toy], strict=True):
        assert ours == pytest.approx(golden, rel=1e-3, abs=1e-6), found


GOLDEN = dict(
    letters=[
        (-0.03505473, 0.329444, 0.15088835),
        (-0.01151580, 0.336495, 0.12500000),
        (-0.05773694, 0.423252, 0.21338835),
        (-0.02800416, 0.422015, 0.15088835),
        (-0.04822496, 0.439492, 0.23927670),
    ],
    talk=[
        (-0.03637213, 0.709052, 1.39375000),
        (-0.03887517, 0.802810, 1.83750000),
        (-0.02525833, 0.634831, 1.91250000),
        (-0.01572481, 0.491442, 2.56875000),
        (-0.01337542, 0.377153, 2.67500000),
    ],
)


@pytest.mark.slow
def test_a_short_warm_start_beats_the_random_policy(tmp_path):
    """A fifth of the default's steps; experiments/tasks.py begins after the whole of it."""
    options = dict(task="frozenlake", task_options=("slippery=false",), warm_start_steps=300, num_sketches=2)
    out = run(tmp_path / "run", **options, eval_only=True, eval_problems=256, eval_samples=8, eval_k=(1,))
    summary = json.loads((out / "summary.json").read_text())
    assert summary["avg@n"] > summary["floor"] + 0.05


@pytest.mark.slow
@pytest.mark.parametrize("name, options", [("frozenlake", "slippery=false"), ("countdown", "difficulty=easy")])
def test_the_solvers_sketch_helps_and_another_problems_does_not(name, options):
    """Of the other puzzles experiments/LOG.md tells: there it does not."""
    task = tasks.make_task(name, **train.parse_options([options]))
    config = train.resolve(Config(task=name, task_options=(options,), warm_start_steps=500), task)
    policy = train.starting_policy("tiny", config, task, train.Ranks(0, 1, torch.device("cpu")))
    explorer, problems = policy.explorer(task), [task.problems("validation", 0)[i] for i in range(128)]
    plan = train.plan_of(config, policy.token_limits(config), 1.0, num_solutions=4)
    rng = random.Random(0)
    written = [explorer.chat.encode(task.demonstrate(problem, rng).sketches[0]) for problem in problems]
    drafts = [Completion(ids + policy.stop_ids[:1], [], "stop") for ids in written]

    def success(draws: list) -> float:
        found = explorer.sampler.run(draws)
        explorer.roots.clear()
        return fmean(t.outcomes[0].success for trajectories in found for t in trajectories)

    def after(drafts: list) -> float:
        return success([explorer.solve(p, plan, (0, p.index), [d]) for p, d in zip(problems, drafts, strict=True)])

    without = success([explorer.direct(p, plan, (0, p.index), range(4)) for p in problems])
    assert after(drafts) > 1.4 * without and after(drafts[1:] + drafts[:1]) < without


# ---------------------------------------------------------------------------------------------------------------------
# Wrong input


@pytest.mark.parametrize(
    "words, line",
    [
        ("--task nonsense", "task 'nonsense': must be one of synthetic, countdown"),
        ("--task nowhere.py:Task", "nowhere.py:Task: no such file"),
        ("--task jsonl:broken.jsonl", "broken.jsonl, line 2: must be a JSON object"),
        ("--task jsonl:nowhere.jsonl", "nowhere.jsonl: must be a .jsonl file"),
        ("--task_options treasures", "treasures: must be name=value"),
        ("--task_options nonsense=1", "no option 'nonsense': it has treasures"),
        ("--task_options treasures=many", "treasures='many': must be int"),
        ("--task_options treasures=1.5", "treasures='1.5': must be int"),
        ("--task_options treasures=null", "treasures='null': must be int"),
        ("--task_options treasures=-1", "treasures -1: must be between"),
        ("--task countdown --task_options difficulty=[1]", "difficulty"),
        ("--model ./nowhere", "--model ./nowhere cannot be loaded (no such file or folder): give tiny, a hub id"),
        ("--model nobody/no-such-model", "--model nobody/no-such-model cannot be loaded ("),
        ("--model empty", "--model empty cannot be loaded ("),
        ("--reference ./nowhere", "./nowhere cannot be loaded (no such file or folder)"),
        ("--num_sketches 1", "a group of 1 has nothing to be compared with"),
        ("--method grpo --group_size 1", "a group of 1 has nothing to be compared with"),
        ("--num_sketches -4", "--num_sketches -4: must be above 0"),
        ("--problems_per_step 0", "--problems_per_step 0: must be above 0"),
        ("--problems_per_step 1", "--problems_per_step 1"),
        ("--steps -1", "--steps -1: must be 0 or more"),
        ("--max_new_tokens 0", "--max_new_tokens 0: must be above 0"),
        ("--learning_rate -1", "--learning_rate -1.0: must be above 0"),
        ("--temperature 0", "--temperature 0.0: must be above 0"),
        ("--temperature nan", "temperature.*nan"),
        ("--learning_rate nan", "--learning_rate nan"),
        ("--kl_coef nan", "--kl_coef nan"),
        ("--minibatches 17", "--minibatches 17: at most"),
        ("--top_p 0.9", "--top_p 0.9: at most 1; less needs --eval_only"),
        ("--top_p 0", "--top_p 0.0: must be above 0"),
        ("--method grpo --advantage_scale passk --pass_k 99", "--pass_k 99, --pass_k_end 99: at most"),
        ("--task countdown --num_sketches 4 --explore stuck", "--explore stuck: needs --num_direct 1 or more"),
        ("--task countdown --method grpo --explore stuck --num_direct 3", "--explore stuck: needs --num_direct 1 or"),
        ("--task countdown --rarity 0.5", "--baseline position, --rarity 0.5: different problems are not comparable"),
        ("--num_solutions 2", "--num_direct 0, --num_solutions 2: needs two stages"),
        ("--task_options name=mine", "has no option 'name'"),
        ("--num_direct 2", "--num_direct 2, --num_solutions 1: needs two stages"),
        ("--distill_coef 0", "--distill_coef 0.0: must be above 0"),
        ("--advantage_scale loo", "--advantage_scale loo"),
        ("--eval_k 100 --eval_samples 20", "--eval_k"),
        ("--eval_k 0 4", "--eval_k"),
        ("--task countdown --sketches placebo --problems_per_step 1", "--sketches placebo"),
        ("--task countdown --method grpo --sketches placebo", "--sketches placebo: --method grpo has no Stage I to vary"),
        ("--cache_gb inf", "--cache_gb inf: must be above 0"),
        ("--task jsonl:long.jsonl", "the model has 2048 positions: shorten it, or lower --num_sketches"),
        ("--prompts nowhere.json", "--prompts nowhere.json"),
        ("--prompts broken.jsonl", "--prompts broken.jsonl"),
        ("--prompts prompts.json", "and `solve` hold {sketch} once"),
        ("--prompts list.json", "--prompts list.json"),
        ("--output_dir full", "--output_dir full is not empty: use --resume, or another folder"),
        ("--output_dir list.json", "--output_dir list.json"),
        ("--output_dir list.json/below", "--output_dir list.json/below"),
        ("--resume --output_dir full", "full holds no checkpoint"),
        ("--resume", "holds no checkpoint"),
    ],
)
def test_wrong_input_ends_with_one_line_and_touches_nothing(words, line, tmp_path, monkeypatch, capsys):
    for folder in ("empty", "full"):
        (tmp_path / folder).mkdir()
    (tmp_path / "full" / "notes.txt").write_text("precious")
    (tmp_path / "broken.jsonl").write_text('{"question": "1 + 1", "answer": 2}\n{"question": \n')
    (tmp_path / "prompts.json").write_text('{"solve": "no place"}')
    (tmp_path / "list.json").write_text("[]")
    questions = [f"how many {i}" for i in range(60)] + ["how many" + " 17" * 2500] * 3  # some are held out
    records = [json.dumps(dict(question=question + f" {i}", answer="1")) for i, question in enumerate(questions)]
    (tmp_path / "long.jsonl").write_text("\n".join(records))
    before = tree(tmp_path)
    small = "--warm_start_steps 0 --tiny_width 32 --tiny_layers 1 --eval_samples 16 --eval_k 1 --steps 0".split()
    given = words.split()
    small = [w for i, w in enumerate(small) if small[i - i % 2] not in given]  # all of these take one value
    assert command(*small, *given, cwd=tmp_path, monkeypatch=monkeypatch) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and error.endswith("\n"), error
    assert re.search(line if "nan" in line else re.escape(line), error), error
    assert tree(tmp_path) == before and not (tmp_path / "runs").exists()


@pytest.mark.parametrize("words", ["--nonsense 1", "--steps many", "--method ppo", "--device gpu"])
def test_a_flag_that_does_not_exist_is_refused(words, tmp_path, monkeypatch, capsys):
    assert command(*words.split(), cwd=tmp_path, monkeypatch=monkeypatch) == 2
    assert "Traceback" not in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused(tmp_path, monkeypatch, capsys):
    assert command("--device", "cuda", cwd=tmp_path, monkeypatch=monkeypatch) == 2
    assert "--device cuda: none is visible" in capsys.readouterr().err


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def corrupt(path: Path) -> None:
    path.write_bytes(b"x" * path.stat().st_size)


@pytest.mark.parametrize("file", ["position.json", ".metadata", "__0_0.distcp"])
@pytest.mark.parametrize("harm", [cut, corrupt, Path.unlink])
def test_a_damaged_checkpoint_is_refused(harm, file, toys, tmp_path, monkeypatch, capsys, finished):
    shutil.copytree(finished, tmp_path / "run")
    harm(tmp_path / "run" / "checkpoints" / "step_4" / "training_state" / file)
    before = tree(tmp_path)
    words = flags(toys["letters"]) + ["--resume", "--output_dir", "run"]
    assert command(*words, cwd=tmp_path, monkeypatch=monkeypatch) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "step_4 is damaged (" in error
    assert "remove it to resume from the one before it" in error
    assert tree(tmp_path) == before
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_4")  # what the line says
    run(tmp_path / "run", **toys["letters"] | dict(resume=True))
    assert_same_run(tmp_path / "run", finished)


@pytest.mark.parametrize("harm", [cut, Path.unlink])
def test_a_run_without_its_config_is_not_resumed(harm, toys, tmp_path, monkeypatch, capsys, finished):
    shutil.copytree(finished, tmp_path / "run")
    harm(tmp_path / "run" / "config.json")
    before = tree(tmp_path)
    words = flags(toys["letters"] | dict(seed=7)) + ["--resume", "--output_dir", "run"]
    assert command(*words, cwd=tmp_path, monkeypatch=monkeypatch) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "config.json cannot be read (" in error and tree(tmp_path) == before


def test_kernels_that_are_not_there_are_refused_before_anything_is_written(toys, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SESA_KERNELS", "cuda")
    words = flags(toys["letters"] | dict(output_dir="run"))
    assert command(*words, cwd=tmp_path, monkeypatch=monkeypatch) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "SESA_KERNELS is 'cuda'" in error and not list(tmp_path.iterdir())


def test_a_warm_start_is_made_anew_for_other_limits_and_only_then():
    task, ranks = tasks.make_task("countdown", difficulty="easy"), train.Ranks(0, 1, torch.device("cpu"))
    small = dict(task="countdown", warm_start_steps=1, warm_start_batch=2, tiny_width=32, tiny_layers=1)
    config = train.resolve(Config(**small), task)
    first = train.warm_start(config, task, ranks.device)
    assert train.warm_start(config, task, ranks.device) == first
    task.tiny_tokens = dict(sketch=5, solution=9)
    assert train.warm_start(config, task, ranks.device) != first
    assert train.starting_policy("tiny", config, task, ranks).limits == task.tiny_tokens


def test_of_two_runs_that_warm_start_at_once_the_faster_serves_both(tmp_path):
    cache = tmp_path / "tiny"

    def write(folder):
        (folder / "weights").write_text("of the slower")
        cache.mkdir()
        (cache / "weights").write_text("of the faster")

    train.write_folder(cache, write, train.Ranks(0, 1, torch.device("cpu")))
    assert (cache / "weights").read_text() == "of the faster" and list(tmp_path.iterdir()) == [cache]


def test_a_damaged_model_is_refused(toys, tmp_path, monkeypatch, capsys, finished):
    shutil.copytree(finished / "checkpoints" / "step_4", tmp_path / "model")
    cut(tmp_path / "model" / "model.safetensors")
    words = flags(toys["letters"] | dict(model="model", eval_only=True, output_dir="run"))
    assert command(*words, cwd=tmp_path, monkeypatch=monkeypatch) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("error: --model model cannot be loaded (")
    assert not (tmp_path / "run").exists()


def test_a_model_whose_head_has_a_bias_is_refused(toys, tmp_path, monkeypatch, capsys, finished):
    """The sampler would add it, the loss would not: they would disagree on every log-prob."""
    from transformers import PhiConfig, PhiForCausalLM

    shutil.copytree(finished / "checkpoints" / "step_4", tmp_path / "model")  # for its tokenizer
    size = dict(vocab_size=14, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    PhiForCausalLM(PhiConfig(**size, eos_token_id=1)).save_pretrained(tmp_path / "model")
    words = flags(toys["letters"] | dict(model="model", output_dir="run"))
    assert command(*words, cwd=tmp_path, monkeypatch=monkeypatch) == 2
    assert "its output head has a bias" in capsys.readouterr().err and not (tmp_path / "run").exists()


@pytest.mark.parametrize("changes", [dict(seed=1), dict(learning_rate=1e-3), dict(temperature=0.5, kl_coef=0.0)])
def test_a_checkpoint_of_another_config_is_refused(changes, toys, tmp_path, monkeypatch, capsys, finished):
    shutil.copytree(finished, tmp_path / "run")
    before = tree(tmp_path)
    words = flags(toys["letters"] | changes | dict(resume=True, output_dir="run"))
    assert command(*words, cwd=tmp_path, monkeypatch=monkeypatch) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "is from another config" in error
    for name, value in changes.items():
        assert re.search(rf"{name} \S+ -> {value}", error)
    assert tree(tmp_path) == before


@pytest.fixture(scope="module")
def finished(toys, tmp_path_factory) -> Path:
    return run(tmp_path_factory.mktemp("finished") / "run", **toys["letters"])


# ---------------------------------------------------------------------------------------------------------------------
# Looking without running


LOOKS = ["--dry_run", "--dry_run --task countdown --task_options difficulty=easy"]
LOOKS += [f"--show 2 --task {name}" for name in ("synthetic", "countdown", "sokoban", "frozenlake", "sudoku")]


@pytest.mark.parametrize("words", LOOKS)
def test_a_look_writes_nothing(words, tmp_path, monkeypatch, capsys):
    assert command(*words.split(), cwd=tmp_path, monkeypatch=monkeypatch) == 0
    assert not list(tmp_path.iterdir())
    out = capsys.readouterr().out
    if "dry_run" in words:
        shown = dict(line.split(maxsplit=1) for line in out.splitlines() if len(line.split(maxsplit=1)) == 2)
        countdown = "countdown" in words
        assert shown["problems_per_step"] == ("8" if countdown else "16") and shown["num_sketches"] == shown["problems_per_step"]
        assert {"output_dir", "steps", "learning_rate", "kl_coef"} <= shown.keys() and "None" not in shown["steps"]
    else:
        assert out.count("Outcome(reward=") == 4 and "--- prompt 'sketch'" in out


def test_prompts_from_a_file_reach_the_policy(toys, tmp_path, steps):
    file = tmp_path / "prompts.json"
    file.write_text(json.dumps(dict(direct="{problem} more")))
    run(tmp_path / "run", **toys["talk"] | dict(steps=1, method="grpo", prompts=str(file)))
    checkpoint = tmp_path / "run" / "checkpoints" / "step_1"
    saved = json.loads((checkpoint / "sesa.json").read_text())
    assert saved["prompts"]["direct"] == "{problem} more"
    saved["prompts"]["list"] = "of an earlier version"
    (checkpoint / "sesa.json").write_text(json.dumps(saved))
    policy = train.load_policy(str(checkpoint), tasks.make_task(toys["talk"]["task"]))
    assert policy.prompts.direct == "{problem} more" and policy.tiny
    vocabulary = json.loads((checkpoint / "tokenizer.json").read_text())["model"]["vocab"]
    for group in steps[0][1]:
        words = f"{group.problem.text} more".split()
        assert group.trajectories[0].prompt == [vocabulary[word] for word in words]


def test_examples_in_the_docstrings():
    failed, _ = doctest.testmod(train)
    assert not failed


# ---------------------------------------------------------------------------------------------------------------------
# A real language model


@pytest.mark.slow
@pytest.mark.parametrize("method", ["sesa", "grpo"])
def test_smollm2_trains_on_countdown_through_its_chat_template(method, smollm2, tmp_path):
    options = dict(model=smollm2, task="countdown", method=method, num_sketches=4, num_solutions=2, steps=2)
    options |= dict(problems_per_step=1, max_sketch_tokens=12, max_new_tokens=32, entropy_coef=1e-3, sample_every=1)
    options |= dict(eval_problems=1, eval_samples=2, eval_k=(1, 2), eval_every=0, learning_rate=1e-5, warmup_steps=1)
    out = run(tmp_path / "run", **options)
    metrics, samples = rows(out), rows(out, "samples.jsonl")
    assert len(metrics) == len(samples) == 2
    for row in metrics:
        assert row["grad_norm"] > 0 and 1 < row["completions/mean_length"] <= 32
    if method == "grpo":
        assert max(row["sampling/logp_difference"] for row in metrics) < 1e-3
    for group in samples:
        texts = [text for solution in group["solutions"] for text in solution["text"]]
        assert len(texts) == 8 and len(group["sketches"]) == (4 if method == "sesa" else 0)
        for text in texts + group["sketches"]:
            assert "<|im_" not in text and "\ufffd" not in text
        english = [word for text in texts + group["sketches"] for word in re.findall(r"[a-z]{3,}", text)]
        assert len(english) > 20
    assert (out / "checkpoints" / "step_2" / "model.safetensors").stat().st_size > 4e8


EVERY_TASK = {
    "synthetic": {},
    "countdown": dict(difficulty="easy"),
    "sokoban": dict(max_turns=2),
    "frozenlake": dict(max_turns=2),
    "sudoku": {},
    "math": None,  # from a file, in the form of GSM8K
}


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERY_TASK)
def test_smollm2_runs_a_step_of_every_task(name, smollm2, tmp_path, monkeypatch):
    """Through its chat template. What is trained is what it wrote, turn by turn, and nothing of what it was shown;
    the rewards are those of a replay of the decoded texts; an answer without the format earns none, or its penalty."""
    given = EVERY_TASK[name]
    if name == "math":
        lines = [dict(question=f"Tom has {i} apples and buys 2. How many?", answer=f"#### {i + 2}") for i in range(40)]
        given = {split: str(tmp_path / f"{split}.jsonl") for split in ("train", "validation")}
        for path, half in zip(given.values(), (lines[::2], lines[1::2]), strict=True):
            Path(path).write_text("\n".join(map(json.dumps, half)))
    options = dict(model=smollm2, task=name, task_options=tuple(f"{k}={v}" for k, v in given.items()), steps=1)
    options |= dict(problems_per_step=2, num_sketches=2, num_solutions=1, max_sketch_tokens=8, max_new_tokens=20)
    options |= dict(eval_problems=1, eval_samples=1, eval_k=(1,), eval_first=False, sample_every=1, kl_coef=0.0)
    options |= dict(sketch_context="keep" if name == "synthetic" else "drop")  # one row for each answer
    trained, groups, update, rollout = [], [], train.update, sesa.Explorer.rollout
    monkeypatch.setattr(train, "update", lambda *args: trained.append([row for _, row in args[2]]) or update(*args))
    monkeypatch.setattr(sesa.Explorer, "rollout", lambda *args: groups.append(rollout(*args)) or groups[-1])
    out = run(tmp_path / "run", **options)

    task, tokenizer = tasks.make_task(name, **given), AutoTokenizer.from_pretrained(smollm2)
    stepped = [pair for pair in groups if pair[0].trajectories[0].advantages]  # the others are of evaluations
    assert len(rows(out)) == len(trained) == len(stepped) == 1
    played = [(group.problem, t) for pair in stepped for group in pair for t in group.trajectories]
    recorded = [solution for record in rows(out, "samples.jsonl") for solution in record["solutions"]]
    for (problem, trajectory), row, solution in zip(played, itertools.chain(*trained), recorded, strict=True):
        turns, last = [], None  # runs of trained tokens
        for target in row.targets:
            if target - 1 != last:
                turns.append([])
            turns[-1].append(row.ids[target])
            last = target
        written = [tokenizer.decode(ids).removesuffix("<|im_end|>") for ids in turns]
        assert written == trajectory.texts == solution["text"]
        shown = tokenizer.decode([token for t, token in enumerate(row.ids) if t not in set(row.targets)])
        assert shown.count("<|im_start|>assistant") == len(written) and problem.text in shown
        if task.two_stage:  # the sketch is dropped from the context of the loss
            assert row.ids[: row.targets[0]] == trajectory.plain != trajectory.prompt
            outcomes = [tasks.play(task, problem, written)]
        else:
            outcomes = [tasks.play(task, problem, [text]) for text in written]
        assert outcomes == trajectory.outcomes and [o.success for o in outcomes] == solution["success"]
        if name in ("sokoban", "frozenlake"):
            assert len(written) == 2 and "actions left" in shown.split("<|im_start|>assistant")[1]
            if not any("</answer>" in text for text in written):
                assert solution["reward"] == [pytest.approx(-0.2)]  # the format penalty of two turns
        elif not any(outcome.success for outcome in outcomes):
            assert max(solution["reward"]) < 1
