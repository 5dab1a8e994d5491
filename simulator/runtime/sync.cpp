// Barriers, fences and semaphores.
#include "runtime/runtime.h"

namespace sim {

// ---------------------------------------------------------------- async views
// Until something in the block uses the asynchronous proxy, every view is what the block started from, and costs
// nothing.
void use_async_proxy(Block& b) {
    if (b.async_proxy) return;
    b.async_proxy = true;
    AsClock as(launch_start);
    for (int w = 0; w < b.num_warps; ++w) {
        Warp& warp = *b.warps[w];
        if (!warp.async_view) warp.async_view = create_clock("async view of a warp");
        AsClock view(warp.async_view);
        acquire(&b.boundary[b.phase]);
    }
}

void publish(SyncPoint& s) {
    release(&s.threads);
    if (!self->block->async_proxy) return;
    AsClock view(self->warp->async_view);
    release(&s.async_view);
}
void absorb(SyncPoint& s) {
    acquire(&s.threads);
    if (!self->block->async_proxy) return;
    AsClock view(self->warp->async_view);
    acquire(&s.async_view);
}
void publish_completion(SyncPoint& s) {
    release(&s.threads);
    release(&s.async_view);
}

void fence_proxy_async() {
    use_async_proxy(*self->block);
    release(&self->proxy_fence);
    AsClock view(self->warp->async_view);
    acquire(&self->proxy_fence);
}

// ---------------------------------------------------------------- named barriers
namespace {

constexpr char kSync[] = "bar.sync or bar.arrive", kReduce[] = "bar.red.or", kSyncWarp[] = "bar.warp.sync";

// Returns the generation that the thread arrives in.
uint64_t arrive(NamedBarrier& b, int id, int threads, const char* kind, bool predicate) {
    if (id < 0 || id > 15) fail("there is no barrier %d", id);
    if (threads <= 0 || threads % kWarpLanes || threads > self->block->num_warps * kWarpLanes)
        fail("barrier %d: %d threads is not a number of whole warps of this block", id, threads);
    const uint64_t generation = b.generation;
    if (b.arrived == 0) {
        b.expected = threads;
        b.kind = kind;
        b.any[generation % 4] = false;
    }
    if (b.expected != threads) fail("barrier %d used with %d and %d threads at once", id, b.expected, threads);
    if (b.kind != kind) fail("barrier %d: %s meets %s", id, b.kind, kind);
    publish(b.sync.at(generation));
    b.any[generation % 4] |= predicate;
    ++b.arrived_of_warp[self->warp->index];
    if (++b.arrived < threads) return generation;
    for (uint8_t& lanes : b.arrived_of_warp) {
        if (lanes % kWarpLanes) fail("barrier %d: only %d lanes of a warp arrived", id, lanes % kWarpLanes);
        lanes = 0;
    }
    b.arrived = 0;
    ++b.generation;
    ++counters.barriers;
    return generation;
}

bool sync(int id, int threads, const char* kind, bool predicate) {
    NamedBarrier& b = self->block->named[id & 15];
    const uint64_t generation = arrive(b, id, threads, kind, predicate);
    if (b.generation == generation) block_while_equal(b.generation, generation, kind, &b);
    absorb(b.sync.at(generation));
    return b.any[generation % 4];
}

int all_threads() { return self->block->num_warps * kWarpLanes; }

}  // namespace

void sync_threads() { sync(0, all_threads(), kSync, false); }
bool sync_threads_or(bool predicate) { return sync(0, all_threads(), kReduce, predicate); }
void barrier_sync(int id, int threads) { sync(id, threads, kSync, false); }
void barrier_arrive(int id, int threads) { arrive(self->block->named[id & 15], id, threads, kSync, false); }
bool barrier_sync_or(int id, int threads, bool predicate) { return sync(id, threads, kReduce, predicate); }

void sync_warp() {
    Warp& w = *self->warp;
    SyncPoint& point = w.sync.at(w.generation);
    publish(point);
    if (arrive_last(w, kSyncWarp)) complete_collective(w);
    absorb(point);
}

// ---------------------------------------------------------------- mbarriers
namespace {

constexpr uint64_t kMbarrierMark = 0x6d62617272696572;

Mbarrier& find_mbarrier(Block& block, uint64_t* word, const char* what, const void* pc) {
    note_read(word, 8, pc);
    const long offset = reinterpret_cast<char*>(word) - block.smem;
    for (int i = 0; i < block.num_mbarriers; ++i) {
        if (block.mbarriers[i].word != word) continue;
        if (*word != kMbarrierMark) fail("%s: the barrier at smem+%ld was overwritten", what, offset);
        return block.mbarriers[i];
    }
    fail("%s: no barrier was initialised at smem+%ld", what, offset);
}

void complete_phase_if_due(Mbarrier& b) {
    if (b.pending || b.tx_bytes) return;
    ++b.generation;
    b.pending = b.count;
}

}  // namespace

void mbarrier_init(uint64_t* word, int arrivals) {
    Block& block = *self->block;
    if (smem_address(word) % 8) fail("mbarrier.init: address is not 8-byte aligned");
    for (int i = 0; i < block.num_mbarriers; ++i)
        if (block.mbarriers[i].word == word) fail("mbarrier.init: the barrier is already in use");
    if (block.num_mbarriers == kMaxMbarriers) fail("more than %d mbarriers", kMaxMbarriers);
    use_async_proxy(block);
    note_write(word, 8, __builtin_return_address(0));
    *word = kMbarrierMark;
    Mbarrier& b = block.mbarriers[block.num_mbarriers++];
    b.word = word;
    b.generation = 0;
    b.count = b.pending = arrivals;
    b.tx_bytes = 0;
}

void mbarrier_arrive(uint64_t* word, int expect_tx_bytes) {
    Mbarrier& b = find_mbarrier(*self->block, word, "mbarrier.arrive", __builtin_return_address(0));
    if (b.pending == 0)
        fail("mbarrier.arrive: more than %d arrivals in one phase at smem+%ld", b.count,
             reinterpret_cast<char*>(word) - self->block->smem);
    publish(b.sync.at(b.generation));
    b.tx_bytes += expect_tx_bytes;
    --b.pending;
    complete_phase_if_due(b);
}

void deliver_bytes(Block& block, uint64_t* word, int bytes, const void* pc) {
    Mbarrier& b = find_mbarrier(block, word, "complete_tx", pc);
    publish_completion(b.sync.at(b.generation));
    b.tx_bytes -= bytes;
    complete_phase_if_due(b);
}

// Returns once the phase of this parity has completed. A waiter that sleeps through two phases sees its own parity
// again and waits on, as on the hardware.
void mbarrier_wait(uint64_t* word, int parity) {
    Mbarrier& b = find_mbarrier(*self->block, word, "mbarrier.try_wait", __builtin_return_address(0));
    uint64_t completed = b.generation - 1;
    while (static_cast<int>(b.generation & 1) == parity) {
        completed = b.generation;
        block_while_equal(b.generation, completed, "mbarrier.try_wait", &b);
    }
    if (b.generation) absorb(b.sync.at(completed));
}

// ---------------------------------------------------------------- semaphores, across blocks
// Blocks take turns in an order that the kernel chooses. The counter itself is the synchronisation object: it orders
// threads, but not the asynchronous proxy, which needs a fence.
void wait_for_turn(const int32_t* counter, int32_t turn) {
    check_global("ld.acquire", counter, 4, 4);
    block_until_turn(counter, turn, "wait_for_turn");
    note_atomic_load_acquire(counter);
}

void pass_turn(int32_t* counter) {
    check_global("red.release", counter, 4, 4);
    note_atomic_add_release(counter);
    ++*counter;
}

}  // namespace sim
