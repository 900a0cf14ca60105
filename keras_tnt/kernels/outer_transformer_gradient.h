// Backward pass of the outer (patch) transformer block of TNT and DeiT in float32: in, dout and the
// saved activations, (images, tokens, ...), to din (images, tokens, dim) and the gradients of all
// weights. Layer norms and the softmax are recomputed.
//
// Cache-blocked GEMMs in four parallel phases: MLP and output projection (row blocks); attention
// (heads); QKV and the first layer norm (row blocks); the weight gradients x^T dy of the four dense
// layers (tiles of the kernels). Images whose branch drop path removed are skipped. The gradients
// of the norms accumulate per row block and are reduced in order; work partitioning and summation
// order do not depend on the number of threads, so that results are deterministic.
#pragma once
#include "outer_transformer.h"

namespace outer {
namespace {

// Layer norm backward on (rows, n): adds to dx the gradient with respect to x, given dy, that of
// the output. Accumulates into dgamma and dbeta, (n,), and recomputes the output `normed`, which
// the weight gradient of the next dense layer needs.
inline void layer_norm_gradient(const float* x, const float* dy, int64_t rows, int64_t n,
                                const float* gamma, const float* beta, float epsilon,
                                float* normed, float* dx, float* dgamma, float* dbeta) {
  for (int64_t i = 0; i < rows; ++i, x += n, dy += n, normed += n, dx += n) {
    const Moments at(x, n, epsilon);
    Vec sum = {}, products = {};
    along(n, [&](int64_t c, int64_t count) {
      const Vec hat = (load(x + c, count) - at.mean) * at.inverse, g = load(dy + c, count);
      const Vec scaled = g * load(gamma + c, count);
      store(hat * load(gamma + c, count) + load(beta + c, count), normed + c, count);
      store(load(dgamma + c, count) + g * hat, dgamma + c, count);
      store(load(dbeta + c, count) + g, dbeta + c, count);
      sum += scaled;
      products += scaled * hat;
    });
    const float mean = total(sum) / n, product = total(products) / n;
    along(n, [&](int64_t c, int64_t count) {
      const Vec hat = (load(x + c, count) - at.mean) * at.inverse;
      const Vec scaled = load(dy + c, count) * load(gamma + c, count);
      store(load(dx + c, count) + (scaled - mean - hat * product) * at.inverse, dx + c, count);
    });
  }
}

// Partial sums of dgamma and dbeta of a layer norm, (blocks, 2, n): each row block has its own, so
// that no atomics are needed and the reduction has a fixed order.
class NormSums {
 public:
  NormSums(int64_t blocks, int64_t n, Space& space)
      : blocks(blocks), n(n), at(space.zeros(blocks * 2 * n)) {}

  float* gamma(int64_t block) const { return at + block * 2 * n; }
  float* beta(int64_t block) const { return gamma(block) + n; }

  void add_up(float* dgamma, float* dbeta) const {
    std::fill_n(dgamma, n, 0.0f);
    std::fill_n(dbeta, n, 0.0f);
    for (int64_t block = 0; block < blocks; ++block) {
      add(dgamma, gamma(block), 1.0f, n, dgamma);
      add(dbeta, beta(block), 1.0f, n, dbeta);
    }
  }

 private:
  const int64_t blocks, n;
  float* const at;
};

// Attention backward of one head of one image: dqkv, given dmixed, the gradient with respect to the
// output of `attend`. For each row block of queries: recompute P, dP = dmixed V^T,
// dS = P * (dP - row sum of P * dP) * scale, dQ = dS K, dK += dS^T Q and dV += P^T dmixed.
inline void attend_gradient(const Sizes& s, const float* qkv, const float* dmixed, int64_t number,
                            float* dqkv) {
  const Head head(s, qkv, number);
  const int64_t d = s.head_dim(), t = s.tokens, row = score_row(s), most = std::min(Block::most, t);
  const int64_t wide = Panels::size(d, row), tall = Panels::size(t, d);
  const int64_t piece = Panels::size(most, d), tokens_row = 3 * s.dim;
  Space space;
  const Panels keys = {space.take(wide), d, row}, values = {space.take(wide), d, row};
  const Panels key_rows = {space.take(tall), t, d};
  float *of_queries = space.take(piece), *of_gradients = space.take(piece);
  float *weights = space.take(most * row), *dscores = space.take(most * row);
  const float* zeros = space.zeros(std::max(d, row));
  keys.pack(head.key.transposed(), t);
  values.pack(head.value.transposed(), t);
  key_rows.pack(head.key);
  float *dquery = dqkv + head.at, *dkey = dquery + s.dim, *dvalue = dkey + s.dim;
  const float by = 1.0 / std::sqrt(double(d));
  const Matrix all_gradients = {dmixed + head.in_tokens(s, number), s.dim, 1};
  for (int64_t first = 0; first < t; first += most) {
    const int64_t rows = std::min(most, t - first);
    const Matrix query = head.query.from(first, 0), gradient = all_gradients.from(first, 0);
    attention(s, query, rows, keys, zeros, weights);
    product(gradient, values, rows, {zeros, 0}, dscores, row);
    for (int64_t i = 0; i < rows; ++i) {
      float *weight = weights + i * row, *dscore = dscores + i * row;
      Vec sum = {};
      for (int64_t c = 0; c < row; c += lanes) sum += load(weight + c) * load(dscore + c);
      const float mean = total(sum);
      for (int64_t c = 0; c < row; c += lanes)
        store((load(dscore + c) - mean) * load(weight + c) * by, dscore + c);
    }
    const Panels queries = {of_queries, rows, d}, gradients = {of_gradients, rows, d};
    queries.pack(query);
    gradients.pack(gradient);
    const Start start = {zeros, 0};
    const Start start_key = first ? Start{dkey, tokens_row} : start;
    const Start start_value = first ? Start{dvalue, tokens_row} : start;
    product({dscores, row, 1}, key_rows, rows, start, dquery + first * tokens_row, tokens_row);
    product({dscores, 1, row}, queries, t, start_key, dkey, tokens_row);
    product({weights, 1, row}, gradients, t, start_value, dvalue, tokens_row);
  }
}

// Weight gradient of a dense layer: kernel (inputs, outputs) = x^T dy and bias (outputs,) = column
// sums of dy, for x (rows, inputs) and dy (rows, outputs). The kernel is split into tiles, the
// parallel tasks; each sums over all rows of the batch in K-blocks of `at_once`.
struct DenseGradient {
  const float *x, *dy;
  int64_t inputs, outputs;
  int branch;  // 0 or 1: images that drop path skips in this branch do not contribute
  float *kernel, *bias;
  int64_t most_inputs = 28 * tile_rows;  // height of a tile

  static constexpr int64_t most_outputs = 12 * tile_columns;  // width of a tile
  static constexpr int64_t at_once = depth / 2;  // K-block: rows of dy that are packed at a time

  int64_t parts_down() const { return parts_of(inputs, most_inputs); }
  int64_t parts_across() const { return parts_of(outputs, most_outputs); }
  int64_t parts() const { return parts_down() * parts_across(); }

  // Computes tile `number` of the kernel gradient; the topmost tile of a column also computes its
  // bias gradient, from the packed panels.
  void compute(const Sizes& s, const Factors& factor, int64_t number) const {
    const int64_t across = number / parts_down(), down = number % parts_down();
    const int64_t i = down * most_inputs, j = across * most_outputs, t = s.tokens;
    const int64_t rows = std::min(most_inputs, inputs - i);
    const int64_t columns = std::min(most_outputs, outputs - j);
    Space space;
    float* panels = space.take(Panels::size(at_once, columns));
    for (int64_t r = 0; r < rows; ++r) std::fill_n(kernel + (i + r) * outputs + j, columns, 0.0f);
    if (down == 0) std::fill_n(bias + j, columns, 0.0f);
    for (int64_t image = 0, end; image < s.images; image = end + 1) {
      for (end = image; end < s.images && factor(branch, end) != 0;) ++end;
      for (int64_t first = image * t; first < end * t; first += at_once) {
        const Panels right = {panels, std::min(at_once, end * t - first), columns};
        const float* from = dy + first * outputs + j;
        float* to = kernel + i * outputs + j;
        right.pack({from, outputs, 1});
        product({x + first * inputs + i, 1, inputs}, right, rows, {to, outputs}, to, outputs);
        if (down) continue;
        along(columns, [&](int64_t c, int64_t count) {
          Vec sum = load(bias + j + c, count);
          for (int64_t r = 0; r < right.k; ++r) sum += load(right.number(r, c));
          store(sum, bias + j + c, count);
        });
      }
    }
  }
};

// Backward pass of the block: writes din and the gradients of the weights `sums`, given dout. keep:
// the drop-path multipliers that `transform` was given; kept: what it saved.
inline void transform_gradient(const Sizes& s, Parallel parallel, const float* in,
                               const float* dout, const Weights<>& w, const float* keep,
                               Kept<const float> kept, float* din,
                               const Weights<float>& sums) {
  const int64_t d = s.dim, h = s.hidden, n = s.rows(), blocks = Block::count(s);
  const int64_t most = std::min(Block::most, s.tokens);
  const Factors factor = {keep, s.images};
  Space space;
  const Packed kernels(s, w, true, parallel, space);
  float *normed_attention = space.take(n * d), *normed_mlp = space.take(n * d);
  float *active = space.take(n * h), *dwide = space.take(n * h);
  float *dmlp = space.take(n * d), *dattention = space.take(n * d);  // of the branches' outputs
  float *dmixed = space.take(n * d), *dqkv = space.take(n * 3 * d);
  float* dmiddle = space.take(n * d);
  const NormSums of_attention(blocks, d, space), of_mlp(blocks, d, space);
  const float* zeros = space.zeros(std::max(d, h));

  parallel(blocks, [&](int64_t number) {
    const Block block(s, number);
    const int64_t at = block.first * d, numbers = block.rows * d, hidden_at = block.first * h;
    Space own;
    float* dnormed = own.take(most * d);
    std::copy_n(dout + at, numbers, dmiddle + at);
    if (const float by = factor(1, block.image); by != 0) {
      scale(dout + at, by, numbers, dmlp + at);
      product({dmlp + at, d, 1}, kernels.fc2, block.rows, {zeros, 0}, dwide + hidden_at, h);
      along(block.rows * h, [&](int64_t c, int64_t count) {
        Vec value = load(kept.wide + hidden_at + c, count);
        const Vec slope = gelu_gradient(value);
        store(value, active + hidden_at + c, count);
        store(load(dwide + hidden_at + c, count) * slope, dwide + hidden_at + c, count);
      });
      product({dwide + hidden_at, h, 1}, kernels.fc1, block.rows, {zeros, 0}, dnormed, d);
      layer_norm_gradient(kept.middle + at, dnormed, block.rows, d, w.mlp_gamma, w.mlp_beta,
                          s.epsilon, normed_mlp + at, dmiddle + at, of_mlp.gamma(number),
                          of_mlp.beta(number));
    }
    if (const float by = factor(0, block.image); by != 0) {
      scale(dmiddle + at, by, numbers, dattention + at);
      product({dattention + at, d, 1}, kernels.projection, block.rows, {zeros, 0}, dmixed + at, d);
    }
  });

  parallel(s.images * s.heads, [&](int64_t number) {
    if (factor(0, number / s.heads) != 0) attend_gradient(s, kept.qkv, dmixed, number, dqkv);
  });

  parallel(blocks, [&](int64_t number) {
    const Block block(s, number);
    const int64_t at = block.first * d, numbers = block.rows * d;
    std::copy_n(dmiddle + at, numbers, din + at);
    if (factor(0, block.image) == 0) return;
    Space own;
    float* dnormed = own.take(most * d);
    product({dqkv + block.first * 3 * d, 3 * d, 1}, kernels.qkv, block.rows, {zeros, 0}, dnormed,
            d);
    layer_norm_gradient(in + at, dnormed, block.rows, d, w.attention_gamma, w.attention_beta,
                        s.epsilon, normed_attention + at, din + at, of_attention.gamma(number),
                        of_attention.beta(number));
  });

  of_attention.add_up(sums.attention_gamma, sums.attention_beta);
  of_mlp.add_up(sums.mlp_gamma, sums.mlp_beta);

  const DenseGradient layers[] = {
      {active, dmlp, h, d, 1, sums.fc2_kernel, sums.fc2_bias},
      {normed_mlp, dwide, d, h, 1, sums.fc1_kernel, sums.fc1_bias},
      {normed_attention, dqkv, d, 3 * d, 0, sums.qkv_kernel, sums.qkv_bias},
      {kept.mixed, dattention, d, d, 0, sums.projection_kernel, sums.projection_bias},
  };
  int64_t parts = 0;
  for (const DenseGradient& layer : layers) parts += layer.parts();
  parallel(parts, [&](int64_t number) {
    const DenseGradient* layer = layers;
    while (number >= layer->parts()) number -= layer++->parts();
    layer->compute(s, factor, number);
  });
}

}  // namespace
}  // namespace outer
