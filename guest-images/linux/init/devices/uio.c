// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
#include "uio.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "../kernel/files.h"
#include "devices.h"

#define DRIVER "uio_pci_generic"

// PCI command register.
enum { COMMAND = 4, COMMAND_INTX_DISABLE = 1 << 10 };

static bool take_name(const char *name, void *found)
{
    snprintf(found, 16, "%s", name);
    return false;
}

const char *uio_open(struct uio *uio, const char *pci)
{
    char path[96], node[16] = "", device[32];

    *uio = (struct uio){.file = -1};
    snprintf(uio->pci, sizeof(uio->pci), "%s", pci);
    int error = give_to_driver(pci, DRIVER);
    if (error)
        return strerror(error);
    snprintf(path, sizeof(path), "/sys/bus/pci/devices/%s/uio", pci);
    for_each_name(path, take_name, node);
    if (!node[0])
        return DRIVER " does not take it";
    snprintf(device, sizeof(device), "/dev/%s", node);
    uio->file = open(device, O_RDONLY | O_CLOEXEC);
    return uio->file < 0 ? strerror(errno) : NULL;
}

void uio_close(struct uio *uio)
{
    if (uio->file >= 0)
        close(uio->file);
    take_from_driver(uio->pci, DRIVER);
}

bool uio_wait(const struct uio *uio)
{
    struct pollfd waiting = {.fd = uio->file, .events = POLLIN};
    uint32_t count;

    return poll(&waiting, 1, PATIENCE_S * 1000) == 1 && read(uio->file, &count, sizeof(count)) == sizeof(count);
}

bool uio_unmask(const struct uio *uio)
{
    char path[96];
    uint16_t command;

    snprintf(path, sizeof(path), "/sys/bus/pci/devices/%s/config", uio->pci);
    int config = open(path, O_RDWR | O_CLOEXEC);
    bool done = config >= 0 && pread(config, &command, sizeof(command), COMMAND) == sizeof(command);
    command &= ~COMMAND_INTX_DISABLE;
    done = done && pwrite(config, &command, sizeof(command), COMMAND) == sizeof(command);
    if (config >= 0)
        close(config);
    return done;
}
