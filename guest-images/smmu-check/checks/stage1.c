// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
// Stage 1 with constant tables: what it maps, and what it refuses.
#include "checks/fixture.h"

enum { ASID = 5 };

// A space for the device, and the unit enabled.
static struct space enter(void)
{
    struct space space = space_new(ASID);

    stream_translate(DEVICE->id, &space);
    if (invalidate(cfgi_ste(DEVICE->id)) && !smmu_enable(true))
        check_fail("CR0.SMMUEN is not taken");
    return space;
}

static void mapped(void)
{
    struct space space = enter();
    volatile u64 *page = target_new(), *other = target_new();

    space_map(&space, IOVA, page, READ_WRITE);
    space_map(&space, IOVA_OTHER, other, READ_WRITE);
    REQUIRE(!check_is_over());
    REQUIRE(write_arrives(IOVA, page));
    REQUIRE(read_arrives(IOVA, page, IOVA_OTHER, other));
}

static void not_mapped(void)
{
    struct space space = enter();
    volatile u64 *page = target_new();

    (void)space;
    REQUIRE(!check_is_over());
    REQUIRE(write_faults(IOVA, page, EVENT_TRANSLATION));
    REQUIRE(read_faults(IOVA_OTHER, EVENT_TRANSLATION));
}

static void memory_itself(void)
{
    struct space space = enter();
    volatile u64 *page = target_new();

    space_map(&space, IOVA, page, READ_WRITE);
    REQUIRE(!check_is_over());
    REQUIRE(write_faults(gpa_of(page), page, EVENT_TRANSLATION));
}

static void read_only(void)
{
    struct space space = enter();
    volatile u64 *page = target_new(), *other = target_new();

    space_map(&space, IOVA, page, READ_ONLY);
    space_map(&space, IOVA_OTHER, other, READ_WRITE);
    REQUIRE(!check_is_over());
    REQUIRE(read_arrives(IOVA, page, IOVA_OTHER, other));
    REQUIRE(write_faults(IOVA, page, EVENT_PERMISSION));
}

static const struct check list[] = {
    {"what is mapped is reached", mapped},
    {"what is not mapped: F_TRANSLATION, with stream and address", not_mapped},
    {"a guest-physical address means nothing", memory_itself},
    {"a read-only page: reads pass, a write is F_PERMISSION", read_only},
};

CHECK_GROUP(stage_1, list, setup, teardown);
