// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
#include "lib/memory.h"
#include "lib/console.h"

// From the linker script.
extern char image_end[], pool_end[];

static char *next_page = image_end;

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
    if (next_page > pool_end) {
        print("out of memory\n");
        machine_exit(1);
    }
    return memset(pages, 0, size);
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
