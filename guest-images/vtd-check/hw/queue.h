// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
// The invalidation queue and its descriptors (VT-d 6.5.2).
#pragma once
#include "lib/types.h"

struct descriptor {
    u64 low, high;
};

// Granularities of each descriptor type's G field.
enum { CONTEXT_GLOBAL = 1, CONTEXT_DOMAIN = 2, CONTEXT_DEVICE = 3 };
enum { IOTLB_GLOBAL = 1, IOTLB_DOMAIN = 2, IOTLB_PAGE = 3 };
enum { PASID_IOTLB_PASID = 2, PASID_IOTLB_PAGE = 3 };
enum { INTERRUPT_ENTRY_GLOBAL = 0, INTERRUPT_ENTRY_INDEX = 1 };
enum { PASID_CACHE_DOMAIN = 0, PASID_CACHE_PASID = 1, PASID_CACHE_GLOBAL = 3 };

enum {
    TYPE_CONTEXT = 1,
    TYPE_IOTLB = 2,
    TYPE_DEVICE_TLB = 3,
    TYPE_INTERRUPT_ENTRY = 4,
    TYPE_WAIT = 5,
    TYPE_PASID_IOTLB = 6,
    TYPE_PASID_CACHE = 7,
    TYPE_PASID_DEVICE_TLB = 8,
    TYPE_PAGE_RESPONSE = 9,
};

#define WAIT_IF BIT(4)
#define WAIT_SW BIT(5)
#define WAIT_FENCE BIT(6)
#define WAIT_DRAIN BIT(7)
#define INVALIDATION_HINT BIT(6)

static inline struct descriptor inv_context(unsigned granularity, u16 domain, u16 source)
{
    return (struct descriptor){TYPE_CONTEXT | granularity << 4 | (u64)domain << 16 | (u64)source << 32, 0};
}

static inline struct descriptor inv_iotlb(unsigned granularity, u16 domain, u64 address_and_mask)
{
    u64 drain = BIT(6) | BIT(7);

    return (struct descriptor){TYPE_IOTLB | granularity << 4 | drain | (u64)domain << 16, address_and_mask};
}

static inline struct descriptor inv_pasid_iotlb(unsigned granularity, u16 domain, u32 pasid,
                                                u64 address_and_mask)
{
    return (struct descriptor){TYPE_PASID_IOTLB | granularity << 4 | (u64)domain << 16 | (u64)pasid << 32,
                               address_and_mask};
}

static inline struct descriptor inv_pasid_cache(unsigned granularity, u16 domain, u32 pasid)
{
    return (struct descriptor){TYPE_PASID_CACHE | granularity << 4 | (u64)domain << 16 | (u64)pasid << 32, 0};
}

// One page of a device's TLB.
static inline struct descriptor inv_device_tlb(u16 source, u64 address)
{
    return (struct descriptor){TYPE_DEVICE_TLB | (u64)source << 32, address};
}

static inline struct descriptor inv_pasid_device_tlb(u16 source, u32 pasid, u64 address)
{
    return (struct descriptor){TYPE_PASID_DEVICE_TLB | (u64)source << 16 | (u64)pasid << 32, address};
}

static inline struct descriptor inv_interrupt_entry(unsigned granularity, u16 index, unsigned mask)
{
    return (struct descriptor){TYPE_INTERRUPT_ENTRY | granularity << 4 | (u64)mask << 27 | (u64)index << 32, 0};
}

static inline struct descriptor inv_wait(u64 flags, u32 data, u64 address)
{
    return (struct descriptor){TYPE_WAIT | flags | (u64)data << 32, address};
}

// Starts an empty queue of one page, with descriptors of 256 bits (scalable mode) or 128.
bool queue_start(bool wide);

// The same in memory of the caller.
bool queue_start_at(u64 base, bool wide);

// Stops it; ignored if it is not running.
void queue_stop(void);

unsigned queue_descriptor_size(void);
u32 queue_bytes(void);

// Address of the next descriptor: as a byte offset, and in memory.
u32 queue_tail(void);
u64 *queue_slot(u32 offset);

// Appends without writing the tail.
void queue_put(struct descriptor descriptor);

// Writes the tail.
void queue_submit(void);

// Appends a wait with status write, submits, and waits for the status. False on a queue error or a
// timeout.
bool queue_flush(void);

// One invalidation, complete if this returns true.
bool queue_run(struct descriptor descriptor);

// Everything, in the order that the specification requires.
bool queue_invalidate_all(void);

// The pending queue error, 0 if there is none (IQERCD.IQEI while FSTS.IQE is set; 0xff if IQE is
// set without a reason).
unsigned queue_error(void);

// Replaces the descriptor at the head by a harmless wait, and clears the error: the unit continues.
void queue_recover(void);
