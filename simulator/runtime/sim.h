// Host model of CUDA's execution and memory model: runs a kernel's own source on a CPU.
//
// A CUDA thread is a fiber. One seeded scheduler picks which warp of which resident block, or which asynchronous
// engine, moves next. What the hardware does asynchronously (cp.async, TMA, wgmma) happens at a moment that the
// scheduler picks between its issue and the wait that orders it. README.md says what is modelled and what is not.
//
// This header is shared by kernels, which ThreadSanitizer instruments, and the models, which it must not: it holds
// plain declarations only, since the linker would merge the two copies of an inline or standard library function.
#pragma once
#include <cstddef>
#include <cstdint>

namespace sim {

// ---------------------------------------------------------------- for code that runs kernels
enum class Landing {
    kEarly,
    kLate,
    kRandom
};  // asynchronous work happens at issue, when it is waited for, or any time

struct Options {
    uint32_t seed = 1;
    Landing landing = Landing::kRandom;
    int resident_blocks = 3;  // at a time; blocks enter in the order of their index
    // Whether red_add has to be ordered like a plain access: a deterministic kernel adds in a fixed order, and two
    // additions without an order are a data race.
    bool ordered_reds = false;
    // Whether launches that may begin before the end of the one before them are to know nothing of it.
    bool overlapping_launches = true;
};
extern Options options;  // of the launches that follow

// What kernels did since the caller last reset them (counters = {}). Traffic is bytes of global memory: of a copy only
// what is within the tensor or the valid bytes counts. Semaphores do not count, nor does what kernels read without
// csrc/cuda/ptx (parameters, lengths and tables).
struct Traffic { int64_t read, written, added; };  // added: sent to be added atomically
struct Counters {
    Traffic cp_async;
    Traffic tma;    // boxes of tensors
    Traffic bulk;   // contiguous runs
    Traffic plain;  // ptx::load_16, store_16, load and store
    Traffic red;    // ptx::red_add

    int64_t shared;    // bytes of shared memory that ptx::load_shared, store_shared and ldmatrix moved
    int64_t barriers;  // completed: a barrier of a whole block counts once
    int64_t mma;       // instructions of a warp
};
extern Counters counters;

constexpr int kModelError = 3, kDeadlock = 4;  // exit codes

struct Grid {
    const void* kernel;  // what reports call it by: the address of a function, or null
    int64_t blocks;
    int threads;
    size_t smem_bytes;
    bool overlaps;  // with the launch before it: knows nothing of what that did until grid_wait()
};
// Runs entry(copy of arg) in every thread of every block.
void launch(const Grid& grid, void (*entry)(void*), const void* arg, size_t arg_bytes);

// A rule of the programming model was broken: says where and exits.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// ---------------------------------------------------------------- for the host models of csrc/cuda/ptx
// The running thread. These never change while a fiber runs its kernel, which lets the compiler call them once.
[[gnu::const]] int thread_idx();
[[gnu::const]] int block_idx();
[[gnu::const]] char* smem();
uint32_t smem_address(const void* p);  // the 32-bit address within the shared window that descriptors encode

void check_shared(const void* p, int bytes);  // of an access that is the kernel's own: aligned to its size, and within

// Registers travel by value: arrays whose address escapes would be instrumented at every access.
struct Regs4 { uint32_t r[4]; };
struct Acc4 { float x[4]; };
enum class Element { kBFloat16, kFloat16 };

Regs4 ldmatrix_x4(const void* row, bool transpose);
void stmatrix_x4(void* row, Regs4 regs, bool transpose);
Acc4 mma_m16n8k16(Acc4 acc, Regs4 a, uint32_t b0, uint32_t b1, Element type);
float shfl_xor(float x, int mask);
bool elect_one();

void sync_threads();
bool sync_threads_or(bool predicate);
void sync_warp();
void barrier_sync(int id, int threads);
void barrier_arrive(int id, int threads);
bool barrier_sync_or(int id, int threads, bool predicate);
void fence_proxy_async();
void set_max_registers(int per_thread);

Regs4 load_16(const void* p);
void store_16(void* p, Regs4 regs);
void note_plain_load(const void* p, int bytes);  // the access itself is the kernel's own, and instrumented as such
void note_plain_store(const void* p, int bytes);
void red_add(float* p, float value);
void red_max(float* p, float value);
int32_t fetch_add(int32_t* p, int32_t value);
void red_add_16(float* p, const float (&x)[4]);
void grid_wait();
void wait_for_turn(const int32_t* counter, int32_t turn);
void pass_turn(int32_t* counter);

void cp_async(void* smem_dst, const void* global_src, int bytes, int valid_bytes);  // bytes: 4 or 16
void cp_async_commit();
void cp_async_wait(int pending);

void mbarrier_init(uint64_t* bar, int arrivals);
void mbarrier_arrive(uint64_t* bar, int expect_tx_bytes);
void mbarrier_wait(uint64_t* bar, int parity);

struct TensorMap {  // a tensor in global memory seen through boxes; dimension 0 is contiguous
    void* base;
    int rank, element_bytes;
    int64_t dim[5], stride_bytes[5];  // stride_bytes[0] is not used
    int box[5];
    int swizzle_bytes;  // 0, 32, 64 or 128
};
void tma_load(void* smem_dst, const TensorMap& map, uint64_t* bar, const int* coord, int rank);
void tma_prefetch(const TensorMap& map, const int* coord, int rank);
void tma_store(const TensorMap& map, const void* smem_src, const int* coord, int rank);
void bulk_load(void* smem_dst, const void* global_src, int bytes, uint64_t* bar);
void bulk_reduce_add(float* global_dst, const float* smem_src, int bytes);
void bulk_commit();
void bulk_wait(int pending, bool only_read);

struct Wgmma {  // one thread's operands; the 128 threads of a warpgroup must agree on everything but registers
    Element type;
    int n;
    const uint32_t* a_regs;  // four registers, or null where A comes from shared memory
    uint64_t desc_a, desc_b;
    bool a_mn_major, b_mn_major, accumulate;
    float* acc;  // n / 2 registers
};
void wgmma(const Wgmma& op);
void wgmma_fence();
void wgmma_commit();
void wgmma_wait(int pending);

}  // namespace sim
