// SPDX-License-Identifier: MIT
/* A real kernel module that does nothing: what DKMS builds where a guest has a kernel's headers (rehearsal lab). */
#include <linux/module.h>

static int __init simulated_init(void)
{
	pr_info("@MODULE@: simulated, version @VERSION@\n");
	return 0;
}

static void __exit simulated_exit(void)
{
}

module_init(simulated_init);
module_exit(simulated_exit);
MODULE_DESCRIPTION("simulated");
MODULE_LICENSE("Dual MIT/GPL");
MODULE_VERSION("@VERSION@");
