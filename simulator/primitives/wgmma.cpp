// wgmma: every swizzle, both majors, both sources of A. Each operand is tested against a known good other side, since
// a wrong layout may permute two operands alike and go unnoticed.
#include <initializer_list>
#include "primitives.h"

#ifdef PRIMITIVES_WITH_SM90
#include "cuda/ptx/sync.h"
#include "cuda/ptx/wgmma.h"

namespace flash_attn::primitives {
namespace {

using ptx::Major;

struct Operand {
    const uint16_t* data;   // [mn][16]
    const int32_t* offset;  // [mn][16]: byte of each element in the region
    int count, region, leading, stride, swizzle;
};

// c[64][N] = a[64][16] b[N][16]^T, twice
template <class Element, int N, bool kFromRegisters, Major kMajorA, Major kMajorB> FA_KERNEL(128, 1)
wgmma_kernel(Operand a, Operand b, float* c) {
    const int t = ptx::thread_idx();
    for (int i = t; i < a.count; i += 128)
        *reinterpret_cast<uint16_t*>(ptx::smem() + a.region + a.offset[i]) = a.data[i];
    for (int i = t; i < b.count; i += 128)
        *reinterpret_cast<uint16_t*>(ptx::smem() + b.region + b.offset[i]) = b.data[i];
    ptx::fence_proxy_async();
    ptx::sync_threads();
    auto descriptor = [](const Operand& x) {
        const char* start = ptx::smem() + x.region + x.offset[0];
        return ptx::wgmma_descriptor(start, x.leading, x.stride, static_cast<ptx::Swizzle>(x.swizzle));
    };
    const uint64_t desc_a = descriptor(a), desc_b = descriptor(b);
    const int row = t / 32 * 16 + t % 32 / 4, col = t % 4 * 2;
    float acc[N / 2];
    uint32_t ar[4];
#pragma unroll
    for (int r = 0; r < 4; ++r) {
        const uint16_t* p = a.data + (row + r % 2 * 8) * 16 + col + r / 2 * 8;
        ar[r] = p[0] | static_cast<uint32_t>(p[1]) << 16;
    }
    ptx::wgmma_fence();
#pragma unroll
    for (int repeat = 0; repeat < 2; ++repeat)
        if constexpr (kFromRegisters)
            ptx::wgmma_rs<Element, N, kMajorB>(acc, ar, desc_b, repeat > 0);
        else
            ptx::wgmma_ss<Element, N, kMajorA, kMajorB>(acc, desc_a, desc_b, repeat > 0);
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
    ptx::pin_registers(acc);
#pragma unroll
    for (int i = 0; i < N / 2; ++i) c[(row + i / 2 % 2 * 8) * N + i / 4 * 8 + col + i % 2] = acc[i];
}

// Where an element of a [rows][16] operand is inside a larger tile: slice `slice` along k of a K-major tile, or of a
// tile of kPanelK rows of k where it is MN-major. Fills in the strides of op.
int32_t place(Operand& op, int rows, Major major, int mn, int k) {
    constexpr int kPanelK = 64;
    const int bytes = op.swizzle == 0 ? 16 : 256 >> op.swizzle;  // contiguous: 16, 128, 64, 32
    op.leading = 16;
    op.stride = 8 * bytes;
    int at;
    if (major == Major::kK) {
        at = op.swizzle ? mn * bytes + k * 2 : k / 8 * rows * 16 + mn * 16 + k % 8 * 2;
        if (!op.swizzle) op.leading = rows * 16;
    } else {
        const int span = bytes / 2;
        at = mn / span * kPanelK * bytes + k * bytes + mn % span * 2;
        op.leading = kPanelK * bytes;
        if (!op.swizzle) {  // the two exchange roles
            op.leading = 8 * bytes;
            op.stride = kPanelK * bytes;
        }
    }
    return op.swizzle ? at ^ (at >> 3 & (bytes - 1) & 0x70) : at;
}

Operand lay_out(const uint16_t* data, Buffer<int32_t>& offset, Major major, int swizzle, int slice, int region) {
    Operand op{data, offset.data, offset.size, region, 0, 0, swizzle};
    const int rows = offset.size / 16;
    for (int mn = 0; mn < rows; ++mn)
        for (int k = 0; k < 16; ++k) offset[mn * 16 + k] = place(op, rows, major, mn, k + slice * 16);
    return op;
}

template <class Element, int N, bool kFromRegisters, Major kMajorA, Major kMajorB>
void test_product(const char* what, int swizzle, int slice, int width = 0) {
    Buffer<uint16_t> a(64 * 16), b(N * 16);
    Buffer<int32_t> offset_a(64 * 16), offset_b(N * 16);
    Buffer<float> c(64 * N);
    fill_small<Element>(a);
    fill_small<Element>(b);
    const Operand oa = lay_out(a, offset_a, kMajorA, swizzle, slice, 0);
    const Operand ob = lay_out(b, offset_b, kMajorB, swizzle, slice, 32768);
    run(wgmma_kernel<Element, N, kFromRegisters, kMajorA, kMajorB>, 1, 128, 98304, oa, ob, c.data);
    bool ok = true;
    for (int i = 0; i < 64; ++i)
        for (int j = 0; j < N; ++j) {
            float x = 0;
            for (int k = 0; k < 16; ++k) x += 2 * small_value(i * 16 + k) * small_value(j * 16 + k);
            ok &= x == c[i * N + j];
        }
    expect(ok, what, width * 100 + swizzle * 10 + slice);
}

// Widths that end within a panel of 64 columns, in every orientation that the kernels use.
template <int N> void test_width() {
    constexpr Major K = Major::kK, MN = Major::kMN;
    for (int slice : {0, 3}) {
        test_product<bf16, N, false, K, K>("wgmma ss bf16, A K-major, B K-major; n, swizzle and slice", 1, slice, N);
        test_product<bf16, N, true, K, MN>("wgmma rs bf16, B MN-major; n, swizzle and slice", 1, slice, N);
        test_product<fp16, N, false, K, MN>("wgmma ss fp16, A K-major, B MN-major; n, swizzle and slice", 1, slice, N);
        test_product<bf16, N, false, MN, MN>("wgmma ss bf16, A and B MN-major; n, swizzle and slice", 1, slice, N);
    }
}

// Between products, a block of one warp: nothing of what the other warps had in flight may be left.
FA_KERNEL(32, 1) one_warp_kernel() { ptx::sync_threads(); }

}  // namespace

// The number printed is 10 * swizzle mode (0 none, 1 128 bytes, 2 64 bytes, 3 32 bytes) + slice, + 100 n if it says so.
void test_wgmma() {
    constexpr Major K = Major::kK, MN = Major::kMN;
    for (int swizzle : {1, 2, 3, 0})
        for (int slice : {0, 1}) {
            if (swizzle == 3 && slice) continue;  // a 32-byte row holds one K-major slice
            test_product<bf16, 64, false, K, K>("wgmma ss bf16 n64, A K-major, B K-major", swizzle, slice);
            test_product<bf16, 128, false, K, K>("wgmma ss bf16 n128, A K-major, B K-major", swizzle, slice);
            test_product<fp16, 128, true, K, K>("wgmma rs fp16 n128, B K-major", swizzle, slice);
        }
    for (int swizzle : {1, 2, 3, 0})
        for (int slice : {0, 1, 3}) {
            test_product<bf16, 64, true, K, MN>("wgmma rs bf16 n64, B MN-major", swizzle, slice);
            test_product<bf16, 128, true, K, MN>("wgmma rs bf16 n128, B MN-major", swizzle, slice);
            test_product<fp16, 128, false, MN, MN>("wgmma ss fp16 n128, A MN-major, B MN-major", swizzle, slice);
        }
    run(one_warp_kernel, 1, 32, 0);
    test_width<80>();
    test_width<96>();
    test_width<112>();
    test_product<fp16, 64, false, K, MN>("wgmma ss fp16 n64, A K-major, B MN-major", 1, 0);
    test_product<bf16, 40, false, K, K>("wgmma ss bf16 n40, A K-major, B K-major", 1, 0);
    test_product<fp16, 40, true, K, MN>("wgmma rs fp16 n40, B MN-major", 1, 0);
    test_product<fp16, 192, true, K, MN>("wgmma rs fp16 n192, B MN-major", 1, 0);
    test_product<bf16, 192, false, K, K>("wgmma ss bf16 n192, A K-major, B K-major", 1, 0);
    test_product<bf16, 256, true, K, MN>("wgmma rs bf16 n256, B MN-major", 1, 0);
    test_product<fp16, 256, false, K, K>("wgmma ss fp16 n256, A K-major, B K-major", 1, 0);
}

}  // namespace flash_attn::primitives
#else
void flash_attn::primitives::test_wgmma() {}
#endif
