// Everything that the kernels include from elsewhere, to be compiled for the processor's baseline: it must come before
// the target pragma of an isa_*.cpp file, so that no inline function of the standard library or of policy/ is compiled
// for a newer instruction set under a name that older processors' code is linked against.
// Masks and scores are not among it: they are always inlined, and GCC splits vectors in functions of the baseline.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#include "cpu/kernel_table.h"
#include "policy/dropout.h"
#include "policy/host_device.h"
#include "policy/paged_kv.h"
#include "policy/scalars.h"
#include "policy/seqlen.h"
#include "problem.h"
