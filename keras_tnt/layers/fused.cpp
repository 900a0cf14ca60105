// TNT's inner transformer without a detour through memory: a patch's words stay in the first cache
// from the first norm to the last residual. Words lie along the vector's lanes, so that norms,
// softmax and products alike are sums of whole vectors.
//
// WORDS, DIM, HEADS, HIDDEN and ACROSS_WORDS (whether norms run over all words of a patch) are
// defined before this text.
#include <ATen/cpu/vec/vec.h>
#include <cmath>
#include <cstdint>

namespace {

using Vec = at::vec::Vectorized<float>;
constexpr int words = WORDS, dim = DIM, heads = HEADS, hidden = HIDDEN;
constexpr bool across_words = ACROSS_WORDS;
constexpr int head_dim = dim / heads, lanes = Vec::size(), parts = words / lanes;

// One channel of all words of a patch.
struct Channel {
  Vec part[parts];
  float word(int i) const { return reinterpret_cast<const float*>(this)[i]; }
};

// The largest divisor of `outputs` that is at most `most`.
constexpr int divisor(int outputs, int most) {
  return most <= 1 ? 1 : outputs % most == 0 ? most : divisor(outputs, most - 1);
}

// y = x kernel + bias, for kernel (inputs, outputs); `block` outputs at a time stay in registers.
template <int inputs, int outputs>
inline void dense(const Channel* x, const float* kernel, const float* bias, Channel* y) {
  constexpr int block = divisor(outputs, 12 / parts);
  for (int first = 0; first < outputs; first += block) {
    Vec sum[block * parts];
#pragma GCC unroll 64
    for (int j = 0; j < block * parts; ++j) sum[j] = Vec(bias[first + j / parts]);
    for (int i = 0; i < inputs; ++i) {
      const float* row = kernel + i * outputs + first;
#pragma GCC unroll 64
      for (int j = 0; j < block * parts; ++j)
        sum[j] = at::vec::fmadd(Vec(row[j / parts]), x[i].part[j % parts], sum[j]);
    }
#pragma GCC unroll 64
    for (int j = 0; j < block * parts; ++j) y[first + j / parts].part[j % parts] = sum[j];
  }
}

// Sums over channels become means over all that is normalised together.
inline void average(Vec* sum) {
  if (across_words) {
    float total = 0.0f, lane[lanes];
    for (int p = 0; p < parts; ++p) {
      sum[p].store(lane);
      for (int i = 0; i < lanes; ++i) total += lane[i];
    }
    for (int p = 0; p < parts; ++p) sum[p] = Vec(total / (dim * words));
  } else {
    for (int p = 0; p < parts; ++p) sum[p] = sum[p] * Vec(1.0f / dim);
  }
}

// gamma and beta: (dim, words).
inline void layer_norm(const Channel* x, const float* gamma, const float* beta, float epsilon,
                       Channel* y) {
  Vec mean[parts], variance[parts];
  for (int p = 0; p < parts; ++p) mean[p] = variance[p] = Vec(0.0f);
  for (int c = 0; c < dim; ++c)
    for (int p = 0; p < parts; ++p) mean[p] = mean[p] + x[c].part[p];
  average(mean);
  for (int c = 0; c < dim; ++c)
    for (int p = 0; p < parts; ++p) {
      y[c].part[p] = x[c].part[p] - mean[p];
      variance[p] = at::vec::fmadd(y[c].part[p], y[c].part[p], variance[p]);
    }
  average(variance);
  for (int p = 0; p < parts; ++p) variance[p] = (variance[p] + Vec(epsilon)).rsqrt();
  for (int c = 0; c < dim; ++c)
    for (int p = 0; p < parts; ++p) {
      const int64_t at = c * words + p * lanes;
      y[c].part[p] = at::vec::fmadd(y[c].part[p] * variance[p], Vec::loadu(gamma + at),
                                    Vec::loadu(beta + at));
    }
}

// Queries along the lanes, keys one after another: the softmax runs over whole vectors.
inline void attend(const Channel* qkv, Channel* y) {
  const Vec scale(1.0f / std::sqrt(float(head_dim)));
  for (int head = 0; head < heads; ++head) {
    const Channel* query = qkv + head * head_dim;
    const Channel* key = query + dim;
    const Channel* value = key + dim;
    for (int p = 0; p < parts; ++p) {
      Vec score[words], most(-INFINITY), total(0.0f), mixed[head_dim];
      for (int k = 0; k < words; ++k) {
        Vec s(0.0f);
        for (int d = 0; d < head_dim; ++d)
          s = at::vec::fmadd(query[d].part[p], Vec(key[d].word(k)), s);
        score[k] = s * scale;
        most = at::vec::maximum(most, score[k]);
      }
      for (int d = 0; d < head_dim; ++d) mixed[d] = Vec(0.0f);
      for (int k = 0; k < words; ++k) {
        const Vec share = (score[k] - most).exp();
        total = total + share;
        for (int d = 0; d < head_dim; ++d)
          mixed[d] = at::vec::fmadd(share, Vec(value[d].word(k)), mixed[d]);
      }
      for (int d = 0; d < head_dim; ++d) y[head * head_dim + d].part[p] = mixed[d] / total;
    }
  }
}

inline void gelu(Channel* x) {
  for (int c = 0; c < hidden; ++c)
    for (int p = 0; p < parts; ++p) {
      const Vec v = x[c].part[p];
      x[c].part[p] = v * Vec(0.5f) * (Vec(1.0f) + (v * Vec(0.70710678f)).erf());
    }
}

inline void add(const Channel* branch, Channel* x) {
  for (int c = 0; c < dim; ++c)
    for (int p = 0; p < parts; ++p) x[c].part[p] = x[c].part[p] + branch[c].part[p];
}

}  // namespace

// in, out: (patches, words, dim). weights: gamma and beta of the first norm, kernel and bias of
// query, key and value and of the projection, gamma and beta of the second norm, kernel and bias of
// both layers of the MLP; kernels (inputs, outputs).
extern "C" void inner_transformer(const float* in, float* out, const float* const* weights,
                                  float epsilon, int64_t patches) {
#pragma omp parallel for schedule(static)
  for (int64_t patch = 0; patch < patches; ++patch) {
    const float* from = in + patch * words * dim;
    float* to = out + patch * words * dim;
    Channel x[dim], normed[dim], qkv[3 * dim], mixed[dim], wide[hidden];
    float* flat = reinterpret_cast<float*>(x);
    for (int w = 0; w < words; ++w)
      for (int c = 0; c < dim; ++c) flat[c * words + w] = from[w * dim + c];
    layer_norm(x, weights[0], weights[1], epsilon, normed);
    dense<dim, 3 * dim>(normed, weights[2], weights[3], qkv);
    attend(qkv, mixed);
    dense<dim, dim>(mixed, weights[4], weights[5], normed);
    add(normed, x);
    layer_norm(x, weights[6], weights[7], epsilon, normed);
    dense<dim, hidden>(normed, weights[8], weights[9], wide);
    gelu(wide);
    dense<hidden, dim>(wide, weights[10], weights[11], normed);
    add(normed, x);
    for (int w = 0; w < words; ++w)
      for (int c = 0; c < dim; ++c) to[w * dim + c] = flat[c * words + w];
  }
}
