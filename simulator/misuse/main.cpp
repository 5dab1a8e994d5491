// Makes every mistake in a process of its own and checks what is reported. Usage: test_misuse [mistake [seed landing]]
#include <signal.h>
#include <sys/wait.h>

#include <cstdio>
#include <string>

#include "misuse/misuse.h"

using namespace flash_attn::misuse;

namespace {

#if defined(__SANITIZE_THREAD__)
constexpr bool kTsan = true, kAsan = false;
#elif defined(__SANITIZE_ADDRESS__)
constexpr bool kTsan = false, kAsan = true;
#else
constexpr bool kTsan = false, kAsan = false;
#endif
constexpr int kTsanExit = 66, kAsanExit = 1, kSignalExit = 128 + SIGSEGV;
constexpr const char* kLandings[] = {"early", "late", "random"};

// Mistakes that every build finds are left to those without ThreadSanitizer, which starts slowly.
bool watched(Found found) {
    if (found == Found::kNothing) return true;
    if (found == Found::kSignal) return !kTsan && !kAsan;
    return found == Found::kRace ? kTsan : found == Found::kBounds ? kAsan : !kTsan;
}

int exit_code(Found found) {
    switch (found) {
        case Found::kRule:
            return sim::kModelError;
        case Found::kDeadlock:
            return sim::kDeadlock;
        case Found::kRace:
            return kTsanExit;
        case Found::kBounds:
            return kAsanExit;
        case Found::kSignal:
            return kSignalExit;
        default:
            return 0;
    }
}

struct Outcome {
    int code;
    std::string output;
};
Outcome outcome_of(const std::string& command) {
    FILE* pipe = popen((command + " 2>&1").c_str(), "r");
    Outcome outcome{-1, ""};
    char piece[4096];
    while (const size_t n = std::fread(piece, 1, sizeof piece, pipe)) outcome.output.append(piece, n);
    const int status = pclose(pipe);
    if (WIFEXITED(status)) outcome.code = WEXITSTATUS(status);  // a shell adds 128 to the number of a signal
    if (WIFSIGNALED(status)) outcome.code = 128 + WTERMSIG(status);
    return outcome;
}

// A report must name the mistake, and hold what a replay needs.
bool reported(const Mistake& m, const std::string& self, int landing) {
    const Outcome got = outcome_of(self + " " + m.name + " 1 " + kLandings[landing]);
    bool ok = got.code == exit_code(m.found) && got.output.find(m.says) != std::string::npos;
    if (m.found != Found::kNothing) ok &= got.output.find("seed 1, asynchronous work lands") != std::string::npos;
    if (!ok)
        std::printf("FAIL %s, landing %s: exit code %d, expected %d and '%s'\n%s\n", m.name, kLandings[landing],
                    got.code, exit_code(m.found), m.says, got.output.c_str());
    return ok;
}

const Mistake* find(const char* name) {
    for (const Mistake* table : {rules, races, bounds})
        for (const Mistake* m = table; m->name; ++m)
            if (std::string(name) == m->name) return m;
    return nullptr;
}

int run_one(int argc, char** argv) {
    const Mistake* m = find(argv[1]);
    if (!m) return std::printf("there is no mistake %s\n", argv[1]), 2;
    if (argc > 2) sim::options.seed = static_cast<uint32_t>(std::atoi(argv[2]));
    for (int i = 0; i < 3; ++i)
        if (argc > 3 && std::string(argv[3]) == kLandings[i]) sim::options.landing = static_cast<sim::Landing>(i);
    m->make();
    return 0;
}

}  // namespace

int main(int argc, char** argv) {
    if (argc > 1) return run_one(argc, argv);
    int failures = 0, count = 0;
    for (const Mistake* table : {rules, races, bounds})
        for (const Mistake* m = table; m->name; ++m) {
            if (!watched(m->found)) continue;
            bool ok = true;
            for (int landing = 0; landing < 3; ++landing) ok &= reported(*m, argv[0], landing);
            if (ok) std::printf("ok   %s\n", m->name);
            failures += !ok;
            ++count;
        }
    std::printf("%d of %d mistakes reported\n", count - failures, count);
    return failures != 0;
}
