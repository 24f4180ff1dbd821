// Attention of a few queries to the keys and values of a cache: one pass over the filled part, nothing else is read.
//
//     row b, key head g, split of 256 keys ──► scores ──► exp(score - largest) ──► sum of weights, weighted sum of values
//                                              (of every query head of the group, and of every query of the call)
//     all splits of a row, in order        ──► one soft-max                    ──► z
//
// Splits begin at key 0, 256, 512… whatever the batch, the capacity, the other rows and the number of threads are, the
// sums within a split run in the order of the keys, and splits are joined in order: the bits of a row depend on that row alone.
//
// Everything is computed in float32.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "parallel.h"
#include "vectors.h"

namespace {

constexpr int64_t SPLIT = 256;
constexpr int64_t ALONE = 1 << 17;  // bytes of keys and values below which waking another thread costs more than it saves

// One call

struct Call {
    const char* q;
    char *k, *v;
    char* out;
    const char *new_k, *new_v;  // keys and values [b t g k] of the queries' own places, to be written there first; null: they are there
    const int64_t* ends;  // [b t]: how many keys a query sees, counted from key 0; null: all s
    const float* sink;    // [h], or null
    int64_t b, h, g, t, s, dk, dv;
    int64_t qb, qh, qt, kb, kg, ks, vb, vg, vs, ob, oh, ot, eb;
    int64_t nkb, nkt, nkg, nvb, nvt, nvg;  // steps between rows, heads and places, in numbers
    int64_t window;                        // a query sees its last so many keys (0: all)
    int64_t q_bf16, kv_bf16, threads;
    double scale, cap;  // cap 0: none

    int64_t end(int64_t row, int64_t i) const { return ends == nullptr ? s : std::max<int64_t>(0, std::min(ends[row * eb + i], s)); }
    int64_t begin(int64_t end) const { return window ? std::max<int64_t>(0, end - window) : 0; }
    int64_t queries() const { return h / g * t; }
};

// Vectors of keys that are read together.
template <typename T>
constexpr int TOGETHER = std::is_same<T, float>::value ? 1 : 2;

// A query in float32, in the order in which `loads` brings keys of type T.
template <typename T, typename Q>
inline void asked(const Q* from, float* q, int64_t dk) {
    constexpr int V = TOGETHER<T>;
    int64_t i = 0;
    for (; i + V * L <= dk; i += V * L)
        for (int c = 0; c < V; ++c)
            for (int l = 0; l < L; ++l) q[i + c * L + l] = widened(from[i + V * l + c]);
    for (; i < dk; ++i) q[i] = widened(from[i]);
}

// Scores of L keys with one query [dk] as `asked` left it: lane l is the product with key l.
template <typename T>
inline vf products(const float* q, const T* const* keys, int64_t dk) {
    constexpr int V = TOGETHER<T>;
    vf part[L];
    for (int l = 0; l < L; ++l) part[l] = vf{};
    int64_t i = 0;
    for (; i + V * L <= dk; i += V * L) {
        vf x[V];
        for (int c = 0; c < V; ++c) x[c] = load(q + i + c * L);
        for (int l = 0; l < L; ++l) {
            vf y[V];
            loads<V>(keys[l] + i, y);
            for (int c = 0; c < V; ++c) part[l] += x[c] * y[c];
        }
    }
    if (V == 2 && i + L <= dk) {
        vf x = load(q + i);
        for (int l = 0; l < L; ++l) part[l] += x * load(keys[l] + i);
        i += L;
    }
    vf result = sums<L>(part);
    if (i < dk) {
        float rest[L];
        for (int l = 0; l < L; ++l) {
            rest[l] = 0;
            for (int64_t j = i; j < dk; ++j) rest[l] = std::fma(q[j], widened(keys[l][j]), rest[l]);  // said, or a compiler fuses some of them only
        }
        result += load(rest);
    }
    return result;
}

// acc[r] [dv] = sum_j weights[r][j] v_j for R queries, keys in order, V vectors of each at a time.
template <int R, int V, typename T>
inline void mix_some(const float* weights, const T* v, int64_t step, int64_t n, int64_t from, float* acc, int64_t dv) {
    vf a[R][V];
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < V; ++c) a[r][c] = vf{};
    for (int64_t j = 0; j < n; ++j) {
        vf x[V];
        loads<V>(v + j * step + from, x);
        for (int r = 0; r < R; ++r) {
            float w = weights[r * SPLIT + j];
            for (int c = 0; c < V; ++c) a[r][c] += w * x[c];
        }
    }
    for (int r = 0; r < R; ++r) held<V, T>(acc + r * dv + from, a[r]);
}

template <int R, typename T>
inline void mix(const float* weights, const T* v, int64_t step, int64_t n, float* acc, int64_t dv) {
    constexpr int V = L == 16 ? 4 : 2;
    int64_t i = 0;
    for (; i + V * L <= dv; i += V * L) mix_some<R, V>(weights, v, step, n, i, acc, dv);
    for (; i + L <= dv; i += L) mix_some<R, 1>(weights, v, step, n, i, acc, dv);
    for (; i < dv; ++i) {
        for (int r = 0; r < R; ++r) {
            float total = 0;
            for (int64_t j = 0; j < n; ++j) total = std::fma(weights[r * SPLIT + j], widened(v[j * step + i]), total);
            acc[r * dv + i] = total;
        }
    }
}

// What a split leaves of every query: the largest score, the sum of weights, the weighted sum of values [dv].
// A query that sees none of its keys leaves -infinity, 0 and zeros.
template <typename Q, typename T>
void one_split(const Call& c, int64_t row, int64_t head, int64_t first, float* left) {
    const int64_t queries = c.queries(), size = c.dv + 2;
    int64_t lowest = c.s, highest = 0;
    for (int64_t i = 0; i < c.t; ++i) {
        int64_t end = c.end(row, i);
        lowest = std::min(lowest, std::max(first, c.begin(end)));
        highest = std::max(highest, std::min(first + SPLIT, end));
    }
    const int64_t unseen = lowest > first ? (lowest - first) % L : 0;  // scored, so that a key keeps its lane whatever the windows, and never mixed
    lowest -= unseen;
    const int64_t n = highest - lowest;
    if (n <= 0) {
        for (int64_t r = 0; r < queries; ++r) {
            left[r * size] = -INFINITY;
            std::memset(left + r * size + 1, 0, (size - 1) * sizeof(float));
        }
        return;
    }
    thread_local std::vector<float> memory;
    const int64_t tile = std::is_same<T, float>::value || queries == 1 ? 0 : L * c.dk;
    const int64_t needed = queries * c.dk + queries * SPLIT + 4 * c.dv + tile;
    if (int64_t(memory.size()) < needed) memory.resize(needed);
    float* const q = memory.data();
    float* const weights = q + queries * c.dk;  // [queries SPLIT]: scores at first
    float* const acc = weights + queries * SPLIT;
    float* const rows = acc + 4 * c.dv;
    for (int64_t r = 0; r < queries; ++r) {
        const Q* from = reinterpret_cast<const Q*>(c.q) + row * c.qb + (head * (c.h / c.g) + r / c.t) * c.qh + r % c.t * c.qt;
        asked<T>(from, q + r * c.dk, c.dk);
    }
    const T* const k = reinterpret_cast<const T*>(c.k) + row * c.kb + head * c.kg + lowest * c.ks;
    const T* const v = reinterpret_cast<const T*>(c.v) + row * c.vb + head * c.vg + lowest * c.vs;
    for (int64_t j = 0; j < n; j += L) {
        const T* keys[L];
        for (int l = 0; l < L; ++l) keys[l] = k + std::min(j + l, n - 1) * c.ks;
        if (tile) {  // each key is widened once for all queries
            const float* wide[L];
            for (int l = 0; l < L; ++l) {
                constexpr int V = TOGETHER<T>;
                int64_t i = 0;
                for (; i + V * L <= c.dk; i += V * L) {
                    vf y[V];
                    loads<V>(keys[l] + i, y);
                    for (int u = 0; u < V; ++u) store(rows + l * c.dk + i + u * L, y[u]);
                }
                for (; i < c.dk; ++i) rows[l * c.dk + i] = widened(keys[l][i]);
                wide[l] = rows + l * c.dk;
            }
            for (int64_t r = 0; r < queries; ++r) store(weights + r * SPLIT + j, products(q + r * c.dk, wide, c.dk));
        } else {
            for (int64_t r = 0; r < queries; ++r) store(weights + r * SPLIT + j, products(q + r * c.dk, keys, c.dk));
        }
    }
    const float scale = float(c.scale), cap = float(c.cap);
    for (int64_t r = 0; r < queries; ++r) {
        float* const w = weights + r * SPLIT;
        const int64_t end = c.end(row, r % c.t);
        const int64_t padded = (n + L - 1) / L * L, to = std::max<int64_t>(0, std::min(highest, end) - lowest);
        const int64_t from = std::min(padded, std::max(lowest, c.begin(end)) - lowest);
        for (int64_t j = 0; j < padded; j += L) store(w + j, load(w + j) * scale);
        if (cap != 0)
            for (int64_t j = 0; j < n; ++j) w[j] = cap * std::tanh(w[j] / cap);
        for (int64_t j = 0; j < from; ++j) w[j] = -INFINITY;
        for (int64_t j = to; j < padded; ++j) w[j] = -INFINITY;
        vf top = all(-INFINITY);
        for (int64_t j = 0; j < padded; j += L) {
            vf x = load(w + j);
            top = x > top ? x : top;
        }
        float largest = -INFINITY;
        for (int l = 0; l < L; ++l) largest = top[l] > largest ? top[l] : largest;
        const float base = largest == -INFINITY ? 0.0f : largest;
        vf total = vf{};
        for (int64_t j = 0; j < padded; j += L) {
            vf e = exponential(load(w + j) - base);
            store(w + j, e);
            total += e;
        }
        left[r * size] = largest;
        left[r * size + 1] = sum(total);
    }
    for (int64_t r = 0; r < queries; r += 4) {
        const int64_t some = std::min<int64_t>(4, queries - r);
        const float* const w = weights + r * SPLIT + unseen;
        const T* const seen = v + unseen * c.vs;
        if (some == 4)
            mix<4>(w, seen, c.vs, n - unseen, acc, c.dv);
        else if (some == 3)
            mix<3>(w, seen, c.vs, n - unseen, acc, c.dv);
        else if (some == 2)
            mix<2>(w, seen, c.vs, n - unseen, acc, c.dv);
        else
            mix<1>(w, seen, c.vs, n - unseen, acc, c.dv);
        for (int64_t i = 0; i < some; ++i) std::memcpy(left + (r + i) * size + 2, acc + i * c.dv, c.dv * sizeof(float));
    }
}

// The splits of one row and key head, joined in order.
template <typename Q>
void join(const Call& c, int64_t row, int64_t head, const float* left, int64_t splits) {
    const int64_t queries = c.queries(), size = c.dv + 2;
    thread_local std::vector<float> total;
    total.resize(c.dv);
    for (int64_t r = 0; r < queries; ++r) {
        const int64_t h = head * (c.h / c.g) + r / c.t;
        float largest = c.sink == nullptr ? -INFINITY : c.sink[h];
        for (int64_t i = 0; i < splits; ++i) {
            float m = left[(i * queries + r) * size];
            largest = m > largest ? m : largest;
        }
        const float base = largest == -INFINITY ? 0.0f : largest;
        float sum = c.sink == nullptr ? 0.0f : exponential(c.sink[h] - base);
        for (int64_t j = 0; j < c.dv; ++j) total[j] = 0;
        for (int64_t i = 0; i < splits; ++i) {
            const float* from = left + (i * queries + r) * size;
            const float w = exponential(from[0] - base);
            sum += w * from[1];
            for (int64_t j = 0; j < c.dv; ++j) total[j] += w * from[2 + j];
        }
        const float by = sum == 0 ? 0.0f : 1.0f / sum;
        Q* to = reinterpret_cast<Q*>(c.out) + row * c.ob + h * c.oh + r % c.t * c.ot;
        for (int64_t j = 0; j < c.dv; ++j) put(to + j, total[j] * by);
    }
}

// One vector from the call to the cache.
inline void moved(const float* from, float* to, int64_t n) { std::memcpy(to, from, n * sizeof(float)); }
inline void moved(const bf16* from, bf16* to, int64_t n) { std::memcpy(to, from, n * sizeof(bf16)); }
template <typename Q, typename T>
inline void moved(const Q* from, T* to, int64_t n) {
    for (int64_t i = 0; i < n; ++i) put(to + i, widened(from[i]));
}

template <typename Q, typename T>
void remember(const Call& c) {
    for (int64_t row = 0; row < c.b; ++row)
        for (int64_t i = 0; i < c.t; ++i) {
            const int64_t place = c.ends == nullptr ? c.s - c.t + i : c.ends[row * c.eb + i] - 1;
            if (place < 0 || place >= c.s) continue;  // a query that sees no key has no place of its own either
            for (int64_t g = 0; g < c.g; ++g) {
                moved(reinterpret_cast<const Q*>(c.new_k) + row * c.nkb + i * c.nkt + g * c.nkg, reinterpret_cast<T*>(c.k) + row * c.kb + g * c.kg + place * c.ks, c.dk);
                moved(reinterpret_cast<const Q*>(c.new_v) + row * c.nvb + i * c.nvt + g * c.nvg, reinterpret_cast<T*>(c.v) + row * c.vb + g * c.vg + place * c.vs, c.dv);
            }
        }
}

template <typename Q, typename T>
void attend(const Call& c) {
    if (c.new_k != nullptr) remember<Q, T>(c);
    thread_local std::vector<float> memory;
    const int64_t splits = (c.s + SPLIT - 1) / SPLIT, queries = c.queries(), each = queries * (c.dv + 2), heads = c.b * c.g;
    if (int64_t(memory.size()) < heads * splits * each) memory.resize(heads * splits * each);
    float* const left = memory.data();
    int64_t keys = 0;
    for (int64_t row = 0; row < c.b; ++row) {
        int64_t end = c.end(row, c.t - 1);
        keys += end - c.begin(end);
    }
    const int64_t threads = keys * c.g * (c.dk + c.dv) * int64_t(sizeof(T)) < ALONE ? 1 : c.threads;
    parallel(heads * splits, threads, [&](int64_t from, int64_t to) {
        for (int64_t i = from; i < to; ++i) one_split<Q, T>(c, i / splits / c.g, i / splits % c.g, i % splits * SPLIT, left + i * each);
    });
    for (int64_t i = 0; i < heads; ++i) join<Q>(c, i / c.g, i % c.g, left + i * splits * each, splits);
}

}  // namespace

extern "C" void glassformer_attend(const void* call) {
    const Call& c = *static_cast<const Call*>(call);
    if (c.q_bf16)
        c.kv_bf16 ? attend<bf16, bf16>(c) : attend<bf16, float>(c);
    else
        c.kv_bf16 ? attend<float, bf16>(c) : attend<float, float>(c);
}
