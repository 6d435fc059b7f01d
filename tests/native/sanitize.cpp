// Random operations on operands of exactly their size on the heap, against double loops: what AddressSanitizer and
// UndefinedBehaviorSanitizer have to say about the kernels. Prints the number of cases, exits 1 at a wrong result.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>

#include "abi.h"

namespace {

std::mt19937 source(1);

int between(int low, int high) { return std::uniform_int_distribution<int>(low, high)(source); }

// Exactly `count` elements between the red zones of the heap.
template <class T> std::unique_ptr<T[]> randoms(int64_t count) {
  std::normal_distribution<double> normal;
  std::unique_ptr<T[]> values(new T[count]);
  for (int64_t i = 0; i < count; i++) values[i] = T(normal(source));
  return values;
}

rf_shape random_conv() {
  rf_shape s{};
  const int kind = between(0, 3);  // anything, Winograd's, grouped, an RGB image
  s.n = between(1, 2);
  s.c = between(1, 40), s.k = between(1, 40), s.groups = 1;
  s.r = between(1, 5), s.s = between(1, 5);
  s.stride_h = between(1, 3), s.stride_w = between(1, 3);
  s.dilation_h = between(1, 2), s.dilation_w = between(1, 2);
  s.pad_h = between(0, 3), s.pad_w = between(0, 3);
  if (kind == 1) {
    s.r = s.s = 3;
    s.stride_h = s.stride_w = between(1, 2);
    s.dilation_h = s.dilation_w = 1;
    if (between(0, 2) == 0) s.n = 8, s.c = between(1, 18);  // blocks of one kind of tiles, and of several
  } else if (kind == 2) {
    s.groups = 16 * between(1, 2);
    s.c = s.groups << between(0, 3);
    s.k = between(0, 3) ? s.c : s.groups;
  } else if (kind == 3) {
    s.c = 3, s.stride_h = between(1, 3), s.stride_w = 2;
    s.r = between(1, 8), s.s = between(1, 8);
    s.dilation_h = s.dilation_w = 1;
  }
  const int high = s.dilation_h * (s.r - 1) + 1, wide = s.dilation_w * (s.s - 1) + 1;
  s.h = between(1, 11) + (high > 2 * s.pad_h ? high - 2 * s.pad_h - 1 : 0);
  s.w = between(1, 11) + (wide > 2 * s.pad_w ? wide - 2 * s.pad_w - 1 : 0);
  s.p = (s.h + 2 * s.pad_h - high) / s.stride_h + 1;
  s.q = (s.w + 2 * s.pad_w - wide) / s.stride_w + 1;
  s.relu = between(0, 1);
  s.pool = s.groups == 1 && between(0, 3) == 0;
  return s;
}

struct Conv {
  rf_shape s;
  std::unique_ptr<float[]> x, shift, residual;  // residual may be null
  std::unique_ptr<float[]> x_scale, x_shift;    // both may be null
  std::unique_ptr<double[]> weight;

  // One output before the pool, and in `size` the sum of the sizes of what was added up.
  double at(int n, int p, int q, int k, double& size) const {
    const int cin = s.c / s.groups, first = k / (s.k / s.groups) * cin;
    double sum = shift[k];
    size = std::fabs(sum);
    for (int r = 0; r < s.r; r++)
      for (int t = 0; t < s.s; t++) {
        const int y = p * s.stride_h - s.pad_h + r * s.dilation_h, z = q * s.stride_w - s.pad_w + t * s.dilation_w;
        if (y < 0 || y >= s.h || z < 0 || z >= s.w) continue;
        for (int c = 0; c < cin; c++) {
          double pixel = x[((int64_t(n) * s.h + y) * s.w + z) * s.c + first + c];
          if (x_scale) pixel = std::fmax(0, pixel * x_scale[first + c] + x_shift[first + c]);
          const double product = weight[((int64_t(k) * cin + c) * s.r + r) * s.s + t] * pixel;
          sum += product;
          size += std::fabs(product);
        }
      }
    if (residual) {
      const double more = residual[((int64_t(n) * s.p + p) * s.q + q) * s.k + k];
      sum += more, size += std::fabs(more);
    }
    return s.relu && sum < 0 ? 0 : sum;
  }

  double pooled(int n, int i, int j, int k, double& size) const {
    double most = -INFINITY;
    size = 0;
    for (int p = 2 * i - 1; p <= 2 * i + 1; p++)
      for (int q = 2 * j - 1; q <= 2 * j + 1; q++) {
        if (p < 0 || p >= s.p || q < 0 || q >= s.q) continue;
        double one;
        most = std::fmax(most, at(n, p, q, k, one));
        size = std::fmax(size, one);
      }
    return most;
  }
};

void run(const rf_op& op, const void* x, const void* residual, void* y) {
  void* buffers[3] = {const_cast<void*>(x), const_cast<void*>(residual), y};
  rf_op here = op;
  here.x = {0, 0, 0}, here.residual = {residual ? 1 : -1, 0, 0}, here.y = {2, 0, 0};
  rf_run(&here, 1, buffers, 2, nullptr);
}

bool check(const Conv& conv, int algorithm) {
  const rf_shape& s = conv.s;
  const int high = s.pool ? (s.p - 1) / 2 + 1 : s.p, wide = s.pool ? (s.q - 1) / 2 + 1 : s.q;
  const int64_t count = int64_t(s.n) * high * wide * s.k;
  std::unique_ptr<float[]> y(new float[count]);
  std::unique_ptr<char[]> packed(new char[rf_packed_bytes(&s, algorithm)]);
  const int64_t taps = s.r * s.s, one = s.c / s.groups * taps;
  const rf_weight weight{conv.weight.get(), nullptr, s.k / s.groups * one, one, taps, s.s, 1, 1, 0};
  rf_pack(&s, algorithm, &weight, packed.get(), 2);
  rf_op op{};
  op.kind = RF_CONV, op.algorithm = algorithm, op.shape = s, op.packed = packed.get(), op.shift = conv.shift.get();
  op.x_scale = conv.x_scale.get(), op.x_shift = conv.x_shift.get();
  run(op, conv.x.get(), conv.residual.get(), y.get());
  for (int64_t i = 0; i < count; i++) {
    const int k = int(i % s.k), q = int(i / s.k % wide), p = int(i / s.k / wide % high), n = int(i / s.k / wide / high);
    double size;
    const double right = s.pool ? conv.pooled(n, p, q, k, size) : conv.at(n, p, q, k, size);
    const bool winograd = algorithm == RF_WINOGRAD2 || algorithm == RF_WINOGRAD4 || algorithm == RF_WINOGRAD_STEM;
    if (!(std::fabs(y[i] - right) <= (winograd ? 1e-3 : 1e-5) * (size + 1))) {
      fprintf(stderr, "algorithm %d: y[%d, %d, %d, %d] is %g, expected %g\n", algorithm, n, p, q, k, y[i], right);
      fprintf(stderr, "n %d, %dx%dx%d to %dx%dx%d, %dx%d, stride %d %d, padding %d %d, dilation %d %d, groups %d\n", s.n,
              s.h, s.w, s.c, s.p, s.q, s.k, s.r, s.s, s.stride_h, s.stride_w, s.pad_h, s.pad_w, s.dilation_h,
              s.dilation_w, s.groups);
      return false;
    }
  }
  return true;
}

std::unique_ptr<int8_t[]> bytes(int64_t count) {
  std::unique_ptr<int8_t[]> values(new int8_t[count]);
  for (int64_t i = 0; i < count; i++) values[i] = int8_t(between(-128, 127));
  return values;
}

// The same of int8, exactly. `weight` and the rest have exactly their size.
bool check_int8(rf_shape s, int algorithm, bool to_float) {
  s.dtype = RF_INT8;
  const int high = s.pool ? (s.p - 1) / 2 + 1 : s.p, wide = s.pool ? (s.q - 1) / 2 + 1 : s.q, cin = s.c / s.groups;
  const int64_t taps = s.r * s.s, one = cin * taps, count = int64_t(s.n) * high * wide * s.k;
  const auto x = bytes(int64_t(s.n) * s.h * s.w * s.c), q = bytes(s.k * one);
  const auto residual = s.pool ? nullptr : bytes(int64_t(s.n) * s.p * s.q * s.k);
  std::unique_ptr<float[]> weight(new float[s.k * one]);
  for (int64_t i = 0; i < s.k * one; i++) weight[i] = q[i];
  const auto scale = randoms<float>(s.k), shift = randoms<float>(s.k);
  for (int k = 0; k < s.k; k++) scale[k] /= 90 * std::sqrt(float(one));
  const float factor = 0.37f;
  std::unique_ptr<char[]> packed(new char[rf_packed_bytes(&s, algorithm)]);
  const rf_weight source{weight.get(), nullptr, s.k / s.groups * one, one, taps, s.s, 1, 0, 0};
  rf_pack(&s, algorithm, &source, packed.get(), 2);
  std::unique_ptr<char[]> y(new char[count * (to_float ? 4 : 1)]);
  rf_op op{};
  op.kind = RF_CONV, op.algorithm = algorithm, op.shape = s, op.packed = packed.get(), op.shift = shift.get();
  op.scale = scale.get(), op.factor = factor, op.y_dtype = to_float ? RF_FLOAT32 : RF_INT8;
  run(op, x.get(), residual.get(), y.get());
  auto at = [&](int n, int p, int o, int k) {
    int32_t sum = 0;
    for (int r = 0; r < s.r; r++)
      for (int t = 0; t < s.s; t++) {
        const int h = p * s.stride_h - s.pad_h + r * s.dilation_h, w = o * s.stride_w - s.pad_w + t * s.dilation_w;
        if (h < 0 || h >= s.h || w < 0 || w >= s.w) continue;
        for (int c = 0; c < cin; c++)
          sum += x[((int64_t(n) * s.h + h) * s.w + w) * s.c + k / (s.k / s.groups) * cin + c] *
                 q[((int64_t(k) * cin + c) * s.r + r) * s.s + t];
      }
    float v = float(sum) * scale[k];
    v += shift[k];
    if (residual) v += float(residual[((int64_t(n) * s.p + p) * s.q + o) * s.k + k]) * factor;
    if (s.relu && v < 0) v = 0;
    return to_float ? v : std::fmin(127.f, std::fmax(-128.f, std::nearbyint(v)));
  };
  for (int64_t i = 0; i < count; i++) {
    const int k = int(i % s.k), o = int(i / s.k % wide), p = int(i / s.k / wide % high), n = int(i / s.k / wide / high);
    float right = s.pool ? -128 : at(n, p, o, k);
    for (int a = 2 * p - 1; s.pool && a <= 2 * p + 1; a++)
      for (int b = 2 * o - 1; b <= 2 * o + 1; b++)
        if (a >= 0 && a < s.p && b >= 0 && b < s.q) right = std::fmax(right, at(n, a, b, k));
    const float found = to_float ? ((float*)y.get())[i] : ((int8_t*)y.get())[i];
    if (found != right) {
      fprintf(stderr, "int8, algorithm %d: y[%d, %d, %d, %d] is %g, expected %g\n", algorithm, n, p, o, k, found, right);
      return false;
    }
  }
  return true;
}

// The operations without weights: only the sanitizers look at these, the Python tests at their results.
void touch(const rf_shape& conv) {
  rf_op op{};
  rf_shape& s = op.shape;
  s = conv;
  s.k = s.c, s.dilation_h = s.dilation_w = s.groups = 1, s.pool = 0;
  s.pad_h = between(0, s.r / 2), s.pad_w = between(0, s.s / 2);
  const auto x = randoms<float>(int64_t(s.n) * s.h * s.w * s.c);
  if (s.h + 2 * s.pad_h >= s.r && s.w + 2 * s.pad_w >= s.s) {
    s.p = (s.h + 2 * s.pad_h - s.r) / s.stride_h + 1, s.q = (s.w + 2 * s.pad_w - s.s) / s.stride_w + 1;
    std::unique_ptr<float[]> y(new float[int64_t(s.n) * s.p * s.q * s.k]);
    for (int kind : {RF_MAX_POOL, RF_AVG_POOL}) op.kind = kind, run(op, x.get(), nullptr, y.get());
  }
  s.p = s.h, s.q = s.w;
  std::unique_ptr<float[]> y(new float[int64_t(s.n) * s.h * s.w * s.c]);
  for (int kind : {RF_ADD, RF_TO_NHWC, RF_TO_NCHW})
    op.kind = kind, run(op, x.get(), kind == RF_ADD ? x.get() : nullptr, y.get());
}

// Training's passes over whole images; likewise.
void touch_passes(const rf_shape& s) {
  const int64_t count = int64_t(s.n) * s.h * s.w * s.c, small = int64_t(s.n) * ((s.h + 1) / 2) * ((s.w + 1) / 2) * s.c;
  const auto one = randoms<float>(count), two = randoms<float>(count), pooled = randoms<float>(small);
  const auto vector = randoms<float>(s.c);
  std::unique_ptr<float[]> large(new float[count]), tiny(new float[small]), sums(new float[RF_MOST_SUMS * s.c]);
  for (int kind : {RF_TAIL, RF_TAIL_POOL, RF_STATISTICS, RF_GATE, RF_TAIL_POOL_BACKWARD, RF_BN_BACKWARD}) {
    rf_pass pass{};
    pass.kind = kind, pass.n = s.n, pass.h = s.h, pass.w = s.w, pass.c = s.c, pass.relu = s.relu;
    pass.x = kind == RF_TAIL_POOL_BACKWARD ? pooled.get() : one.get(), pass.y = two.get(), pass.gate = one.get();
    pass.residual = pass.residual_y = two.get();
    pass.scale = pass.shift = pass.residual_scale = pass.residual_shift = vector.get();
    pass.mean = pass.residual_mean = pass.slope = vector.get();
    pass.result = kind == RF_TAIL_POOL ? tiny.get() : large.get();
    const int number = kind == RF_GATE ? 3 : kind == RF_STATISTICS || kind == RF_TAIL_POOL_BACKWARD ? 2 : 0;
    for (int i = 0; i < number; i++) pass.sums[i] = sums.get() + i * s.c;
    rf_run_pass(&pass, 2);
  }
}

// Gradients of weights, and covariances; likewise.
void touch_gradients(const Conv& conv) {
  rf_shape s = conv.s;
  s.pool = 0;
  const auto dy = randoms<float>(int64_t(s.n) * s.p * s.q * s.k);
  std::unique_ptr<float[]> dw(new float[int64_t(s.k) * s.r * s.s * (s.c / s.groups)]);
  for (int algorithm : {RF_GEMM, RF_WINOGRAD2, RF_WINOGRAD4})
    if (rf_wgrad_supports(&s, algorithm))
      rf_wgrad(&s, algorithm, dy.get(), conv.x.get(), conv.x_scale.get(), conv.x_shift.get(), dw.get(), 2);
  s.r = s.s = s.dilation_h = s.dilation_w = s.groups = 1, s.pad_h = s.pad_w = 0, s.k = s.c;
  s.p = (s.h - 1) / s.stride_h + 1, s.q = (s.w - 1) / s.stride_w + 1;
  std::unique_ptr<float[]> mean(new float[s.c]), covariance(new float[int64_t(s.c) * s.c]);
  rf_gram(&s, conv.x.get(), conv.x_scale.get(), conv.x_shift.get(), mean.get(), covariance.get(), 2);
}

}  // namespace

// Arguments: how many shapes for each instruction set, and how many algorithms there are.
int main(int, char** arguments) {
  const int shapes = atoi(arguments[1]), algorithms = atoi(arguments[2]);
  int cases = 0;
  for (int variant = 0; variant < rf_variants(); variant++) {
    if (!rf_variant_usable(variant)) continue;
    rf_select_variant(variant);
    for (int i = 0; i < shapes; i++) {
      Conv conv{};
      conv.s = random_conv();
      const rf_shape& s = conv.s;
      conv.x = randoms<float>(int64_t(s.n) * s.h * s.w * s.c);
      conv.weight = randoms<double>(int64_t(s.k) * (s.c / s.groups) * s.r * s.s);
      conv.shift = randoms<float>(s.k);
      if (!s.pool && between(0, 1)) conv.residual = randoms<float>(int64_t(s.n) * s.p * s.q * s.k);
      for (int algorithm = 0; algorithm < algorithms; algorithm++)
        if (rf_supports(&s, algorithm)) {
          if (!check(conv, algorithm)) return 1;
          cases++;
        }
      touch_gradients(conv);
      conv.x_scale = randoms<float>(s.c), conv.x_shift = randoms<float>(s.c);
      for (int algorithm : {RF_GEMM, RF_WINOGRAD2, RF_WINOGRAD4})
        if (!s.pool && rf_supports(&s, algorithm) && !check(conv, algorithm)) return 1;
      rf_shape in_bytes = s;
      in_bytes.dtype = RF_INT8;
      for (int algorithm = 0; algorithm < algorithms; algorithm++)
        if (rf_supports(&in_bytes, algorithm)) {
          if (!check_int8(s, algorithm, !s.pool && between(0, 1))) return 1;
          cases++;
        }
      touch(s);
      touch_gradients(conv);
      touch_passes(s);
    }
    printf("%s: %d cases so far\n", rf_variant_name(variant), cases);
  }
}
