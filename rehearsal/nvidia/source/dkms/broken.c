
/* Does not build: the kernel's function takes more arguments. Debian's nvidia-open-kernel-dkms 550.163.01 fails by the
 * same call against kernel 6.12.117. */
#include <linux/pci.h>

int nv_resize_pcie_bars(struct pci_dev *pci_dev);
int nv_resize_pcie_bars(struct pci_dev *pci_dev)
{
	return pci_resize_resource(pci_dev, 1);
}
