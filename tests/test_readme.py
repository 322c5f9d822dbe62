"""What the README states is checked: commands, lines of code, flags, metrics, tables."""

import dataclasses
import importlib.util
import io
import json
import re
import tokenize
from pathlib import Path

import pytest

import train

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = (ROOT / "experiments" / "RESULTS.md").read_text(encoding="utf-8")
MOST_LINES = 3_400  # a ratchet: the design allows 3,400
MODULES = ("sesa", "train", "rl", "sampler", "kernels", "tasks")


def code_lines(path: Path) -> tuple[int, int]:
    """(lines with code on them: no blank lines, comments or docstrings; their characters)"""
    lines, at_start, text = set(), True, path.read_text(encoding="utf-8")
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type in (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT):  # of a logical line, not inside brackets
            at_start = True
        elif token.type not in (tokenize.COMMENT, tokenize.NL, tokenize.ENDMARKER):
            if not (token.type == tokenize.STRING and at_start):
                lines.update(range(token.start[0], token.end[0] + 1))
            at_start = False
    return len(lines), sum(len(text.splitlines()[i - 1].strip()) for i in lines)


def test_lines_of_code():
    counts = {name: code_lines(ROOT / f"{name}.py") for name in MODULES}
    stated = {name: int(lines) for name, lines in re.findall(r"\| `(\w+)\.py` \| (\d+) \|", README)}
    assert stated == {name: lines for name, (lines, _) in counts.items()}
    total, characters = (sum(column) for column in zip(*counts.values(), strict=True))
    assert f"Together {total:,} lines of code" in README
    assert total <= MOST_LINES and characters / total <= 47


def test_the_readme_is_short():
    assert len(README.encode()) <= 9_000


def test_the_shape_is_six_modules():
    assert {path.stem for path in ROOT.glob("*.py")} == set(MODULES)


def test_the_two_commands_are_what_ci_runs():
    commands = re.findall(r"^python3 -m venv .*$", README, re.M)
    assert [c.rpartition("&& ")[2] for c in commands] == ["torchrun train.py --task synthetic", "pytest -q"]
    assert all("pip install -r requirements.txt" in command for command in commands)
    ci = (ROOT / ".ci" / "run").read_text()
    assert "pip install --quiet -r requirements.txt" in ci and "torchrun train.py --task synthetic" in ci
    assert re.search(r"^pytest -q$", ci, re.M)


def test_flags_exist():
    known = {field.name for field in dataclasses.fields(train.Config)}
    flags = set(re.findall(r"`--(\w+)", README)) | set(re.findall(r" --(\w+)", README))
    of_others = set("nproc_per_node nnodes rdzv max help cpu threads dtype schedule methods".split())  # torchrun, benchmarks
    assert flags - of_others <= known
    assert [name for name in known if not source_of(name)] == [], "a flag without a string under it"


def source_of(name: str) -> str:
    """The lines of a field of Config with the string under it."""
    text = (ROOT / "train.py").read_text(encoding="utf-8")
    match = re.search(rf'^    {name}: .*\n    """.+"""$', text, re.M)
    return match.group() if match else ""


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("readme") / "run"
    train.main(
        train.Config(
            task="synthetic",
            task_options=("chain=4",),
            steps=1,
            warm_start_steps=0,
            tiny_width=32,
            tiny_layers=1,
            num_sketches=4,
            problems_per_step=4,
            eval_samples=20,
            eval_k=(1, 20),
            output_dir=str(folder),
        )  # fmt: skip
    )
    return folder


def test_metrics_are_in_the_dictionary(run_folder):
    [row] = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    table = RESULTS.partition("| metric |")[2]
    listed = set(re.findall(r"`([\w/@]+)`", table))
    assert set(row) - {"step"} <= listed, set(row) - listed
    assert {"reward", "loss", "grad_norm", "entropy", "kl", "generated_tokens", "step_time"} <= set(row)


def experiment(name: str):
    spec = importlib.util.spec_from_file_location(f"experiment_{name}", ROOT / "experiments" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["collapse", "states", "tasks", "asked"])
def test_tables_are_made_from_the_committed_results(name):
    module = experiment(name)
    rows = module.results()
    if rows:
        assert module.table(rows).strip() == module.runs.published(name).strip()
        picture = getattr(module, "PICTURE", None)
        assert not picture or picture.stat().st_size > 10_000 and f"{name}.png" in README + RESULTS


def test_a_state_is_right_if_it_is_the_only_one_that_is_named():
    module = experiment("states")
    task = module.States()
    assert len(task.targets) == len(module.STATES) == 50
    for text, key in [
        ("I like New York.", "New-York"),
        ("West Virginia", "West-Virginia"),
        ("Virginia", "Virginia"),
        ("Arkansas", "Arkansas"),
        ("Ohio, or Ohio", "Ohio"),
        ("Ohio or Texas", None),
        ("Texasville", None),
        ("x" * 300 + " Ohio", None),
        ("", None),
    ]:
        outcome = task.score(None, text)
        assert (outcome.key, outcome.success, outcome.reward) == (key, key is not None, float(key is not None)), text
    assert all(task.score(None, name).key == name for name in module.STATES)


def test_the_frontier_is_what_coins_between_policies_reach():
    module = experiment("tasks")

    def row(*points: tuple[float, float]) -> dict:
        return dict(curve=[dict(iid={"avg@n": x, "pass@k": {"8": y}}) for x, y in points])

    rows = {
        ("t", "grpo", 0): row((0.4, 0.92), (0.5, 0.7), (0.62, 0.68)),
        ("t", "grpo", 1): row((0.4, 0.88), (0.5, 0.7), (0.58, 0.72)),  # the mean of seeds: 0.9, 0.7, and (0.6, 0.7)
        ("t", "grpo-kl0.2", 0): row((0.3, 0.6), (0.5, 0.85)),
        ("t", "grpo-zero", 0): row((0.55, 0.95)),  # one of SESA's rewards
        ("t", "mixed", 0): row((0.6, 0.9)),
        ("other", "grpo", 0): row((0.9, 0.9)),
    }
    hull = module.frontier(rows, "t")
    assert [pytest.approx(corner) for corner in hull] == [(40, 90), (50, 85), (60, 70)]
    for x, y, above in [(45, 90.5, 3), (55, 77.5, 0), (60, 60, -10), (30, 91, 1), (70, 75, 5)]:
        assert module.above(hull, x, y) == pytest.approx(above)
    assert module.frontier({("t", "mixed", 0): row((0.6, 0.9))}, "t") == []
