// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
// Two units with a device behind each: invalidations of one do not affect the other.
#include "fixture.h"

enum { FIRST_UNIT, SECOND_UNIT };

static u64 *roots[VTD_MOST];

static void use(unsigned unit)
{
    vtd_use(unit);
    root = roots[unit];
}

static void setup_both(void)
{
    for (unsigned unit = 0; unit < vtd_count; unit++) {
        vtd_use(unit);
        SKIP_UNLESS(ecap_scalable(), "ECAP.SMTS is 0");
        teardown();
    }
    vtd_use(FIRST_UNIT);
    setup_scalable();
    roots[FIRST_UNIT] = root;
    vtd_use(SECOND_UNIT);
    setup_unit(RTADDR_SCALABLE);
    roots[SECOND_UNIT] = root;
    EXPECT(queue_start(true), "GCMD.QIE never showed in GSTS");
    use(FIRST_UNIT);
}

// No record is in the unit, which need not be the current one.
static bool is_quiet(unsigned unit)
{
    unsigned pending;

    use(unit);
    pending = fault_pending();
    if (pending)
        check_fail("%u fault records in unit %u", pending, unit);
    return !check_is_over();
}

static void one_enabled(unsigned enabled, const struct edu *blocked, const struct edu *passing)
{
    volatile u64 *page = page_new();

    use(enabled);
    REQUIRE(enable());
    REQUIRE(write_faults(blocked, NO_PASID, gpa_of(page), page, ROOT_NOT_PRESENT));
    REQUIRE(write_arrives(passing, NO_PASID, gpa_of(page), page));
    REQUIRE(is_quiet(FIRST_UNIT));
    REQUIRE(is_quiet(SECOND_UNIT));
}

static void first_enabled(void)
{
    one_enabled(FIRST_UNIT, DEVICE, SECOND);
}

static void second_enabled(void)
{
    one_enabled(SECOND_UNIT, SECOND, DEVICE);
}

// Both devices through `space`, under the same domain id.
static bool attach_both(const struct page_table *space)
{
    use(FIRST_UNIT);
    attach(DEVICE, space, DOMAIN_A);
    if (!enable())
        return false;
    use(SECOND_UNIT);
    attach(SECOND, space, DOMAIN_A);
    return enable();
}

static void own_invalidations(void)
{
    struct page_table space = space_new();
    struct target target = target_new();

    map_leaf(&space, IOVA, gpa_of(target.old), LEVEL_4K, FS_READ_WRITE);
    REQUIRE(attach_both(&space));
    REQUIRE(lands_on_old(DEVICE, NO_PASID, IOVA, target));
    REQUIRE(lands_on_old(SECOND, NO_PASID, IOVA, target));
    map_leaf(&space, IOVA, gpa_of(target.new), LEVEL_4K, FS_READ_WRITE);
    use(FIRST_UNIT);
    REQUIRE(invalidate(inv_pasid_iotlb(PASID_IOTLB_PAGE, DOMAIN_A, 0, IOVA)));
    REQUIRE(lands_on_new(DEVICE, NO_PASID, IOVA, target));
    REQUIRE(lands_on_stale(SECOND, NO_PASID, IOVA, target));
    use(SECOND_UNIT);
    REQUIRE(invalidate(inv_pasid_iotlb(PASID_IOTLB_PAGE, DOMAIN_A, 0, IOVA)));
    REQUIRE(lands_on_new(SECOND, NO_PASID, IOVA, target));
}

static void own_fault_events(void)
{
    struct page_table space = space_new();
    volatile u64 *page = page_new();
    bool told;

    SKIP_UNLESS(!devices_assigned(), "faults of assigned devices are not reported");
    REQUIRE(attach_both(&space));
    interrupt_count_clear(VECTOR_FAULT_EVENT);
    interrupt_count_clear(VECTOR_INVALIDATION_EVENT);
    use(FIRST_UNIT);
    fault_event_enable(VECTOR_INVALIDATION_EVENT);
    use(SECOND_UNIT);
    fault_event_enable(VECTOR_FAULT_EVENT);
    REQUIRE(write_faults(SECOND, NO_PASID, IOVA, page, FS_NOT_PRESENT));
    told = WAIT_UNTIL(interrupt_count(VECTOR_FAULT_EVENT));
    EXPECT(told, "the fault event of the second unit does not arrive");
    use(FIRST_UNIT);
    EXPECT(!interrupt_count(VECTOR_INVALIDATION_EVENT), "the first unit sends an event, too");
    REQUIRE(write_faults(DEVICE, NO_PASID, IOVA, page, FS_NOT_PRESENT));
    told = WAIT_UNTIL(interrupt_count(VECTOR_INVALIDATION_EVENT));
    EXPECT(told, "the fault event of the first unit does not arrive");
    EXPECT(interrupt_count(VECTOR_FAULT_EVENT) == 1, "the second unit sends one more");
}

static void left_running(void)
{
    struct page_table space = space_new();
    volatile u64 *page = page_new();

    map_leaf(&space, IOVA, gpa_of(page), LEVEL_4K, FS_READ_WRITE);
    REQUIRE(attach_both(&space));
    REQUIRE(write_arrives(DEVICE, NO_PASID, IOVA, page));
    REQUIRE(write_arrives(SECOND, NO_PASID, IOVA, page));
}

static const struct check list[] = {
    {"the first enabled: its device is blocked, the other passes", first_enabled},
    {"the second enabled: its device is blocked, the other passes", second_enabled},
    {"one table and one domain id: each unit invalidates for its own device", own_invalidations},
    {"each unit sends its own fault event", own_fault_events},
    {"both devices on one table, translation left on", left_running},
};
CHECK_GROUP(two_units, list, setup_both, NULL);
