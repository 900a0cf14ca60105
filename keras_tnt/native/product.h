// Products of matrices, on one core, near what its multipliers can do: tiles of the result stay in
// registers while panels of both factors stream through the first caches.
#pragma once
#include <algorithm>
#include <type_traits>

#include "space.h"
#include "vectors.h"

namespace {

#if defined(__AVX512F__)
constexpr int64_t tile_rows = 14;
#else
constexpr int64_t tile_rows = 6;
#endif
constexpr int64_t tile_columns = 2 * lanes;
constexpr int64_t ahead = 16;  // rows that are asked of memory before they are copied
constexpr int64_t depth = 384;  // of what is summed before a tile goes back to memory

inline void prefetch(const float* at) { __builtin_prefetch(at); }

// How far the next row and the next column are from a number of a matrix.
struct Matrix {
  const float* at;
  int64_t row, column;
  Matrix from(int64_t i, int64_t j) const { return {at + i * row + j * column, row, column}; }
  Matrix transposed() const { return {at, column, row}; }
};

// Copies n numbers; `most` of them without a call.
template <int64_t most>
inline void copy_up_to(const float* from, int64_t n, float* to) {
  if (n == most)
    std::memcpy(to, from, most * sizeof *to);
  else
    std::copy_n(from, n, to);
}

// The right factor of a product, (k, n): its columns in panels of `tile_columns`, zeros behind the
// last, cut at each `depth` rows.
struct Panels {
  float* at;
  int64_t k, n;

  static int64_t size(int64_t k, int64_t n) { return k * round_up(n, tile_columns); }
  int64_t count() const { return parts_of(n, tile_columns); }

  // The panel of the columns from `column` on, of the rows from `row` on.
  float* panel(int64_t row, int64_t column) const {
    return at + row * round_up(n, tile_columns) + column * std::min(depth, k - row);
  }

  float* number(int64_t row, int64_t column) const {
    const int64_t above = row / depth * depth, in_panel = column % tile_columns;
    return panel(above, column - in_panel) + (row - above) * tile_columns + in_panel;
  }

  // Fills the panel number `i` with columns of a matrix, of which there may be fewer than n.
  void pack(Matrix from, int64_t columns, int64_t i) const {
    const int64_t column = i * tile_columns;
    const int64_t width = std::clamp<int64_t>(columns - column, 0, tile_columns);
    for (int64_t row = 0; row < k; row += depth) {
      const int64_t rows = std::min(depth, k - row);
      const Matrix part = from.from(row, column);
      float* to = panel(row, column);
      if (width < tile_columns) std::fill_n(to, rows * tile_columns, 0.0f);
      if (part.column != 1) {
        transpose(part.at, part.column, width, rows, to, tile_columns);
        continue;
      }
      for (int64_t p = 0; p < rows; ++p) {
        const float* row = part.at + p * part.row;
        for (int64_t c = 0; c < width; c += lanes) prefetch(row + ahead * part.row + c);
        copy_up_to<tile_columns>(row, width, to + p * tile_columns);
      }
    }
  }

  void pack(Matrix from, int64_t columns) const {
    for (int64_t i = 0; i < count(); ++i) pack(from, columns, i);
  }

  void pack(Matrix from) const { pack(from, n); }
};

// Calls pack(i, panel) for each panel of the i-th of several right factors.
template <typename Factor, size_t count, typename Parallel, typename Pack>
inline void for_panels(const Factor (&factors)[count], Parallel parallel, Pack pack) {
  int64_t panels = 0;
  for (const Factor& factor : factors) panels += factor.count();
  parallel(panels, [&](int64_t panel) {
    int64_t i = 0;
    while (panel >= factors[i].count()) panel -= factors[i++].count();
    pack(i, panel);
  });
}

// c (rows, tile_columns) = start + a panel. start_row is 0 where all rows start from the same numbers.
// a's columns are next to each other, or, if `down`, its rows, and `stride` is between the others.
template <int rows, bool down>
__attribute__((noinline)) void multiply(const float* a, int64_t stride, const float* panel,
                                        int64_t k, const float* start, int64_t start_row, float* c,
                                        int64_t c_row) {
  Vec sum[rows][2] = {};
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i) {
    prefetch(start + i * start_row);
    prefetch(start + i * start_row + lanes);
  }
  for (int64_t p = 0; p < k; ++p, a += down ? stride : 1, panel += tile_columns) {
    const Vec left = load(panel), right = load(panel + lanes);
#pragma GCC unroll 16
    for (int i = 0; i < rows; ++i) {
      const float x = down ? a[i] : a[i * stride];
      sum[i][0] += x * left;
      sum[i][1] += x * right;
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i) {
    store(load(start + i * start_row) + sum[i][0], c + i * c_row);
    store(load(start + i * start_row + lanes) + sum[i][1], c + i * c_row + lanes);
  }
}

template <bool down, int rows = tile_rows, typename... Rest>
inline void multiply_rows(int64_t count, Rest... rest) {
  if constexpr (rows > 1)
    if (count < rows) return multiply_rows<down, rows - 1>(count, rest...);
  multiply<rows, down>(rest...);
}

// Numbers where the sums of a product begin; its rows are so far apart.
struct Start {
  const float* at;
  int64_t row;
};

// c (rows, width) = start + a panel, as `multiply` does it; width is at most `tile_columns`.
template <bool down>
inline void multiply_tile(int64_t rows, const float* a, int64_t stride, const float* panel,
                          int64_t k, int64_t width, Start start, float* c, int64_t c_row) {
  if (width == tile_columns)
    return multiply_rows<down>(rows, a, stride, panel, k, start.at, start.row, c, c_row);
  float from[tile_rows * tile_columns] = {}, to[tile_rows * tile_columns];
  for (int64_t i = 0; i < rows; ++i)
    std::copy_n(start.at + i * start.row, width, from + i * tile_columns);
  multiply_rows<down>(rows, a, stride, panel, k, from, tile_columns, to, tile_columns);
  for (int64_t i = 0; i < rows; ++i) std::copy_n(to + i * tile_columns, width, c + i * c_row);
}

// c (m, n) = start + a b, for a whose columns or rows are next to each other. The rows of c are c_row
// apart, and start may be c itself.
inline void product(Matrix a, Panels b, int64_t m, Start start, float* c, int64_t c_row) {
  const auto multiply_at = [&](auto down, int64_t i, int64_t row, int64_t j, const float* left,
                               int64_t stride) {
    multiply_tile<decltype(down)::value>(
        std::min(tile_rows, m - i), left, stride, b.panel(row, j), std::min(depth, b.k - row),
        std::min(tile_columns, b.n - j), {start.at + i * start.row + j, start.row},
        c + i * c_row + j, c_row);
  };
  const bool down = a.column != 1;
  Space space;
  float* left = down ? space.take(round_up(m, tile_rows) * std::min(depth, b.k)) : nullptr;
  for (int64_t row = 0; row < b.k; row += depth, start = {c, c_row}) {
    const int64_t k = std::min(depth, b.k - row);
    for (int64_t i = 0; down && i < m; i += tile_rows)  // rows of a tile side by side
      for (int64_t p = 0; p < k; ++p) {
        prefetch(a.from(i, row + p + ahead).at);
        copy_up_to<tile_rows>(a.from(i, row + p).at, std::min(tile_rows, m - i),
                              left + i * k + p * tile_rows);
      }
    for (int64_t j = 0; j < b.n; j += tile_columns)  // a panel stays in the first cache
      for (int64_t i = 0; i < m; i += tile_rows) {
        if (down)
          multiply_at(std::true_type(), i, row, j, left + i * k, tile_rows);
        else
          multiply_at(std::false_type(), i, row, j, a.from(i, row).at, a.row);
      }
  }
}

}  // namespace
