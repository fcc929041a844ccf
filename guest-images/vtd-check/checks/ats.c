// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
// Device TLBs (ATS): what a device has cached of its own translations, and how it is told to forget.
#include "fixture.h"

enum { PASID_A = 3 };

// No device has it: of the last bus.
#define MISSING 0xffff

static void setup(void)
{
    setup_scalable();
    if (!check_is_over())
        edu_ats_enable(DEVICE, true);
}

static void finish(void)
{
    edu_ats_enable(DEVICE, false);
    teardown();
}

// Attaches the device, whose context entry allows translation requests (VT-d 9.4: DTE).
static u64 *attach_asking(u32 pasid, const struct page_table *space)
{
    u64 *entry = pasid == NO_PASID ? attach(DEVICE, space, DOMAIN_A)
                                   : attach_pasid(DEVICE, pasid, space, DOMAIN_A);

    context_of(DEVICE)[0] |= CONTEXT_DTE;
    return entry;
}

// The invalidations of a changed page, in the order of VT-d 6.5.2.5: the IOTLB, then the device.
static bool invalidate_page(u32 pasid)
{
    u32 tag = pasid == NO_PASID ? 0 : pasid;

    return invalidate(inv_pasid_iotlb(PASID_IOTLB_PAGE, DOMAIN_A, tag, IOVA)) &&
           invalidate(pasid == NO_PASID ? inv_device_tlb(DEVICE->id, IOVA)
                                        : inv_pasid_device_tlb(DEVICE->id, pasid, IOVA));
}

static void follows(u32 pasid)
{
    struct page_table space = space_new();
    struct target target = target_new();
    u64 *leaf = map_leaf(&space, IOVA, gpa_of(target.old), LEVEL_4K, FS_READ_WRITE);

    (void)attach_asking(pasid, &space);
    REQUIRE(enable());
    REQUIRE(lands_on_old(DEVICE, pasid, IOVA, target));
    *leaf = *leaf - gpa_of(target.old) + gpa_of(target.new);
    REQUIRE(lands_on_stale(DEVICE, pasid, IOVA, target));
    REQUIRE(invalidate_page(pasid));
    REQUIRE(lands_on_new(DEVICE, pasid, IOVA, target));
}

static void follows_without_pasid(void)
{
    follows(NO_PASID);
}

static void follows_with_pasid(void)
{
    SKIP_UNLESS(DEVICE->has_pasid, "the device has no PASID capability");
    follows(PASID_A);
}

// The answer to a translation request says so, and is no fault (PCIe 10.2.3, VT-d 7.1.3).
static void absent_is_no_fault(void)
{
    struct page_table space = space_new();
    volatile u64 *page = page_new();

    (void)attach_asking(NO_PASID, &space);
    REQUIRE(enable());
    REQUIRE(write_vanishes(DEVICE, NO_PASID, IOVA, NULL));
    // Nor is it remembered.
    map_leaf(&space, IOVA, gpa_of(page), LEVEL_4K, FS_READ_WRITE);
    REQUIRE(write_arrives(DEVICE, NO_PASID, IOVA, page));
}

// A permission that was not granted is asked for again when it is needed.
static void permission_added(void)
{
    struct page_table space = space_new();
    volatile u64 *page = page_new();
    u64 *leaf = map_leaf(&space, IOVA, gpa_of(page), LEVEL_4K, FS_READ_WRITE & ~FS_RW);

    (void)attach_asking(NO_PASID, &space);
    REQUIRE(enable());
    REQUIRE(read_arrives(DEVICE, NO_PASID, IOVA, page));
    REQUIRE(write_vanishes(DEVICE, NO_PASID, IOVA, page));
    *leaf |= FS_RW;
    REQUIRE(write_arrives(DEVICE, NO_PASID, IOVA, page));
}

// A wait behind a device that does not answer is aborted (VT-d 6.5.2.10, 11.4.9.9).
static void missing_device(void)
{
    static volatile u32 done;
    u32 tail;

    done = 0;
    queue_put(inv_device_tlb(MISSING, IOVA));
    queue_put(inv_wait(WAIT_SW, 1, gpa_of(&done)));
    tail = queue_tail();
    queue_submit();
    EXPECT(WAIT_UNTIL(vtd_read32(VTD_FSTS) & FSTS_ITE), "FSTS 0x%x", vtd_read32(VTD_FSTS));
    EXPECT(bits(vtd_read64(VTD_IQERCD), 47, 32) == MISSING, "IQERCD 0x%lx", vtd_read64(VTD_IQERCD));
    EXPECT(queue_error() == 0, "queue error %u", queue_error());
    EXPECT(done == 0, "the wait was not aborted");
    EXPECT(vtd_read64(VTD_IQH) == tail, "IQH 0x%lx", vtd_read64(VTD_IQH));
    vtd_write32(VTD_FSTS, FSTS_ITE);
    EXPECT(queue_flush(), "the queue does not go on, FSTS 0x%x", vtd_read32(VTD_FSTS));
}

static void locked_while_enabled(void)
{
    u16 pasid = pci_extended_capability(DEVICE->place, PCI_EXT_CAP_PASID);
    u32 before;

    SKIP_UNLESS(pasid, "the device has no PASID capability");
    before = pci_read(DEVICE->place, pasid + 4);
    edu_pasid_enable(DEVICE, false);
    EXPECT(pci_read(DEVICE->place, pasid + 4) == before, "PASID Enable changed while ATS is enabled");
}

static const struct check list[] = {
    {"a device without PASID follows both invalidations", follows_without_pasid},
    {"a device with PASID follows both invalidations", follows_with_pasid},
    {"a page that is not present is no fault, and not remembered", absent_is_no_fault},
    {"a permission that is added is asked for", permission_added},
    {"a device that is not there: ITE, and the wait is aborted", missing_device},
    {"PASID Enable is locked while ATS is enabled (PCIe 7.8.9.3)", locked_while_enabled},
};
CHECK_GROUP(ats, list, setup, finish);
