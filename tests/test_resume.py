"""A run that was stopped and continued equals the uninterrupted run bit for bit."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from tuning_run_to_interrupt import TuningRun

import hvp_engine as hvp
from hvp_engine.tuning import checkpoint

STEPS = 20
EVALUATIONS_PER_ROUND = 3 * 2 + 2
"""Loss evaluations of a round: three training steps of two batches each, and a hypergradient."""


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """The tensors are tiny."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the weights are far from a minimum")
        yield


@pytest.fixture(scope="module")
def straight(one_thread: None) -> dict[str, Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return TuningRun().fit(STEPS)


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    different = [name for name in expected if not torch.equal(found[name], expected[name])]
    assert not different


class Stop(Exception):
    pass


def test_the_run_moves_everything(straight: dict[str, Tensor]) -> None:
    """Otherwise the comparisons below would prove little."""
    fresh = TuningRun().result()
    assert not [name for name in straight if name != "random" and torch.equal(straight[name], fresh[name])]
    assert straight["losses"].shape == (STEPS, 3) and (straight["losses"][:, 2] > 0).sum() == STEPS // 4


def test_stopped_and_continued_at_every_step(straight: dict[str, Tensor], tmp_path: Path) -> None:
    """A callback raises at each hyper step; a new process's tuner continues."""

    def stop(tuner: hvp.Tuner, record: hvp.Record) -> None:
        raise Stop

    for step in range(1, STEPS + 1):
        run = TuningRun()
        with pytest.raises(Stop):
            run.fit(STEPS, checkpoint=tmp_path / "run.pt", checkpoint_every=1000, callbacks=[stop])
        assert run.tuner.hyper_steps == step
    last = TuningRun()
    assert_same(last.fit(STEPS, checkpoint=tmp_path / "run.pt"), straight)
    assert last.tuner.hyper_steps == STEPS


def test_killed_in_the_middle_of_a_step(straight: dict[str, Tensor], tmp_path: Path) -> None:
    """SIGKILL in round 13 of a run that saves every 5 hyper steps: another process continues from 10."""
    path = tmp_path / "run.pt"
    kill_at = 8 + 12 * EVALUATIONS_PER_ROUND + 4
    script = Path(__file__).with_name("tuning_run_to_interrupt.py")
    arguments = [sys.executable, str(script), str(path), str(kill_at)]
    package = str(Path(hvp.__file__).parents[1])
    ended = subprocess.run(arguments, env={**os.environ, "PYTHONPATH": package}, capture_output=True, timeout=300)
    assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()
    assert checkpoint.read(path)["counters"]["hyper_steps"] == 10
    assert_same(TuningRun().fit(STEPS, checkpoint=path), straight)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize(("minutes", "steps"), [(0, 4), (10, None), (None, None)])
def test_killed_before_the_first_hyper_step(
    minutes: float | None, steps: int | None, straight: dict[str, Tensor], tmp_path: Path
) -> None:
    """SIGKILL in the fifth of the first round's seven training steps: only what the clock asked for has been saved."""
    path, evaluations = tmp_path / "run.pt", []

    def event(kind: str) -> None:
        evaluations.append(kind)
        if len(evaluations) == 4 * 2 + 1:
            os.kill(os.getpid(), signal.SIGKILL)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about threads, which the child does not need
        child = os.fork()
    if child == 0:
        try:
            TuningRun(event).fit(STEPS, checkpoint=path, checkpoint_minutes=minutes)
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert path.exists() == (steps is not None)
    if steps is not None:
        assert checkpoint.read(path)["counters"] == {"hyper_steps": 0, "steps_to_go": 7 - steps, "failures": 0}
    assert_same(TuningRun().fit(STEPS, checkpoint=path), straight)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize("kills", [5, pytest.param(100, marks=pytest.mark.soak)])
def test_killed_at_any_moment(kills: int, straight: dict[str, Tensor], tmp_path: Path) -> None:
    """SIGKILL at random moments of runs that save after each hyper step; some of 100 are killed during a write."""
    start = time.perf_counter()
    TuningRun().fit(STEPS, checkpoint=tmp_path / "timed.pt", checkpoint_every=1)
    whole = time.perf_counter() - start
    draw, in_a_write = random.Random(kills), 0
    for number in range(kills):
        path = tmp_path / str(number) / "run.pt"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about threads, which the child does not need
            child = os.fork()
        if child == 0:
            try:
                TuningRun().fit(STEPS, checkpoint=path, checkpoint_every=1)
            finally:
                os._exit(0)
        time.sleep(draw.uniform(0, whole))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        in_a_write += path.with_name("run.pt.partial").exists()
        assert_same(TuningRun().fit(STEPS, checkpoint=path), straight)
    assert in_a_write or kills < 100


@pytest.mark.parametrize("evaluation", [1, 8, 14, 45, 47, 48, 61])
def test_a_loss_that_fails_in_the_middle_of_a_step(
    evaluation: int, straight: dict[str, Tensor], tmp_path: Path
) -> None:
    """The batches, random numbers and buffer updates of the step that failed are taken back."""
    evaluations = 0

    def event(kind: str) -> None:
        nonlocal evaluations
        evaluations += 1
        if evaluations == evaluation:
            torch.rand(5)
            raise Stop

    with pytest.raises(Stop):
        TuningRun(event).fit(STEPS, checkpoint=tmp_path / "run.pt")
    assert_same(TuningRun().fit(STEPS, checkpoint=tmp_path / "run.pt"), straight)


@pytest.fixture(autouse=True)
def usual_handlers() -> Iterator[None]:
    """The handlers of a program in the foreground; one in the background ignores SIGINT."""
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


SIGNALS = pytest.mark.parametrize(
    ("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)], ids=["int", "term"]
)


@SIGNALS
@pytest.mark.parametrize("evaluation", [5, 40, 49])  # 40: in a hyper step with an evaluation after it
def test_a_signal_waits_for_the_end_of_the_step(
    evaluation: int, number: int, error: type[BaseException], straight: dict[str, Tensor], tmp_path: Path
) -> None:
    before = signal.getsignal(number)
    kinds: list[str] = []

    def event(kind: str) -> None:
        kinds.append(kind)
        if len(kinds) == evaluation:
            signal.raise_signal(number)

    run = TuningRun(event)
    with pytest.raises(error) as raised:
        run.fit(STEPS, checkpoint=tmp_path / "run.pt")
    assert error is KeyboardInterrupt or raised.value.code == 143
    assert len(kinds) - evaluation < 2, "no further step was begun"
    assert signal.getsignal(number) is before
    assert_same(TuningRun().fit(STEPS, checkpoint=tmp_path / "run.pt"), straight)


@SIGNALS
def test_a_second_signal_acts_at_once(
    number: int, error: type[BaseException], straight: dict[str, Tensor], tmp_path: Path
) -> None:
    def event(kind: str) -> None:
        if kind == "val":
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(number)
            raise AssertionError("must not be reached")

    with pytest.raises(error):
        TuningRun(event).fit(STEPS, checkpoint=tmp_path / "run.pt")
    assert_same(TuningRun().fit(STEPS, checkpoint=tmp_path / "run.pt"), straight)


@SIGNALS
def test_a_signal_after_the_last_step_is_not_lost(
    number: int, error: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = checkpoint.write

    def signalled(*arguments: Any) -> None:
        signal.raise_signal(number)
        write(*arguments)

    monkeypatch.setattr(checkpoint, "write", signalled)
    with pytest.raises(error):
        TuningRun().fit(2, checkpoint=tmp_path / "run.pt")
    assert checkpoint.read(tmp_path / "run.pt")["counters"]["hyper_steps"] == 2


def test_a_terminated_process_saves_and_exits_with_143(straight: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    script = [sys.executable, str(Path(__file__).parent / "tuning_run_to_interrupt.py"), str(path), "27", "SIGTERM"]
    environment = {**os.environ, "PYTHONPATH": str(Path(hvp.__file__).parents[1])}
    ended = subprocess.run(script, env=environment, capture_output=True, text=True)
    assert ended.returncode == 143, ended.stderr
    assert checkpoint.read(path)["counters"]["hyper_steps"] == 2
    assert_same(TuningRun().fit(STEPS, checkpoint=path), straight)


@contextmanager
def full_disk(room: int) -> Iterator[None]:
    """Limits the size of files that this process writes to `room` bytes."""
    resource = pytest.importorskip("resource", reason="limits of a process are POSIX")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("room", [100, 5000])  # torch reports early and late failures differently
def test_training_goes_on_when_the_disk_is_full(room: int, straight: dict[str, Tensor], tmp_path: Path) -> None:
    path, run = tmp_path / "run.pt", TuningRun()
    run.fit(4, checkpoint=path)
    saved = path.read_bytes()
    with full_disk(room), pytest.warns(UserWarning, match="could not be written .*training goes on") as warned:
        run.fit(10, checkpoint=path, checkpoint_every=3)
    assert len([warning for warning in warned if "training goes on" in str(warning.message)]) == 3
    assert path.read_bytes() == saved and not path.with_name("run.pt.partial").exists()
    with (
        full_disk(room),
        pytest.raises(hvp.CheckpointError, match="expected a disk that takes .*: make room"),
    ):
        run.tuner.save(path)
    assert path.read_bytes() == saved
    assert_same(run.fit(STEPS, checkpoint=path), straight)
    assert checkpoint.read(path)["counters"]["hyper_steps"] == STEPS


def test_training_goes_on_when_the_folder_is_gone(straight: dict[str, Tensor], tmp_path: Path) -> None:
    folder, run = tmp_path / "folder", TuningRun()

    def remove(tuner: hvp.Tuner, record: hvp.Record) -> None:
        shutil.rmtree(folder)

    with pytest.warns(UserWarning, match="could not be written .*training goes on"):
        run.fit(1, checkpoint=folder / "run.pt", callbacks=[remove])
    assert_same(run.fit(STEPS, checkpoint=folder / "run.pt"), straight)


def test_a_handler_of_the_user_stays_and_other_threads_work(tmp_path: Path) -> None:
    handler = lambda number, frame: None  # noqa: E731
    before = signal.signal(signal.SIGINT, handler)
    try:
        seen: list[Any] = []
        run = TuningRun()
        run.fit(1, checkpoint=tmp_path / "run.pt", callbacks=[lambda *_: seen.append(signal.getsignal(signal.SIGINT))])
        assert seen == [handler]
    finally:
        signal.signal(signal.SIGINT, before)
    thread = threading.Thread(target=lambda: seen.append(TuningRun().fit(2, checkpoint=tmp_path / "run.pt")))
    thread.start()
    thread.join()
    assert len(seen) == 2


def test_a_torn_step_is_not_saved(tmp_path: Path) -> None:
    """An error between the optimizer's first and last write leaves the file as it was."""
    path = tmp_path / "run.pt"
    run = TuningRun()
    run.fit(4, checkpoint=path)
    saved = path.read_bytes()
    optimizer = run.tuner.weight_optimizer
    optimizer.register_step_post_hook(lambda *_: (_ for _ in ()).throw(Stop))
    with pytest.raises(Stop), pytest.warns(UserWarning, match="not written, since Stop came in the middle"):
        run.fit(6, checkpoint=path)
    assert path.read_bytes() == saved


def test_a_broken_state_is_not_saved(tmp_path: Path) -> None:
    """Otherwise NaN weights would replace both good checkpoints before the run fails."""
    path = tmp_path / "run.pt"

    def spoil(tuner: hvp.Tuner, record: hvp.Record) -> None:
        if record.hyper_step == 4:
            with torch.no_grad():
                tuner.weights[0][0, 0] = float("nan")

    message = "not written, since weights or hyperparameters are NaN or infinite"
    with pytest.raises(hvp.DivergenceError), pytest.warns(UserWarning, match=message):
        TuningRun().fit(STEPS, checkpoint=path, checkpoint_every=2, callbacks=[spoil])
    for file, steps in ((path, 4), (checkpoint.previous(path), 2)):
        state = checkpoint.read(file)
        assert state["counters"]["hyper_steps"] == steps
        assert all(bool(weight.isfinite().all()) for weight in state["weights"].values())


def test_the_error_that_came_first_is_raised_even_if_saving_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(tuner: hvp.Tuner, record: hvp.Record) -> None:
        def full(*arguments: Any) -> None:
            raise OSError("disk full")

        monkeypatch.setattr(torch, "save", full)
        raise Stop

    with pytest.raises(Stop), pytest.warns(UserWarning, match="could not be written after Stop: disk full"):
        TuningRun().fit(3, checkpoint=tmp_path / "run.pt", callbacks=[stop])


def test_fit_again_in_the_same_process(straight: dict[str, Tensor], tmp_path: Path) -> None:
    """With and without a file: `hyper_steps` is the total, and the epochs go on where they stopped."""
    run = TuningRun()
    run.fit(7)
    run.fit(13, checkpoint=tmp_path / "run.pt")
    assert_same(run.fit(STEPS, checkpoint=tmp_path / "run.pt"), straight)
    again = TuningRun()
    assert_same(again.fit(STEPS, checkpoint=tmp_path / "run.pt"), straight)
    assert_same(again.fit(STEPS), straight), "nothing more to do"


def test_files_and_when_they_are_written(tmp_path: Path) -> None:
    path, steps = tmp_path / "run.pt", []

    def look(tuner: hvp.Tuner, record: hvp.Record) -> None:
        steps.append(checkpoint.read(path)["counters"]["hyper_steps"] if path.exists() else 0)

    TuningRun().fit(8, checkpoint=path, checkpoint_every=3, callbacks=[look])
    assert steps == [0, 0, 0, 3, 3, 3, 6, 6]
    assert checkpoint.read(path)["counters"]["hyper_steps"] == 8
    assert checkpoint.read(checkpoint.previous(path))["counters"]["hyper_steps"] == 6
    assert sorted(file.name for file in tmp_path.iterdir()) == ["run.pt", "run.pt.previous"]


def test_a_damaged_newest_costs_the_steps_since_the_one_before(straight: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    TuningRun().fit(9, checkpoint=path, checkpoint_every=4)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.warns(UserWarning, match="going on from the checkpoint before it"):
        found = TuningRun().fit(STEPS, checkpoint=path)
    assert_same(found, straight)


def test_the_traced_engine_continues_too(tmp_path: Path) -> None:
    expected = TuningRun(engine="linearized").fit(6)
    TuningRun(engine="linearized").fit(3, checkpoint=tmp_path / "run.pt")
    assert_same(TuningRun(engine="linearized").fit(6, checkpoint=tmp_path / "run.pt"), expected)


def test_retraining_after_a_resume_begins_at_the_first_runs_weights(tmp_path: Path) -> None:
    run = TuningRun()
    run.fit(2, checkpoint=tmp_path / "run.pt")
    torch.manual_seed(7)
    expected = run.tuner.retrain(run.train_loader, 3, progress=False)
    other = TuningRun()
    with torch.no_grad():
        for initial in other.tuner.problem.initial_weights:
            initial.zero_()
    other.tuner.load(tmp_path / "run.pt")
    torch.manual_seed(7)
    assert other.tuner.retrain(other.train_loader, 3, progress=False) == expected


def test_a_wrong_loader_can_be_corrected(straight: dict[str, Tensor], tmp_path: Path) -> None:
    run = TuningRun()
    run.fit(2, checkpoint=tmp_path / "run.pt")
    again = TuningRun()
    right, again.train_loader = again.train_loader, [next(iter(run.train_loader))]
    with pytest.raises(hvp.CheckpointError, match="train_loader: expected"):
        again.fit(STEPS, checkpoint=tmp_path / "run.pt")
    again.train_loader = right
    assert_same(again.fit(STEPS, checkpoint=tmp_path / "run.pt"), straight)


class Failing(hvp.tuning.Callback):
    """Draws random numbers and raises in one of its methods, at the third hyper step."""

    def __init__(self, method: str):
        setattr(self, method, self.fail)

    def fail(self, tuner: hvp.Tuner, *arguments: Any) -> None:
        if tuner.hyper_steps == 3:
            torch.rand(3), random.random()
            raise Stop


@pytest.mark.parametrize("method", ["on_train_step", "on_evaluate", "on_hyper_step", "on_round_end", "on_fit_start"])
def test_a_callback_that_fails(method: str, straight: dict[str, Tensor], tmp_path: Path) -> None:
    TuningRun().fit(2 if method != "on_fit_start" else 3, checkpoint=tmp_path / "run.pt")
    with pytest.raises(Stop):
        TuningRun().fit(STEPS, checkpoint=tmp_path / "run.pt", callbacks=[Failing(method)])
    assert_same(TuningRun().fit(STEPS, checkpoint=tmp_path / "run.pt"), straight)


def test_a_state_in_memory_continues_exactly(straight: dict[str, Tensor]) -> None:
    first, second = TuningRun(), TuningRun()
    first.fit(9)
    second.tuner.load_state_dict(first.tuner.state_dict())
    assert_same(second.fit(STEPS), straight)
