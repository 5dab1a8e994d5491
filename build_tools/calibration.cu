// What the compile times in the static report are relative to: tensor products, exponentials and copies in unrolled
// loops, like the kernels', but never changed with them.
namespace calibration {

__device__ __forceinline__ void multiply(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <int kCols, bool kScale> __global__ void __launch_bounds__(128)
    calibrate(const unsigned* in, float* out, int n) {
    extern __shared__ unsigned tile[];
    float sums[kCols / 8][4] = {};
    for (int step = 0; step < n; ++step) {
#pragma unroll
        for (int i = 0; i < kCols / 4; ++i)
            tile[threadIdx.x + 128 * i] = in[threadIdx.x + 128 * (i + step * kCols / 4)];
        __syncthreads();
        float scores[kCols / 8][4] = {};
#pragma unroll
        for (int k = 0; k < kCols / 16; ++k) {
            const unsigned a[4] = {tile[4 * k + threadIdx.x], tile[4 * k + 1], tile[4 * k + 2], tile[4 * k + 3]};
#pragma unroll
            for (int j = 0; j < kCols / 8; ++j)
                multiply(scores[j], a, tile[(threadIdx.x ^ j) + 32 * k], tile[(threadIdx.x ^ j) + 64 * k]);
        }
        float largest = -1e30f;
#pragma unroll
        for (int j = 0; j < kCols / 8; ++j)
#pragma unroll
            for (int e = 0; e < 4; ++e) largest = fmaxf(largest, scores[j][e]);
#pragma unroll
        for (int j = 0; j < kCols / 8; ++j)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const float weight = exp2f(scores[j][e] - largest);
                sums[j][e] += kScale ? weight * tile[(threadIdx.x + j * e) % kCols] : weight;
            }
        __syncthreads();
    }
#pragma unroll
    for (int j = 0; j < kCols / 8; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) out[(j * 4 + e) * 128 + threadIdx.x] = sums[j][e];
}

}  // namespace calibration

template __global__ void calibration::calibrate<64, false>(const unsigned*, float*, int);
template __global__ void calibration::calibrate<64, true>(const unsigned*, float*, int);
template __global__ void calibration::calibrate<128, false>(const unsigned*, float*, int);
template __global__ void calibration::calibrate<128, true>(const unsigned*, float*, int);
