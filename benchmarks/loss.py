"""Time and extra peak memory of the fused linear divergence, of its peers and of the bare matrix products, in one run.

    python benchmarks/loss.py [--shapes 1024x576x32000 ...] [--grid] [--kind jsd] [--reference without] [--device cuda]

Peers want an environment of their own, with ``pip install -r benchmarks/peers-requirements.txt`` and ``pip install --no-deps
-e .``; those that are missing are printed as not installed.

The floor: one product for each head and two for the student's gradients, into memory that is already there. They can be cut
into blocks of tokens and, since bare products need no normaliser over the vocabulary, of vocabulary rows; several cuts are
timed, and the fastest is the floor. Each candidate computes the mean over tokens and both gradients of the student. These are
first compared with dense fp64 autograd; a wrong one is not timed. Then all take turns within each round, so that a machine
whose speed drifts favours none, and the medians of their ratios to the floor of the same round are printed. With one CPU
thread, seconds are of the process's own clock, so that a busy machine disturbs less.

Extra memory is the peak of what torch's allocator hands out during one run, without the two gradients. On CPU it comes from
the profiler's record of every allocation and release, exact to the byte, with the temporaries inside operators; only the
scratch memory of the BLAS library is missing. On CUDA it is the allocator's own peak, less the gradients.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import psutil
import torch
from loss_peers import LIGER, NAIVE, PEERS, TRL, Gradients, Peer, Problem, dense_gradients
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from megatron_opd.losses import fused_linear_divergence

Shape = tuple[int, int, int]  # N, H, V

SHAPES: tuple[Shape, ...] = ((1024, 576, 32000), (256, 256, 151936), (4096, 192, 49152))
GRID: tuple[Shape, ...] = tuple(itertools.product((256, 1024, 4096), (192, 576, 1024), (32000, 49152, 151936)))
MEMORY_N, MEMORY_V, FEWER_TOKENS = 4096, 49152, 1024  # of the memory aims
REFERENCE_COEF = 0.5
FLOOR, OURS = "GEMM floor", "ours"
# A block of tokens by a block of vocabulary rows; None: all.
CUTS = ((None, None), (512, None), (128, None), (None, 4096), (None, 1024))
MIB = 2**20


class Candidate(NamedTuple):
    name: str
    make: Callable[[], Callable[[], Gradients]]  # allocates what one run after another can use; ImportError: not installed
    estimate: float  # bytes
    obstacle: str = ""  # why it does not fit the problem


@dataclass
class Result:
    obstacle: str
    extra: int = 0  # bytes
    error: float = math.nan  # of the gradients, relative to their norms
    seconds: list[float] = field(default_factory=list)


Results = dict[str, Result]


def main() -> None:
    options = parse_options()
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler announces each start and stop
    torch.set_num_threads(options.threads)
    device = torch.cuda.get_device_name() if options.device == "cuda" else f"{options.threads} CPU threads"
    print(f"{device}, {options.dtype}; {', '.join(peer_versions())}")
    verdicts: list[str] = []
    for shape, reference in itertools.product(options.shapes, options.reference):
        problem = make_problem(options, shape, reference)
        results = compare(problem, options.repeats, options.seconds)
        verdicts += speed_verdicts(problem, results)
        n, h, v = shape
        if (n, v) == (MEMORY_N, MEMORY_V) and not results[OURS].obstacle:
            fewer = make_problem(options, (FEWER_TOKENS, h, v), reference)
            verdicts += memory_verdicts(problem, results, first_run(our_candidate(fewer), fewer)[1])
    if options.kind == "reverse_kl":
        print("\nAims, set for reverse KL on CPU:", *verdicts, sep="\n  ")


def make_problem(options: argparse.Namespace, shape: Shape, reference: bool) -> Problem:
    """Random hidden states and heads; logits of standard deviation 2, those of the models independent."""
    n, h, v = shape
    tensor = partial(torch.randn, device=options.device, generator=torch.Generator(options.device).manual_seed(0))
    dtype, teacher_h = getattr(torch, options.dtype), options.teacher_hidden or h
    return Problem(
        hidden=tensor(n, h).to(dtype).requires_grad_(),
        weight=(tensor(v, h) * (2 / h**0.5)).to(dtype).requires_grad_(),
        teacher_hidden=tensor(n, teacher_h).to(dtype),
        teacher_weight=(tensor(v, teacher_h) * (2 / teacher_h**0.5)).to(dtype),
        reference_hidden=tensor(n, h).to(dtype) if reference else None,
        reference_weight=(tensor(v, h) * (2 / h**0.5)).to(dtype) if reference else None,
        reference_coef=REFERENCE_COEF if reference else 0.0,
        kind=options.kind,
        beta=0.5,
    )


def compare(problem: Problem, repeats: int, budget: float) -> Results:
    """Check, measure and print all candidates: two rounds, and up to ``repeats`` that begin within ``budget`` seconds."""
    floor, cut = fastest_floor(problem)
    candidates = [floor, our_candidate(problem), *peer_candidates(problem)]
    results = check(candidates, problem)
    runs = {candidate.name: candidate.make() for candidate in candidates if not results[candidate.name].obstacle}
    start = time.perf_counter()
    for round_ in range(repeats):
        if round_ >= 2 and time.perf_counter() - start > budget:
            break
        for name, run in runs.items():
            results[name].seconds.append(seconds(run, problem))
    print_table(problem, cut, results)
    return results


def check(candidates: list[Candidate], problem: Problem) -> Results:
    """Everything but the times."""
    expected = dense_gradients(problem)
    tolerance = 1e-4 if problem.hidden.dtype == torch.float32 else 5e-2
    results: Results = {}
    for candidate in candidates:
        results[candidate.name] = result = Result(candidate.obstacle or obstacle(candidate, problem))
        if result.obstacle:
            continue
        gradients, result.extra = first_run(candidate, problem)
        if candidate.name != FLOOR:
            result.error = max(relative_error(*pair) for pair in zip(gradients, expected, strict=True))
            result.obstacle = "" if result.error <= tolerance else f"WRONG: relative gradient error {result.error:.1e}"
        del gradients
    return results


def print_table(problem: Problem, cut: str, results: Results) -> None:
    rounds = len(results[FLOOR].seconds)
    print(f"\n{title(problem)}; medians of {rounds} rounds; the floor's products go by {cut}")
    print(f"  {'':24} {'seconds':>8} {'x floor':>8} {'extra MiB':>10} {'gradient error':>15}")
    for name, result in results.items():
        if result.obstacle:
            print(f"  {name:24} {result.obstacle}")
        else:
            ratio, error = ratio_of(result, results[FLOOR]), "" if math.isnan(result.error) else f"{result.error:.1e}"
            print(f"  {name:24} {statistics.median(result.seconds):8.3f} {ratio:8.2f} {result.extra / MIB:10.1f} {error:>15}")
    sys.stdout.flush()


def title(problem: Problem) -> str:
    (n, h), v, teacher_h = problem.hidden.shape, len(problem.weight), problem.teacher_hidden.shape[1]
    reference = "without" if problem.reference_hidden is None else "with"
    return f"N={n}, H={h} (teacher {teacher_h}), V={v}, {problem.kind}, {reference} reference"


def ratio_of(result: Result, base: Result) -> float:
    """The median over the rounds."""
    return statistics.median(mine / other for mine, other in zip(result.seconds, base.seconds, strict=True))


def speed_verdicts(problem: Problem, results: Results) -> list[str]:
    pairs = [(OURS, FLOOR, "<=", 1.25)]
    if problem.reference_hidden is None:
        pairs += [(LIGER, OURS, ">=", 1.4), (TRL, OURS, ">=", 2.5)]
    return [speed_verdict(problem, results, *pair) for pair in pairs]


def speed_verdict(problem: Problem, results: Results, name: str, base: str, relation: str, aim: float) -> str:
    what = f"seconds, {name} / {base}, {title(problem)}"
    for candidate in (name, base):
        if results[candidate].obstacle:
            return f"---- {what}: {candidate} {results[candidate].obstacle}"
    return verdict(what, ratio_of(results[name], results[base]), relation, aim)


def memory_verdicts(problem: Problem, results: Results, fewer_tokens: int) -> list[str]:
    """``fewer_tokens``: the extra bytes of ours at ``FEWER_TOKENS`` tokens."""
    ours, naive = results[OURS], results[NAIVE]
    what = f"extra memory, ours / naive, {title(problem)}"
    return [
        verdict(f"extra memory, ours / ours at N={FEWER_TOKENS}, {title(problem)}", ours.extra / fewer_tokens, "<=", 1.05),
        f"---- {what}: {naive.obstacle}" if naive.obstacle else verdict(what, ours.extra / naive.extra, "<=", 0.05),
    ]


def verdict(what: str, value: float, relation: str, aim: float) -> str:
    met = value <= aim if relation == "<=" else value >= aim
    return f"{'PASS' if met else 'MISS'} {what}: {value:.3f} (aim {relation} {aim})"


# The candidates


def our_candidate(problem: Problem) -> Candidate:
    n = len(problem.hidden)
    token_weights = torch.full((n,), 1 / n, device=problem.hidden.device)

    def loss() -> Tensor:
        return fused_linear_divergence(
            problem.hidden,
            problem.weight,
            problem.teacher_hidden,
            problem.teacher_weight,
            token_weights,
            kind=problem.kind,
            beta=problem.beta,
            reference_hidden=problem.reference_hidden,
            reference_weight=problem.reference_weight,
            reference_coef=problem.reference_coef,
        )

    return Candidate(OURS, lambda: autograd_run(problem, loss), 0)


def peer_candidates(problem: Problem) -> Iterator[Candidate]:
    for peer in PEERS:
        obstacle = "" if problem.kind in peer.kinds else f"n/a: has no {problem.kind}"
        if problem.reference_hidden is not None and not peer.has_reference:
            obstacle = "n/a: has no reference term"
        yield Candidate(peer.name, partial(peer_run, problem, peer), peer.estimate(problem), obstacle)


def peer_run(problem: Problem, peer: Peer) -> Callable[[], Gradients]:
    return autograd_run(problem, peer.make(problem))


def autograd_run(problem: Problem, loss: Callable[[], Tensor]) -> Callable[[], Gradients]:
    def run() -> Gradients:
        loss().backward()
        assert problem.hidden.grad is not None and problem.weight.grad is not None
        return problem.hidden.grad, problem.weight.grad

    return run


def fastest_floor(problem: Problem) -> tuple[Candidate, str]:
    """The bare products in the fastest of ``CUTS``, and its name."""
    n, v = len(problem.hidden), len(problem.weight)
    times: dict[tuple[int, int], float] = {}
    for cut in CUTS:
        tokens, rows = min(cut[0] or n, n), min(cut[1] or v, v)
        if (tokens, rows) not in times and 4 * tokens * rows < free_bytes(problem) / 4:
            times[tokens, rows] = seconds(make_floor(problem, tokens, rows), problem)
    tokens, rows = min(times, key=times.__getitem__)
    name = f"blocks of {'all' if tokens == n else tokens} tokens x {'all' if rows == v else rows} vocabulary rows"
    return Candidate(FLOOR, partial(make_floor, problem, tokens, rows), 4 * tokens * rows), name


def make_floor(problem: Problem, tokens: int, rows: int) -> Callable[[], Gradients]:
    """The logits of the student stand in for their gradient."""
    hidden, weight = problem.hidden.detach(), problem.weight.detach()
    (n, _), v = hidden.shape, len(weight)
    heads = [(problem.teacher_hidden, problem.teacher_weight), (hidden, weight)]  # the student's last: its logits stay
    if problem.reference_hidden is not None and problem.reference_weight is not None:
        heads.insert(0, (problem.reference_hidden, problem.reference_weight))
    memory = hidden.new_zeros(tokens * rows)
    hidden_gradient, weight_gradient = torch.zeros_like(hidden), torch.zeros_like(weight)

    def run() -> Gradients:
        for t, r in itertools.product(range(0, n, tokens), range(0, v, rows)):
            block, block_rows = slice(t, min(t + tokens, n)), slice(r, min(r + rows, v))
            shape = block.stop - t, block_rows.stop - r
            logits = memory[: math.prod(shape)].view(shape)
            for head_hidden, head_weight in heads:
                torch.mm(head_hidden[block], head_weight[block_rows].T, out=logits)
            # beta 0: the first block overwrites.
            hidden_gradient[block].addmm_(logits, weight[block_rows], beta=int(r > 0))
            weight_gradient[block_rows].addmm_(logits.T, hidden[block], beta=int(t > 0))
        return hidden_gradient, weight_gradient

    return run


# Measurements


def relative_error(gradient: Tensor, expected: Tensor) -> float:
    error = float((gradient - expected).norm() / expected.norm())
    return error if math.isfinite(error) else math.inf  # max() would pass over a NaN


def obstacle(candidate: Candidate, problem: Problem) -> str:
    """Why it cannot run here; "" where it can."""
    if candidate.estimate > 0.8 * free_bytes(problem):
        return f"does not fit: wants about {candidate.estimate / 2**30:.1f} GiB of {free_bytes(problem) / 2**30:.1f} GiB free"
    try:
        candidate.make()
    except ImportError as error:
        return f"not installed: {str(error).strip().splitlines()[0]}"
    return ""


def free_bytes(problem: Problem) -> int:
    if not problem.hidden.is_cuda:
        return psutil.virtual_memory().available
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]


def seconds(run: Callable[[], Gradients], problem: Problem) -> float:
    # The process's own clock does not run while others have the core, but would add up several threads.
    clock = time.process_time if not problem.hidden.is_cuda and torch.get_num_threads() == 1 else time.perf_counter
    problem.hidden.grad = problem.weight.grad = None
    synchronize(problem)
    start = clock()
    run()
    synchronize(problem)
    return clock() - start


def synchronize(problem: Problem) -> None:
    if problem.hidden.is_cuda:
        torch.cuda.synchronize()


def first_run(candidate: Candidate, problem: Problem) -> tuple[Gradients, int]:
    """The gradients, and the extra peak memory in bytes, that of what ``make`` allocates included."""
    problem.hidden.grad = problem.weight.grad = None
    if problem.hidden.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        gradients = candidate.make()()
        extra = torch.cuda.max_memory_allocated() - before - sum(gradient.nbytes for gradient in gradients)
        return gradients, extra
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        gradients = candidate.make()()
    return gradients, peak_bytes(record, {gradient.untyped_storage().data_ptr() for gradient in gradients})


def peak_bytes(record: profile, kept: set[int]) -> int:
    """Of all that lived at once, without what lies at the addresses ``kept`` in the end."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        record.export_chrome_trace(str(path))
        events = [event for event in json.loads(path.read_text())["traceEvents"] if event.get("name") == "[memory]"]
    changes = [(event["args"]["Addr"], event["args"]["Bytes"]) for event in sorted(events, key=lambda event: event["ts"])]
    last = {address: index for index, (address, _) in enumerate(changes)}  # an address is used again and again
    live: dict[int, int] = {}
    peak = total = 0
    for index, (address, size) in enumerate(changes):
        if size > 0 and not (address in kept and last[address] == index):
            live[address] = size
            total += size
            peak = max(peak, total)
        elif size < 0:
            total -= live.pop(address, 0)  # 0: it was there before
    return peak


def peer_versions() -> Iterator[str]:
    for package in sorted({peer.package for peer in PEERS}):
        try:
            yield f"{package} {metadata.version(package)}"
        except metadata.PackageNotFoundError:
            yield f"no {package}"


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", type=parse_shape, nargs="+", default=SHAPES, help="NxHxV each")
    parser.add_argument("--grid", dest="shapes", action="store_const", const=GRID, help=f"{len(GRID)} shapes: hours on CPU")
    parser.add_argument("--kind", default="reverse_kl", choices=["reverse_kl", "forward_kl", "jsd"])
    parser.add_argument("--reference", default="both", choices=["without", "with", "both"], help="the reference term")
    parser.add_argument("--teacher-hidden", type=int, help="the teacher's hidden size (default: the student's)")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--repeats", type=int, default=5, help="rounds")
    parser.add_argument("--seconds", type=float, default=120, help="per table, after which no third or later round begins")
    options = parser.parse_args()
    options.reference = {"without": (False,), "with": (True,), "both": (False, True)}[options.reference]
    return options


def parse_shape(text: str) -> Shape:
    try:
        n, h, v = (int(size) for size in text.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: give NxHxV, such as 1024x576x32000") from None
    return n, h, v


if __name__ == "__main__":
    main()
