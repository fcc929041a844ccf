// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
// The machine's virtio devices and NVMe controllers, according to sysfs.
#pragma once

#include <stdbool.h>

enum { MAX_DEVICES = 32 };

struct device {
    char pci[32];    // PCI address: "0000:00:01.0"
    char virtio[16]; // "virtio0"; another one after the PCI driver let go of it. "" for NVMe
    char driver[16]; // "virtio_blk", "virtio_net", "virtio_rng", "nvme"
    char node[24];   // "vda", "eth0", "nvme0n1"; "" for others
};

// The devices with a driver, in the order of their PCI addresses. Returns their number.
unsigned find_devices(struct device devices[static MAX_DEVICES]);

// Whether it is a disk.
bool is_disk(const struct device *device);

// The first device with this driver. False if there is none.
bool find_device(const char *driver, struct device *device);

// Binds a function without driver to this one, and no other. 0, or errno.
int give_to_driver(const char *pci, const char *driver);

// Leaves it without a driver.
void take_from_driver(const char *pci, const char *driver);
