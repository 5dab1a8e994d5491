#include "runner/run.h"
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include "cuda/api.h"
#include "runner/elements.h"

namespace flash_attn::runner {
namespace {

// So few that two heads of a hundred keys and a head_dim of 64 make a group.
constexpr int64_t kL2Bytes = 100000;

cuda::Device device_of(const Case& c) { return {c.compute_capability, c.smem, c.multiprocessors, kL2Bytes, nullptr}; }

void check_error(const char* pass, const char* error, Report& report) {
    if (error) report.fail(format("%s: refused: %s", pass, error));
}

template <class Params> bool runs_on_hopper(const Params& params, const Case& c) {
    const cuda::Explanation explanation = cuda::explain(params, device_of(c));
    return explanation.backend && explanation.backend == std::string("sm90");
}

// A case for Hopper must not be one that its kernels leave to others. Where there are no rows, so do they.
void check_kernels(const char* pass, const Case& c, bool hopper, Report& report) {
    const bool has_rows = shape_q(c, 1).rows > 0 && shape_k(c, 1).rows > 0;
    if (!hopper && has_rows && c.compute_capability == 90)
        report.fail(format("%s: not by the kernels for Hopper", pass));
}

// Aligned as kernels ask, ending with its last byte, and full of NaN.
class Workspace {
public:
    explicit Workspace(int64_t bytes) {
        constexpr size_t kAlignment = 256;
        if (posix_memalign(&data_, kAlignment, size_t(bytes))) std::abort();
        std::memset(data_, 0xff, size_t(bytes));
    }
    ~Workspace() { std::free(data_); }
    Workspace(const Workspace&) = delete;
    Workspace& operator=(const Workspace&) = delete;
    void* data() const { return data_; }

private:
    void* data_;
};

// Rows of the sequences in a tensor: of queries or of keys.
struct Rows { int batch, first, count, compact; };
std::vector<Rows> rows_of(const Case& c, bool of_queries) {
    std::vector<Rows> rows;
    for (const Sequence& s : sequences(c))
        rows.push_back(of_queries ? Rows{s.batch, s.first_q, s.seqlen_q, s.compact_q}
                                  : Rows{s.batch, s.first_k, s.seqlen_k, s.compact_k});
    return rows;
}

// A result as the reference has it. Everything outside of sequences must be untouched.
Compact collect(const char* name, const Case& c, const Tensor& t, bool of_queries, Report& report) {
    const Shape& shape = t.shape();
    Compact result(of_queries ? total_rows_q(c) : total_rows_k(c), shape.heads, shape.head_dim);
    std::vector<bool> used(size_t(shape.batch) * size_t(shape.rows), false);
    for (const Rows& rows : rows_of(c, of_queries))
        for (int i = 0; i < rows.count; ++i) {
            used[size_t(rows.batch * shape.rows + rows.first + i)] = true;
            for (int h = 0; h < shape.heads; ++h)
                for (int d = 0; d < shape.head_dim; ++d)
                    result.at(rows.compact + i, h)[d] = t.number(c.type, rows.batch, rows.first + i, h, d);
        }
    bool untouched = t.gaps_untouched();
    for (size_t row = 0; row < used.size(); ++row)
        for (int h = 0; h < shape.heads; ++h)
            for (int d = 0; d < shape.head_dim; ++d)
                untouched &= used[row] || t.is_untouched(int(row) / shape.rows, int(row) % shape.rows, h, d);
    if (!untouched) report.fail(format("%s: written outside of sequences", name));
    return result;
}

// The same for one number per query and head.
Compact collect_rows(const char* name, const Case& c, const RowTensor& t, int batch, int rows, Report& report) {
    Compact result(total_rows_q(c), c.num_heads, 1);
    std::vector<bool> used(size_t(batch) * size_t(rows), false);
    int unwritten = 0;
    for (const Sequence& s : sequences(c))
        for (int i = 0; i < s.seqlen_q; ++i) {
            used[size_t(s.batch * rows + s.first_q + i)] = true;
            for (int h = 0; h < c.num_heads; ++h) {
                *result.at(s.compact_q + i, h) = double(t.at(s.batch, h, s.first_q + i));
                unwritten += t.is_untouched(s.batch, h, s.first_q + i);
            }
        }
    if (unwritten) report.fail(format("%s: %d rows are not written", name, unwritten));
    bool untouched = t.gaps_untouched();
    for (size_t row = 0; row < used.size(); ++row)
        for (int h = 0; h < c.num_heads; ++h)
            untouched &= used[row] || t.is_untouched(int(row) / rows, h, int(row) % rows);
    if (!untouched) report.fail(format("%s: written outside of sequences", name));
    return result;
}

// The opposite: tensors as kernels read them.
void place_queries(const Case& c, const Compact& values, const Tensor& t) {
    for (const Sequence& s : sequences(c))
        for (int i = 0; i < s.seqlen_q; ++i)
            for (int h = 0; h < values.heads; ++h)
                for (int d = 0; d < values.head_dim; ++d)
                    Inputs::q_element(t, s, i, h, d) = to_bits(c.type, float(values.at(s.compact_q + i, h)[d]));
}
void place_rows(const Case& c, const Compact& values, const RowTensor& t) {
    for (const Sequence& s : sequences(c))
        for (int i = 0; i < s.seqlen_q; ++i)
            for (int h = 0; h < values.heads; ++h)
                t.at(s.batch, h, s.first_q + i) = float(*values.at(s.compact_q + i, h));
}

}  // namespace

Forward run_forward(const Inputs& x, Schedule schedule, Report& report) {
    const Case& c = x.c;
    const Tensor out(shape_q(c, c.head_dim_v), c.layout, Access::kWritten, c.float_results);
    const Shape& shape = out.shape();
    const RowTensor softmax_lse(shape.batch, c.num_heads, shape.rows, c.layout);
    set_schedule(schedule);
    take_traffic();
    const int num_maxima = c.max_logits ? c.batch_size() * c.num_heads : 0;
    const Numbers<float> max_logits(std::vector<float>(size_t(num_maxima), -INFINITY));
    FwdParams params{x.problem(), out.view(c.packed), softmax_lse.view(c.packed)};
    if (c.max_logits) params.max_logits = max_logits.data();
    const Workspace workspace(cuda::fwd_workspace_bytes(params, device_of(c)));
    check_error("forward", cuda::run_fwd(params, workspace.data(), device_of(c)), report);
    Forward result;
    result.traffic = take_traffic();
    result.hopper = runs_on_hopper(params, c);
    check_kernels("forward", c, result.hopper, report);
    result.out = collect("out", c, out, true, report);
    result.softmax_lse = collect_rows("softmax_lse", c, softmax_lse, shape.batch, shape.rows, report);
    result.max_logits = Compact(num_maxima ? c.batch_size() : 0, c.num_heads, 1);
    for (int i = 0; i < num_maxima; ++i) result.max_logits.x[size_t(i)] = double(max_logits.data()[i]);
    return result;
}

Backward run_backward(const Inputs& x, const Compact& out, const Compact& softmax_lse, Schedule schedule,
                      Report& report) {
    const Case& c = x.c;
    const Tensor out_read(shape_q(c, c.head_dim_v), c.layout, Access::kRead);
    const Tensor dq(shape_q(c, c.head_dim), c.layout, Access::kWritten, c.float_results);
    const Tensor dk(shape_k(c, c.head_dim), c.layout, Access::kWritten, c.float_results);
    const Tensor dv(shape_k(c, c.head_dim_v), c.layout, Access::kWritten, c.float_results);
    const Shape& shape = dq.shape();
    const RowTensor lse_read(shape.batch, c.num_heads, shape.rows, c.layout);
    const RowTensor dsoftmax_sum(shape.batch, c.num_heads, shape.rows, c.layout);
    place_queries(c, out, out_read);
    place_rows(c, softmax_lse, lse_read);
    BwdParams params{};
    params.problem = x.problem();
    params.out = out_read.view(c.packed), params.dout = x.dout.view(c.packed);
    params.softmax_lse = lse_read.view(c.packed);
    if (c.lse_grad) params.dlse = x.dlse.view(c.packed);
    params.dq = dq.view(c.packed), params.dk = dk.view(c.packed), params.dv = dv.view(c.packed);
    params.dsoftmax_sum = dsoftmax_sum.view(c.packed);
    params.deterministic = c.deterministic;
    set_schedule({schedule.seed, schedule.landing, c.deterministic});
    take_traffic();
    const Workspace workspace(cuda::bwd_workspace_bytes(params, device_of(c)));
    check_error("backward", cuda::run_bwd(params, workspace.data(), device_of(c)), report);
    Backward result;
    result.traffic = take_traffic();
    result.hopper = runs_on_hopper(params, c);
    check_kernels("backward", c, result.hopper, report);
    result.dq = collect("dq", c, dq, true, report);
    result.dk = collect("dk", c, dk, false, report);
    result.dv = collect("dv", c, dv, false, report);
    result.dsoftmax_sum = collect_rows("dsoftmax_sum", c, dsoftmax_sum, shape.batch, shape.rows, report);
    return result;
}

Probs run_attn_probs(const Inputs& x, const Compact& softmax_lse, Schedule schedule, Report& report) {
    const Case& c = x.c;
    const Shape shape = shape_q(c, 1);
    const RowTensor lse_read(shape.batch, c.num_heads, shape.rows, c.layout);
    place_rows(c, softmax_lse, lse_read);
    const int64_t rows = int64_t(c.batch_size()) * c.num_heads * c.seqlen_q();
    const Memory probs(2 * rows * c.seqlen_k());
    std::memset(probs.data(), 0, size_t(2 * rows * c.seqlen_k()));
    set_schedule(schedule);
    take_traffic();
    const ProbsParams params{x.problem(), lse_read.view(c.packed), probs.data()};
    const Workspace workspace(cuda::attn_probs_workspace_bytes(params, device_of(c)));
    check_error("attn_probs", cuda::run_attn_probs(params, workspace.data(), device_of(c)), report);
    Probs result;
    result.traffic = take_traffic();
    for (int64_t i = 0; i < rows * c.seqlen_k(); ++i)
        result.weights.push_back(to_float(c.type, reinterpret_cast<const uint16_t*>(probs.data())[i]));
    return result;
}

}  // namespace flash_attn::runner
