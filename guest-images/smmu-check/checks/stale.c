// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
// Changing tables: the old translation may be used, and here it is, until the invalidation is
// complete; afterwards it is not.
#include "checks/fixture.h"

enum { ASID = 7 };

// One page mapped and used, and another one in its place in the tables.
struct changed {
    volatile u64 *old, *new;
    u64 *leaf;
    struct space space;
};

static bool change(struct changed *changed)
{
    changed->space = space_new(ASID);
    changed->old = target_new();
    changed->new = target_new();
    changed->leaf = space_map(&changed->space, IOVA, changed->old, READ_WRITE);
    stream_translate(DEVICE->id, &changed->space);
    if (!invalidate(cfgi_ste(DEVICE->id)) || !smmu_enable(true))
        check_fail("the unit does not translate");
    if (check_is_over() || !write_arrives(IOVA, changed->old))
        return false;
    *changed->leaf = page_entry(changed->new, READ_WRITE);
    // The unit still has the old translation.
    return write_arrives(IOVA, changed->old);
}

static void check_invalidation(struct command command)
{
    struct changed changed;

    REQUIRE(change(&changed));
    REQUIRE(invalidate(command));
    REQUIRE(write_arrives(IOVA, changed.new));
}

static void by_address(void)
{
    check_invalidation(tlbi_va(ASID, IOVA));
}

static void by_asid(void)
{
    check_invalidation(tlbi_asid(ASID));
}

static void all(void)
{
    check_invalidation(tlbi_all());
}

static void others(void)
{
    struct changed changed;

    REQUIRE(change(&changed));
    REQUIRE(invalidate(tlbi_asid(ASID + 1)));
    REQUIRE(invalidate(tlbi_va(ASID, IOVA_OTHER)));
    REQUIRE(write_arrives(IOVA, changed.old));
}

static void unmapped(void)
{
    struct changed changed;

    REQUIRE(change(&changed));
    *changed.leaf = 0;
    REQUIRE(write_arrives(IOVA, changed.old));
    REQUIRE(invalidate(tlbi_va(ASID, IOVA)));
    REQUIRE(write_faults(IOVA, changed.old, EVENT_TRANSLATION));
}

static void context(void)
{
    struct changed changed;
    struct space other = space_new(ASID + 1);
    volatile u64 *page = target_new();

    space_map(&other, IOVA, page, READ_WRITE);
    REQUIRE(change(&changed));
    changed.space.context->words[1] = other.context->words[1];
    changed.space.context->words[0] = other.context->words[0];
    REQUIRE(invalidate(cfgi_cd(DEVICE->id)));
    REQUIRE(write_arrives(IOVA, page));
}

static void stream(void)
{
    struct changed changed;
    struct space other = space_new(ASID + 1);
    volatile u64 *page = target_new();

    space_map(&other, IOVA, page, READ_WRITE);
    REQUIRE(change(&changed));
    stream_translate(DEVICE->id, &other);
    REQUIRE(invalidate(cfgi_ste(DEVICE->id)));
    REQUIRE(write_arrives(IOVA, page));
}

static const struct check list[] = {
    {"TLBI_NH_VA", by_address},
    {"TLBI_NH_ASID", by_asid},
    {"TLBI_NH_ALL", all},
    {"another ASID and another address change nothing", others},
    {"an entry that is taken away", unmapped},
    {"another context: CFGI_CD", context},
    {"another stream-table entry: CFGI_STE", stream},
};

CHECK_GROUP(stale, list, setup, teardown);
