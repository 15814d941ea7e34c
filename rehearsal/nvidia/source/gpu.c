/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "gpu.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/capability.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

/* A slot of `clients` is this many bytes wide, and the length of a lock in it is a share in MiB, plus one. Slots
 * of one device follow each other; beyond those of all devices lies the one of the card's users. */
#define SLOT ((off_t)1 << 32)
#define USERS ((off_t)GPU_DEVICES * GPU_CLIENTS)
/* How a process knows its own share: F_GETLK tells of the locks of others only. libcuda leaves it here for
 * libnvidia-ml, which may be in the same process: pid, slot, MiB. */
#define OWN_SHARE "LAB_GPU_CLIENT"

static gpu_driver_t driver;
static gpu_settings_t *settings;
static int settings_writable;
/* Never closed: closing any descriptor of a file gives up all POSIX locks this process has on it, and
 * libcuda and libnvidia-ml may live in one process. */
static int clients_fd = -1;
/* A node without a driver cannot be opened, but a path to it can be held: /proc/PID/fd then shows who uses the
 * card, as it does with the real driver. */
static int node_fd = -1;

/* Where the tests put the files; an ordinary process uses /. */
static const char *path(char *buffer, size_t size, const char *name)
{
    const char *root = getenv("LAB_GPU_ROOT");
    snprintf(buffer, size, "%s%s", root ? root : "", name);
    return buffer;
}

static int lock_call(int command, short type, off_t slot, off_t start, off_t length, struct flock *lock)
{
    memset(lock, 0, sizeof *lock);
    lock->l_type = type;
    lock->l_whence = SEEK_SET;
    lock->l_start = slot * SLOT + start;
    lock->l_len = length;
    return fcntl(clients_fd, command, lock);
}

static int read_driver(void)
{
    char name[256], line[256];
    FILE *file = fopen(path(name, sizeof name, "/run/lab-gpu/driver"), "re");
    if (!file) return GPU_DRIVER_NOT_LOADED;
    memset(&driver, 0, sizeof driver);
    while (fgets(line, sizeof line, file)) {
        gpu_device_t *d = &driver.devices[driver.count < GPU_DEVICES ? driver.count : 0];
        if (sscanf(line, "version=%31s", driver.version) == 1) continue;
        if (driver.count < GPU_DEVICES
            && sscanf(line, "device=%15s %x:%x %x %47s", d->address, &d->vendor, &d->device, &d->subsystem, d->uuid) == 5)
            driver.count++;
    }
    fclose(file);
    return driver.version[0] ? GPU_OK : GPU_DRIVER_NOT_LOADED;
}

/* A node without a driver behind it answers ENXIO: that is our normal case. EPERM is what a container sees
 * whose device rights were taken away, and the real library then says no more than "Unknown Error". */
static int node_answers(void)
{
    char name[256];
    int fd = open(path(name, sizeof name, "/dev/nvidiactl"), O_RDWR | O_CLOEXEC);
    if (fd >= 0) close(fd);
    else if (errno == ENOENT) return GPU_DRIVER_NOT_LOADED;
    else if (errno == EPERM || errno == EACCES) return GPU_UNKNOWN;
    return GPU_OK;
}

static int open_settings(void)
{
    char name[256];
    int fd = open(path(name, sizeof name, "/run/lab-gpu/settings"), O_RDWR | O_CLOEXEC);
    settings_writable = fd >= 0;
    if (fd < 0) fd = open(name, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return -1;
    settings = mmap(NULL, sizeof *settings, PROT_READ | (settings_writable ? PROT_WRITE : 0), MAP_SHARED, fd, 0);
    close(fd);
    if (settings == MAP_FAILED) settings = NULL;
    return settings ? 0 : -1;
}

int gpu_may_change(void)
{
    struct __user_cap_header_struct header = {_LINUX_CAPABILITY_VERSION_3, 0};
    struct __user_cap_data_struct data[2] = {{0}};
    if (!settings_writable || geteuid() != 0 || syscall(SYS_capget, &header, data)) return 0;
    return (data[0].effective & (1u << CAP_SYS_ADMIN)) != 0;
}

/* Without persistence the driver shuts the card down when its last user leaves, and its settings go with it.
 * Nobody is told at that moment here, so the next one to come finds the card unused and resets it. */
static void reset_if_unused(void)
{
    struct flock lock;
    /* A compute process is a user by its share alone. */
    if (!gpu_may_change() || lock_call(F_GETLK, F_WRLCK, 0, 0, 0, &lock) || lock.l_type != F_UNLCK) return;
    for (unsigned i = 0; i < GPU_DEVICES; i++) {
        if (settings->persistence[i]) continue;
        settings->power_limit_mw[i] = settings->compute_mode[i] = settings->accounting[i] = 0;
    }
}

int gpu_open(const char *library_version)
{
    struct flock lock;
    int error = read_driver();
    if (!error) error = node_answers();
    if (!error && strcmp(driver.version, library_version)) error = GPU_VERSION_MISMATCH;
    if (!error) error = (int)gpu_fault(-1, "init_error", GPU_OK);
    if (error) return error;
    driver.count = (unsigned)gpu_fault(-1, "device_count", driver.count);
    if (driver.count > GPU_DEVICES) driver.count = GPU_DEVICES;
    if (settings) return GPU_OK;
    char name[256];
    if (clients_fd < 0) clients_fd = open(path(name, sizeof name, "/run/lab-gpu/clients"), O_RDONLY | O_CLOEXEC);
    if (clients_fd < 0 || open_settings()) return GPU_DRIVER_NOT_LOADED;
    node_fd = open(path(name, sizeof name, "/dev/nvidiactl"), O_PATH | O_CLOEXEC);
    reset_if_unused();
    lock_call(F_SETLK, F_RDLCK, USERS, 0, 1, &lock);
    return GPU_OK;
}

void gpu_close(void)
{
    struct flock lock;
    if (!settings) return;
    lock_call(F_SETLK, F_UNLCK, USERS, 0, 1, &lock);
    close(node_fd);
    munmap(settings, sizeof *settings);
    settings = NULL;
}

const gpu_driver_t *gpu_driver(void) { return &driver; }
gpu_settings_t *gpu_settings(void) { return settings; }

static int find(const char *text, const char *key, long *value)
{
    size_t length = strlen(key);
    for (const char *line = text; line && *line; line = strchr(line, '\n'), line += line ? 1 : 0)
        if (!strncmp(line, key, length) && line[length] == '=') {
            *value = strtol(line + length + 1, NULL, 0);
            return 1;
        }
    return 0;
}

long gpu_fault(int device, const char *key, long otherwise)
{
    char name[256], text[4096], own[80];
    long value;
    int fd = open(path(name, sizeof name, "/var/lib/lab-hardware/nvml.conf"), O_RDONLY | O_CLOEXEC);
    if (fd < 0) return otherwise;
    ssize_t size = read(fd, text, sizeof text - 1);
    close(fd);
    if (size <= 0) return otherwise;
    text[size] = 0;
    snprintf(own, sizeof own, "%d.%s", device, key);
    return find(text, own, &value) || find(text, key, &value) ? value : otherwise;
}

static int own_share(int *slot, unsigned long *mib)
{
    int pid;
    const char *text = getenv(OWN_SHARE);
    return text && sscanf(text, "%d %d %lu", &pid, slot, mib) == 3 && pid == getpid();
}

/* The kernel translates a lock owner's pid into the reader's namespace; 0 where it is not visible. */
int gpu_processes(gpu_process_t *list)
{
    struct flock lock;
    unsigned long mib = 0;
    int count = 0, own = -1;
    if (!own_share(&own, &mib)) own = -1;
    for (int slot = 0; slot < USERS && count < GPU_CLIENTS; slot++) {
        unsigned device = (unsigned)slot / GPU_CLIENTS;
        if (device >= driver.count) break;
        if (slot == own)
            list[count++] = (gpu_process_t){(unsigned)getpid(), device, mib * GPU_MIB};
        else if (lock_call(F_GETLK, F_WRLCK, slot, 0, SLOT, &lock) == 0 && lock.l_type != F_UNLCK)
            list[count++] = (gpu_process_t){lock.l_pid > 0 ? (unsigned)lock.l_pid : 0, device, (uint64_t)(lock.l_len - 1) * GPU_MIB};
    }
    return count;
}

uint64_t gpu_used_bytes(unsigned device)
{
    gpu_process_t list[GPU_CLIENTS];
    uint64_t used = (uint64_t)gpu_fault((int)device, "memory_used_mib", 2) * GPU_MIB;
    int count = gpu_processes(list);
    for (int i = 0; i < count; i++)
        if (list[i].device == device) used += list[i].used_bytes;
    return used;
}

int gpu_busy(unsigned device)
{
    gpu_process_t list[GPU_CLIENTS];
    int count = gpu_processes(list);
    for (int i = 0; i < count; i++)
        if (list[i].device == device) return 1;
    return 0;
}

uint64_t gpu_total_bytes(unsigned device)
{
    return (uint64_t)gpu_fault((int)device, "memory_total_mib", 16376) * GPU_MIB;
}

/* Read locks do not keep each other out: after taking a slot, look whether somebody else did so too. */
static int claim_slot(unsigned device)
{
    struct flock lock;
    for (unsigned attempt = 0; attempt < 8 * GPU_CLIENTS; attempt++) {
        off_t slot = (off_t)device * GPU_CLIENTS + (attempt < GPU_CLIENTS ? attempt : (unsigned)random() % GPU_CLIENTS);
        if (lock_call(F_GETLK, F_WRLCK, slot, 0, SLOT, &lock) || lock.l_type != F_UNLCK) continue;
        if (lock_call(F_SETLK, F_RDLCK, slot, 0, 1, &lock)) return -1;
        if (lock_call(F_GETLK, F_WRLCK, slot, 0, SLOT, &lock) == 0 && lock.l_type == F_UNLCK) return (int)slot;
        lock_call(F_SETLK, F_UNLCK, slot, 0, SLOT, &lock);
    }
    return -1;
}

int gpu_register(unsigned device, uint64_t used_bytes)
{
    struct flock lock;
    char own[64];
    unsigned long before = 0, mib = (unsigned long)((used_bytes + GPU_MIB - 1) / GPU_MIB);
    int slot;
    if (clients_fd < 0) return -1;
    if (!own_share(&slot, &before)) slot = claim_slot(device);
    if (slot < 0) return -1;
    if (lock_call(F_SETLK, F_RDLCK, slot, 0, (off_t)mib + 1, &lock)) return -1;
    if (mib < before) lock_call(F_SETLK, F_UNLCK, slot, (off_t)mib + 1, SLOT - (off_t)mib - 1, &lock);
    snprintf(own, sizeof own, "%d %d %lu", getpid(), slot, mib);
    return setenv(OWN_SHARE, own, 1);
}

void gpu_unregister(void)
{
    struct flock lock;
    unsigned long mib;
    int slot;
    if (!own_share(&slot, &mib)) return;
    lock_call(F_SETLK, F_UNLCK, slot, 0, SLOT, &lock);
    unsetenv(OWN_SHARE);
}
