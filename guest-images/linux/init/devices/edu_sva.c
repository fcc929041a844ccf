// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
#include "edu_sva.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>

#include "../../../linux-modules/edu_sva.h"
#include "../kernel/files.h"
#include "../kernel/modules.h"

enum { WORD = sizeof(uint64_t) };

const char *sva_load(void)
{
    int error = load_module("/sva/edu_sva.ko");

    return error ? strerror(error) : NULL;
}

bool sva_exists(unsigned device)
{
    char path[32];

    snprintf(path, sizeof(path), "/dev/edu_sva%u", device);
    return exists(path);
}

int sva_open(unsigned device)
{
    char path[32];

    snprintf(path, sizeof(path), "/dev/edu_sva%u", device);
    return open(path, O_RDWR | O_CLOEXEC);
}

uint32_t sva_pasid(int file)
{
    uint32_t pasid = 0;

    return ioctl(file, EDU_SVA_PASID, &pasid) < 0 ? 0 : pasid;
}

static int copy(int file, const void *from, void *to, size_t size, unsigned steps)
{
    struct edu_sva_copy copy = {
        .from = (uintptr_t)from, .to = (uintptr_t)to, .length = (uint32_t)size, .steps = steps};

    return ioctl(file, EDU_SVA_COPY, &copy) < 0 ? errno : 0;
}

int sva_copy(int file, const void *from, void *to, size_t size)
{
    return copy(file, from, to, size, EDU_SVA_READ | EDU_SVA_WRITE);
}

int sva_fill(int file, const void *page, void *to, size_t size)
{
    int error = copy(file, page, NULL, EDU_SVA_BUFFER, EDU_SVA_READ);

    return error ? error : copy(file, NULL, to, size, EDU_SVA_WRITE);
}

const char *sva_refuses_read(int file, const void *from)
{
    static const uint64_t before = 0x6578616d706c6521;
    uint64_t after = 0;
    int error = copy(file, &before, NULL, WORD, EDU_SVA_READ);

    if (error)
        return strerror(error);
    error = copy(file, from, NULL, WORD, EDU_SVA_READ);
    if (error && error != EFAULT)
        return strerror(error);
    if (copy(file, NULL, &after, WORD, EDU_SVA_WRITE) != 0)
        return "the buffer cannot be read";
    return after == before ? NULL : "the device has read it";
}

const char *sva_refuses_write(int file, void *to)
{
    static const uint64_t value = 0x776f72647772616c;
    int error = copy(file, &value, NULL, WORD, EDU_SVA_READ);

    if (error)
        return strerror(error);
    error = copy(file, NULL, to, WORD, EDU_SVA_WRITE);
    return error == 0 || error == EFAULT ? NULL : strerror(error);
}
