// Products of a few rows with a large matrix, at the speed of memory: `ops/native.py` builds this file, and
// `ops/few_rows.py` says what it is for.
//
// Threads take strips of output channels. A strip reads GROUP rows of the matrix side by side and adds them to sums that
// stay in the first cache, while the next GROUP rows are fetched from memory. Weights are widened to float32 in
// registers. A sum is never split between threads: the bits do not depend on how many there are.

#include <immintrin.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>

#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;
using Int = std::int64_t;

#ifdef __AVX512F__
constexpr int LANES = 16;
#define INTRINSIC(name) _mm512_##name
#define LOAD(w) _mm_loadu_si128((const __m128i*)(w))
#define LOAD_HALVES(w) _mm256_loadu_si256((const __m256i*)(w))
#else
constexpr int LANES = 8;
#define INTRINSIC(name) _mm256_##name
#define LOAD(w) _mm_loadl_epi64((const __m128i*)(w))
#define LOAD_HALVES(w) _mm_loadu_si128((const __m128i*)(w))
#endif
constexpr int GROUP = 8;     // rows of the matrix that are read side by side
constexpr Int STRIP = 512;   // output channels that a thread takes at a time, at most
constexpr Int LEAST = 64;    // and at least

typedef float Vector __attribute__((vector_size(4 * LANES)));
typedef float Unaligned __attribute__((vector_size(4 * LANES), aligned(4)));
typedef std::int32_t Integers __attribute__((vector_size(4 * LANES)));

// Read LANES weights as float32. The bits of a bfloat16 are the upper half of a float32.
Vector widen(const float* w) { return *(const Unaligned*)w; }
Vector widen(const std::uint16_t* w) { return (Vector)((Integers)INTRINSIC(cvtepu16_epi32)(LOAD_HALVES(w)) << 16); }
Vector widen(const std::int8_t* w) { return (Vector)INTRINSIC(cvtepi32_ps)(INTRINSIC(cvtepi8_epi32)(LOAD(w))); }
float one(const float* w) { return *w; }
float one(const std::uint16_t* w) {
  const std::uint32_t bits = std::uint32_t(*w) << 16;
  float out;
  __builtin_memcpy(&out, &bits, 4);
  return out;
}
float one(const std::int8_t* w) { return *w; }

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

// Call f(0), ..., f(n - 1), on this thread and those of `pool`. Returns when all are done.
template <typename F>
void share(ffi::ThreadPool& pool, Int n, const F& f) {
  struct Shared {
    std::atomic<Int> next{0}, done{0};
  };
  auto shared = std::make_shared<Shared>();
  auto work = [shared, n, &f] {  // once all are taken, a thread that comes late does not touch `f`
    for (Int i; (i = shared->next.fetch_add(1)) < n; shared->done.fetch_add(1)) f(i);
  };
  for (Int helper = std::min<Int>(n, pool.num_threads()); helper > 1; helper--) pool.Schedule([work] { work(); });
  work();
  while (shared->done.load() < n) __builtin_ia32_pause();
}

template <typename T>
void multiply(ffi::ThreadPool& pool, const FewRows<T>& product) {
  const Int even = product.O / pool.num_threads() / LANES * LANES;
  const Int wide = std::clamp(even, LEAST, STRIP);
  share(pool, (product.O + wide - 1) / wide,
        [&](Int n) { product.strip(n * wide, std::min(product.O, (n + 1) * wide)); });
}

// x[M I] w[I O], where w is float32, bfloat16 or int8.
ffi::Error Few(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::AnyBuffer w, ffi::Result<ffi::Buffer<ffi::F32>> y) {
  const Int M = x.dimensions()[0], I = w.dimensions()[0], O = w.dimensions()[1];
  const float* left = x.typed_data();
  float* out = y->typed_data();
  if (I == 0) std::fill_n(out, M * O, 0.0f);
  switch (w.element_type()) {
    case ffi::F32: multiply(pool, FewRows<float>{M, I, O, left, (const float*)w.untyped_data(), out}); break;
    case ffi::BF16:
      multiply(pool, FewRows<std::uint16_t>{M, I, O, left, (const std::uint16_t*)w.untyped_data(), out});
      break;
    case ffi::S8: multiply(pool, FewRows<std::int8_t>{M, I, O, left, (const std::int8_t*)w.untyped_data(), out}); break;
    default: return ffi::Error::InvalidArgument("weights are float32, bfloat16 or int8");
  }
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(llm_jax_few_rows, Few,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::Buffer<ffi::F32>>());
