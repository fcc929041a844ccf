// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
// Common parts of checks of the remapping unit: a root table, an address space, and probes that
// tell where a DMA went or why it was refused.
#pragma once
#include "check.h"
#include "hw/context.h"
#include "hw/edu.h"
#include "hw/faults.h"
#include "hw/paging.h"
#include "hw/queue.h"
#include "hw/vtd.h"
#include "lib/interrupts.h"
#include "lib/memory.h"
#include "lib/wait.h"

// The device most checks use, and the other one, where there are two.
#define DEVICE (&edus[0])
#define SECOND (&edus[1])

// Domain IDs. 0 belongs to the unit in caching mode.
enum { DOMAIN_A = 2, DOMAIN_B = 3 };

// IOVAs the checks map. They are beyond memory if the devices' DMA can use such addresses, so that
// they are only valid through stage 1.
u64 iova_base(void);
#define IOVA (iova_base())
#define IOVA_OTHER (iova_base() + 0x1000000)
#define IOVA_MAILBOX (iova_base() + 0x2000000)

// Two 2 MiB regions after the pool of pages, aligned to their size, as targets of large pages.
// Never zeroed as a whole.
#define LARGE_SIZE 0x200000ull
#define LARGE_REGION_A 0x1000000ull
#define LARGE_REGION_B (LARGE_REGION_A + LARGE_SIZE)

// Guest-physical addresses without memory.
#define NO_MEMORY 0x4000000000ull

// The root table of the running check; its mode is that of the setup.
extern u64 *root;

// The entry of the bus of `DEVICE` in it: two words.
#define ROOT_ENTRY (&root[2 * (DEVICE->id >> 8)])

// `assigned=1` on the command line: the devices are assigned from the host, whose IOMMU blocks them
// without reporting faults; and the host handles their own writes to the interrupt range. With
// `assigned=2` only the second device is.
bool devices_assigned(void);

// Skips the check with `mirrored=1` on the command line: a mirror has what was invalidated, and its
// flags are set when it is made, not by requests.
void require_hardware_walk(void);

// Setups: a fresh, empty root table is set, translation is disabled, records and counters are
// clear.
void setup_scalable(void);        // 256-bit queue on
void setup_legacy_queue(void);    // 128-bit queue on
void setup_legacy_registers(void); // queue off
void teardown(void);

// A setup for the current unit only, in `mode`, with the queue disabled.
void setup_unit(u64 mode);

// Invalidates everything and enables translation. False if the check is over.
bool enable(void);

// A first-stage space of 4 levels with the mailbox mapped. Skips the check if the unit has no first
// stage; `enable` then returns false.
struct page_table space_new(void);
// The same for the second stage, with the widest tables of at most 4 levels the unit has.
struct page_table second_stage_space_new(void);

// Whether legacy mode translates: second-stage tables have a supported width.
bool legacy_second_stage(void);

// Attaches `edu` without PASID (its RID_PASID, 0) to `space`. Returns the PASID-table entry.
u64 *attach(const struct edu *edu, const struct page_table *space, u16 domain);
u64 *attach_pasid(const struct edu *edu, u32 pasid, const struct page_table *space, u16 domain);
// Legacy mode: returns the context entry.
u64 *attach_legacy(const struct edu *edu, const struct page_table *space, u16 domain);
u64 *context_of(const struct edu *edu);

// The address of the PASID directory in a scalable-mode context entry.
u64 *directory_of(const struct edu *edu);

// Two pages between which a mapping is changed.
struct target {
    volatile u64 *old, *new;
};
struct target target_new(void);

// A write by `edu` to `iova` reaches the old (new) page and not the other.
bool lands_on_old(const struct edu *edu, u32 pasid, u64 iova, struct target target);
bool lands_on_new(const struct edu *edu, u32 pasid, u64 iova, struct target target);
// The unit still uses the old page although the tables have the new one. Satisfied by either page
// with `stale-required=0` on the command line: the specification allows caching but does not
// require it.
bool lands_on_stale(const struct edu *edu, u32 pasid, u64 iova, struct target target);

// A write by `edu` to `iova` arrives in `page`.
bool write_arrives(const struct edu *edu, u32 pasid, u64 iova, volatile u64 *page);
// A read by `edu` from `iova` gets the contents of `page`; needs the mailbox mapped for it.
bool read_arrives(const struct edu *edu, u32 pasid, u64 iova, volatile u64 *page);
// The result of the last read in the device, refused or not; it is written out through the mailbox.
u64 device_holds(const struct edu *edu, u32 pasid, u64 mailbox_iova);
u64 mailbox_gpa(void);

// The access moves no byte of `page` (which it would reach if allowed; null if none), and one fault
// is recorded (unless the devices are assigned), with this reason, the device's ID, the PASID and
// the page's address.
bool write_faults(const struct edu *edu, u32 pasid, u64 iova, volatile u64 *page, unsigned reason);
bool read_faults(const struct edu *edu, u32 pasid, u64 iova, unsigned reason);
// The access moves no byte and nothing is recorded.
bool write_vanishes(const struct edu *edu, u32 pasid, u64 iova, volatile u64 *page);

// The device's accesses at IOVA are those that a read-only `page` allows, and at the next page those
// of a write-only one; the others leave a record with these reasons.
void rights_hold(volatile u64 *read_only, volatile u64 *write_only, unsigned no_write, unsigned no_read);

// First-stage entries on the way from IOVA to `page`: a read sets A in `leaf` and in `top`, only a
// write sets D, in `leaf`.
void first_stage_flags_follow(volatile u64 *page, volatile u64 *leaf, volatile u64 *top);

// To be called when entries have changed that were not present, or invalid: in caching mode it
// invalidates them. Otherwise a unit does not cache them (VT-d 6.1).
bool mend(void);

// Runs an invalidation; fails the check if the queue refuses it.
bool invalidate(struct descriptor descriptor);
