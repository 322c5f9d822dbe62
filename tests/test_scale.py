"""Several ranks are one: the same numbers, less memory, and a run that outlives the death of any of them.

Everything here is processes over gloo. `torchrun tests/test_scale.py JSON` (below) runs train.main once for each of a
list of options, all in one process group, and leaves what each rank held and how often it spoke beside each run.
"""

import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

sys.path.insert(0, str(ROOT / "tests"))

import faults  # noqa: E402

import train  # noqa: E402
from train import Config, main  # noqa: E402

TIMES = {"step_time", "rollout_time"}
SMALL = dict(eval_every=0, eval_problems=2, eval_k=(1,), tiny_width=32, warmup_steps=1, warm_start_steps=0)
SYNTHETIC = SMALL | dict(
    task="synthetic", task_options=("treasures=1500", "chain=4"), num_sketches=4, problems_per_step=5, steps=4,
    eval_samples=20, learning_rate=1e-3, micro_batch_tokens=40, entropy_coef=0.01,
)  # fmt: skip
COUNTDOWN = SMALL | dict(
    task="countdown", task_options=("difficulty=easy",), num_sketches=2, num_solutions=2, problems_per_step=3, steps=3,
    eval_samples=2, learning_rate=1e-3, micro_batch_tokens=100, entropy_coef=0.01, kl_coef=0.05,
)  # fmt: skip
ARMS = dict(
    tied=SYNTHETIC,
    countdown=COUNTDOWN | dict(minibatches=2, sketch_context="is"),
    few=COUNTDOWN | dict(problems_per_step=1, sketch_context="distill", gradient_checkpointing=True),
    untied=SYNTHETIC | dict(model="untied"),
)
TWO_RANKS = ["few", "untied"]  # of the default run; all of them in the slow one
SHARED = {"prefill_tokens"}  # chains at one problem share its prompt, on each rank once
RESUMED = COUNTDOWN | dict(steps=6, checkpoint_every=3, keep_checkpoints=5, minibatches=2)


@pytest.fixture(scope="module", autouse=True)
def no_figures(one_thread_and_a_cache_of_its_own):
    one_thread_and_a_cache_of_its_own.setattr(train, "draw", lambda *args: None)


@pytest.fixture(scope="module")
def untied(tmp_path_factory) -> str:
    """A folder with a random policy for the synthetic task whose head is not its embedding."""
    config = Config(**SYNTHETIC, tiny_layers=2)
    policy = train.tiny_policy(config, train.tasks.make_task("synthetic"))
    shape = policy.model.config
    shape.tie_word_embeddings = False
    torch.manual_seed(0)
    policy.model = type(policy.model)(shape)
    folder = tmp_path_factory.mktemp("models") / "untied"
    policy.save(folder)
    return str(folder)


def torchrun(ranks: int, runs: list[dict], seconds: int = 300, *words: str) -> None:
    """Run them one after another on so many ranks."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks), *words]
    done = subprocess.Popen(
        [*command, __file__, json.dumps(runs)], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        _, error = done.communicate(timeout=seconds)
    finally:
        if done.poll() is None:
            os.killpg(done.pid, signal.SIGKILL)  # the ranks, too
    assert done.returncode == 0, error[-6000:]


def rows(folder: Path, name: str = "metrics.jsonl") -> list[dict]:
    return [json.loads(line) for line in (folder / name).read_text(encoding="utf-8").splitlines()]


def assert_same(ours: list[dict], theirs: list[dict], tolerance: float) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.keys() == other.keys()
        for name in mine.keys() - TIMES - SHARED - {"eval"}:
            assert mine[name] == pytest.approx(other[name], rel=tolerance, abs=tolerance), (mine["step"], name)
        assert mine.get("eval") == other.get("eval")


# ---------------------------------------------------------------------------------------------------------------------
# One rank or several


def arms(folder: Path, ranks: str, untied: str, names=ARMS, **changes) -> list[dict]:
    options = {name: ARMS[name] | changes | dict(output_dir=str(folder / f"{name}-{ranks}")) for name in names}
    return [o | dict(model=untied) if o.get("model") else o for o in options.values()]


def record(run: train.Run, folder: Path) -> None:
    """held-RANK.json: the bytes of weights, gradients and moments of this rank."""

    def local(tensors) -> int:
        tensors = [t for t in tensors if torch.is_tensor(t) and t.numel() > 1]
        return sum(t.to_local().nbytes if hasattr(t, "to_local") else t.nbytes for t in tensors)

    held = dict(weights=local(run.model.parameters()), gradients=local(p.grad for p in run.model.parameters()))
    held["moments"] = local(t for state in run.optimizer.state.values() for t in state.values())
    held["reference"] = local(run.reference.parameters())
    (folder / f"held-{run.ranks.rank}.json").write_text(json.dumps(held))


@pytest.fixture(scope="module")
def alone(tmp_path_factory, untied) -> Path:
    """Every arm, and the run that is to be resumed, on one rank."""
    folder, train_run = tmp_path_factory.mktemp("alone"), train.Run.train
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.Run, "train", recording(train_run))
        for options in arms(folder, "1", untied) + [RESUMED | dict(output_dir=str(folder / "resumed-1"))]:
            main(Config(**options))
    return folder


def recording(train_run):
    def wrapped(run, folder, *args):
        train_run(run, folder, *args)
        record(run, folder.path)

    return wrapped


@pytest.fixture(scope="module")
def four(tmp_path_factory, untied) -> Path:
    """On four ranks, some of them sharded over two and replicated over two; and one to be resumed."""
    folder = tmp_path_factory.mktemp("four")
    runs = arms(folder, "4", untied, ["tied", "few"])
    runs += arms(folder, "4", untied, ["countdown", "untied"], shard_ranks=2)
    again = RESUMED | dict(output_dir=str(folder / "resumed-4"))
    runs += [again, again | dict(again=str(folder / "again-4"))]
    torchrun(4, runs)
    return folder


@pytest.fixture(scope="module")
def two(tmp_path_factory, untied) -> Path:
    folder = tmp_path_factory.mktemp("two")
    poisoned = SYNTHETIC | dict(output_dir=str(folder / "poisoned-2"), poison=[2])
    given_up = SYNTHETIC | dict(output_dir=str(folder / "given_up-2"), poison=list(range(2, 8)), steps=8)
    given_up["checkpoint_every"] = 1
    runs = [RESUMED | dict(output_dir=str(folder / "resumed-2")), poisoned, given_up]
    torchrun(2, arms(folder, "2", untied, TWO_RANKS) + runs)
    return folder


@pytest.mark.parametrize("name", TWO_RANKS)
def test_two_ranks_are_one(name, alone, two):
    """More ranks than problems, uneven shares, several updates per rollout, tied and untied heads."""
    one = rows(alone / f"{name}-1")
    assert all(row["grad_norm"] > 0 and row["skipped_updates"] == 0 for row in one)
    assert_same(rows(two / f"{name}-2"), one, 1e-4)


@pytest.mark.slow
def test_ranks_are_one_for_twenty_steps(tmp_path, untied):
    for tag, ranks, changes in (("1", 1, {}), ("2", 2, {}), ("4", 4, {}), ("2x2", 4, dict(shard_ranks=2))):
        torchrun(ranks, arms(tmp_path, tag, untied, steps=20, **changes), 580)
    for name in ARMS:
        for tag in ("2", "4", "2x2"):
            assert_same(rows(tmp_path / f"{name}-{tag}"), rows(tmp_path / f"{name}-1"), 1e-4)


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_what_a_rank_holds_falls_with_their_number(ranks, alone, request):
    folder = request.getfixturevalue({2: "two", 4: "four"}[ranks])
    arms = {2: [("untied", 2)], 4: [("tied", 4), ("untied", 2)]}  # with four ranks the second is sharded over two
    for name, parts in arms[ranks]:
        whole = json.loads((alone / f"{name}-1" / "held-0.json").read_text())
        held = [json.loads((folder / f"{name}-{ranks}" / f"held-{rank}.json").read_text()) for rank in range(ranks)]
        for part, size in whole.items():
            assert sum(h[part] for h in held) == size * ranks // parts
            assert max(h[part] for h in held) < 1.1 * size / parts, (name, ranks, part)


def test_ranks_that_do_not_divide_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(train.UserError, match="--shard_ranks 3: must divide the 4 ranks"):
        train.resolve(Config(shard_ranks=3), train.tasks.make_task("synthetic"))


# ---------------------------------------------------------------------------------------------------------------------
# Stopping on so many ranks, going on with others


def rewind(source: Path, target: Path) -> None:
    """The folder as it was after step 3."""
    shutil.copytree(source, target)
    for name in ("summary.json", "checkpoints/step_6"):
        path = target / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def test_what_two_ranks_saved_goes_on_on_one(alone, two, tmp_path):
    whole = rows(two / "resumed-2")
    assert [row["step"] for row in whole] == list(range(1, 7))
    assert_same(whole, rows(alone / "resumed-1"), 1e-4)
    rewind(two / "resumed-2", tmp_path / "run")
    main(Config(**RESUMED, resume=True, output_dir=str(tmp_path / "run")))
    assert_same(rows(tmp_path / "run"), whole, 1e-5)


@pytest.mark.slow
def test_what_four_ranks_saved_goes_on_on_any_number(alone, four, tmp_path):
    whole = rows(four / "resumed-4")
    assert_same(whole, rows(alone / "resumed-1"), 1e-4)
    drop = lambda row: {name: value for name, value in row.items() if name not in TIMES}  # noqa: E731
    assert [drop(row) for row in rows(four / "again-4")] == [drop(row) for row in whole]
    ours, theirs = (four / f"{n}-4" / "checkpoints" / "step_6" / "model.safetensors" for n in ("again", "resumed"))
    assert ours.read_bytes() == theirs.read_bytes()
    for ranks in (1, 2):
        rewind(four / "resumed-4", tmp_path / f"run-{ranks}")
        torchrun(ranks, [RESUMED | dict(resume=True, output_dir=str(tmp_path / f"run-{ranks}"))])
        assert_same(rows(tmp_path / f"run-{ranks}"), whole, 1e-5)


@pytest.mark.parametrize("ranks", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_a_checkpoint_of_one_rank_goes_on_and_an_old_one_too(ranks, alone, tmp_path):
    """An old one held model.safetensors and training_state.pt: one file, the moments by number."""
    from torch.distributed.checkpoint.state_dict import get_state_dict

    for name in ("new", "old"):
        rewind(alone / "resumed-1", tmp_path / name)
    folder = tmp_path / "old" / "checkpoints" / "step_3"
    position = json.loads((folder / "training_state" / "position.json").read_text())
    policy = train.load_policy(str(folder), train.tasks.make_task("countdown"))
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=0.0, betas=(0.9, 0.999), weight_decay=0.0)
    weights, moments = get_state_dict(policy.model, optimizer)
    tensors = dict(model_state_dict=weights, optim_state_dict=moments)
    train.dcp.load(tensors, checkpoint_id=folder / "training_state")
    names = [name for name, _ in policy.model.named_parameters()]
    old = optimizer.state_dict()
    old["state"] = {i: moments["state"][name] for i, name in enumerate(names)}
    torch.save(position | dict(optimizer=old), folder / "training_state.pt")
    shutil.rmtree(folder / "training_state")
    with pytest.raises(train.UserError, match="first version: python experiments/upgrade.py"):
        train.position(folder)
    subprocess.run([sys.executable, ROOT / "experiments" / "upgrade.py", folder], check=True)
    runs = [RESUMED | dict(resume=True, output_dir=str(tmp_path / name)) for name in ("new", "old")]
    if ranks > 1:
        torchrun(ranks, runs)
    for name, options in zip(("new", "old"), runs):
        if ranks == 1:
            main(Config(**options))
        assert_same(rows(tmp_path / name), rows(alone / "resumed-1"), 0 if ranks == 1 else 1e-5)


def test_auto_starts_where_there_is_nothing_and_goes_on_where_there_is(alone, tmp_path):
    out = tmp_path / "run"
    options = RESUMED | dict(output_dir=str(out), resume_auto=True)
    main(Config(**options))
    assert_same(rows(out), rows(alone / "resumed-1"), 0)
    shutil.rmtree(out / "checkpoints")  # as if killed before the first
    with pytest.raises(train.UserError, match="is from another config .seed 0 -> 1"):
        main(Config(**options | dict(seed=1)))
    main(Config(**options))
    assert_same(rows(out), rows(alone / "resumed-1"), 0)
    shutil.rmtree(out / "checkpoints" / "step_6")
    main(Config(**options))
    assert_same(rows(out), rows(alone / "resumed-1"), 0)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("precious")
    with pytest.raises(train.UserError, match="is not empty"):
        main(Config(**options | dict(output_dir=str(tmp_path / "notes"))))


# ---------------------------------------------------------------------------------------------------------------------
# Faults


def test_an_update_that_is_not_finite_is_skipped_by_all_ranks(two):
    """The second rank's loss, and so its gradient, is inf or nan in the second update."""
    metrics = rows(two / "poisoned-2")
    assert [row["skipped_updates"] for row in metrics] == [0, 1, 0, 0] and not math.isfinite(metrics[1]["grad_norm"])
    assert all(math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"]) for row in metrics[2:])


def test_five_in_a_row_end_the_run(two):
    metrics = rows(two / "given_up-2")
    assert [row["skipped_updates"] for row in metrics] == [0, 1, 1, 1, 1, 1]
    line = (two / "given_up-2" / "error").read_text()
    assert line.startswith("step 6: 5 updates in a row were not finite") and "\n" not in line
    assert (two / "given_up-2" / "checkpoints" / "step_5").is_dir()


def test_a_second_run_in_the_same_folder_is_refused(alone, tmp_path, monkeypatch):
    shutil.copytree(alone / "resumed-1", tmp_path / "run")
    code = "import fcntl, sys, time; f = open(sys.argv[1]); fcntl.flock(f, fcntl.LOCK_EX); print(1, flush=True)"
    command = [sys.executable, "-c", code + "; time.sleep(99)", str(tmp_path / "run" / "config.json")]
    other = subprocess.Popen(command, stdout=subprocess.PIPE)
    other.stdout.readline()
    again = Config(**RESUMED, resume=True, output_dir=str(tmp_path / "run"))
    with pytest.raises(train.UserError, match="another run is at work there"):
        main(again)
    other.kill()  # -9: the lock ends with its process
    other.wait()
    main(again)
    evaluate = train.evaluate

    def both(run):  # another run makes the folder meanwhile
        (tmp_path / "new").mkdir(exist_ok=True)
        (tmp_path / "new" / "config.json").write_text("theirs")
        return evaluate(run)

    monkeypatch.setattr(train, "evaluate", both)
    with pytest.raises(train.UserError, match="cannot be made .File exists"):
        main(Config(**RESUMED, output_dir=str(tmp_path / "new")))
    assert (tmp_path / "new" / "config.json").read_text() == "theirs"


def test_a_full_disk_ends_with_one_line_and_keeps_the_checkpoint_before(tmp_path, monkeypatch):
    """A limit on the size of a file, which fails the write as a full disk does, from the second save on."""
    save, (soft, hard) = train.RunFolder.save, resource.getrlimit(resource.RLIMIT_FSIZE)

    def full(folder, run, state):
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft if state["step"] == 3 else 20_000, hard))
        save(folder, run, state)

    monkeypatch.setattr(train.RunFolder, "save", full)
    out = tmp_path / "run"
    try:
        with pytest.raises(train.UserError, match="step_6 cannot be written") as caught:
            main(Config(**RESUMED, output_dir=str(out)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    line = str(caught.value)
    assert "\n" not in line and "MB, " in line and "are free; make room, and go on with --resume" in line
    assert [p.name for p in (out / "checkpoints").iterdir()] == ["step_3"]
    monkeypatch.undo()
    main(Config(**RESUMED, resume=True, output_dir=str(out)))
    assert [row["step"] for row in rows(out)] == list(range(1, 7))


def test_a_disk_that_is_full_of_metrics_ends_with_one_line(alone, tmp_path, monkeypatch):
    append, (soft, hard) = train.RunFolder.append, resource.getrlimit(resource.RLIMIT_FSIZE)

    def full(folder, name, *rows):
        file = folder.path / name
        if rows and rows[0]["step"] == 4:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file.stat().st_size + 20, hard))
        append(folder, name, *rows)

    monkeypatch.setattr(train.RunFolder, "append", full)
    out = tmp_path / "run"
    try:
        with pytest.raises(train.UserError, match="metrics.jsonl cannot be written .File too large.: make room, and go on"):
            main(Config(**RESUMED, output_dir=str(out)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    monkeypatch.undo()
    main(Config(**RESUMED, resume=True, output_dir=str(out)))
    assert_same(rows(out), rows(alone / "resumed-1"), 0)


def test_a_second_ctrl_c_during_a_save_leaves_whole_checkpoints_only(alone, tmp_path, monkeypatch):
    save = train.dcp.save

    def interrupted(tensors, checkpoint_id):
        save(tensors, checkpoint_id=checkpoint_id)
        if "step_6" in str(checkpoint_id):
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(train.dcp, "save", interrupted)
    out = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        main(Config(**RESUMED, output_dir=str(out)))
    assert [p.name for p in (out / "checkpoints").iterdir()] == ["step_3"]
    monkeypatch.undo()
    main(Config(**RESUMED, resume=True, output_dir=str(out)))
    assert_same(rows(out), rows(alone / "resumed-1"), 0)


SLOW_TASK = """
import time
from dataclasses import dataclass
from pathlib import Path
import tasks


@dataclass
class Slow(tasks.Countdown):
    mark: str = ""

    def episode(self, problem):
        Path(self.mark).touch()
        time.sleep(0.2)
        return super().episode(problem)
"""


def test_ctrl_c_during_the_first_evaluation_is_one_line_and_leaves_nothing(tmp_path):
    (tmp_path / "slow.py").write_text(SLOW_TASK)
    words = f"--task {tmp_path}/slow.py:Slow --task_options mark={tmp_path}/mark --output_dir {tmp_path}/run"
    words += " --warm_start_steps 0"
    process = subprocess.Popen(
        [sys.executable, "train.py", *words.split()], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        text=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # not as a shell's "&" has it
    )  # fmt: skip
    while not (tmp_path / "mark").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=30)
    assert process.returncode == 130 and error.count("\n") == 1 and error.startswith("interrupted"), error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kills, ranks", [(1, 1), pytest.param(4, 2, marks=pytest.mark.slow)])
def test_killed_at_random_moments_a_run_comes_to_the_same_curve(kills, ranks):
    """`python tests/faults.py --kills 20` does more of it."""
    faults.survive(kills, ranks, seed=int.from_bytes(os.urandom(4)))


# ---------------------------------------------------------------------------------------------------------------------
# Memory told in advance


def test_what_a_token_keeps_for_the_backward_is_what_is_told():
    """Bytes of the tensors that autograd saves, over tokens; within a tenth, with and without recomputation."""
    from transformers import LlamaConfig, LlamaForCausalLM

    for heads, keys, inner in ((4, 4, 192), (8, 2, 512)):
        shape = dict(hidden_size=128, intermediate_size=inner, num_hidden_layers=6, vocab_size=50)
        model = LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=heads, num_key_value_heads=keys)).train()
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        storages, kept = {}, []

        def pack(tensor, weights=weights, storages=storages, kept=kept):
            kept.append(tensor)  # so that no address is used twice
            storage = tensor.untyped_storage()
            storages |= {storage.data_ptr(): storage.nbytes()} if storage.data_ptr() not in weights else {}
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model.base_model(input_ids=torch.zeros(2, 64, dtype=torch.long), use_cache=False)
        told, _, _ = train.token_bytes(model, Config(), on_gpu=False)
        assert told == pytest.approx(sum(storages.values()) / 128, rel=0.1)


def test_a_dry_run_tells_the_memory_of_each_rank(untied, alone, monkeypatch, capsys):
    options = SYNTHETIC | dict(model=untied, dry_run=True)

    def told() -> dict[str, float]:
        main(Config(**options))
        lines = capsys.readouterr().out.partition("memory of each rank, GB")[2].splitlines()
        return {line.split()[0]: float(line.split()[1]) for line in lines if line}

    one = told()
    held = json.loads((alone / "untied-1" / "held-0.json").read_text())
    for name, part in (("weights", "weights"), ("gradients", "gradients"), ("optimizer", "moments")):
        assert one[name] == pytest.approx(held[part] / 1e9, abs=6e-4)
    monkeypatch.setenv("WORLD_SIZE", "4")
    four = told()
    assert four["optimizer"] == pytest.approx(one["optimizer"] / 4, abs=6e-4) and four["rollout_copy"] > 0
    monkeypatch.setattr(os, "sysconf", lambda name: 100)
    main(Config(**options))
    assert "IT DOES NOT FIT" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------------------


def worker(runs: list[dict]) -> None:
    """On each rank of torchrun. Beside train.py's options: `poison`, the updates in which the second rank's loss is
    inf; `again`, where to copy the run's folder at step 3 and go on from it."""
    dist = torch.distributed
    dist.init_process_group("gloo")
    dist.init_process_group = lambda *args, **kwargs: None  # once for all runs
    train.draw = lambda *args: None
    train.Run.train = recording(train.Run.train)
    update, policy_loss = train.update, train.rl.policy_loss
    for options in runs:
        poison, again = (options.pop(name, None) for name in ("poison", "again"))
        updates = []

        def counted(*args, updates=updates):
            updates.append(1)
            return update(*args)

        def poisoned(*args, updates=updates, poison=poison, **options):
            bad = poison and dist.get_rank() == 1 and len(updates) in poison
            return policy_loss(*args, **options) * (math.inf if bad else 1)

        train.update, train.rl.policy_loss = counted, poisoned
        if again:
            if dist.get_rank() == 0:
                rewind(Path(options["output_dir"]), Path(again))
            dist.barrier()
            options |= dict(output_dir=again, resume=True)
        try:
            main(Config(**options))
        except train.UserError as error:
            (Path(options["output_dir"]) / "error").write_text(str(error))
    dist.destroy_process_group()


if __name__ == "__main__":
    worker(json.loads(sys.argv[1]))
