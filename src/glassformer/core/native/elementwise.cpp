// What a decode step does between its products, on a few rows: norms, rotations of queries and keys, activations; and the
// sum over a row of logits after them.
//
// Each is one pass in float32. A row is a few kilobytes, and waking another thread takes longer: several rows are shared only among
// threads that are awake.

#include <cmath>

#include "parallel.h"
#include "vectors.h"

namespace {

inline float rounded(float x, const float*) { return x; }
inline float rounded(float x, const bf16*) {
    bf16 y;
    put(&y, x);
    return widened(y);
}

inline vf sigmoid(vf x) {
    vf e = exponential(x < 0.0f ? x : -x);  // e^-|x|
    return (x < 0.0f ? e : all(1.0f)) / (1.0f + e);
}

struct Norm {
    const char *x, *weight, *bias;  // bias null: none
    char* out;
    int64_t rows, d, is_bf16, rms;
    double eps, offset;  // offset: added to the weight
    int64_t late;        // whether rounding to the type of x waits until the weight is multiplied
};

// Mean over a row of f(x), L partial sums, in order.
template <typename T, typename F>
inline float mean(const T* x, int64_t d, F f) {
    vf part = vf{};
    int64_t i = 0;
    for (; i + L <= d; i += L) part += f(load(x + i));
    float total = sum(part);
    for (; i < d; ++i) total += f(all(widened(x[i])))[0];
    return total / float(d);
}

template <typename T>
void norm(const Norm& c) {
    const T* weight = reinterpret_cast<const T*>(c.weight);
    const T* bias = reinterpret_cast<const T*>(c.bias);
    auto one = [&](int64_t row) {
        const T* x = reinterpret_cast<const T*>(c.x) + row * c.d;
        T* y = reinterpret_cast<T*>(c.out) + row * c.d;
        const float centre = c.rms ? 0.0f : mean(x, c.d, [](vf v) { return v; });
        const float by = 1.0f / std::sqrt(mean(x, c.d, [centre](vf v) { return (v - centre) * (v - centre); }) + float(c.eps));
        const float offset = float(c.offset);
        if (c.rms && !c.late) {
            for (int64_t i = 0; i < c.d; ++i) put(y + i, rounded(widened(x[i]) * by, x) * rounded(offset + widened(weight[i]), x));
        } else if (bias == nullptr) {
            for (int64_t i = 0; i < c.d; ++i) put(y + i, (widened(x[i]) - centre) * by * (offset + widened(weight[i])));
        } else {
            for (int64_t i = 0; i < c.d; ++i) put(y + i, (widened(x[i]) - centre) * by * (offset + widened(weight[i])) + widened(bias[i]));
        }
    };
    rows_of(c.rows, c.d, [&](int64_t from, int64_t to) {
        for (int64_t row = from; row < to; ++row) one(row);
    });
}

struct Turn {
    const char* x;           // [b t n k]
    char* out;               // [b t n k], without gaps
    const float *cos, *sin;  // [t dim] or [b t dim], dim <= k
    int64_t b, t, n, k, dim, xb, xt, xn, tb, half, is_bf16;
};

template <typename T>
void turn(const Turn& c) {
    const int64_t pairs = c.dim / 2;
    for (int64_t row = 0; row < c.b; ++row)
        for (int64_t i = 0; i < c.t; ++i) {
            const float* cos = c.cos + row * c.tb + i * c.dim;
            const float* sin = c.sin + row * c.tb + i * c.dim;
            for (int64_t h = 0; h < c.n; ++h) {
                const T* x = reinterpret_cast<const T*>(c.x) + row * c.xb + i * c.xt + h * c.xn;
                T* y = reinterpret_cast<T*>(c.out) + ((row * c.t + i) * c.n + h) * c.k;
                for (int64_t j = c.dim; j < c.k; ++j) y[j] = x[j];
                if (c.half) {
                    for (int64_t j = 0; j < pairs; ++j) {
                        const float a = widened(x[j]), b = widened(x[j + pairs]);
                        put(y + j, a * cos[j] - b * sin[j]);
                        put(y + j + pairs, b * cos[j + pairs] + a * sin[j + pairs]);
                    }
                } else {
                    for (int64_t j = 0; j < c.dim; j += 2) {
                        const float a = widened(x[j]), b = widened(x[j + 1]);
                        put(y + j, a * cos[j] - b * sin[j]);
                        put(y + j + 1, b * cos[j + 1] + a * sin[j + 1]);
                    }
                }
            }
        }
}

struct Bend {
    const char *x, *up;  // up: what the bent x is multiplied by, of the same steps; null: nothing
    char* out;           // [rows n]
    int64_t rows, n, step, is_bf16, kind;
};

enum { GELU_TANH, SILU, RELU, RELU_SQUARED };

inline vf bent(vf x, int64_t kind) {
    vf zero = vf{};
    switch (kind) {
        case GELU_TANH:  // 1 + tanh(u) = 2 sigmoid(2u), u = sqrt(2 / pi) (x + 0.044715 x^3)
            return x * sigmoid(x * (1.5957691216057308f + 0.07135481627260025f * x * x));
        case SILU:
            return x * sigmoid(x);
        case RELU:
            return x < 0.0f ? zero : x;
        default: {
            vf r = x < 0.0f ? zero : x;
            return r * r;
        }
    }
}

template <typename T>
void bend(const Bend& c) {
    auto one = [&](int64_t row) {
        const T* x = reinterpret_cast<const T*>(c.x) + row * c.step;
        const T* up = c.up == nullptr ? nullptr : reinterpret_cast<const T*>(c.up) + row * c.step;
        T* out = reinterpret_cast<T*>(c.out) + row * c.n;
        for (int64_t i = 0; i < c.n; i += L) {
            const int64_t some = c.n - i < L ? c.n - i : L;
            vf v = vf{};
            if (some == L)
                v = load(x + i);
            else
                for (int64_t l = 0; l < some; ++l) v[l] = widened(x[i + l]);
            v = bent(v, c.kind);
            for (int64_t l = 0; l < some; ++l) put(out + i + l, up == nullptr ? v[l] : rounded(v[l], x) * widened(up[i + l]));
        }
    };
    rows_of(c.rows, c.n, [&](int64_t from, int64_t to) {
        for (int64_t row = from; row < to; ++row) one(row);
    });
}

struct Sum {
    const float* x;  // [rows n]
    float* out;      // [rows]
    int64_t rows, n, step;
};

// ln sum exp of a row: sums of 4,096 numbers in float32, the sums' sum in float64. NaN wins over infinity.
float logsumexp(const float* x, int64_t n) {
    vf top = all(-INFINITY);
    int64_t i = 0;
    for (; i + L <= n; i += L) {
        vf v = load(x + i);
        top = v > top ? v : top;
    }
    float largest = -INFINITY;
    for (int l = 0; l < L; ++l) largest = top[l] > largest ? top[l] : largest;
    for (; i < n; ++i) largest = x[i] > largest ? x[i] : largest;
    const float base = std::isinf(largest) ? 0.0f : largest;
    double total = 0;
    for (int64_t from = 0; from < n; from += 4096) {
        const int64_t to = from + 4096 < n ? from + 4096 : n;
        vf part = vf{};
        for (i = from; i + L <= to; i += L) part += exponential(load(x + i) - base);
        float some = sum(part);
        for (; i < to; ++i) some += exponential(x[i] - base);
        total += some;
    }
    if (largest == INFINITY) {
        for (i = 0; i < n; ++i)
            if (x[i] != x[i]) return NAN;
        return INFINITY;
    }
    return float(double(base) + std::log(total));
}

}  // namespace

extern "C" void glassformer_logsumexp(const void* call) {
    const Sum& c = *static_cast<const Sum*>(call);
    for (int64_t row = 0; row < c.rows; ++row) c.out[row] = logsumexp(c.x + row * c.step, c.n);
}

extern "C" void glassformer_norm(const void* call) {
    const Norm& c = *static_cast<const Norm*>(call);
    c.is_bf16 ? norm<bf16>(c) : norm<float>(c);
}

extern "C" void glassformer_turn(const void* call) {
    const Turn& c = *static_cast<const Turn*>(call);
    c.is_bf16 ? turn<bf16>(c) : turn<float>(c);
}

extern "C" void glassformer_bend(const void* call) {
    const Bend& c = *static_cast<const Bend*>(call);
    c.is_bf16 ? bend<bf16>(c) : bend<float>(c);
}
