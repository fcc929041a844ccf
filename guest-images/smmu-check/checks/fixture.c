// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
#include "checks/fixture.h"

// Eight bytes per DMA: QEMU's device makes accesses of four bytes, with an event each.
enum { BYTES = 8, READ_OFFSET = 0x100 };

#define NOTHING 0x1111111111111111ull

// The value that the device writes in this check; the next one is for reads.
static u64 stamp;

// Where a DMA was last stopped. Each of its accesses has an event, and all but the first may come
// late, during the next check.
static u64 stopped = ~0ull;

// The next event that is not such a late one.
static bool next_event(struct event *event)
{
    while (smmu_event(event))
        if (event_address(event) == stopped || (event_address(event) & ~(BYTES - 1ull)) != stopped)
            return true;
    return false;
}

// While the unit is disabled all addresses are physical.
void setup(void)
{
    static volatile u64 mailbox __attribute__((aligned(PAGE_SIZE)));
    static void *mark;
    struct event event;

    if (!mark)
        mark = pages_mark();
    pages_release_to(mark);
    if (!smmu_start(false)) {
        check_fail("the unit does not start: error %u", smmu_error());
        return;
    }
    stamp += 0x0101010101010102ull;
    mailbox = stamp;
    if (!edu_read_from(DEVICE, NO_PASID, gpa_of(&mailbox), 0, BYTES))
        check_fail("a DMA does not end");
    // Late events of the previous check.
    while (smmu_event(&event))
        ;
}

void teardown(void)
{
    if (!smmu_enable(false))
        check_fail("the unit cannot be disabled");
}

bool invalidate(struct command command)
{
    if (smmu_run(&command, 1))
        return true;
    check_fail("command 0x%02x is refused: error %u", (u32)(command.words[0] & 0xff), smmu_error());
    return false;
}

volatile u64 *target_new(void)
{
    volatile u64 *page = page_new();

    *page = NOTHING;
    return page;
}

// Whether the DMA finished, successfully or not.
static bool write_by_dma(u64 address, u32 offset)
{
    if (edu_write_to(DEVICE, NO_PASID, address, offset, BYTES))
        return true;
    check_fail("a DMA does not end");
    return false;
}

bool write_arrives(u64 address, volatile u64 *page)
{
    struct event event;
    u64 found;

    *page = NOTHING;
    if (!write_by_dma(address, 0))
        return false;
    found = *page;
    if (found == stamp)
        return true;
    if (next_event(&event))
        check_fail("a write to 0x%lx: event 0x%02x for 0x%lx", address, event_id(&event), event_address(&event));
    else
        check_fail("a write to 0x%lx: 0x%lx is in the page", address, found);
    return false;
}

bool read_arrives(u64 address, volatile u64 *page, u64 other, volatile u64 *other_page)
{
    *page = ~stamp;
    *other_page = NOTHING;
    if (!edu_read_from(DEVICE, NO_PASID, address, READ_OFFSET, BYTES)) {
        check_fail("a DMA does not end");
        return false;
    }
    if (!write_by_dma(other, READ_OFFSET))
        return false;
    if (*other_page == ~stamp)
        return true;
    check_fail("a read from 0x%lx brings 0x%lx", address, *other_page);
    return false;
}

static bool is_untouched(volatile u64 *page, u64 before)
{
    if (*page == before)
        return true;
    check_fail("0x%lx is in the page", *page);
    return false;
}

bool write_vanishes(u64 address, volatile u64 *page)
{
    struct event event;
    u64 before = *page;

    if (!write_by_dma(address, 0) || !is_untouched(page, before))
        return false;
    if (!next_event(&event))
        return true;
    check_fail("event 0x%02x for 0x%lx", event_id(&event), event_address(&event));
    return false;
}

// Events are asynchronous.
bool is_recorded(u64 address, enum event_id id, bool read)
{
    struct event event;

    if (!WAIT_UNTIL(next_event(&event))) {
        check_fail("no event");
        return false;
    }
    if (event_id(&event) == id && event_stream(&event) == DEVICE->id && event_address(&event) == address &&
        event_is_read(&event) == read) {
        stopped = address;
        return true;
    }
    check_fail("event 0x%02x, stream 0x%x, address 0x%lx, read %u; not 0x%02x, 0x%x, 0x%lx, %u", event_id(&event),
               event_stream(&event), event_address(&event), event_is_read(&event), id, DEVICE->id, address, read);
    return false;
}

bool write_faults(u64 address, volatile u64 *page, enum event_id id)
{
    u64 before = *page;

    return write_by_dma(address, 0) && is_untouched(page, before) && is_recorded(address, id, false);
}

bool read_faults(u64 address, enum event_id id)
{
    if (!edu_read_from(DEVICE, NO_PASID, address, READ_OFFSET, BYTES)) {
        check_fail("a DMA does not end");
        return false;
    }
    return is_recorded(address, id, true);
}
