// Work shared among the threads that torch has already: no pool of this library's own ever competes with torch's for the cores.
//
//     parallel(n, threads, f)  calls f(from, to) for ranges that make up 0 … n - 1, each of them once, on any thread
//
// The pool is reached through one function of the OpenMP library that torch brings along (`GOMP_parallel`, which GNU's, LLVM's
// and Intel's have), told to `glassformer_pool` when this library is loaded; without one, macOS has a pool of its own, and elsewhere
// the calling thread does everything. Ranges are taken as threads get to them, so what is computed must not depend on who does it.
//
// Waking threads for every loop of a decode step, and waiting until each of them has come, costs more than some of the loops, most of all
// where others want the cores too. A `Team` is woken once, by `together`:
//
//     leader:  f() ──► … open a loop, take ranges, close it, wait for those inside … ──► done
//     others:          … wait for a loop to be open, enter, take ranges, leave …     ──► go
//
// A loop waits for nobody who has not entered it. All of a team may enter, whatever `threads` the loop says above 1; loops do not nest.

#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>

#if defined(__APPLE__)
#include <dispatch/dispatch.h>
#endif

using Fork = void (*)(void (*)(void*), void*, unsigned, unsigned);
extern Fork glassformer_fork;  // threads.cpp

struct Team {
    std::atomic<uint64_t> turn{0};  // odd: a loop is open
    std::atomic<int> inside{0};
    std::atomic<bool> led{false}, done{false};
    int64_t threads = 1;
    void (*work)(void*) = nullptr;
    void* given = nullptr;
};
extern thread_local Team* glassformer_team;  // of the thread that leads one

inline void relax(int& waited) {
    if (++waited < 4096) {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
    } else {
        std::this_thread::yield();
    }
}

inline void lead(Team& team, void (*work)(void*), void* given) {
    team.work = work, team.given = given;
    const uint64_t turn = team.turn.load(std::memory_order_relaxed);
    team.turn.store(turn + 1);
    work(given);
    team.turn.store(turn + 2);  // whoever enters from here on sees it, and whoever did not see it is counted inside
    for (int waited = 0; team.inside.load() != 0;) relax(waited);
}

inline void follow(Team& team) {
    uint64_t last = 0;
    for (int waited = 0; !team.done.load(std::memory_order_acquire);) {
        const uint64_t turn = team.turn.load(std::memory_order_acquire);
        if (turn % 2 == 0 || turn == last) {
            relax(waited);
            continue;
        }
        team.inside.fetch_add(1);
        if (team.turn.load() == turn) team.work(team.given);
        team.inside.fetch_sub(1);
        last = turn, waited = 0;
    }
}

// f() by one thread, with the others at hand for every `parallel` in it.
template <typename F>
inline void together(int64_t threads, F&& f) {
#if defined(__APPLE__)
    f();
#else
    if (threads <= 1 || glassformer_fork == nullptr || glassformer_team != nullptr) return f();
    struct Shared {
        F& f;
        Team team;
    } shared{f, {}};
    shared.team.threads = threads;
    auto work = [](void* given) {
        Shared& s = *static_cast<Shared*>(given);
        if (s.team.led.exchange(true)) return follow(s.team);
        glassformer_team = &s.team;
        s.f();
        glassformer_team = nullptr;
        s.team.done.store(true, std::memory_order_release);
    };
    glassformer_fork(work, &shared, unsigned(threads), 0);
#endif
}

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
    if (glassformer_team != nullptr)
        lead(*glassformer_team, work, &shared);
    else
        glassformer_fork(work, &shared, unsigned(threads), 0);
#endif
}

// f(from, to) over rows of `n` numbers that each take a little work: by those who are awake anyway, if there is a team.
template <typename F>
inline void rows_of(int64_t rows, int64_t n, F&& f) {
    parallel(rows, glassformer_team != nullptr && rows * n >= (1 << 13) ? glassformer_team->threads : 1, f);
}
