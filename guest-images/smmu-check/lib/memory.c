// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
#include "lib/memory.h"
#include "lib/console.h"

// What the image's header asks for behind the image.
#define POOL_SIZE 0x1000000u

extern char image_end[];

static char *next_page = image_end;

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

int memcmp(const void *left, const void *right, size_t count)
{
    const u8 *a = left, *b = right;

    for (; count; a++, b++, count--)
        if (*a != *b)
            return *a - *b;
    return 0;
}

void *pages_new(unsigned count)
{
    u64 size = count * PAGE_SIZE;
    char *pages = (char *)((gpa_of(next_page) + size - 1) & ~(size - 1));

    next_page = pages + size;
    if (next_page > image_end + POOL_SIZE) {
        print("out of memory\n");
        machine_exit(1);
    }
    for (u64 *word = (u64 *)pages; (char *)word < next_page; word++)
        *word = 0;
    return pages;
}

void *page_new(void)
{
    return pages_new(1);
}

void *pages_mark(void)
{
    return next_page;
}

void pages_release_to(void *mark)
{
    next_page = mark;
}
