// Happens-before, handed to ThreadSanitizer; all of it does nothing in other builds. Not for kernels.
//
// Every CUDA thread has a clock. Every warp also has an *async view*: what the asynchronous proxy (TMA, wgmma) may rely
// on when this warp issues work. Plain accesses enter the view only through fence.proxy.async; barriers carry clock and
// view side by side. Asynchronous work runs with the view it was issued with, and enters clock and view of the
// threads that wait for it.
//
// A clock is a fiber of ThreadSanitizer. The current one is that of the running CUDA thread or of the scheduler; work
// done in another name is bracketed by AsClock. The library functions that ThreadSanitizer intercepts (memcpy, malloc,
// ...) count as accesses of the current clock, so the models do without them, or call them in the scheduler's name.
#pragma once
#include <cstddef>

namespace sim {

#ifdef SIM_TSAN
constexpr bool kDetectsRaces = true;
#else
constexpr bool kDetectsRaces = false;
#endif

using Clock = void*;
Clock create_clock(const char* name);  // knows what the current clock knows
void name_clock(Clock clock, const char* name);
void destroy_clock(Clock clock);
void begin_launch_clock();  // the clock of the launching thread becomes the scheduler's
Clock scheduler_clock();
void become(Clock clock);

class AsClock {
public:
    explicit AsClock(Clock clock);
    ~AsClock();

private:
    Clock previous_;
};
// For functions that kernels call and that need the library.
struct AsScheduler : AsClock {
    AsScheduler() : AsClock(scheduler_clock()) {}
};

// An address stands for a synchronisation object.
void acquire(const void* sync);
void release(const void* sync);

// Accesses by the current clock. pc: the instruction of the kernel that reports are to show.
void note_read(const void* p, size_t bytes, const void* pc);
void note_write(const void* p, size_t bytes, const void* pc);
void note_atomic(void* p);  // four bytes; races with plain accesses only
void note_atomic_load_acquire(const void* p);
void note_atomic_add_release(void* p);

// What one generation of a barrier publishes.
struct SyncPoint { char threads, async_view; };
// One per generation, reused four generations later. With one per barrier, a thread that wakes late would acquire what
// was released for the next generation, and data races would vanish.
struct Generations {
    SyncPoint ring[4];
    SyncPoint& at(unsigned long generation) { return ring[generation % 4]; }
};

}  // namespace sim
