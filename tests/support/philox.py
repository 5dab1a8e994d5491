"""An independent implementation of dropout's random numbers: Philox4x32 in numpy, and the resulting mask."""

import numpy as np

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 7
LOW = np.uint64(0xFFFFFFFF)
HALF = np.uint64(32)


def philox4x32(counter, key, rounds: int):
    """Four arrays of 32-bit words from four counter words and two key words: Salmon et al. (2011)."""
    c = [np.asarray(x, dtype=np.uint64) for x in counter]
    k = [int(x) for x in key]
    for _ in range(rounds):
        products = [np.uint64(MULTIPLIERS[0]) * c[0], np.uint64(MULTIPLIERS[1]) * c[2]]
        high, low = [p >> HALF for p in products], [p & LOW for p in products]
        c = [high[1] ^ c[1] ^ np.uint64(k[0]), low[1], high[0] ^ c[3] ^ np.uint64(k[1]), low[0]]
        k = [(x + w) & 0xFFFFFFFF for x, w in zip(k, WEYL, strict=True)]
    return c


def random_bits(batch_head: int, rows: int, keys: int, seed: int, offset: int) -> np.ndarray:
    """The 16 random bits of each weight of one head: (rows, keys).

    One Philox call covers rows r, r + 8 (low and high half of a word) and keys j, j + 8, j + 16, j + 24 (the words),
    for r and j in the first octet of a block of 16 rows and 32 keys.
    """
    row, key = np.meshgrid(np.arange(rows), np.arange(keys), indexing="ij")
    counter = (row // 16 * 8 + row % 8, key // 32 * 8 + key % 8, np.full_like(row, batch_head), offset & 0xFFFFFFFF)
    words = philox4x32(counter, (seed & 0xFFFFFFFF, (seed >> 32) ^ (offset >> 32)), ROUNDS)
    word = np.choose(key // 8 % 4, words)
    return np.where(row // 8 % 2 == 1, word >> np.uint64(16), word & np.uint64(0xFFFF)).astype(np.int64)


def keep_mask(batch: int, heads: int, rows: int, keys: int, seed: int, offset: int, threshold: int) -> np.ndarray:
    """(batch, heads, rows, keys), True where a weight is kept."""
    bits = [random_bits(b * heads + h, rows, keys, seed, offset) for b in range(batch) for h in range(heads)]
    return np.stack(bits).reshape(batch, heads, rows, keys) >= threshold
