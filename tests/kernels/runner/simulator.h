// What the runner asks of the simulator.
#pragma once
#include <cstdint>

namespace flash_attn::runner {

// When asynchronous work happens: at issue, as late as possible, or at random in between.
enum class Landing { kEarly, kLate, kRandom };

struct Schedule {
    uint32_t seed = 1;
    Landing landing = Landing::kRandom;
    bool ordered_reds = false;  // additions without an order are data races
};
void set_schedule(Schedule schedule);

// Bytes moved from and to global memory since the last call.
struct Traffic {
    int64_t read = 0, written = 0, added = 0;  // added: by atomic additions
    bool operator==(const Traffic&) const = default;
};
Traffic take_traffic();

}  // namespace flash_attn::runner
