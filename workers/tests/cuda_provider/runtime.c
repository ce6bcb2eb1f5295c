// A stand-in for CUDA's runtime library (libcudart.so.13), so that ONNX Runtime's provider for CUDA can be loaded, and given a
// graph, on a machine without a GPU. Kernels do nothing: what is seen is which nodes the provider takes, and what it does while a
// CUDA graph is captured. Numbers of attributes and offsets of fields are those of CUDA 13's headers.
#define _GNU_SOURCE
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef unsigned long long u64;

enum { OK = 0, CAPTURE_BROKEN = 900 };

// Captures that ended, launches in the last of them, replays, and what a capture must not meet.
static size_t captures, launches, replays, mistakes;
static int capturing;

static int refuse(const char *what) {
    if (!capturing) return OK;
    fprintf(stderr, "%s during a capture\n", what);
    mistakes += 1;
    return CAPTURE_BROKEN;
}

static int refused(const char *what, int otherwise) {
    const int broken = refuse(what);
    return broken ? broken : otherwise;
}

void stand_in_captures(size_t counts[4]) {
    counts[0] = captures;
    counts[1] = launches;
    counts[2] = replays;
    counts[3] = mistakes;
}

// ---- the device: one of compute capability 9.0 ----

int cudaGetDeviceCount(int *count) { return *count = 1, OK; }
int cudaGetDevice(int *device) { return *device = 0, OK; }
int cudaSetDevice(int device) { return device; }
int cudaDriverGetVersion(int *version) { return *version = 13000, OK; }
int cudaRuntimeGetVersion(int *version) { return *version = 13000, OK; }

static void put(void *of, size_t offset, int value) { memcpy((char *)of + offset, &value, sizeof value); }
static void put_size(void *of, size_t offset, size_t value) { memcpy((char *)of + offset, &value, sizeof value); }

int cudaGetDeviceProperties(void *properties, int device) {
    memset(properties, 0, 1008);
    strcpy(properties, "stand-in");
    put_size(properties, 288, 64ull << 30); // totalGlobalMem
    put_size(properties, 296, 48 << 10);    // sharedMemPerBlock
    put(properties, 304, 65536);            // regsPerBlock
    put(properties, 308, 32);               // warpSize
    put(properties, 320, 1024);             // maxThreadsPerBlock
    for (int axis = 0; axis < 3; axis += 1) {
        put(properties, 324 + 4 * axis, axis < 2 ? 1024 : 64);     // maxThreadsDim
        put(properties, 336 + 4 * axis, axis ? 65535 : 0x7fffffff); // maxGridSize
    }
    put(properties, 360, 9);                // major
    put(properties, 384, 132);              // multiProcessorCount
    put(properties, 596, 50 << 20);         // l2CacheSize
    put(properties, 604, 2048);             // maxThreadsPerMultiProcessor
    put_size(properties, 624, 228 << 10);   // sharedMemPerMultiprocessor
    put_size(properties, 672, 227 << 10);   // sharedMemPerBlockOptin
    return device;
}

int cudaDeviceGetAttribute(int *value, int attribute, int device) {
    switch (attribute) {
    case 1: *value = 1024; break;       // MaxThreadsPerBlock
    case 8: *value = 48 << 10; break;   // MaxSharedMemoryPerBlock
    case 10: *value = 32; break;        // WarpSize
    case 16: *value = 132; break;       // MultiProcessorCount
    case 39: *value = 2048; break;      // MaxThreadsPerMultiProcessor
    case 75: *value = 9; break;         // ComputeCapabilityMajor
    case 76: *value = 0; break;         // ComputeCapabilityMinor
    case 81: *value = 228 << 10; break; // MaxSharedMemoryPerMultiprocessor
    case 97: *value = 227 << 10; break; // MaxSharedMemoryPerBlockOptin
    case 115: *value = 0; break;        // MemoryPoolsSupported
    default: *value = 1;
    }
    return device;
}

// ---- memory ----

static int allocate(void **at, size_t bytes) {
    const size_t whole = (bytes + 511) / 256 * 256;
    *at = aligned_alloc(256, whole);
    memset(*at, 0, whole);
    return OK;
}
int cudaMalloc(void **at, size_t bytes) { return refused("cudaMalloc", allocate(at, bytes)); }
int cudaMallocHost(void **at, size_t bytes) { return refused("cudaMallocHost", allocate(at, bytes)); }
int cudaHostAlloc(void **at, size_t bytes, unsigned flags) {
    (void)flags;
    return refused("cudaHostAlloc", allocate(at, bytes));
}
int cudaFree(void *at) { return free(at), refuse("cudaFree"); }
int cudaFreeHost(void *at) { return free(at), refuse("cudaFreeHost"); }
int cudaMemGetInfo(size_t *unused, size_t *all) { return *unused = 60ull << 30, *all = 64ull << 30, OK; }
int cudaMemcpy(void *into, const void *from, size_t bytes, int kind) {
    (void)kind;
    return memcpy(into, from, bytes), refuse("cudaMemcpy");
}
// Within a capture it would be replayed with the addresses of now: whatever the host holds then is not what is meant.
int cudaMemcpyAsync(void *into, const void *from, size_t bytes, int kind, void *stream) {
    (void)stream;
    return memcpy(into, from, bytes), kind == 3 ? OK : refuse("a copy from or to the host");
}
int cudaMemcpyFromSymbol(void *into, const void *symbol, size_t bytes, size_t offset, int kind) {
    (void)symbol, (void)offset, (void)kind;
    return memset(into, 0, bytes), refuse("cudaMemcpyFromSymbol");
}
int cudaMemset(void *at, int value, size_t bytes) { return memset(at, value, bytes), refuse("cudaMemset"); }
int cudaMemsetAsync(void *at, int value, size_t bytes, void *stream) {
    (void)stream;
    return memset(at, value, bytes), OK;
}
int cudaPointerGetAttributes(void *attributes, const void *at) {
    memset(attributes, 0, 88);
    put(attributes, 0, 2); // cudaMemoryTypeDevice
    put_size(attributes, 8, (size_t)at);
    return OK;
}

// ---- streams, events and graphs ----

static int make(void **it) { return *it = malloc(8), OK; }
int cudaStreamCreate(void **stream) { return make(stream); }
int cudaStreamCreateWithFlags(void **stream, unsigned flags) { return (void)flags, make(stream); }
int cudaStreamSynchronize(void *stream) { return (void)stream, refuse("cudaStreamSynchronize"); }
int cudaDeviceSynchronize(void) { return refuse("cudaDeviceSynchronize"); }
int cudaEventCreate(void **event) { return make(event); }
int cudaEventCreateWithFlags(void **event, unsigned flags) { return (void)flags, make(event); }
int cudaEventElapsedTime(float *ms, void *from, void *to) { return (void)from, (void)to, *ms = 1.0f, OK; }
int cudaStreamIsCapturing(void *stream, int *status) { return (void)stream, *status = capturing, OK; }
int cudaStreamBeginCapture(void *stream, int mode) { return (void)stream, (void)mode, capturing = 1, launches = 0, OK; }
int cudaStreamEndCapture(void *stream, void **graph) {
    (void)stream;
    capturing = 0;
    captures += 1;
    return make(graph);
}
int cudaGraphInstantiate(void **executable, void *graph, u64 flags) { return (void)graph, (void)flags, make(executable); }
int cudaGraphLaunch(void *executable, void *stream) { return (void)executable, (void)stream, replays += 1, OK; }

// ---- kernels, which do nothing ----

static int launched(void) { return launches += 1, OK; }
int cudaLaunchKernel(const void *kernel) { return (void)kernel, launched(); }
int cudaLaunchKernelExC(const void *config) { return (void)config, launched(); }
int cudaLaunchCooperativeKernel(const void *kernel) { return (void)kernel, launched(); }
int __cudaLaunchKernel(const void *kernel) { return (void)kernel, launched(); }
int __cudaGetKernel(const void **kernel, const void *function) { return *kernel = function, OK; }
void **__cudaRegisterFatBinary(void *code) {
    static void *none;
    return (void)code, &none;
}
unsigned __cudaPushCallConfiguration(void) { return 0; }
int __cudaPopCallConfiguration(unsigned grid[3], unsigned block[3], size_t *shared, void **stream) {
    for (int axis = 0; axis < 3; axis += 1) grid[axis] = block[axis] = 1;
    return *shared = 0, *stream = NULL, OK;
}
int cudaFuncGetAttributes(void *attributes, const void *function) {
    (void)function;
    memset(attributes, 0, 144);
    put(attributes, 24, 1024); // maxThreadsPerBlock
    put(attributes, 28, 32);   // numRegs
    put(attributes, 32, 90);   // ptxVersion
    put(attributes, 36, 90);   // binaryVersion
    return OK;
}
int cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks, const void *function) {
    return (void)function, *blocks = 1, OK;
}
int cudaGetDriverEntryPointByVersion(const char *name, void **entry, unsigned version, u64 flags, int *status) {
    (void)name, (void)version, (void)flags;
    return *entry = NULL, status ? *status = 1 : 0, 500;
}

const char *cudaGetErrorString(int error) { return error == CAPTURE_BROKEN ? "not during a capture" : "an error"; }
const char *cudaGetErrorName(int error) { return cudaGetErrorString(error); }

// ---- what succeeds, whatever it is asked ----

#define SUCCEEDS(name)                                                                                                 \
    int name(void) { return OK; }
SUCCEEDS(__cudaRegisterFatBinaryEnd)
SUCCEEDS(__cudaRegisterFunction)
SUCCEEDS(__cudaRegisterVar)
SUCCEEDS(__cudaUnregisterFatBinary)
SUCCEEDS(cudaEventDestroy)
SUCCEEDS(cudaEventRecord)
SUCCEEDS(cudaEventRecordWithFlags)
SUCCEEDS(cudaEventSynchronize)
SUCCEEDS(cudaFreeAsync)
SUCCEEDS(cudaFuncSetAttribute)
SUCCEEDS(cudaGetLastError)
SUCCEEDS(cudaGraphDestroy)
SUCCEEDS(cudaGraphExecDestroy)
SUCCEEDS(cudaKernelSetAttributeForDevice)
SUCCEEDS(cudaLaunchHostFunc)
SUCCEEDS(cudaLibraryGetKernel)
SUCCEEDS(cudaLibraryLoadData)
SUCCEEDS(cudaLibraryUnload)
SUCCEEDS(cudaMallocFromPoolAsync)
SUCCEEDS(cudaMemPoolCreate)
SUCCEEDS(cudaMemPoolDestroy)
SUCCEEDS(cudaMemPoolGetAttribute)
SUCCEEDS(cudaMemPoolSetAttribute)
SUCCEEDS(cudaMemPoolTrimTo)
SUCCEEDS(cudaMemcpy2DAsync)
SUCCEEDS(cudaPeekAtLastError)
SUCCEEDS(cudaStreamDestroy)
SUCCEEDS(cudaStreamWaitEvent)
