// Many calls as one: the kernels of a decode step in their order, so that nobody has to be asked between them.
//
//     ops [n]: (function, its call) ──► function(call), one after the other
//
// A call is the struct that the function takes by itself; what it computes has the same bits either way.

#include <cstdint>

#include "parallel.h"
#include "vectors.h"

namespace {

struct Op {
    void (*run)(const void*);
    const void* call;
};

struct Program {
    const Op* ops;
    int64_t n, threads;
};

struct Add {
    char* x;  // x += y
    const char* y;
    int64_t n, is_bf16;
};

template <typename T>
void add(const Add& c) {
    T* x = reinterpret_cast<T*>(c.x);
    const T* y = reinterpret_cast<const T*>(c.y);
    for (int64_t i = 0; i < c.n; ++i) put(x + i, widened(x[i]) + widened(y[i]));
}

}  // namespace

extern "C" void glassformer_add(const void* call) {
    const Add& c = *static_cast<const Add*>(call);
    c.is_bf16 ? add<bf16>(c) : add<float>(c);
}

extern "C" void glassformer_program(const void* call) {
    const Program& c = *static_cast<const Program*>(call);
    together(c.threads, [&] {
        for (int64_t i = 0; i < c.n; ++i) c.ops[i].run(c.ops[i].call);
    });
}
