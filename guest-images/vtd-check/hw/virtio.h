// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
// A virtio device over PCI (Virtio 1.3, chapter 4.1) with one queue, as Twostage has its structures: the common
// ones at the start of BAR 0, a page each for the next.
#pragma once
#include "hw/pci.h"

enum { VIRTIO_QUEUE_SIZE = 64 };

// Device IDs of the devices that the checks know.
enum { VIRTIO_BLOCK = 0x1042, VIRTIO_ENTROPY = 0x1044 };

enum { VIRTIO_WRITE = 2, VIRTIO_INDIRECT = 4, VIRTIO_NEXT = 1 };

struct virtio_descriptor {
    u64 address;
    u32 length;
    u16 flags, next;
};

struct virtio {
    pci_id id;
    u64 bar;
    struct virtio_descriptor *descriptors;
    volatile u16 *available, *used;
};

// Finds the first of this device ID and enables it: memory, bus mastering. False when there is none.
bool virtio_find(struct virtio *device, u16 id);

// MSI-X on: vector 0, of the configuration, is masked; vector 1, of the queue, is `vector` here.
void virtio_interrupts(const struct virtio *device, unsigned vector);
// Vector `number` sends `data` to `address`, which need not make sense.
void virtio_message(const struct virtio *device, unsigned number, u64 address, u32 data);

// Resets the device and brings it to DRIVER_OK, all that it offers accepted but event indices. False when it does not
// come there.
bool virtio_start(struct virtio *device);

// Writes 0 to the status, and does not look whether the reset is over.
void virtio_reset(const struct virtio *device);
u8 virtio_status(const struct virtio *device);

// Makes the chain that starts with descriptor `head` available, and tells the device.
void virtio_put(const struct virtio *device, u16 head);

// How many chains the device has given back since it was started, modulo 2^16.
u16 virtio_used(const struct virtio *device);
