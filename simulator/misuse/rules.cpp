// Mistakes against the rules of instructions, and deadlocks.
#include "cuda/ptx/cp_async.h"
#include "cuda/ptx/global.h"
#include "cuda/ptx/ldmatrix.h"
#include "cuda/ptx/mbarrier.h"
#include "cuda/ptx/mma.h"
#include "cuda/ptx/shared.h"
#include "cuda/ptx/sync.h"
#include "cuda/ptx/tma.h"
#include "cuda/ptx/wgmma.h"
#include "misuse/misuse.h"
#include "primitives/tensor_map.h"

namespace flash_attn::misuse {

// Not in the unnamed namespace: reports tell the names of kernels that the linker knows.
FA_KERNEL(32, 1) kernel_with_a_name() { ptx::barrier_sync(16, 32); }

namespace {

int lane() { return ptx::thread_idx() % 32; }
ptx::SmemPtr barrier_at(int byte) { return ptx::smem() + byte; }

// ---------------------------------------------------------------- lanes of a warp
FA_KERNEL(32, 1) divergent_kernel() {
    uint32_t r[4] = {};
    if (lane() < 16)
        ptx::ldmatrix_x4<false>(r, ptx::smem() + 16 * lane());
    else
        ptx::shfl_xor(1.f, 1);
}
FA_KERNEL(32, 1) half_a_warp_kernel() {
    if (lane() < 16) ptx::shfl_xor(1.f, 1);
}

// ---------------------------------------------------------------- addresses
FA_KERNEL(32, 1) misaligned_row_kernel() {
    uint32_t r[4];
    ptx::ldmatrix_x4<false>(r, ptx::smem() + 8 * lane());
}
FA_KERNEL(32, 1) row_outside_kernel() {
    uint32_t r[4];
    ptx::ldmatrix_x4<false>(r, ptx::smem() + 16 * (lane() + 1));  // of 512 bytes
}
FA_KERNEL(32, 1) row_across_the_end_kernel() {
    uint32_t r[4];
    ptx::ldmatrix_x4<false>(r, ptx::smem() + 16 * lane());  // of 504 bytes
}
FA_KERNEL(32, 1) cp_async_misaligned_kernel(const char* in) {
    ptx::cp_async_16(ptx::smem() + 16 * lane(), in + 8 * lane(), 8);
}
FA_KERNEL(32, 1) cp_async_too_many_bytes_kernel(const char* in) { ptx::cp_async_16(ptx::smem(), in, 17); }
FA_KERNEL(32, 1) shared_misaligned_kernel() {
    uint32_t r[4];
    ptx::load_shared_16(r, ptx::smem() + 4 * lane());
}
FA_KERNEL(32, 1) load_16_misaligned_kernel(const char* in) {
    uint32_t r[4];
    ptx::load_16(r, in + 4 * lane());
}
FA_KERNEL(32, 1) load_of_shared_kernel() {
    uint32_t r[4];
    ptx::load_16(r, ptx::smem());
}

// ---------------------------------------------------------------- copies left in flight
FA_KERNEL(32, 1) cp_async_not_waited_for_kernel(const char* in) {
    for (int i = 0; i < 8; ++i) ptx::cp_async_16(ptx::smem() + 16 * lane() + 512 * i, in, 16);
    ptx::cp_async_commit();
}

// ---------------------------------------------------------------- barriers
FA_KERNEL(64, 1) half_a_block_kernel() {
    if (ptx::thread_idx() < 32) ptx::sync_threads();
}
FA_KERNEL(96, 1) different_counts_kernel() { ptx::barrier_sync(1, ptx::thread_idx() < 32 ? 64 : 96); }
FA_KERNEL(64, 1) no_whole_warps_kernel() { ptx::barrier_sync(1, 48); }
FA_KERNEL(64, 1) part_of_a_warp_kernel() {
    if (lane() < 16) ptx::barrier_arrive(1, 32);
}
FA_KERNEL(64, 1) vote_meets_barrier_kernel() {
    if (ptx::thread_idx() < 32)
        ptx::sync_threads();
    else
        ptx::sync_threads_or(true);
}
FA_KERNEL(64, 1) arrivals_left_over_kernel() {
    if (ptx::thread_idx() < 32) ptx::barrier_arrive(1, 64);
}

// ---------------------------------------------------------------- the semaphore
FA_KERNEL(32, 1) backwards_kernel(int32_t* counter, int blocks) {
    if (lane() == 0) ptx::wait_for_turn(counter, blocks - 1 - ptx::block_idx());
    ptx::sync_threads();
    if (lane() == 0) ptx::pass_turn(counter);
}
FA_KERNEL(32, 1) turn_not_passed_kernel(int32_t* counter) {
    if (lane() == 0) ptx::wait_for_turn(counter, ptx::block_idx());
}

// ---------------------------------------------------------------- TMA
FA_KERNEL(32, 1) store_before_the_tensor_kernel(FA_GRID_CONSTANT ptx::TensorMap out) {
    if (lane() == 0) ptx::tma_store<2>(out, ptx::smem(), {0, -1});
}
void store_before_the_tensor() {
    Buffer<uint16_t> out(64 * 8);
    const auto map = primitives::make_tensor_map<2>(out.data, {64, 8}, {128}, {64, 8});
    run(store_before_the_tensor_kernel, 1, 32, 1024, map);
}

// ---------------------------------------------------------------- mbarriers, wgmma, setmaxnreg
FA_KERNEL(32, 1) not_initialised_kernel() { ptx::mbarrier_arrive(barrier_at(0)); }
FA_KERNEL(32, 1) too_many_arrivals_kernel() {
    if (lane() == 0) ptx::mbarrier_init(barrier_at(0), 3);
    if (lane() == 0) ptx::mbarrier_arrive_expect_tx(barrier_at(0), 16);
    ptx::sync_threads();
    ptx::mbarrier_arrive(barrier_at(0));
}
FA_KERNEL(32, 1) bytes_missing_kernel(const float* in) {
    if (lane() == 0) {
        ptx::mbarrier_init(barrier_at(0), 1);
        ptx::fence_mbarrier_init();
        ptx::mbarrier_arrive_expect_tx(barrier_at(0), 64);
        ptx::bulk_load(ptx::smem() + 16, in, 48, barrier_at(0));
    }
    ptx::sync_threads();
    ptx::mbarrier_wait(barrier_at(0), 0);
}
FA_KERNEL(128, 1) no_fence_kernel() {
    float acc[32];
    const uint64_t desc = ptx::wgmma_descriptor(ptx::smem(), 16, 1024, ptx::Swizzle::k128B);
    ptx::wgmma_ss<bf16, 64, ptx::Major::kK, ptx::Major::kK>(acc, desc, desc, false);
}
FA_KERNEL(128, 1) not_committed_kernel() {
    float acc[32];
    const uint64_t desc = ptx::wgmma_descriptor(ptx::smem(), 16, 1024, ptx::Swizzle::k128B);
    ptx::wgmma_fence();
    ptx::wgmma_ss<bf16, 64, ptx::Major::kK, ptx::Major::kK>(acc, desc, desc, false);
    ptx::wgmma_wait<0>();
    ptx::sync_threads();
}
FA_KERNEL(256, 1) too_many_registers_kernel() { ptx::reg_alloc<256>(); }
FA_KERNEL(32, 1) store_still_reads_kernel(float* out) {
    ptx::fence_proxy_async();
    ptx::sync_threads();
    if (lane() == 0) ptx::bulk_reduce_add(out, reinterpret_cast<const float*>(ptx::smem()), 256);
    if (lane() == 0) ptx::bulk_commit();
}

// ---------------------------------------------------------------- launches
void no_such_barrier() { run(kernel_with_a_name, 1, 32, 0); }
void divergent() { run(divergent_kernel, 1, 32, 512); }
void half_a_warp() { run(half_a_warp_kernel, 1, 32, 0); }
void misaligned_row() { run(misaligned_row_kernel, 1, 32, 512); }
void row_outside() { run(row_outside_kernel, 1, 32, 512); }
void row_across_the_end() { run(row_across_the_end_kernel, 1, 32, 504); }
template <void (*kKernel)(const char*)> void with_input() {
    Buffer<char> in(1024);
    run(kKernel, 1, 32, 4096, in.data);
}
// With early landing nothing is left in flight.
void cp_async_not_waited_for() {
    sim::options.landing = sim::Landing::kLate;
    with_input<cp_async_not_waited_for_kernel>();
}
void store_still_reads() {
    sim::options.landing = sim::Landing::kLate;
    Buffer<float> out(64);
    run(store_still_reads_kernel, 1, 32, 256, out.data);
}
void shared_misaligned() { run(shared_misaligned_kernel, 1, 32, 512); }
void load_of_shared() { run(load_of_shared_kernel, 1, 32, 512); }
void half_a_block() { run(half_a_block_kernel, 1, 64, 0); }
void different_counts() { run(different_counts_kernel, 1, 96, 0); }
void no_whole_warps() { run(no_whole_warps_kernel, 1, 64, 0); }
void part_of_a_warp() { run(part_of_a_warp_kernel, 1, 64, 0); }
void vote_meets_barrier() { run(vote_meets_barrier_kernel, 1, 64, 0); }
void arrivals_left_over() { run(arrivals_left_over_kernel, 1, 64, 0); }
void later_block() {
    Buffer<int32_t> counter(1);
    run(backwards_kernel, 4, 32, 0, counter.data, 4);  // three are resident
}
void turn_not_passed() {
    Buffer<int32_t> counter(1);
    run(turn_not_passed_kernel, 2, 32, 0, counter.data);
}
void not_initialised() { run(not_initialised_kernel, 1, 32, 64); }
void too_many_arrivals() { run(too_many_arrivals_kernel, 1, 32, 64); }
void bytes_missing() {
    Buffer<float> in(64);
    run(bytes_missing_kernel, 1, 32, 512, in.data);
}
void no_fence() { run(no_fence_kernel, 1, 128, 16384); }
void not_committed() { run(not_committed_kernel, 1, 128, 16384); }
void too_many_registers() { run(too_many_registers_kernel, 1, 512, 0); }
void no_whole_warps_in_block() { run(half_a_warp_kernel, 1, 40, 0); }

}  // namespace

const Mistake rules[] = {
    {"no_such_barrier", Found::kRule, "flash_attn::misuse::kernel_with_a_name(): block 0 warp 0 lane ",
     no_such_barrier},
    {"divergent", Found::kRule, "lanes of one warp are in different instructions", divergent},
    {"half_a_warp", Found::kDeadlock, "16 lanes in shfl.xor", half_a_warp},
    {"misaligned_row", Found::kRule, "is not 16-byte aligned", misaligned_row},
    {"row_outside", Found::kRule, "smem+512 of 512 bytes", row_outside},
    {"row_across_the_end", Found::kRule, "16 bytes at smem+496 are outside of shared memory", row_across_the_end},
    {"cp_async_misaligned", Found::kRule, "is not 16-byte aligned", with_input<cp_async_misaligned_kernel>},
    {"cp_async_too_many_bytes", Found::kRule, "17 valid bytes", with_input<cp_async_too_many_bytes_kernel>},
    {"load_16_misaligned", Found::kRule, "ld.global.v4: global address", with_input<load_16_misaligned_kernel>},
    {"shared_misaligned", Found::kRule, "access of 16 bytes at smem+", shared_misaligned},
    {"load_of_shared", Found::kRule, "a pointer to shared memory is used as a global address", load_of_shared},
    {"cp_async_not_waited_for", Found::kRule, "exits with cp.async in flight", cp_async_not_waited_for},
    {"store_still_reads", Found::kRule, "exits while a bulk store still reads shared memory", store_still_reads},
    {"store_before_the_tensor", Found::kRule, "coordinate 1 is -1, and must not be negative", store_before_the_tensor},
    {"half_a_block", Found::kDeadlock, "barrier 0, 32 of 64 threads arrived", half_a_block},
    {"different_counts", Found::kRule, "threads at once", different_counts},
    {"no_whole_warps", Found::kRule, "48 threads is not a number of whole warps", no_whole_warps},
    {"part_of_a_warp", Found::kRule, "only 16 lanes of a warp arrived", part_of_a_warp},
    {"vote_meets_barrier", Found::kRule, "meets", vote_meets_barrier},
    {"arrivals_left_over", Found::kRule, "ends with 32 of 64 arrivals on barrier 1", arrivals_left_over},
    {"later_block", Found::kDeadlock, "blocks from 3 on have not started", later_block},
    {"turn_not_passed", Found::kDeadlock, "the counter is 0, it waits for 1", turn_not_passed},
    {"not_initialised", Found::kRule, "no barrier was initialised at smem+0", not_initialised},
    {"too_many_arrivals", Found::kRule, "more than 3 arrivals in one phase", too_many_arrivals},
    {"bytes_missing", Found::kDeadlock, "0 of 1 arrivals missing, 16 bytes outstanding", bytes_missing},
    {"no_fence", Found::kRule, "no wgmma.fence before the first one", no_fence},
    {"not_committed", Found::kRule, "wgmma", not_committed},
    {"too_many_registers", Found::kRule, "registers claimed", too_many_registers},
    {"no_whole_warps_in_block", Found::kRule, "a block of 40 threads", no_whole_warps_in_block},
    {nullptr, Found::kNothing, nullptr, nullptr},
};

}  // namespace flash_attn::misuse
