// Barriers, exchange between lanes, fragments and products of a warp.
#include <cmath>

#include "cuda/ptx/global.h"
#include "cuda/ptx/ldmatrix.h"
#include "cuda/ptx/mma.h"
#include "cuda/ptx/shared.h"
#include "cuda/ptx/sync.h"
#include "primitives.h"

namespace flash_attn::primitives {
namespace {

// ---------------------------------------------------------------- barriers
// Every thread reads what a thread of another warp wrote, several times over the same memory.
FA_KERNEL(128, 1) sync_threads_kernel(int32_t* out) {
    int32_t* s = reinterpret_cast<int32_t*>(ptx::smem());
    const int t = ptx::thread_idx();
    int32_t sum = 0;
    for (int round = 0; round < 4; ++round) {
        s[t] = 1000 * round + t;
        ptx::sync_threads();
        sum += s[(t + 37 * (round + 1)) % 128];
        ptx::sync_threads();  // before s is overwritten
    }
    ptx::store(out + t, sum);
}

void test_sync_threads() {
    Buffer<int32_t> out(128);
    run(sync_threads_kernel, 1, 128, 512, out.data);
    bool ok = true;
    for (int t = 0; t < 128; ++t) {
        int32_t sum = 0;
        for (int round = 0; round < 4; ++round) sum += 1000 * round + (t + 37 * (round + 1)) % 128;
        ok &= out[t] == sum;
    }
    expect(ok, "bar.sync 0");
}

// Vote r: the threads whose bit r is set in votes say true. out: [threads], bit r: the result of vote r.
constexpr int kVotes = 4;
FA_KERNEL(96, 1) sync_threads_or_kernel(const int32_t* votes, int32_t* out) {
    const int t = ptx::thread_idx();
    int32_t* s = reinterpret_cast<int32_t*>(ptx::smem());
    s[t] = ptx::load(votes + t);
    int32_t results = 0;
    for (int r = 0; r < kVotes; ++r) results |= ptx::sync_threads_or(ptx::load(votes + t) >> r & 1) << r;
    ptx::store(out + t, results == 0 ? -1 : results | s[95 - t] << 8);  // a vote is a barrier too
}

void test_sync_threads_or() {
    Buffer<int32_t> votes(96), out(96);
    for (int t = 0; t < 96; ++t) votes[t] = (t == 77) | (t < 40) << 1 | 0 << 2 | 1 << 3;
    run(sync_threads_or_kernel, 1, 96, 384, votes.data, out.data);
    bool ok = true;
    for (int t = 0; t < 96; ++t) ok &= out[t] == (0b1011 | votes[95 - t] << 8);
    expect(ok, "bar.red.or");
}

// Warp 0 fills two buffers alternately, warp 1 empties them. Barriers 1 and 2: full; 3 and 4: empty.
constexpr int kHandovers = 6;
FA_KERNEL(64, 1) named_barrier_kernel(int32_t* out) {
    int32_t* s = reinterpret_cast<int32_t*>(ptx::smem());  // [2][32]
    const int lane = ptx::thread_idx() % 32;
    const bool producer = ptx::thread_idx() < 32;
    int32_t sum = 0;
    for (int i = 0; i < kHandovers; ++i) {
        const int stage = i % 2;
        if (producer) {
            if (i >= 2) ptx::barrier_sync(3 + stage, 64);
            s[32 * stage + lane] = 100 * i + lane;
            ptx::barrier_arrive(1 + stage, 64);
        } else {
            ptx::barrier_sync(1 + stage, 64);
            sum = 3 * sum + s[32 * stage + 31 - lane];
            if (i + 2 < kHandovers) ptx::barrier_arrive(3 + stage, 64);
        }
    }
    if (!producer) ptx::store(out + lane, sum);
}

void test_named_barriers() {
    Buffer<int32_t> out(32);
    run(named_barrier_kernel, 1, 64, 256, out.data);
    bool ok = true;
    for (int lane = 0; lane < 32; ++lane) {
        int32_t sum = 0;
        for (int i = 0; i < kHandovers; ++i) sum = 3 * sum + 100 * i + 31 - lane;
        ok &= out[lane] == sum;
    }
    expect(ok, "bar.sync and bar.arrive, two stages");
}

// ---------------------------------------------------------------- shfl
FA_KERNEL(64, 1) shfl_kernel(float* out) {  // out: [5][64]
    const int t = ptx::thread_idx();
    for (int i = 0; i < 5; ++i) ptx::store(out + i * 64 + t, ptx::shfl_xor(static_cast<float>(t + 100 * i), 1 << i));
}

void test_shfl() {
    Buffer<float> out(320);
    run(shfl_kernel, 1, 64, 0, out.data);
    bool ok = true;
    for (int i = 0; i < 5; ++i)
        for (int t = 0; t < 64; ++t) ok &= out[i * 64 + t] == static_cast<float>((t ^ 1 << i) + 100 * i);
    expect(ok, "shfl.xor");
}

// ---------------------------------------------------------------- bar.warp.sync
FA_KERNEL(64, 1) sync_warp_kernel(uint32_t* out) {
    const int t = ptx::thread_idx();
    for (uint32_t i = 0; i < 9; ++i) {
        ptx::store_shared(ptx::smem() + 4 * t, 100 * i + uint32_t(t));
        ptx::sync_warp();
        ptx::store(out + t, ptx::load(out + t) * 3 + ptx::load_shared(ptx::smem() + 4 * (t ^ 31)));
        ptx::sync_warp();
    }
}

void test_sync_warp() {
    Buffer<uint32_t> out(64);
    run(sync_warp_kernel, 1, 64, 256, out.data);
    bool ok = true;
    for (uint32_t t = 0; t < 64; ++t) {
        uint32_t expected = 0;
        for (uint32_t i = 0; i < 9; ++i) expected = 3 * expected + 100 * i + (t ^ 31);
        ok &= out[int(t)] == expected;
    }
    expect(ok, "bar.warp.sync");
}

// ---------------------------------------------------------------- ldmatrix
template <bool kTranspose> FA_KERNEL(32, 1) ldmatrix_kernel(const uint16_t* in, uint32_t* regs) {
    uint16_t* s = reinterpret_cast<uint16_t*>(ptx::smem());  // [4][8][8]
    const int lane = ptx::thread_idx();
    for (int i = lane; i < 256; i += 32) s[i] = in[i];
    ptx::sync_threads();
    uint32_t r[4];
    ptx::ldmatrix_x4<kTranspose>(r, s + lane * 8);
    for (int m = 0; m < 4; ++m) regs[lane * 4 + m] = r[m];
}

template <bool kTranspose> void test_ldmatrix() {
    Buffer<uint16_t> in(256);
    Buffer<uint32_t> regs(128);
    for (int i = 0; i < 256; ++i) in[i] = static_cast<uint16_t>(i);
    run(ldmatrix_kernel<kTranspose>, 1, 32, 512, in.data, regs.data);
    bool ok = true;
    for (int t = 0; t < 32; ++t)
        for (int m = 0; m < 4; ++m)
            for (int h = 0; h < 2; ++h) {
                const int row = t / 4, col = t % 4 * 2 + h;
                const uint32_t value = regs[t * 4 + m] >> 16 * h & 0xffff;
                ok &= value == static_cast<uint32_t>(kTranspose ? m * 64 + col * 8 + row : m * 64 + row * 8 + col);
            }
    expect(ok, "ldmatrix, transposed", kTranspose);
}

// ---------------------------------------------------------------- mma
// c[16][8] = 1 + a[16][16] b[16][8]
template <class Element> FA_KERNEL(32, 1) mma_kernel(const uint16_t* a, const uint16_t* b, float* c) {
    const int lane = ptx::thread_idx(), row = lane / 4, col = lane % 4 * 2;
    auto pair = [](uint16_t lo, uint16_t hi) { return lo | static_cast<uint32_t>(hi) << 16; };
    uint32_t ar[4], br[2];
    for (int r = 0; r < 4; ++r) {
        const uint16_t* p = a + (row + r % 2 * 8) * 16 + col + r / 2 * 8;
        ar[r] = pair(p[0], p[1]);
    }
    for (int r = 0; r < 2; ++r) br[r] = pair(b[(col + r * 8) * 8 + row], b[(col + r * 8 + 1) * 8 + row]);
    float acc[4] = {1.f, 1.f, 1.f, 1.f};
    ptx::mma_m16n8k16<Element>(acc, ar, br[0], br[1]);
    for (int r = 0; r < 4; ++r) c[(row + r / 2 * 8) * 8 + col + r % 2] = acc[r];
}

template <class Element> void test_mma() {
    Buffer<uint16_t> a(256), b(128);
    Buffer<float> c(128);
    fill_small<Element>(a);
    fill_small<Element>(b);
    run(mma_kernel<Element>, 1, 32, 0, a.data, b.data, c.data);
    bool ok = true;
    for (int i = 0; i < 16; ++i)
        for (int j = 0; j < 8; ++j) {
            float x = 1;
            for (int k = 0; k < 16; ++k) x += small_value(i * 16 + k) * small_value(k * 8 + j);
            ok &= x == c[i * 8 + j];
        }
    char what[40];
    std::snprintf(what, sizeof what, "mma.m16n8k16, %s", type_name<Element>());
    expect(ok, what);
}

// What is not finite reaches the rows and columns that it belongs to, and denormals are not flushed.
template <class Element> void test_mma_special() {
    constexpr bool kBf16 = std::is_same_v<Element, bf16>;
    Buffer<uint16_t> a(256), b(128);
    Buffer<float> c(128);
    const uint16_t one = small_bits<Element>(1);
    for (int i = 0; i < 128; ++i) b[i] = one;
    a[3 * 16 + 5] = kBf16 ? 0x7f80 : 0x7c00;  // +infinity
    a[4 * 16 + 7] = kBf16 ? 0x7fc0 : 0x7e00;  // NaN
    a[9 * 16 + 15] = 0x0001;                  // the smallest denormal
    b[15 * 8 + 2] = kBf16 ? 0x7e80 : 0x7800;  // 2^126 or 2^15
    run(mma_kernel<Element>, 1, 32, 0, a.data, b.data, c.data);
    const float product = kBf16 ? 0x1p-7f : 0x1p-9f;
    bool ok = true;
    for (int i = 0; i < 16; ++i)
        for (int j = 0; j < 8; ++j) {
            const float x = c[i * 8 + j];
            const float expected = 1 + (i == 9 && j == 2 ? product : 0);
            ok &= i == 3 ? x == HUGE_VALF : i == 4 ? x != x : x == expected;
        }
    char what[60];
    std::snprintf(what, sizeof what, "mma.m16n8k16, infinity, NaN, denormal, %s", type_name<Element>());
    expect(ok, what);
}

}  // namespace

void test_warp() {
    test_sync_threads();
    test_sync_threads_or();
    test_named_barriers();
    test_shfl();
    test_sync_warp();
    test_ldmatrix<false>();
    test_ldmatrix<true>();
    test_mma<bf16>();
    test_mma<fp16>();
    test_mma_special<bf16>();
    test_mma_special<fp16>();
}

}  // namespace flash_attn::primitives
