// Matrix products and attention for a CPU, in float32: `ops/native.py` builds this file and says what each is.
//
// A product is split into tiles of the output, which threads take one after another. A tile packs what it reads of its
// two factors in the order in which it reads it, so that any strides are equally fast: no factor is transposed in
// memory, and heads stay where they are (Goto and van de Geijn 2008, doi:10.1145/1356052.1356053). Sums over the inner
// dimension are never split between threads: the bits do not depend on how many there are.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <memory>
#include <numeric>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;
using Buffer = ffi::Buffer<ffi::F32>;
using Result = ffi::Result<Buffer>;
using Int = std::int64_t;

// Registers hold a block of ROWS x COLS of the output: 24 of 32 with AVX-512, 12 of 16 with AVX2.
#ifdef __AVX512F__
constexpr int LANES = 16, ROWS = 12;
#else
constexpr int LANES = 8, ROWS = 6;
#endif
constexpr int COLS = 2 * LANES;
constexpr Int DEPTH = 512, TALL = 10 * ROWS, WIDE = 768;  // what is packed at a time, for an L2 cache of 2 MB
constexpr Int QUERIES = 16 * ROWS, KEYS = 256;             // a block of scores; of short rows a smaller one

typedef float Vector __attribute__((vector_size(4 * LANES)));
typedef float Unaligned __attribute__((vector_size(4 * LANES), aligned(4)));
typedef float Four __attribute__((vector_size(16), aligned(4)));
typedef std::int32_t Integers __attribute__((vector_size(4 * LANES)));

struct Matrix {  // element (i, j) is at[i * down + j * right]
  const float* at;
  Int down, right;
  Matrix from(Int i, Int j) const { return {at + i * down + j * right, down, right}; }
  Matrix transposed() const { return {at, right, down}; }
};

struct alignas(64) Workspace {
  alignas(64) float left[TALL * DEPTH], right[WIDE * DEPTH];
  alignas(64) float scores[QUERIES * KEYS], gradient[QUERIES * KEYS], out[QUERIES * KEYS];
  float most[QUERIES], sum[QUERIES];
};

thread_local const std::unique_ptr<Workspace> workspace(new Workspace);

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

// Write `rows` rows of `a`, `depth` long, as panels of SIDE rows, each column after column. Missing rows become 0.
template <int SIDE>
void pack(Matrix a, Int rows, Int depth, float* out) {
  for (Int i = 0; i < rows; i += SIDE, out += SIDE * depth) {
    const float* from = a.from(i, 0).at;
    const Int here = std::min<Int>(SIDE, rows - i);
    if (here == SIDE && a.down == 1) {
      for (Int k = 0; k < depth; k++)
        for (int r = 0; r < SIDE; r++) out[k * SIDE + r] = from[k * a.right + r];
      continue;
    }
    Int k = 0;
    if (here == SIDE && a.right == 1 && SIDE % 4 == 0)  // four by four, transposed in registers
      for (; k + 4 <= depth; k += 4)
        for (int r = 0; r < SIDE; r += 4) {
          const float* at = from + r * a.down + k;
          const Four w = *(const Four*)at, x = *(const Four*)(at + a.down);
          const Four y = *(const Four*)(at + 2 * a.down), z = *(const Four*)(at + 3 * a.down);
          const Four wx = __builtin_shufflevector(w, x, 0, 4, 1, 5), yz = __builtin_shufflevector(y, z, 0, 4, 1, 5);
          const Four WX = __builtin_shufflevector(w, x, 2, 6, 3, 7), YZ = __builtin_shufflevector(y, z, 2, 6, 3, 7);
          float* to = out + k * SIDE + r;
          *(Four*)to = __builtin_shufflevector(wx, yz, 0, 1, 4, 5);
          *(Four*)(to + SIDE) = __builtin_shufflevector(wx, yz, 2, 3, 6, 7);
          *(Four*)(to + 2 * SIDE) = __builtin_shufflevector(WX, YZ, 0, 1, 4, 5);
          *(Four*)(to + 3 * SIDE) = __builtin_shufflevector(WX, YZ, 2, 3, 6, 7);
        }
    for (; k < depth; k++)
      for (int r = 0; r < SIDE; r++) out[k * SIDE + r] = r < here ? from[r * a.down + k * a.right] : 0.0f;
  }
}

// Multiply HEIGHT rows of `left`, of which `rows` are written, with a panel of `cols` <= COLS columns.
template <int HEIGHT>
void block(Int depth, Matrix left, const float* right, float* out, Int stride, Int rows, Int cols, bool add) {
  for (int i = 0; i < HEIGHT && i < rows; i++)  // they arrive during the products
    __builtin_prefetch(out + i * stride, 1), __builtin_prefetch(out + i * stride + LANES, 1);
  Vector sum[HEIGHT][2] = {};
  for (const float* at = left.at; depth > 0; depth--, at += left.right, right += COLS) {
    const Vector first = *(const Vector*)right, second = *(const Vector*)(right + LANES);
#pragma GCC unroll 12
    for (int i = 0; i < HEIGHT; i++) sum[i][0] += at[i * left.down] * first, sum[i][1] += at[i * left.down] * second;
  }
#pragma GCC unroll 12
  for (int i = 0; i < HEIGHT; i++) {
    if (i >= rows) break;
    if (cols == COLS) {
      Unaligned* to = (Unaligned*)(out + i * stride);
      to[0] = add ? to[0] + sum[i][0] : sum[i][0], to[1] = add ? to[1] + sum[i][1] : sum[i][1];
    } else {
      const float* from = (const float*)sum[i];
      for (Int j = 0; j < cols; j++) out[i * stride + j] = (add ? out[i * stride + j] : 0.0f) + from[j];
    }
  }
}

// The length of pieces of at most `most`, and about as long as each other, that n is split into.
Int even(Int n, Int most) {
  const Int pieces = (n + most - 1) / most;
  return (n + pieces * COLS - 1) / (pieces * COLS) * COLS;
}

// out[M N] = a[M K] b[K N], or += that.
void multiply(Int M, Int N, Int K, Matrix a, Matrix b, float* out, Int stride, bool add = false) {
  Workspace& own = *workspace;
  const Int deep = even(K, DEPTH), broad = even(N, WIDE);
  for (Int n = 0; n < N; n += broad)
    for (Int k = 0; k < K; k += deep) {
      const Int wide = std::min(broad, N - n), depth = std::min(deep, K - k);
      pack<COLS>(b.from(k, n).transposed(), wide, depth, own.right);
      for (Int m = 0; m < M; m += TALL) {
        const Int tall = std::min(TALL, M - m);
        const Int whole = a.right == 1 ? tall / ROWS * ROWS : 0;  // rows that lie in order need no packing
        if (whole < tall) pack<ROWS>(a.from(m + whole, k), tall - whole, depth, own.left);
        for (Int j = 0; j < wide; j += COLS)
          for (Int i = 0; i < tall; i += ROWS) {
            const Int rows = std::min<Int>(ROWS, tall - i), cols = std::min<Int>(COLS, wide - j);
            const Matrix left = i < whole ? a.from(m + i, k) : Matrix{own.left + (i - whole) * depth, 1, ROWS};
            const auto with = rows > 2 * ROWS / 3 ? block<ROWS> : rows > ROWS / 3 ? block<2 * ROWS / 3> : block<ROWS / 3>;
            with(depth, left, own.right + j * depth, out + (m + i) * stride + n + j, stride, rows, cols, add || k > 0);
          }
      }
    }
}

// A product out[M N] = a b, in pieces that threads take: the longer side is halved until there is one for each.
struct Product {
  Int M, N, K;
  Matrix a, b;
  float* out;
  Int down, across, tall, wide;

  Product(Int M, Int N, Int K, Matrix a, Matrix b, float* out, Int threads)
      : M(M), N(N), K(K), a(a), b(b), out(out), down(1), across(1) {
    while (pieces() < threads && M * N * K / pieces() > 1 << 16) (M / down > N / across ? down : across) *= 2;
    tall = (M + down * ROWS - 1) / (down * ROWS) * ROWS, wide = (N + across * COLS - 1) / (across * COLS) * COLS;
  }
  Int pieces() const { return down * across; }
  void operator()(Int piece) const {
    const Int m = piece / across * tall, n = piece % across * wide;
    if (m >= M || n >= N) return;
    multiply(std::min(tall, M - m), std::min(wide, N - n), K, a.from(m, 0), b.from(0, n), out + m * N + n, N);
  }
};

// x[M K] w[K N], or where `transposed`, x[M K] w[N K].
ffi::Error Linear(ffi::ThreadPool pool, Buffer x, Buffer w, Result out, Int M, Int N, Int K, bool transposed) {
  const Matrix right = transposed ? Matrix{w.typed_data(), 1, K} : Matrix{w.typed_data(), N, 1};
  const Product product(M, N, K, {x.typed_data(), K, 1}, right, out->typed_data(), pool.num_threads());
  parallel(pool, product.pieces(), product);
  return ffi::Error::Success();
}

// The gradients of x and w, given that of the output, g[M N].
ffi::Error LinearBackward(ffi::ThreadPool pool, Buffer x, Buffer w, Buffer g, Result dx, Result dw, Int M, Int N, Int K,
                          bool transposed) {
  const Int threads = pool.num_threads();
  const Matrix of_x = {x.typed_data(), K, 1}, of_g = {g.typed_data(), N, 1};
  const Matrix of_w = transposed ? Matrix{w.typed_data(), K, 1} : Matrix{w.typed_data(), 1, N};
  const Product left(M, K, N, of_g, of_w, dx->typed_data(), threads);
  const Product right = transposed ? Product(N, K, M, of_g.transposed(), of_x, dw->typed_data(), threads)
                                   : Product(K, N, M, of_x.transposed(), of_g, dw->typed_data(), threads);
  const Int first = left.pieces();
  parallel(pool, first + right.pieces(), [&](Int piece) { piece < first ? left(piece) : right(piece - first); });
  return ffi::Error::Success();
}

// e^x, to 2 units in the last place; 0 below -87.
Vector exponential(Vector x) {
  const Vector shift = Vector{} + 12582912.0f;  // 1.5 * 2^23: the sum with it is rounded to an integer
  const Vector rounded = x * 1.44269504f + shift, n = rounded - shift;
  const Vector r = x - n * 0.693145752f - n * 1.42860677e-6f;
  Vector p = Vector{} + 1.38888889e-3f;
  for (float c : {8.33333333e-3f, 4.16666667e-2f, 1.66666667e-1f, 0.5f, 1.0f, 1.0f}) p = p * r + c;
  const Integers power = ((Integers)rounded + 127) << 23;
  return (Vector)((Integers)(p * (Vector)power) & ~(x <= -87.0f));  // NaN stays NaN
}

struct Attention {
  Int B, L, K, G, H;
  float scale;
  bool causal;
  Int window;
  const std::int32_t* segments;  // [B, L], or null

  Int block() const { return L < 1024 ? QUERIES / 2 : QUERIES; }
  Matrix query(const float* q, Int b, Int i, Int head) const {
    return {q + ((b * L + i) * K * G + head) * H, K * G * H, 1};
  }
  Matrix key(const float* k, Int b, Int j, Int head) const { return {k + ((b * L + j) * K + head) * H, K * H, 1}; }

  // Call f(s, n) for each block of keys, s to s + n, that some query of i to i + rows may see.
  template <typename F>
  void blocks(Int b, Int i, Int rows, const F& f) const {
    const Int first = window ? std::max<Int>(0, i - window + 1) / KEYS * KEYS : 0, end = causal ? i + rows : L;
    for (Int s = first; s < end; s += KEYS) {
      const Int n = std::min(KEYS, end - s);
      if (segments) {
        const auto *mine = segments + b * L + i, *theirs = segments + b * L + s;
        const auto [low, high] = std::minmax_element(mine, mine + rows);
        const auto [least, most] = std::minmax_element(theirs, theirs + n);
        if (*least > *high || *most < *low) continue;
      }
      f(s, n);
    }
  }

  // Make the scores of query i with n keys from s very small where it does not see them, up to a whole vector.
  void hide(float* scores, Int b, Int i, Int s, Int n) const {
    const Int low = window ? std::max<Int>(0, i - window + 1 - s) : 0, high = causal ? std::min(n, i + 1 - s) : n;
    if (segments) {
      const auto mine = segments[b * L + i], *theirs = segments + b * L + s;
      for (Int j = 0; j < n; j++) scores[j] = theirs[j] == mine ? scores[j] : -1e30f;
    }
    for (Int j = 0; j < std::min(low, n); j++) scores[j] = -1e30f;
    for (Int j = std::max<Int>(0, high); j < (n + LANES - 1) / LANES * LANES; j++) scores[j] = -1e30f;
  }

  void forward(const float* q, const float* k, const float* v, float* out, float* lse, Int b, Int head, Int i) const {
    Workspace& own = *workspace;
    const Int rows = std::min(block(), L - i);
    bool begun = false;
    std::fill(own.most, own.most + rows, -1e30f);
    std::fill(own.sum, own.sum + rows, 0.0f);
    blocks(b, i, rows, [&](Int s, Int n) {
      multiply(rows, n, H, query(q, b, i, head), key(k, b, s, head / G).transposed(), own.scores, KEYS);
      for (Int r = 0; r < rows; r++) {
        float* row = own.scores + r * KEYS;
        hide(row, b, i + r, s, n);
        Vector most = Vector{} + own.most[r], sum = {};
        for (Int j = 0; j < n; j += LANES) {
          const Vector x = *(Vector*)(row + j) * scale;
          most = x > most ? x : most;
        }
        const float now = *std::max_element((float*)&most, (float*)&most + LANES);
        for (Int j = 0; j < n; j += LANES) sum += *(Vector*)(row + j) = exponential(*(Vector*)(row + j) * scale - now);
        const float kept = exponential(Vector{} + (own.most[r] - now))[0];
        own.sum[r] = own.sum[r] * kept + std::accumulate((float*)&sum, (float*)&sum + LANES, 0.0f);
        own.most[r] = now;
        if (begun && kept != 1.0f)
          for (Int h = 0; h < H; h++) own.out[r * H + h] *= kept;
      }
      multiply(rows, H, n, {own.scores, KEYS, 1}, key(v, b, s, head / G), own.out, H, begun);
      begun = true;
    });
    for (Int r = 0; r < rows; r++) {
      float* to = out + ((b * L + i + r) * K * G + head) * H;
      for (Int h = 0; h < H; h++) to[h] = own.out[r * H + h] / own.sum[r];
      lse[(b * K * G + head) * L + i + r] = own.most[r] + std::log(own.sum[r]);
    }
  }

  // The gradients of all queries that read key head (b, pair), and of its keys and values.
  void backward(const float* q, const float* k, const float* v, const float* out, const float* lse, const float* g,
                float* dq, float* dk, float* dv, Int b, Int pair) const {
    Workspace& own = *workspace;
    for (Int j = 0; j < L; j++)
      for (float* gradient : {dk, dv}) std::fill_n(const_cast<float*>(key(gradient, b, j, pair).at), H, 0.0f);
    for (Int head = pair * G; head < (pair + 1) * G; head++)
      for (Int i = 0; i < L; i += block()) {
        const Int rows = std::min(block(), L - i);
        const Matrix queries = query(q, b, i, head), of_out = query(g, b, i, head);
        for (Int r = 0; r < rows; r++) {
          const float *x = query(out, b, i + r, head).at, *y = of_out.from(r, 0).at;
          own.sum[r] = 0;
          for (Int h = 0; h < H; h++) own.sum[r] += x[h] * y[h];
        }
        bool begun = false;
        blocks(b, i, rows, [&](Int s, Int n) {
          const Matrix keys = key(k, b, s, pair), values = key(v, b, s, pair);
          multiply(rows, n, H, queries, keys.transposed(), own.scores, KEYS);
          multiply(rows, n, H, of_out, values.transposed(), own.gradient, KEYS);
          for (Int r = 0; r < rows; r++) {
            hide(own.scores + r * KEYS, b, i + r, s, n);
            const float of_row = lse[(b * K * G + head) * L + i + r];
            for (Int j = 0; j < n; j += LANES) {
              Vector &p = *(Vector*)(own.scores + r * KEYS + j), &dp = *(Vector*)(own.gradient + r * KEYS + j);
              p = exponential(p * scale - of_row), dp = p * (dp - own.sum[r]) * scale;
            }
          }
          const Matrix pattern = {own.scores, KEYS, 1}, of_scores = {own.gradient, KEYS, 1};
          multiply(n, H, rows, pattern.transposed(), of_out, const_cast<float*>(key(dv, b, s, pair).at), K * H, true);
          multiply(n, H, rows, of_scores.transposed(), queries, const_cast<float*>(key(dk, b, s, pair).at), K * H, true);
          multiply(rows, H, n, of_scores, keys, const_cast<float*>(query(dq, b, i, head).at), K * G * H, begun);
          begun = true;
        });
      }
  }
};

using Segments = ffi::Buffer<ffi::S32>;  // [B, L], or empty

Attention attention_of(const Buffer& q, const Segments& segments, float scale, bool causal, Int window) {
  const auto d = q.dimensions();
  const auto* tags = segments.element_count() ? segments.typed_data() : nullptr;
  return {d[0], d[1], d[2], d[3], d[4], scale, causal, window, tags};
}

ffi::Error Forward(ffi::ThreadPool pool, Buffer q, Buffer k, Buffer v, Segments segments, Result out, Result lse,
                   float scale, bool causal, Int window) {
  const Attention a = attention_of(q, segments, scale, causal, window);
  const Int heads = a.K * a.G, blocks = (a.L + a.block() - 1) / a.block();
  parallel(pool, a.B * heads * blocks, [&](Int n) {
    a.forward(q.typed_data(), k.typed_data(), v.typed_data(), out->typed_data(), lse->typed_data(),
              n / blocks / heads, n / blocks % heads, n % blocks * a.block());
  });
  return ffi::Error::Success();
}

ffi::Error Backward(ffi::ThreadPool pool, Buffer q, Buffer k, Buffer v, Buffer out, Buffer lse, Buffer g,
                    Segments segments, Result dq, Result dk, Result dv, float scale, bool causal, Int window) {
  const Attention a = attention_of(q, segments, scale, causal, window);
  parallel(pool, a.B * a.K, [&](Int n) {
    a.backward(q.typed_data(), k.typed_data(), v.typed_data(), out.typed_data(), lse.typed_data(), g.typed_data(),
               dq->typed_data(), dk->typed_data(), dv->typed_data(), n / a.K, n % a.K);
  });
  return ffi::Error::Success();
}

#define BIND ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()
#define IN(T) .Arg<T>()
#define OUT .Ret<Buffer>()
#define SHAPE .Attr<Int>("M").Attr<Int>("N").Attr<Int>("K").Attr<bool>("transposed")
#define RULES .Attr<float>("scale").Attr<bool>("causal").Attr<Int>("window")
#define QKV IN(Buffer) IN(Buffer) IN(Buffer)
XLA_FFI_DEFINE_HANDLER_SYMBOL(llm_jax_linear, Linear, BIND IN(Buffer) IN(Buffer) OUT SHAPE);
XLA_FFI_DEFINE_HANDLER_SYMBOL(llm_jax_linear_backward, LinearBackward, BIND QKV OUT OUT SHAPE);
XLA_FFI_DEFINE_HANDLER_SYMBOL(llm_jax_attention, Forward, BIND QKV IN(Segments) OUT OUT RULES);
XLA_FFI_DEFINE_HANDLER_SYMBOL(llm_jax_attention_backward, Backward, BIND QKV QKV IN(Segments) OUT OUT OUT RULES);
