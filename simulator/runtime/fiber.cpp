// Stacks, and switching between them.
#include "runtime/fiber.h"

#include <cstring>

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>

#include "runtime/runtime.h"
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

#if defined(SIM_USES_UCONTEXT)
#elif defined(__x86_64__)
asm(R"(
.text
.globl sim_switch_stack
.type sim_switch_stack,@function
sim_switch_stack:
    pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
    ret
.size sim_switch_stack, .-sim_switch_stack
)");
#elif defined(__aarch64__)
asm(R"(
.text
.globl sim_switch_stack
.type sim_switch_stack,%function
sim_switch_stack:
    sub sp, sp, #160
    stp x19, x20, [sp]; stp x21, x22, [sp, #16]; stp x23, x24, [sp, #32]; stp x25, x26, [sp, #48]
    stp x27, x28, [sp, #64]; stp x29, x30, [sp, #80]
    stp d8, d9, [sp, #96]; stp d10, d11, [sp, #112]; stp d12, d13, [sp, #128]; stp d14, d15, [sp, #144]
    mov x9, sp
    str x9, [x0]
    mov sp, x1
    ldp x19, x20, [sp]; ldp x21, x22, [sp, #16]; ldp x23, x24, [sp, #32]; ldp x25, x26, [sp, #48]
    ldp x27, x28, [sp, #64]; ldp x29, x30, [sp, #80]
    ldp d8, d9, [sp, #96]; ldp d10, d11, [sp, #112]; ldp d12, d13, [sp, #128]; ldp d14, d15, [sp, #144]
    add sp, sp, #160
    ret
.size sim_switch_stack, .-sim_switch_stack
)");
#endif

namespace sim {
namespace {

constexpr size_t kStackBytes = 256 << 10;

#if defined(SIM_USES_UCONTEXT)
void prepare(Fiber& fiber, void (*entry)()) {
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack;
    fiber.context.uc_stack.ss_size = fiber.stack_bytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, entry, 0);
}
#else
// As if the fiber had been switched away from at the first instruction of entry. Zeros end a debugger's backtrace.
void prepare(Fiber& fiber, void (*entry)()) {
    void** top = reinterpret_cast<void**>((reinterpret_cast<uintptr_t>(fiber.stack) + fiber.stack_bytes) & ~15ul);
#if defined(__x86_64__)
    constexpr int kSlots = 8, kReturnAddress = 6;  // r15 ... rbp, entry, and what entry would return to
#else
    constexpr int kSlots = 20, kReturnAddress = 11;
#endif
    top -= kSlots;
    for (int i = 0; i < kSlots; ++i) top[i] = nullptr;
    top[kReturnAddress] = reinterpret_cast<void*>(entry);
    fiber.stack_pointer = static_cast<void*>(top);
}
#endif

}  // namespace

char* allocate_guarded(size_t bytes, size_t* allocated_bytes) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE)), usable = (bytes + page - 1) / page * page;
    void* p = mmap(nullptr, usable + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) fail("no memory for %zu bytes", usable);
    char* first = static_cast<char*>(p) + page;
    if (mprotect(first, usable, PROT_READ | PROT_WRITE)) fail("no memory for %zu bytes", usable);
    *allocated_bytes = usable;
    return first;
}

void create_fiber(Fiber& fiber, void (*entry)()) {
    fiber.stack = allocate_guarded(kStackBytes, &fiber.stack_bytes);
    // Uninitialised registers are NaN, not the zeros of fresh memory. They are near the top of the stack.
    constexpr size_t kFilled = 16384;
    const size_t filled = fiber.stack_bytes < kFilled ? fiber.stack_bytes : kFilled;
    std::memset(fiber.stack + fiber.stack_bytes - filled, 0xff, filled);
    prepare(fiber, entry);
}

#ifdef __SANITIZE_ADDRESS__
static Fiber* left;
void switch_fiber(Fiber& from, Fiber& to) {
    left = &from;
    __sanitizer_start_switch_fiber(&from.fake_stack, to.stack, to.stack_bytes);
    switch_stack(from, to);
    __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
}
void begin_fiber() {
    const void* stack;
    size_t bytes;
    __sanitizer_finish_switch_fiber(nullptr, &stack, &bytes);
    left->stack = static_cast<char*>(const_cast<void*>(stack));  // news if it is the stack of a launch
    left->stack_bytes = bytes;
}
#endif

}  // namespace sim
