// Single-threaded, cache-blocked float32 GEMM in the style of GotoBLAS and BLIS:
//
//   C (m, n) = C0 + A (m, k) B (k, n)
//
// B is packed once into column panels of `tile_columns` (two vectors), and cut along K into
// K-blocks of `depth` rows, so that a K-block of a panel (48 KiB with AVX-512) stays in the L1
// cache while all rows of A pass by. The micro-kernel `multiply` keeps a tile of `tile_rows` x
// `tile_columns` accumulators in registers (28 of 32 with AVX-512, 12 of 16 otherwise) and adds one
// outer product for each k. A row-major A is read in place; a column-major (transposed) A is packed
// to row tiles. C0 is a bias that is broadcast over rows, zeros, or C itself (accumulation).
//
// Callers parallelize over panels (packing) and over rows of C.
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
constexpr int64_t ahead = 16;  // prefetch distance of packing, in rows
constexpr int64_t depth = 384;  // size of a K-block (kc in BLIS)

inline void prefetch(const float* at) { __builtin_prefetch(at); }

// View of a matrix with strides in elements: element (i, j) is at[i * row + j * column].
struct Matrix {
  const float* at;
  int64_t row, column;
  Matrix from(int64_t i, int64_t j) const { return {at + i * row + j * column, row, column}; }
  Matrix transposed() const { return {at, column, row}; }
};

// Copies n floats; the common case n == most is inlined, as its size is a compile-time constant.
template <int64_t most>
inline void copy_up_to(const float* from, int64_t n, float* to) {
  if (n == most)
    std::memcpy(to, from, most * sizeof *to);
  else
    std::copy_n(from, n, to);
}

// Packed B (k, n). K-blocks of `depth` rows follow one another; each holds its column panels of
// `tile_columns`, the last of which is padded with zeros, and each panel is row-major
// (rows of the K-block, tile_columns).
struct Panels {
  float* at;
  int64_t k, n;

  static int64_t size(int64_t k, int64_t n) { return k * round_up(n, tile_columns); }
  int64_t count() const { return parts_of(n, tile_columns); }

  // Returns the panel that starts at (row, column), multiples of `depth` and `tile_columns`.
  float* panel(int64_t row, int64_t column) const {
    return at + row * round_up(n, tile_columns) + column * std::min(depth, k - row);
  }

  // Returns the address of the element (row, column).
  float* number(int64_t row, int64_t column) const {
    const int64_t above = row / depth * depth, in_panel = column % tile_columns;
    return panel(above, column - in_panel) + (row - above) * tile_columns + in_panel;
  }

  // Packs panel `i` of all K-blocks. `from` may have fewer columns than n; zeros take their place.
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

// Runs pack(i, panel) in parallel for each panel of each of several packed matrices, factors[i].
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

// Micro-kernel: c (rows, tile_columns) = start + a (rows, k) panel (k, tile_columns), where k is at
// most a K-block. The accumulators stay in registers. start_row is the row stride of `start`, 0 to
// broadcast one row. Element (i, p) of a is a[p * stride + i] if `down` (packed), otherwise
// a[i * stride + p] (row-major).
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

// Dispatches to the micro-kernel that was instantiated for `count` rows.
template <bool down, int rows = tile_rows, typename... Rest>
inline void multiply_rows(int64_t count, Rest... rest) {
  if constexpr (rows > 1)
    if (count < rows) return multiply_rows<down, rows - 1>(count, rest...);
  multiply<rows, down>(rest...);
}

// Initial value C0 of the accumulation, with its row stride; a stride of 0 broadcasts one row.
struct Start {
  const float* at;
  int64_t row;
};

// The micro-kernel for a tile of `width` <= tile_columns columns: edge tiles go through local
// buffers, because the micro-kernel reads and writes whole tiles.
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

// GEMM: c (m, n) = start + a (m, k) b (k, n). Either stride of `a` must be 1. c_row is the row
// stride of c; `start` may be c itself. The loops, from the outermost: K-blocks, column panels, row
// tiles. After the first K-block, the accumulation starts from c.
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
    for (int64_t i = 0; down && i < m; i += tile_rows)  // pack A: (row tiles, k, tile_rows)
      for (int64_t p = 0; p < k; ++p) {
        prefetch(a.from(i, row + p + ahead).at);
        copy_up_to<tile_rows>(a.from(i, row + p).at, std::min(tile_rows, m - i),
                              left + i * k + p * tile_rows);
      }
    for (int64_t j = 0; j < b.n; j += tile_columns)  // the panel stays in the L1 cache
      for (int64_t i = 0; i < m; i += tile_rows) {
        if (down)
          multiply_at(std::true_type(), i, row, j, left + i * k, tile_rows);
        else
          multiply_at(std::false_type(), i, row, j, a.from(i, row).at, a.row);
      }
  }
}

}  // namespace
