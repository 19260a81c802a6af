// Layer norm and RMS norm of rows, and their gradients: each row is read once.

#pragma once

#include "vectors.h"

struct Norm {
  Int rows, D;
  bool center;
  float eps;

  static constexpr Int BLOCK = 32;  // rows that a thread takes at a time
  Int blocks() const { return (rows + BLOCK - 1) / BLOCK; }
  Int end(Int block) const { return std::min(rows, (block + 1) * BLOCK); }

  // y = (x - mean) * inverse * scale + bias, with `mean` and `inverse` of each row; without `center`, mean is 0.
  void forward(const float* x, const float* scale, const float* bias, float* y, float* mean, float* inverse,
               Int block) const {
    for (Int i = block * BLOCK; i < end(block); i++, x += D, y += D) {
      float sum = 0, squares = 0;
#pragma omp simd reduction(+ : sum)
      for (Int j = 0; j < D; j++) sum += x[j];
      const float m = mean[i] = center ? sum / D : 0;
#pragma omp simd reduction(+ : squares)
      for (Int j = 0; j < D; j++) squares += (x[j] - m) * (x[j] - m);
      const float over = inverse[i] = 1 / std::sqrt(squares / D + eps);
#pragma omp simd
      for (Int j = 0; j < D; j++) y[j] = (x[j] - m) * over * scale[j] + bias[j];
    }
  }

  // The gradient of x, and what this block adds to those of scale and bias, given that of the output, g.
  void backward(const float* x, const float* scale, const float* mean, const float* inverse, const float* g, float* dx,
                float* of_scale, float* of_bias, Int block) const {
    for (Int i = block * BLOCK; i < end(block); i++, x += D, g += D, dx += D) {
      const float m = mean[i], over = inverse[i];
      float sum = 0, along = 0;
#pragma omp simd reduction(+ : sum, along)
      for (Int j = 0; j < D; j++) {
        const float unit = (x[j] - m) * over, inner = g[j] * scale[j];
        of_scale[j] += g[j] * unit, of_bias[j] += g[j];
        sum += inner, along += inner * unit;
      }
      sum = center ? sum / D : 0, along /= D;
#pragma omp simd
      for (Int j = 0; j < D; j++) dx[j] = over * (g[j] * scale[j] - sum - (x[j] - m) * over * along);
    }
  }
};
