// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
// Invalid scalable-mode tables: the device is blocked, the record has the reason, and the unit
// continues. Each check breaks one thing in working tables and repairs it again.
#include "fixture.h"

struct good {
    struct page_table space;
    volatile u64 *page;
    u64 *context, *directory, *entry;
};

static struct good good_tables(void)
{
    struct good good = {.space = space_new(), .page = page_new()};

    map_leaf(&good.space, IOVA, gpa_of(good.page), LEVEL_4K, FS_READ_WRITE);
    good.entry = attach(DEVICE, &good.space, DOMAIN_A);
    good.context = context_of(DEVICE);
    good.directory = directory_of(DEVICE);
    return good;
}

// `*where` is `value` while the unit reads it; afterwards the old value is restored, without
// invalidation for a unit without caching mode, and everything works.
static void broken(struct good good, u64 *where, u64 value, unsigned reason)
{
    u64 right = *where;

    *where = value;
    REQUIRE(enable());
    REQUIRE(write_faults(DEVICE, NO_PASID, IOVA, good.page, reason));
    *where = right;
    REQUIRE(mend());
    REQUIRE(write_arrives(DEVICE, NO_PASID, IOVA, good.page));
}

static void root_reserved(void)
{
    struct good good = good_tables();

    broken(good, ROOT_ENTRY, ROOT_ENTRY[0] | BIT(5), ROOT_RESERVED);
}

static void context_reserved(void)
{
    struct good good = good_tables();

    broken(good, &good.context[0], good.context[0] | BIT(7), CONTEXT_RESERVED);
}

static void context_reserved_high(void)
{
    struct good good = good_tables();

    broken(good, &good.context[1], BIT(40), CONTEXT_RESERVED);
}

static void directory_reserved(void)
{
    struct good good = good_tables();

    broken(good, &good.directory[0], good.directory[0] | BIT(5), PASID_DIRECTORY_RESERVED);
}

static void entry_reserved(void)
{
    struct good good = good_tables();

    broken(good, &good.entry[0], good.entry[0] | BIT(10), PASID_ENTRY_RESERVED);
}

static void entry_type_reserved(void)
{
    struct good good = good_tables();

    broken(good, &good.entry[0], (u64)PGTT_RESERVED << 6 | ENTRY_P, PASID_ENTRY_INVALID);
}

static void entry_type_none(void)
{
    struct good good = good_tables();

    broken(good, &good.entry[0], ENTRY_P, PASID_ENTRY_INVALID);
}

static void entry_nested(void)
{
    struct good good = good_tables();

    SKIP_UNLESS(!ecap_nested(), "ECAP.NEST is 1");
    broken(good, &good.entry[0], (u64)PGTT_NESTED << 6 | address_width(4) << 2 | ENTRY_P, PASID_ENTRY_INVALID);
}

static void paging_mode_reserved(void)
{
    struct good good = good_tables();

    broken(good, &good.entry[2], good.entry[2] | BIT(3), PASID_ENTRY_INVALID);
}

static void paging_mode_not_offered(void)
{
    struct good good = good_tables();

    SKIP_UNLESS(!cap_fs_5_level(), "CAP.FS5LP is 1");
    broken(good, &good.entry[2], good.entry[2] | FSPM_5_LEVEL, PASID_ENTRY_INVALID);
}

static void rid_pasid_beyond(void)
{
    struct good good = good_tables();

    SKIP_UNLESS(ecap_rid_pasid(), "ECAP.RPS is 0");
    broken(good, &good.context[1], 1 << 13, RID_PASID_BEYOND);
}

static void context_table_nowhere(void)
{
    struct good good = good_tables();

    broken(good, ROOT_ENTRY, NO_MEMORY | ENTRY_P, CONTEXT_ACCESS);
}

static void directory_nowhere(void)
{
    struct good good = good_tables();

    broken(good, &good.context[0], NO_MEMORY | (good.context[0] & (PAGE_SIZE - 1)), PASID_DIRECTORY_ACCESS);
}

static void pasid_table_nowhere(void)
{
    struct good good = good_tables();

    broken(good, &good.directory[0], NO_MEMORY | ENTRY_P, PASID_ENTRY_ACCESS);
}

static void root_nowhere(void)
{
    struct good good = good_tables();

    EXPECT(vtd_set_root(NO_MEMORY | RTADDR_SCALABLE), "GCMD.SRTP never showed in GSTS");
    REQUIRE(enable());
    REQUIRE(write_faults(DEVICE, NO_PASID, IOVA, good.page, ROOT_ACCESS));
}

static void root_mode_reserved(void)
{
    struct good good = good_tables();

    EXPECT(vtd_set_root(gpa_of(root) | RTADDR_RESERVED_MODE), "GCMD.SRTP never showed in GSTS");
    EXPECT(vtd_switch(GCMD_TE, true), "GCMD.TE never showed in GSTS");
    REQUIRE(write_faults(DEVICE, NO_PASID, IOVA, good.page, RTADDR_INVALID));
}

// Cyclic tables end where the architecture's levels end.
static void tables_in_circles(void)
{
    struct good good = good_tables();

    good.space.top[(IOVA >> 39) & 511] = gpa_of(good.space.top) | FS_READ_WRITE;
    for (unsigned n = 0; n < 512; n += 511)
        good.space.top[n] = gpa_of(good.space.top) | FS_READ_WRITE;
    REQUIRE(enable());
    EXPECT(edu_write_to(DEVICE, NO_PASID, 0x123000, 0, 8), "the write does not end");
    EXPECT(edu_write_to(DEVICE, NO_PASID, IOVA, 0, 8), "the write does not end");
    EXPECT(queue_invalidate_all(), "the queue stopped: error %u", queue_error());
}

static const struct check list[] = {
    {"reserved bit in the root entry: fault 3Ah", root_reserved},
    {"reserved bit in the context entry: fault 42h", context_reserved},
    {"reserved bit in the context entry's second half: fault 42h", context_reserved_high},
    {"reserved bit in the PASID directory: fault 52h", directory_reserved},
    {"reserved bit in the PASID-table entry: fault 5Ah", entry_reserved},
    {"reserved PGTT: fault 5Bh", entry_type_reserved},
    {"PGTT of zero: fault 5Bh", entry_type_none},
    {"nested PGTT where it is not offered: fault 5Bh", entry_nested},
    {"reserved first-stage paging mode: fault 5Bh", paging_mode_reserved},
    {"5-level paging mode where it is not offered: fault 5Bh", paging_mode_not_offered},
    {"RID_PASID beyond the directory: fault 48h", rid_pasid_beyond},
    {"context table in no memory: fault 40h", context_table_nowhere},
    {"PASID directory in no memory: fault 50h", directory_nowhere},
    {"PASID table in no memory: fault 58h", pasid_table_nowhere},
    {"root table in no memory: fault 38h", root_nowhere},
    {"reserved translation table mode: fault 30h", root_mode_reserved},
    {"tables that point at themselves", tables_in_circles},
};
CHECK_GROUP(malformed_tables, list, setup_scalable, teardown);
