// Attention whose bits depend on a query and on its visible keys in their order, and on nothing else: not on how many queries come at
// once, where keys lie in memory, what hidden ones stand between or beside them, or the number of threads.
//
//     list of a query's visible keys ──► scores ──► exp(score - largest) ──► sum of weights, weighted sum of values ──► z
//     (j-th on the list is the j-th      (+ bias)                            by j, in pieces of 256 that are added up
//     everywhere, from 0 on)                                                 in order
//
// Queries of a row that see longer and longer beginnings of one list are worked on together; their weights beyond what they see are zeros.
// Everything is computed in float32.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "parallel.h"
#include "vectors.h"

namespace {

constexpr int64_t PIECE = 256;

struct Call {
    const char *q, *k, *v;
    char* out;
    const int64_t* list;    // [b|1 t|1 n]: columns of keys; null: 0, 1, 2…
    const int64_t* counts;  // [b|1 t]: how many of the list each query sees
    const float* bias;      // [b|1 h|1 t s], or null
    const float* sink;      // [h], or null
    int64_t b, h, g, t, dk, dv;
    int64_t qb, qh, qt, kb, kg, ks, vb, vg, vs, ob, oh, ot;
    int64_t lb, lt, cb, bb, bh, bt;  // steps; lt 0: the queries of a row share a list
    int64_t q_bf16, kv_bf16, threads;
    double scale, cap;  // cap 0: none

    int64_t column(const int64_t* own, int64_t j) const { return own == nullptr ? j : own[j]; }
};

// Scores of L keys with one query: lane l is the product with key l.
template <typename T>
inline vf products(const float* q, const T* const* keys, int64_t dk) {
    vf part[L];
    for (int l = 0; l < L; ++l) part[l] = vf{};
    int64_t i = 0;
    for (; i + L <= dk; i += L) {
        vf x = load(q + i);
        for (int l = 0; l < L; ++l) part[l] += x * load(keys[l] + i);
    }
    vf result = sums<L>(part);
    if (i < dk) {
        float rest[L];
        for (int l = 0; l < L; ++l) {
            rest[l] = 0;
            for (int64_t j = i; j < dk; ++j) rest[l] = std::fma(q[j], widened(keys[l][j]), rest[l]);
        }
        result += load(rest);
    }
    return result;
}

// total[r] [dv] = sum_j weights[r][j] v_j for R queries.
template <int R, int V, typename T>
inline void mix_some(const Call& c, const float* weights, int64_t width, const T* v, const int64_t* own, int64_t n, int64_t at, float* total) {
    vf sum[R][V];
    for (int r = 0; r < R; ++r)
        for (int i = 0; i < V; ++i) sum[r][i] = vf{};
    for (int64_t from = 0; from < n; from += PIECE) {
        vf a[R][V];
        for (int r = 0; r < R; ++r)
            for (int i = 0; i < V; ++i) a[r][i] = vf{};
        for (int64_t j = from; j < std::min(from + PIECE, n); ++j) {
            const T* const p = v + c.column(own, j) * c.vs + at;
            for (int i = 0; i < V; ++i) {
                const vf x = load(p + i * L);
                for (int r = 0; r < R; ++r) a[r][i] += weights[r * width + j] * x;
            }
        }
        for (int r = 0; r < R; ++r)
            for (int i = 0; i < V; ++i) sum[r][i] += a[r][i];
    }
    for (int r = 0; r < R; ++r)
        for (int i = 0; i < V; ++i) store(total + r * c.dv + at + i * L, sum[r][i]);
}

template <int R, typename T>
inline void mix(const Call& c, const float* weights, int64_t width, const T* v, const int64_t* own, int64_t n, float* total) {
    int64_t at = 0;
    for (; at + 4 * L <= c.dv; at += 4 * L) mix_some<R, 4>(c, weights, width, v, own, n, at, total);
    for (; at + L <= c.dv; at += L) mix_some<R, 1>(c, weights, width, v, own, n, at, total);
    for (; at < c.dv; ++at)
        for (int r = 0; r < R; ++r) {
            float sum = 0;
            for (int64_t from = 0; from < n; from += PIECE) {
                float a = 0;
                for (int64_t j = from; j < std::min(from + PIECE, n); ++j)
                    a = std::fma(weights[r * width + j], widened(v[c.column(own, j) * c.vs + at]), a);  // else products in vectors, the last ones not
                sum += a;
            }
            total[r * c.dv + at] = sum;
        }
}

// Scores of one query become weights; gives their sum.
float weigh(const Call& c, float* w, int64_t width, int64_t count, const int64_t* own, const float* bias, const float* sink) {
    const float scale = float(c.scale), cap = float(c.cap);
    for (int64_t j = 0; j < width; j += L) store(w + j, load(w + j) * scale);
    if (cap != 0)
        for (int64_t j = 0; j < count; ++j) w[j] = cap * std::tanh(w[j] / cap);
    if (bias != nullptr)
        for (int64_t j = 0; j < count; ++j) w[j] += bias[c.column(own, j)];
    for (int64_t j = count; j < width; ++j) w[j] = -INFINITY;
    float largest = sink == nullptr ? -INFINITY : *sink;
    for (int64_t j = 0; j < count; ++j) largest = w[j] > largest ? w[j] : largest;
    const float base = largest == -INFINITY ? 0.0f : largest;
    float total = sink == nullptr ? 0.0f : exponential(*sink - base);
    for (int64_t from = 0; from < width; from += PIECE) {
        vf part = vf{};
        for (int64_t j = from; j < std::min(from + PIECE, width); j += L) {
            const vf e = exponential(load(w + j) - base);
            store(w + j, e);
            part += e;
        }
        total += sum(part);
    }
    return total;
}

// Queries i … i + some - 1 of row b and the heads of group g.
template <typename Q, typename T>
void block(const Call& c, int64_t b, int64_t g, int64_t first, int64_t some) {
    const int64_t heads = c.h / c.g, rows = heads * some;
    const int64_t* const own = c.list == nullptr ? nullptr : c.list + b * c.lb + first * c.lt;
    const int64_t* const counts = c.counts + b * c.cb + first;
    const int64_t n = *std::max_element(counts, counts + some), width = (n + L - 1) / L * L;
    thread_local std::vector<float> memory;
    const int64_t needed = rows * (c.dk + width + c.dv + 1);
    if (int64_t(memory.size()) < needed) memory.resize(size_t(needed));
    float* const q = memory.data();
    float* const weights = q + rows * c.dk;  // [rows width]
    float* const total = weights + rows * width;
    float* const sums = total + rows * c.dv;
    for (int64_t r = 0; r < rows; ++r) {
        const Q* from = reinterpret_cast<const Q*>(c.q) + b * c.qb + (g * heads + r / some) * c.qh + (first + r % some) * c.qt;
        for (int64_t i = 0; i < c.dk; ++i) q[r * c.dk + i] = widened(from[i]);
    }
    const T* const k = reinterpret_cast<const T*>(c.k) + b * c.kb + g * c.kg;
    const T* const v = reinterpret_cast<const T*>(c.v) + b * c.vb + g * c.vg;
    for (int64_t j = 0; j < n; j += L) {
        const T* keys[L];
        for (int l = 0; l < L; ++l) keys[l] = k + c.column(own, std::min(j + l, n - 1)) * c.ks;
        for (int64_t r = 0; r < rows; ++r)
            if (j < counts[r % some]) store(weights + r * width + j, products(q + r * c.dk, keys, c.dk));
    }
    for (int64_t r = 0; r < rows; ++r) {
        const int64_t head = g * heads + r / some, i = first + r % some;
        const int64_t count = counts[r % some];
        for (int64_t j = (count + L - 1) / L * L; j < width; ++j) weights[r * width + j] = 0;
        const float* bias = c.bias == nullptr ? nullptr : c.bias + b * c.bb + head * c.bh + i * c.bt;
        sums[r] = weigh(c, weights + r * width, width, count, own, bias, c.sink == nullptr ? nullptr : c.sink + head);
    }
    for (int64_t r = 0; r < rows; r += 4) {
        const float* const w = weights + r * width;
        float* const to = total + r * c.dv;
        switch (std::min<int64_t>(4, rows - r)) {
            case 4: mix<4>(c, w, width, v, own, n, to); break;
            case 3: mix<3>(c, w, width, v, own, n, to); break;
            case 2: mix<2>(c, w, width, v, own, n, to); break;
            default: mix<1>(c, w, width, v, own, n, to);
        }
    }
    for (int64_t r = 0; r < rows; ++r) {
        const float by = sums[r] == 0 ? 0.0f : 1.0f / sums[r];
        Q* to = reinterpret_cast<Q*>(c.out) + b * c.ob + (g * heads + r / some) * c.oh + (first + r % some) * c.ot;
        for (int64_t i = 0; i < c.dv; ++i) put(to + i, total[r * c.dv + i] * by);
    }
}

template <typename Q, typename T>
void attend(const Call& c) {
    const int64_t together = c.lt != 0 ? 1 : std::max<int64_t>(1, 8 / (c.h / c.g)), blocks = (c.t + together - 1) / together;
    parallel(c.b * c.g * blocks, c.threads, [&](int64_t from, int64_t to) {
        for (int64_t i = from; i < to; ++i) {
            const int64_t first = i % blocks * together;
            block<Q, T>(c, i / blocks / c.g, i / blocks % c.g, first, std::min(together, c.t - first));
        }
    });
}

}  // namespace

extern "C" void glassformer_attend_steadily(const void* call) {
    const Call& c = *static_cast<const Call*>(call);
    if (c.q_bf16)
        c.kv_bf16 ? attend<bf16, bf16>(c) : attend<bf16, float>(c);
    else
        c.kv_bf16 ? attend<float, bf16>(c) : attend<float, float>(c);
}
