"""What a training script has at each hyper step: a network, weights to tune, and a fresh batch."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.problems import PROBLEMS, Batch, Problem, Recipe, built

WORDS, LENGTH, PADDING = 200, 32, 0


class MaskedTransformer(nn.Module):
    """A small encoder that looks at its mask in Python, as models of other packages do."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, 64)
        layer = nn.TransformerEncoderLayer(64, 4, 128, 0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.decoder = nn.Linear(64, WORDS)

    def forward(self, words: Tensor) -> Tensor:
        padding = words == PADDING
        mask = padding if padding.any() else None
        return self.decoder(self.encoder(self.embedding(words), src_key_padding_mask=mask))


class Bert(nn.Module):
    """BERT of transformers, small, with the attention mask that padding gives."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import BertConfig, BertForSequenceClassification

        config = BertConfig(
            vocab_size=1000,
            hidden_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=512,
            max_position_embeddings=64,
        )
        self.model = BertForSequenceClassification(config)

    def forward(self, words: Tensor) -> Tensor:
        return self.model(input_ids=words, attention_mask=(words != PADDING).long()).logits


def padded_text(words: int, count: int) -> Tensor:
    """Sentences of different lengths, filled up with zeros."""
    text = torch.randint(1, words, (count, LENGTH))
    lengths = torch.randint(LENGTH // 2, LENGTH, (count, 1))
    return text.masked_fill(torch.arange(LENGTH) >= lengths, PADDING)


def _next_words(count: int) -> Batch:
    text = padded_text(WORDS, count)
    return text, text.roll(-1, 1)


def _labelled(count: int) -> Batch:
    return padded_text(1000, count), torch.randint(2, (count,))


def _twenty_numbers(count: int) -> Batch:
    return torch.randn(count, 20), (torch.rand(count, 1) > 0.5).float()


def _word_loss(scores: Tensor, words: Tensor) -> Tensor:
    return F.cross_entropy(scores.flatten(0, 1), words.flatten(), ignore_index=PADDING)


_math = partial(sdpa_kernel, SDPBackend.MATH)

OTHERS = {
    "20 weights": Recipe(
        partial(nn.Linear, 20, 1, bias=False), _twenty_numbers, F.binary_cross_entropy_with_logits, alpha=0.1
    ),
    "masked transformer": Recipe(MaskedTransformer, _next_words, _word_loss, alpha=0.05, size=16, kernels=_math),
    "bert": Recipe(Bert, _labelled, F.cross_entropy, alpha=0.01, size=8, kernels=_math),
}

NAMES = ("20 weights", "logistic", "mlp", "lenet", "resnet20", "lstm", "looped-lstm", "masked transformer", "bert")


def missing(name: str) -> str | None:
    """Why a problem cannot be built here, if it cannot."""
    if name == "bert" and importlib.util.find_spec("transformers") is None:
        return "transformers is not installed"
    return None


def build(name: str) -> tuple[Problem, Callable[[], Batch]]:
    """The problem, and a source of fresh batches for it."""
    recipe = OTHERS.get(name) or PROBLEMS[name]
    return built(name, recipe), partial(recipe.batch, recipe.size)
