// Missing barriers, waits, fences and semaphores: data races.
#include "cuda/ptx/bulk.h"
#include "cuda/ptx/cp_async.h"
#include "cuda/ptx/global.h"
#include "cuda/ptx/grid.h"
#include "cuda/ptx/mbarrier.h"
#include "cuda/ptx/shared.h"
#include "cuda/ptx/sync.h"
#include "cuda/ptx/wgmma.h"
#include "misuse/misuse.h"

namespace flash_attn::misuse {
namespace {

constexpr int kThreads = 64;
int mirrored() { return kThreads - 1 - ptx::thread_idx(); }

// ---------------------------------------------------------------- within a block
// out[t] = number of the thread on the other side of the block or of the warp, twice. Which barriers there are: bit 0
// before the reads, bit 1 before the next writes.
template <bool kOfWarp, int kBarriers> FA_KERNEL(kThreads, 1) exchange_kernel(uint32_t* out) {
    const int other = kOfWarp ? ptx::thread_idx() ^ 31 : mirrored();
    const auto sync = [] { kOfWarp ? ptx::sync_warp() : ptx::sync_threads(); };
    for (uint32_t round = 0; round < 2; ++round) {
        ptx::store_shared(ptx::smem() + 4 * ptx::thread_idx(), round + static_cast<uint32_t>(ptx::thread_idx()));
        if (kBarriers & 1) sync();
        ptx::store(out + ptx::thread_idx(), ptx::load_shared(ptx::smem() + 4 * other));
        if (kBarriers & 2) sync();
    }
}

// The same by cp.async.
template <bool kWait, bool kBarrier> FA_KERNEL(kThreads, 1) copied_exchange_kernel(const uint32_t* in, uint32_t* out) {
    ptx::cp_async_16(ptx::smem() + 16 * ptx::thread_idx(), in + 4 * ptx::thread_idx(), 16);
    ptx::cp_async_commit();
    if (kWait) ptx::cp_async_wait<0>();
    if (kBarrier) ptx::sync_threads();
    ptx::store(out + ptx::thread_idx(), ptx::load_shared(ptx::smem() + 16 * mirrored()));
    ptx::cp_async_wait<0>();
}

// A copy into memory that others still read.
FA_KERNEL(kThreads, 1) copied_too_early_kernel(const uint32_t* in, uint32_t* out) {
    ptx::store_shared(ptx::smem() + 16 * ptx::thread_idx(), 1);
    ptx::sync_threads();
    ptx::store(out + ptx::thread_idx(), ptx::load_shared(ptx::smem() + 16 * mirrored()));
    ptx::cp_async_16(ptx::smem() + 16 * ptx::thread_idx(), in + 4 * ptx::thread_idx(), 16);
    ptx::cp_async_commit();
    ptx::sync_threads();  // too late
    ptx::cp_async_wait<0>();
}

// ---------------------------------------------------------------- between blocks
FA_KERNEL(kThreads, 1) same_place_kernel(float* out) { ptx::store(out + ptx::thread_idx(), 1.f); }
FA_KERNEL(kThreads, 1) plain_sum_kernel(float* out) {
    ptx::store(out + ptx::thread_idx(), ptx::load(out + ptx::thread_idx()) + 1.f);
}
FA_KERNEL(kThreads, 1) plain_read_of_a_sum_kernel(float* out) {
    ptx::red_add(out, 1.f);
    ptx::store(out + 1 + kThreads * ptx::block_idx() + ptx::thread_idx(), ptx::load(out));
}

// ---------------------------------------------------------------- between kernels
// out = the number that another block wrote.
FA_KERNEL(kThreads, 1) numbers_kernel(uint32_t* out) {
    ptx::store(out + ptx::block_idx() * kThreads + ptx::thread_idx(), 1u);
}
template <bool kWait> FA_KERNEL(kThreads, 1) next_kernel(const uint32_t* in, uint32_t* out) {
    if (kWait) ptx::grid_wait();
    const int there = static_cast<int>((ptx::block_idx() + 1) % 4 * kThreads) + ptx::thread_idx();
    ptx::store(out + ptx::block_idx() * kThreads + ptx::thread_idx(), ptx::load(in + there));
}
// The same by a copy, which has to know of it too.
FA_KERNEL(32, 1) next_copy_kernel(const uint32_t* in, uint32_t* out) {
    const ptx::SmemPtr bar = ptx::smem() + 16;
    if (ptx::thread_idx() == 0) {
        ptx::mbarrier_init(bar, 1);
        ptx::fence_mbarrier_init();
        ptx::grid_wait();
        ptx::mbarrier_arrive_expect_tx(bar, 16);
        ptx::bulk_load(ptx::smem(), in + (ptx::block_idx() + 1) % 4 * kThreads, 16, bar);
    }
    ptx::sync_threads();
    ptx::mbarrier_wait(bar, 0);
    ptx::store(out + ptx::block_idx() * 32 + ptx::thread_idx(), ptx::load_shared(ptx::smem()));
}

enum class Turn { kRight, kNoWait, kPassedEarly, kNoBarrierAfterWait, kNoBarrierBeforePass };
template <Turn kTurn> FA_KERNEL(kThreads, 1) turn_kernel(int32_t* counter, float* out) {
    const int t = ptx::thread_idx();
    if (t == 0 && kTurn != Turn::kNoWait) ptx::wait_for_turn(counter, ptx::block_idx());
    if (kTurn != Turn::kNoBarrierAfterWait) ptx::sync_threads();
    if (t == 0 && kTurn == Turn::kPassedEarly) ptx::pass_turn(counter);
    ptx::store(out + t, 2 * ptx::load(out + t) + 1.f);
    if (kTurn != Turn::kNoBarrierBeforePass) ptx::sync_threads();
    if (t == 0 && kTurn != Turn::kPassedEarly) ptx::pass_turn(counter);
}

// The turn is passed on when the reduction has read shared memory (kOnlyRead) or when it is done.
template <bool kOnlyRead> FA_KERNEL(32, 1) bulk_turn_kernel(int32_t* counter, float* sum) {
    const int t = ptx::thread_idx();
    if (t == 0) ptx::wait_for_turn(counter, ptx::block_idx());
    ptx::sync_threads();
    if (t < 4) reinterpret_cast<float*>(ptx::smem())[t] = ptx::load(sum + t);
    ptx::fence_proxy_async();
    ptx::sync_threads();
    if (t != 0) return;
    ptx::bulk_reduce_add(sum, reinterpret_cast<const float*>(ptx::smem()), 16);
    ptx::bulk_commit();
    if (kOnlyRead)
        ptx::bulk_wait_read<0>();
    else
        ptx::bulk_wait<0>();
    ptx::pass_turn(counter);
}

// Sums in a fixed order.
template <bool kFence> FA_KERNEL(32, 1) bulk_sums_in_turn_kernel(int32_t* counter, float* sum) {
    const int t = ptx::thread_idx();
    if (t < 4) reinterpret_cast<float*>(ptx::smem())[t] = 1.f;
    ptx::fence_proxy_async();
    ptx::sync_threads();
    if (t != 0) return;
    ptx::wait_for_turn(counter, ptx::block_idx());
    if (kFence) ptx::fence_proxy_async_global();
    ptx::bulk_reduce_add(sum, reinterpret_cast<const float*>(ptx::smem()), 16);
    ptx::bulk_commit();
    ptx::bulk_wait<0>();
    ptx::pass_turn(counter);
}

// ---------------------------------------------------------------- the asynchronous proxy
template <bool kFence> FA_KERNEL(32, 1) bulk_store_kernel(float* out) {
    for (int i = ptx::thread_idx(); i < 64; i += 32) reinterpret_cast<float*>(ptx::smem())[i] = 1.f;
    if (kFence) ptx::fence_proxy_async();
    ptx::sync_threads();
    if (ptx::thread_idx() == 0) {
        ptx::bulk_reduce_add(out, reinterpret_cast<const float*>(ptx::smem()), 256);
        ptx::bulk_commit();
        ptx::bulk_wait_read<0>();
    }
}

enum class Product { kRight, kNoProxyFence, kNoWait };
template <Product kProduct> FA_KERNEL(128, 1) product_kernel(float* out) {
    for (int i = ptx::thread_idx(); i < 4096; i += 128) reinterpret_cast<uint16_t*>(ptx::smem())[i] = 0;
    if (kProduct != Product::kNoProxyFence) ptx::fence_proxy_async();
    ptx::sync_threads();
    float acc[32];
    const uint64_t desc = ptx::wgmma_descriptor(ptx::smem(), 16, 1024, ptx::Swizzle::k128B);
    ptx::wgmma_fence();
    ptx::wgmma_ss<bf16, 64, ptx::Major::kK, ptx::Major::kK>(acc, desc, desc, false);
    ptx::wgmma_commit();
    if (kProduct != Product::kNoWait) ptx::wgmma_wait<0>();
    ptx::store(out + ptx::thread_idx(), acc[5]);
    ptx::wgmma_wait<0>();
}

// ---------------------------------------------------------------- launches
template <bool kOfWarp, int kBarriers> void exchange() {
    Buffer<uint32_t> out(kThreads);
    run(exchange_kernel<kOfWarp, kBarriers>, 1, kThreads, 4 * kThreads, out.data);
}
template <void (*kKernel)(const uint32_t*, uint32_t*)> void copied() {
    Buffer<uint32_t> in(4 * kThreads), out(kThreads);
    run(kKernel, 1, kThreads, 16 * kThreads, in.data, out.data);
}
template <void (*kKernel)(float*)> void blocks() {
    Buffer<float> out(1024);
    run(kKernel, 4, kThreads, 0, out.data);
}
template <Turn kTurn> void turn() {
    Buffer<int32_t> counter(1);
    Buffer<float> out(kThreads);
    run(turn_kernel<kTurn>, 5, kThreads, 0, counter.data, out.data);
}
template <bool kOnlyRead> void bulk_turn() {
    Buffer<int32_t> counter(1);
    Buffer<float> sum(4);
    run(bulk_turn_kernel<kOnlyRead>, 5, 32, 16, counter.data, sum.data);
}
template <bool kFence> void bulk_sums_in_turn() {
    Buffer<int32_t> counter(1);
    Buffer<float> sum(4);
    sim::options.ordered_reds = true;
    run(bulk_sums_in_turn_kernel<kFence>, 5, 32, 16, counter.data, sum.data);
}
template <bool kFence> void bulk_store() {
    Buffer<float> out(64);
    run(bulk_store_kernel<kFence>, 1, 32, 256, out.data);
}
template <Product kProduct> void product() {
    Buffer<float> out(128);
    run(product_kernel<kProduct>, 1, 128, 16384, out.data);
}

constexpr int kNumbers = 4 * kThreads;
template <bool kWait> void overlap() {
    Buffer<uint32_t> first(kNumbers), second(kNumbers);
    primitives::launch(false, numbers_kernel, 4, kThreads, 0, first.data);
    primitives::launch(true, next_kernel<kWait>, 4, kThreads, 0, first.data, second.data);
}
void overlap_copy() {
    Buffer<uint32_t> first(kNumbers), second(kNumbers);
    primitives::launch(false, numbers_kernel, 4, kThreads, 0, first.data);
    primitives::launch(true, next_copy_kernel, 4, 32, 32, first.data, second.data);
}
// The third kernel reads what the first wrote, and only the second could have waited for that.
template <bool kWait> void overlap_twice() {
    Buffer<uint32_t> first(kNumbers), other(kNumbers), second(kNumbers), third(kNumbers);
    primitives::launch(false, numbers_kernel, 4, kThreads, 0, first.data);
    primitives::launch(true, next_kernel<kWait>, 4, kThreads, 0, other.data, second.data);
    primitives::launch(true, next_kernel<true>, 4, kThreads, 0, first.data, third.data);
}

constexpr char kRaceText[] = "ThreadSanitizer: data race";

}  // namespace

const Mistake races[] = {
    {"exchange", Found::kNothing, "", exchange<false, 3>},
    {"no_barrier_before_reads", Found::kRace, kRaceText, exchange<false, 2>},
    {"no_barrier_before_writes", Found::kRace, kRaceText, exchange<false, 1>},
    {"exchange_in_warp", Found::kNothing, "", exchange<true, 3>},
    {"no_warp_barrier_before_reads", Found::kRace, kRaceText, exchange<true, 2>},
    {"no_warp_barrier_before_writes", Found::kRace, kRaceText, exchange<true, 1>},
    {"copied_exchange", Found::kNothing, "", copied<copied_exchange_kernel<true, true>>},
    {"copied_without_barrier", Found::kRace, kRaceText, copied<copied_exchange_kernel<true, false>>},
    {"copied_too_early", Found::kRace, kRaceText, copied<copied_too_early_kernel>},
    {"blocks_write_one_place", Found::kRace, kRaceText, blocks<same_place_kernel>},
    {"blocks_sum_without_red", Found::kRace, kRaceText, blocks<plain_sum_kernel>},
    {"blocks_read_what_red_adds_to", Found::kRace, kRaceText, blocks<plain_read_of_a_sum_kernel>},
    {"turn", Found::kNothing, "", turn<Turn::kRight>},
    {"turn_without_wait", Found::kRace, kRaceText, turn<Turn::kNoWait>},
    {"turn_passed_early", Found::kRace, kRaceText, turn<Turn::kPassedEarly>},
    {"turn_without_barrier_after_wait", Found::kRace, kRaceText, turn<Turn::kNoBarrierAfterWait>},
    {"turn_without_barrier_before_pass", Found::kRace, kRaceText, turn<Turn::kNoBarrierBeforePass>},
    {"bulk_turn", Found::kNothing, "", bulk_turn<false>},
    {"bulk_turn_passed_early", Found::kRace, kRaceText, bulk_turn<true>},
    {"bulk_sums_in_turn", Found::kNothing, "", bulk_sums_in_turn<true>},
    {"bulk_sums_in_turn_without_fence", Found::kRace, kRaceText, bulk_sums_in_turn<false>},
    {"bulk_store", Found::kNothing, "", bulk_store<true>},
    {"bulk_store_without_fence", Found::kRace, kRaceText, bulk_store<false>},
    {"product", Found::kNothing, "", product<Product::kRight>},
    {"product_without_proxy_fence", Found::kRace, kRaceText, product<Product::kNoProxyFence>},
    {"product_without_wait", Found::kRace, kRaceText, product<Product::kNoWait>},
    {"kernels_overlap", Found::kNothing, "", overlap<true>},
    {"kernels_overlap_without_wait", Found::kRace, kRaceText, overlap<false>},
    {"kernels_overlap_and_copy", Found::kNothing, "", overlap_copy},
    {"three_kernels_overlap", Found::kNothing, "", overlap_twice<true>},
    {"three_kernels_overlap_without_wait", Found::kRace, kRaceText, overlap_twice<false>},
    {nullptr, Found::kNothing, nullptr, nullptr},
};

}  // namespace flash_attn::misuse
