// Copies of 4 or 16 bytes that threads wait for themselves. A copy writes shared memory at any time from its issue to
// its wait: ThreadSanitizer is told of a write at both ends, in the name of the thread.
#include "runtime/runtime.h"

namespace sim {
namespace {

void note(const CpAsync& c) {
    if (c.valid_bytes) note_read(c.src, static_cast<size_t>(c.valid_bytes), c.pc);
    note_write(c.dst, static_cast<size_t>(c.bytes), c.pc);
}

void land(const CpAsync& c) {
    note(c);
    if (c.valid_bytes == 16) return copy_16(c.dst, c.src);
    for (int i = 0; i < c.bytes; ++i)
        static_cast<char*>(c.dst)[i] = i < c.valid_bytes ? static_cast<const char*>(c.src)[i] : 0;
}

void push(CpAsyncQueue& q, const CpAsync& c) {
    if (q.end == q.capacity) {
        AsScheduler as;
        const int capacity = q.capacity ? 2 * q.capacity : 64;
        auto* items = new CpAsync[static_cast<size_t>(capacity)];
        for (int i = q.begin; i < q.end; ++i) items[i] = q.items[i];
        delete[] q.items;
        q.items = items;
        q.capacity = capacity;
    }
    q.items[q.end++] = c;
}

void land_oldest(CpAsyncQueue& q) {
    land(q.items[q.begin++]);
    if (q.begin == q.end) q.begin = q.end = 0;
}

bool lands_at_issue() {
    return options.landing == Landing::kEarly || (options.landing == Landing::kRandom && random_below(2));
}

}  // namespace

void cp_async(void* dst, const void* src, int bytes, int valid_bytes) {
    if (valid_bytes < 0 || valid_bytes > bytes) fail("cp.async: %d valid bytes of %d", valid_bytes, bytes);
    if (smem_address(dst) % static_cast<uint32_t>(bytes))
        fail("cp.async: shared address smem+%td is not %d-byte aligned", (char*)dst - smem(), bytes);
    smem_at(*self->block, smem_address(dst), bytes);
    check_global("cp.async", src, valid_bytes ? valid_bytes : 1, bytes);
    // Nothing says that an address is not looked at from which no byte is read.
    static_cast<void>(*static_cast<const volatile char*>(src));
    counters.cp_async.read += valid_bytes;
    const CpAsync c{dst, src, bytes, valid_bytes, self->copies.open_group, __builtin_return_address(0)};
    if (lands_at_issue()) return land(c);
    note(c);
    push(self->copies, c);
}

void cp_async_commit() { ++self->copies.open_group; }

void cp_async_wait(int pending) {
    CpAsyncQueue& q = self->copies;
    while (q.begin != q.end && q.items[q.begin].group + static_cast<uint64_t>(pending) < q.open_group) land_oldest(q);
}

void land_some_copies() {
    Block& b = *current_launch.resident[random_below(static_cast<uint32_t>(current_launch.resident.size()))];
    if (!b.live) return;
    for (Thread& t : b.warps[random_below(static_cast<uint32_t>(b.num_warps))]->lanes) {
        const int pending = t.copies.end - t.copies.begin;
        if (!pending) continue;
        AsClock as(t.clock);
        for (uint32_t n = random_below(static_cast<uint32_t>(pending) + 1); n; --n) land_oldest(t.copies);
    }
}

}  // namespace sim
