// A stand-in for NVIDIA's driver, for tests on machines without a GPU. The "GPU's" memory is memory of the host, and kernels run
// on the processor (on_cpu.h). It is as unhelpful as a driver may be:
//
// - Nothing that is queued on a stream is done before somebody waits for it, or for something that comes after it.
// - Fresh memory is full of NaNs. Copies must lie in memory that was allocated, mapped or pinned.
// - Only what is declared here is there, and it is called as the driver's documentation has it.
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#include "../../cuda/kernel.h"
#include "kernels.c"

#define EXPORT __attribute__((visibility("default")))

enum { OK = 0, INVALID = 1, NO_MEMORY = 2, NOT_READY = 600, ALREADY_PINNED = 712, NOT_PINNED = 713 };
enum { GRANULE = 4 << 10, THREADS_SHOWN = 8, GPUS = 2, BY_DESCRIPTOR = 1 };

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
#define LOCKED(...)                                                                                                    \
    do {                                                                                                               \
        pthread_mutex_lock(&lock);                                                                                     \
        const int outcome = (__VA_ARGS__);                                                                             \
        pthread_mutex_unlock(&lock);                                                                                   \
        return outcome;                                                                                                \
    } while (0)

// ---- memory ----

typedef enum { DEVICE_MEMORY, HOST_MEMORY, REGISTERED, RESERVED, MAPPED } Kind;

typedef struct Range {
    struct Range *next;
    u8 *start;
    size_t bytes;
    Kind kind;
    int accessible;
} Range;

typedef struct {
    int fd;
    size_t bytes;
    int holders; // Whoever made it, and each mapping.
    int exportable;
    int made_here;
} Physical;

typedef struct Mapping {
    struct Mapping *next;
    u8 *start;
    Physical *memory;
} Mapping;

static Range *ranges;
static Mapping *mappings;
static size_t used, detours;

static size_t total(void) {
    const char *given = getenv("FOREBAY_STAND_IN_BYTES");
    return given ? strtoull(given, NULL, 10) : 1ull << 30;
}

static Range *put(u8 *start, size_t bytes, Kind kind) {
    Range *range = malloc(sizeof *range);
    *range = (Range){ranges, start, bytes, kind, kind != MAPPED};
    return ranges = range;
}

static Range *range_at(const void *start, Kind kind) {
    for (Range *range = ranges; range; range = range->next)
        if (range->start == start && range->kind == kind) return range;
    return NULL;
}

static size_t forget(Range *gone) {
    const size_t bytes = gone->bytes;
    for (Range **at = &ranges; *at; at = &(*at)->next) {
        if (*at != gone) continue;
        *at = gone->next;
        free(gone);
        break;
    }
    return bytes;
}

// Whether all bytes of a range are in memory that a copy may use. Mapped granules that touch count as one.
static int holds(const u8 *start, size_t bytes, int on_device) {
    while (bytes > 0) {
        size_t there = 0;
        for (Range *range = ranges; range; range = range->next) {
            const int device = range->kind == DEVICE_MEMORY || range->kind == MAPPED;
            if (range->kind == RESERVED || device != on_device || !range->accessible) continue;
            if (start >= range->start && start < range->start + range->bytes) there = range->start + range->bytes - start;
        }
        if (there == 0) return 0;
        // Pinned parts of the host's memory are apart, even where they touch.
        if (!on_device) return there >= bytes;
        if (there >= bytes) return 1;
        start += there;
        bytes -= there;
    }
    return 1;
}

// ---- streams ----

typedef struct Stream Stream;

typedef struct Job {
    struct Job *next;
    enum { COPY, LAUNCH, WAIT } kind;
    u8 *into;
    const u8 *from;
    size_t into_pitch, from_pitch, width, height;
    const Kernel *kernel;
    void *taken;
    u32 blocks, threads;
    Stream *awaited;
    size_t number; // For WAIT: of the awaited stream's jobs.
} Job;

struct Stream {
    Stream *next;
    Job *first, **last;
    size_t queued, done;
};

typedef struct {
    Stream *stream;
    size_t number;
} Event;

static Stream *streams;
static int live_streams, live_events;

static void drain(Stream *stream, size_t number) {
    while (stream->done < number) {
        Job *job = stream->first;
        stream->first = job->next;
        if (!stream->first) stream->last = &stream->first;
        if (job->kind == WAIT) drain(job->awaited, job->number);
        if (job->kind == COPY)
            for (size_t row = 0; row < job->height; row += 1)
                memcpy(job->into + row * job->into_pitch, job->from + row * job->from_pitch, job->width);
        if (job->kind == LAUNCH) launch(job->kernel->run, job->taken, job->blocks, job->threads);
        free(job->taken);
        free(job);
        stream->done += 1;
    }
}

static void drain_all(void) {
    for (Stream *stream = streams; stream; stream = stream->next) drain(stream, stream->queued);
}

static int queue(Stream *stream, Job given) {
    Job *job = malloc(sizeof *job);
    *job = given;
    job->next = NULL;
    *stream->last = job;
    stream->last = &job->next;
    stream->queued += 1;
    return OK;
}

static int copy(Stream *stream, Job job, int from_device, int into_device) {
    if (job.width == 0 || job.height == 0) return OK;
    const size_t from_bytes = (job.height - 1) * job.from_pitch + job.width;
    const size_t into_bytes = (job.height - 1) * job.into_pitch + job.width;
    if (job.height > 1 && (job.from_pitch < job.width || job.into_pitch < job.width)) return INVALID;
    if (from_device && !holds(job.from, from_bytes, 1)) return INVALID;
    if (into_device && !holds(job.into, into_bytes, 1)) return INVALID;
    const int pinned = (from_device || holds(job.from, from_bytes, 0)) && (into_device || holds(job.into, into_bytes, 0));
    queue(stream, job);
    if (!pinned) {
        // The driver copies memory that is not pinned while the caller waits.
        detours += 1;
        drain(stream, stream->queued);
    }
    return OK;
}

// ---- what the driver exports ----

EXPORT int cuInit(unsigned flags) { return flags == 0 ? OK : INVALID; }
EXPORT int cuDriverGetVersion(int *version) { return *version = 13000, OK; }
// Two GPUs, which share one memory, and reach each other's.
static int is_gpu(int device) { return device >= 0 && device < GPUS ? OK : 101; }
EXPORT int cuDeviceGetCount(int *count) { return *count = GPUS, OK; }
EXPORT int cuDeviceGet(int *device, int ordinal) { return *device = ordinal, is_gpu(ordinal); }
EXPORT int cuDeviceGetName(char *name, int bytes, int device) {
    snprintf(name, bytes, "stand-in");
    return is_gpu(device);
}
EXPORT int cuDeviceGetUuid_v2(char uuid[16], int device) {
    snprintf(uuid, 16, "stand-in GPU %d", device);
    return is_gpu(device);
}
// Of a GPU and itself the driver says no.
EXPORT int cuDeviceCanAccessPeer(int *can, int device, int other) {
    return *can = device != other, is_gpu(device) == OK ? is_gpu(other) : 101;
}
EXPORT int cuDeviceTotalMem_v2(size_t *bytes, int device) { return *bytes = total(), is_gpu(device); }
EXPORT int cuDeviceGetAttribute(int *value, int attribute, int device) {
    // COMPUTE_CAPABILITY_MAJOR is 9, MINOR and MEMORY_POOLS_SUPPORTED are 0; CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM,
    // HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED.
    *value = attribute == 75 ? 9 : attribute == 91 || attribute == 103;
    return is_gpu(device);
}
static int contexts[GPUS];
EXPORT int cuDevicePrimaryCtxRetain(void **context, int device) {
    return is_gpu(device) == OK ? (*context = &contexts[device], OK) : 101;
}
EXPORT int cuDevicePrimaryCtxRelease_v2(int device) { return is_gpu(device); }
static _Thread_local void *current;
EXPORT int cuCtxGetCurrent(void **context) { return *context = current, OK; }
EXPORT int cuCtxSetCurrent(void *context) { return current = context, OK; }
EXPORT int cuCtxSynchronize(void) { LOCKED((drain_all(), OK)); }
EXPORT int cuGetErrorString(int error, const char **text) {
    *text = error == NO_MEMORY ? "out of memory" : error == INVALID ? "invalid argument" : "an error";
    return OK;
}
EXPORT int cuGetErrorName(int error, const char **text) { return cuGetErrorString(error, text); }

EXPORT int cuMemGetInfo_v2(size_t *unused, size_t *all) { LOCKED((*all = total(), *unused = total() - used, OK)); }

static int allocate(u8 **address, size_t bytes, Kind kind) {
    if (kind == DEVICE_MEMORY && used + bytes > total()) return NO_MEMORY;
    const size_t whole = (bytes + 255) / 256 * 256;
    *address = aligned_alloc(256, whole);
    memset(*address, 0xff, whole);
    put(*address, bytes, kind);
    used += kind == DEVICE_MEMORY ? bytes : 0;
    return OK;
}
static int unallocate(void *address, Kind kind) {
    Range *range = range_at(address, kind);
    if (!range) return INVALID;
    drain_all();
    const size_t bytes = forget(range);
    used -= kind == DEVICE_MEMORY ? bytes : 0;
    free(address);
    return OK;
}
EXPORT int cuMemAlloc_v2(u8 **address, size_t bytes) { LOCKED(allocate(address, bytes, DEVICE_MEMORY)); }
EXPORT int cuMemFree_v2(void *address) { LOCKED(unallocate(address, DEVICE_MEMORY)); }
EXPORT int cuMemHostAlloc(u8 **address, size_t bytes, unsigned flags) {
    (void)flags;
    LOCKED(allocate(address, bytes, HOST_MEMORY));
}
EXPORT int cuMemFreeHost(void *address) { LOCKED(unallocate(address, HOST_MEMORY)); }

static int is_writable(const u8 *at) {
    FILE *maps = fopen("/proc/self/maps", "r");
    unsigned long from, to;
    char access[5] = "", line[512];
    int found = 0;
    while (!found && maps && fgets(line, sizeof line, maps))
        if (sscanf(line, "%lx-%lx %4s", &from, &to, access) == 3) found = (u64)at >= from && (u64)at < to;
    if (maps) fclose(maps);
    return found && access[1] == 'w';
}
static int pin(u8 *start, size_t bytes, int read_only) {
    // Memory that is mapped for reading only must be said to be.
    if (!read_only && !is_writable(start)) return INVALID;
    for (Range *range = ranges; range; range = range->next)
        if (range->kind == REGISTERED && start < range->start + range->bytes && range->start < start + bytes)
            return ALREADY_PINNED;
    put(start, bytes, REGISTERED);
    return OK;
}
EXPORT int cuMemHostRegister_v2(void *start, size_t bytes, unsigned flags) {
    LOCKED(pin(start, bytes, (flags & 8) != 0));
}
EXPORT int cuMemHostUnregister(void *start) {
    LOCKED(range_at(start, REGISTERED) ? (drain_all(), forget(range_at(start, REGISTERED)), OK) : NOT_PINNED);
}

typedef struct {
    int kind, handles, location, device;
} Properties;
// Pinned memory of a GPU, for which descriptors may be asked for.
static int is_good(const Properties *of) {
    return of->kind == 1 && (of->handles & ~BY_DESCRIPTOR) == 0 && of->location == 1 && is_gpu(of->device) == OK;
}
EXPORT int cuMemGetAllocationGranularity(size_t *bytes, const Properties *properties, int option) {
    return *bytes = GRANULE, option > 1 || !is_good(properties) ? INVALID : OK;
}
static int reserve(u8 **address, size_t bytes) {
    if (bytes == 0 || bytes % GRANULE) return INVALID;
    // Whatever touches it before it is mapped is stopped there.
    u8 *got = mmap(NULL, bytes + GRANULE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (got == MAP_FAILED) return NO_MEMORY;
    *address = (u8 *)(((u64)got + GRANULE - 1) / GRANULE * GRANULE);
    put(*address, bytes, RESERVED);
    return OK;
}
EXPORT int cuMemAddressReserve(u8 **address, size_t bytes, size_t alignment, void *wanted, u64 flags) {
    LOCKED(alignment || wanted || flags ? INVALID : reserve(address, bytes));
}
EXPORT int cuMemAddressFree(u8 *address, size_t bytes) {
    pthread_mutex_lock(&lock);
    Range *range = range_at(address, RESERVED);
    int outcome = range && range->bytes == bytes ? OK : INVALID;
    for (Mapping *mapping = mappings; mapping; mapping = mapping->next)
        if (mapping->start >= address && mapping->start < address + bytes) outcome = INVALID;
    if (outcome == OK) munmap(address, forget(range));
    pthread_mutex_unlock(&lock);
    return outcome;
}
static void let_go(Physical *memory) {
    if (--memory->holders > 0) return;
    used -= memory->made_here ? memory->bytes : 0;
    close(memory->fd);
    free(memory);
}
static int make(Physical **handle, size_t bytes, int exportable) {
    if (bytes % GRANULE) return INVALID;
    if (used + bytes > total()) return NO_MEMORY;
    Physical *memory = malloc(sizeof *memory);
    *memory = (Physical){memfd_create("stand-in", MFD_CLOEXEC), bytes, 1, exportable, 1};
    if (ftruncate(memory->fd, bytes)) return NO_MEMORY;
    u8 *at = mmap(NULL, bytes, PROT_WRITE, MAP_SHARED, memory->fd, 0);
    memset(at, 0xff, bytes);
    munmap(at, bytes);
    used += bytes;
    *handle = memory;
    return OK;
}
EXPORT int cuMemCreate(Physical **handle, size_t bytes, const Properties *properties, u64 flags) {
    LOCKED(flags || !is_good(properties) ? INVALID : make(handle, bytes, properties->handles == BY_DESCRIPTOR));
}
static int export(int *descriptor, const Physical *memory) {
    if (!memory->exportable) return INVALID;
    return (*descriptor = fcntl(memory->fd, F_DUPFD_CLOEXEC, 0)) < 0 ? NO_MEMORY : OK;
}
EXPORT int cuMemExportToShareableHandle(int *descriptor, const Physical *memory, int kind, u64 flags) {
    LOCKED(flags || kind != BY_DESCRIPTOR ? INVALID : export(descriptor, memory));
}
// What is imported is memory of whoever made it, and is there until nobody has it any more.
static int import(Physical **handle, int descriptor) {
    struct stat is;
    if (fstat(descriptor, &is) || is.st_size == 0 || is.st_size % GRANULE) return INVALID;
    const int fd = fcntl(descriptor, F_DUPFD_CLOEXEC, 0);
    if (fd < 0) return NO_MEMORY;
    Physical *memory = malloc(sizeof *memory);
    *memory = (Physical){fd, is.st_size, 1, 0, 0};
    *handle = memory;
    return OK;
}
EXPORT int cuMemImportFromShareableHandle(Physical **handle, void *descriptor, int kind) {
    LOCKED(kind != BY_DESCRIPTOR ? INVALID : import(handle, (int)(u64)descriptor));
}
EXPORT int cuMemRelease(Physical *handle) { LOCKED((let_go(handle), OK)); }
static int map(u8 *address, size_t bytes, Physical *memory) {
    int reserved = 0;
    for (Range *range = ranges; range; range = range->next)
        reserved |= range->kind == RESERVED && address >= range->start && address + bytes <= range->start + range->bytes;
    if (!reserved || bytes != memory->bytes || (u64)address % GRANULE || range_at(address, MAPPED)) return INVALID;
    if (mmap(address, bytes, PROT_NONE, MAP_SHARED | MAP_FIXED, memory->fd, 0) == MAP_FAILED) return NO_MEMORY;
    memory->holders += 1;
    Mapping *mapping = malloc(sizeof *mapping);
    *mapping = (Mapping){mappings, address, memory};
    mappings = mapping;
    put(address, bytes, MAPPED);
    return OK;
}
EXPORT int cuMemMap(u8 *address, size_t bytes, size_t offset, Physical *handle, u64 flags) {
    LOCKED(offset || flags ? INVALID : map(address, bytes, handle));
}
static int allow(u8 *address, size_t bytes, int access) {
    for (size_t at = 0; at < bytes; at += GRANULE) {
        Range *range = range_at(address + at, MAPPED);
        if (!range) return INVALID;
        range->accessible = 1;
    }
    return mprotect(address, bytes, access) ? INVALID : OK;
}
typedef struct {
    int location, device, flags;
} Access;
EXPORT int cuMemSetAccess(u8 *address, size_t bytes, const Access *access, size_t count) {
    // To read only, or to read and write.
    const int reads = access->flags == 1 || access->flags == 3;
    const int good = count == 1 && access->location == 1 && is_gpu(access->device) == OK && reads;
    LOCKED(good ? allow(address, bytes, access->flags == 1 ? PROT_READ : PROT_READ | PROT_WRITE) : INVALID);
}
// One mapping or several, side by side: all of each.
static int unmap(u8 *address, size_t bytes) {
    size_t mapped = 0;
    for (Range *range = ranges; range; range = range->next) {
        const int within = range->start >= address && range->start + range->bytes <= address + bytes;
        if (range->kind == MAPPED && within) mapped += range->bytes;
    }
    if (!mapped || mapped != bytes) return INVALID;
    // What is queued and uses it is not waited for: it finds nothing there.
    for (Range **at = &ranges; *at;) {
        Range *range = *at;
        if (range->kind == MAPPED && range->start >= address && range->start < address + bytes) {
            *at = range->next;
            free(range);
        } else {
            at = &range->next;
        }
    }
    mmap(address, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
    for (Mapping **at = &mappings; *at;) {
        Mapping *mapping = *at;
        if (mapping->start >= address && mapping->start < address + bytes) {
            *at = mapping->next;
            let_go(mapping->memory);
            free(mapping);
        } else {
            at = &mapping->next;
        }
    }
    return OK;
}
EXPORT int cuMemUnmap(u8 *address, size_t bytes) { LOCKED(unmap(address, bytes)); }

static int make_stream(Stream **stream) {
    *stream = malloc(sizeof **stream);
    **stream = (Stream){streams, NULL, &(*stream)->first, 0, 0};
    streams = *stream;
    live_streams += 1;
    return OK;
}
EXPORT int cuStreamCreate(Stream **stream, unsigned flags) {
    (void)flags;
    LOCKED(make_stream(stream));
}
// Its bookkeeping stays: events may still name it.
EXPORT int cuStreamDestroy_v2(Stream *stream) { LOCKED((drain(stream, stream->queued), live_streams -= 1, OK)); }
EXPORT int cuStreamSynchronize(Stream *stream) { LOCKED((drain(stream, stream->queued), OK)); }
EXPORT int cuStreamWaitEvent(Stream *stream, Event *event, unsigned flags) {
    (void)flags;
    LOCKED(event->stream ? queue(stream, (Job){.kind = WAIT, .awaited = event->stream, .number = event->number}) : OK);
}
EXPORT int cuEventCreate(Event **event, unsigned flags) {
    (void)flags;
    LOCKED((*event = calloc(1, sizeof **event), live_events += 1, OK));
}
EXPORT int cuEventRecord(Event *event, Stream *stream) { LOCKED((*event = (Event){stream, stream->queued}, OK)); }
EXPORT int cuEventSynchronize(Event *event) {
    LOCKED((event->stream ? drain(event->stream, event->number) : (void)0, OK));
}
EXPORT int cuEventQuery(Event *event) {
    LOCKED(!event->stream || event->stream->done >= event->number ? OK : NOT_READY);
}
EXPORT int cuEventDestroy_v2(Event *event) { LOCKED((free(event), live_events -= 1, OK)); }

EXPORT int cuMemcpyHtoDAsync_v2(u8 *into, const void *from, size_t bytes, Stream *stream) {
    LOCKED(copy(stream, (Job){.kind = COPY, .into = into, .from = from, .width = bytes, .height = 1}, 0, 1));
}
EXPORT int cuMemcpyDtoHAsync_v2(void *into, const u8 *from, size_t bytes, Stream *stream) {
    LOCKED(copy(stream, (Job){.kind = COPY, .into = into, .from = from, .width = bytes, .height = 1}, 1, 0));
}
EXPORT int cuMemcpyDtoDAsync_v2(u8 *into, const u8 *from, size_t bytes, Stream *stream) {
    LOCKED(copy(stream, (Job){.kind = COPY, .into = into, .from = from, .width = bytes, .height = 1}, 1, 1));
}

typedef struct {
    size_t from_x, from_y;
    unsigned from_kind;
    const u8 *from_host, *from_device;
    void *from_array;
    size_t from_pitch, into_x, into_y;
    unsigned into_kind;
    u8 *into_host, *into_device;
    void *into_array;
    size_t into_pitch, width, height;
} Copy2d;

EXPORT int cuMemcpy2DAsync_v2(const Copy2d *of, Stream *stream) {
    const int from_device = of->from_kind == 2, into_device = of->into_kind == 2;
    const Job job = {
        .kind = COPY,
        .from = from_device ? of->from_device : of->from_host,
        .from_pitch = of->from_pitch,
        .into = into_device ? of->into_device : of->into_host,
        .into_pitch = of->into_pitch,
        .width = of->width,
        .height = of->height,
    };
    LOCKED(of->from_x || of->from_y || of->into_x || of->into_y ? INVALID : copy(stream, job, from_device, into_device));
}

EXPORT int cuModuleLoadData(void **module, const void *image) { return *module = (void *)image, image ? OK : INVALID; }
EXPORT int cuModuleUnload(void *module) { return module ? OK : INVALID; }
EXPORT int cuModuleGetFunction(const Kernel **function, void *module, const char *name) {
    for (size_t at = 0; module && at < sizeof kernels / sizeof *kernels; at += 1) {
        *function = &kernels[at];
        if (!strcmp(name, kernels[at].name)) return OK;
    }
    return 500;
}
EXPORT int cuLaunchKernel(
    const Kernel *kernel, unsigned blocks, unsigned y, unsigned z, unsigned threads, unsigned thread_y,
    unsigned thread_z, unsigned shared, Stream *stream, void **parameters, void **extra
) {
    if (!blocks || !threads || threads > 1024 || y * z * thread_y * thread_z != 1 || shared || extra) return INVALID;
    // Kernels do the same with any number of threads, and systems have fewer.
    const u32 shown = threads < THREADS_SHOWN ? threads : THREADS_SHOWN;
    LOCKED(queue(
        stream,
        (Job){.kind = LAUNCH, .kernel = kernel, .taken = kernel->take(parameters), .blocks = blocks, .threads = shown}
    ));
}

// ONNX Runtime's provider for CUDA is linked with this one, and NVRTC asks for the other, and can do without.
EXPORT int cuTensorMapEncodeTiled(void) { return 801; }
EXPORT int cuGetExportTable(const void **table, const void *id) { return *table = NULL, id ? INVALID : OK; }

// ---- for tests ----

// What is allocated, mapped or pinned, and streams and events; and copies of memory that was not pinned.
EXPORT void stand_in_counts(size_t counts[4]) {
    pthread_mutex_lock(&lock);
    counts[0] = used;
    counts[1] = counts[2] = 0;
    for (Range *range = ranges; range; range = range->next) counts[1] += 1;
    counts[2] = live_streams + live_events;
    counts[3] = detours;
    pthread_mutex_unlock(&lock);
}
