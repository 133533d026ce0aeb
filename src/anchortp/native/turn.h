// Weights of two bytes an element as arenas hold them, made from rows as a checkpoint holds them: columns that become
// rows, and panels. Tiles are turned in registers, a cache line of each row at a time.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#include "copy.h"

namespace turning {

constexpr int64_t kLine = 64, kPanelRows = 64;  // `layout.units.PANEL_ROWS`

template <typename T>
struct Tile {
    static constexpr int64_t kSize = kLine / sizeof(T);  // of its sides
    typedef T Row __attribute__((vector_size(kLine)));
    Row rows[kSize];
};

// Of the lanes of two rows `step` apart, those that trade places.
template <int64_t step, typename Row, size_t... lane>
inline void trade(Row& a, Row& b, std::index_sequence<lane...>) {
    constexpr int64_t size = sizeof...(lane);
    const Row first = __builtin_shufflevector(a, b, (lane & step ? size + lane - step : lane)...);
    b = __builtin_shufflevector(a, b, (lane & step ? size + lane : lane + step)...);
    a = first;
}

template <int64_t step, typename T>
inline void turn(Tile<T>& tile) {
    constexpr int64_t size = Tile<T>::kSize;
    for (int64_t i = 0; i < size; i++) {
        if (!(i & step)) {
            trade<step>(tile.rows[i], tile.rows[i + step], std::make_index_sequence<size>());
        }
    }
    if constexpr (step > 1) {
        turn<step / 2>(tile);
    }
}

// `kSize` rows of as many elements, of which the first begins at `row(0)`, written as columns; `past` the cache where `to`
// is aligned.
template <typename T, bool past, typename Rows>
inline void turn_tile(Rows row, uint8_t* to, int64_t to_stride) {
    constexpr int64_t size = Tile<T>::kSize;
    Tile<T> tile;
    for (int64_t i = 0; i < size; i++) {
        std::memcpy(&tile.rows[i], row(i), kLine);
    }
    turn<size / 2>(tile);
    for (int64_t i = 0; i < size; i++) {
        copying::store<past>(to + i * to_stride, (copying::Lanes)tile.rows[i]);
    }
}

template <bool past>
inline void turn_columns(const uint16_t* from, int64_t stride, uint16_t* to, int64_t num_rows, int64_t num_columns) {
    constexpr int64_t size = Tile<uint16_t>::kSize;
    const int64_t whole_rows = num_rows / size * size, whole_columns = num_columns / size * size;
    for (int64_t row = 0; row < whole_rows; row += size) {
        for (int64_t i = 0; i < size; i++) {  // each on a page of its own, mostly: the hardware does not foresee them
            for (int64_t column = 0; column < num_columns; column += size) {
                __builtin_prefetch(from + (row + size + i) * stride + column);
            }
        }
        for (int64_t column = 0; column < whole_columns; column += size) {
            const auto rows = [&](int64_t i) { return from + (row + i) * stride + column; };
            turn_tile<uint16_t, past>(rows, reinterpret_cast<uint8_t*>(to + column * num_rows + row), 2 * num_rows);
        }
    }
    for (int64_t column = 0; column < num_columns; column++) {
        for (int64_t row = column < whole_columns ? whole_rows : 0; row < num_rows; row++) {
            to[column * num_rows + row] = from[row * stride + column];
        }
    }
}

// `to` `[num_columns, num_rows]` = `from` `[num_rows, num_columns]` turned; rows of `from` are `stride` elements apart.
inline void turn_columns(const uint16_t* from, int64_t stride, uint16_t* to, int64_t num_rows, int64_t num_columns) {
    const bool past = copying::is_aligned(to) && 2 * num_rows % kLine == 0;
    (past ? turn_columns<true> : turn_columns<false>)(from, stride, to, num_rows, num_columns);
    copying::finish_stores();
}

// A panel: pairs of neighbouring columns (`num_pairs`, a multiple of 16) change places with `kPanelRows` rows. `out` gets
// it a line at a time.
template <typename Rows, typename Out>
inline void turn_panel(Rows row, int64_t num_pairs, Out out) {
    constexpr int64_t size = Tile<uint32_t>::kSize;
    alignas(kLine) uint8_t turned[kPanelRows * kLine];
    for (int64_t pair = 0; pair < num_pairs; pair += size) {
        for (int64_t first = 0; first < kPanelRows; first += size) {
            const auto rows = [&](int64_t i) { return row(first + i) + 4 * pair; };
            turn_tile<uint32_t, false>(rows, turned + 4 * first, 4 * kPanelRows);
        }
        for (int64_t at = 0; at < kPanelRows * kLine; at += kLine) {
            out(copying::load(turned + at));
        }
    }
}

inline void turn_panels(const uint8_t* from, uint8_t* to, int64_t num_panels, int64_t num_pairs) {
    for (int64_t panel = 0; panel < num_panels; panel++, from += kPanelRows * 4 * num_pairs) {
        const auto row = [&](int64_t i) { return from + i * 4 * num_pairs; };
        turn_panel(row, num_pairs, [&](copying::Lanes line) {
            std::memcpy(to, &line, kLine);
            to += kLine;
        });
    }
}

template <bool past>
inline void gather_segments(const uint8_t* const* rows, int64_t row_bytes, bool in_panels, uint8_t* to,
                            int64_t num_bytes, copying::Cut cut, uint64_t* sums) {
    for (int64_t at = 0, size; at < num_bytes; at += size) {
        size = cut.segment_at(at);
        copying::Sum sum(size);
        const auto put = [&](copying::Lanes line) {
            sum.add(line);
            copying::store<past>(to, line);
            to += kLine;
        };
        const uint8_t* const* end = rows + size / row_bytes;
        if (in_panels) {
            for (; rows < end; rows += kPanelRows) {
                turn_panel([&](int64_t i) { return rows[i]; }, row_bytes / 4, put);
            }
        } else {
            for (; rows < end; rows++) {
                for (int64_t i = 0; i < row_bytes; i += kLine) put(copying::load(*rows + i));
            }
        }
        *sums++ = sum.value();
    }
}

// Whole segments of one block or several from rows anywhere (of whole lines), as they are or in panels; a sum for each.
inline void gather_segments(const uint8_t* const* rows, int64_t row_bytes, bool in_panels, uint8_t* to,
                            int64_t num_bytes, copying::Cut cut, uint64_t* sums) {
    const auto gather = copying::is_aligned(to) ? gather_segments<true> : gather_segments<false>;
    gather(rows, row_bytes, in_panels, to, num_bytes, cut, sums);
    copying::finish_stores();
}

}  // namespace turning
