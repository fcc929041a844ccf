// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
// Nested translation: what reaches memory, and which faults occur. Each line names the section that
// says so.
#include "nested.h"

u64 *nested_show(struct nested *nested, const volatile void *page, u64 rights)
{
    return map_leaf(&nested->second, shown_at(page), gpa_of(page), LEVEL_4K, rights);
}

u64 *first_table(struct nested *nested, u64 iova, unsigned level)
{
    return (u64 *)(uintptr_t)(gpa_of(table_entry(&nested->first, iova, level)) & ~(PAGE_SIZE - 1));
}

u64 *nested_map(struct nested *nested, u64 iova, const volatile void *page, u64 rights)
{
    u64 *leaf = map_leaf(&nested->first, iova, shown_at(page), LEVEL_4K, rights);

    for (unsigned level = 1; level <= nested->first.levels; level++)
        (void)nested_show(nested, first_table(nested, iova, level), SS_READ_WRITE);
    (void)nested_show(nested, page, SS_READ_WRITE);
    return leaf;
}

struct nested nested_over(struct page_table second)
{
    struct nested nested = {first_stage_new(4), second};

    nested.first.moved = MOVED;
    (void)nested_map(&nested, IOVA_MAILBOX, (void *)(uintptr_t)mailbox_gpa(), FS_READ_WRITE);
    return nested;
}

struct nested nested_new(void)
{
    return nested_over(second_stage_new(cap_sagaw() & BIT(2) ? 4 : 3));
}

u64 *attach_nested(u32 pasid, const struct nested *nested)
{
    u64 *entry = pasid_entry(directory_of(DEVICE), pasid);

    pasid_entry_nested(entry, shown_at(nested->first.top), gpa_of(nested->second.top), nested->second.levels,
                       DOMAIN_A);
    return entry;
}

bool device_has_both_pasids(void)
{
    if (!ecap_pasid() || PASID_2 >> ecap_pasid_bits() || !DEVICE->has_pasid)
        check_skip("no PASIDs");
    return !check_is_over();
}

static void both_stages(void)
{
    struct nested nested = nested_new();
    volatile u64 *page = page_new();

    (void)nested_map(&nested, IOVA, page, FS_READ_WRITE);
    attach_nested(0, &nested);
    REQUIRE(enable());
    REQUIRE(write_arrives(DEVICE, NO_PASID, IOVA + 0x158, page));
    REQUIRE(read_arrives(DEVICE, NO_PASID, IOVA + 0x7f8, page));
}

// As an operating system has it: one second stage of a guest, and tables of its processes.
static void two_pasids(void)
{
    struct nested one = nested_new(), two = nested_over(one.second);
    struct target target = target_new();

    REQUIRE(device_has_both_pasids());
    (void)nested_map(&one, IOVA, target.old, FS_READ_WRITE);
    (void)nested_map(&two, IOVA, target.new, FS_READ_WRITE);
    attach_nested(PASID_1, &one);
    attach_nested(PASID_2, &two);
    REQUIRE(enable());
    REQUIRE(lands_on_old(DEVICE, PASID_1, IOVA, target));
    REQUIRE(lands_on_new(DEVICE, PASID_2, IOVA, target));
}

static void large_below(void)
{
    struct nested nested = nested_new();
    volatile u64 *page = (void *)(LARGE_REGION_A + 0x7000);

    SKIP_UNLESS(cap_ss_2m(), "CAP.SSLPS offers no 2 MiB pages");
    (void)nested_map(&nested, IOVA, page_new(), FS_READ_WRITE);
    map_leaf(&nested.first, IOVA, shown_at(page), LEVEL_4K, FS_READ_WRITE);
    map_leaf(&nested.second, MOVED + LARGE_REGION_A, LARGE_REGION_A, LEVEL_2M, SS_READ_WRITE);
    attach_nested(0, &nested);
    REQUIRE(enable());
    REQUIRE(write_arrives(DEVICE, NO_PASID, IOVA + 8, page));
    REQUIRE(read_arrives(DEVICE, NO_PASID, IOVA + 16, page));
}

// The pages of a large page are scattered, and one is missing.
static void large_above(void)
{
    struct nested nested = nested_new();
    struct target target = target_new();
    u64 large = MOVED + LARGE_REGION_A;

    (void)nested_map(&nested, IOVA, page_new(), FS_READ_WRITE);
    map_leaf(&nested.first, IOVA, large, LEVEL_2M, FS_READ_WRITE);
    map_leaf(&nested.second, large + 3 * PAGE_SIZE, gpa_of(target.new), LEVEL_4K, SS_READ_WRITE);
    map_leaf(&nested.second, large + 4 * PAGE_SIZE, gpa_of(target.old), LEVEL_4K, SS_READ_WRITE);
    attach_nested(0, &nested);
    REQUIRE(enable());
    REQUIRE(lands_on_new(DEVICE, NO_PASID, IOVA + 3 * PAGE_SIZE, target));
    REQUIRE(lands_on_old(DEVICE, NO_PASID, IOVA + 4 * PAGE_SIZE, target));
    REQUIRE(write_faults(DEVICE, NO_PASID, IOVA + 5 * PAGE_SIZE, NULL, SS_PERMISSION));
}

// What the first stage refuses by itself.
static void first_stage_refuses(void)
{
    struct nested nested = nested_new();
    volatile u64 *page = page_new();

    (void)nested_map(&nested, IOVA, page, FS_READ_ONLY);
    attach_nested(0, &nested);
    REQUIRE(enable());
    REQUIRE(write_faults(DEVICE, NO_PASID, IOVA, page, NO_WRITE));
    REQUIRE(read_arrives(DEVICE, NO_PASID, IOVA, page));
    REQUIRE(write_faults(DEVICE, NO_PASID, IOVA + PAGE_SIZE, NULL, FS_NOT_PRESENT));
}

// `*entry`, of the second stage, is 0 while the unit reads it; then everything works.
static void missing(struct nested *nested, u64 *entry, volatile u64 *page, unsigned reason)
{
    u64 right = *entry;

    *entry = 0;
    attach_nested(0, nested);
    REQUIRE(enable());
    REQUIRE(write_faults(DEVICE, NO_PASID, IOVA, page, reason));
    REQUIRE(read_faults(DEVICE, NO_PASID, IOVA, reason));
    *entry = right;
    REQUIRE(mend());
    REQUIRE(write_arrives(DEVICE, NO_PASID, IOVA, page));
}

static void page_missing(void)
{
    struct nested nested = nested_new();
    volatile u64 *page = page_new();

    (void)nested_map(&nested, IOVA, page, FS_READ_WRITE);
    missing(&nested, nested_show(&nested, page, SS_READ_WRITE), page, SS_PERMISSION);
}

static void table_missing(unsigned level, unsigned reason)
{
    struct nested nested = nested_new();
    volatile u64 *page = page_new();

    (void)nested_map(&nested, IOVA, page, FS_READ_WRITE);
    missing(&nested, nested_show(&nested, first_table(&nested, IOVA, level), SS_READ_WRITE), page, reason);
}

static void top_table_missing(void) { table_missing(4, FS_TOP_TABLE_DENIED); }
static void lower_table_missing(void) { table_missing(2, FS_TABLE_DENIED); }

static void page_rights(void)
{
    struct nested nested = nested_new();
    volatile u64 *read_only = page_new(), *write_only = page_new();

    (void)nested_map(&nested, IOVA, read_only, FS_READ_WRITE);
    (void)nested_map(&nested, IOVA + PAGE_SIZE, write_only, FS_READ_WRITE);
    (void)nested_show(&nested, read_only, SS_R);
    (void)nested_show(&nested, write_only, SS_W);
    attach_nested(0, &nested);
    REQUIRE(enable());
    rights_hold(read_only, write_only, SS_PERMISSION, SS_PERMISSION);
}

// Flags of entries that the second stage lets nobody write; those that are set need no write.
static void flags_read_only(void)
{
    struct nested nested = nested_new();
    volatile u64 *page = page_new();
    volatile u64 *leaf = nested_map(&nested, IOVA, page, FS_READ_WRITE);

    (void)nested_show(&nested, first_table(&nested, IOVA, LEVEL_4K), SS_R);
    attach_nested(0, &nested);
    REQUIRE(enable());
    REQUIRE(read_faults(DEVICE, NO_PASID, IOVA, FS_FLAGS_DENIED));
    EXPECT(!(*leaf & (FS_A | FS_D)), "leaf 0x%lx", *leaf);
    *leaf |= FS_A;
    REQUIRE(mend());
    REQUIRE(read_arrives(DEVICE, NO_PASID, IOVA, page));
    REQUIRE(write_faults(DEVICE, NO_PASID, IOVA, page, FS_FLAGS_DENIED));
    *leaf |= FS_D;
    REQUIRE(invalidate(inv_pasid_iotlb(PASID_IOTLB_PAGE, DOMAIN_A, 0, IOVA)));
    REQUIRE(write_arrives(DEVICE, NO_PASID, IOVA, page));
}

static void first_flags(void)
{
    struct nested nested = nested_new();
    volatile u64 *page = page_new();
    volatile u64 *leaf = nested_map(&nested, IOVA, page, FS_READ_WRITE);

    attach_nested(0, &nested);
    REQUIRE(enable());
    first_stage_flags_follow(page, leaf, table_entry(&nested.first, IOVA, 4));
}

// Of the page and, as its flags are written, of the first-stage table.
static void second_flags(bool enabled)
{
    struct nested nested = nested_new();
    volatile u64 *page = page_new(), *of_page, *of_table;
    const u64 flags = SS_A | SS_D;

    SKIP_UNLESS(ecap_second_stage_flags(), "ECAP.SSADS is 0");
    (void)nested_map(&nested, IOVA, page, FS_READ_WRITE);
    of_page = nested_show(&nested, page, SS_READ_WRITE);
    of_table = nested_show(&nested, first_table(&nested, IOVA, LEVEL_4K), SS_READ_WRITE);
    *attach_nested(0, &nested) |= enabled ? SSADE : 0;
    REQUIRE(enable());
    EXPECT(edu_read_from(DEVICE, NO_PASID, IOVA, 1024, 8), "the read does not end");
    EXPECT((*of_page & flags) == (enabled ? SS_A : 0), "the page's 0x%lx after a read", *of_page);
    EXPECT((*of_table & flags) == (enabled ? flags : 0), "the table's 0x%lx after a read", *of_table);
    REQUIRE(write_arrives(DEVICE, NO_PASID, IOVA, page));
    EXPECT((*of_page & flags) == (enabled ? flags : 0), "the page's 0x%lx after a write", *of_page);
}

static void second_flags_on(void) { second_flags(true); }
static void second_flags_off(void) { second_flags(false); }

// `*where` is `value` while the unit reads it; `tell` tells of the right value.
static void broken(struct nested *nested, u64 *where, u64 value, unsigned reason, bool (*tell)(void))
{
    u64 right = *where;
    volatile u64 *page = page_new();

    (void)nested_map(nested, IOVA, page, FS_READ_WRITE);
    *where = value;
    REQUIRE(enable());
    REQUIRE(write_faults(DEVICE, NO_PASID, IOVA, page, reason));
    *where = right;
    REQUIRE(tell());
    REQUIRE(write_arrives(DEVICE, NO_PASID, IOVA, page));
}

// Of a PASID-table entry that a unit may cache: it is valid, whatever its tables are.
static bool drop_entry(void)
{
    return invalidate(inv_pasid_cache(PASID_CACHE_PASID, DOMAIN_A, 0)) &&
           invalidate(inv_iotlb(IOTLB_DOMAIN, DOMAIN_A, 0));
}

static void unsupported_width(void)
{
    struct nested nested = nested_new();
    u64 *entry = attach_nested(0, &nested);

    broken(&nested, entry, entry[0] | 7 << 2, PASID_ENTRY_INVALID, mend);
}

static void pointer_beyond(void)
{
    struct nested nested = nested_new();
    u64 *entry = attach_nested(0, &nested);

    broken(&nested, &entry[2], entry[2] | BIT(49), FS_POINTER_BEYOND, drop_entry);
}

static void second_reserved(void)
{
    struct nested nested = nested_new();
    u64 *entry = table_entry(&nested.second, MOVED, nested.second.levels);

    SKIP_UNLESS(nested.second.levels == 4, "the top table of 3 levels may hold leaves");
    attach_nested(0, &nested);
    broken(&nested, entry, *entry | PAGE_LARGE, SS_RESERVED, mend);
}

static const struct check list[] = {
    {"DMA through both stages, tables as well (3.8)", both_stages},
    {"two PASIDs over one second stage (3.8)", two_pasids},
    {"4 KiB page in a 2 MiB page of the second stage (3.8)", large_below},
    {"2 MiB page over 4 KiB pages of the second stage (3.8)", large_above},
    {"refused by the first stage: faults 85h and 71h (7.1.3)", first_stage_refuses},
    {"page missing in the second stage: fault 79h (7.1.3)", page_missing},
    {"top table missing in the second stage: fault 75h (7.1.3)", top_table_missing},
    {"lower table missing in the second stage: fault 76h (7.1.3)", lower_table_missing},
    {"read-only and write-only pages of the second stage: fault 79h (7.1.3)", page_rights},
    {"flags in a table that is read-only in the second stage: fault 77h (7.1.3)", flags_read_only},
    {"accessed and dirty flags of the first stage (3.6.2)", first_flags},
    {"accessed and dirty flags of the second stage, SSADE (3.7.2)", second_flags_on},
    {"no such flags without SSADE (9.6)", second_flags_off},
    {"unsupported width of the second stage: fault 5Bh (9.6)", unsupported_width},
    {"first-stage pointer beyond the second stage: fault 74h (7.1.3)", pointer_beyond},
    {"reserved bit in the second stage: fault 7Ah (7.1.3)", second_reserved},
};
CHECK_GROUP(nested, list, setup_scalable, teardown);
