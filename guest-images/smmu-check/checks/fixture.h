// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
// What checks share: a fresh unit for each, and probes that say where a DMA went or why it was refused.
#pragma once
#include "check.h"
#include "hw/edu.h"
#include "hw/stage1.h"
#include "lib/memory.h"
#include "lib/wait.h"

#define DEVICE (&edus[0])

// Addresses that checks map. No memory is there, so only stage 1 can make them mean something.
#define IOVA 0x2000000000ull
#define IOVA_OTHER (IOVA + 0x1000)

// A unit that is disabled and lets DMA pass, with empty tables and queues; and back to that.
void setup(void);
void teardown(void);

// Runs commands, or says why not.
bool invalidate(struct command command);

// A page that a DMA may change, with something in it.
volatile u64 *target_new(void);

// A write by the device to `address` arrives in the page. A read brings what is in it, which the device
// writes to another address, where the other page is.
bool write_arrives(u64 address, volatile u64 *page);
bool read_arrives(u64 address, volatile u64 *page, u64 other, volatile u64 *other_page);

// A write changes nothing of the page, and there is no event.
bool write_vanishes(u64 address, volatile u64 *page);

// There is an event of this kind with the device's stream and this address.
bool is_recorded(u64 address, enum event_id id, bool read);

// A write, or a read, changes nothing, and there is an event of this kind with the device's stream and this
// address.
bool write_faults(u64 address, volatile u64 *page, enum event_id id);
bool read_faults(u64 address, enum event_id id);
