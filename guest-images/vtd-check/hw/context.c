// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
#include "hw/context.h"
#include "hw/vtd.h"
#include "lib/memory.h"

#define POINTER 0x000ffffffffff000ull

// Follows the pointer in `entry`, allocating a zeroed table if it has none.
static u64 *table_behind(u64 *entry)
{
    if (!(*entry & POINTER))
        *entry = gpa_of(page_new()) | ENTRY_P;
    return (u64 *)(uintptr_t)(*entry & POINTER);
}

u64 *legacy_context(u64 *root, pci_id function)
{
    u64 *table = table_behind(&root[2 * (function >> 8)]);

    return &table[2 * (function & 0xff)];
}

u64 *scalable_context(u64 *root, pci_id function)
{
    unsigned upper_half = (function >> 7) & 1;
    u64 *table = table_behind(&root[2 * (function >> 8) + upper_half]);

    return &table[4 * (function & 0x7f)];
}

void legacy_context_set(u64 *entry, unsigned translation_type, u64 tables, unsigned levels, u16 domain)
{
    entry[1] = address_width(levels) | (u64)domain << 8;
    entry[0] = tables | (u64)translation_type << 2 | ENTRY_P;
}

u64 *scalable_context_set(u64 *entry)
{
    u64 *directory = page_new();

    entry[1] = entry[2] = entry[3] = 0;
    entry[0] = gpa_of(directory) | (ecap_pasid() ? CONTEXT_PASIDE : 0) | CONTEXT_PDTS(0) | ENTRY_P;
    return directory;
}

u64 *pasid_entry(u64 *directory, u32 pasid)
{
    u64 *table = table_behind(&directory[pasid >> 6]);

    return &table[PASID_ENTRY_QUADS * (pasid & 63)];
}

static void set(u64 *entry, unsigned type, u64 first_quad, u16 domain, u64 third_quad)
{
    entry[2] = third_quad;
    entry[1] = domain;
    entry[0] = first_quad | (u64)type << 6 | ENTRY_P;
}

// AW does not apply to the first stage, but QEMU's unit checks it; Linux sets it, too.
void pasid_entry_first_stage(u64 *entry, u64 tables, unsigned levels, u16 domain)
{
    set(entry, PGTT_FIRST_STAGE, address_width(levels) << 2, domain, tables | (levels == 5 ? FSPM_5_LEVEL : 0));
}

void pasid_entry_second_stage(u64 *entry, u64 tables, unsigned levels, u16 domain)
{
    set(entry, PGTT_SECOND_STAGE, tables | address_width(levels) << 2, domain, 0);
}

void pasid_entry_nested(u64 *entry, u64 first, u64 second, unsigned second_levels, u16 domain)
{
    set(entry, PGTT_NESTED, second | address_width(second_levels) << 2, domain, first);
}

void pasid_entry_pass_through(u64 *entry, u16 domain)
{
    unsigned levels = cap_sagaw() & BIT(3) ? 5 : cap_sagaw() & BIT(2) ? 4 : 3;

    set(entry, PGTT_PASS_THROUGH, address_width(levels) << 2, domain, 0);
}
