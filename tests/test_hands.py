"""Asking, comparing, looking, publishing, forking: what a person does with a policy beside training it."""

import ast
import importlib.util
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import sesa
import tasks
import train
from tasks import Outcome, Problem

ROOT = Path(__file__).parent.parent
CHAT = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }} {% if m['role'] == 'assistant' %}<eos> {% endif %}{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
pytestmark = pytest.mark.usefixtures("one_thread_and_a_cache_of_its_own")
SMALL = dict(
    task="synthetic", task_options=("treasures=1500", "chain=4"), num_sketches=4, problems_per_step=4, steps=2,
    warm_start_steps=0, tiny_width=32, tiny_layers=1, eval_samples=20, eval_k=(1, 4, 20), sample_every=1,
)  # fmt: skip


def run(folder: Path, **changes) -> Path:
    train.main(train.Config(**SMALL | dict(output_dir=str(folder)) | changes))
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> list[Path]:
    """Two seeds of one config, and one of another."""
    home = tmp_path_factory.mktemp("runs")
    return [run(home / "a0"), run(home / "a1", seed=1), run(home / "b0", kl_coef=0.0)]


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory) -> str:
    """A random Llama with a chat template, as a folder."""
    words = "Name a fruit. Answer in few words. Another one, different from all of yours above. Do not answer yet. On one line, write short plan: the approach to take, Follow this approach: [user] [assistant]"
    tokenizer = train.word_tokenizer([*words.split(), *"abcdefgh", "plan", "answer."])
    tokenizer.chat_template = CHAT
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=1,
        max_position_embeddings=1024, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("chat")
    LlamaForCausalLM(shape).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


# ---------------------------------------------------------------------------------------------------------------------
# Ask


def asked(capsys, **options) -> str:
    train.main(train.Config(ask="Name a fruit.", **options))
    return capsys.readouterr().out


def test_a_chain_is_printed_beside_iid_answers(chat_model, capsys):
    out = asked(capsys, model=chat_model, num_sketches=5)
    lines = out.splitlines()
    assert lines[0].split() == ["in", "sequence", "i.i.d."]
    assert [line.split()[0] for line in lines[1:6]] == list("12345")
    assert re.fullmatch(r"different: \d of 5 in sequence, \d of 5 i\.i\.d\.", lines[6]) and len(lines) == 7
    assert asked(capsys, model=chat_model, num_sketches=5) == out
    assert asked(capsys, model=chat_model, num_sketches=5, seed=1) != out


@pytest.mark.parametrize("two_stage", [False, True])
def test_the_answers_as_json(two_stage, chat_model, capsys):
    options = dict(model=chat_model, num_sketches=3, json=True, two_stage=two_stage, max_new_tokens=6)
    found = json.loads(asked(capsys, **options))
    assert found["question"] == "Name a fruit." and found["seed"] == 0
    for kind in ("sequential", "iid"):
        answers = found[kind]
        assert len(answers) == 3 and all(len(a["text"].split()) <= 6 for a in answers)
        assert found["different"][kind] == len({a["key"] for a in answers if a["key"]})
        assert all((a["sketch"] is not None) == (two_stage and kind == "sequential") for a in answers)
    # of training: here a sketch has one answer, and nothing is beside them
    assert json.loads(asked(capsys, **options, num_solutions=2, num_direct=2, sketches="iid")) == found


def test_every_answer_of_a_chain_sees_those_before_it(chat_model):
    question = train.Question("Name a fruit.")
    policy = train.load_policy(chat_model, question)
    explorer, seen = policy.explorer(question), []
    prompts = explorer.sampler.prefill, explorer.sampler.extend
    explorer.sampler.extend = lambda rows, ids: seen.append(ids) or prompts[1](rows, ids)
    told = []
    explorer.drawn = told.append
    answers = train.ask(explorer, sesa.Plan(num_sketches=3))
    assert told == [a["text"] for a in answers]
    again = policy.chat().following("Another one, different from all of yours above.")
    assert sum(ids == [again] or ids[0][-len(again):] == again for ids in seen) == 2


def test_the_five_lines_of_the_readme(chat_model, capsys):
    [block] = re.findall(r"```python\n(from sesa import Plan\n.*?)```", (ROOT / "README.md").read_text("utf-8"), re.S)
    block = block.replace("Qwen/Qwen2.5-0.5B-Instruct", chat_model).replace("a U.S. state", "a fruit")
    exec(compile(block, "readme.py", "exec"), {})
    assert len(ast.literal_eval(capsys.readouterr().out)) == 8


def test_a_question_from_stdin(chat_model, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Name a fruit.\n"))
    train.main(train.Config(ask="-", model=chat_model, json=True, num_sketches=2))
    assert json.loads(capsys.readouterr().out)["question"] == "Name a fruit."


@pytest.mark.parametrize(
    "options, line",
    [
        (dict(ask=" "), "--ask: the question is empty"),
        (dict(ask="Name a fruit.", model="tiny"), "--model tiny: question has no closed vocabulary"),
        (dict(ask="Name a fruit.", num_sketches=0), "--num_sketches 0: must be above 0"),
        (dict(ask="Name a fruit.", top_p=0.0), "--top_p 0.0: must be above 0"),
        (dict(ask="Name a fruit.", max_new_tokens=4000), "the model has 1024 positions"),
        (dict(ask="Name a vegetable."), "has words unknown to the model"),
    ],
)  # fmt: skip
def test_a_wrong_question_is_one_line(options, line, chat_model):
    with pytest.raises(train.UserError) as error:
        train.main(train.Config(**dict(model=chat_model) | options))
    assert line in str(error.value) and "\n" not in str(error.value)


def test_equal_answers_have_equal_keys():
    question = train.Question("Name a fruit.")
    keys = [question.score(None, text).key for text in ("Apple", " apple.", "**APPLE**\n", "apples", "…")]
    assert keys == ["apple", "apple", "apple", "apples", None]


def test_control_characters_of_a_policy_do_not_reach_the_terminal():
    assert train.one_line("a\x1b[31m\x07 b\r\n\u202ec", 80) == "a[31m b c"


@pytest.mark.slow
def test_smollm2_answers_in_sequence(smollm2):
    question = train.Question("Name a fruit.")
    explorer = train.load_policy(smollm2, question).explorer(question)
    chain = train.ask(explorer, sesa.Plan(num_sketches=4))
    assert len({answer["key"] for answer in chain}) > 1 and any(answer["text"].isascii() for answer in chain)


# ---------------------------------------------------------------------------------------------------------------------
# Compare


def test_runs_are_compared_in_one_picture_and_a_table(runs, tmp_path, capsys):
    train.main(train.Config(compare=tuple(map(str, runs)), output_dir=str(tmp_path)))
    lines = capsys.readouterr().out.splitlines()
    assert (tmp_path / "compare.png").stat().st_size > 20_000 and lines[-1].endswith(f"{tmp_path}/compare.png")
    assert "kl_coef=0.1 kl_coef_end=0.02" in lines[1] and "kl_coef=0.0 kl_coef_end=0.0" in lines[2] and len(lines) == 4
    names, values = lines[0].split(), lines[1].split()
    assert values[0] == "2" and values[names.index("step")] == "2"  # two seeds are one row
    tokens = [json.loads((r / "summary.json").read_text())["generated_tokens"] for r in runs[:2]]
    assert float(values[names.index("tokens")]) == pytest.approx(sum(tokens) / 2, rel=1e-3)
    (tmp_path / "file").write_text("mine")
    for taken in (tmp_path, tmp_path / "file"):
        with pytest.raises(train.UserError, match="compare.png exists, or is below a file"):
            train.main(train.Config(compare=tuple(map(str, runs)), output_dir=str(taken)))


def test_the_curves_are_the_runs_numbers(runs, tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    drawn, plot = [], Axes.plot
    monkeypatch.setattr(Axes, "plot", lambda self, *a, **k: drawn.append((a, k)) or plot(self, *a, **k))
    rows = [train.read_run(path)[1] for path in runs[:2]]
    train.draw(dict(both=rows), tmp_path / "x.png")
    means = [args for args, k in drawn if k.get("linewidth") == 1.8]
    x, y, _ = means[6]  # three panels of two lines, then the reward
    rewards = [[r["reward"] for r in seed if r["step"]] for seed in rows]
    assert list(x) == [1, 2] and list(y) == pytest.approx([sum(pair) / 2 for pair in zip(*rewards)])
    x, y, _ = means[0]
    assert list(x) == [0, 2] and list(y)[1] == pytest.approx(sum(s[-1]["sequential"] for s in rows) / 2)


@pytest.mark.parametrize("name", ["nowhere", "empty"])
def test_what_is_no_run_cannot_be_compared(name, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(train.UserError, match=f"{name} cannot be read as a run folder"):
        train.main(train.Config(compare=(str(tmp_path / name),), output_dir=str(tmp_path)))
    assert not (tmp_path / "compare.png").exists()


# ---------------------------------------------------------------------------------------------------------------------
# The page of rollouts, and the terminal

EVIL = "</script><script>document.title = 'broken into'</script><b>bold</b> <!-- "


def records() -> list[dict]:
    hit, miss = Outcome(1.0, True, "a", True), Outcome(0.0, False, None, False)
    chain = sesa.Trajectory([], [], 0, texts=["a", EVIL, "a"], outcomes=[hit, miss, hit])
    chain.rewards, chain.advantages = [1.0, 0.0, 0.0], [0.5, -0.5, -0.5]
    solution = sesa.Trajectory([], [], 0, sketch=EVIL, texts=["first", "second"], outcomes=[hit])
    solution.rewards, solution.advantages = [1.0], [0.0]
    groups = [sesa.Group(Problem(0, text, None), [t]) for text, t in (("one", chain), (EVIL, solution))]
    return [sesa.sample_record(step, group) for step in (1, 11) for group in groups]


@pytest.fixture
def page(tmp_path) -> Path:
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records()))
    (tmp_path / "figures").mkdir()
    train.write_rollouts(tmp_path)
    return tmp_path / "figures" / "rollouts.html"


def test_what_a_policy_writes_stays_text_in_the_page(page):
    text = page.read_text()
    assert text.count("<script") == text.count("</script>") == 2 and "broken into" in text and "<b>" not in text
    payload = re.search(r'<script type="application/json" id="records">(.*?)</script>', text, re.S)[1]
    assert json.loads(payload) == records()
    assert not re.search(r"(src|href)=|https?:|url\(|innerHTML", text)


def test_a_run_leaves_its_page(runs):
    text = (runs[0] / "figures" / "rollouts.html").read_text()
    [payload] = re.findall(r'id="records">(.*?)</script>', text, re.S)
    found = json.loads(payload)
    assert [r["step"] for r in found] == [1, 1, 2, 2]
    assert all(len(s["mark"]) == len(s["text"]) == 4 for r in found for s in r["solutions"])


@pytest.mark.slow
def test_the_page_in_a_browser(page):
    playwright = pytest.importorskip("playwright.sync_api")
    if not Path("/usr/bin/chromium").exists():
        pytest.skip("no chromium")
    with playwright.sync_playwright() as play:
        browser = play.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
        tab, errors = browser.new_page(), []
        tab.on("pageerror", lambda error: errors.append(error))
        tab.goto(page.as_uri())
        assert tab.title() == "Rollouts" and not errors
        assert tab.locator("h2").all_inner_texts() == ["one", EVIL.rstrip()] or tab.locator("h2").count() == 2
        assert tab.locator("tbody tr").count() == 4 and tab.locator("tbody b").count() == 0
        assert [t.split()[-1] for t in tab.locator("td.mark").all_inner_texts()] == ["hit", "invalid", "repeat", "hit"]
        assert tab.locator("#step").inner_text() == "11"
        tab.locator("#slider").fill("0")
        assert tab.locator("#step").inner_text() == "1"
        tab.screenshot(path=str(page.with_suffix(".png")), full_page=True)
        browser.close()
    assert page.with_suffix(".png").stat().st_size > 10_000


def test_a_group_on_the_terminal():
    chain, solution = (train.in_colour(record) for record in records()[:2])
    assert [int(code) for code in re.findall(r"\033\[(\d+)m", chain) if code != "0"] == [32, 31, 33]
    assert chain.startswith("step 1, one: ") and "\033[32ma -> 1\033[0m" in chain
    assert solution.count("->") == 1 and solution.endswith("-> 1\033[0m") and "\n" not in chain + solution


def test_without_a_terminal_nothing_is_shown(tmp_path, capsys):
    run(tmp_path / "run")
    assert "->" not in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# Report


def test_tensorboard_gets_all_metrics_and_a_resumed_run_goes_on(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = run(tmp_path / "run", report_to="tensorboard")
    run(out, report_to="tensorboard", resume=True, steps=3)
    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    for name in ("reward", "loss", "entropy"):
        points = [(e.step, e.value) for e in events.Scalars(name)]
        assert points == [(row["step"], pytest.approx(row[name], rel=1e-5, abs=1e-7)) for row in rows]
    assert {"eval/iid/pass@4", "eval/sequential/avg@n", "eval/iid/coverage/20"} <= set(events.Tags()["scalars"])
    assert "_hparams_/session_start_info" in events.summary_metadata
    assert "samples/text_summary" in events.Tags()["tensors"]


@pytest.mark.slow
def test_trackio_gets_all_metrics_and_a_resumed_run_goes_on(tmp_path, monkeypatch):
    pytest.importorskip("trackio")
    script = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
import train
train.main(train.Config(**{SMALL | dict(output_dir="run", report_to="trackio")}, **eval(sys.argv[1])))
"""
    home = dict(TRACKIO_DIR=str(tmp_path / "trackio"), HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", HOME=str(tmp_path))
    home |= dict(XDG_CACHE_HOME=str(tmp_path / "cache"), PATH="/usr/bin:/bin", TRACKIO_SHOW_DASHBOARD="0")
    for more in ("{}", "dict(resume=True)"):
        steps = script if more == "{}" else script.replace("'steps': 2", "'steps': 3")
        subprocess.run([sys.executable, "-c", steps, more], cwd=tmp_path, env=home, check=True, timeout=300)
    import sqlite3

    [file] = [f for f in (tmp_path / "trackio").glob("*.db")]
    with sqlite3.connect(file) as base:
        found = [(name, step, json.loads(text)) for name, step, text in base.execute("select run_name, step, metrics from metrics order by step")]
    assert {name for name, _, _ in found} == {"run"} and [step for _, step, _ in found] == [1, 2, 3]
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [f["reward"] for _, _, f in found] == pytest.approx([row["reward"] for row in rows])
    assert "eval/iid/pass@4" in found[1][2] and "samples" in found[0][2]


def test_a_tracker_that_is_not_there_is_one_line_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(train.UserError, match="--report_to wandb: first pip install wandb"):
        run(tmp_path / "run", report_to="wandb")
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Take away


def test_a_checkpoint_is_a_plain_model_with_a_card(runs):
    folder = runs[2] / "checkpoints" / "step_2"
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n") and "base_model" not in card
    assert "--kl_coef 0.0" in card and "--eval_k 1 4 20" in card and "--temperature" not in card
    assert "{" not in card and "| valid, i.i.d. |" in card
    ours = train.load_policy(str(folder), tasks.make_task("synthetic"))
    theirs, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor([tokenizer("Find the treasures of China.", add_special_tokens=False)["input_ids"]])
    assert torch.equal(ours.model(ids).logits, theirs(ids).logits)


@pytest.mark.parametrize("broken", [False, True])
def test_the_best_checkpoint_is_pushed(broken, tmp_path, monkeypatch, capsys):
    import huggingface_hub

    calls = []

    class FakeApi:
        def create_repo(self, name, **options):
            if broken:
                raise OSError("no network\nat all")
            calls.append(name)

        def upload_folder(self, **options):
            calls.append(options)

    monkeypatch.setattr(huggingface_hub, "HfApi", FakeApi)
    if broken:
        with pytest.raises(train.UserError) as error:
            run(tmp_path / "run", push_to_hub="me/it")
        assert "--push_to_hub me/it (no network): the checkpoint is in" in str(error.value)
        assert "\n" not in str(error.value) and (tmp_path / "run" / "summary.json").exists()
        return
    run(tmp_path / "run", push_to_hub="me/it")
    name, options = calls
    assert name == options["repo_id"] == "me/it" and options["ignore_patterns"] == ["training_state/*"]
    assert (Path(options["folder_path"]) / "README.md").exists()


def test_nothing_is_evaluated_first_if_so_wished(tmp_path, capsys):
    out = run(tmp_path / "run", eval_first=False)
    summary = json.loads((out / "summary.json").read_text())
    assert summary["base"] is None and summary["evaluation"]["iid"]["n"] == 20
    assert "nan -> " in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------------------
# Forks and imports

BLOCKS = re.findall(r"```python\n(# my_\w+\.py\n.*?)```", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.S)


@pytest.mark.parametrize("block", BLOCKS, ids=["credit", "loss", "drawing"])
def test_the_forks_of_the_guide_run_and_matter(block, runs, tmp_path, monkeypatch):
    import rl

    for module, name in ((sesa, "credit"), (rl, "policy_loss"), (sesa.Explorer, "guess")):
        monkeypatch.setattr(module, name, getattr(module, name))  # put back at the end
    lines = [line for line in block.splitlines() if line.strip() and not line.startswith("#")]
    assert len(lines) < 20
    exec(compile(block, "my_fork.py", "exec"), dict(__name__="my_fork"))
    treasures = dict(task_options=("treasures=3056", "chain=4"), steps=4, warm_start_steps=300, entropy_coef=0.01)
    forked = run(tmp_path / "fork", **treasures)
    monkeypatch.undo()
    usual = run(tmp_path / "usual", **treasures)
    ours, theirs = ((f / "checkpoints" / "step_4" / "model.safetensors").read_bytes() for f in (forked, usual))
    assert ours != theirs


def test_the_main_command_imports_nothing_that_is_not_needed(tmp_path):
    script = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
import train
train.main(train.Config(**{SMALL | dict(output_dir="run")}))
print([m for m in ("tensorboard", "wandb", "trackio", "playwright", "gguf") if m in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
