// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
// An `edu` device has no driver in Linux, so nothing is mapped in its domain. This process drives
// it through sysfs, and makes it read and write a page of this process by its physical address: the
// IOMMU must refuse both, and the kernel must log it, unless the device is that of twostage.silent=:
// Linux's intel-iommu and amd-iommu do not tell a VMM of the faults of assigned devices.
#include <errno.h>
#include <inttypes.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>

#include "../../pattern.h"
#include "../devices/edu.h"
#include "../iommu.h"
#include "../kernel/files.h"
#include "../kernel/kernel_log.h"
#include "../kernel/options.h"
#include "../report.h"
#include "checks.h"

// Few bytes: each refused access is a line of the log, and the kernel limits their rate.
enum { SEED = 77, BYTES = 8 };

struct access {
    const char *requester;
    bool write;
    uint64_t address;
};

static bool is_logged(const void *context)
{
    const struct access *access = context;

    return iommu.says_refused(access->requester, access->write, access->address);
}

static void check_direction(const struct edu *edu, uint64_t address, bool write)
{
    struct access access = {edu->requester, write, address};
    const char *what = write ? "a write" : "a read";

    if (!edu_transfer(edu, address, BYTES, write))
        failed("isolation", "%s: %s by DMA does not end", edu->pci, what);
    else if (strcmp(edu->pci, option("silent", "")) == 0)
        note("%s: %s by DMA at %#" PRIx64 " of which the log need not tell", edu->pci, what, address);
    else if (wait_until(is_logged, &access))
        passed("isolation", "%s: %s by DMA at %#" PRIx64 " was refused, and the log says so", edu->pci, what, address);
    else
        failed("isolation", "%s: the log does not say that %s at %#" PRIx64 " was refused", edu->pci, what, address);
}

static void say(const char *line)
{
    note("%s", line);
}

static void check_device(const struct edu *edu)
{
    static char page[EDU_PAGE] __attribute__((aligned(EDU_PAGE)));

    pattern_fill(page, EDU_PAGE, SEED, 0);
    uint64_t address = physical_address(page);
    if (edu->registers == MAP_FAILED || !address) {
        failed("isolation", "%s: %s", edu->pci, strerror(errno));
        return;
    }
    check_direction(edu, address, false);
    check_direction(edu, address, true);
    if (pattern_check(page, EDU_PAGE, SEED, 0) == EDU_PAGE)
        passed("isolation", "%s: memory is as it was", edu->pci);
    else
        failed("isolation", "%s: memory has changed", edu->pci);
    edu_close(edu);
}

void check_isolation(void)
{
    struct edu edu;
    unsigned number = 0;

    for (; edu_open(&edu, number); number++)
        check_device(&edu);
    if (number)
        log_lines(iommu.faults, say);
    else
        skipped("isolation", "there is no edu device");
}
