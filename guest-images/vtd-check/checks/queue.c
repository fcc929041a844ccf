// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
// The invalidation queue: waits, wrap-around, errors and recovery. No DMA.
#include "fixture.h"

static volatile u32 status_word;

static void event_enable(bool masked)
{
    vtd_write32(VTD_ICS, ICS_IWC);
    vtd_write32(VTD_IEDATA, VECTOR_INVALIDATION_EVENT);
    vtd_write32(VTD_IEADDR, msi_address());
    vtd_write32(VTD_IEUADDR, 0);
    vtd_write32(VTD_IECTL, masked ? (u32)ECTL_IM : 0);
    interrupt_count_clear(VECTOR_INVALIDATION_EVENT);
}

static u32 events(void)
{
    return interrupt_count(VECTOR_INVALIDATION_EVENT);
}

static bool queue_is_empty(void)
{
    return WAIT_UNTIL(vtd_read64(VTD_IQH) == vtd_read64(VTD_IQT));
}

static void wait_status(void)
{
    status_word = 0;
    queue_put(inv_wait(WAIT_SW, 0xc0ffee, gpa_of(&status_word)));
    queue_submit();
    EXPECT(WAIT_UNTIL(status_word == 0xc0ffee), "status 0x%x", status_word);
    EXPECT(queue_is_empty(), "IQH 0x%lx", vtd_read64(VTD_IQH));
}

static void wait_interrupt(void)
{
    event_enable(false);
    queue_put(inv_wait(WAIT_IF, 0, 0));
    queue_submit();
    EXPECT(WAIT_UNTIL(events() == 1), "%u events", events());
    EXPECT(vtd_read32(VTD_ICS) & ICS_IWC, "ICS.IWC is 0");
    // IWC is still set: the next completion is not a new condition.
    queue_put(inv_wait(WAIT_IF, 0, 0));
    EXPECT(queue_flush(), "the queue stopped");
    EXPECT(events() == 1, "%u events with IWC set", events());
    vtd_write32(VTD_ICS, ICS_IWC);
    EXPECT(!(vtd_read32(VTD_ICS) & ICS_IWC), "ICS.IWC does not clear");
    queue_put(inv_wait(WAIT_IF, 0, 0));
    queue_submit();
    EXPECT(WAIT_UNTIL(events() == 2), "%u events after clearing IWC", events());
    vtd_write32(VTD_ICS, ICS_IWC);
}

static void wait_interrupt_masked(void)
{
    event_enable(true);
    queue_put(inv_wait(WAIT_IF, 0, 0));
    EXPECT(queue_flush(), "the queue stopped");
    EXPECT(vtd_read32(VTD_IECTL) == (ECTL_IM | ECTL_IP), "IECTL 0x%x", vtd_read32(VTD_IECTL));
    EXPECT(events() == 0, "an event came although it was masked");
    vtd_write32(VTD_IECTL, 0);
    EXPECT(WAIT_UNTIL(events() == 1), "unmasking does not send the pending event");
    vtd_write32(VTD_ICS, ICS_IWC);
    vtd_write32(VTD_IECTL, (u32)ECTL_IM);
}

static void wait_neither(void)
{
    queue_put(inv_wait(0, 0, 0));
    queue_put(inv_wait(WAIT_FENCE, 0, 0));
    EXPECT(queue_flush(), "queue error %u", queue_error());
}

static void wrap_around(void)
{
    unsigned slots = queue_bytes() / queue_descriptor_size();

    for (unsigned n = 0; n < slots + slots / 2; n++) {
        queue_put(inv_iotlb(IOTLB_GLOBAL, 0, 0));
        if (n % (slots / 4) == 0)
            EXPECT(queue_flush(), "stopped after %u descriptors, error %u", n, queue_error());
    }
    EXPECT(queue_flush(), "queue error %u", queue_error());
    EXPECT(vtd_read64(VTD_IQH) == queue_tail(), "IQH 0x%lx", vtd_read64(VTD_IQH));
}

static void full_queue(void)
{
    unsigned slots = queue_bytes() / queue_descriptor_size();

    for (unsigned n = 0; n < slots - 2; n++)
        queue_put(inv_iotlb(IOTLB_GLOBAL, 0, 0));
    EXPECT(queue_flush(), "queue error %u", queue_error());
}

static void empty_tail(void)
{
    EXPECT(queue_flush(), "queue error %u", queue_error());
    for (unsigned n = 0; n < 4; n++)
        queue_submit();
    EXPECT(queue_error() == 0, "queue error %u", queue_error());
    EXPECT(vtd_read64(VTD_IQH) == queue_tail(), "IQH 0x%lx", vtd_read64(VTD_IQH));
    EXPECT(queue_flush(), "queue error %u", queue_error());
}

static void disable_resets_head(void)
{
    EXPECT(queue_flush(), "queue error %u", queue_error());
    queue_stop();
    EXPECT(vtd_read64(VTD_IQH) == 0, "IQH 0x%lx", vtd_read64(VTD_IQH));
    EXPECT(queue_start(true), "GCMD.QIE never showed in GSTS");
    EXPECT(queue_flush(), "queue error %u", queue_error());
}

// A tail written before the queue is enabled is served when it is.
static void tail_before_enable(void)
{
    queue_stop();
    status_word = 0;
    EXPECT(queue_start(true), "GCMD.QIE never showed in GSTS");
    queue_put(inv_wait(WAIT_SW, 77, gpa_of(&status_word)));
    EXPECT(vtd_switch(GCMD_QIE, false), "GSTS.QIES does not clear");
    queue_submit();
    EXPECT(status_word == 0, "a queue that is off was served");
    EXPECT(vtd_switch(GCMD_QIE, true), "GCMD.QIE never showed in GSTS");
    EXPECT(WAIT_UNTIL(status_word == 77), "status %u", status_word);
}

// `bad` stops the queue with `reason`, at its place; what follows waits until software has replaced
// it and cleared the error, and is then served without another tail write.
static void stops_at(struct descriptor bad, u64 third_quad, unsigned reason)
{
    u32 place = queue_tail();
    unsigned error;

    status_word = 0;
    queue_put(bad);
    if (third_quad)
        queue_slot(place)[2] = third_quad;
    queue_put(inv_wait(WAIT_SW, 1, gpa_of(&status_word)));
    queue_submit();
    EXPECT(WAIT_UNTIL(vtd_read32(VTD_FSTS) & FSTS_IQE), "FSTS.IQE stays 0");
    error = queue_error();
    EXPECT(error == reason || error == 0xff, "IQERCD says %u instead of %u", error, reason);
    EXPECT(vtd_read64(VTD_IQH) == place, "IQH 0x%lx, the descriptor is at 0x%x", vtd_read64(VTD_IQH), place);
    EXPECT(status_word == 0, "the queue went on");
    queue_recover();
    EXPECT(WAIT_UNTIL(status_word == 1), "clearing FSTS.IQE does not restart the queue");
    EXPECT(queue_flush(), "queue error %u afterwards", queue_error());
}

static void type_zero(void) { stops_at((struct descriptor){0, 0}, 0, IQEI_TYPE); }
static void type_unknown(void) { stops_at((struct descriptor){0xf, 0}, 0, IQEI_TYPE); }
static void type_high_bits(void)
{
    stops_at((struct descriptor){TYPE_IOTLB | BIT(11) | IOTLB_GLOBAL << 4, 0}, 0, IQEI_TYPE);
}
static void context_granularity(void) { stops_at(inv_context(0, 0, 0), 0, IQEI_RESERVED); }
static void iotlb_granularity(void) { stops_at(inv_iotlb(0, 0, 0), 0, IQEI_RESERVED); }
static void pasid_iotlb_granularity(void) { stops_at(inv_pasid_iotlb(1, 1, 0, 0), 0, IQEI_RESERVED); }
static void pasid_cache_granularity(void) { stops_at(inv_pasid_cache(2, 1, 0), 0, IQEI_RESERVED); }
static void upper_half(void) { stops_at(inv_iotlb(IOTLB_GLOBAL, 0, 0), 1, IQEI_RESERVED); }

static struct descriptor with_bit(struct descriptor descriptor, unsigned bit)
{
    descriptor.low |= BIT(bit);
    return descriptor;
}

static void reserved_bits(void)
{
    const struct descriptor bad[] = {
        with_bit(inv_context(CONTEXT_GLOBAL, 0, 0), 6),
        with_bit(inv_iotlb(IOTLB_GLOBAL, 0, 0), 40),
        with_bit(inv_pasid_iotlb(PASID_IOTLB_PASID, 1, 0, 0), 13),
        with_bit(inv_pasid_cache(PASID_CACHE_GLOBAL, 0, 0), 60),
        with_bit(inv_wait(WAIT_FENCE, 0, 0), 20),
        inv_iotlb(IOTLB_PAGE, 1, IOVA | BIT(8)),
        inv_wait(WAIT_SW, 0, gpa_of(&status_word) | 1),
    };

    for (unsigned n = 0; n < ARRAY_LEN(bad) && !check_is_over(); n++)
        stops_at(bad[n], 0, IQEI_RESERVED);
}

static void mask_beyond(void)
{
    SKIP_UNLESS(cap_mamv() < 63, "CAP.MAMV is its maximum");
    stops_at(inv_iotlb(IOTLB_PAGE, 1, cap_mamv() + 1), 0, IQEI_RESERVED);
}

// After an error without a descriptor to replace, software restarts the queue.
static void starts_anew(unsigned reason)
{
    unsigned error;

    EXPECT(WAIT_UNTIL(vtd_read32(VTD_FSTS) & FSTS_IQE), "FSTS.IQE stays 0");
    error = queue_error();
    EXPECT(error == reason || error == 0xff, "IQERCD says %u instead of %u", error, reason);
    queue_stop();
    vtd_write32(VTD_FSTS, FSTS_IQE);
    EXPECT(queue_start(true), "GCMD.QIE never showed in GSTS");
    EXPECT(queue_flush(), "queue error %u afterwards", queue_error());
}

static void tail_beyond(void)
{
    vtd_write64(VTD_IQT, queue_bytes());
    starts_anew(IQEI_TAIL);
}

static void tail_misaligned(void)
{
    vtd_write64(VTD_IQT, 16);
    starts_anew(IQEI_TAIL_ALIGNMENT);
}

static void in_no_memory(void)
{
    queue_stop();
    EXPECT(queue_start_at(NO_MEMORY, true), "GCMD.QIE never showed in GSTS");
    vtd_write64(VTD_IQT, 64);
    starts_anew(IQEI_FETCH);
}

static void status_in_no_memory(void)
{
    queue_put(inv_wait(WAIT_SW, 1, NO_MEMORY));
    EXPECT(queue_flush(), "queue error %u", queue_error());
}

// Pseudo-random descriptors: each either completes or stops the queue, and the unit survives all.
static void garbage(void)
{
    u64 noise = 0x9e3779b97f4a7c15;
    unsigned errors = 0;

    for (unsigned n = 0; n < 64; n++) {
        u32 place = queue_tail();
        u64 *slot = queue_slot(place);

        queue_put((struct descriptor){0, 0});
        for (unsigned quad = 0; quad < 4; quad++) {
            noise ^= noise << 13;
            noise ^= noise >> 7;
            noise ^= noise << 17;
            slot[quad] = noise;
        }
        // No wait that might write its status over the guest.
        if ((slot[0] & 0xf) == TYPE_WAIT)
            slot[0] ^= 0xf;
        queue_submit();
        EXPECT(WAIT_UNTIL(queue_error() || vtd_read64(VTD_IQH) == queue_tail()),
               "descriptor %u hangs the queue", n);
        if (queue_error()) {
            errors++;
            queue_recover();
        }
    }
    EXPECT(errors > 48, "only %u of 64 were refused", errors);
    EXPECT(queue_flush(), "queue error %u afterwards", queue_error());
}

static void error_event(void)
{
    fault_event_enable(VECTOR_FAULT_EVENT);
    interrupt_count_clear(VECTOR_FAULT_EVENT);
    queue_put((struct descriptor){0xf, 0});
    queue_submit();
    EXPECT(WAIT_UNTIL(interrupt_count(VECTOR_FAULT_EVENT)), "no fault event for FSTS.IQE");
    queue_recover();
    EXPECT(queue_flush(), "queue error %u afterwards", queue_error());
}

static const struct check list[] = {
    {"wait with status write", wait_status},
    {"wait with interrupt, ICS.IWC", wait_interrupt},
    {"wait with interrupt while masked", wait_interrupt_masked},
    {"wait with neither", wait_neither},
    {"wrap-around", wrap_around},
    {"a queue filled to the last slot", full_queue},
    {"tail writes with nothing new", empty_tail},
    {"disabling resets the head", disable_resets_head},
    {"a tail written before enabling is served on enabling", tail_before_enable},
    {"descriptor type 0: IQE 3 and recovery", type_zero},
    {"unknown descriptor type: IQE 3 and recovery", type_unknown},
    {"type in the upper type bits: IQE 3 and recovery", type_high_bits},
    {"context-cache granularity 0: IQE 4", context_granularity},
    {"IOTLB granularity 0: IQE 4", iotlb_granularity},
    {"PASID-IOTLB granularity 1: IQE 4", pasid_iotlb_granularity},
    {"PASID-cache granularity 2: IQE 4", pasid_cache_granularity},
    {"upper half of a 256-bit descriptor not zero: IQE 4", upper_half},
    {"reserved bits of each type: IQE 4", reserved_bits},
    {"address mask beyond CAP.MAMV: IQE 4", mask_beyond},
    {"tail beyond the queue: IQE 1", tail_beyond},
    {"tail misaligned: IQE 6", tail_misaligned},
    {"queue in no memory: IQE 2", in_no_memory},
    {"status address in no memory", status_in_no_memory},
    {"64 descriptors of garbage", garbage},
    {"fault event for a queue error", error_event},
};
CHECK_GROUP(queue, list, setup_scalable, teardown);
