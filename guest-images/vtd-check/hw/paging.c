// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
#include "hw/paging.h"
#include "lib/memory.h"

#define ENTRY_ADDRESS 0x000ffffffffff000ull

struct page_table first_stage_new(unsigned levels)
{
    return (struct page_table){page_new(), levels, FS_READ_WRITE, 0};
}

struct page_table second_stage_new(unsigned levels)
{
    return (struct page_table){page_new(), levels, SS_READ_WRITE, 0};
}

u64 *table_entry(struct page_table *table, u64 iova, unsigned level)
{
    u64 *entries = table->top;

    for (unsigned at = table->levels;; at--) {
        u64 *entry = &entries[(iova >> (12 + 9 * (at - 1))) & 511];

        if (at == level)
            return entry;
        if (!*entry)
            *entry = (gpa_of(page_new()) + table->moved) | table->table_rights;
        entries = (u64 *)(uintptr_t)((*entry & ENTRY_ADDRESS) - table->moved);
    }
}

u64 *map_leaf(struct page_table *table, u64 iova, u64 gpa, enum page_level level, u64 rights)
{
    u64 *entry = table_entry(table, iova, level);

    *entry = gpa | rights | (level > LEVEL_4K ? PAGE_LARGE : 0);
    return entry;
}
