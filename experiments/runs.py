"""What the experiments share: a run of train.py, resumed if it was interrupted, and its result as one JSON line."""

import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parent.parent
REPORT = ROOT / "experiments" / "RESULTS.md"


def train(folder: Path, flags: Sequence[str]) -> dict:
    """Run train.py into `folder`, or finish what is there. Returns its summary with "curve", [(step, evaluation)], or
    {"failed": its last line} if it ended with an error: that is a result too, if it had begun."""
    if finished(folder):
        return read(folder)
    resume = ["--resume"] if any(folder.glob("checkpoints/step_*")) else []
    if not resume:
        shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "train.py", *flags, "--output_dir", str(folder), *resume]
    log = folder.with_name(folder.name + ".log")
    with open(log, "w") as file:
        done = subprocess.run(command, cwd=ROOT, stdout=file, stderr=file)
    said = (log.read_text().strip() or "it said nothing").splitlines()[-1]
    if done.returncode > 0 and not folder.exists():
        raise SystemExit(f"{folder} did not begin: {said}")
    if done.returncode > 0 and "another run is at work" not in said:
        return dict(failed=said[:300])
    if not finished(folder):
        raise SystemExit(f"{folder} was stopped before its end: start again, it goes on")
    return read(folder)


def finished(folder: Path) -> bool:
    """Whether it came to its last step: Ctrl-C ends a run early, with a summary."""
    if not (folder / "summary.json").exists():
        return False
    ended, wanted = (json.loads((folder / name).read_text())["steps"] for name in ("summary.json", "config.json"))
    return ended >= wanted


def read(folder: Path) -> dict:
    summary = json.loads((folder / "summary.json").read_text())
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    first = [(0, summary["base_evaluation"])] if summary["base_evaluation"] else []
    evaluated = first + [(row["step"], row["eval"]) for row in rows if "eval" in row]
    kept = "steps seconds generated_tokens unique_found peak_rss_mb floor ceiling versions".split()
    mean = statistics.fmean
    stage_1 = dict(sketch_tokens=sum(row["sketch_tokens"] for row in rows))
    if rows:
        stage_1["rollout_share"] = mean(row["rollout_time"] for row in rows) / mean(row["step_time"] for row in rows)
    return {name: summary[name] for name in kept} | stage_1 | dict(curve=evaluated)


def results(file: Path, names: Sequence[str]) -> dict[tuple, dict]:
    """The lines of a result file by the values of `names`; the last one counts."""
    lines = file.read_text().splitlines() if file.exists() else []
    return {tuple(row[name] for name in names): row for row in map(json.loads, lines)}


def append(file: Path, row: dict) -> None:
    with open(file, "a") as out:
        out.write(json.dumps(row, ensure_ascii=False) + "\n")


def in_parallel(run: Callable, jobs: Iterable[tuple], workers: int) -> None:
    """Call run(*job) for all jobs, `workers` at a time, of one thread each if more than one."""
    if workers > 1:
        os.environ["OMP_NUM_THREADS"] = "1"
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(lambda job: run(*job), jobs))


def spread(values: Sequence[float], form: str = ".1f") -> str:
    """The mean, and the single values in the order of seeds."""
    singles = f" ({', '.join(f'{v:{form}}' for v in values)})" if len(values) > 1 else ""
    return f"{statistics.fmean(values):{form}}{singles}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def published(name: str) -> str:
    """What stands in RESULTS.md between <!-- name --> and <!-- end -->."""
    return REPORT.read_text(encoding="utf-8").partition(f"<!-- {name} -->\n")[2].partition("<!-- end -->")[0]


def publish(name: str, text: str) -> None:
    before, _, rest = REPORT.read_text(encoding="utf-8").partition(f"<!-- {name} -->\n")
    after = rest.partition("<!-- end -->")[2]
    REPORT.write_text(f"{before}<!-- {name} -->\n{text}<!-- end -->{after}", encoding="utf-8")
    print(text)
