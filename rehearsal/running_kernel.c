/* SPDX-License-Identifier: MIT
 * uname(2) with the release of /etc/lab-kernel, for a host of the lab that is to run a Debian kernel (simulated). */
#include <string.h>
#include <stdio.h>
#include <sys/syscall.h>
#include <sys/utsname.h>
#include <unistd.h>

int uname(struct utsname *name)
{
    int status = (int)syscall(SYS_uname, name);
    FILE *file = status == 0 ? fopen("/etc/lab-kernel", "re") : NULL;

    if (file) {
        char line[sizeof name->release];
        if (fgets(line, sizeof line, file)) {
            line[strcspn(line, "\n")] = '\0';
            strcpy(name->release, line);
            strcpy(name->version, "#1 SMP PREEMPT_DYNAMIC Debian (simulated)");
        }
        fclose(file);
    }
    return status;
}
