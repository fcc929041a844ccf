// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
// Page requests (VT-d 7.4 to 7.7, 7.10, 11.4.11): the device asks for a page that is not there, and
// the guest brings it, or not, and responds.
#include "fixture.h"

enum {
    PASID = 5,
    RING = PAGE_SIZE,
    ENTRY = 32,
    LAST = RING - ENTRY,
    // The PRI capability (PCIe 6.0 10.5.2).
    PRI_CONTROL = 4,
    PRI_CAPACITY = 8,
    PRI_ALLOCATION = 12,
};
#define PRI_ENABLE BIT(0)
#define PRI_RESET BIT(1)

// A page request descriptor (7.4.1.1).
#define REQUEST_TYPE 1u
#define REQUEST_PASID BIT(8)
#define REQUEST_READ BIT(0)
#define REQUEST_WRITE BIT(1)
#define REQUEST_LAST BIT(2)
enum { SUCCESS = 0, INVALID = 1, FAILURE = 15 };

static u64 ring;
static struct page_table space;

static void pri_switch(bool on)
{
    u16 pri = pci_extended_capability(DEVICE->place, PCI_EXT_CAP_PRI);

    if (on) {
        edu_ats_enable(DEVICE, true);
        pci_write(DEVICE->place, pri + PRI_ALLOCATION, pci_read(DEVICE->place, pri + PRI_CAPACITY));
        pci_write(DEVICE->place, pri + PRI_CONTROL, PRI_ENABLE);
    } else {
        pci_write(DEVICE->place, pri + PRI_CONTROL, 0);
        pci_write(DEVICE->place, pri + PRI_CONTROL, PRI_RESET);
        edu_ats_enable(DEVICE, false);
    }
}

// An empty queue; translation is enabled, and the device's PASID has tables that map nothing at
// IOVA.
static void setup(void)
{
    setup_scalable();
    ring = gpa_of(page_new());
    vtd_write64(VTD_PQH, 0);
    vtd_write64(VTD_PQT, 0);
    vtd_write64(VTD_PQA, ring);
    vtd_write32(VTD_PRS, PRS_PPR | PRS_PRO);
    space = space_new();
    attach_pasid(DEVICE, PASID, &space, DOMAIN_A);
    context_of(DEVICE)[0] |= CONTEXT_DTE | CONTEXT_PRE;
    pri_switch(true);
    (void)enable();
}

static void stop(void)
{
    vtd_write32(VTD_PECTL, ECTL_IM);
    pri_switch(false);
    vtd_write64(VTD_PQA, 0);
    teardown();
}

// Starts a write of one word to IOVA and does not wait for it.
static void start_write(void)
{
    write32(DEVICE->registers + EDU_DMA_PASID, PASID | BIT(31));
    write64(DEVICE->registers + EDU_DMA_SOURCE, EDU_BUFFER);
    write64(DEVICE->registers + EDU_DMA_DESTINATION, IOVA);
    write64(DEVICE->registers + EDU_DMA_COUNT, 8);
    write64(DEVICE->registers + EDU_DMA_COMMAND, EDU_DMA_START | EDU_DMA_TO_MEMORY);
}

static bool is_done(void)
{
    return !(read64(DEVICE->registers + EDU_DMA_COMMAND) & EDU_DMA_START);
}

// The group in the descriptor at `offset`.
static u16 group_at(u32 offset)
{
    return (u16)bits(read64(ring + offset + 8), 11, 3);
}

// Waits for a request, which is the one at `offset`.
static bool asked_at(u32 offset)
{
    u64 low, high;

    if (!WAIT_UNTIL(vtd_read64(VTD_PQT) == (offset + ENTRY) % RING)) {
        check_fail("no request: PQT 0x%lx, PRS 0x%x", vtd_read64(VTD_PQT), vtd_read32(VTD_PRS));
        return false;
    }
    low = read64(ring + offset);
    high = read64(ring + offset + 8) & ~(0x1ffull << 3);
    if (low != (REQUEST_TYPE | REQUEST_PASID | (u64)DEVICE->id << 16 | (u64)PASID << 32) ||
        high != (IOVA | REQUEST_WRITE | REQUEST_LAST))
        check_fail("the request is 0x%lx 0x%lx", low, high);
    return !check_is_over();
}

static bool respond(u16 source, u32 pasid, u16 group, unsigned code)
{
    return invalidate((struct descriptor){TYPE_PAGE_RESPONSE | BIT(4) | (u64)code << 12 | (u64)source << 16 |
                                              (u64)pasid << 32,
                                          (u64)group << 3});
}

static bool bring(volatile u64 *page)
{
    map_leaf(&space, IOVA, gpa_of(page), LEVEL_4K, FS_READ_WRITE);
    return mend();
}

// Serves the request at `offset`, whose write then reaches its page.
static void served_at(u32 offset)
{
    volatile u64 *page = page_new();

    REQUIRE(asked_at(offset));
    EXPECT(!is_done(), "the DMA is over before the response");
    REQUIRE(bring(page));
    REQUIRE(respond(DEVICE->id, PASID, group_at(offset), SUCCESS));
    EXPECT(WAIT_UNTIL(is_done()), "the DMA does not end");
    EXPECT(page[0], "the write did not reach the page that was brought");
    EXPECT(!fault_pending(), "%u faults", fault_pending());
}

static void served(void)
{
    start_write();
    served_at(0);
}

static void refused_with(unsigned code)
{
    start_write();
    REQUIRE(asked_at(0));
    REQUIRE(respond(DEVICE->id, PASID, group_at(0), code));
    EXPECT(WAIT_UNTIL(is_done()), "the DMA does not end");
    EXPECT(!fault_pending(), "%u faults", fault_pending());
    EXPECT(vtd_read64(VTD_PQT) == ENTRY, "it asked again");
}

static void invalid(void) { refused_with(INVALID); }
static void failure(void) { refused_with(FAILURE); }

static void over_the_end(void)
{
    vtd_write64(VTD_PQH, LAST);
    vtd_write64(VTD_PQT, LAST);
    start_write();
    served_at(LAST);
}

static void event(void)
{
    vtd_write32(VTD_PEDATA, VECTOR_FAULT_EVENT);
    vtd_write32(VTD_PEADDR, msi_address());
    vtd_write32(VTD_PECTL, 0);
    interrupt_count_clear(VECTOR_FAULT_EVENT);
    start_write();
    EXPECT(WAIT_UNTIL(interrupt_count(VECTOR_FAULT_EVENT)), "the event does not arrive");
    EXPECT(vtd_read32(VTD_PRS) == PRS_PPR, "PRS 0x%x", vtd_read32(VTD_PRS));
    vtd_write32(VTD_PRS, PRS_PPR);
    EXPECT(vtd_read32(VTD_PRS) == 0, "PRS 0x%x after clearing", vtd_read32(VTD_PRS));
    served_at(0);
    EXPECT(interrupt_count(VECTOR_FAULT_EVENT) == 1, "%u arrivals", interrupt_count(VECTOR_FAULT_EVENT));
}

static void masked_event(void)
{
    vtd_write32(VTD_PEDATA, VECTOR_FAULT_EVENT);
    vtd_write32(VTD_PEADDR, msi_address());
    interrupt_count_clear(VECTOR_FAULT_EVENT);
    start_write();
    REQUIRE(asked_at(0));
    EXPECT(WAIT_UNTIL(vtd_read32(VTD_PECTL) == (ECTL_IM | ECTL_IP)), "PECTL 0x%x", vtd_read32(VTD_PECTL));
    EXPECT(!interrupt_count(VECTOR_FAULT_EVENT), "it arrives masked");
    vtd_write32(VTD_PECTL, 0);
    EXPECT(WAIT_UNTIL(interrupt_count(VECTOR_FAULT_EVENT)), "the event does not arrive");
    served_at(0);
}

// One slot stays free. The device is answered, and tries until it gives up.
static void overflow(void)
{
    vtd_write64(VTD_PQH, ENTRY);
    start_write();
    EXPECT(WAIT_UNTIL(vtd_read32(VTD_PRS) & PRS_PRO), "PRO is not set");
    EXPECT(WAIT_UNTIL(is_done()), "the DMA does not end: it was not answered");
    EXPECT(vtd_read64(VTD_PQT) == 0, "PQT 0x%lx", vtd_read64(VTD_PQT));
    // Space alone is not enough: while PRO is set, requests are dropped.
    vtd_write64(VTD_PQH, 0);
    start_write();
    EXPECT(WAIT_UNTIL(is_done()), "the DMA does not end: it was not answered");
    EXPECT(vtd_read64(VTD_PQT) == 0, "PQT 0x%lx while PRO is set", vtd_read64(VTD_PQT));
    vtd_write32(VTD_PRS, PRS_PRO);
    start_write();
    served_at(0);
}

static void response_for_nobody(void)
{
    u16 group;

    start_write();
    REQUIRE(asked_at(0));
    group = group_at(0);
    REQUIRE(respond(DEVICE->id, PASID, group ^ 1, INVALID));
    REQUIRE(respond(DEVICE->id, PASID + 1, group, INVALID));
    REQUIRE(respond(DEVICE->id ^ 0x100, PASID, group, INVALID));
    served_at(0);
    REQUIRE(respond(DEVICE->id, PASID, group, INVALID));
}

static void not_enabled(void)
{
    struct fault fault;

    context_of(DEVICE)[0] &= ~CONTEXT_PRE;
    REQUIRE(invalidate(inv_context(CONTEXT_DEVICE, 0, DEVICE->id)));
    start_write();
    EXPECT(WAIT_UNTIL(is_done()), "the DMA does not end: it was not answered");
    EXPECT(vtd_read64(VTD_PQT) == 0, "the request is in the queue");
    EXPECT(fault_take(&fault), "no fault is recorded");
    EXPECT(fault.reason == PAGE_REQUEST_NOT_ENABLED && fault.source == DEVICE->id && fault.pasid == PASID,
           "fault 0x%02x of %04x, PASID 0x%x", fault.reason, fault.source, fault.pasid);
}

static void no_queue(void)
{
    vtd_write64(VTD_PQA, 0);
    start_write();
    EXPECT(WAIT_UNTIL(is_done()), "the DMA does not end: it was not answered");
    EXPECT(vtd_read32(VTD_PRS) == 0, "PRS 0x%x", vtd_read32(VTD_PRS));
}

// A table that is read-only, and cached as that, is another one when the guest responds: a request
// forgets the way to its page, in all caches, and nothing else has to be invalidated.
static void forgets_the_way(void)
{
    volatile u64 *page = page_new();
    u64 *table;

    map_leaf(&space, IOVA, gpa_of(page), LEVEL_4K, FS_READ_WRITE);
    table = table_entry(&space, IOVA, LEVEL_2M);
    *table &= ~FS_RW;
    REQUIRE(mend());
    REQUIRE(read_arrives(DEVICE, PASID, IOVA, page));
    page[0] = 0;
    start_write();
    REQUIRE(asked_at(0));
    *table |= FS_RW;
    REQUIRE(respond(DEVICE->id, PASID, group_at(0), SUCCESS));
    EXPECT(WAIT_UNTIL(is_done()), "the DMA does not end");
    EXPECT(page[0], "the write did not reach its page");
    EXPECT(vtd_read64(VTD_PQT) == ENTRY, "it asked again");
    EXPECT(!fault_pending(), "%u faults", fault_pending());
}

// Steps of 7.10, after those of 7.11 that revoke a PASID. A drain that does not wait would not be
// seen here, as the request is in the queue before.
static void revoked(void)
{
    u64 *entry = pasid_entry(directory_of(DEVICE), PASID);

    start_write();
    REQUIRE(asked_at(0));
    entry[0] &= ~ENTRY_P;
    REQUIRE(invalidate(inv_pasid_cache(PASID_CACHE_PASID, DOMAIN_A, PASID)));
    REQUIRE(invalidate(inv_pasid_iotlb(PASID_IOTLB_PASID, DOMAIN_A, PASID, 0)));
    REQUIRE(invalidate(inv_wait(WAIT_FENCE | WAIT_DRAIN, 0, 0)));
    EXPECT(WAIT_UNTIL(is_done()), "the DMA does not end");
    REQUIRE(respond(DEVICE->id, PASID, group_at(0), SUCCESS));
    EXPECT(vtd_read64(VTD_PQT) == ENTRY, "a request came after the drain");
    EXPECT(vtd_read32(VTD_PRS) == PRS_PPR, "PRS 0x%x", vtd_read32(VTD_PRS));
}

static const struct check list[] = {
    {"a page that is not there is asked for and brought (7.4.1.1, 7.6.1)", served},
    {"response: invalid request (7.6.1)", invalid},
    {"response: failure (7.6.1)", failure},
    {"the queue goes on at its start (11.4.11)", over_the_end},
    {"a request raises the event once (7.5)", event},
    {"a masked event is pending until it is unmasked (7.5)", masked_event},
    {"a full queue: PRO, and the device is answered (7.4.1, 7.10)", overflow},
    {"responses for nobody have no effect (7.6.1)", response_for_nobody},
    {"PRE is clear: refused, fault 47h (7.1.3)", not_enabled},
    {"a request while there is no queue is refused (7.4.1)", no_queue},
    {"a request forgets the way to its page (6.5.3.1)", forgets_the_way},
    {"a revoked PASID is answered; a wait with PD ends (7.10, 7.11)", revoked},
};
CHECK_GROUP(page_requests, list, setup, stop);
