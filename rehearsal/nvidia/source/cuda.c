/* SPDX-License-Identifier: MIT
 * libcuda.so.1 of the simulated card: devices, contexts and the bookkeeping of device memory.
 *
 * It runs nothing: loading a module answers CUDA_ERROR_NOT_SUPPORTED, so that no benchmark can take it for a
 * GPU. An allocation enters the process into the card's table, and nvidia-smi then lists it. */
#define _GNU_SOURCE
#include "gpu.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#define API __attribute__((visibility("default")))
enum {
    OK = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NOT_INITIALIZED = 3, UNAVAILABLE = 46, NO_DEVICE = 100,
    INVALID_DEVICE = 101, INVALID_CONTEXT = 201, VERSION_MISMATCH = 803, NOT_SUPPORTED = 801, UNKNOWN = 999,
};

/* What a context costs on the card before anything is allocated. Invented; the real figure is of this order. */
#define CONTEXT_BYTES (128 * GPU_MIB)
#define ALLOCATIONS 1024

typedef struct { unsigned device; int users; } context_t;

static int ready;
static context_t context;
static uint64_t allocated;
static struct { uint64_t address, size; } allocations[ALLOCATIONS];

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
    if (!gpu_driver()->count) return NO_DEVICE;
    ready = 1;
    return OK;
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

/* A client that finds the MPS control socket is let in by the server; any other must have the card to itself. */
static int has_mps(void)
{
    struct stat status;
    char name[256];
    const char *folder = getenv("CUDA_MPS_PIPE_DIRECTORY");
    snprintf(name, sizeof name, "%s/control", folder ? folder : "/tmp/nvidia-mps");
    return stat(name, &status) == 0 && S_ISSOCK(status.st_mode);
}

static int admitted(unsigned device)
{
    unsigned mode = gpu_settings()->compute_mode[device];
    if (mode == GPU_COMPUTE_PROHIBITED) return 0;
    return mode != GPU_COMPUTE_EXCLUSIVE || has_mps() || !gpu_busy(device);
}

static int enter(unsigned device)
{
    if (!ready) return NOT_INITIALIZED;
    if (device >= gpu_driver()->count) return INVALID_DEVICE;
    if (!context.users) {
        if (!admitted(device)) return UNAVAILABLE;
        if (gpu_register(device, CONTEXT_BYTES)) return UNKNOWN;
        context.device = device;
    }
    context.users++;
    return OK;
}
static int leave(void)
{
    if (!context.users) return INVALID_CONTEXT;
    if (--context.users) return OK;
    memset(allocations, 0, sizeof allocations);
    allocated = 0;
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
API int cuCtxSynchronize(void) { return context.users ? OK : INVALID_CONTEXT; }

/* CUDA_MPS_PINNED_DEVICE_MEM_LIMIT, `0=4G` or `0=512M`, counts for clients of a server only. */
static uint64_t pinned_limit(void)
{
    unsigned device;
    unsigned long long value;
    char unit = 'M';
    const char *text = getenv("CUDA_MPS_PINNED_DEVICE_MEM_LIMIT");
    if (!text || !has_mps() || sscanf(text, "%u=%llu%c", &device, &value, &unit) < 2 || device != context.device)
        return UINT64_MAX;
    return value * GPU_MIB * (unit == 'G' ? 1024 : 1);
}

API int cuMemGetInfo_v2(size_t *free_bytes, size_t *total)
{
    if (!context.users) return INVALID_CONTEXT;
    uint64_t used = gpu_used_bytes(context.device) + 417 * GPU_MIB;
    *total = gpu_total_bytes(context.device);
    *free_bytes = used < *total ? *total - used : 0;
    return OK;
}

API int cuMemAlloc_v2(uint64_t *address, size_t size)
{
    size_t free_bytes, total;
    static uint64_t next = 0x7f0000000000ull;
    if (!size) return INVALID_VALUE;
    if (cuMemGetInfo_v2(&free_bytes, &total)) return INVALID_CONTEXT;
    if (size > free_bytes || allocated + size > pinned_limit()) return OUT_OF_MEMORY;
    for (int n = 0; n < ALLOCATIONS; n++) {
        if (allocations[n].size) continue;
        *address = allocations[n].address = next;
        allocations[n].size = size;
        next += (size + 0xffff) & ~0xffffull;
        allocated += size;
        return gpu_register(context.device, CONTEXT_BYTES + allocated) ? UNKNOWN : OK;
    }
    return OUT_OF_MEMORY;
}
API int cuMemFree_v2(uint64_t address)
{
    for (int n = 0; n < ALLOCATIONS; n++) {
        if (!allocations[n].size || allocations[n].address != address) continue;
        allocated -= allocations[n].size;
        allocations[n].size = 0;
        return gpu_register(context.device, CONTEXT_BYTES + allocated) ? UNKNOWN : OK;
    }
    return INVALID_VALUE;
}

API int cuModuleLoadData(void **module, const void *image) { (void)module; (void)image; return NOT_SUPPORTED; }
API int cuModuleLoadDataEx(void **module, const void *image, unsigned count, int *options, void **values)
{
    (void)count;
    (void)options;
    (void)values;
    return cuModuleLoadData(module, image);
}
