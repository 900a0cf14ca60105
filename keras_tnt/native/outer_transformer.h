// The transformer among the patches, TNT's outer one and DeiT's block, as it is trained: forward and
// backward in products that keep to their part of the caches, with norms, GELU and residuals done
// while their rows are there. The forward pass keeps what it multiplied, five times the tokens and
// the MLP's hidden numbers; norms and the softmax are computed again.
//
// Work is cut into parts that do not depend on the number of threads, nor do the sums.
#pragma once
#include "product.h"
#include "weights.h"

namespace outer {
namespace {

// Calls part(data, i) for each i from 0 to before `parts`, on whatever threads there are.
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

// What the branches of attention, 0, and MLP, 1, of an image are multiplied by, (2, images); a branch
// of 0 is not computed. Null: all ones.
struct Factors {
  const float* at;
  int64_t images;

  float operator()(int branch, int64_t image) const {
    return at ? at[branch * images + image] : 1.0f;
  }
};

// What the forward pass keeps, for all rows: query, key and value, the attention's result, the
// tokens between attention and MLP, the MLP's hidden numbers before GELU.
template <typename Number>
struct Kept {
  Number *qkv, *mixed, *middle, *wide;

  Kept(Number* at, const Sizes& s)
      : qkv(at),
        mixed(qkv + s.rows() * 3 * s.dim),
        middle(mixed + s.rows() * s.dim),
        wide(middle + s.rows() * s.dim) {}
};

// Calls what(column, lanes or fewer) for the columns of a row.
template <typename What>
inline void along(int64_t n, What what) {
  int64_t c = 0;
  for (; c + lanes <= n; c += lanes) what(c, std::integral_constant<int64_t, lanes>());
  if (c < n) what(c, n - c);
}

// x, and `other` behind its first numbers.
template <typename Count>
inline Vec cut(Vec x, Count count, float other) {
  if (count == lanes) return x;
  for (int64_t i = count; i < lanes; ++i) x[i] = other;
  return x;
}

template <typename Combine>
inline float fold(Vec x, Combine combine) {
  float parts[lanes];
  std::memcpy(parts, &x, sizeof x);
  for (int half = lanes / 2; half; half /= 2)
    for (int i = 0; i < half; ++i) parts[i] = combine(parts[i], parts[i + half]);
  return parts[0];
}

inline float total(Vec x) {
  return fold(x, [](float a, float b) { return a + b; });
}

// A row's mean, and one over its deviation.
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

// Calls take(numbers, where they are among those of x, how many) with normalised rows.
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

// Rows of one image that are computed together.
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

// The softmax of the first n of scores times `scale`, in place; zeros behind, to the end of the row.
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

// Queries, keys and values of one head of one image.
struct Head {
  int64_t image, at;  // and where its first number is, in rows of query, key and value
  Matrix query, key, value;

  Head(const Sizes& s, const float* qkv, int64_t number)
      : image(number / s.heads), at(image * s.tokens * 3 * s.dim + number % s.heads * s.head_dim()) {
    query = {qkv + at, 3 * s.dim, 1};
    key = query.from(0, s.dim);
    value = key.from(0, s.dim);
  }

  // The same head in rows of tokens.
  int64_t in_tokens(const Sizes& s, int64_t number) const {
    return image * s.tokens * s.dim + number % s.heads * s.head_dim();
  }
};

// Rows of scores end with whole panels.
inline int64_t score_row(const Sizes& s) { return round_up(s.tokens, tile_columns); }

// scores (rows, score_row): the softmax of query key^T / sqrt(head_dim), zeros behind the tokens.
inline void attention(const Sizes& s, Matrix query, int64_t rows, Panels keys, const float* zeros,
                      float* scores) {
  const int64_t row = score_row(s);
  product(query, keys, rows, {zeros, 0}, scores, row);
  const float scale = 1.0 / std::sqrt(double(s.head_dim()));
  for (int64_t i = 0; i < rows; ++i) softmax(scores + i * row, s.tokens, row, scale);
}

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

// Kernels, packed to be multiplied with, and where they come from.
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

// tokens (images, tokens, dim) to `out` of the same shape, and to what `Kept` says. keep: of
// `Factors`.
inline void transform(const Sizes& s, Parallel parallel, const float* in, const Weights<>& w,
                      const float* keep, float* out, Kept<float> kept) {
  const int64_t d = s.dim, h = s.hidden, most = std::min(Block::most, s.tokens);
  const Factors factor = {keep, s.images};
  Space space;
  const Packed kernels(s, w, false, parallel, space);

  parallel(Block::count(s), [&](int64_t number) {
    const Block block(s, number);
    float* qkv = kept.qkv + block.first * 3 * d;
    if (factor(0, block.image) == 0) {  // what is kept is defined all the same
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
