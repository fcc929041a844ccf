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
    NOTIFY_DISTANCE = 4,
    MSIX_TABLE = 0x4000,
    MSIX_ENTRY = 16,
};

enum { ACKNOWLEDGE = 1, DRIVER = 2, DRIVER_OK = 4, FEATURES_OK = 8 };

#define EVENT_INDEX BIT(29)

static void make_rings(struct virtio *queue)
{
    queue->descriptors = page_new();
    queue->available = page_new();
    queue->used = page_new();
}

bool virtio_find_nth(struct virtio *device, u16 id, unsigned n)
{
    pci_id found[4];

    if (pci_find((u32)id << 16 | VENDOR, found, ARRAY_LEN(found)) <= n)
        return false;
    device->id = found[n];
    device->bar = pci_enable(device->id, BAR_SIZE);
    device->queue = 0;
    make_rings(device);
    return true;
}

bool virtio_find(struct virtio *device, u16 id)
{
    return virtio_find_nth(device, id, 0);
}

struct virtio virtio_other_queue(const struct virtio *device, u16 queue)
{
    struct virtio other = *device;

    other.queue = queue;
    make_rings(&other);
    return other;
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

bool virtio_begin(struct virtio *device)
{
    virtio_reset(device);
    if (!WAIT_UNTIL(virtio_status(device) == 0))
        return false;
    write8(device->bar + STATUS, ACKNOWLEDGE);
    write8(device->bar + STATUS, ACKNOWLEDGE | DRIVER);
    accept(device, 0, EVENT_INDEX);
    accept(device, 1, 0);
    write8(device->bar + STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK);
    write16(device->bar + CONFIG_VECTOR, 0);
    return true;
}

void virtio_enable(struct virtio *queue)
{
    memset(queue->descriptors, 0, PAGE_SIZE);
    memset((void *)(uintptr_t)gpa_of(queue->available), 0, PAGE_SIZE);
    memset((void *)(uintptr_t)gpa_of(queue->used), 0, PAGE_SIZE);
    write16(queue->bar + QUEUE_SELECT, queue->queue);
    write16(queue->bar + QUEUE_SIZE, VIRTIO_QUEUE_SIZE);
    write16(queue->bar + QUEUE_VECTOR, 1);
    set_area(queue, QUEUE_DESCRIPTORS, queue->descriptors);
    set_area(queue, QUEUE_AVAILABLE, queue->available);
    set_area(queue, QUEUE_USED, queue->used);
    write16(queue->bar + QUEUE_ENABLE, 1);
}

bool virtio_ready(struct virtio *device)
{
    write8(device->bar + STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
    return virtio_status(device) == (ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
}

bool virtio_start(struct virtio *device)
{
    if (!virtio_begin(device))
        return false;
    virtio_enable(device);
    return virtio_ready(device);
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
    write16(device->bar + NOTIFY + device->queue * NOTIFY_DISTANCE, device->queue);
}

u16 virtio_used(const struct virtio *device)
{
    return device->used[1];
}

// What a chain that was returned is told by: its first descriptor, and a length.
static u32 used_element(const struct virtio *device, u16 n, unsigned word)
{
    const volatile u32 *ring = (const volatile u32 *)device->used;

    return ring[1 + 2 * (n % VIRTIO_QUEUE_SIZE) + word];
}

u16 virtio_used_head(const struct virtio *device, u16 n)
{
    return (u16)used_element(device, n, 0);
}

u32 virtio_used_length(const struct virtio *device, u16 n)
{
    return used_element(device, n, 1);
}
