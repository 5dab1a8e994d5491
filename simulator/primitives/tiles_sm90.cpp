// Tiles of sm_90: rows of one sequence by TMA (cuda/tile/copy_sm90.h), products of a warpgroup (cuda/tile/gemm_sm90.h).
#include "primitives.h"

#ifdef PRIMITIVES_WITH_SM90
#include "cuda/ptx/global.h"
#include "cuda/ptx/shared.h"
#include "cuda/ptx/sync.h"
#include "cuda/sm90/tma_tensor.h"
#include "cuda/tile/copy_sm90.h"
#include "cuda/tile/gemm_sm90.h"
#include "cuda/tile/store_tile.h"

namespace flash_attn::primitives {
namespace {

// ---------------------------------------------------------------- rows of a sequence
constexpr int kTileRows = 32, kTileCols = 96;  // of which the last panel has 64 columns too
using Tile = WideTile<kTileRows, kTileCols>;
constexpr int kWideCols = Tile::kPanels * 64;

struct Place { int batch, head, first_row, seqlen, row; };

FA_KERNEL(32, 1)
rows_kernel(FA_GRID_CONSTANT TmaTensor in, FA_GRID_CONSTANT TmaTensor out, Place at, uint16_t* loaded) {
    const Tile tile{ptx::smem()};
    const ptx::SmemPtr bar = tile.end();
    const TmaRows from(in, at.batch, at.head, at.first_row, at.seqlen),
        to(out, at.batch, at.head, at.first_row, at.seqlen);
    if (ptx::thread_idx() == 0) {
        ptx::mbarrier_init(bar, 1);
        ptx::fence_mbarrier_init();
        ptx::mbarrier_arrive_expect_tx(bar, Tile::kBytes);
        from.load(tile, bar, at.row);
    }
    ptx::sync_threads();
    ptx::mbarrier_wait(bar, 0);
    for (int i = ptx::thread_idx(); i < kTileRows * kWideCols / 8; i += 32) {
        const int row = i / (kWideCols / 8), chunk = i % (kWideCols / 8);
        uint32_t elements[4];
        ptx::load_shared_16(elements, tile.panel(chunk / 8).chunk(row, chunk % 8));
        for (int j = 0; j < 8; ++j) loaded[i * 8 + j] = static_cast<uint16_t>(elements[j / 2] >> 16 * (j % 2));
    }
    if (ptx::thread_idx() != 0) return;
    to.store(tile, 0, at.row);
    ptx::bulk_commit();
    ptx::bulk_wait_read<0>();
}

// [2][40][3][columns], with gaps after every head, row and batch entry. The tile starts within a sequence and ends
// after it.
void test_rows(int columns, Place at) {
    constexpr int kBatch = 2, kRows = 40, kHeads = 3;
    const int64_t head_stride = 104, row_stride = (kHeads + 1) * head_stride,
                  batch_stride = (kRows + 1) * row_stride + 24;
    const cuda::TensorSize size{kBatch, kHeads, kRows, columns};
    Buffer<uint16_t> in(int(kBatch * batch_stride)), out(int(kBatch * batch_stride)), loaded(kTileRows * kWideCols);
    for (int i = 0; i < in.size; ++i) in[i] = static_cast<uint16_t>(i + 1);
    out.fill(0x1234);
    TmaTensor from{}, to{};
    const char* error =
        cuda::make_tma_tensor("from", from, {in.data, batch_stride, row_stride, head_stride}, size, kTileRows);
    if (!error)
        error = cuda::make_tma_tensor("to", to, {out.data, batch_stride, row_stride, head_stride}, size, kTileRows);
    require(!error, error);
    run(rows_kernel, 1, 32, Tile::kBytes + 8, from, to, at, loaded.data);
    const auto place = [&](int r, int c) {
        return int(at.batch * batch_stride + (at.first_row + at.row + r) * row_stride + at.head * head_stride + c);
    };
    bool right = true;
    Buffer<uint16_t> expected(out.size);
    expected.fill(0x1234);
    for (int r = 0; r < kTileRows; ++r)
        for (int c = 0; c < kWideCols; ++c) {
            const bool inside = at.row + r < at.seqlen && c < columns;
            right &= loaded[r * kWideCols + c] == (inside ? in[place(r, c)] : 0);
            if (inside) expected[place(r, c)] = in[place(r, c)];
            // Stores are rounded up to 16 bytes.
            const bool beside = at.row + r < at.seqlen && c >= columns && c < round_up(columns, 8);
            if (beside) expected[place(r, c)] = 0;
        }
    bool stored = true;
    for (int i = 0; i < out.size; ++i) stored &= out[i] == expected[i];
    expect(right, "rows of a sequence, zeros after it; columns", columns);
    expect(stored, "rows of a sequence, stored, and nothing after it; columns", columns);
}

// Which tensors TMA can see. Of strides those are looked at that lead anywhere.
void test_strides() {
    struct Row {
        const char* what;
        bool fits;
        TensorView view;
        cuda::TensorSize size;
    };
    const auto at = [](int64_t address) { return reinterpret_cast<void*>(address); };
    constexpr int64_t kFar = int64_t(1) << 32;
    const Row rows[] = {
        {"contiguous", true, {at(4096), 24576, 192, 64}, {2, 3, 128, 64}},
        {"heads before rows", true, {at(4096), 24576, 64, 8192}, {2, 3, 128, 64}},
        {"columns of wider rows", true, {at(4096), 24576, 192, 64}, {2, 3, 128, 40}},
        {"one row, whatever its stride", true, {at(4096), 192, 3, 64}, {2, 3, 1, 64}},
        {"one head and sequence, whatever their strides", true, {at(4096), 5, 64, 7}, {1, 1, 128, 64}},
        {"the same sequence many times", true, {at(4096), 0, 192, 64}, {2, 3, 128, 64}},
        {"far apart", true, {at(4096), kFar, 192, 64}, {2, 3, 128, 64}},
        {"no data", false, {nullptr, 24576, 192, 64}, {2, 3, 128, 64}},
        {"no rows", false, {at(4096), 24576, 192, 64}, {2, 3, 0, 64}},
        {"rows that end within 16 bytes", false, {at(4096), 24576, 192, 64}, {2, 3, 128, 44}},
        {"one such row", false, {at(4096), 24576, 192, 64}, {1, 1, 1, 44}},
        {"the same row many times", false, {at(4096), 24576, 0, 64}, {2, 3, 128, 64}},
        {"rows that overlap", false, {at(4096), 24576, 56, 64}, {2, 3, 128, 64}},
        {"a start that is no multiple of 16 bytes", false, {at(4104), 24576, 192, 64}, {2, 3, 128, 64}},
        {"a stride of rows that is none", false, {at(4096), 24576, 196, 64}, {2, 3, 128, 64}},
        {"a stride of heads that is none", false, {at(4096), 24576, 192, 68}, {2, 3, 128, 64}},
        {"a stride of sequences that is none", false, {at(4096), 24580, 192, 64}, {2, 3, 128, 64}},
        {"more than 2^31 steps", false, {at(4096), 8 * kFar, 72, 8}, {2, 3, 128, 64}},
    };
    for (const Row& row : rows) expect(cuda::TmaStrides(row.view, row.size).fit() == row.fits, row.what);
    TmaTensor map{};
    const char* error = cuda::make_tma_tensor("dk", map, {at(4104), 24576, 192, 64}, {2, 3, 128, 64}, 32);
    expect(error && std::strstr(error, "refuses a tensor map of dk: "), "a tensor map that is refused says of what");
}

// ---------------------------------------------------------------- products
// a: [64][kK], b: [kN][kK] and [kK][kN], c: [5][64][kN], all rounded up to tiles of 64 columns in shared memory.
constexpr int kK = 96, kN = 64, kPart = 32;

template <int kRows, int kCols> FA_DEVICE void fill(WideTile<kRows, kCols> tile, const uint16_t* rows, int columns) {
    for (int i = ptx::thread_idx(); i < kRows * tile.kPanels * 8; i += kWarpgroupThreads) {
        const int row = i / (tile.kPanels * 8), chunk = i % (tile.kPanels * 8);
        uint32_t elements[4] = {};
        for (int j = 0; j < 8 && chunk * 8 < columns; ++j)
            elements[j / 2] |= static_cast<uint32_t>(rows[row * columns + chunk * 8 + j]) << 16 * (j % 2);
        ptx::store_shared_16(tile.panel(chunk / 8).chunk(row, chunk % 8), elements);
    }
}

FA_KERNEL(kWarpgroupThreads, 1) products_kernel(const uint16_t* a, const uint16_t* b, const uint16_t* bt, float* c) {
    const WideTile<64, kK> sA{ptx::smem()}, sB{sA.end()};  // sA: K columns are read only
    const WideTile<kK, kN> sBt{sB.end()};
    const WideTile<64, kN> sP{sBt.end()};
    const WideTile<kN, 64> sPt{sP.end()};
    fill<64, kK>(sA, a, kK);
    fill<kN, kK>(sB, b, kK);
    fill<kK, kN>(sBt, bt, kN);
    ptx::fence_proxy_async();
    ptx::sync_threads();
    const int warp_row0 = ptx::thread_idx() / 32 * 16;
    const auto write = [&](float* to, auto& tile, int columns, int col0) {
        tile.for_each(
            [&](int r, int column, float& x) { to[(warp_row0 + lane_row(r)) * columns + col0 + column] = x; });
    };
    // a b^T, then that times the first 64 rows of bt, from registers and from shared memory, in two parts.
    AccTile<16, kN> product, again;
    AccTile<16, kPart> part;
    wgmma_abt<bf16, kK>(product, sA, 0, sB, 0);
    ptx::wgmma_wait<0>();
    pin_tile(product);
    write(c, product, kN, 0);
    const PackedTile<bf16, 16, kN> packed(product);
    again.clear();
    const WideTile<kN, kN> first_rows{sBt.base};
    wgmma_ab<bf16>(again, packed, first_rows);
    ptx::wgmma_wait<0>();
    pin_tile(again);
    write(c + 64 * kN, again, kN, 0);
    store_matrices(packed, sP, warp_row0);
    store_matrices_transposed(packed, sPt);
    ptx::fence_proxy_async();
    ptx::sync_threads();
    for (int col0 = 0; col0 < kN; col0 += kPart) {
        wgmma_ab<bf16>(part, sP, 0, first_rows, col0);
        ptx::wgmma_wait<0>();
        pin_tile(part);
        write(c + 2 * 64 * kN, part, kN, col0);
    }
    // The transpose of the product times bt.
    wgmma_ab<bf16>(again, sPt, 0, first_rows, 0);
    ptx::wgmma_wait<0>();
    pin_tile(again);
    write(c + 3 * 64 * kN, again, kN, 0);
    // The same without transposing in shared memory.
    again.clear();
    wgmma_atb<bf16>(again, sP, 0, first_rows);
    ptx::wgmma_wait<0>();
    pin_tile(again);
    write(c + 4 * 64 * kN, again, kN, 0);
}

// a [64][kK] times 40 rows of b [kN][kK] from kRow0 on, stored as bf16 in shared memory from column kCol0 on, across
// two panels. stored: [64][128]
constexpr int kFewer = 40, kRow0 = 24, kCol0 = 40;
FA_KERNEL(kWarpgroupThreads, 1) some_rows_kernel(const uint16_t* a, const uint16_t* b, uint16_t* stored) {
    const WideTile<64, kK> sA{ptx::smem()}, sB{sA.end()};
    const WideTile<64, 128> sC{sB.end()};
    fill<64, kK>(sA, a, kK);
    fill<kN, kK>(sB, b, kK);
    ptx::fence_proxy_async();
    ptx::sync_threads();
    AccTile<16, kFewer> product;
    wgmma_abt<bf16, kK>(product, sA, 0, sB, kRow0);
    ptx::wgmma_wait<0>();
    pin_tile(product);
    store_shared<bf16>(product, sC, ptx::thread_idx() / 32 * 16, kCol0);
    ptx::sync_threads();
    for (int i = ptx::thread_idx(); i < 64 * kFewer / 8; i += kWarpgroupThreads) {
        const int row = i / (kFewer / 8), chunk = kCol0 / 8 + i % (kFewer / 8);
        uint32_t elements[4];
        ptx::load_shared_16(elements, sC.panel(chunk / 8).chunk(row, chunk % 8));
        ptx::store_16(stored + row * 128 + chunk * 8, elements);
    }
}

void test_products() {
    Buffer<uint16_t> a(64 * kK), b(kN * kK), bt(kK * kN);
    Buffer<float> c(5 * 64 * kN);
    // Small enough for products of products to be exact.
    const auto value = [](int i, int j) { return float((i * 5 + j * 3) % 7 == 0) - float((i + j * 2) % 11 == 0); };
    for (int i = 0; i < 64; ++i)
        for (int j = 0; j < kK; ++j) {
            a[i * kK + j] = small_bits<bf16>(value(i, j));
            b[i * kK + j] = small_bits<bf16>(value(j, i + 1));
            bt[j * kN + i] = small_bits<bf16>(value(i + 2, j));
        }
    run(products_kernel, 1, kWarpgroupThreads, 128 * 1024, a.data, b.data, bt.data, c.data);
    float product[64][kN];
    bool right[5] = {true, true, true, true, true};
    for (int i = 0; i < 64; ++i)
        for (int j = 0; j < kN; ++j) {
            product[i][j] = 0;
            for (int k = 0; k < kK; ++k) product[i][j] += value(i, k) * value(k, j + 1);
            right[0] &= c[i * kN + j] == product[i][j];
        }
    for (int i = 0; i < 64; ++i)
        for (int j = 0; j < kN; ++j) {
            float sum = 0, transposed = 0;
            for (int k = 0; k < kN; ++k) {
                sum += product[i][k] * value(j + 2, k);
                transposed += product[k][i] * value(j + 2, k);
            }
            right[1] &= c[64 * kN + i * kN + j] == sum;
            right[2] &= c[2 * 64 * kN + i * kN + j] == sum;
            right[3] &= c[3 * 64 * kN + i * kN + j] == transposed;
            right[4] &= c[4 * 64 * kN + i * kN + j] == transposed;
        }
    const char* const names[] = {"a b^T of tiles", "a b, a in registers", "a b of tiles, in parts",
                                 "a b of tiles, a stored transposed", "a^T b of tiles"};
    for (int i = 0; i < 5; ++i) expect(right[i], names[i]);

    Buffer<uint16_t> stored(64 * 128);
    run(some_rows_kernel, 1, kWarpgroupThreads, 128 * 1024, a.data, b.data, stored.data);
    bool some = true;
    for (int i = 0; i < 64; ++i)
        for (int j = 0; j < kFewer; ++j) some &= stored[i * 128 + kCol0 + j] == small_bits<bf16>(product[i][kRow0 + j]);
    expect(some, "a b^T of tiles, 40 rows of b, stored across panels");
}

}  // namespace

void test_rows_sm90() {
    test_rows(96, {1, 2, 7, 25, 16});
    test_rows(40, {0, 1, 0, 40, 32});
    test_rows(13, {1, 0, 39, 1, 0});
    test_rows(72, {0, 0, 3, 32, 0});
    test_strides();
}

void test_tiles_sm90() { test_products(); }

}  // namespace flash_attn::primitives
#else
namespace flash_attn::primitives {
void test_rows_sm90() {}
void test_tiles_sm90() {}
}  // namespace flash_attn::primitives
#endif
