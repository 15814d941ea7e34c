/* SPDX-License-Identifier: MIT
 * The simulated card as NVML, CUDA, nvidia-smi and the persistence daemon share it.
 *
 * /run/lab-gpu stands for the loaded driver: `driver` (version and devices, written by the module stand-in),
 * `settings` (what root changes: power limit, modes; mapped by everybody) and `clients`, an empty file that
 * compute processes lock: a share of the card's memory is the length of a read lock. That works through a
 * read-only mount, as in a container, and the kernel takes the lock back from a process however it ends.
 * /var/lib/lab-hardware/nvml.conf makes the card answer differently: key=value lines. */
#ifndef LAB_GPU_H
#define LAB_GPU_H

#include <stdint.h>

#define GPU_DEVICES 8
#define GPU_CLIENTS 64
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

/* All zero means: as the card comes out of a reset. */
typedef struct {
    uint32_t power_limit_mw[GPU_DEVICES];
    uint32_t compute_mode[GPU_DEVICES];
    uint32_t accounting[GPU_DEVICES];
    uint32_t persistence[GPU_DEVICES];
} gpu_settings_t;

typedef struct {
    unsigned pid; /* as the reader's namespace counts; 0: not visible from here */
    unsigned device;
    uint64_t used_bytes;
} gpu_process_t;

/* 0, or the NVML error of a driver that cannot be talked to. A second call re-reads the driver's file. */
int gpu_open(const char *library_version);
/* Gives up the use of the device that gpu_open() took; the module can be unloaded after that. */
void gpu_close(void);
const gpu_driver_t *gpu_driver(void);
gpu_settings_t *gpu_settings(void); /* read-only mapping unless gpu_may_change() */
int gpu_may_change(void);
/* Value of KEY in the fault file: `DEVICE.KEY` before `KEY` before the default. */
long gpu_fault(int device, const char *key, long otherwise);
/* Live compute processes, those of other PID namespaces included; at most GPU_CLIENTS. */
int gpu_processes(gpu_process_t *list);
uint64_t gpu_used_bytes(unsigned device);
int gpu_busy(unsigned device);
uint64_t gpu_total_bytes(unsigned device);
/* Enters this process as a client, or changes its share: 0, or -1 when the table is full or absent. */
int gpu_register(unsigned device, uint64_t used_bytes);
void gpu_unregister(void);

#endif
