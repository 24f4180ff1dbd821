// Vectors of float32 as wide as the machine's registers (GCC's and Clang's vector types, no intrinsics), numbers in memory, exp.
//
// exp(x), x <= 0: x = n ln 2 + r with |r| <= ln 2 / 2, exp(r) = 1 + r + r^2 p(r) with p of degree 4 (fitted to a relative error
// of 3.1e-9); below -87.3 the result is 0, NaN stays NaN. Off by at most 1 unit in the last place (tests/native).

#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

namespace {

#if defined(__AVX512F__)
constexpr int L = 16;
#elif defined(__AVX__)
constexpr int L = 8;
#else
constexpr int L = 4;
#endif

typedef float vf __attribute__((vector_size(4 * L)));
typedef int32_t vi __attribute__((vector_size(4 * L)));
typedef uint32_t vu __attribute__((vector_size(4 * L)));
typedef float vf_any __attribute__((vector_size(4 * L), aligned(4), may_alias));
typedef uint16_t vh __attribute__((vector_size(2 * L)));
typedef uint16_t vh_any __attribute__((vector_size(2 * L), aligned(2), may_alias));
typedef uint32_t vu_any __attribute__((vector_size(4 * L), aligned(2), may_alias));

// Numbers in memory: float32, or bfloat16 as the upper half of one.

struct bf16 {
    uint16_t bits;
};

inline float widened(float x) { return x; }
inline float widened(bf16 x) {
    uint32_t u = uint32_t(x.bits) << 16;
    float y;
    std::memcpy(&y, &u, 4);
    return y;
}
inline vf load(const float* p) { return *reinterpret_cast<const vf_any*>(p); }
inline vf load(const bf16* p) {
    vh half = *reinterpret_cast<const vh_any*>(p);
    vu wide = __builtin_convertvector(half, vu) << 16;
    return (vf)wide;
}

// V vectors at once. Two vectors of bfloat16 come as those at even places and those at odd places, which costs a shift and
// a mask where widening in order costs shuffles; `held` puts such vectors back in order.
template <int V>
inline void loads(const float* p, vf* x) {
    for (int c = 0; c < V; ++c) x[c] = load(p + c * L);
}
template <int V>
inline void loads(const bf16* p, vf* x) {
    if constexpr (V == 1) {
        x[0] = load(p);
    } else {
        for (int c = 0; c < V; c += 2) {
            vu both = *reinterpret_cast<const vu_any*>(p + c * L);
            x[c] = (vf)(both << 16);
            x[c + 1] = (vf)(both & 0xffff0000u);
        }
    }
}

inline void store(float* p, vf x) { *reinterpret_cast<vf_any*>(p) = x; }
template <int V, typename T>
inline void held(float* p, const vf* x) {
    if constexpr (V == 1 || std::is_same<T, float>::value) {
        for (int c = 0; c < V; ++c) store(p + c * L, x[c]);
    } else {
        for (int c = 0; c < V; ++c)
            for (int l = 0; l < L; ++l) p[c / 2 * 2 * L + 2 * l + c % 2] = x[c][l];
    }
}
inline void put(float* p, float x) { *p = x; }
inline void put(bf16* p, float x) {
    uint32_t u;
    std::memcpy(&u, &x, 4);
    p->bits = x != x ? uint16_t(0x7fc0) : uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16);  // to the nearest, ties to even
}
inline vf all(float x) { return x - vf{}; }

// Sums across a vector, of L vectors at once: two become one half as wide until lane l holds the sum of vector l.

template <int HALF, size_t... I>
inline vf folded(vf a, vf b, std::index_sequence<I...>) {
#if defined(__clang__) || __GNUC__ >= 12
    vf low = __builtin_shufflevector(a, b, (I / HALF * 2 * HALF + I % HALF)...);
    vf high = __builtin_shufflevector(a, b, (I / HALF * 2 * HALF + I % HALF + HALF)...);
#else
    vf low = __builtin_shuffle(a, b, vi{int32_t(I / HALF * 2 * HALF + I % HALF)...});
    vf high = __builtin_shuffle(a, b, vi{int32_t(I / HALF * 2 * HALF + I % HALF + HALF)...});
#endif
    return low + high;
}

template <int N>
inline vf sums(const vf* x) {
    if constexpr (N == 1) {
        return x[0];
    } else {
        return folded<L / N>(sums<N / 2>(x), sums<N / 2>(x + N / 2), std::make_index_sequence<L>{});
    }
}

inline float sum(vf x) {
    float lanes[L], total = 0;
    std::memcpy(lanes, &x, sizeof x);
    for (int i = 0; i < L; ++i) total += lanes[i];
    return total;
}

inline vf exponential(vf x) {
    const vf least = all(-87.3f);
    vf gone = all(0.0f);
    auto below = x < least;  // false for NaN, which stays
    x = below ? least : x;
    vf shift = all(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number
    vf n = (x * 1.44269504088896341f + shift) - shift;
    vf r = (x - n * 0.693145751953125f) - n * 1.42860682030941723e-6f;
    vf p = ((((1.381460894e-03f * r + 8.368710282e-03f) * r + 4.166838745e-02f) * r + 1.666652068e-01f) * r + 4.999999345e-01f);
    vf e = (p * r * r + r) + 1.0f;
    auto nan = x != x;
    vi power = (__builtin_convertvector(nan ? gone : n, vi) + 127) << 23;
    return below ? gone : e * (vf)power;
}

inline float exponential(float x) { return exponential(all(x))[0]; }

}  // namespace
