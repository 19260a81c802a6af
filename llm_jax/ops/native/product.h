// Matrix products. A product is split into tiles of the output, which threads take one after another. A tile packs what
// it reads of its two factors in the order in which it reads it, so that any strides are equally fast: no factor is
// transposed in memory, and heads stay where they are (Goto and van de Geijn 2008, doi:10.1145/1356052.1356053). Sums
// over the inner dimension are never split between threads: the bits do not depend on how many there are.

#pragma once

#include "vectors.h"

// Registers hold a block of ROWS x COLS of the output: 24 of 32 with AVX-512, 12 of 16 with AVX2.
constexpr int ROWS = LANES == 16 ? 12 : 6, COLS = 2 * LANES;
constexpr Int DEPTH = 512, TALL = 10 * ROWS, WIDE = 768;  // what is packed at a time, for an L2 cache of 2 MB

struct Matrix {  // element (i, j) is at[i * down + j * right]
  const float* at;
  Int down, right;
  Matrix from(Int i, Int j) const { return {at ? at + i * down + j * right : nullptr, down, right}; }
  Matrix transposed() const { return {at, right, down}; }
};

struct alignas(64) Packed {
  float left[TALL * DEPTH], right[WIDE * DEPTH];
};

thread_local const std::unique_ptr<Packed> packed(new Packed);

// Write `rows` rows of `a`, `depth` long, as panels of SIDE rows, each column after column. Missing rows become 0.
template <int SIDE>
void pack(Matrix a, Int rows, Int depth, float* out) {
  Int i = 0;
  for (Int panels; a.down == 1 && (panels = std::min<Int>(4, (rows - i) / SIDE)) > 0; i += panels * SIDE)
    for (Int k = 0; k < depth; k++)  // a few at a time, as one column of them is one line of memory
      for (Int p = i; p < i + panels * SIDE; p += SIDE)
        __builtin_memcpy(out + p * depth + k * SIDE, a.at + p + k * a.right, SIDE * sizeof(float));
  for (out += i * depth; i < rows; i += SIDE, out += SIDE * depth) {
    const float* from = a.from(i, 0).at;
    const Int here = std::min<Int>(SIDE, rows - i);
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

// Multiply HEIGHT rows of `left`, of which `rows` are written, with a panel of `cols` <= COLS columns, and add `more`.
template <int HEIGHT>
void block(Int depth, Matrix left, const float* right, Matrix more, float* out, Int stride, Int rows, Int cols) {
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
    const float* begin = more.from(i, 0).at;
    if (cols == COLS) {
      Unaligned *to = (Unaligned*)(out + i * stride), *from = (Unaligned*)begin;
      to[0] = begin ? from[0] + sum[i][0] : sum[i][0], to[1] = begin ? from[1] + sum[i][1] : sum[i][1];
    } else {
      const float* found = (const float*)sum[i];
      for (Int j = 0; j < cols; j++) out[i * stride + j] = begin ? begin[j] + found[j] : found[j];
    }
  }
}

// The length, a multiple of `unit`, of each of the `pieces` that n is split into.
inline Int even(Int n, Int pieces, Int unit) { return (n + pieces * unit - 1) / (pieces * unit) * unit; }

constexpr Matrix NOTHING = {nullptr, 0, 0};

// out[M N] = a[M K] b[K N] + more[M N], which may be `out` itself, or NOTHING.
void multiply(Int M, Int N, Int K, Matrix a, Matrix b, float* out, Int stride, Matrix more = NOTHING) {
  Packed& own = *packed;
  const Int deep = even(K, (K + DEPTH - 1) / DEPTH, COLS), broad = even(N, (N + WIDE - 1) / WIDE, COLS);
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
            const auto few = rows > ROWS / 3 ? block<2 * ROWS / 3> : block<ROWS / 3>;
            const auto with = rows > 2 * ROWS / 3 ? block<ROWS> : few;
            const Matrix begun = k ? Matrix{out, stride, 1} : more;
            with(depth, left, own.right + j * depth, begun.from(m + i, n + j), out + (m + i) * stride + n + j, stride,
                 rows, cols);
          }
      }
    }
}

struct Factors {  // a[M K] b[K N]
  Int K;
  Matrix a, b;
};

// Add to `tasks` what computes out[M N] = more + the sum of all products: the longer side is halved until there are
// enough.
template <typename Tasks>
void multiply_by_pieces(Tasks& tasks, Int M, Int N, const std::vector<Factors>& all, float* out, Matrix more,
                        Int threads) {
  Int down = 1, across = 1;
  while (down * across < threads && M * N * all[0].K / (down * across) > 1 << 16)
    (M / down > N / across ? down : across) *= 2;
  const Int tall = even(M, down, ROWS), wide = even(N, across, COLS);
  for (Int m = 0; m < M; m += tall)
    for (Int n = 0; n < N; n += wide)
      tasks.push_back([=] {
        Matrix begun = more.from(m, n);
        float* to = out + m * N + n;
        for (const Factors& x : all) {
          multiply(std::min(tall, M - m), std::min(wide, N - n), x.K, x.a.from(m, 0), x.b.from(0, n), to, N, begun);
          begun = {to, N, 1};
        }
      });
}

constexpr Int STRIPE = 64;  // columns that are summed at a time

// Write the sums of the columns of x[M N], for N up to STRIPE.
inline void sum_columns(Matrix x, Int M, Int N, float* out) {
  float sum[STRIPE] = {};
  for (Int i = 0; i < M; i++)
#pragma omp simd
    for (Int j = 0; j < N; j++) sum[j] += x.at[i * x.down + j];
  std::copy_n(sum, N, out);
}
