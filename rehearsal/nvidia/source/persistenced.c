/* SPDX-License-Identifier: MIT
 * nvidia-persistenced of the simulated card: sets persistence mode, keeps the device in use until it ends. */
#include "gpu.h"

#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define FOLDER "/run/nvidia-persistenced"

static void set_persistence(unsigned mode)
{
    for (unsigned i = 0; i < gpu_driver()->count; i++) gpu_settings()->persistence[i] = mode;
}

static void write_pid_file(void)
{
    mkdir(FOLDER, 0755);
    FILE *file = fopen(FOLDER "/nvidia-persistenced.pid", "we");
    if (!file) return;
    fprintf(file, "%d\n", getpid());
    fclose(file);
}

int main(int count, char **words)
{
    sigset_t signals;
    int received, ready[2], persist = 1;
    for (int n = 1; n < count; n++) {
        if (!strcmp(words[n], "--no-persistence-mode")) persist = 0;
        if (!strcmp(words[n], "--version"))
            return printf("nvidia-persistenced:  version %s (simulated)\n", DRIVER_VERSION) < 0;
    }
    if (pipe(ready)) return 1;
    /* Locks are not inherited: the child opens the card, and its parent waits for the outcome. */
    if (fork()) {
        char outcome = 1;
        close(ready[1]);
        if (read(ready[0], &outcome, 1) == 1 && outcome == 0) return 0;
        fprintf(stderr, "nvidia-persistenced failed to initialize: no simulated driver of version %s is loaded.\n", DRIVER_VERSION);
        return 1;
    }
    setsid();
    if (gpu_open(DRIVER_VERSION) || !gpu_may_change()) return 1;
    sigemptyset(&signals);
    sigaddset(&signals, SIGTERM);
    sigaddset(&signals, SIGINT);
    sigprocmask(SIG_BLOCK, &signals, NULL);
    if (persist) set_persistence(1);
    write_pid_file();
    if (write(ready[1], "", 1) != 1) return 1;
    close(ready[1]);
    sigwait(&signals, &received);
    if (persist) set_persistence(0);
    unlink(FOLDER "/nvidia-persistenced.pid");
    return 0;
}
