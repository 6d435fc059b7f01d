// What is compiled once per instruction set, with RF_VARIANT as its namespace, of int8.
#include "direct.h"
#include "gemm.h"
#include "grouped_int8.h"
#include "pool.h"
#include "requantise.h"
#include "stem.h"
#include "variant.h"

namespace RF_VARIANT {

static int supports(const rf_shape* s, int algorithm) {
  switch (algorithm) {
    case RF_GEMM: return !s->pool || s->groups == 1;
    case RF_DIRECT: return direct_supports(*s);
    case RF_GROUPED: return grouped_int8_supports(*s);
  }
  return 0;
}

static int64_t packed_bytes(const rf_shape* s, int algorithm) {
  return algorithm == RF_GROUPED ? grouped_int8_packed_bytes(*s) : gemm_packed_bytes<Int8>(*s, algorithm == RF_DIRECT);
}

static void pack(const rf_shape* s, int algorithm, const rf_weight* weight, void* packed, int thread, int threads) {
  const Team team{thread, threads};
  if (algorithm == RF_GROUPED) return grouped_int8_pack({*s, *weight}, (Int8::Packed*)packed, team);
  gemm_pack<Int8>({*s, *weight}, packed, team, algorithm == RF_DIRECT);
}

static void convolve(const rf_op& op, const ConvTask<Int8>& task, Team team) {
  if (op.shape.pool) return stem(task, op.algorithm, team);
  if (op.algorithm == RF_DIRECT) return direct_conv(task, team);
  if (op.algorithm == RF_GROUPED) return grouped_int8(task, team);
  gemm_conv(task, team);
}

static void run(const rf_op* op, void* const* buffers, int thread, int threads) {
  const rf_shape& s = op->shape;
  const Team team{thread, threads};
  const auto *x = rf_place<int8_t>(op->x, buffers), *residual = rf_place<int8_t>(op->residual, buffers);
  auto* y = rf_place<int8_t>(op->y, buffers);
  switch (op->kind) {
    case RF_CONV: {
      const Requantise requantise{op->scale, op->factor, op->y_dtype == RF_FLOAT32};
      return convolve(*op, {s, x, (const Int8::Packed*)op->packed, op->shift, residual, y, 0, {}, {}, requantise}, team);
    }
    case RF_MAX_POOL: return pool<Int8>(s, x, y, false, team);
    case RF_AVG_POOL: return pool<Int8>(s, x, y, true, team);
    case RF_TO_NHWC: return to_nhwc(s, x, y, team);
    case RF_TO_NCHW: return to_nchw(s, x, y, team);
    case RF_QUANTISE: return scale_all<Float32, Int8>(s, (const float*)x, op->factor, y, team);
    case RF_DEQUANTISE: return scale_all<Int8, Float32>(s, x, op->factor, (float*)y, team);
  }
}

extern const Int8Variant int8_variant = {supports, packed_bytes, pack, run};

}  // namespace RF_VARIANT
