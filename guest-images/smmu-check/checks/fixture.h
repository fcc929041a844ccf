// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
// Common parts of checks: a fresh unit for each, and probes that tell where a DMA went or why it
// was refused.
#pragma once
#include "check.h"
#include "hw/edu.h"
#include "hw/stage1.h"
#include "lib/memory.h"
#include "lib/wait.h"

#define DEVICE (&edus[0])

// Addresses that checks map. No memory is there, so they are only valid through stage 1.
#define IOVA 0x2000000000ull
#define IOVA_OTHER (IOVA + 0x1000)

// A unit that is disabled and lets DMA bypass it, with empty tables and queues; and the return to
// that state.
void setup(void);
void teardown(void);

// Runs commands; fails the check otherwise.
bool invalidate(struct command command);

// A page for DMA, with known contents.
volatile u64 *target_new(void);

// A write by the device to `address` arrives in the page. A read gets the contents of the page,
// which the device writes to another address, that of the other page.
bool write_arrives(u64 address, volatile u64 *page);
bool read_arrives(u64 address, volatile u64 *page, u64 other, volatile u64 *other_page);

// A write does not change the page, and there is no event.
bool write_vanishes(u64 address, volatile u64 *page);

// There is an event of this kind with the device's stream and this address.
bool is_recorded(u64 address, enum event_id id, bool read);

// A write, or a read, has no effect, and there is an event of this kind with the device's stream
// and this address.
bool write_faults(u64 address, volatile u64 *page, enum event_id id);
bool read_faults(u64 address, enum event_id id);
