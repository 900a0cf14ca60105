// Single-threaded bfloat16 GEMM with float32 accumulation for AVX512-BF16, with a fused epilogue:
//
//   epilogue(A (m, k) B (k, n))
//
// As in the float32 GEMM of product.h, B is packed into column panels of `tile_columns` (two
// vectors), and a micro-kernel keeps a tile of up to `tile_rows` x `tile_columns` accumulators in
// registers. Here two adjacent rows of B are interleaved to pairs (VNNI layout), which one
// VDPBF16PS multiplies and adds, and there is no K-blocking: a panel has all of K. The epilogue
// (bias, GELU, residual, rounding) is a callback on the float32 accumulators of a tile, before they
// go to memory.
#pragma once
#include "half.h"
#include "product.h"

namespace {

// Allocates `size` bfloat16 of a workspace.
inline Half* take_half(Space& space, int64_t size) {
  return reinterpret_cast<Half*>(space.take(parts_of(size, 2)));
}

// Packed B (inputs, n) in bfloat16: column panels, each (inputs / 2 rounded up, tile_columns)
// pairs. An odd last row is paired with zeros, and the last panel is padded with zeros.
struct HalfPanels {
  Pair* at;
  int64_t inputs, n;

  HalfPanels(Space& space, int64_t inputs, int64_t n) : inputs(inputs), n(n) {
    at = reinterpret_cast<Pair*>(space.take(pairs() * round_up(n, tile_columns)));
  }

  int64_t pairs() const { return parts_of(inputs, 2); }
  int64_t count() const { return parts_of(n, tile_columns); }
  Pair* panel(int64_t i) const { return at + i * pairs() * tile_columns; }

  // Packs panel `i` of a row-major float32 or bfloat16 matrix with the row stride `row`.
  template <typename Number>
  void pack(const Number* from, int64_t row, int64_t i) const {
    const int64_t column = i * tile_columns;
    float* to = reinterpret_cast<float*>(panel(i));
    from += column;
    for (int64_t p = 0; p < inputs; p += 2, from += 2 * row, to += tile_columns) {
      const Number* next = p + 1 < inputs ? from + row : nullptr;
      for (int64_t soon = ahead; soon < ahead + 2; ++soon)
        for (int64_t c : {int64_t{0}, tile_columns - 1}) __builtin_prefetch(from + soon * row + c);
      const auto put = [&](int64_t c, auto count) {
        store(pairs_of(from + c, next ? next + c : next, count), to + c);
      };
      for (int64_t c = 0; c < tile_columns; c += lanes)
        if (n - column >= tile_columns)
          put(c, std::integral_constant<int64_t, lanes>());
        else
          put(c, std::clamp<int64_t>(n - column - c, 0, lanes));
    }
  }

  template <typename Number>
  void pack(const Number* from, int64_t row) const {
    for (int64_t i = 0; i < count(); ++i) pack(from, row, i);
  }

  // Packs the transpose of a row-major (n, inputs) matrix with the row stride `row`; `inputs` and
  // `row` must be even. Pairs are adjacent in memory already, so they are transposed as 32-bit
  // elements.
  void pack_transposed(const Half* from, int64_t row) const {
    for (int64_t i = 0; i < count(); ++i) {
      const int64_t column = i * tile_columns, width = std::min(tile_columns, n - column);
      if (width < tile_columns) std::fill_n(panel(i), pairs() * tile_columns, 0);
      transpose(reinterpret_cast<const float*>(from + column * row), row / 2, width, pairs(),
                reinterpret_cast<float*>(panel(i)), tile_columns);
    }
  }
};

// Packs several contiguous float32 kernels (inputs, n), in parallel over panels.
template <size_t count, typename Parallel>
inline void pack(const HalfPanels (&to)[count], const float* const (&kernels)[count],
                 Parallel parallel) {
  for_panels(to, parallel,
             [&](int64_t i, int64_t panel) { to[i].pack(kernels[i], to[i].n, panel); });
}

// Micro-kernel: a tile (rows, tile_columns) of a (rows, k pairs) panel (k pairs, tile_columns).
// Calls take(i, c, accumulators) for each vector of the tile. stride: between rows of a, in pairs.
template <int rows, typename Take>
__attribute__((noinline)) void multiply_half(const Pair* a, int64_t stride, const Pair* panel,
                                             int64_t k, Take& take) {
  Vec sum[rows][2] = {};
  for (int64_t p = 0; p < k; ++p, ++a, panel += tile_columns) {
    const Vec left = load(reinterpret_cast<const float*>(panel));
    const Vec right = load(reinterpret_cast<const float*>(panel + lanes));
#pragma GCC unroll 16
    for (int i = 0; i < rows; ++i) {
      sum[i][0] = dot(sum[i][0], a[i * stride], left);
      sum[i][1] = dot(sum[i][1], a[i * stride], right);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i) {
    take(i, 0, sum[i][0]);
    take(i, lanes, sum[i][1]);
  }
}

// GEMM: a (m, inputs) b (inputs, n) for a row-major `a` with an even row stride a_row. Calls the
// epilogue take(row, column, accumulators, count) for each vector of the result, and before each
// tile soon(row, column) for each of its rows, to prefetch what the epilogue reads or writes. Where
// `inputs` is odd, the element of `a` after each row is multiplied by zero: it must be readable
// and finite.
template <typename Soon, typename Take>
inline void half_product(const Half* a, int64_t a_row, HalfPanels b, int64_t m, Soon soon,
                         Take take) {
  for (int64_t j = 0; j < b.n; j += tile_columns) {
    const Pair* panel = b.panel(j / tile_columns);
    const auto column = [&](auto take) {
      const auto tile = [&](auto rows, int64_t i) {
        for (int64_t r = 0; r < rows; ++r) soon(i + r, j);
        const auto take_at = [&](int64_t r, int64_t c, Vec x) { take(i + r, j + c, x); };
        multiply_half<decltype(rows)::value>(reinterpret_cast<const Pair*>(a + i * a_row),
                                             a_row / 2, panel, b.pairs(), take_at);
        return i + rows;
      };
      int64_t i = 0;
      while (m - i >= tile_rows) i = tile(std::integral_constant<int, tile_rows>(), i);
      while (m - i >= 4) i = tile(std::integral_constant<int, 4>(), i);
      while (m > i) i = tile(std::integral_constant<int, 1>(), i);
    };
    if (b.n - j >= tile_columns)
      column([&](int64_t i, int64_t c, Vec x) {
        take(i, c, x, std::integral_constant<int64_t, lanes>());
      });
    else
      column([&](int64_t i, int64_t c, Vec x) {
        if (c < b.n) take(i, c, x, std::min<int64_t>(lanes, b.n - c));
      });
  }
}

// Prefetches a cache line for writing.
inline void for_writing(const void* at) { __builtin_prefetch(at, 1); }

}  // namespace
