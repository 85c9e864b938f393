"""Dropout masks by a counter-based generator: made again wherever they are needed, never stored.

Philox 4x32-10 turns a counter of four words and a key of two into four random words. The four words of the counter
(j // 4, i, head, 0), under the seed as the key, belong to query i and keys j, j + 1, j + 2, j + 3 of a head, counted
through the batch. So keys 4 to 7 of query 2 in head 1 get the words of (1, 2, 1, 0), whichever part asks for them.

Source: Salmon et al., Parallel random numbers: as easy as 1, 2, 3, SC 2011.
"""

from __future__ import annotations

import torch
from torch import Tensor

WORD = 1 << 32
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four random words of each counter, as int64 numbers below 2^32."""
    a, b, c, d = counter
    low, high = seed % WORD, (seed >> 32) % WORD
    for _ in range(_ROUNDS):
        # The product of two words wraps around to a negative int64 with the same 64 bits.
        first, second = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]
        a, b, c, d = (
            (second >> 32) % WORD ^ b ^ low,
            second % WORD,
            (first >> 32) % WORD ^ d ^ high,
            first % WORD,
        )
        low, high = (low + _INCREMENTS[0]) % WORD, (high + _INCREMENTS[1]) % WORD
    return a, b, c, d


def threshold(dropout_p: float) -> int:
    """A number is dropped if its random word is below this."""
    return min(round(dropout_p * WORD), WORD - 1)


def dropout_factors(seed: Tensor, shape: tuple[int, int, int, int], dropout_p: float, dtype: torch.dtype) -> Tensor:
    """0 for what is dropped, 1 / (1 - p) for the rest, for a batch x heads x queries x keys."""
    if dropout_p == 1:
        return torch.zeros(shape, dtype=dtype, device=seed.device)
    batch, heads, queries, keys = shape
    counts = [torch.arange(n, device=seed.device) for n in (batch * heads, queries, (keys + 3) // 4)]
    head, query, quarter = torch.meshgrid(*counts, indexing="ij")
    words = torch.stack(philox((quarter, query, head, torch.zeros_like(head)), seed), -1)
    words = words.reshape(batch, heads, queries, -1)[..., :keys]
    return (words >= threshold(dropout_p)).to(dtype) / (1 - dropout_p)
