/* SPDX-License-Identifier: MIT
 * nvidia-smi of the simulated card. It knows the card through libnvidia-ml.so.1 alone, as the real one does, so
 * whatever makes NVML fail makes it fail with the same words. Its CSV is that of the real one; everything meant
 * for people says `simulated`. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

typedef unsigned long long u64;
typedef void *device_t;
typedef struct { unsigned pid; u64 used; unsigned gpu_instance, compute_instance; } process_t;
typedef struct { char legacy[16]; unsigned domain, bus, device, id, subsystem; char bus_id[32]; } pci_t;
typedef struct { unsigned version; u64 total, reserved, free, used; } memory_t;

#define MIB 1048576ull
#define PROCESSES 64

static void *library;
static int header = 1, units = 1;

/* One signature serves all: arguments go in registers, and a function takes only those it declares. */
static int nvml5(const char *name, void *a, void *b, void *c, void *d, void *e)
{
    int (*function)(void *, void *, void *, void *, void *) = (int (*)(void *, void *, void *, void *, void *))dlsym(library, name);
    return function ? function(a, b, c, d, e) : 13;
}
static int nvml(const char *name, void *a, void *b, void *c) { return nvml5(name, a, b, c, NULL, NULL); }
static const char *words(int error)
{
    const char *(*function)(int) = (const char *(*)(int))dlsym(library, "nvmlErrorString");
    return function ? function(error) : "Function Not Found";
}
static unsigned number(const char *name, device_t device)
{
    unsigned value = 0;
    nvml(name, device, &value, NULL);
    return value;
}
static void string(const char *name, device_t device, char *value)
{
    value[0] = 0;
    nvml(name, device, value, (void *)80);
}
static const char *enabled(unsigned value) { return value ? "Enabled" : "Disabled"; }
static const char *compute_mode(unsigned mode)
{
    return mode == 0 ? "Default" : mode == 2 ? "Prohibited" : mode == 3 ? "Exclusive_Process" : "Unknown";
}

static int start(void)
{
    library = dlopen("libnvidia-ml.so.1", RTLD_NOW);
    if (!library) {
        puts("NVIDIA-SMI couldn't find libnvidia-ml.so library in your system. Please make sure that the NVIDIA "
             "Display Driver is properly installed and present in your system.\n"
             "Please also try adding directory that contains libnvidia-ml.so to your system PATH.");
        return 12;
    }
    int error = nvml("nvmlInit_v2", NULL, NULL, NULL);
    if (error == 9)
        puts("NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver. Make sure that the latest "
             "NVIDIA driver is installed and running.\n");
    else if (error) {
        char version[80] = "";
        printf("Failed to initialize NVML: %s\n", words(error));
        nvml("nvmlSystemGetNVMLVersion", version, (void *)80, NULL);
        if (error == 18) printf("NVML library version: %s\n", version + 3);
    }
    return error > 255 ? 255 : error;
}

/* Plain numbers with a unit; the real tool writes memory in MiB, power with two digits. */
static int amount(char *out, const char *unit, double value, int digits)
{
    sprintf(out, "%.*f%s%s", digits, value, units && *unit ? " " : "", units ? unit : "");
    return 0;
}

static const char *unit_of(const char *field)
{
    if (!strncmp(field, "memory.", 7) || !strcmp(field, "used_gpu_memory") || !strcmp(field, "used_memory")) return " [MiB]";
    if (strstr(field, "power.") && !strstr(field, "management")) return " [W]";
    if (!strncmp(field, "clocks.", 7)) return " [MHz]";
    if (!strncmp(field, "utilization.", 12) || !strcmp(field, "fan.speed")) return " [%]";
    return "";
}

static const struct { const char *field, *function; long kind; const char *unit; } plain[] = {
    {"temperature.gpu", "nvmlDeviceGetTemperature", 0, ""},
    {"clocks.gr", "nvmlDeviceGetClockInfo", 0, "MHz"},
    {"clocks.current.graphics", "nvmlDeviceGetClockInfo", 0, "MHz"},
    {"clocks.sm", "nvmlDeviceGetClockInfo", 1, "MHz"},
    {"clocks.current.sm", "nvmlDeviceGetClockInfo", 1, "MHz"},
    {"clocks.mem", "nvmlDeviceGetClockInfo", 2, "MHz"},
    {"clocks.video", "nvmlDeviceGetClockInfo", 3, "MHz"},
    {"clocks.current.video", "nvmlDeviceGetClockInfo", 3, "MHz"},
    {"clocks.current.memory", "nvmlDeviceGetClockInfo", 2, "MHz"},
    {"clocks.max.graphics", "nvmlDeviceGetMaxClockInfo", 0, "MHz"},
    {"clocks.max.sm", "nvmlDeviceGetMaxClockInfo", 1, "MHz"},
    {"clocks.max.memory", "nvmlDeviceGetMaxClockInfo", 2, "MHz"},
    {"clocks.max.gr", "nvmlDeviceGetMaxClockInfo", 0, "MHz"},
    {"clocks.max.mem", "nvmlDeviceGetMaxClockInfo", 2, "MHz"},
    {"pcie.link.gen.current", "nvmlDeviceGetCurrPcieLinkGeneration", -1, ""},
    {"pcie.link.gen.gpucurrent", "nvmlDeviceGetCurrPcieLinkGeneration", -1, ""},
    {"pcie.link.gen.max", "nvmlDeviceGetMaxPcieLinkGeneration", -1, ""},
    {"pcie.link.gen.gpumax", "nvmlDeviceGetGpuMaxPcieLinkGeneration", -1, ""},
    {"pcie.link.width.current", "nvmlDeviceGetCurrPcieLinkWidth", -1, ""},
    {"pcie.link.width.max", "nvmlDeviceGetMaxPcieLinkWidth", -1, ""},
    {"pcie.replay_counter", "nvmlDeviceGetPcieReplayCounter", -1, ""},
    {"fan.speed", "nvmlDeviceGetFanSpeed", -1, "%"},
    {"accounting.buffer_size", "nvmlDeviceGetAccountingBufferSize", -1, ""},
};

static const struct { const char *field, *function; } strings[] = {
    {"name", "nvmlDeviceGetName"}, {"gpu_name", "nvmlDeviceGetName"}, {"uuid", "nvmlDeviceGetUUID"},
    {"gpu_uuid", "nvmlDeviceGetUUID"}, {"vbios_version", "nvmlDeviceGetVbiosVersion"}, {"serial", "nvmlDeviceGetSerial"},
};

static const struct { const char *field, *function; } limits[] = {
    {"power.draw", "nvmlDeviceGetPowerUsage"}, {"power.draw.instant", "nvmlDeviceGetPowerUsage"},
    {"power.draw.average", "nvmlDeviceGetPowerUsage"}, {"power.limit", "nvmlDeviceGetPowerManagementLimit"},
    {"enforced.power.limit", "nvmlDeviceGetEnforcedPowerLimit"},
    {"power.default_limit", "nvmlDeviceGetPowerManagementDefaultLimit"},
};

static const struct { const char *field, *function; } modes[] = {
    {"persistence_mode", "nvmlDeviceGetPersistenceMode"}, {"accounting.mode", "nvmlDeviceGetAccountingMode"},
};

static const struct { const char *name; u64 bit; } reasons[] = {
    {"gpu_idle", 0x1}, {"applications_clocks_setting", 0x2}, {"sw_power_cap", 0x4}, {"hw_slowdown", 0x8}, {"sync_boost", 0x10},
    {"sw_thermal_slowdown", 0x20}, {"hw_thermal_slowdown", 0x40}, {"hw_power_brake_slowdown", 0x80},
};

static int not_available(char *out)
{
    strcpy(out, "[N/A]");
    return 0;
}

static int value_from_tables(const char *field, device_t device, char *out)
{
    for (size_t n = 0; n < sizeof plain / sizeof *plain; n++) {
        unsigned value = 0;
        if (strcmp(field, plain[n].field)) continue;
        int error = plain[n].kind < 0 ? nvml(plain[n].function, device, &value, NULL)
                                      : nvml(plain[n].function, device, (void *)plain[n].kind, &value);
        return error ? not_available(out) : amount(out, plain[n].unit, value, 0);
    }
    for (size_t n = 0; n < sizeof strings / sizeof *strings; n++)
        if (!strcmp(field, strings[n].field)) return string(strings[n].function, device, out), 0;
    for (size_t n = 0; n < sizeof limits / sizeof *limits; n++)
        if (!strcmp(field, limits[n].field)) return amount(out, "W", number(limits[n].function, device) / 1000.0, 2);
    for (size_t n = 0; n < sizeof modes / sizeof *modes; n++)
        if (!strcmp(field, modes[n].field)) return strcpy(out, enabled(number(modes[n].function, device))), 0;
    return -1;
}

/* `clocks_event_reasons.NAME`, and the name that the group had before. */
static int reason_value(const char *field, device_t device, char *out)
{
    const char *groups[] = {"clocks_event_reasons.", "clocks_throttle_reasons."}, *name = NULL;
    u64 active = 0;
    for (int n = 0; n < 2; n++)
        if (!strncmp(field, groups[n], strlen(groups[n]))) name = field + strlen(groups[n]);
    if (!name) return -1;
    nvml(!strcmp(name, "supported") ? "nvmlDeviceGetSupportedClocksEventReasons" : "nvmlDeviceGetCurrentClocksEventReasons",
         device, &active, NULL);
    if (!strcmp(name, "active") || !strcmp(name, "supported")) return sprintf(out, "0x%016llX", active), 0;
    for (size_t n = 0; n < sizeof reasons / sizeof *reasons; n++)
        if (!strcmp(name, reasons[n].name)) return strcpy(out, active & reasons[n].bit ? "Active" : "Not Active"), 0;
    return -1;
}

/* `ecc.errors.KIND.COUNTER.PLACE` */
static int errors_value(const char *field, device_t device, char *out)
{
    static const struct { const char *place; long location; } places[] = {
        {"total", -1}, {"dram", 2}, {"device_memory", 2}, {"sram", 7}, {"l1_cache", 0}, {"l2_cache", 1},
        {"register_file", 3}, {"texture_memory", 4}, {"cbu", 6},
    };
    char kind[32], counter[32], place[32];
    u64 errors = 0;
    if (sscanf(field, "ecc.errors.%31[a-z].%31[a-z].%31[a-z0-9_]", kind, counter, place) != 3) return -1;
    long kind_number = !strcmp(kind, "uncorrected"), counter_number = !strcmp(counter, "aggregate");
    if ((!kind_number && strcmp(kind, "corrected")) || (!counter_number && strcmp(counter, "volatile"))) return -1;
    for (size_t n = 0; n < sizeof places / sizeof *places; n++) {
        if (strcmp(place, places[n].place)) continue;
        int error = places[n].location < 0
            ? nvml5("nvmlDeviceGetTotalEccErrors", device, (void *)kind_number, (void *)counter_number, &errors, NULL)
            : nvml5("nvmlDeviceGetMemoryErrorCounter", device, (void *)kind_number, (void *)counter_number,
                    (void *)places[n].location, &errors);
        return error ? not_available(out) : (sprintf(out, "%llu", errors), 0);
    }
    return -1;
}

static int ecc_value(const char *field, device_t device, char *out)
{
    unsigned current = 0, pending = 0, rows[4] = {0};
    nvml("nvmlDeviceGetEccMode", device, &current, &pending);
    nvml5("nvmlDeviceGetRemappedRows", device, &rows[0], &rows[1], &rows[2], &rows[3]);
    if (!strcmp(field, "ecc.mode.current")) return strcpy(out, enabled(current)), 0;
    if (!strcmp(field, "ecc.mode.pending")) return strcpy(out, enabled(pending)), 0;
    if (!strcmp(field, "remapped_rows.correctable")) return sprintf(out, "%u", rows[0]), 0;
    if (!strcmp(field, "remapped_rows.uncorrectable")) return sprintf(out, "%u", rows[1]), 0;
    if (!strcmp(field, "remapped_rows.pending")) return strcpy(out, rows[2] ? "Yes" : "No"), 0;
    if (!strcmp(field, "remapped_rows.failure")) return strcpy(out, rows[3] ? "Yes" : "No"), 0;
    if (!strncmp(field, "retired_pages.", 14)) return not_available(out);
    return errors_value(field, device, out);
}

static int value_of(const char *field, unsigned index, device_t device, char *out)
{
    unsigned low = 0, high = 0, rates[2] = {0};
    memory_t memory = {2u << 24 | sizeof(memory_t), 0, 0, 0, 0};
    pci_t pci;
    char now[32];
    if (!value_from_tables(field, device, out) || !ecc_value(field, device, out) || !reason_value(field, device, out)) return 0;
    nvml("nvmlDeviceGetPciInfo_v3", device, &pci, NULL);
    if (!strncmp(field, "memory.", 7)) {
        nvml("nvmlDeviceGetMemoryInfo_v2", device, &memory, NULL);
        u64 bytes = !strcmp(field + 7, "total") ? memory.total : !strcmp(field + 7, "used") ? memory.used
                  : !strcmp(field + 7, "free") ? memory.free : !strcmp(field + 7, "reserved") ? memory.reserved : ~0ull;
        return bytes == ~0ull ? -1 : amount(out, "MiB", (double)(bytes / MIB), 0);
    }
    if (!strcmp(field, "index")) return sprintf(out, "%u", index), 0;
    if (!strcmp(field, "count")) return nvml("nvmlDeviceGetCount_v2", &low, NULL, NULL), sprintf(out, "%u", low), 0;
    if (!strcmp(field, "driver_version")) return nvml("nvmlSystemGetDriverVersion", out, (void *)80, NULL);
    if (!strcmp(field, "pci.bus_id") || !strcmp(field, "gpu_bus_id")) return strcpy(out, pci.bus_id), 0;
    if (!strcmp(field, "pci.device_id")) return sprintf(out, "0x%08X", pci.id), 0;
    if (!strcmp(field, "pci.sub_device_id")) return sprintf(out, "0x%08X", pci.subsystem), 0;
    if (!strcmp(field, "compute_cap")) return nvml("nvmlDeviceGetCudaComputeCapability", device, &low, &high), sprintf(out, "%u.%u", low, high), 0;
    if (!strcmp(field, "compute_mode")) return strcpy(out, compute_mode(number("nvmlDeviceGetComputeMode", device))), 0;
    if (!strcmp(field, "pstate")) return sprintf(out, "P%u", number("nvmlDeviceGetPerformanceState", device)), 0;
    if (!strcmp(field, "mig.mode.current") || !strcmp(field, "temperature.memory")) return not_available(out);
    if (!strcmp(field, "power.management")) return strcpy(out, "Supported"), 0;
    if (!strcmp(field, "power.min_limit") || !strcmp(field, "power.max_limit")) {
        nvml("nvmlDeviceGetPowerManagementLimitConstraints", device, &low, &high);
        return amount(out, "W", (field[7] == 'i' ? low : high) / 1000.0, 2);
    }
    if (!strcmp(field, "utilization.gpu") || !strcmp(field, "utilization.memory")) {
        nvml("nvmlDeviceGetUtilizationRates", device, rates, NULL);
        return amount(out, "%", rates[field[12] == 'm'], 0);
    }
    if (!strcmp(field, "timestamp")) {
        time_t seconds = time(NULL);
        strftime(now, sizeof now, "%Y/%m/%d %H:%M:%S", localtime(&seconds));
        return sprintf(out, "%s.000", now), 0;
    }
    return -1;
}

/* The devices that `-i` names by index, UUID or bus id; all without it. -1: no such device. */
static int choose(const char *id, device_t *devices, unsigned *indexes)
{
    unsigned total = 0;
    int count = 0;
    nvml("nvmlDeviceGetCount_v2", &total, NULL, NULL);
    for (unsigned n = 0; n < total && n < 8; n++) {
        char uuid[80], index[8];
        pci_t pci;
        int error = nvml("nvmlDeviceGetHandleByIndex_v2", (void *)(long)n, &devices[count], NULL);
        if (error) {
            printf("Unable to determine the device handle for GPU%u: %s%s\n", n, words(error),
                   error == 15 ? ".  Reboot the system to recover this GPU" : "");
            exit(error);
        }
        string("nvmlDeviceGetUUID", devices[count], uuid);
        nvml("nvmlDeviceGetPciInfo_v3", devices[count], &pci, NULL);
        sprintf(index, "%u", n);
        /* The kernel's four digits of a domain are the last four of NVML's eight. */
        if (id && strcmp(id, index) && strcmp(id, uuid) && strcasecmp(id, pci.bus_id) && strcasecmp(id, pci.bus_id + 4)) continue;
        indexes[count++] = n;
    }
    if (!total) return puts("No devices were found"), -6;
    return id && !count ? printf("No devices were found matching %s\n", id), -6 : count;
}

static int query_gpu(const char *fields, device_t *devices, unsigned *indexes, int count)
{
    char copy[2048], value[160], *field, *rest;
    for (int row = header ? -1 : 0; row < count; row++) {
        int column = 0;
        snprintf(copy, sizeof copy, "%s", fields);
        for (rest = copy; (field = strsep(&rest, ",")); column++) {
            while (*field == ' ') field++;
            if (value_of(field, indexes[0], devices[0], value)) {
                printf("Field \"%s\" is not a valid field to query.\n\n", field);
                return 2;
            }
            if (row >= 0) value_of(field, indexes[row], devices[row], value);
            printf("%s%s%s", column ? ", " : "", row < 0 ? field : value, row < 0 ? unit_of(field) : "");
        }
        puts("");
    }
    return 0;
}

static unsigned processes_of(device_t device, process_t *list)
{
    unsigned count = PROCESSES;
    return nvml("nvmlDeviceGetComputeRunningProcesses_v3", device, &count, list) ? 0 : count;
}
/* A client of MPS has both kinds of context. */
static const char *process_type(device_t device, unsigned pid)
{
    process_t list[PROCESSES];
    unsigned count = PROCESSES;
    if (nvml("nvmlDeviceGetMPSComputeRunningProcesses_v3", device, &count, list)) count = 0;
    for (unsigned n = 0; n < count; n++)
        if (list[n].pid == pid) return "M+C";
    return "C";
}
static void process_name(unsigned pid, char *name)
{
    if (nvml("nvmlSystemGetProcessName", (void *)(long)pid, name, (void *)80)) strcpy(name, "[Not Found]");
}

static int query_processes(const char *fields, device_t *devices, int count)
{
    char copy[2048], name[80], uuid[80], *field, *rest;
    process_t list[PROCESSES];
    pci_t pci;
    for (int d = header ? -1 : 0; d < count; d++) {
        unsigned rows = d < 0 ? 1 : processes_of(devices[d], list);
        for (unsigned row = 0; row < rows; row++) {
            int column = 0;
            snprintf(copy, sizeof copy, "%s", fields);
            for (rest = copy; (field = strsep(&rest, ",")); column++) {
                while (*field == ' ') field++;
                if (column) printf(", ");
                if (strcmp(field, "pid") && strcmp(field, "process_name") && strcmp(field, "name") && strcmp(field, "used_memory")
                    && strcmp(field, "used_gpu_memory") && strcmp(field, "gpu_uuid") && strcmp(field, "gpu_bus_id"))
                    return printf("Field \"%s\" is not a valid field to query.\n\n", field), 2;
                if (d < 0) {
                    printf("%s%s", field, unit_of(field));
                    continue;
                }
                string("nvmlDeviceGetUUID", devices[d], uuid);
                nvml("nvmlDeviceGetPciInfo_v3", devices[d], &pci, NULL);
                process_name(list[row].pid, name);
                if (!strcmp(field, "pid")) printf("%u", list[row].pid);
                else if (!strcmp(field, "gpu_uuid")) printf("%s", uuid);
                else if (!strcmp(field, "gpu_bus_id")) printf("%s", pci.bus_id);
                else if (strstr(field, "memory")) printf("%llu%s", list[row].used / MIB, units ? " MiB" : "");
                else printf("%s", name);
            }
            puts("");
        }
    }
    return 0;
}

static void versions(char *driver, char *cuda)
{
    int version = 0;
    nvml("nvmlSystemGetDriverVersion", driver, (void *)80, NULL);
    nvml("nvmlSystemGetCudaDriverVersion_v2", &version, NULL, NULL);
    sprintf(cuda, "%d.%d", version / 1000, version % 1000 / 10);
}

static int table(device_t *devices, unsigned *indexes, int count)
{
    char driver[80], cuda[16], value[8][160], now[40];
    process_t list[PROCESSES];
    time_t seconds = time(NULL);
    unsigned shown = 0;
    versions(driver, cuda);
    strftime(now, sizeof now, "%a %b %e %H:%M:%S %Y", localtime(&seconds));
    printf("%s       simulated\n", now);
    puts("+-----------------------------------------------------------------------------------------+");
    printf("| NVIDIA-SMI %-22s Driver Version: %-14s CUDA Version: %-9s|\n", DRIVER_VERSION, driver, cuda);
    puts("+-----------------------------------------+------------------------+----------------------+\n"
         "| GPU  Name                 Persistence-M | Bus-Id          Disp.A | Volatile Uncorr. ECC |\n"
         "| Fan  Temp   Perf          Pwr:Usage/Cap |           Memory-Usage | GPU-Util  Compute M. |\n"
         "|                                         |                        |               MIG M. |\n"
         "|=========================================+========================+======================|");
    units = 0;
    for (int n = 0; n < count; n++) {
        const char *fields[] = {"name", "pci.bus_id", "fan.speed", "temperature.gpu", "pstate", "memory.used", "memory.total", "utilization.gpu"};
        for (int f = 0; f < 8; f++) value_of(fields[f], indexes[n], devices[n], value[f]);
        unsigned mode = number("nvmlDeviceGetComputeMode", devices[n]);
        char ecc[160], errors[160];
        value_of("ecc.errors.uncorrected.volatile.total", indexes[n], devices[n], errors);
        snprintf(ecc, sizeof ecc, "%s", errors[0] == '[' ? "Off" : errors);
        printf("| %3u  %-26.26s %4s    | %18s Off | %20s |\n", indexes[n], value[0],
               number("nvmlDeviceGetPersistenceMode", devices[n]) ? "On" : "Off", value[1], ecc);
        printf("| %2s%%  %3sC  %4s         %5uW / %4uW    | %7sMiB / %7sMiB | %6s%% %12s |\n", value[2], value[3], value[4],
               number("nvmlDeviceGetPowerUsage", devices[n]) / 1000, number("nvmlDeviceGetEnforcedPowerLimit", devices[n]) / 1000,
               value[5], value[6], value[7], mode == 3 ? "E. Process" : compute_mode(mode));
        puts("|                                         |                        |                  N/A |\n"
             "+-----------------------------------------+------------------------+----------------------+");
    }
    puts("\n+-----------------------------------------------------------------------------------------+\n"
         "| Processes:                                                                    simulated |\n"
         "|  GPU   GI   CI              PID   Type   Process name                        GPU Memory |\n"
         "|        ID   ID                                                               Usage      |\n"
         "|=========================================================================================|");
    for (int n = 0; n < count; n++) {
        unsigned found = processes_of(devices[n], list);
        for (unsigned row = 0; row < found; row++, shown++) {
            process_name(list[row].pid, value[0]);
            printf("| %4u   N/A  N/A %16u%7s   %-36.36s %5lluMiB |\n", indexes[n], list[row].pid,
                   process_type(devices[n], list[row].pid), value[0], list[row].used / MIB);
        }
    }
    if (!shown) puts("|  No running processes found                                                             |");
    puts("+-----------------------------------------------------------------------------------------+");
    return 0;
}

static int list_gpus(device_t *devices, unsigned *indexes, int count)
{
    char name[80], uuid[80];
    for (int n = 0; n < count; n++) {
        string("nvmlDeviceGetName", devices[n], name);
        string("nvmlDeviceGetUUID", devices[n], uuid);
        printf("GPU %u: %s (UUID: %s) (simulated)\n", indexes[n], name, uuid);
    }
    return 0;
}

static void row(const char *indent, const char *name, const char *field, unsigned index, device_t device)
{
    char value[160] = "";
    value_of(field, index, device, value);
    printf("%s%-*s: %s\n", indent, (int)(42 - strlen(indent)), name, value);
}

/* Is a section of -q among those of -d, `ECC,POWER`? All are without it. */
static int wanted(const char *title, const char *sections)
{
    static const struct { const char *name, *title; } names[] = {
        {"MEMORY", "FB Memory Usage"}, {"UTILIZATION", "Utilization"}, {"ECC", "ECC Mode"}, {"ECC", "ECC Errors"},
        {"TEMPERATURE", "Temperature"}, {"POWER", "GPU Power Readings"}, {"CLOCK", "Clocks"}, {"CLOCK", "Max Clocks"},
        {"PERFORMANCE", "Clocks Event Reasons"}, {"ROW_REMAPPER", "Remapped Rows"},
    };
    for (size_t n = 0; sections && n < sizeof names / sizeof *names; n++)
        if (!strcmp(title, names[n].title) && strstr(sections, names[n].name)) return 1;
    return !sections;
}

static int details(device_t *devices, unsigned *indexes, int count, const char *sections)
{
    static const struct { const char *title, *name, *field; } rows[] = {
        {"", "Product Name", "name"}, {"", "Persistence Mode", "persistence_mode"}, {"", "Accounting Mode", "accounting.mode"},
        {"", "GPU UUID", "uuid"}, {"", "VBIOS Version", "vbios_version"}, {"", "Compute Mode", "compute_mode"},
        {"", "Performance State", "pstate"},
        {"PCI", "Device Id", "pci.device_id"}, {"PCI", "Bus Id", "pci.bus_id"},
        {"GPU Link Info", "PCIe Generation Current", "pcie.link.gen.current"}, {"GPU Link Info", "PCIe Generation Max", "pcie.link.gen.max"},
        {"GPU Link Info", "Link Width Current", "pcie.link.width.current"}, {"GPU Link Info", "Link Width Max", "pcie.link.width.max"},
        {"Clocks Event Reasons", "Active", "clocks_event_reasons.active"}, {"Clocks Event Reasons", "Idle", "clocks_event_reasons.gpu_idle"},
        {"Clocks Event Reasons", "SW Power Cap", "clocks_event_reasons.sw_power_cap"},
        {"Clocks Event Reasons", "SW Thermal Slowdown", "clocks_event_reasons.sw_thermal_slowdown"},
        {"Clocks Event Reasons", "HW Thermal Slowdown", "clocks_event_reasons.hw_thermal_slowdown"},
        {"FB Memory Usage", "Total", "memory.total"}, {"FB Memory Usage", "Reserved", "memory.reserved"},
        {"FB Memory Usage", "Used", "memory.used"}, {"FB Memory Usage", "Free", "memory.free"},
        {"Utilization", "Gpu", "utilization.gpu"}, {"Utilization", "Memory", "utilization.memory"},
        {"ECC Mode", "Current", "ecc.mode.current"}, {"ECC Mode", "Pending", "ecc.mode.pending"},
        {"ECC Errors", "Volatile DRAM Correctable", "ecc.errors.corrected.volatile.dram"},
        {"ECC Errors", "Volatile DRAM Uncorrectable", "ecc.errors.uncorrected.volatile.dram"},
        {"ECC Errors", "Aggregate DRAM Correctable", "ecc.errors.corrected.aggregate.dram"},
        {"ECC Errors", "Aggregate DRAM Uncorrectable", "ecc.errors.uncorrected.aggregate.dram"},
        {"Remapped Rows", "Correctable Error", "remapped_rows.correctable"}, {"Remapped Rows", "Uncorrectable Error", "remapped_rows.uncorrectable"},
        {"Remapped Rows", "Pending", "remapped_rows.pending"}, {"Remapped Rows", "Remapping Failure Occurred", "remapped_rows.failure"},
        {"Temperature", "GPU Current Temp", "temperature.gpu"},
        {"GPU Power Readings", "Power Draw", "power.draw"}, {"GPU Power Readings", "Current Power Limit", "power.limit"},
        {"GPU Power Readings", "Default Power Limit", "power.default_limit"}, {"GPU Power Readings", "Min Power Limit", "power.min_limit"},
        {"GPU Power Readings", "Max Power Limit", "power.max_limit"},
        {"Clocks", "SM", "clocks.sm"}, {"Clocks", "Memory", "clocks.mem"},
        {"Max Clocks", "SM", "clocks.max.sm"}, {"Max Clocks", "Memory", "clocks.max.memory"},
    };
    char driver[80], cuda[16], value[160];
    versions(driver, cuda);
    printf("\n==============NVSMI LOG==============\n\nDriver Version                            : %s\n"
           "CUDA Version                              : %s\n\nAttached GPUs                             : %d\n", driver, cuda, count);
    for (int n = 0; n < count; n++) {
        const char *title = "";
        value_of("pci.bus_id", indexes[n], devices[n], value);
        printf("GPU %s\n    Product Brand                         : NVIDIA RTX (simulated)\n", value);
        for (size_t r = 0; r < sizeof rows / sizeof *rows; r++) {
            if (!wanted(rows[r].title, sections)) continue;
            if (*rows[r].title && strcmp(title, rows[r].title)) printf("    %s\n", rows[r].title);
            title = rows[r].title;
            row(*title ? "        " : "    ", rows[r].name, rows[r].field, indexes[n], devices[n]);
        }
    }
    return 0;
}

static int refused(const char *what, const char *bus_id, int error)
{
    printf("Failed to set %s for GPU %s: %s\nTerminating early due to previous errors.\n", what, bus_id, words(error));
    return error;
}

/* What is set is lost with the card's last user. */
static void warn_of_persistence(device_t device, const char *bus_id)
{
    if (!number("nvmlDeviceGetPersistenceMode", device))
        printf("Warning: persistence mode is disabled on device %s. See the Known Issues section of the nvidia-smi(1) man page "
               "for more information. Run with [--help | -h] switch to get more information on how to enable persistence mode.\n", bus_id);
}

static int set_power(device_t device, const char *bus_id, double watts)
{
    unsigned before = number("nvmlDeviceGetPowerManagementLimit", device), low = 0, high = 0, wanted = (unsigned)(watts * 1000 + 0.5);
    nvml("nvmlDeviceGetPowerManagementLimitConstraints", device, &low, &high);
    if (wanted < low || wanted > high) {
        printf("Provided power limit %.2f W is not a valid power limit which should be between %.2f W and %.2f W for GPU %s\n"
               "Terminating early due to previous errors.\n", watts, low / 1000.0, high / 1000.0, bus_id);
        return 2;
    }
    int error = nvml("nvmlDeviceSetPowerManagementLimit", device, (void *)(long)wanted, NULL);
    if (error) return refused("power management limit", bus_id, error);
    warn_of_persistence(device, bus_id);
    printf("Power limit for GPU %s was set to %.2f W from %.2f W.\n", bus_id, watts, before / 1000.0);
    return 0;
}

/* `MIN,MAX`, or one number for both; no number at all: give the clocks free. */
static int set_clocks(device_t device, const char *bus_id, const char *range)
{
    unsigned low = 0, high = 0;
    int given = *range ? sscanf(range, "%u,%u", &low, &high) : 0;
    if (*range && given < 1) return refused("GPU clocks", bus_id, 2);
    if (given == 1) high = low;
    int error = given ? nvml("nvmlDeviceSetGpuLockedClocks", device, (void *)(long)low, (void *)(long)high)
                      : nvml("nvmlDeviceResetGpuLockedClocks", device, NULL, NULL);
    if (error == 4) {
        printf("The current user does not have permission to change clocks for GPU %s.\nTerminating early due to previous errors.\n", bus_id);
        return error;
    }
    if (error) return refused("GPU clocks", bus_id, error);
    if (!given) return 0;
    printf("GPU clocks set to \"(gpuClkMin %u, gpuClkMax %u)\" for GPU %s\n", low, high, bus_id);
    warn_of_persistence(device, bus_id);
    return 0;
}

static int set_ecc(device_t device, const char *bus_id, const char *value, int *reboot)
{
    unsigned current = 0, pending = 0;
    long mode = !strcmp(value, "1") || !strcasecmp(value, "ENABLED") ? 1 : !strcmp(value, "0") || !strcasecmp(value, "DISABLED") ? 0 : -1;
    if (mode < 0) return refused("ECC mode", bus_id, 2);
    nvml("nvmlDeviceGetEccMode", device, &current, &pending);
    if (pending == (unsigned)mode) return printf("ECC support is already %s for GPU %s.\n", enabled(pending), bus_id), 0;
    int error = nvml("nvmlDeviceSetEccMode", device, (void *)mode, NULL);
    if (error) return refused("ECC mode", bus_id, error);
    printf("%s ECC support for GPU %s.\n", enabled((unsigned)mode), bus_id);
    *reboot |= current != (unsigned)mode;
    return 0;
}

static int clear_errors(device_t device, const char *bus_id, const char *value)
{
    long counter = !strcmp(value, "1") || !strcasecmp(value, "AGGREGATE") ? 1 : !strcmp(value, "0") || !strcasecmp(value, "VOLATILE") ? 0 : -1;
    int error = counter < 0 ? 2 : nvml("nvmlDeviceClearEccErrorCounts", device, (void *)counter, NULL);
    if (error) return refused("ECC error counts", bus_id, error);
    return printf("Reset %s ECC errors to zero for GPU %s.\n", counter ? "aggregate" : "volatile", bus_id), 0;
}

static int clear_accounted(device_t device, const char *bus_id)
{
    int error = nvml("nvmlDeviceClearAccountingPids", device, NULL, NULL);
    if (error) return refused("accounted processes", bus_id, error);
    return printf("Cleared Accounted PIDs for GPU %s.\n", bus_id), 0;
}

static int set_mode(device_t device, const char *bus_id, char option, const char *value)
{
    const char *function = option == 'p' ? "nvmlDeviceSetPersistenceMode" : option == 'a' ? "nvmlDeviceSetAccountingMode" : "nvmlDeviceSetComputeMode";
    const char *what = option == 'p' ? "persistence mode" : option == 'a' ? "Accounting Mode" : "compute mode";
    long mode = !strcasecmp(value, "DEFAULT") || !strcasecmp(value, "DISABLED") ? 0 : !strcasecmp(value, "ENABLED") ? 1
              : !strcasecmp(value, "PROHIBITED") ? 2 : !strcasecmp(value, "EXCLUSIVE_PROCESS") ? 3
              : strlen(value) == 1 && *value >= '0' && *value <= '3' ? *value - '0' : -1;
    int error = mode < 0 ? 2 : nvml(function, device, (void *)mode, NULL);
    if (error) return refused(what, bus_id, error);
    if (option == 'c') printf("Set compute mode to %s for GPU %s.\n", mode == 3 ? "EXCLUSIVE_PROCESS" : mode ? "PROHIBITED" : "DEFAULT", bus_id);
    else printf("%s %s for GPU %s.\n", mode ? "Enabled" : "Disabled", what, bus_id);
    return 0;
}

/* What the command line asks to change; NULL: nothing of it. */
typedef struct { const char *power, *persistence, *accounting, *compute, *clocks, *ecc, *errors, *accounted; } wishes_t;

static int change(device_t *devices, int count, const wishes_t *wish)
{
    int reboot = 0;
    for (int n = 0; n < count; n++) {
        pci_t pci;
        int error = 0;
        nvml("nvmlDeviceGetPciInfo_v3", devices[n], &pci, NULL);
        if (wish->persistence) error = set_mode(devices[n], pci.bus_id, 'p', wish->persistence);
        if (!error && wish->power) error = set_power(devices[n], pci.bus_id, atof(wish->power));
        if (!error && wish->clocks) error = set_clocks(devices[n], pci.bus_id, wish->clocks);
        if (!error && wish->accounting) error = set_mode(devices[n], pci.bus_id, 'a', wish->accounting);
        if (!error && wish->compute) error = set_mode(devices[n], pci.bus_id, 'c', wish->compute);
        if (!error && wish->ecc) error = set_ecc(devices[n], pci.bus_id, wish->ecc, &reboot);
        if (!error && wish->errors) error = clear_errors(devices[n], pci.bus_id, wish->errors);
        if (!error && wish->accounted) error = clear_accounted(devices[n], pci.bus_id);
        if (error) return error;
    }
    puts(reboot ? "All done.\nReboot required." : "All done.");
    return 0;
}

/* The value of an option in any of its forms: `-x VALUE`, `-x=VALUE`, `--long=VALUE`, `--long VALUE`. */
static const char *option(int *n, int count, char **argv, const char *brief, const char *full)
{
    const char *equals = strchr(argv[*n], '=');
    size_t length = equals ? (size_t)(equals - argv[*n]) : 0;
    if (equals && ((length == strlen(full) && !strncmp(argv[*n], full, length)) || (length == strlen(brief) && !strncmp(argv[*n], brief, length))))
        return equals + 1;
    if (strcmp(argv[*n], full) && strcmp(argv[*n], brief)) return NULL;
    return *n + 1 < count ? argv[++*n] : "";
}

int main(int count, char **argv)
{
    const char *id = NULL, *fields = NULL, *apps = NULL, *sections = NULL, *value;
    wishes_t wish = {0}, nothing = {0};
    int list = 0, full = 0, version = 0;
    for (int n = 1; n < count; n++) {
        if (!strcmp(argv[n], "-L") || !strcmp(argv[n], "--list-gpus")) list = 1;
        else if (!strcmp(argv[n], "-q") || !strcmp(argv[n], "--query")) full = 1;
        else if (!strcmp(argv[n], "--version")) version = 1;
        else if (!strncmp(argv[n], "--query-gpu=", 12)) fields = argv[n] + 12;
        else if (!strncmp(argv[n], "--query-compute-apps=", 21)) apps = argv[n] + 21;
        else if (!strncmp(argv[n], "--format=csv", 12)) {
            header = !strstr(argv[n], "noheader");
            units = !strstr(argv[n], "nounits");
        }
        else if ((value = option(&n, count, argv, "-i", "--id"))) id = value;
        else if (!strcmp(argv[n], "-rgc") || !strcmp(argv[n], "--reset-gpu-clocks")) wish.clocks = "";
        else if (!strcmp(argv[n], "-caa") || !strcmp(argv[n], "--clear-accounted-apps")) wish.accounted = "";
        else if (!strcmp(argv[n], "-r") || !strcmp(argv[n], "--gpu-reset"))
            return puts("Resetting GPU is not supported: this card is simulated."), 3;
        else if ((value = option(&n, count, argv, "-d", "--display"))) sections = value;
        else if ((value = option(&n, count, argv, "-pl", "--power-limit"))) wish.power = value;
        else if ((value = option(&n, count, argv, "-pm", "--persistence-mode"))) wish.persistence = value;
        else if ((value = option(&n, count, argv, "-am", "--accounting-mode"))) wish.accounting = value;
        else if ((value = option(&n, count, argv, "-c", "--compute-mode"))) wish.compute = value;
        else if ((value = option(&n, count, argv, "-lgc", "--lock-gpu-clocks"))) wish.clocks = *value ? value : "none";
        else if ((value = option(&n, count, argv, "-e", "--ecc-config"))) wish.ecc = value;
        else if ((value = option(&n, count, argv, "-p", "--reset-ecc-errors"))) wish.errors = value;
        else return printf("Invalid combination of input arguments (the simulated tool does not know %s). "
                           "Please run 'nvidia-smi -h' for help.\n", argv[n]), 2;
    }
    device_t devices[8];
    unsigned indexes[8] = {0};
    int error = start();
    if (error) return error;
    if (version) {
        char driver[80], cuda[16];
        versions(driver, cuda);
        return printf("NVIDIA-SMI version  : %s (simulated)\nNVML version        : %s\nDRIVER version      : %s\n"
                      "CUDA Version        : %s\n", DRIVER_VERSION, DRIVER_VERSION, driver, cuda) < 0;
    }
    int chosen = choose(id, devices, indexes);
    if (chosen < 0) return -chosen;
    if (memcmp(&wish, &nothing, sizeof wish)) error = change(devices, chosen, &wish);
    else if (fields) error = query_gpu(fields, devices, indexes, chosen);
    else if (apps) error = query_processes(apps, devices, chosen);
    else if (list) error = list_gpus(devices, indexes, chosen);
    else if (full) error = details(devices, indexes, chosen, sections);
    else error = table(devices, indexes, chosen);
    nvml("nvmlShutdown", NULL, NULL, NULL);
    return error;
}
