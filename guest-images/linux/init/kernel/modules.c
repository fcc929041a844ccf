// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
#include "modules.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "../report.h"

int load_module(const char *path)
{
    int file = open(path, O_RDONLY | O_CLOEXEC);
    if (file < 0)
        return errno;
    int error = syscall(SYS_finit_module, file, "", 0) < 0 ? errno : 0;
    close(file);
    return error;
}

void load_modules(const char *directory)
{
    char name[128], path[192];

    snprintf(path, sizeof(path), "%s/order", directory);
    FILE *order = fopen(path, "re");

    if (!order)
        return;
    while (fscanf(order, "%127s", name) == 1) {
        snprintf(path, sizeof(path), "%s/%s", directory, name);
        int error = load_module(path);
        if (error && error != EEXIST)
            failed("modules", "%s: %s", name, strerror(error));
    }
    fclose(order);
}
