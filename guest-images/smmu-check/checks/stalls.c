// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
// The stall model (IHI 0070 3.12.2, 4.7, 7.2.1): a write that faults waits, and the guest resumes it.
#include "checks/fixture.h"

enum { ASID = 5, BYTES = 8, EVENTS = 256 };

// What CMD_RESUME says: Ac, Ab.
enum { TERMINATE = 0, RETRY = 1, ABORT = 2 };

static struct space space;

static struct command resume(pci_id function, unsigned tag, unsigned how)
{
    return (struct command){{0x44 | (u64)how << 12 | (u64)function << 32, tag}};
}

static struct command stall_term(pci_id function)
{
    return (struct command){{0x45 | (u64)function << 32, 0}};
}

// A space whose faults stall, with nothing at IOVA.
static void start(void)
{
    setup();
    space = space_new(ASID);
    space_stall(&space);
    stream_translate(DEVICE->id, &space);
    if (invalidate(cfgi_ste(DEVICE->id)) && !smmu_enable(true))
        check_fail("CR0.SMMUEN is not taken");
}

// Whatever a check leaves behind ends.
static void stop(void)
{
    teardown();
    if (!WAIT_UNTIL(edu_is_done(DEVICE)))
        check_fail("a DMA does not end when translation is disabled");
}

static void start_write(void)
{
    edu_start(DEVICE, EDU_BUFFER, IOVA, BYTES, EDU_DMA_TO_MEMORY);
}

// Waits for the event of the write, which stalls.
static bool stalled(struct event *event)
{
    if (!WAIT_UNTIL(smmu_event(event))) {
        check_fail("no event");
        return false;
    }
    if (event_id(event) == EVENT_TRANSLATION && event_stalls(event) && event_stream(event) == DEVICE->id &&
        event_address(event) == IOVA && !event_is_read(event))
        return true;
    check_fail("event 0x%02x, stall %u, stream 0x%x, address 0x%lx", event_id(event), event_stalls(event),
               event_stream(event), event_address(event));
    return false;
}

static void ends_with(unsigned how)
{
    struct event event;

    start_write();
    REQUIRE(stalled(&event));
    REQUIRE(invalidate(resume(DEVICE->id, event_tag(&event), how)));
    EXPECT(WAIT_UNTIL(edu_is_done(DEVICE)), "the DMA does not end");
    EXPECT(!smmu_event(&event), "another event, 0x%02x", event_id(&event));
}

static void aborted(void) { ends_with(ABORT); }
static void terminated(void) { ends_with(TERMINATE); }

static void retried(void)
{
    volatile u64 *page = target_new();
    struct event event;
    u64 before = *page;

    start_write();
    REQUIRE(stalled(&event));
    EXPECT(!edu_is_done(DEVICE), "the DMA is over before it is resumed");
    space_map(&space, IOVA, page, READ_WRITE);
    REQUIRE(invalidate(resume(DEVICE->id, event_tag(&event), RETRY)));
    EXPECT(WAIT_UNTIL(edu_is_done(DEVICE)), "the DMA does not end");
    EXPECT(*page != before, "the write did not reach the page that was brought");
    EXPECT(!smmu_event(&event), "another event, 0x%02x", event_id(&event));
}

static void stalls_again(void)
{
    struct event event;

    start_write();
    for (unsigned n = 0; n < 50; n++) {
        REQUIRE(stalled(&event));
        REQUIRE(invalidate(resume(DEVICE->id, event_tag(&event), RETRY)));
    }
    REQUIRE(stalled(&event));
    REQUIRE(invalidate(resume(DEVICE->id, event_tag(&event), ABORT)));
    EXPECT(WAIT_UNTIL(edu_is_done(DEVICE)), "the DMA does not end");
}

static void resume_for_nobody(void)
{
    struct event event;
    unsigned tag;

    start_write();
    REQUIRE(stalled(&event));
    tag = event_tag(&event);
    REQUIRE(invalidate(resume(DEVICE->id, tag ^ 1, ABORT)));
    REQUIRE(invalidate(resume(DEVICE->id ^ 0x100, tag, ABORT)));
    REQUIRE(invalidate(stall_term(DEVICE->id ^ 0x100)));
    EXPECT(!edu_is_done(DEVICE), "the DMA is over");
    REQUIRE(invalidate(resume(DEVICE->id, tag, ABORT)));
    EXPECT(WAIT_UNTIL(edu_is_done(DEVICE)), "the DMA does not end");
    REQUIRE(invalidate(resume(DEVICE->id, tag, ABORT)));
}

static void whole_stream(void)
{
    struct event event;

    start_write();
    REQUIRE(stalled(&event));
    stream_abort(DEVICE->id);
    REQUIRE(invalidate(cfgi_ste(DEVICE->id)));
    REQUIRE(invalidate(stall_term(DEVICE->id)));
    EXPECT(WAIT_UNTIL(edu_is_done(DEVICE)), "the DMA does not end");
}

static void disabled(void)
{
    struct event event;

    start_write();
    REQUIRE(stalled(&event));
    EXPECT(smmu_enable(false), "CR0.SMMUEN is not taken");
    EXPECT(WAIT_UNTIL(edu_is_done(DEVICE)), "the DMA does not end");
}

// Without space for its record it waits, and there is no overflow.
static void full_queue(void)
{
    struct event event;

    smmu_fill_events();
    start_write();
    // It does not end, and its event does not come, while two round trips of the queue go by.
    for (unsigned n = 0; n < 2; n++)
        REQUIRE(invalidate(tlbi_asid(ASID)));
    EXPECT(!edu_is_done(DEVICE), "the DMA is over without a record");
    EXPECT(!(smmu_read(SMMU_EVENTQ_PROD) & BIT(31)), "an overflow");
    for (unsigned n = 0; n < EVENTS; n++)
        EXPECT(smmu_event(&event), "event %u is not there", n);
    REQUIRE(stalled(&event));
    REQUIRE(invalidate(resume(DEVICE->id, event_tag(&event), ABORT)));
    EXPECT(WAIT_UNTIL(edu_is_done(DEVICE)), "the DMA does not end");
}

// C_BAD_CD.
static void must_not(void)
{
    struct event event;

    smmu_stream(DEVICE->id)->words[1] |= STE_S1STALLD;
    REQUIRE(invalidate(cfgi_ste(DEVICE->id)));
    start_write();
    EXPECT(WAIT_UNTIL(edu_is_done(DEVICE)), "the DMA does not end");
    EXPECT(WAIT_UNTIL(smmu_event(&event)), "no event");
    EXPECT(event_id(&event) == EVENT_BAD_CD, "event 0x%02x", event_id(&event));
}

static const struct check list[] = {
    {"a write to a page that is not there waits until it is resumed (3.12.2)", retried},
    {"resumed with an abort (4.7.1)", aborted},
    {"resumed by termination (4.7.1)", terminated},
    {"tried again too early, it stalls again, with an event each time (4.7.1)", stalls_again},
    {"CMD_RESUME for nobody has no effect (4.7.1)", resume_for_nobody},
    {"CMD_STALL_TERM ends what is stalled of a stream (4.7.2)", whole_stream},
    {"SMMUEN of 0 ends what is stalled (6.3.9.6)", disabled},
    {"a full event queue: the record waits, and is no overflow (7.2.1, 7.4)", full_queue},
    {"CD.S with S1STALLD: C_BAD_CD (5.5)", must_not},
};

CHECK_GROUP(stalls, list, start, stop);
