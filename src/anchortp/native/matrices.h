// Few rows times a matrix, in bfloat16, where the CPU multiplies pairs. A matrix is read from memory once: while rows meet a
// piece of it that is in the cache, the next piece is on its way.
#pragma once

#include <algorithm>
#include <vector>

#include "vectors.h"

#ifdef __AVX512BF16__

namespace {

constexpr int64_t kPanel = 4 * kLanes, kMostRows = 32, kTogether = 6;

inline void store_rows(BFloat16* out, int64_t out_width, const float* sums, int64_t num_rows) {
    for (int64_t row = 0; row < num_rows; ++row)
        for (int64_t i = 0; i < kPanel; i += kLanes) store(out + row * out_width + i, load(sums + row * kPanel + i));
}

// x @ weight.T, for weights in panels: of 64 rows each, in which the two values of a word, neighbours in a row, lie beside
// the word of the next row. A panel meets four rows as it comes from memory, the others from the cache.
inline void linear(const BFloat16* x, const BFloat16* weight, BFloat16* out, int64_t num_rows, int64_t num_in,
                   int64_t num_out) {
    constexpr int64_t kOnce = 4;
    const int64_t num_words = num_in / 2;
    const float *x_words = reinterpret_cast<const float*>(x), *weight_words = reinterpret_cast<const float*>(weight);
#pragma omp parallel for if (worth_threads(num_in* num_out / 4))
    for (int64_t panel = 0; panel < num_out; panel += kPanel)
        for (int64_t first = 0; first < num_rows; first += kMostRows) {
            float sums[kMostRows * kPanel] = {};
            const float *piece = weight_words + panel * num_words, *rows = x_words + first * num_words;
            const int64_t num = std::min(num_rows - first, kMostRows);
            int64_t row = 0;
            const auto meet = [&](auto lines) {
                const char* ahead = reinterpret_cast<const char*>(piece + kPanel * num_words);
                for (; row + kOnce <= num; row += kOnce, ahead += lines * num_words * kLineBytes)
                    add_products<BFloat16, kOnce, 4, lines>(piece, kPanel, rows + row * num_words, num_words, num_words,
                                                            sums + row * kPanel, kPanel, ahead);
            };
            if (num >= 4 * kOnce) meet(std::integral_constant<int, 1>{});
            else if (num >= 2 * kOnce) meet(std::integral_constant<int, 2>{});
            add_products_of<BFloat16, kOnce, 4>(num - row, piece, kPanel, rows + row * num_words, num_words, num_words,
                                                sums + row * kPanel, kPanel);
            store_rows(out + first * num_out + panel, num_out, sums, num);
        }
}

// A piece of a plain matrix: `num_words` pairs of rows, `kPanel` columns. `sums` and, if wanted, `taken` have their columns as
// `take_columns` makes them.
template <int V, bool Takes>
inline void meet_plain(const BFloat16* weight, int64_t width, const float* x, int64_t x_width, int64_t num_words,
                       float* sums, int64_t sums_width, int64_t ahead, float* taken) {
    Floats own[V][4];
    for (int v = 0; v < V; ++v)
        for (int d = 0; d < 4; ++d) own[v][d] = load(sums + v * sums_width + d * kLanes);
    for (int64_t w = 0; w < num_words; ++w, weight += 2 * width) {
        Floats lanes[4];
        for (int half = 0; half < 2; ++half) {
            const BFloat16* at = weight + half * 2 * kLanes;
            take_columns(at, at + width, lanes + 2 * half);
            __builtin_prefetch(at + ahead, 0, 2);
            __builtin_prefetch(at + ahead + width, 0, 2);
        }
        if (Takes)
            for (int d = 0; d < 4; ++d) store(taken + w * kPanel + d * kLanes, lanes[d]);
        for (int v = 0; v < V; ++v) {
            const Floats word = everywhere(x + v * x_width + w);
            for (int d = 0; d < 4; ++d) own[v][d] = InWords<BFloat16>::add_product(own[v][d], lanes[d], word);
        }
    }
    for (int v = 0; v < V; ++v)
        for (int d = 0; d < 4; ++d) store(sums + v * sums_width + d * kLanes, own[v][d]);
}

// x @ weight, for plain matrices. Read in stretches of `most_words` pairs of rows, across all columns: as it lies in memory.
// The first rows take a piece as they meet it, the others meet what was taken.
inline void times(const BFloat16* x, const BFloat16* weight, BFloat16* out, int64_t num_rows, int64_t num_in,
                  int64_t num_out) {
    constexpr int64_t kMostWords = 32;
    const int64_t num_words = num_in / 2, most_words = num_rows > 2 * kTogether ? kMostWords : kMostWords / 2;
    const float* x_words = reinterpret_cast<const float*>(x);
    const int64_t num_panels = num_out / kPanel, wanted = worth_threads(num_in * num_out / 4) ? omp_get_max_threads() : 1;
    const int64_t num_threads = std::min(num_panels, wanted);
#pragma omp parallel for if (num_threads > 1) num_threads(num_threads)
    for (int64_t thread = 0; thread < num_threads; ++thread) {
        static thread_local std::vector<float> sums;
        const int64_t begin = num_panels * thread / num_threads * kPanel;
        const int64_t width = num_panels * (thread + 1) / num_threads * kPanel - begin;
        for (int64_t first_row = 0; first_row < num_rows; first_row += kMostRows) {
            const int64_t num = std::min(num_rows - first_row, kMostRows), num_groups = (num - 1) / kTogether + 1;
            sums.assign(num * width, 0.f);
            float taken[kMostWords * kPanel];
            for (int64_t first = 0; first < num_words; first += most_words) {
                const int64_t words = std::min(num_words - first, most_words);
                for (int64_t column = 0; column < width; column += kPanel) {
                    const BFloat16* piece = weight + 2 * first * num_out + begin + column;
                    for (int64_t group = 0, row = 0; group < num_groups; ++group) {
                        const int64_t together = num * (group + 1) / num_groups - row;
                        const float* rows = x_words + (first_row + row) * num_words + first;
                        float* to = sums.data() + row * width + column;
                        const int64_t ahead = 2 * words * num_out;
                        with_constant(together, [&](auto v) {
                            if (group)
                                add_products<BFloat16, v, 4>(taken, kPanel, rows, num_words, words, to, width);
                            else if (num_groups > 1)
                                meet_plain<v, true>(piece, num_out, rows, num_words, words, to, width, ahead, taken);
                            else
                                meet_plain<v, false>(piece, num_out, rows, num_words, words, to, width, ahead, taken);
                        });
                        row += together;
                    }
                }
            }
            for (int64_t row = 0; row < num; ++row) {
                const float* from = sums.data() + row * width;
                for (int64_t column = 0; column < width; column += 2 * kLanes, from += 2 * kLanes)
                    store_columns(out + (first_row + row) * num_out + begin + column, load(from), load(from + kLanes));
            }
        }
    }
}

}  // namespace

#endif
