// Copies bytes and sums them up in one pass, past the cache.
//
// What is stored is what was summed: both come from the same registers, so a source that changes meanwhile cannot go
// unnoticed. Stores are non-temporal where the CPU has them: a store that goes through the cache first reads the line
// that it overwrites, so that half as many bytes again cross the memory bus.
//
// The sum is XXH3_64bits (seed 0, default secret) of inputs longer than 240 bytes.
// Source: https://github.com/Cyan4973/xxHash/blob/v0.8.3/doc/xxhash_spec.md

#pragma once

#include <cstdint>
#include <cstring>

#ifdef __x86_64__
#include <immintrin.h>
#endif

namespace copying {

constexpr int64_t kStripeBytes = 64, kLanes = 8, kSecretBytes = 192;
constexpr int64_t kStripesPerBlock = (kSecretBytes - kStripeBytes) / 8;
constexpr int64_t kShortest = 241;  // shorter inputs have another formula
constexpr int64_t kLastSecret = kSecretBytes - kStripeBytes - 7;  // where the last stripe's begins
typedef uint64_t Lanes __attribute__((vector_size(kStripeBytes)));

constexpr uint64_t kPrime32[] = {0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D};
constexpr uint64_t kPrime64[] = {0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0x85EBCA77C2B2AE63,
                                 0x27D4EB2F165667C5};

constexpr Lanes kStart = {kPrime32[2], kPrime64[0], kPrime64[1], kPrime64[2],
                          kPrime64[3], kPrime32[1], kPrime64[4], kPrime32[0]};

alignas(64) constexpr uint8_t kSecret[kSecretBytes] = {
    0xb8, 0xfe, 0x6c, 0x39, 0x23, 0xa4, 0x4b, 0xbe, 0x7c, 0x01, 0x81, 0x2c, 0xf7, 0x21, 0xad, 0x1c, 0xde, 0xd4, 0x6d,
    0xe9, 0x83, 0x90, 0x97, 0xdb, 0x72, 0x40, 0xa4, 0xa4, 0xb7, 0xb3, 0x67, 0x1f, 0xcb, 0x79, 0xe6, 0x4e, 0xcc, 0xc0,
    0xe5, 0x78, 0x82, 0x5a, 0xd0, 0x7d, 0xcc, 0xff, 0x72, 0x21, 0xb8, 0x08, 0x46, 0x74, 0xf7, 0x43, 0x24, 0x8e, 0xe0,
    0x35, 0x90, 0xe6, 0x81, 0x3a, 0x26, 0x4c, 0x3c, 0x28, 0x52, 0xbb, 0x91, 0xc3, 0x00, 0xcb, 0x88, 0xd0, 0x65, 0x8b,
    0x1b,
    0x53, 0x2e, 0xa3, 0x71, 0x64, 0x48, 0x97, 0xa2, 0x0d, 0xf9, 0x4e, 0x38, 0x19, 0xef, 0x46, 0xa9, 0xde, 0xac, 0xd8,
    0xa8, 0xfa, 0x76, 0x3f, 0xe3, 0x9c, 0x34, 0x3f, 0xf9, 0xdc, 0xbb, 0xc7, 0xc7, 0x0b, 0x4f, 0x1d, 0x8a, 0x51, 0xe0,
    0x4b, 0xcd, 0xb4, 0x59, 0x31, 0xc8, 0x9f, 0x7e, 0xc9, 0xd9, 0x78, 0x73, 0x64, 0xea, 0xc5, 0xac, 0x83, 0x34, 0xd3,
    0xeb, 0xc3, 0xc5, 0x81, 0xa0, 0xff, 0xfa, 0x13, 0x63, 0xeb, 0x17, 0x0d, 0xdd, 0x51, 0xb7, 0xf0, 0xda, 0x49, 0xd3,
    0x16, 0x55, 0x26, 0x29, 0xd4, 0x68, 0x9e, 0x2b, 0x16, 0xbe, 0x58, 0x7d, 0x47, 0xa1, 0xfc, 0x8f, 0xf8, 0xb8, 0xd1,
    0x7a, 0xd0, 0x31, 0xce, 0x45, 0xcb, 0x3a, 0x8f, 0x95, 0x16, 0x04, 0x28, 0xaf, 0xd7, 0xfb, 0xca, 0xbb, 0x4b, 0x40,
    0x7e};

inline Lanes load(const uint8_t* from) {
    Lanes x;
    std::memcpy(&x, from, sizeof x);
    return x;
}

inline uint64_t load_word(const uint8_t* from) {
    uint64_t x;
    std::memcpy(&x, from, sizeof x);
    return x;
}

// The product of the halves of each lane.
inline Lanes halves_multiplied(Lanes x) {
#ifdef __AVX512F__
    return (Lanes)_mm512_mul_epu32((__m512i)x, _mm512_srli_epi64((__m512i)x, 32));
#else
    return (x & 0xffffffff) * (x >> 32);
#endif
}

inline void accumulate(Lanes& sums, Lanes data, const uint8_t* secret) {
    const Lanes swapped = __builtin_shufflevector(data, data, 1, 0, 3, 2, 5, 4, 7, 6);
    sums += swapped + halves_multiplied(data ^ load(secret));
}

inline void scramble(Lanes& sums) {
    sums ^= sums >> 47;
    sums ^= load(kSecret + kSecretBytes - kStripeBytes);
    sums *= kPrime32[0];
}

// To 64 bytes that are aligned.
inline void stream(uint8_t* to, Lanes x) {
#if defined(__AVX512F__)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to), (__m512i)x);
#elif defined(__x86_64__)
    for (int i = 0; i < 4; i++) {
        __m128i part;
        std::memcpy(&part, reinterpret_cast<const uint8_t*>(&x) + 16 * i, sizeof part);
        _mm_stream_si128(reinterpret_cast<__m128i*>(to) + i, part);
    }
#else
    std::memcpy(to, &x, sizeof x);
#endif
}

// `aligned`: `to` is, to the size of a stripe.
template <bool aligned>
inline void store(uint8_t* to, Lanes data) {
    if (aligned) {
        stream(to, data);
    } else {
        std::memcpy(to, &data, sizeof data);
    }
}

inline bool is_aligned(const void* to) { return reinterpret_cast<uintptr_t>(to) % kStripeBytes == 0; }

// After the last store: whoever is told that the bytes are there finds them.
inline void finish_stores() {
#ifdef __x86_64__
    _mm_sfence();
#endif
}

template <bool aligned>
inline void copy_stripe(Lanes& sums, uint8_t* to, const uint8_t* from, const uint8_t* secret) {
    const Lanes data = load(from);
    accumulate(sums, data, secret);
    store<aligned>(to, data);
}

inline uint64_t folded(uint64_t a, uint64_t b) {
    const auto product = static_cast<unsigned __int128>(a) * b;
    return static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64);
}

inline uint64_t merged(Lanes sums, uint64_t num_bytes) {
    uint64_t x = num_bytes * kPrime64[0];
    for (int64_t i = 0; i < kLanes; i += 2) {
        const uint8_t* secret = kSecret + 11 + 8 * i;
        x += folded(sums[i] ^ load_word(secret), sums[i + 1] ^ load_word(secret + 8));
    }
    x = (x ^ (x >> 37)) * 0x165667919E3779F9;
    x ^= x >> 32;
    return x == 0 ? 1 : x;  // 0 stands for nothing
}

// The sum of bytes that come a stripe at a time, `num_bytes` in all: whole stripes, `kShortest` bytes at least.
class Sum {
  public:
    explicit Sum(int64_t num_bytes) : num_bytes_(num_bytes), left_(num_bytes / kStripeBytes) {}

    void add(Lanes data) {
        const bool is_last = --left_ == 0;
        accumulate(sums_, data, kSecret + (is_last ? kLastSecret : 8 * stripe_));
        if (++stripe_ == kStripesPerBlock && !is_last) {
            scramble(sums_);
            stripe_ = 0;
        }
    }

    uint64_t value() const { return merged(sums_, num_bytes_); }

  private:
    Lanes sums_ = kStart;
    int64_t num_bytes_, left_, stripe_ = 0;
};

template <bool aligned>
uint64_t copy_summed(uint8_t* to, const uint8_t* from, int64_t num_bytes) {
    Lanes sums = kStart;
    const int64_t num_stripes = (num_bytes - 1) / kStripeBytes;  // the last, whole or not, is summed in another way
    int64_t stripe = 0;
    for (; stripe + kStripesPerBlock <= num_stripes; stripe += kStripesPerBlock) {
        for (int64_t i = 0; i < kStripesPerBlock; i++) {
            const int64_t at = (stripe + i) * kStripeBytes;
            copy_stripe<aligned>(sums, to + at, from + at, kSecret + 8 * i);
        }
        scramble(sums);
    }
    for (int64_t i = 0; stripe + i < num_stripes; i++) {
        const int64_t at = (stripe + i) * kStripeBytes;
        copy_stripe<aligned>(sums, to + at, from + at, kSecret + 8 * i);
    }
    uint8_t last[kStripeBytes];  // it overlaps the one before, which is not read again from a source that may change
    const int64_t rest = num_bytes - num_stripes * kStripeBytes;
    std::memcpy(to + num_bytes - rest, from + num_bytes - rest, rest);
    std::memcpy(last, to + num_bytes - kStripeBytes, kStripeBytes);
    accumulate(sums, load(last), kSecret + kLastSecret);
    return merged(sums, num_bytes);
}

// Of `num_bytes` (`kShortest` at least), which do not overlap; returns their xxh3_64, or 1 for 0.
inline uint64_t copy_summed(uint8_t* to, const uint8_t* from, int64_t num_bytes) {
    const auto copy = is_aligned(to) ? copy_summed<true> : copy_summed<false>;
    const uint64_t sum = copy(to, from, num_bytes);
    finish_stores();
    return sum;
}

// The size of the segment that begins `at` bytes behind the first byte of a chunk (`transfer.work`).
struct Cut {
    int64_t first_byte, block_bytes, segment_bytes;

    int64_t segment_at(int64_t at) const {
        const int64_t rest_bytes = block_bytes - (first_byte + at) % block_bytes;
        return rest_bytes < segment_bytes ? rest_bytes : segment_bytes;
    }
};

// Whole segments of one block or several; a sum for each of them.
inline void copy_segments(uint8_t* to, const uint8_t* from, int64_t num_bytes, Cut cut, uint64_t* sums) {
    for (int64_t at = 0, size; at < num_bytes; at += size) {
        size = cut.segment_at(at);
        *sums++ = copy_summed(to + at, from + at, size);
    }
}

}  // namespace copying
