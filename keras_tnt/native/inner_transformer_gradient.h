// The gradient of the inner transformer, patch by patch in the first caches. Nothing of the forward
// pass is kept but its input: what is needed of it is computed again.
//
// Defined before this text: inner_transformer.h.
#include "space.h"

namespace {

// How many numbers each weight has, in the order of `Weights`.
constexpr int64_t weight_sizes[weight_count] = {
    dim * words, dim * words, dim * 3 * dim, 3 * dim, dim * dim,    dim,
    dim * words, dim * words, dim * hidden,  hidden,  hidden * dim, dim,
};

// Where the gradient of weight `i` begins among those of all, which stand one behind another, each
// from a whole line of memory on.
constexpr int64_t sum_at(int i) {
  return i == 0 ? 0 : sum_at(i - 1) + round_up(weight_sizes[i - 1], Space::aligned);
}
constexpr int64_t sums_size = sum_at(weight_count);

inline Weights<float> sums_in(float* row) {
  float* pointers[weight_count];
  for (int i = 0; i < weight_count; ++i) pointers[i] = row + sum_at(i);
  return as_weights(pointers);
}

// The gradients of the weights from rows of sums.
void add_up(const float* rows, int64_t count, float* const* gradients) {
  for (int i = 0; i < weight_count; ++i) {
    std::copy_n(rows + sum_at(i), weight_sizes[i], gradients[i]);
    for (int64_t row = 1; row < count; ++row)
      for (int64_t j = 0; j < weight_sizes[i]; ++j)
        gradients[i][j] += rows[row * sums_size + sum_at(i) + j];
  }
}

// Kernels as (outputs, inputs), by which gradients go back.
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

// kernel += x^T dy and bias += the sum of dy, over the words.
template <int inputs, int outputs>
inline void dense_gradient(const Channel* x, const Channel* dy, float* kernel, float* bias) {
  // The last vector of a row ends with it, and may share outputs with the one before.
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

// A norm's input centred and divided by its deviation, and one over the deviation.
struct Normed {
  Channel hat[dim];
  Vec inverse[parts];

  Normed(const Channel* x, float epsilon) {
    center(x, epsilon, hat, inverse);
    for (int c = 0; c < dim; ++c)
      for (int p = 0; p < parts; ++p) hat[c].part[p] *= inverse[p];
  }

  void output(const float* gamma, const float* beta, Channel* y) const {
    for (int c = 0; c < dim; ++c)
      for (int p = 0; p < parts; ++p) {
        const int at = c * words + p * lanes;
        y[c].part[p] = hat[c].part[p] * load(gamma + at) + load(beta + at);
      }
  }

  // dx += the gradient by the norm's input, for dy by its output, which is overwritten.
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

// dqkv for dy, the gradient by the result of `attend`.
inline void attend_gradient(const Channel* qkv, const Channel* dy, Channel* dqkv) {
  const float scale = 1.0 / std::sqrt(double(head_dim));
  for (int head = 0; head < heads; ++head) {
    const int at = head * head_dim;
    const Channel *query = qkv + at, *key = query + dim, *value = key + dim;
    Channel *dquery = dqkv + at, *dkey = dquery + dim, *dvalue = dkey + dim;
    Channel weight[words], dscore[words];  // of each key, queries along the lanes
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
    Channel weight_of[words], dscore_of[words];  // of each query, keys along the lanes
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

// For the patches from `first` to before `last`: din, the gradient by `in` for dout by the result,
// and the weights' gradients, added to what stands there. keep: (2, patches), by what the branches
// of attention and MLP were multiplied; a branch of 0 is not computed; null: all ones.
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
