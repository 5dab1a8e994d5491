"""Lengths, tables and random numbers of all backends (csrc/policy/) against Python definitions.

What could come from a device is also tested with invalid values.
"""

import ctypes
import itertools

import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

import philox
from policies import ints

HOSTILE = st.one_of(st.integers(-5, 40), st.integers(-(2**31), 2**31 - 1), st.sampled_from([-(2**31), 2**31 - 1]))


@given(
    st.tuples(*[st.lists(HOSTILE, min_size=4, max_size=4)] * 4),
    st.tuples(*[st.booleans()] * 4),
    st.tuples(*[st.integers(0, 50)] * 4),
    st.tuples(st.integers(0, 4), st.integers(0, 9), st.integers(1, 20), st.integers(0, 9)),
)
@example(([0, 2**31 - 1, -(2**31), 5],) * 4, (True,) * 4, (50, 50, 40, 40), (0, 1, 7, 0))
@example(([-(2**31), 2**31 - 1, 0, 0],) * 4, (True, True, True, False), (50, 50, 50, 50), (0, 1, 7, 0))
@example(([-(2**31), 2**31 - 1, 0, 0],) * 4, (False, True, True, False), (50, 50, 50, 50), (0, 1, 7, 2**30 - 1))
def test_hostile_lengths_stay_inside(policies, values, is_given, sizes, pages):
    """Whatever cu_seqlens, seqused_k and leftpad_k contain, sequences stay within their tensors."""
    packed, paged = is_given[0], is_given[0] and is_given[3]
    cu_q, cu_k = (values[0], values[1]) if packed else (None, None)
    seqused, leftpad = values[2] if is_given[1] else None, values[3] if is_given[2] else None
    total_q, total_k, max_q, max_k = sizes
    arrays = [ints(array) for array in (cu_q, cu_k, seqused, leftpad, [0] if paged else None)]
    for batch in range(3):
        out = ints([0] * 4, ctypes.c_int64)
        policies.sequence(*arrays, ints([*sizes, *pages]), batch, out)
        first_q, seqlen_q, first_k, seqlen_k = out
        limit_q = total_q if packed else max_q
        limit_k = pages[0] * pages[2] if paged else total_k if packed else max_k
        assert 0 <= first_q <= first_q + seqlen_q <= limit_q
        assert 0 <= first_k <= first_k + seqlen_k <= limit_k
        assert seqlen_q <= max_q
        assert seqlen_k <= max_k


@given(st.data(), st.lists(st.integers(0, 30), min_size=3, max_size=3), st.booleans())
def test_honest_lengths_are_kept(policies, data, lengths, padded):
    """Valid lengths are not changed, except by seqused_k and leftpad_k."""
    cu = [0, *itertools.accumulate(lengths)]
    seqused = [data.draw(st.integers(0, n)) for n in lengths]
    leftpad = [data.draw(st.integers(0, n)) for n in seqused] if padded else None
    for batch in range(3):
        out = ints([0] * 4, ctypes.c_int64)
        arrays = [ints(array) for array in (cu, cu, seqused, leftpad, None)]
        policies.sequence(*arrays, ints([cu[-1], cu[-1], max(lengths), max(lengths), 0, 0, 1, 0]), batch, out)
        skipped = leftpad[batch] if leftpad else 0
        assert tuple(out) == (cu[batch], lengths[batch], cu[batch] + skipped, seqused[batch] - skipped)


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 40)), min_size=3, max_size=3), st.integers(-99, 99))
def test_keys_in_use_leave_gaps(policies, sequences, unread):
    """With seqused_k only the starts in cu_seqlens_k are used: sequences may be in any order and overlap."""
    starts, used = zip(*sequences, strict=True)
    arrays = [ints(array) for array in ([0, 1, 2, 3], [*starts, unread], used, None, None)]
    for batch in range(3):
        out = ints([0] * 4, ctypes.c_int64)
        policies.sequence(*arrays, ints([3, 100, 1, 40, 0, 0, 1, 0]), batch, out)
        assert tuple(out) == (batch, 1, starts[batch], used[batch])


@given(st.integers(-3, 40), st.integers(0, 9), st.integers(0, 50), st.integers(0, 30), st.booleans())
def test_rows_of_a_cache(policies, length, seqlen_new, leftpad, capacity, paged):
    """New rows come after those in the cache, as far as there is room; with a negative length there are none at all."""
    arrays = [ints(array) for array in (None, None, [length], [leftpad], [0] if paged else None)]
    out = ints([0] * 4, ctypes.c_int64)
    policies.sequence(*arrays, ints([0, 0, 3, capacity, capacity, 9, 1, seqlen_new]), 0, out)
    rows = min(length + seqlen_new, capacity) if length >= 0 else 0
    assert tuple(out) == (0, 3, min(leftpad, rows), rows - min(leftpad, rows))


@given(
    st.lists(HOSTILE, min_size=6, max_size=6), st.integers(1, 300), st.integers(0, 20), st.integers(1, 2**40), st.data()
)
def test_pages_outside_of_the_pool_have_no_offset(policies, table, page_size, num_pages, page_stride, data):
    """Row j of a sequence is row j % page_size of its page j / page_size; invalid pages give offset -1."""
    batch, row = data.draw(st.integers(0, 1)), data.draw(st.integers(0, 3 * page_size - 1))
    row_stride = data.draw(st.integers(1, 2**20))
    page = table[batch * 3 + row // page_size]
    strides = ints([page_stride, row_stride, 1], ctypes.c_int64)
    found = policies.row_offset(strides, ints(table), ints([3, num_pages, page_size]), batch, ctypes.c_int64(row))
    expected = page * page_stride + row % page_size * row_stride if 0 <= page < num_pages else -1
    assert found == expected


@given(st.integers(0, 2**20), st.integers(0, 2**40), st.integers(0, 2**20), st.integers(0, 2**20))
def test_offsets_of_dense_rows_are_64_bit(policies, batch, batch_stride, row, row_stride):
    strides = ints([batch_stride, row_stride, 1], ctypes.c_int64)
    assume(batch * batch_stride < 2**62)
    found = policies.row_offset(strides, None, ints([0, 0, 1]), batch, ctypes.c_int64(row))
    assert found == batch * batch_stride + row * row_stride


# Known-answer vectors of Random123, the authors' library: counter, key, and output words per number of rounds.
KNOWN = [
    ((0,) * 4, (0,) * 2, {
        7: (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48), 10: (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)}),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, {
        7: (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662), 10: (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)}),
    ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0), {
        7: (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A), 10: (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)}),
]  # fmt: skip


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_philox_gives_the_published_words(policies, counter, key, words):
    """C++ and Python at the number of rounds in use; Python also at the usual ten rounds."""
    for rounds, expected in words.items():
        assert tuple(int(word) for word in philox.philox4x32(counter, key, rounds)) == expected
    out = ints([0] * 4, ctypes.c_uint32)
    policies.philox_words(ints(counter, ctypes.c_uint32), ints(key, ctypes.c_uint32), out)
    assert tuple(out) == words[philox.ROUNDS]


@given(st.lists(st.integers(0, 2**32 - 1), min_size=6, max_size=6))
def test_philox_is_the_same_in_both_languages(policies, numbers):
    out = ints([0] * 4, ctypes.c_uint32)
    policies.philox_words(ints(numbers[:4], ctypes.c_uint32), ints(numbers[4:], ctypes.c_uint32), out)
    assert list(out) == [int(word) for word in philox.philox4x32(numbers[:4], numbers[4:], philox.ROUNDS)]


WORD = st.integers(0, 2**64 - 1)


@given(WORD, WORD, st.integers(0, 65535), st.integers(0, 1000), st.integers(0, 63), st.integers(0, 40), st.data())
def test_dropout_mask(policies, seed, offset, threshold, batch, head, elsewhere, data):
    """Of a shard of rows, keys and heads: the part of the mask of the whole."""
    rows, keys, num_heads = 35, 70, 64
    before, q_start, k_start = data.draw(st.integers(0, elsewhere)), *(32 * data.draw(st.integers(0, 3)) for _ in "qk")
    dropped = np.zeros((rows, keys), np.uint8)
    numbers = [ctypes.c_uint32(threshold), ctypes.c_uint64(seed), ctypes.c_uint64(offset)]
    heads, starts = ints([num_heads, before, elsewhere]), ints([q_start, k_start])
    policies.drops(*numbers, batch, head, heads, starts, rows, keys, dropped.ctypes.data_as(ctypes.c_void_p))
    batch_head = batch * (num_heads + elsewhere) + before + head
    whole = philox.random_bits(batch_head, q_start + rows, k_start + keys, seed, offset) < threshold
    assert np.array_equal(dropped, whole[q_start:, k_start:])


@given(st.integers(0, 65535))
def test_rescale_is_of_the_probability_in_use(policies, threshold):
    kept = (65536 - threshold) / 65536
    assert policies.rescale(ctypes.c_uint32(threshold)) * kept == pytest.approx(1, rel=1e-15)
