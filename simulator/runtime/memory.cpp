// Shared memory of a block, and accesses to global memory.
#include <cmath>
#include <utility>
#include "runtime/element.h"
#include "runtime/runtime.h"
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

namespace sim {
namespace {

constexpr size_t kSmemAlignment = 1024;
constexpr uint32_t kSmemWindowBase = 1024;  // dynamic shared memory does not start at address 0
constexpr char kMargin = 0x5a;

// Compiled without the optimisation that would make a call of memset of this.
void fill(char* first, const char* last, char value) {
    for (volatile char* p = first; p != last; ++p) *p = value;
}
bool filled(const char* first, const char* last, char value) {
    for (const char* p = first; p != last; ++p)
        if (*p != value) return false;
    return true;
}

}  // namespace

// ---------------------------------------------------------------- shared memory
// As near to the end of the region as alignment allows: a page that cannot be touched follows. What is left between
// holds a mark in plain builds and is poisoned for AddressSanitizer.
void place_smem(Block& b, size_t bytes) {
    if (b.region_bytes < bytes + kSmemAlignment) b.region = allocate_guarded(bytes + kSmemAlignment, &b.region_bytes);
    const uintptr_t end = reinterpret_cast<uintptr_t>(b.region) + b.region_bytes;
#ifdef __SANITIZE_ADDRESS__
    __asan_unpoison_memory_region(b.region, b.region_bytes);
#endif
    b.smem = reinterpret_cast<char*>((end - bytes) / kSmemAlignment * kSmemAlignment);
    b.smem_bytes = bytes;
    fill(b.smem - kSmemAlignment, b.smem, kMargin);
    fill(b.smem + bytes, b.region + b.region_bytes, kMargin);
#ifdef __SANITIZE_ADDRESS__
    __asan_poison_memory_region(b.region, size_t(b.smem - b.region));
    __asan_poison_memory_region(b.smem + bytes, size_t(b.region + b.region_bytes - b.smem) - bytes);
#endif
}

void check_smem_margins(const Block& b) {
#ifndef __SANITIZE_ADDRESS__
    if (!filled(b.smem - kSmemAlignment, b.smem, kMargin) ||
        !filled(b.smem + b.smem_bytes, b.region + b.region_bytes, kMargin))
        fail("something was written outside of the block's %zu bytes of shared memory", b.smem_bytes);
#else
    static_cast<void>(filled);
    static_cast<void>(b);
#endif
}

// NaN in every floating-point format.
void fill_smem(Block& b) {
    auto* words = reinterpret_cast<volatile uint64_t*>(b.smem);
    for (size_t i = 0; i < b.smem_bytes / 8; ++i) words[i] = ~uint64_t{0};
    fill(b.smem + b.smem_bytes / 8 * 8, b.smem + b.smem_bytes, char(0xff));
}

uint32_t smem_address(const void* p) {
    const Block& b = *self->block;
    const ptrdiff_t offset = static_cast<const char*>(p) - b.smem;
    if (offset < 0 || static_cast<size_t>(offset) >= b.smem_bytes)
        fail("a pointer outside of shared memory (smem%+td of %zu bytes) is used as a shared address", offset,
             b.smem_bytes);
    return static_cast<uint32_t>(offset) + kSmemWindowBase;
}

void check_shared(const void* p, int bytes) {
    const uint32_t address = smem_address(p);
    if (address % static_cast<uint32_t>(bytes))
        fail("access of %d bytes at smem+%u is not aligned", bytes, address - kSmemWindowBase);
    smem_at(*self->block, address, bytes);
    counters.shared += bytes;
}

char* smem_at(const Block& b, uint32_t address, int bytes) {
    const size_t offset = size_t{address} - kSmemWindowBase;
    if (address < kSmemWindowBase || offset + static_cast<size_t>(bytes) > b.smem_bytes)
        fail("%d bytes at smem%+ld are outside of shared memory", bytes, long(address) - long(kSmemWindowBase));
    return b.smem + offset;
}

// ---------------------------------------------------------------- global memory
// Where AddressSanitizer watches, touches the first bad byte, so that it reports the instruction that is being issued
// and not the later moment at which an asynchronous copy lands.
void check_global(const char* what, const void* p, int bytes, int alignment) {
    if (reinterpret_cast<uintptr_t>(p) % static_cast<unsigned>(alignment))
        fail("%s: global address %p is not %d-byte aligned", what, p, alignment);
    const Block& b = *self->block;
    if (p >= b.region && p < b.region + b.region_bytes)
        fail("%s: a pointer to shared memory is used as a global address", what);
#ifdef __SANITIZE_ADDRESS__
    if (const void* bad = __asan_region_is_poisoned(const_cast<void*>(p), static_cast<size_t>(bytes)))
        static_cast<void>(*static_cast<const volatile char*>(bad));
#else
    static_cast<void>(bytes);
#endif
}

// Not memcpy: ThreadSanitizer would take that for an access of the current clock.
void copy_16(void* dst, const void* src) {
    using Word = uint64_t __attribute__((may_alias));
    static_cast<Word*>(dst)[0] = static_cast<const Word*>(src)[0];
    static_cast<Word*>(dst)[1] = static_cast<const Word*>(src)[1];
}

Regs4 load_16(const void* p) {
    check_global("ld.global.v4", p, 16, 16);
    counters.plain.read += 16;
    note_read(p, 16, __builtin_return_address(0));
    Regs4 regs;
    copy_16(&regs, p);
    return regs;
}
void store_16(void* p, Regs4 regs) {
    check_global("st.global.v4", p, 16, 16);
    counters.plain.written += 16;
    note_write(p, 16, __builtin_return_address(0));
    copy_16(p, &regs);
}
void note_plain_load(const void* p, int bytes) {
    check_global("ld.global", p, bytes, bytes);
    counters.plain.read += bytes;
}
void note_plain_store(const void* p, int bytes) {
    check_global("st.global", p, bytes, bytes);
    counters.plain.written += bytes;
}
static void add_atomically(float* p, float value, void* caller) {
    counters.red.added += 4;
    options.ordered_reds ? note_write(p, 4, caller) : note_atomic(p);
    *p += value;
}
void red_add(float* p, float value) {
    check_global("red.global", p, 4, 4);
    add_atomically(p, value, __builtin_return_address(0));
}
void red_max(float* p, float value) {
    check_global("red.global", p, 4, 4);
    note_atomic(p);
    if (std::isnan(*p) && std::signbit(*p)) fail("red_max of a NaN with its sign set");
    if (std::isnan(value))
        *p = bits_float(0x7fffffff);
    else if (*p < value || (*p == value && std::signbit(*p)))
        *p = value;
}
int32_t fetch_add(int32_t* p, int32_t value) {
    check_global("atom.global", p, 4, 4);
    note_atomic(p);
    return std::exchange(*p, *p + value);
}
void red_add_16(float* p, const float (&x)[4]) {
    check_global("red.global.v4", p, 16, 16);
    for (int i = 0; i < 4; ++i) add_atomically(p + i, x[i], __builtin_return_address(0));
}

}  // namespace sim
