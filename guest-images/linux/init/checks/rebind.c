// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
#include <stdio.h>
#include <string.h>

#include "../devices/devices.h"
#include "../kernel/files.h"
#include "../kernel/options.h"
#include "../report.h"
#include "checks.h"

static bool device_at(const char *pci, struct device *device)
{
    struct device all[MAX_DEVICES];
    unsigned count = find_devices(all);

    for (unsigned i = 0; i < count; i++) {
        if (strcmp(all[i].pci, pci) == 0) {
            *device = all[i];
            return true;
        }
    }
    return false;
}

// A disk or interface appears some time after its driver was bound.
static bool works_again(const void *context)
{
    struct device device;
    bool needs_node;

    if (!device_at(context, &device))
        return false;
    needs_node = strcmp(device.driver, "virtio_rng") != 0;
    return !needs_node || device.node[0];
}

static const char *try_device(const char *pci)
{
    struct device device;

    if (!wait_until(works_again, pci) || !device_at(pci, &device))
        return "did not come back";
    if (is_disk(&device))
        return try_disk(device.node);
    if (strcmp(device.driver, "virtio_net") == 0)
        return try_net(device.node);
    if (strcmp(device.driver, "virtio_rng") == 0)
        return try_rng();
    return NULL;
}

// Unbinds `name` from the driver in `directory` and binds it again. NULL, or the error.
static const char *take_and_give(const char *directory, const char *name)
{
    static char wrong[160];
    const char *const steps[] = {"unbind", "bind"};

    for (unsigned i = 0; i < 2; i++) {
        char path[128];
        snprintf(path, sizeof(path), "%s/%s", directory, steps[i]);
        int error = write_text(path, name);
        if (error) {
            snprintf(wrong, sizeof(wrong), "%s of %s: %s", steps[i], name, strerror(error));
            return wrong;
        }
    }
    return NULL;
}

static void rebind(const struct device *device, bool pci, unsigned long rounds)
{
    const char *what = pci ? "PCI device" : "driver";
    double start = now();

    for (unsigned long round = 0; round < rounds; round++) {
        struct device current;
        char directory[64];
        const char *wrong = "not there";
        if (device_at(device->pci, &current)) {
            const char *bus = pci ? "pci" : "virtio";
            const char *driver = pci && current.virtio[0] ? "virtio-pci" : current.driver;
            snprintf(directory, sizeof(directory), "/sys/bus/%s/drivers/%s", bus, driver);
            wrong = take_and_give(directory, pci ? current.pci : current.virtio);
        }
        if (!wrong)
            wrong = try_device(device->pci);
        if (wrong) {
            failed("rebind", "%s %s, %s, round %lu: %s", device->pci, device->driver, what, round + 1, wrong);
            return;
        }
    }
    passed("rebind", "%s %s, %s: %lu rounds in %.2f s", device->pci, device->driver, what, rounds, now() - start);
}

void check_rebind(void)
{
    struct device devices[MAX_DEVICES];
    unsigned count = find_devices(devices);
    unsigned long rounds = option_number("rebind.rounds", 20);

    if (!count)
        failed("rebind", "there is no device");
    for (unsigned i = 0; i < count; i++) {
        if (devices[i].virtio[0])
            rebind(&devices[i], false, rounds);
        rebind(&devices[i], true, rounds);
    }
}
