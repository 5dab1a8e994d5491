// Runs the tests of the primitives: all, or the groups that are named. On the simulator a seed and a landing may be
// named too: test_primitives [group ...] [seed [early|late|random]]. With --list it prints the names of the groups.
//
// On a GPU a kernel that fails takes its process down, so that each group should have a process of its own.
#include <algorithm>
#include <iterator>
#include <string>
#include <vector>
#include "primitives.h"

using namespace flash_attn::primitives;

namespace {

struct Group {
    std::string name;
    void (*test)();
};
const Group groups[] = {{"memory", test_memory}, {"warp", test_warp},      {"numbers", test_numbers},
                        {"sm90", test_sm90},     {"rows", test_rows_sm90}, {"tiles", test_tiles_sm90},
                        {"wgmma", test_wgmma}};

bool choose_schedule([[maybe_unused]] const std::string& word) {
#ifndef __CUDACC__
    const bool is_landing = word == "early" || word == "late" || word == "random";
    if (is_landing)
        sim::options.landing = word == "early"  ? sim::Landing::kEarly
                               : word == "late" ? sim::Landing::kLate
                                                : sim::Landing::kRandom;
    const bool is_seed = word.find_first_not_of("0123456789") == std::string::npos;
    if (is_seed) sim::options.seed = static_cast<uint32_t>(std::atoi(word.c_str()));
    return is_landing || is_seed;
#else
    return false;
#endif
}

}  // namespace

int main(int argc, char** argv) {
    std::setvbuf(stdout, nullptr, _IOLBF, 0);  // of a test that hangs, one sees after which
    std::vector<std::string> named;
    for (int i = 1; i < argc; ++i)
        if (!choose_schedule(argv[i])) named.push_back(argv[i]);
    if (named == std::vector<std::string>{"--list"}) {
        for (const Group& group : groups) std::printf("%s\n", group.name.c_str());
        return 0;
    }
    for (const std::string& name : named) {
        const auto has_name = [&](const Group& group) { return group.name == name; };
        require(std::any_of(std::begin(groups), std::end(groups), has_name), "no such group; --list names them");
    }
    for (const Group& group : groups)
        if (named.empty() || std::find(named.begin(), named.end(), group.name) != named.end()) group.test();
    std::printf("%d failures\n", failures);
    return failures != 0;
}
