// Whole layers of a dense model in one call, for few rows: what Python would spend between the kernels takes longer than
// they do.
#pragma once

#include "attention.h"
#include "group.h"
#include "matrices.h"

#ifdef __AVX512BF16__

namespace {

// As `Layer`, `Shapes` and `Rows` in `library.py`.
struct Layer {
    const BFloat16 *input_norm, *post_norm, *q_norm, *k_norm, *q, *kv, *o, *gate_up, *down;
    BFloat16* cache;
};

struct Shapes {  // of this rank's shard; its q heads by the KV head that they read
    int64_t hidden, num_q, num_kv, head_dim, num_columns, block, block_size, plane_tokens;
    const int32_t *readers, *reader_starts;
    const BFloat16 *cos, *sin;
    float eps;
};

struct Rows {
    int64_t num, num_sequences;
    const int64_t *positions, *cache_slots;
    const int32_t *rows, *starts, *blocks, *last_tokens;
};

// Layers `[first, last)` on the residual stream `x`. Collectives are those of the layers one by one.
inline Outcome run_layers(const Layer* layers, int64_t first, int64_t last, const Shapes& s, const Rows& rows, Group& group,
                          BFloat16* x) {
    static thread_local std::vector<BFloat16> scratch;
    const int64_t n = rows.num, q_width = s.num_q * s.head_dim, kv_width = 2 * s.num_kv * s.head_dim;
    const int64_t wide = std::max(2 * q_width + kv_width, 3 * s.num_columns);
    scratch.resize(n * (2 * s.hidden + wide));
    BFloat16 *normed = scratch.data(), *partial = normed + n * s.hidden, *own = partial + n * s.hidden;
    if (first < last) add_norm<BFloat16>(x, nullptr, layers[first].input_norm, normed, n, s.hidden, s.eps);
    for (int64_t index = first; index < last; ++index) {
        const Layer& layer = layers[index];
        if (s.num_q) {
            BFloat16 *q = own, *turned = q + n * q_width, *kv = turned + n * q_width;
            linear(normed, layer.q, q, n, s.hidden, q_width);
            linear(normed, layer.kv, kv, n, s.hidden, kv_width);
            rotate_store(q, kv, layer.q_norm, layer.k_norm, rows.positions, s.cos, s.sin, rows.cache_slots, layer.cache,
                         turned, n, s.num_q, s.num_kv, s.head_dim, s.plane_tokens, s.eps);
            attend(turned, layer.cache, rows.rows, rows.starts, rows.blocks, rows.last_tokens, s.readers, s.reader_starts,
                   q, rows.num_sequences, s.num_q, s.num_kv, s.head_dim, s.block_size, s.plane_tokens);
            times(q, layer.o, partial, n, q_width, s.hidden);
        } else {
            std::memset(partial, 0, n * s.hidden * sizeof(BFloat16));
        }
        if (Outcome outcome = reduce_add_norm(group, partial, x, layer.post_norm, normed, n, s.hidden, s.eps))
            return outcome;
        if (s.num_columns) {
            BFloat16 *both = own, *gated = both + 2 * n * s.num_columns;
            linear(normed, layer.gate_up, both, n, s.hidden, 2 * s.num_columns);
            silu_mul(both, gated, n * s.num_columns / s.block, s.block);
            times(gated, layer.down, partial, n, s.num_columns, s.hidden);
        } else {
            std::memset(partial, 0, n * s.hidden * sizeof(BFloat16));
        }
        const BFloat16* next_norm = index + 1 < last ? layers[index + 1].input_norm : nullptr;
        if (Outcome outcome = reduce_add_norm(group, partial, x, next_norm, normed, n, s.hidden, s.eps)) return outcome;
    }
    return kDone;
}

}  // namespace

#endif
