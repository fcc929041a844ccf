// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
// The effect of a stream's entry, or its absence, on DMA.
#include "checks/fixture.h"

static void disabled(void)
{
    volatile u64 *page = target_new();

    REQUIRE(write_arrives(gpa_of(page), page));
}

static void disabled_abort(void)
{
    volatile u64 *page = target_new();

    EXPECT(smmu_start(true), "GBPA is not taken");
    REQUIRE(write_vanishes(gpa_of(page), page));
}

static void bypass(void)
{
    volatile u64 *page = target_new(), *other = target_new();

    stream_bypass(DEVICE->id);
    REQUIRE(invalidate(cfgi_ste(DEVICE->id)));
    EXPECT(smmu_enable(true), "CR0.SMMUEN is not taken");
    REQUIRE(write_arrives(gpa_of(page), page));
    REQUIRE(read_arrives(gpa_of(page), page, gpa_of(other), other));
}

static void abort_silently(void)
{
    volatile u64 *page = target_new();

    stream_abort(DEVICE->id);
    REQUIRE(invalidate(cfgi_ste(DEVICE->id)));
    EXPECT(smmu_enable(true), "CR0.SMMUEN is not taken");
    REQUIRE(write_vanishes(gpa_of(page), page));
}

static void abort_then_bypass(void)
{
    volatile u64 *page = target_new();

    stream_abort(DEVICE->id);
    REQUIRE(invalidate(cfgi_ste(DEVICE->id)));
    EXPECT(smmu_enable(true), "CR0.SMMUEN is not taken");
    REQUIRE(write_vanishes(gpa_of(page), page));
    stream_bypass(DEVICE->id);
    REQUIRE(invalidate(cfgi_ste(DEVICE->id)));
    REQUIRE(write_arrives(gpa_of(page), page));
}

static const struct check list[] = {
    {"disabled: DMA passes", disabled},
    {"disabled, GBPA.ABORT: DMA is dropped", disabled_abort},
    {"a bypass entry: DMA goes to guest-physical addresses", bypass},
    {"an abort entry: DMA is dropped, without an event", abort_silently},
    {"an abort entry, then a bypass one", abort_then_bypass},
};

CHECK_GROUP(streams, list, setup, teardown);
