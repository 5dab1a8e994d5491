// Runs every test of the primitives. Usage on the simulator: primitives [seed [early|late|random]]
#include "primitives.h"

using namespace flash_attn::primitives;

static void choose_schedule([[maybe_unused]] int argc, [[maybe_unused]] char** argv) {
#ifndef __CUDACC__
    if (argc > 1) sim::options.seed = static_cast<uint32_t>(std::atoi(argv[1]));
    if (argc > 2)
        sim::options.landing = argv[2][0] == 'e'   ? sim::Landing::kEarly
                               : argv[2][0] == 'l' ? sim::Landing::kLate
                                                   : sim::Landing::kRandom;
#endif
}

int main(int argc, char** argv) {
    std::setvbuf(stdout, nullptr, _IOLBF, 0);  // of a test that hangs, one sees after which
    choose_schedule(argc, argv);
    test_memory();
    test_warp();
    test_numbers();
    test_sm90();
    test_tiles_sm90();
    std::printf("%d failures\n", failures);
    return failures != 0;
}
