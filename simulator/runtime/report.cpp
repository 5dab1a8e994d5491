// Reports of errors, always with what a replay needs: kernel, block, seed and landing.
#include <cxxabi.h>
#include <dlfcn.h>
#include <signal.h>
#include <unistd.h>

#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <map>
#include <string>

#include "runtime/runtime.h"
#if defined(SIM_TSAN) || defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace sim {
namespace {

const char* landing_name() {
    if (options.landing == Landing::kEarly) return "early";
    return options.landing == Landing::kLate ? "late" : "random";
}

// Demangled. Where the executable was linked without -rdynamic, and for kernels in unnamed namespaces, what addr2line
// turns into a name.
std::string kernel_name() {
    Dl_info info;
    if (!current_launch.kernel || !dladdr(current_launch.kernel, &info)) return "kernel";
    if (info.dli_sname && info.dli_saddr == current_launch.kernel) {
        int status;
        const char* name = abi::__cxa_demangle(info.dli_sname, nullptr, nullptr, &status);
        return status == 0 ? name : info.dli_sname;
    }
    const auto offset = static_cast<const char*>(current_launch.kernel) - static_cast<const char*>(info.dli_fbase);
    char text[64];
    std::snprintf(text, sizeof text, "kernel at +0x%tx of ", offset);
    return std::string(text) + info.dli_fname;
}

void print_position(FILE* to) {
    std::fprintf(to, "sim: %s: ", kernel_name().c_str());
    if (self)
        std::fprintf(to, "block %ld warp %d lane %d, ", long(self->block->index), self->warp->index, self->lane);
    else if (acting)
        std::fprintf(to, "block %ld, ", long(acting->index));
    std::fprintf(to, "seed %u, asynchronous work lands %s, %d resident blocks", options.seed, landing_name(),
                 options.resident_blocks);
}

// A sanitizer that found something is about to end the process.
[[maybe_unused]] void on_sanitizer_report() {
    if (!current_launch.kernel) return;
    print_position(stderr);
    std::fprintf(stderr, ": this is where a sanitizer found something\n");
}

// A wild address, or a fiber's stack that ran into its guard page. Sanitizers have handlers of their own.
[[maybe_unused]] void on_signal(int signal) {
    print_position(stderr);
    std::fprintf(stderr, ": %s\n", strsignal(signal));
    ::signal(signal, SIG_DFL);
    raise(signal);
}

[[maybe_unused]] void install_signal_handler() {
    static char stack[1 << 16];
    const stack_t alternative{stack, 0, sizeof stack};
    sigaltstack(&alternative, nullptr);
    struct sigaction action{};
    action.sa_handler = on_signal;
    action.sa_flags = SA_ONSTACK;
    for (int signal : {SIGSEGV, SIGBUS, SIGFPE}) sigaction(signal, &action, nullptr);
}

}  // namespace
#ifdef __SANITIZE_ADDRESS__
// UBSan comes as a library of its own, which calls this.
extern "C" void __ubsan_on_report() { on_sanitizer_report(); }
#endif
namespace {

// What a thread waits for, in words; equal for lanes that wait for the same.
std::string waits_for(const Block& b, const Thread& t) {
    char text[200];
    if (t.turn_counter) {
        std::snprintf(text, sizeof text, "%s: the counter is %d, it waits for %d", t.wait_what, *t.turn_counter,
                      t.turn);
        return text;
    }
    for (int i = 0; i < b.num_mbarriers; ++i) {
        const Mbarrier& m = b.mbarriers[i];
        if (&m != t.wait_object) continue;
        std::snprintf(text, sizeof text, "%s: smem+%ld, phase %d, %d of %d arrivals missing, %ld bytes outstanding",
                      t.wait_what, long(reinterpret_cast<char*>(m.word) - b.smem), int(m.generation & 1), m.pending,
                      m.count, long(m.tx_bytes));
        return text;
    }
    for (int i = 0; i < 16; ++i) {
        if (&b.named[i] != t.wait_object) continue;
        std::snprintf(text, sizeof text, "%s: barrier %d, %d of %d threads arrived", t.wait_what, i, b.named[i].arrived,
                      b.named[i].expected);
        return text;
    }
    return t.wait_what;
}

void print_waiting(const Block& b) {
    std::map<std::pair<int, std::string>, int> lanes;
    for (int w = 0; w < b.num_warps; ++w)
        for (const Thread& t : b.warps[w]->lanes)
            if (!t.done) ++lanes[{w, waits_for(b, t)}];
    for (const auto& [who, count] : lanes)
        std::fprintf(stderr, "  block %ld warp %2d: %2d lanes in %s\n", long(b.index), who.first, count,
                     who.second.c_str());
}

[[noreturn]] void leave_process(int code) {
    std::fflush(stdout);
    _exit(code);
}

}  // namespace

const char* thread_name(const Thread& t) {
    static char name[64];
    std::snprintf(name, sizeof name, "block %ld warp %d lane %d", long(t.block->index), t.warp->index, t.lane);
    return name;
}

void install_reports() {
#if defined(SIM_TSAN) || defined(__SANITIZE_ADDRESS__)
    __sanitizer_set_death_callback(on_sanitizer_report);
#else
    install_signal_handler();
#endif
}

[[noreturn]] void fail(const char* format, ...) {
    become(scheduler_clock());
    print_position(stderr);
    std::fprintf(stderr, ": ");
    va_list args;
    va_start(args, format);
    std::vfprintf(stderr, format, args);
    va_end(args);
    std::fprintf(stderr, "\n");
    leave_process(kModelError);
}

[[noreturn]] void report_deadlock() {
    print_position(stderr);
    std::fprintf(stderr, ": deadlock; nothing can move but by\n");
    for (const Block* b : current_launch.resident)
        if (b->live) print_waiting(*b);
    if (current_launch.next_block < current_launch.blocks)
        std::fprintf(stderr, "  blocks from %ld on have not started: no resident block has ended\n",
                     long(current_launch.next_block));
    leave_process(kDeadlock);
}

}  // namespace sim
