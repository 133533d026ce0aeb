// What a step does between its matmuls, each in one pass over memory. `build.py` compiles this, `model/native.py` calls it.
//
// Plain C functions over pointers; rows are contiguous; sums and exponentials are in float32. Threads are torch's: this
// library names no OpenMP of its own, so it finds the one that torch has loaded.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include <omp.h>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace {

constexpr int64_t kLanes = 16, kLineBytes = 64;
typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));

struct BFloat16 {
    uint16_t bits;
};

// How many lanes of a vector are in memory.
struct All {};
struct Some {
    int64_t num;
};

inline Floats load(const float* from, All = {}) {
    Floats x;
    std::memcpy(&x, from, sizeof x);
    return x;
}

inline void store(float* to, Floats x, All = {}) { std::memcpy(to, &x, sizeof x); }

#ifdef __AVX512BF16__

inline Floats load(const BFloat16* from, All = {}) {
    const __m512i bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
    return (Floats)_mm512_slli_epi32(bits, 16);
}

inline void store(BFloat16* to, Floats x, All = {}) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh((__m512)x));
}

#else

inline Floats load(const BFloat16* from, All = {}) {
    Halves x;
    std::memcpy(&x, from, sizeof x);
    return (Floats)(__builtin_convertvector(x, Words) << 16);
}

inline void store(BFloat16* to, Floats x, All = {}) {  // to the nearest, ties to even; what is no number stays none
    const Words bits = (Words)x, nearest = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const Halves halves = __builtin_convertvector(x != x ? Words{} + 0x7fc0 : nearest, Halves);
    std::memcpy(to, &halves, sizeof halves);
}

#endif

template <class T>
inline Floats load(const T* from, Some some) {
    T lanes[kLanes] = {};
    std::memcpy(lanes, from, some.num * sizeof(T));
    return load(lanes);
}

template <class T>
inline void store(T* to, Floats x, Some some) {
    T lanes[kLanes];
    store(lanes, x);
    std::memcpy(to, lanes, some.num * sizeof(T));
}

// What is left of `x` in memory that holds `T`.
template <class T>
inline Floats rounded(Floats x) {
    T lanes[kLanes];
    store(lanes, x);
    return load(lanes);
}

// `work(i, lanes)` for all elements, a vector from `i` on at a time.
template <class Work>
inline void by_lanes(int64_t num, Work work) {
    int64_t i = 0;
    for (; i + kLanes <= num; i += kLanes) work(i, All{});
    if (i < num) work(i, Some{num - i});
}

inline float sum_of(Floats x) {
    float sum = 0.f;
    for (int i = 0; i < kLanes; ++i) sum += x[i];
    return sum;
}

// e**x to some units in the last place (Cephes' polynomial); beyond what float32 holds it stays at the ends.
inline Floats exp_of(Floats x) {
    x = x < -87.f ? Floats{} - 87.f : x;
    x = x > 88.f ? Floats{} + 88.f : x;
    const float magic = 12582912.f;  // what it is added to is rounded to an integer, in the low bits of the sum
    const Floats shifted = x * 1.44269504f + magic, n = shifted - magic;
    const Floats r = x - n * 0.693359375f + n * 2.12194440e-4f;
    Floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.f;
    return p * (Floats)(((Ints)shifted - (0x4b400000 - 127)) << 23);
}

inline bool worth_threads(int64_t num_elements) { return num_elements > 65536 && omp_get_max_threads() > 1; }

// As transformers: the normalised row is rounded before the weight is applied.
template <class T>
inline void norm_row(const T* x, const T* weight, T* out, int64_t num, float eps) {
    Floats squares{};
    by_lanes(num, [&](int64_t i, auto lanes) { squares += load(x + i, lanes) * load(x + i, lanes); });
    const float scale = 1.f / std::sqrt(sum_of(squares) / static_cast<float>(num) + eps);
    by_lanes(num, [&](int64_t i, auto lanes) {
        store(out + i, rounded<T>(load(x + i, lanes) * scale) * load(weight + i, lanes), lanes);
    });
}

template <class T>
void add_norm(T* x, const T* delta, const T* weight, T* out, int64_t num_rows, int64_t num, float eps) {
#pragma omp parallel for if (worth_threads(num_rows* num))
    for (int64_t row = 0; row < num_rows; ++row) {
        T* own = x + row * num;
        if (delta)
            by_lanes(num, [&](int64_t i, auto lanes) {
                store(own + i, load(own + i, lanes) + load(delta + row * num + i, lanes), lanes);
            });
        norm_row(own, weight, out + row * num, num, eps);
    }
}

template <class T>
void silu_mul(const T* both, T* out, int64_t num_blocks, int64_t block) {
#pragma omp parallel for if (worth_threads(num_blocks* block * 2))
    for (int64_t b = 0; b < num_blocks; ++b) {
        const T *gate = both + 2 * b * block, *up = gate + block;
        by_lanes(block, [&](int64_t i, auto lanes) {
            const Floats g = load(gate + i, lanes);
            store(out + b * block + i, rounded<T>(g / (1.f + exp_of(-g))) * load(up + i, lanes), lanes);
        });
    }
}

// The first half of `sin` is negated.
template <class T>
inline void rotate_head(const T* x, const T* cos, const T* sin, T* out, int64_t half) {
    by_lanes(half, [&](int64_t i, auto lanes) {
        const Floats a = load(x + i, lanes), b = load(x + half + i, lanes);
        store(out + i, a * load(cos + i, lanes) + b * load(sin + i, lanes), lanes);
        store(out + half + i, b * load(cos + half + i, lanes) + a * load(sin + half + i, lanes), lanes);
    });
}

template <class T>
void rotate_store(const T* q, const T* kv, const T* q_norm, const T* k_norm, const int64_t* positions, const T* cos,
                  const T* sin, const int64_t* slots, T* cache, T* out, int64_t num_rows, int64_t num_q,
                  int64_t num_kv, int64_t head_dim, int64_t plane_tokens, float eps) {
    const int64_t half = head_dim / 2, plane = plane_tokens * head_dim;
#pragma omp parallel for if (worth_threads(num_rows*(num_q + 2 * num_kv) * head_dim))
    for (int64_t row = 0; row < num_rows; ++row) {
        const T *row_cos = cos + positions[row] * head_dim, *row_sin = sin + positions[row] * head_dim;
        std::vector<T> normed(q_norm ? head_dim : 0);
        auto place = [&](const T* x, const T* norm, T* to) {
            if (norm) norm_row(x, norm, normed.data(), head_dim, eps);
            rotate_head(norm ? normed.data() : x, row_cos, row_sin, to, half);
        };
        for (int64_t h = row * num_q; h < (row + 1) * num_q; ++h) place(q + h * head_dim, q_norm, out + h * head_dim);
        for (int64_t h = 0; h < num_kv; ++h) {
            const T* keys = kv + (row * num_kv + h) * 2 * head_dim;
            T* to = cache + 2 * h * plane + slots[row] * head_dim;
            place(keys, k_norm, to);
            std::memcpy(to + plane, keys + head_dim, head_dim * sizeof(T));
        }
    }
}

// Products of rows are summed over words of 32 bits: a float, or, where the CPU can, two neighbours in bfloat16.
template <class T>
struct InWords {
    static constexpr int64_t kTerms = 1;  // in a word

    template <class Lanes>
    static Floats take(const T* from, Lanes lanes) {
        return load(from, lanes);
    }

    static Floats add_product(Floats sum, Floats a, Floats b) { return sum + a * b; }

    // Of `kTerms` rows, words that have their terms from one row -> words that have one from each.
    static void interleave(const Floats* rows, float* to) { store(to, rows[0]); }

    static void put(float* row, int64_t first, Floats x) { store(row + first, x); }
};

#ifdef __AVX512BF16__

template <>
struct InWords<BFloat16> {
    static constexpr int64_t kTerms = 2;
    typedef uint16_t Terms __attribute__((vector_size(4 * kLanes)));

    template <class Lanes>
    static Floats take(const BFloat16* from, Lanes lanes) {
        return load(reinterpret_cast<const float*>(from), lanes);
    }

    static Floats add_product(Floats sum, Floats a, Floats b) {
        return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
    }

    static void interleave(const Floats* rows, float* to) {
        const Terms a = (Terms)rows[0], b = (Terms)rows[1];
        store(to, (Floats)__builtin_shufflevector(a, b, 0, 32, 1, 33, 2, 34, 3, 35, 4, 36, 5, 37, 6, 38, 7, 39,  //
                                                  8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47));
        store(to + kLanes,
              (Floats)__builtin_shufflevector(a, b, 16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55,  //
                                              24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63));
    }

    static void put(float* row, int64_t first, Floats x) { store(reinterpret_cast<BFloat16*>(row) + first, x); }
};

#endif

inline Floats everywhere(const float* word) {  // its bits, which need not be a float's
    int32_t bits;
    std::memcpy(&bits, word, sizeof bits);
    return (Floats)(Ints{} + bits);
}

// out[v] += sum over words w of b[v][w] * a[w], for V vectors of D times `kLanes` lanes.
template <class T, int V, int D>
inline void add_products(const float* a, int64_t a_width, const float* b, int64_t b_width, int64_t num_words,
                         float* out, int64_t out_width) {
    Floats sums[V][D];
    for (int v = 0; v < V; ++v)
        for (int d = 0; d < D; ++d) sums[v][d] = load(out + v * out_width + d * kLanes);
    for (int64_t w = 0; w < num_words; ++w) {
        Floats lanes[D];
        for (int d = 0; d < D; ++d) lanes[d] = load(a + w * a_width + d * kLanes);
        for (int v = 0; v < V; ++v) {
            const Floats word = everywhere(b + v * b_width + w);
            for (int d = 0; d < D; ++d) sums[v][d] = InWords<T>::add_product(sums[v][d], lanes[d], word);
        }
    }
    for (int v = 0; v < V; ++v)
        for (int d = 0; d < D; ++d) store(out + v * out_width + d * kLanes, sums[v][d]);
}

// As above for any number of vectors: V at a time, then the rest.
template <class T, int V, int D>
inline void add_products_of(int64_t num_vectors, const float* a, int64_t a_width, const float* b, int64_t b_width,
                            int64_t num_words, float* out, int64_t out_width) {
    int64_t v = 0;
    for (; v + V <= num_vectors; v += V)
        add_products<T, V, D>(a, a_width, b + v * b_width, b_width, num_words, out + v * out_width, out_width);
    if constexpr (V > 1)
        if (v < num_vectors)
            add_products_of<T, V / 2, D>(num_vectors - v, a, a_width, b + v * b_width, b_width, num_words,
                                         out + v * out_width, out_width);
}

inline void transpose(Floats* x) {  // 16 x 16: swaps a bit of the row's number with that of the lane's, bit by bit
    for (int i = 0; i < 8; ++i) {
        const Floats a = x[i], b = x[i + 8];
        x[i] = __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23);
        x[i + 8] = __builtin_shufflevector(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    }
    for (int i = 0; i < 16; i += i % 4 == 3 ? 5 : 1) {
        const Floats a = x[i], b = x[i + 4];
        x[i] = __builtin_shufflevector(a, b, 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27);
        x[i + 4] = __builtin_shufflevector(a, b, 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
    }
    for (int i = 0; i < 16; i += i % 2 ? 3 : 1) {
        const Floats a = x[i], b = x[i + 2];
        x[i] = __builtin_shufflevector(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29);
        x[i + 2] = __builtin_shufflevector(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
    }
    for (int i = 0; i < 16; i += 2) {
        const Floats a = x[i], b = x[i + 1];
        x[i] = __builtin_shufflevector(a, b, 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30);
        x[i + 1] = __builtin_shufflevector(a, b, 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
    }
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

    // Asks memory for values that are taken soon: a sequence's blocks lie anywhere.
    void ask_for_values(int64_t first) const {
        const T* rows[kTileTokens];
        find(values, first, rows);
        for (int64_t t = 0; t < kTileTokens && rows[t]; ++t)
            for (int64_t d = 0; d < head_dim; d += kLineBytes / sizeof(T)) __builtin_prefetch(rows[t] + d);
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

inline int64_t rounded_up(int64_t num, int64_t multiple) { return (num + multiple - 1) / multiple * multiple; }

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
#pragma omp for schedule(dynamic, 1)
        for (size_t i = 0; i < tiles.size(); ++i) attend_tile(tiles[i], scratch);
    }
}

// x @ weight.T, for weights in panels: of 64 rows each, in which the two values of a word, neighbours in a row, lie beside
// the word of the next row.
template <class T>
void linear(const T* x, const T* weight, T* out, int64_t num_rows, int64_t num_in, int64_t num_out) {
    constexpr int64_t kPanel = 4 * kLanes, kMostRows = 32;
    const int64_t num_words = num_in / InWords<T>::kTerms;
    const float *x_words = reinterpret_cast<const float*>(x), *weight_words = reinterpret_cast<const float*>(weight);
#pragma omp parallel for if (worth_threads(num_in* num_out / 4))
    for (int64_t panel = 0; panel < num_out; panel += kPanel)
        for (int64_t row = 0; row < num_rows; row += kMostRows) {
            float sums[kMostRows * kPanel] = {};
            const int64_t num = num_rows - row < kMostRows ? num_rows - row : kMostRows;
            add_products_of<T, 4, 4>(num, weight_words + panel * num_words, kPanel, x_words + row * num_words, num_words,
                                     num_words, sums, kPanel);
            for (int64_t r = 0; r < num; ++r)
                by_lanes(kPanel, [&](int64_t i, auto lanes) {
                    store(out + (row + r) * num_out + panel + i, load(sums + r * kPanel + i), lanes);
                });
        }
}

}  // namespace

#define EXPORT(DTYPE, T)                                                                                               \
    extern "C" void add_norm_##DTYPE(T* x, const T* delta, const T* weight, T* out, int64_t num_rows, int64_t num,     \
                                     float eps) {                                                                      \
        add_norm(x, delta, weight, out, num_rows, num, eps);                                                           \
    }                                                                                                                  \
    extern "C" void silu_mul_##DTYPE(const T* both, T* out, int64_t num_blocks, int64_t block) {                       \
        silu_mul(both, out, num_blocks, block);                                                                        \
    }                                                                                                                  \
    extern "C" void rotate_store_##DTYPE(const T* q, const T* kv, const T* q_norm, const T* k_norm,                    \
                                         const int64_t* positions, const T* cos, const T* sin, const int64_t* slots,   \
                                         T* cache, T* out, int64_t num_rows, int64_t num_q, int64_t num_kv,            \
                                         int64_t head_dim, int64_t plane_tokens, float eps) {                          \
        rotate_store(q, kv, q_norm, k_norm, positions, cos, sin, slots, cache, out, num_rows, num_q, num_kv, head_dim, \
                     plane_tokens, eps);                                                                               \
    }                                                                                                                  \
    extern "C" void attend_##DTYPE(const T* q, const T* cache, const int32_t* rows, const int32_t* starts,             \
                                   const int32_t* blocks, const int32_t* last_tokens, const int32_t* heads,            \
                                   const int32_t* head_starts, T* out, int64_t num_sequences, int64_t num_q,           \
                                   int64_t num_kv, int64_t head_dim, int64_t block_size, int64_t plane_tokens) {       \
        attend(q, cache, rows, starts, blocks, last_tokens, heads, head_starts, out, num_sequences, num_q, num_kv,     \
               head_dim, block_size, plane_tokens);                                                                    \
    }

EXPORT(bfloat16, BFloat16)
EXPORT(float32, float)

#ifdef __AVX512BF16__

extern "C" void linear_bfloat16(const BFloat16* x, const BFloat16* weight, BFloat16* out, int64_t num_rows,
                                int64_t num_in, int64_t num_out) {
    linear(x, weight, out, num_rows, num_in, num_out);
}

#endif
