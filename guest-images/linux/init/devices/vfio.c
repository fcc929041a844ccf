// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
#include "vfio.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/vfio.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#include "../kernel/files.h"
#include "../kernel/modules.h"
#include "devices.h"

#define DRIVER "vfio-pci"

// PCI command register.
enum { COMMAND = 4, COMMAND_MEMORY = 2, COMMAND_BUS_MASTER = 4 };

// NULL, or what cannot be done; errno says why.
static const char *open_files(struct vfio *vfio)
{
    char path[64];

    vfio->container = open("/dev/vfio/vfio", O_RDWR | O_CLOEXEC);
    if (vfio->container < 0)
        return "/dev/vfio/vfio";
    snprintf(path, sizeof(path), "/dev/vfio/%.32s", link_name("/sys/bus/pci/devices/%s/iommu_group", vfio->pci));
    vfio->group = open(path, O_RDWR | O_CLOEXEC);
    if (vfio->group < 0)
        return "its group's file";
    if (ioctl(vfio->group, VFIO_GROUP_SET_CONTAINER, &vfio->container) < 0)
        return "VFIO_GROUP_SET_CONTAINER";
    if (ioctl(vfio->container, VFIO_SET_IOMMU, VFIO_TYPE1v2_IOMMU) < 0)
        return "VFIO_SET_IOMMU";
    vfio->device = ioctl(vfio->group, VFIO_GROUP_GET_DEVICE_FD, vfio->pci);
    return vfio->device < 0 ? "VFIO_GROUP_GET_DEVICE_FD" : NULL;
}

const char *vfio_open(struct vfio *vfio, const char *pci)
{
    static char wrong[128];
    const char *what = DRIVER;

    *vfio = (struct vfio){.container = -1, .group = -1, .device = -1};
    snprintf(vfio->pci, sizeof(vfio->pci), "%s", pci);
    load_modules("/vfio/modules");
    errno = give_to_driver(pci, DRIVER);
    if (!errno)
        what = open_files(vfio);
    if (!what)
        return NULL;
    snprintf(wrong, sizeof(wrong), "%s: %s", what, strerror(errno));
    return wrong;
}

void vfio_close(struct vfio *vfio)
{
    const int files[] = {vfio->device, vfio->group, vfio->container};

    for (size_t i = 0; i < sizeof(files) / sizeof(files[0]); i++)
        if (files[i] >= 0)
            close(files[i]);
    take_from_driver(vfio->pci, DRIVER);
}

volatile char *vfio_registers(const struct vfio *vfio, size_t size)
{
    struct vfio_region_info config = {.argsz = sizeof(config), .index = VFIO_PCI_CONFIG_REGION_INDEX};
    struct vfio_region_info bar = {.argsz = sizeof(bar), .index = VFIO_PCI_BAR0_REGION_INDEX};
    uint16_t command;

    if (ioctl(vfio->device, VFIO_DEVICE_GET_REGION_INFO, &config) < 0 ||
        ioctl(vfio->device, VFIO_DEVICE_GET_REGION_INFO, &bar) < 0 ||
        pread(vfio->device, &command, sizeof(command), (off_t)config.offset + COMMAND) != sizeof(command))
        return MAP_FAILED;
    command |= COMMAND_MEMORY | COMMAND_BUS_MASTER;
    if (pwrite(vfio->device, &command, sizeof(command), (off_t)config.offset + COMMAND) != sizeof(command))
        return MAP_FAILED;
    return mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, vfio->device, (off_t)bar.offset);
}

int vfio_map(const struct vfio *vfio, const void *memory, uint64_t iova, uint64_t size, bool writable)
{
    struct vfio_iommu_type1_dma_map map = {
        .argsz = sizeof(map),
        .flags = VFIO_DMA_MAP_FLAG_READ | (writable ? VFIO_DMA_MAP_FLAG_WRITE : 0),
        .vaddr = (uintptr_t)memory,
        .iova = iova,
        .size = size,
    };

    return ioctl(vfio->container, VFIO_IOMMU_MAP_DMA, &map) < 0 ? errno : 0;
}

int vfio_unmap(const struct vfio *vfio, uint64_t iova, uint64_t size)
{
    struct vfio_iommu_type1_dma_unmap unmap = {
        .argsz = sizeof(unmap),
        .flags = size ? 0 : VFIO_DMA_UNMAP_FLAG_ALL,
        .iova = iova,
        .size = size,
    };

    if (ioctl(vfio->container, VFIO_IOMMU_UNMAP_DMA, &unmap) < 0)
        return errno;
    // What it unmapped.
    return size && unmap.size != size ? ENOENT : 0;
}
