/* SPDX-License-Identifier: MIT
 * Included before everything else: built on Debian 13, sscanf and strtol would be those of C23, which Debian 12's
 * library (2.36) does not have. */
#define _GNU_SOURCE
#include <features.h>
#undef __GLIBC_USE_C2X_STRTOL
#define __GLIBC_USE_C2X_STRTOL 0
#undef __GLIBC_USE_C23_STRTOL
#define __GLIBC_USE_C23_STRTOL 0
