// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
// A queue of a virtio device over PCI (Virtio 1.3, chapter 4.1) with Twostage's layout: the common
// structure at the start of BAR 0, followed by the others, a page each.
#pragma once
#include "hw/pci.h"

enum { VIRTIO_QUEUE_SIZE = 64 };

// IDs of the devices that the checks use.
enum { VIRTIO_NETWORK = 0x1041, VIRTIO_BLOCK = 0x1042, VIRTIO_ENTROPY = 0x1044 };

enum { VIRTIO_WRITE = 2, VIRTIO_INDIRECT = 4, VIRTIO_NEXT = 1 };

struct virtio_descriptor {
    u64 address;
    u32 length;
    u16 flags, next;
};

struct virtio {
    pci_id id;
    u64 bar;
    u16 queue;
    struct virtio_descriptor *descriptors;
    volatile u16 *available, *used;
};

// Finds the first device with this ID and enables memory and bus mastering. False if there is none.
bool virtio_find(struct virtio *device, u16 id);
// The same for the device before which there are `n` with this ID.
bool virtio_find_nth(struct virtio *device, u16 id, unsigned n);
// Another queue of a device that was found.
struct virtio virtio_other_queue(const struct virtio *device, u16 queue);

// Enables MSI-X: vector 0, for configuration changes, is masked; vector 1, for the queue, is
// `vector` here.
void virtio_interrupts(const struct virtio *device, unsigned vector);
// Vector `number` sends `data` to `address`, which may be invalid.
void virtio_message(const struct virtio *device, unsigned number, u64 address, u32 data);

// Resets the device and initializes it up to DRIVER_OK, accepting all offered features except event
// indices. False if that fails.
bool virtio_start(struct virtio *device);
// The same in steps, for a device with several queues, each of which is enabled.
bool virtio_begin(struct virtio *device);
void virtio_enable(struct virtio *queue);
bool virtio_ready(struct virtio *device);

// Writes 0 to the status, without waiting for the reset.
void virtio_reset(const struct virtio *device);
u8 virtio_status(const struct virtio *device);

// Makes the chain that starts with descriptor `head` available, and notifies the device.
void virtio_put(const struct virtio *device, u16 head);

// Number of chains the device has returned since it was started, modulo 2^16.
u16 virtio_used(const struct virtio *device);
// First descriptor of the chain that was returned after `n` others, and the bytes written to it.
u16 virtio_used_head(const struct virtio *device, u16 n);
u32 virtio_used_length(const struct virtio *device, u16 n);
