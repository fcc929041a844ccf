// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
// The checks for twostage.test=. Each reports its results through report.h.
#pragma once

#include <stdbool.h>

void check_boot(void);      // processors, memory, devices that are there
void check_iommu(void);     // the units, DMA domains, interrupts
void check_blk(void);       // every disk: sequential and random writes, read back
void check_md5(void);       // what an NVMe disk holds, to compare outside
void check_queues(void);    // the queues of disks that have one for each processor, and their interrupts
void check_net(void);       // ping, bulk transfer both ways
void check_rng(void);       // /dev/hwrng
void check_rebind(void);    // every device: its driver and its PCI driver let go and take it again
void check_reboot(void);    // the machine restarts; does not return the first times
void check_kexec(void);     // another kernel starts without a reset; does not return the first time
void check_isolation(void); // a device without driver is refused its DMA
void check_intx(void);      // the pin of a device without driver
void check_bypass(void);    // its DMA goes to physical addresses when its domain is an identity
void check_sva(void);       // a device uses processes' own addresses, and asks for their pages
void check_vfio(void);      // a program maps and unmaps for a device: its DMA sees that, and no more
void check_clean(void);     // the IOMMU has refused nothing

// The requests to each disk.
void note_disks(void);

// Short forms, to check that a device still works. NULL, or the error.
const char *try_disk(const char *name);
const char *try_net(const char *interface);
const char *try_rng(void);
