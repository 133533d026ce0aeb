// Weights of two bytes an element as arenas hold them, made from rows as a checkpoint holds them: columns that become
// rows, and panels. Tiles are turned in registers, a cache line of each row at a time.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

namespace turning {

constexpr int64_t kLine = 64;

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

// `kSize` rows of as many elements, `from_stride` bytes apart, written as columns.
template <typename T>
inline void turn_tile(const uint8_t* from, int64_t from_stride, uint8_t* to, int64_t to_stride) {
    constexpr int64_t size = Tile<T>::kSize;
    Tile<T> tile;
    for (int64_t i = 0; i < size; i++) {
        std::memcpy(&tile.rows[i], from + i * from_stride, kLine);
    }
    turn<size / 2>(tile);
    for (int64_t i = 0; i < size; i++) {
        std::memcpy(to + i * to_stride, &tile.rows[i], kLine);
    }
}

// `to` `[num_columns, num_rows]` = `from` `[num_rows, num_columns]` turned; rows of `from` are `stride` elements apart.
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
            turn_tile<uint16_t>(reinterpret_cast<const uint8_t*>(from + row * stride + column), 2 * stride,
                                reinterpret_cast<uint8_t*>(to + column * num_rows + row), 2 * num_rows);
        }
    }
    for (int64_t column = 0; column < num_columns; column++) {
        for (int64_t row = column < whole_columns ? whole_rows : 0; row < num_rows; row++) {
            to[column * num_rows + row] = from[row * stride + column];
        }
    }
}

// Panels of `panel_rows` rows (a multiple of 16): pairs of neighbouring columns (`num_pairs`, a multiple of 16) change
// places with rows.
inline void turn_panels(const uint8_t* from, uint8_t* to, int64_t num_panels, int64_t panel_rows, int64_t num_pairs) {
    constexpr int64_t size = Tile<uint32_t>::kSize;
    for (int64_t panel = 0; panel < num_panels; panel++) {
        const int64_t base = panel * panel_rows * num_pairs;
        for (int64_t pair = 0; pair < num_pairs; pair += size) {
            for (int64_t row = 0; row < panel_rows; row += size) {
                turn_tile<uint32_t>(from + 4 * (base + row * num_pairs + pair), 4 * num_pairs,
                                    to + 4 * (base + pair * panel_rows + row), 4 * panel_rows);
            }
        }
    }
}

}  // namespace turning
