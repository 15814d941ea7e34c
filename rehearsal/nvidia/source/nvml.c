/* SPDX-License-Identifier: MIT
 * libnvidia-ml.so.1 of a simulated RTX A4000: the functions that nvidia-ml-py and nvidia-smi ask for.
 *
 * Figures with a source: 16376 MiB (geerlingguy/raspberry-pi-pcie-devices#692, with 8 W, P8 and 31 C at rest),
 * 15957 MiB of them free at rest and a 100 W limit accepted (rammsguns/llm-rig#100), 140 W, 735/1560 MHz and
 * 256 bit (datasheet), link generation 1 at rest. Invented: vbios version, temperature thresholds,
 * maximum clocks, BAR1 size, every figure under load. */
#define _GNU_SOURCE
#include "gpu.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define API __attribute__((visibility("default")))
#define NAME "NVIDIA RTX A4000"
#define RESERVED_MIB 417
#define POWER_DEFAULT_MW 140000u
#define POWER_MIN_MW 100000u
#define POWER_MAX_MW 140000u

enum {
    OK = 0, UNINITIALIZED = 1, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, NO_PERMISSION = 4, NOT_FOUND = 6,
    INSUFFICIENT_SIZE = 7, TIMEOUT = 10, LOST = 15,
};

typedef const gpu_device_t *device_t;
typedef unsigned long long u64;

static int users;

/* Every call on a device checks the library and the card first, as the driver would. */
static int check(device_t device, const void *answer, int *index)
{
    if (!users) return UNINITIALIZED;
    *index = (int)(device - gpu_driver()->devices);
    if (!device || !answer || *index < 0 || *index >= (int)gpu_driver()->count) return INVALID_ARGUMENT;
    return gpu_fault(*index, "lost", 0) ? LOST : OK;
}

#define CHECK(answer) \
    int i, error = check(device, answer, &i); \
    if (error) return error

static int text(char *buffer, unsigned size, const char *value)
{
    if (!buffer) return INVALID_ARGUMENT;
    if (strlen(value) >= size) return INSUFFICIENT_SIZE;
    strcpy(buffer, value);
    return OK;
}

API int nvmlInitWithFlags(unsigned flags)
{
    (void)flags;
    int error = gpu_open(DRIVER_VERSION);
    if (!error) users++;
    return error;
}
API int nvmlInit_v2(void) { return nvmlInitWithFlags(0); }
API int nvmlInit(void) { return nvmlInitWithFlags(0); }

API int nvmlShutdown(void)
{
    if (!users) return UNINITIALIZED;
    if (!--users) gpu_close();
    return OK;
}

API const char *nvmlErrorString(int error)
{
    switch (error) {
    case OK: return "Success";
    case UNINITIALIZED: return "Uninitialized";
    case INVALID_ARGUMENT: return "Invalid Argument";
    case NOT_SUPPORTED: return "Not Supported";
    case NO_PERMISSION: return "Insufficient Permissions";
    case NOT_FOUND: return "Not Found";
    case INSUFFICIENT_SIZE: return "Insufficient Size";
    case GPU_DRIVER_NOT_LOADED: return "Driver Not Loaded";
    case TIMEOUT: return "Timeout";
    case LOST: return "GPU is lost";
    case GPU_VERSION_MISMATCH: return "Driver/library version mismatch";
    default: return "Unknown Error";
    }
}

API int nvmlSystemGetDriverVersion(char *buffer, unsigned size)
{
    return users ? text(buffer, size, gpu_driver()->version) : UNINITIALIZED;
}
API int nvmlSystemGetNVMLVersion(char *buffer, unsigned size) { return text(buffer, size, "13." DRIVER_VERSION); }
API int nvmlSystemGetCudaDriverVersion_v2(int *version)
{
    if (!version) return INVALID_ARGUMENT;
    *version = CUDA_VERSION;
    return OK;
}
API int nvmlSystemGetCudaDriverVersion(int *version) { return nvmlSystemGetCudaDriverVersion_v2(version); }

API int nvmlSystemGetProcessName(unsigned pid, char *buffer, unsigned size)
{
    char link[40], name[256];
    if (!users) return UNINITIALIZED;
    snprintf(link, sizeof link, "/proc/%u/exe", pid);
    ssize_t length = readlink(link, name, sizeof name - 1);
    if (length < 0) return NOT_FOUND;
    name[length] = 0;
    return text(buffer, size, name);
}

API int nvmlDeviceGetCount_v2(unsigned *count)
{
    if (!users) return UNINITIALIZED;
    if (!count) return INVALID_ARGUMENT;
    *count = gpu_driver()->count;
    return OK;
}
API int nvmlDeviceGetCount(unsigned *count) { return nvmlDeviceGetCount_v2(count); }

API int nvmlDeviceGetHandleByIndex_v2(unsigned index, device_t *device)
{
    if (!users) return UNINITIALIZED;
    if (!device || index >= gpu_driver()->count) return INVALID_ARGUMENT;
    if (gpu_fault((int)index, "lost", 0)) return LOST;
    *device = &gpu_driver()->devices[index];
    return OK;
}
API int nvmlDeviceGetHandleByIndex(unsigned index, device_t *device)
{
    return nvmlDeviceGetHandleByIndex_v2(index, device);
}

API int nvmlDeviceGetHandleByUUID(const char *uuid, device_t *device)
{
    for (unsigned n = 0; users && uuid && n < gpu_driver()->count; n++)
        if (!strcmp(uuid, gpu_driver()->devices[n].uuid)) return nvmlDeviceGetHandleByIndex_v2(n, device);
    return users ? NOT_FOUND : UNINITIALIZED;
}

/* NVML writes the domain with eight digits, the kernel with four: both are taken. */
API int nvmlDeviceGetHandleByPciBusId_v2(const char *bus_id, device_t *device)
{
    unsigned domain, bus, slot, d, b, s;
    if (!users) return UNINITIALIZED;
    if (!bus_id || sscanf(bus_id, "%x:%x:%x", &domain, &bus, &slot) != 3) return INVALID_ARGUMENT;
    for (unsigned n = 0; n < gpu_driver()->count; n++)
        if (sscanf(gpu_driver()->devices[n].address, "%x:%x:%x", &d, &b, &s) == 3 && d == domain && b == bus && s == slot)
            return nvmlDeviceGetHandleByIndex_v2(n, device);
    return NOT_FOUND;
}

API int nvmlDeviceGetIndex(device_t device, unsigned *index) { CHECK(index); *index = (unsigned)i; return OK; }
API int nvmlDeviceGetMinorNumber(device_t device, unsigned *minor) { CHECK(minor); *minor = (unsigned)i; return OK; }
API int nvmlDeviceGetName(device_t device, char *buffer, unsigned size) { CHECK(buffer); return text(buffer, size, NAME); }
API int nvmlDeviceGetUUID(device_t device, char *buffer, unsigned size) { CHECK(buffer); return text(buffer, size, device->uuid); }
API int nvmlDeviceGetSerial(device_t device, char *buffer, unsigned size) { CHECK(buffer); return text(buffer, size, "simulated"); }
API int nvmlDeviceGetVbiosVersion(device_t device, char *buffer, unsigned size) { CHECK(buffer); return text(buffer, size, "94.04.00.00.00"); }
API int nvmlDeviceGetBrand(device_t device, int *brand) { CHECK(brand); *brand = 14; return OK; } /* NVIDIA RTX */
API int nvmlDeviceGetArchitecture(device_t device, unsigned *architecture) { CHECK(architecture); *architecture = 7; return OK; } /* Ampere */
API int nvmlDeviceGetNumGpuCores(device_t device, unsigned *cores) { CHECK(cores); *cores = 6144; return OK; }
API int nvmlDeviceGetMemoryBusWidth(device_t device, unsigned *bits) { CHECK(bits); *bits = 256; return OK; }

API int nvmlDeviceGetCudaComputeCapability(device_t device, int *major, int *minor)
{
    CHECK(major);
    *major = 8;
    *minor = 6;
    return OK;
}

typedef struct {
    char legacy[16];
    unsigned domain, bus, device, id, subsystem;
    char bus_id[32];
} pci_t;

API int nvmlDeviceGetPciInfo_v3(device_t device, pci_t *pci)
{
    CHECK(pci);
    memset(pci, 0, sizeof *pci);
    sscanf(device->address, "%x:%x:%x", &pci->domain, &pci->bus, &pci->device);
    snprintf(pci->legacy, sizeof pci->legacy, "%04X:%02X:%02X.0", pci->domain & 0xffff, pci->bus & 0xff, pci->device & 0x1f);
    snprintf(pci->bus_id, sizeof pci->bus_id, "%08X:%02X:%02X.0", pci->domain, pci->bus, pci->device);
    pci->id = device->device << 16 | device->vendor;
    pci->subsystem = device->subsystem;
    return OK;
}
API int nvmlDeviceGetPciInfo_v2(device_t device, pci_t *pci) { return nvmlDeviceGetPciInfo_v3(device, pci); }

API int nvmlDeviceGetMigMode(device_t device, unsigned *current, unsigned *pending)
{
    CHECK(current);
    (void)pending;
    return NOT_SUPPORTED;
}

API int nvmlDeviceGetPerformanceState(device_t device, int *state)
{
    CHECK(state);
    *state = gpu_busy((unsigned)i) ? 2 : 8;
    return OK;
}

/* Version 1 counts what the driver reserves as used; version 2 tells it apart. */
API int nvmlDeviceGetMemoryInfo(device_t device, u64 *info)
{
    CHECK(info);
    info[0] = gpu_total_bytes((unsigned)i);
    info[2] = gpu_used_bytes((unsigned)i) + RESERVED_MIB * GPU_MIB;
    if (info[2] > info[0]) info[2] = info[0];
    info[1] = info[0] - info[2];
    return OK;
}

typedef struct { unsigned version; u64 total, reserved, free, used; } memory_v2_t;

API int nvmlDeviceGetMemoryInfo_v2(device_t device, memory_v2_t *info)
{
    CHECK(info);
    info->total = gpu_total_bytes((unsigned)i);
    info->reserved = RESERVED_MIB * GPU_MIB;
    info->used = gpu_used_bytes((unsigned)i);
    if (info->used > info->total - info->reserved) info->used = info->total - info->reserved;
    info->free = info->total - info->reserved - info->used;
    return OK;
}

API int nvmlDeviceGetBAR1MemoryInfo(device_t device, u64 *info)
{
    CHECK(info);
    info[0] = 256 * GPU_MIB;
    info[2] = 2 * GPU_MIB;
    info[1] = info[0] - info[2];
    return OK;
}

API int nvmlDeviceGetTemperature(device_t device, int sensor, unsigned *celsius)
{
    CHECK(celsius);
    (void)sensor;
    *celsius = (unsigned)gpu_fault(i, "temperature_c", gpu_busy((unsigned)i) ? 47 : 31);
    return OK;
}

typedef struct { unsigned version; int sensor, celsius; } temperature_t;

API int nvmlDeviceGetTemperatureV(device_t device, temperature_t *temperature)
{
    CHECK(temperature);
    return nvmlDeviceGetTemperature(device, temperature->sensor, (unsigned *)&temperature->celsius);
}

API int nvmlDeviceGetTemperatureThreshold(device_t device, int threshold, unsigned *celsius)
{
    CHECK(celsius);
    switch (threshold) {
    case 0: *celsius = 98; return OK; /* shutdown */
    case 1: *celsius = 95; return OK; /* slowdown */
    case 3: *celsius = 90; return OK; /* highest at which clocks are kept */
    default: return NOT_SUPPORTED;
    }
}

API int nvmlDeviceGetFanSpeed(device_t device, unsigned *percent)
{
    CHECK(percent);
    *percent = (unsigned)gpu_fault(i, "fan_percent", 41);
    return OK;
}

API int nvmlDeviceGetPowerManagementLimit(device_t device, unsigned *milliwatts)
{
    CHECK(milliwatts);
    unsigned set = gpu_settings()->power_limit_mw[i];
    *milliwatts = set ? set : POWER_DEFAULT_MW;
    return OK;
}
API int nvmlDeviceGetEnforcedPowerLimit(device_t device, unsigned *milliwatts)
{
    return nvmlDeviceGetPowerManagementLimit(device, milliwatts);
}
API int nvmlDeviceGetPowerManagementDefaultLimit(device_t device, unsigned *milliwatts)
{
    CHECK(milliwatts);
    *milliwatts = POWER_DEFAULT_MW;
    return OK;
}
API int nvmlDeviceGetPowerManagementLimitConstraints(device_t device, unsigned *low, unsigned *high)
{
    CHECK(low);
    *low = POWER_MIN_MW;
    *high = POWER_MAX_MW;
    return OK;
}
API int nvmlDeviceSetPowerManagementLimit(device_t device, unsigned milliwatts)
{
    CHECK(device);
    if (!gpu_may_change()) return NO_PERMISSION;
    if (milliwatts < POWER_MIN_MW || milliwatts > POWER_MAX_MW) return INVALID_ARGUMENT;
    gpu_settings()->power_limit_mw[i] = milliwatts;
    return OK;
}
API int nvmlDeviceGetPowerUsage(device_t device, unsigned *milliwatts)
{
    unsigned limit;
    CHECK(milliwatts);
    nvmlDeviceGetPowerManagementLimit(device, &limit);
    *milliwatts = (unsigned)gpu_fault(i, "power_draw_mw", gpu_busy((unsigned)i) ? limit / 2 : 8000);
    return OK;
}
API int nvmlDeviceGetTotalEnergyConsumption(device_t device, u64 *millijoules)
{
    struct timespec now;
    CHECK(millijoules);
    clock_gettime(CLOCK_MONOTONIC, &now);
    *millijoules = (u64)now.tv_sec * 8000;
    return OK;
}

/* Clock kinds: 0 graphics, 1 SM, 2 memory, 3 video. */
API int nvmlDeviceGetClockInfo(device_t device, int kind, unsigned *megahertz)
{
    CHECK(megahertz);
    int busy = gpu_busy((unsigned)i);
    if (kind == 2) *megahertz = (unsigned)gpu_fault(i, "memory_clock_mhz", busy ? 7001 : 405);
    else *megahertz = (unsigned)gpu_fault(i, "sm_clock_mhz", busy ? 1560 : 210);
    return kind < 0 || kind > 3 ? INVALID_ARGUMENT : OK;
}
API int nvmlDeviceGetMaxClockInfo(device_t device, int kind, unsigned *megahertz)
{
    CHECK(megahertz);
    *megahertz = kind == 2 ? 7001 : 2100;
    return kind < 0 || kind > 3 ? INVALID_ARGUMENT : OK;
}

API int nvmlDeviceGetCurrentClocksEventReasons(device_t device, u64 *reasons)
{
    CHECK(reasons);
    *reasons = (u64)gpu_fault(i, "event_reasons", gpu_busy((unsigned)i) ? 0 : 1);
    return OK;
}
API int nvmlDeviceGetCurrentClocksThrottleReasons(device_t device, u64 *reasons)
{
    return nvmlDeviceGetCurrentClocksEventReasons(device, reasons);
}
API int nvmlDeviceGetSupportedClocksEventReasons(device_t device, u64 *reasons)
{
    CHECK(reasons);
    *reasons = 0x1ff;
    return OK;
}

API int nvmlDeviceGetUtilizationRates(device_t device, unsigned *rates)
{
    CHECK(rates);
    rates[0] = (unsigned)gpu_fault(i, "utilization_percent", 0);
    rates[1] = (unsigned)gpu_fault(i, "memory_utilization_percent", 0);
    return OK;
}
API int nvmlDeviceGetEncoderUtilization(device_t device, unsigned *percent, unsigned *period_us)
{
    CHECK(percent);
    *percent = 0;
    *period_us = 167000;
    return OK;
}
API int nvmlDeviceGetDecoderUtilization(device_t device, unsigned *percent, unsigned *period_us)
{
    return nvmlDeviceGetEncoderUtilization(device, percent, period_us);
}

typedef struct { unsigned pid; u64 used; unsigned gpu_instance, compute_instance; } process_t;

/* Asked with too small a table the function says how large it should be, as NVML does. */
API int nvmlDeviceGetComputeRunningProcesses_v3(device_t device, unsigned *count, process_t *list)
{
    gpu_process_t all[GPU_CLIENTS];
    unsigned found = 0, room = count ? *count : 0;
    CHECK(count);
    int total = gpu_processes(all);
    for (int n = 0; n < total; n++) {
        if (all[n].device != (unsigned)i || !all[n].pid) continue;
        if (found < room && list) list[found] = (process_t){all[n].pid, all[n].used_bytes, ~0u, ~0u};
        found++;
    }
    *count = found;
    return found > room ? INSUFFICIENT_SIZE : OK;
}
API int nvmlDeviceGetComputeRunningProcesses_v2(device_t device, unsigned *count, process_t *list)
{
    return nvmlDeviceGetComputeRunningProcesses_v3(device, count, list);
}
API int nvmlDeviceGetGraphicsRunningProcesses_v3(device_t device, unsigned *count, process_t *list)
{
    CHECK(count);
    (void)list;
    *count = 0;
    return OK;
}
API int nvmlDeviceGetMPSComputeRunningProcesses_v3(device_t device, unsigned *count, process_t *list)
{
    return nvmlDeviceGetGraphicsRunningProcesses_v3(device, count, list);
}

/* The real link falls back to generation 1 when nothing runs. */
API int nvmlDeviceGetMaxPcieLinkGeneration(device_t device, unsigned *generation)
{
    CHECK(generation);
    *generation = (unsigned)gpu_fault(i, "link_generation_max", 4);
    return OK;
}
API int nvmlDeviceGetCurrPcieLinkGeneration(device_t device, unsigned *generation)
{
    unsigned best;
    CHECK(generation);
    nvmlDeviceGetMaxPcieLinkGeneration(device, &best);
    *generation = (unsigned)gpu_fault(i, "link_generation", gpu_busy((unsigned)i) ? best : 1);
    return OK;
}
API int nvmlDeviceGetMaxPcieLinkWidth(device_t device, unsigned *lanes)
{
    CHECK(lanes);
    *lanes = (unsigned)gpu_fault(i, "link_width_max", 16);
    return OK;
}
API int nvmlDeviceGetCurrPcieLinkWidth(device_t device, unsigned *lanes)
{
    CHECK(lanes);
    *lanes = (unsigned)gpu_fault(i, "link_width", 16);
    return OK;
}
API int nvmlDeviceGetPcieReplayCounter(device_t device, unsigned *replays)
{
    CHECK(replays);
    *replays = (unsigned)gpu_fault(i, "replay_count", 0);
    return OK;
}

API int nvmlDeviceGetEccMode(device_t device, unsigned *current, unsigned *pending)
{
    CHECK(current);
    *current = *pending = (unsigned)gpu_fault(i, "ecc_mode", 0);
    return OK;
}
/* Error kind 0 corrected, 1 uncorrected; no counters while ECC is off. */
API int nvmlDeviceGetTotalEccErrors(device_t device, int kind, int counter, u64 *errors)
{
    CHECK(errors);
    (void)counter;
    if (!gpu_fault(i, "ecc_mode", 0)) return NOT_SUPPORTED;
    *errors = (u64)gpu_fault(i, kind ? "ecc_uncorrected" : "ecc_corrected", 0);
    return OK;
}
API int nvmlDeviceGetRemappedRows(device_t device, unsigned *corrected, unsigned *uncorrected, unsigned *pending, unsigned *failure)
{
    CHECK(corrected);
    *corrected = (unsigned)gpu_fault(i, "remapped_corrected", 0);
    *uncorrected = (unsigned)gpu_fault(i, "remapped_uncorrected", 0);
    *pending = (unsigned)gpu_fault(i, "remapped_pending", 0);
    *failure = (unsigned)gpu_fault(i, "remapped_failure", 0);
    return OK;
}

/* A mode of the card: read by anybody, changed by root. */
#define MODE(Name, field, valid) \
    API int nvmlDeviceGet##Name(device_t device, unsigned *mode) \
    { \
        CHECK(mode); \
        *mode = gpu_settings()->field[i]; \
        return OK; \
    } \
    API int nvmlDeviceSet##Name(device_t device, unsigned mode) \
    { \
        CHECK(device); \
        if (!gpu_may_change()) return NO_PERMISSION; \
        if (!(valid)) return INVALID_ARGUMENT; \
        gpu_settings()->field[i] = mode; \
        return OK; \
    }

MODE(PersistenceMode, persistence, mode <= 1)
MODE(ComputeMode, compute_mode, mode == 0 || mode == 2 || mode == 3)
MODE(AccountingMode, accounting, mode <= 1)

API int nvmlDeviceGetAccountingPids(device_t device, unsigned *count, unsigned *pids)
{
    CHECK(count);
    (void)pids;
    *count = 0;
    return OK;
}

/* Events: the only one that can be waited for is the Xid of the fault file. */
typedef struct { device_t device; u64 type, data; unsigned gpu_instance, compute_instance; } event_t;
typedef struct { device_t device; long seen; } event_set_t;

API int nvmlDeviceGetSupportedEventTypes(device_t device, u64 *types)
{
    CHECK(types);
    *types = 8;
    return OK;
}
API int nvmlEventSetCreate(event_set_t **set)
{
    if (!users) return UNINITIALIZED;
    *set = calloc(1, sizeof **set);
    return *set ? OK : GPU_UNKNOWN;
}
API int nvmlDeviceRegisterEvents(device_t device, u64 types, event_set_t *set)
{
    CHECK(set);
    if (types & ~8ull) return NOT_SUPPORTED;
    set->device = device;
    return OK;
}
API int nvmlEventSetWait_v2(event_set_t *set, event_t *event, unsigned timeout_ms)
{
    if (!users || !set || !event) return users ? INVALID_ARGUMENT : UNINITIALIZED;
    for (unsigned waited = 0; set->device; waited += 10) {
        long xid = gpu_fault((int)(set->device - gpu_driver()->devices), "xid", 0);
        if (xid && xid != set->seen) {
            set->seen = xid;
            *event = (event_t){set->device, 8, (u64)xid, ~0u, ~0u};
            return OK;
        }
        if (waited >= timeout_ms) break;
        usleep(10000);
    }
    return TIMEOUT;
}
API int nvmlEventSetFree(event_set_t *set)
{
    free(set);
    return OK;
}
