// What a step does to rows between its matmuls, each in one pass over memory.
#pragma once

#include <vector>

#include "vectors.h"

namespace {

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

}  // namespace
