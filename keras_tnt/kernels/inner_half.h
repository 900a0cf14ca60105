// Forward pass of TNT's inner (word) transformer block with bfloat16 multiplications and float32
// accumulation, norms, softmax, GELU and residuals; inference only, for AVX512-BF16.
//
//   words (patches, words, dim) -> (patches, words, dim): x += MHSA(LN(x)); x += MLP(LN(x))
//
// The layout is channel-major: the words of a patch fill the SIMD lanes, and a channel of all words
// is one or a few vectors. All layers of a patch run before the next patch, so that its activations
// stay in the L1 cache. For VDPBF16PS, two adjacent channels form a pair (the K dimension of the
// dense layers and of Q K^T), or two adjacent words (the K dimension of P V). The head dimension
// and the hidden dimension of the MLP must be even. The compile-time constants are those of
// inner_transformer.h.
#pragma once
#include "half.h"
#include "inner_transformer.h"

namespace half {
namespace {

// A pair of adjacent channels in bfloat16, of all words of a patch.
struct Channels {
  Vec part[parts];
  Pair word(int i) const { return reinterpret_cast<const Pair*>(this)[i]; }
};

// Rounds `count` channels to count / 2 pairs.
template <int count>
inline void round(const Channel* x, Channels* y) {
  for (int c = 0; c < count / 2; ++c)
    for (int p = 0; p < parts; ++p) y[c].part[p] = pairs(x[2 * c].part[p], x[2 * c + 1].part[p]);
}

// A dense kernel, float32 (inputs, outputs), rounded to (inputs / 2, outputs) bfloat16 pairs.
template <int inputs, int outputs>
struct Kernel {
  Pair at[inputs / 2][outputs];

  explicit Kernel(const float* from) {
    for (int i = 0; i < inputs / 2; ++i, from += 2 * outputs)
      for (int j = 0; j < outputs; j += lanes) {
        const int count = std::min(lanes, outputs - j);
        store(pairs_of(from + j, from + outputs + j, count), reinterpret_cast<float*>(at[i] + j),
              count);
      }
  }
};

// y = x kernel + bias. Register blocking: up to 24 accumulators, for a block of outputs and all
// words; kernel pairs are broadcast.
template <int inputs, int outputs>
inline void dense(const Channels* x, const Kernel<inputs, outputs>& kernel, const float* bias,
                  Channel* y) {
  constexpr int block = divisor(outputs, 24 / parts);
  for (int first = 0; first < outputs; first += block) {
    Vec sum[block * parts];
#pragma GCC unroll 64
    for (int j = 0; j < block * parts; ++j) sum[j] = all(bias[first + j / parts]);
    for (int i = 0; i < inputs / 2; ++i) {
      const Pair* row = kernel.at[i] + first;
#pragma GCC unroll 64
      for (int j = 0; j < block * parts; ++j)
        sum[j] = dot(sum[j], row[j / parts], x[i].part[j % parts]);
    }
#pragma GCC unroll 64
    for (int j = 0; j < block * parts; ++j) y[first + j / parts].part[j % parts] = sum[j];
  }
}

// Multi-head self-attention: qkv (3 dim, words) to y (dim, words), channel-major. Queries fill the
// lanes, so that the softmax over keys needs no horizontal reduction. Two-pass softmax: the first
// pass stores the scores of all keys and finds their maximum, the second exponentiates (base 2,
// with log2(e) folded into the scale) and accumulates P V, two keys at a time. The division by the
// sum comes last (deferred normalization).
inline void attend(const Channel* qkv, Channel* y) {
  const float scale = 1.44269504 / std::sqrt(double(head_dim));
  Channels query[dim / 2], key[dim / 2];
  round<dim>(qkv, query);
  round<dim>(qkv + dim, key);
  Half value[dim][words];
  for (int c = 0; c < dim; ++c)
    for (int p = 0; p < parts; ++p)
      store_half(qkv[2 * dim + c].part[p], value[c] + p * lanes, std::integral_constant<int, lanes>());
  constexpr int step = head_dim / 2;
  for (int head = 0; head < heads; ++head)
    for (int p = 0; p < parts; ++p) {
      Vec score[words], most = all(-INFINITY), total = {}, mixed[head_dim] = {};
#pragma GCC unroll 4
      for (int k = 0; k < words; ++k) {
        Vec s = {};
        for (int d = head * step; d < (head + 1) * step; ++d)
          s = dot(s, key[d].word(k), query[d].part[p]);
        score[k] = s * scale;
        most = larger(most, score[k]);
      }
      for (int k = 0; k < words; k += 2) {
        const Vec one = exp2_half(score[k] - most), two = exp2_half(score[k + 1] - most);
        total += one + two;
        const Vec weight = pairs(one, two);
        for (int d = 0; d < head_dim; ++d) {
          Pair both;
          std::memcpy(&both, value[head * head_dim + d] + k, sizeof both);
          mixed[d] = dot(mixed[d], both, weight);
        }
      }
      const Vec inverse = 1.0f / total;
      for (int d = 0; d < head_dim; ++d) y[head * head_dim + d].part[p] = mixed[d] * inverse;
    }
}

// Rounds the kernels once, and computes patches [first, last) of `in` to `out`. The arguments for
// drop path are ignored: both branches are computed.
class Forward {
 public:
  Forward(const Weights<>& weights, float epsilon)
      : w(weights),
        qkv(w.qkv_kernel),
        projection(w.projection_kernel),
        fc1(w.fc1_kernel),
        fc2(w.fc2_kernel),
        epsilon(epsilon) {}

  void operator()(const float* in, float* out, int64_t first, int64_t last,
                  const float* = nullptr, int64_t = 0) const {
    for (int64_t patch = first; patch < last; ++patch) {
      Channel x[dim], normed[dim], wide[std::max(3 * dim, hidden)];
      Channels narrow[dim / 2], active[hidden / 2];
      read(in + patch * words * dim, x);
      layer_norm(x, w.attention_gamma, w.attention_beta, epsilon, normed);
      round<dim>(normed, narrow);
      dense(narrow, qkv, w.qkv_bias, wide);
      half::attend(wide, normed);
      round<dim>(normed, narrow);
      dense(narrow, projection, w.projection_bias, normed);
      add(normed, x);
      layer_norm(x, w.mlp_gamma, w.mlp_beta, epsilon, normed);
      round<dim>(normed, narrow);
      dense(narrow, fc1, w.fc1_bias, wide);
      for (int c = 0; c < hidden; c += 2)
        for (int p = 0; p < parts; ++p)
          active[c / 2].part[p] = pairs(gelu_half(wide[c].part[p]), gelu_half(wide[c + 1].part[p]));
      dense(active, fc2, w.fc2_bias, normed);
      add(normed, x);
      write(x, dim, out + patch * words * dim);
    }
  }

 private:
  Weights<> w;
  Kernel<dim, 3 * dim> qkv;
  Kernel<dim, dim> projection;
  Kernel<dim, hidden> fc1;
  Kernel<hidden, dim> fc2;
  float epsilon;
};

}  // namespace
}  // namespace half
