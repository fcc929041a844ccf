// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
// The guest's first stage over the guest's own second stage, PGTT 011b (VT-d 3.8), where ECAP.NEST
// offers that.
//
// The second stage shows memory MOVED above its place, where no memory is: what takes an address of
// first-stage tables for one of memory finds nothing.
#pragma once
#include "fixture.h"

#define MOVED 0x200000000ull

// Two PASIDs, of DEVICE.
enum { PASID_1 = 1, PASID_2 = 2 };

struct nested {
    struct page_table first, second;
};

// A second stage, and a first stage over it with the mailbox mapped; or over one that is there.
struct nested nested_new(void);
struct nested nested_over(struct page_table second);

// Attaches DEVICE with `pasid`, 0 for none, in DOMAIN_A. Returns the PASID-table entry.
u64 *attach_nested(u32 pasid, const struct nested *nested);

// Where the second stage shows a page.
static inline u64 shown_at(const volatile void *page)
{
    return gpa_of(page) + MOVED;
}

// Shows a page; returns the entry of the second stage.
u64 *nested_show(struct nested *nested, const volatile void *page, u64 rights);

// Maps `iova` to `page` by a leaf of the first stage, which is returned, and shows the page and the
// first-stage tables on the way.
u64 *nested_map(struct nested *nested, u64 iova, const volatile void *page, u64 rights);

// The first-stage table of `level` on the way to `iova`.
u64 *first_table(struct nested *nested, u64 iova, unsigned level);

// Skips the check if the device cannot use both PASIDs.
bool device_has_both_pasids(void);
