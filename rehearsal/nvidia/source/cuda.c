/* SPDX-License-Identifier: MIT
 * libcuda.so.1 of the simulated card: devices, contexts and the bookkeeping of device memory.
 *
 * It runs nothing: loading a module answers CUDA_ERROR_NOT_SUPPORTED, so that no benchmark can take it for a
 * GPU. An allocation enters the process into the card's table, and nvidia-smi then lists it; copies go to memory of
 * this machine, so that what was written can be read again, at a speed that says nothing.
 *
 * MPS: a process becomes a client when it can connect to the socket of the (real) control daemon. It is closed again
 * at once, for the daemon serves one caller at a time and a server could not be started without a GPU; the daemon
 * logs "Unable to accept connection". What is simulated of the server is that clients share an exclusive card, and
 * the memory limit of the client's own environment. Not simulated: thread percentages, priorities, limits set in the
 * daemon, that a server serves one user id (a second one's clients would wait), that a fault ends all clients. */
#define _GNU_SOURCE
#include "gpu.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#define API __attribute__((visibility("default")))
enum {
    OK = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NOT_INITIALIZED = 3, UNAVAILABLE = 46, NO_DEVICE = 100,
    INVALID_DEVICE = 101, INVALID_CONTEXT = 201, NOT_SUPPORTED = 801, VERSION_MISMATCH = 803, MPS_CONNECTION_FAILED = 805,
    UNKNOWN = 999,
};

/* What a context costs on the card before anything is allocated. Invented; the real figure is of this order. */
#define CONTEXT_BYTES (128 * GPU_MIB)
#define ALLOCATIONS 1024

typedef struct { unsigned device; int users; } context_t;

static int ready;
static int mps; /* this process is a client of MPS */
static context_t context;
static uint64_t allocated;
static struct { uint64_t address, size; } allocations[ALLOCATIONS];

/* 0, or the errno of a connection to the control daemon. A daemon that is busy with its queue full gets a second. */
static int connect_to(const struct sockaddr_un *address, int type)
{
    for (int attempt = 0;; attempt++) {
        int fd = socket(AF_UNIX, type | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
        int error = fd < 0 || connect(fd, (const struct sockaddr *)address, sizeof *address) ? errno : 0;
        if (fd >= 0) close(fd);
        if (error != EAGAIN || attempt == 100) return error;
        usleep(10000);
    }
}

/* Without a pipe folder, or without a socket in it, a program runs without MPS (nvidia-cuda-mps-control(1)). A socket
 * that is there but cannot be reached or that nobody listens at is an error. */
static int join_mps(void)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    const char *folder = getenv("CUDA_MPS_PIPE_DIRECTORY");
    int length = snprintf(address.sun_path, sizeof address.sun_path, "%s/control", folder ? folder : "/tmp/nvidia-mps");
    mps = 0;
    if (length >= (int)sizeof address.sun_path) return MPS_CONNECTION_FAILED;
    /* The daemon's socket is of the first type. */
    int error = connect_to(&address, SOCK_SEQPACKET);
    if (error == EPROTOTYPE) error = connect_to(&address, SOCK_STREAM);
    mps = error == 0;
    return error && error != ENOENT && error != ENOTDIR ? MPS_CONNECTION_FAILED : OK;
}

static int any_device(void)
{
    for (unsigned i = 0; i < gpu_driver()->count; i++)
        if (!gpu_lost(i)) return 1;
    return 0;
}

API int cuInit(unsigned flags)
{
    (void)flags;
    const char *visible = getenv("CUDA_VISIBLE_DEVICES");
    if (visible && (!*visible || !strcmp(visible, "-1"))) return NO_DEVICE;
    switch (gpu_open(DRIVER_VERSION)) {
    case GPU_OK: break;
    case GPU_DRIVER_NOT_LOADED: return NO_DEVICE;
    case GPU_VERSION_MISMATCH: return VERSION_MISMATCH;
    default: return UNKNOWN;
    }
    if (!any_device()) return NO_DEVICE;
    int error = join_mps();
    ready = !error;
    return error;
}

API int cuDriverGetVersion(int *version)
{
    *version = CUDA_VERSION;
    return OK;
}

API int cuGetErrorName(int error, const char **name)
{
    switch (error) {
    case OK: *name = "CUDA_SUCCESS"; break;
    case INVALID_VALUE: *name = "CUDA_ERROR_INVALID_VALUE"; break;
    case OUT_OF_MEMORY: *name = "CUDA_ERROR_OUT_OF_MEMORY"; break;
    case NOT_INITIALIZED: *name = "CUDA_ERROR_NOT_INITIALIZED"; break;
    case UNAVAILABLE: *name = "CUDA_ERROR_DEVICE_UNAVAILABLE"; break;
    case NO_DEVICE: *name = "CUDA_ERROR_NO_DEVICE"; break;
    case INVALID_DEVICE: *name = "CUDA_ERROR_INVALID_DEVICE"; break;
    case INVALID_CONTEXT: *name = "CUDA_ERROR_INVALID_CONTEXT"; break;
    case NOT_SUPPORTED: *name = "CUDA_ERROR_NOT_SUPPORTED"; break;
    case MPS_CONNECTION_FAILED: *name = "CUDA_ERROR_MPS_CONNECTION_FAILED"; break;
    case VERSION_MISMATCH: *name = "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH"; break;
    default: *name = "CUDA_ERROR_UNKNOWN";
    }
    return OK;
}
API int cuGetErrorString(int error, const char **text)
{
    if (error != NOT_SUPPORTED) return cuGetErrorName(error, text);
    *text = "operation not supported: this card is simulated and runs no code";
    return OK;
}

API int cuDeviceGetCount(int *count)
{
    if (!ready) return NOT_INITIALIZED;
    *count = (int)gpu_driver()->count;
    return OK;
}
API int cuDeviceGet(int *device, int ordinal)
{
    if (!ready) return NOT_INITIALIZED;
    if (ordinal < 0 || ordinal >= (int)gpu_driver()->count) return INVALID_DEVICE;
    *device = ordinal;
    return OK;
}
API int cuDeviceGetName(char *name, int size, int device)
{
    (void)device;
    snprintf(name, (size_t)size, "NVIDIA RTX A4000");
    return ready ? OK : NOT_INITIALIZED;
}
API int cuDeviceGetUuid_v2(unsigned char *uuid, int device)
{
    if (!ready) return NOT_INITIALIZED;
    const char *digits = gpu_driver()->devices[device].uuid + 4;
    for (int n = 0; n < 16 && *digits; n++) {
        unsigned byte;
        if (*digits == '-') digits++;
        if (sscanf(digits, "%2x", &byte) != 1) break;
        uuid[n] = (unsigned char)byte;
        digits += 2;
    }
    return OK;
}
API int cuDeviceGetUuid(unsigned char *uuid, int device) { return cuDeviceGetUuid_v2(uuid, device); }
API int cuDeviceTotalMem_v2(size_t *bytes, int device)
{
    if (!ready) return NOT_INITIALIZED;
    *bytes = gpu_total_bytes((unsigned)device);
    return OK;
}
API int cuDeviceGetAttribute(int *value, int attribute, int device)
{
    (void)device;
    if (!ready) return NOT_INITIALIZED;
    switch (attribute) {
    case 1: *value = 1024; return OK;     /* threads per block */
    case 10: *value = 32; return OK;      /* warp size */
    case 13: *value = 1560000; return OK; /* clock, kHz */
    case 16: *value = 48; return OK;      /* multiprocessors */
    case 36: *value = 7001000; return OK; /* memory clock, kHz */
    case 37: *value = 256; return OK;     /* memory bus, bit */
    case 38: *value = 4194304; return OK; /* L2, bytes */
    case 75: *value = 8; return OK;       /* compute capability */
    case 76: *value = 6; return OK;
    default: *value = 0; return OK;
    }
}

/* An exclusive card takes one process, or the clients of an MPS server, which to the card are one. */
static int admitted(unsigned device)
{
    gpu_process_t list[GPU_CLIENTS];
    unsigned mode = gpu_settings()->compute_mode[device];
    if (mode == GPU_COMPUTE_PROHIBITED) return 0;
    if (mode != GPU_COMPUTE_EXCLUSIVE) return 1;
    int count = gpu_processes(list);
    for (int n = 0; n < count; n++)
        if (list[n].device == device && list[n].pid != (unsigned)getpid() && !(mps && list[n].mps)) return 0;
    return 1;
}

static int enter(unsigned device)
{
    if (!ready) return NOT_INITIALIZED;
    if (device >= gpu_driver()->count) return INVALID_DEVICE;
    if (gpu_lost(device)) return UNKNOWN;
    if (!context.users) {
        if (!admitted(device)) return UNAVAILABLE;
        if (gpu_register(device, CONTEXT_BYTES, mps)) return UNKNOWN;
        /* Two may have come at the same moment. */
        if (!admitted(device)) return gpu_unregister(), UNAVAILABLE;
        context.device = device;
    }
    context.users++;
    return OK;
}

static void release(int n)
{
    munmap((void *)allocations[n].address, allocations[n].size);
    allocated -= allocations[n].size;
    allocations[n].size = 0;
}

static int leave(void)
{
    if (!context.users) return INVALID_CONTEXT;
    if (--context.users) return OK;
    for (int n = 0; n < ALLOCATIONS; n++)
        if (allocations[n].size) release(n);
    gpu_unregister();
    return OK;
}

API int cuCtxCreate_v2(context_t **made, unsigned flags, int device)
{
    (void)flags;
    *made = &context;
    return enter((unsigned)device);
}
API int cuCtxDestroy_v2(context_t *old) { return old == &context ? leave() : INVALID_CONTEXT; }
API int cuDevicePrimaryCtxRetain(context_t **made, int device)
{
    *made = &context;
    return enter((unsigned)device);
}
API int cuDevicePrimaryCtxRelease_v2(int device) { (void)device; return leave(); }
API int cuCtxSetCurrent(context_t *next) { (void)next; return ready ? OK : NOT_INITIALIZED; }
API int cuCtxGetDevice(int *device) { *device = (int)context.device; return context.users ? OK : INVALID_CONTEXT; }

/* Of a call that needs the card: a context whose card was lost answers nothing else. */
static int check(void)
{
    if (!context.users) return INVALID_CONTEXT;
    return gpu_lost(context.device) ? UNKNOWN : OK;
}
API int cuCtxSynchronize(void) { return check(); }

/* CUDA_MPS_PINNED_DEVICE_MEM_LIMIT, `0=4G` or `0=4096M,1=512M`, counts for clients of a server only. */
static uint64_t pinned_limit(void)
{
    const char *text = mps ? getenv("CUDA_MPS_PINNED_DEVICE_MEM_LIMIT") : NULL;
    for (; text && *text; text = strchr(text, ','), text += text ? 1 : 0) {
        unsigned device;
        unsigned long long value;
        char unit = 'M';
        if (sscanf(text, "%u=%llu%c", &device, &value, &unit) < 2 || device != context.device) continue;
        return value * GPU_MIB * (unit == 'G' || unit == 'g' ? 1024 : 1);
    }
    return UINT64_MAX;
}

API int cuMemGetInfo_v2(size_t *free_bytes, size_t *total)
{
    int error = check();
    if (error) return error;
    uint64_t used = gpu_used_bytes(context.device) + 417 * GPU_MIB;
    *total = gpu_total_bytes(context.device);
    *free_bytes = used < *total ? *total - used : 0;
    return OK;
}

API int cuMemAlloc_v2(uint64_t *address, size_t size)
{
    size_t free_bytes, total;
    int n = 0, error = cuMemGetInfo_v2(&free_bytes, &total);
    if (error || !size) return error ? error : INVALID_VALUE;
    if (size > free_bytes || allocated + size > pinned_limit()) return OUT_OF_MEMORY;
    while (n < ALLOCATIONS && allocations[n].size) n++;
    if (n == ALLOCATIONS) return OUT_OF_MEMORY;
    /* Takes memory of this machine only where it is written. */
    void *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) return OUT_OF_MEMORY;
    *address = allocations[n].address = (uint64_t)memory;
    allocations[n].size = size;
    allocated += size;
    return gpu_register(context.device, CONTEXT_BYTES + allocated, mps) ? UNKNOWN : OK;
}
API int cuMemFree_v2(uint64_t address)
{
    int error = check();
    if (error) return error;
    for (int n = 0; n < ALLOCATIONS; n++) {
        if (!allocations[n].size || allocations[n].address != address) continue;
        release(n);
        return gpu_register(context.device, CONTEXT_BYTES + allocated, mps) ? UNKNOWN : OK;
    }
    return INVALID_VALUE;
}

static int copy(uint64_t device_address, uint64_t to, const void *from, size_t size)
{
    int error = check();
    if (error) return error;
    for (int n = 0; n < ALLOCATIONS; n++) {
        uint64_t begin = allocations[n].address, room = allocations[n].size;
        if (!room || device_address < begin || device_address - begin > room || size > room - (device_address - begin)) continue;
        memcpy((void *)to, from, size);
        return OK;
    }
    return INVALID_VALUE;
}
API int cuMemcpyHtoD_v2(uint64_t to, const void *from, size_t size) { return copy(to, to, from, size); }
API int cuMemcpyDtoH_v2(void *to, uint64_t from, size_t size) { return copy(from, (uint64_t)to, (const void *)from, size); }

/* Memory of the host that a copy engine could reach. */
API int cuMemAllocHost_v2(void **memory, size_t size)
{
    int error = check();
    if (error) return error;
    *memory = malloc(size);
    return *memory ? OK : OUT_OF_MEMORY;
}
API int cuMemFreeHost(void *memory)
{
    free(memory);
    return check();
}

API int cuModuleLoadData(void **module, const void *image) { (void)module; (void)image; return NOT_SUPPORTED; }
API int cuModuleLoadDataEx(void **module, const void *image, unsigned count, int *options, void **values)
{
    (void)count;
    (void)options;
    (void)values;
    return cuModuleLoadData(module, image);
}
