// y = x W^T + b for a few rows x: W is read once, from the first byte to the last, and every type of W at the speed of memory.
//
//     x [m k] ──► float32 ──────────────────────────────────┐
//     4 rows of W [n k] as they lie in memory ──► 16 lanes ──┴──► m x 4 sums per lane ──► sums over lanes, in a tree ──► + b
//
// A number y[m, n] is summed in an order that is a function of k alone: every product is added by one fused operation to its
// lane, in the order of k (bfloat16: in one of its own). So a row has the same bits in any batch, at any place in it, with any number of threads.
//
// W in blocks (formats of GGUF files: 32 whole numbers and a float16 step) is unpacked in registers, number = step x whole number in
// float32, as a dequantised matrix has it: a packed matrix and its unpacked one give the same bits.

#include <cmath>
#include <cstring>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "parallel.h"
#include "products.h"

namespace {

constexpr int LANES = 16, ROWS = 4, BLOCK = 32;
constexpr int64_t AHEAD = 12288;  // bytes

typedef float f16 __attribute__((vector_size(64)));
typedef float f16_any __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint32_t u16 __attribute__((vector_size(64)));
typedef uint32_t u16_any __attribute__((vector_size(64), aligned(2), may_alias));
typedef int32_t i16 __attribute__((vector_size(64)));

enum { FLOAT32, BFLOAT16, Q8_0, Q4_0 };

// Lanes

inline f16 zeros() { return f16{}; }
inline f16 load(const float* p) { return *reinterpret_cast<const f16_any*>(p); }

// a * b + c, rounded once where the machine can, and then everywhere.
inline f16 fused(f16 a, f16 b, f16 c) {
#if defined(__AVX512F__)
    return (f16)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
    union Halves {
        f16 all;
        __m256 half[2];
    } p{a}, q{b}, r{c};
    for (int i = 0; i < 2; ++i) r.half[i] = _mm256_fmadd_ps(p.half[i], q.half[i], r.half[i]);
    return r.all;
#elif defined(__aarch64__)
    union Quarters {
        f16 all;
        float32x4_t part[4];
    } p{a}, q{b}, r{c};
    for (int i = 0; i < 4; ++i) r.part[i] = vfmaq_f32(r.part[i], p.part[i], q.part[i]);
    return r.all;
#else
    return a * b + c;
#endif
}

inline float sum(f16 x) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)x);  // the tree below
#else
    float lane[LANES];
    std::memcpy(lane, &x, sizeof x);
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; ++i) lane[i] += lane[i + half];
    return lane[0];
#endif
}

inline float from_bf16(const char* p) {
    uint16_t half;
    std::memcpy(&half, p, 2);
    uint32_t bits = uint32_t(half) << 16;
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

inline void to_bf16(char* p, float x) {  // to the nearest, ties to even
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    uint16_t half = x != x ? 0x7fc0 : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
    std::memcpy(p, &half, 2);
}

inline float from_fp16(const char* p) {
    uint16_t half;
    std::memcpy(&half, p, 2);
    uint32_t sign = uint32_t(half & 0x8000) << 16, e = half >> 10 & 31, f = half & 1023;
    if (e == 0) {
        float x = float(f) * 5.9604644775390625e-8f;  // 2^-24
        return sign ? -x : x;
    }
    uint32_t bits = sign | (e == 31 ? 255u : e + 112) << 23 | f << 13;
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

inline float number(const char* p, int64_t i, bool bf16) {
    if (bf16) return from_bf16(p + 2 * i);
    float x;
    std::memcpy(&x, p + 4 * i, 4);
    return x;
}

// W in numbers: UNIT of them are read together. Two vectors of bfloat16 come as those at even places and those at odd ones,
// a shift and a mask, so x waits in that order.

struct Float32 {
    static constexpr int UNIT = 16, BYTES = 64;
    static int64_t bytes(int64_t i) { return 4 * i; }
    static int64_t place(int64_t i) { return i; }
    static void read(const char* p, f16* w) { w[0] = load(reinterpret_cast<const float*>(p)); }
};

struct Bfloat16 {
    static constexpr int UNIT = 32, BYTES = 64;
    static int64_t bytes(int64_t i) { return 2 * i; }
    static int64_t place(int64_t i) { return i / 32 * 32 + i % 2 * 16 + i % 32 / 2; }
    static void read(const char* p, f16* w) {
        u16 both = *reinterpret_cast<const u16_any*>(p);
        w[0] = (f16)(both << 16);
        w[1] = (f16)(both & 0xffff0000u);
    }
};

// W in blocks of 32: a step, and a whole number for each.

inline f16 step_of(const char* p) {
#if defined(__AVX512F__) && defined(__AVX2__)
    uint16_t half;
    std::memcpy(&half, p, 2);
    return (f16)_mm512_cvtph_ps(_mm256_set1_epi16(short(half)));
#else
    return from_fp16(p) - zeros();
#endif
}

inline f16 wholes(const signed char* p) {
#if defined(__AVX512F__)
    return (f16)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
    f16 y;
    for (int i = 0; i < LANES; ++i) y[i] = float(p[i]);
    return y;
#endif
}

struct Eights {  // 32 bytes with a sign
    static constexpr int UNIT = BLOCK, BYTES = 34;
    static int64_t bytes(int64_t i) { return i / UNIT * BYTES; }
    static int64_t place(int64_t i) { return i; }
    static void read(const char* p, f16* w) {
        const f16 d = step_of(p);
        const signed char* q = reinterpret_cast<const signed char*>(p + 2);
        w[0] = d * wholes(q);
        w[1] = d * wholes(q + 16);
    }
};

struct Fours {  // 16 bytes: the first 16 numbers in the lower halves, the others in the upper ones, all 8 too large
    static constexpr int UNIT = BLOCK, BYTES = 18;
    static int64_t bytes(int64_t i) { return i / UNIT * BYTES; }
    static int64_t place(int64_t i) { return i; }
    static void read(const char* p, f16* w) {
        const f16 d = step_of(p);
#if defined(__AVX512F__)
        // The sixteen numbers there can be, and of each place the one that its four bits name: a permutation reads an index's lowest four.
        const f16 all = d * f16{-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};
        const __m512i both = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 2)));
        w[0] = (f16)_mm512_permutexvar_ps(both, (__m512)all);
        w[1] = (f16)_mm512_permutexvar_ps(_mm512_srli_epi32(both, 4), (__m512)all);
#else
        f16 low, high;
        for (int i = 0; i < LANES; ++i) {
            const unsigned char both = static_cast<unsigned char>(p[2 + i]);
            low[i] = float((both & 15) - 8);
            high[i] = float((both >> 4) - 8);
        }
        w[0] = d * low;
        w[1] = d * high;
#endif
    }
};

// R rows of W times M rows of x, of which `width` numbers are there (a whole number of units, zeros at the end).
template <typename W, int R, int M>
inline void tile(const char* w, int64_t stride, const float* x, int64_t width, int64_t k, float (*out)[M], int64_t ahead) {
    constexpr int V = W::UNIT / LANES;
    f16 part[R][M];
    for (auto& row : part)
        for (auto& p : row) p = zeros();
    const int64_t whole = k / W::UNIT * W::UNIT;
    auto step = [&](const f16 (*a)[V], int64_t i) {
        for (int m = 0; m < M; ++m)
            for (int v = 0; v < V; ++v) {
                f16 b = load(x + m * width + i + v * LANES);
                for (int r = 0; r < R; ++r) part[r][m] = fused(a[r][v], b, part[r][m]);
            }
    };
    for (int64_t i = 0; i < whole; i += W::UNIT) {
        f16 a[R][V];
        for (int r = 0; r < R; ++r) {
            const char* from = w + r * stride + W::bytes(i);
            W::read(from, a[r]);
            if (ahead) __builtin_prefetch(from + ahead, 0, 3);
        }
        step(a, i);
    }
    if (whole < k) {
        f16 a[R][V];
        for (int r = 0; r < R; ++r) {
            char last[W::BYTES] = {};
            std::memcpy(last, w + r * stride + W::bytes(whole), size_t(W::bytes(k) - W::bytes(whole)));
            W::read(last, a[r]);
        }
        step(a, whole);
    }
    for (int r = 0; r < R; ++r)
        for (int m = 0; m < M; ++m) out[r][m] = sum(part[r][m]);
}

// All rows of W

template <int M>
inline void put(const Call& c, int64_t n, int64_t m, const float* sums) {
    for (int i = 0; i < M; ++i) {
        const float y = c.bias == nullptr ? sums[i] : sums[i] + number(c.bias, n, c.x_bf16);
        char* to = c.y + ((m + i) * c.n + n) * (c.x_bf16 ? 2 : 4);
        if (c.x_bf16)
            to_bf16(to, y);
        else
            std::memcpy(to, &y, 4);
    }
}

// `tiles(rows, several, n, m, out)` computes W's rows n … against x's rows m …
template <int R, int M, typename Tiles>
inline void put_tile(const Call& c, const Tiles& tiles, int64_t n, int64_t m) {
    float out[R][M];
    tiles.template operator()<R, M>(n, m, out);
    for (int r = 0; r < R; ++r) put<M>(c, n + r, m, out[r]);
}

template <int R, typename Tiles>
inline void put_rows(const Call& c, const Tiles& tiles, int64_t n) {
    int64_t m = 0;
    if constexpr (R == ROWS && Tiles::PACKED)  // half as many rows of W by twice as many of x: unpacked half as often
        for (; m + 8 <= c.m; m += 8) {
            put_tile<R / 2, 8>(c, tiles, n, m);
            put_tile<R / 2, 8>(c, tiles, n + R / 2, m);
        }
    for (; m + 4 <= c.m; m += 4) put_tile<R, 4>(c, tiles, n, m);
    if (c.m - m == 3) put_tile<R, 3>(c, tiles, n, m);
    if (c.m - m == 2) put_tile<R, 2>(c, tiles, n, m);
    if (c.m - m == 1) put_tile<R, 1>(c, tiles, n, m);
}

template <typename Tiles>
void every(const Call& c, int64_t stride, const Tiles& tiles) {
    parallel((c.n + ROWS - 1) / ROWS, c.n * stride < ALONE ? 1 : c.threads, [&](int64_t from, int64_t to) {
        for (int64_t n = from * ROWS; n < std::min(to * ROWS, c.n); n += ROWS)
            if (n + ROWS <= c.n)
                put_rows<ROWS>(c, tiles, n);
            else
                for (int64_t one = n; one < c.n; ++one) put_rows<1>(c, tiles, one);
    });
}

// How far ahead of the bytes that are read others are asked for: whole groups of rows, and enough of them for memory to answer in time.
inline int64_t ahead(int64_t group) { return (AHEAD + group - 1) / group * group; }

template <typename W>
struct Numbers {
    static constexpr bool PACKED = W::BYTES != 64;
    const Call& c;
    const float* x;
    int64_t width;
    template <int R, int M>
    void operator()(int64_t n, int64_t m, float (*out)[M]) const {
        const int64_t stride = W::bytes(c.k);
        tile<W, R, M>(c.w + n * stride, stride, x + m * width, width, c.k, out, m == 0 ? ahead(R * stride) : 0);
    }
};

template <typename W>
void numbers(const Call& c) {
    const int64_t width = (c.k + W::UNIT - 1) / W::UNIT * W::UNIT;
    const float* x = reinterpret_cast<const float*>(c.x);
    thread_local std::vector<float> memory;
    if (c.x_bf16 || width != c.k || W::place(1) != 1) {
        memory.assign(size_t(c.m * width), 0.0f);
        for (int64_t m = 0; m < c.m; ++m)
            for (int64_t i = 0; i < c.k; ++i) memory[size_t(m * width + W::place(i))] = number(c.x, m * c.k + i, c.x_bf16);
        x = memory.data();
    }
    every(c, W::bytes(c.k), Numbers<W>{c, x, width});
}

// Rows of a table by their numbers: y = round(factor * table[id]) + places[at], rounded to y's type after each of the three.

struct Rows {
    const char* table;
    const int64_t* ids;
    const char* places;  // null: nothing is added; it has the type of y
    const int64_t* at;
    char* y;
    int64_t m, k, type, y_bf16;
    double factor;
};

template <typename W>
void rows(const Rows& c) {
    auto rounded = [&](float v) {
        if (!c.y_bf16) return v;
        char half[2];
        to_bf16(half, v);
        return from_bf16(half);
    };
    for (int64_t m = 0; m < c.m; ++m) {
        const char* row = c.table + c.ids[m] * W::bytes(c.k);
        for (int64_t i = 0; i < c.k; i += W::UNIT) {
            const int64_t n = std::min<int64_t>(W::UNIT, c.k - i);
            char unit[W::BYTES] = {};
            std::memcpy(unit, row + W::bytes(i), size_t(n == W::UNIT ? W::BYTES : W::bytes(c.k) - W::bytes(i)));
            f16 w[W::UNIT / LANES];
            W::read(unit, w);
            for (int64_t j = 0; j < n; ++j) {
                const int64_t place = W::place(j);
                float v = rounded(w[place / LANES][place % LANES]);
                if (c.factor != 1.0) {
                    volatile float times = v * float(c.factor);  // rounded here: no compiler fuses it with the sum below
                    v = rounded(times);
                }
                if (c.places != nullptr) v = rounded(v + number(c.places, c.at[m] * c.k + i + j, c.y_bf16));
                char* to = c.y + (m * c.k + i + j) * (c.y_bf16 ? 2 : 4);
                if (c.y_bf16)
                    to_bf16(to, v);
                else
                    std::memcpy(to, &v, 4);
            }
        }
    }
}

}  // namespace

extern "C" void glassformer_rows(const void* call) {
    const Rows& c = *static_cast<const Rows*>(call);
    switch (c.type) {
        case FLOAT32: return rows<Float32>(c);
        case BFLOAT16: return rows<Bfloat16>(c);
        case Q8_0: return rows<Eights>(c);
        case Q4_0: return rows<Fours>(c);
    }
}

extern "C" void glassformer_linear(const void* call) {
    const Call& c = *static_cast<const Call*>(call);
    switch (c.type) {
        case FLOAT32: return numbers<Float32>(c);
        case BFLOAT16: return numbers<Bfloat16>(c);
        case Q8_0: return numbers<Eights>(c);
        case Q4_0: return numbers<Fours>(c);
    }
}
