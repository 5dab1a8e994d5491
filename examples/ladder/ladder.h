// What the rungs share: the problem, rows of 16-bit numbers as floats, a reference in double precision, and a line of
// the table that says what a rung did.
//
// The problem: one head of causal attention in bf16, with head_dim 64. Queries and keys are as many, a multiple of the
// 64 rows of a tile: what it takes to do without that is left to csrc.
#pragma once
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>
#include "cuda/launch.h"
#include "cuda/ptx/global.h"
#include "cuda/ptx/math.h"
#include "policy/mask.h"
#include "policy/scalars.h"

namespace ladder {

using namespace flash_attn;

constexpr int kHeadDim = 64, kTile = 64, kSeqlen = 512;
constexpr int kRowBytes = kHeadDim * sizeof(bf16), kTileBytes = kTile * kRowBytes;
// 1 / sqrt(head_dim), and log2(e): exp(x) is computed as exp2(x * log2(e)), for which there is an instruction.
constexpr double kScale = 0.125;
constexpr float kScaleLog2 = float(kScale * kLog2e);

struct Attention {
    const bf16 *q, *k, *v;  // [seqlen, kHeadDim]
    bf16* out;              // [seqlen, kHeadDim]
    float* scores;          // [seqlen, seqlen], for the rung that keeps them
    WindowMask mask;        // causal
    int seqlen;
};

// ---------------------------------------------------------------- for kernels
// Eight elements, as 16 bytes, to floats.
FA_DEVICE void unpack_eight(float* x, const uint32_t (&eight)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        x[2 * i] = ptx::unpack_lo<bf16>(eight[i]);
        x[2 * i + 1] = ptx::unpack_hi<bf16>(eight[i]);
    }
}
FA_DEVICE void load_row(float (&x)[kHeadDim], const bf16* row) {
#pragma unroll
    for (int i = 0; i < kHeadDim; i += 8) {
        uint32_t eight[4];
        ptx::load_16(eight, row + i);
        unpack_eight(x + i, eight);
    }
}
FA_DEVICE void store_row(bf16* row, const float (&x)[kHeadDim], float factor) {
#pragma unroll
    for (int i = 0; i < kHeadDim; i += 8) {
        uint32_t eight[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) eight[j] = ptx::pack<bf16>(x[i + 2 * j] * factor, x[i + 2 * j + 1] * factor);
        ptx::store_16(row + i, eight);
    }
}
FA_DEVICE float dot(const float (&x)[kHeadDim], const float (&y)[kHeadDim]) {
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < kHeadDim; ++i) sum += x[i] * y[i];
    return sum;
}

// ---------------------------------------------------------------- for the host
inline void require(bool ok, const char* what) {
    if (ok) return;
    std::fprintf(stderr, "ladder: %s\n", what);
    std::exit(1);
}

// Memory that host and kernel reach, until the process ends.
template <class T> T* allocate(int count) {
    void* data = nullptr;
#ifdef __CUDACC__
    require(cudaMallocManaged(&data, count * sizeof(T)) == cudaSuccess, "no memory, or no GPU");
#else
    data = std::aligned_alloc(256, count * sizeof(T));
#endif
    return static_cast<T*>(data);
}

// Numbers between -2 and 2, the same in every run, of which bf16 keeps all bits.
inline bf16* random_rows(int seqlen, uint32_t seed) {
    bf16* const rows = allocate<bf16>(seqlen * kHeadDim);
    for (int i = 0; i < seqlen * kHeadDim; ++i) {
        seed = seed * 1664525u + 1013904223u;
        const float x = float(int(seed >> 24) - 128) / 64.f;
        uint32_t bits;
        std::memcpy(&bits, &x, sizeof bits);
        rows[i].bits = uint16_t(bits >> 16);
    }
    return rows;
}
inline double to_double(bf16 x) {
    const uint32_t bits = uint32_t(x.bits) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

// The definition: out = softmax(scale * q k^T) v, row by row. Returns how far the kernel's output is from it at most,
// relative to the largest number in it. Rounding to bf16 alone gives up to 2^-9 = 0.00195.
inline double max_error(const Attention& a) {
    double error = 0, largest = 0;
    for (int query = 0; query < a.seqlen; ++query) {
        std::vector<double> out(kHeadDim);
        double sum = 0;
        for (int key = 0; key <= query; ++key) {
            double product = 0;
            for (int i = 0; i < kHeadDim; ++i)
                product += to_double(a.q[query * kHeadDim + i]) * to_double(a.k[key * kHeadDim + i]);
            const double weight = std::exp(kScale * product);
            sum += weight;
            for (int i = 0; i < kHeadDim; ++i) out[i] += weight * to_double(a.v[key * kHeadDim + i]);
        }
        for (int i = 0; i < kHeadDim; ++i) {
            const double difference = std::fabs(to_double(a.out[query * kHeadDim + i]) - out[i] / sum);
            if (!(difference <= error)) error = difference;  // a NaN stays
            largest = std::fmax(largest, std::fabs(out[i] / sum));
        }
    }
    return error / largest;
}

// On the simulator a seed may be named, and when asynchronous work lands: [seed [early|late|random]].
inline void choose_schedule([[maybe_unused]] int argc, [[maybe_unused]] char** argv) {
#ifndef __CUDACC__
    if (argc > 1) sim::options.seed = uint32_t(std::atoi(argv[1]));
    const std::string landing = argc > 2 ? argv[2] : "random";
    sim::options.landing = landing == "early"  ? sim::Landing::kEarly
                           : landing == "late" ? sim::Landing::kLate
                                               : sim::Landing::kRandom;
#endif
}

// Prints the name, the error and, on the simulator, bytes of global memory read and written, bytes of shared memory
// moved, barriers and tensor-core instructions.
inline void print_line(const char* name, double error) {
    std::printf("%-20s %9.6f", name, error);
#ifndef __CUDACC__
    const sim::Counters& c = sim::counters;
    std::printf(" %12lld %10lld %12lld %9lld %7lld", (long long)(c.plain.read + c.cp_async.read),
                (long long)c.plain.written, (long long)c.shared, (long long)c.barriers, (long long)c.mma);
#endif
    std::printf("\n");
}

struct Grid { int block_queries, threads, smem_bytes; };
// Launches a block for every block_queries queries, checks its output and prints its line.
inline int run(int argc, char** argv, const char* name, void (*kernel)(Attention), Grid grid) {
    choose_schedule(argc, argv);
    const Attention a{random_rows(kSeqlen, 1),
                      random_rows(kSeqlen, 2),
                      random_rows(kSeqlen, 3),
                      allocate<bf16>(kSeqlen * kHeadDim),
                      allocate<float>(kSeqlen * kSeqlen),
                      {kSeqlen, kSeqlen, 0, 0, kMaxSeqlen, 0, make_chunks(0)},
                      kSeqlen};
    const cuda::Device device{80, 99 * 1024, 1, 1, nullptr};
    const int blocks = kSeqlen / grid.block_queries;
    const char* failure = cuda::launch(kernel, blocks, grid.threads, grid.smem_bytes, device, a);
#ifdef __CUDACC__
    if (!failure && cudaDeviceSynchronize() != cudaSuccess) failure = "the kernel failed";
#endif
    require(!failure, failure);
    const double error = max_error(a);
    print_line(name, error);
    require(error < 0.004, "this is not attention");
    return 0;
}

}  // namespace ladder
