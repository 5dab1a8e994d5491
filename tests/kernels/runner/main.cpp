// Runs cases on the simulator. See usage() and tests/kernels/list_cases.py.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iostream>
#include <string>
#include <vector>
#include "runner/check.h"

namespace flash_attn::runner {
namespace {

struct Options {
    Plan plan;
    uint32_t seed = 1;
    std::string landing = "random", table;
    std::vector<std::string> lines;
    int shard = 0, num_shards = 1;
    bool stops = false;
};

[[noreturn]] void usage() {
    std::fputs(
        "usage: run_case [options] 'line of a case' ...\n"
        "       run_case [options] --table FILE     one line per case, - for the standard input\n"
        "  --seed N                          of the schedule (1)\n"
        "  --landing early|late|random|all   when asynchronous work happens (random; after --table, all)\n"
        "  --pass fwd|bwd|attn_probs         only this pass (all); bwd needs fwd and runs it\n"
        "  --shard I/N                       every Nth case, from the Ith on, counted from 0\n"
        "  --stop                            at the first case that fails\n",
        stderr);
    std::exit(2);
}

void choose_pass(Plan& plan, const std::string& pass) {
    if (pass != "fwd" && pass != "bwd" && pass != "attn_probs") usage();
    plan.backward = pass == "bwd";
    plan.attn_probs = pass == "attn_probs";
}

Options parse(int argc, char** argv) {
    Options options;
    for (int i = 1; i < argc; ++i) {
        const std::string word = argv[i];
        if (word.rfind("--", 0) != 0) {
            options.lines.push_back(word);
            continue;
        }
        if (word == "--stop") {
            options.stops = true;
            continue;
        }
        if (++i == argc) usage();
        const char* value = argv[i];
        if (word == "--seed") {
            options.seed = uint32_t(std::strtoul(value, nullptr, 10));
        } else if (word == "--landing") {
            options.landing = value;
        } else if (word == "--pass") {
            choose_pass(options.plan, value);
        } else if (word == "--table") {
            options.table = value, options.landing = "all";
        } else if (word == "--shard") {
            if (std::sscanf(value, "%d/%d", &options.shard, &options.num_shards) != 2) usage();
        } else {
            usage();
        }
    }
    if (options.lines.empty() == options.table.empty()) usage();
    return options;
}

void plan_schedules(Options& options) {
    const std::vector<std::string> names{"early", "late", "random"};
    const auto found = std::find(names.begin(), names.end(), options.landing);
    if (found != names.end()) {
        options.plan.schedules = {{options.seed, Landing(found - names.begin())}};
    } else if (options.landing == "all") {
        for (int i = 0; i < 3; ++i) options.plan.schedules.push_back({options.seed + uint32_t(i), Landing(2 - i)});
    } else {
        usage();
    }
}

void read_table(Options& options) {
    std::ifstream file;
    if (options.table != "-") file.open(options.table);
    std::istream& input = options.table == "-" ? std::cin : file;
    if (!input) usage();
    int number = 0;
    for (std::string line; std::getline(input, line);)
        if (number++ % options.num_shards == options.shard) options.lines.push_back(line);
}

// The line is printed before anything can fail.
bool run_line(const Options& options, const std::string& line, bool prints) {
    std::printf("%s", line.c_str());
    std::printf(prints ? "\n" : " ... ");
    std::fflush(stdout);
    Report report(prints);
    const auto start = std::chrono::steady_clock::now();
    check_case(parse_case(line), options.plan, report);
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    std::printf("%s %.2f s\n", report.failed() ? "FAILED" : "ok", seconds);
    if (!prints)
        for (const std::string& failure : report.failures()) std::printf("  WRONG %s\n", failure.c_str());
    return !report.failed();
}

int run(int argc, char** argv) {
    Options options = parse(argc, argv);
    const bool prints = options.table.empty();
    plan_schedules(options);
    if (!options.table.empty()) read_table(options);
    int failed = 0;
    for (const std::string& line : options.lines) {
        failed += !run_line(options, line, prints);
        if (failed && options.stops) return 1;
    }
    std::printf("%zu cases under %zu schedules, %d failed\n", options.lines.size(), options.plan.schedules.size(),
                failed);
    return failed ? 1 : 0;
}

}  // namespace

void check_case(const Case& c, const Plan& plan, Report& report) {
    if (c.check == "reference" || c.check == "large") return check_reference(c, plan, report);
    if (c.check == "batch") return check_batch(c, plan, report);
    if (c.check == "invalid_lengths") return check_invalid_lengths(c, plan, report);
    if (c.check == "nonfinite") return check_nonfinite(c, plan, report);
    if (c.check == "hidden") return check_hidden(c, plan, report);
    if (c.check == "marked") return check_marked(c, plan, report);
    if (c.check == "shards") return check_shards(c, plan, report);
    report.fail("no such check: " + c.check);
}

}  // namespace flash_attn::runner

int main(int argc, char** argv) { return flash_attn::runner::run(argc, argv); }
