// All headers that the kernels include from elsewhere. An isa_*.cpp file includes this before its target pragma, so
// that inline functions of the standard library and of policy/ are compiled for the baseline: otherwise the linker
// could pick a copy compiled for a newer instruction set for all callers. Masks and scores are not included here: they
// are always inlined, and GCC splits vectors in functions of the baseline.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <new>
#include <type_traits>
#include <utility>
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#include "cpu/kernel_table.h"
#include "policy/dropout.h"
#include "policy/host_device.h"
#include "policy/paged_kv.h"
#include "policy/scalars.h"
#include "policy/seqlen.h"
#include "policy/split.h"
#include "problem.h"
