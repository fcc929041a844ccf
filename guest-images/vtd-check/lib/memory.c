// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
#include "lib/memory.h"
#include "lib/console.h"

extern char image_end[];

static char *next_page = image_end;

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
    char *pages = next_page;
    void *cursor = pages;
    u64 words = count * PAGE_SIZE / sizeof(u64);

    next_page += count * PAGE_SIZE;
    if (gpa_of(next_page) > LARGE_REGION_A) {
        print("out of memory\n");
        machine_exit(1);
    }
    asm volatile("rep stosq" : "+D"(cursor), "+c"(words) : "a"(0ull) : "memory");
    return pages;
}

void *page_new(void)
{
    return pages_new(1);
}

void pages_release_all(void)
{
    next_page = image_end;
}
