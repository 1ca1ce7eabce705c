/* A CUDA runtime without a device: memory is the host's, kernels do nothing. With it onnxruntime-gpu's own CUDA provider
   makes sessions, places nodes, binds tensors and captures graphs on any machine; results mean nothing. Of CUDA 13, whose
   structures have the offsets written here (cuda-runtime 13.0's driver_types.h).

   CUDA_STUB_BYTES  the device's memory; 8 GiB by default
   CUDA_STUB_TRACE  a line on stderr for each capture and launch of a graph
   CUDA_STUB_REFUSE captures fail */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { OK = 0, OUT_OF_MEMORY = 2, CAPTURE_UNSUPPORTED = 900, INVALID_DEVICE = 101 };
enum { PROPERTIES = 1008, POINTER_ATTRIBUTES = 88, FUNCTION_ATTRIBUTES = 144, LARGEST = 1 << 16 };

static char handle[4096];
static int capturing;
static struct { void *at; size_t bytes; } taken[LARGEST];
static size_t used;

static size_t limit(void) {
  const char *said = getenv("CUDA_STUB_BYTES");
  return said ? strtoull(said, NULL, 10) : (size_t)8 << 30;
}

static void tell(const char *what) {
  if (getenv("CUDA_STUB_TRACE")) fprintf(stderr, "stub: %s\n", what);
}

int cudaMalloc(void **at, size_t bytes) {
  if (used + bytes > limit() || posix_memalign(at, 256, bytes ? bytes : 1)) return OUT_OF_MEMORY;
  memset(*at, 0, bytes);
  for (int i = 0; i < LARGEST; i++)
    if (!taken[i].at) {
      taken[i].at = *at, taken[i].bytes = bytes, used += bytes;
      break;
    }
  return OK;
}

int cudaFree(void *at) {
  for (int i = 0; at && i < LARGEST; i++)
    if (taken[i].at == at) {
      used -= taken[i].bytes, taken[i].at = NULL;
      break;
    }
  free(at);
  return OK;
}

int cudaMallocHost(void **at, size_t bytes) { return posix_memalign(at, 256, bytes ? bytes : 1) ? OUT_OF_MEMORY : OK; }
int cudaHostAlloc(void **at, size_t bytes, unsigned flags) { return cudaMallocHost(at, bytes); }
int cudaFreeHost(void *at) { free(at); return OK; }
int cudaMallocFromPoolAsync(void **at, size_t bytes, void *pool, void *stream) { return cudaMalloc(at, bytes); }
int cudaFreeAsync(void *at, void *stream) { return cudaFree(at); }
int cudaMemcpy(void *to, const void *from, size_t bytes, int kind) { memmove(to, from, bytes); return OK; }
int cudaMemcpyAsync(void *to, const void *from, size_t bytes, int kind, void *stream) { memmove(to, from, bytes); return OK; }
int cudaMemcpy2DAsync(char *to, size_t to_pitch, const char *from, size_t from_pitch, size_t width, size_t height, int kind,
                      void *stream) {
  for (size_t row = 0; row < height; row++) memmove(to + row * to_pitch, from + row * from_pitch, width);
  return OK;
}
int cudaMemset(void *at, int value, size_t bytes) { memset(at, value, bytes); return OK; }
int cudaMemsetAsync(void *at, int value, size_t bytes, void *stream) { memset(at, value, bytes); return OK; }
int cudaMemGetInfo(size_t *available, size_t *all) { *all = limit(), *available = *all - used; return OK; }

int cudaGetDevice(int *device) { *device = 0; return OK; }
int cudaGetDeviceCount(int *count) { *count = 1; return OK; }
int cudaSetDevice(int device) { return device ? INVALID_DEVICE : OK; }
int cudaDriverGetVersion(int *version) { *version = 13000; return OK; }
int cudaRuntimeGetVersion(int *version) { *version = 13000; return OK; }

static void put32(char *at, int offset, int32_t value) { memcpy(at + offset, &value, 4); }
static void put64(char *at, int offset, uint64_t value) { memcpy(at + offset, &value, 8); }

int cudaGetDeviceProperties(char *to, int device) { /* of an H100, as far as anything here asks */
  memset(to, 0, PROPERTIES);
  strcpy(to, "stub");
  put64(to, 288, limit()), put64(to, 296, 49152), put32(to, 304, 65536), put32(to, 308, 32), put32(to, 320, 1024);
  put32(to, 324, 1024), put32(to, 328, 1024), put32(to, 332, 64);
  put32(to, 336, 2147483647), put32(to, 340, 65535), put32(to, 344, 65535);
  put32(to, 360, 9), put32(to, 364, 0), put32(to, 384, 132), put32(to, 596, 50 << 20), put32(to, 604, 2048);
  put64(to, 624, 233472), put64(to, 672, 232448);
  return OK;
}

int cudaDeviceGetAttribute(int *value, int attribute, int device) {
  switch (attribute) {
    case 75: *value = 9; break;      /* compute capability */
    case 76: *value = 0; break;
    case 16: *value = 132; break;    /* multiprocessors */
    case 97: *value = 232448; break; /* shared memory a block may opt in to */
    case 1: *value = 1024; break;    /* threads per block */
    case 10: *value = 32; break;     /* warp size */
    default: *value = 1;
  }
  return OK;
}

int cudaStreamCreate(void **stream) { *stream = handle; return OK; }
int cudaStreamCreateWithFlags(void **stream, unsigned flags) { *stream = handle; return OK; }
int cudaEventCreate(void **event) { *event = handle; return OK; }
int cudaEventCreateWithFlags(void **event, unsigned flags) { *event = handle; return OK; }
int cudaStreamIsCapturing(void *stream, int *status) { *status = capturing; return OK; }
int cudaStreamBeginCapture(void *stream, int mode) { capturing = 1; tell("capture"); return OK; }
int cudaStreamEndCapture(void *stream, void **graph) {
  capturing = 0, *graph = handle;
  return getenv("CUDA_STUB_REFUSE") ? CAPTURE_UNSUPPORTED : OK;
}
int cudaGraphInstantiate(void **graph, void *from, unsigned long long flags) { *graph = handle; return OK; }
int cudaGraphLaunch(void *graph, void *stream) { tell("launch"); return OK; }

int cudaPointerGetAttributes(char *to, const void *at) { memset(to, 0, POINTER_ATTRIBUTES); put32(to, 0, 2); return OK; }
int cudaFuncGetAttributes(char *to, const void *function) {
  memset(to, 0, FUNCTION_ATTRIBUTES);
  put32(to, 24, 1024);
  return OK;
}
int cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks, const void *function, int size, size_t shared,
                                                           unsigned flags) { *blocks = 1; return OK; }
int cudaGetDriverEntryPointByVersion(const char *name, void **at, unsigned version, unsigned long long flags, int *found) {
  *at = handle;
  if (found) *found = 0;
  return OK;
}
int cudaMemPoolCreate(void **pool, const void *properties) { *pool = handle; return OK; }

const char *cudaGetErrorName(int error) { return error == OUT_OF_MEMORY ? "cudaErrorMemoryAllocation" : "cudaError"; }
const char *cudaGetErrorString(int error) {
  return error == OUT_OF_MEMORY ? "out of memory"
         : error == CAPTURE_UNSUPPORTED ? "operation not permitted when stream is capturing" : "an error of the stub";
}
