// Attention block by block with a running softmax (FlashAttention, arXiv:2205.14135).

#pragma once

#include "product.h"

constexpr Int QUERIES = 16 * ROWS, KEYS = 256;  // a block of scores; of short rows a smaller one

struct alignas(64) Workspace {
  float scores[QUERIES * KEYS], gradient[QUERIES * KEYS], out[QUERIES * KEYS];
  float most[QUERIES], sum[QUERIES];
};

thread_local const std::unique_ptr<Workspace> workspace(new Workspace);

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
      const Matrix pattern = {own.scores, KEYS, 1}, before = begun ? Matrix{own.out, H, 1} : NOTHING;
      multiply(rows, H, n, pattern, key(v, b, s, head / G), own.out, H, before);
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
          float sum = 0;
#pragma omp simd reduction(+ : sum)
          for (Int h = 0; h < H; h++) sum += x[h] * y[h];
          own.sum[r] = sum;
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
          const Matrix to_v = key(dv, b, s, pair), to_k = key(dk, b, s, pair), to_q = query(dq, b, i, head);
          multiply(n, H, rows, pattern.transposed(), of_out, (float*)to_v.at, K * H, to_v);
          multiply(n, H, rows, of_scores.transposed(), queries, (float*)to_k.at, K * H, to_k);
          multiply(rows, H, n, of_scores, keys, (float*)to_q.at, K * G * H, begun ? to_q : NOTHING);
          begun = true;
        });
      }
  }
};
