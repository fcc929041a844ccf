// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
// Nested translation: a changed entry of either stage keeps its old meaning until it is invalidated,
// and has its new one from the moment the invalidation is complete.
#include "nested.h"

// The leaf of the first stage changes.
static void first_changes(struct descriptor descriptor)
{
    struct nested nested = nested_new();
    struct target target = target_new();

    (void)nested_map(&nested, IOVA, target.old, FS_READ_WRITE);
    (void)nested_show(&nested, target.new, SS_READ_WRITE);
    attach_nested(0, &nested);
    REQUIRE(enable());
    REQUIRE(lands_on_old(DEVICE, NO_PASID, IOVA, target));
    map_leaf(&nested.first, IOVA, shown_at(target.new), LEVEL_4K, FS_READ_WRITE);
    REQUIRE(lands_on_stale(DEVICE, NO_PASID, IOVA, target));
    REQUIRE(invalidate(descriptor));
    REQUIRE(lands_on_new(DEVICE, NO_PASID, IOVA, target));
}

static void first_by_page(void) { first_changes(inv_pasid_iotlb(PASID_IOTLB_PAGE, DOMAIN_A, 0, IOVA)); }
static void first_by_pasid(void) { first_changes(inv_pasid_iotlb(PASID_IOTLB_PASID, DOMAIN_A, 0, 0)); }

// Without a PASID, what both stages translated goes, whatever address of the second stage is named.
static void first_by_other_page(void)
{
    SKIP_UNLESS(cap_psi(), "CAP.PSI is 0");
    first_changes(inv_iotlb(IOTLB_PAGE, DOMAIN_A, MOVED + LARGE_REGION_A));
}

static void first_by_domain(void) { first_changes(inv_iotlb(IOTLB_DOMAIN, DOMAIN_A, 0)); }

// The second stage shows another page at the same address; `descriptor` names that address if
// `by_page`.
static void second_changes(struct descriptor descriptor, bool by_page)
{
    struct nested nested = nested_new();
    struct target target = target_new();

    (void)nested_map(&nested, IOVA, target.old, FS_READ_WRITE);
    attach_nested(0, &nested);
    REQUIRE(enable());
    REQUIRE(lands_on_old(DEVICE, NO_PASID, IOVA, target));
    map_leaf(&nested.second, shown_at(target.old), gpa_of(target.new), LEVEL_4K, SS_READ_WRITE);
    REQUIRE(lands_on_stale(DEVICE, NO_PASID, IOVA, target));
    if (by_page)
        descriptor.high = shown_at(target.old);
    REQUIRE(invalidate(descriptor));
    REQUIRE(lands_on_new(DEVICE, NO_PASID, IOVA, target));
}

static void second_by_page(void)
{
    SKIP_UNLESS(cap_psi(), "CAP.PSI is 0");
    second_changes(inv_iotlb(IOTLB_PAGE, DOMAIN_A, 0), true);
}

static void second_by_domain(void) { second_changes(inv_iotlb(IOTLB_DOMAIN, DOMAIN_A, 0), false); }
static void second_globally(void) { second_changes(inv_iotlb(IOTLB_GLOBAL, 0, 0), false); }

static void large_by_page(void)
{
    struct nested nested = nested_new();
    struct target target = {(void *)LARGE_REGION_A, (void *)LARGE_REGION_B};

    SKIP_UNLESS(cap_psi() && cap_ss_2m() && cap_mamv() >= 9, "no 2 MiB pages, or no mask for them");
    (void)nested_map(&nested, IOVA, page_new(), FS_READ_WRITE);
    map_leaf(&nested.first, IOVA, shown_at(target.old), LEVEL_4K, FS_READ_WRITE);
    map_leaf(&nested.second, MOVED + LARGE_REGION_A, LARGE_REGION_A, LEVEL_2M, SS_READ_WRITE);
    attach_nested(0, &nested);
    REQUIRE(enable());
    REQUIRE(lands_on_old(DEVICE, NO_PASID, IOVA, target));
    map_leaf(&nested.second, MOVED + LARGE_REGION_A, LARGE_REGION_B, LEVEL_2M, SS_READ_WRITE);
    REQUIRE(lands_on_stale(DEVICE, NO_PASID, IOVA, target));
    REQUIRE(invalidate(inv_iotlb(IOTLB_PAGE, DOMAIN_A, (MOVED + LARGE_REGION_A) | 9)));
    REQUIRE(lands_on_new(DEVICE, NO_PASID, IOVA, target));
}

// The second stage shows a copy of a first-stage table, whose leaf differs.
static void table_moves(void)
{
    struct nested nested = nested_new();
    struct target target = target_new();
    u64 *leaf = nested_map(&nested, IOVA, target.old, FS_READ_WRITE), *copy = page_new();

    SKIP_UNLESS(cap_psi(), "CAP.PSI is 0");
    (void)nested_show(&nested, target.new, SS_READ_WRITE);
    copy[(gpa_of(leaf) & (PAGE_SIZE - 1)) / sizeof(*copy)] = shown_at(target.new) | FS_READ_WRITE;
    attach_nested(0, &nested);
    REQUIRE(enable());
    REQUIRE(lands_on_old(DEVICE, NO_PASID, IOVA, target));
    leaf = first_table(&nested, IOVA, LEVEL_4K);
    map_leaf(&nested.second, shown_at(leaf), gpa_of(copy), LEVEL_4K, SS_READ_WRITE);
    REQUIRE(lands_on_stale(DEVICE, NO_PASID, IOVA, target));
    REQUIRE(invalidate(inv_iotlb(IOTLB_PAGE, DOMAIN_A, shown_at(leaf))));
    REQUIRE(lands_on_new(DEVICE, NO_PASID, IOVA, target));
}

// One invalidation of the domain serves every PASID over its second stage.
static void serves_both(void)
{
    struct nested one = nested_new(), two = nested_over(one.second);
    struct target target = target_new();
    const u32 pasids[2] = {PASID_1, PASID_2};

    REQUIRE(device_has_both_pasids());
    SKIP_UNLESS(cap_psi(), "CAP.PSI is 0");
    (void)nested_map(&one, IOVA, target.old, FS_READ_WRITE);
    (void)nested_map(&two, IOVA, target.old, FS_READ_WRITE);
    attach_nested(PASID_1, &one);
    attach_nested(PASID_2, &two);
    REQUIRE(enable());
    for (unsigned n = 0; n < 2; n++)
        REQUIRE(lands_on_old(DEVICE, pasids[n], IOVA, target));
    map_leaf(&one.second, shown_at(target.old), gpa_of(target.new), LEVEL_4K, SS_READ_WRITE);
    for (unsigned n = 0; n < 2; n++)
        REQUIRE(lands_on_stale(DEVICE, pasids[n], IOVA, target));
    REQUIRE(invalidate(inv_iotlb(IOTLB_PAGE, DOMAIN_A, shown_at(target.old))));
    for (unsigned n = 0; n < 2; n++)
        REQUIRE(lands_on_new(DEVICE, pasids[n], IOVA, target));
}

static void taken_away(void)
{
    struct nested nested = nested_new();
    struct target target = target_new();

    SKIP_UNLESS(cap_psi(), "CAP.PSI is 0");
    (void)nested_map(&nested, IOVA, target.old, FS_READ_WRITE);
    attach_nested(0, &nested);
    REQUIRE(enable());
    REQUIRE(lands_on_old(DEVICE, NO_PASID, IOVA, target));
    *nested_show(&nested, target.old, SS_READ_WRITE) = 0;
    REQUIRE(invalidate(inv_iotlb(IOTLB_PAGE, DOMAIN_A, shown_at(target.old))));
    REQUIRE(write_faults(DEVICE, NO_PASID, IOVA, target.old, SS_PERMISSION));
}

// The PASID-table entry is pointed at another second stage.
static void changed_entry(void)
{
    struct nested nested = nested_new(), other = nested_new();
    struct target target = target_new();

    (void)nested_map(&nested, IOVA, target.old, FS_READ_WRITE);
    other.first = nested.first;
    (void)nested_map(&other, IOVA, target.old, FS_READ_WRITE);
    map_leaf(&other.second, shown_at(target.old), gpa_of(target.new), LEVEL_4K, SS_READ_WRITE);
    attach_nested(0, &nested);
    REQUIRE(enable());
    REQUIRE(lands_on_old(DEVICE, NO_PASID, IOVA, target));
    attach_nested(0, &other);
    REQUIRE(lands_on_stale(DEVICE, NO_PASID, IOVA, target));
    REQUIRE(invalidate(inv_pasid_cache(PASID_CACHE_PASID, DOMAIN_A, 0)));
    REQUIRE(invalidate(inv_iotlb(IOTLB_DOMAIN, DOMAIN_A, 0)));
    REQUIRE(lands_on_new(DEVICE, NO_PASID, IOVA, target));
}

static const struct check list[] = {
    {"leaf of the first stage: PASID-IOTLB, page-selective (6.5.2.4)", first_by_page},
    {"leaf of the first stage: PASID-IOTLB, PASID-selective (6.5.2.4)", first_by_pasid},
    {"leaf of the first stage: IOTLB, page-selective, another page (6.5.2.3)", first_by_other_page},
    {"leaf of the first stage: IOTLB, domain-selective (6.5.2.3)", first_by_domain},
    {"leaf of the second stage: IOTLB, page-selective (6.5.2.3)", second_by_page},
    {"leaf of the second stage: IOTLB, domain-selective (6.5.2.3)", second_by_domain},
    {"leaf of the second stage: IOTLB, global (6.5.2.3)", second_globally},
    {"2 MiB leaf of the second stage: IOTLB, page-selective (6.5.2.3)", large_by_page},
    {"first-stage table moved by the second stage: IOTLB, page-selective (6.5.2.3)", table_moves},
    {"two PASIDs over one second stage: one IOTLB, page-selective (6.5.2.3)", serves_both},
    {"page taken away by the second stage: fault 79h after the invalidation (6.5.2.3)", taken_away},
    {"changed second stage of the PASID-table entry: PASID cache, IOTLB (6.5.3.3)", changed_entry},
};
CHECK_GROUP(stale_nested, list, setup_scalable, teardown);
