// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <unistd.h>

#include "../kernel/files.h"
#include "../report.h"
#include "checks.h"

enum { SIZE = 4096 };

static unsigned char data[SIZE];

// NULL, or the error.
static const char *read_random(size_t size)
{
    int file = open("/dev/hwrng", O_RDONLY | O_CLOEXEC);
    if (file < 0)
        return strerror(errno);
    size_t have = 0;
    while (have < size) {
        ssize_t length = read(file, data + have, size - have);
        if (length <= 0) {
            close(file);
            return length < 0 ? strerror(errno) : "no more bytes";
        }
        have += (size_t)length;
    }
    close(file);
    return NULL;
}

void check_rng(void)
{
    unsigned seen[256] = {0}, values = 0;
    const char *current = first_line("/sys/class/misc/hw_random/rng_current");
    const char *wrong = read_random(SIZE);

    if (wrong) {
        failed("rng", "/dev/hwrng: %s", wrong);
        return;
    }
    for (unsigned i = 0; i < SIZE; i++)
        values += seen[data[i]]++ == 0;
    if (strncmp(current, "virtio_rng", 10) != 0)
        failed("rng", "the source is '%s', not virtio_rng", current);
    else if (values < 250) // 4096 random bytes leave out a value with a chance of 1 in 40,000
        failed("rng", "%u different values in %d bytes", values, SIZE);
    else
        passed("rng", "%d bytes from %s, %u different values", SIZE, current, values);
}

const char *try_rng(void)
{
    return read_random(64);
}
