// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
// First-stage translation in scalable mode: what reaches memory, and which faults occur.
#include "fixture.h"

#define LARGE_OFFSET 0x123000ull

static void only_stage_1_maps(void)
{
    struct page_table space = space_new();
    volatile u64 *page = page_new();

    map_leaf(&space, IOVA, gpa_of(page), LEVEL_4K, FS_READ_WRITE);
    attach(DEVICE, &space, DOMAIN_A);
    REQUIRE(enable());
    REQUIRE(write_arrives(DEVICE, NO_PASID, IOVA + 0x158, page));
    REQUIRE(read_arrives(DEVICE, NO_PASID, IOVA + 0x7f8, page));
}

static void page_2m(void)
{
    struct page_table space = space_new();
    volatile u64 *page = (void *)(LARGE_REGION_A + LARGE_OFFSET);

    map_leaf(&space, IOVA, LARGE_REGION_A, LEVEL_2M, FS_READ_WRITE);
    attach(DEVICE, &space, DOMAIN_A);
    REQUIRE(enable());
    REQUIRE(write_arrives(DEVICE, NO_PASID, IOVA + LARGE_OFFSET + 8, page));
    REQUIRE(read_arrives(DEVICE, NO_PASID, IOVA + LARGE_OFFSET + 16, page));
}

static void page_1g(void)
{
    struct page_table space = space_new();
    volatile u64 *page = page_new();
    u64 iova = 0x1000000000;

    SKIP_UNLESS(cap_fs_1g(), "CAP.FS1GP is 0");
    SKIP_UNLESS(edu_reaches(iova), "the device's DMA mask is too narrow");
    map_leaf(&space, iova, 0, LEVEL_1G, FS_READ_WRITE);
    attach(DEVICE, &space, DOMAIN_A);
    REQUIRE(enable());
    REQUIRE(write_arrives(DEVICE, NO_PASID, iova + gpa_of(page) + 24, page));
    REQUIRE(read_arrives(DEVICE, NO_PASID, iova + gpa_of(page) + 32, page));
}

static void page_1g_not_offered(void)
{
    struct page_table space = space_new();

    SKIP_UNLESS(!cap_fs_1g(), "CAP.FS1GP is 1");
    map_leaf(&space, IOVA & ~0x3fffffffull, 0, LEVEL_1G, FS_READ_WRITE);
    attach(DEVICE, &space, DOMAIN_A);
    REQUIRE(enable());
    REQUIRE(write_faults(DEVICE, NO_PASID, IOVA & ~0x3fffffffull, NULL, FS_RESERVED));
}

static void five_levels(void)
{
    struct page_table space = first_stage_new(5);
    volatile u64 *low = page_new(), *high = page_new();
    u64 high_iova = BIT(50) | 0x5000;

    SKIP_UNLESS(cap_fs_5_level(), "CAP.FS5LP is 0");
    map_leaf(&space, IOVA, gpa_of(low), LEVEL_4K, FS_READ_WRITE);
    map_leaf(&space, high_iova, gpa_of(high), LEVEL_4K, FS_READ_WRITE);
    attach(DEVICE, &space, DOMAIN_A);
    REQUIRE(enable());
    REQUIRE(write_arrives(DEVICE, NO_PASID, IOVA, low));
    SKIP_UNLESS(edu_reaches(high_iova), "the device's DMA mask is too narrow");
    REQUIRE(write_arrives(DEVICE, NO_PASID, high_iova, high));
}

static void across_pages(void)
{
    struct page_table space = space_new();
    volatile u64 *first = page_new(), *gap = page_new(), *second = page_new();

    map_leaf(&space, IOVA, gpa_of(second), LEVEL_4K, FS_READ_WRITE);
    map_leaf(&space, IOVA + PAGE_SIZE, gpa_of(first), LEVEL_4K, FS_READ_WRITE);
    attach(DEVICE, &space, DOMAIN_A);
    second[511] = 0x1111;
    first[0] = 0x2222;
    REQUIRE(enable());
    EXPECT(edu_read_from(DEVICE, NO_PASID, IOVA + PAGE_SIZE - 8, 1024, 16), "the read does not end");
    second[511] = first[0] = gap[0] = 0;
    EXPECT(edu_write_to(DEVICE, NO_PASID, IOVA + PAGE_SIZE - 8, 1024, 16), "the write does not end");
    EXPECT(second[511] == 0x1111 && first[0] == 0x2222 && gap[0] == 0, "0x%lx, 0x%lx and 0x%lx between",
           second[511], first[0], gap[0]);
}

static void accessed_and_dirty(void)
{
    struct page_table space = space_new();
    volatile u64 *page = page_new();
    volatile u64 *leaf = map_leaf(&space, IOVA, gpa_of(page), LEVEL_4K, FS_READ_WRITE);

    require_hardware_walk();
    attach(DEVICE, &space, DOMAIN_A);
    REQUIRE(enable());
    first_stage_flags_follow(page, leaf, table_entry(&space, IOVA, 4));
}

// An IOVA whose walk ends at an empty entry of `level`, whatever else is mapped.
static u64 unmapped_at(unsigned level)
{
    return IOVA + (level == 4 ? BIT(40) : BIT(12 + 9 * level) - PAGE_SIZE);
}

static void not_present(void)
{
    struct page_table space = space_new();
    volatile u64 *page = page_new();

    for (unsigned level = 1; level <= 4; level++)
        (void)table_entry(&space, unmapped_at(level), level);
    attach(DEVICE, &space, DOMAIN_A);
    REQUIRE(enable());
    for (unsigned level = 1; level <= 4 && edu_reaches(unmapped_at(level)); level++) {
        REQUIRE(write_faults(DEVICE, NO_PASID, unmapped_at(level), page, FS_NOT_PRESENT));
        REQUIRE(read_faults(DEVICE, NO_PASID, unmapped_at(level), FS_NOT_PRESENT));
    }
}

static void read_only(void)
{
    struct page_table space = space_new();
    volatile u64 *page = page_new();

    map_leaf(&space, IOVA, gpa_of(page), LEVEL_4K, FS_READ_ONLY);
    attach(DEVICE, &space, DOMAIN_A);
    REQUIRE(enable());
    REQUIRE(read_arrives(DEVICE, NO_PASID, IOVA, page));
    REQUIRE(write_faults(DEVICE, NO_PASID, IOVA + 8, page, NO_WRITE));
    EXPECT(page[1] == 0, "the page was written");
}

static void read_only_above(void)
{
    struct page_table space = space_new();
    volatile u64 *page = page_new();

    map_leaf(&space, IOVA, gpa_of(page), LEVEL_4K, FS_READ_WRITE);
    *table_entry(&space, IOVA, 2) &= ~FS_RW;
    attach(DEVICE, &space, DOMAIN_A);
    REQUIRE(enable());
    REQUIRE(write_faults(DEVICE, NO_PASID, IOVA, page, NO_WRITE));
}

static void supervisor_page(void)
{
    struct page_table space = space_new();
    volatile u64 *page = page_new();

    map_leaf(&space, IOVA, gpa_of(page), LEVEL_4K, FS_P | FS_RW);
    attach(DEVICE, &space, DOMAIN_A);
    REQUIRE(enable());
    REQUIRE(write_faults(DEVICE, NO_PASID, IOVA, page, NO_USER_ACCESS));
    REQUIRE(read_faults(DEVICE, NO_PASID, IOVA, NO_USER_ACCESS));
}

static void second_device_named(void)
{
    struct page_table space = space_new();

    SKIP_UNLESS(edu_count > 1, "one edu only");
    attach(DEVICE, &space, DOMAIN_A);
    attach(SECOND, &space, DOMAIN_A);
    REQUIRE(enable());
    REQUIRE(write_faults(SECOND, NO_PASID, IOVA, NULL, FS_NOT_PRESENT));
    REQUIRE(write_faults(DEVICE, NO_PASID, IOVA, NULL, FS_NOT_PRESENT));
}

static void not_canonical(void)
{
    struct page_table space = space_new();

    SKIP_UNLESS(edu_reaches(BIT(63)), "the device's DMA mask is too narrow");
    attach(DEVICE, &space, DOMAIN_A);
    REQUIRE(enable());
    REQUIRE(write_faults(DEVICE, NO_PASID, BIT(47), NULL, NOT_CANONICAL));
    REQUIRE(read_faults(DEVICE, NO_PASID, BIT(63) | IOVA, NOT_CANONICAL));
}

static void reserved_in_top_entry(void)
{
    struct page_table space = space_new();
    volatile u64 *page = page_new();

    map_leaf(&space, IOVA, gpa_of(page), LEVEL_4K, FS_READ_WRITE);
    *table_entry(&space, IOVA, 4) |= PAGE_LARGE;
    attach(DEVICE, &space, DOMAIN_A);
    REQUIRE(enable());
    REQUIRE(write_faults(DEVICE, NO_PASID, IOVA, page, FS_RESERVED));
}

static void reserved_in_large_leaf(void)
{
    struct page_table space = space_new();

    map_leaf(&space, IOVA, LARGE_REGION_A + PAGE_SIZE * 4, LEVEL_2M, FS_READ_WRITE);
    attach(DEVICE, &space, DOMAIN_A);
    REQUIRE(enable());
    REQUIRE(write_faults(DEVICE, NO_PASID, IOVA, NULL, FS_RESERVED));
}

// Tables outside of memory cannot be read: the architecture has a fault reason for each case.
static void tables_in_no_memory(void)
{
    struct page_table space = space_new();

    *table_entry(&space, IOVA, 2) = NO_MEMORY | FS_READ_WRITE;
    attach(DEVICE, &space, DOMAIN_A);
    REQUIRE(enable());
    REQUIRE(write_faults(DEVICE, NO_PASID, IOVA, NULL, FS_TABLE_ACCESS));
}

static void top_table_in_no_memory(void)
{
    struct page_table space = {(u64 *)NO_MEMORY, 4, FS_READ_WRITE, 0};

    attach(DEVICE, &space, DOMAIN_A);
    REQUIRE(enable());
    REQUIRE(write_faults(DEVICE, NO_PASID, IOVA, NULL, FS_TOP_TABLE_ACCESS));
}

static void page_in_no_memory(void)
{
    struct page_table space = space_new();
    volatile u64 *page = page_new();

    map_leaf(&space, IOVA, NO_MEMORY, LEVEL_4K, FS_READ_WRITE);
    map_leaf(&space, IOVA_OTHER, gpa_of(page), LEVEL_4K, FS_READ_WRITE);
    attach(DEVICE, &space, DOMAIN_A);
    REQUIRE(enable());
    EXPECT(edu_write_to(DEVICE, NO_PASID, IOVA, 0, 8), "the write does not end");
    EXPECT(edu_read_from(DEVICE, NO_PASID, IOVA, 1024, 8), "the read does not end");
    REQUIRE(write_arrives(DEVICE, NO_PASID, IOVA_OTHER, page));
}

static const struct check list[] = {
    {"an IOVA that only stage 1 maps", only_stage_1_maps},
    {"2 MiB page", page_2m},
    {"1 GiB page", page_1g},
    {"1 GiB page where none are offered: fault 72h", page_1g_not_offered},
    {"5-level tables", five_levels},
    {"one DMA across two pages", across_pages},
    {"accessed and dirty flags", accessed_and_dirty},
    {"not present at each level: fault 71h", not_present},
    {"write to a read-only page: fault 85h", read_only},
    {"write below a read-only table: fault 85h", read_only_above},
    {"user access to a supervisor page: fault 81h", supervisor_page},
    {"the fault names the device that caused it", second_device_named},
    {"address not canonical: fault 80h", not_canonical},
    {"reserved bit in the top table: fault 72h", reserved_in_top_entry},
    {"misaligned 2 MiB page: fault 72h", reserved_in_large_leaf},
    {"table in no memory: fault 70h", tables_in_no_memory},
    {"top table in no memory: fault 73h", top_table_in_no_memory},
    {"page in no memory: the machine goes on", page_in_no_memory},
};
CHECK_GROUP(first_stage, list, setup_scalable, teardown);
