// Work shared among the threads that torch has already: no pool of this library's own ever competes with torch's for the cores.
//
//     parallel(n, threads, f)  calls f(from, to) for ranges that make up 0 … n - 1, each of them once, on any thread
//
// The pool is reached through one function of the OpenMP library that torch brings along (`GOMP_parallel`, which GNU's, LLVM's
// and Intel's have), told to `glassformer_pool` when this library is loaded; without one, macOS has a pool of its own, and elsewhere
// the calling thread does everything. Ranges are taken as threads get to them, so what is computed must not depend on who does it.

#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

#if defined(__APPLE__)
#include <dispatch/dispatch.h>
#endif

using Fork = void (*)(void (*)(void*), void*, unsigned, unsigned);
extern Fork glassformer_fork;  // threads.cpp

template <typename F>
inline void parallel(int64_t n, int64_t threads, F&& f) {
    threads = std::min(threads, n);
#if !defined(__APPLE__)
    if (glassformer_fork == nullptr) threads = 1;
#endif
    if (threads <= 1) {
        if (n > 0) f(int64_t(0), n);
        return;
    }
    struct Shared {
        F& f;
        int64_t n, step;
        std::atomic<int64_t> next;
    } shared{f, n, std::max<int64_t>(1, n / (4 * threads)), {0}};  // a thread that was held up leaves the rest to the others
    auto work = [](void* given) {
        Shared& s = *static_cast<Shared*>(given);
        for (int64_t from; (from = s.next.fetch_add(s.step, std::memory_order_relaxed)) < s.n;) s.f(from, std::min(from + s.step, s.n));
    };
#if defined(__APPLE__)
    struct Call {
        void (*work)(void*);
        void* given;
    } call{work, &shared};
    dispatch_apply_f(size_t(threads), dispatch_get_global_queue(QOS_CLASS_USER_INITIATED, 0), &call, [](void* c, size_t) {
        static_cast<Call*>(c)->work(static_cast<Call*>(c)->given);
    });
#else
    glassformer_fork(work, &shared, unsigned(threads), 0);
#endif
}
