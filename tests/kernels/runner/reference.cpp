#include "runner/reference.h"
#include <algorithm>
#include <cmath>
#include <limits>
#include "runner/elements.h"

namespace flash_attn::runner {
namespace {

template <class T> struct Matrix {
    int rows = 0, columns = 0;
    std::vector<T> x;

    Matrix() = default;
    Matrix(int rows, int columns) : rows(rows), columns(columns), x(size_t(rows) * size_t(columns), T(0)) {}
    T* operator[](int row) { return x.data() + int64_t(row) * columns; }
    const T* operator[](int row) const { return x.data() + int64_t(row) * columns; }
};

template <class T> Matrix<T> transposed(const Matrix<T>& a) {
    Matrix<T> t(a.columns, a.rows);
    for (int i = 0; i < a.rows; ++i)
        for (int j = 0; j < a.columns; ++j) t[j][i] = a[i][j];
    return t;
}

// Sums go over the columns of a in their order; the result is rounded.
template <class T, class Round> Matrix<T> product(const Matrix<T>& a, const Matrix<T>& b, Round round) {
    Matrix<T> c(a.rows, b.columns);
    for (int i = 0; i < a.rows; ++i) {
        T* row = c[i];
        for (int k = 0; k < a.columns; ++k) {
            const T factor = a[i][k];
            const T* other = b[k];
            for (int j = 0; j < b.columns; ++j) row[j] += factor * other[j];
        }
        for (int j = 0; j < b.columns; ++j) row[j] = round(row[j]);
    }
    return c;
}

// What the elements of out, dq, dk and dv are rounded to: nothing, if they are to be in fp32.
template <class Round> struct RoundResult {
    bool in_floats;
    template <class T> T operator()(T x) const { return in_floats ? x : T(Round()(x)); }
};

// One head of one sequence. T is the type of sums; the result of every operation is rounded.
template <class T, class Round> class Head {
public:
    Head(const Case& c, const Values& values, const Sequence& s, int head, Order order)
        : c_(c), values_(values), s_(s), head_(head), head_k_(head / (c.num_heads / c.num_heads_k)), order_(order),
          result_{c.float_results} {
        q_ = rows_of(values.q, s.compact_q, s.seqlen_q, head, false, order.dims_reversed);
        k_ = rows_of(values.k, s.compact_k, s.seqlen_k, head_k_, order.keys_reversed, order.dims_reversed);
        v_ = rows_of(values.v, s.compact_k, s.seqlen_k, head_k_, order.keys_reversed, false);
    }

    void forward() {
        if (order_.scale_first)
            for (T& x : q_.x) x = round_(x * T(c_.scale()));
        scores_ = product(q_, transposed(k_), round_);
        derivative_ = Matrix<T>(c_.softcap > 0 ? s_.seqlen_q : 0, s_.seqlen_k);
        weights_ = Matrix<T>(s_.seqlen_q, s_.seqlen_k);
        lse_.assign(size_t(s_.seqlen_q), T(0));
        for (int i = 0; i < s_.seqlen_q; ++i) {
            score_row(i);
            softmax_row(i);
        }
        if (c_.dropout_p > 0) draw_mask();
        dropped_ = weights_;
        drop(dropped_);
    }

    void store_forward(Attention& result) const {
        const Matrix<T> out = product(dropped_, v_, result_);
        for (int i = 0; i < s_.seqlen_q; ++i) {
            std::copy_n(out[i], c_.head_dim_v, result.out.at(s_.compact_q + i, head_));
            *result.softmax_lse.at(s_.compact_q + i, head_) = double(lse_[size_t(i)]);
        }
        double& largest = *result.max_logits.at(s_.index, head_);
        for (const T score : scores_.x) largest = std::max(largest, double(score));
    }

    void store_backward(Attention& result) {
        const Matrix<T> dout = rows_of(values_.dout, s_.compact_q, s_.seqlen_q, head_, false, false);
        Matrix<T> ds = product(dout, transposed(v_), round_);
        drop(ds);
        for (int i = 0; i < s_.seqlen_q; ++i) differentiate_row(i, ds[i]);
        add_keys(result.dv, product(transposed(dropped_), dout, result_), false);
        Matrix<T> dq = product(ds, k_, result_);
        if (order_.scale_first)
            for (T& x : dq.x) x = result_(x * T(c_.scale()));
        for (int i = 0; i < s_.seqlen_q; ++i) {
            double* row = result.dq.at(s_.compact_q + i, head_);
            std::copy_n(dq[i], c_.head_dim, row);
            if (order_.dims_reversed) std::reverse(row, row + c_.head_dim);
        }
        add_keys(result.dk, product(transposed(ds), q_, result_), order_.dims_reversed);
    }

    const Matrix<T>& weights() const { return weights_; }

private:
    static Matrix<T> rows_of(const Compact& t, int first, int count, int head, bool rows_reversed, bool dims_reversed) {
        Matrix<T> m(count, t.head_dim);
        for (int i = 0; i < count; ++i) {
            T* row = m[rows_reversed ? count - 1 - i : i];
            std::transform(t.at(first + i, head), t.at(first + i, head) + t.head_dim, row,
                           [](double x) { return T(x); });
            if (dims_reversed) std::reverse(row, row + t.head_dim);
        }
        return m;
    }

    int key_at(int column) const { return order_.keys_reversed ? s_.seqlen_k - 1 - column : column; }

    // Scores of keys that the query does not see become -infinity.
    void score_row(int i) {
        T* s = scores_[i];
        const T cap = T(c_.softcap);
        for (int j = 0; j < s_.seqlen_k; ++j) {
            if (!order_.scale_first) s[j] = round_(s[j] * T(c_.scale()));
            if (c_.softcap > 0) {
                const T t = round_(std::tanh(round_(s[j] / cap)));
                s[j] = round_(cap * t);
                derivative_[i][j] = 1 - t * t;
            }
            if (!values_.slopes.empty()) {
                const double slope = values_.slopes[size_t(s_.index * c_.num_heads + head_)];
                const double distance = s_.distance(c_, i, key_at(j));
                s[j] = round_(s[j] - round_(T(slope * std::abs(distance))));
            }
            if (!visible(c_, s_, i, key_at(j))) s[j] = -std::numeric_limits<T>::infinity();
        }
    }

    // A query that sees no key has no weights.
    void softmax_row(int i) {
        const T* s = scores_[i];
        const T none = -std::numeric_limits<T>::infinity();
        const T sink = values_.sinks.empty() ? none : T(values_.sinks[size_t(head_)]);
        T largest = sink;
        for (int j = 0; j < s_.seqlen_k; ++j) largest = std::max(largest, s[j]);
        lse_[size_t(i)] = largest;
        if (std::isinf(largest)) return;
        T sum = std::exp(sink - largest);
        for (int j = 0; j < s_.seqlen_k; ++j) sum += weights_[i][j] = std::exp(s[j] - largest);
        for (int j = 0; j < s_.seqlen_k; ++j) weights_[i][j] = round_(weights_[i][j] / sum);
        lse_[size_t(i)] = largest + std::log(sum);
    }

    void draw_mask() {
        for (int i = 0; i < s_.seqlen_q; ++i)
            for (int j = 0; j < s_.seqlen_k; ++j) drops_.push_back(dropped(c_, values_, s_, head_, i, key_at(j)));
    }
    void drop(Matrix<T>& weights) const {
        const T rescale = T(65536 / (65536.0 - c_.dropout_threshold()));
        for (size_t at = 0; at < drops_.size(); ++at)
            weights.x[at] = drops_[at] ? T(0) : round_(weights.x[at] * rescale);
    }

    // From the derivative of weights to that of products of queries and keys.
    void differentiate_row(int i, T* ds) const {
        const T *p = weights_[i], *s = scores_[i];
        const bool sees_any = std::isfinite(lse_[size_t(i)]);
        const T dlse = c_.lse_grad ? T(*values_.dlse.at(s_.compact_q + i, head_)) : T(0);
        T sum = 0;
        for (int j = 0; j < s_.seqlen_k; ++j) sum += sees_any ? p[j] * ds[j] : T(0);
        for (int j = 0; j < s_.seqlen_k; ++j) {
            ds[j] = sees_any ? round_(p[j] * (ds[j] - sum)) : T(0);
            if (c_.lse_grad && sees_any) ds[j] = round_(ds[j] + round_(dlse * std::exp(s[j] - lse_[size_t(i)])));
            if (c_.softcap > 0)
                ds[j] = round_(round_(round_(ds[j] * T(c_.softcap)) * derivative_[i][j]) / T(c_.softcap));
            if (!order_.scale_first) ds[j] = round_(ds[j] * T(c_.scale()));
        }
    }

    // Adds the gradients of keys to those of the other heads of their group.
    void add_keys(Compact& result, const Matrix<T>& gradient, bool dims_reversed) const {
        const int last = gradient.columns - 1;
        for (int j = 0; j < s_.seqlen_k; ++j) {
            double* row = result.at(s_.compact_k + key_at(j), head_k_);
            for (int d = 0; d <= last; ++d) row[d] += double(gradient[j][dims_reversed ? last - d : d]);
        }
    }

    const Case& c_;
    const Values& values_;
    const Sequence& s_;
    int head_, head_k_;
    Order order_;
    Round round_;
    RoundResult<Round> result_;
    Matrix<T> q_, k_, v_;         // [seqlen_q or seqlen_k, head_dim or head_dim_v]
    Matrix<T> scores_, weights_;  // [seqlen_q, seqlen_k]
    Matrix<T> dropped_;           // the weights with those dropped at 0 and the others rescaled
    Matrix<T> derivative_;        // of softcap
    std::vector<T> lse_;
    std::vector<bool> drops_;  // [seqlen_q, seqlen_k], or empty
};

template <class T, class Round> Attention compute(const Case& c, const Values& values, bool grads, Order order) {
    const int rows_q = total_rows_q(c), rows_k = total_rows_k(c);
    Attention result;
    result.out = Compact(rows_q, c.num_heads, c.head_dim_v);
    result.softmax_lse = Compact(rows_q, c.num_heads, 1);
    result.max_logits = Compact(c.batch_size(), c.num_heads, 1);
    std::fill(result.max_logits.x.begin(), result.max_logits.x.end(), -std::numeric_limits<double>::infinity());
    result.dq = Compact(rows_q, c.num_heads, c.head_dim);
    result.dk = Compact(rows_k, c.num_heads_k, c.head_dim);
    result.dv = Compact(rows_k, c.num_heads_k, c.head_dim_v);
    for (const Sequence& s : sequences(c))
        for (int h = 0; h < c.num_heads; ++h) {
            Head<T, Round> head(c, values, s, h, order);
            head.forward();
            head.store_forward(result);
            if (grads) head.store_backward(result);
        }
    for (Compact* gradient : {&result.dk, &result.dv})
        for (double& x : gradient->x) x = double(RoundResult<Round>{c.float_results}(T(x)));
    return result;
}

constexpr Order kOrders[] = {
    {},
    {.keys_reversed = true, .dims_reversed = false, .scale_first = true},
    {.keys_reversed = false, .dims_reversed = true, .scale_first = false},
    {.keys_reversed = true, .dims_reversed = true, .scale_first = true},
};

// One call of Philox4x32 with seven rounds (Salmon et al., 2011): the word of the four that is asked for.
uint32_t philox_word(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t k0, uint32_t k1, int word) {
    uint32_t c[4] = {c0, c1, c2, c3};
    for (uint32_t round = 0; round < 7; ++round) {
        const uint64_t first = uint64_t(c[0]) * 0xD2511F53u, second = uint64_t(c[2]) * 0xCD9E8D57u;
        const uint32_t key0 = k0 + round * 0x9E3779B9u, key1 = k1 + round * 0xBB67AE85u;
        c[0] = uint32_t(second >> 32) ^ c[1] ^ key0;
        c[2] = uint32_t(first >> 32) ^ c[3] ^ key1;
        c[1] = uint32_t(second), c[3] = uint32_t(first);
    }
    return c[word];
}

}  // namespace

Attention attention(const Case& c, const Values& values, Precision precision, bool grads, Order order) {
    if (precision == Precision::kFloat64) return compute<double, Exact>(c, values, grads, order);
    if (precision == Precision::kFloat32) return compute<float, ToFloat>(c, values, grads, order);
    if (c.type == ElementType::kBFloat16) return compute<float, ToBf16>(c, values, grads, order);
    if (precision == Precision::kAsInputsWide) return compute<float, ToWideFp16>(c, values, grads, order);
    return compute<float, ToFp16>(c, values, grads, order);
}

Yardstick make_yardstick(const Case& c, const Values& values, bool grads) {
    Yardstick y{attention(c, values, Precision::kFloat64, grads), {}};
    const Precision plain = c.check == "large" ? Precision::kAsInputsWide : Precision::kAsInputs;
    for (const Order order : kOrders) {
        y.plain.push_back(attention(c, values, plain, grads, order));
        const Attention wide = attention(c, values, Precision::kFloat32, false, order);
        y.plain.back().softmax_lse = wide.softmax_lse;
        y.plain.back().max_logits = wide.max_logits;
    }
    return y;
}

bool dropped(const Case& c, const Values& values, const Sequence& s, int head, int i, int j) {
    const int row = s.q_start + i, key = s.k_start + j;
    const int batch_head = s.index * (c.total_heads ? c.total_heads : c.num_heads) + c.head_start + head;
    const uint32_t octet_row = uint32_t(row / 16 * 8 + row % 8), octet_key = uint32_t(key / 32 * 8 + key % 8);
    const uint32_t word =
        philox_word(octet_row, octet_key, uint32_t(batch_head), uint32_t(values.offset), uint32_t(values.seed),
                    uint32_t(values.seed >> 32) ^ uint32_t(values.offset >> 32), key / 8 % 4);
    return (row / 8 % 2 ? word >> 16 : word & 0xffff) < c.dropout_threshold();
}

std::vector<double> attn_probs(const Case& c, const Values& values, const Sequence& s, int head) {
    Head<double, Exact> h(c, values, s, head, {});
    h.forward();
    return h.weights().x;
}

}  // namespace flash_attn::runner
