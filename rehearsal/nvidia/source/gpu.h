/* SPDX-License-Identifier: MIT
 * The simulated card as NVML, CUDA, nvidia-smi and the persistence daemon share it.
 *
 * /run/lab-gpu stands for the loaded driver: `driver` (version and devices, written by the module stand-in),
 * `settings` (what root changes: power limit, clocks, modes; mapped by everybody), `accounting` (a record of each
 * compute process, which the process itself writes) and `clients`, an empty file that compute processes lock: a
 * share of the card's memory is the length of a read lock. That works through a read-only mount, as in a container,
 * and the kernel takes the lock back from a process however it ends. `off-bus/ADDRESS` is there once a card fell off.
 * /var/lib/lab-hardware/inforom is what the card keeps without power: key=value lines of the ECC mode and counters.
 * /var/lib/lab-hardware/nvml.conf makes the card answer differently: key=value lines, for all cards or, as
 * `0.key=value`, for one. Its keys:
 *   init_error device_count lost off_bus xid                      what fails
 *   temperature_c heat_c_per_w load_percent power_draw_mw         heat and load, see heat() in nvml.c
 *   event_reasons utilization_percent memory_utilization_percent sm_clock_mhz memory_clock_mhz fan_percent
 *   memory_total_mib memory_used_mib link_generation link_generation_max link_width link_width_max replay_count
 *   ecc_mode ecc_corrected ecc_uncorrected ecc_corrected_aggregate ecc_uncorrected_aggregate
 *   remapped_corrected remapped_uncorrected remapped_pending remapped_failure */
#ifndef LAB_GPU_H
#define LAB_GPU_H

#include <stdint.h>

#define GPU_DEVICES 8
#define GPU_CLIENTS 64
#define GPU_ACCOUNTED 128
#define GPU_MIB (1024ull * 1024ull)

/* NVML's own numbers. */
enum { GPU_OK = 0, GPU_DRIVER_NOT_LOADED = 9, GPU_LOST = 15, GPU_VERSION_MISMATCH = 18, GPU_UNKNOWN = 999 };
enum { GPU_COMPUTE_DEFAULT = 0, GPU_COMPUTE_PROHIBITED = 2, GPU_COMPUTE_EXCLUSIVE = 3 };

typedef struct {
    char address[16]; /* 0000:01:00.0 */
    char uuid[48];
    unsigned device, vendor, subsystem;
} gpu_device_t;

typedef struct {
    char version[32];
    unsigned count;
    gpu_device_t devices[GPU_DEVICES];
} gpu_driver_t;

/* All zero means: as the card comes out of a reset. The module stand-in writes the first field when it loads. */
typedef struct {
    uint32_t ecc[GPU_DEVICES];
    uint32_t power_limit_mw[GPU_DEVICES];
    uint32_t compute_mode[GPU_DEVICES];
    uint32_t accounting[GPU_DEVICES];
    uint32_t persistence[GPU_DEVICES];
    uint32_t clock_min_mhz[GPU_DEVICES], clock_max_mhz[GPU_DEVICES]; /* 0: not locked */
    uint32_t ecc_cleared[GPU_DEVICES][2];                            /* volatile errors that were cleared, by kind */
} gpu_settings_t;

typedef struct {
    unsigned pid; /* as the reader's namespace counts; 0: not visible from here */
    unsigned device;
    uint64_t used_bytes;
    int mps; /* a client of an MPS server */
} gpu_process_t;

/* A process that used the card while accounting was on. */
typedef struct {
    uint32_t pid, device;
    uint64_t most_bytes, started_us, seen_us; /* times since the epoch */
} gpu_account_t;

/* 0, or the NVML error of a driver that cannot be talked to. A second call re-reads the driver's file. */
int gpu_open(const char *library_version);
/* Gives up the use of the device that gpu_open() took; the module can be unloaded after that. */
void gpu_close(void);
const gpu_driver_t *gpu_driver(void);
gpu_settings_t *gpu_settings(void); /* read-only mapping unless gpu_may_change() */
int gpu_may_change(void);
/* Value of KEY in the fault file: `DEVICE.KEY` before `KEY` before the default. */
long gpu_fault(int device, const char *key, long otherwise);
double gpu_fault_real(int device, const char *key, double otherwise);
/* Fallen off the bus, or lost by the fault file. */
int gpu_lost(unsigned device);
/* What the card keeps over a reboot. Setting it: 0, or -1 where the file cannot be written. */
long gpu_inforom(unsigned device, const char *key, long otherwise);
int gpu_set_inforom(unsigned device, const char *key, long value);
int gpu_ecc(unsigned device);
/* Live compute processes, those of other PID namespaces included; at most GPU_CLIENTS. */
int gpu_processes(gpu_process_t *list);
uint64_t gpu_used_bytes(unsigned device);
/* Percent of the card's power that its load asks for: `load_percent`, or 50 while there is a compute process. */
unsigned gpu_load(unsigned device);
int gpu_busy(unsigned device);
uint64_t gpu_total_bytes(unsigned device);
/* The records, GPU_ACCOUNTED of them, brought up to date; unused ones have no pid. NULL: none are kept here. */
gpu_account_t *gpu_accounts(void);
/* Enters this process as a client, or changes its share: 0, or -1 when the table is full or absent. */
int gpu_register(unsigned device, uint64_t used_bytes, int mps);
void gpu_unregister(void);

#endif
