// Stacks, and switching between them. Not for kernels.
#pragma once
#include <cstddef>

#if defined(SIM_UCONTEXT) || !(defined(__x86_64__) || defined(__aarch64__))
#define SIM_USES_UCONTEXT 1
#include <ucontext.h>
#else
// Pushes the registers that a callee must keep, stores the stack pointer in *save, and continues from the stack pointer
// `load`, where the same registers were pushed.
extern "C" void sim_switch_stack(void** save, void* load);
#endif

namespace sim {

struct Fiber {
    char* stack = nullptr;
    size_t stack_bytes = 0;
    void* fake_stack = nullptr;  // of AddressSanitizer
#ifdef SIM_USES_UCONTEXT
    ucontext_t context;
#else
    void* stack_pointer = nullptr;
#endif
};

inline void switch_stack(Fiber& from, Fiber& to) {
#ifdef SIM_USES_UCONTEXT
    swapcontext(&from.context, &to.context);
#else
    sim_switch_stack(&from.stack_pointer, to.stack_pointer);
#endif
}

// A fiber that starts in entry(), which calls begin_fiber() first and does not return.
void create_fiber(Fiber& fiber, void (*entry)());

// AddressSanitizer is told which stack is in use, to recognise addresses on it and to walk it for reports.
#ifdef __SANITIZE_ADDRESS__
void begin_fiber();
void switch_fiber(Fiber& from, Fiber& to);
#else
inline void begin_fiber() {}
inline void switch_fiber(Fiber& from, Fiber& to) { switch_stack(from, to); }
#endif

// Memory of at least `bytes` bytes between two pages that cannot be touched. Never given back.
char* allocate_guarded(size_t bytes, size_t* allocated_bytes);

}  // namespace sim
