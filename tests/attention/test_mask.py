"""The masks shared by all backends (csrc/policy/) against Python definitions.

They are compared exhaustively for small shapes and windows, and by random trials beyond.
"""

import ctypes
import itertools

import hypothesis
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from policies import ints

UNBOUNDED = 1 << 30


def spans(length: int) -> np.ndarray:
    """All (begin, end) with 0 <= begin < end <= length, in the order of the C code."""
    found = [(a, b) for a in range(length) for b in range(a + 1, length + 1)]
    return np.array(found, dtype=np.int64).reshape(-1, 2)


def mask_numbers(seqlen_q, seqlen_k, left, right, chunk, starts):
    """The numbers that policies.cpp takes for a mask."""
    unbounded = [UNBOUNDED if side < 0 else side for side in (left, right)]
    return ints([seqlen_q, seqlen_k, *unbounded, chunk, starts is not None, *(starts or (0, 0))])


def brute_mask(seqlen_q, seqlen_k, left, right, chunk, starts) -> np.ndarray:
    first_q, first_k = starts or (seqlen_k - seqlen_q, 0)
    row = np.arange(seqlen_q)[:, None] + first_q
    key = np.arange(seqlen_k)[None, :] + first_k
    keep = np.ones((seqlen_q, seqlen_k), dtype=bool)
    if left >= 0:
        keep &= row - key <= left
    if right >= 0:
        keep &= key - row <= right
    if chunk > 0:
        keep &= row // chunk == key // chunk
    return keep


def brute_range(lines: np.ndarray, ranges: np.ndarray):
    """First True and one past the last True in each range of lines; (0, 0) if there is none."""
    count = np.concatenate([np.zeros((1, lines.shape[1]), int), lines.cumsum(0)])
    seen = count[ranges[:, 1]] - count[ranges[:, 0]] > 0
    first = seen.argmax(1)
    last = seen.shape[1] - seen[:, ::-1].argmax(1)
    some = seen.any(1)
    return np.stack([np.where(some, first, 0), np.where(some, last, 0)], 1)


def check_mask(policies, seqlen_q, seqlen_k, left, right, chunk=0, starts=None):
    """keep, kv_range, q_range and is_full_block for all rows, keys and ranges. starts: q_start and k_start."""
    mask = brute_mask(seqlen_q, seqlen_k, left, right, chunk, starts)
    rows, keys = spans(seqlen_q), spans(seqlen_k)
    keep = np.zeros(mask.shape, np.uint8)
    kv_range, q_range = np.zeros((len(rows), 2), np.int32), np.zeros((len(keys), 2), np.int32)
    is_full_block = np.zeros((len(rows), len(keys)), np.uint8)
    arrays = [a.ctypes.data_as(ctypes.c_void_p) for a in (keep, kv_range, q_range, is_full_block)]
    policies.mask_tables(mask_numbers(seqlen_q, seqlen_k, left, right, chunk, starts), *arrays)
    where = f"seqlens {seqlen_q}, {seqlen_k}, window {left}, {right}, chunk {chunk}, starts {starts}"
    assert np.array_equal(keep, mask), where
    for found, lines, ranges in [(kv_range, mask, rows), (q_range, mask.T, keys)]:
        if lines.shape[1] == 0:
            assert (found[:, 0] >= found[:, 1]).all(), where
            continue
        expected = brute_range(lines, ranges) if len(ranges) else np.zeros((0, 2))
        empty = found[:, 0] >= found[:, 1]
        assert np.array_equal(np.where(empty[:, None], 0, found), expected), where
    total = np.zeros((seqlen_q + 1, seqlen_k + 1), int)
    total[1:, 1:] = mask.cumsum(0).cumsum(1)
    (a, b), (c, d) = rows.T[:, :, None], keys.T[:, None, :]
    num_visible = total[b, d] - total[a, d] - total[b, c] + total[a, c]
    assert np.array_equal(is_full_block, num_visible == (b - a) * (d - c)), where


@pytest.mark.parametrize("seqlen_q", range(10))
def test_mask_of_every_small_shape(policies, seqlen_q):
    for seqlen_k, left, right in itertools.product(range(10), range(-1, 11), range(-1, 11)):
        check_mask(policies, seqlen_q, seqlen_k, left, right)
    for seqlen_k, left, right, chunk in itertools.product(range(10), (-1, 0, 2), (-1, 0, 3), (1, 2, 3, 7, 11)):
        check_mask(policies, seqlen_q, seqlen_k, left, right, chunk)


@pytest.mark.parametrize("starts", list(itertools.product((0, 1, 4, 9), (0, 3, 8))))
def test_mask_of_every_small_shard(policies, starts):
    for seqlen_q, seqlen_k, left, right in itertools.product((1, 2, 5), (1, 3, 6), (-1, 0, 1, 4), (-1, 0, 2, 7)):
        check_mask(policies, seqlen_q, seqlen_k, left, right, starts=starts)
    for seqlen_q, seqlen_k, left, right, chunk in itertools.product((1, 5), (1, 6), (-1, 3), (-1, 0), (1, 2, 3, 7, 20)):
        check_mask(policies, seqlen_q, seqlen_k, left, right, chunk, starts)


STARTS = st.one_of(st.none(), st.tuples(st.integers(0, 60), st.integers(0, 60)))


@given(st.integers(0, 40), st.integers(0, 40), st.integers(-1, 50), st.integers(-1, 50), st.integers(0, 50), STARTS)
def test_mask_of_larger_shapes(policies, seqlen_q, seqlen_k, left, right, chunk, starts):
    check_mask(policies, seqlen_q, seqlen_k, left, right, chunk, starts)


LENGTH = st.one_of(st.integers(1, 300), st.integers(1, UNBOUNDED - 1))
SIDE = st.one_of(st.just(-1), st.integers(0, 300), st.integers(0, UNBOUNDED - 1))
CHUNK = st.one_of(st.just(0), st.integers(1, 300), st.integers(1, UNBOUNDED - 1))


def start_below(length):
    """Positions of rows are below the limit, too."""
    most = max(UNBOUNDED - 256 - length, 0)
    return st.one_of(st.integers(0, min(300, most)), st.integers(0, most))


@given(st.data(), LENGTH, LENGTH, SIDE, SIDE, CHUNK, st.booleans())
def test_mask_of_any_length(policies, data, seqlen_q, seqlen_k, left, right, chunk, is_shard):
    """Lengths up to the limit: no overflow, and the four functions agree with the definition and each other."""
    starts = tuple(data.draw(start_below(n)) for n in (seqlen_q, seqlen_k)) if is_shard else None
    mask = mask_numbers(seqlen_q, seqlen_k, left, right, chunk, starts)
    first_q, first_k = starts or (seqlen_k - seqlen_q, 0)

    def sees(row, key):
        position, key = first_q + row, first_k + key
        in_window = (left < 0 or key >= position - left) and (right < 0 or key <= position + right)
        return in_window and (chunk == 0 or position // chunk == key // chunk)

    rows = sorted(data.draw(st.tuples(st.integers(0, seqlen_q - 1), st.integers(0, seqlen_q - 1))))
    keys = sorted(data.draw(st.tuples(st.integers(0, seqlen_k - 1), st.integers(0, seqlen_k - 1))))
    rows[1], keys[1] = rows[1] + 1, keys[1] + 1
    row, key = data.draw(st.integers(rows[0], rows[1] - 1)), data.draw(st.integers(keys[0], keys[1] - 1))
    of_rows, of_keys = ints([0, 0]), ints([0, 0])
    policies.mask_kv_range(mask, *rows, of_rows)
    policies.mask_q_range(mask, *keys, of_keys)
    assert policies.mask_keep(mask, row, key) == sees(row, key)
    if sees(row, key):
        assert of_rows[0] <= key < of_rows[1]
        assert of_keys[0] <= row < of_keys[1]
    assert of_rows[0] >= 0
    assert of_rows[1] <= seqlen_k
    assert of_keys[0] >= 0
    assert of_keys[1] <= seqlen_q
    corners = sees(rows[0], keys[1] - 1) and sees(rows[1] - 1, keys[0])
    assert policies.mask_is_full_block(mask, *rows, *keys) == corners


@given(st.data(), LENGTH, LENGTH, SIDE, SIDE, CHUNK)
@example(None, 1, 1, -1, -1, 0)
@example(None, 1, 1, 0, UNBOUNDED - 1, UNBOUNDED - 1)
def test_rows_past_the_end_of_a_shard(policies, data, seqlen_q, seqlen_k, left, right, chunk):
    """Of a last tile: their positions do not overflow (which stops the process), and no key past the end is seen."""
    lengths = [min(n, UNBOUNDED - 256) for n in (seqlen_q, seqlen_k)]
    starts = tuple(data.draw(start_below(n)) for n in lengths) if data else (UNBOUNDED - 256 - lengths[0], 0)
    mask = mask_numbers(*lengths, left, right, chunk, starts)
    rows, keys = ((n - 1, n + 255) for n in lengths)
    for row, key in itertools.product(*((begin, end - 1) for begin, end in (rows, keys))):
        assert policies.mask_keep(mask, row, key) == (key < lengths[1] and policies.mask_keep(mask, row, key))
    assert not policies.mask_is_full_block(mask, *rows, *keys)
    out = ints([0, 0])
    policies.mask_kv_range(mask, *rows, out)
    assert 0 <= out[0] <= out[1] <= lengths[1]
    policies.mask_q_range(mask, *keys, out)
    assert 0 <= out[0] <= out[1] <= lengths[0]


INT32 = (-(2**31), 2**31 - 1)
# Bounds of ranges: near the keys, far outside of them, anything.
EDGE = st.sampled_from([0, 1, 63, 64, 65, 127, 128, 129])
BOUND = st.one_of(EDGE, st.integers(-5, 300), st.sampled_from(INT32), st.integers(*INT32))


def draw_ranges(data, seqlen_q, seqlen_k) -> np.ndarray:
    """(seqlen_q, 2): documents, prefixes, the same for all queries, or anything; some are empty or reversed."""
    kind = data.draw(st.sampled_from(["all", "documents", "prefix", "any", "mixed"]))
    bounds = st.tuples(BOUND, BOUND)
    if kind == "all":
        return np.array([data.draw(bounds)] * seqlen_q, np.int64).reshape(-1, 2)
    if kind == "prefix":
        ends = sorted(data.draw(st.lists(BOUND, min_size=seqlen_q, max_size=seqlen_q)))
        return np.array([(0, end) for end in ends], np.int64).reshape(-1, 2)
    if kind == "documents":
        cuts = st.lists(st.one_of(EDGE, st.integers(0, 200)), min_size=3, max_size=3)
        first_rows, first_keys = (np.array(sorted(data.draw(cuts))) for _ in "qk")
        document = np.searchsorted(first_rows, np.arange(seqlen_q), "right")
        keys = np.array([0, *first_keys, seqlen_k])
        return np.stack([keys[document], keys[document + 1]], 1)
    few = data.draw(st.lists(bounds, min_size=1, max_size=4))
    usual = [(0, seqlen_k)] * 9 if kind == "mixed" else []
    generator = np.random.default_rng(data.draw(st.integers(0, 99)))
    return np.array([*usual, *few], np.int64)[generator.integers(0, len(usual) + len(few), seqlen_q)].reshape(-1, 2)


def pointers(*arrays):
    return [array.ctypes.data_as(ctypes.c_void_p) for array in arrays]


def spans_of_ranges(policies, mask, ranges, rows, keys):
    """kv_range, q_range and is_full_block of spans of rows and of keys."""
    of_rows, of_keys = np.zeros((len(rows), 2), np.int32), np.zeros((len(keys), 2), np.int32)
    full = np.zeros((len(rows), len(keys)), np.uint8)
    rows, keys = rows.astype(np.int32), keys.astype(np.int32)
    policies.ranges_of_spans(
        mask, *pointers(ranges, rows), len(rows), *pointers(keys), len(keys), *pointers(of_rows, of_keys, full)
    )
    return of_rows, of_keys, full


def tile_spans(length, data) -> np.ndarray:
    """Spans as kernels have them, which are sums of blocks of 64, and others."""
    found = [(begin, min(begin + size, length)) for size in (64, 128, 192) for begin in range(0, length, size)]
    found += [(begin, min(begin + 16, length)) for begin in range(0, length, 48)]
    found += [sorted(data.draw(st.tuples(st.integers(0, length - 1), st.integers(1, length)))) for _ in range(4)]
    return np.array([(a, b) for a, b in found if a < b], np.int64)


@given(
    st.data(), st.integers(1, 200), st.integers(1, 200), *[st.one_of(st.just(-1), st.integers(0, 150))] * 2,
    st.one_of(st.just(0), st.integers(1, 150)), STARTS,
)  # fmt: skip
@hypothesis.settings(max_examples=400)
def test_ranges_of_keys(policies, data, seqlen_q, seqlen_k, left, right, chunk, starts):
    """keep and visible() are as defined; kv_range and q_range have every pair, and a full block hides none.

    Of blocks of 64 rows and keys, they are as narrow as they can be.
    """
    wide = np.ascontiguousarray(draw_ranges(data, seqlen_q, seqlen_k))
    ranges = wide.astype(np.int32)
    numbers = mask_numbers(seqlen_q, seqlen_k, left, right, chunk, starts)
    key = np.arange(seqlen_k, dtype=np.int32)
    window = brute_mask(seqlen_q, seqlen_k, left, right, chunk, starts)
    in_range = (key >= wide[:, :1]) & (key < wide[:, 1:])
    mask = window & in_range
    keep, seen = np.zeros(mask.shape, np.uint8), np.zeros((seqlen_q, 2), np.int32)
    policies.ranges_keep(numbers, *pointers(ranges, key), seqlen_k, *pointers(keep, seen))
    assert np.array_equal(keep, mask)
    assert np.array_equal((key >= seen[:, :1]) & (key <= seen[:, 1:]), mask)

    rows, keys = tile_spans(seqlen_q, data), tile_spans(seqlen_k, data)
    of_rows, of_keys, full = spans_of_ranges(policies, numbers, ranges, rows, keys)
    is_wide = window.all()
    for found, lines, spans_ in [(of_rows, mask, rows), (of_keys, mask.T, keys)]:
        expected = brute_range(lines, spans_)
        some = expected[:, 0] < expected[:, 1]
        assert (found[:, 0] >= 0).all()
        assert (found[:, 1] <= lines.shape[1]).all()
        assert (found[some, 0] <= expected[some, 0]).all()
        assert (found[some, 1] >= expected[some, 1]).all()
        if is_wide:
            exact = aligned(spans_, lines.shape[0])
            assert np.array_equal(np.where((found[:, 0] < found[:, 1])[:, None], found, 0)[exact], expected[exact])
    for i, (a, b) in enumerate(rows):
        visible = np.array([mask[a:b, c:d].all() for c, d in keys])
        assert (full[i] <= visible).all()
        if aligned(rows[i : i + 1], seqlen_q)[0]:
            assert np.array_equal(full[i], visible)


def aligned(found: np.ndarray, length: int) -> np.ndarray:
    return (found[:, 0] % 64 == 0) & ((found[:, 1] % 64 == 0) | (found[:, 1] == length))


@given(st.data(), st.integers(1, 70), LENGTH, SIDE, SIDE, CHUNK, st.booleans())
def test_ranges_of_any_length(policies, data, seqlen_q, seqlen_k, left, right, chunk, is_shard):
    """Lengths and positions up to the limit, any 32 bits as a range: no overflow, which stops the process."""
    starts = tuple(data.draw(start_below(n)) for n in (seqlen_q, seqlen_k)) if is_shard else None
    numbers = mask_numbers(seqlen_q, seqlen_k, left, right, chunk, starts)
    wide = np.ascontiguousarray(draw_ranges(data, seqlen_q, seqlen_k))
    ranges = wide.astype(np.int32)
    key = np.unique(np.array([data.draw(st.integers(0, seqlen_k - 1)) for _ in range(6)], np.int32))
    keep, seen = np.zeros((seqlen_q, len(key)), np.uint8), np.zeros((seqlen_q, 2), np.int32)
    policies.ranges_keep(numbers, *pointers(ranges, key), len(key), *pointers(keep, seen))
    for (i, row), (j, column) in itertools.product(enumerate(range(seqlen_q)), enumerate(key.tolist())):
        in_range = wide[row, 0] <= column < wide[row, 1]
        assert keep[i, j] == (in_range and policies.mask_keep(numbers, row, column))
    rows = np.array([(0, seqlen_q), (0, seqlen_q + 64), (seqlen_q - 1, seqlen_q + 255)])
    keys = np.array([(key[0], key[-1] + 1), (round_down(seqlen_k - 1, 64), round_down(seqlen_k - 1, 64) + 64)])
    of_rows, of_keys, full = spans_of_ranges(policies, numbers, ranges, rows, keys)
    assert ((of_rows >= 0) & (of_rows <= seqlen_k)).all()
    assert ((of_keys >= 0) & (of_keys <= seqlen_q)).all()
    visible = keep.any(0)
    assert (of_rows[0, 0] <= key[visible]).all()
    assert (key[visible] < of_rows[0, 1]).all()
    assert full[0, 0] <= keep.all()


def round_down(number: int, multiple: int) -> int:
    return number // multiple * multiple
