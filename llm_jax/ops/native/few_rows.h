// Products of a few rows with a large matrix, at the speed of memory.
//
// Threads take strips of output channels. A strip reads GROUP rows of the matrix side by side and adds them to sums
// that stay in the first cache, while the next GROUP rows are fetched from memory. Weights are widened to float32 in
// registers. A sum is never split between threads: the bits do not depend on how many there are.

#pragma once

#include <immintrin.h>

#include "vectors.h"

#ifdef __AVX512F__
#define INTRINSIC(name) _mm512_##name
#define LOAD(w) _mm_loadu_si128((const __m128i*)(w))
#define LOAD_HALVES(w) _mm256_loadu_si256((const __m256i*)(w))
#else
#define INTRINSIC(name) _mm256_##name
#define LOAD(w) _mm_loadl_epi64((const __m128i*)(w))
#define LOAD_HALVES(w) _mm_loadu_si128((const __m128i*)(w))
#endif

constexpr int GROUP = 8;    // rows of the matrix that are read side by side
constexpr Int STRIP = 512;   // output channels that a thread takes at a time, at most
constexpr Int LEAST = 64;    // and at least

// Read LANES weights as float32. The bits of a bfloat16 are the upper half of a float32.
inline Vector widen(const float* w) { return *(const Unaligned*)w; }
inline Vector widen(const std::uint16_t* w) {
  return (Vector)((Integers)INTRINSIC(cvtepu16_epi32)(LOAD_HALVES(w)) << 16);
}
inline Vector widen(const std::int8_t* w) { return (Vector)INTRINSIC(cvtepi32_ps)(INTRINSIC(cvtepi8_epi32)(LOAD(w))); }
inline float one(const float* w) { return *w; }
inline float one(const std::uint16_t* w) {
  const std::uint32_t bits = std::uint32_t(*w) << 16;
  float out;
  __builtin_memcpy(&out, &bits, 4);
  return out;
}
inline float one(const std::int8_t* w) { return *w; }

// y[M O] = x[M I] w[I O], or its columns from `begin` to `end`.
template <typename T>
struct FewRows {
  Int M, I, O;
  const float* x;
  const T* w;
  float* y;

  // Add the product with R rows of the matrix from row i on; the first product is stored.
  template <int R>
  void rows(Int i, Int begin, Int end) const {
    const T* from = w + i * O;
    Int c = begin;
    for (; c + LANES <= end; c += LANES) {
      Vector weights[R];
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) {
        __builtin_prefetch(from + (R + r) * O + c);  // a prefetch past the end is none
        weights[r] = widen(from + r * O + c);
      }
      for (Int m = 0; m < M; m++) {
        const float* factor = x + m * I + i;
        Unaligned* sum = (Unaligned*)(y + m * O + c);
        Vector even = i == 0 ? Vector{} : (Vector)*sum, odd = {};
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) (r % 2 ? odd : even) += weights[r] * factor[r];
        *sum = even + odd;
      }
    }
    for (; c < end; c++)
      for (Int m = 0; m < M; m++) {
        float sum = i == 0 ? 0.0f : y[m * O + c];
        for (int r = 0; r < R; r++) sum += one(from + r * O + c) * x[m * I + i + r];
        y[m * O + c] = sum;
      }
  }

  void strip(Int begin, Int end) const {
    Int i = 0;
    for (; i + GROUP <= I; i += GROUP) rows<GROUP>(i, begin, end);
    for (; i < I; i++) rows<1>(i, begin, end);
  }
};

template <typename T>
void multiply_few(ffi::ThreadPool& pool, const FewRows<T>& product) {
  const Int even = product.O / pool.num_threads() / LANES * LANES;
  const Int wide = std::clamp(even, LEAST, STRIP);
  parallel(pool, (product.O + wide - 1) / wide,
           [&](Int n) { product.strip(n * wide, std::min(product.O, (n + 1) * wide)); });
}
