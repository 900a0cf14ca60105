// Forward pass of TNT's inner (word) transformer block in float32, fully fused:
//
//   words (patches, words, dim) -> (patches, words, dim): x += MHSA(LN(x)); x += MLP(LN(x))
//
// All layers of a patch run before the next patch, so that its activations stay on the stack, in
// the L1 cache. The layout is channel-major: a patch is transposed to (dim, words), so that its
// words fill the SIMD lanes and a channel of all words is one or a few vectors. Dense layers then
// broadcast kernel elements, and the softmax needs no horizontal reduction, nor do the norms,
// except where they include all words. Drop path skips whole branches.
//
// Compile-time constants, set by -D: WORDS (a multiple of the lanes), DIM, HEADS, HIDDEN (MLP) and
// ACROSS_WORDS, 1 if the layer norms normalize over all words and channels of a patch, 0 if over
// the channels of each word.
#pragma once
#include "vectors.h"
#include "weights.h"

namespace {

constexpr int words = WORDS, dim = DIM, heads = HEADS, hidden = HIDDEN;
constexpr bool across_words = ACROSS_WORDS;
constexpr int head_dim = dim / heads, parts = words / lanes;

// One channel of all words of a patch: a vector of `words` floats.
struct Channel {
  Vec part[parts];
  float word(int i) const { return reinterpret_cast<const float*>(this)[i]; }
};

// The largest divisor of `outputs` that is at most `most`.
constexpr int divisor(int outputs, int most) {
  return most <= 1 ? 1 : outputs % most == 0 ? most : divisor(outputs, most - 1);
}

// y (outputs, words) = kernel^T x + bias, for x (inputs, words) and a row-major kernel (inputs,
// outputs). Register blocking: up to 12 accumulators, for `block` outputs and all words; kernel
// elements are broadcast.
template <int inputs, int outputs>
inline void dense(const Channel* x, const float* kernel, const float* bias, Channel* y) {
  constexpr int block = divisor(outputs, 12 / parts);
  for (int first = 0; first < outputs; first += block) {
    Vec sum[block * parts];
#pragma GCC unroll 64
    for (int j = 0; j < block * parts; ++j) sum[j] = all(bias[first + j / parts]);
    for (int i = 0; i < inputs; ++i) {
      const float* row = kernel + i * outputs + first;
#pragma GCC unroll 64
      for (int j = 0; j < block * parts; ++j) sum[j] += row[j / parts] * x[i].part[j % parts];
    }
#pragma GCC unroll 64
    for (int j = 0; j < block * parts; ++j) y[first + j / parts].part[j % parts] = sum[j];
  }
}

// Turns sums over channels into the means of the layer norm, over channels or channels and words.
inline void average(Vec* sum) {
  if (across_words) {
    float total = 0.0f;
    for (int p = 0; p < parts; ++p)
      for (int i = 0; i < lanes; ++i) total += sum[p][i];
    for (int p = 0; p < parts; ++p) sum[p] = all(total / (dim * words));
  } else {
    for (int p = 0; p < parts; ++p) sum[p] *= 1.0f / dim;
  }
}

// First half of a layer norm, in two passes: y = x - mean, inverse = 1 / sqrt(variance + epsilon).
inline void center(const Channel* x, float epsilon, Channel* y, Vec* inverse) {
  Vec mean[parts] = {}, variance[parts] = {};
  for (int c = 0; c < dim; ++c)
    for (int p = 0; p < parts; ++p) mean[p] += x[c].part[p];
  average(mean);
  for (int c = 0; c < dim; ++c)
    for (int p = 0; p < parts; ++p) {
      y[c].part[p] = x[c].part[p] - mean[p];
      variance[p] += y[c].part[p] * y[c].part[p];
    }
  average(variance);
  for (int p = 0; p < parts; ++p)
    for (int i = 0; i < lanes; ++i) inverse[p][i] = 1.0f / std::sqrt(variance[p][i] + epsilon);
}

// y = LN(x), for x and y (dim, words); gamma and beta are (dim, words), too.
inline void layer_norm(const Channel* x, const float* gamma, const float* beta, float epsilon,
                       Channel* y) {
  Vec inverse[parts];
  center(x, epsilon, y, inverse);
  for (int c = 0; c < dim; ++c)
    for (int p = 0; p < parts; ++p) {
      const int64_t at = c * words + p * lanes;
      y[c].part[p] = y[c].part[p] * inverse[p] * load(gamma + at) + load(beta + at);
    }
}

// Multi-head self-attention: qkv (3 dim, words) to y (dim, words). Queries fill the lanes, and keys
// are broadcast one by one, so that the softmax over keys needs no horizontal reduction. Two-pass
// softmax: the first pass stores the scores of all keys and finds their maximum, the second
// exponentiates and accumulates P V. The division by the sum comes last (deferred normalization).
inline void attend(const Channel* qkv, Channel* y) {
  const float scale = 1.0 / std::sqrt(double(head_dim));
  for (int head = 0; head < heads; ++head) {
    const Channel* query = qkv + head * head_dim;
    const Channel* key = query + dim;
    const Channel* value = key + dim;
    for (int p = 0; p < parts; ++p) {
      Vec score[words], most = all(-INFINITY), total = {}, mixed[head_dim] = {};
      for (int k = 0; k < words; ++k) {
        Vec s = {};
        for (int d = 0; d < head_dim; ++d) s += query[d].part[p] * key[d].word(k);
        score[k] = s * scale;
        most = larger(most, score[k]);
      }
      for (int k = 0; k < words; ++k) {
        const Vec weight = exp(score[k] - most);
        total += weight;
        for (int d = 0; d < head_dim; ++d) mixed[d] += weight * value[d].word(k);
      }
      for (int d = 0; d < head_dim; ++d) y[head * head_dim + d].part[p] = mixed[d] / total;
    }
  }
}

// Residual: x += branch, (dim, words).
inline void add(const Channel* branch, Channel* x) {
  for (int c = 0; c < dim; ++c)
    for (int p = 0; p < parts; ++p) x[c].part[p] += branch[c].part[p];
}

// Transposes (words, dim) to channels, (dim, words).
inline void read(const float* from, Channel* x) {
  transpose(from, dim, words, dim, reinterpret_cast<float*>(x), words);
}

// Transposes `count` channels to `to`, (words, count).
inline void write(const Channel* x, int count, float* to) {
  transpose(reinterpret_cast<const float*>(x), words, count, words, to, count);
}

inline void scale(float factor, Channel* x) {
  for (int c = 0; c < dim; ++c)
    for (int p = 0; p < parts; ++p) x[c].part[p] *= factor;
}

// Computes patches [first, last); in and out are (patches, words, dim). keep: drop-path multipliers
// (2, patches) of the attention and MLP branches, which are skipped where it is 0; null: all ones.
void transform(const float* in, float* out, const Weights<>& weights, float epsilon, int64_t first,
               int64_t last, const float* keep = nullptr, int64_t patches = 0) {
  for (int64_t patch = first; patch < last; ++patch) {
    Channel x[dim], normed[dim], qkv[3 * dim], mixed[dim], wide[hidden];
    read(in + patch * words * dim, x);
    if (!keep || keep[patch] != 0) {
      layer_norm(x, weights.attention_gamma, weights.attention_beta, epsilon, normed);
      dense<dim, 3 * dim>(normed, weights.qkv_kernel, weights.qkv_bias, qkv);
      attend(qkv, mixed);
      dense<dim, dim>(mixed, weights.projection_kernel, weights.projection_bias, normed);
      if (keep) scale(keep[patch], normed);
      add(normed, x);
    }
    if (!keep || keep[patches + patch] != 0) {
      layer_norm(x, weights.mlp_gamma, weights.mlp_beta, epsilon, normed);
      dense<dim, hidden>(normed, weights.fc1_kernel, weights.fc1_bias, wide);
      for (Channel& channel : wide)
        for (Vec& part : channel.part) part = gelu(part);
      dense<hidden, dim>(wide, weights.fc2_kernel, weights.fc2_bias, normed);
      if (keep) scale(keep[patches + patch], normed);
      add(normed, x);
    }
    write(x, dim, out + patch * words * dim);
  }
}

}  // namespace
