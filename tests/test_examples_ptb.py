"""The experiments on Penn Treebank text, on a few made-up lines in its format: its preparation, results, resuming."""

from __future__ import annotations

import math
import time
from dataclasses import replace

import pytest
import torch
from test_examples_paper import finished, rows
from test_examples_resuming import Interrupted

import hvp_engine as hvp
from examples import models, ptb_tuning, regularized_lstm, text_sets, training
from examples.__main__ import find, main
from examples.experiment import Options, Run
from hvp_engine.errors import DataError

pytestmark = pytest.mark.filterwarnings("ignore:the weights are far from a minimum")


@pytest.fixture
def folder(tmp_path):
    """Sentences of 12 words that mostly follow each other in one order."""
    generator = torch.Generator().manual_seed(0)
    words = ("<unk>", *"abcdefghijk")
    for part, lines in (("train", 150), ("valid", 60), ("test", 60)):
        starts = torch.randint(len(words), (lines,), generator=generator).tolist()
        text = [" ".join(words[(start + step) % len(words)] for step in range(2 + start % 9)) for start in starts]
        (tmp_path / f"ptb.{part}.txt").write_text("\n".join([" ".join(words), *text]))
    return tmp_path


def test_rare_words_are_unknown(folder):
    whole, few = text_sets.load(folder, 100), text_sets.load(folder, 5)
    assert len(whole.words) == 13 and len(few.words) == 5
    counts = whole.train.bincount()
    kept = {whole.words[number] for number in counts.argsort(descending=True)[:4]}
    assert {"<unk>", "<eos>"} <= set(few.words) and len(kept - set(few.words)) <= 1
    for mine, other in zip(
        (few.train, few.validation, few.test), (whole.train, whole.validation, whole.test), strict=True
    ):
        for number, before in zip(mine.tolist(), other.tolist(), strict=True):
            word = whole.words[before]
            assert few.words[number] == (word if word in few.words else "<unk>")


def test_a_folder_is_asked_for_and_looked_through(tmp_path, capsys):
    with pytest.raises(DataError, match="--data: expected a folder with ptb/ptb.train.txt"):
        text_sets.load(None, 10)
    assert main(["ptb_overfitting", "--data", str(tmp_path), "--out", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert "ptb.train.txt: expected this file" in error and "www.fit.vutbr.cz/~imikolov/rnnlm" in error
    with pytest.raises(DataError, match="expected at least 11 words, 1 sequences; got 10"):
        text_sets.sequences(torch.arange(10), 1, 10, torch.Generator())
    with pytest.raises(DataError, match="expected at least 12 words, 2 rows; got 11"):
        text_sets.batches(torch.arange(11), 2, 5, 0)


def test_sequences_are_passages_that_do_not_overlap():
    found = text_sets.sequences(torch.arange(47), 4, 10, torch.Generator())
    assert sorted(found[:, 0].tolist()) == [0, 11, 22, 33]
    assert torch.equal(found - found[:, :1], torch.arange(11).expand(4, 11))


def test_batches_read_every_row_once_with_the_words_before():
    found = text_sets.batches(torch.arange(23), rows=2, time=3, context=2)
    assert [batch.tolist() for batch in found] == [
        [[21, 22, 0, 1, 2, 3], [9, 10, 11, 12, 13, 14]],
        [[1, 2, 3, 4, 5, 6], [12, 13, 14, 15, 16, 17]],
        [[4, 5, 6, 7, 8, 9], [15, 16, 17, 18, 19, 20]],
    ]


def test_perplexity_is_that_of_the_whole_rows():
    lstm, text = models.TiedLSTM(words=7, units=5, scale=1.0), torch.randint(7, (45,))
    weights = dict(lstm.named_parameters())
    found = text_sets.perplexity(hvp.functional(lstm), weights, text, rows=2, time=4)
    whole = text[:44].view(2, 22)
    logits, *_ = lstm(whole[:, :-1])
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), whole[:, 1:].flatten())
    assert found == pytest.approx(math.exp(expected.item()), rel=1e-5)


def test_overfitting_fits_the_validation_sequences(folder, tmp_path):
    sizes = {"units": 24, "sequences": 3, "time": 5, "test_sequences": 20, "hyper_steps": 90, "goal": 0.7}
    rates = {"weight_learning_rate": 1e-2, "hyper_learning_rate": 0.2}
    run, result = finished("ptb_overfitting", tmp_path / "out", {"data": folder}, **sizes, **rates)
    ours = [line["ours"] for line in result["comparisons"]]
    _, validation, test = map(float, ours[1].split(", "))
    assert validation < 0.8 < 1.6 < test
    assert len(rows(run, "overfitting")) < 90
    assert ours[0] == f"{13 * 24 + 13 + 2 * (2 * 96 * 24 + 2 * 96):,}"


def test_concrete_masks_drop_at_their_rates_and_know_them():
    torch.manual_seed(0)
    logit = torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64, requires_grad=True)
    mask = models.concrete_mask(logit, (20_000, 3), 0.1)
    kept = mask / (1 + logit.exp())
    torch.testing.assert_close((kept < 0.5).double().mean(0), logit.sigmoid().detach(), atol=0.02, rtol=0)
    torch.testing.assert_close(mask.mean(0).detach(), torch.ones(3, dtype=torch.float64), atol=0.1, rtol=0)
    assert ((kept < 0.1) | (kept > 0.9)).double().mean() > 0.8
    assert torch.autograd.gradcheck(_same_noise, [logit], atol=1e-6)


def _same_noise(logit):
    torch.manual_seed(0)
    return models.concrete_mask(logit, (4, 3), 0.5)


def small_lstm(folder, start=0.5):
    torch.manual_seed(0)
    text = text_sets.load(folder, 10)
    return regularized_lstm.RegularizedLSTM(text, 6, 2, (4, 5), start, 0.1, torch.device("cpu"))


def test_no_dropout_and_no_penalty_leave_the_validation_loss(folder):
    problem = small_lstm(folder)
    weights, batch = dict(problem.module.named_parameters()), problem.train[1]
    for hyper in (problem.seven, problem.many):
        off = {name: torch.full_like(tensor, -30.0) for name, tensor in hyper.items()}
        off |= {name: torch.tensor(-30.0) for name in ("activation", "temporal")}
        expected = problem.val_loss(weights, off, batch)
        torch.testing.assert_close(problem.train_loss(weights, off, batch), expected)
        for name in hyper:
            assert problem.train_loss(weights, off | {name: hyper[name]}, batch) != expected


def test_one_rate_for_all_is_many_equal_rates(folder):
    problem = small_lstm(folder)
    weights, batch = dict(problem.module.named_parameters()), problem.train[1]
    losses = []
    for hyper in (problem.seven, problem.many):
        torch.manual_seed(1)
        losses.append(problem.train_loss(weights, hyper, batch))
    torch.testing.assert_close(*losses)
    assert problem.bounds({"input": 0, "temporal": 0}, (0.5, 0.9), (1.0, math.e)) == (
        {"input": 0.0, "temporal": 0.0},
        {"input": pytest.approx(math.log(9)), "temporal": 1.0},
    )


def test_learning_rates_fall():
    weight = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=8.0)
    scheduler = training.last_quarter(100)(optimizer)
    rates = []
    for _ in range(100):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert set(rates[:76]) == {8.0}
    assert rates[88] == pytest.approx(8 * 0.48) and min(rates) == rates[-1] == pytest.approx(0.4)

    data = torch.tensor([1.0])
    tuner = hvp.Tuner(
        weight.detach(),
        {"unused": torch.zeros(1)},
        loss := (lambda w, h, batch: (w * batch).sum()),
        loss,
        weight_optimizer=lambda tensors: torch.optim.SGD(tensors, lr=8.0),
        hyper_optimizer=lambda tensors: torch.optim.SGD(tensors, lr=1.0),
        inner_steps=1,
        estimator=training.NoTuning(loss, loss),
    )
    metrics = iter([5.0, 4.0, 4.5, 4.2, 3.0, 3.5, 3.6])  # with a patience of 2 the fourth and the seventh are too high
    tuner.fit(
        [data],
        [data],
        7,
        progress=False,
        evaluate=lambda tuner: {"perplexity": next(metrics)},
        callbacks=[training.nonmonotone("perplexity", 2)],
    )
    assert tuner.weight_optimizer.param_groups[0]["lr"] == 0.5
    assert [record.val_loss for record in tuner.history][:2] == [-8.0, -16.0]


def test_processor_time_leaves_evaluations_out_and_goes_on_after_an_interruption(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(time, "process_time", lambda: clock[0])

    def loss(weights, hyper, batch):
        return (weights * batch).square().sum() + (hyper["rate"] * weights).sum()

    def passing(seconds, result):
        clock[0] += seconds
        return result

    def fit(steps):
        processor = training.ProcessorTime()
        tuner = hvp.Tuner(
            torch.ones(1),
            {"rate": torch.zeros(1)},
            loss,
            loss,
            weight_optimizer=lambda tensors: torch.optim.SGD(tensors, lr=0.1),
            hyper_optimizer=lambda tensors: torch.optim.SGD(tensors, lr=0.1),
            inner_steps=1,
            estimator=lambda *problem: passing(1.0, training.NoTuning(loss, loss)(*problem)),
        )
        options = {"progress": False, "checkpoint": tmp_path / "run.pt", "callbacks": [processor]}
        evaluate = processor.untimed(lambda tuner: passing(100.0, {}))
        history = tuner.fit([torch.ones(1)], [torch.ones(1)], steps, evaluate=evaluate, **options)
        return [record.metrics["processor_seconds"] for record in history]

    assert fit(2) == [1.0, 2.0]
    assert passing(1000.0, fit(4)) == [1.0, 2.0, 3.0, 4.0]


TINY = {
    "words": 13,
    "units": 16,
    "rows": 4,
    "time": 4,
    "steps": 48,
    "evaluations": 3,
    "curve_words": 100,
    "learning_rate": 5.0,
    "inner_steps": 2,
}


def test_tuning_moves_every_rate_and_has_a_row_for_every_search(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(ptb_tuning, "CALIBRATION", (6, 12))
    run, result = finished("ptb_tuning", tmp_path / "out", {"data": folder}, **TINY, seeds=1, hyper_learning_rate=0.2)
    table = rows(run, "table")
    by_method = {row["method"]: row for row in table if row["steps"] == "48"}
    for method in ("no tuning", "7", "many"):
        last = rows(run, f"{method}, 48 steps, seed 0")[-1]
        rates = [float(last[f"rate_{name}"]) for name in regularized_lstm.RATES]
        assert all((rate == 0.5) == (method == "no tuning") for rate in rates)
    assert by_method["7"]["hyperparameters"] == "7"
    assert by_method["many"]["hyperparameters"] == str(4 * 16 * 16 + 3 * 16 + 1)
    assert [row["method"] for row in table] == [
        *("no tuning", "7", "many", "no tuning", "no tuning"),
        *("self-tuning network", "random search", "grid search", "Bayesian optimization"),
    ]
    assert all(1 < float(row["test"]) < 20 for row in table)
    assert all(float(row["seconds"]) > 0 for row in table)
    longer, longest = (int(row["steps"]) for row in table[3:5])
    assert 48 < longer == longest / 2 and longer % 16 == 0  # whole rounds of evaluation
    assert [row["trainings"] for row in table] == ["1"] * 6 + ["4"] * 3
    assert all(int(row["steps"]) == longer // 4 for row in table[6:])
    assert result["costs"]["many, 48 steps, seed 0"]["ratio_to_plain_training"] > 1


def test_the_recipe_that_converges_has_no_searches(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(ptb_tuning, "CONVERGED", ptb_tuning.CONVERGED | {"steps": 24, "evaluations": 3})
    run, result = finished("ptb_tuning", tmp_path / "out", {"data": folder, "recipe": "converged"}, **TINY, seeds=2)
    table = rows(run, "table")
    assert [row["method"] for row in table] == ["no tuning", "7", "many", "no tuning"]
    assert [row["steps"] for row in table[:3]] == ["24"] * 3 and {row["seed"] for row in table} == {"0"}
    assert sum(line["what"].startswith("no tuning, ") for line in result["comparisons"]) == 2


def test_tuned_perplexity_is_below_untuned_at_equal_steps(folder, tmp_path):
    experiment, options = find("ptb_tuning"), Options("small", tmp_path / "out", folder)
    longer = TINY | {"steps": 144, "learning_rate": 10.0, "hyper_learning_rate": 0.12}
    settings = replace(experiment.settings(options), **longer)
    run, text = Run(experiment, options, settings), text_sets.load(folder, settings.words)
    run.start()
    found = {}
    for method in ("no tuning", "7", "many"):
        torch.manual_seed(0)
        problem = settings.problem(text, torch.device("cpu"))
        found[method], _ = ptb_tuning._tune(run, settings, problem, method, seed=0, steps=144)
    for part in ("validation", "test"):
        untuned, *tuned = (getattr(found[method], part) for method in ("no tuning", "7", "many"))
        assert max(tuned) < 0.9 * untuned < 0.9 * 13


def test_tuning_at_paper_size_resumes_to_the_same_numbers(folder, tmp_path, monkeypatch):
    small = TINY | {"steps": 6, "seeds": 1, "searches": (), "nonmonotone": 1}
    options = {"data": folder, "size": "paper"}
    whole, _ = finished("ptb_tuning", tmp_path / "whole", options, **small)

    perplexity, calls = text_sets.perplexity, []

    def failing(*arguments, **keywords):
        calls.append(arguments)
        if len(calls) == 3 + 2 + 2:  # the second evaluation of the second run
            raise Interrupted
        return perplexity(*arguments, **keywords)

    monkeypatch.setattr(text_sets, "perplexity", failing)
    with pytest.raises(Interrupted):
        finished("ptb_tuning", tmp_path / "parts", options, **small)
    monkeypatch.undo()
    parts, _ = finished("ptb_tuning", tmp_path / "parts", options | {"resume": True}, **small)
    for mine, other in zip(rows(parts, "table")[:3], rows(whole, "table")[:3], strict=True):  # the rest depends on time
        for name in ("steps", "validation", "test"):
            assert float(mine[name]) == pytest.approx(float(other[name]), rel=1e-5)
    spent = [float(row["processor_seconds"] or 0) for row in rows(parts, "7, 6 steps, seed 0")]
    assert 0 < spent[0] < spent[-1] and spent[1] == 0  # the step that was interrupted


def test_overfitting_at_paper_size_starts(folder, tmp_path):
    sizes = {"units": 8, "sequences": 3, "test_sequences": 10, "hyper_steps": 2}
    run, _ = finished("ptb_overfitting", tmp_path / "out", {"data": folder, "size": "paper"}, **sizes)
    assert len(rows(run, "overfitting")) == 2
