"""kernels.py against its physical limits and its peers, on the same tensors, in one run.

    python benchmarks/kernels.py --figure kernels.png          # one GPU, under 8 minutes
    python benchmarks/kernels.py --cpu --figure kernels.png    # the torch paths: time and peak memory

Every case runs forward and backward of  sum over tokens of (-A log p - 0.01 H + 0.05 KL) / N,  as far as it knows the
terms. The limits are measured in the same run: the bandwidth of a copy and the rate of a matrix product. The limit of
a case is the time that its logits need at that bandwidth (rows), or its products at that rate (heads): 6NHV FLOPs, and
2NHV for a reference. Times are the fastest of the repeats. The error is that of d loss / d logits or d loss / d hidden
of 32 tokens against float64, relative in norm. On a CPU every case has a process of its own, whose resident memory
gives the peak, one thread, and CPU time for a clock, which a busy machine blurs less; torch.compile is left out there.
"""

import argparse
import importlib.metadata
import json
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

sys.path[0] = str(Path(__file__).parent.parent)  # this file has the name of the module that it measures
import kernels  # noqa: E402

ENTROPY, KL, LENGTH = 0.01, 0.05, 128  # coefficients, tokens of a sequence (Liger's GRPO has an advantage a sequence)
PROBE = slice(0, 32)  # the tokens whose gradients are checked


class Size(NamedTuple):
    part: str  # rows | head
    tokens: int
    width: int
    vocab: int
    chunk: int | None = None


class Case(NamedTuple):
    name: str
    run: Callable[["Inputs"], Tensor]  # the loss, its graph attached
    terms: tuple[str, ...] = ("logp", "entropy")
    gpu_only: bool = False


class Inputs(NamedTuple):
    size: Size
    hidden: Tensor  # [N, H], or the logits [N, V] of the row cases
    weight: Tensor | None
    targets: Tensor
    advantage: Tensor  # [N], equal within a sequence
    ref_hidden: Tensor | None  # the reference's, as above
    ref_weight: Tensor | None


class Result(NamedTuple):
    part: str
    name: str
    terms: str
    forward: float  # seconds
    backward: float
    limit: float
    peak: int  # bytes on top of the inputs
    error: float


# ------------------------------------------------------------------------------------------------------- the loss


def loss_sum(stats: kernels.TokenStats, advantage: Tensor, scale: Tensor) -> Tensor:
    losses = -advantage * stats.logp - ENTROPY * stats.entropy
    return ((losses if stats.kl is None else losses + KL * stats.kl) * scale).sum()


def loss_of(inputs: Inputs, logp: Tensor, entropy: Tensor, kl: Tensor | None = None, *_) -> Tensor:
    return loss_sum(kernels.TokenStats(logp, entropy, kl, None), *extras_of(inputs))


def extras_of(inputs: Inputs) -> list[Tensor]:
    return [inputs.advantage, torch.full_like(inputs.advantage, 1 / len(inputs.targets))]


def plain_stats(logits: Tensor, targets: Tensor, ref_logits: Tensor | None) -> kernels.TokenStats:
    """What everybody writes first."""
    logp = logits.float().log_softmax(-1)  # [N, V]
    p = logp.exp()
    chosen, entropy = logp.gather(1, targets[:, None])[:, 0], -(p * logp).sum(-1)
    if ref_logits is None:
        return kernels.TokenStats(chosen, entropy, None, None)
    with torch.no_grad():
        ref_logp = ref_logits.float().log_softmax(-1)
    kl = (p * (logp - ref_logp)).sum(-1)
    return kernels.TokenStats(chosen, entropy, kl, ref_logp.gather(1, targets[:, None])[:, 0])


def plain_head(hidden, weight, targets, ref_hidden, ref_weight) -> kernels.TokenStats:
    with torch.no_grad():
        ref_logits = None if ref_hidden is None else ref_hidden @ ref_weight.t()
    return plain_stats(hidden @ weight.t(), targets, ref_logits)


# ------------------------------------------------------------------------------------------------------ the cases


def row_cases() -> list[Case]:
    def ours(impl):
        return lambda x: loss_of(x, *kernels.token_stats(x.hidden, x.targets, x.ref_hidden, impl=impl))

    def plain(function):
        return lambda x: loss_of(x, *function(x.hidden, x.targets, x.ref_hidden))

    def trl(x):
        from trl.trainer.utils import selective_log_softmax_and_entropy

        return loss_of(x, *selective_log_softmax_and_entropy(x.hidden, x.targets))

    def liger(x):
        from liger_kernel.ops.grpo_loss import GrpoLossFunction

        b = len(x.targets) // LENGTH  # it drops the last position of every sequence: one more is put there
        logits = x.hidden.view(b, LENGTH, -1)
        logits = torch.cat([logits, logits[:, :1].detach()], 1)
        mask = torch.ones(b, LENGTH, device=logits.device)
        out = GrpoLossFunction.apply(logits, None, None, x.targets.view(b, LENGTH), x.advantage[::LENGTH].contiguous(),
                                     mask, 1.0, 0.0, 0.2, 0.2, True, "dapo")
        return out[0]

    both = [("torch", False), ("triton", True)]
    return [
        Case("plain torch", plain(plain_stats)),
        Case("torch.compile", plain(torch.compile(plain_stats)), gpu_only=True),
        *(Case(f"ours, {impl}", ours(impl), gpu_only=gpu) for impl, gpu in both),
        Case("TRL", trl),
        Case("Liger GRPO, Triton", liger, ("logp",), gpu_only=True),
        Case("plain torch", plain(plain_stats), ("logp", "entropy", "kl")),
        Case("torch.compile", plain(torch.compile(plain_stats)), ("logp", "entropy", "kl"), gpu_only=True),
        *(Case(f"ours, {impl}", ours(impl), ("logp", "entropy", "kl"), gpu_only=gpu) for impl, gpu in both),
    ]


def head_cases() -> list[Case]:
    def arguments(x):
        return x.hidden, x.weight, x.targets

    def plain(function):
        return lambda x: loss_of(x, *function(*arguments(x), x.ref_hidden, x.ref_weight))

    def loss(impl):
        def run(x):
            options = {"chunk_size": x.size.chunk, "impl": impl}
            ref = x.ref_hidden, x.ref_weight
            return kernels.linear_policy_loss(*arguments(x), loss_sum, extras_of(x), *ref, **options)[0]

        return run

    def stats(impl):
        def run(x):
            options = {"chunk_size": x.size.chunk, "impl": impl}
            return loss_of(x, *kernels.linear_token_stats(*arguments(x), x.ref_hidden, x.ref_weight, **options))

        return run

    def trl(x):
        from trl.kernels import ChunkedLogProbFunction as chunked

        columns = 32768  # what its trainers use
        logp, entropy, *_ = chunked.apply(x.hidden, x.weight, None, x.targets, 1.0, columns, None, 1.0, ("entropy",))
        return loss_of(x, logp, entropy)

    def liger_entropy(x):
        from liger_kernel.ops import fused_linear_scaled_cross_entropy as fused

        function = fused.LigerFusedLinearScaledCrossEntropyFunction
        nll, entropy = function.apply(*arguments(x), 1.0, -100, 1, True)
        return loss_of(x, -nll, entropy)

    def liger_grpo(x):
        from liger_kernel.chunked_loss.grpo_loss import LigerFusedLinearGRPOLoss

        b = len(x.targets) // LENGTH
        chunk = max(1, (x.size.chunk or 1024) // LENGTH)
        module = LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False, compiled=x.hidden.is_cuda, chunk_size=chunk)
        mask = torch.ones(b, LENGTH, device=x.hidden.device)
        return module(x.hidden.view(b, LENGTH, -1), x.weight, x.targets.view(b, LENGTH), mask, x.advantage[::LENGTH])[0]

    both, everything = [("torch", False), ("triton", True)], ("logp", "entropy", "kl")
    return [
        Case("plain torch", plain(plain_head)),
        Case("torch.compile", plain(torch.compile(plain_head)), gpu_only=True),
        *(Case(f"ours, policy loss, {impl}", loss(impl), gpu_only=gpu) for impl, gpu in both),
        *(Case(f"ours, token stats, {impl}", stats(impl), gpu_only=gpu) for impl, gpu in both),
        Case("TRL chunked", trl),
        Case("Liger scaled CE", liger_entropy),
        Case("Liger GRPO", liger_grpo, ("logp",)),
        Case("plain torch", plain(plain_head), everything),
        Case("torch.compile", plain(torch.compile(plain_head)), everything, gpu_only=True),
        *(Case(f"ours, policy loss, {impl}", loss(impl), everything, gpu_only=gpu) for impl, gpu in both),
        *(Case(f"ours, token stats, {impl}", stats(impl), everything, gpu_only=gpu) for impl, gpu in both),
    ]


def cases_of(size: Size, device: str) -> list[Case]:
    cases = row_cases() if size.part == "rows" else head_cases()
    return [case for case in cases if device == "cuda" or not case.gpu_only]


# ---------------------------------------------------------------------------------------------------- measurement


def make_inputs(size: Size, terms: tuple[str, ...], device: str) -> Inputs:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape, scale=1.0):
        return torch.randn(*shape, generator=generator, device=device).mul_(scale).to(dtype)

    ref = "kl" in terms
    targets = torch.randint(0, size.vocab, (size.tokens,), generator=generator, device=device)
    advantage = torch.randn(size.tokens // LENGTH, generator=generator, device=device).repeat_interleave(LENGTH)
    if size.part == "rows":
        logits, ref_logits = (normal(size.tokens, size.vocab, scale=2.0) if wanted else None for wanted in (True, ref))
        return Inputs(size, logits.requires_grad_(), None, targets, advantage, ref_logits, None)
    hidden, weight = normal(size.tokens, size.width), normal(size.vocab, size.width, scale=2 / size.width**0.5)
    ref_hidden, ref_weight = (hidden + 0.1 * normal(*hidden.shape), weight.clone()) if ref else (None, None)
    return Inputs(size, hidden.requires_grad_(), weight.requires_grad_(), targets, advantage, ref_hidden, ref_weight)


def expected_gradient(inputs: Inputs, terms: tuple[str, ...]) -> Tensor:
    """d loss / d hidden (or logits) of the probed tokens in float64, with the terms that the case knows."""
    leaf = inputs.hidden.detach()[PROBE].double().requires_grad_()
    head = (lambda h, w: h) if inputs.weight is None else lambda h, w: h.double() @ w.detach().double().t()
    logp = head(leaf, inputs.weight).log_softmax(-1)
    losses = -inputs.advantage[PROBE].double() * logp.gather(1, inputs.targets[PROBE, None])[:, 0]
    if "entropy" in terms:
        losses = losses + ENTROPY * (logp.exp() * logp).sum(-1)
    if "kl" in terms:
        ref_logp = head(inputs.ref_hidden[PROBE].double(), inputs.ref_weight).log_softmax(-1)
        losses = losses + KL * (logp.exp() * (logp - ref_logp)).sum(-1)
    (losses.sum() / len(inputs.targets)).backward()
    return leaf.grad


def timed(function: Callable, device: str) -> tuple[float, Tensor]:
    if device == "cpu":
        start = time.process_time()
        out = function()
        return time.process_time() - start, out
    torch.cuda.synchronize()
    start = time.perf_counter()
    out = function()
    torch.cuda.synchronize()
    return time.perf_counter() - start, out


def start_of_peak(device: str) -> int:
    """Bytes in use now; the peak is counted from here on. On a CPU the kernel's own books are read (Linux)."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def peak_memory(device: str) -> int:
    return torch.cuda.max_memory_allocated() if device == "cuda" else resident("VmHWM")


def resident(field: str) -> int:
    return 1024 * int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text()).group(1))


def measure(case: Case, size: Size, device: str, repeats: int) -> dict:
    """Seconds of forward and of backward, peak bytes, error. The first of the runs warms up and is not timed."""
    inputs = make_inputs(size, case.terms, device)
    if device == "cpu":  # imports and thread pools are no memory of the case
        small = make_inputs(size._replace(tokens=LENGTH, width=16, vocab=500), case.terms, device)
        case.run(small).backward()
    before, forward, backward = start_of_peak(device), [], []
    for _ in range(repeats + 1):
        inputs.hidden.grad = None
        if inputs.weight is not None:
            inputs.weight.grad = None
        seconds, loss = timed(lambda: case.run(inputs), device)
        forward.append(seconds)
        backward.append(timed(loss.backward, device)[0])
        del loss
    peak, expected = peak_memory(device) - before, expected_gradient(inputs, case.terms)
    return {
        "forward": min(forward[1:]),
        "backward": min(backward[1:]),
        "peak": peak,
        "error": ((inputs.hidden.grad[PROBE].double() - expected).norm() / expected.norm()).item(),
    }


def measure_apart(index: int, size: Size, arguments: argparse.Namespace) -> dict:
    """The same in a process of its own."""
    options = ["--threads", str(arguments.threads), "--repeats", str(arguments.repeats)]
    command = [sys.executable, __file__, "--cpu", "--case", json.dumps([index, size]), *options]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    return json.loads(done.stdout.splitlines()[-1])


def measure_limits(device: str) -> tuple[float, float]:
    """Bytes per second of a copy (read and write), FLOP/s of a matrix product."""
    gpu = device == "cuda"
    source = torch.empty(2**31 if gpu else 2**27, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    side, dtype = (8192, torch.bfloat16) if gpu else (2048, torch.float32)
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    copy = min(timed(lambda: target.copy_(source), device)[0] for _ in range(20))
    product = min(timed(lambda: a @ b, device)[0] for _ in range(20 if gpu else 5))
    return 2 * source.numel() / copy, 2 * side**3 / product


def limit_seconds(size: Size, terms: tuple[str, ...], bandwidth: float, rate: float, device: str) -> float:
    matrices = 2 if "kl" in terms else 1
    if size.part == "rows":  # forward reads, backward reads and writes
        return size.tokens * size.vocab * (2 if device == "cuda" else 4) * (2 * matrices + 1) / bandwidth
    return (4 + 2 * matrices) * size.tokens * size.width * size.vocab / rate


# ----------------------------------------------------------------------------------------------------------- report


def sizes_of(device: str, quick: bool) -> list[Size]:
    if quick:
        return [Size("rows", 256, 0, 1000), Size("head", 256, 32, 1000, 128)]
    if device == "cuda":
        heads = [Size("head", 8192, width, 151_936) for width in (2048, 4096)]
        return [Size("rows", 8192, 0, 151_936), *heads, Size("head", 4096, 4096, 128_256)]
    return [Size("rows", 1024, 0, 49_152), Size("head", 1024, 128, 3400), Size("head", 4096, 576, 49_152, 512)]


def title(size: Size) -> str:
    shape = f"N={size.tokens}" + (f" H={size.width}" if size.width else "") + f" V={size.vocab}"
    return f"{size.part} {shape}" + (f" chunk={size.chunk}" if size.chunk else "")


def run_all(arguments: argparse.Namespace, device: str, bandwidth: float, rate: float) -> list[Result]:
    results = []
    for size in sizes_of(device, arguments.quick):
        for index, case in enumerate(cases_of(size, device)):
            if not re.search(arguments.only, f"{title(size)} {case.name} {'+'.join(case.terms)}"):
                continue
            try:
                if device == "cuda":
                    torch.cuda.empty_cache()
                    numbers = measure(case, size, device, arguments.repeats)
                else:
                    numbers = measure_apart(index, size, arguments)
            except (ImportError, RuntimeError, ValueError, torch.cuda.OutOfMemoryError) as error:
                print(f"{title(size)}: {case.name} left out: {str(error).splitlines()[0][:150]}", file=sys.stderr)
                continue
            limit = limit_seconds(size, case.terms, bandwidth, rate, device)
            results.append(Result(title(size), case.name, "+".join(case.terms), limit=limit, **numbers))
            print(table_line(results[-1]), flush=True)
    return results


HEADER = """| case | | terms | forward ms | backward ms | sum ms | of the limit | peak MiB | error |
|---|---|---|---|---|---|---|---|---|"""


def table_line(r: Result) -> str:
    total = r.forward + r.backward
    times = f"{1e3 * r.forward:.1f} | {1e3 * r.backward:.1f} | {1e3 * total:.1f} | {100 * r.limit / total:.0f} %"
    return f"| {r.part} | {r.name} | {r.terms} | {times} | {r.peak / 2**20:.0f} | {r.error:.1e} |"


def ratios(results: list[Result]) -> list[str]:
    """Ours over the plain path, per size and terms."""
    lines = []
    for plain in (r for r in results if r.name == "plain torch"):
        for r in results:
            if (r.part, r.terms) == (plain.part, plain.terms) and r.name.startswith("ours"):
                seconds = (r.forward + r.backward) / (plain.forward + plain.backward)
                memory = r.peak / max(plain.peak, 1)
                lines.append(f"{r.part}, {r.terms}: {r.name} / plain torch: time {seconds:.2f}, memory {memory:.3f}")
    return lines


def hardware(device: str, threads: int) -> str:
    name = torch.cuda.get_device_name() if device == "cuda" else f"{cpu_name()}, threads: {threads}"
    versions = []
    for package in ("torch", "triton", "trl", "liger-kernel"):
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"{package} not installed")
    return f"{name}; python {platform.python_version()}, {', '.join(versions)}"


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def draw(results: list[Result], heading: str, path: str) -> None:
    """Left the share of the physical limit (the roof is 100 %), right the peak memory; a row of panels per size."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    parts = list(dict.fromkeys(r.part for r in results))
    heights = [sum(r.part == part for r in results) for part in parts]
    figure, axes = plt.subplots(
        len(parts), 2, figsize=(12, 0.32 * sum(heights) + 1.1 * len(parts) + 0.6), squeeze=False,
        gridspec_kw={"height_ratios": heights}, constrained_layout=True)
    for (left, right), part in zip(axes, parts, strict=True):
        chosen = [r for r in results if r.part == part][::-1]
        labels = [f"{r.name} ({r.terms})" for r in chosen]
        colours = ["tab:blue" if r.name.startswith("ours") else "lightgrey" for r in chosen]
        shares = [100 * r.limit / (r.forward + r.backward) for r in chosen]
        left.bar_label(left.barh(labels, shares, color=colours), fmt="%.0f %%", fontsize=7, padding=2)
        left.axvline(100, color="tab:red", lw=1)
        left.set(title=f"{part}: share of the measured limit", xlim=(0, max(110, 1.1 * max(shares))))
        memory = [r.peak / 2**20 for r in chosen]
        right.bar_label(right.barh(labels, memory, color=colours), fmt="%.0f", fontsize=7, padding=2)
        right.set(title="peak memory beyond the inputs, MiB", yticklabels=[], xlim=(0, 1.12 * max(memory)))
        for axis in (left, right):
            axis.tick_params(labelsize=7)
            axis.title.set_fontsize(8)
    figure.suptitle(heading, fontsize=8)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cpu", action="store_true", help="compare the torch paths on the CPU, even if there is a GPU")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does everything run?")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of a case, after one that warms up")
    parser.add_argument("--threads", type=int, default=1, help="threads of the CPU mode; CPU time is their sum")
    parser.add_argument("--only", default="", help="regular expression: the cases to run, as '<size> <name> <terms>'")
    parser.add_argument("--figure", help="where to write the picture (.png)")
    parser.add_argument("--json", help="where to write the results")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if not arguments.cpu and not torch.cuda.is_available():
        sys.exit("benchmarks/kernels.py: no CUDA device here: use --cpu to compare the torch paths")
    device = "cpu" if arguments.cpu else "cuda"
    if arguments.case:
        index, size = json.loads(arguments.case)
        print(json.dumps(measure(cases_of(Size(*size), device)[index], Size(*size), device, arguments.repeats)))
        return
    started, (bandwidth, rate) = time.perf_counter(), measure_limits(device)
    limits = f"copy {bandwidth / 1e9:.1f} GB/s, matrix product {rate / 1e12:.2f} TFLOP/s"
    heading = f"{hardware(device, arguments.threads)}\n{limits}"
    print(heading, HEADER, sep="\n", flush=True)
    results = run_all(arguments, device, bandwidth, rate)
    print("", *ratios(results), f"{time.perf_counter() - started:.0f} s in all", sep="\n")
    if arguments.json:
        rows = [r._asdict() for r in results]
        Path(arguments.json).write_text(json.dumps({"heading": heading, "results": rows}, indent=1))
    if arguments.figure:
        draw(results, heading, arguments.figure)


if __name__ == "__main__":
    main()
