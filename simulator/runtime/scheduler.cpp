// Launches: places for blocks, their fibers, and which warp runs next. Neither the runtime nor the models are compiled
// with -fsanitize=thread: it must see what the modelled threads do, not how the models do it.
#include <utility>
#include "runtime/runtime.h"

namespace sim {

Options options;
Counters counters;
Thread* self;
const Block* acting;
Launch current_launch;
Clock launch_start;

namespace {

Fiber launch_fiber;
uint64_t random_state;
// Kept to the end, and so no leak. Launches that overlap have places of their own: threads, which are kept, would
// remember what they did in the other.
std::vector<Block*>& places = *new std::vector<Block*>;
std::vector<Block*>& other_places = *new std::vector<Block*>;

bool runnable(const Thread& t) {
    if (t.wait_word) return *t.wait_word != t.wait_value;
    if (t.done) return false;
    return !t.turn_counter || *t.turn_counter >= t.turn;
}

void switch_to(Fiber& from, Thread& to) {
    self = &to;
    become(to.clock);
    switch_fiber(from, to.fiber);
}

// Continues with the next lane of the warp that can run, without a detour to the scheduler: lanes run one after another
// to the instruction that they meet in.
void leave() {
    Thread& me = *self;
    Warp& w = *me.warp;
    for (int i = 1, lane = me.lane; i < kWarpLanes; ++i) {
        lane = (lane + w.lane_step) % kWarpLanes;
        if (runnable(w.lanes[lane])) return switch_to(me.fiber, w.lanes[lane]);
    }
    switch_to_scheduler();
}

void thread_main() {
    begin_fiber();
    for (;;) {
        Thread& me = *self;
        acquire(&me.block->boundary[me.block->phase]);
        current_launch.entry(current_launch.arg);
        check_thread_exit(me);
        release(&me.block->boundary[me.block->phase ^ 1]);
        me.done = true;
        --me.block->live_threads;
        leave();
    }
}

// ---------------------------------------------------------------- what a launch knows
// What is known when a launch begins: all that the host knows, which waits for every launch, or, if it overlaps with
// the launch before it, what was known when that began.
void begin(bool overlaps) {
    begin_launch_clock();
    if (overlaps && launch_start) {
        std::swap(places, other_places);
        return;
    }
    if (launch_start) destroy_clock(launch_start);
    launch_start = create_clock("start of a launch");
}

// ---------------------------------------------------------------- places
Warp* make_warp(Block& block, int index) {
    Warp* w = new Warp;
    w->block = &block;
    w->index = index;
    for (int lane = 0; lane < kWarpLanes; ++lane) {
        Thread& t = w->lanes[lane];
        t.block = &block;
        t.warp = w;
        t.lane = lane;
        t.index = index * kWarpLanes + lane;
        const char* const name = thread_name(t);
        AsClock start(launch_start);
        t.clock = create_clock(name);
        create_fiber(t.fiber, thread_main);
    }
    return w;
}

void prepare_place(Block& b) {
    b.num_warps = current_launch.threads / kWarpLanes;
    while (static_cast<int>(b.warps.size()) < b.num_warps) b.warps.push_back(make_warp(b, int(b.warps.size())));
    AsClock start(launch_start);
    place_smem(b, current_launch.smem_bytes);
    release(&b.boundary[b.phase]);
}

void reset_warp(Warp& w) {
    w.priority = random_below(1 << 20);
    w.arrived = 0;
    w.max_registers = 0;
    for (Thread& t : w.lanes) {
        t.done = false;
#ifdef SIM_TSAN
        name_clock(t.clock, thread_name(t));
#endif
    }
}

void enter_block(Block& b) {
    b.index = current_launch.next_block++;
    b.live = true;
    b.live_threads = current_launch.threads;
    fill_smem(b);
    for (NamedBarrier& barrier : b.named) barrier = {};
    b.num_mbarriers = 0;
    for (Warpgroup* g : b.warpgroups) g->issued = g->performed = 0;
    for (int w = 0; w < b.num_warps; ++w) reset_warp(*b.warps[w]);
}

void retire_block(Block& b) {
    check_block_exit(b);
    if (b.async_proxy)  // now, since the next block here may have fewer warps
        for (int w = 0; w < b.num_warps; ++w)
            for (Thread& t : b.warps[w]->lanes) t.proxy = {};
    b.async_proxy = false;
    b.phase ^= 1;
    b.live = false;
}

// ---------------------------------------------------------------- the schedule
bool can_run(const Warp& w) {
    for (const Thread& t : w.lanes)
        if (runnable(t)) return true;
    return false;
}

// The warp of the highest priority that can run, or null.
Warp* choose_warp() {
    Warp* best = nullptr;
    for (Block* b : current_launch.resident) {
        if (!b->live) continue;
        for (int w = 0; w < b->num_warps; ++w) {
            Warp& warp = *b->warps[w];
            if ((!best || warp.priority > best->priority) && can_run(warp)) best = &warp;
        }
    }
    return best;
}

// Until none of its lanes can run, or its patience ends. Lanes run in an order that changes from time to time, and so
// do the priorities of warps: this reaches states that a fair scheduler does not, such as one warp a whole iteration
// ahead of the others, in a few seeds.
void run_warp(Warp& w) {
    w.lane_step = int(random_below(16)) * 2 + 1;
    w.patience = int(random_below(64)) + 1;
    const int first = int(random_below(kWarpLanes));
    for (int i = 0; i < kWarpLanes; ++i) {
        Thread& t = w.lanes[(first + i) % kWarpLanes];
        if (!runnable(t)) continue;
        switch_to(launch_fiber, t);
        break;
    }
    if (random_below(8) == 0) w.priority = random_below(1 << 20);
}

void run_blocks() {
    for (;;) {
        bool any_live = false;
        for (Block* b : current_launch.resident) {
            if (b->live && b->live_threads == 0) retire_block(*b);
            if (!b->live && current_launch.next_block < current_launch.blocks) enter_block(*b);
            any_live |= b->live;
        }
        if (!any_live) return;
        if (options.landing == Landing::kRandom && random_below(3) == 0) {
            perform_something();
            land_some_copies();
        }
        if (Warp* w = choose_warp())
            run_warp(*w);
        else if (!perform_something())
            report_deadlock();
    }
}

}  // namespace

uint32_t random_below(uint32_t n) {
    random_state = random_state * 6364136223846793005ull + 1442695040888963407ull;
    return static_cast<uint32_t>((random_state >> 33) % n);
}

void switch_to_scheduler() {
    Fiber& mine = self->fiber;
    self = nullptr;
    become(scheduler_clock());
    switch_fiber(mine, launch_fiber);
}

void block_while_equal(const uint64_t& word, uint64_t value, const char* what, const void* object) {
    Thread& me = *self;
    me.wait_word = &word;
    me.wait_value = value;
    me.wait_what = what;
    me.wait_object = object;
    while (word == value) leave();
    me.wait_word = nullptr;
}

void block_until_turn(const int32_t* counter, int32_t turn, const char* what) {
    Thread& me = *self;
    me.turn_counter = counter;
    me.turn = turn;
    me.wait_what = what;
    while (*static_cast<const volatile int32_t*>(counter) < turn) leave();
    me.turn_counter = nullptr;
}

void fail_divergent(const char* what, const char* other) {
    fail("lanes of one warp are in different instructions: %s and %s", what, other);
}

namespace {

// Sync objects, one per launch, reused after many launches: what a launch has done, and what it has waited for.
constexpr int kEnds = 4096;
char ends[kEnds];
int last_end;
void end() {
    for (Block* b : current_launch.resident) acquire(&b->boundary[b->phase]);
    last_end = (last_end + 1) % kEnds;
    AsClock before(launch_start);
    const Clock clock = create_clock("end of a launch");
    {
        AsClock as(clock);
        for (Block* b : current_launch.resident) acquire(&b->boundary[b->phase]);
        release(&ends[last_end]);
    }
    destroy_clock(clock);
}

// Written by code that is not instrumented: kernels that overlap may not know of what the host did last.
void* copy_argument(const void* arg, size_t bytes) {
    alignas(64) static char copy[4096];
    if (bytes > sizeof copy) fail("%zu bytes of parameters, of %zu", bytes, sizeof copy);
    for (size_t i = 0; i < bytes; ++i) static_cast<volatile char*>(copy)[i] = static_cast<const char*>(arg)[i];
    return copy;
}

}  // namespace

void launch(const Grid& grid, void (*entry)(void*), const void* arg, size_t arg_bytes) {
    const auto [kernel, blocks, threads, smem_bytes, may_overlap] = grid;
    const bool overlaps = may_overlap && options.overlapping_launches;
    current_launch = {grid, entry, copy_argument(arg, arg_bytes), 0, overlaps ? &ends[last_end] : nullptr, {}};
    random_state = options.seed * 0x9E3779B97F4A7C15ull + 1;
    begin(overlaps);
    install_reports();
    if (threads < kWarpLanes || threads > kWarpLanes * kMaxWarps || threads % kWarpLanes)
        fail("a block of %d threads is not 1 to %d whole warps", threads, kMaxWarps);
    if (options.resident_blocks < 1) fail("options.resident_blocks is %d", options.resident_blocks);
    // Under ThreadSanitizer, kernels that overlap have one block at a time: what it may know is the same, and the
    // sanitizer is slower the more threads there are.
    const int64_t at_a_time = kDetectsRaces && overlaps ? 1 : options.resident_blocks;
    const int64_t resident = blocks < at_a_time ? blocks : at_a_time;
    while (static_cast<int64_t>(places.size()) < resident) places.push_back(new Block);
    current_launch.resident.assign(places.begin(), places.begin() + resident);
    for (Block* b : current_launch.resident) prepare_place(*b);
    run_blocks();
    end();
    current_launch.kernel = nullptr;
}

void grid_wait() {
    if (!current_launch.previous_end) return;
    use_async_proxy(*self->block);
    acquire(current_launch.previous_end);
    AsClock view(self->warp->async_view);
    acquire(current_launch.previous_end);
}

// ---------------------------------------------------------------- the running thread
int thread_idx() { return self->index; }
int block_idx() { return static_cast<int>(self->block->index); }
char* smem() { return self->block->smem; }

}  // namespace sim
