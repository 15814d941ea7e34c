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
#include <time.h>
#include <unistd.h>

/* A slot of `clients` is this many bytes wide. The length of a lock in it tells the share: two bytes for each MiB,
 * one for being there, one more for a client of MPS. Slots of one device follow each other; beyond those of all
 * devices lies the one of the card's users. */
#define SLOT ((off_t)1 << 32)
#define USERS ((off_t)GPU_DEVICES * GPU_CLIENTS)
/* How a process knows its own share: F_GETLK tells of the locks of others only. libcuda leaves it here for
 * libnvidia-ml, which may be in the same process: pid, slot, MiB, MPS. */
#define OWN_SHARE "LAB_GPU_CLIENT"

static gpu_driver_t driver;
static gpu_settings_t *settings;
static int settings_writable;
static gpu_account_t *accounts;
static int accounts_writable;
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

/* A file as memory that all processes share; NULL: it cannot even be read. */
static void *map(const char *file, size_t size, int *writable)
{
    char name[256];
    int fd = open(path(name, sizeof name, file), O_RDWR | O_CLOEXEC);
    *writable = fd >= 0;
    if (fd < 0) fd = open(name, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return NULL;
    void *memory = mmap(NULL, size, PROT_READ | (*writable ? PROT_WRITE : 0), MAP_SHARED, fd, 0);
    close(fd);
    return memory == MAP_FAILED ? NULL : memory;
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
        settings->clock_min_mhz[i] = settings->clock_max_mhz[i] = 0;
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
    if (clients_fd >= 0) settings = map("/run/lab-gpu/settings", sizeof *settings, &settings_writable);
    if (!settings) return GPU_DRIVER_NOT_LOADED;
    accounts = map("/run/lab-gpu/accounting", GPU_ACCOUNTED * sizeof *accounts, &accounts_writable);
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
    if (accounts) munmap(accounts, GPU_ACCOUNTED * sizeof *accounts);
    settings = NULL;
    accounts = NULL;
}

const gpu_driver_t *gpu_driver(void) { return &driver; }
gpu_settings_t *gpu_settings(void) { return settings; }

#define FAULTS "/var/lib/lab-hardware/nvml.conf"
#define INFOROM "/var/lib/lab-hardware/inforom"
#define TEXT 4096

/* The whole of a small file; empty where there is none. */
static char *read_text(const char *file, char *text)
{
    char name[256];
    int fd = open(path(name, sizeof name, file), O_RDONLY | O_CLOEXEC);
    ssize_t size = fd < 0 ? 0 : read(fd, text, TEXT - 1);
    if (fd >= 0) close(fd);
    text[size > 0 ? size : 0] = 0;
    return text;
}

/* What stands behind `key=` at the beginning of a line, or NULL. */
static char *find(char *text, const char *key)
{
    size_t length = strlen(key);
    for (char *line = text; line && *line; line = strchr(line, '\n'), line += line ? 1 : 0)
        if (!strncmp(line, key, length) && line[length] == '=') return line + length + 1;
    return NULL;
}

static char *find_for(char *text, int device, const char *key)
{
    char own[80];
    snprintf(own, sizeof own, "%d.%s", device, key);
    char *value = find(text, own);
    return value ? value : find(text, key);
}

long gpu_fault(int device, const char *key, long otherwise)
{
    char text[TEXT], *value = find_for(read_text(FAULTS, text), device, key);
    return value ? strtol(value, NULL, 0) : otherwise;
}

double gpu_fault_real(int device, const char *key, double otherwise)
{
    char text[TEXT], *value = find_for(read_text(FAULTS, text), device, key);
    return value ? strtod(value, NULL) : otherwise;
}

int gpu_lost(unsigned device)
{
    char name[256], file[64];
    snprintf(file, sizeof file, "/run/lab-gpu/off-bus/%s", driver.devices[device].address);
    return gpu_fault((int)device, "lost", 0) || gpu_fault((int)device, "off_bus", 0)
        || access(path(name, sizeof name, file), F_OK) == 0;
}

long gpu_inforom(unsigned device, const char *key, long otherwise)
{
    char text[TEXT], *value = find_for(read_text(INFOROM, text), (int)device, key);
    return value ? strtol(value, NULL, 0) : otherwise;
}

int gpu_set_inforom(unsigned device, const char *key, long value)
{
    char text[TEXT], own[80], name[256], unfinished[260], *next = NULL;
    read_text(INFOROM, text);
    int length = snprintf(own, sizeof own, "%u.%s=", device, key);
    snprintf(unfinished, sizeof unfinished, "%s.new", path(name, sizeof name, INFOROM));
    FILE *file = fopen(unfinished, "we");
    if (!file) return -1;
    for (char *line = strtok_r(text, "\n", &next); line; line = strtok_r(NULL, "\n", &next))
        if (strncmp(line, own, (size_t)length)) fprintf(file, "%s\n", line);
    fprintf(file, "%s%ld\n", own, value);
    return fclose(file) || rename(unfinished, name) ? -1 : 0;
}

int gpu_ecc(unsigned device) { return (int)gpu_fault((int)device, "ecc_mode", settings->ecc[device]); }

static int own_share(int *slot, unsigned long *mib, int *mps)
{
    int pid;
    const char *text = getenv(OWN_SHARE);
    return text && sscanf(text, "%d %d %lu %d", &pid, slot, mib, mps) == 4 && pid == getpid();
}

/* The kernel translates a lock owner's pid into the reader's namespace; 0 where it is not visible. */
int gpu_processes(gpu_process_t *list)
{
    struct flock lock;
    unsigned long mib = 0;
    int count = 0, own = -1, mps = 0;
    if (!own_share(&own, &mib, &mps)) own = -1;
    for (int slot = 0; slot < USERS && count < GPU_CLIENTS; slot++) {
        unsigned device = (unsigned)slot / GPU_CLIENTS;
        if (device >= driver.count) break;
        if (slot == own)
            list[count++] = (gpu_process_t){(unsigned)getpid(), device, mib * GPU_MIB, mps};
        else if (lock_call(F_GETLK, F_WRLCK, slot, 0, SLOT, &lock) == 0 && lock.l_type != F_UNLCK) {
            uint64_t share = (uint64_t)(lock.l_len - 1);
            list[count++] = (gpu_process_t){lock.l_pid > 0 ? (unsigned)lock.l_pid : 0, device, share / 2 * GPU_MIB, share % 2};
        }
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

static int has_process(unsigned device)
{
    gpu_process_t list[GPU_CLIENTS];
    int count = gpu_processes(list);
    for (int i = 0; i < count; i++)
        if (list[i].device == device) return 1;
    return 0;
}

unsigned gpu_load(unsigned device)
{
    long percent = gpu_fault((int)device, "load_percent", -1);
    if (percent < 0) return has_process(device) ? 50 : 0;
    return percent > 100 ? 100 : (unsigned)percent;
}

int gpu_busy(unsigned device) { return gpu_load(device) > 0 || has_process(device); }

/* ECC lives in the memory itself: a card with GDDR loses 6.25 % (CUDA C++ Best Practices Guide). What a real A4000
 * shows then is not known to us; 15352 MiB is computed. */
uint64_t gpu_total_bytes(unsigned device)
{
    uint64_t mib = (uint64_t)gpu_fault((int)device, "memory_total_mib", 16376);
    return (gpu_ecc(device) ? mib - (mib + 15) / 16 : mib) * GPU_MIB;
}

static uint64_t now_us(void)
{
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    return (uint64_t)now.tv_sec * 1000000 + (uint64_t)now.tv_nsec / 1000;
}

/* The record of a process: its own, a free one, or that of the process which was seen the longest time ago. */
static gpu_account_t *record_of(unsigned pid, unsigned device)
{
    for (int attempt = 0; attempt < 8; attempt++) {
        gpu_account_t *chosen = &accounts[0];
        for (int i = 0; i < GPU_ACCOUNTED; i++) {
            if (accounts[i].pid == pid && accounts[i].device == device) return &accounts[i];
            if (chosen->pid && (!accounts[i].pid || accounts[i].seen_us < chosen->seen_us)) chosen = &accounts[i];
        }
        uint32_t before = chosen->pid;
        /* Another process may be after the same one. */
        if (!__atomic_compare_exchange_n(&chosen->pid, &before, pid, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) continue;
        chosen->device = device;
        chosen->most_bytes = chosen->started_us = 0;
        return chosen;
    }
    return NULL;
}

static void account(unsigned pid, unsigned device, uint64_t bytes, int begins)
{
    gpu_account_t *record;
    if (!accounts || !accounts_writable || !settings->accounting[device] || !(record = record_of(pid, device))) return;
    record->seen_us = now_us();
    if (begins || !record->started_us) {
        record->started_us = record->seen_us;
        record->most_bytes = 0;
    }
    if (bytes > record->most_bytes) record->most_bytes = bytes;
}

/* A process of a container sees `accounting` read-only and counts pids of its own: it is recorded from outside, by
 * whoever asks while it lives. */
gpu_account_t *gpu_accounts(void)
{
    gpu_process_t list[GPU_CLIENTS];
    int count = gpu_processes(list);
    for (int i = 0; i < count; i++)
        if (list[i].pid) account(list[i].pid, list[i].device, list[i].used_bytes, 0);
    return accounts;
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

int gpu_register(unsigned device, uint64_t used_bytes, int mps)
{
    struct flock lock;
    char own[64];
    unsigned long before = 0, mib = (unsigned long)((used_bytes + GPU_MIB - 1) / GPU_MIB);
    int slot, was_mps = 0, begins = 0;
    if (clients_fd < 0) return -1;
    if (!own_share(&slot, &before, &was_mps)) {
        slot = claim_slot(device);
        begins = 1;
    }
    if (slot < 0) return -1;
    off_t length = 2 * (off_t)mib + 1 + (mps != 0);
    if (lock_call(F_SETLK, F_RDLCK, slot, 0, length, &lock)) return -1;
    if (mib < before) lock_call(F_SETLK, F_UNLCK, slot, length, SLOT - length, &lock);
    snprintf(own, sizeof own, "%d %d %lu %d", getpid(), slot, mib, mps != 0);
    account((unsigned)getpid(), device, mib * GPU_MIB, begins);
    return setenv(OWN_SHARE, own, 1);
}

void gpu_unregister(void)
{
    struct flock lock;
    unsigned long mib;
    int slot, mps;
    if (!own_share(&slot, &mib, &mps)) return;
    account((unsigned)getpid(), (unsigned)slot / GPU_CLIENTS, mib * GPU_MIB, 0);
    lock_call(F_SETLK, F_UNLCK, slot, 0, SLOT, &lock);
    unsetenv(OWN_SHARE);
}
