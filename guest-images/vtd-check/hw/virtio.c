// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
#include "hw/virtio.h"
#include "lib/interrupts.h"
#include "lib/memory.h"
#include "lib/wait.h"

enum {
    VENDOR = 0x1af4,
    BAR_SIZE = 0x8000,
    MSIX = 0x11,
    MSIX_ENABLE = 1u << 31,
};

// Offsets in the BAR.
enum {
    DEVICE_FEATURE_SELECT = 0x00,
    DEVICE_FEATURE = 0x04,
    DRIVER_FEATURE_SELECT = 0x08,
    DRIVER_FEATURE = 0x0c,
    CONFIG_VECTOR = 0x10,
    STATUS = 0x14,
    QUEUE_SELECT = 0x16,
    QUEUE_SIZE = 0x18,
    QUEUE_VECTOR = 0x1a,
    QUEUE_ENABLE = 0x1c,
    QUEUE_DESCRIPTORS = 0x20,
    QUEUE_AVAILABLE = 0x28,
    QUEUE_USED = 0x30,
    NOTIFY = 0x3000,
    MSIX_TABLE = 0x4000,
    MSIX_ENTRY = 16,
};

enum { ACKNOWLEDGE = 1, DRIVER = 2, DRIVER_OK = 4, FEATURES_OK = 8 };

#define EVENT_INDEX BIT(29)

bool virtio_find(struct virtio *device, u16 id)
{
    if (!pci_find((u32)id << 16 | VENDOR, &device->id, 1))
        return false;
    device->bar = pci_enable(device->id, BAR_SIZE);
    device->descriptors = page_new();
    device->available = page_new();
    device->used = page_new();
    return true;
}

void virtio_message(const struct virtio *device, unsigned number, u64 address, u32 data)
{
    u64 entry = device->bar + MSIX_TABLE + number * MSIX_ENTRY;

    write32(entry, (u32)address);
    write32(entry + 4, (u32)(address >> 32));
    write32(entry + 8, data);
    write32(entry + 12, 0);
}

void virtio_interrupts(const struct virtio *device, unsigned vector)
{
    u16 msix = pci_capability(device->id, MSIX);

    virtio_message(device, 1, msi_address(), vector);
    pci_write(device->id, msix, pci_read(device->id, msix) | MSIX_ENABLE);
}

static void set_area(const struct virtio *device, u32 offset, const volatile void *area)
{
    write32(device->bar + offset, (u32)gpa_of(area));
    write32(device->bar + offset + 4, (u32)(gpa_of(area) >> 32));
}

static void accept(const struct virtio *device, u32 half, u32 without)
{
    u32 offered;

    write32(device->bar + DEVICE_FEATURE_SELECT, half);
    offered = read32(device->bar + DEVICE_FEATURE);
    write32(device->bar + DRIVER_FEATURE_SELECT, half);
    write32(device->bar + DRIVER_FEATURE, offered & ~without);
}

bool virtio_start(struct virtio *device)
{
    virtio_reset(device);
    if (!WAIT_UNTIL(virtio_status(device) == 0))
        return false;
    memset(device->descriptors, 0, PAGE_SIZE);
    memset((void *)(uintptr_t)gpa_of(device->available), 0, PAGE_SIZE);
    memset((void *)(uintptr_t)gpa_of(device->used), 0, PAGE_SIZE);
    write8(device->bar + STATUS, ACKNOWLEDGE);
    write8(device->bar + STATUS, ACKNOWLEDGE | DRIVER);
    accept(device, 0, EVENT_INDEX);
    accept(device, 1, 0);
    write8(device->bar + STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK);
    write16(device->bar + CONFIG_VECTOR, 0);
    write16(device->bar + QUEUE_SELECT, 0);
    write16(device->bar + QUEUE_SIZE, VIRTIO_QUEUE_SIZE);
    write16(device->bar + QUEUE_VECTOR, 1);
    set_area(device, QUEUE_DESCRIPTORS, device->descriptors);
    set_area(device, QUEUE_AVAILABLE, device->available);
    set_area(device, QUEUE_USED, device->used);
    write16(device->bar + QUEUE_ENABLE, 1);
    write8(device->bar + STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
    return virtio_status(device) == (ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
}

void virtio_reset(const struct virtio *device)
{
    write8(device->bar + STATUS, 0);
}

u8 virtio_status(const struct virtio *device)
{
    return read8(device->bar + STATUS);
}

void virtio_put(const struct virtio *device, u16 head)
{
    u16 index = device->available[1];

    device->available[2 + index % VIRTIO_QUEUE_SIZE] = head;
    device->available[1] = index + 1;
    write16(device->bar + NOTIFY, 0);
}

u16 virtio_used(const struct virtio *device)
{
    return device->used[1];
}
