// Products of tiles with wgmma, accumulated in the registers of a warpgroup: each of its four warps has 16 rows, as a
// register tile of its own. Every function issues one group of products and returns at once. Until the wgmma_wait that
// orders it, neither its registers nor its tiles may be touched, and operands in registers have to live on.
#pragma once
#include "ptx/wgmma.h"
#include "tile/acc_tile.h"
#include "tile/smem_tile.h"

namespace flash_attn {

constexpr int kWarpgroupThreads = 128, kWarpgroupRows = 64;

FA_DEVICE int warpgroup_id() { return ptx::uniform(ptx::thread_idx() / kWarpgroupThreads); }

// An operand in shared memory. The products of a tile differ in where their 16-deep slice starts, which is an addition
// to the lowest field of the descriptor.
struct WgmmaOperand {
    uint64_t descriptor;

    FA_DEVICE uint64_t at(int bytes) const { return descriptor + static_cast<uint64_t>(bytes >> 4); }
};

// Rows of t from row0 on, with k along the columns. 8 rows are 1024 bytes apart; the leading offset is not used.
template <int kRows, int kCols> FA_DEVICE WgmmaOperand k_major(SmemTile<kRows, kCols, 64> t, int row0) {
    return {ptx::opaque(ptx::wgmma_descriptor(t.base + t.row_offset(row0), 16, t.row_offset(8), ptx::Swizzle::k128B))};
}
// Columns of t, with k along the rows: 8 of them are 1024 bytes apart, and runs of 64 columns one panel.
template <int kRows, int kCols> FA_DEVICE WgmmaOperand mn_major(SmemTile<kRows, kCols, 64> t, int col0 = 0) {
    const ptx::SmemPtr start = t.panel(col0 / 64).base + col0 % 64 * 2;
    return {ptx::opaque(ptx::wgmma_descriptor(start, t.kPanelBytes, t.row_offset(8), ptx::Swizzle::k128B))};
}
// Where the i-th slice starts.
template <class Tile> FA_DEVICE constexpr int k_major_slice(int i) {
    return Tile::panel_offset(i / 4) + i % 4 * 32;  // 16 elements
}
template <class Tile> FA_DEVICE constexpr int mn_major_slice(int i) { return Tile::row_offset(16 * i); }

// c[64, N] = a[row0 .. row0 + 64, 0 .. K] * b[N, 0 .. K]^T
template <class Element, int K, int N, int kRowsA, int kColsA, int kColsB>
FA_DEVICE void wgmma_abt(AccTile<16, N>& c, SmemTile<kRowsA, kColsA, 64> a, int row0, SmemTile<N, kColsB, 64> b) {
    static_assert(K % 16 == 0 && K <= kColsA && K <= kColsB);
    const WgmmaOperand rows = k_major(a, row0), columns = k_major(b, 0);
    ptx::wgmma_fence();
#pragma unroll
    for (int i = 0; i < K / 16; ++i)
        ptx::wgmma_ss<Element, N, ptx::Major::kK, ptx::Major::kK>(c.x[0], rows.at(k_major_slice<decltype(a)>(i)),
                                                                  columns.at(k_major_slice<decltype(b)>(i)), i > 0);
    ptx::wgmma_commit();
}

// c[64, N] += a[64, K] * b[K, 0 .. N], a in registers.
template <class Element, int N, int K, int kColsB>
FA_DEVICE void wgmma_ab(AccTile<16, N>& c, const PackedTile<Element, 16, K>& a, SmemTile<K, kColsB, 64> b) {
    static_assert(N <= kColsB);
    const WgmmaOperand columns = mn_major(b);
    ptx::wgmma_fence();
#pragma unroll
    for (int i = 0; i < K / 16; ++i)
        ptx::wgmma_rs<Element, N, ptx::Major::kMN>(c.x[0], a.a[0][i], columns.at(mn_major_slice<decltype(b)>(i)), true);
    ptx::wgmma_commit();
}

// c[64, N] = a[row0 .. row0 + 64, 0 .. K] * b[K, col0 .. col0 + N], within a panel of b.
template <class Element, int N, int K, int kRowsA, int kColsB>
FA_DEVICE void wgmma_ab(AccTile<16, N>& c, SmemTile<kRowsA, K, 64> a, int row0, SmemTile<K, kColsB, 64> b, int col0) {
    static_assert(N <= 64);
    const WgmmaOperand rows = k_major(a, row0), columns = mn_major(b, col0);
    ptx::wgmma_fence();
#pragma unroll
    for (int i = 0; i < K / 16; ++i)
        ptx::wgmma_ss<Element, N, ptx::Major::kK, ptx::Major::kMN>(c.x[0], rows.at(k_major_slice<decltype(a)>(i)),
                                                                   columns.at(mn_major_slice<decltype(b)>(i)), i > 0);
    ptx::wgmma_commit();
}

// After a wait: what follows must not be moved above it.
template <int N> FA_DEVICE void pin_tile(AccTile<16, N>& c) { ptx::pin_registers(c.x[0]); }

}  // namespace flash_attn
