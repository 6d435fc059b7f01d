// The C interface: picks the compiled variant, and runs programs on the OpenMP threads.
#include <omp.h>
#include <unistd.h>
#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <cstdlib>

#include "barrier.h"
#include "variant.h"

#define RF_FLOATS(name) \
  namespace name {      \
  extern const Variant variant; \
  }
#define RF_INT8_OF(name) \
  namespace name {       \
  extern const Int8Variant int8_variant; \
  }
RF_FLOATS(portable)
RF_INT8_OF(portable)
#if defined(__x86_64__)
RF_FLOATS(avx2)
RF_FLOATS(avx512)
RF_FLOATS(avx512_bf16)
RF_INT8_OF(avx2)
RF_INT8_OF(avx2_vnni)
RF_INT8_OF(avx512)
RF_INT8_OF(avx512_vnni)
#endif

namespace {

struct Compiled {
  const char* name;
  const Variant* floats;
  const Int8Variant* int8;
  bool usable;  // on this CPU

  void run(const rf_op* op, void* const* buffers, int thread, int threads) const {
    const bool is_int8 = op->shape.dtype == RF_INT8 || op->kind == RF_QUANTISE;
    (is_int8 ? int8->run : floats->run)(op, buffers, thread, threads);
  }
};

#if defined(__x86_64__)
const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
const bool has_avx512_vnni = has_avx512 && __builtin_cpu_supports("avx512vnni");

const bool has_avx2_vnni = [] {
#if defined(RF_EMULATE)
  return has_avx2;
#endif
  unsigned a, b, c, d;
  return has_avx2 && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
}();
#endif

// Slowest first. setup.py says which of them are left out.
const Compiled variants[] = {
    {"portable", &portable::variant, &portable::int8_variant, true},
#if defined(__x86_64__)
#if !defined(RF_WITHOUT_avx2)
    {"avx2", &avx2::variant, &avx2::int8_variant, has_avx2},
#endif
#if !defined(RF_WITHOUT_avx2_vnni)
    {"avx2_vnni", &avx2::variant, &avx2_vnni::int8_variant, has_avx2_vnni},
#endif
#if !defined(RF_WITHOUT_avx512)
    {"avx512", &avx512::variant, &avx512::int8_variant, has_avx512},
#endif
#if !defined(RF_WITHOUT_avx512_vnni)
    {"avx512_vnni", &avx512::variant, &avx512_vnni::int8_variant, has_avx512_vnni},
#endif
#if !defined(RF_WITHOUT_avx512_bf16)
    {"avx512_bf16", &avx512_bf16::variant, &avx512_vnni::int8_variant,
     has_avx512_vnni && __builtin_cpu_supports("avx512bf16")},
#endif
#endif
};
constexpr int count = sizeof(variants) / sizeof(*variants);

int best() {
  int index = count - 1;
  while (!variants[index].usable) index--;
  return index;
}

int selected = best();

#if defined(__SANITIZE_ADDRESS__)
constexpr bool EXACT = true;  // AddressSanitizer then sees a step beyond what was asked for
#else
constexpr bool EXACT = false;
#endif

// Memory that grows to what its thread has asked for, and goes with the thread.
struct Scratch {
  void* memory = nullptr;
  size_t size = 0;

  void* at_least(size_t bytes) {
    if (EXACT ? bytes != size : bytes > size) {
      free(memory);
      size = EXACT ? bytes : (bytes + 4095) / 4096 * 4096;
      // The kernels have no way to report it, and Linux does not refuse in practice.
      if (posix_memalign(&memory, 64, size)) abort();
    }
    return memory;
  }
  ~Scratch() { free(memory); }
};

thread_local Scratch scratch[SLOTS];

int64_t cache_bytes() {
#if defined(_SC_LEVEL2_CACHE_SIZE)  // not on macOS
  const long bytes = sysconf(_SC_LEVEL2_CACHE_SIZE);
  if (bytes > 0) return bytes;
#endif
  return 256 << 10;
}

}  // namespace

void* rf_scratch(Slot slot, size_t bytes) { return scratch[slot].at_least(bytes); }
int64_t rf_cache_bytes() {
  static const int64_t bytes = cache_bytes();
  return bytes;
}

extern "C" {

int rf_abi(void) { return RESNET_FAST_ABI; }

int rf_variants(void) { return count; }
const char* rf_variant_name(int index) { return variants[index].name; }

int rf_variant_usable(int index) { return variants[index].usable; }

void rf_select_variant(int index) { selected = index; }
int rf_selected_variant(void) { return selected; }

int rf_supports(const rf_shape* shape, int algorithm) {
  const Compiled& from = variants[selected];
  return (shape->dtype == RF_INT8 ? from.int8->supports : from.floats->supports)(shape, algorithm);
}
int64_t rf_products(const rf_shape* shape, int algorithm) {
  return variants[selected].floats->products(shape, algorithm);
}
int64_t rf_packed_bytes(const rf_shape* shape, int algorithm) {
  const Compiled& from = variants[selected];
  return (shape->dtype == RF_INT8 ? from.int8->packed_bytes : from.floats->packed_bytes)(shape, algorithm);
}
void rf_pack(const rf_shape* shape, int algorithm, const rf_weight* weight, void* packed, int threads) {
  const Compiled& from = variants[selected];
  const auto pack = shape->dtype == RF_INT8 ? from.int8->pack : from.floats->pack;
#pragma omp parallel num_threads(threads)
  pack(shape, algorithm, weight, packed, omp_get_thread_num(), omp_get_num_threads());
}

uint64_t rf_digest(const rf_pieces* pieces, int number, int threads) {
  const Variant& variant = *variants[selected].floats;
  uint64_t sum = 0;  // every digest with another odd factor, for their order counts
#pragma omp parallel for num_threads(threads) schedule(dynamic, 8) reduction(+ : sum)
  for (int i = 0; i < number; i++) sum += variant.digest(pieces + i) * (2 * i + 1);
  return sum;
}

double rf_peak(int threads) {
  double best = 0;
  for (int i = 0; i < 20; i++) {
    double operations = 0;
    const double start = omp_get_wtime();
#pragma omp parallel num_threads(threads) reduction(+ : operations)
    operations += variants[selected].floats->multiply_adds(200000);
    const double rate = operations / (omp_get_wtime() - start);
    best = rate > best ? rate : best;
  }
  return best;
}

void rf_run(const rf_op* ops, int number, void* const* buffers, int threads, double* seconds) {
  const Compiled& variant = variants[selected];
  Barrier barrier;
#pragma omp parallel num_threads(threads)
  {
    const int thread = omp_get_thread_num(), team = omp_get_num_threads();
    double start = omp_get_wtime();
    for (int i = 0; i < number; i++) {
      variant.run(ops + i, buffers, thread, team);
      if (team > 1 && (i + 1 < number || seconds)) barrier.wait(team);
      if (seconds && thread == 0) {
        const double end = omp_get_wtime();
        seconds[i] = end - start;
        start = end;
      }
    }
  }
}

void rf_run_pass(const rf_pass* pass, int threads) {
  const Variant& variant = *variants[selected].floats;
  const int64_t count = variant.pass_partials(pass);
  double* partials = (double*)rf_scratch(PARTIALS, count * sizeof(double));
  Barrier barrier;
#pragma omp parallel num_threads(threads)
  {
    const int thread = omp_get_thread_num(), team = omp_get_num_threads();
    variant.pass(pass, partials, thread, team);
    if (count) {
      if (team > 1) barrier.wait(team);
      variant.finish_pass(pass, partials, thread, team);
    }
  }
}

int rf_wgrad_supports(const rf_shape* shape, int algorithm) {
  return variants[selected].floats->wgrad_supports(shape, algorithm);
}

void rf_wgrad(const rf_shape* shape, int algorithm, const float* dy, const float* x, const float* scale,
              const float* shift, float* dw, int threads) {
  const Variant& variant = *variants[selected].floats;
  const WgradCall call{*shape, algorithm, dy, x, scale, shift, dw};
  void* workspace = rf_scratch(PANELS, variant.wgrad_bytes(call));
  Barrier barrier;
#pragma omp parallel num_threads(threads)
  variant.wgrad(call, workspace, omp_get_thread_num(), omp_get_num_threads(), barrier);
}

void rf_gram(const rf_shape* shape, const float* x, const float* scale, const float* shift, float* mean,
             float* covariance, int threads) {
  const Variant& variant = *variants[selected].floats;
  const GramCall call{*shape, x, scale, shift, mean, covariance};
  void* workspace = rf_scratch(PANELS, variant.gram_bytes(call));
  Barrier barrier;
#pragma omp parallel num_threads(threads)
  variant.gram(call, workspace, omp_get_thread_num(), omp_get_num_threads(), barrier);
}
}
