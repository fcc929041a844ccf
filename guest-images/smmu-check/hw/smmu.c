// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
#include "hw/smmu.h"
#include "lib/devicetree.h"
#include "lib/memory.h"
#include "lib/wait.h"

enum {
    STREAMS = 4096, // those of 16 buses
    STREAMS_LOG2 = 12,
    QUEUE_LOG2 = 8,
    QUEUE_ENTRIES = 1 << QUEUE_LOG2,
    // Tables and queues: inner shareable, write-back.
    CR1_CACHED = 3 << 10 | 1 << 8 | 1 << 6 | 3 << 4 | 1 << 2 | 1 << 0,
    ALLOCATE_HINT = 62, // of the base registers
    CMD_SYNC = 0x46,
    // An index with its wrap bit.
    POINTER_MASK = 2 * QUEUE_ENTRIES - 1,
};

#define GBPA_UPDATE BIT(31)

static u64 base;
static struct entry *streams;
static struct command *commands;
static struct event *events;
static u32 command_tail, event_head;
static struct command *page_requests;
static u32 page_head;
// CR0.PRIQEN, while it is in use.
static u32 pages_enabled;

bool smmu_init(void)
{
    base = address_of("arm,smmu-v3");
    return base != 0;
}

u32 smmu_read(enum smmu_register offset)
{
    return read32(base + offset);
}

static bool set_cr0(u32 value)
{
    write32(base + SMMU_CR0, value);
    return WAIT_UNTIL(read32(base + SMMU_CR0ACK) == value);
}

static bool set_gbpa(bool abort)
{
    u32 value = read32(base + SMMU_GBPA) & ~(u32)GBPA_ABORT;

    write32(base + SMMU_GBPA, value | (abort ? GBPA_ABORT : 0) | (u32)GBPA_UPDATE);
    return WAIT_UNTIL(!(read32(base + SMMU_GBPA) & GBPA_UPDATE));
}

bool smmu_start(bool abort)
{
    streams = pages_new(STREAMS * sizeof(*streams) / PAGE_SIZE);
    commands = pages_new(QUEUE_ENTRIES * sizeof(*commands) / PAGE_SIZE);
    events = pages_new(QUEUE_ENTRIES * sizeof(*events) / PAGE_SIZE);
    command_tail = event_head = 0;
    pages_enabled = 0;
    if (!set_cr0(0) || !set_gbpa(abort))
        return false;
    write32(base + SMMU_GERRORN, read32(base + SMMU_GERROR));
    write32(base + SMMU_CR1, CR1_CACHED);
    write32(base + SMMU_CR2, 0);
    write64(base + SMMU_STRTAB_BASE, gpa_of(streams) | BIT(ALLOCATE_HINT));
    write32(base + SMMU_STRTAB_BASE_CFG, STREAMS_LOG2);
    write64(base + SMMU_CMDQ_BASE, gpa_of(commands) | QUEUE_LOG2 | BIT(ALLOCATE_HINT));
    write32(base + SMMU_CMDQ_PROD, 0);
    write32(base + SMMU_CMDQ_CONS, 0);
    write64(base + SMMU_EVENTQ_BASE, gpa_of(events) | QUEUE_LOG2 | BIT(ALLOCATE_HINT));
    write32(base + SMMU_EVENTQ_PROD, 0);
    write32(base + SMMU_EVENTQ_CONS, 0);
    if (!set_cr0(CR0_CMDQEN) || !set_cr0(CR0_CMDQEN | CR0_EVENTQEN))
        return false;
    // Invalidates everything: CFGI_STE_RANGE of all, TLBI_NSNH_ALL.
    return smmu_run((struct command[]){{{0x04, 31}}, {{0x30, 0}}}, 2);
}

bool smmu_enable(bool on)
{
    return set_cr0(CR0_CMDQEN | CR0_EVENTQEN | pages_enabled | (on ? CR0_SMMUEN : 0));
}

struct entry *smmu_stream(pci_id function)
{
    return &streams[function % STREAMS];
}

static void add(const struct command *command)
{
    commands[command_tail % QUEUE_ENTRIES] = *command;
    command_tail = (command_tail + 1) & POINTER_MASK;
}

static u32 consumed(void)
{
    return read32(base + SMMU_CMDQ_CONS) & POINTER_MASK;
}

static bool has_error(void)
{
    return (read32(base + SMMU_GERROR) ^ read32(base + SMMU_GERRORN)) & GERROR_CMDQ_ERR;
}

bool smmu_run(const struct command *list, unsigned count)
{
    static const struct command sync = {{CMD_SYNC, 0}};

    for (unsigned n = 0; n < count; n++)
        add(&list[n]);
    add(&sync);
    write32(base + SMMU_CMDQ_PROD, command_tail);
    return WAIT_UNTIL(consumed() == command_tail || has_error()) && !has_error();
}

unsigned smmu_error(void)
{
    return (unsigned)bits(read32(base + SMMU_CMDQ_CONS), 30, 24);
}

bool smmu_recover(void)
{
    static const struct command sync = {{CMD_SYNC, 0}};

    // Replaces the illegal command, as Linux does.
    commands[consumed() % QUEUE_ENTRIES] = sync;
    write32(base + SMMU_GERRORN, read32(base + SMMU_GERROR));
    return WAIT_UNTIL(consumed() == command_tail);
}

// EVENTQ_PROD is software's while the queue is disabled.
void smmu_fill_events(void)
{
    u32 cr0 = read32(base + SMMU_CR0);

    (void)set_cr0(cr0 & ~(u32)CR0_EVENTQEN);
    write32(base + SMMU_EVENTQ_PROD, (event_head + QUEUE_ENTRIES) & POINTER_MASK);
    (void)set_cr0(cr0);
}

bool smmu_serve_pages(u32 first)
{
    page_requests = pages_new(PAGE_REQUESTS * sizeof(*page_requests) / PAGE_SIZE);
    write64(base + SMMU_PRIQ_BASE, gpa_of(page_requests) | QUEUE_LOG2 | BIT(ALLOCATE_HINT));
    page_head = first;
    write32(base + SMMU_PRIQ_PROD, first);
    write32(base + SMMU_PRIQ_CONS, first);
    pages_enabled = CR0_PRIQEN;
    return set_cr0(read32(base + SMMU_CR0) | CR0_PRIQEN);
}

bool smmu_serve_no_pages(void)
{
    pages_enabled = 0;
    return set_cr0(read32(base + SMMU_CR0) & ~(u32)CR0_PRIQEN);
}

bool smmu_page_request(struct command *request)
{
    u32 overflow = read32(base + SMMU_PRIQ_CONS) & ~(u32)POINTER_MASK;

    if ((read32(base + SMMU_PRIQ_PROD) & POINTER_MASK) == page_head)
        return false;
    *request = page_requests[page_head % PAGE_REQUESTS];
    page_head = (page_head + 1) & POINTER_MASK;
    write32(base + SMMU_PRIQ_CONS, page_head | overflow);
    return true;
}

void smmu_fill_page_requests(void)
{
    (void)smmu_serve_no_pages();
    write32(base + SMMU_PRIQ_PROD, (page_head + PAGE_REQUESTS) & POINTER_MASK);
    pages_enabled = CR0_PRIQEN;
    (void)set_cr0(read32(base + SMMU_CR0) | CR0_PRIQEN);
}

void smmu_drop_page_requests(bool acknowledge)
{
    u32 prod = read32(base + SMMU_PRIQ_PROD), cons = read32(base + SMMU_PRIQ_CONS);

    page_head = prod & POINTER_MASK;
    write32(base + SMMU_PRIQ_CONS, page_head | ((acknowledge ? prod : cons) & (u32)BIT(31)));
}

bool smmu_event(struct event *event)
{
    if ((read32(base + SMMU_EVENTQ_PROD) & POINTER_MASK) == event_head)
        return false;
    *event = events[event_head % QUEUE_ENTRIES];
    event_head = (event_head + 1) & POINTER_MASK;
    write32(base + SMMU_EVENTQ_CONS, event_head);
    return true;
}
