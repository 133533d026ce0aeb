// Vectors of 16 floats: to and from memory in either dtype, whole or in part, and sums of products over them.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

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

// Of two rows of 32 values: words of the even columns and of the odd ones, a value of each row in a word. Cheaper than
// interleaving them, and `store_columns` puts them in order again.
inline void take_columns(const BFloat16* a, const BFloat16* b, Floats* even_odd) {
    const Words x = (Words)load(reinterpret_cast<const float*>(a)), y = (Words)load(reinterpret_cast<const float*>(b));
    even_odd[0] = (Floats)((x & 0xffff) | (y << 16));
    even_odd[1] = (Floats)((x >> 16) | (y & 0xffff0000));
}

inline void store_columns(BFloat16* to, Floats even, Floats odd) {
    static const uint16_t kOrder[2 * kLanes] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const auto both = (__m512i)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even);
    _mm512_storeu_si512(to, _mm512_permutexvar_epi16(_mm512_loadu_si512(kOrder), both));
}

#endif

// `go(n)` for n from 1 to 6, known to the compiler.
template <class Go>
inline void with_constant(int64_t n, Go go) {
    switch (n) {
        case 1: return go(std::integral_constant<int, 1>{});
        case 2: return go(std::integral_constant<int, 2>{});
        case 3: return go(std::integral_constant<int, 3>{});
        case 4: return go(std::integral_constant<int, 4>{});
        case 5: return go(std::integral_constant<int, 5>{});
        default: return go(std::integral_constant<int, 6>{});
    }
}

inline Floats everywhere(const float* word) {  // its bits, which need not be a float's
    int32_t bits;
    std::memcpy(&bits, word, sizeof bits);
    return (Floats)(Ints{} + bits);
}

// out[v] += sum over words w of b[v][w] * a[w], for V vectors of D times `kLanes` lanes. Meanwhile memory is asked for what
// lies from `ahead` on, `Lines` lines a word.
template <class T, int V, int D, int Lines = 0>
inline void add_products(const float* a, int64_t a_width, const float* b, int64_t b_width, int64_t num_words,
                         float* out, int64_t out_width, const char* ahead = nullptr) {
    Floats sums[V][D];
    for (int v = 0; v < V; ++v)
        for (int d = 0; d < D; ++d) sums[v][d] = load(out + v * out_width + d * kLanes);
    for (int64_t w = 0; w < num_words; ++w) {
        Floats lanes[D];
        for (int d = 0; d < D; ++d) lanes[d] = load(a + w * a_width + d * kLanes);
        for (int i = 0; i < Lines; ++i) __builtin_prefetch(ahead + (w * Lines + i) * kLineBytes, 0, 2);
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

}  // namespace
