// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
// A PCI function in the hands of this process, through Linux's vfio-pci, with mappings of its own: a
// container of type 1.
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct vfio {
    char pci[32];
    int container, group, device;
};

// Loads the modules, and binds the function, alone in its group, to vfio-pci. NULL, or the error;
// must be closed in any case.
const char *vfio_open(struct vfio *vfio, const char *pci);

// Closes it, which unmaps everything, and leaves it without a driver.
void vfio_close(struct vfio *vfio);

// The first bytes of BAR 0, with memory and bus mastering enabled; MAP_FAILED, with errno, on an error.
volatile char *vfio_registers(const struct vfio *vfio, size_t size);

// Maps memory of this process for DMA. 0, or errno.
int vfio_map(const struct vfio *vfio, const void *memory, uint64_t iova, uint64_t size, bool writable);

// Unmaps what was mapped by one call, or, without a size, everything. 0, or errno.
int vfio_unmap(const struct vfio *vfio, uint64_t iova, uint64_t size);
