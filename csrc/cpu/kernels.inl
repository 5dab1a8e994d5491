// All kernels of one instruction set. isa_*.cpp files include this after their target pragma.
#include "cpu/append.h"
#include "cpu/bwd.h"
#include "cpu/decode.h"
#include "cpu/fwd.h"
#include "cpu/probs.h"

namespace flash_attn::cpu::FA_ISA {

template <class E, class Dot> static size_t fwd_scratch(const FwdParams& params) {
    return max(FwdTile<E, Dot>::scratch_bytes(params), DecodeTile<E, Dot>::scratch_bytes(params));
}
template <class E, class Dot> static void fwd(const FwdParams& params, const FwdTask& task, void* scratch) {
    if (task.decodes) return DecodeTile<E, Dot>::run(params, task, Arena(scratch));
    for (int i = 0; i < task.num_tiles; ++i) FwdTile<E, Dot>(params, tile_of(task, i), Arena(scratch)).run();
}

template <class E, class Dot> static Kernels make_kernels() {
    return {
        .compute_bytes = int(sizeof(Compute<E>)),
        .head_dim_padded = [](int head_dim) { return padded_row<Compute<E>>(head_dim); },
        .fwd_scratch = fwd_scratch<E, Dot>,
        .fwd = fwd<E, Dot>,
        .partial_bytes = partial_bytes<E>,
        .merge = merge<E>,
        .append = append<E>,
        .bwd_preprocess_scratch = bwd_preprocess_scratch,
        .bwd_preprocess = bwd_preprocess<E, Dot>,
        .bwd_scratch = BwdSlice<E, Dot>::scratch_bytes,
        .bwd = [](const BwdParams& p, const BwdTask& task,
                  void* scratch) { BwdSlice<E, Dot>(p, task, Arena(scratch)).run(); },
        .bwd_postprocess = bwd_postprocess<E>,
        .attn_probs = attn_probs<E>,
    };
}

// float16, and bfloat16 without dot product instructions, are widened to fp32 when a tile is loaded.
Kernels kernels(ElementType type) {
    switch (type) {
        case ElementType::kFloat64:
            return make_kernels<double, PlainDot<double>>();
        case ElementType::kFloat32:
            return make_kernels<float, PlainDot<float>>();
        case ElementType::kFloat16:
            return make_kernels<Float16, PlainDot<float>>();
        case ElementType::kBFloat16:
            break;
    }
#if FA_BF16_DOT
    return make_kernels<BFloat16, Bf16Dot>();
#else
    return make_kernels<BFloat16, PlainDot<float>>();
#endif
}

}  // namespace flash_attn::cpu::FA_ISA
