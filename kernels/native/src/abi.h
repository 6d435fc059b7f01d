// The C interface between Python (ctypes) and the kernels. Images are NHWC, float32, bfloat16 or int8; bfloat16 has one
// variant and one algorithm, RF_GEMM.
//
// An int8 stands for itself times a scale that the caller knows, see kernels/reference/quantised.py. Sums of products are
// exact, and what follows is rounded to float32 after every multiplication and addition: results are equal bit by bit on
// every variant.
//
// A program is an array of operations over a handful of buffers; one call runs all of it, so that a whole network costs
// Python one call. Pointers in an operation are a buffer's number and a byte offset: the arena of a network is one
// buffer, its input another, and neither address is part of the program.
#pragma once

#include <cstdint>

#define RESNET_FAST_ABI 5

#pragma GCC visibility push(default)
extern "C" {

enum rf_dtype : int32_t { RF_FLOAT32 = 0, RF_BFLOAT16 = 1, RF_INT8 = 2 };

enum rf_kind : int32_t {
  RF_CONV = 0,      // y = relu?(conv(x) + shift + residual?), then a 3x3/2 max-pool with padding 1 if `pool`
  RF_MAX_POOL = 1,  // windows r x s; outside the image counts as nothing; NaN wins
  RF_AVG_POOL = 2,  // as above; the divisor counts the pixels inside the image
  RF_ADD = 3,       // y = relu?(x + residual?)
  RF_TO_NHWC = 4,   // x is NCHW, y NHWC
  RF_TO_NCHW = 5,   // the other way round
  RF_QUANTISE = 6,    // y, int8, = saturate(round(x * factor)) to -128 .. 127, half to even; NaN becomes -128
  RF_DEQUANTISE = 7,  // y, float32, = x * factor
};

enum rf_algorithm : int32_t {
  RF_GEMM = 0,           // gather patches into panels, multiply: every shape
  RF_WINOGRAD2 = 1,      // F(2x2, 3x3): 3x3, stride 1 or 2, dilation 1, one group
  RF_WINOGRAD4 = 2,      // F(4x4, 3x3): same
  RF_GROUPED = 3,        // few channels per group: 1, 2, 4 or 8 in and as many out
  RF_DIRECT = 4,         // RGB image, horizontal stride 2
  RF_WINOGRAD_STEM = 5,  // F(4x4, 4x4): RGB image, stride 2, windows from 5x5 to 8x8
};

// Sizes of one operation. Output sizes are given, not derived: ceil_mode is the caller's business.
struct rf_shape {
  int32_t dtype;       // of x and residual, and of y where nothing else is said
  int32_t n, h, w, c;  // input
  int32_t p, q, k;     // output of the convolution or pool: height, width, channels
  int32_t r, s;        // window: height, width
  int32_t stride_h, stride_w;  // -2: the way back, to the input of a convolution with stride 2 and padding 1
  int32_t pad_h, pad_w, dilation_h, dilation_w;
  int32_t groups;
  int32_t relu;
  int32_t pool;  // convolutions: a 3x3/2 max-pool follows; y is [n, (p - 1) / 2 + 1, (q - 1) / 2 + 1, k]
};

// The weights of a convolution, element [k / K][k % K][c][r][s] for K output channels in each group, wherever they lie.
// Strides are in elements and may be negative: the convolution that takes a gradient back to the input reads the same
// weights with k and c exchanged, from the last tap to the first.
struct rf_weight {
  const void* data;
  const double* scale;  // [k], a factor for each output channel; null: none
  int64_t group, k, c, r, s;
  int32_t is_double;  // else float32
  int32_t reserved;
};

struct rf_ref {
  int32_t buffer;  // index into the buffers of the call; -1: absent
  int32_t reserved;
  int64_t offset;  // bytes
};

struct rf_op {
  int32_t kind;
  int32_t algorithm;  // of a convolution
  rf_shape shape;
  int32_t y_dtype;     // of a convolution of int8: RF_INT8, or RF_FLOAT32 where no pool follows
  const void* packed;  // weights from rf_pack
  const float* shift;  // [k]; never null for a convolution
  rf_ref x, residual, y;
  // Of convolutions by RF_GEMM, RF_WINOGRAD2 and RF_WINOGRAD4 in float32: x is read as relu(x * scale + shift), padding
  // is zero after that. [c] each; null: x as it is.
  const float *x_scale, *x_shift;
  // Of convolutions by RF_GEMM without residual and ReLU: pixel (p, q) of the result is (p * step_h, q * step_w) of an
  // image `y_h` high and `y_w` wide. 0: y is dense.
  int32_t y_h, y_w, step_h, step_w;
  // Of convolutions of int8, where y = relu?(sum * scale[k] + shift[k] + residual * factor), rounded as RF_QUANTISE does if
  // it is int8.
  const float* scale;  // [k]
  float factor;        // of the residual; or of x
  int32_t reserved;
};

// `count` pieces of memory, `bytes` long each, that begin `stride` bytes apart.
struct rf_pieces {
  const void* data;
  int64_t stride;
  int32_t count;
  int32_t bytes;
};

int rf_abi(void);

// The compiled variants, slowest first: "portable", "avx2", "avx512", "avx512_bf16". The best usable one is selected at load.
int rf_variants(void);
const char* rf_variant_name(int index);
int rf_variant_usable(int index);
void rf_select_variant(int index);
int rf_selected_variant(void);

int rf_supports(const rf_shape* shape, int algorithm);
// How many multiply-adds each input channel has with each output channel of its group.
int64_t rf_products(const rf_shape* shape, int algorithm);
int64_t rf_packed_bytes(const rf_shape* shape, int algorithm);
// Packs are for one variant.
void rf_pack(const rf_shape* shape, int algorithm, const rf_weight* weight, void* packed, int threads);
// One number for the bytes of all the `count` pieces: another one, as good as always, when any of them has changed.
uint64_t rf_digest(const rf_pieces* pieces, int count, int threads);
// Floating-point operations per second of multiply-adds on registers, all threads together.
double rf_peak(int threads);
// seconds: [count], the time each operation took, or null.
void rf_run(const rf_op* ops, int count, void* const* buffers, int threads, double* seconds);

// --- training: passes over whole images, float32 ----------------------------------------------------------------------

enum rf_pass_kind : int32_t {
  RF_TAIL = 0,                // result = relu?(x * scale + shift + residual?), the residual through its own if it has them
  RF_TAIL_POOL = 1,           // result = max_pool2d(relu(x * scale + shift), 3, 2, 1)
  RF_STATISTICS = 2,          // sums: mean and biased variance of x
  RF_GATE = 3,                // result? = g = x + residual? where gate?, or gate * scale + shift, is not <= 0, else 0
  RF_TAIL_POOL_BACKWARD = 4,  // result = g, the gradient of y where x is that of the result of RF_TAIL_POOL of y
  RF_BN_BACKWARD = 5,         // result = scale * x - slope * (y - mean) - shift
};

#define RF_MOST_SUMS 3

// A gradient g comes with sums over its pixels: of g, of g * (y - mean), of g * (residual_y - residual_mean); the first
// of them that are not null. `x`, `y`, `gate`, `residual` and `result` may be one image; all are [n, h, w, c], but beside
// a pool [n, (h - 1) / 2 + 1, (w - 1) / 2 + 1, c]. Vectors have c elements.
struct rf_pass {
  int32_t kind;
  int32_t n, h, w, c;
  int32_t relu;
  const float *x, *residual, *gate, *y, *residual_y;
  const float *scale, *shift, *residual_scale, *residual_shift, *mean, *residual_mean, *slope;
  float* result;
  float* sums[RF_MOST_SUMS];
};

void rf_run_pass(const rf_pass* pass, int threads);

// Training, float32. `scale` and `shift`, [c] each, are what x is read through, relu(x * scale + shift); null: nothing.
int rf_wgrad_supports(const rf_shape* shape, int algorithm);
// The gradient of a convolution's weight, dw: [k, r, s, c / groups], from dy, the gradient of its output.
void rf_wgrad(const rf_shape* shape, int algorithm, const float* dy, const float* x, const float* scale,
              const float* shift, float* dw, int threads);
// Mean, [c], and biased covariance, [c, c], of x at the output pixels of a 1x1 convolution without padding.
void rf_gram(const rf_shape* shape, const float* x, const float* scale, const float* shift, float* mean,
             float* covariance, int threads);
}
#pragma GCC visibility pop
