// Attention over the KV cache where it lies.
#pragma once

#include <algorithm>
#include <vector>

#include "vectors.h"

namespace {

inline int64_t rounded_up(int64_t num, int64_t multiple) { return (num + multiple - 1) / multiple * multiple; }

inline void transpose(Floats* x) {  // 16 x 16: swaps a bit of the row's number with that of the lane's, bit by bit
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
        const Floats a = x[i], b = x[i + 8];
        x[i] = __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23);
        x[i + 8] = __builtin_shufflevector(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    }
#pragma GCC unroll 8
    for (int n = 0; n < 8; ++n) {
        const int i = n + n / 4 * 4;
        const Floats a = x[i], b = x[i + 4];
        x[i] = __builtin_shufflevector(a, b, 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27);
        x[i + 4] = __builtin_shufflevector(a, b, 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
    }
#pragma GCC unroll 8
    for (int n = 0; n < 8; ++n) {
        const int i = n + n / 2 * 2;
        const Floats a = x[i], b = x[i + 2];
        x[i] = __builtin_shufflevector(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29);
        x[i + 2] = __builtin_shufflevector(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
    }
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
        const Floats a = x[i], b = x[i + 1];
        x[i] = __builtin_shufflevector(a, b, 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30);
        x[i + 1] = __builtin_shufflevector(a, b, 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
    }
}

// The sum of the lanes of each of 16 vectors, in order. Each round adds up halves of the lanes of two vectors and leaves the
// results beside each other in one. Overwrites them.
inline Floats sums_of(Floats* x) {
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2)
        x[i] = __builtin_shufflevector(x[i], x[i + 1], 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29) +
               __builtin_shufflevector(x[i], x[i + 1], 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4)
        x[i] = __builtin_shufflevector(x[i], x[i + 2], 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
               __builtin_shufflevector(x[i], x[i + 2], 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
#pragma GCC unroll 2
    for (int i = 0; i < 16; i += 8)
        x[i] = __builtin_shufflevector(x[i], x[i + 4], 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
               __builtin_shufflevector(x[i], x[i + 4], 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
    return __builtin_shufflevector(x[0], x[8], 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
           __builtin_shufflevector(x[0], x[8], 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
}

constexpr int64_t kTileVectors = 16, kTileTokens = 2 * kLanes;

// Some consecutive tokens of one sequence, and the q heads that read one KV head.
template <class T>
struct Tile {
    static constexpr int64_t kTerms = InWords<T>::kTerms;

    const T *q, *keys, *values;
    T* out;
    const int32_t *table, *heads;
    int64_t first_row, num_rows, num_heads, num_keys;  // keys that the last row sees; each row before sees one less
    int64_t num_q, head_dim, block_size;

    int64_t place_of(int64_t vector) const {
        return ((first_row + vector / num_heads) * num_q + heads[vector % num_heads]) * head_dim;
    }

    // Rows of a plane, of `kTileTokens` tokens from `first` on; null behind the last token.
    void find(const T* plane, int64_t first, const T** rows) const {
        const int64_t num = num_keys - first < kTileTokens ? num_keys - first : kTileTokens;
        int64_t block = first / block_size, place = first % block_size, t = 0;
        for (; t < num; ++block, place = 0) {
            const T* from = plane + (table[block] * block_size + place) * head_dim;
            const int64_t stop = t + (block_size - place < num - t ? block_size - place : num - t);
            for (; t < stop; ++t, from += head_dim) rows[t] = from;
        }
        for (; t < kTileTokens; ++t) rows[t] = nullptr;
    }

    // The keys of all tokens; for `num`, which may be more or less, some again or not all.
    void find_keys(int64_t num, std::vector<const T*>& rows) const {
        rows.resize(rounded_up(num, kTileTokens));
        for (int64_t first = 0; first < num; first += kTileTokens) {
            if (first < num_keys) find(keys, first, rows.data() + first);
            else std::fill_n(rows.begin() + first, kTileTokens, rows[0]);
            for (int64_t t = first; t < first + kTileTokens; ++t) rows[t] = rows[t] ? rows[t] : rows[first];
        }
    }

    // Asks memory for values that are taken soon: a sequence's blocks lie anywhere.
    void ask_for_values(int64_t first) const {
        const T* rows[kTileTokens];
        find(values, first, rows);
        for (int64_t t = 0; t < kTileTokens && rows[t]; ++t)
            for (int64_t d = 0; d < head_dim; d += kLineBytes / sizeof(T)) __builtin_prefetch(rows[t] + d, 0, 2);
    }

    // Keys of the tokens from `first` on: `kTileTokens` lanes for each word of a key. They are copied to `near` first:
    // memory gives them faster in the order in which they lie than in the one in which they are wanted.
    void take_keys(int64_t first, float* to, T* near) const {
        const T* rows[kTileTokens];
        find(keys, first, rows);
        for (int64_t t = 0; t < kTileTokens && rows[t]; ++t, near += head_dim)
            rows[t] = static_cast<const T*>(std::memcpy(near, rows[t], head_dim * sizeof(T)));
        for (int64_t half = 0; half < kTileTokens; half += kLanes)
            by_lanes(head_dim / kTerms, [&](int64_t word, auto lanes) {
                Floats x[kLanes];
                for (int64_t t = 0; t < kLanes; ++t)
                    x[t] = rows[half + t] ? InWords<T>::take(rows[half + t] + word * kTerms, lanes) : Floats{};
                transpose(x);
                for (int64_t i = 0; i < kLanes; ++i) store(to + (word + i) * kTileTokens + half, x[i]);
            });
    }

    // Values of the tokens from `first` on: `width` lanes for each word of tokens.
    void take_values(int64_t first, float* to, int64_t width) const {
        const T* rows[kTileTokens];
        find(values, first, rows);
        for (int64_t t = 0; t < kTileTokens; t += kTerms, to += width)
            by_lanes(head_dim / kTerms, [&](int64_t word, auto lanes) {
                Floats x[kTerms];
                for (int64_t i = 0; i < kTerms; ++i)
                    x[i] = rows[t + i] ? InWords<T>::take(rows[t + i] + word * kTerms, lanes) : Floats{};
                InWords<T>::interleave(x, to + word * kTerms);
            });
    }
};

// Of a row of scores: e to the power of each, times `scale` and less the largest, for the first `num`; 0 for the others.
// As words, in place. Returns their sum.
template <class T>
inline float exponentials(float* row, int64_t num, int64_t width, float scale) {
    for (int64_t t = num; t < width; ++t) row[t] = -INFINITY;
    Floats most = load(row), sum{};
    for (int64_t t = kLanes; t < width; t += kLanes) most = load(row + t) > most ? load(row + t) : most;
    float largest = most[0];
    for (int i = 1; i < kLanes; ++i) largest = most[i] > largest ? most[i] : largest;
    for (int64_t t = 0; t < width; t += kLanes) {
        const Floats score = load(row + t), power = exp_of((score - largest) * scale);
        const Floats x = score == -INFINITY ? Floats{} : power;
        InWords<T>::put(row, t, x);
        sum += x;
    }
    return sum_of(sum);
}

template <class T>
void attend_tile(const Tile<T>& tile, std::vector<float>& scratch) {
    constexpr int64_t kTerms = InWords<T>::kTerms;
    const int64_t num_vectors = tile.num_rows * tile.num_heads, num_words = tile.head_dim / kTerms;
    const int64_t width = rounded_up(tile.head_dim, kTerms * kLanes), num_scores = rounded_up(tile.num_keys, kTileTokens);
    scratch.resize(num_vectors * (2 * width + num_scores) + 2 * kTileTokens * width);
    float *queries = scratch.data(), *taken = queries + num_vectors * width, *copy = taken + kTileTokens * width;
    float *outs = copy + kTileTokens * width, *scores = outs + num_vectors * width;
    T* near = reinterpret_cast<T*>(copy);
    std::memset(outs, 0, num_vectors * (width + num_scores) * sizeof(float));

    for (int64_t v = 0; v < num_vectors; ++v)
        by_lanes(num_words, [&](int64_t word, auto lanes) {
            store(queries + v * width + word, InWords<T>::take(tile.q + tile.place_of(v) + word * kTerms, lanes));
        });
    for (int64_t first = 0; first < num_scores; first += kTileTokens) {
        tile.ask_for_values(first);
        tile.take_keys(first, taken, near);
        add_products_of<T, 8, 2>(num_vectors, taken, kTileTokens, queries, width, num_words, scores + first, num_scores);
    }
    std::vector<float> shares(num_vectors);
    for (int64_t v = 0; v < num_vectors; ++v) {
        const int64_t seen = tile.num_keys - (tile.num_rows - 1 - v / tile.num_heads);
        const float scale = 1.f / std::sqrt(static_cast<float>(tile.head_dim));
        shares[v] = 1.f / exponentials<T>(scores + v * num_scores, seen, num_scores, scale);
    }
    for (int64_t first = 0; first < num_scores; first += kTileTokens) {
        tile.take_values(first, taken, width);
        const float* weights = scores + first / kTerms;
        int64_t d = 0;
        for (; d + 4 * kLanes <= width; d += 4 * kLanes)
            add_products_of<T, 4, 4>(num_vectors, taken + d, width, weights, num_scores, kTileTokens / kTerms, outs + d,
                                     width);
        for (; d < width; d += kLanes)
            add_products_of<T, 8, 1>(num_vectors, taken + d, width, weights, num_scores, kTileTokens / kTerms, outs + d,
                                     width);
    }
    for (int64_t v = 0; v < num_vectors; ++v)
        by_lanes(tile.head_dim, [&](int64_t d, auto lanes) {
            store(tile.out + tile.place_of(v) + d, load(outs + v * width + d) * shares[v], lanes);
        });
}

#ifdef __AVX512BF16__

constexpr int64_t kFewVectors = 8, kValuesTogether = 4, kTokensAhead = 128;

// As above for few vectors, whose heads have W times 32 values: keys and values are used where they lie. Memory is asked for
// what comes some tokens later, be it the values or the keys of `next` (the tile after this one, maybe), a row at a time: many
// lines at once would hold up what is computed meanwhile.
template <int W>
void attend_few(const Tile<BFloat16>& tile, const Tile<BFloat16>* next, std::vector<float>& scratch) {
    using Pairs = InWords<BFloat16>;
    constexpr int64_t kRow = W * 2 * kLanes, kStep = kLineBytes / sizeof(BFloat16);
    static thread_local std::vector<const BFloat16*> key_rows, next_rows;
    const int64_t num_vectors = tile.num_rows * tile.num_heads, num_scores = rounded_up(tile.num_keys, kTileTokens);
    const int64_t to_values = tile.values - tile.keys;
    scratch.resize(num_vectors * num_scores);
    tile.find_keys(num_scores, key_rows);
    const int64_t distance = std::min(num_scores, kTokensAhead);
    (next ? next : &tile)->find_keys(distance, next_rows);
    const auto ask = [](const BFloat16* row) {
        for (int64_t d = 0; d < kRow; d += kStep) __builtin_prefetch(row + d, 0, 2);
    };
    float* scores = scratch.data();
    for (int64_t first = 0; first < num_scores; first += kLanes)
        for (int64_t v = 0; v < num_vectors; ++v) {
            const BFloat16* q = tile.q + tile.place_of(v);
            Floats products[kLanes], query[W];
#pragma GCC unroll 8
            for (int w = 0; w < W; ++w) query[w] = Pairs::take(q + w * 2 * kLanes, All{});
#pragma GCC unroll 16
            for (int64_t t = 0; t < kLanes; ++t) {
                const BFloat16* key = key_rows[first + t];
                products[t] = Pairs::add_product(Floats{}, Pairs::take(key, All{}), query[0]);
#pragma GCC unroll 8
                for (int w = 1; w < W; ++w)
                    products[t] = Pairs::add_product(products[t], Pairs::take(key + w * 2 * kLanes, All{}), query[w]);
            }
            for (int64_t t = first + v; t < first + kLanes; t += num_vectors)
                ask(t + distance < num_scores ? key_rows[t + distance] : key_rows[t + distance - num_scores] + to_values);
            store(scores + v * num_scores + first, sums_of(products));
        }
    float shares[kFewVectors];
    for (int64_t v = 0; v < num_vectors; ++v) {
        const int64_t seen = tile.num_keys - (tile.num_rows - 1 - v / tile.num_heads);
        const float scale = 1.f / std::sqrt(static_cast<float>(tile.head_dim));
        shares[v] = 1.f / exponentials<BFloat16>(scores + v * num_scores, seen, num_scores, scale);
    }
    const int64_t num_groups = (num_vectors - 1) / kValuesTogether + 1;
    for (int64_t group = 0, v = 0; group < num_groups; ++group) {
        const int64_t together = num_vectors * (group + 1) / num_groups - v;
        for (int64_t d = 0; d < kRow; d += 4 * kLanes)
            with_constant(together, [&](auto num) {
                Floats sums[num][4] = {};
                for (int64_t t = 0; t < num_scores; t += 2) {
                    Floats lanes[4];
                    const BFloat16 *a = key_rows[t] + to_values + d, *b = key_rows[t + 1] + to_values + d;
                    take_columns(a, b, lanes);
                    take_columns(a + 2 * kLanes, b + 2 * kLanes, lanes + 2);
                    if (v + d == 0)
                        for (int64_t u = t + distance; u < t + distance + 2; ++u)
                            ask(u < num_scores ? key_rows[u] + to_values : next_rows[u - num_scores]);
                    for (int i = 0; i < num; ++i) {
                        const Floats word = everywhere(scores + (v + i) * num_scores + t / 2);
#pragma GCC unroll 4
                        for (int j = 0; j < 4; ++j) sums[i][j] = Pairs::add_product(sums[i][j], lanes[j], word);
                    }
                }
                for (int i = 0; i < num; ++i)
                    for (int j = 0; j < 4; j += 2)
                        store_columns(tile.out + tile.place_of(v + i) + d + j * kLanes, sums[i][j] * shares[v + i],
                                      sums[i][j + 1] * shares[v + i]);
            });
        v += together;
    }
}

inline void attend_any(const Tile<BFloat16>& tile, const Tile<BFloat16>* next, std::vector<float>& scratch) {
    const bool is_few = tile.num_rows * tile.num_heads <= kFewVectors;
    if (is_few && tile.head_dim == 64) attend_few<2>(tile, next, scratch);
    else if (is_few && tile.head_dim == 128) attend_few<4>(tile, next, scratch);
    else if (is_few && tile.head_dim == 256) attend_few<8>(tile, next, scratch);
    else attend_tile(tile, scratch);
}

#endif

template <class T>
inline void attend_any(const Tile<T>& tile, const Tile<T>*, std::vector<float>& scratch) {
    attend_tile(tile, scratch);
}

template <class T>
void attend(const T* q, const T* cache, const int32_t* rows, const int32_t* starts, const int32_t* blocks,
            const int32_t* last_tokens, const int32_t* heads, const int32_t* head_starts, T* out,
            int64_t num_sequences, int64_t num_q, int64_t num_kv, int64_t head_dim, int64_t block_size,
            int64_t plane_tokens) {
    std::vector<Tile<T>> tiles;
    int64_t work = 0;
    for (int64_t s = 0; s < num_sequences; ++s)
        for (int64_t kv = 0; kv < num_kv; ++kv) {
            const int64_t group = head_starts[kv + 1] - head_starts[kv], num_rows = rows[s + 1] - rows[s];
            const int64_t most = group < kTileVectors ? kTileVectors / group : 1;
            const int64_t num_keys = (starts[s + 1] - starts[s] - 1) * block_size + last_tokens[s];
            const T* keys = cache + 2 * kv * plane_tokens * head_dim;
            for (int64_t first = 0; first < num_rows; first += most) {
                const int64_t num = num_rows - first < most ? num_rows - first : most;
                const int64_t seen = num_keys - (num_rows - first - num);
                work += num * group * seen * head_dim;
                tiles.push_back({q, keys, keys + plane_tokens * head_dim, out, blocks + starts[s],
                                 heads + head_starts[kv], rows[s] + first, num, group, seen, num_q, head_dim,
                                 block_size});
            }
        }
#pragma omp parallel if (worth_threads(work / 8))
    {
        static thread_local std::vector<float> scratch;
#pragma omp for schedule(dynamic, 4)
        for (size_t i = 0; i < tiles.size(); ++i)
            attend_any(tiles[i], i + 1 < tiles.size() ? &tiles[i + 1] : nullptr, scratch);
    }
}

}  // namespace
