"""The policies shared by all backends (csrc/policy/) against Python definitions.

Masks are compared exhaustively for small shapes and windows, and by random trials beyond; lengths and tables that could
come from a device are also tested with invalid values.
"""

import ctypes
import itertools
import shutil
import subprocess
from pathlib import Path

import hypothesis
import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

import philox
from paths import ROOT

hypothesis.settings.register_profile("flash_attn", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("flash_attn")

UNBOUNDED = 1 << 30


@pytest.fixture(scope="session")
def policies(tmp_path_factory):
    """policies.cpp as a shared library."""
    compiler = shutil.which("g++") or shutil.which("c++") or "g++"
    library = tmp_path_factory.mktemp("policies") / "policies.so"
    source = Path(__file__).with_name("policies.cpp")
    flags = ["-std=c++17", "-O1", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror", f"-I{ROOT / 'csrc'}"]
    flags += ["-fsanitize=signed-integer-overflow", "-fsanitize-undefined-trap-on-error"]
    subprocess.run([compiler, *flags, str(source), "-o", str(library)], check=True)
    loaded = ctypes.CDLL(str(library))
    loaded.mask_keep.restype = loaded.mask_is_full_block.restype = ctypes.c_uint8
    loaded.row_offset.restype = ctypes.c_int64
    loaded.rescale.restype = ctypes.c_double
    return loaded


def ints(values, kind=ctypes.c_int32):
    return None if values is None else (kind * len(values))(*values)


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
