// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
// The command queue after an illegal command.
#include "checks/fixture.h"

static void unknown(void)
{
    static const struct command command = {{0xff, 0}};
    volatile u64 *page = target_new();

    EXPECT(!smmu_run(&command, 1), "the command is taken");
    EXPECT(smmu_error() == CERROR_ILL, "error %u, not CERROR_ILL", smmu_error());
    EXPECT(smmu_recover(), "the queue does not go on");
    stream_bypass(DEVICE->id);
    REQUIRE(invalidate(cfgi_ste(DEVICE->id)));
    EXPECT(smmu_enable(true), "CR0.SMMUEN is not taken");
    REQUIRE(write_arrives(gpa_of(page), page));
}

static void around_the_end(void)
{
    for (unsigned n = 0; n < 600; n++)
        REQUIRE(invalidate(tlbi_va(1, IOVA)));
}

static const struct check list[] = {
    {"an unknown command: CERROR_ILL, and the queue goes on when it has been noticed", unknown},
    {"more commands than it has room for, one after the other", around_the_end},
};

CHECK_GROUP(queue, list, setup, teardown);
