// Forward pass of the outer (patch) transformer block of TNT and DeiT in float32, for training:
//
//   tokens (images, tokens, dim) -> (images, tokens, dim): x += MHSA(LN(x)); x += MLP(LN(x))
//
// Cache-blocked GEMMs with B panels that are packed once, on blocks of at most 16 * tile_rows rows;
// norms, GELU and residuals run while these rows are in the cache. Three parallel phases: layer
// norm and QKV GEMM (row blocks); attention (heads); output projection, residual, layer norm and
// MLP (row blocks). Drop path skips whole branches of an image.
//
// Saved for the backward pass, 5 dim + hidden floats per token: query, key and value, the attention
// output, the tokens after the attention residual, and the MLP's pre-activations. Norms and softmax
// are recomputed. Work partitioning and summation order do not depend on the number of threads, so
// that results are deterministic.
#pragma once
#include "product.h"
#include "weights.h"

namespace outer {
namespace {

// parallel_for: calls part(i) for i in [0, parts) on a runtime's thread pool, through a C function
// pointer that each binding provides.
struct Parallel {
  void (*run)(void* pool, int64_t parts, void (*part)(void* data, int64_t i), void* data);
  void* pool;

  template <typename Part>
  void operator()(int64_t parts, Part part) const {
    run(pool, parts, [](void* data, int64_t i) { (*static_cast<Part*>(data))(i); }, &part);
  }
};

struct Sizes {
  int64_t images, tokens, dim, heads, hidden;
  float epsilon;

  int64_t rows() const { return images * tokens; }
  int64_t head_dim() const { return dim / heads; }
};

// Drop-path multipliers (2, images) of the attention (0) and MLP (1) branches; a branch with 0 is
// skipped. Null: all ones.
struct Factors {
  const float* at;
  int64_t images;

  float operator()(int branch, int64_t image) const {
    return at ? at[branch * images + image] : 1.0f;
  }
};

// Views of the saved activations of all rows, one after another: qkv (rows, 3 dim), attention
// output (rows, dim), tokens after the attention residual (rows, dim), MLP pre-activations
// (rows, hidden).
template <typename Number>
struct Kept {
  Number *qkv, *mixed, *middle, *wide;

  Kept(Number* at, const Sizes& s)
      : qkv(at),
        mixed(qkv + s.rows() * 3 * s.dim),
        middle(mixed + s.rows() * s.dim),
        wide(middle + s.rows() * s.dim) {}
};

// Calls what(column, count) for each vector of a row of n floats. count is a compile-time constant,
// `lanes`, except for the tail.
template <typename What>
inline void along(int64_t n, What what) {
  int64_t c = 0;
  for (; c + lanes <= n; c += lanes) what(c, std::integral_constant<int64_t, lanes>());
  if (c < n) what(c, n - c);
}

// Masks the tail: replaces all lanes from `count` on by `other`.
template <typename Count>
inline Vec cut(Vec x, Count count, float other) {
  if (count == lanes) return x;
  for (int64_t i = count; i < lanes; ++i) x[i] = other;
  return x;
}

// Horizontal reduction of a vector, as a binary tree.
template <typename Combine>
inline float fold(Vec x, Combine combine) {
  float parts[lanes];
  std::memcpy(parts, &x, sizeof x);
  for (int half = lanes / 2; half; half /= 2)
    for (int i = 0; i < half; ++i) parts[i] = combine(parts[i], parts[i + half]);
  return parts[0];
}

// Horizontal sum.
inline float total(Vec x) {
  return fold(x, [](float a, float b) { return a + b; });
}

// Layer norm statistics of a row, in two passes: mean, and inverse = 1 / sqrt(variance + epsilon).
struct Moments {
  float mean, inverse;

  Moments(const float* x, int64_t n, float epsilon) {
    Vec sum = {}, squares = {};
    along(n, [&](int64_t c, int64_t count) { sum += load(x + c, count); });
    mean = total(sum) / n;
    along(n, [&](int64_t c, int64_t count) {
      const Vec centered = cut(load(x + c, count) - mean, count, 0.0f);
      squares += centered * centered;
    });
    inverse = 1.0f / std::sqrt(total(squares) / n + epsilon);
  }
};

// Layer norm of x (rows, n) with an epilogue: calls take(values, offset in x, count) for each
// vector.
template <typename Take>
inline void normalize(const float* x, int64_t rows, int64_t n, const float* gamma,
                      const float* beta, float epsilon, Take take) {
  for (int64_t i = 0; i < rows; ++i, x += n) {
    const Moments at(x, n, epsilon);
    along(n, [&](int64_t c, auto count) {
      const Vec hat = (load(x + c, count) - at.mean) * at.inverse;
      take(hat * load(gamma + c, count) + load(beta + c, count), i * n + c, count);
    });
  }
}

// y = LN(x), (rows, n).
inline void layer_norm(const float* x, int64_t rows, int64_t n, const float* gamma,
                       const float* beta, float epsilon, float* y) {
  normalize(x, rows, n, gamma, beta, epsilon,
            [=](Vec value, int64_t at, int64_t count) { store(value, y + at, count); });
}

// y = x + factor * branch
inline void add(const float* x, const float* branch, float factor, int64_t n, float* y) {
  along(n, [&](int64_t c, int64_t count) {
    store(load(x + c, count) + load(branch + c, count) * factor, y + c, count);
  });
}

// y = factor * x
inline void scale(const float* x, float factor, int64_t n, float* y) {
  along(n, [&](int64_t c, int64_t count) { store(load(x + c, count) * factor, y + c, count); });
}

// Row block: at most `most` consecutive tokens of one image, the unit of work of the row phases.
struct Block {
  int64_t image, first, rows;

  static constexpr int64_t most = 16 * tile_rows;
  static int64_t per_image(const Sizes& s) { return parts_of(s.tokens, most); }
  static int64_t count(const Sizes& s) { return s.images * per_image(s); }

  Block(const Sizes& s, int64_t number)
      : image(number / per_image(s)), first(number % per_image(s) * most) {
    rows = std::min(most, s.tokens - first);
    first += image * s.tokens;
  }
};

// In-place softmax of scale * scores over the first n of `row` elements; the rest become zeros.
inline void softmax(float* scores, int64_t n, int64_t row, float scale) {
  const int64_t end = round_up(n, lanes), last = end - lanes, count = n - last;
  store(cut(load(scores + last), count, -INFINITY), scores + last);
  Vec most = all(-INFINITY), sum = {};
  for (int64_t c = 0; c < end; c += lanes) most = larger(most, load(scores + c));
  const float largest = fold(most, [](float a, float b) { return a > b ? a : b; });
  for (int64_t c = 0; c < end; c += lanes) {
    Vec x = exp((load(scores + c) - largest) * scale);
    if (c == last) x = cut(x, count, 0.0f);
    sum += x;
    store(x, scores + c);
  }
  const float inverse = 1.0f / total(sum);
  for (int64_t c = 0; c < end; c += lanes) store(load(scores + c) * inverse, scores + c);
  std::fill(scores + end, scores + row, 0.0f);
}

// Query, key and value (tokens, head_dim) of one head of one image, number = image * heads + head.
struct Head {
  int64_t image, at;  // at: offset of the query in qkv (rows, 3 dim)
  Matrix query, key, value;

  Head(const Sizes& s, const float* qkv, int64_t number)
      : image(number / s.heads), at(image * s.tokens * 3 * s.dim + number % s.heads * s.head_dim()) {
    query = {qkv + at, 3 * s.dim, 1};
    key = query.from(0, s.dim);
    value = key.from(0, s.dim);
  }

  // Offset of the head in a tensor (rows, dim), such as the attention output.
  int64_t in_tokens(const Sizes& s, int64_t number) const {
    return image * s.tokens * s.dim + number % s.heads * s.head_dim();
  }
};

// Row stride of attention scores: the tokens, padded to whole B panels.
inline int64_t score_row(const Sizes& s) { return round_up(s.tokens, tile_columns); }

// scores (rows, score_row) = softmax(query key^T / sqrt(head_dim)), with zeros after the tokens.
// keys: the packed transpose, (head_dim, score_row).
inline void attention(const Sizes& s, Matrix query, int64_t rows, Panels keys, const float* zeros,
                      float* scores) {
  const int64_t row = score_row(s);
  product(query, keys, rows, {zeros, 0}, scores, row);
  const float scale = 1.0 / std::sqrt(double(s.head_dim()));
  for (int64_t i = 0; i < rows; ++i) softmax(scores + i * row, s.tokens, row, scale);
}

// Attention of one head of one image, a row block of queries at a time: scores of all keys, softmax
// and P V while the block's scores (rows, score_row) are in the cache. mixed: (rows, dim).
inline void attend(const Sizes& s, const float* qkv, int64_t number, float* mixed) {
  const Head head(s, qkv, number);
  const int64_t d = s.head_dim(), t = s.tokens, row = score_row(s), most = std::min(Block::most, t);
  Space space;
  const Panels keys = {space.take(Panels::size(d, row)), d, row};
  const Panels values = {space.take(Panels::size(t, d)), t, d};
  float* scores = space.take(most * row);
  const float* zeros = space.zeros(std::max(d, row));
  keys.pack(head.key.transposed(), t);
  values.pack(head.value);
  for (int64_t first = 0; first < t; first += most) {
    const int64_t rows = std::min(most, t - first);
    attention(s, head.query.from(first, 0), rows, keys, zeros, scores);
    float* to = mixed + head.in_tokens(s, number) + first * s.dim;
    product({scores, row, 1}, values, rows, {zeros, 0}, to, s.dim);
  }
}

// The four dense kernels as packed B panels, or their transposes, for dx = dy kernel^T.
class Packed {
 public:
  Panels qkv, projection, fc1, fc2;

  Packed(const Sizes& s, const Weights<>& w, bool transposed, Parallel parallel, Space& space) {
    const int64_t d = s.dim, h = s.hidden;
    const Matrix from[] = {{w.qkv_kernel, 3 * d, 1},
                           {w.projection_kernel, d, 1},
                           {w.fc1_kernel, h, 1},
                           {w.fc2_kernel, d, 1}};
    const int64_t shapes[][2] = {{d, 3 * d}, {d, d}, {d, h}, {h, d}};
    Panels to[4];
    for (int i = 0; i < 4; ++i) {
      const int64_t k = shapes[i][transposed], n = shapes[i][!transposed];
      to[i] = {space.take(Panels::size(k, n)), k, n};
    }
    for_panels(to, parallel, [&](int64_t i, int64_t panel) {
      to[i].pack(transposed ? from[i].transposed() : from[i], to[i].n, panel);
    });
    qkv = to[0], projection = to[1], fc1 = to[2], fc2 = to[3];
  }
};

// Computes the block, tokens `in` (images, tokens, dim) to `out` of the same shape, and the saved
// activations `kept`. keep: drop-path multipliers (2, images), or null; see `Factors`.
inline void transform(const Sizes& s, Parallel parallel, const float* in, const Weights<>& w,
                      const float* keep, float* out, Kept<float> kept) {
  const int64_t d = s.dim, h = s.hidden, most = std::min(Block::most, s.tokens);
  const Factors factor = {keep, s.images};
  Space space;
  const Packed kernels(s, w, false, parallel, space);

  parallel(Block::count(s), [&](int64_t number) {
    const Block block(s, number);
    float* qkv = kept.qkv + block.first * 3 * d;
    if (factor(0, block.image) == 0) {  // a skipped branch leaves no uninitialized output
      std::fill_n(qkv, block.rows * 3 * d, 0.0f);
      std::fill_n(kept.mixed + block.first * d, block.rows * d, 0.0f);
      return;
    }
    Space space;
    float* normed = space.take(most * d);
    layer_norm(in + block.first * d, block.rows, d, w.attention_gamma, w.attention_beta, s.epsilon,
               normed);
    product({normed, d, 1}, kernels.qkv, block.rows, {w.qkv_bias, 0}, qkv, 3 * d);
  });

  parallel(s.images * s.heads, [&](int64_t number) {
    if (factor(0, number / s.heads) != 0) attend(s, kept.qkv, number, kept.mixed);
  });

  parallel(Block::count(s), [&](int64_t number) {
    const Block block(s, number);
    const int64_t at = block.first * d, numbers = block.rows * d;
    Space space;
    float *branch = space.take(most * d), *normed = space.take(most * d);
    float* active = space.take(most * h);
    float* middle = kept.middle + at;
    if (const float by = factor(0, block.image); by != 0) {
      product({kept.mixed + at, d, 1}, kernels.projection, block.rows, {w.projection_bias, 0},
              branch, d);
      add(in + at, branch, by, numbers, middle);
    } else {
      std::copy_n(in + at, numbers, middle);
    }
    float* wide = kept.wide + block.first * h;
    if (const float by = factor(1, block.image); by != 0) {
      layer_norm(middle, block.rows, d, w.mlp_gamma, w.mlp_beta, s.epsilon, normed);
      product({normed, d, 1}, kernels.fc1, block.rows, {w.fc1_bias, 0}, wide, h);
      along(block.rows * h, [&](int64_t c, int64_t count) {
        store(gelu(load(wide + c, count)), active + c, count);
      });
      product({active, h, 1}, kernels.fc2, block.rows, {w.fc2_bias, 0}, branch, d);
      add(middle, branch, by, numbers, out + at);
    } else {
      std::copy_n(middle, numbers, out + at);
      std::fill_n(wide, block.rows * h, 0.0f);
    }
  });
}

}  // namespace
}  // namespace outer
