// State shared by the runtime (scheduling, barriers) and the models (data movement). Not for kernels.
#pragma once
#include <cstdint>
#include <vector>

#include "runtime/clocks.h"
#include "runtime/fiber.h"
#include "runtime/sim.h"

namespace sim {

constexpr int kWarpLanes = 32;
constexpr int kMaxWarps = 32;

struct Block;
struct Warp;

// ---------------------------------------------------------------- state of a thread
struct CpAsync {
    void* dst;
    const void* src;
    int bytes, valid_bytes;
    uint64_t group;
    const void* pc;
};
// Copies in flight, oldest first: items[begin, end).
struct CpAsyncQueue {
    CpAsync* items;
    int begin, end, capacity;
    uint64_t open_group;  // of the copies being issued; those before it are committed
};

// Bulk stores that are waited for together. Each operation reads shared memory first and writes global memory later.
struct StoreGroup {
    uint64_t issued, read, written;
    SyncPoint read_done, write_done;
};
constexpr int kStoreGroups = 32;  // of one thread, in flight

// What a thread has given to the asynchronous proxy.
struct ProxyState {
    uint64_t wgmma_issued, wgmma_groups;
    uint64_t wgmma_group_end[64];  // ring: wgmma_issued at each commit
    char register_fence[8];        // sync objects, ring by number of wgmma.fence executed
    uint64_t register_fences;
    StoreGroup stores[kStoreGroups];  // ring
    uint64_t store_group;             // the open one
};

struct Thread {
    Fiber fiber;
    Clock clock = nullptr;
    Block* block = nullptr;
    Warp* warp = nullptr;
    int index = 0, lane = 0;
    bool done = true;

    // Blocked while *wait_word == wait_value, or until *turn_counter >= turn, unless these are null.
    const uint64_t* wait_word = nullptr;
    uint64_t wait_value = 0;
    const int32_t* turn_counter = nullptr;
    int32_t turn = 0;
    const char* wait_what = "";
    const void* wait_object = nullptr;

    CpAsyncQueue copies{};
    char proxy_fence = 0;  // sync object
    ProxyState proxy{};
};

// ---------------------------------------------------------------- state of a warp
// Operands and results of the instruction that the lanes are meeting in. Results are read by every lane before all of
// them can have arrived at the next instruction, so one place is enough; operands are consumed when the last arrives.
struct CollectiveBuffer {
    void* address[kWarpLanes];
    Regs4 regs[kWarpLanes];
    float value[kWarpLanes], exchanged[kWarpLanes];
    int mask[kWarpLanes];
    int elected;
    alignas(64) uint32_t a[16][8];  // mma: [row][pair of k]
    alignas(64) uint32_t b[8][8];   // [pair of k][column]
    alignas(64) float c[16][8];
};

struct Warp {
    Block* block = nullptr;
    int index = 0;
    uint32_t priority = 0;
    Clock async_view = nullptr;
    const char* what = nullptr;  // the instruction that the lanes are meeting in
    int arrived = 0;
    uint64_t generation = 0;  // collectives completed
    Generations sync{};       // of those that are barriers
    int lane_step = 1;        // the lane that runs after lane l is l + lane_step
    int patience = 0;         // collectives until another warp may run
    int max_registers = 0;    // 0 until setmaxnreg
    CollectiveBuffer buffer;
    Thread lanes[kWarpLanes];
};

// ---------------------------------------------------------------- state of a block
struct NamedBarrier {
    uint64_t generation;
    int arrived, expected;
    const char* kind;
    bool any[4];  // bar.red.or, by generation
    uint8_t arrived_of_warp[kMaxWarps];
    Generations sync;
};

struct Mbarrier {
    uint64_t* word;
    uint64_t generation;
    int count, pending;
    int64_t tx_bytes;
    Generations sync;
};
constexpr int kMaxMbarriers = 64;

// A TMA or bulk operation in flight.
struct AsyncCopy {
    enum Kind { kTmaLoad, kBulkLoad, kTmaStore, kBulkReduce } kind;
    bool is_store() const { return kind >= kTmaStore; }
    bool has_read = false;  // a store: shared memory has been read, into data
    uint32_t smem_address = 0;
    int bytes = 0;    // of shared memory
    TensorMap map{};  // TMA
    int coord[5] = {};
    char* global = nullptr;       // bulk
    uint64_t* bar = nullptr;      // loads
    StoreGroup* group = nullptr;  // stores
    const void* pc = nullptr;
    Clock clock = nullptr;
    std::vector<char> data;
};

struct PendingWgmma {
    Wgmma op;
    const void* pc;
    int arrived;
    float* acc[128];
    const uint32_t* a_regs[128];
    char* register_fence[128];  // what the thread's last wgmma.fence published
};
constexpr int kMaxWgmmaInFlight = 32;
struct Warpgroup {
    uint64_t issued, performed;              // in order, over the life of the block; issued: by at least one thread
    PendingWgmma ops[kMaxWgmmaInFlight];     // ring, as the following
    char issued_view[kMaxWgmmaInFlight][4];  // async view of each issuing warp
    SyncPoint done[kMaxWgmmaInFlight][4];    // per warp: waiting tells a warp about its own quarter only
    Clock smem_port[4], register_port[4];    // a warp's quarter of a product relies on that warp only
};

// A place for one block at a time: threads, fibers and clocks are kept from block to block and launch to launch.
struct Block {
    bool live = false;
    int64_t index = 0;
    int num_warps = 0, live_threads = 0;
    std::vector<Warp*> warps;  // num_warps of them are in use
    NamedBarrier named[16];
    Mbarrier mbarriers[kMaxMbarriers];
    int num_mbarriers = 0;
    std::vector<AsyncCopy> copies;
    std::vector<Warpgroup*> warpgroups;  // made by the first wgmma
    bool async_proxy = false;            // something has used async views
    char* region = nullptr;              // shared memory, with guard pages around it
    size_t region_bytes = 0;
    char* smem = nullptr;
    size_t smem_bytes = 0;
    // Orders the blocks of this place: block n starts from one, and ends into the other.
    char boundary[2];
    int phase = 0;
};

extern Thread* self;         // null while the scheduler runs
extern const Block* acting;  // whose asynchronous work is being performed, or that is ending; null if neither
struct ActingFor {
    const Block* previous = acting;
    explicit ActingFor(const Block& b) { acting = &b; }
    ~ActingFor() { acting = previous; }
};

struct Launch : Grid {
    void (*entry)(void*);
    void* arg;
    int64_t next_block;
    const char* previous_end;  // sync object: what the launch before this one did, if this one overlaps with it
    std::vector<Block*> resident;
};
extern Launch current_launch;
extern Clock launch_start;  // knows what the launch may rely on from its beginning

// ---------------------------------------------------------------- scheduling
uint32_t random_below(uint32_t n);
void block_while_equal(const uint64_t& word, uint64_t value, const char* what, const void* object = nullptr);
void block_until_turn(const int32_t* counter, int32_t turn, const char* what);
void switch_to_scheduler();

// A whole-warp instruction: true in the lane that arrives last, which then performs it for all and calls
// complete_collective. This orders no memory, as on the device: lanes that communicate through memory need a barrier.
// `what` is the same pointer wherever it names the same instruction.
[[noreturn]] void fail_divergent(const char* what, const char* other);
inline bool arrive_last(Warp& w, const char* what) {
    if (w.arrived == 0)
        w.what = what;
    else if (w.what != what)
        fail_divergent(w.what, what);
    if (++w.arrived == kWarpLanes) return true;
    block_while_equal(w.generation, w.generation, what);
    return false;
}
inline void complete_collective(Warp& w) {
    w.arrived = 0;
    ++w.generation;
    if (--w.patience <= 0) switch_to_scheduler();
}

// ---------------------------------------------------------------- synchronisation
void use_async_proxy(Block& block);  // called before anything touches async views
void publish(SyncPoint& s);          // by the running thread, with its warp's async view
void absorb(SyncPoint& s);
void publish_completion(SyncPoint& s);  // by finished asynchronous work
void deliver_bytes(Block& block, uint64_t* bar, int bytes, const void* pc);

// ---------------------------------------------------------------- asynchronous work
bool perform_something();  // one piece of pending work, chosen at random; false if there is none
void land_some_copies();   // cp.async of one warp
AsyncCopy& issue_copy(AsyncCopy::Kind kind, const void* smem, int bytes, const void* pc);  // by the running thread
void perform_early();                                // what has just been issued, if work lands early
void perform_load(Block& block, AsyncCopy& copy);    // tma.cpp: moves the data of a load ...
void read_for_store(Block& block, AsyncCopy& copy);  // ... and of a store: from shared memory to copy.data, and on
void write_store(AsyncCopy& copy);
void perform_wgmma(Block& block, Warpgroup& group, PendingWgmma& op, int slot);  // wgmma.cpp

// ---------------------------------------------------------------- memory
uint32_t swizzled(uint32_t address, int swizzle_bytes);          // 0: as it is
char* smem_at(const Block& block, uint32_t address, int bytes);  // the inverse of smem_address
void check_global(const char* what, const void* p, int bytes, int alignment);
void copy_16(void* dst, const void* src);
void place_smem(Block& block, size_t bytes);
void fill_smem(Block& block);
void check_smem_margins(const Block& block);

// ---------------------------------------------------------------- end of a thread and of a block, reports
void check_thread_exit(const Thread& t);
void check_block_exit(Block& block);
const char* thread_name(const Thread& t);
[[noreturn]] void report_deadlock();
void install_reports();

}  // namespace sim
