"""Profile one hypergradient: where the time goes, phase by phase. Runs on the CPU where there is no GPU, and says so.

    python -m bench.profile_gpu --problem lenet --engine linearized --terms 20

writes to out/profile a Chrome trace (chrome://tracing, ui.perfetto.dev), a summary (also printed) and the memory
timeline (CSV and PNG). The phases are NVTX ranges too, so that Nvidia's profilers can be pointed at them; torch's
profiler must then be off (`--ranges-only`), since only one tool at a time can listen to the device:

    # Timeline of one call: kernels, launches and gaps under the named ranges.
    nsys profile --trace=cuda,nvtx,cublas,cudnn --capture-range=nvtx --nvtx-capture=hypergradient \
        --env-var=NSYS_NVTX_PROFILER_REGISTER_ONLY=0 --output=hypergradient \
        python -m bench.profile_gpu --problem lenet --ranges-only
    nsys stats --report nvtx_gpu_proj_sum,cuda_gpu_kern_sum,cuda_api_sum hypergradient.nsys-rep

    # Everything about the fused step: bandwidth, occupancy, sectors per request. By the kernel's name (step_kernel;
    # with Triton that of the op, such as neumann_step), since a range holds only what its own thread launches.
    ncu --kernel-name regex:step_kernel --launch-skip 6 --launch-count 3 --set full --export step \
        python -m bench.profile_gpu --problem mlp --engine linearized --ranges-only

    # Which kernels a term is made of, and what bounds each. Not of eager's terms: autograd has a thread of its own.
    ncu --nvtx --nvtx-include "term 2/" --set roofline --export term \
        python -m bench.profile_gpu --problem lenet --engine linearized --ranges-only
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

import hvp_engine as hvp
from bench import results
from bench.interleave import synchronize
from bench.methods import solver_of
from bench.phases import GRADIENT, LINEARIZE, MIXED, STEP, TERM, WHOLE, PhasedEngine, PhasedSolver, Phases
from bench.problems import PROBLEMS, Problem, build
from bench.report import duration, grid, size_of
from bench.steps import WORDS
from hvp_engine import engines

_WARM_UP = 3


def phased_call(problem: Problem, engine_name: str, terms: int, phases: Phases) -> Callable[[], None]:
    """One hypergradient with its phases marked."""
    engine = PhasedEngine(engines.create(engine_name), phases)
    hypergradient = hvp.Hypergradient(
        problem.train_loss, problem.val_loss, solver=PhasedSolver(solver_of(problem, terms), phases), engine=engine
    )

    def call() -> None:
        phases.forget()
        with engine.hypergradient():
            hypergradient(problem.weights, problem.hyper, problem.train, problem.val)
            synchronize(problem.device)

    return call


def profiled(call: Callable[[], None], device: torch.device) -> profile:
    """The profile of one call, after some that build and warm what is built once."""
    for _ in range(_WARM_UP):
        call()
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with profile(activities=activities, profile_memory=True) as found:
        call()
    return found


def phase_of(name: str) -> str | None:
    """The phase that an event opens, without a term's number."""
    plain = TERM if name.startswith(f"{TERM} ") else name
    return plain if plain in (WHOLE, GRADIENT, LINEARIZE, TERM, STEP, MIXED) else None


class Summary:
    """What a profile says, by phase."""

    def __init__(self, found: profile, problem: Problem, phases: Phases):
        self.profile, self.problem = found, problem
        self.spans = phases.seconds()
        self.on_gpu = problem.device.type == "cuda"
        events = list(found.events() or [])
        self.ranges = [e for e in events if e.device_type == DeviceType.CPU and phase_of(e.name) and not e.is_async]
        self.kernels = [e for e in events if e.device_type == DeviceType.CUDA and phase_of(e.name) is None]
        if self.on_gpu:
            names = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx", "cudaGraphLaunch")
            self.launches = [e for e in events if e.name in names]
        else:
            self.launches = [e for e in events if e.name.startswith(("aten::", "hvp_engine::")) and not e.cpu_children]

    def seconds(self, phase: str) -> list[float]:
        """How long each range of a phase took, on the device that computes."""
        return [seconds for name, seconds in self.spans if phase_of(name) == phase]

    def launches_per(self, phase: str) -> float:
        """Kernel launches (on a CPU: operators) inside a range of a phase, on average."""
        spans = [(e.time_range.start, e.time_range.end) for e in self.ranges if phase_of(e.name) == phase]
        inside = sum(any(start <= launch.time_range.start <= end for start, end in spans) for launch in self.launches)
        return inside / len(spans) if spans else 0.0

    @property
    def busy_share(self) -> float | None:
        """Share of the call in which some kernel runs; None on a CPU."""
        if not self.on_gpu:
            return None
        covered, reached = 0.0, float("-inf")
        for event in sorted(self.kernels, key=lambda e: e.time_range.start):
            start, end = max(event.time_range.start, reached), event.time_range.end
            covered, reached = covered + max(0.0, end - start), max(reached, end)
        return 1e-6 * covered / sum(self.seconds(WHOLE))

    @property
    def memory(self) -> list[tuple[float, int]]:
        """(seconds since the first event, bytes above its level) at every allocation and release on the device."""
        kind = DeviceType.CUDA if self.on_gpu else DeviceType.CPU
        raw: Any = self.profile.profiler.kineto_results.events()  # type: ignore[union-attr]
        changes = sorted((e.start_ns(), e.nbytes()) for e in raw if e.name() == "[memory]" and e.device_type() == kind)
        level, timeline = 0, []
        for when, size in changes:
            level += size
            timeline.append((1e-9 * (when - changes[0][0]), level))
        return timeline

    def text(self) -> str:
        """The summary, as Markdown."""
        whole = sum(self.seconds(WHOLE))
        body = []
        for name in (GRADIENT, LINEARIZE, TERM, STEP, MIXED):
            times = self.seconds(name)
            if times:
                body.append([
                    name, str(len(times)), duration(sum(times)), duration(sum(times) / len(times)),
                    f"{100 * sum(times) / whole:.1f}%", f"{self.launches_per(name):.1f}",
                ])  # fmt: skip
        head = [
            "phase",
            "ranges",
            "in all",
            "each",
            "of the call",
            "launches each" if self.on_gpu else "operators each",
        ]
        weights = sum(w.numel() for w in self.problem.weights.values())
        steps = self.seconds(STEP)
        lines = [
            f"{self.problem.name}, {weights:,} weights, {results.device_name(self.problem.device)}: {duration(whole)}",
            "" if self.on_gpu else "There is no GPU here: this is a profile of the CPU.",
            grid(head, body),
        ]
        if self.busy_share is not None:
            lines.append(f"GPU busy: {100 * self.busy_share:.1f}% of the call")
        if steps and sum(steps):
            speed = WORDS["neumann_step"] * 4 * weights * len(steps) / sum(steps)
            lines.append(f"fused step: {duration(sum(steps) / len(steps))} each, {speed / 1e9:.1f} GB/s")
        else:
            lines.append("fused step: every step is part of its term")
        if self.on_gpu:
            reserved = torch.cuda.max_memory_reserved(self.problem.device)
            lines.append(f"reserved by torch, pools of graphs included: {size_of(reserved)}")
        if self.memory:
            lines.append(f"peak memory above the start: {size_of(max(level for _, level in self.memory))}")
        order = "self_device_time_total" if self.on_gpu else "self_cpu_time_total"
        lines.append(self.profile.key_averages().table(sort_by=order, row_limit=15, max_name_column_width=60))
        return "\n\n".join(line for line in lines if line)


def write(summary: Summary, folder: Path) -> list[Path]:
    """Write trace, summary and memory timeline."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / name for name in ("trace.json", "summary.md", "memory.csv", "memory.png")]
    summary.profile.export_chrome_trace(str(files[0]))
    files[1].write_text(summary.text() + "\n")
    timeline = summary.memory
    with files[2].open("w", newline="") as lines:
        writer = csv.writer(lines)
        writer.writerow(["seconds", "bytes"])
        writer.writerows(timeline)
    figure = Figure(figsize=(9, 3.2))
    axes = figure.add_subplot()
    axes.step([1e3 * when for when, _ in timeline], [level / 1e6 for _, level in timeline], where="post", linewidth=0.8)
    axes.set_xlabel("ms")
    axes.set_ylabel("MB above the start")
    figure.savefig(files[3], dpi=120, bbox_inches="tight")
    return files


def main(arguments: Sequence[str] | None = None) -> int:
    """Profile what the command line asks for."""
    parser = argparse.ArgumentParser("bench.profile_gpu", description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--problem", choices=list(PROBLEMS), default="lenet", metavar="NAME", help=", ".join(PROBLEMS))
    add("--engine", choices=list(engines.ENGINES), default="linearized", help="default: linearized")
    add("--terms", type=int, metavar="N", help="products (default: the problem's usual number)")
    add("--device", type=torch.device, help="default: cuda where there is one, else cpu")
    add("--ranges-only", action="store_true", help="only mark the phases, for nsys and ncu")
    add("--out", type=Path, default=results.ROOT / "out" / "profile", metavar="FOLDER", help="default: out/profile")
    options = parser.parse_args(arguments)
    device = options.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    problem = build(options.problem, device)
    phases = Phases(device)
    call = phased_call(problem, options.engine, options.terms or problem.terms, phases)
    if options.ranges_only:
        for _ in range(_WARM_UP + 1):
            call()
        return 0
    summary = Summary(profiled(call, device), problem, phases)
    folder = options.out / f"{results.slug(results.device_name(device))}-{options.problem}-{options.engine}"
    files = write(summary, folder)
    print(summary.text())
    print(f"written: {', '.join(map(str, files))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
