/* SPDX-License-Identifier: MIT
 * A small libnvidia-ml.so.1 for the benchmarks. OLD: as a driver has it that lacks newer names. From the environment:
 *   SIM_NVML       NAME:CODE, this function is answered with CODE
 *   SIM_PROCESSES  file of lines `compute|mps|graphics PID`, read at each question; this process is always listed
 *   SIM_PID        it is listed by this number in the place of its own, once it has a context (SIM_CONTEXT, of cuda.cpp)
 *   SIM_BUSY       percent of use */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static int asked(const char *name)
{
    const char *text = getenv("SIM_NVML");
    size_t length = strlen(name);
    return text && !strncmp(text, name, length) && text[length] == ':' ? atoi(text + length + 1) : 0;
}
#define ENTER int code = asked(__func__); if (code) return code
static int card;
#define CARD ENTER; if (device != &card) return 2
static int put(char *buffer, unsigned size, const char *text) { return snprintf(buffer, size, "%s", text) >= (int)size ? 7 : 0; }

int nvmlInit_v2(void) { ENTER; return 0; }
int nvmlInitWithFlags(unsigned flags) { ENTER; return flags ? 2 : 0; }
int nvmlShutdown(void) { ENTER; return 0; }
const char *nvmlErrorString(int code) { return code == 18 ? "Driver/library version mismatch" : "Unknown Error"; }
int nvmlSystemGetDriverVersion(char *buffer, unsigned size) { ENTER; return put(buffer, size, "580.95.05"); }
int nvmlSystemGetCudaDriverVersion_v2(int *version) { ENTER; *version = 13000; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **device) { ENTER; *device = &card; return index ? 2 : 0; }
int nvmlDeviceGetName(void *device, char *buffer, unsigned size) { CARD; return put(buffer, size, "NVIDIA RTX A4000"); }
int nvmlDeviceGetUUID(void *device, char *buffer, unsigned size) { CARD; return put(buffer, size, "GPU-1"); }
int nvmlDeviceGetSerial(void *device, char *buffer, unsigned size)
{
    CARD;
    const char *text = getenv("SIM_SERIAL");
    return text ? put(buffer, size, text) : 3;
}
int nvmlDeviceGetPciInfo_v3(void *device, void *info)
{
    CARD;
    struct { char legacy[16]; unsigned domain, bus, device, id, subsystem; char bus_id[32]; } pci = {
        "0000:01:00.0", 0, 1, 0, 0x24b010de, 0, "00000000:01:00.0"};
    memcpy(info, &pci, sizeof pci);
    return 0;
}
int nvmlDeviceGetCudaComputeCapability(void *device, int *major, int *minor) { CARD; *major = 8; *minor = 6; return 0; }
int nvmlDeviceGetMemoryInfo(void *device, uint64_t *info) { CARD; info[0] = 16376ull << 20; info[1] = 15ull << 30; info[2] = 1ull << 30; return 0; }
int nvmlDeviceGetNumGpuCores(void *device, unsigned *value) { CARD; *value = 6144; return 0; }
int nvmlDeviceGetMaxClockInfo(void *device, int kind, unsigned *value) { CARD; *value = kind == 2 ? 7001 : 2100; return 0; }
int nvmlDeviceGetClockInfo(void *device, int kind, unsigned *value) { CARD; *value = kind == 2 ? 7000 : kind == 1 ? 1500 : 0; return kind == 1 || kind == 2 ? 0 : 2; }
int nvmlDeviceGetPowerUsage(void *device, unsigned *value) { CARD; *value = 90500; return 0; }
int nvmlDeviceGetTemperature(void *device, int sensor, unsigned *value) { CARD; *value = 61; return sensor ? 2 : 0; }
int nvmlDeviceGetCurrPcieLinkGeneration(void *device, unsigned *value) { CARD; *value = 4; return 0; }
int nvmlDeviceGetCurrPcieLinkWidth(void *device, unsigned *value) { CARD; *value = 16; return 0; }
int nvmlDeviceGetMaxPcieLinkGeneration(void *device, unsigned *value) { CARD; *value = 4; return 0; }
int nvmlDeviceGetMaxPcieLinkWidth(void *device, unsigned *value) { CARD; *value = 16; return 0; }
int nvmlDeviceGetUtilizationRates(void *device, unsigned *rates)
{
    CARD;
    rates[0] = getenv("SIM_BUSY") ? (unsigned)atoi(getenv("SIM_BUSY")) : 0;
    rates[1] = 0;
    return 0;
}
int nvmlDeviceGetCurrentClocksThrottleReasons(void *device, uint64_t *reasons) { CARD; *reasons = 4; return 0; }
#ifndef OLD
int nvmlDeviceGetMemoryBusWidth(void *device, unsigned *value) { CARD; *value = 256; return 0; }
int nvmlDeviceGetCurrentClocksEventReasons(void *device, uint64_t *reasons) { CARD; *reasons = 4; return 0; }
#endif

typedef struct { unsigned pid; uint64_t used; unsigned instance, compute; } process_t;

static int list(const char *which, unsigned *count, process_t *rows)
{
    unsigned found = 0, room = *count, pid;
    char kind[16];
    FILE *file = getenv("SIM_PROCESSES") ? fopen(getenv("SIM_PROCESSES"), "r") : NULL;
    const char *number = getenv("SIM_PID");
    if (!strcmp(which, "compute") && room && (!number || getenv("SIM_CONTEXT")))
        rows[found++] = (process_t){number ? (unsigned)atoi(number) : (unsigned)getpid(), 1 << 20, ~0u, ~0u};
    while (file && fscanf(file, "%15s %u", kind, &pid) == 2) {
        if (strcmp(kind, which)) continue;
        if (found < room) rows[found] = (process_t){pid, 1 << 20, ~0u, ~0u};
        found++;
    }
    if (file) fclose(file);
    *count = found;
    return found > room ? 7 : 0;
}
#ifdef OLD
#define LIST(name) name##_v2
#else
#define LIST(name) name##_v3
#endif
int LIST(nvmlDeviceGetComputeRunningProcesses)(void *device, unsigned *count, process_t *rows) { CARD; return list("compute", count, rows); }
int LIST(nvmlDeviceGetMPSComputeRunningProcesses)(void *device, unsigned *count, process_t *rows) { CARD; return list("mps", count, rows); }
int LIST(nvmlDeviceGetGraphicsRunningProcesses)(void *device, unsigned *count, process_t *rows) { CARD; return list("graphics", count, rows); }
