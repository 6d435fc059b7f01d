// Everything that is compiled once per instruction set, with RF_VARIANT as its namespace.
#include "variant.h"

#include "digest.h"
#include "gemm.h"
#include "gram.h"
#include "grouped.h"
#include "passes.h"
#include "pool.h"
#include "stem.h"
#include "winograd.h"
#include "winograd_wgrad.h"

namespace RF_VARIANT {

static bool winograd(int algorithm) { return algorithm == RF_WINOGRAD2 || algorithm == RF_WINOGRAD4; }

static int supports(const rf_shape* s, int algorithm) {
#if defined(__AVX512BF16__)
  if (s->dtype == RF_BFLOAT16) return algorithm == RF_GEMM;
#endif
  if (s->dtype == RF_INT8) return (algorithm == RF_GEMM && (!s->pool || s->groups == 1)) || (algorithm == RF_DIRECT && direct_supports(*s));
  if (s->dtype != RF_FLOAT32 || (s->stride_h < 0 && !winograd(algorithm))) return 0;
  switch (algorithm) {
    case RF_GEMM: return !s->pool || s->groups == 1;
    case RF_WINOGRAD2:
    case RF_WINOGRAD4: return winograd_supports(*s);
    case RF_GROUPED: return grouped_supports(*s);
    case RF_DIRECT: return direct_supports(*s);
    case RF_WINOGRAD_STEM: return WinogradStem::supports(*s);
  }
  return 0;
}

// Calls use(conv) with the WinogradConv of an algorithm and a shape.
template <class Use> static auto with_winograd(const rf_shape& s, int algorithm, Use use) {
  const bool small = algorithm == RF_WINOGRAD2;
  if (s.stride_h == 1) return small ? use(WinogradConv<2, 1>()) : use(WinogradConv<4, 1>());
  if (s.stride_h == 2) return small ? use(WinogradConv<2, 2>()) : use(WinogradConv<4, 2>());
  return small ? use(WinogradConv<2, -2>()) : use(WinogradConv<4, -2>());
}

static int64_t products(const rf_shape* s, int algorithm) {
  switch (algorithm) {
    case RF_WINOGRAD2:
    case RF_WINOGRAD4: return with_winograd(*s, algorithm, [&](auto w) { return w.products(*s); });
    case RF_WINOGRAD_STEM: return WinogradStem::products(*s);
  }
  return int64_t(s->n) * s->p * s->q * s->r * s->s;
}

static int64_t packed_bytes(const rf_shape* s, int algorithm) {
#if defined(__AVX512BF16__)
  if (s->dtype == RF_BFLOAT16) return gemm_packed_bytes<BFloat16>(*s);
#endif
  if (s->dtype == RF_INT8) return gemm_packed_bytes<Int8>(*s, algorithm == RF_DIRECT);
  switch (algorithm) {
    case RF_GEMM:
    case RF_DIRECT: return gemm_packed_bytes<Float32>(*s);
    case RF_WINOGRAD2:
    case RF_WINOGRAD4: return with_winograd(*s, algorithm, [&](auto w) { return w.floats(*s) * 4; });
    case RF_GROUPED: return grouped_packed_floats(*s) * 4;
    case RF_WINOGRAD_STEM: return WinogradStem::packed_floats(*s) * 4;
  }
  return 0;
}

static void pack(const rf_shape* s, int algorithm, const rf_weight* weight, void* packed, int thread, int threads) {
  const WeightSource from{*s, *weight};
  const Team team{thread, threads};
#if defined(__AVX512BF16__)
  if (s->dtype == RF_BFLOAT16) return gemm_pack<BFloat16>(from, packed, team);
#endif
  if (s->dtype == RF_INT8) return gemm_pack<Int8>(from, packed, team, algorithm == RF_DIRECT);
  float* to = (float*)packed;
  switch (algorithm) {
    case RF_GEMM:
    case RF_DIRECT: return gemm_pack<Float32>(from, to, team);
    case RF_WINOGRAD2:
    case RF_WINOGRAD4: return with_winograd(*s, algorithm, [&](auto w) { w.pack(from, to, team); });
    case RF_GROUPED: return grouped_pack(from, to, team);
    case RF_WINOGRAD_STEM: return WinogradStem::pack(from, to, team);
  }
}

template <class E> static void convolve(const rf_op& op, const ConvTask<E>& task, Team team) {
  if (op.shape.pool) return stem(task, op.algorithm, team);
  if (op.algorithm == RF_GEMM) return gemm_conv(task, team);
  if constexpr (E::DIRECT)
    if (op.algorithm == RF_DIRECT) return direct_conv(task, team);
  if constexpr (E::WINOGRAD) {
    switch (op.algorithm) {
      case RF_WINOGRAD2:
      case RF_WINOGRAD4: return with_winograd(op.shape, op.algorithm, [&](auto w) { w.conv(task, team); });
      case RF_GROUPED: return grouped(task, team);
      case RF_WINOGRAD_STEM: return WinogradStem::conv(task, team);
    }
  }
}

template <class T> static T* place(const rf_ref& ref, void* const* buffers) {
  return ref.buffer < 0 ? nullptr : (T*)((char*)buffers[ref.buffer] + ref.offset);
}

static void convert(const rf_op& op, void* const* buffers, Team team) {
  if (op.kind == RF_QUANTISE)
    scale_all<Float32, Int8>(op.shape, place<float>(op.x, buffers), op.factor, place<int8_t>(op.y, buffers), team);
  else
    scale_all<Int8, Float32>(op.shape, place<int8_t>(op.x, buffers), op.factor, place<float>(op.y, buffers), team);
}

template <class E> static void run_as(const rf_op& op, void* const* buffers, Team team) {
  using Element = typename E::Element;
  const auto *x = place<Element>(op.x, buffers), *residual = place<Element>(op.residual, buffers);
  auto* y = place<Element>(op.y, buffers);
  const rf_shape& s = op.shape;
  switch (op.kind) {
    case RF_CONV: {
      const Prologue prologue{op.x_scale, op.x_shift};
      const Spread spread{op.y_h, op.y_w, op.step_h, op.step_w};
      const Requantise requantise{op.scale, op.factor, s.dtype == RF_INT8 && op.y_dtype == RF_FLOAT32};
      const auto* packed = (const typename E::Packed*)op.packed;
      return convolve<E>(op, {s, x, packed, op.shift, residual, y, 0, prologue, spread, requantise}, team);
    }
    case RF_MAX_POOL: return pool<E>(s, x, y, false, team);
    case RF_AVG_POOL: return pool<E>(s, x, y, true, team);
    case RF_ADD: return add<E>(s, x, residual, y, team);
    case RF_TO_NHWC: return to_nhwc(s, x, y, team);
    case RF_TO_NCHW: return to_nchw(s, x, y, team);
    case RF_QUANTISE:
    case RF_DEQUANTISE: return;  // no operations on E
  }
}

static void run(const rf_op* op, void* const* buffers, int thread, int threads) {
#if defined(__AVX512BF16__)
  if (op->shape.dtype == RF_BFLOAT16) return run_as<BFloat16>(*op, buffers, {thread, threads});
#endif
  if (op->kind == RF_QUANTISE || op->kind == RF_DEQUANTISE) return convert(*op, buffers, {thread, threads});
  if (op->shape.dtype == RF_INT8) return run_as<Int8>(*op, buffers, {thread, threads});
  run_as<Float32>(*op, buffers, {thread, threads});
}

static int wgrad_supports(const rf_shape* s, int algorithm) {
  if (s->dtype != RF_FLOAT32) return 0;
  switch (algorithm) {
    case RF_GEMM: return 1;
    case RF_WINOGRAD2: return WgradWinograd<Filter<2, 1>>::supports(*s);
    case RF_WINOGRAD4: return WgradWinograd<Filter<4, 1>>::supports(*s);
  }
  return 0;
}

// Calls use(wgrad) with the algorithm of a call.
template <class Use> static auto with_wgrad(const WgradCall& c, void* workspace, Use use) {
  const WgradTask task{c.shape, c.dy, c.x, {c.scale, c.shift}, c.dw, (float*)workspace};
  switch (c.algorithm) {
    case RF_WINOGRAD2: return use(WgradWinograd<Filter<2, 1>>(task));
    case RF_WINOGRAD4: return use(WgradWinograd<Filter<4, 1>>(task));
  }
  return use(WgradGemm(task));
}

static size_t wgrad_bytes(const WgradCall& call) {
  return with_wgrad(call, nullptr, [](const auto& wgrad) { return wgrad.floats() * sizeof(float); });
}

static void wgrad(const WgradCall& call, void* workspace, int thread, int threads, Barrier& barrier) {
  with_wgrad(call, workspace, [&](const auto& wgrad) { wgrad.run({thread, threads}, barrier); });
}

static GramTask gram_task(const GramCall& c, void* workspace) {
  return {c.shape, c.x, {c.scale, c.shift}, c.mean, c.covariance, (float*)workspace};
}

static size_t gram_bytes(const GramCall& call) {
  const GramTask task = gram_task(call, nullptr);
  return Gram(task).floats() * sizeof(float);
}

static void gram(const GramCall& call, void* workspace, int thread, int threads, Barrier& barrier) {
  const GramTask task = gram_task(call, workspace);
  Gram(task).run({thread, threads}, barrier);
}

static double multiply_adds(int64_t rounds) {
  constexpr int CHAINS = 12;  // enough to hide the latency
  vec sum[CHAINS];
  for (int j = 0; j < CHAINS; j++) sum[j] = splat(float(j));  // all different, or the compiler would keep one
  vec x = in_register(splat(1e-9f)), w = in_register(splat(1.0f));
  for (int64_t i = 0; i < rounds; i++)
#pragma GCC unroll 16
    for (int j = 0; j < CHAINS; j++) sum[j] = in_register(multiply_add(x, sum[j], w));
  vec total = {};
  for (int j = 0; j < CHAINS; j++) total += sum[j];
  return 2.0 * VL * CHAINS * double(rounds) + 0.0 * double(total[0]);  // the sums are used, so they must be made
}

#define RF_NAME_OF(variant) #variant
#define RF_NAME(variant) RF_NAME_OF(variant)

extern const Variant variant = {
    RF_NAME(RF_VARIANT), supports,    products,       packed_bytes, pack,  multiply_adds, digest, run, pass,
    pass_partials,       finish_pass, wgrad_supports, wgrad_bytes,  wgrad, gram_bytes,    gram,
};

}  // namespace RF_VARIANT
