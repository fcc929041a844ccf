// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
// Blocked by default: with translation enabled, a device reaches memory only while every table from
// the root down allows it.
#include "fixture.h"

static void legacy_empty_root(void)
{
    volatile u64 *page = page_new();

    REQUIRE(enable());
    REQUIRE(write_faults(DEVICE, NO_PASID, gpa_of(page), page, LEGACY_ROOT_NOT_PRESENT));
    REQUIRE(read_faults(DEVICE, NO_PASID, gpa_of(page), LEGACY_ROOT_NOT_PRESENT));
}

static void legacy_empty_context(void)
{
    volatile u64 *page = page_new();

    (void)legacy_context(root, DEVICE->id);
    REQUIRE(enable());
    REQUIRE(write_faults(DEVICE, NO_PASID, gpa_of(page), page, LEGACY_CONTEXT_NOT_PRESENT));
}

static void empty_root(void)
{
    volatile u64 *page = page_new();

    REQUIRE(enable());
    REQUIRE(write_faults(DEVICE, NO_PASID, gpa_of(page), page, ROOT_NOT_PRESENT));
    REQUIRE(read_faults(DEVICE, NO_PASID, gpa_of(page), ROOT_NOT_PRESENT));
}

static void empty_context(void)
{
    volatile u64 *page = page_new();

    (void)context_of(DEVICE);
    REQUIRE(enable());
    REQUIRE(write_faults(DEVICE, NO_PASID, gpa_of(page), page, CONTEXT_NOT_PRESENT));
}

static void empty_pasid_directory(void)
{
    volatile u64 *page = page_new();

    (void)directory_of(DEVICE);
    REQUIRE(enable());
    REQUIRE(write_faults(DEVICE, NO_PASID, gpa_of(page), page, PASID_DIRECTORY_NOT_PRESENT));
}

static void empty_pasid_entry(void)
{
    volatile u64 *page = page_new();

    (void)pasid_entry(directory_of(DEVICE), 0);
    REQUIRE(enable());
    REQUIRE(write_faults(DEVICE, NO_PASID, gpa_of(page), page, PASID_ENTRY_NOT_PRESENT));
}

static void other_device_stays_blocked(void)
{
    struct page_table space = space_new();
    volatile u64 *page = page_new();
    bool same_table;

    SKIP_UNLESS(edu_count > 1, "one edu only");
    map_leaf(&space, IOVA, gpa_of(page), LEVEL_4K, FS_READ_WRITE);
    attach(DEVICE, &space, DOMAIN_A);
    REQUIRE(enable());
    REQUIRE(write_arrives(DEVICE, NO_PASID, IOVA, page));
    // On another bus, or in the other half of one, it has another context table.
    same_table = SECOND->id >> 7 == DEVICE->id >> 7;
    REQUIRE(write_faults(SECOND, NO_PASID, IOVA, page, same_table ? CONTEXT_NOT_PRESENT : ROOT_NOT_PRESENT));
}

// Behind a bridge to PCI there are devices with one Requester ID.
static void same_requester(void)
{
    const struct edu *other = edu_sharing(DEVICE);
    struct page_table space = space_new();
    volatile u64 *page = page_new();

    map_leaf(&space, IOVA, gpa_of(page), LEVEL_4K, FS_READ_WRITE);
    (void)context_of(DEVICE);
    REQUIRE(enable());
    REQUIRE(write_faults(other, NO_PASID, IOVA, page, CONTEXT_NOT_PRESENT));
    attach(DEVICE, &space, DOMAIN_A);
    REQUIRE(mend());
    REQUIRE(write_arrives(DEVICE, NO_PASID, IOVA, page));
    EXPECT(edu_read_from(other, NO_PASID, IOVA, 0, 8), "the other's read does not end");
    page[0] = 0;
    EXPECT(edu_write_to(other, NO_PASID, IOVA, 0, 8) && page[0], "the other is blocked");
}

static void refused_read_brings_nothing(void)
{
    struct page_table space = space_new();
    volatile u64 *page = page_new();

    page[0] = 0x5ec8e7;
    attach(DEVICE, &space, DOMAIN_A);
    REQUIRE(enable());
    REQUIRE(read_faults(DEVICE, NO_PASID, gpa_of(page), FS_NOT_PRESENT));
    EXPECT(device_holds(DEVICE, NO_PASID, IOVA_MAILBOX) != page[0], "the device holds what it must not see");
}

static void entry_removed(void)
{
    struct page_table space = space_new();
    volatile u64 *page = page_new();

    map_leaf(&space, IOVA, gpa_of(page), LEVEL_4K, FS_READ_WRITE);
    attach(DEVICE, &space, DOMAIN_A);
    REQUIRE(enable());
    REQUIRE(write_arrives(DEVICE, NO_PASID, IOVA, page));
    context_of(DEVICE)[0] = 0;
    REQUIRE(invalidate(inv_context(CONTEXT_DEVICE, 0, DEVICE->id)));
    REQUIRE(invalidate(inv_pasid_cache(PASID_CACHE_GLOBAL, 0, 0)));
    REQUIRE(invalidate(inv_iotlb(IOTLB_GLOBAL, 0, 0)));
    REQUIRE(write_faults(DEVICE, NO_PASID, IOVA, page, CONTEXT_NOT_PRESENT));
}

// Non-present entries become present, one by one.
static void entries_added(void)
{
    struct page_table space = space_new();
    volatile u64 *page = page_new();

    map_leaf(&space, IOVA, gpa_of(page), LEVEL_4K, FS_READ_WRITE);
    REQUIRE(enable());
    REQUIRE(write_faults(DEVICE, NO_PASID, IOVA, page, ROOT_NOT_PRESENT));
    (void)context_of(DEVICE);
    REQUIRE(mend());
    REQUIRE(write_faults(DEVICE, NO_PASID, IOVA, page, CONTEXT_NOT_PRESENT));
    (void)directory_of(DEVICE);
    REQUIRE(mend());
    REQUIRE(write_faults(DEVICE, NO_PASID, IOVA, page, PASID_DIRECTORY_NOT_PRESENT));
    attach(DEVICE, &space, DOMAIN_A);
    REQUIRE(mend());
    REQUIRE(write_arrives(DEVICE, NO_PASID, IOVA, page));
}

static void disable_and_enable(void)
{
    volatile u64 *page = page_new();
    struct page_table space = space_new();
    struct target mapped = target_new();

    map_leaf(&space, IOVA, gpa_of(mapped.new), LEVEL_4K, FS_READ_WRITE);
    attach(DEVICE, &space, DOMAIN_A);
    REQUIRE(write_arrives(DEVICE, NO_PASID, gpa_of(page), page));
    REQUIRE(enable());
    REQUIRE(write_faults(DEVICE, NO_PASID, gpa_of(page), page, FS_NOT_PRESENT));
    EXPECT(vtd_switch(GCMD_TE, false), "GSTS.TES does not clear");
    REQUIRE(write_arrives(DEVICE, NO_PASID, gpa_of(page), page));
    REQUIRE(enable());
    REQUIRE(write_faults(DEVICE, NO_PASID, gpa_of(page), page, FS_NOT_PRESENT));
    REQUIRE(write_arrives(DEVICE, NO_PASID, IOVA, mapped.new));
}

static void root_only_with_srtp(void)
{
    struct page_table space = space_new();
    volatile u64 *page = page_new();

    map_leaf(&space, IOVA, gpa_of(page), LEVEL_4K, FS_READ_WRITE);
    attach(DEVICE, &space, DOMAIN_A);
    REQUIRE(enable());
    vtd_write64(VTD_RTADDR, gpa_of(page_new()) | RTADDR_SCALABLE);
    REQUIRE(queue_invalidate_all());
    REQUIRE(write_arrives(DEVICE, NO_PASID, IOVA, page));
}

static void new_root(void)
{
    struct page_table space = space_new();
    volatile u64 *page = page_new();

    map_leaf(&space, IOVA, gpa_of(page), LEVEL_4K, FS_READ_WRITE);
    attach(DEVICE, &space, DOMAIN_A);
    REQUIRE(enable());
    REQUIRE(write_arrives(DEVICE, NO_PASID, IOVA, page));
    EXPECT(vtd_set_root(gpa_of(page_new()) | RTADDR_SCALABLE), "GCMD.SRTP never showed in GSTS");
    REQUIRE(queue_invalidate_all());
    REQUIRE(write_faults(DEVICE, NO_PASID, IOVA, page, ROOT_NOT_PRESENT));
}

static const struct check legacy[] = {
    {"legacy mode, empty root table", legacy_empty_root},
    {"legacy mode, context entry not present", legacy_empty_context},
};
CHECK_GROUP(legacy_blocked, legacy, setup_legacy_queue, teardown);

static const struct check scalable[] = {
    {"empty root table", empty_root},
    {"context entry not present", empty_context},
    {"PASID-directory entry not present", empty_pasid_directory},
    {"PASID-table entry not present", empty_pasid_entry},
    {"a device beside an attached one", other_device_stays_blocked},
    {"a refused read brings the device no byte", refused_read_brings_nothing},
    {"a context entry taken away", entry_removed},
    {"entries that become present, told of in caching mode alone", entries_added},
    {"untranslated while disabled, translated again when enabled", disable_and_enable},
    {"RTADDR without SRTP changes nothing", root_only_with_srtp},
    {"a new root table, empty, blocks", new_root},
};
CHECK_GROUP(blocked, scalable, setup_scalable, teardown);

static const struct check shared[] = {
    {"devices with one Requester ID are blocked and translated together", same_requester},
};
CHECK_GROUP(same_requester, shared, setup_scalable, teardown);
