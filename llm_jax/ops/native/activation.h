// Activation functions x * sigmoid(u(x)), and their gradients: SiLU, and GELU in its tanh form.

#pragma once

#include "vectors.h"

// u(x) is x for SiLU. For GELU it is 2 sqrt(2 / pi) (x + 0.044715 x^3), as (1 + tanh(u / 2)) / 2 = sigmoid(u).
struct Activation {
  float slope, cubic;

  Vector sigmoid(Vector x) const {
    Vector u = x * (slope + cubic * x * x);
    u = u < -80.0f ? Vector{} - 80.0f : u;  // e^-u stays finite
    return 1.0f / (1.0f + exponential(-u));
  }
  Vector value(Vector x) const { return x * sigmoid(x); }
  Vector gradient(Vector x) const {
    const Vector s = sigmoid(x);
    return s + x * s * (1.0f - s) * (slope + 3 * cubic * x * x);
  }
};

// y[i] = f(i, x[i], true) from `begin` to `end`, a vector at a time, and f(i, x[i], false) for those that fill none.
template <typename F>
void by_vectors(Int begin, Int end, const float* x, float* y, const F& f) {
  Int i = begin;
  for (; i + LANES <= end; i += LANES) *(Unaligned*)(y + i) = f(i, *(const Unaligned*)(x + i), true);
  for (; i < end; i++) y[i] = f(i, Vector{} + x[i], false)[0];
}
