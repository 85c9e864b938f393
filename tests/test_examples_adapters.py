"""The example on models of transformers and peft at reduced size, and its hypergradient against plain autograd."""

from __future__ import annotations

import importlib.util
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from field_models import torchvision_operators
from torch.nn.attention import SDPBackend, sdpa_kernel

import hvp_engine as hvp

pytestmark = [
    pytest.mark.field,
    pytest.mark.skipif(
        any(importlib.util.find_spec(name) is None for name in ("transformers", "peft")),
        reason="needs transformers and peft",
    ),
]

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def example() -> ModuleType:
    torchvision_operators()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module("examples.adapter_decay")


@pytest.fixture
def problem(example: ModuleType) -> tuple[Any, Any]:
    """A model with adapters that are not zero, and two batches of other lengths."""
    torch.manual_seed(0)
    texts = ["a b c d", "b c a", "d d d a c b a b c d", "c b", "a a b b c c"] * 8
    batches = list(example.loader_of(example.tokenizer_of(texts), texts, False, workers=0))
    model = example.adapted(example.language_model())
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.2)
    return model, batches


def test_batches_are_as_the_tokenizer_makes_them(problem: Any) -> None:
    _, batches = problem
    assert [type(batch).__name__ for batch in batches] == ["BatchEncoding"] * 3
    assert batches[0].input_ids.shape == (16, 16) and not batches[0]["attention_mask"].all()
    assert (batches[0].labels == -100).equal(batches[0].attention_mask == 0)


@pytest.mark.parametrize("engine", ["auto", "eager"])
def test_the_hypergradient_under_autocast_is_that_of_plain_autograd(
    example: ModuleType, problem: Any, engine: str
) -> None:
    model, (batch, other, _) = problem
    decays = example.decays_of(model, each=True)
    train, val = example.losses_of(model)
    weights = {name: weight.detach() for name, weight in model.named_parameters() if weight.requires_grad}
    assert len(weights) == len(decays) == 14 and all("lora" in name for name in weights)
    decays = {name: decay + 1 for name, decay in decays.items()}
    found = hvp.Hypergradient(train, val, hvp.Neumann(2, alpha=0.05), engine)(weights, decays, batch, other)

    ws = {name: weight.clone().requires_grad_() for name, weight in weights.items()}
    hs = {name: decay.clone().requires_grad_() for name, decay in decays.items()}
    ours = list(ws.values())
    with sdpa_kernel(SDPBackend.MATH):
        v = torch.autograd.grad(val(ws, hs, other), ours)
        f = torch.autograd.grad(train(ws, hs, batch), ours, create_graph=True)
        total = p = [0.05 * t for t in v]
        for _ in range(2):
            product = torch.autograd.grad(f, ours, p, retain_graph=True)
            p = [t - 0.05 * s for t, s in zip(p, product, strict=True)]
            total = [t + s for t, s in zip(total, p, strict=True)]
        mixed = torch.autograd.grad(f, list(hs.values()), total)
    expected = -torch.stack(mixed)
    grads = torch.stack(list(found.grads.values()))
    assert float((grads - expected).norm() / expected.norm()) < 1e-2 and float(expected.norm()) > 0


def test_decays_are_tuned_and_the_model_itself_stays(example: ModuleType, problem: Any) -> None:
    model, batches = problem
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    decays = example.decays_of(model, each=True)
    history = example.tuner_of(model, decays).fit(batches, batches, 3, progress=False)
    assert len(history) == 3 and all(float(decay) != -5.0 for decay in decays.values())
    changed = {name for name, tensor in model.state_dict().items() if not tensor.equal(before[name])}
    assert changed == {name for name in before if "lora" in name}


def test_tuned_decays_help_on_real_text(example: ModuleType) -> None:
    rows = {name: figures for name, *figures in example.run(hyper_steps=16, pretraining=150)}
    assert [count for count, *_ in rows.values()] == [0, 0, 1, 14]
    (_, *before), (_, *plain), (_, *one), (_, *each) = rows.values()
    assert plain[0] < 0.8 * before[0] and plain[2] > 1.1 * before[2]  # few sentences are learned by heart
    assert one[2] < 0.9 * plain[2] and each[2] < 0.9 * plain[2]


def test_the_script_reads_the_penn_treebank_and_prints_its_table(
    example: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [f" the firm sold N {what} of its word{n % 50} " for n in range(200) for what in ("shares", "dogs")]
    (tmp_path / "ptb").mkdir()
    (tmp_path / "ptb" / "ptb.train.txt").write_text("\n".join(lines))
    general, special = example.texts(tmp_path)
    assert len(general) == len(special) == 200 and all("shares" in text for text in special)
    sizes = ["--data", str(tmp_path), "--sentences", "16", "--hyper-steps", "1", "--pretraining", "2"]
    monkeypatch.setattr(sys, "argv", ["adapter_decay.py", *sizes])
    monkeypatch.setattr(example, "WARMUP_STEPS", 2)
    example.main()
    head, *rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 4 and all(len(row) <= len(head) for row in rows)
    assert "](adapter_decay.py)" in (ROOT / "examples" / "README.md").read_text()
