// AdamW (Loshchilov and Hutter 2017, arXiv:1711.05101) on all parameters at once, in the memory in which they are.

#pragma once

#include "vectors.h"

struct Parameter {  // one array, with its two moments and its gradient
  float *p, *m, *v;
  const float* g;
  Int size;
  float decay;
};

struct AdamW {
  float scale, rate, b1, b2, eps, debias1, debias2;  // `scale` makes of the gradient the clipped mean

  static constexpr Int BLOCK = 512;

  // The sum of squares of the new parameters from `begin` to `end`. They are stored if `store`, with their moments.
  template <bool store>
  double update(const Parameter& of, Int begin, Int end) const {
    double total = 0;
    float new_p[BLOCK], new_m[BLOCK], new_v[BLOCK];
    for (Int i = begin; i < end; i += BLOCK) {
      const Int n = std::min(BLOCK, end - i);
      float *p = of.p + i, *m = of.m + i, *v = of.v + i, sum = 0;
      const float* g = of.g + i;
#pragma omp simd reduction(+ : sum)
      for (Int j = 0; j < n; j++) {
        const float slope = g[j] * scale;
        new_m[j] = b1 * m[j] + (1 - b1) * slope;
        new_v[j] = b2 * v[j] + (1 - b2) * slope * slope;
        const float step = new_m[j] * debias1 / (std::sqrt(new_v[j] * debias2) + eps) + of.decay * p[j];
        new_p[j] = p[j] - rate * step;
        sum += new_p[j] * new_p[j];
      }
      if (store) std::copy_n(new_p, n, p), std::copy_n(new_m, n, m), std::copy_n(new_v, n, v);
      total += sum;
    }
    return total;
  }
};

// The sum of squares of x[n].
inline double squares(const float* x, Int n) {
  double total = 0;
  for (Int i = 0; i < n; i += AdamW::BLOCK) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (Int j = i; j < std::min(n, i + AdamW::BLOCK); j++) sum += x[j] * x[j];
    total += sum;
  }
  return total;
}
