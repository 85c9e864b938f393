import contextlib
import io
import json
import struct
import sys

import pytest
import torch

from bench import demo
from bench.report import README
from hvp_engine.__main__ import main
from hvp_engine.demo import experiment, report

NAMES = ["no tuning", "one decay, implicit", "one per weight, implicit", "one per weight, unrolled"]


def run(folder, *arguments):
    """Run the command in this process; return what it printed and the content of demo.json."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(io.StringIO()):
        assert main(["demo", "--out", str(folder), *arguments]) == 0
    return printed.getvalue(), json.loads((folder / "demo.json").read_text())


def without_times(value):
    if isinstance(value, dict):
        return {name: without_times(part) for name, part in value.items() if "seconds" not in name}
    return [without_times(part) for part in value] if isinstance(value, list) else value


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "new" / "folder"
    printed, content = run(folder, "--hyper-steps", "15")
    return folder, printed, content


@pytest.fixture
def idx_folder(tmp_path):
    generator = torch.Generator().manual_seed(0)
    for prefix, count in (("train", 720), ("t10k", 90)):
        labels = torch.arange(count).remainder(10).byte()
        images = torch.randint(0, 64, (count, 28, 28), generator=generator)
        images[torch.arange(count), labels.long() * 2, 5:20] += 150  # the label is the height of a stripe
        header = struct.pack(">4i", 0x803, count, 28, 28)
        (tmp_path / f"{prefix}-images-idx3-ubyte").write_bytes(header + images.byte().numpy().tobytes())
        header = struct.pack(">2i", 0x801, count)
        (tmp_path / f"{prefix}-labels-idx1-ubyte").write_bytes(header + labels.numpy().tobytes())
    return tmp_path


def test_tuning_lowers_the_validation_loss(short):
    _, _, content = short
    untuned, single, many, unrolled = content["runs"]
    assert [run["name"] for run in content["runs"]] == NAMES
    assert [run["hyperparameters"] for run in content["runs"]] == [0, 1, 101_770, 101_770]
    assert many["validation"]["loss"] < 0.97 * untuned["validation"]["loss"]
    assert many["validation"]["loss"] < single["validation"]["loss"]
    assert unrolled["validation"]["loss"] < untuned["validation"]["loss"]
    assert untuned["test"]["accuracy"] > 0.85


def test_memory_is_constant_in_products_and_linear_in_unrolled_steps(short):
    _, _, content = short
    implicit, unrolled = content["implicit_bytes"], content["unrolled_bytes"]
    assert content["terms"] == [1, 5, 10, 20]
    assert max(implicit) <= 1.01 * min(implicit)
    for_each_step = [
        (unrolled[k + 1] - unrolled[k]) / (content["terms"][k + 1] - content["terms"][k]) for k in range(3)
    ]
    assert min(for_each_step) > 4 * 101_770 * 2  # at least the weights and their gradient, in float32
    assert max(for_each_step) < 1.2 * min(for_each_step)
    assert content["runs"][2]["peak_bytes"] == implicit[-1] < unrolled[-1] == content["runs"][3]["peak_bytes"]


def test_the_table_shows_every_run_and_number(short):
    _, printed, content = short
    rows = {line[:24].rstrip(): line for line in printed.splitlines()}
    for run in content["runs"]:
        row = rows[run["name"]]
        for part in ("train", "validation", "test"):
            assert f"{run[part]['loss']:.4f} / {run[part]['accuracy']:.1%}" in row
        if run["peak_bytes"] is not None:
            assert f"{1e3 * run['hyper_step_seconds']:.1f}" in row and f"{run['peak_bytes'] / 1e6:.1f}" in row
    assert "only the test column is unbiased" in printed
    assert "3000 / 1000 / 1000 for train / validation / test" in printed


def test_files_are_complete_and_nothing_else_is_left(short):
    folder, _, content = short
    assert sorted(file.name for file in folder.iterdir()) == ["demo.json", "demo.png"]
    picture = (folder / "demo.png").read_bytes()
    assert picture.startswith(b"\x89PNG\r\n") and b"IEND" in picture[-12:] and len(picture) > 30_000
    (folder.parent / "reference").touch()
    assert (folder / "demo.json").stat().st_mode == (folder.parent / "reference").stat().st_mode
    assert content["versions"]["torch"] == torch.__version__
    for run in content["runs"]:
        assert run["curve"][-1] == [15, run["validation"]["loss"], run["test"]["loss"]]


def test_results_read_again_give_the_same_table(short):
    folder, printed, _ = short
    assert report.table(report.read(folder / "demo.json")) in printed


def test_the_readme_shows_the_committed_results():
    assert demo.block() in README.read_text()


def test_same_seed_same_numbers_other_seed_other_digits(tmp_path):
    first, again = (
        without_times(run(tmp_path / name, "--hyper-steps", "1", "--seed", "3")[1]) for name in ("first", "again")
    )
    assert first == again
    one, another = (experiment.load(None, seed, torch.device("cpu")).train for seed in (3, 4))
    assert not torch.equal(one[0], another[0])


def test_idx_files_of_a_folder_and_the_global_random_state_left_alone(idx_folder, tmp_path):
    before = torch.get_rng_state()
    _, content = run(tmp_path / "out", "--data", str(idx_folder), "--hyper-steps", "2")
    assert content["sizes"] == [600, 120, 90] and content["source"] == "MNIST"
    assert content["runs"][0]["test"]["accuracy"] > 0.5  # chance is 0.1
    assert torch.equal(before, torch.get_rng_state())


def test_one_unrolled_step_against_its_closed_form():
    """w' = w - lr (g + exp(d) w), so dL_V(w')/dd = -lr L_V'(w') exp(d) w."""
    trial = experiment.Experiment(
        experiment.load(None, 0, torch.device("cpu")), 0, torch.device("cpu"), per_weight=True
    )
    train_batch, val_batch = next(iter(trial.train_loader)), next(iter(trial.val_loader))
    grads = trial.unrolled(1)(trial.weights, trial.hyper, train_batch, val_batch).grads
    weights = {name: weight.detach().requires_grad_() for name, weight in trial.weights.items()}
    loss = trial.train_loss(weights, trial.hyper, train_batch)
    descent = torch.autograd.grad(loss, list(weights.values()))
    moved = {
        name: (weight - 0.1 * step).detach().requires_grad_()
        for (name, weight), step in zip(weights.items(), descent, strict=True)
    }
    outer = torch.autograd.grad(trial.val_loss(moved, trial.hyper, val_batch), list(moved.values()))
    for grad, slope, weight, log_decay in zip(
        grads.values(), outer, weights.values(), trial.hyper.values(), strict=True
    ):
        expected = -0.1 * slope * log_decay.exp() * weight.detach()
        torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-9)
        assert grad.abs().max() > 0


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    target = tmp_path / "demo.json"
    target.write_text("old")

    def fill(file):
        file.write(b"half of the new")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        report._write_atomically(target, fill)
    assert target.read_text() == "old" and list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize(
    "option", [["--hyper-steps", "0"], ["--hyper-steps", "x"], ["--device", "tpu"], ["--device", "meta"]]
)
def test_bad_options_are_refused_with_what_was_expected(option, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["demo", *option])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert option[0] in error and "expected" in error and repr(option[1]) in error


def test_missing_data_is_an_error_without_a_traceback(tmp_path, capsys):
    assert main(["demo", "--out", str(tmp_path), "--data", str(tmp_path / "nowhere")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "train-images-idx3-ubyte" in error and "nowhere" in error


def test_an_output_that_cannot_be_written_is_found_before_the_work(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main(["demo", "--out", str(tmp_path / "file" / "out")]) == 1
    assert "--out: expected a folder that can be written" in capsys.readouterr().err


def test_without_matplotlib_the_remedy_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["demo", "--out", str(tmp_path)]) == 1
    assert "pip install hvp_engine[demo]" in capsys.readouterr().err
