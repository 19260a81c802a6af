// What cross-entropy reads of a row of logits, and its gradient: logits are read once, and not stored again.

#pragma once

#include "vectors.h"

// log(sum(exp(x))) of x[V].
inline float log_sum_exp(const float* x, Int V) {
  float most = x[0];
#pragma omp simd reduction(max : most)
  for (Int j = 0; j < V; j++) most = x[j] > most ? x[j] : most;
  Vector sum = {};
  Int j = 0;
  for (; j + LANES <= V; j += LANES) sum += exponential(*(const Unaligned*)(x + j) - most);
  float total = std::accumulate((float*)&sum, (float*)&sum + LANES, 0.0f);
  for (; j < V; j++) total += exponential(Vector{} + (x[j] - most))[0];
  return most + std::log(total);
}

// dx = softmax(x) * of_log_z, and of_picked more at the target, if that is one of the V.
inline void log_sum_exp_gradient(const float* x, Int V, float log_z, Int target, float of_log_z, float of_picked,
                                 float* dx) {
  Int j = 0;
  for (; j + LANES <= V; j += LANES)
    *(Unaligned*)(dx + j) = exponential(*(const Unaligned*)(x + j) - log_z) * of_log_z;
  for (; j < V; j++) dx[j] = exponential(Vector{} + (x[j] - log_z))[0] * of_log_z;
  if (target >= 0 && target < V) dx[target] += of_picked;
}
