"""How rows are appended to a KV cache on CUDA, by torch operations: flash_attn::_append, which runs on any device."""

from dataclasses import dataclass

import pytest
import torch

import flash_attn  # noqa: F401 (registers the ops)
from compare import assert_bitwise, compare
from device import IS_GPU, on_device

BATCH_SIZE, HEADS, ENTRIES = 3, 2, 6


@dataclass(frozen=True)
class Append:
    """New rows for three sequences in a cache of 12 rows each, or in pages."""

    lengths: int | tuple[int, int, int]  # rows in the cache before; an int is given as such
    seqlen_new: int = 3
    seqlen_q: int = 2
    dtype: torch.dtype = torch.bfloat16
    head_dim: int = 8
    head_dim_v: int = 5
    page_size: int = 0  # 0: no pages
    table: tuple | None = None  # cache_batch_idx or, with pages, block_table
    rotary_dim: int = 0
    interleaved: bool = True
    window: tuple[int, int] = (-1, 0)
    layout: str = "contiguous"  # "heads before rows"; "one buffer": of K and V; "latent": V is a part of K

    @property
    def capacity(self) -> int:
        return len(self.table[0]) * self.page_size if self.page_size else 12

    def length(self, b: int) -> int:
        return self.lengths if isinstance(self.lengths, int) else self.lengths[b]

    def place(self, b: int, row: int) -> tuple[int, int] | None:
        """Entry of the cache and row there; None if there is no such row."""
        if self.length(b) < 0 or row >= self.capacity:
            return None
        page = row // self.page_size if self.page_size else 0
        entry = b if self.table is None else self.table[b][page] if self.page_size else self.table[b]
        return (entry, row - page * self.page_size) if 0 <= entry < ENTRIES else None


PAGES = ((5, 0, 3), (1, 4, -1), (2, 99, 0))  # with entries outside of the pool
HALF = {"rotary_dim": 6, "interleaved": False}
CASES = {
    "direct": Append((0, 5, 9)),
    "int": Append(4),
    "batch entries": Append((0, 5, 9), table=(4, 0, 5)),
    "pages": Append((2, 5, 0), page_size=4, table=PAGES),
    "pages of one row": Append((1, 0, 0), 1, page_size=1, table=PAGES),
    "pages of 3 rows": Append((2, 4, 1), 2, page_size=3, table=PAGES, **HALF),
    "pages outside of the pool": Append((2, 7, 3), 4, page_size=4, table=PAGES, rotary_dim=2),
    "no page in the pool": Append((2, 3, 1), page_size=4, table=((-1,) * 3, (6,) * 3, (2**31 - 1,) * 3)),
    "not in use": Append((-1, 5, -(2**31)), rotary_dim=8),
    "not in use, and nothing else": Append((-1, -2, -1), rotary_dim=8),
    "not in use, int": Append(-1, **HALF),
    "not in use, batch entries": Append((-1, 5, 2), table=(-7, 1, 2**31 - 1)),
    "past the capacity": Append((10, 12, 2**31 - 1), **HALF),
    "past the capacity, pages": Append((11, 0, 2**30), page_size=4, table=PAGES, rotary_dim=4),
    "everything past the capacity": Append((12, 13, 14)),
    "queries at one position": Append((0, 5, 9), 1, 3, window=(-1, -1), rotary_dim=4),
    "queries in a window": Append((0, 5, 9), 1, 3, window=(-1, 2), rotary_dim=4),
    "no queries": Append((0, 5, 9), seqlen_q=0, rotary_dim=4),
    "no new rows": Append((0, 5, 9), seqlen_new=0, rotary_dim=4),
    "heads before rows": Append((0, 5, 9), layout="heads before rows", **HALF),
    "one buffer": Append((0, 5, 9), head_dim_v=8, layout="one buffer", **HALF),
    "one buffer, pages": Append((3, 5, 1), head_dim_v=8, page_size=4, table=PAGES, layout="one buffer"),
    "latent": Append((0, 5, 9), layout="latent"),
    "latent, pages": Append((3, 5, 1), page_size=4, table=PAGES, layout="latent"),
    "float16": Append((0, 5, 9), dtype=torch.float16, rotary_dim=8),
    "float32": Append((0, 5, 9), dtype=torch.float32, rotary_dim=8),
    "float64": Append((0, 5, 9), dtype=torch.float64, **HALF),
}


def caches_of(case: Append, buffer: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """k_cache and v_cache in a buffer of (ENTRIES, 12 rows, 4 times HEADS, 8 columns)."""
    wide, rows = buffer[:, : case.page_size or 12], slice(0, case.page_size or 12)
    if case.layout == "one buffer":
        return wide[:, :, :HEADS], wide[:, :, HEADS : 2 * HEADS]
    if case.layout == "latent":
        return wide[:, :, :HEADS, : case.head_dim], wide[:, :, :HEADS, : case.head_dim_v]
    if case.layout == "heads before rows":
        moved = buffer.view(ENTRIES, 4 * HEADS, 12, 8).transpose(1, 2)[:, rows]
        return moved[:, :, :HEADS], moved[:, :, HEADS : 2 * HEADS, : case.head_dim_v]
    halves = buffer.view(2, ENTRIES, 12, 2 * HEADS, 8)[:, :, rows, :HEADS]
    return halves[0], halves[1][..., : case.head_dim_v]


def arguments_of(case: Append, buffer: torch.Tensor) -> dict:
    def ints(values):
        return None if values is None else torch.tensor(values, dtype=torch.int32)

    k_cache, v_cache = caches_of(case, buffer)
    k = torch.randn(BATCH_SIZE, case.seqlen_new, HEADS, case.head_dim).to(case.dtype)
    v = torch.randn(BATCH_SIZE, case.seqlen_new, HEADS, case.head_dim_v).to(case.dtype)
    angles = torch.randn(case.capacity + 1, case.rotary_dim // 2)
    is_int = isinstance(case.lengths, int)
    return {
        "q": torch.randn(BATCH_SIZE, case.seqlen_q, 2 * HEADS, case.head_dim).to(case.dtype),
        "k_cache": k_cache,
        "v_cache": v_cache,
        "k": k,
        "v": k[..., : case.head_dim_v] if case.layout == "latent" else v,
        "rotary_cos": angles.cos().to(case.dtype) if case.rotary_dim else None,
        "rotary_sin": angles.sin().to(case.dtype) if case.rotary_dim else None,
        "rotary_interleaved": case.interleaved,
        "cache_seqlen": case.lengths if is_int else None,
        "cache_seqlens": None if is_int else ints(case.lengths),
        "cache_batch_idx": None if case.page_size else ints(case.table),
        "block_table": ints(case.table) if case.page_size else None,
        "window_size_left": case.window[0],
        "window_size_right": case.window[1],
    }


def rotate(x: dict, row: torch.Tensor, position: int) -> torch.Tensor:
    """One row (heads, head_dim) in float64: pairs are complex numbers, which are turned."""
    row = row.to(torch.float64, copy=True)
    if x["rotary_cos"] is None:
        return row
    at = min(position, len(x["rotary_cos"]) - 1)
    turn = torch.complex(x["rotary_cos"][at].double(), x["rotary_sin"][at].double())
    rotary_dim = 2 * len(turn)
    first, second = (slice(i, rotary_dim, 2) for i in range(2))
    if not x["rotary_interleaved"]:
        first, second = slice(0, len(turn)), slice(len(turn), rotary_dim)
    turned = torch.complex(row[:, first], row[:, second]) * turn
    row[:, first], row[:, second] = turned.real, turned.imag
    return row


def expected(case: Append, x: dict, buffer: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The rotated queries and the buffer afterwards, row by row, in float64."""
    buffer, q = (t.to(torch.float64, copy=True) for t in (buffer, x["q"]))
    k_cache, v_cache = caches_of(case, buffer)
    advance = case.window != (-1, -1)
    for b in range(BATCH_SIZE):
        for i in range(case.seqlen_q):
            q[b, i] = rotate(x, x["q"][b, i], max(case.length(b), 0) + i * advance)
        for j in range(case.seqlen_new):
            if place := case.place(b, case.length(b) + j):
                v_cache[place] = x["v"][b, j].double()
                k_cache[place] = rotate(x, x["k"][b, j], case.length(b) + j)
    return q, buffer


def make(case: Append) -> tuple[torch.Tensor, dict]:
    """NaN marks what must not be written."""
    buffer = torch.full((ENTRIES, 12, 4 * HEADS, 8), torch.nan, dtype=case.dtype)
    return buffer, arguments_of(case, buffer)


@on_device
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not (IS_GPU and case.dtype.itemsize > 2)])
def test_append(name):
    """Against a loop over rows; nothing else of the memory changes."""
    case = CASES[name]
    buffer, x = make(case)
    expected_q, expected_buffer = expected(case, x, buffer)
    q = torch.ops.flash_attn._append(**x)
    compare("q", q, expected_q, context=name)
    compare("caches", buffer, expected_buffer, context=name)
    if not case.rotary_dim:
        assert_bitwise("q", q, x["q"])
    exact = expected_buffer.to(case.dtype)
    if case.layout != "latent":
        assert_bitwise("v_cache", caches_of(case, buffer)[1], caches_of(case, exact)[1])
    rest = slice(case.rotary_dim, None)
    assert_bitwise("k_cache", caches_of(case, buffer)[0][..., rest], caches_of(case, exact)[0][..., rest])


VALID = ["direct", "int", "batch entries", "pages of one row", "one buffer", "latent", "float16", "float32", "float64"]


@pytest.mark.parametrize("name", VALID)
def test_like_the_kernel_of_the_cpu(name):
    case = CASES[name]
    buffer, x = make(case)
    of_op = buffer.clone()
    k_cache, v_cache = caches_of(case, of_op)
    torch.ops.flash_attn._append(**x)
    torch.ops.flash_attn.fwd_kvcache(**{**x, "k_cache": k_cache, "v_cache": v_cache, "softmax_scale": 0.3})
    compare("caches", buffer, of_op.double(), context=name)
    if not case.rotary_dim:
        assert_bitwise("caches", buffer, of_op)


@pytest.mark.parametrize("name", CASES)
def test_the_host_reads_no_device_memory(name):
    """Meta tensors have none: whatever asks for a value of one raises."""
    _, x = make(CASES[name])
    metas = {key: value.to("meta") if isinstance(value, torch.Tensor) else value for key, value in x.items()}
    assert torch.ops.flash_attn._append(**metas).shape == x["q"].shape


NOTHING = {  # batch_size, seqlen_q, shape of the caches, shape of block_table
    "no batch": (0, 1, (2, 4, 1, 8), None),
    "no capacity": (2, 0, (2, 0, 1, 8), None),
    "no pages": (2, 1, (0, 4, 1, 8), (2, 3)),
    "an empty table": (2, 0, (3, 4, 1, 8), (2, 0)),
}


@on_device
@pytest.mark.parametrize(("batch_size", "seqlen_q", "shape", "table"), NOTHING.values(), ids=NOTHING)
def test_nothing_to_write(batch_size, seqlen_q, shape, table):
    k_cache, v_cache = (torch.zeros(shape, dtype=torch.bfloat16) for _ in range(2))
    new = torch.ones(batch_size, 1, 1, 8, dtype=torch.bfloat16)
    angles = torch.ones(12, 4, dtype=torch.bfloat16)
    table = None if table is None else torch.zeros(table, dtype=torch.int32)
    new_rows = {"k": new, "v": new, "rotary_cos": angles, "rotary_sin": angles, "cache_seqlen": -1}
    q = torch.ops.flash_attn._append(new[:, :seqlen_q], k_cache, v_cache, **new_rows, block_table=table)
    assert q.shape == (batch_size, seqlen_q, 1, 8)
    assert not k_cache.any()
    assert not v_cache.any()


def test_refusals():
    """As of fwd_kvcache: arguments are validated, and there are no derivatives."""
    _, x = make(CASES["direct"])
    with pytest.raises(ValueError, match="v: expected a tensor, as k is given"):
        torch.ops.flash_attn._append(**{**x, "v": None})
    with pytest.raises(ValueError, match="k: expected a tensor that does not require grad"):
        torch.ops.flash_attn._append(**{**x, "k": x["k"].requires_grad_()})
    with pytest.raises(RuntimeError, match=r"_append: torch\.vmap is not supported"):
        torch.vmap(lambda q: torch.ops.flash_attn._append(**{**x, "q": q, "k": x["k"].detach()}))(x["q"][None])


def test_writes_are_counted():
    """Autograd detects that a tensor which it has saved was changed."""
    _, x = make(CASES["direct"])
    before = x["k_cache"]._version, x["q"]._version
    torch.ops.flash_attn._append(**x)
    assert (x["k_cache"]._version > before[0], x["q"]._version) == (True, before[1])


@pytest.mark.parametrize(("name", "table"), [("block_table", [[0, 1], [2, 9]]), ("cache_batch_idx", [0, 3])])
def test_entries_of_a_whole_cache_are_checked(name, table):
    """Also where no length says that they are in use."""
    q, cache = torch.ones(2, 1, 2, 8), torch.ones(3, 4, 2, 8)
    with pytest.raises(ValueError, match=rf"{name}\[1.*: expected a (page|batch entry) from 0 to below .*=3, got "):
        torch.ops.flash_attn.fwd_kvcache(q, cache, cache.clone(), **{name: torch.tensor(table, dtype=torch.int32)})
