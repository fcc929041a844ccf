// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
// Page tables of both stages (VT-d chapter 9.8 and 9.10). They differ in the meaning of their low
// bits; the structure is the same.
#pragma once
#include "lib/types.h"

// First stage.
#define FS_P BIT(0)
#define FS_RW BIT(1)
#define FS_US BIT(2)
#define FS_A BIT(5)
#define FS_D BIT(6)
#define FS_READ_ONLY (FS_P | FS_US)
#define FS_READ_WRITE (FS_P | FS_RW | FS_US)

// Second stage.
#define SS_R BIT(0)
#define SS_W BIT(1)
#define SS_A BIT(8)
#define SS_D BIT(9)
#define SS_READ_WRITE (SS_R | SS_W)

// Both, in a leaf above level 1.
#define PAGE_LARGE BIT(7)

// A leaf's level, counted from the bottom.
enum page_level { LEVEL_4K = 1, LEVEL_2M = 2, LEVEL_1G = 3 };

struct page_table {
    u64 *top;
    unsigned levels;
    u64 table_rights; // what entries that point to tables carry
    u64 moved;        // how far above its place a table is for entries that point to it
};

struct page_table first_stage_new(unsigned levels);
struct page_table second_stage_new(unsigned levels);

// Maps one leaf; returns the entry, so that a check can change it.
u64 *map_leaf(struct page_table *table, u64 iova, u64 gpa, enum page_level level, u64 rights);

// The entry of `level` on the way to `iova`; allocates missing tables above it.
u64 *table_entry(struct page_table *table, u64 iova, unsigned level);
