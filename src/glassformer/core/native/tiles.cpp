// y = x W^T + b in bfloat16 for 9 to 32 rows x, on processors whose matrix unit multiplies tiles of 16 x 32 by 32 x 16 (x86's AMX):
// too many rows for the vector unit to keep up with memory, too few for a library to lay W out anew first.
//
//     x [m k] ──► pairs of numbers side by side, 16 rows of x each, once ──► B [k/2 16 2] ──┐
//     W [n k] ──► 16 of its rows as they lie in memory ──► A [16 k] ────────────────────────┴──► A B in float32 ──► + b ──► y [m n]
//
// The unit adds products in float32, two at a time in the order of k, so a row of x has the same bits whatever the others are; they are
// not those of products.cpp, which adds in sixteen lanes.

#include <cstdint>
#include <cstring>
#include <vector>

#include "parallel.h"
#include "products.h"
#include "vectors.h"

#if defined(__AMX_BF16__) && defined(__linux__)
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace {

constexpr int64_t SIDE = 16, DEEP = 32;  // rows of a tile, and numbers of k in each

struct Shape {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};
    Shape() {
        for (int i = 0; i < 8; ++i) bytes[i] = 64, rows[i] = SIDE;
    }
};

// x [m k] -> [m / 16, k / 2 pairs, 16 rows, 2], zeros where there is no row.
std::vector<uint32_t> paired(const Call& c, int64_t blocks) {
    const int64_t pairs = c.k / 2;
    std::vector<uint32_t> made(size_t(blocks * SIDE * pairs));
    for (int64_t m = 0; m < c.m; ++m) {
        const char* x = c.x + m * 4 * pairs;
        uint32_t* to = made.data() + m / SIDE * SIDE * pairs + m % SIDE;
        for (int64_t i = 0; i < pairs; ++i) std::memcpy(to + i * SIDE, x + 4 * i, 4);
    }
    return made;
}

// 32 rows of W (`w`, a row every `stride` bytes) against one or two blocks of 16 rows of x.
template <int B>
void block(const char* w, int64_t stride, const uint32_t* x, int64_t k, float* sums, int64_t ahead) {
    _tile_zero(0);
    _tile_zero(1);
    if (B == 2) {
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int64_t i = 0; i < k; i += DEEP) {
        const char* from = w + 2 * i;
        if (ahead)
            for (int64_t r = 0; r < 2 * SIDE; ++r) __builtin_prefetch(from + r * stride + ahead, 0, 3);
        _tile_loadd(4, from, stride);
        _tile_loadd(5, from + SIDE * stride, stride);
        _tile_loadd(6, x + i / 2 * SIDE, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 5, 6);
        if (B == 2) {
            _tile_loadd(7, x + (k + i) / 2 * SIDE, 64);
            _tile_dpbf16ps(2, 4, 7);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, sums, 64);
    _tile_stored(1, sums + SIDE * SIDE, 64);
    if (B == 2) {
        _tile_stored(2, sums + 2 * SIDE * SIDE, 64);
        _tile_stored(3, sums + 3 * SIDE * SIDE, 64);
    }
}

// A column of 16 sums, at every 16th place, as (the first `some` of) 16 numbers of y side by side.
inline void lay_down(const float* sums, const bf16* bias, bf16* y, int64_t some) {
#if defined(__AVX512BF16__)
    const __m512i places = _mm512_slli_epi32(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0), 4);
    const __mmask16 there = __mmask16((1u << some) - 1);
    __m512 v = _mm512_i32gather_ps(places, sums, 4);
    if (bias != nullptr)
        v = _mm512_add_ps(v, _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(there, bias)), 16)));
    _mm256_mask_storeu_epi16(y, there, (__m256i)_mm512_cvtneps_pbh(v));
#else
    for (int64_t r = 0; r < some; ++r) put(y + r, bias == nullptr ? sums[r * SIDE] : sums[r * SIDE] + widened(bias[r]));
#endif
}

template <int B>
void product(const Call& c) {
    const std::vector<uint32_t> x = paired(c, B);
    const bf16* bias = reinterpret_cast<const bf16*>(c.bias);
    bf16* y = reinterpret_cast<bf16*>(c.y);
    const int64_t stride = 2 * c.k, rows = 2 * SIDE;
    parallel((c.n + rows - 1) / rows, c.n * stride < ALONE ? 1 : c.threads, [&](int64_t from, int64_t to) {
        const Shape shape;
        _tile_loadconfig(&shape);  // others of this process use the unit too
        alignas(64) float sums[2 * 2 * SIDE * SIDE];
        std::vector<char> last;
        for (int64_t i = from; i < to; ++i) {
            const int64_t n = i * rows, some = std::min(rows, c.n - n);
            const char* w = c.w + n * stride;
            if (some < rows) {
                last.assign(size_t(rows * stride), 0);
                std::memcpy(last.data(), w, size_t(some * stride));
                w = last.data();
            }
            block<B>(w, stride, x.data(), c.k, sums, some < rows ? 0 : rows * stride);
            for (int64_t at = 0; at < some; at += SIDE)
                for (int64_t m = 0; m < c.m; ++m)
                    lay_down(
                        sums + (m / SIDE * rows + at) * SIDE + m % SIDE, bias == nullptr ? nullptr : bias + n + at, y + m * c.n + n + at, std::min(SIDE, some - at)
                    );
        }
        _tile_release();
    });
}

}  // namespace

// Whether the unit is there and the system lets this process use it.
extern "C" int glassformer_has_tiles() {
    constexpr long REQUEST = 0x1023, TILE_DATA = 18;  // arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)
    static const bool here = syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
    return here;
}

extern "C" void glassformer_tiles(const void* call) {
    const Call& c = *static_cast<const Call*>(call);
    c.m <= SIDE ? product<1>(c) : product<2>(c);
}
#else
extern "C" int glassformer_has_tiles() { return 0; }
extern "C" void glassformer_tiles(const void*) {}
#endif
