"""The benchmark itself: problems, methods against float64, timing, results, tables and the profile; all tiny."""

from __future__ import annotations

import contextlib
import csv
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from bench import (
    methods,
    networks,
    peers,
    peers_jax,
    plots,
    problems,
    profile_gpu,
    report,
    results,
    steps,
    verification,
)
from bench import phases as bench_phases
from bench.bench_distributed import GPUS, MODES, WEIGHTS, Machine, draw, estimated_rows
from bench.interleave import Work, interleave, threads
from bench.problems import PROBLEMS, Problem
from bench.results import Environment, Row
from hvp_engine.hypergradients import SGD, Unrolled

CPU = torch.device("cpu")


# Problems


def test_weights_of_the_networks() -> None:
    """As published, where the experiments have no such test."""
    made = {
        lambda: networks.resnet(20): 269_722,
        lambda: networks.LSTM(10_000, 650): 13_280_400,
    }
    with torch.device("meta"):
        assert [sum(p.numel() for p in make().parameters()) for make in made] == list(made.values())


def test_looped_lstm_is_an_lstm() -> None:
    module, looped, words = networks.LSTM(7, 4), networks.LoopedLSTM(7, 4), torch.randint(7, (2, 5))
    looped.load_state_dict(module.state_dict())
    torch.testing.assert_close(looped(words), module(words))


@pytest.mark.parametrize("name", problems.names_for(CPU))
def test_problems_are_the_same_at_every_build(name: str) -> None:
    first, second = problems.build(name), problems.build(name)
    for a, b in zip(first.weights.values(), second.weights.values(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(first.train[0], second.train[0]) and not torch.equal(first.train[0], first.val[0])
    assert len(first.train[0]) == PROBLEMS[name].size


def test_penalty_by_hand(small: Problem) -> None:
    pairs = zip(small.hyper.values(), small.weights.values(), strict=True)
    expected = torch.stack([(h.exp() * w.square()).sum() for h, w in pairs]).sum()
    torch.testing.assert_close(small.penalty(small.weights, small.hyper), expected / 2)
    difference = small.train_loss(small.weights, small.hyper, small.train) - small.val_loss(
        small.weights, small.hyper, small.train
    )
    torch.testing.assert_close(difference, expected / 2)


# Methods


def _tiny() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def _batch(count: int) -> tuple[Tensor, Tensor]:
    return torch.randn(count, 3), torch.randint(2, (count,))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Problem:
    recipe = problems.Recipe(_tiny, _batch, nn.functional.cross_entropy, alpha=0.3, size=6, terms=4)
    monkeypatch.setitem(PROBLEMS, "tiny", recipe)
    return problems.build("tiny")


def _candidates() -> dict[str, dict[str, methods.Preparation]]:
    made = {name: engine for name, engine in methods.own_engines().items() if name != "compiled"}
    return {
        "inverse_hvp": methods.own_inverse_hvps(made) | peers.inverse_hvps(),
        "hypergradient": methods.own_hypergradients(made) | peers.hypergradients(),
        "unrolled": {"unrolling": methods.unrolled} | peers.unrolled(),
    }


@pytest.mark.parametrize("kind", verification.KINDS)
def test_every_method_agrees_with_the_reference(small: Problem, kind: str) -> None:
    """All of ours pass; of a peer that is installed and knows the network, the same is expected on so plain a one."""
    candidates = {name: prepare for name, prepare in _candidates()[kind].items() if "compiled" not in name}
    verified = verification.verify(kind, small, candidates)
    missing = ("ModuleNotFoundError", "NotImplementedError: not written by hand")
    absent = {name for name, reason in verified.left_out.items() if reason.startswith(missing)}
    assert set(verified.left_out) == absent and not verified.broken
    assert set(verified.runs) == set(candidates) - absent and all(s >= 0 for s in verified.setup.values())


def test_unrolling_equals_the_implicit_hypergradient_at_a_minimum(small: Problem) -> None:
    """The theorem that lets both stand in one table: n + 1 steps from w* are n products."""
    exact = problems.build("tiny", dtype=torch.float64)
    optimizer = torch.optim.LBFGS(
        exact.weights.values(), max_iter=2000, tolerance_grad=1e-13, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = exact.train_loss(exact.weights, exact.hyper, exact.train)
        loss.backward(inputs=list(exact.weights.values()))
        return loss

    optimizer.step(closure)
    unrolled = methods.unrolled(exact)(5)
    implicit = methods.taped_hypergradient(methods.foreach_loop, exact)(5)
    torch.testing.assert_close(list(unrolled), list(implicit), rtol=1e-6, atol=1e-12)
    assert max(float(g.abs().max()) for g in implicit) > 1e-4


def test_unrolling_is_what_the_package_unrolls(small: Problem) -> None:
    estimator = Unrolled(small.train_loss, small.val_loss, 6, SGD(small.alpha))
    ours = estimator(small.weights, small.hyper, small.train, small.val).grads
    torch.testing.assert_close(list(methods.unrolled(small)(5)), list(ours.values()))


@pytest.mark.parametrize("name", ["lenet", "looped-lstm", "transformer"])
def test_models_by_hand_in_jax(name: str) -> None:
    """Against double backward in float64, on three examples: every weight's decay has its own part of the result."""
    jax = pytest.importorskip("jax", reason="jax is not installed")
    problem = problems.built(name, replace(PROBLEMS[name], size=3), dtype=torch.float64)
    with jax.enable_x64(True):
        found = peers_jax.hypergradient(problem)(3)
    expected = methods.taped_hypergradient(methods.list_loop, problem)(3)
    torch.testing.assert_close(list(found), list(expected), rtol=1e-8, atol=1e-12)


def test_wrong_and_failing_methods_are_left_out(small: Problem) -> None:
    def without_curvature(problem: Problem) -> methods.Run:
        return lambda terms: [problem.alpha * (terms + 1) * v for v in problem.vector]

    def failing(problem: Problem) -> methods.Run:
        raise NotImplementedError("no such\nthing")

    candidates = {f"{methods.OURS} wrong": without_curvature, "failing": failing}
    verified = verification.verify("inverse_hvp", small, candidates)
    assert verified.runs == {}
    assert verified.left_out["failing"] == "NotImplementedError: no such thing"
    assert len(verified.broken) == 1 and "wrong result: relative error 1" in verified.broken[0]


# Timing


def test_interleaving_times_every_work_per_unit() -> None:
    order: list[str] = []

    def busy(name: str, seconds: float) -> None:
        """Works for so long by the processor's clock, which is the one that counts on one thread."""
        order.append(name)
        end = time.process_time() + seconds
        while time.process_time() < end:
            pass

    works = {
        "long": Work(lambda: busy("long", 0.03), units=3),
        "short": Work(lambda: busy("short", 0.004)),
        "self": Work(lambda: 0.5, units=5, self_timed=True),
    }
    samples = interleave(works, CPU, seconds=60.0, rounds=4)
    assert all(len(values) == 4 for values in samples.values())
    assert min(samples["long"]) >= 0.01 and min(samples["short"]) >= 0.004
    assert samples["self"] == [0.1] * 4
    timed = order[-8:]
    assert timed.count("long") == timed.count("short") == 4  # they take turns: no block of one of them


def test_a_work_beyond_its_share_gets_three_samples() -> None:
    samples = interleave({"slow": Work(lambda: time.sleep(0.02))}, CPU, seconds=0.01, rounds=50)
    assert len(samples["slow"]) == 3


def test_a_work_is_timed_on_its_number_of_threads_alone() -> None:
    works = {"one": Work(list, threads=1), "two": Work(list, threads=2), "any": Work(list)}
    for count, others in ((1, "one"), (2, "two")):
        with threads(count):
            assert set(interleave(works, CPU, seconds=0.1, rounds=1)) == {others, "any"}


def test_threads_are_restored() -> None:
    before = torch.get_num_threads()
    with pytest.raises(KeyError), threads(before + 1):
        assert torch.get_num_threads() == before + 1
        raise KeyError
    assert torch.get_num_threads() == before


def test_step_works_run_and_agree() -> None:
    works = steps.step_works(1000, 20, CPU)
    assert set(works) == {"neumann_step", "neumann_step_horner", "two _foreach_add_"}
    for work in [*works.values(), *steps.step_works(100, 1, CPU).values()]:
        work.call()


def test_update_seconds_are_a_part_of_the_solve(small: Problem) -> None:
    for work in steps.update_works(small, 4).values():
        start = time.perf_counter()
        seconds = work.call()
        assert isinstance(seconds, float) and 0 < seconds < time.perf_counter() - start


# Results


def _rows() -> list[Row]:
    environment = Environment("Some CPU (R), 2 cores", "2.13.0", "3.6.0", "abc", "2030-01-01")
    timed = {
        "list loop": 0.2,
        "list loop, foreach": 0.1,
        "betty": 0.3,
        "hvp_engine eager": 0.1,
        "hvp_engine auto": 0.05,
    }
    rows = [environment.row("inverse_hvp", "lenet", name, 20, 1, [s, s, s]) for name, s in timed.items()]
    rows += [environment.row("hvp", "lenet", name, 1, 1, [s]) for name, s in (timed | {"gradient": 0.1}).items()]
    rows += [environment.row("step", "1 tensor", name, 10**7, 1, [0.01]) for name in steps.WORDS]
    rows += [environment.row("update", "lenet", name, 1, 1, [0.01]) for name in ("list loop", "hvp_engine step")]
    for size in (2, 100):
        rows.append(environment.row("memory", "lenet", "hvp_engine eager", size, 1, [1e6], "bytes"))
        rows.append(environment.row("unrolling", "lenet", "unrolling", size, 1, [0.1 * size]))
        rows.append(environment.row("unrolling memory", "lenet", "unrolling", size, 1, [1e6 * size], "bytes"))
    rows.append(environment.row("setup", "lenet", "hvp_engine auto", 0, 1, [3.0], note="linearized: fastest"))
    rows.append(environment.row("inverse_hvp", "lenet", "curvlinops", 0, 1, [], note="wrong result, by 1"))
    return rows


def test_results_round_trip(tmp_path: Path) -> None:
    file = tmp_path / "new folder" / "device.csv"
    results.write(file, _rows())
    assert results.read(file) == _rows()
    with file.open() as lines:
        assert {"p20", "p50", "p80", "commit", "torch_version", "package", "threads"} < set(next(csv.reader(lines)))


def test_a_new_row_replaces_the_old_one_of_its_case() -> None:
    rows = _rows()
    newer = replace(rows[0], p50=0.7)
    assert results.merged(rows, [newer])[0] == newer and len(results.merged(rows, [newer])) == len(rows)


def test_percentiles_and_packages() -> None:
    assert results.percentiles([3.0]) == (3.0, 3.0, 3.0)
    assert results.percentiles([float(n) for n in range(11)]) == (2.0, 5.0, 8.0)
    assert results.package_of("list loop, foreach") == ""
    assert results.package_of("hvp_engine auto").startswith("hvp_engine 0.")
    assert results.package_of("curvlinops, compiled").startswith("curvlinops-for-pytorch ")


def test_environment_of_this_machine() -> None:
    environment = Environment.of(CPU)
    assert environment.torch_version == torch.__version__ and environment.commit
    assert results.slug(environment.device).replace("-", "").replace(".", "").isalnum()


# Tables and plots


def test_tables() -> None:
    text = report.markdown(_rows())
    assert "| lenet | 20 | 1 | 100 ms | 100 ms (list loop, foreach) | 100 ms | 50 ms | 50 ms (auto) | 2.00x |" in text
    assert "| lenet | 1 | 100 ms | 100 ms | 50 ms | 0.50 | 0.50 (auto) |" in text
    assert "20.0 | 12.0 | 8.0 |" in text  # GB/s of the step, add_ and copy_
    assert "1 MB (2) | 1 MB (100) | 1.000 | 1.00" in text
    assert "linearized: fastest" in text and "curvlinops: wrong result, by 1" in text


def test_every_device_has_tables_of_its_own() -> None:
    other = [replace(row, device="A GPU", p50=row.p50 and row.p50 / 10) for row in _rows()]
    text = report.markdown([*_rows(), *other])
    assert text.index("### Some CPU (R), 2 cores") < text.index("| 50 ms (auto) | 2.00x |")
    assert text.index("### A GPU") < text.index("| 5 ms (auto) | 2.00x |")


def test_short_table() -> None:
    lines = report.summary([*_rows(), *(replace(row, device="A GPU", date="2030-01-02") for row in _rows())]).split(
        "\n"
    )
    found = [line for line in lines if line.startswith("| lenet")]
    assert found == [
        f"| lenet | 20 | {device} | {date} | 100 ms (list loop, foreach) | 50 ms | 2.00x | 60 calls |"
        for device, date in (("Some CPU (R), 2 cores", "2030-01-01"), ("A GPU", "2030-01-02"))
    ]
    assert lines[-1] == "Peak memory of a solve of 100 products against one of 2: 1.00x at most."


def test_short_table_goes_between_the_markers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "everything", _rows)
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- bench:begin -->\nold\n<!-- bench:end -->\nafter\n")
    for _ in range(2):
        report.update_readme(readme)
        text = readme.read_text()
        assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
        assert text.count("2.00x") == 1
    readme.write_text("no markers")
    with pytest.raises(ValueError, match="markers"):
        report.update_readme(readme)


def test_estimate_for_many_gpus() -> None:
    machine = Machine(flops=1e14, inside=4e11, outside=4e10, start_inside=1e-6, start_outside=1e-5, tokens=1000)
    # 1e9 weights, 16 GPUs in two nodes: 120 ms of products; 4 GB, of which 15/16 go out and in; 2 (3 + 10) us to start.
    assert machine.product(1e9) == pytest.approx(0.12)
    assert machine.reduction(1e9, 16) == pytest.approx(2 * 15 / 16 * 0.1 + 26e-6)
    assert machine.reduction(1e9, 8) == pytest.approx(2 * 7 / 8 * 0.01 + 6e-6)
    shards, whole = (machine.bytes_needed(1e9, 16, sharded) for sharded in (True, False))
    assert whole - shards == pytest.approx(15 / 16 * 8e9)
    environment = Environment("a cpu", "2.13", "none", "abc", "2026-11-25")
    estimates = list(estimated_rows(machine, environment))
    assert len(estimates) == len(GPUS) * len(WEIGHTS) * len(MODES)
    units = {"": "s", ", counted": "bytes a process a term"}
    measured = [
        environment.row("distributed", f"mlp, {count} processes", f"hvp_engine shards{kind}", 1000, 1, [1.0], unit)
        for kind, unit in units.items()
        for count in (1, 2)
    ]
    assert len(draw([*measured, *estimates], machine).axes) == 4


def test_plots(tmp_path: Path) -> None:
    files = plots.draw(_rows(), tmp_path, "device")
    assert [file.name for file in files] == ["device-solves.png", "device-step.png", "device-unrolling.png"]
    assert all(file.stat().st_size > 1000 for file in files)
    assert plots.draw([], tmp_path, "device") == []


# The profile


@pytest.mark.parametrize("engine", ["eager", "linearized"])
def test_profile(tmp_path: Path, small: Problem, engine: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--problem", "tiny", "--engine", engine, "--device", "cpu", "--out", str(tmp_path)]
    assert profile_gpu.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "There is no GPU here" in printed
    assert "| term | 4 |" in printed
    assert "| step |" in printed and "fused step: " in printed
    for name in ("| gradient | 1 |", "| linearize | 1 |", "| mixed product | 1 |"):
        assert name in printed
    (folder,) = tmp_path.iterdir()
    assert {file.name for file in folder.iterdir()} == {"trace.json", "summary.md", "memory.csv", "memory.png"}
    assert '"term 4"' in (folder / "trace.json").read_text()


def test_phases_are_timed_on_the_devices_own_timeline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each range has two points of its own; none is set while a graph is captured, where it could not be read."""
    clock, capturing = iter(range(100)), [False]

    class Tick:
        def __init__(self, device: torch.device):
            self.when = next(clock)

        def seconds_since(self, earlier: Tick) -> float:
            return float(self.when - earlier.when)

    monkeypatch.setattr(bench_phases, "Moment", Tick)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    monkeypatch.setattr(torch.cuda.nvtx, "range", lambda name: contextlib.nullcontext())
    phases = bench_phases.Phases(torch.device("cuda"))
    step = phases.within(lambda: "step", lambda: None)
    with phases("term 1"):
        step()
    capturing[0] = True
    step()
    assert phases.seconds() == [("step", 1.0), ("term 1", 3.0)]
    phases.forget()
    assert phases.seconds() == []
