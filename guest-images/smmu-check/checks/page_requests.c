// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
// Page requests (IHI 0070 4.5.2, 8): the device asks for a page that is not there, and the guest
// brings it, or not, and responds.
#include "checks/fixture.h"

enum {
    ASID = 5,
    BYTES = 8,
    // The PRI capability (PCIe 6.0 10.5.2).
    PRI_CONTROL = 4,
    PRI_CAPACITY = 8,
    PRI_ALLOCATION = 12,
    // What CMD_PRI_RESP says.
    FAILURE = 0,
    INVALID = 1,
    SUCCESS = 2,
};
#define PRI_ENABLE BIT(0)
#define PRI_RESET BIT(1)
#define STE_EATS BIT(28)

// An entry of the queue.
#define REQUEST_WRITE BIT(61)
#define REQUEST_LAST BIT(62)

static struct space space;

static struct command response(pci_id function, u16 group, unsigned code)
{
    return (struct command){{0x41 | (u64)function << 32, (u64)code << 12 | group}};
}

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

// A space with nothing at IOVA, an empty queue, and a device that asks.
static void start(void)
{
    setup();
    space = space_new(ASID);
    stream_translate(DEVICE->id, &space);
    smmu_stream(DEVICE->id)->words[1] |= STE_EATS;
    if (!invalidate(cfgi_ste(DEVICE->id)))
        return;
    if (!smmu_serve_pages(0) || !smmu_enable(true))
        check_fail("CR0 is not taken");
    pri_switch(true);
}

static void stop(void)
{
    pri_switch(false);
    if (!smmu_serve_no_pages())
        check_fail("CR0.PRIQEN is not taken");
    teardown();
    if (!WAIT_UNTIL(edu_is_done(DEVICE)))
        check_fail("a DMA does not end when translation is disabled");
}

static void start_write(void)
{
    edu_start(DEVICE, EDU_BUFFER, IOVA, BYTES, EDU_DMA_TO_MEMORY);
}

// Waits for the request of the write.
static bool asked(struct command *request)
{
    if (!WAIT_UNTIL(smmu_page_request(request))) {
        check_fail("no request: PROD 0x%x", smmu_read(SMMU_PRIQ_PROD));
        return false;
    }
    if (request->words[0] == (DEVICE->id | REQUEST_WRITE | REQUEST_LAST) && (request->words[1] & ~0x1ffull) == IOVA)
        return true;
    check_fail("the request is 0x%lx 0x%lx", request->words[0], request->words[1]);
    return false;
}

static u16 group_of(const struct command *request)
{
    return (u16)(request->words[1] & 0x1ff);
}

static bool ends(void)
{
    struct event event;

    if (!WAIT_UNTIL(edu_is_done(DEVICE))) {
        check_fail("the DMA does not end: it was not answered");
        return false;
    }
    // A translation request that fails is no event (3.9.1).
    if (smmu_event(&event)) {
        check_fail("event 0x%02x", event_id(&event));
        return false;
    }
    return true;
}

static void serve(const struct command *request)
{
    volatile u64 *page = target_new();
    u64 before = *page;

    EXPECT(!edu_is_done(DEVICE), "the DMA is over before the response");
    space_map(&space, IOVA, page, READ_WRITE);
    REQUIRE(invalidate(response(DEVICE->id, group_of(request), SUCCESS)));
    REQUIRE(ends());
    EXPECT(*page != before, "the write did not reach the page that was brought");
}

static void served(void)
{
    struct command request;

    start_write();
    REQUIRE(asked(&request));
    serve(&request);
}

static void refused_with(unsigned code)
{
    struct command request;

    start_write();
    REQUIRE(asked(&request));
    REQUIRE(invalidate(response(DEVICE->id, group_of(&request), code)));
    REQUIRE(ends());
    EXPECT(!smmu_page_request(&request), "it asked again");
}

static void invalid(void) { refused_with(INVALID); }
static void failure(void) { refused_with(FAILURE); }

static void reserved(void)
{
    struct command request, illegal;

    start_write();
    REQUIRE(asked(&request));
    illegal = response(DEVICE->id, group_of(&request), 3);
    EXPECT(!smmu_run(&illegal, 1), "the command is taken");
    EXPECT(smmu_error() == CERROR_ILL, "error %u, not CERROR_ILL", smmu_error());
    EXPECT(smmu_recover(), "the queue does not go on");
    serve(&request);
}

static void over_the_end(void)
{
    struct command request;

    EXPECT(smmu_serve_no_pages() && smmu_serve_pages(PAGE_REQUESTS - 1), "CR0.PRIQEN is not taken");
    for (unsigned n = 0; n < 2; n++) {
        start_write();
        REQUIRE(asked(&request));
        REQUIRE(invalidate(response(DEVICE->id, group_of(&request), INVALID)));
        REQUIRE(ends());
    }
}

static void response_for_nobody(void)
{
    struct command request;
    u16 group;

    start_write();
    REQUIRE(asked(&request));
    group = group_of(&request);
    REQUIRE(invalidate(response(DEVICE->id, group ^ 1, INVALID)));
    REQUIRE(invalidate(response(DEVICE->id ^ 0x100, group, INVALID)));
    serve(&request);
    REQUIRE(invalidate(response(DEVICE->id, group, INVALID)));
}

// The device is answered, and tries until it gives up. Space alone is not enough afterwards.
static void overflow(void)
{
    struct command request;

    smmu_fill_page_requests();
    start_write();
    REQUIRE(ends());
    EXPECT(smmu_read(SMMU_PRIQ_PROD) & BIT(31), "no overflow: PROD 0x%x", smmu_read(SMMU_PRIQ_PROD));
    smmu_drop_page_requests(false);
    start_write();
    REQUIRE(ends());
    EXPECT(!smmu_page_request(&request), "a request before the overflow is acknowledged");
    smmu_drop_page_requests(true);
    start_write();
    REQUIRE(asked(&request));
    serve(&request);
}

static void no_queue(void)
{
    EXPECT(smmu_serve_no_pages(), "CR0.PRIQEN is not taken");
    start_write();
    REQUIRE(ends());
}

static void revoked(void)
{
    struct command request;

    start_write();
    REQUIRE(asked(&request));
    stream_abort(DEVICE->id);
    REQUIRE(invalidate(cfgi_ste(DEVICE->id)));
    REQUIRE(ends());
    REQUIRE(invalidate(response(DEVICE->id, group_of(&request), SUCCESS)));
}

static const struct check list[] = {
    {"a page that is not there is asked for and brought (8, 4.5.2)", served},
    {"response: invalid request (4.5.2)", invalid},
    {"response: failure (4.5.2)", failure},
    {"a reserved response: CERROR_ILL (4.5.2)", reserved},
    {"the queue goes on at its start (3.5.1)", over_the_end},
    {"responses for nobody have no effect", response_for_nobody},
    {"a full queue: OVFLG, and the device is answered (8.1)", overflow},
    {"a request while there is no queue is refused (8.2)", no_queue},
    {"a stream that is revoked is answered", revoked},
};

CHECK_GROUP(page_requests, list, start, stop);
