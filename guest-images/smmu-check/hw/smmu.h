// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
// The SMMUv3 that the device tree names (Arm IHI 0070): its registers, command queue and event
// queue, and a linear stream table for bus 0.
#pragma once
#include "hw/pci.h"

enum smmu_register {
    SMMU_IDR0 = 0x00,
    SMMU_IDR1 = 0x04,
    SMMU_IDR5 = 0x14,
    SMMU_CR0 = 0x20,
    SMMU_CR0ACK = 0x24,
    SMMU_CR1 = 0x28,
    SMMU_CR2 = 0x2c,
    SMMU_GBPA = 0x44,
    SMMU_GERROR = 0x60,
    SMMU_GERRORN = 0x64,
    SMMU_STRTAB_BASE = 0x80,
    SMMU_STRTAB_BASE_CFG = 0x88,
    SMMU_CMDQ_BASE = 0x90,
    SMMU_CMDQ_PROD = 0x98,
    SMMU_CMDQ_CONS = 0x9c,
    SMMU_EVENTQ_BASE = 0xa0,
    SMMU_PRIQ_BASE = 0xc0,
    SMMU_EVENTQ_PROD = 0x100a8,
    SMMU_EVENTQ_CONS = 0x100ac,
    SMMU_PRIQ_PROD = 0x100c8,
    SMMU_PRIQ_CONS = 0x100cc,

    CR0_SMMUEN = 1 << 0,
    CR0_PRIQEN = 1 << 1,
    CR0_EVENTQEN = 1 << 2,
    CR0_CMDQEN = 1 << 3,
    GBPA_ABORT = 1 << 20,
    GERROR_CMDQ_ERR = 1 << 0,
};

// Why a command queue stopped (CMDQ_CONS.ERR).
enum { CERROR_NONE = 0, CERROR_ILL = 1 };

// A stream-table entry and a context descriptor are 64 bytes each.
struct entry {
    volatile u64 words[8];
};

struct command {
    u64 words[2];
};

struct event {
    u64 words[4];
};

enum event_id { EVENT_BAD_STE = 0x04, EVENT_BAD_CD = 0x0a, EVENT_TRANSLATION = 0x10, EVENT_PERMISSION = 0x13 };

static inline unsigned event_id(const struct event *event)
{
    return (unsigned)bits(event->words[0], 7, 0);
}

static inline u32 event_stream(const struct event *event)
{
    return (u32)bits(event->words[0], 63, 32);
}

static inline bool event_is_read(const struct event *event)
{
    return event->words[1] & BIT(35);
}

// The transaction waits for CMD_RESUME with this tag.
static inline bool event_stalls(const struct event *event)
{
    return event->words[1] & BIT(31);
}

static inline unsigned event_tag(const struct event *event)
{
    return (unsigned)bits(event->words[1], 15, 0);
}

static inline u64 event_address(const struct event *event)
{
    return event->words[2];
}

// False if the device tree has none.
bool smmu_init(void);
u32 smmu_read(enum smmu_register offset);

// Disabled, with this GBPA, empty and enabled queues, and a stream table without entries. False if
// a register does not accept that.
bool smmu_start(bool abort);
// Enables or disables translation.
bool smmu_enable(bool on);

// The entry of a function's stream.
struct entry *smmu_stream(pci_id function);

// Runs commands, followed by a CMD_SYNC. False, with the reason in `smmu_error`, if the queue
// stopped.
bool smmu_run(const struct command *commands, unsigned count);
unsigned smmu_error(void);
// Acknowledges an error: the queue continues after the illegal command.
bool smmu_recover(void);

// The next event; false if there is none.
bool smmu_event(struct event *event);
// The event queue is full of events that say nothing.
void smmu_fill_events(void);

// Entries of the PRI queue.
#define PAGE_REQUESTS 256u

// Enables the PRI queue, empty, from entry `first` on; and disables it.
bool smmu_serve_pages(u32 first);
bool smmu_serve_no_pages(void);
// The next page request; false if there is none.
bool smmu_page_request(struct command *request);
// The PRI queue is full of requests that say nothing; and empty again, with its overflow
// acknowledged or not.
void smmu_fill_page_requests(void);
void smmu_drop_page_requests(bool acknowledge);

// Commands.
static inline struct command cfgi_ste(pci_id function)
{
    return (struct command){{0x03 | (u64)function << 32, 1}};
}

static inline struct command cfgi_cd(pci_id function)
{
    return (struct command){{0x05 | (u64)function << 32, 1}};
}

static inline struct command tlbi_all(void)
{
    return (struct command){{0x10, 0}};
}

static inline struct command tlbi_asid(u16 asid)
{
    return (struct command){{0x11 | (u64)asid << 48, 0}};
}

// Last level only.
static inline struct command tlbi_va(u16 asid, u64 address)
{
    return (struct command){{0x12 | (u64)asid << 48, address | 1}};
}
