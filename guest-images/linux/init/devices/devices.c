// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
#include "devices.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "../kernel/files.h"

struct found {
    struct device *devices;
    unsigned count;
};

static bool take_name(const char *name, void *node)
{
    snprintf(node, 16, "%s", name);
    return false;
}

static bool take_virtio(const char *name, void *context)
{
    if (strncmp(name, "virtio", 6) != 0)
        return true;
    snprintf(context, sizeof(((struct device *)0)->virtio), "%s", name);
    return false;
}

// Adds an NVMe controller, with its first namespace if that exists. Returns whether it is one.
static bool take_nvme(const char *pci, struct device *device)
{
    char path[256], controller[16] = "";

    snprintf(device->driver, sizeof(device->driver), "%s", link_name("/sys/bus/pci/devices/%s/driver", pci));
    if (strcmp(device->driver, "nvme") != 0)
        return false;
    snprintf(path, sizeof(path), "/sys/bus/pci/devices/%s/nvme", pci);
    for_each_name(path, take_name, controller);
    snprintf(device->node, sizeof(device->node), "%sn1", controller);
    snprintf(path, sizeof(path), "/sys/block/%s", device->node);
    if (!exists(path))
        device->node[0] = '\0';
    return true;
}

static bool take_pci(const char *name, void *context)
{
    struct found *found = context;
    struct device *device = &found->devices[found->count];
    char path[256];

    *device = (struct device){0};
    snprintf(device->pci, sizeof(device->pci), "%s", name);
    snprintf(path, sizeof(path), "/sys/bus/pci/devices/%s", name);
    for_each_name(path, take_virtio, device->virtio);
    if (!device->virtio[0])
        return !take_nvme(name, device) || ++found->count < MAX_DEVICES;
    snprintf(device->driver, sizeof(device->driver), "%s", link_name("/sys/bus/virtio/devices/%s/driver", device->virtio));
    if (!device->driver[0])
        return true;
    snprintf(path, sizeof(path), "/sys/bus/virtio/devices/%s/block", device->virtio);
    for_each_name(path, take_name, device->node);
    snprintf(path, sizeof(path), "/sys/bus/virtio/devices/%s/net", device->virtio);
    for_each_name(path, take_name, device->node);
    return ++found->count < MAX_DEVICES;
}

unsigned find_devices(struct device devices[static MAX_DEVICES])
{
    struct found found = {devices, 0};

    for_each_name("/sys/bus/pci/devices", take_pci, &found);
    return found.count;
}

bool is_disk(const struct device *device)
{
    return strcmp(device->driver, "virtio_blk") == 0 || strcmp(device->driver, "nvme") == 0;
}

bool find_device(const char *driver, struct device *device)
{
    struct device all[MAX_DEVICES];
    unsigned count = find_devices(all);

    for (unsigned i = 0; i < count; i++) {
        if (strcmp(all[i].driver, driver) == 0) {
            *device = all[i];
            return true;
        }
    }
    return false;
}

int give_to_driver(const char *pci, const char *driver)
{
    char path[96];

    snprintf(path, sizeof(path), "/sys/bus/pci/devices/%s/driver_override", pci);
    int error = write_text(path, driver);
    if (!error)
        error = write_text("/sys/bus/pci/drivers_probe", pci);
    if (!error && strcmp(link_name("/sys/bus/pci/devices/%s/driver", pci), driver) != 0)
        error = ENODEV;
    return error;
}

void take_from_driver(const char *pci, const char *driver)
{
    char path[96];

    snprintf(path, sizeof(path), "/sys/bus/pci/devices/%s/driver_override", pci);
    write_text(path, "\n");
    snprintf(path, sizeof(path), "/sys/bus/pci/drivers/%s/unbind", driver);
    write_text(path, pci);
}
