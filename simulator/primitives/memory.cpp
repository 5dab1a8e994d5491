// Copies into shared memory, accesses to global memory, and the semaphore between blocks.
#include <cmath>
#include <limits>
#include <vector>
#include "cuda/ptx/cp_async.h"
#include "cuda/ptx/global.h"
#include "cuda/ptx/shared.h"
#include "cuda/ptx/sync.h"
#include "primitives.h"

namespace flash_attn::primitives {
namespace {

// ---------------------------------------------------------------- cp.async
constexpr int kChunk = 16;

// Thread t copies chunk t with t % 17 valid bytes over a mark. in and out: [threads][16] bytes.
FA_KERNEL(64, 1) cp_async_kernel(const char* in, char* out) {
    char* mine = ptx::smem() + ptx::thread_idx() * kChunk;
    for (int i = 0; i < kChunk; ++i) mine[i] = 0x11;
    ptx::cp_async_16(mine, in + ptx::thread_idx() * kChunk, ptx::thread_idx() % 17);
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
    uint32_t r[4];
    for (int i = 0; i < 4; ++i) r[i] = reinterpret_cast<const uint32_t*>(mine)[i];
    ptx::store_16(out + ptx::thread_idx() * kChunk, r);
}

void test_valid_bytes() {
    constexpr int kThreads = 64;
    Buffer<char> in(kThreads * kChunk), out(kThreads * kChunk);
    for (int i = 0; i < in.size; ++i) in[i] = static_cast<char>(i % 100 + 1);
    run(cp_async_kernel, 1, kThreads, kThreads * kChunk, in.data, out.data);
    bool ok = true;
    for (int i = 0; i < in.size; ++i) ok &= out[i] == (i % kChunk < i / kChunk % 17 ? in[i] : 0);
    expect(ok, "cp.async, 0 to 16 valid bytes");
}

// Thread t copies number t with t % 5 valid bytes over a mark.
FA_KERNEL(64, 1) cp_async_4_kernel(const uint32_t* in, uint32_t* out) {
    char* mine = ptx::smem() + 4 * ptx::thread_idx();
    ptx::store_shared(mine, 0x11111111);
    ptx::cp_async_4(mine, in + ptx::thread_idx(), ptx::thread_idx() % 5);
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
    ptx::store(out + ptx::thread_idx(), ptx::load_shared(mine));
}

void test_valid_bytes_of_4() {
    Buffer<uint32_t> in(64), out(64);
    for (int i = 0; i < in.size; ++i) in[i] = 0x80402010u + static_cast<uint32_t>(i);
    run(cp_async_4_kernel, 1, 64, 256, in.data, out.data);
    bool ok = true;
    for (int i = 0; i < in.size; ++i) ok &= out[i] == (i % 5 == 4 ? in[i] : in[i] & ((1u << 8 * (i % 5)) - 1));
    expect(ok, "cp.async, 0 to 4 valid bytes");
}

// Chunks go through shared memory to the thread on the other side.
FA_KERNEL(64, 1) shared_16_kernel(const uint32_t* in, uint32_t* out) {
    const int t = ptx::thread_idx();
    uint32_t r[4];
    ptx::load_16(r, in + 4 * t);
    ptx::store_shared_16(ptx::smem() + 16 * t, r);
    ptx::sync_threads();
    ptx::load_shared_16(r, ptx::smem() + 16 * (63 - t));
    ptx::store_16(out + 4 * t, r);
}

void test_shared() {
    Buffer<uint32_t> in(256), out(256);
    for (int i = 0; i < in.size; ++i) in[i] = static_cast<uint32_t>(i) * 0x01010101u;
    run(shared_16_kernel, 1, 64, 1024, in.data, out.data);
    bool ok = true;
    for (int i = 0; i < in.size; ++i) ok &= out[i] == in[(63 - i / 4) * 4 + i % 4];
    expect(ok, "16-byte shared load and store");
}

// An address with bits flipped, as swizzles do it.
FA_KERNEL(32, 1) flip_bits_kernel(uint32_t* out) {
    const ptx::SmemPtr base = ptx::smem();
    const int t = ptx::thread_idx();
    ptx::store_shared(ptx::flip_bits(ptx::pin(base + 4 * t), t / 8 * 4), static_cast<uint32_t>(t));
    ptx::sync_threads();
    ptx::store(out + t, ptx::load_shared(base + 4 * t));
}

void test_flip_bits() {
    Buffer<uint32_t> out(32);
    run(flip_bits_kernel, 1, 32, 128, out.data);
    bool ok = true;
    for (int t = 0; t < 32; ++t) ok &= out[t ^ t / 8] == static_cast<uint32_t>(t);
    expect(ok, "flip_bits");
}

// Three groups, the second one empty, waited for one by one; neighbours read what a thread copied.
FA_KERNEL(64, 1) cp_async_groups_kernel(const float* in, float* out) {
    float* s = reinterpret_cast<float*>(ptx::smem());  // [2][64][4]
    const int t = ptx::thread_idx(), neighbour = t ^ 33;
    ptx::cp_async_16(s + 4 * t, in + 4 * t, 16);
    ptx::cp_async_commit();
    ptx::cp_async_commit();
    ptx::cp_async_16(s + 256 + 4 * t, in + 256 + 4 * t, 16);
    ptx::cp_async_commit();
    ptx::cp_async_wait<2>();
    ptx::sync_threads();  // the first group of every thread
    ptx::store(out + t, s[4 * neighbour]);
    ptx::cp_async_wait<0>();
    ptx::sync_threads();  // the third
    ptx::store(out + 64 + t, s[256 + 4 * neighbour + 3]);
}

void test_groups() {
    Buffer<float> in(512), out(128);
    for (int i = 0; i < in.size; ++i) in[i] = static_cast<float>(i);
    run(cp_async_groups_kernel, 1, 64, 2048, in.data, out.data);
    bool ok = true;
    for (int t = 0; t < 64; ++t) {
        ok &= out[t] == static_cast<float>(4 * (t ^ 33));
        ok &= out[64 + t] == static_cast<float>(256 + 4 * (t ^ 33) + 3);
    }
    expect(ok, "cp.async, groups");
}

// ---------------------------------------------------------------- plain accesses and reductions
template <class T> FA_KERNEL(64, 1) load_store_kernel(const T* in, T* out) {
    const int t = ptx::block_idx() * 64 + ptx::thread_idx();
    ptx::store(out + t, ptx::load(in + t));
}

template <class T, class Bits> void test_load_store(const char* what) {
    Buffer<T> in(128), out(128);
    for (int i = 0; i < in.size; ++i) {
        const Bits bits = static_cast<Bits>(0x0123456789abcdefull * static_cast<unsigned>(i + 1));
        std::memcpy(static_cast<void*>(&in[i]), &bits, sizeof bits);
    }
    run(load_store_kernel<T>, 2, 64, 0, in.data, out.data);
    expect(!std::memcmp(&in[0], &out[0], 128 * sizeof(T)), what, sizeof(T));
}

FA_KERNEL(64, 1) load_store_16_kernel(const float* in, float* out) {
    const int t = ptx::thread_idx();
    uint32_t r[4];
    ptx::load_16(r, in + 4 * t);
    ptx::store_16(out + 4 * (63 - t), r);
}

void test_load_store_16() {
    Buffer<float> in(256), out(256);
    for (int i = 0; i < in.size; ++i) in[i] = static_cast<float>(i);
    run(load_store_16_kernel, 1, 64, 0, in.data, out.data);
    bool ok = true;
    for (int i = 0; i < in.size; ++i) ok &= out[i] == static_cast<float>((63 - i / 4) * 4 + i % 4);
    expect(ok, "16-byte global load and store");
}

// Every thread of every block to the same few places: not a data race.
FA_KERNEL(64, 1) red_add_kernel(const float* in, float* sum) {
    ptx::red_add(sum + ptx::thread_idx() % 3, ptx::load(in + ptx::thread_idx()) + static_cast<float>(ptx::block_idx()));
}

void test_red_add() {
    constexpr int kBlocks = 7;
    Buffer<float> in(64), sum(3);
    float expected[3] = {5, 5, 5};
    sum.fill(5);
    for (int i = 0; i < in.size; ++i) in[i] = static_cast<float>(i * 7 % 31);
    for (int b = 0; b < kBlocks; ++b)
        for (int i = 0; i < 64; ++i) expected[i % 3] += in[i] + static_cast<float>(b);
    run(red_add_kernel, kBlocks, 64, 0, in.data, sum.data);
    expect(sum[0] == expected[0] && sum[1] == expected[1] && sum[2] == expected[2], "red.add.f32, across blocks");
}

// Every thread of every block to one place: thread t of block b has number (64 b + t) % count of in.
FA_KERNEL(64, 1) red_max_kernel(const float* in, int count, float* largest) {
    ptx::red_max(largest, ptx::load(in + (64 * ptx::block_idx() + ptx::thread_idx()) % count));
}

void test_red_max() {
    const float infinity = HUGE_VALF, least = std::numeric_limits<float>::denorm_min();
    struct Row {
        std::vector<float> in;
        float before, after;
    };
    const Row rows[] = {
        {{-3, 2, 7, -8, 1}, -infinity, 7},
        {{-3, -2.5f, -8}, -infinity, -2.5f},
        {{-3, -2.5f, -8}, -1, -1},
        {{3, -5}, 4, 4},
        {{-infinity}, -infinity, -infinity},
        {{-infinity, -1e38f}, -infinity, -1e38f},
        {{infinity, 1e38f}, -infinity, infinity},
        {{-0.f, -1}, -infinity, -0.f},
        {{-0.f, 0.f, -1}, -infinity, 0},
        {{-0.f}, 0, 0},
        {{0.f}, -0.f, 0},
        {{-least, -1}, -infinity, -least},
        {{least, -least, 0}, -infinity, least},
        {{1, NAN, infinity}, -infinity, NAN},
        {{-NAN, -1, 2}, -infinity, NAN},
        {{-1}, NAN, NAN},
        {{1}, NAN, NAN},
    };
    bool ok = true;
    for (const Row& row : rows) {
        Buffer<float> in(static_cast<int>(row.in.size())), largest(1);
        for (int i = 0; i < in.size; ++i) in[i] = row.in[static_cast<size_t>(i)];
        largest[0] = row.before;
        run(red_max_kernel, 5, 64, 0, in.data, in.size, largest.data);
        const bool same_sign = std::signbit(largest[0]) == std::signbit(row.after);
        ok &= std::isnan(row.after) ? std::isnan(largest[0]) : largest[0] == row.after && same_sign;
    }
    expect(ok, "red.max of numbers, across blocks");
}

// Every thread of every block takes a number of its own.
FA_KERNEL(64, 1) fetch_add_kernel(int32_t* taken, int32_t* owners) {
    const int32_t number = ptx::fetch_add(taken, 3);
    if (number % 3 == 0 && number < 3 * 7 * 64) ptx::store(owners + number / 3, ptx::block_idx() + 1);
}

void test_fetch_add() {
    constexpr int kBlocks = 7;
    Buffer<int32_t> taken(1), owners(kBlocks * 64);
    owners.fill(0);
    taken.fill(0);
    run(fetch_add_kernel, kBlocks, 64, 0, taken.data, owners.data);
    int count[kBlocks + 1] = {};
    for (int i = 0; i < owners.size; ++i) ++count[owners[i]];
    bool ok = taken[0] == 3 * owners.size;
    for (int b = 0; b <= kBlocks; ++b) ok &= count[b] == (b ? 64 : 0);
    expect(ok, "atom.add.s32, across blocks");
}

// ---------------------------------------------------------------- the semaphore
// Blocks take turns at plain sums whose value shows the order: x = 3 x + block. out: [64]
FA_KERNEL(64, 1) turns_kernel(int32_t* counter, int32_t* out, bool backwards, int blocks) {
    const int block = ptx::block_idx(), t = ptx::thread_idx();
    if (t == 0) ptx::wait_for_turn(counter, backwards ? blocks - 1 - block : block);
    ptx::sync_threads();  // all threads come after thread 0's wait
    ptx::store(out + t, 3 * ptx::load(out + t) + block);
    ptx::sync_threads();  // and thread 0 passes the turn on after all of them
    if (t == 0) ptx::pass_turn(counter);
}

void test_turns(int blocks, bool backwards) {
    Buffer<int32_t> counter(1), out(64);
    run(turns_kernel, blocks, 64, 0, counter.data, out.data, backwards, blocks);
    int32_t expected = 0;
    for (int i = 0; i < blocks; ++i) expected = 3 * expected + (backwards ? blocks - 1 - i : i);
    bool ok = counter[0] == blocks;
    for (int i = 0; i < 64; ++i) ok &= out[i] == expected;
    expect(ok, backwards ? "turns, last block first" : "turns, in order", blocks);
}

// ---------------------------------------------------------------- bytes moved
FA_KERNEL(32, 1) traffic_kernel(const float* in, float* out, float* sum) {
    const int t = ptx::thread_idx();
    ptx::cp_async_16(ptx::smem() + 16 * t, in + 4 * t, t % 17);
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
    uint32_t r[4];
    ptx::load_16(r, in + 4 * t);
    ptx::store(out + 32 * ptx::block_idx() + t, ptx::load(in + t));
    ptx::red_add(sum, 1.f);
}

void test_traffic() {
    Buffer<float> in(128), out(64), sum(1);
    reset_traffic();
    run(traffic_kernel, 2, 32, 512, in.data, out.data, sum.data);
    int64_t valid = 0;
    for (int t = 0; t < 32; ++t) valid += t % 17;
    expect_traffic({{2 * valid, 0, 0}, {}, {}, {2 * 32 * (16 + 4), 2 * 32 * 4, 0}, {0, 0, 2 * 32 * 4}},
                   "plain and red");
}

}  // namespace

void test_memory() {
    test_valid_bytes();
    test_valid_bytes_of_4();
    test_shared();
    test_flip_bits();
    test_groups();
    test_load_store<bf16, uint16_t>("load and store, bytes");
    test_load_store<fp16, uint16_t>("load and store, bytes");
    test_load_store<float, uint32_t>("load and store, bytes");
    test_load_store<uint32_t, uint32_t>("load and store, bytes");
    test_load_store<int64_t, int64_t>("load and store, bytes");
    test_load_store_16();
    test_red_add();
    test_red_max();
    test_fetch_add();
    test_turns(8, false);
    test_turns(3, true);
    test_traffic();
}

}  // namespace flash_attn::primitives
