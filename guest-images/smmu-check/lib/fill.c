// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
#include "lib/memory.h"

void *memset(void *to, int value, size_t count)
{
    volatile char *cursor = to;

    while (count--)
        *cursor++ = (char)value;
    return to;
}

void *memcpy(void *to, const void *from, size_t count)
{
    volatile char *cursor = to;
    const char *source = from;

    while (count--)
        *cursor++ = *source++;
    return to;
}
