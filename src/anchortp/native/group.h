// Sums over the ranks of an epoch, through the region of shared memory that `comm/region.py` describes and creates.
#pragma once

#include <sched.h>
#include <time.h>

#include <algorithm>

#include "rows.h"

namespace {

// As `GroupMemory` in `library.py`. Words and lines as in `comm/region.py`.
struct Group {
    int64_t* words;
    char* slots;
    int64_t slot_bytes, size, rank, two_phase_from, timeout_ns, avoid_yield_until_ns;

    int64_t* line_of(int64_t of_rank) const { return words + (8 + of_rank) * 8; }
    bool is_aborted() const { return __atomic_load_n(words + 8, __ATOMIC_ACQUIRE) != 0; }
    char* slot(int64_t parity, int64_t of_rank) const { return slots + (parity * size + of_rank) * slot_bytes; }
};

enum Outcome : int { kDone = 0, kAborted = 1, kTimedOut = 2, kMismatch = 3 };

// How a rank waits: as `comm.region.Rendezvous`, whose numbers these are.
constexpr int64_t kLostNs = 2500000, kAvoidYieldNs = 100000000, kNapNs = 20000, kLongWaitNs = 2000000, kLongNapNs = 100000;

inline int64_t now_ns() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

inline void nap(int64_t ns) {
    const timespec t = {0, ns};
    nanosleep(&t, nullptr);
}

inline Outcome wait_for(Group& group, const int64_t* word, int64_t goal) {
    int64_t began = 0;
    while (__atomic_load_n(word, __ATOMIC_ACQUIRE) < goal) {
        if (group.is_aborted()) return kAborted;
        const int64_t now = now_ns();
        if (!began) began = now;
        if (now - began > group.timeout_ns) return kTimedOut;
        if (now - began > kLongWaitNs) nap(kLongNapNs);
        else if (now < group.avoid_yield_until_ns) nap(kNapNs);
        else {
            sched_yield();
            const int64_t back = now_ns();
            if (back - now > kLostNs) group.avoid_yield_until_ns = back + kAvoidYieldNs;
        }
    }
    return kDone;
}

// Every rank's arrivals are at least this one's.
inline Outcome wait_for_all(Group& group) {
    const int64_t goal = group.line_of(group.rank)[0];
    for (int64_t rank = 0; rank < group.size; ++rank)
        if (Outcome outcome = wait_for(group, group.line_of(rank), goal)) return outcome;
    return kDone;
}

// One collective: `put(slot)` fills this rank's slot, and `parts` are the slots of all, which stand until the next but one.
// `kind`: the low bits of its tag, which `comm/shm.py` knows as well.
template <class T, class Put>
Outcome meet(Group& group, int64_t num, int64_t kind, const T** parts, Put put) {
    if (group.is_aborted()) return kAborted;
    if (Outcome outcome = wait_for_all(group)) return outcome;
    int64_t* own = group.line_of(group.rank);
    const int64_t arrival = own[0] + 1, parity = arrival & 1, tag = num << 3 | kind;
    put(reinterpret_cast<T*>(group.slot(parity, group.rank)));
    own[2 + parity] = tag;
    __atomic_store_n(own, arrival, __ATOMIC_RELEASE);
    if (Outcome outcome = wait_for_all(group)) return outcome;
    for (int64_t rank = 0; rank < group.size; ++rank) {
        if (group.line_of(rank)[2 + parity] != tag) return kMismatch;
        parts[rank] = reinterpret_cast<const T*>(group.slot(parity, rank));
    }
    return kDone;
}

constexpr int64_t kMostRanks = 1024, kSum = 4, kSpread = 5;

// In the order of the ranks, in float32, rounded once.
template <class T, class Lanes>
inline Floats sum_of_parts(const T* const* parts, int64_t size, int64_t i, Lanes lanes) {
    Floats sum = load(parts[0] + i, lanes);
    for (int64_t rank = 1; rank < size; ++rank) sum += load(parts[rank] + i, lanes);
    return rounded<T>(sum);
}

// Every rank's values, in the model's dtype: that is all that they had.
template <class T>
Outcome exchange(Group& group, const T* x, int64_t num, const T** parts) {
    return meet(group, num, kSum, parts, [&](T* slot) { std::memcpy(slot, x, num * sizeof(T)); });
}

// Of many values every rank sums a share, in whole cache lines, and takes the others' sums.
template <class T>
Outcome all_reduce(Group& group, T* x, int64_t num) {
    const T* parts[kMostRanks];
    if (Outcome outcome = exchange(group, x, num, parts)) return outcome;
    const auto add_up = [&](T* to, int64_t start, int64_t stop) {
        by_lanes(std::max<int64_t>(0, stop - start), [&](int64_t i, auto lanes) {
            store(to + start + i, sum_of_parts(parts, group.size, start + i, lanes), lanes);
        });
    };
    if (num < group.two_phase_from) {
        add_up(x, 0, num);
        return kDone;
    }
    const int64_t line = kLineBytes / sizeof(T), width = (num + group.size * line - 1) / (group.size * line) * line;
    const auto bound = [&](int64_t rank) { return std::min(num, rank * width); };
    const T* sums[kMostRanks];
    const auto put = [&](T* slot) { add_up(slot, bound(group.rank), bound(group.rank + 1)); };
    if (Outcome outcome = meet(group, num, kSpread, sums, put)) return outcome;
    for (int64_t rank = 0; rank < group.size; ++rank)
        std::memcpy(x + bound(rank), sums[rank] + bound(rank), (bound(rank + 1) - bound(rank)) * sizeof(T));
    return kDone;
}

// Adds the sum of every rank's `partial` to the residual stream `x`; with a `weight`, `normed` is the norm of that.
template <class T>
Outcome reduce_add_norm(Group& group, T* partial, T* x, const T* weight, T* normed, int64_t num_rows, int64_t num,
                        float eps) {
    const T* parts[kMostRanks] = {partial};
    int64_t num_parts = 1;
    if (group.size == 1) {
        if (group.is_aborted()) return kAborted;
    } else if (num_rows * num >= group.two_phase_from) {
        if (Outcome outcome = all_reduce(group, partial, num_rows * num)) return outcome;
    } else {
        if (Outcome outcome = exchange(group, partial, num_rows * num, parts)) return outcome;
        num_parts = group.size;
    }
    for (int64_t row = 0; row < num_rows; ++row) {
        const int64_t first = row * num;
        by_lanes(num, [&](int64_t i, auto lanes) {
            store(x + first + i, load(x + first + i, lanes) + sum_of_parts(parts, num_parts, first + i, lanes), lanes);
        });
        if (weight) norm_row(x + first, weight, normed + first, num, eps);
    }
    return kDone;
}

}  // namespace
