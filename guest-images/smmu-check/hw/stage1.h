// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
// Stream-table entries, context descriptors and stage-1 tables of VMSAv8-64: 39 bits, pages of 4
// KiB.
#pragma once
#include "hw/smmu.h"

struct space {
    u64 *table;            // level 1
    struct entry *context; // its context descriptor
    u16 asid;
};

// In the second word of a stream's entry: it must not stall.
#define STE_S1STALLD BIT(27)

enum access { READ_ONLY, READ_WRITE };

struct space space_new(u16 asid);
// Transactions that fault in it stall.
void space_stall(const struct space *space);

// The last-level entry of a page. The caller must invalidate what it changes.
u64 *space_map(const struct space *space, u64 address, const volatile void *page, enum access access);
u64 page_entry(const volatile void *page, enum access access);

// Attaches a stream to a space, or sets bypass or abort; the caller must invalidate (CFGI_STE).
void stream_translate(pci_id function, const struct space *space);
void stream_bypass(pci_id function);
void stream_abort(pci_id function);
