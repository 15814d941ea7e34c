/* SPDX-License-Identifier: MIT
 * libnvidia-ml.so.1 of a simulated RTX A4000: the functions that nvidia-ml-py and nvidia-smi ask for.
 *
 * Figures with a source: 16376 MiB (geerlingguy/raspberry-pi-pcie-devices#692, with 8 W, P8 and 31 C at rest),
 * 15957 MiB of them free at rest and a 100 W limit accepted (rammsguns/llm-rig#100), 140 W, 735/1560 MHz and
 * 256 bit (datasheet), link generation 1 at rest, 2100 MHz at most (RTX A6000: NVIDIA forum 203772), 6.25 % of the
 * memory for ECC (CUDA C++ Best Practices Guide). Invented: vbios version, temperature thresholds, memory clocks and
 * steps of the graphics clock, BAR1 size, every figure under load. */
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
#define REST_MW 8000u
#define REST_C 31
#define CLOCK_MIN_MHZ 210u
#define CLOCK_MAX_MHZ 2100u
#define CLOCK_STEP_MHZ 15u
#define CLOCK_BOOST_MHZ 1560u
#define SHUTDOWN_C 98
#define SLOWDOWN_C 95
#define GPU_MAX_C 90

/* Reasons for lower clocks. */
enum { REASON_IDLE = 0x1, REASON_POWER_CAP = 0x4, REASON_HW_SLOWDOWN = 0x8, REASON_SW_THERMAL = 0x20, REASON_HW_THERMAL = 0x40 };

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
    return gpu_lost((unsigned)*index) ? LOST : OK;
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
    case 13: return "Function Not Found";
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
    if (gpu_lost(index)) return LOST;
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

static unsigned power_limit(int i)
{
    unsigned set = gpu_settings()->power_limit_mw[i];
    return set ? set : POWER_DEFAULT_MW;
}

/* What the load would draw without a limit. */
static unsigned power_wanted(int i)
{
    unsigned wanted = gpu_load((unsigned)i) * (POWER_MAX_MW / 100);
    return wanted > REST_MW ? wanted : REST_MW;
}

static unsigned power_draw(int i)
{
    unsigned wanted = power_wanted(i), limit = power_limit(i);
    return (unsigned)gpu_fault(i, "power_draw_mw", wanted < limit ? wanted : limit);
}

/* Heat, no more than the loop of a thermal policy needs: without inertia, so that the next reading shows a change.
 * The card has 31 C at rest, and `heat_c_per_w` more for each watt that it draws beyond. `temperature_c` fixes the
 * temperature; both together: what the card has at its default power limit, load or no load, and it follows the
 * limit from there. */
static int heat(int i)
{
    double per_watt = gpu_fault_real(i, "heat_c_per_w", -1);
    long fixed = gpu_fault(i, "temperature_c", -1);
    if (fixed >= 0 && per_watt < 0) return (int)fixed;
    if (fixed >= 0) return (int)(fixed - per_watt * (POWER_DEFAULT_MW - power_limit(i)) / 1000 + 0.5);
    return (int)(REST_C + (per_watt < 0 ? 0.26 : per_watt) * ((double)power_draw(i) - REST_MW) / 1000 + 0.5);
}

static u64 reasons_now(int i)
{
    int celsius = heat(i);
    u64 reasons = gpu_busy((unsigned)i) ? 0 : REASON_IDLE;
    if (power_wanted(i) > power_limit(i)) reasons |= REASON_POWER_CAP;
    if (celsius >= GPU_MAX_C) reasons |= REASON_SW_THERMAL;
    if (celsius >= SLOWDOWN_C) reasons |= REASON_HW_SLOWDOWN | REASON_HW_THERMAL;
    return (u64)gpu_fault(i, "event_reasons", (long)reasons);
}

API int nvmlDeviceGetTemperature(device_t device, int sensor, unsigned *celsius)
{
    CHECK(celsius);
    if (sensor) return INVALID_ARGUMENT;
    *celsius = (unsigned)heat(i);
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
    case 0: *celsius = SHUTDOWN_C; return OK;
    case 1: *celsius = SLOWDOWN_C; return OK;
    case 3: *celsius = GPU_MAX_C; return OK; /* the highest at which clocks are kept */
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
    *milliwatts = power_limit(i);
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
    CHECK(milliwatts);
    *milliwatts = power_draw(i);
    return OK;
}
API int nvmlDeviceGetTotalEnergyConsumption(device_t device, u64 *millijoules)
{
    struct timespec now;
    CHECK(millijoules);
    clock_gettime(CLOCK_MONOTONIC, &now);
    *millijoules = (u64)now.tv_sec * REST_MW;
    return OK;
}

static const unsigned memory_clocks[] = {7001, 6501, 5001, 810, 405};
#define MEMORY_CLOCKS (sizeof memory_clocks / sizeof *memory_clocks)

/* The lock holds at rest too; a power cap or heat goes below it. */
static unsigned graphics_clock(int i)
{
    unsigned low = gpu_settings()->clock_min_mhz[i], high = gpu_settings()->clock_max_mhz[i];
    unsigned clock = gpu_busy((unsigned)i) ? CLOCK_BOOST_MHZ : CLOCK_MIN_MHZ;
    if (high && clock < low) clock = low;
    if (high && clock > high) clock = high;
    if (power_wanted(i) > power_limit(i)) clock = (unsigned)((u64)clock * power_limit(i) / power_wanted(i));
    if (heat(i) >= SLOWDOWN_C) clock /= 2;
    if (clock < CLOCK_MIN_MHZ) clock = CLOCK_MIN_MHZ;
    return (unsigned)gpu_fault(i, "sm_clock_mhz", clock);
}

/* Clock kinds: 0 graphics, 1 SM, 2 memory, 3 video. */
API int nvmlDeviceGetClockInfo(device_t device, int kind, unsigned *megahertz)
{
    CHECK(megahertz);
    if (kind < 0 || kind > 3) return INVALID_ARGUMENT;
    *megahertz = kind == 2 ? (unsigned)gpu_fault(i, "memory_clock_mhz", gpu_busy((unsigned)i) ? memory_clocks[0] : memory_clocks[4])
                           : graphics_clock(i);
    return OK;
}
API int nvmlDeviceGetMaxClockInfo(device_t device, int kind, unsigned *megahertz)
{
    CHECK(megahertz);
    if (kind < 0 || kind > 3) return INVALID_ARGUMENT;
    *megahertz = kind == 2 ? memory_clocks[0] : CLOCK_MAX_MHZ;
    return OK;
}
API int nvmlDeviceGetMaxCustomerBoostClock(device_t device, int kind, unsigned *megahertz)
{
    return nvmlDeviceGetMaxClockInfo(device, kind, megahertz);
}
/* Which clock: 0 the current one, 3 the highest; those between are of application clocks. */
API int nvmlDeviceGetClock(device_t device, int kind, int which, unsigned *megahertz)
{
    CHECK(megahertz);
    if (which == 0) return nvmlDeviceGetClockInfo(device, kind, megahertz);
    return which == 3 ? nvmlDeviceGetMaxClockInfo(device, kind, megahertz) : which < 0 || which > 3 ? INVALID_ARGUMENT : NOT_SUPPORTED;
}

API int nvmlDeviceGetSupportedMemoryClocks(device_t device, unsigned *count, unsigned *list)
{
    CHECK(count);
    unsigned room = *count;
    *count = MEMORY_CLOCKS;
    if (room < MEMORY_CLOCKS || !list) return INSUFFICIENT_SIZE;
    memcpy(list, memory_clocks, sizeof memory_clocks);
    return OK;
}
/* At the memory clock of a card at rest the graphics clock stays low. */
API int nvmlDeviceGetSupportedGraphicsClocks(device_t device, unsigned memory_mhz, unsigned *count, unsigned *list)
{
    CHECK(count);
    size_t known = 0;
    while (known < MEMORY_CLOCKS && memory_clocks[known] != memory_mhz) known++;
    if (known == MEMORY_CLOCKS) return NOT_FOUND;
    unsigned room = *count, highest = memory_mhz == memory_clocks[4] ? 420 : CLOCK_MAX_MHZ;
    *count = (highest - CLOCK_MIN_MHZ) / CLOCK_STEP_MHZ + 1;
    if (room < *count || !list) return INSUFFICIENT_SIZE;
    for (unsigned n = 0; n < *count; n++) list[n] = highest - n * CLOCK_STEP_MHZ;
    return OK;
}

/* A real card takes a lower bound of 0; what else it does at the edges of its range is not known to us. */
API int nvmlDeviceSetGpuLockedClocks(device_t device, unsigned low, unsigned high)
{
    CHECK(device);
    if (!gpu_may_change()) return NO_PERMISSION;
    if (low > high || high < CLOCK_MIN_MHZ || high > CLOCK_MAX_MHZ) return INVALID_ARGUMENT;
    gpu_settings()->clock_min_mhz[i] = low;
    gpu_settings()->clock_max_mhz[i] = high;
    return OK;
}
API int nvmlDeviceResetGpuLockedClocks(device_t device)
{
    CHECK(device);
    if (!gpu_may_change()) return NO_PERMISSION;
    gpu_settings()->clock_min_mhz[i] = gpu_settings()->clock_max_mhz[i] = 0;
    return OK;
}

API int nvmlDeviceGetCurrentClocksEventReasons(device_t device, u64 *reasons)
{
    CHECK(reasons);
    *reasons = reasons_now(i);
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
API int nvmlDeviceGetSupportedClocksThrottleReasons(device_t device, u64 *reasons)
{
    return nvmlDeviceGetSupportedClocksEventReasons(device, reasons);
}

API int nvmlDeviceGetUtilizationRates(device_t device, unsigned *rates)
{
    CHECK(rates);
    rates[0] = (unsigned)gpu_fault(i, "utilization_percent", gpu_fault(i, "load_percent", 0));
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
static int processes(device_t device, int mps_only, unsigned *count, process_t *list)
{
    gpu_process_t all[GPU_CLIENTS];
    unsigned found = 0, room = count ? *count : 0;
    CHECK(count);
    int total = gpu_processes(all);
    for (int n = 0; n < total; n++) {
        if (all[n].device != (unsigned)i || !all[n].pid || (mps_only && !all[n].mps)) continue;
        if (found < room && list) list[found] = (process_t){all[n].pid, all[n].used_bytes, ~0u, ~0u};
        found++;
    }
    *count = found;
    return found > room ? INSUFFICIENT_SIZE : OK;
}
API int nvmlDeviceGetComputeRunningProcesses_v3(device_t device, unsigned *count, process_t *list)
{
    return processes(device, 0, count, list);
}
API int nvmlDeviceGetComputeRunningProcesses_v2(device_t device, unsigned *count, process_t *list)
{
    return processes(device, 0, count, list);
}
/* A client of an MPS server has a compute context and an MPS one, nvidia-smi's M+C: it is in both lists. */
API int nvmlDeviceGetMPSComputeRunningProcesses_v3(device_t device, unsigned *count, process_t *list)
{
    return processes(device, 1, count, list);
}
API int nvmlDeviceGetMPSComputeRunningProcesses_v2(device_t device, unsigned *count, process_t *list)
{
    return processes(device, 1, count, list);
}
API int nvmlDeviceGetGraphicsRunningProcesses_v3(device_t device, unsigned *count, process_t *list)
{
    CHECK(count);
    (void)list;
    *count = 0;
    return OK;
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
API int nvmlDeviceGetGpuMaxPcieLinkGeneration(device_t device, unsigned *generation)
{
    CHECK(generation);
    *generation = 4;
    return OK;
}
/* Megabits a second and lane. */
API int nvmlDeviceGetPcieSpeed(device_t device, unsigned *speed)
{
    static const unsigned speeds[] = {0, 2500, 5000, 8000, 16000, 32000};
    unsigned generation;
    CHECK(speed);
    nvmlDeviceGetCurrPcieLinkGeneration(device, &generation);
    *speed = generation < sizeof speeds / sizeof *speeds ? speeds[generation] : 0;
    return OK;
}
/* NVML's number for 2.5, 5, 8 and 16 GT/s is the generation. */
API int nvmlDeviceGetPcieLinkMaxSpeed(device_t device, unsigned *speed)
{
    return nvmlDeviceGetMaxPcieLinkGeneration(device, speed);
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

/* A change is pending until the driver is loaded again: the module stand-in then makes it the current mode. */
API int nvmlDeviceGetEccMode(device_t device, unsigned *current, unsigned *pending)
{
    CHECK(current);
    *current = (unsigned)gpu_ecc((unsigned)i);
    *pending = (unsigned)gpu_fault(i, "ecc_mode", gpu_inforom((unsigned)i, "ecc", gpu_settings()->ecc[i]));
    return OK;
}
API int nvmlDeviceGetDefaultEccMode(device_t device, unsigned *mode)
{
    CHECK(mode);
    *mode = 0;
    return OK;
}
API int nvmlDeviceSetEccMode(device_t device, unsigned mode)
{
    CHECK(device);
    if (!gpu_may_change()) return NO_PERMISSION;
    if (mode > 1) return INVALID_ARGUMENT;
    return gpu_set_inforom((unsigned)i, "ecc", mode) ? GPU_UNKNOWN : OK;
}

/* Errors come from the fault file alone. Kind 0 corrected, 1 uncorrected; counter 0 since the driver was loaded, 1
 * over the card's life. Clearing a counter keeps what stood in it, and that is taken off from then on. */
static const char *const error_keys[] = {"ecc_corrected", "ecc_uncorrected"};
static const char *const aggregate_keys[] = {"ecc_corrected_aggregate", "ecc_uncorrected_aggregate"};

static u64 errors_so_far(int i, int kind, int counter)
{
    long recent = gpu_fault(i, error_keys[kind], 0);
    return (u64)(counter ? gpu_fault(i, aggregate_keys[kind], recent) : recent);
}
static int valid_counter(int i, int kind, int counter)
{
    if (kind < 0 || kind > 1 || counter < 0 || counter > 1) return INVALID_ARGUMENT;
    return gpu_ecc((unsigned)i) ? OK : NOT_SUPPORTED;
}

API int nvmlDeviceGetTotalEccErrors(device_t device, int kind, int counter, u64 *errors)
{
    CHECK(errors);
    if ((error = valid_counter(i, kind, counter))) return error;
    u64 all = errors_so_far(i, kind, counter);
    u64 cleared = counter ? (u64)gpu_inforom((unsigned)i, aggregate_keys[kind], 0) : gpu_settings()->ecc_cleared[i][kind];
    *errors = all > cleared ? all - cleared : 0;
    return OK;
}
/* Since Turing, counters are kept of DRAM (2) and SRAM (7) only. All errors are the DRAM's. */
API int nvmlDeviceGetMemoryErrorCounter(device_t device, int kind, int counter, int location, u64 *errors)
{
    CHECK(errors);
    if ((error = valid_counter(i, kind, counter))) return error;
    if (location == 2) return nvmlDeviceGetTotalEccErrors(device, kind, counter, errors);
    *errors = 0;
    return location == 7 ? OK : location < 0 || location > 7 ? INVALID_ARGUMENT : NOT_SUPPORTED;
}
API int nvmlDeviceClearEccErrorCounts(device_t device, int counter)
{
    CHECK(device);
    if (!gpu_may_change()) return NO_PERMISSION;
    for (int kind = 0; kind < 2; kind++) {
        if ((error = valid_counter(i, kind, counter))) return error;
        u64 all = errors_so_far(i, kind, counter);
        if (!counter) gpu_settings()->ecc_cleared[i][kind] = (uint32_t)all;
        else if (gpu_set_inforom((unsigned)i, aggregate_keys[kind], (long)all)) return GPU_UNKNOWN;
    }
    return OK;
}
/* Ampere remaps rows and retires no pages. */
API int nvmlDeviceGetRetiredPages(device_t device, int cause, unsigned *count, u64 *addresses)
{
    CHECK(count);
    (void)cause;
    (void)addresses;
    return NOT_SUPPORTED;
}
API int nvmlDeviceGetRetiredPages_v2(device_t device, int cause, unsigned *count, u64 *addresses, u64 *times)
{
    (void)times;
    return nvmlDeviceGetRetiredPages(device, cause, count, addresses);
}
API int nvmlDeviceGetRetiredPagesPendingStatus(device_t device, unsigned *pending)
{
    CHECK(pending);
    return NOT_SUPPORTED;
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

static int accounted(int i) { return gpu_settings()->accounting[i] != 0; }

static int running(unsigned pid, unsigned device)
{
    gpu_process_t all[GPU_CLIENTS];
    int total = gpu_processes(all);
    for (int n = 0; n < total; n++)
        if (all[n].pid == pid && all[n].device == device) return 1;
    return 0;
}

API int nvmlDeviceGetAccountingBufferSize(device_t device, unsigned *size)
{
    CHECK(size);
    *size = GPU_ACCOUNTED;
    return accounted(i) ? OK : NOT_SUPPORTED;
}
API int nvmlDeviceGetAccountingPids(device_t device, unsigned *count, unsigned *pids)
{
    CHECK(count);
    if (!accounted(i)) return NOT_SUPPORTED;
    const gpu_account_t *all = gpu_accounts();
    unsigned found = 0, room = *count;
    for (int n = 0; all && n < GPU_ACCOUNTED; n++) {
        if (!all[n].pid || all[n].device != (unsigned)i) continue;
        if (found < room && pids) pids[found] = all[n].pid;
        found++;
    }
    *count = found;
    return found > room ? INSUFFICIENT_SIZE : OK;
}

/* A card that runs nothing has no utilisation to tell; a process that was killed ended when it was last seen. */
typedef struct { unsigned gpu_percent, memory_percent; u64 most_bytes, time_ms, start_us; unsigned running, reserved[5]; } stats_t;

API int nvmlDeviceGetAccountingStats(device_t device, unsigned pid, stats_t *stats)
{
    CHECK(stats);
    if (!accounted(i)) return NOT_SUPPORTED;
    const gpu_account_t *all = gpu_accounts();
    for (int n = 0; all && n < GPU_ACCOUNTED; n++) {
        if (!pid || all[n].pid != pid || all[n].device != (unsigned)i) continue;
        unsigned alive = (unsigned)running(pid, (unsigned)i);
        u64 time_ms = alive ? 0 : (all[n].seen_us - all[n].started_us) / 1000;
        *stats = (stats_t){0, 0, all[n].most_bytes, time_ms, all[n].started_us, alive, {0}};
        return OK;
    }
    return NOT_FOUND;
}
/* Forgets those that have ended. */
API int nvmlDeviceClearAccountingPids(device_t device)
{
    CHECK(device);
    if (!gpu_may_change()) return NO_PERMISSION;
    if (!accounted(i)) return NOT_SUPPORTED;
    gpu_account_t *all = gpu_accounts();
    for (int n = 0; all && n < GPU_ACCOUNTED; n++)
        if (all[n].device == (unsigned)i && all[n].pid && !running(all[n].pid, (unsigned)i)) all[n].pid = 0;
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
