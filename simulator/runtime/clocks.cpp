// Happens-before, handed to ThreadSanitizer.
#include "runtime/clocks.h"

#ifdef SIM_TSAN
#include <sanitizer/tsan_interface.h>
extern "C" {
void __tsan_read16_pc(void*, void*);
void __tsan_write16_pc(void*, void*);
void __tsan_read_range_pc(void*, unsigned long, void*);
void __tsan_write_range_pc(void*, unsigned long, void*);
int __tsan_atomic32_load(const volatile int*, int memory_order);
int __tsan_atomic32_fetch_add(volatile int*, int, int memory_order);
}
#endif

namespace sim {

#ifdef SIM_TSAN
namespace {
Clock current, scheduler;
void* address(const void* p) { return const_cast<void*>(p); }
}  // namespace

void become(Clock clock) {
    if (clock == current) return;
    current = clock;
    __tsan_switch_to_fiber(clock, __tsan_switch_to_fiber_no_sync);
}
void begin_launch_clock() { current = scheduler = __tsan_get_current_fiber(); }
Clock scheduler_clock() { return scheduler; }

Clock create_clock(const char* name) {
    Clock clock = __tsan_create_fiber(0);
    name_clock(clock, name);
    return clock;
}
void name_clock(Clock clock, const char* name) { __tsan_set_fiber_name(clock, name); }
void destroy_clock(Clock clock) { __tsan_destroy_fiber(clock); }

AsClock::AsClock(Clock clock) : previous_(current) { become(clock); }
AsClock::~AsClock() { become(previous_); }

void acquire(const void* sync) { __tsan_acquire(address(sync)); }
void release(const void* sync) { __tsan_release(address(sync)); }

void note_read(const void* p, size_t bytes, const void* pc) {
    if (bytes == 16)
        __tsan_read16_pc(address(p), address(pc));
    else
        __tsan_read_range_pc(address(p), bytes, address(pc));
}
void note_write(const void* p, size_t bytes, const void* pc) {
    if (bytes == 16)
        __tsan_write16_pc(address(p), address(pc));
    else
        __tsan_write_range_pc(address(p), bytes, address(pc));
}
// The additions add nothing: they are there for their memory order.
void note_atomic(void* p) { __tsan_atomic32_fetch_add(static_cast<int*>(p), 0, __ATOMIC_RELAXED); }
void note_atomic_load_acquire(const void* p) { __tsan_atomic32_load(static_cast<const int*>(p), __ATOMIC_ACQUIRE); }
void note_atomic_add_release(void* p) { __tsan_atomic32_fetch_add(static_cast<int*>(p), 0, __ATOMIC_RELEASE); }
#else
void become(Clock) {}
void begin_launch_clock() {}
Clock scheduler_clock() { return nullptr; }
Clock create_clock(const char*) { return nullptr; }
void name_clock(Clock, const char*) {}
void destroy_clock(Clock) {}
AsClock::AsClock(Clock) : previous_(nullptr) {}
AsClock::~AsClock() {}
void acquire(const void*) {}
void release(const void*) {}
void note_read(const void*, size_t, const void*) {}
void note_write(const void*, size_t, const void*) {}
void note_atomic(void*) {}
void note_atomic_load_acquire(const void*) {}
void note_atomic_add_release(void*) {}
#endif

}  // namespace sim
