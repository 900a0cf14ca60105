// Backward pass of TNT's inner (word) transformer block in float32, fully fused like the forward
// pass: in and dout (patches, words, dim) to din (patches, words, dim) and the gradients of all
// weights. The forward pass saves nothing but its input; each patch recomputes its activations
// (rematerialization), on the stack and in the L1 cache.
//
// Weight gradients accumulate in rows of `sums_size` floats, one row per task, and `add_up` reduces
// the rows in order, so that results are deterministic for a given number of rows.
//
// Include inner_transformer.h first: the compile-time constants and the channel-major layout, with
// the words of a patch in the SIMD lanes, are the same.
#include "space.h"

namespace {

// Number of elements of each weight, in the order of `Weights`.
constexpr int64_t weight_sizes[weight_count] = {
    dim * words, dim * words, dim * 3 * dim, 3 * dim, dim * dim,    dim,
    dim * words, dim * words, dim * hidden,  hidden,  hidden * dim, dim,
};

// Offset of the gradient of weight `i` in a row of gradients, aligned to a cache line.
constexpr int64_t sum_at(int i) {
  return i == 0 ? 0 : sum_at(i - 1) + round_up(weight_sizes[i - 1], Space::aligned);
}
constexpr int64_t sums_size = sum_at(weight_count);

// Returns pointers to the gradients in a row of `sums_size` floats.
inline Weights<float> sums_in(float* row) {
  float* pointers[weight_count];
  for (int i = 0; i < weight_count; ++i) pointers[i] = row + sum_at(i);
  return as_weights(pointers);
}

// Reduces `count` rows of partial gradients (count, sums_size) to the gradients of the weights.
void add_up(const float* rows, int64_t count, float* const* gradients) {
  for (int i = 0; i < weight_count; ++i) {
    std::copy_n(rows + sum_at(i), weight_sizes[i], gradients[i]);
    for (int64_t row = 1; row < count; ++row)
      for (int64_t j = 0; j < weight_sizes[i]; ++j)
        gradients[i][j] += rows[row * sums_size + sum_at(i) + j];
  }
}

// Transposed kernels (outputs, inputs), so that dx = dy kernel^T is a call of `dense` with a bias
// of zeros.
struct Transposed {
  float qkv[3 * dim * dim], projection[dim * dim], fc1[hidden * dim], fc2[dim * hidden];
  float zeros[hidden > 3 * dim ? hidden : 3 * dim] = {};

  explicit Transposed(const Weights<>& weights) {
    transpose(weights.qkv_kernel, 3 * dim, dim, 3 * dim, qkv, dim);
    transpose(weights.projection_kernel, dim, dim, dim, projection, dim);
    transpose(weights.fc1_kernel, hidden, dim, hidden, fc1, dim);
    transpose(weights.fc2_kernel, dim, hidden, dim, fc2, hidden);
  }
};

// kernel (inputs, outputs) += x dy^T and bias (outputs,) += row sums of dy, for x (inputs, words)
// and dy (outputs, words): the weight gradient of a dense layer. Outputs fill the lanes; register
// blocking over inputs.
template <int inputs, int outputs>
inline void dense_gradient(const Channel* x, const Channel* dy, float* kernel, float* bias) {
  // The last vector of a row ends with it, and may overlap the one before instead of being masked.
  constexpr int width = std::min(outputs, lanes), vectors = (outputs + lanes - 1) / lanes;
  constexpr int block = divisor(inputs, 12 / vectors);
  const auto at = [](int j) { return std::min(j * lanes, outputs - width); };
  float rows[words][outputs];
  write(dy, outputs, rows[0]);
  for (int w = 0; w < words; ++w)
    for (int j = 0; j < outputs; ++j) bias[j] += rows[w][j];
  for (int i = 0; i < inputs; i += block) {
    Vec sum[block * vectors];
#pragma GCC unroll 64
    for (int j = 0; j < block * vectors; ++j)
      sum[j] = load(kernel + (i + j / vectors) * outputs + at(j % vectors), width);
    for (int w = 0; w < words; ++w) {
#pragma GCC unroll 64
      for (int j = 0; j < block * vectors; ++j)
        sum[j] += x[i + j / vectors].word(w) * load(rows[w] + at(j % vectors), width);
    }
#pragma GCC unroll 64
    for (int j = 0; j < block * vectors; ++j)
      store(sum[j], kernel + (i + j / vectors) * outputs + at(j % vectors), width);
  }
}

// Saved statistics of a layer norm: hat = (x - mean) / std, (dim, words), and inverse = 1 / std.
struct Normed {
  Channel hat[dim];
  Vec inverse[parts];

  Normed(const Channel* x, float epsilon) {
    center(x, epsilon, hat, inverse);
    for (int c = 0; c < dim; ++c)
      for (int p = 0; p < parts; ++p) hat[c].part[p] *= inverse[p];
  }

  // y = hat * gamma + beta
  void output(const float* gamma, const float* beta, Channel* y) const {
    for (int c = 0; c < dim; ++c)
      for (int p = 0; p < parts; ++p) {
        const int at = c * words + p * lanes;
        y[c].part[p] = hat[c].part[p] * load(gamma + at) + load(beta + at);
      }
  }

  // Layer norm backward: adds to dx the gradient with respect to the input, given dy, that of the
  // output, which is overwritten. Accumulates into dgamma and dbeta, (dim, words).
  void gradient(Channel* dy, const float* gamma, float* dgamma, float* dbeta, Channel* dx) const {
    Vec mean[parts] = {}, product[parts] = {};
    for (int c = 0; c < dim; ++c)
      for (int p = 0; p < parts; ++p) {
        const int at = c * words + p * lanes;
        const Vec g = dy[c].part[p], h = hat[c].part[p];
        store(load(dgamma + at) + g * h, dgamma + at);
        store(load(dbeta + at) + g, dbeta + at);
        dy[c].part[p] = g * load(gamma + at);
        mean[p] += dy[c].part[p];
        product[p] += dy[c].part[p] * h;
      }
    average(mean);
    average(product);
    for (int c = 0; c < dim; ++c)
      for (int p = 0; p < parts; ++p)
        dx[c].part[p] += (dy[c].part[p] - mean[p] - hat[c].part[p] * product[p]) * inverse[p];
  }
};

// Attention backward: dqkv (3 dim, words), given dy (dim, words), the gradient with respect to the
// output of `attend`. Recomputes the softmax P; dS = P * (dP - sum over keys of P * dP) * scale.
// dQ is computed with queries in the lanes; then P and dS are transposed, so that dK and dV are
// computed with keys in the lanes.
inline void attend_gradient(const Channel* qkv, const Channel* dy, Channel* dqkv) {
  const float scale = 1.0 / std::sqrt(double(head_dim));
  for (int head = 0; head < heads; ++head) {
    const int at = head * head_dim;
    const Channel *query = qkv + at, *key = query + dim, *value = key + dim;
    Channel *dquery = dqkv + at, *dkey = dquery + dim, *dvalue = dkey + dim;
    Channel weight[words], dscore[words];  // P and dS: (keys, queries), queries in the lanes
    for (int p = 0; p < parts; ++p) {
      Vec most = all(-INFINITY), total = {}, mean = {};
      for (int k = 0; k < words; ++k) {
        Vec s = {}, d = {};
        for (int c = 0; c < head_dim; ++c) {
          s += query[c].part[p] * key[c].word(k);
          d += dy[at + c].part[p] * value[c].word(k);
        }
        weight[k].part[p] = s * scale;
        dscore[k].part[p] = d;
        most = larger(most, weight[k].part[p]);
      }
      for (int k = 0; k < words; ++k) {
        weight[k].part[p] = exp(weight[k].part[p] - most);
        total += weight[k].part[p];
      }
      for (int k = 0; k < words; ++k) {
        weight[k].part[p] /= total;
        mean += weight[k].part[p] * dscore[k].part[p];
      }
      Vec sum[head_dim] = {};
      for (int k = 0; k < words; ++k) {
        dscore[k].part[p] = (dscore[k].part[p] - mean) * weight[k].part[p] * scale;
        for (int c = 0; c < head_dim; ++c) sum[c] += dscore[k].part[p] * key[c].word(k);
      }
      for (int c = 0; c < head_dim; ++c) dquery[c].part[p] = sum[c];
    }
    Channel weight_of[words], dscore_of[words];  // (queries, keys), keys in the lanes
    write(weight, words, reinterpret_cast<float*>(weight_of));
    write(dscore, words, reinterpret_cast<float*>(dscore_of));
    for (int p = 0; p < parts; ++p) {
      Vec keys[head_dim] = {}, values[head_dim] = {};
      for (int q = 0; q < words; ++q)
        for (int c = 0; c < head_dim; ++c) {
          keys[c] += dscore_of[q].part[p] * query[c].word(q);
          values[c] += weight_of[q].part[p] * dy[at + c].word(q);
        }
      for (int c = 0; c < head_dim; ++c) {
        dkey[c].part[p] = keys[c];
        dvalue[c].part[p] = values[c];
      }
    }
  }
}

// Backward pass for patches [first, last): writes din, given dout, and accumulates the gradients of
// the weights into `sums`. in, dout and din are (patches, words, dim). keep: drop-path multipliers
// (2, patches) of the attention and MLP branches; a branch with 0 is skipped; null: all ones.
void transform_gradient(const float* in, const float* dout, float* din, const Weights<>& weights,
                        const Transposed& back, const Weights<float>& sums, const float* keep,
                        int64_t patches, float epsilon, int64_t first, int64_t last) {
  for (int64_t patch = first; patch < last; ++patch) {
    const float keep_attention = keep ? keep[patch] : 1.0f;
    const float keep_mlp = keep ? keep[patches + patch] : 1.0f;
    Channel x[dim], dx[dim], branch[dim], dbranch[dim];
    Channel normed[dim], qkv[3 * dim], mixed[dim], dqkv[3 * dim];
    read(in + patch * words * dim, x);
    read(dout + patch * words * dim, dx);
    const Normed norm_attention(x, epsilon);
    if (keep_attention != 0) {
      norm_attention.output(weights.attention_gamma, weights.attention_beta, normed);
      dense<dim, 3 * dim>(normed, weights.qkv_kernel, weights.qkv_bias, qkv);
      attend(qkv, mixed);
      dense<dim, dim>(mixed, weights.projection_kernel, weights.projection_bias, branch);
      scale(keep_attention, branch);
      add(branch, x);
    }
    if (keep_mlp != 0) {
      const Normed norm_mlp(x, epsilon);
      Channel into[dim], wide[hidden], dwide[hidden];
      norm_mlp.output(weights.mlp_gamma, weights.mlp_beta, into);
      dense<dim, hidden>(into, weights.fc1_kernel, weights.fc1_bias, wide);
      std::memcpy(dbranch, dx, sizeof dx);
      scale(keep_mlp, dbranch);
      dense<dim, hidden>(dbranch, back.fc2, back.zeros, dwide);
      for (int h = 0; h < hidden; ++h)
        for (int p = 0; p < parts; ++p) dwide[h].part[p] *= gelu_gradient(wide[h].part[p]);
      dense_gradient<hidden, dim>(wide, dbranch, sums.fc2_kernel, sums.fc2_bias);
      dense_gradient<dim, hidden>(into, dwide, sums.fc1_kernel, sums.fc1_bias);
      dense<hidden, dim>(dwide, back.fc1, back.zeros, dbranch);
      norm_mlp.gradient(dbranch, weights.mlp_gamma, sums.mlp_gamma, sums.mlp_beta, dx);
    }
    if (keep_attention != 0) {
      std::memcpy(dbranch, dx, sizeof dx);
      scale(keep_attention, dbranch);
      dense_gradient<dim, dim>(mixed, dbranch, sums.projection_kernel, sums.projection_bias);
      dense<dim, dim>(dbranch, back.projection, back.zeros, branch);
      attend_gradient(qkv, branch, dqkv);
      dense_gradient<dim, 3 * dim>(normed, dqkv, sums.qkv_kernel, sums.qkv_bias);
      dense<3 * dim, dim>(dqkv, back.qkv, back.zeros, dbranch);
      norm_attention.gradient(dbranch, weights.attention_gamma, sums.attention_gamma,
                              sums.attention_beta, dx);
    }
    write(dx, dim, din + patch * words * dim);
  }
}

}  // namespace
