// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
#include <sys/sysinfo.h>
#include <unistd.h>

#include "../devices/devices.h"
#include "../kernel/files.h"
#include "../kernel/options.h"
#include "../report.h"
#include "checks.h"

void check_boot(void)
{
    struct device devices[MAX_DEVICES];
    unsigned count = find_devices(devices);
    unsigned long wanted = option_number("cpus", 1);
    long cpus = sysconf(_SC_NPROCESSORS_ONLN);
    struct sysinfo info;

    if (cpus == (long)wanted)
        passed("boot", "%ld processors", cpus);
    else
        failed("boot", "%ld processors, not %lu (twostage.cpus)", cpus, wanted);

    sysinfo(&info);
    note("memory %lu MiB, clock source %s", info.totalram * info.mem_unit >> 20,
         first_line("/sys/devices/system/clocksource/clocksource0/current_clocksource"));
    for (unsigned i = 0; i < count; i++)
        note("%s %s %s %s, IOMMU group %s", devices[i].pci, devices[i].virtio, devices[i].driver, devices[i].node,
             link_name("/sys/bus/pci/devices/%s/iommu_group", devices[i].pci));
}
