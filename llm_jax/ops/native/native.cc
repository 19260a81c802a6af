// Native code for a CPU, in float32, as XLA calls it. Each header says what it computes; `build.py` compiles this file.

#include "activation.h"
#include "adamw.h"
#include "attention.h"
#include "few_rows.h"
#include "norm.h"
#include "softmax.h"

using Pool = ffi::ThreadPool;
using Tasks = std::vector<std::function<void()>>;
using Integers32 = ffi::Buffer<ffi::S32>;
using Segments = Integers32;  // [B, L], or empty
constexpr Int GRAIN = 1 << 14;  // numbers that a thread takes at a time, where each is computed by itself

void run(Pool& pool, const Tasks& tasks) {
  parallel(pool, tasks.size(), [&](Int n) { tasks[n](); });
}

// Weights [K N], or where `transposed`, [N K], by which one x[M K] is multiplied.
Matrix weight(const Buffer& w, bool transposed) {
  const auto d = w.dimensions();
  return transposed ? Matrix{w.typed_data(), 1, d[1]} : Matrix{w.typed_data(), d[1], 1};
}

// x w + bias for each of some weights, which come before their biases; a bias may be empty.
ffi::Error Linear(Pool pool, Buffer x, ffi::RemainingArgs given, ffi::RemainingRets out, bool transposed) {
  const Int M = x.dimensions()[0], K = x.dimensions()[1], n = out.size();
  Tasks tasks;
  for (Int i = 0; i < n; i++) {
    const Buffer w = *given.get<Buffer>(i), bias = *given.get<Buffer>(n + i), y = **out.get<Buffer>(i);
    const Matrix more = bias.element_count() ? Matrix{bias.typed_data(), 0, 1} : NOTHING;
    const Matrix left = {x.typed_data(), K, 1};
    multiply_by_pieces(tasks, M, y.dimensions()[1], {{K, left, weight(w, transposed)}}, y.typed_data(), more,
                       pool.num_threads());
  }
  run(pool, tasks);
  return ffi::Error::Success();
}

// The gradients of x, the weights and the biases, given the weights and the gradients of their outputs, g[M N].
ffi::Error LinearBackward(Pool pool, Buffer x, ffi::RemainingArgs given, Result dx, ffi::RemainingRets out,
                          bool transposed) {
  const Int M = x.dimensions()[0], K = x.dimensions()[1], n = given.size() / 2, threads = pool.num_threads();
  const Matrix of_x = {x.typed_data(), K, 1};
  std::vector<Factors> summed;
  Tasks tasks;
  for (Int i = 0; i < n; i++) {
    const Buffer w = *given.get<Buffer>(i), g = *given.get<Buffer>(n + i);
    const Buffer dw = **out.get<Buffer>(i), db = **out.get<Buffer>(n + i);
    const Int N = g.dimensions()[1];
    const Matrix of_g = {g.typed_data(), N, 1};
    summed.push_back({N, of_g, weight(w, transposed).transposed()});
    if (transposed)
      multiply_by_pieces(tasks, N, K, {{M, of_g.transposed(), of_x}}, dw.typed_data(), NOTHING, threads);
    else
      multiply_by_pieces(tasks, K, N, {{M, of_x.transposed(), of_g}}, dw.typed_data(), NOTHING, threads);
    float* sums = db.typed_data();
    for (Int j = 0; j < static_cast<Int>(db.element_count()); j += STRIPE)
      tasks.push_back([=] { sum_columns(of_g.from(0, j), M, std::min(STRIPE, N - j), sums + j); });
  }
  multiply_by_pieces(tasks, M, K, summed, dx->typed_data(), NOTHING, threads);
  run(pool, tasks);
  return ffi::Error::Success();
}

// x[M I] w[I O], where w is float32, bfloat16 or int8.
ffi::Error Few(Pool pool, Buffer x, ffi::AnyBuffer w, Result y) {
  const Int M = x.dimensions()[0], I = w.dimensions()[0], O = w.dimensions()[1];
  const float* left = x.typed_data();
  float* out = y->typed_data();
  if (I == 0) std::fill_n(out, M * O, 0.0f);
  switch (w.element_type()) {
    case ffi::F32: multiply_few(pool, FewRows<float>{M, I, O, left, (const float*)w.untyped_data(), out}); break;
    case ffi::BF16:
      multiply_few(pool, FewRows<std::uint16_t>{M, I, O, left, (const std::uint16_t*)w.untyped_data(), out});
      break;
    case ffi::S8:
      multiply_few(pool, FewRows<std::int8_t>{M, I, O, left, (const std::int8_t*)w.untyped_data(), out});
      break;
    default: return ffi::Error::InvalidArgument("weights are float32, bfloat16 or int8");
  }
  return ffi::Error::Success();
}

Attention attention_of(const Buffer& q, const Segments& segments, float scale, bool causal, Int window) {
  const auto d = q.dimensions();
  const auto* tags = segments.element_count() ? segments.typed_data() : nullptr;
  return {d[0], d[1], d[2], d[3], d[4], scale, causal, window, tags};
}

ffi::Error Forward(Pool pool, Buffer q, Buffer k, Buffer v, Segments segments, Result out, Result lse, float scale,
                   bool causal, Int window) {
  const Attention a = attention_of(q, segments, scale, causal, window);
  const Int heads = a.K * a.G, blocks = (a.L + a.block() - 1) / a.block();
  parallel(pool, a.B * heads * blocks, [&](Int n) {
    a.forward(q.typed_data(), k.typed_data(), v.typed_data(), out->typed_data(), lse->typed_data(),
              n / blocks / heads, n / blocks % heads, n % blocks * a.block());
  });
  return ffi::Error::Success();
}

ffi::Error Backward(Pool pool, Buffer q, Buffer k, Buffer v, Buffer out, Buffer lse, Buffer g, Segments segments,
                    Result dq, Result dk, Result dv, float scale, bool causal, Int window) {
  const Attention a = attention_of(q, segments, scale, causal, window);
  parallel(pool, a.B * a.K, [&](Int n) {
    a.backward(q.typed_data(), k.typed_data(), v.typed_data(), out.typed_data(), lse.typed_data(), g.typed_data(),
               dq->typed_data(), dk->typed_data(), dv->typed_data(), n / a.K, n % a.K);
  });
  return ffi::Error::Success();
}

Norm norm_of(const Buffer& x, const Buffer& scale, bool center, float eps) {
  const Int D = scale.element_count();
  return {static_cast<Int>(x.element_count()) / D, D, center, eps};
}

ffi::Error NormForward(Pool pool, Buffer x, Buffer scale, Buffer bias, Result y, Result mean, Result inverse, float eps,
                       bool center) {
  const Norm norm = norm_of(x, scale, center, eps);
  parallel(pool, norm.blocks(), [&](Int n) {
    const Int i = n * norm.BLOCK * norm.D;
    norm.forward(x.typed_data() + i, scale.typed_data(), bias.typed_data(), y->typed_data() + i, mean->typed_data(),
                 inverse->typed_data(), n);
  });
  return ffi::Error::Success();
}

ffi::Error NormBackward(Pool pool, Buffer x, Buffer scale, Buffer mean, Buffer inverse, Buffer g, Result dx,
                        Result of_scale, Result of_bias, float eps, bool center) {
  const Norm norm = norm_of(x, scale, center, eps);
  std::vector<float> sums(norm.blocks() * 2 * norm.D);  // of each block: whoever computes it, they are added in order
  parallel(pool, norm.blocks(), [&](Int n) {
    const Int i = n * norm.BLOCK * norm.D;
    float* own = sums.data() + n * 2 * norm.D;
    norm.backward(x.typed_data() + i, scale.typed_data(), mean.typed_data(), inverse.typed_data(), g.typed_data() + i,
                  dx->typed_data() + i, own, own + norm.D, n);
  });
  std::fill_n(of_scale->typed_data(), norm.D, 0.0f), std::fill_n(of_bias->typed_data(), norm.D, 0.0f);
  for (Int n = 0; n < norm.blocks(); n++)
    for (Int j = 0; j < norm.D; j++) {
      of_scale->typed_data()[j] += sums[n * 2 * norm.D + j];
      of_bias->typed_data()[j] += sums[(n * 2 + 1) * norm.D + j];
    }
  return ffi::Error::Success();
}

// f(x), or where g is not empty, the gradient of x given that of the output, g.
ffi::Error Activate(Pool pool, Buffer x, Buffer g, Result out, float slope, float cubic) {
  const Activation f = {slope, cubic};
  const Int size = x.element_count();
  const float *of_out = g.typed_data(), *from = x.typed_data();
  parallel(pool, (size + GRAIN - 1) / GRAIN, [&](Int n) {
    const Int begin = n * GRAIN, end = std::min(size, begin + GRAIN);
    if (g.element_count())
      by_vectors(begin, end, from, out->typed_data(), [&](Int i, Vector x, bool all) {
        return f.gradient(x) * (all ? *(const Unaligned*)(of_out + i) : Vector{} + of_out[i]);
      });
    else
      by_vectors(begin, end, from, out->typed_data(), [&](Int, Vector x, bool) { return f.value(x); });
  });
  return ffi::Error::Success();
}

// Of each row of logits[T V]: log(sum(exp)), and the logit of its target, 0 if that is none of the V.
ffi::Error LogZ(Pool pool, Buffer logits, Integers32 targets, Result log_z, Result picked) {
  const Int T = targets.element_count(), V = logits.element_count() / std::max<Int>(T, 1);
  parallel(pool, T, [&](Int i) {
    const float* row = logits.typed_data() + i * V;
    const Int target = targets.typed_data()[i];
    log_z->typed_data()[i] = log_sum_exp(row, V);
    picked->typed_data()[i] = target >= 0 && target < V ? row[target] : 0;
  });
  return ffi::Error::Success();
}

ffi::Error LogZBackward(Pool pool, Buffer logits, Integers32 targets, Buffer log_z, Buffer of_log_z, Buffer of_picked,
                        Result dx) {
  const Int T = targets.element_count(), V = logits.element_count() / std::max<Int>(T, 1);
  parallel(pool, T, [&](Int i) {
    log_sum_exp_gradient(logits.typed_data() + i * V, V, log_z.typed_data()[i], targets.typed_data()[i],
                         of_log_z.typed_data()[i], of_picked.typed_data()[i], dx->typed_data() + i * V);
  });
  return ffi::Error::Success();
}

struct Piece {  // of an array among many
  Int array, begin, end;
};

std::vector<Piece> pieces_of(const std::vector<Int>& sizes) {
  std::vector<Piece> found;
  for (std::size_t a = 0; a < sizes.size(); a++)
    for (Int i = 0; i < sizes[a]; i += GRAIN) found.push_back({static_cast<Int>(a), i, std::min(sizes[a], i + GRAIN)});
  return found;
}

// The sum of f(piece), computed by all threads and added in one order.
template <typename F>
double sum(Pool& pool, const std::vector<Piece>& pieces, const F& f) {
  std::vector<double> found(pieces.size());
  parallel(pool, pieces.size(), [&](Int n) { found[n] = f(pieces[n]); });
  return std::accumulate(found.begin(), found.end(), 0.0);
}

// The norm of all arrays together.
ffi::Error GlobalNorm(Pool pool, ffi::RemainingArgs arrays, Result norm) {
  std::vector<const float*> at;
  std::vector<Int> sizes;
  for (std::size_t a = 0; a < arrays.size(); a++) {
    const Buffer array = *arrays.get<Buffer>(a);
    at.push_back(array.typed_data()), sizes.push_back(array.element_count());
  }
  const auto square = [&](const Piece& of) { return squares(at[of.array] + of.begin, of.end - of.begin); };
  *norm->typed_data() = std::sqrt(sum(pool, pieces_of(sizes), square));
  return ffi::Error::Success();
}

// The parameters, their first and second moments, and their gradients, n arrays each: the first three are updated in
// place, unless `given` says 0 or the norm of the new parameters is not finite; then `done` is 0.
ffi::Error Update(Pool pool, Buffer given, ffi::RemainingArgs arrays, Result done, ffi::RemainingRets out, float b1,
                  float b2, float eps, ffi::Span<const float> decay) {
  const std::size_t n = decay.size();
  std::vector<Parameter> all;
  std::vector<Int> sizes;
  for (std::size_t a = 0; a < n; a++) {
    const auto of = [&](std::size_t kind) { return (*out.get<Buffer>(kind * n + a))->typed_data(); };
    const Buffer g = *arrays.get<Buffer>(3 * n + a);
    sizes.push_back(g.element_count());
    all.push_back({of(0), of(1), of(2), g.typed_data(), sizes[a], decay[a]});
  }
  const float* now = given.typed_data();
  const AdamW adamw = {now[1], now[2], b1, b2, eps, now[3], now[4]};
  const auto pieces = pieces_of(sizes);
  const auto look = [&](const Piece& of) { return adamw.update<false>(all[of.array], of.begin, of.end); };
  const auto store = [&](const Piece& of) { return adamw.update<true>(all[of.array], of.begin, of.end); };
  const bool finite = now[0] && std::isfinite(static_cast<float>(sum(pool, pieces, look)));
  if (finite) sum(pool, pieces, store);
  *done->typed_data() = finite;
  return ffi::Error::Success();
}

#define BIND ffi::Ffi::Bind().Ctx<Pool>()
#define IN(T) .Arg<T>()
#define OUT .Ret<Buffer>()
#define RULES .Attr<float>("scale").Attr<bool>("causal").Attr<Int>("window")
#define NORM .Attr<float>("eps").Attr<bool>("center")
#define XYZ IN(Buffer) IN(Buffer) IN(Buffer)
XLA_FFI_DEFINE_HANDLER_SYMBOL(llm_jax_linear, Linear,
                              BIND IN(Buffer).RemainingArgs().RemainingRets().Attr<bool>("transposed"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(llm_jax_linear_backward, LinearBackward,
                              BIND IN(Buffer).RemainingArgs() OUT.RemainingRets().Attr<bool>("transposed"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(llm_jax_attention, Forward, BIND XYZ IN(Segments) OUT OUT RULES);
XLA_FFI_DEFINE_HANDLER_SYMBOL(llm_jax_attention_backward, Backward, BIND XYZ XYZ IN(Segments) OUT OUT OUT RULES);
XLA_FFI_DEFINE_HANDLER_SYMBOL(llm_jax_norm, NormForward, BIND XYZ OUT OUT OUT NORM);
XLA_FFI_DEFINE_HANDLER_SYMBOL(llm_jax_norm_backward, NormBackward, BIND XYZ IN(Buffer) IN(Buffer) OUT OUT OUT NORM);
XLA_FFI_DEFINE_HANDLER_SYMBOL(llm_jax_activation, Activate,
                              BIND IN(Buffer) IN(Buffer) OUT.Attr<float>("slope").Attr<float>("cubic"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(llm_jax_global_norm, GlobalNorm, BIND.RemainingArgs() OUT);
XLA_FFI_DEFINE_HANDLER_SYMBOL(llm_jax_adamw, Update,
                              BIND IN(Buffer).RemainingArgs() OUT.RemainingRets().Attr<float>("b1").Attr<float>("b2")
                                  .Attr<float>("eps").Attr<ffi::Span<const float>>("decay"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(llm_jax_log_z, LogZ, BIND IN(Buffer) IN(Integers32) OUT OUT);
XLA_FFI_DEFINE_HANDLER_SYMBOL(llm_jax_log_z_backward, LogZBackward, BIND IN(Buffer) IN(Integers32) XYZ OUT);
XLA_FFI_DEFINE_HANDLER_SYMBOL(llm_jax_few_rows, Few, BIND IN(Buffer) IN(ffi::AnyBuffer) OUT);
