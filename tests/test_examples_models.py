"""The paper's networks have the counts that it states, and work on images and words of their sizes."""

from __future__ import annotations

import pytest
import torch

from examples import models

MNIST, CIFAR = (1, 28, 28), (3, 32, 32)


def count(tensors) -> int:
    return sum(tensor.numel() for tensor in tensors)


@pytest.mark.parametrize(
    ("make", "shape", "classes", "weights"),
    [
        (models.linear, MNIST, 10, 7_850),
        (models.linear, CIFAR, 10, 30_730),
        (models.one_layer, MNIST, 10, 623_290),
        (models.one_layer, CIFAR, 10, 9_470_986),
        (models.lenet5, MNIST, 10, 61_706),
        (models.lenet5, CIFAR, 10, 62_006),
        (models.wide_lenet, MNIST, 10, 247_960),
        (models.wide_lenet, CIFAR, 10, 323_320),
        (models.small_cnn, (1, 14, 14), 10, 7_690),
        (models.alexnet, CIFAR, 10, 56_826_698),
        (models.resnet44, CIFAR, 10, 658_586),
        (models.resnet18, CIFAR, 10, 11_173_962),
        (models.resnet18, CIFAR, 100, 11_220_132),
    ],
)
def test_counts_and_output_shapes(make, shape, classes, weights):
    with torch.device("meta"):
        module = make(shape, classes)
        assert count(module.parameters()) == weights
        assert count(models.weight_decays(module, -4.0).values()) == weights
        assert module(torch.empty(2, *shape)).shape == (2, classes)


def test_the_lstm_is_tied_and_goes_on_from_its_state():
    with torch.device("meta"):
        assert count(models.TiedLSTM().parameters()) == 13_280_400
    lstm, words = models.TiedLSTM(words=7, units=5, scale=1.0), torch.tensor([[1, 2, 3, 6], [0, 5, 4, 4]])
    logits, _, raw, dropped = lstm(words)
    assert logits.shape == (2, 4, 7)
    assert torch.equal(raw, dropped)
    first, states, _, _ = lstm(words[:, :1])
    rest, _, _, _ = lstm(words[:, 1:], states)
    torch.testing.assert_close(torch.cat([first, rest], 1), logits)
    torch.testing.assert_close(lstm(words, context=1)[0], rest)


def test_the_context_is_a_constant():
    lstm, words = models.TiedLSTM(words=7, units=5, scale=1.0), torch.tensor([[1, 2, 3, 6]])
    weights = list(lstm.parameters())
    grads = torch.autograd.grad(lstm(words, context=2)[0].square().sum(), weights)
    _, states, _, _ = lstm(words[:, :2])
    constant = [(output.detach(), cell.detach()) for output, cell in states]
    expected = torch.autograd.grad(lstm(words[:, 2:], constant)[0].square().sum(), weights)
    torch.testing.assert_close(grads, expected)
    through = torch.autograd.grad(lstm(words[:, 2:], states)[0].square().sum(), weights)
    assert not all(map(torch.allclose, through, grads))


def test_masks_of_the_lstm():
    lstm, words = models.TiedLSTM(words=7, units=5), torch.tensor([[1, 2, 3], [0, 5, 4]])
    ones = {name: torch.ones(2, 1, 5) for name in ("input", "hidden", "output")} | {"embedding": torch.ones(7)}
    torch.testing.assert_close(lstm(words, masks=ones)[0], lstm(words)[0])
    zero = {"embedding": torch.zeros(7), "input": torch.zeros(2, 1, 5), "hidden": torch.zeros(2, 1, 5)}
    for name, mask in zero.items():  # then every word is like every other
        other = words.flip(1) if name != "embedding" else 6 - words
        torch.testing.assert_close(lstm(words, masks=ones | {name: mask})[0], lstm(other, masks=ones | {name: mask})[0])
    logits, _, raw, dropped = lstm(words, masks=ones | {"output": torch.zeros(2, 1, 5)})
    assert raw.any() and not dropped.any()
    assert torch.equal(logits, lstm.bias.expand(2, 3, 7))


@pytest.mark.parametrize(
    ("shape", "classes", "pixels"), [(MNIST, 10, 7_840), (CIFAR, 10, 30_720), (CIFAR, 100, 307_200)]
)
def test_distilled_pixels(shape, classes, pixels):
    assert models.images_per_class(shape, classes).numel() == pixels


def test_dropout_rates():
    rates = models.dropout_rates(rate=0.2, device="meta")
    assert count(rates.values()) == 1_691_951 == 2600 * 650 + 3 * 650 + 1
    assert all(torch.allclose(r.sigmoid(), torch.tensor(0.2)) for r in models.dropout_rates(3, rate=0.2).values())
    with torch.device("meta"):
        recurrent = models.TiedLSTM().recurrent
    assert all(w.shape == rates["drop_connect"].shape for n, w in recurrent.named_parameters() if "weight_hh" in n)
