// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
// The kernel gives each `edu` device an identity domain. Then its DMA uses physical addresses, and
// this process knows that of one of its pages.
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>

#include "../../pattern.h"
#include "../devices/edu.h"
#include "../kernel/files.h"
#include "../report.h"
#include "checks.h"

enum { SEED = 78 };

// NULL, or the error.
static const char *copy_page(const struct edu *edu)
{
    static char pages[2][EDU_PAGE] __attribute__((aligned(EDU_PAGE)));
    uint64_t from, to;

    pattern_fill(pages[0], EDU_PAGE, SEED, 0);
    memset(pages[1], 0, EDU_PAGE);
    from = physical_address(pages[0]);
    to = physical_address(pages[1]);
    if (!from || !to)
        return strerror(errno);
    if (!edu_transfer(edu, from, EDU_PAGE, false) || !edu_transfer(edu, to, EDU_PAGE, true))
        return "DMA does not end";
    return pattern_check(pages[1], EDU_PAGE, SEED, 0) == EDU_PAGE ? NULL : "the page is not what the other one is";
}

static void check_device(const struct edu *edu)
{
    char type[128], before[32];
    const char *wrong;

    if (edu->registers == MAP_FAILED) {
        failed("bypass", "%s: %s", edu->pci, strerror(errno));
        return;
    }
    snprintf(type, sizeof(type), "/sys/bus/pci/devices/%s/iommu_group/type", edu->pci);
    snprintf(before, sizeof(before), "%s", first_line("%s", type));
    int error = write_text(type, "identity");
    wrong = error ? strerror(error) : copy_page(edu);
    if (wrong)
        failed("bypass", "%s: %s", edu->pci, wrong);
    else
        passed("bypass", "%s: DMA to physical addresses, while its domain is of type %s", edu->pci, first_line("%s", type));
    error = write_text(type, before);
    if (error)
        failed("bypass", "%s: type %s again: %s", edu->pci, before, strerror(error));
    edu_close(edu);
}

void check_bypass(void)
{
    struct edu edu;
    unsigned number = 0;

    for (; edu_open(&edu, number); number++)
        check_device(&edu);
    if (!number)
        skipped("bypass", "there is no edu device");
}
