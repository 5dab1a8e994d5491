// The error of the ops for CUDA tensors in a build without CUDA kernels.
#include <torch/library.h>
#include "ops/kvcache.h"
#include "ops/original_ops.h"
#include "ops/prepare.h"

namespace flash_attn {
namespace {

[[noreturn]] void no_kernels() {
    TORCH_CHECK(false,
                "flash_attn: this build is for the CPU only, because " FLASH_ATTN_BUILT_BECAUSE
                ": rebuild it with nvcc and a CUDA build of torch by `pip install --no-build-isolation .`, or move the "
                "tensors to the CPU");
}

template <class Result, class Args> Result no_cuda(const Args& args) {
    validate(args);
    no_kernels();
}

}  // namespace

TORCH_LIBRARY_IMPL(flash_attn, CUDA, m) {
    implement_ops<no_cuda<FwdResult, FwdArgs>, no_cuda<Tensor, BwdArgs>, no_cuda<Tensor, ProbsArgs>>(m);
    m.impl("fwd_kvcache", KvCacheOps::run<no_cuda<CacheResult, KvCacheArgs>>);
    m.impl("_explain", Ops::run_explain<no_cuda<Names, FwdArgs>>);
}

}  // namespace flash_attn
