// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
// Fault recording: order, overflow, suppression (FPD) and the fault event.
#include "fixture.h"

// A write that faults because nothing is mapped at page `n`; the caller checks the record.
static bool provoke(unsigned n)
{
    if (!edu_write_to(DEVICE, NO_PASID, IOVA + n * PAGE_SIZE, 0, 8))
        check_fail("the device's DMA does not end");
    return !check_is_over();
}

static bool nothing_mapped(void)
{
    struct page_table space;

    if (devices_assigned()) {
        check_skip("faults of assigned devices are not reported");
        return false;
    }
    space = space_new();
    attach(DEVICE, &space, DOMAIN_A);
    return enable();
}

static void in_order(void)
{
    struct fault fault;

    SKIP_UNLESS(vtd->fault_record_count >= 3, "fewer than 3 fault records");
    REQUIRE(nothing_mapped());
    for (unsigned n = 0; n < 3; n++)
        REQUIRE(provoke(n));
    SKIP_UNLESS(fault_pending() == 3, "faults of one device are collapsed into one record");
    for (unsigned n = 0; n < 3; n++) {
        EXPECT(fault_take(&fault), "record %u is missing", n);
        EXPECT(fault.address == IOVA + n * PAGE_SIZE, "record %u has address 0x%lx", n, fault.address);
    }
    EXPECT(!(vtd_read32(VTD_FSTS) & FSTS_PPF), "FSTS.PPF outlives the records");
}

static void round_the_records(void)
{
    struct fault fault;

    REQUIRE(nothing_mapped());
    for (unsigned n = 0; n < 2 * vtd->fault_record_count + 1; n++) {
        REQUIRE(provoke(n));
        EXPECT(fault_take(&fault), "fault %u left no record", n);
        EXPECT(fault.address == IOVA + n * PAGE_SIZE, "fault %u has address 0x%lx", n, fault.address);
    }
}

static void overflow(void)
{
    struct fault fault;
    unsigned records = vtd->fault_record_count;

    REQUIRE(nothing_mapped());
    REQUIRE(provoke(0));
    REQUIRE(provoke(1));
    SKIP_UNLESS(records == 1 || fault_pending() == 2, "faults of one device are collapsed into one record");
    for (unsigned n = 2; n <= records; n++)
        REQUIRE(provoke(n));
    SKIP_UNLESS(vtd_read32(VTD_FSTS) & FSTS_PFO || records > 1,
                "faults of one device are collapsed into one record");
    EXPECT(vtd_read32(VTD_FSTS) & FSTS_PFO, "FSTS.PFO is 0 after %u faults", records + 1);
    // Until software clears PFO, nothing more is recorded, whether records are free or not.
    EXPECT(fault_take(&fault) && fault.address == IOVA, "the first record has address 0x%lx", fault.address);
    REQUIRE(provoke(100));
    EXPECT(fault_pending() == records - 1, "a fault was recorded with PFO set");
    faults_clear();
    EXPECT(!(vtd_read32(VTD_FSTS) & (FSTS_PFO | FSTS_PPF)), "FSTS 0x%x after clearing", vtd_read32(VTD_FSTS));
    REQUIRE(write_faults(DEVICE, NO_PASID, IOVA + 200 * PAGE_SIZE, NULL, FS_NOT_PRESENT));
}

static void silenced_by_context(void)
{
    struct page_table space = space_new();

    attach(DEVICE, &space, DOMAIN_A);
    context_of(DEVICE)[0] |= ENTRY_FPD;
    REQUIRE(enable());
    REQUIRE(write_vanishes(DEVICE, NO_PASID, IOVA, NULL));
}

static void silenced_by_absent_context(void)
{
    context_of(DEVICE)[0] = ENTRY_FPD;
    REQUIRE(enable());
    REQUIRE(write_vanishes(DEVICE, NO_PASID, IOVA, NULL));
}

static void silenced_by_directory(void)
{
    struct page_table space = space_new();

    attach(DEVICE, &space, DOMAIN_A);
    directory_of(DEVICE)[0] |= ENTRY_FPD;
    REQUIRE(enable());
    REQUIRE(write_vanishes(DEVICE, NO_PASID, IOVA, NULL));
}

static void silenced_by_entry(void)
{
    struct page_table space = space_new();

    attach(DEVICE, &space, DOMAIN_A)[0] |= ENTRY_FPD;
    REQUIRE(enable());
    REQUIRE(write_vanishes(DEVICE, NO_PASID, IOVA, NULL));
}

static void event(void)
{
    struct fault fault;

    REQUIRE(nothing_mapped());
    fault_event_enable(VECTOR_FAULT_EVENT);
    interrupt_count_clear(VECTOR_FAULT_EVENT);
    REQUIRE(provoke(0));
    EXPECT(WAIT_UNTIL(interrupt_count(VECTOR_FAULT_EVENT)), "the first fault brings no event");
    // While a record is pending, another one is not a new condition.
    REQUIRE(provoke(1));
    while (fault_take(&fault))
        ;
    EXPECT(interrupt_count(VECTOR_FAULT_EVENT) == 1, "%u events", interrupt_count(VECTOR_FAULT_EVENT));
    REQUIRE(provoke(2));
    EXPECT(WAIT_UNTIL(interrupt_count(VECTOR_FAULT_EVENT) == 2), "no event after the records were cleared");
}

static void event_masked(void)
{
    REQUIRE(nothing_mapped());
    fault_event_enable(VECTOR_FAULT_EVENT);
    fault_event_mask();
    interrupt_count_clear(VECTOR_FAULT_EVENT);
    REQUIRE(provoke(0));
    EXPECT(vtd_read32(VTD_FECTL) == (ECTL_IM | ECTL_IP), "FECTL 0x%x", vtd_read32(VTD_FECTL));
    EXPECT(interrupt_count(VECTOR_FAULT_EVENT) == 0, "an event came although it was masked");
    vtd_write32(VTD_FECTL, 0);
    EXPECT(WAIT_UNTIL(interrupt_count(VECTOR_FAULT_EVENT)), "unmasking does not send the pending event");
    EXPECT(vtd_read32(VTD_FECTL) == 0, "FECTL 0x%x", vtd_read32(VTD_FECTL));
}

static void event_withdrawn(void)
{
    REQUIRE(nothing_mapped());
    fault_event_enable(VECTOR_FAULT_EVENT);
    fault_event_mask();
    interrupt_count_clear(VECTOR_FAULT_EVENT);
    REQUIRE(provoke(0));
    faults_clear();
    EXPECT(!(vtd_read32(VTD_FECTL) & ECTL_IP), "FECTL.IP outlives what it was about");
    vtd_write32(VTD_FECTL, 0);
    REQUIRE(queue_flush());
    EXPECT(interrupt_count(VECTOR_FAULT_EVENT) == 0, "an event came for faults already cleared");
}

static const struct check list[] = {
    {"records keep the order of the faults", in_order},
    {"records are used round and round", round_the_records},
    {"more faults than records: PFO", overflow},
    {"FPD in the context entry: blocked without a record", silenced_by_context},
    {"FPD in a context entry not present", silenced_by_absent_context},
    {"FPD in the PASID directory", silenced_by_directory},
    {"FPD in the PASID-table entry", silenced_by_entry},
    {"fault event, one for a run of pending faults", event},
    {"fault event masked: pending, sent when unmasked", event_masked},
    {"fault event masked: withdrawn when the faults are cleared", event_withdrawn},
};
CHECK_GROUP(fault_log, list, setup_scalable, teardown);
