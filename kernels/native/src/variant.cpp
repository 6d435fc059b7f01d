// Everything that is compiled once per instruction set, with RF_VARIANT as its namespace.
#include "variant.h"

#include "gemm.h"
#include "grouped.h"
#include "pool.h"
#include "stem.h"
#include "winograd.h"

namespace RF_VARIANT {

static int supports(const rf_shape* s, int algorithm) {
  const bool winograd = s->r == 3 && s->s == 3 && s->stride_h == 1 && s->stride_w == 1 && s->dilation_h == 1 &&
                        s->dilation_w == 1 && s->groups == 1 && !s->pool;
  if (s->dtype != RF_FLOAT32) return 0;
  switch (algorithm) {
    case RF_GEMM: return !s->pool || s->groups == 1;
    case RF_WINOGRAD2:
    case RF_WINOGRAD4: return winograd;
    case RF_GROUPED: return grouped_supports(*s);
    case RF_DIRECT: return direct_supports(*s);
  }
  return 0;
}

static int64_t packed_bytes(const rf_shape* s, int algorithm) {
  switch (algorithm) {
    case RF_GEMM:
    case RF_DIRECT: return gemm_packed_floats(*s) * 4;
    case RF_WINOGRAD2: return Winograd<2>::packed_floats(*s) * 4;
    case RF_WINOGRAD4: return Winograd<4>::packed_floats(*s) * 4;
    case RF_GROUPED: return grouped_packed_floats(*s) * 4;
  }
  return 0;
}

static void pack(const rf_shape* s, int algorithm, const double* weight, void* packed) {
  float* to = (float*)packed;
  switch (algorithm) {
    case RF_GEMM:
    case RF_DIRECT: return gemm_pack(*s, weight, to);
    case RF_WINOGRAD2: return Winograd<2>::pack(*s, weight, to);
    case RF_WINOGRAD4: return Winograd<4>::pack(*s, weight, to);
    case RF_GROUPED: return grouped_pack(*s, weight, to);
  }
}

static void convolve(const rf_op& op, const float* x, const float* residual, float* y, Team team) {
  const rf_shape& s = op.shape;
  const float* packed = (const float*)op.packed;
  if (s.pool) return stem(s, op.algorithm, x, packed, op.shift, y, team);
  switch (op.algorithm) {
    case RF_GEMM: return gemm_conv(s, x, packed, op.shift, residual, y, team);
    case RF_WINOGRAD2: return Winograd<2>::conv(s, x, packed, op.shift, residual, y, team);
    case RF_WINOGRAD4: return Winograd<4>::conv(s, x, packed, op.shift, residual, y, team);
    case RF_GROUPED: return grouped(s, x, packed, op.shift, residual, y, team);
    case RF_DIRECT: return direct_conv(s, x, packed, op.shift, residual, y, team);
  }
}

static void run(const rf_op* op, void* const* buffers, int thread, int threads) {
  auto at = [&](const rf_ref& ref) {
    return ref.buffer < 0 ? nullptr : (float*)((char*)buffers[ref.buffer] + ref.offset);
  };
  const float *x = at(op->x), *residual = at(op->residual);
  float* y = at(op->y);
  const Team team{thread, threads};
  switch (op->kind) {
    case RF_CONV: return convolve(*op, x, residual, y, team);
    case RF_MAX_POOL: return pool(op->shape, x, y, false, team);
    case RF_AVG_POOL: return pool(op->shape, x, y, true, team);
    case RF_ADD: return add(op->shape, x, residual, y, team);
    case RF_TO_NHWC: return to_nhwc(op->shape, x, y, team);
    case RF_TO_NCHW: return to_nchw(op->shape, x, y, team);
  }
}

#define RF_NAME_OF(variant) #variant
#define RF_NAME(variant) RF_NAME_OF(variant)

extern const Variant variant = {RF_NAME(RF_VARIANT), supports, packed_bytes, pack, run};

}  // namespace RF_VARIANT
