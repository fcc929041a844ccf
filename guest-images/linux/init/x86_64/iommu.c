// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
// VT-d, as Linux's driver shows it.
#include "../iommu.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../kernel/files.h"
#include "../kernel/kernel_log.h"
#include "../report.h"

// ECAP bits (Intel VT-d specification, section 11.4.3).
#define ECAP_SMTS (UINT64_C(1) << 43)
#define ECAP_FSTS (UINT64_C(1) << 47)

static const char *const of_interest[] = {"DMAR", "iommu", "IOMMU", "x2apic", "remapping", NULL};

// Linux writes "DMAR: [DMA Read ...", "DMAR: [DMA Write ..." and "DMAR: [INTR-REMAP] ...".
static const char *const faults[] = {"DMAR: [", "DMAR: DRHD: handling fault", NULL};

static void check_unit(const char *name)
{
    uint64_t ecap = strtoull(first_line("/sys/class/iommu/%s/intel-iommu/ecap", name), NULL, 16);

    note("%s: CAP %s, ECAP %s", name, first_line("/sys/class/iommu/%s/intel-iommu/cap", name),
         first_line("/sys/class/iommu/%s/intel-iommu/ecap", name));
    if ((ecap & ECAP_SMTS) && (ecap & ECAP_FSTS))
        passed("iommu", "%s has scalable mode and first-stage translation", name);
    else
        failed("iommu", "%s: ECAP %#llx lacks SMTS or FSTS", name, (unsigned long long)ecap);
}

// Whether device interrupts are remapped, according to their chips' names in /proc/interrupts.
static void check_interrupts(void)
{
    char line[1024];
    unsigned remapped = 0, others = 0;
    FILE *file = fopen("/proc/interrupts", "re");

    if (log_count("DMAR-IR: Enabled IRQ remapping in x2apic mode"))
        passed("iommu", "interrupt remapping in x2APIC mode");
    else
        failed("iommu", "the log does not say that interrupts are remapped in x2APIC mode");
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

static bool says_refused(const char *pci, bool write, uint64_t address)
{
    char place[96];

    // Before 7.2 the kernel omits the PCI domain.
    snprintf(place, sizeof(place), "%s] fault addr 0x%" PRIx64 " ", pci + strlen("0000:"), address);
    return log_count(write ? "DMAR: [DMA Write" : "DMAR: [DMA Read") && log_count(place);
}

const struct iommu iommu = {
    .unit = "VT-d unit",
    .prefix = "dmar",
    .of_interest = of_interest,
    .faults = faults,
    .domain = "DMA-FQ",
    .check_unit = check_unit,
    .check_interrupts = check_interrupts,
    .says_refused = says_refused,
};
