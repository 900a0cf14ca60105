// Forward pass of the outer (patch) transformer block of TNT and DeiT with bfloat16 GEMMs and
// float32 accumulation, norms, softmax, GELU and residuals; inference only, for AVX512-BF16.
//
//   tokens (images, tokens, dim) -> (images, tokens, dim): x += MHSA(LN(x)); x += MLP(LN(x))
//
// Kernels are packed to bfloat16 B panels once. Three steps, in which biases, GELU, residuals and
// rounding are GEMM epilogues: `project` (layer norm and QKV GEMM on a block of rows), `attend`
// (one head of one image) and `finish` (output projection, residual, layer norm and MLP on a block
// of rows). If the images divide evenly among the threads, or are at least eight times as many,
// each task runs all steps of one image, in one core's caches; otherwise each step is parallel over
// row blocks, or heads. Either way, results do not depend on the number of threads.
#pragma once
#include "half_product.h"
#include "outer_transformer.h"

namespace outer {
namespace {

// The four dense kernels as packed bfloat16 B panels.
struct HalfKernels {
  Space space;
  HalfPanels qkv, projection, fc1, fc2;

  HalfKernels(int64_t d, int64_t hidden, const Weights<>& w, Parallel parallel)
      : qkv(space, d, 3 * d),
        projection(space, d, d),
        fc1(space, d, hidden),
        fc2(space, hidden, d) {
    pack({qkv, projection, fc1, fc2},
         {w.qkv_kernel, w.projection_kernel, w.fc1_kernel, w.fc2_kernel}, parallel);
  }
};

// y = LN(x) rounded to bfloat16, (rows, n).
inline void layer_norm(const float* x, int64_t rows, int64_t n, const float* gamma,
                       const float* beta, float epsilon, Half* y) {
  normalize(x, rows, n, gamma, beta, epsilon,
            [=](Vec value, int64_t at, auto count) { store_half(value, y + at, count); });
}

// The steps of the forward pass on rows of a batch, with bfloat16 buffers for query, key and value,
// (rows, 3 dim), and the attention output, (rows, dim).
struct HalfSteps {
  const Sizes s;
  const Weights<> w;
  const HalfKernels& kernels;
  Space space;
  Half* const qkv;
  Half* const mixed;

  HalfSteps(const Sizes& s, const Weights<>& w, const HalfKernels& kernels)
      : s(s),
        w(w),
        kernels(kernels),
        qkv(take_half(space, s.rows() * 3 * s.dim)),
        mixed(take_half(space, s.rows() * s.dim)) {}

  // Layer norm and QKV GEMM of rows [first, first + rows).
  void project(const float* in, int64_t first, int64_t rows) {
    const int64_t d = s.dim;
    Space space;
    Half* normed = take_half(space, rows * d);
    layer_norm(in + first * d, rows, d, w.attention_gamma, w.attention_beta, s.epsilon, normed);
    Half* const to = qkv + first * 3 * d;
    half_product(
        normed, d, kernels.qkv, rows, [=](int64_t i, int64_t j) { for_writing(to + i * 3 * d + j); },
        [=](int64_t i, int64_t j, Vec x, auto n) {
          store_half(x + load(w.qkv_bias + j, n), to + i * 3 * d + j, n);
        });
  }

  // Attention of one head of one image, number = image * heads + head. For each tile of query rows,
  // the scores (tile_rows, tokens) of all keys stay in the cache: the epilogue of Q K^T finds the
  // row maxima, then the scores are exponentiated (base 2, with log2(e) folded into the scale) and
  // rounded to bfloat16; the epilogue of P V divides by the row sums (deferred normalization).
  void attend(int64_t number) {
    const int64_t d = s.head_dim(), t = s.tokens, width = 3 * s.dim, row = score_row(s);
    const int64_t image = number / s.heads, head = number % s.heads;
    const Half* query = qkv + image * t * width + head * d;
    Space space;
    const HalfPanels keys(space, d, t), values(space, t, d);
    keys.pack_transposed(query + s.dim, width);
    values.pack(query + 2 * s.dim, width);
    float* scores = space.take(tile_rows * row);
    Half* weights = take_half(space, tile_rows * row);
    const float scale = 1.44269504 / std::sqrt(double(d));  // log2(e) / sqrt(head_dim)
    for (int64_t first = 0; first < t; first += tile_rows) {
      const int64_t rows = std::min(tile_rows, t - first);
      Vec most[tile_rows];
      float inverse[tile_rows];
      std::fill_n(most, rows, all(-INFINITY));
      half_product(
          query + first * width, width, keys, rows, [](int64_t, int64_t) {},
          [&](int64_t i, int64_t j, Vec x, auto n) {
            x = cut(x, n, -INFINITY);
            most[i] = larger(most[i], x);
            store(x, scores + i * row + j);
          });
      for (int64_t i = 0; i < rows; ++i) {
        const float largest = _mm512_reduce_max_ps((__m512)most[i]) * scale;
        Vec sum = {};
        for (int64_t c = i * row; c < i * row + t; c += lanes) {
          const Vec x = exp2_half(load(scores + c) * scale - largest);
          sum += x;
          store_half(x, weights + c, std::integral_constant<int64_t, lanes>());
        }
        inverse[i] = 1.0f / total(sum);
      }
      Half* to = mixed + (image * t + first) * s.dim + head * d;
      half_product(
          weights, row, values, rows, [&](int64_t i, int64_t j) { for_writing(to + i * s.dim + j); },
          [&](int64_t i, int64_t j, Vec x, auto n) {
            store_half(x * inverse[i], to + i * s.dim + j, n);
          });
    }
  }

  // Output projection, residual, layer norm and MLP of rows [first, first + rows), to `out`.
  void finish(const float* in, int64_t first, int64_t rows, float* out) {
    const int64_t d = s.dim, h = s.hidden;
    Space space;
    float* const middle = space.take(rows * d);
    Half *const normed = take_half(space, rows * d), *const active = take_half(space, rows * h);
    add_product(mixed + first * d, d, kernels.projection, rows, w.projection_bias, in + first * d,
                middle);
    layer_norm(middle, rows, d, w.mlp_gamma, w.mlp_beta, s.epsilon, normed);
    half_product(
        normed, d, kernels.fc1, rows, [=](int64_t i, int64_t j) { for_writing(active + i * h + j); },
        [=](int64_t i, int64_t j, Vec x, auto n) {
          store_half(gelu_half(x + load(w.fc1_bias + j, n)), active + i * h + j, n);
        });
    add_product(active, h, kernels.fc2, rows, w.fc2_bias, middle, out + first * d);
  }

 private:
  // GEMM with residual: to = from + a b + bias, (rows, n).
  void add_product(const Half* a, int64_t a_row, HalfPanels b, int64_t rows, const float* bias,
                   const float* from, float* to) {
    half_product(
        a, a_row, b, rows,
        [=](int64_t i, int64_t j) {
          for (int64_t c = i * b.n + j; c < i * b.n + j + tile_columns; c += lanes) {
            prefetch(from + c);
            for_writing(to + c);
          }
        },
        [=](int64_t i, int64_t j, Vec x, auto n) {
          const int64_t at = i * b.n + j;
          store(load(from + at, n) + load(bias + j, n) + x, to + at, n);
        });
  }
};

// Splits n rows into `parts` ranges of about equal length that begin at multiples of tile_rows, and
// calls what(first, count) for range `number`, unless it is empty.
template <typename What>
inline void part_of(int64_t n, int64_t parts, int64_t number, What what) {
  const auto start = [=](int64_t i) {
    const int64_t nearest = (n * i / parts + tile_rows / 2) / tile_rows * tile_rows;
    return i == parts ? n : std::min(n, nearest);
  };
  if (const int64_t count = start(number + 1) - start(number)) what(start(number), count);
}

constexpr int64_t half_rows = 8 * tile_rows;  // rows of a task, at most, but for rounding to tiles

// Computes the block, tokens `in` (images, tokens, dim) to `out` of the same shape.
inline void transform(const Sizes& s, Parallel parallel, int64_t threads, const float* in,
                      const Weights<>& w, const HalfKernels& kernels, float* out) {
  if (s.images % threads == 0 || s.images >= 8 * threads)
    return parallel(s.images, [&](int64_t image) {  // all steps of an image on one core
      const int64_t numbers = s.tokens * s.dim, parts = parts_of(s.tokens, half_rows);
      const float* from = in + image * numbers;
      Sizes one = s;
      one.images = 1;
      HalfSteps steps(one, w, kernels);
      for (int64_t i = 0; i < parts; ++i)
        part_of(s.tokens, parts, i,
                [&](int64_t first, int64_t rows) { steps.project(from, first, rows); });
      for (int64_t head = 0; head < s.heads; ++head) steps.attend(head);
      for (int64_t i = 0; i < parts; ++i)
        part_of(s.tokens, parts, i, [&](int64_t first, int64_t rows) {
          steps.finish(from, first, rows, out + image * numbers);
        });
    });
  HalfSteps steps(s, w, kernels);
  const int64_t parts = round_up(parts_of(s.rows(), half_rows), threads);
  parallel(parts, [&](int64_t i) {
    part_of(s.rows(), parts, i,
            [&](int64_t first, int64_t rows) { steps.project(in, first, rows); });
  });
  parallel(s.images * s.heads, [&](int64_t number) { steps.attend(number); });
  parallel(parts, [&](int64_t i) {
    part_of(s.rows(), parts, i,
            [&](int64_t first, int64_t rows) { steps.finish(in, first, rows, out); });
  });
}

}  // namespace
}  // namespace outer
