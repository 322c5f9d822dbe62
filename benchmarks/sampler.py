"""What the serial stage costs: the SESA schedule on our sampler and on transformers, same weights, one run.

    python benchmarks/sampler.py                                   # the tiny policy, a minute
    python benchmarks/sampler.py --model FOLDER                    # a real one, such as SmolLM2-135M
    python benchmarks/sampler.py --growth                          # how cost grows with K, prompt length and M
    python benchmarks/sampler.py --model qwen --dtype bfloat16 --schedule.problems 64 --methods ours reprefill
                                                                   # for a GPU; not run yet

Schedule: P problems; K sketches of `sketch` tokens, each after all earlier ones and a separator; then for each sketch
M solutions of `solution` tokens, after the prompt and that sketch. Nothing stops early: every method samples as many
tokens.

  ours        sampler.py: the prompt once, a history never again, forks share; all problems in one running batch
  reprefill   `generate` on the whole context of every sketch and solution (its own cache within a call)
  kept cache  `generate` with past_key_values carried from sketch to sketch, the prompt's repeated for the solutions
  batch       `generate_batch`: continuous batching over a paged cache with prefix sharing

`limit` is the time that the machine needs at least: for every forward of the schedule with everything shared, the
larger of bytes (weights, and each key and value that is attended to, once) over the measured bandwidth, and of
operations over the measured rate of matrix products. CPU seconds are those of all threads of the process: with
--threads 1 they are near what an idle machine would take, however busy this one is. Peak memory is the growth of the
resident set during a method.
"""

import copy
import json
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

# The root, not this folder, whose kernels.py transformers would take for the package of that name.
sys.path[0] = str(Path(__file__).resolve().parent.parent)
# ruff: noqa: E402
import torch
import transformers
import tyro
from transformers import (
    AutoModelForCausalLM,
    ContinuousBatchingConfig,
    DynamicCache,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
)

from sampler import Sampler, SamplingParams, Stats

SEPARATOR = 5


@dataclass(frozen=True)
class Schedule:
    problems: int = 4
    """P, decoded side by side"""
    sketches: int = 8
    """K, one after the other"""
    solutions: int = 1
    """M per sketch (0: no second stage, as in the synthetic task)"""
    prompt: int = 128
    """tokens of a prompt"""
    sketch: int = 16
    """tokens of a sketch"""
    solution: int = 32
    """tokens of a solution"""

    @property
    def generated(self) -> int:
        return self.problems * self.sketches * (self.sketch + self.solutions * self.solution)

    def prompts(self, vocab: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(0)
        return torch.randint(6, vocab, (self.problems, self.prompt), generator=generator).tolist()


@dataclass
class Options:
    schedule: Schedule
    model: str = "tiny"
    """`tiny` (0.8 M parameters, random), `qwen` (random, of the shape of Qwen2.5-1.5B), a folder or a hub id"""
    dtype: str = "float32"
    """of the weights"""
    methods: tuple[str, ...] = ("ours", "reprefill", "kept cache", "batch")
    """which to run"""
    repeats: int = 3
    """each method is run so often, in turns; the best time counts"""
    threads: int = torch.get_num_threads()
    """of torch"""
    growth: bool = False
    """vary K, prompt length and M, ours against reprefill, and draw it"""
    output: Path | None = None
    """a .json file for the numbers; with --growth also a .png beside it"""


def load(options: Options):
    if options.model == "tiny":
        torch.manual_seed(0)
        shape = dict(hidden_size=128, intermediate_size=384, num_hidden_layers=2, num_attention_heads=4)
        config = LlamaConfig(**shape, vocab_size=3400, max_position_embeddings=4096, tie_word_embeddings=True)
        model = LlamaForCausalLM(config).to(getattr(torch, options.dtype))
    elif options.model == "qwen":
        shape = dict(hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12)
        config = Qwen2Config(**shape, num_key_value_heads=2, vocab_size=151_936, tie_word_embeddings=True)
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, options.dtype))
    else:
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=getattr(torch, options.dtype))
    model.generation_config = GenerationConfig(do_sample=True, top_k=0, top_p=1.0, eos_token_id=-1, pad_token_id=0)
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu")


# ------------------------------------------------------------------------------------------------------ the methods


def ours(sampler: Sampler, s: Schedule, prompts: list[list[int]]) -> int:
    """Returns the number of given tokens that were computed, as the other methods do."""

    def program(problem: int, prompt: list[int]):
        (root,) = sampler.prefill([prompt])
        (chain,) = sampler.fork([root], 1)
        rows = []
        for k in range(s.sketches):
            params = SamplingParams(max_new_tokens=s.sketch)
            (sketch,) = yield [chain], params, [problem * 10_000 + k]
            sampler.extend([chain], [[SEPARATOR]])
            if s.solutions:
                rows += sampler.extend(sampler.fork([root], s.solutions), [sketch.ids] * s.solutions)
        seeds = [problem * 10_000 + 5000 + i for i in range(len(rows))]
        yield rows, SamplingParams(max_new_tokens=s.solution), seeds
        sampler.release([root, chain, *rows])

    sampler.stats = Stats()
    sampler.run([program(i, prompt) for i, prompt in enumerate(prompts)])
    assert sampler.stats.generated_tokens == s.generated
    return sampler.stats.prefill_tokens


def _solution_contexts(s: Schedule, prompts: torch.Tensor, sketches: list[torch.Tensor]) -> torch.Tensor:
    """[P * K * M, prompt + sketch], the solutions of a problem together."""
    texts = torch.stack(sketches, 1).flatten(0, 1)  # [P * K, sketch]
    contexts = torch.cat([prompts.repeat_interleave(s.sketches, 0), texts], 1)
    return contexts.repeat_interleave(s.solutions, 0)


def reprefill(model, s: Schedule, prompts: list[list[int]]) -> int:
    start = torch.tensor(prompts, device=model.device)
    chain, sketches, prefilled = start, [], 0
    for _ in range(s.sketches):
        prefilled += chain.numel()
        chain = _generate(model, chain, s.sketch)
        sketches.append(chain[:, -s.sketch :])
        chain = torch.cat([chain, torch.full_like(chain[:, :1], SEPARATOR)], 1)
    if s.solutions:
        contexts = _solution_contexts(s, start, sketches)
        prefilled += contexts.numel()
        _generate(model, contexts, s.solution)
    return prefilled


def kept_cache(model, s: Schedule, prompts: list[list[int]]) -> int:
    start = torch.tensor(prompts, device=model.device)
    with torch.inference_mode():
        # all but the last token: `generate` computes at least one
        root = DynamicCache()
        if s.prompt > 1:
            model(start[:, :-1], past_key_values=root, use_cache=True, logits_to_keep=1)
        chain, cache, sketches = start, copy.deepcopy(root), []
        for _ in range(s.sketches):
            chain = _generate(model, chain, s.sketch, cache)
            sketches.append(chain[:, -s.sketch :])
            chain = torch.cat([chain, torch.full_like(chain[:, :1], SEPARATOR)], 1)
        prefilled = start.numel() + (s.sketches - 1) * s.problems
        if s.solutions:
            root.batch_repeat_interleave(s.sketches * s.solutions)
            contexts = _solution_contexts(s, start, sketches)
            prefilled += contexts.numel() - len(contexts) * (s.prompt - 1)
            _generate(model, contexts, s.solution, root)
    return prefilled


def _generate(model, contexts: torch.Tensor, count: int, cache=None) -> torch.Tensor:
    mask = torch.ones_like(contexts)
    return model.generate(contexts, attention_mask=mask, max_new_tokens=count, past_key_values=cache)


def generate_batch(model, s: Schedule, prompts: list[list[int]]) -> int:
    rows = max(s.problems, s.problems * s.sketches * s.solutions)
    longest = s.prompt + max(s.sketches * (s.sketch + 1), s.sketch + s.solution)
    # sized for the work: with the defaults it takes most of the machine's memory first
    paged = ContinuousBatchingConfig(page_size=32, num_blocks=rows * (longest // 32 + 2), max_batch_tokens=2048)
    chains, sketches, prefilled = [list(prompt) for prompt in prompts], [], 0

    def call(contexts: list[list[int]], count: int) -> list[list[int]]:
        config = copy.deepcopy(model.generation_config)
        config.max_new_tokens = count
        out = model.generate_batch(inputs=contexts, generation_config=config, continuous_batching_config=paged)
        ids = [out[name].generated_tokens for name in sorted(out, key=lambda name: int(name.split("_")[-1]))]
        assert len(ids) == len(contexts) and all(len(row) == count for row in ids)
        return ids

    for _ in range(s.sketches):
        prefilled += sum(map(len, chains))
        new = call(chains, s.sketch)
        sketches.append(new)
        chains = [chain + ids + [SEPARATOR] for chain, ids in zip(chains, new, strict=True)]
    if s.solutions:
        contexts = [prompt + new[i] for i, prompt in enumerate(prompts) for new in sketches for _ in range(s.solutions)]
        prefilled += sum(map(len, contexts))
        call(contexts, s.solution)
    return prefilled


# ------------------------------------------------------------------------------------------------------ measuring


def machine_rates(dtype: torch.dtype, device) -> tuple[float, float]:
    """Bytes per second read, and floating-point operations per second of a matrix product, both at their best of 5."""
    data = torch.ones(2**27, dtype=torch.float32, device=device)  # 0.5 GB, beyond every cache
    a = torch.randn(2048, 2048, device=device).to(dtype)
    read = min(_seconds(lambda: data.sum(), device) for _ in range(5))
    product = min(_seconds(lambda: a @ a, device) for _ in range(5))
    return data.nbytes / read, 2 * 2048**3 / product


def limit(model, s: Schedule, bandwidth: float, rate: float) -> float:
    """Seconds below which the schedule cannot be on this machine, everything shared and no overhead at all."""
    config = model.config
    heads, size = config.num_attention_heads, getattr(config, "head_dim", None) or 0
    size = size or config.hidden_size // heads
    weights = sum(p.numel() for p in model.parameters())
    embedding = model.get_input_embeddings().weight.numel()
    if not config.tie_word_embeddings:
        weights -= embedding  # a table that is looked up, not multiplied with
    token = 2 * config.num_hidden_layers * config.num_key_value_heads * size  # numbers cached per token
    item = next(model.parameters()).element_size()

    def forward(tokens: int, drawn: int, keys_read: int, keys_seen: float) -> float:
        """tokens computed, of which `drawn` need logits; distinct keys read; keys seen on average by a token."""
        operations = 2 * tokens * (weights - embedding) + 2 * drawn * embedding
        operations += 4 * tokens * keys_seen * config.num_hidden_layers * heads * size
        return max((weights + keys_read * token) * item / bandwidth, operations / rate)

    seconds = forward(s.problems * s.prompt, s.problems, s.problems * s.prompt, s.prompt / 2)
    history = s.prompt
    for _ in range(s.sketches * s.sketch - 1):
        history += 1 + 1 / s.sketch  # the separators
        seconds += forward(s.problems, s.problems, int(s.problems * history), history)
    if s.solutions:
        rows = s.problems * s.sketches * s.solutions
        own = s.problems * s.prompt
        seconds += forward(rows * s.sketch, rows, own + rows * s.sketch, s.prompt + s.sketch / 2)
        for t in range(1, s.solution):
            seconds += forward(rows, rows, own + rows * (s.sketch + t), s.prompt + s.sketch + t)
    return seconds


def _seconds(call: Callable[[], object], device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


class PeakMemory:
    """Growth of the resident set (of the allocated memory, on a GPU) inside the `with`, in MB."""

    def __enter__(self):
        self.base = self.peak = self._now()
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.over.set()
        self.thread.join()
        self.mb = (max(self.peak, self._now()) - self.base) / 1e6

    def _watch(self):
        while not self.over.wait(0.01):
            self.peak = max(self.peak, self._now())

    @staticmethod
    def _now() -> int:
        if torch.cuda.is_available():
            return torch.cuda.memory_allocated()
        try:
            return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
        except OSError:
            return 0  # not Linux


def measure(model, s: Schedule, options: Options, methods: tuple[str, ...], rates: tuple[float, float]) -> dict:
    """Best seconds of each method, the methods taking turns."""
    prompts = s.prompts(model.config.vocab_size)
    sampler = Sampler(model, [], max_rows=4096)
    calls = {
        "ours": lambda: ours(sampler, s, prompts),
        "reprefill": lambda: reprefill(model, s, prompts),
        "kept cache": lambda: kept_cache(model, s, prompts),
        "batch": lambda: generate_batch(model, s, prompts),
    }
    fresh = dict(seconds=float("inf"), cpu_seconds=float("inf"), peak_mb=0.0)
    results = {name: dict(fresh) for name in methods}
    for _ in range(options.repeats):
        for name in methods:
            result = results[name]
            with PeakMemory() as memory:
                began, cpu_began = time.perf_counter(), time.process_time()
                result["prefill_tokens"] = calls[name]()
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu_began
            result["seconds"] = min(result["seconds"], seconds)
            result["cpu_seconds"] = min(result["cpu_seconds"], cpu_seconds)
            result["peak_mb"] = max(result["peak_mb"], memory.mb)
    least = limit(model, s, *rates)
    for result in results.values():
        result["tokens_per_second"] = s.generated / result["seconds"]
        result["times_ours"] = result["seconds"] / results["ours"]["seconds"]
        result["cpu_times_ours"] = result["cpu_seconds"] / results["ours"]["cpu_seconds"]
        result["of_limit"] = least / result["seconds"]
    return results


# ------------------------------------------------------------------------------------------------------ reporting


def print_table(s: Schedule, results: dict) -> None:
    print(f"\nP={s.problems} K={s.sketches} L_s={s.sketch} M={s.solutions} L_y={s.solution} prompt={s.prompt}")
    print("method       seconds  x ours    CPU s  x ours  tokens/s  prefill  peak MB  of limit")
    for name, r in results.items():
        print(
            f"{name:<11}{r['seconds']:>9.3f}{r['times_ours']:>8.2f}{r['cpu_seconds']:>9.3f}{r['cpu_times_ours']:>8.2f}"
            f"{r['tokens_per_second']:>10.0f}{r['prefill_tokens']:>9}{r['peak_mb']:>9.0f}{r['of_limit']:>10.1%}",
            flush=True,
        )


def growth(model, options: Options, rates) -> dict[str, list]:
    """The schedule with one number varied at a time, ours against reprefill."""
    base, out = options.schedule, {}
    for name, values in dict(sketches=(4, 8, 16, 32), prompt=(32, 128, 512), solutions=(1, 4, 16)).items():
        out[name] = []
        for value in values:
            changed = replace(base, **{name: value})
            if name == "sketches":
                changed = replace(changed, solutions=0)  # the serial stage by itself
            results = measure(model, changed, options, ("ours", "reprefill"), rates)
            print_table(changed, results)
            out[name].append(dict(value=value, results=results))
        if name == "sketches":
            for method in ("ours", "reprefill"):
                each = [f"{1e3 * r['results'][method]['cpu_seconds'] / r['value']:.0f}" for r in out[name]]
                print(f"CPU ms per sketch, {method}, K = {', '.join(map(str, values))}: {', '.join(each)}")
    return out


def draw(curves: dict[str, list], options: Options, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    labels = dict(sketches="K sketches (stage I only)", prompt="prompt tokens", solutions="M solutions per sketch")
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.4))
    for axis, (name, points) in zip(axes, curves.items(), strict=True):
        for method, style in (("ours", "o-"), ("reprefill", "s--")):
            seconds = [point["results"][method]["cpu_seconds"] for point in points]
            axis.plot([point["value"] for point in points], seconds, style, label=method)
        axis.set_xlabel(labels[name])
        axis.set_ylabel("CPU seconds")
        axis.set_ylim(bottom=0)
        axis.legend(frameon=False)
    figure.suptitle(f"{options.model.rstrip('/').split('/')[-1]}, {options.threads} thread(s), {options.dtype}")
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    model = load(options)
    rates = machine_rates(model.dtype, model.device)
    record = dict(
        model=options.model.rstrip("/").split("/")[-1],
        parameters=sum(p.numel() for p in model.parameters()),
        dtype=options.dtype,
        threads=options.threads,
        device=torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        versions=dict(torch=torch.__version__, transformers=transformers.__version__),
        gb_per_second=rates[0] / 1e9,
        gflops=rates[1] / 1e9,
    )
    print(json.dumps(record))
    if options.growth:
        record["growth"] = growth(model, options, rates)
    else:
        record["results"] = measure(model, options.schedule, options, options.methods, rates)
        print_table(options.schedule, record["results"])
    if options.output:
        options.output.write_text(json.dumps(record, indent=1, default=str))
        if options.growth:
            draw(record["growth"], options, options.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
