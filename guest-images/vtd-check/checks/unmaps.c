// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
// A driver in strict mode that unmaps one page after the other, `unmaps=` times. With `idle=1` on
// the command line it then does nothing, until the machine is ended from outside. With `loans=1`,
// each run of unmaps, in which a unit may have lent its registers as memory, is followed by
// something that memory cannot express.
#include "fixture.h"
#include "lib/cmdline.h"
#include "lib/console.h"

enum { MICROSECONDS = 1000000, ROUNDS = 2 };

static struct page_table space;

static u64 unmaps(void)
{
    return cmdline_number("unmaps", 1);
}

static bool attached(void)
{
    space = space_new();
    attach(DEVICE, &space, DOMAIN_A);
    return enable();
}

static bool unmap_them(void)
{
    for (u64 n = 0; n < unmaps(); n++)
        if (!invalidate(inv_pasid_iotlb(PASID_IOTLB_PAGE, DOMAIN_A, 0, IOVA)))
            return false;
    return true;
}

static void one_after_the_other(void)
{
    u64 started, ticks;

    REQUIRE(attached());
    started = timestamp();
    REQUIRE(unmap_them());
    ticks = timestamp() - started;
    print("# %lu unmaps, %lu ns each\n", unmaps(), ticks * 1000 / (clock_frequency() / MICROSECONDS) / unmaps());
    while (cmdline_number("idle", 0))
        asm volatile("cli; hlt");
}

static void read_back(void)
{
    u64 noise = 0x9e3779b97f4a7c15;

    REQUIRE(attached());
    for (unsigned round = 0; round < ROUNDS; round++) {
        REQUIRE(unmap_them());
        for (unsigned n = 0; n < 64; n++) {
            noise ^= noise << 13;
            noise ^= noise >> 7;
            noise ^= noise << 17;
            vtd_write32(VTD_FEDATA, (u32)noise);
            vtd_write32(VTD_IEUADDR, (u32)(noise >> 32));
            EXPECT(vtd_read32(VTD_FEDATA) == (u32)noise, "FEDATA 0x%x", vtd_read32(VTD_FEDATA));
            EXPECT(vtd_read32(VTD_IEUADDR) == (u32)(noise >> 32), "IEUADDR 0x%x", vtd_read32(VTD_IEUADDR));
        }
    }
}

static void fault(void)
{
    struct fault fault;

    REQUIRE(attached());
    fault_event_enable(VECTOR_FAULT_EVENT);
    for (unsigned round = 1; round <= ROUNDS; round++) {
        interrupt_count_clear(VECTOR_FAULT_EVENT);
        REQUIRE(unmap_them());
        // Without effect: nothing is pending.
        faults_clear();
        EXPECT(edu_write_to(DEVICE, NO_PASID, IOVA + round * PAGE_SIZE, 0, 8), "the DMA does not end");
        EXPECT(WAIT_UNTIL(interrupt_count(VECTOR_FAULT_EVENT)), "no fault event");
        EXPECT(vtd_read32(VTD_FSTS) & FSTS_PPF, "FSTS 0x%x", vtd_read32(VTD_FSTS));
        EXPECT(fault_take(&fault), "no record");
        EXPECT(fault.address == IOVA + round * PAGE_SIZE, "address 0x%lx", fault.address);
        EXPECT(vtd_read32(VTD_FSTS) == 0 || !fault_pending(), "FSTS 0x%x", vtd_read32(VTD_FSTS));
    }
}

static void error_and_recovery(void)
{
    REQUIRE(attached());
    for (unsigned round = 0; round < ROUNDS; round++) {
        u32 place;

        REQUIRE(unmap_them());
        place = queue_tail();
        queue_put((struct descriptor){0xf, 0});
        queue_submit();
        EXPECT(WAIT_UNTIL(vtd_read32(VTD_FSTS) & FSTS_IQE), "FSTS.IQE stays 0");
        EXPECT(queue_error() == IQEI_TYPE, "IQERCD says %u", queue_error());
        EXPECT(vtd_read64(VTD_IQH) == place, "IQH 0x%lx, not 0x%x", vtd_read64(VTD_IQH), place);
        queue_recover();
        EXPECT(queue_flush(), "queue error %u afterwards", queue_error());
    }
}

static void commands(void)
{
    REQUIRE(attached());
    for (unsigned round = 0; round < ROUNDS; round++) {
        REQUIRE(unmap_them());
        EXPECT(vtd_switch((u32)GCMD_TE, false), "GSTS.TES stays 1");
        EXPECT(vtd_switch((u32)GCMD_TE, true), "GSTS.TES stays 0");
        REQUIRE(unmap_them());
        // All at once: GCMD is 0 but for what must stay on.
        vtd_write32(VTD_GCMD, 0);
        EXPECT(WAIT_UNTIL(!(vtd_read32(VTD_GSTS) & (u32)(GCMD_TE | GCMD_QIE))), "GSTS 0x%x", vtd_read32(VTD_GSTS));
        EXPECT(vtd_read64(VTD_IQH) == 0, "IQH 0x%lx", vtd_read64(VTD_IQH));
        EXPECT(queue_start(true), "GCMD.QIE never showed in GSTS");
        REQUIRE(enable());
    }
}

static void completion_interrupt(void)
{
    vtd_write32(VTD_IEDATA, VECTOR_INVALIDATION_EVENT);
    vtd_write32(VTD_IEADDR, msi_address());
    vtd_write32(VTD_IEUADDR, 0);
    vtd_write32(VTD_IECTL, 0);
    REQUIRE(attached());
    for (unsigned round = 0; round < ROUNDS; round++) {
        interrupt_count_clear(VECTOR_INVALIDATION_EVENT);
        REQUIRE(unmap_them());
        queue_put(inv_wait(WAIT_IF, 0, 0));
        queue_submit();
        EXPECT(WAIT_UNTIL(interrupt_count(VECTOR_INVALIDATION_EVENT) == 1), "no event");
        EXPECT(vtd_read32(VTD_ICS) & ICS_IWC, "ICS.IWC is 0");
        vtd_write32(VTD_ICS, ICS_IWC);
        EXPECT(!(vtd_read32(VTD_ICS) & ICS_IWC), "ICS.IWC does not clear");
    }
    vtd_write32(VTD_IECTL, (u32)ECTL_IM);
}

static const struct check one[] = {
    {"one after the other", one_after_the_other},
};
CHECK_GROUP(unmaps, one, setup_scalable, teardown);

static const struct check each[] = {
    {"registers read as written after unmaps", read_back},
    {"a fault after unmaps", fault},
    {"a queue error after unmaps, and recovery", error_and_recovery},
    {"commands after unmaps", commands},
    {"a completion interrupt after unmaps", completion_interrupt},
};
CHECK_GROUP(loans, each, setup_scalable, teardown);
