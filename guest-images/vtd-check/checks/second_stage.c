// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
// Guest-owned second-stage tables: the only ones of legacy mode, and PGTT 010b of scalable mode.
#include "fixture.h"

#define LARGE_OFFSET 0x7000ull

static void maps_4k(void)
{
    struct page_table space = second_stage_space_new();
    volatile u64 *page = page_new();

    map_leaf(&space, IOVA, gpa_of(page), LEVEL_4K, SS_READ_WRITE);
    attach_legacy(DEVICE, &space, DOMAIN_A);
    REQUIRE(enable());
    REQUIRE(write_arrives(DEVICE, NO_PASID, IOVA + 8, page));
    REQUIRE(read_arrives(DEVICE, NO_PASID, IOVA + 16, page));
}

static void maps_2m(void)
{
    struct page_table space = second_stage_space_new();
    volatile u64 *page = (void *)(LARGE_REGION_A + LARGE_OFFSET);

    SKIP_UNLESS(cap_ss_2m(), "CAP.SSLPS offers no 2 MiB pages");
    map_leaf(&space, IOVA, LARGE_REGION_A, LEVEL_2M, SS_READ_WRITE);
    attach_legacy(DEVICE, &space, DOMAIN_A);
    REQUIRE(enable());
    REQUIRE(write_arrives(DEVICE, NO_PASID, IOVA + LARGE_OFFSET, page));
}

static void rights(void)
{
    struct page_table space = second_stage_space_new();
    volatile u64 *read_only = page_new(), *write_only = page_new();

    map_leaf(&space, IOVA, gpa_of(read_only), LEVEL_4K, SS_R);
    map_leaf(&space, IOVA + PAGE_SIZE, gpa_of(write_only), LEVEL_4K, SS_W);
    attach_legacy(DEVICE, &space, DOMAIN_A);
    REQUIRE(enable());
    rights_hold(read_only, write_only, LEGACY_NO_WRITE, LEGACY_NO_READ);
}

static void not_mapped(void)
{
    struct page_table space = second_stage_space_new();

    attach_legacy(DEVICE, &space, DOMAIN_A);
    REQUIRE(enable());
    REQUIRE(write_faults(DEVICE, NO_PASID, IOVA, NULL, LEGACY_NO_WRITE));
    REQUIRE(read_faults(DEVICE, NO_PASID, IOVA, LEGACY_NO_READ));
}

// First the context entry, then the page below it.
static void entries_added(void)
{
    struct page_table space = second_stage_space_new();
    volatile u64 *page = page_new();

    (void)legacy_context(root, DEVICE->id);
    REQUIRE(enable());
    REQUIRE(write_faults(DEVICE, NO_PASID, IOVA, page, LEGACY_CONTEXT_NOT_PRESENT));
    attach_legacy(DEVICE, &space, DOMAIN_A);
    REQUIRE(mend());
    REQUIRE(write_faults(DEVICE, NO_PASID, IOVA, page, LEGACY_NO_WRITE));
    map_leaf(&space, IOVA, gpa_of(page), LEVEL_4K, SS_READ_WRITE);
    REQUIRE(mend());
    REQUIRE(write_arrives(DEVICE, NO_PASID, IOVA, page));
}

static void beyond_width(void)
{
    struct page_table space = second_stage_space_new();

    SKIP_UNLESS(edu_reaches(BIT(60)), "the device's DMA mask is too narrow");
    attach_legacy(DEVICE, &space, DOMAIN_A);
    REQUIRE(enable());
    REQUIRE(write_faults(DEVICE, NO_PASID, BIT(60), NULL, LEGACY_ADDRESS_BEYOND));
}

static void table_in_no_memory(void)
{
    struct page_table space = second_stage_space_new();

    *table_entry(&space, IOVA, 2) = NO_MEMORY | SS_READ_WRITE;
    attach_legacy(DEVICE, &space, DOMAIN_A);
    REQUIRE(enable());
    REQUIRE(write_faults(DEVICE, NO_PASID, IOVA, NULL, LEGACY_TABLE_ACCESS));
}

static void not_offered(void)
{
    struct page_table space = second_stage_new(4);

    SKIP_UNLESS(!legacy_second_stage(), "it is offered");
    map_leaf(&space, IOVA, gpa_of(page_new()), LEVEL_4K, SS_READ_WRITE);
    attach_legacy(DEVICE, &space, DOMAIN_A);
    REQUIRE(enable());
    REQUIRE(write_faults(DEVICE, NO_PASID, IOVA, NULL, LEGACY_CONTEXT_INVALID));
}

static void pass_through(void)
{
    volatile u64 *page = page_new();
    unsigned widest = cap_sagaw() & BIT(3) ? 5 : cap_sagaw() & BIT(2) ? 4 : 3;

    SKIP_UNLESS(ecap_pass_through(), "ECAP.PT is 0");
    SKIP_UNLESS(legacy_second_stage(), "the entry has to name a width, and CAP.SAGAW is 0");
    legacy_context_set(legacy_context(root, DEVICE->id), TT_PASS_THROUGH, 0, widest, DOMAIN_A);
    REQUIRE(enable());
    REQUIRE(write_arrives(DEVICE, NO_PASID, gpa_of(page), page));
}

static void reserved_type(void)
{
    struct page_table space = second_stage_space_new();

    legacy_context_set(legacy_context(root, DEVICE->id), TT_RESERVED, gpa_of(space.top), space.levels,
                       DOMAIN_A);
    REQUIRE(enable());
    REQUIRE(write_faults(DEVICE, NO_PASID, IOVA, NULL, LEGACY_CONTEXT_INVALID));
}

static void unsupported_width(void)
{
    struct page_table space = second_stage_space_new();

    attach_legacy(DEVICE, &space, DOMAIN_A)[1] |= 7;
    REQUIRE(enable());
    REQUIRE(write_faults(DEVICE, NO_PASID, IOVA, NULL, LEGACY_CONTEXT_INVALID));
}

static void reserved_in_context(void)
{
    struct page_table space = second_stage_space_new();

    attach_legacy(DEVICE, &space, DOMAIN_A)[1] |= BIT(40);
    REQUIRE(enable());
    REQUIRE(write_faults(DEVICE, NO_PASID, IOVA, NULL, LEGACY_CONTEXT_RESERVED));
}

static void reserved_in_root(void)
{
    struct page_table space = second_stage_space_new();

    attach_legacy(DEVICE, &space, DOMAIN_A);
    ROOT_ENTRY[1] = BIT(20);
    REQUIRE(enable());
    REQUIRE(write_faults(DEVICE, NO_PASID, IOVA, NULL, LEGACY_ROOT_RESERVED));
}

static void reserved_in_page_entry(void)
{
    struct page_table space = second_stage_space_new();
    volatile u64 *page = page_new();

    map_leaf(&space, IOVA, gpa_of(page), LEVEL_4K, SS_READ_WRITE);
    SKIP_UNLESS(space.levels == 4, "the top table of 3 levels may hold leaves");
    *table_entry(&space, IOVA, 4) |= PAGE_LARGE;
    attach_legacy(DEVICE, &space, DOMAIN_A);
    REQUIRE(enable());
    REQUIRE(write_faults(DEVICE, NO_PASID, IOVA, page, LEGACY_TABLE_RESERVED));
}

static void faults_silenced(void)
{
    struct page_table space = second_stage_space_new();

    attach_legacy(DEVICE, &space, DOMAIN_A)[0] |= ENTRY_FPD;
    REQUIRE(enable());
    REQUIRE(write_vanishes(DEVICE, NO_PASID, IOVA, NULL));
}

static const struct check legacy_list[] = {
    {"4 KiB page", maps_4k},
    {"2 MiB page", maps_2m},
    {"read-only and write-only pages: faults 05h and 06h", rights},
    {"not mapped: faults 05h and 06h", not_mapped},
    {"address beyond the width: fault 04h", beyond_width},
    {"table in no memory: fault 07h", table_in_no_memory},
    {"where it is not offered: fault 03h", not_offered},
    {"pass-through context entry", pass_through},
    {"reserved translation type: fault 03h", reserved_type},
    {"unsupported address width: fault 03h", unsupported_width},
    {"reserved bit in the context entry: fault 0Bh", reserved_in_context},
    {"reserved bit in the root entry: fault 0Ah", reserved_in_root},
    {"reserved bit in a page-table entry: fault 0Ch", reserved_in_page_entry},
    {"FPD in the context entry: blocked without a record", faults_silenced},
    {"entries that become present, told of in caching mode alone", entries_added},
};
CHECK_GROUP(legacy_second_stage, legacy_list, setup_legacy_queue, teardown);

static void scalable_maps_4k(void)
{
    struct page_table space = second_stage_space_new();
    volatile u64 *page = page_new();

    map_leaf(&space, IOVA, gpa_of(page), LEVEL_4K, SS_READ_WRITE);
    attach(DEVICE, &space, DOMAIN_A);
    REQUIRE(enable());
    REQUIRE(write_arrives(DEVICE, NO_PASID, IOVA, page));
    REQUIRE(read_arrives(DEVICE, NO_PASID, IOVA, page));
}

static void scalable_maps_2m(void)
{
    struct page_table space = second_stage_space_new();
    volatile u64 *page = (void *)(LARGE_REGION_A + LARGE_OFFSET);

    SKIP_UNLESS(cap_ss_2m(), "CAP.SSLPS offers no 2 MiB pages");
    map_leaf(&space, IOVA, LARGE_REGION_A, LEVEL_2M, SS_READ_WRITE);
    attach(DEVICE, &space, DOMAIN_A);
    REQUIRE(enable());
    REQUIRE(write_arrives(DEVICE, NO_PASID, IOVA + LARGE_OFFSET, page));
}

static void scalable_not_mapped(void)
{
    struct page_table space = second_stage_space_new();

    attach(DEVICE, &space, DOMAIN_A);
    REQUIRE(enable());
    REQUIRE(write_faults(DEVICE, NO_PASID, IOVA, NULL, SS_PERMISSION));
}

static void scalable_not_offered(void)
{
    struct page_table space = second_stage_new(4);

    SKIP_UNLESS(!ecap_second_stage(), "ECAP.SSTS is 1");
    map_leaf(&space, IOVA, gpa_of(page_new()), LEVEL_4K, SS_READ_WRITE);
    attach(DEVICE, &space, DOMAIN_A);
    REQUIRE(enable());
    REQUIRE(write_faults(DEVICE, NO_PASID, IOVA, NULL, PASID_ENTRY_INVALID));
}

static const struct check scalable_list[] = {
    {"4 KiB page", scalable_maps_4k},
    {"2 MiB page", scalable_maps_2m},
    {"not mapped: fault 79h", scalable_not_mapped},
    {"where it is not offered: fault 5Bh", scalable_not_offered},
};
CHECK_GROUP(second_stage, scalable_list, setup_scalable, teardown);
