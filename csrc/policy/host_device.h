// Function attributes for policies, which g++, nvcc and the simulator compile from one source. No CUDA headers.
#pragma once

// Policies are always inlined: the CPU backend compiles them once per instruction set, and the linker may merge
// out-of-line copies, so that an older processor would run code of a newer instruction set.
#if defined(__CUDACC__)
#define FA_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define FA_HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace flash_attn {

template <class T> FA_HOST_DEVICE constexpr T min(T a, T b) { return b < a ? b : a; }
template <class T> FA_HOST_DEVICE constexpr T max(T a, T b) { return a < b ? b : a; }
template <class T> FA_HOST_DEVICE constexpr T clamp(T x, T low, T high) { return min(max(x, low), high); }
template <class T> FA_HOST_DEVICE constexpr T ceil_div(T a, T b) { return (a + b - 1) / b; }
template <class T> FA_HOST_DEVICE constexpr T round_down(T a, T multiple) { return a / multiple * multiple; }
template <class T> FA_HOST_DEVICE constexpr T round_up(T a, T multiple) { return ceil_div(a, multiple) * multiple; }

// A type as a value: the argument of generic lambdas that select a type.
template <class T> struct Type { using type = T; };

}  // namespace flash_attn
