// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
#include "lib/memory.h"

void *memset(void *to, int value, size_t count)
{
    void *cursor = to;

    asm volatile("rep stosb" : "+D"(cursor), "+c"(count) : "a"(value) : "memory");
    return to;
}

void *memcpy(void *to, const void *from, size_t count)
{
    void *cursor = to;

    asm volatile("rep movsb" : "+D"(cursor), "+S"(from), "+c"(count) : : "memory");
    return to;
}
