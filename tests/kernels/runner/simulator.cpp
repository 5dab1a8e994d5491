#include "runner/simulator.h"
#include "runtime/sim.h"

namespace flash_attn::runner {

void set_schedule(Schedule schedule) {
    constexpr sim::Landing kLandings[] = {sim::Landing::kEarly, sim::Landing::kLate, sim::Landing::kRandom};
    sim::options.seed = schedule.seed;
    sim::options.landing = kLandings[int(schedule.landing)];
    sim::options.ordered_reds = schedule.ordered_reds;
    // Once is enough: with threads of their own, they make ThreadSanitizer slower.
    sim::options.overlapping_launches = schedule.landing == Landing::kEarly;
}

Traffic take_traffic() {
    const sim::Counters& c = sim::counters;
    const sim::Traffic* const parts[] = {&c.cp_async, &c.tma, &c.bulk, &c.plain, &c.red};
    Traffic sum;
    for (const sim::Traffic* part : parts)
        sum.read += part->read, sum.written += part->written, sum.added += part->added;
    sim::counters = {};
    return sum;
}

}  // namespace flash_attn::runner
