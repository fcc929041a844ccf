// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
#include "hw/stage1.h"
#include "lib/memory.h"

enum { STE_ABORT = 0, STE_BYPASS = 4, STE_STAGE_1 = 5 };

#define STE_VALID BIT(0)
#define STE_CONFIG(config) ((u64)(config) << 1)
// Context descriptors: inner and outer write-back, inner shareable.
#define STE_CONTEXT_CACHED (1ull << 2 | 1ull << 4 | 3ull << 6)
#define STE_SHARING_INCOMING (1ull << 44)

#define CD_T0SZ (64ull - 39)
#define CD_TABLES_CACHED (1ull << 8 | 1ull << 10 | 3ull << 12)
#define CD_NO_TTB1 BIT(30)
#define CD_VALID BIT(31)
#define CD_IPS(code) ((u64)(code) << 32)
#define CD_IPS_48 5
#define CD_AARCH64 BIT(41)
#define CD_STALL BIT(44)
#define CD_RECORD BIT(45)
#define CD_TERMINATE_ABORT BIT(46)
#define CD_ASID(asid) ((u64)(asid) << 48 | BIT(47))
#define MAIR_WRITE_BACK 0xffull

#define TABLE 3ull
#define PAGE 3ull
#define PAGE_USER BIT(6) // devices' accesses are unprivileged
#define PAGE_READ_ONLY BIT(7)
#define PAGE_INNER_SHAREABLE (3ull << 8)
#define PAGE_ACCESSED BIT(10)
#define PAGE_NOT_GLOBAL BIT(11)
#define ADDRESS_MASK 0xfffffffff000ull

struct space space_new(u16 asid)
{
    struct space space = {page_new(), page_new(), asid};

    space.context->words[3] = MAIR_WRITE_BACK;
    space.context->words[1] = gpa_of(space.table);
    // The unit's maximum output address size, as far as a granule of 4 KiB can say one: 48 bits.
    // QEMU's SMMUv3 ends at a larger one, which the architecture has it take for its own.
    u64 size = smmu_read(SMMU_IDR5) & 7;

    if (size > CD_IPS_48)
        size = CD_IPS_48;
    space.context->words[0] = CD_T0SZ | CD_TABLES_CACHED | CD_NO_TTB1 | CD_VALID |
                              CD_IPS(size) | CD_AARCH64 | CD_RECORD | CD_TERMINATE_ABORT |
                              CD_ASID(asid);
    return space;
}

void space_stall(const struct space *space)
{
    space->context->words[0] |= CD_STALL;
}

u64 page_entry(const volatile void *page, enum access access)
{
    return gpa_of(page) | PAGE | PAGE_USER | (access == READ_ONLY ? PAGE_READ_ONLY : 0) | PAGE_INNER_SHAREABLE |
           PAGE_ACCESSED | PAGE_NOT_GLOBAL;
}

u64 *space_map(const struct space *space, u64 address, const volatile void *page, enum access access)
{
    u64 *table = space->table;

    for (unsigned shift = 30; shift > 12; shift -= 9) {
        u64 *entry = &table[address >> shift & 511];

        if (!*entry)
            *entry = gpa_of(page_new()) | TABLE;
        table = (u64 *)(uintptr_t)(*entry & ADDRESS_MASK);
    }
    table[address >> 12 & 511] = page_entry(page, access);
    return &table[address >> 12 & 511];
}

static void set(pci_id function, u64 first, u64 second)
{
    struct entry *stream = smmu_stream(function);

    // The word with the valid bit is written last, as the unit may read at any time.
    stream->words[0] = 0;
    stream->words[1] = second;
    stream->words[0] = first;
}

void stream_translate(pci_id function, const struct space *space)
{
    set(function, STE_VALID | STE_CONFIG(STE_STAGE_1) | gpa_of(space->context), STE_CONTEXT_CACHED | STE_SHARING_INCOMING);
}

void stream_bypass(pci_id function)
{
    set(function, STE_VALID | STE_CONFIG(STE_BYPASS), STE_SHARING_INCOMING);
}

void stream_abort(pci_id function)
{
    set(function, STE_VALID | STE_CONFIG(STE_ABORT), 0);
}
