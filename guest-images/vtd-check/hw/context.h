// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
// Root, context and PASID tables (VT-d 9.1 to 9.6), in legacy and in scalable mode.
#pragma once
#include "hw/pci.h"

// Every entry: present, and "do not record faults".
#define ENTRY_P BIT(0)
#define ENTRY_FPD BIT(1)

// Legacy context entry.
enum { TT_UNTRANSLATED = 0, TT_PASS_THROUGH = 2, TT_RESERVED = 3 };

// Scalable-mode context entry, first quadword.
#define CONTEXT_DTE BIT(2)
#define CONTEXT_PASIDE BIT(3)
#define CONTEXT_PRE BIT(4)
#define CONTEXT_PDTS(x) ((u64)(x) << 9)

// PASID-table entry.
enum { PGTT_FIRST_STAGE = 1, PGTT_SECOND_STAGE = 2, PGTT_NESTED = 3, PGTT_PASS_THROUGH = 4, PGTT_RESERVED = 5 };
#define PASID_ENTRY_QUADS 8
#define FSPM_5_LEVEL BIT(2)
#define SSADE BIT(9)

// A field value for `levels` of second-stage tables: 3, 4 or 5 levels are 1, 2 or 3.
static inline u64 address_width(unsigned levels)
{
    return levels - 2;
}

// Entry of `function` in the tables under `root`; allocates a missing context table.
u64 *legacy_context(u64 *root, pci_id function);   // two quadwords
u64 *scalable_context(u64 *root, pci_id function); // four quadwords

void legacy_context_set(u64 *entry, unsigned translation_type, u64 tables, unsigned levels, u16 domain);

// A present entry with an empty PASID directory, PASIDs enabled, RID_PASID 0. Returns the
// directory.
u64 *scalable_context_set(u64 *entry);

// Entry of `pasid` under `directory`; allocates a missing PASID table.
u64 *pasid_entry(u64 *directory, u32 pasid);

void pasid_entry_first_stage(u64 *entry, u64 tables, unsigned levels, u16 domain);
void pasid_entry_second_stage(u64 *entry, u64 tables, unsigned levels, u16 domain);
// First-stage tables of 4 levels at address `first` of the second stage.
void pasid_entry_nested(u64 *entry, u64 first, u64 second, unsigned second_levels, u16 domain);
void pasid_entry_pass_through(u64 *entry, u16 domain);
