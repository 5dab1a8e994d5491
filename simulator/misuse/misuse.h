// Kernels with one mistake each, and what the simulator reports. Not for a GPU.
#pragma once
#include "primitives/primitives.h"

namespace flash_attn::misuse {

using primitives::Buffer;
using primitives::run;

enum class Found {
    kRule,      // by a check of the models, in every build
    kDeadlock,  // in every build
    kRace,      // by ThreadSanitizer
    kBounds,    // by AddressSanitizer or UBSan
    kSignal,    // where no sanitizer is in the way
    kNothing,   // right: there must be no report
};

struct Mistake {
    const char* name;
    Found found;
    const char* says;  // part of the report
    void (*make)();
};

extern const Mistake rules[], races[], bounds[];  // each ends with a name that is null

}  // namespace flash_attn::misuse
