// Kernels for CPUs. `build.py` compiles this file, `library.py` calls it.
//
// Plain C functions over pointers; rows are contiguous; sums and exponentials are in float32. Threads are torch's: this
// library names no OpenMP of its own, so it finds the one that torch has loaded.

#include "attention.h"
#include "copy.h"
#include "group.h"
#include "layers.h"
#include "matrices.h"
#include "rows.h"
#include "turn.h"

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
    }                                                                                                                  \
    extern "C" int all_reduce_##DTYPE(Group* group, T* x, int64_t num) { return all_reduce(*group, x, num); }

extern "C" uint64_t copy_summed(uint8_t* to, const uint8_t* from, int64_t num_bytes) {
    return copying::copy_summed(to, from, num_bytes);
}

extern "C" void copy_segments(const uint8_t* from, uint8_t* to, int64_t num_bytes, int64_t first_byte,
                              int64_t block_bytes, int64_t segment_bytes, uint64_t* sums) {
    copying::copy_segments(to, from, num_bytes, {first_byte, block_bytes, segment_bytes}, sums);
}

extern "C" void gather_segments(const uint8_t* const* rows, int64_t row_bytes, bool in_panels, uint8_t* to,
                                int64_t num_bytes, int64_t first_byte, int64_t block_bytes, int64_t segment_bytes,
                                uint64_t* sums) {
    turning::gather_segments(rows, row_bytes, in_panels, to, num_bytes, {first_byte, block_bytes, segment_bytes}, sums);
}

extern "C" int64_t shortest_summed() { return copying::kShortest; }

extern "C" void turn_columns(const uint16_t* from, int64_t stride, uint16_t* to, int64_t num_rows, int64_t num_columns) {
    turning::turn_columns(from, stride, to, num_rows, num_columns);
}

extern "C" void turn_panels(const uint8_t* from, uint8_t* to, int64_t num_panels, int64_t num_pairs) {
    turning::turn_panels(from, to, num_panels, num_pairs);
}

EXPORT(bfloat16, BFloat16)
EXPORT(float32, float)

#ifdef __AVX512BF16__

extern "C" void linear_bfloat16(const BFloat16* x, const BFloat16* weight, BFloat16* out, int64_t num_rows,
                                int64_t num_in, int64_t num_out) {
    linear(x, weight, out, num_rows, num_in, num_out);
}

extern "C" void times_bfloat16(const BFloat16* x, const BFloat16* weight, BFloat16* out, int64_t num_rows,
                               int64_t num_in, int64_t num_out) {
    times(x, weight, out, num_rows, num_in, num_out);
}

extern "C" int run_layers_bfloat16(const Layer* layers, int64_t first, int64_t last, const Shapes* shapes,
                                   const Rows* rows, Group* group, BFloat16* x) {
    return run_layers(layers, first, last, *shapes, *rows, *group, x);
}

#endif
