// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
// First stage: a changed entry keeps its old meaning until it is invalidated, and has its new one
// from the moment the invalidation is complete.
#include "fixture.h"

// AM of 2 MiB.
#define LARGE_MASK 9

static struct descriptor iotlb_global(void)
{
    return inv_iotlb(IOTLB_GLOBAL, 0, 0);
}

static struct descriptor pasid_selective(void)
{
    return inv_pasid_iotlb(PASID_IOTLB_PASID, DOMAIN_A, 0, 0);
}

static struct descriptor pasid_page(void)
{
    return inv_pasid_iotlb(PASID_IOTLB_PAGE, DOMAIN_A, 0, IOVA);
}

static struct descriptor pasid_page_leaf_only(void)
{
    return inv_pasid_iotlb(PASID_IOTLB_PAGE, DOMAIN_A, 0, IOVA | INVALIDATION_HINT);
}

// One leaf of `level` changes from `old` to `new`; the device uses `offset` in it.
static void changed_leaf(enum page_level level, u64 old, u64 new, u64 offset, struct descriptor descriptor)
{
    struct page_table space = space_new();
    struct target target = {(void *)(old + (offset & ~7ull)), (void *)(new + (offset & ~7ull))};

    map_leaf(&space, IOVA, old, level, FS_READ_WRITE);
    attach(DEVICE, &space, DOMAIN_A);
    REQUIRE(enable());
    REQUIRE(lands_on_old(DEVICE, NO_PASID, IOVA + offset, target));
    map_leaf(&space, IOVA, new, level, FS_READ_WRITE);
    REQUIRE(lands_on_stale(DEVICE, NO_PASID, IOVA + offset, target));
    REQUIRE(invalidate(descriptor));
    REQUIRE(lands_on_new(DEVICE, NO_PASID, IOVA + offset, target));
}

static void changed_4k(struct descriptor descriptor)
{
    changed_leaf(LEVEL_4K, gpa_of(page_new()), gpa_of(page_new()), 0, descriptor);
}

static void changed_2m(struct descriptor descriptor)
{
    changed_leaf(LEVEL_2M, LARGE_REGION_A, LARGE_REGION_B, 5 * PAGE_SIZE, descriptor);
}

static void leaf_iotlb_global(void) { changed_4k(iotlb_global()); }
static void leaf_pasid_selective(void) { changed_4k(pasid_selective()); }
static void leaf_pasid_page(void) { changed_4k(pasid_page()); }
static void leaf_pasid_page_hint(void) { changed_4k(pasid_page_leaf_only()); }
static void large_iotlb_global(void) { changed_2m(iotlb_global()); }
static void large_pasid_selective(void) { changed_2m(pasid_selective()); }
// A large page needs a mask of its size (VT-d 6.5.2.4); the address may be of any page inside.
static void large_pasid_page(void)
{
    SKIP_UNLESS(cap_mamv() >= LARGE_MASK, "CAP.MAMV is below 9");
    changed_2m(inv_pasid_iotlb(PASID_IOTLB_PAGE, DOMAIN_A, 0, (IOVA + 300 * PAGE_SIZE) | LARGE_MASK));
}

// Without a PASID the addresses are those of second-stage tables; all first-stage entries are
// dropped (6.5.2.3).
static void leaf_iotlb_page(void)
{
    SKIP_UNLESS(cap_psi(), "CAP.PSI is 0");
    changed_4k(inv_iotlb(IOTLB_PAGE, DOMAIN_A, (IOVA + 300 * PAGE_SIZE) | INVALIDATION_HINT));
}

// Eight pages change; the mask makes the low bits of the address irrelevant.
static void page_range(void)
{
    struct page_table space = space_new();
    struct target targets[8];

    SKIP_UNLESS(cap_mamv() >= 3, "CAP.MAMV is below 3");
    attach(DEVICE, &space, DOMAIN_A);
    for (unsigned n = 0; n < 8; n++) {
        targets[n] = target_new();
        map_leaf(&space, IOVA + n * PAGE_SIZE, gpa_of(targets[n].old), LEVEL_4K, FS_READ_WRITE);
    }
    REQUIRE(enable());
    for (unsigned n = 0; n < 8; n += 7)
        REQUIRE(lands_on_old(DEVICE, NO_PASID, IOVA + n * PAGE_SIZE, targets[n]));
    for (unsigned n = 0; n < 8; n++)
        map_leaf(&space, IOVA + n * PAGE_SIZE, gpa_of(targets[n].new), LEVEL_4K, FS_READ_WRITE);
    for (unsigned n = 0; n < 8; n += 7)
        REQUIRE(lands_on_stale(DEVICE, NO_PASID, IOVA + n * PAGE_SIZE, targets[n]));
    REQUIRE(invalidate(inv_pasid_iotlb(PASID_IOTLB_PAGE, DOMAIN_A, 0, (IOVA + 5 * PAGE_SIZE) | 3)));
    for (unsigned n = 0; n < 8; n++)
        REQUIRE(lands_on_new(DEVICE, NO_PASID, IOVA + n * PAGE_SIZE, targets[n]));
}

// A directory entry, not a leaf, changes: a page-selective invalidation without IH covers it.
static void changed_directory(void)
{
    struct page_table space = space_new(), other = first_stage_new(4);
    struct target target = target_new();

    map_leaf(&space, IOVA, gpa_of(target.old), LEVEL_4K, FS_READ_WRITE);
    map_leaf(&other, IOVA, gpa_of(target.new), LEVEL_4K, FS_READ_WRITE);
    attach(DEVICE, &space, DOMAIN_A);
    REQUIRE(enable());
    REQUIRE(lands_on_old(DEVICE, NO_PASID, IOVA, target));
    *table_entry(&space, IOVA, 2) = *table_entry(&other, IOVA, 2);
    REQUIRE(lands_on_stale(DEVICE, NO_PASID, IOVA, target));
    REQUIRE(invalidate(pasid_page()));
    REQUIRE(lands_on_new(DEVICE, NO_PASID, IOVA, target));
}

static void split_large_page(void)
{
    struct page_table space = space_new();
    struct target target = {(void *)LARGE_REGION_A, page_new()};
    u64 *leaf;

    SKIP_UNLESS(cap_mamv() >= LARGE_MASK, "CAP.MAMV is below 9");
    leaf = map_leaf(&space, IOVA, LARGE_REGION_A, LEVEL_2M, FS_READ_WRITE);
    attach(DEVICE, &space, DOMAIN_A);
    REQUIRE(enable());
    REQUIRE(lands_on_old(DEVICE, NO_PASID, IOVA, target));
    *leaf = 0;
    map_leaf(&space, IOVA, gpa_of(target.new), LEVEL_4K, FS_READ_WRITE);
    REQUIRE(lands_on_stale(DEVICE, NO_PASID, IOVA, target));
    REQUIRE(invalidate(inv_pasid_iotlb(PASID_IOTLB_PAGE, DOMAIN_A, 0, IOVA | LARGE_MASK)));
    REQUIRE(lands_on_new(DEVICE, NO_PASID, IOVA, target));
}

static void unmapped(void)
{
    struct page_table space = space_new();
    struct target target = target_new();
    u64 *leaf = map_leaf(&space, IOVA, gpa_of(target.old), LEVEL_4K, FS_READ_WRITE);

    attach(DEVICE, &space, DOMAIN_A);
    REQUIRE(enable());
    REQUIRE(lands_on_old(DEVICE, NO_PASID, IOVA, target));
    *leaf = 0;
    REQUIRE(invalidate(pasid_page()));
    REQUIRE(write_faults(DEVICE, NO_PASID, IOVA, target.old, FS_NOT_PRESENT));
}

static void made_read_only(void)
{
    struct page_table space = space_new();
    volatile u64 *page = page_new();

    map_leaf(&space, IOVA, gpa_of(page), LEVEL_4K, FS_READ_WRITE);
    attach(DEVICE, &space, DOMAIN_A);
    REQUIRE(enable());
    REQUIRE(write_arrives(DEVICE, NO_PASID, IOVA, page));
    map_leaf(&space, IOVA, gpa_of(page), LEVEL_4K, FS_READ_ONLY);
    REQUIRE(invalidate(pasid_page_leaf_only()));
    REQUIRE(write_faults(DEVICE, NO_PASID, IOVA, page, NO_WRITE));
    REQUIRE(read_arrives(DEVICE, NO_PASID, IOVA, page));
}

// First-stage entries that are not present are never cached, not even in caching mode.
static void newly_mapped(void)
{
    struct page_table space = space_new();
    volatile u64 *page = page_new();

    require_hardware_walk();
    attach(DEVICE, &space, DOMAIN_A);
    REQUIRE(enable());
    REQUIRE(write_faults(DEVICE, NO_PASID, IOVA, page, FS_NOT_PRESENT));
    map_leaf(&space, IOVA, gpa_of(page), LEVEL_4K, FS_READ_WRITE);
    REQUIRE(write_arrives(DEVICE, NO_PASID, IOVA, page));
}

static void batch(void)
{
    struct page_table space = space_new();
    struct target target = target_new();

    map_leaf(&space, IOVA, gpa_of(target.old), LEVEL_4K, FS_READ_WRITE);
    attach(DEVICE, &space, DOMAIN_A);
    REQUIRE(enable());
    REQUIRE(lands_on_old(DEVICE, NO_PASID, IOVA, target));
    map_leaf(&space, IOVA, gpa_of(target.new), LEVEL_4K, FS_READ_WRITE);
    for (unsigned n = 1; n < 32; n++)
        queue_put(inv_pasid_iotlb(PASID_IOTLB_PAGE, DOMAIN_A, 0, IOVA + n * PAGE_SIZE));
    REQUIRE(invalidate(pasid_page()));
    REQUIRE(lands_on_new(DEVICE, NO_PASID, IOVA, target));
}

// The same page in the other device's table, with another domain ID.
static void each_device_its_own(void)
{
    struct page_table spaces[2] = {space_new(), space_new()};
    struct target targets[2] = {target_new(), target_new()};

    SKIP_UNLESS(edu_count > 1, "one edu only");
    for (unsigned n = 0; n < 2; n++) {
        map_leaf(&spaces[n], IOVA, gpa_of(targets[n].old), LEVEL_4K, FS_READ_WRITE);
        attach(&edus[n], &spaces[n], (u16)(DOMAIN_A + n));
    }
    REQUIRE(enable());
    for (unsigned n = 0; n < 2; n++)
        REQUIRE(lands_on_old(&edus[n], NO_PASID, IOVA, targets[n]));
    for (unsigned n = 0; n < 2; n++)
        map_leaf(&spaces[n], IOVA, gpa_of(targets[n].new), LEVEL_4K, FS_READ_WRITE);
    REQUIRE(invalidate(inv_pasid_iotlb(PASID_IOTLB_PAGE, DOMAIN_A, 0, IOVA)));
    REQUIRE(lands_on_new(DEVICE, NO_PASID, IOVA, targets[0]));
    REQUIRE(invalidate(inv_pasid_iotlb(PASID_IOTLB_PAGE, DOMAIN_B, 0, IOVA)));
    REQUIRE(lands_on_new(SECOND, NO_PASID, IOVA, targets[1]));
}

static const struct check list[] = {
    {"4 KiB leaf: IOTLB, global", leaf_iotlb_global},
    {"4 KiB leaf: IOTLB, page-selective, another page", leaf_iotlb_page},
    {"4 KiB leaf: PASID-IOTLB, PASID-selective", leaf_pasid_selective},
    {"4 KiB leaf: PASID-IOTLB, page-selective", leaf_pasid_page},
    {"4 KiB leaf: PASID-IOTLB, page-selective, leaf only (IH)", leaf_pasid_page_hint},
    {"2 MiB leaf: IOTLB, global", large_iotlb_global},
    {"2 MiB leaf: PASID-IOTLB, PASID-selective", large_pasid_selective},
    {"2 MiB leaf: PASID-IOTLB, page-selective with mask 9", large_pasid_page},
    {"8 pages: PASID-IOTLB, page-selective with mask 3", page_range},
    {"directory entry: PASID-IOTLB, page-selective", changed_directory},
    {"2 MiB page split: PASID-IOTLB, page-selective", split_large_page},
    {"unmapped page faults after invalidation", unmapped},
    {"page made read-only faults after invalidation", made_read_only},
    {"newly mapped page needs no invalidation", newly_mapped},
    {"one among 32 invalidations of a batch", batch},
    {"two devices, two tables, two domains", each_device_its_own},
};
CHECK_GROUP(stale_first_stage, list, setup_scalable, teardown);
