// sm_90a. Asynchronous warpgroup products: acc[64, N] (+)= A[64, 16] * B[16, N], fp32 accumulators. A is in shared
// memory (ss) or registers (rs), B in shared memory. In warp w of the warpgroup, accumulator register 4 j + 2 i + e of
// lane l is element (16 w + l / 4 + 8 i, 8 j + 2 (l % 4) + e); registers of A are as in mma_m16n8k16. PTX ISA,
// "Asynchronous Warpgroup Level Matrix Multiply-Accumulate Instructions".
#pragma once
#include "cuda/ptx/types.h"

namespace flash_attn::ptx {

enum class Major { kK, kMN };  // which index is contiguous in shared memory: k (the summed one), or m / n
enum class Swizzle { kNone = 0, k128B = 1, k64B = 2, k32B = 3 };

// PTX ISA, "Matrix Descriptor Format". Byte offsets within an operand:
//   K-major, swizzled: stride between groups of 8 rows; leading is ignored
//   MN-major, swizzled: stride between groups of 8 k; leading between swizzle-wide panels of m or n
FA_DEVICE uint64_t wgmma_descriptor(SmemPtr start, int leading_bytes, int stride_bytes, Swizzle swizzle) {
    return static_cast<uint64_t>((start.address & 0x3ffff) >> 4) | static_cast<uint64_t>(leading_bytes >> 4) << 16 |
           static_cast<uint64_t>(stride_bytes >> 4) << 32 | static_cast<uint64_t>(swizzle) << 62;
}

// Orders earlier accesses to the accumulator and A registers before the wgmma that follow.
FA_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
// Closes the group of the wgmma issued since the last commit.
FA_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits until at most kPending groups are in flight.
template <int kPending> FA_DEVICE void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// After a wait: keeps the compiler from moving reads of accumulator registers above it.
template <int kCount> FA_DEVICE void pin_registers(float (&r)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(r[i])::"memory");
}

// The operands of an asm statement cannot be built from a parameter pack, so these macros spell them out: accumulator
// registers in groups of eight, then the widths in use.
#define FA_ACC8(i)                                                                                              \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
        "+f"(d[i + 7])
#define FA_REGS_16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define FA_ACC_16 FA_ACC8(0), FA_ACC8(8)
#define FA_REGS_20 \
    FA_REGS_16     \
    ", %16, %17, %18, %19"
#define FA_ACC_20 FA_ACC_16, "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19])
#define FA_REGS_32 \
    FA_REGS_16     \
    ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define FA_ACC_32 FA_ACC_16, FA_ACC8(16), FA_ACC8(24)
#define FA_REGS_40 \
    FA_REGS_32     \
    ", %32, %33, %34, %35, %36, %37, %38, %39"
#define FA_ACC_40 FA_ACC_32, FA_ACC8(32)
#define FA_REGS_48 \
    FA_REGS_40     \
    ", %40, %41, %42, %43, %44, %45, %46, %47"
#define FA_ACC_48 FA_ACC_40, FA_ACC8(40)
#define FA_REGS_56 \
    FA_REGS_48     \
    ", %48, %49, %50, %51, %52, %53, %54, %55"
#define FA_ACC_56 FA_ACC_48, FA_ACC8(48)
#define FA_REGS_64 \
    FA_REGS_56     \
    ", %56, %57, %58, %59, %60, %61, %62, %63"
#define FA_ACC_64 FA_ACC_56, FA_ACC8(56)
#define FA_REGS_88                                                                     \
    FA_REGS_64                                                                         \
    ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79" \
    ", %80, %81, %82, %83, %84, %85, %86, %87"
#define FA_ACC_88 FA_ACC_64, FA_ACC8(64), FA_ACC8(72), FA_ACC8(80)
#define FA_REGS_96 \
    FA_REGS_88     \
    ", %88, %89, %90, %91, %92, %93, %94, %95"
#define FA_ACC_96 FA_ACC_88, FA_ACC8(88)
#define FA_REGS_128                                                                                \
    FA_REGS_96                                                                                     \
    ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111" \
    ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define FA_ACC_128 FA_ACC_96, FA_ACC8(96), FA_ACC8(104), FA_ACC8(112), FA_ACC8(120)
// X(width n, registers, accumulators, then the numbers of the operands that follow them).
#define FA_WGMMA_WIDTHS(X)                                                       \
    X(32, FA_REGS_16, (FA_ACC_16), "16", "17", "18", "19", "20", "21", "22")     \
    X(40, FA_REGS_20, (FA_ACC_20), "20", "21", "22", "23", "24", "25", "26")     \
    X(64, FA_REGS_32, (FA_ACC_32), "32", "33", "34", "35", "36", "37", "38")     \
    X(80, FA_REGS_40, (FA_ACC_40), "40", "41", "42", "43", "44", "45", "46")     \
    X(96, FA_REGS_48, (FA_ACC_48), "48", "49", "50", "51", "52", "53", "54")     \
    X(112, FA_REGS_56, (FA_ACC_56), "56", "57", "58", "59", "60", "61", "62")    \
    X(128, FA_REGS_64, (FA_ACC_64), "64", "65", "66", "67", "68", "69", "70")    \
    X(176, FA_REGS_88, (FA_ACC_88), "88", "89", "90", "91", "92", "93", "94")    \
    X(192, FA_REGS_96, (FA_ACC_96), "96", "97", "98", "99", "100", "101", "102") \
    X(256, FA_REGS_128, (FA_ACC_128), "128", "129", "130", "131", "132", "133", "134")
#define FA_ARGS(...) __VA_ARGS__
#define FA_WGMMA_SS(n, types, regs, acc, a, b, accumulate_at, major_a, major_b)                     \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" accumulate_at                                 \
                 ", 0;\n"                                                                           \
                 "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." types " {" regs "}, %" a ", %" b \
                 ", p, 1, 1, %" major_a ", %" major_b ";\n}"                                        \
                 : FA_ARGS acc                                                                      \
                 : "l"(desc_a), "l"(desc_b), "r"(int(accumulate)), "n"(int(kMajorA)), "n"(int(kMajorB)))
#define FA_WGMMA_RS(n, types, regs, acc, a0, a1, a2, a3, b, accumulate_at, major_b)                             \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" accumulate_at                                             \
                 ", 0;\n"                                                                                       \
                 "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." types " {" regs "}, {%" a0 ", %" a1 ", %" a2 \
                 ", %" a3 "}, %" b ", p, 1, 1, %" major_b ";\n}"                                                \
                 : FA_ARGS acc                                                                                  \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(desc_b), "r"(int(accumulate)), "n"(int(kMajorB)))
#define FA_IF_WIDTH_SS(n, regs, acc, x0, x1, x2, x3, x4, x5, x6)                               \
    if constexpr (N == n && kBf16) FA_WGMMA_SS(n, "bf16.bf16", regs, acc, x0, x1, x2, x3, x4); \
    if constexpr (N == n && !kBf16) FA_WGMMA_SS(n, "f16.f16", regs, acc, x0, x1, x2, x3, x4);
#define FA_IF_WIDTH_RS(n, regs, acc, x0, x1, x2, x3, x4, x5, x6)                                       \
    if constexpr (N == n && kBf16) FA_WGMMA_RS(n, "bf16.bf16", regs, acc, x0, x1, x2, x3, x4, x5, x6); \
    if constexpr (N == n && !kBf16) FA_WGMMA_RS(n, "f16.f16", regs, acc, x0, x1, x2, x3, x4, x5, x6);

template <int N> constexpr bool kIsWgmmaWidth =
    N == 32 || N == 40 || N == 64 || N == 80 || N == 96 || N == 112 || N == 128 || N == 176 || N == 192 || N == 256;

template <class Element, int N, Major kMajorA, Major kMajorB>
FA_DEVICE void wgmma_ss(float (&d)[N / 2], uint64_t desc_a, uint64_t desc_b, bool accumulate) {
    static_assert(kIsWgmmaWidth<N>, "add the width to the table");
    constexpr bool kBf16 = std::is_same_v<Element, bf16>;
    static_assert(kBf16 || std::is_same_v<Element, fp16>);
    FA_WGMMA_WIDTHS(FA_IF_WIDTH_SS)
}

template <class Element, int N, Major kMajorB>
FA_DEVICE void wgmma_rs(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t desc_b, bool accumulate) {
    static_assert(kIsWgmmaWidth<N>, "add the width to the table");
    constexpr bool kBf16 = std::is_same_v<Element, bf16>;
    static_assert(kBf16 || std::is_same_v<Element, fp16>);
    FA_WGMMA_WIDTHS(FA_IF_WIDTH_RS)
}

#undef FA_ACC8
#undef FA_REGS_16
#undef FA_ACC_16
#undef FA_REGS_20
#undef FA_ACC_20
#undef FA_REGS_32
#undef FA_ACC_32
#undef FA_REGS_40
#undef FA_ACC_40
#undef FA_REGS_48
#undef FA_ACC_48
#undef FA_REGS_56
#undef FA_ACC_56
#undef FA_REGS_64
#undef FA_ACC_64
#undef FA_REGS_88
#undef FA_ACC_88
#undef FA_REGS_96
#undef FA_ACC_96
#undef FA_REGS_128
#undef FA_ACC_128
#undef FA_WGMMA_WIDTHS
#undef FA_ARGS
#undef FA_WGMMA_SS
#undef FA_WGMMA_RS
#undef FA_IF_WIDTH_SS
#undef FA_IF_WIDTH_RS

}  // namespace flash_attn::ptx
