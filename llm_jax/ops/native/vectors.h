// What all native code shares: vectors, threads, and the buffers of XLA.

#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <functional>
#include <memory>
#include <numeric>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;
using Buffer = ffi::Buffer<ffi::F32>;
using Result = ffi::Result<Buffer>;
using Int = std::int64_t;

#ifdef __AVX512F__
constexpr int LANES = 16;
#else
constexpr int LANES = 8;
#endif

typedef float Vector __attribute__((vector_size(4 * LANES)));
typedef float Unaligned __attribute__((vector_size(4 * LANES), aligned(4)));
typedef float Four __attribute__((vector_size(16), aligned(4)));
typedef std::int32_t Integers __attribute__((vector_size(4 * LANES)));

// Call f(0), ..., f(n - 1), on this thread and those of `pool`. Returns when all are done.
template <typename F>
void parallel(ffi::ThreadPool& pool, Int n, const F& f) {
  struct Shared {
    std::atomic<Int> next{0}, done{0};
  };
  auto shared = std::make_shared<Shared>();
  auto work = [shared, n, &f] {  // once all are taken, a thread that comes late does not touch `f`
    for (Int i; (i = shared->next.fetch_add(1)) < n; shared->done.fetch_add(1)) f(i);
  };
  for (Int helper = std::min(n, pool.num_threads()); helper > 1; helper--) pool.Schedule([work] { work(); });
  work();
  while (shared->done.load() < n) __builtin_ia32_pause();
}

// e^x, to 2 units in the last place; 0 below -87.
inline Vector exponential(Vector x) {
  const Vector shift = Vector{} + 12582912.0f;  // 1.5 * 2^23: the sum with it is rounded to an integer
  const Vector rounded = x * 1.44269504f + shift, n = rounded - shift;
  const Vector r = x - n * 0.693145752f - n * 1.42860677e-6f;
  Vector p = Vector{} + 1.38888889e-3f;
  for (float c : {8.33333333e-3f, 4.16666667e-2f, 1.66666667e-1f, 0.5f, 1.0f, 1.0f}) p = p * r + c;
  const Integers power = ((Integers)rounded + 127) << 23;
  return (Vector)((Integers)(p * (Vector)power) & ~(x <= -87.0f));  // NaN stays NaN
}
