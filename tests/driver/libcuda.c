// A driver of NVIDIA GPUs without any: what Triton's own driver and launcher ask libcuda.so.1 for.
//
// Nothing runs. Every call is checked as the real driver checks it, against the binary that was loaded (the parameters,
// registers and shared memory that its ELF file states), the GPU's limits, and the handles that exist; and what would
// have been started is recorded. A refusal says why in the text of its error, which Triton raises. "Device memory" is
// the process's own: a pointer is good if something lies there.
//
// Device 0 is an H100 (9.0), 1 an A100 (8.0), 2 a B200 (10.0), as far as anybody asks.
#define _GNU_SOURCE
#include "cuda.h"
#include <elf.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

enum { DEVICES = 3, PARAMETERS = 64, BLOCK = 4096, KEPT = 256, DRIVER = 13000, THREADS = 1024, REGISTERS = 65536 };

typedef struct { // what a binary states of a parameter
  uint16_t offset, size;
  bool there, pointer;
} Parameter;

typedef struct Handle { // what every object of the driver's begins with
  struct Handle *next;
  int kind, device;
} Handle;
typedef struct { // a module, which has one kernel, and the kernel: the same handle
  Handle handle;
  char name[256];
  Parameter parameters[PARAMETERS];
  int count, base, bytes, stated, registers, stack, required, shared, dynamic;
} Function;
typedef struct CUctx_st { int device; } Context;

typedef struct { // as tests/driver/stub.py reads it
  uint32_t kind, device, grid[3], threads, shared, bytes, count;
  uint64_t stream, other; // the event, or the function
  char name[256];
  uint16_t offsets[PARAMETERS], sizes[PARAMETERS];
  uint8_t block[BLOCK];
} Entry;
enum { LAUNCH = 1, RECORD = 2, WAIT = 3 };

static const struct { int major, minor, multiprocessors, shared; } GPUS[DEVICES] = {
    {9, 0, 132, 232448}, {8, 0, 108, 166912}, {10, 0, 148, 232448}};

static Context contexts[DEVICES] = {{0}, {1}, {2}};
static Context *current; // one thread's is enough here
static Entry log_[KEPT];
static int recorded, quiet;
static char reason[512];
static CUresult refused;

// --- for the tests ---------------------------------------------------------------------------------------------------

const Entry *stub_entries(size_t *count) { return *count = recorded, log_; }
void stub_forget(void) { recorded = 0; }
void stub_quiet(int wanted) { quiet = wanted; } // neither checks nor records launches, to be timed

static CUresult refuse(CUresult code, const char *format, ...) {
  va_list values;
  va_start(values, format);
  vsnprintf(reason, sizeof reason, format, values);
  va_end(values);
  return refused = code;
}
#define INVALID(...) return refuse(CUDA_ERROR_INVALID_VALUE, __VA_ARGS__)

static Entry *entry(int kind, const void *stream, const void *event) {
  static Entry last;
  Entry *one = recorded < KEPT ? &log_[recorded++] : &last;
  memset(one, 0, offsetof(Entry, block));
  one->kind = kind, one->device = current->device;
  one->stream = (uintptr_t)stream, one->other = (uintptr_t)event;
  return one;
}

static bool mapped(uint64_t address) { // whether anything lies there
  return msync((void *)(address & ~4095ull), 1, MS_ASYNC) == 0;
}

// --- handles: those that were made -----------------------------------------------------------------------------------

enum { GONE, MODULES, STREAMS, EVENTS };
static Handle *handles;

static void *make(int kind, size_t size) {
  Handle *one = calloc(1, size);
  one->next = handles, one->kind = kind, one->device = current->device;
  return handles = one;
}
static Handle *find(int kind, const void *handle) {
  for (Handle *one = handles; one; one = one->next)
    if (one == handle && one->kind == kind) return one;
  return NULL;
}
#define NEEDS(kind, handle, what)                                                                                      \
  if (!find(kind, handle))                                                                                             \
  return refuse(CUDA_ERROR_INVALID_HANDLE, "%s: %s %p does not exist", __func__, what, (void *)handle)

// --- errors, devices, contexts ---------------------------------------------------------------------------------------

CUresult cuGetErrorString(CUresult code, const char **text) {
  *text = code == CUDA_SUCCESS ? "no error" : code == refused ? reason : "an error that nobody explained";
  return CUDA_SUCCESS;
}
CUresult cuInit(unsigned flags) { return flags ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int *version) { return *version = DRIVER, CUDA_SUCCESS; }
CUresult cuDeviceGetCount(int *count) { return *count = DEVICES, CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice *device, int ordinal) {
  if (ordinal < 0 || ordinal >= DEVICES) return refuse(CUDA_ERROR_INVALID_DEVICE, "there is no device %d", ordinal);
  return *device = ordinal, CUDA_SUCCESS;
}
CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  if (device < 0 || device >= DEVICES) return refuse(CUDA_ERROR_INVALID_DEVICE, "there is no device %d", device);
  switch (attribute) {
  case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = GPUS[device].major; break;
  case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = GPUS[device].minor; break;
  case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = GPUS[device].multiprocessors; break;
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = GPUS[device].shared; break;
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: *value = GPUS[device].shared + 1024; break;
  case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: *value = REGISTERS; break;
  case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; break;
  case CU_DEVICE_ATTRIBUTE_CLOCK_RATE:
  case CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE: *value = 1000000; break;
  case CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH: *value = 5120; break;
  default: INVALID("device attribute %d is not known here", attribute);
  }
  return CUDA_SUCCESS;
}
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
  if (device < 0 || device >= DEVICES) return refuse(CUDA_ERROR_INVALID_DEVICE, "there is no device %d", device);
  return *context = &contexts[device], CUDA_SUCCESS;
}
CUresult cuCtxGetCurrent(CUcontext *context) { return *context = current, CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext context) {
  if (context && (context < contexts || context >= contexts + DEVICES)) INVALID("no such context");
  return current = context, CUDA_SUCCESS;
}
#define NEEDS_CONTEXT                                                                                                  \
  if (!current) return refuse(CUDA_ERROR_INVALID_CONTEXT, "%s: no context is current", __func__)
CUresult cuCtxGetDevice(CUdevice *device) {
  NEEDS_CONTEXT;
  return *device = current->device, CUDA_SUCCESS;
}
CUresult cuCtxGetLimit(size_t *value, CUlimit limit) { return *value = 1 << 20, CUDA_SUCCESS; }
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }

CUresult cuPointerGetAttribute(void *value, CUpointer_attribute attribute, CUdeviceptr pointer) {
  if (attribute != CU_POINTER_ATTRIBUTE_DEVICE_POINTER) INVALID("pointer attribute %d", attribute);
  if (!quiet && !mapped(pointer)) INVALID("nothing lies at %#llx", pointer);
  return *(CUdeviceptr *)value = pointer, CUDA_SUCCESS;
}

// --- streams and events ----------------------------------------------------------------------------------------------

#define NEEDS_STREAM(stream) /* up to 2: the default streams */                                                        \
  NEEDS_CONTEXT;                                                                                                       \
  if ((uintptr_t)(stream) > 2) {                                                                                       \
    NEEDS(STREAMS, stream, "stream");                                                                                  \
    if (((Handle *)(stream))->device != current->device)                                                               \
      return refuse(CUDA_ERROR_INVALID_HANDLE, "%s: the stream is of device %d, current is device %d", __func__,       \
                    ((Handle *)(stream))->device, current->device);                                                    \
  }

CUresult cuStreamCreate(CUstream *stream, unsigned flags) {
  NEEDS_CONTEXT;
  return *stream = make(STREAMS, sizeof(Handle)), CUDA_SUCCESS;
}
CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *status) {
  NEEDS_STREAM(stream);
  return *status = CU_STREAM_CAPTURE_STATUS_NONE, CUDA_SUCCESS;
}
CUresult cuEventCreate(CUevent *event, unsigned flags) {
  NEEDS_CONTEXT;
  return *event = make(EVENTS, sizeof(Handle)), CUDA_SUCCESS;
}
CUresult cuEventRecord(CUevent event, CUstream stream) {
  NEEDS_STREAM(stream);
  NEEDS(EVENTS, event, "event");
  entry(RECORD, stream, event);
  return CUDA_SUCCESS;
}
CUresult cuStreamWaitEvent(CUstream stream, CUevent event, unsigned flags) {
  NEEDS_STREAM(stream);
  NEEDS(EVENTS, event, "event");
  entry(WAIT, stream, event);
  return CUDA_SUCCESS;
}

// --- modules: what an ELF file of NVIDIA's says of its kernel --------------------------------------------------------

// Entries of .nv.info: a byte for the format (4: as many bytes follow as the 16 bits say), one for the attribute.
enum { SIZED = 4, BANK = 10, REQUIRED_THREADS = 16, FRAME_SIZE = 17, PARAMETER = 23, REGISTER_COUNT = 47 };
enum { GLOBAL = 4 }; // the space that a pointer is for

static void read_info(Function *function, const uint8_t *at, size_t size, uint32_t symbol) {
  for (const uint8_t *end = at + size; at + 4 <= end;) {
    uint32_t values[3] = {0};
    uint16_t length = at[2] | at[3] << 8;
    int attribute = at[0] == SIZED ? at[1] : 0;
    at += 4;
    if (!attribute) continue;
    memcpy(values, at, length < sizeof values ? length : sizeof values);
    at += length;
    if (attribute == PARAMETER && (values[1] & 0xffff) < PARAMETERS) {
      Parameter *one = &function->parameters[values[1] & 0xffff];
      *one = (Parameter){values[1] >> 16, values[2] >> 18, true, (values[2] >> 8 & 15) == GLOBAL};
      function->count++;
      if (one->offset + one->size > function->bytes) function->bytes = one->offset + one->size;
    } else if (attribute == BANK) { // where parameters begin among the constants, and how many bytes they are
      function->base = values[1] & 0xffff, function->stated = values[1] >> 16;
    } else if (attribute == REQUIRED_THREADS) {
      function->required = values[0] * values[1] * values[2];
    } else if (attribute == REGISTER_COUNT && values[0] == symbol) {
      function->registers = values[1];
    } else if (attribute == FRAME_SIZE && values[0] == symbol) {
      function->stack = values[1];
    }
  }
}

CUresult cuModuleLoadData(CUmodule *module, const void *image) {
  NEEDS_CONTEXT;
  const uint8_t *file = image;
  const Elf64_Ehdr *head = image;
  if (memcmp(file, ELFMAG, SELFMAG) || head->e_machine != EM_CUDA)
    return refuse(CUDA_ERROR_INVALID_IMAGE, "no ELF file of CUDA's");
  int made_for = file[EI_ABIVERSION] >= 8 ? head->e_flags >> 8 & 255 : head->e_flags & 255;
  int device = current->device, capability = GPUS[device].major * 10 + GPUS[device].minor;
  if (made_for != capability)
    return refuse(CUDA_ERROR_NO_BINARY_FOR_GPU, "a binary for sm_%d, device %d is an sm_%d", made_for, device,
                  capability);
  Function *function = make(MODULES, sizeof(Function));
  function->dynamic = 49152;
  const Elf64_Shdr *sections = (const void *)(file + head->e_shoff);
  const char *names = (const char *)file + sections[head->e_shstrndx].sh_offset;
  uint32_t symbol = 0;
  for (int i = 0; i < head->e_shnum; i++) // the kernel's name, and its number among the symbols
    if (!strncmp(names + sections[i].sh_name, ".text.", 6))
      snprintf(function->name, sizeof function->name, "%s", names + sections[i].sh_name + 6);
  for (int i = 0; i < head->e_shnum; i++)
    if (sections[i].sh_type == SHT_SYMTAB) {
      const Elf64_Sym *symbols = (const void *)(file + sections[i].sh_offset);
      const char *words = (const char *)file + sections[sections[i].sh_link].sh_offset;
      for (uint32_t j = 0; j < sections[i].sh_size / sizeof *symbols; j++)
        if (!strcmp(words + symbols[j].st_name, function->name)) symbol = j;
    }
  for (int i = 0; i < head->e_shnum; i++) {
    const char *name = names + sections[i].sh_name, *dot = strrchr(name, '.');
    bool own = dot && !strcmp(dot + 1, function->name);
    if (!strcmp(name, ".nv.info") || (!strncmp(name, ".nv.info.", 9) && own))
      read_info(function, file + sections[i].sh_offset, sections[i].sh_size, symbol);
    else if (!strncmp(name, ".nv.shared.", 11) && own)
      function->shared = sections[i].sh_size;
  }
  if (function->bytes != function->stated)
    return refuse(CUDA_ERROR_INVALID_IMAGE, "%s: %d bytes of parameters, stated are %d", function->name,
                  function->bytes, function->stated);
  return *module = (CUmodule)function, CUDA_SUCCESS;
}
CUresult cuModuleUnload(CUmodule module) {
  NEEDS(MODULES, module, "module");
  return ((Handle *)module)->kind = GONE, CUDA_SUCCESS;
}
CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  NEEDS(MODULES, module, "module");
  if (strcmp(((Function *)module)->name, name)) return refuse(CUDA_ERROR_NOT_FOUND, "there is no function %s", name);
  return *function = (CUfunction)module, CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction handle) {
  NEEDS(MODULES, handle, "function");
  const Function *function = (void *)handle;
  switch (attribute) {
  case CU_FUNC_ATTRIBUTE_NUM_REGS: *value = function->registers; break;
  case CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES: *value = function->stack; break;
  case CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK: *value = function->required ? function->required : THREADS; break;
  case CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES: *value = function->shared; break;
  default: INVALID("function attribute %d is not known here", attribute);
  }
  return CUDA_SUCCESS;
}
CUresult cuFuncSetAttribute(CUfunction handle, CUfunction_attribute attribute, int value) {
  NEEDS(MODULES, handle, "function");
  Function *function = (void *)handle;
  if (attribute != CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES) INVALID("function attribute %d", attribute);
  int most = GPUS[function->handle.device].shared - function->shared;
  if (value < 0 || value > most) INVALID("%s: %d bytes of shared memory, at most %d", function->name, value, most);
  return function->dynamic = value, CUDA_SUCCESS;
}
CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) {
  NEEDS(MODULES, function, "function");
  return CUDA_SUCCESS;
}

// --- tensor maps: 128 bytes that only the driver reads, so these are of our own --------------------------------------

static const uint64_t ENCODED = 0x70616d726f736e74; // "tnsormap"
static const uint64_t BIG = 1ull << 21;             // a bit of the second word, which Triton clears for small tensors

typedef struct {
  uint64_t encoded, flags, address, strides[4];
  uint32_t less_one[5];
  uint16_t box[5];
  uint8_t steps[5], type, rank, swizzle, promotion, fill;
} Map;
_Static_assert(sizeof(Map) <= sizeof(CUtensorMap), "fits");

// Of an element, by CUtensorMapDataType: UINT8, 16, 32, INT32, UINT64, INT64, FLOAT16, 32, 64, BFLOAT16, FLOAT32_FTZ,
// TFLOAT32, TFLOAT32_FTZ.
static const uint8_t BYTES[] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4, 4};

// The conditions are those of the driver's documentation, for maps without interleaving.
CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *address,
                                const cuuint64_t *dims, const cuuint64_t *strides, const cuuint32_t *box,
                                const cuuint32_t *steps, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
  Map made = {ENCODED, BIG, (uintptr_t)address, .type = type, .rank = rank, .swizzle = swizzle, .promotion = promotion,
              .fill = fill};
  int bytes = (unsigned)type < sizeof BYTES ? BYTES[type] : 0;
  if ((uintptr_t)map % 64) INVALID("tensor map: 64 does not divide its own address %p", (void *)map);
  if (!bytes) INVALID("tensor map: type %d", type);
  if (rank < 1 || rank > 5) INVALID("tensor map: rank %u", rank);
  if (!address || (uintptr_t)address % 16) INVALID("tensor map: 16 does not divide the address %p", address);
  if (interleave != CU_TENSOR_MAP_INTERLEAVE_NONE) INVALID("tensor map: interleaved");
  if ((unsigned)swizzle > CU_TENSOR_MAP_SWIZZLE_128B) INVALID("tensor map: swizzle %d", swizzle);
  if ((unsigned)fill > 1 || (fill && type < CU_TENSOR_MAP_DATA_TYPE_FLOAT16)) INVALID("tensor map: fill %d", fill);
  for (unsigned i = 0; i < rank; i++) {
    if (!dims[i] || dims[i] > 1ull << 32) INVALID("tensor map: a size of %llu", (unsigned long long)dims[i]);
    if (!box[i] || box[i] > 256) INVALID("tensor map: a box of %u", box[i]);
    if (!steps[i] || steps[i] > 8) INVALID("tensor map: a step of %u", steps[i]);
    made.less_one[i] = dims[i] - 1, made.box[i] = box[i], made.steps[i] = steps[i];
    if (i + 1 == rank) break;
    cuuint64_t stride = strides[i], least = i ? strides[i - 1] * dims[i] : dims[0] * bytes;
    if (stride % 16 || stride >= 1ull << 40 || stride < least)
      INVALID("tensor map: a stride of %llu bytes", (unsigned long long)stride);
    made.strides[i] = stride;
  }
  int row = box[0] * bytes, widest = swizzle ? 16 << swizzle : row;
  if (row % 16 || row > widest) INVALID("tensor map: rows of %d bytes in a box, swizzle %d", row, swizzle);
  memset(map, 0, sizeof *map);
  memcpy(map, &made, sizeof made);
  return CUDA_SUCCESS;
}

// --- launches --------------------------------------------------------------------------------------------------------

static uint8_t taken[BLOCK]; // the parameters of the last launch that nobody looked at

CUresult cuLaunchKernelEx(const CUlaunchConfig *launch, CUfunction handle, void **parameters, void **extra) {
  const Function *function = (void *)handle;
  if (quiet) {
    for (int i = 0; i < function->count; i++)
      memcpy(taken + function->parameters[i].offset, parameters[i], function->parameters[i].size);
    return CUDA_SUCCESS;
  }
  NEEDS_STREAM(launch->hStream);
  NEEDS(MODULES, handle, "function");
  const char *name = function->name;
  int device = function->handle.device;
  if (device != current->device)
    return refuse(CUDA_ERROR_INVALID_CONTEXT, "%s: loaded on device %d, current is %d", name, device, current->device);
  const unsigned grid[3] = {launch->gridDimX, launch->gridDimY, launch->gridDimZ};
  if (!grid[0] || !grid[1] || !grid[2] || grid[0] > INT32_MAX || grid[1] > 65535 || grid[2] > 65535)
    INVALID("%s: a grid of %u x %u x %u", name, grid[0], grid[1], grid[2]);
  unsigned threads = launch->blockDimX * launch->blockDimY * launch->blockDimZ, shared = launch->sharedMemBytes;
  if (!threads || threads > THREADS || (function->required && threads != (unsigned)function->required))
    INVALID("%s: %u threads, it is compiled for %d", name, threads, function->required);
  if ((function->registers + 7) / 8 * 8 * threads > REGISTERS)
    return refuse(CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES, "%s: %d registers of %u threads", name, function->registers,
                  threads);
  if (shared > (unsigned)function->dynamic)
    INVALID("%s: %u bytes of shared memory, allowed are %d", name, shared, function->dynamic);
  if (launch->numAttrs || extra) INVALID("%s: %u attributes of the launch", name, launch->numAttrs);
  Entry made = {LAUNCH, device, {grid[0], grid[1], grid[2]}, threads, shared, function->bytes, function->count,
                .stream = (uintptr_t)launch->hStream, .other = (uintptr_t)function};
  strcpy(made.name, name);
  for (int i = 0; i < function->count; i++) {
    Parameter one = function->parameters[i];
    if (!one.there) INVALID("%s: the binary does not describe parameter %d", name, i);
    if (one.offset + one.size > BLOCK) INVALID("%s: parameter %d lies beyond %d bytes", name, i, BLOCK);
    if (!mapped((uintptr_t)parameters[i])) INVALID("%s: nothing is given as parameter %d", name, i);
    uint8_t *place = made.block + one.offset;
    memcpy(place, parameters[i], one.size);
    uint64_t word = 0;
    memcpy(&word, place, one.size < 8 ? one.size : 8);
    if (one.pointer && word && !mapped(word)) INVALID("%s: parameter %d: nothing lies at %#lx", name, i, word);
    if (one.size == sizeof(CUtensorMap) && (word != ENCODED || (function->base + one.offset) % 64))
      INVALID("%s: parameter %d is no tensor map, or lies at %d", name, i, function->base + one.offset);
    made.offsets[i] = one.offset, made.sizes[i] = one.size;
  }
  *entry(LAUNCH, launch->hStream, function) = made;
  return CUDA_SUCCESS;
}
