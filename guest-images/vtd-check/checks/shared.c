// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
// Devices that share one first-stage table, and the final state: translation stays enabled, so that
// a report at exit shows the objects behind it.
#include "fixture.h"

static void two_devices_one_table(void)
{
    struct page_table space = space_new();
    struct target target = target_new();

    SKIP_UNLESS(edu_count > 1, "one edu only");
    map_leaf(&space, IOVA, gpa_of(target.old), LEVEL_4K, FS_READ_WRITE);
    attach(DEVICE, &space, DOMAIN_A);
    attach(SECOND, &space, DOMAIN_A);
    REQUIRE(enable());
    REQUIRE(lands_on_old(DEVICE, NO_PASID, IOVA, target));
    REQUIRE(lands_on_old(SECOND, NO_PASID, IOVA, target));
    map_leaf(&space, IOVA, gpa_of(target.new), LEVEL_4K, FS_READ_WRITE);
    REQUIRE(invalidate(inv_pasid_iotlb(PASID_IOTLB_PAGE, DOMAIN_A, 0, IOVA)));
    REQUIRE(lands_on_new(DEVICE, NO_PASID, IOVA, target));
    REQUIRE(lands_on_new(SECOND, NO_PASID, IOVA, target));
    // One leaves; the other stays.
    context_of(DEVICE)[0] = 0;
    REQUIRE(invalidate(inv_context(CONTEXT_DEVICE, 0, DEVICE->id)));
    REQUIRE(invalidate(inv_pasid_cache(PASID_CACHE_DOMAIN, DOMAIN_A, 0)));
    REQUIRE(invalidate(inv_pasid_iotlb(PASID_IOTLB_PASID, DOMAIN_A, 0, 0)));
    REQUIRE(write_faults(DEVICE, NO_PASID, IOVA, target.new, CONTEXT_NOT_PRESENT));
    REQUIRE(lands_on_new(SECOND, NO_PASID, IOVA, target));
}

static void left_running(void)
{
    struct page_table space = space_new();
    volatile u64 *page = page_new();

    map_leaf(&space, IOVA, gpa_of(page), LEVEL_4K, FS_READ_WRITE);
    for (unsigned n = 0; n < edu_count; n++)
        attach(&edus[n], &space, DOMAIN_A);
    REQUIRE(enable());
    for (unsigned n = 0; n < edu_count; n++)
        REQUIRE(write_arrives(&edus[n], NO_PASID, IOVA, page));
}

static const struct check list[] = {
    {"two devices, one table: one invalidation serves both", two_devices_one_table},
};
CHECK_GROUP(shared, list, setup_scalable, teardown);

static const struct check last[] = {
    {"every device on one table, translation left on", left_running},
};
CHECK_GROUP(last, last, setup_scalable, NULL);
