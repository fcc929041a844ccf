// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../devices.h"
#include "../files.h"
#include "../kernel_log.h"
#include "../options.h"
#include "../report.h"
#include "checks.h"

// ECAP bits (Intel VT-d specification, section 11.4.3).
#define ECAP_SMTS (UINT64_C(1) << 43)
#define ECAP_FSTS (UINT64_C(1) << 47)

static void say(const char *line)
{
    note("%s", line);
}

static bool take_unit(const char *name, void *context)
{
    unsigned *units = context;
    uint64_t ecap = strtoull(first_line("/sys/class/iommu/%s/intel-iommu/ecap", name), NULL, 16);

    if (strncmp(name, "dmar", 4) != 0)
        return true;
    ++*units;
    note("%s: CAP %s, ECAP %s", name, first_line("/sys/class/iommu/%s/intel-iommu/cap", name),
         first_line("/sys/class/iommu/%s/intel-iommu/ecap", name));
    if ((ecap & ECAP_SMTS) && (ecap & ECAP_FSTS))
        passed("iommu", "%s has scalable mode and first-stage translation", name);
    else
        failed("iommu", "%s: ECAP %#llx lacks SMTS or FSTS", name, (unsigned long long)ecap);
    return true;
}

// Linux's names: DMA is strict, DMA-FQ lazy, identity pass-through.
static void check_domain(const struct device *device)
{
    const char *strict = on_command_line("iommu.strict=1") ? "DMA" : "DMA-FQ";
    const char *wanted = option("domain", on_command_line("iommu=pt") ? "identity" : strict);
    const char *type = first_line("/sys/bus/pci/devices/%s/iommu_group/type", device->pci);
    const char *unit = link_name("/sys/bus/pci/devices/%s/iommu", device->pci);

    if (!type[0])
        skipped("iommu", "%s is in no IOMMU group", device->pci);
    else if (strcmp(type, wanted) == 0)
        passed("iommu", "%s, behind %s, has a domain of type %s", device->pci, unit, type);
    else
        failed("iommu", "%s has a domain of type %s, not %s", device->pci, type, wanted);
}

// Whether there are as many units as there should be, and a device behind each.
static void check_units(const struct device *devices, unsigned count, unsigned units)
{
    unsigned wanted = (unsigned)option_number("iommus", 1), used = 0;
    char seen[MAX_DEVICES][16];

    for (unsigned i = 0; i < count; i++) {
        const char *unit = link_name("/sys/bus/pci/devices/%s/iommu", devices[i].pci);
        unsigned known = 0;
        while (known < used && strcmp(seen[known], unit) != 0)
            known++;
        if (unit[0] && known == used)
            snprintf(seen[used++], sizeof(seen[0]), "%s", unit);
    }
    if (units == wanted && used == wanted)
        passed("iommu", "%u VT-d units, devices behind %u", units, used);
    else
        failed("iommu", "%u VT-d units, devices behind %u, not %u (twostage.iommus)", units, used, wanted);
}

// Whether the interrupts of devices go through remapping, as /proc/interrupts names their chips.
static void check_interrupts(void)
{
    char line[1024];
    unsigned remapped = 0, others = 0;
    FILE *file = fopen("/proc/interrupts", "re");

    while (file && fgets(line, sizeof(line), file)) {
        if (!strstr(line, "virtio") && !strstr(line, "ttyS"))
            continue;
        if (strstr(line, " IR-"))
            remapped++;
        else
            others++;
    }
    if (file)
        fclose(file);
    if (remapped && !others)
        passed("iommu", "%u device interrupts, all remapped", remapped);
    else
        failed("iommu", "%u device interrupts are remapped, %u are not", remapped, others);
}

void check_iommu(void)
{
    static const char *const interesting[] = {"DMAR", "iommu", "IOMMU", "x2apic", "remapping", NULL};
    struct device devices[MAX_DEVICES];
    unsigned count = find_devices(devices), units = 0;

    log_lines(interesting, say);
    for_each_name("/sys/class/iommu", take_unit, &units);
    check_units(devices, count, units);
    for (unsigned i = 0; i < count; i++)
        check_domain(&devices[i]);
    if (log_count("DMAR-IR: Enabled IRQ remapping in x2apic mode"))
        passed("iommu", "interrupt remapping in x2APIC mode");
    else
        failed("iommu", "the log does not say that interrupts are remapped in x2APIC mode");
    check_interrupts();
}

void check_clean(void)
{
    static const char *const faults[] = {dmar_fault, "DMAR: DRHD: handling fault", NULL};

    if (log_lines(faults, say) == 0)
        passed("clean", "no DMAR fault in the log");
    else
        failed("clean", "%u DMAR faults in the log", log_count(dmar_fault));
}
