// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
// Second stage and legacy context entries: stale until invalidated, new from then on; by queue and
// by register.
#include "fixture.h"

// How to invalidate: by queue or by registers, depending on the setup.
struct invalidation {
    struct descriptor descriptor;
    unsigned granularity;
    u64 address;
    unsigned mask;
};

static bool tell(struct invalidation how)
{
    if (vtd_read32(VTD_GSTS) & GCMD_QIE)
        return invalidate(how.descriptor);
    if (!vtd_invalidate_iotlb(how.granularity, DOMAIN_A, how.address, how.mask))
        check_fail("the IOTLB register did not do granularity %u", how.granularity);
    return !check_is_over();
}

static struct invalidation iotlb(unsigned granularity, u64 address, unsigned mask)
{
    return (struct invalidation){inv_iotlb(granularity, DOMAIN_A, address | mask), granularity, address, mask};
}

static void attach_here(struct page_table *space)
{
    if (vtd_read64(VTD_RTADDR) & RTADDR_SCALABLE)
        attach(DEVICE, space, DOMAIN_A);
    else
        attach_legacy(DEVICE, space, DOMAIN_A);
}

// `count` pages change.
static void changed_pages(unsigned count, struct invalidation how)
{
    struct page_table space = second_stage_space_new();
    struct target targets[4];

    for (unsigned n = 0; n < count; n++) {
        targets[n] = target_new();
        map_leaf(&space, IOVA + n * PAGE_SIZE, gpa_of(targets[n].old), LEVEL_4K, SS_READ_WRITE);
    }
    attach_here(&space);
    REQUIRE(enable());
    for (unsigned n = 0; n < count; n++)
        REQUIRE(lands_on_old(DEVICE, NO_PASID, IOVA + n * PAGE_SIZE, targets[n]));
    for (unsigned n = 0; n < count; n++)
        map_leaf(&space, IOVA + n * PAGE_SIZE, gpa_of(targets[n].new), LEVEL_4K, SS_READ_WRITE);
    for (unsigned n = 0; n < count; n++)
        REQUIRE(lands_on_stale(DEVICE, NO_PASID, IOVA + n * PAGE_SIZE, targets[n]));
    REQUIRE(tell(how));
    for (unsigned n = 0; n < count; n++)
        REQUIRE(lands_on_new(DEVICE, NO_PASID, IOVA + n * PAGE_SIZE, targets[n]));
}

static void global(void) { changed_pages(1, iotlb(IOTLB_GLOBAL, 0, 0)); }
static void domain(void) { changed_pages(1, iotlb(IOTLB_DOMAIN, 0, 0)); }

static void page(void)
{
    SKIP_UNLESS(cap_psi(), "CAP.PSI is 0");
    changed_pages(1, iotlb(IOTLB_PAGE, IOVA, 0));
}

static void page_range(void)
{
    SKIP_UNLESS(cap_psi() && cap_mamv() >= 2, "CAP.MAMV is below 2");
    changed_pages(4, iotlb(IOTLB_PAGE, IOVA, 2));
}

static void large_page(void)
{
    struct page_table space = second_stage_space_new();
    struct target target = {(void *)LARGE_REGION_A, (void *)LARGE_REGION_B};

    SKIP_UNLESS(cap_psi() && cap_ss_2m(), "CAP.PSI or 2 MiB pages are missing");
    // A large page needs a mask of its size (VT-d 6.5.2.3).
    SKIP_UNLESS(cap_mamv() >= 9, "CAP.MAMV is below 9");
    map_leaf(&space, IOVA, LARGE_REGION_A, LEVEL_2M, SS_READ_WRITE);
    attach_here(&space);
    REQUIRE(enable());
    REQUIRE(lands_on_old(DEVICE, NO_PASID, IOVA, target));
    map_leaf(&space, IOVA, LARGE_REGION_B, LEVEL_2M, SS_READ_WRITE);
    REQUIRE(lands_on_stale(DEVICE, NO_PASID, IOVA, target));
    REQUIRE(tell(iotlb(IOTLB_PAGE, IOVA, 9)));
    REQUIRE(lands_on_new(DEVICE, NO_PASID, IOVA, target));
}

static bool tell_context(unsigned granularity)
{
    if (vtd_read32(VTD_GSTS) & GCMD_QIE)
        return invalidate(inv_context(granularity, DOMAIN_A, DEVICE->id));
    if (!vtd_invalidate_context(granularity, DOMAIN_A, DEVICE->id))
        check_fail("CCMD did not do granularity %u", granularity);
    return !check_is_over();
}

// The context entry is pointed at another table.
static void changed_context(unsigned granularity)
{
    struct page_table old = second_stage_space_new(), new = second_stage_space_new();
    struct target target = target_new();

    map_leaf(&old, IOVA, gpa_of(target.old), LEVEL_4K, SS_READ_WRITE);
    map_leaf(&new, IOVA, gpa_of(target.new), LEVEL_4K, SS_READ_WRITE);
    attach_legacy(DEVICE, &old, DOMAIN_A);
    REQUIRE(enable());
    REQUIRE(lands_on_old(DEVICE, NO_PASID, IOVA, target));
    attach_legacy(DEVICE, &new, DOMAIN_A);
    REQUIRE(lands_on_stale(DEVICE, NO_PASID, IOVA, target));
    REQUIRE(tell_context(granularity));
    REQUIRE(tell(iotlb(IOTLB_DOMAIN, 0, 0)));
    REQUIRE(lands_on_new(DEVICE, NO_PASID, IOVA, target));
}

static void context_global(void) { changed_context(CONTEXT_GLOBAL); }
static void context_domain(void) { changed_context(CONTEXT_DOMAIN); }
static void context_device(void) { changed_context(CONTEXT_DEVICE); }

static const struct check legacy_list[] = {
    {"IOTLB, global", global},
    {"IOTLB, domain-selective", domain},
    {"IOTLB, page-selective", page},
    {"IOTLB, page-selective with mask 2", page_range},
    {"2 MiB page: IOTLB, page-selective", large_page},
    {"context cache, global", context_global},
    {"context cache, domain-selective", context_domain},
    {"context cache, device-selective", context_device},
};
CHECK_GROUP(stale_legacy_by_register, legacy_list, setup_legacy_registers, teardown);
CHECK_GROUP(stale_legacy_by_queue, legacy_list, setup_legacy_queue, teardown);

static const struct check scalable_list[] = {
    {"IOTLB, global", global},
    {"IOTLB, domain-selective", domain},
    {"IOTLB, page-selective", page},
    {"IOTLB, page-selective with mask 2", page_range},
    {"2 MiB page: IOTLB, page-selective", large_page},
};
CHECK_GROUP(stale_second_stage, scalable_list, setup_scalable, teardown);
