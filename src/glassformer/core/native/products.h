// What a product is told: by products.cpp and tiles.cpp alike, from glassformer/parts/linear.py.

#pragma once

#include <cstdint>

namespace {

constexpr int64_t ALONE = 1 << 16;  // bytes of W below which waking another thread costs more than it saves

struct Call {
    const char *x, *w, *bias;  // bias null: none; it has the type of x, as y has
    char* y;
    int64_t m, n, k, type, x_bf16, threads;
};

}  // namespace
