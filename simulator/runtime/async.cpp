// Bookkeeping of asynchronous work: what is in flight, when it is performed, and that nothing is left at the end.
#include "runtime/runtime.h"

namespace sim {

// ---------------------------------------------------------------- TMA and bulk operations
// The engine that performs an operation may rely on the async view of the warp that issued it, not on its clock.
AsyncCopy& issue_copy(AsyncCopy::Kind kind, const void* smem, int bytes, const void* pc) {
    Block& b = *self->block;
    use_async_proxy(b);
    const uint32_t address = smem_address(smem);
    smem_at(b, address, bytes);
    AsScheduler as;
    AsyncCopy& copy = b.copies.emplace_back();
    copy.kind = kind;
    copy.smem_address = address;
    copy.bytes = bytes;
    copy.pc = pc;
    if (copy.is_store()) {
        copy.data.resize(static_cast<size_t>(bytes));
        copy.group = &self->proxy.stores[self->proxy.store_group % kStoreGroups];
        ++copy.group->issued;
    }
    AsClock view(self->warp->async_view);
    copy.clock = create_clock("TMA operation");
    return copy;
}

namespace {

// One step of the i-th copy: a load is done after one, a store after two.
void step_copy(Block& b, size_t i) {
    const ActingFor block(b);
    AsyncCopy& copy = b.copies[i];
    bool done = true;
    {
        AsClock engine(copy.clock);
        if (!copy.is_store()) {
            perform_load(b, copy);
            deliver_bytes(b, copy.bar, copy.bytes, copy.pc);
        } else if (!copy.has_read) {
            read_for_store(b, copy);
            copy.has_read = true;
            ++copy.group->read;
            publish_completion(copy.group->read_done);
            done = false;
        } else {
            write_store(copy);
            ++copy.group->written;
            publish_completion(copy.group->write_done);
        }
        if (done) release(&b.boundary[b.phase ^ 1]);
    }
    if (!done) return;
    destroy_clock(copy.clock);
    if (i + 1 < b.copies.size()) b.copies[i] = static_cast<AsyncCopy&&>(b.copies.back());
    b.copies.pop_back();
}

void perform_next_wgmma(Block& b, Warpgroup& g) {
    const int slot = static_cast<int>(g.performed % kMaxWgmmaInFlight);
    const ActingFor block(b);
    perform_wgmma(b, g, g.ops[slot], slot);
    ++g.performed;
}

bool wgmma_ready(const Warpgroup& g) {
    return g.performed < g.issued && g.ops[g.performed % kMaxWgmmaInFlight].arrived == 128;
}

}  // namespace

void perform_early() {
    if (options.landing != Landing::kEarly) return;
    AsScheduler as;
    Block& b = *self->block;
    while (!b.copies.empty()) step_copy(b, b.copies.size() - 1);
    for (Warpgroup* g : b.warpgroups)
        while (wgmma_ready(*g)) perform_next_wgmma(b, *g);
}

bool perform_something() {
    uint32_t candidates = 0;
    for (const Block* b : current_launch.resident) {
        candidates += static_cast<uint32_t>(b->copies.size());
        for (const Warpgroup* g : b->warpgroups) candidates += wgmma_ready(*g);
    }
    if (candidates == 0) return false;
    uint32_t pick = random_below(candidates);
    for (Block* b : current_launch.resident) {
        if (pick < b->copies.size()) return step_copy(*b, pick), true;
        pick -= static_cast<uint32_t>(b->copies.size());
        for (Warpgroup* g : b->warpgroups)
            if (wgmma_ready(*g) && pick-- == 0) return perform_next_wgmma(*b, *g), true;
    }
    return false;
}

// ---------------------------------------------------------------- groups of bulk stores
void bulk_commit() {
    ProxyState& p = self->proxy;
    StoreGroup& next = p.stores[++p.store_group % kStoreGroups];
    if (next.written < next.issued) fail("more than %d groups of bulk stores in flight", kStoreGroups - 1);
    next.issued = next.read = next.written = 0;
}

void bulk_wait(int pending, bool only_read) {
    ProxyState& p = self->proxy;
    const uint64_t first = p.store_group < kStoreGroups ? 0 : p.store_group - kStoreGroups + 1;
    for (uint64_t i = first; i + static_cast<uint64_t>(pending) < p.store_group; ++i) {
        StoreGroup& g = p.stores[i % kStoreGroups];
        const uint64_t& done = only_read ? g.read : g.written;
        while (done < g.issued)
            block_while_equal(done, done, only_read ? "cp.async.bulk.wait_group.read" : "cp.async.bulk.wait_group");
        absorb(only_read ? g.read_done : g.write_done);
    }
}

// ---------------------------------------------------------------- setmaxnreg
void set_max_registers(int per_thread) { self->warp->max_registers = per_thread; }

// ---------------------------------------------------------------- what must not be left
void check_thread_exit(const Thread& t) {
    if (t.copies.begin != t.copies.end) fail("the thread exits with cp.async in flight");
    if (!t.block->async_proxy) return;
    const ProxyState& p = t.proxy;
    if (p.wgmma_issued) {
        const Warpgroup& g = *t.block->warpgroups[static_cast<size_t>(t.warp->index / 4)];
        if (g.performed < p.wgmma_issued) fail("the thread exits with wgmma in flight");
        if (!p.wgmma_groups || p.wgmma_group_end[(p.wgmma_groups - 1) % 64] != p.wgmma_issued)
            fail("the thread exits with wgmma never committed");
    }
    for (const StoreGroup& g : p.stores)
        if (g.read < g.issued) fail("the thread exits while a bulk store still reads shared memory");
}

// Once any warp changes its share of the registers, all must, in step and within the register file.
static void check_registers(const Block& b) {
    int sum = 0, set = 0;
    for (int w = 0; w < b.num_warps; ++w) {
        const int own = b.warps[w]->max_registers;
        sum += own;
        set += own != 0;
        if (own != b.warps[w / 4 * 4]->max_registers) fail("setmaxnreg: the warps of warpgroup %d disagree", w / 4);
    }
    if (set && (set != b.num_warps || sum * kWarpLanes > 65536))
        fail("setmaxnreg: %d of %d warps set, %d registers claimed", set, b.num_warps, sum * kWarpLanes);
}

static void release_into(Block& b, Clock clock) {
    AsClock as(clock);
    release(&b.boundary[b.phase ^ 1]);
}

void check_block_exit(Block& b) {
    const ActingFor block(b);
    check_registers(b);
    for (const AsyncCopy& c : b.copies)
        if (!c.is_store()) fail("the block ends with loads in flight");
    while (!b.copies.empty()) step_copy(b, 0);
    for (int i = 0; i < b.num_mbarriers; ++i)
        if (b.mbarriers[i].tx_bytes)
            fail("the block ends with %ld bytes expected but not delivered at smem+%td", long(b.mbarriers[i].tx_bytes),
                 reinterpret_cast<char*>(b.mbarriers[i].word) - b.smem);
    for (int i = 0; i < 16; ++i)
        if (b.named[i].arrived)
            fail("the block ends with %d of %d arrivals on barrier %d", b.named[i].arrived, b.named[i].expected, i);
    check_smem_margins(b);
    if (!b.async_proxy) return;
    for (int w = 0; w < b.num_warps; ++w) release_into(b, b.warps[w]->async_view);
    for (Warpgroup* g : b.warpgroups)
        for (int w = 0; w < 4; ++w) {
            release_into(b, g->smem_port[w]);
            release_into(b, g->register_port[w]);
        }
}

}  // namespace sim
