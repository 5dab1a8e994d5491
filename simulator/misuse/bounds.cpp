// Accesses outside of tensors and of shared memory.
#include "cuda/ptx/cp_async.h"
#include "cuda/ptx/global.h"
#include "cuda/ptx/mbarrier.h"
#include "cuda/ptx/shared.h"
#include "cuda/ptx/sync.h"
#include "cuda/ptx/tma.h"
#include "misuse/misuse.h"

namespace flash_attn::misuse {
namespace {

// ---------------------------------------------------------------- global memory
// Thread t touches 16 bytes (or one number) at first + t: the tensor has 31.
FA_KERNEL(32, 1) cp_async_kernel(const char* in, int valid_bytes) {
    ptx::cp_async_16(ptx::smem() + 16 * ptx::thread_idx(), in + 16 * ptx::thread_idx(), valid_bytes);
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
}
FA_KERNEL(32, 1) load_16_kernel(const char* in) {
    uint32_t r[4];
    ptx::load_16(r, in + 16 * ptx::thread_idx());
    ptx::store_shared_16(ptx::smem() + 16 * ptx::thread_idx(), r);
}
FA_KERNEL(32, 1) store_16_kernel(char* out) {
    const uint32_t r[4] = {};
    ptx::store_16(out + 16 * ptx::thread_idx(), r);
}
template <class T> FA_KERNEL(32, 1) load_store_kernel(T* p) {
    ptx::store(p + ptx::thread_idx(), ptx::load(p + ptx::thread_idx()));
}
FA_KERNEL(32, 1) red_add_kernel(float* p) { ptx::red_add(p + ptx::thread_idx(), 1.f); }
FA_KERNEL(32, 1) fetch_add_kernel(int32_t* p) { ptx::fetch_add(p + ptx::thread_idx(), 1); }
FA_KERNEL(32, 1) bulk_load_kernel(const float* in, int bytes) {
    const ptx::SmemPtr bar = ptx::smem();
    if (ptx::thread_idx() == 0) {
        ptx::mbarrier_init(bar, 1);
        ptx::fence_mbarrier_init();
        ptx::mbarrier_arrive_expect_tx(bar, bytes);
        ptx::bulk_load(ptx::smem() + 16, in, bytes, bar);
    }
    ptx::sync_threads();
    ptx::mbarrier_wait(bar, 0);
}

FA_KERNEL(32, 1) overflow_kernel(int32_t* p) { ptx::store(p, ptx::load(p) + ptx::thread_idx()); }
FA_KERNEL(32, 1) wild_address_kernel(int32_t* p) { *p = 0; }

// Memory of exactly this size, with more in front of and behind it that is out of bounds.
template <class T> struct Exact {
    T* data;
    explicit Exact(int count) : data(static_cast<T*>(std::malloc(static_cast<size_t>(count) * sizeof(T)))) {
        for (int i = 0; i < count; ++i) data[i] = T{};
    }
    ~Exact() { std::free(data); }
};

template <int kBytes, int kValid> void cp_async() {
    Exact<char> in(kBytes);
    run(cp_async_kernel, 1, 32, 512, in.data, kValid);
}
template <void (*kKernel)(const char*)> void chunks_read() {
    Exact<char> in(31 * 16);
    run(kKernel, 1, 32, 512, in.data);
}
void chunks_written() {
    Exact<char> out(31 * 16);
    run(store_16_kernel, 1, 32, 512, out.data);
}
template <class T> void numbers() {
    Exact<T> p(31);
    run(load_store_kernel<T>, 1, 32, 0, p.data);
}
void red_add() {
    Exact<float> p(31);
    run(red_add_kernel, 1, 32, 0, p.data);
}
void fetch_add() {
    Exact<int32_t> p(31);
    run(fetch_add_kernel, 1, 32, 0, p.data);
}
void bulk_load() {
    Exact<float> in(60);
    run(bulk_load_kernel, 1, 32, 512, in.data, 256);
}

void overflow() {
    Buffer<int32_t> p(1);
    p[0] = INT32_MAX;
    run(overflow_kernel, 1, 32, 0, p.data);
}
void wild_address() { run(wild_address_kernel, 1, 32, 0, reinterpret_cast<int32_t*>(64)); }

// ---------------------------------------------------------------- shared memory
FA_KERNEL(32, 1) shared_store_kernel(int first) { ptx::smem()[first + ptx::thread_idx()] = 1; }
FA_KERNEL(32, 1) shared_load_kernel(int first, char* out) {
    out[ptx::thread_idx()] = ptx::smem()[first + ptx::thread_idx()];
}

template <int kFirst> void shared_store() { run(shared_store_kernel, 1, 32, 100, kFirst); }
void shared_load() {
    Buffer<char> out(32);
    run(shared_load_kernel, 1, 32, 100, 69, out.data);
}

#ifdef __SANITIZE_ADDRESS__
constexpr Found kMargin = Found::kBounds;
constexpr char kMarginText[] = "AddressSanitizer";
#else
constexpr Found kMargin = Found::kRule;
constexpr char kMarginText[] = "outside of the block's 100 bytes of shared memory";
#endif
constexpr char kHeap[] = "AddressSanitizer: heap-buffer-overflow";

}  // namespace

const Mistake bounds[] = {
    {"cp_async_of_32_chunks", Found::kNothing, "", cp_async<32 * 16, 16>},
    {"cp_async_of_the_last_4_bytes", Found::kNothing, "", cp_async<31 * 16 + 4, 4>},
    {"cp_async_outside", Found::kBounds, "cp_async_kernel", cp_async<31 * 16, 16>},
    {"cp_async_partly_outside", Found::kBounds, kHeap, cp_async<31 * 16 + 4, 5>},
    {"cp_async_of_nothing_from_outside", Found::kBounds, kHeap, cp_async<31 * 16, 0>},
    {"load_16_outside", Found::kBounds, kHeap, chunks_read<load_16_kernel>},
    {"store_16_outside", Found::kBounds, kHeap, chunks_written},
    {"load_of_2_bytes_outside", Found::kBounds, kHeap, numbers<bf16>},
    {"load_of_4_bytes_outside", Found::kBounds, kHeap, numbers<float>},
    {"load_of_8_bytes_outside", Found::kBounds, kHeap, numbers<int64_t>},
    {"red_add_outside", Found::kBounds, kHeap, red_add},
    {"fetch_add_outside", Found::kBounds, kHeap, fetch_add},
    {"bulk_load_outside", Found::kBounds, kHeap, bulk_load},
    {"overflow", Found::kBounds, "signed integer overflow", overflow},
    {"wild_address", Found::kSignal, "Segmentation fault", wild_address},
    {"shared_store_within", Found::kNothing, "", shared_store<68>},
    {"shared_store_behind", kMargin, kMarginText, shared_store<69>},
    {"shared_store_in_front", kMargin, kMarginText, shared_store<-1>},
    {"shared_load_behind", Found::kBounds, "AddressSanitizer", shared_load},
    {nullptr, Found::kNothing, nullptr, nullptr},
};

}  // namespace flash_attn::misuse
