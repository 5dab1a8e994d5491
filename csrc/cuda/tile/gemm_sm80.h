// Tile products with mma.sync, accumulated in fp32 registers of one warp. Loops are unrolled; addresses are a per-lane
// part plus a compile-time offset.
#pragma once
#include "cuda/ptx/ldmatrix.h"
#include "cuda/ptx/mma.h"
#include "cuda/tile/acc_tile.h"
#include "cuda/tile/smem_tile.h"

namespace flash_attn {

using AFragment = uint32_t[4];  // 16 x 16, m x k
using BFragment = uint32_t[4];  // two of 16 x 8, k x n

// A[m, k] = t[row0 + rows + m, 16 step + k].
template <int kRows, int kCols>
FA_DEVICE void load_a(AFragment& a, SmemTile<kRows, kCols> t, int row0, int rows, int step) {
    const int lane = lane_id();
    const ptx::SmemPtr row = t.template chunk_at<kCols>(row0 + lane % 16, 0, 2 * step, lane / 16);
    ptx::ldmatrix_x4<false>(a, row + t.row_offset(rows));
}
// A[m, k] = t[16 step + k, col0 + cols + m], in a window of kWidth columns from col0 on.
template <int kWidth, int kRows, int kCols>
FA_DEVICE void load_a_transposed(AFragment& a, SmemTile<kRows, kCols> t, int col0, int cols, int step) {
    const int lane = lane_id();
    const ptx::SmemPtr row = t.template chunk_at<kWidth>(lane % 8 + lane / 16 * 8, col0, cols / 8, lane / 8 % 2);
    ptx::ldmatrix_x4<true>(a, row + t.row_offset(16 * step));
}
// B[k, n] = t[row0 + rows + n, 16 step + k] for 16 n.
template <int kRows, int kCols>
FA_DEVICE void load_b_transposed(BFragment& b, SmemTile<kRows, kCols> t, int row0, int rows, int step) {
    const int lane = lane_id();
    const int lane_row0 = row0 + lane % 8 + lane / 16 * 8;
    const ptx::SmemPtr row = t.template chunk_at<kCols>(lane_row0, 0, 2 * step, lane / 8 % 2);
    ptx::ldmatrix_x4<false>(b, row + t.row_offset(rows));
}
// B[k, n] = t[16 step + k, col0 + cols + n] for 16 n, in a window of kWidth columns from col0 on.
template <int kWidth, int kRows, int kCols>
FA_DEVICE void load_b(BFragment& b, SmemTile<kRows, kCols> t, int col0, int cols, int step) {
    const int lane = lane_id();
    const ptx::SmemPtr row = t.template chunk_at<kWidth>(lane % 16, col0, cols / 8, lane / 16);
    ptx::ldmatrix_x4<true>(b, row + t.row_offset(16 * step));
}

// c[:, 16 n .. 16 n + 16] += a * b for every row block of c.
template <class Element, int kRows, int kCols>
FA_DEVICE void mma_step(AccTile<kRows, kCols>& c, const AFragment (&a)[kRows / 16], const BFragment& b, int n) {
#pragma unroll
    for (int i = 0; i < kRows / 16; ++i) {
        ptx::mma_m16n8k16<Element>(&c.x[i][8 * n], a[i], b[0], b[1]);
        ptx::mma_m16n8k16<Element>(&c.x[i][8 * n + 4], a[i], b[2], b[3]);
    }
}

// c[kRows, kCols] += a[row0 .. row0 + kRows, K] * b[col0 .. col0 + kCols, K]^T
template <class Element, int kRows, int kCols, int kRowsA, int kRowsB, int K>
FA_DEVICE void mma_abt(AccTile<kRows, kCols>& c, SmemTile<kRowsA, K> a, int row0, SmemTile<kRowsB, K> b, int col0) {
#pragma unroll
    for (int k = 0; k < K / 16; ++k) {
        AFragment fa[kRows / 16];
#pragma unroll
        for (int i = 0; i < kRows / 16; ++i) load_a(fa[i], a, row0, 16 * i, k);
#pragma unroll
        for (int n = 0; n < kCols / 16; ++n) {
            BFragment fb;
            load_b_transposed(fb, b, col0, 16 * n, k);
            mma_step<Element>(c, fa, fb, n);
        }
    }
}

// c[kRows, kCols] += a[kRows, K] * b[row0 .. row0 + K, kCols], a in registers.
template <class Element, int kRows, int kCols, int K, int kRowsB>
FA_DEVICE void mma_ab(AccTile<kRows, kCols>& c, const PackedTile<Element, kRows, K>& a, SmemTile<kRowsB, kCols> b,
                      int row0) {
#pragma unroll
    for (int k = 0; k < K / 16; ++k) {
        AFragment fa[kRows / 16];
#pragma unroll
        for (int i = 0; i < kRows / 16; ++i)
#pragma unroll
            for (int r = 0; r < 4; ++r) fa[i][r] = a.a[i][k][r];
#pragma unroll
        for (int n = 0; n < kCols / 16; ++n) {
            BFragment fb;
            load_b<kCols>(fb, b, 0, 16 * n, row0 / 16 + k);
            mma_step<Element>(c, fa, fb, n);
        }
    }
}

// c[kRows, kCols] += a[row0 .. row0 + kRows, K] * b[K, col0 .. col0 + kCols]
template <class Element, int kRows, int kCols, int kRowsA, int K, int kColsB>
FA_DEVICE void mma_ab(AccTile<kRows, kCols>& c, SmemTile<kRowsA, K> a, int row0, SmemTile<K, kColsB> b, int col0) {
#pragma unroll
    for (int k = 0; k < K / 16; ++k) {
        AFragment fa[kRows / 16];
#pragma unroll
        for (int i = 0; i < kRows / 16; ++i) load_a(fa[i], a, row0, 16 * i, k);
#pragma unroll
        for (int n = 0; n < kCols / 16; ++n) {
            BFragment fb;
            load_b<kCols>(fb, b, col0, 16 * n, k);
            mma_step<Element>(c, fa, fb, n);
        }
    }
}

// c[kRows, kCols] += a[K, row0 .. row0 + kRows]^T * b[K, col0 .. col0 + kCols]
template <class Element, int kRows, int kCols, int K, int kColsA, int kColsB>
FA_DEVICE void mma_atb(AccTile<kRows, kCols>& c, SmemTile<K, kColsA> a, int row0, SmemTile<K, kColsB> b, int col0) {
#pragma unroll
    for (int k = 0; k < K / 16; ++k) {
        AFragment fa[kRows / 16];
#pragma unroll
        for (int i = 0; i < kRows / 16; ++i) load_a_transposed<kRows>(fa[i], a, row0, 16 * i, k);
#pragma unroll
        for (int n = 0; n < kCols / 16; ++n) {
            BFragment fb;
            load_b<kCols>(fb, b, col0, 16 * n, k);
            mma_step<Element>(c, fa, fb, n);
        }
    }
}

}  // namespace flash_attn
