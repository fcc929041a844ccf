// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
// A driver in strict mode that unmaps one page after the other, `unmaps=` times: for figures. With
// `idle=1` on the command line it then does nothing, until the machine is ended from outside.
#include "fixture.h"
#include "lib/cmdline.h"
#include "lib/console.h"

enum { MICROSECONDS = 1000000 };

static void unmap_and_wait(void)
{
    u64 times = cmdline_number("unmaps", 0), started, ticks;
    struct page_table space = space_new();

    attach(DEVICE, &space, DOMAIN_A);
    REQUIRE(enable());
    started = timestamp();
    for (u64 n = 0; n < times; n++)
        REQUIRE(invalidate(inv_pasid_iotlb(PASID_IOTLB_PAGE, DOMAIN_A, 0, IOVA)));
    ticks = timestamp() - started;
    print("# %lu unmaps, %lu ns each\n", times, ticks * 1000 / (clock_frequency() / MICROSECONDS) / times);
    while (cmdline_number("idle", 0))
        asm volatile("cli; hlt");
}

static const struct check list[] = {
    {"one unmap after the other", unmap_and_wait},
};
CHECK_GROUP(unmaps, list, setup_scalable, teardown);
