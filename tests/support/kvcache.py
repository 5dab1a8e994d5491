"""Cases of flash_attn_with_kvcache: a frozen description, its tensors, a float64 reference, the check of a call."""

import dataclasses
import math
from dataclasses import dataclass

import torch

import flash_attn
from check import poisoned_memory
from compare import assert_finite, compare
from device import DEVICE, IS_GPU, narrow
from inputs import lse_dtype, make_sinks
from layouts import WRITABLE
from reference import ORDERS, USUAL, Order, Scoring, one_sequence, visible

ONE_BUFFER = "one buffer"  # k_cache and v_cache are slices of one tensor
LATENT = "latent"  # v_cache is the leading columns of k_cache
UNUSED = (-1, 10**9, -(2**31))  # what entries that are not in use may contain


@dataclass(frozen=True)
class KvCase:
    """A batch of sequences in a KV cache: rows leftpad to cache_seqlens of each, and seqlen_new rows to append."""

    cache_seqlens: tuple[int, ...]  # rows in the cache before the call; negative: the sequence is skipped
    seqlen_q: int = 1
    seqlen_new: int | None = None  # None: k and v are not given
    spare: int = 3  # rows (with pages: entries of block_table) that the longest sequence leaves unused
    dtype: str = "float32"
    num_heads: int = 2
    num_heads_k: int = 2
    head_dim: int = 64
    head_dim_v: int = 64
    given_as: str = "tensor"  # what cache_seqlens is given as: "tensor", "int" or "None"
    leftpad: tuple[int, ...] | None = None
    page_size: int = 0  # 0: without pages
    shuffled: bool = False  # whether cache_batch_idx is given, and the cache has two sequences more
    rotary_dim: int = 0
    interleaved: bool = True
    causal: bool = False
    window_size: tuple[int, int] = (-1, -1)
    attention_chunk: int = 0
    softcap: float = 0.0
    softmax_scale: float | None = None
    alibi: str = ""  # "heads": (num_heads,), "batch": (batch_size, num_heads)
    s_aux: str = ""  # sinks: "all" heads have one, or "some", all but the first
    num_splits: int = 0
    layout: str = ""  # of the caches: one of layouts.WRITABLE, ONE_BUFFER or LATENT; "": contiguous
    seed: int = 0

    @property
    def batch_size(self) -> int:
        return len(self.cache_seqlens)

    @property
    def ends(self) -> list[int]:
        """The number of rows of each sequence after the call, with its leftpad."""
        return [n + (self.seqlen_new or 0) if n >= 0 else 0 for n in self.cache_seqlens]

    @property
    def capacity(self) -> int:
        """Rows that each sequence has room for."""
        longest = max([0, *self.ends])
        return (
            longest + self.spare
            if not self.page_size
            else (-(-longest // self.page_size) + self.spare) * self.page_size
        )

    @property
    def window(self) -> tuple[int, int]:
        """The effective window: causal sets right to 0."""
        return (self.window_size[0], 0) if self.causal else self.window_size

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5 if self.softmax_scale is None else self.softmax_scale

    @property
    def turns_queries_on(self) -> bool:
        """Whether query i is rotated as position cache_seqlens + i; otherwise all are as the first."""
        return self.causal or self.window_size != (-1, -1) or self.attention_chunk > 0

    @property
    def name(self) -> str:
        """All fields with non-default values."""
        fields = [(field, getattr(self, field.name)) for field in dataclasses.fields(self)]
        shown = [f"{field.name}={value}" for field, value in fields if value != field.default]
        return "-".join(shown).replace(" ", "").replace("cache_seqlens=", "").replace("'", "")


@dataclass
class KvInputs:
    """The tensors of a call."""

    q: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    k: torch.Tensor | None = None
    v: torch.Tensor | None = None
    rotary_cos: torch.Tensor | None = None
    rotary_sin: torch.Tensor | None = None
    cache_seqlens: torch.Tensor | int | None = None
    cache_batch_idx: torch.Tensor | None = None
    cache_leftpad: torch.Tensor | None = None
    block_table: torch.Tensor | None = None
    alibi_slopes: torch.Tensor | None = None
    s_aux: torch.Tensor | None = None

    def place(self, b: int, rows: range) -> tuple[torch.Tensor, torch.Tensor]:
        """The indices in the first two dimensions of the caches of some rows of sequence b."""
        row = torch.arange(rows.start, rows.stop, device=self.q.device)
        if self.block_table is not None:
            page_size = self.k_cache.shape[1]
            return self.block_table[b].long()[row // page_size], row % page_size
        first = b if self.cache_batch_idx is None else int(self.cache_batch_idx[b])
        return torch.full_like(row, first), row


def kv_for_device(cases: list[KvCase]) -> list[KvCase]:
    """The cases in dtypes and head_dims that the device supports, without duplicates."""
    return list(dict.fromkeys(narrow(case) for case in cases if not IS_GPU or case.head_dim <= 256))


def make_kv_inputs(case: KvCase, padding: float = math.nan) -> KvInputs:
    """Random tensors on the device under test.

    What must not matter is `padding`: rows not in use, queries of skipped sequences, unread rows of rotary_cos.
    Entries of block_table and cache_batch_idx that must not matter are out of range.
    """
    with torch.device("cpu"):
        return _make_kv_inputs(narrow(case), padding)


def _make_kv_inputs(case: KvCase, padding: float) -> KvInputs:
    generator = torch.Generator().manual_seed(3000 + case.seed)
    dtype = getattr(torch, case.dtype)
    batch_size, seqlen_new = case.batch_size, case.seqlen_new

    def rows(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    x = KvInputs(rows(batch_size, case.seqlen_q, case.num_heads, case.head_dim), *[torch.empty(0)] * 2)
    if seqlen_new is not None:
        x.k = rows(batch_size, seqlen_new, case.num_heads_k, case.head_dim)
        x.v = rows(batch_size, seqlen_new, case.num_heads_k, case.head_dim_v)
    for b, length in enumerate(case.cache_seqlens):
        if length < 0:
            x.q[b] = padding  # k and v are numbers, which would show in the cache
    shape = _shape_of_caches(case, x, generator)
    x.k_cache = torch.full((*shape, case.num_heads_k, case.head_dim), padding, dtype=dtype)
    x.v_cache = torch.full((*shape, case.num_heads_k, case.head_dim_v), padding, dtype=dtype)
    for b, length in enumerate(case.cache_seqlens):
        first = case.leftpad[b] if case.leftpad else 0
        for cache in (x.k_cache, x.v_cache):
            place = x.place(b, range(first, max(first, length)))
            cache[place] = rows(len(place[0]), *cache.shape[2:])
    _add_small_tensors(case, x, padding, generator)
    for field in dataclasses.fields(x):
        if isinstance(t := getattr(x, field.name), torch.Tensor):
            setattr(x, field.name, t.to(DEVICE))
    _lay_out(case, x)
    return x


def _shape_of_caches(case: KvCase, x: KvInputs, generator: torch.Generator) -> tuple[int, int]:
    """The first two dimensions of the caches; sets block_table or cache_batch_idx."""
    if not case.page_size:
        if case.shuffled:
            order = torch.randperm(case.batch_size + 2, generator=generator)[: case.batch_size].int()
            skipped = torch.tensor(case.cache_seqlens, dtype=torch.int64) < 0
            x.cache_batch_idx = torch.where(skipped, torch.tensor(UNUSED[1], dtype=torch.int32), order)
        return case.batch_size + 2 * case.shuffled, case.capacity
    needed = [-(-end // case.page_size) for end in case.ends]
    order = torch.randperm(sum(needed) + 2, generator=generator).tolist()
    max_pages = case.capacity // case.page_size
    x.block_table = torch.tensor(UNUSED, dtype=torch.int32).repeat(case.batch_size, max_pages)[:, :max_pages]
    for b, pages in enumerate(needed):
        padding = min(case.leftpad[b], max(case.cache_seqlens[b], 0)) if case.leftpad else 0
        first = padding // case.page_size  # nothing is read from the pages before it
        x.block_table[b, first:pages] = torch.tensor([order.pop() for _ in range(first, pages)], dtype=torch.int32)
    return sum(needed) + 2, case.page_size


def _add_small_tensors(case: KvCase, x: KvInputs, padding: float, generator: torch.Generator) -> None:
    lengths = torch.tensor(case.cache_seqlens, dtype=torch.int32)
    x.cache_seqlens = {"tensor": lengths, "int": max(case.cache_seqlens, default=0), "None": None}[case.given_as]
    if case.leftpad:
        x.cache_leftpad = torch.tensor(case.leftpad, dtype=torch.int32)
    if case.alibi:
        shape = (case.num_heads,) if case.alibi == "heads" else (case.batch_size, case.num_heads)
        x.alibi_slopes = torch.rand(shape, generator=generator) * 0.3
    x.s_aux = make_sinks(case, generator)
    if case.rotary_dim:
        starts = [n for n in case.cache_seqlens if n >= 0] or [0]
        end = max(starts) + max(case.seqlen_new or 0, case.seqlen_q, 1)
        angle = torch.rand(max(case.capacity, end), case.rotary_dim // 2, generator=generator, dtype=torch.float64) * 6
        angle[: min(starts)] = angle[end:] = padding
        x.rotary_cos, x.rotary_sin = angle.cos().to(x.q.dtype), angle.sin().to(x.q.dtype)


def _lay_out(case: KvCase, x: KvInputs) -> None:
    if case.layout == ONE_BUFFER:
        x.k_cache, x.v_cache = torch.stack([x.k_cache, x.v_cache], 2).unbind(2)
    elif case.layout == LATENT:
        x.v_cache = x.k_cache[..., : case.head_dim_v]
        x.v = None if x.k is None or case.seed % 2 else x.k[..., : case.head_dim_v]
    elif case.layout:
        x.k_cache, x.v_cache = WRITABLE[case.layout](x.k_cache), WRITABLE[case.layout](x.v_cache)


def arguments_of(case: KvCase, x: KvInputs) -> dict:
    """The arguments of flash_attn_with_kvcache."""
    names = ("softmax_scale", "causal", "window_size", "softcap", "num_splits", "attention_chunk")
    options = {name: getattr(case, name) for name in names}
    return {**x.__dict__, **options, "rotary_interleaved": case.interleaved, "return_softmax_lse": True}


def op_arguments_of(case: KvCase, x: KvInputs) -> dict:
    """The arguments of the op."""
    arguments = {**arguments_of(case, x), "cache_seqlen": None}
    del arguments["return_softmax_lse"]
    arguments["window_size_left"], arguments["window_size_right"] = arguments.pop("window_size")
    if isinstance(x.cache_seqlens, int):
        arguments.update(cache_seqlen=x.cache_seqlens, cache_seqlens=None)
    return arguments


def run_kvcache(case: KvCase, x: KvInputs, **changes) -> tuple[torch.Tensor, torch.Tensor]:
    """out and softmax_lse."""
    return flash_attn.flash_attn_with_kvcache(**{**arguments_of(case, x), **changes})


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """Rotate x (seqlen, heads, head_dim) by cos, sin (seqlen, rotary_dim / 2), in the dtype of x."""
    rotary_dim, cos, sin = 2 * cos.shape[1], cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
    turning = x[..., :rotary_dim]
    a, b = (turning[..., 0::2], turning[..., 1::2]) if interleaved else turning.chunk(2, -1)
    pairs = (a * cos - b * sin, a * sin + b * cos)
    turned = torch.stack(pairs, -1).flatten(-2) if interleaved else torch.cat(pairs, -1)
    return torch.cat([turned, x[..., rotary_dim:]], -1)


def new_keys(case: KvCase, x: KvInputs, b: int, dtype: torch.dtype) -> torch.Tensor:
    """The rows of K that sequence b appends, computed in dtype."""
    start = case.cache_seqlens[b]
    if x.rotary_cos is None:
        return x.k[b].to(dtype)
    turns = [t[start : start + x.k.shape[1]] for t in (x.rotary_cos, x.rotary_sin)]
    return rotate(x.k[b].to(dtype), *turns, case.interleaved)


def new_values(case: KvCase, x: KvInputs, b: int) -> torch.Tensor:
    """The rows of V that sequence b appends."""
    return x.k[b, :, :, : case.head_dim_v] if case.layout == LATENT else x.v[b]


def attended(case: KvCase, x: KvInputs, b: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """q, k and v of sequence b as attention sees them: gathered, appended and rotated in dtype."""
    start, first = case.cache_seqlens[b], case.leftpad[b] if case.leftpad else 0
    place = x.place(b, range(first, max(first, start)))
    q, k, v = x.q[b].to(dtype), x.k_cache[place].to(dtype), x.v_cache[place].to(dtype)
    if x.k is not None:
        skipped = max(first - start, 0)
        k = torch.cat([k, new_keys(case, x, b, dtype)[skipped:]])
        v = torch.cat([v, new_values(case, x, b).to(dtype)[skipped:]])
    if x.rotary_cos is not None:
        position = start + torch.arange(case.seqlen_q, device=q.device) * case.turns_queries_on
        q = rotate(q, x.rotary_cos[position], x.rotary_sin[position], case.interleaved)
    return q, k, v


def kv_attention(
    case: KvCase,
    x: KvInputs,
    dtype: torch.dtype = torch.float64,
    order: Order = USUAL,
    rotary_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """out and softmax_lse of the whole batch, computed in dtype, for the caches as they are before the call."""
    out = torch.zeros(*x.q.shape[:3], x.v_cache.shape[3], dtype=dtype, device=x.q.device)
    lse = out.new_full((x.q.shape[0], x.q.shape[2], x.q.shape[1]), -math.inf, dtype=lse_dtype(dtype))
    sinks = None if x.s_aux is None else x.s_aux.to(dtype)
    if sinks is not None:
        lse[:] = sinks[:, None]  # of skipped sequences, as of all that have no keys
    for b, length in enumerate(case.cache_seqlens):
        if length >= 0:
            slopes = x.alibi_slopes if x.alibi_slopes is None or x.alibi_slopes.dim() == 1 else x.alibi_slopes[b]
            q, k, v = (t.to(dtype) for t in attended(case, x, b, rotary_dtype or dtype))
            scoring = Scoring(visible(len(q), len(k), case.window, q.device, case.attention_chunk), slopes, sinks)
            result = one_sequence(case, q, k, v, scoring, order)
            out[b], lse[b] = result.out, result.softmax_lse
    return out, lse


def whole(t: torch.Tensor) -> torch.Tensor:
    """The bits of all elements of the storage of t."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()]
    return torch.empty(0, dtype=integer, device=t.device).set_(t.untyped_storage())


def copies_of_caches(x: KvInputs) -> tuple[torch.Tensor, torch.Tensor]:
    """k_cache and v_cache in copies of their storages."""
    storages = {cache.untyped_storage().data_ptr(): cache.untyped_storage() for cache in (x.k_cache, x.v_cache)}
    clones = {address: storage.clone() for address, storage in storages.items()}
    k_cache, v_cache = (
        cache.new_empty(0).set_(
            clones[cache.untyped_storage().data_ptr()], cache.storage_offset(), cache.shape, cache.stride()
        )
        for cache in (x.k_cache, x.v_cache)
    )
    return k_cache, v_cache


def check_caches(case: KvCase, x: KvInputs, before: tuple[torch.Tensor, torch.Tensor]) -> None:
    """V is appended exactly, K within 2 eps where it is rotated; every other bit of both storages is as before."""
    for b, length in enumerate(case.cache_seqlens):
        if x.k is None or length < 0:
            continue
        place = x.place(b, range(length, length + x.k.shape[1]))
        k, got = new_keys(case, x, b, torch.float64), x.k_cache[place]
        compare(f"k_cache[{b}]", got, k, context=case.name)
        before[0][place] = x.k[b]
        if case.rotary_dim:
            before[0][(*place, slice(None), slice(case.rotary_dim))] = got[..., : case.rotary_dim]
        before[1][place] = new_values(case, x, b)
    for name, cache, expected in zip(("k_cache", "v_cache"), (x.k_cache, x.v_cache), before, strict=True):
        wrong = (whole(cache) != whole(expected)).nonzero().flatten().tolist()
        text = f"{name} of {case.name}: {len(wrong)} elements are wrong, first at {wrong[:3]} of the storage"
        assert not wrong, f"{text}, of strides {cache.stride()} and offset {cache.storage_offset()}"


def check_kvcache(case: KvCase) -> None:
    """Check out, softmax_lse, both caches with all memory around them, and that nothing else is written."""
    x = make_kv_inputs(case)
    (ref_out, ref_lse), dtype = kv_attention(case, x), x.q.dtype
    plain = [kv_attention(case, x, dtype, order) for order in ORDERS]
    plain_lse = [kv_attention(case, x, lse_dtype(dtype), order, rotary_dtype=dtype)[1] for order in ORDERS]
    if case.rotary_dim and dtype in (torch.bfloat16, torch.float16):
        # All orders round rotated rows alike, which may be exact by chance. Elements of q and k are about 1.
        plain_lse.append(ref_lse + torch.finfo(dtype).eps / 4 * case.scale * case.head_dim**0.5)
    before = copies_of_caches(x)
    others = {name: t.clone() for name, t in x.__dict__.items() if isinstance(t, torch.Tensor) and "_cache" not in name}
    with poisoned_memory():
        out, lse = run_kvcache(case, x)
    assert_finite("out", ref_out, case.name)
    compare("out", out, ref_out, [each for each, _ in plain], context=case.name)
    compare("softmax_lse", lse, ref_lse, plain_lse, size=1.0, context=case.name)
    assert (out.dtype, lse.dtype) == (dtype, lse_dtype(dtype))
    check_caches(case, x, before)
    for name, t in others.items():
        assert torch.equal(getattr(x, name).nan_to_num(7), t.nan_to_num(7)), f"{name} was written"
