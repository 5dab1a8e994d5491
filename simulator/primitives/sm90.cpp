// Instructions of sm_90: elect, stmatrix, mbarrier, TMA, bulk copies. Those of wgmma are in wgmma.cpp.
#include "primitives.h"

#ifdef PRIMITIVES_WITH_SM90
#include "cuda/ptx/global.h"
#include "cuda/ptx/grid.h"
#include "cuda/ptx/ldmatrix.h"
#include "cuda/ptx/sync.h"
#include "tensor_map.h"

namespace flash_attn::primitives {
namespace {

// ---------------------------------------------------------------- elect.sync
FA_KERNEL(32, 1) elect_kernel(int32_t* elected) { ptx::store(elected + ptx::thread_idx(), ptx::elect_one() ? 1 : 0); }

void test_elect() {
    Buffer<int32_t> elected(32);
    run(elect_kernel, 1, 32, 0, elected.data);
    int sum = 0;
    for (int i = 0; i < 32; ++i) sum += elected[i];
    expect(sum == 1, "elect.sync");
}

// ---------------------------------------------------------------- stmatrix
template <bool kTranspose> FA_KERNEL(32, 1) stmatrix_kernel(const uint16_t* in, uint16_t* stored) {  // [4][8][8]
    uint16_t* s = reinterpret_cast<uint16_t*>(ptx::smem());
    const int lane = ptx::thread_idx();
    uint32_t r[4];
    for (int m = 0; m < 4; ++m) {
        const uint16_t* p = in + m * 64 + lane / 4 * 8 + lane % 4 * 2;
        r[m] = p[0] | static_cast<uint32_t>(p[1]) << 16;
    }
    ptx::stmatrix_x4<kTranspose>(s + lane * 8, r);
    ptx::sync_threads();
    for (int i = lane; i < 256; i += 32) stored[i] = s[i];
}

template <bool kTranspose> void test_stmatrix() {
    Buffer<uint16_t> in(256), stored(256);
    for (int i = 0; i < 256; ++i) in[i] = static_cast<uint16_t>(i);
    run(stmatrix_kernel<kTranspose>, 1, 32, 512, in.data, stored.data);
    bool ok = true;
    for (int m = 0; m < 4; ++m)
        for (int i = 0; i < 8; ++i)
            for (int j = 0; j < 8; ++j)
                ok &= stored[m * 64 + (kTranspose ? j * 8 + i : i * 8 + j)] == in[m * 64 + i * 8 + j];
    expect(ok, "stmatrix, transposed", kTranspose);
}

// ---------------------------------------------------------------- TMA
constexpr int kRows = 16, kCols = 64;  // the box, of a [2][20][80] tensor

FA_KERNEL(32, 1)
tma_kernel(FA_GRID_CONSTANT ptx::TensorMap in, FA_GRID_CONSTANT ptx::TensorMap out, int col, int row, int plane,
           bool stores, uint16_t* raw) {
    uint16_t* tile = reinterpret_cast<uint16_t*>(ptx::smem());
    const ptx::SmemPtr bar = ptx::smem() + kRows * kCols * 2;
    if (ptx::thread_idx() == 0) {
        ptx::mbarrier_init(bar, 1);
        ptx::fence_mbarrier_init();
    }
    ptx::sync_threads();
    if (ptx::thread_idx() == 0) {
        ptx::mbarrier_arrive_expect_tx(bar, kRows * kCols * 2);
        ptx::tma_load<3>(tile, in, bar, {col, row, plane});
    }
    ptx::mbarrier_wait(bar, 0);
    for (int i = ptx::thread_idx(); i < kRows * kCols; i += 32) raw[i] = tile[i];
    if (stores && ptx::thread_idx() == 0) {
        ptx::tma_store<3>(out, tile, {col, row, plane});
        ptx::bulk_commit();
        ptx::bulk_wait_read<0>();
    }
}

// Boxes within the tensor, across its end and past it: nothing that a kernel sees.
FA_KERNEL(32, 1) prefetch_kernel(FA_GRID_CONSTANT ptx::TensorMap in) {
    if (ptx::thread_idx() != 0) return;
    ptx::tma_prefetch(in, {0, 0, 0, 1});
    ptx::tma_prefetch(in, {64, 12, 1, 0});
    ptx::tma_prefetch(in, {0, 40, 0, 0});
}

void test_prefetch() {
    Buffer<uint16_t> in(80 * 20 * 2 * 2);
    for (int i = 0; i < in.size; ++i) in[i] = static_cast<uint16_t>(i);
    reset_traffic();
    const auto map = make_tensor_map<4>(in.data, {80, 20, 2, 2}, {160, 3200, 6400}, {kCols, kRows, 1, 1});
    run(prefetch_kernel, 1, 32, 0, map);
    bool ok = true;
    for (int i = 0; i < in.size; ++i) ok &= in[i] == static_cast<uint16_t>(i);
    expect(ok, "TMA prefetch");
    expect_traffic({}, "TMA prefetch, no bytes");
}

// The box may begin before the tensor where it is loaded, but not where it is stored: an illegal instruction on an
// H200.
void test_tma(int col, int row, int plane) {
    const bool stores = col >= 0 && row >= 0;
    constexpr int kDim0 = 80, kDim1 = 20, kDim2 = 2;
    Buffer<uint16_t> in(kDim0 * kDim1 * kDim2), out(kDim0 * kDim1 * kDim2), raw(kRows * kCols);
    for (int i = 0; i < in.size; ++i) in[i] = static_cast<uint16_t>(i + 1);
    out.fill(0x1234);
    auto map = [](void* p) {
        return make_tensor_map<3>(p, {kDim0, kDim1, kDim2}, {kDim0 * 2, kDim0 * kDim1 * 2}, {kCols, kRows, 1});
    };
    reset_traffic();
    run(tma_kernel, 1, 32, kRows * kCols * 2 + 8, map(in.data), map(out.data), col, row, plane, stores, raw.data);
    bool loaded = true, stored = true;
    int64_t bytes = 0;
    for (int r = 0; r < kRows; ++r)
        for (int c = 0; c < kCols; ++c) {
            const int x = col + c, y = row + r;
            const bool inside = x >= 0 && x < kDim0 && y >= 0 && y < kDim1;
            const int place = r * 64 + ((c / 8 ^ r % 8) * 8 + c % 8);
            bytes += inside ? 2 : 0;
            loaded &= raw[place] == (inside ? in[(plane * kDim1 + y) * kDim0 + x] : 0);
        }
    for (int z = 0; z < kDim2; ++z)
        for (int y = 0; y < kDim1; ++y)
            for (int x = 0; x < kDim0; ++x) {
                const bool touched = stores && z == plane && y >= row && y < row + kRows && x >= col && x < col + kCols;
                const int at = (z * kDim1 + y) * kDim0 + x;
                stored &= out[at] == (touched ? in[at] : 0x1234);
            }
    expect(loaded, "TMA load, 128-byte swizzle, zero fill; first column", col);
    expect(stored, "TMA store, clipped; first column", col);
    expect_traffic({{}, {bytes, stores ? bytes : 0, 0}, {}, {}, {}}, "TMA, what is within the tensor");
}

// ---------------------------------------------------------------- bulk copies
constexpr int kFloats = 256;

FA_KERNEL(64, 1) bulk_kernel(const float* in, float* reduced) {
    float* s = reinterpret_cast<float*>(ptx::smem());
    const ptx::SmemPtr bar = ptx::smem() + kFloats * 4;
    const int t = ptx::thread_idx();
    if (t == 0) {
        ptx::mbarrier_init(bar, 1);
        ptx::fence_mbarrier_init();
        ptx::mbarrier_arrive_expect_tx(bar, kFloats * 4);
        ptx::bulk_load(s, in, kFloats * 4, bar);
    }
    ptx::sync_threads();
    ptx::mbarrier_wait(bar, 0);
    for (int i = t; i < kFloats; i += 64) s[i] += 1;
    ptx::fence_proxy_async();
    ptx::sync_threads();
    if (t % 32 == 0) {  // both warps, to the same place
        ptx::bulk_reduce_add(reduced, s, kFloats * 4);
        ptx::bulk_commit();
        ptx::bulk_wait_read<0>();
    }
}

void test_bulk(int blocks) {
    Buffer<float> in(kFloats), reduced(kFloats);
    reduced.fill(3);
    for (int i = 0; i < kFloats; ++i) in[i] = static_cast<float>(i * 7 % 31);
    reset_traffic();
    run(bulk_kernel, blocks, 64, kFloats * 4 + 8, in.data, reduced.data);
    bool ok = true;
    for (int i = 0; i < kFloats; ++i) ok &= reduced[i] == 3 + static_cast<float>(2 * blocks) * (in[i] + 1);
    expect(ok, "bulk load, bulk reduction; blocks", blocks);
    expect_traffic({{}, {}, {blocks * kFloats * 4, 0, 2 * blocks * kFloats * 4}, {}, {}}, "bulk");
}

// Blocks take turns at bulk reductions, each waiting until its own has been written: the sum shows the order.
FA_KERNEL(32, 1) bulk_turns_kernel(int32_t* counter, float* sum) {
    float* s = reinterpret_cast<float*>(ptx::smem());
    const int block = ptx::block_idx(), t = ptx::thread_idx();
    if (t == 0) ptx::wait_for_turn(counter, block);
    ptx::sync_threads();  // all threads read what earlier blocks have added
    const float before = t < 4 ? ptx::load(sum + t) : 0.f;
    if (t < 4) s[t] = 2 * before + static_cast<float>(block);
    ptx::fence_proxy_async();
    ptx::sync_threads();  // s is complete, and sum has been read
    if (t != 0) return;
    ptx::bulk_reduce_add(sum, s, 16);
    ptx::bulk_commit();
    ptx::bulk_wait<0>();
    ptx::pass_turn(counter);
}

void test_bulk_turns() {
    constexpr int kBlocks = 5;
    Buffer<int32_t> counter(1);
    Buffer<float> sum(4);
    sum.fill(1);
    run(bulk_turns_kernel, kBlocks, 32, 16, counter.data, sum.data);
    float expected = 1;
    for (int b = 0; b < kBlocks; ++b) expected += 2 * expected + static_cast<float>(b);
    bool ok = true;
    for (int i = 0; i < 4; ++i) ok &= sum[i] == expected;
    expect(ok, "bulk reductions in a fixed order");
}

// ---------------------------------------------------------------- griddepcontrol
// Three kernels, each of which may begin before the last has ended: a, b = 2 a of another block, and c = a + b of yet
// others. The second waits, and so the third, which waits for the second, sees what the first wrote.
constexpr int kRelayBlocks = 64, kRelayThreads = 64, kRelayed = kRelayBlocks * kRelayThreads;
FA_DEVICE int relayed(int blocks_on) {
    return (ptx::block_idx() + blocks_on) % kRelayBlocks * kRelayThreads + ptx::thread_idx();
}

FA_KERNEL(kRelayThreads, 1) relay_first_kernel(const int32_t* in, int32_t* a) {
    ptx::grid_launch_dependents();
    int32_t sum = 0;
    for (int i = 0; i < kRelayBlocks; ++i) sum += ptx::load(in + relayed(i));
    ptx::store(a + relayed(0), sum + ptx::block_idx());
}
FA_KERNEL(kRelayThreads, 1) relay_second_kernel(const int32_t* a, int32_t* b) {
    ptx::grid_launch_dependents();
    ptx::grid_wait();
    ptx::store(b + relayed(0), 2 * ptx::load(a + relayed(1)));
}
FA_KERNEL(kRelayThreads, 1) relay_third_kernel(const int32_t* a, const int32_t* b, int32_t* c) {
    ptx::grid_wait();
    ptx::store(c + relayed(0), ptx::load(a + relayed(2)) + ptx::load(b + relayed(3)));
}

void test_grid_wait() {
    Buffer<int32_t> in(kRelayed), a(kRelayed), b(kRelayed), c(kRelayed);
    in.fill(1);
    launch(false, relay_first_kernel, kRelayBlocks, kRelayThreads, 0, in.data, a.data);
    launch(true, relay_second_kernel, kRelayBlocks, kRelayThreads, 0, a.data, b.data);
    launch(true, relay_third_kernel, kRelayBlocks, kRelayThreads, 0, a.data, b.data, c.data);
    finish();
    bool ok = true;
    const auto first = [](int block) { return kRelayBlocks + block % kRelayBlocks; };
    for (int i = 0; i < kRelayed; ++i) {
        const int block = i / kRelayThreads;
        ok &= c[i] == first(block + 2) + 2 * first(block + 3 + 1);
    }
    expect(ok, "griddepcontrol, kernels that begin early");
}

// Four numbers at a time, and of every thread of a warp to places of its own, which all blocks share.
FA_KERNEL(32, 1) red_add_16_kernel(float* sums) {
    const float x = static_cast<float>(ptx::thread_idx() + ptx::block_idx());
    ptx::red_add_16(sums + 4 * ptx::thread_idx(), {x, 2 * x, 3 * x, 4 * x});
}

void test_red_add_16() {
    constexpr int kBlocks = 5;
    Buffer<float> sums(128);
    sums.fill(3);
    run(red_add_16_kernel, kBlocks, 32, 0, sums.data);
    bool ok = true;
    for (int i = 0; i < sums.size; ++i)
        ok &= sums[i] == 3 + static_cast<float>((i % 4 + 1) * (i / 4 * kBlocks + kBlocks * (kBlocks - 1) / 2));
    expect(ok, "red.add.v4.f32, across blocks");
}

}  // namespace

void test_sm90() {
    test_elect();
    test_stmatrix<false>();
    test_stmatrix<true>();
    test_prefetch();
    test_tma(0, 0, 0);
    test_tma(32, 8, 1);
    test_tma(-8, -3, 1);
    test_bulk(1);
    test_bulk(4);
    test_bulk_turns();
    test_grid_wait();
    test_red_add_16();
}

}  // namespace flash_attn::primitives
#else
void flash_attn::primitives::test_sm90() { std::printf("those of sm_90a are left out of this build\n"); }
#endif
