// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
// PASIDs, PASID-table entries and the caches that hold them.
#include "fixture.h"

enum { PASID_1 = 1, PASID_2 = 70 }; // the second lies in another PASID table

static bool device_has_pasid(void)
{
    if (!ecap_pasid())
        check_skip("ECAP.PASID is 0");
    else if (PASID_2 >> ecap_pasid_bits())
        check_skip("ECAP.PSS has too few bits for two PASID tables");
    else if (!DEVICE->has_pasid)
        check_skip("the device has no PASID capability");
    return !check_is_over();
}

static void pass_through(void)
{
    volatile u64 *page = page_new();

    SKIP_UNLESS(ecap_pass_through(), "ECAP.PT is 0");
    pasid_entry_pass_through(pasid_entry(directory_of(DEVICE), 0), DOMAIN_A);
    REQUIRE(enable());
    REQUIRE(write_arrives(DEVICE, NO_PASID, gpa_of(page), page));
    page[0] = 0x77;
    EXPECT(edu_read_from(DEVICE, NO_PASID, gpa_of(page), 2048, 8), "the read does not end");
    EXPECT(device_holds(DEVICE, NO_PASID, mailbox_gpa()) == 0x77, "a read brought something else");
}

static void rid_pasid(void)
{
    struct page_table wrong = space_new(), right = space_new();
    struct target target = target_new();

    SKIP_UNLESS(ecap_rid_pasid(), "ECAP.RPS is 0");
    map_leaf(&wrong, IOVA, gpa_of(target.old), LEVEL_4K, FS_READ_WRITE);
    map_leaf(&right, IOVA, gpa_of(target.new), LEVEL_4K, FS_READ_WRITE);
    attach(DEVICE, &wrong, DOMAIN_A);
    attach_pasid(DEVICE, PASID_2, &right, DOMAIN_B);
    context_of(DEVICE)[1] = PASID_2;
    REQUIRE(enable());
    REQUIRE(lands_on_new(DEVICE, NO_PASID, IOVA, target));
}

static void two_pasids(void)
{
    struct page_table spaces[3] = {space_new(), space_new(), space_new()};
    const u32 pasids[3] = {NO_PASID, PASID_1, PASID_2};
    volatile u64 *pages[3];

    REQUIRE(device_has_pasid());
    for (unsigned n = 0; n < 3; n++) {
        pages[n] = page_new();
        map_leaf(&spaces[n], IOVA, gpa_of(pages[n]), LEVEL_4K, FS_READ_WRITE);
        attach_pasid(DEVICE, n == 0 ? 0 : pasids[n], &spaces[n], (u16)(DOMAIN_A + n));
    }
    REQUIRE(enable());
    for (unsigned n = 0; n < 3; n++) {
        REQUIRE(write_arrives(DEVICE, pasids[n], IOVA, pages[n]));
        REQUIRE(read_arrives(DEVICE, pasids[n], IOVA + 8, pages[n]));
    }
    for (unsigned n = 0; n < 3; n++)
        EXPECT(pages[n][0] && !pages[n][2], "page %u changed elsewhere", n);
}

static void pasid_in_fault_record(void)
{
    struct page_table space = space_new();

    REQUIRE(device_has_pasid());
    attach_pasid(DEVICE, PASID_2, &space, DOMAIN_A);
    REQUIRE(enable());
    REQUIRE(write_faults(DEVICE, PASID_2, IOVA, NULL, FS_NOT_PRESENT));
    REQUIRE(read_faults(DEVICE, PASID_2, IOVA, FS_NOT_PRESENT));
}

static void pasid_without_entry(void)
{
    struct page_table space = space_new();

    REQUIRE(device_has_pasid());
    attach_pasid(DEVICE, PASID_1, &space, DOMAIN_A);
    REQUIRE(enable());
    REQUIRE(write_faults(DEVICE, PASID_1 + 1, IOVA, NULL, PASID_ENTRY_NOT_PRESENT));
    REQUIRE(write_faults(DEVICE, PASID_2, IOVA, NULL, PASID_DIRECTORY_NOT_PRESENT));
    REQUIRE(write_faults(DEVICE, NO_PASID, IOVA, NULL, PASID_ENTRY_NOT_PRESENT));
}

static void pasids_not_enabled(void)
{
    struct page_table space = space_new();

    REQUIRE(device_has_pasid());
    attach_pasid(DEVICE, PASID_1, &space, DOMAIN_A);
    context_of(DEVICE)[0] &= ~CONTEXT_PASIDE;
    REQUIRE(enable());
    REQUIRE(write_faults(DEVICE, PASID_1, IOVA, NULL, PASID_NOT_ENABLED));
}

static void pasid_beyond_directory(void)
{
    struct page_table space = space_new();

    REQUIRE(device_has_pasid());
    SKIP_UNLESS(ecap_pasid_bits() > 13, "PASIDs are not wider than the smallest directory");
    attach_pasid(DEVICE, PASID_1, &space, DOMAIN_A);
    REQUIRE(enable());
    REQUIRE(write_faults(DEVICE, 1 << 13, IOVA, NULL, PASID_BEYOND));
}

// What lets a PASID out is the capability (PCIe 7.8.9.3), not the register with the PASID.
static void pasids_not_enabled_in_device(void)
{
    struct page_table with = space_new(), without = space_new();
    struct target target = target_new();
    bool landed;

    REQUIRE(device_has_pasid());
    SKIP_UNLESS(!devices_assigned(), "the host's driver has enabled it, whatever this guest does");
    map_leaf(&with, IOVA, gpa_of(target.old), LEVEL_4K, FS_READ_WRITE);
    map_leaf(&without, IOVA, gpa_of(target.new), LEVEL_4K, FS_READ_WRITE);
    attach_pasid(DEVICE, PASID_1, &with, DOMAIN_A);
    attach(DEVICE, &without, DOMAIN_B);
    REQUIRE(enable());
    REQUIRE(lands_on_old(DEVICE, PASID_1, IOVA, target));
    edu_pasid_enable(DEVICE, false);
    landed = lands_on_new(DEVICE, PASID_1, IOVA, target);
    edu_pasid_enable(DEVICE, true);
    REQUIRE(landed);
    REQUIRE(lands_on_old(DEVICE, PASID_1, IOVA, target));
}

static void untranslated_with_pasid(void)
{
    volatile u64 *page = page_new();

    REQUIRE(device_has_pasid());
    REQUIRE(write_vanishes(DEVICE, PASID_1, gpa_of(page), page));
}

// The leaf of one PASID changes; the invalidation names that PASID, then the other's.
static void pasid_selective_invalidation(void)
{
    struct page_table spaces[2] = {space_new(), space_new()};
    struct target targets[2] = {target_new(), target_new()};
    const u32 pasids[2] = {PASID_1, PASID_2};

    REQUIRE(device_has_pasid());
    for (unsigned n = 0; n < 2; n++) {
        map_leaf(&spaces[n], IOVA, gpa_of(targets[n].old), LEVEL_4K, FS_READ_WRITE);
        attach_pasid(DEVICE, pasids[n], &spaces[n], DOMAIN_A);
    }
    REQUIRE(enable());
    for (unsigned n = 0; n < 2; n++) {
        REQUIRE(lands_on_old(DEVICE, pasids[n], IOVA, targets[n]));
        map_leaf(&spaces[n], IOVA, gpa_of(targets[n].new), LEVEL_4K, FS_READ_WRITE);
        REQUIRE(lands_on_stale(DEVICE, pasids[n], IOVA, targets[n]));
    }
    REQUIRE(invalidate(inv_pasid_iotlb(PASID_IOTLB_PAGE, DOMAIN_A, PASID_1, IOVA)));
    REQUIRE(lands_on_new(DEVICE, PASID_1, IOVA, targets[0]));
    REQUIRE(invalidate(inv_pasid_iotlb(PASID_IOTLB_PASID, DOMAIN_A, PASID_2, 0)));
    REQUIRE(lands_on_new(DEVICE, PASID_2, IOVA, targets[1]));
}

// The PASID-table entry is pointed at another table.
static void changed_entry(struct descriptor descriptor, u16 new_domain)
{
    struct page_table old = space_new(), new = space_new();
    struct target target = target_new();

    map_leaf(&old, IOVA, gpa_of(target.old), LEVEL_4K, FS_READ_WRITE);
    map_leaf(&new, IOVA, gpa_of(target.new), LEVEL_4K, FS_READ_WRITE);
    attach(DEVICE, &old, DOMAIN_A);
    REQUIRE(enable());
    REQUIRE(lands_on_old(DEVICE, NO_PASID, IOVA, target));
    attach(DEVICE, &new, new_domain);
    REQUIRE(lands_on_stale(DEVICE, NO_PASID, IOVA, target));
    REQUIRE(invalidate(descriptor));
    REQUIRE(invalidate(inv_pasid_iotlb(PASID_IOTLB_PASID, DOMAIN_A, 0, 0)));
    REQUIRE(lands_on_new(DEVICE, NO_PASID, IOVA, target));
}

static void entry_global(void) { changed_entry(inv_pasid_cache(PASID_CACHE_GLOBAL, 0, 0), DOMAIN_A); }
static void entry_domain(void) { changed_entry(inv_pasid_cache(PASID_CACHE_DOMAIN, DOMAIN_A, 0), DOMAIN_A); }
static void entry_pasid(void) { changed_entry(inv_pasid_cache(PASID_CACHE_PASID, DOMAIN_A, 0), DOMAIN_A); }
static void entry_and_domain(void) { changed_entry(inv_pasid_cache(PASID_CACHE_PASID, DOMAIN_A, 0), DOMAIN_B); }

static bool drop_entry(void)
{
    return invalidate(inv_pasid_cache(PASID_CACHE_PASID, DOMAIN_A, 0)) &&
           invalidate(inv_pasid_iotlb(PASID_IOTLB_PASID, DOMAIN_A, 0, 0));
}

static void type_changes(void)
{
    struct page_table space = space_new();
    struct target target = {page_new(), page_new()};
    u64 iova = gpa_of(target.new); // pass-through makes it the new page, stage 1 the old one
    u64 *entry;

    SKIP_UNLESS(ecap_pass_through(), "ECAP.PT is 0");
    map_leaf(&space, iova, gpa_of(target.old), LEVEL_4K, FS_READ_WRITE);
    entry = attach(DEVICE, &space, DOMAIN_A);
    REQUIRE(enable());
    REQUIRE(lands_on_old(DEVICE, NO_PASID, iova, target));
    pasid_entry_pass_through(entry, DOMAIN_A);
    REQUIRE(drop_entry());
    REQUIRE(lands_on_new(DEVICE, NO_PASID, iova, target));
    attach(DEVICE, &space, DOMAIN_A);
    REQUIRE(drop_entry());
    REQUIRE(lands_on_old(DEVICE, NO_PASID, iova, target));
}

static void entry_cleared(void)
{
    struct page_table space = space_new();
    volatile u64 *page = page_new();
    u64 *entry;

    map_leaf(&space, IOVA, gpa_of(page), LEVEL_4K, FS_READ_WRITE);
    entry = attach(DEVICE, &space, DOMAIN_A);
    REQUIRE(enable());
    REQUIRE(write_arrives(DEVICE, NO_PASID, IOVA, page));
    entry[0] &= ~ENTRY_P;
    REQUIRE(drop_entry());
    REQUIRE(write_faults(DEVICE, NO_PASID, IOVA, page, PASID_ENTRY_NOT_PRESENT));
}

static void entry_added(void)
{
    struct page_table space = space_new();
    volatile u64 *page = page_new();

    REQUIRE(device_has_pasid());
    map_leaf(&space, IOVA, gpa_of(page), LEVEL_4K, FS_READ_WRITE);
    attach_pasid(DEVICE, PASID_1, &space, DOMAIN_A);
    REQUIRE(enable());
    REQUIRE(write_arrives(DEVICE, PASID_1, IOVA, page));
    REQUIRE(write_faults(DEVICE, PASID_2, IOVA, page, PASID_DIRECTORY_NOT_PRESENT));
    attach_pasid(DEVICE, PASID_2, &space, DOMAIN_A);
    REQUIRE(mend());
    REQUIRE(write_arrives(DEVICE, PASID_2, IOVA, page));
}

// The context entry is pointed at another PASID directory.
static void changed_directory(void)
{
    struct page_table old = space_new(), new = space_new();
    struct target target = target_new();

    map_leaf(&old, IOVA, gpa_of(target.old), LEVEL_4K, FS_READ_WRITE);
    map_leaf(&new, IOVA, gpa_of(target.new), LEVEL_4K, FS_READ_WRITE);
    attach(DEVICE, &old, DOMAIN_A);
    REQUIRE(enable());
    REQUIRE(lands_on_old(DEVICE, NO_PASID, IOVA, target));
    (void)scalable_context_set(context_of(DEVICE));
    attach(DEVICE, &new, DOMAIN_B);
    REQUIRE(invalidate(inv_context(CONTEXT_DEVICE, 0, DEVICE->id)));
    REQUIRE(invalidate(inv_pasid_cache(PASID_CACHE_DOMAIN, DOMAIN_A, 0)));
    REQUIRE(invalidate(inv_pasid_iotlb(PASID_IOTLB_PASID, DOMAIN_A, 0, 0)));
    REQUIRE(lands_on_new(DEVICE, NO_PASID, IOVA, target));
}

static const struct check list[] = {
    {"pass-through entry", pass_through},
    {"RID_PASID chooses the entry of requests without PASID", rid_pasid},
    {"two PASIDs and none, three tables", two_pasids},
    {"fault record carries the PASID", pasid_in_fault_record},
    {"PASID without entry: faults 59h and 51h", pasid_without_entry},
    {"PASIDs not enabled in the context entry: fault 45h", pasids_not_enabled},
    {"PASID beyond the directory: fault 46h", pasid_beyond_directory},
    {"no PASID goes out of a device whose capability is not enabled", pasids_not_enabled_in_device},
    {"a PASID while translation is off is blocked", untranslated_with_pasid},
    {"PASID-IOTLB invalidation, each PASID by itself", pasid_selective_invalidation},
    {"changed table pointer: PASID cache, global", entry_global},
    {"changed table pointer: PASID cache, domain-selective", entry_domain},
    {"changed table pointer: PASID cache, PASID-selective", entry_pasid},
    {"changed table pointer and domain: PASID cache of the old domain", entry_and_domain},
    {"first stage to pass-through and back", type_changes},
    {"entry made not present: fault 59h", entry_cleared},
    {"entry that becomes present, told of in caching mode alone", entry_added},
    {"changed PASID directory: context cache, device-selective", changed_directory},
};
CHECK_GROUP(pasid, list, setup_scalable, teardown);
