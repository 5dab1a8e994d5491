// Typed handles to our ops, called through the dispatcher.
#pragma once
#include <ATen/core/dispatch/Dispatcher.h>
#include "ops/original_ops.h"

namespace flash_attn {

template <class Signature> c10::TypedOperatorHandle<Signature> find_op(const char* name, const char* overload = "") {
    return c10::Dispatcher::singleton().findSchemaOrThrow(name, overload).typed<Signature>();
}

// The signature of an op of 2.8.3, deduced from the function that unpacks its arguments.
template <class Result, class Unpack> struct SignatureOf;
template <class Result, class Record, class... Args> struct SignatureOf<Result, Record (*)(Args...)> {
    using type = Result(Args...);
};
template <class Result, auto unpack> using OriginalSignature = typename SignatureOf<Result, decltype(unpack)>::type;

using DenseFwd = OriginalSignature<OriginalFwdResult, dense_fwd_args>;
using VarlenFwd = OriginalSignature<OriginalFwdResult, varlen_fwd_args>;
using DenseBwd = OriginalSignature<Tensor, dense_bwd_args>;
using VarlenBwd = OriginalSignature<Tensor, varlen_bwd_args>;

template <class... Tail> struct SignaturesWithTail {
    using Fwd = FwdResult(const Tensor&, const Tensor&, const Tensor&, Tail...);
    using Bwd = BwdResult(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                          const OptionalTensor&, Tail..., bool);
    using BwdOut = Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                          const OptionalTensor&, Tail..., bool, const Tensor&, const Tensor&, const Tensor&);
};
using Signatures = WithTail<SignaturesWithTail>;

}  // namespace flash_attn
