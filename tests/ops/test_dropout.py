"""The dropout mask: the bits of Philox, and of Triton's implementation of it."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megakrause.ops.dropout import keep_mask

WORD = 2**32
Four = tuple[int, int, int, int]


def philox(counter: Four, key: tuple[int, int]) -> Four:
    """Philox-4x32-10 from the paper, in whole numbers of any size."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = b // WORD ^ c1 ^ k0, b % WORD, a // WORD ^ c3 ^ k1, a % WORD
        k0, k1 = (k0 + 0x9E3779B9) % WORD, (k1 + 0xBB67AE85) % WORD
    return c0, c1, c2, c3


@pytest.mark.parametrize(
    "counter, key, expected",
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_the_oracle_gives_the_published_test_vectors(counter: str, key: str, expected: str) -> None:
    def words(text: str) -> tuple[int, ...]:
        return tuple(int(word, 16) for word in text.split())

    assert philox(words(counter), words(key)) == words(expected)  # type: ignore[arg-type]


def word(seed: int, head: int, query: int, key: int) -> int:
    """The random number behind the mask: the smallest threshold that it does not reach, less one."""
    one = [torch.tensor(x) for x in (head, query, key)]
    low, high = 0, WORD  # kept at `low`, dropped at `high`
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if keep_mask(seed, *one, dropout=middle / WORD) else (low, middle)
    return low


CHOOSE = random.Random(0)
PLACES = [(0, 0, 0, 0), (2**63 - 1, WORD - 1, WORD - 1, WORD - 1), (1, 0, 0, 0), (WORD, 0, 0, 0), (5, 1, 2, 3)]
PLACES += [(CHOOSE.randrange(2**63), *(CHOOSE.randrange(WORD) for _ in range(3))) for _ in range(20)]  # type: ignore[misc]


@pytest.mark.parametrize("seed, head, query, key", PLACES)
def test_the_mask_is_philox(seed: int, head: int, query: int, key: int) -> None:
    assert word(seed, head, query, key) == philox((key, query, head, 0), (seed % WORD, seed // WORD))[0]


def mask(seed: int, dropout: float, heads: int = 4, queries: int = 100, keys: int = 90) -> Tensor:
    head, query = torch.arange(heads)[:, None, None], torch.arange(queries)[:, None]
    return keep_mask(seed, head, query, torch.arange(keys), dropout)


def test_one_mask_for_any_shape_it_is_asked_in() -> None:
    whole = mask(3, 0.3)
    assert whole.shape == (4, 100, 90) and whole.dtype == torch.bool
    part = keep_mask(3, torch.tensor(2), torch.arange(10, 20)[:, None], torch.arange(50, 60), 0.3)
    assert torch.equal(part, whole[2, 10:20, 50:60])
    assert torch.equal(whole, mask(3, 0.3))


@pytest.mark.parametrize("dropout", [0.0, 0.1, 0.5, 0.9])
def test_the_share_that_stays(dropout: float) -> None:
    stays = mask(11, dropout)
    deviation = (dropout * (1 - dropout) / stays.numel()) ** 0.5
    assert abs(stays.double().mean() - (1 - dropout)) <= 4 * deviation
    assert torch.equal(stays & mask(11, 0.95), mask(11, 0.95))  # what stays at a higher rate stays at a lower one


def test_seeds_heads_queries_and_keys_are_independent() -> None:
    """Two masks that both drop half of n weights agree in n / 2 places, give or take four standard deviations."""
    n = 90
    one = mask(1, 0.5, n, n, n)
    pairs = [(one, mask(seed, 0.5, n, n, n)) for seed in (2, 1 + WORD)]
    pairs += [(one, one.roll(1, axis)) for axis in range(3)]
    apart = ~torch.eye(n, dtype=torch.bool)  # where the two indices that are swapped differ
    for axes in ((0, 1), (0, 2), (1, 2)):
        by_two = one.movedim(axes, (0, 1))
        pairs.append((by_two[apart], by_two.transpose(0, 1)[apart]))
    for a, b in pairs:
        deviation = 0.5 * (2 / a.numel()) ** 0.5  # some pairs count twice
        assert abs((a == b).double().mean() - 0.5) <= 4 * deviation


TRITON = """
import sys, torch, triton, triton.language as tl

@triton.jit
def words(seed, key, query, head, out, n: tl.constexpr):
    i = tl.arange(0, n)
    zero = tl.zeros([n], tl.int32)
    result, _, _, _ = tl.philox(seed, tl.load(key + i), tl.load(query + i), tl.load(head + i), zero)
    tl.store(out + i, result.to(tl.int32, bitcast=True))

n = 64
generator = torch.Generator().manual_seed(0)
key, query, head = torch.randint(0, 2**31 - 1, (3, n), generator=generator).int()
out = torch.zeros(n, dtype=torch.int32)
for seed in map(int, sys.argv[1:]):
    words[(1,)](seed, key, query, head, out, n)
    for row in zip(key.tolist(), query.tolist(), head.tolist(), out.tolist()):
        print(seed, *row)
"""


def test_triton_draws_the_same_bits(tmp_path: Path) -> None:
    """In Triton's interpreter: kernels that draw their mask with tl.philox will agree with this one."""
    script = tmp_path / "words.py"
    script.write_text(TRITON)
    command = [sys.executable, str(script), "3", str(2**40 + 3)]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
    assert len(rows) == 2 * 64
    for seed, key, query, head, drawn in rows:
        assert philox((key, query, head, 0), (seed % WORD, seed // WORD))[0] == drawn % WORD
