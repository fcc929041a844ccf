// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
// For the sanitizer of the emulated host: a driver that unmaps pages and tables and, with
// `forget=1` on the command line, omits the invalidation. With `forget=0` it does not. Runs alone
// in both cases, as the other checks use stale translations on purpose.
#include "fixture.h"
#include "lib/cmdline.h"

enum { PASID = 5 };

static void page_taken_away(u32 pasid)
{
    struct page_table space = space_new();
    struct target target = target_new();
    u32 tag = pasid == NO_PASID ? 0 : pasid;

    map_leaf(&space, IOVA, gpa_of(target.old), LEVEL_4K, FS_READ_WRITE);
    attach_pasid(DEVICE, tag, &space, DOMAIN_A);
    REQUIRE(enable());
    REQUIRE(lands_on_old(DEVICE, pasid, IOVA, target));
    // An unrelated correct invalidation of another page, which the device does not use.
    REQUIRE(invalidate(inv_pasid_iotlb(PASID_IOTLB_PAGE, DOMAIN_A, tag, IOVA_OTHER | INVALIDATION_HINT)));
    map_leaf(&space, IOVA, gpa_of(target.new), LEVEL_4K, FS_READ_WRITE);
    if (cmdline_number("forget", 0)) {
        REQUIRE(lands_on_stale(DEVICE, pasid, IOVA, target));
        return;
    }
    REQUIRE(invalidate(inv_pasid_iotlb(PASID_IOTLB_PAGE, DOMAIN_A, tag, IOVA | INVALIDATION_HINT)));
    REQUIRE(lands_on_new(DEVICE, pasid, IOVA, target));
}

static void tables_exchanged(void)
{
    struct page_table before = space_new(), after = space_new();
    struct target target = target_new();

    map_leaf(&before, IOVA, gpa_of(target.old), LEVEL_4K, FS_READ_WRITE);
    map_leaf(&after, IOVA, gpa_of(target.new), LEVEL_4K, FS_READ_WRITE);
    attach(DEVICE, &before, DOMAIN_A);
    REQUIRE(enable());
    REQUIRE(lands_on_old(DEVICE, NO_PASID, IOVA, target));
    attach(DEVICE, &after, DOMAIN_A);
    if (cmdline_number("forget", 0)) {
        REQUIRE(lands_on_stale(DEVICE, NO_PASID, IOVA, target));
        return;
    }
    REQUIRE(invalidate(inv_pasid_cache(PASID_CACHE_PASID, DOMAIN_A, 0)));
    REQUIRE(invalidate(inv_pasid_iotlb(PASID_IOTLB_PASID, DOMAIN_A, 0, 0)));
    REQUIRE(lands_on_new(DEVICE, NO_PASID, IOVA, target));
}

static void without_pasid(void) { page_taken_away(NO_PASID); }

static void with_pasid(void)
{
    SKIP_UNLESS(ecap_pasid() && DEVICE->has_pasid, "no PASIDs");
    page_taken_away(PASID);
}

static const struct check checks[] = {
    {"a page is taken away from a device", without_pasid},
    {"a page is taken away from a PASID", with_pasid},
    {"a device gets other tables", tables_exchanged},
};

CHECK_GROUP(forget, checks, setup_scalable, teardown);
