// Tile products with wgmma, accumulated in the registers of a warpgroup; each of its four warps holds 16 rows as a
// register tile. Every function issues one wgmma group and returns at once. Until the matching wgmma_wait, the
// accumulators and shared tiles must not be touched, and register operands must stay live.
#pragma once
#include "cuda/ptx/wgmma.h"
#include "cuda/tile/acc_tile.h"
#include "cuda/tile/smem_tile.h"

namespace flash_attn {

constexpr int kWarpgroupThreads = 128, kWarpgroupRows = 64;

FA_DEVICE int warpgroup_id() { return ptx::uniform(ptx::thread_idx() / kWarpgroupThreads); }

// A shared-memory operand, read in slices of 16 along k. Slices differ in the start address, the lowest field of the
// descriptor.
template <class Tile, ptx::Major kMajor_> struct WgmmaOperand {
    static constexpr ptx::Major kMajor = kMajor_;
    uint64_t descriptor;

    FA_DEVICE uint64_t slice(int i) const {
        const int offset = kMajor == ptx::Major::kK ? Tile::panel_offset(i / 4) + i % 4 * 32 : Tile::row_offset(16 * i);
        return descriptor + static_cast<uint64_t>(offset >> 4);
    }
};

// Rows of t from row0 on (a multiple of 8), k along the columns. Groups of 8 rows are 1024 bytes apart; the leading
// offset is unused.
template <int kRows, int kCols>
FA_DEVICE WgmmaOperand<SmemTile<kRows, kCols, 64>, ptx::Major::kK> k_major(SmemTile<kRows, kCols, 64> t, int row0) {
    return {ptx::opaque(ptx::wgmma_descriptor(t.base + t.row_offset(row0), 16, t.row_offset(8), ptx::Swizzle::k128B))};
}
// Columns of t, k along the rows: groups of 8 k are 1024 bytes apart; a run of 64 columns is one panel.
template <int kRows, int kCols>
FA_DEVICE WgmmaOperand<SmemTile<kRows, kCols, 64>, ptx::Major::kMN> mn_major(SmemTile<kRows, kCols, 64> t, int col0) {
    const ptx::SmemPtr start = t.panel(col0 / 64).base + col0 % 64 * 2;
    return {ptx::opaque(ptx::wgmma_descriptor(start, t.kPanelBytes, t.row_offset(8), ptx::Swizzle::k128B))};
}

// c[64, N] = a b, summed over K; with kAdd, c += a b.
template <class Element, int K, bool kAdd, int N, class A, class B>
FA_DEVICE void multiply_slices(AccTile<16, N>& c, const A& a, const B& b) {
    static_assert(K % 16 == 0);
    ptx::wgmma_fence();
#pragma unroll
    for (int i = 0; i < K / 16; ++i)
        ptx::wgmma_ss<Element, N, A::kMajor, B::kMajor>(c.x[0], a.slice(i), b.slice(i), kAdd || i > 0);
    ptx::wgmma_commit();
}
// c[64, N] = a[row0_a .. row0_a + 64, 0 .. K] * b[row0_b .. row0_b + N, 0 .. K]^T
template <class Element, int K, int N, int kRowsA, int kColsA, int kRowsB, int kColsB>
FA_DEVICE void wgmma_abt(AccTile<16, N>& c, SmemTile<kRowsA, kColsA, 64> a, int row0_a, SmemTile<kRowsB, kColsB, 64> b,
                         int row0_b) {
    static_assert(K <= kColsA && K <= kColsB && N <= kRowsB);
    multiply_slices<Element, K, false>(c, k_major(a, row0_a), k_major(b, row0_b));
}
// c[64, N] = a[row0 .. row0 + 64, 0 .. K] * b[K, col0 .. col0 + N], within a panel of b or from the start of one.
template <class Element, int N, int kRowsA, int kColsA, int K, int kColsB>
FA_DEVICE void wgmma_ab(AccTile<16, N>& c, SmemTile<kRowsA, kColsA, 64> a, int row0, SmemTile<K, kColsB, 64> b,
                        int col0) {
    static_assert(N <= kColsB && K <= kColsA);
    multiply_slices<Element, K, false>(c, k_major(a, row0), mn_major(b, col0));
}
// c[64, N] += a[K, col0 .. col0 + 64]^T * b[K, 0 .. N], within a panel of a.
template <class Element, int N, int K, int kColsA, int kColsB>
FA_DEVICE void wgmma_atb(AccTile<16, N>& c, SmemTile<K, kColsA, 64> a, int col0, SmemTile<K, kColsB, 64> b) {
    static_assert(N <= kColsB);
    multiply_slices<Element, K, true>(c, mn_major(a, col0), mn_major(b, 0));
}
// c[64, N] += a[64, K] * b[K, 0 .. N], a in registers.
template <class Element, int N, int K, int kColsB>
FA_DEVICE void wgmma_ab(AccTile<16, N>& c, const PackedTile<Element, 16, K>& a, SmemTile<K, kColsB, 64> b) {
    static_assert(N <= kColsB);
    const auto columns = mn_major(b, 0);
    ptx::wgmma_fence();
#pragma unroll
    for (int i = 0; i < K / 16; ++i)
        ptx::wgmma_rs<Element, N, columns.kMajor>(c.x[0], a.a[0][i], columns.slice(i), true);
    ptx::wgmma_commit();
}

// After a wait: keeps the compiler from moving reads of c above it.
template <int N> FA_DEVICE void pin_tile(AccTile<16, N>& c) { ptx::pin_registers(c.x[0]); }

}  // namespace flash_attn
