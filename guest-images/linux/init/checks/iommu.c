// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
#include <stdio.h>
#include <string.h>

#include "../devices/devices.h"
#include "../iommu.h"
#include "../kernel/files.h"
#include "../kernel/kernel_log.h"
#include "../kernel/options.h"
#include "../report.h"
#include "checks.h"

static void say(const char *line)
{
    note("%s", line);
}

static bool take_unit(const char *name, void *context)
{
    unsigned *units = context;

    if (strncmp(name, iommu.prefix, strlen(iommu.prefix)) != 0)
        return true;
    ++*units;
    iommu.check_unit(name);
    return true;
}

// The domain type that the kernel's command line selects, as far as the units let it.
static const char *wanted_domain(void)
{
    if (on_command_line("iommu=pt"))
        return "identity";
    if (on_command_line("iommu.strict=1") || (iommu.is_always_strict && iommu.is_always_strict()))
        return "DMA";
    return on_command_line("iommu.strict=0") ? "DMA-FQ" : iommu.domain;
}

static void check_domain(const struct device *device)
{
    const char *wanted = option("domain", wanted_domain());
    const char *type = first_line("/sys/bus/pci/devices/%s/iommu_group/type", device->pci);
    const char *unit = link_name("/sys/bus/pci/devices/%s/iommu", device->pci);

    if (!type[0])
        skipped("iommu", "%s is in no IOMMU group", device->pci);
    else if (strcmp(type, wanted) == 0)
        passed("iommu", "%s, behind %s, has a domain of type %s", device->pci, unit, type);
    else
        failed("iommu", "%s has a domain of type %s, not %s", device->pci, type, wanted);
}

// Whether the number of units is right, and a device is behind each.
static void check_units(const struct device *devices, unsigned count, unsigned units)
{
    unsigned wanted = (unsigned)option_number("iommus", 1), used = 0;
    char seen[MAX_DEVICES][64]; // such as smmu3.0x000000000a000000

    for (unsigned i = 0; i < count; i++) {
        const char *unit = link_name("/sys/bus/pci/devices/%s/iommu", devices[i].pci);
        unsigned known = 0;
        while (known < used && strcmp(seen[known], unit) != 0)
            known++;
        if (unit[0] && known == used)
            snprintf(seen[used++], sizeof(seen[0]), "%s", unit);
    }
    if (units == wanted && used == wanted)
        passed("iommu", "%u %ss, devices behind %u", units, iommu.unit, used);
    else
        failed("iommu", "%u %ss, devices behind %u, not %u (twostage.iommus)", units, iommu.unit, used, wanted);
}

void check_iommu(void)
{
    struct device devices[MAX_DEVICES];
    unsigned count = find_devices(devices), units = 0;

    log_lines(iommu.of_interest, say);
    for_each_name("/sys/class/iommu", take_unit, &units);
    check_units(devices, count, units);
    for (unsigned i = 0; i < count; i++)
        check_domain(&devices[i]);
    iommu.check_interrupts();
}

void check_clean(void)
{
    unsigned refused = log_lines(iommu.faults, say);

    if (refused == 0)
        passed("clean", "no IOMMU fault in the log");
    else
        failed("clean", "%u lines of the log are about faults", refused);
}
