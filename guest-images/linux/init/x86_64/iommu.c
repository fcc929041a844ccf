// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
// VT-d, as Linux's driver shows it.
#include "../iommu.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../kernel/files.h"
#include "../kernel/kernel_log.h"
#include "../kernel/options.h"
#include "../report.h"

// Bits of CAP and ECAP (Intel VT-d specification, sections 11.4.2 and 11.4.3).
#define CAP_CM (UINT64_C(1) << 7)
#define ECAP_SMTS (UINT64_C(1) << 43)
#define ECAP_SSTS (UINT64_C(1) << 46)
#define ECAP_FSTS (UINT64_C(1) << 47)

static const char *const of_interest[] = {"DMAR", "iommu", "IOMMU", "x2apic", "remapping", NULL};

// Linux writes "DMAR: [DMA Read ...", "DMAR: [DMA Write ..." and "DMAR: [INTR-REMAP] ...".
static const char *const faults[] = {"DMAR: [", "DMAR: DRHD: handling fault", NULL};

static uint64_t unit_register(const char *unit, const char *name)
{
    return strtoull(first_line("/sys/class/iommu/%s/intel-iommu/%s", unit, name), NULL, 16);
}

// Mirrors follow what a guest invalidates (CAP.CM), which Linux omits for what it maps in a
// first-stage table.
static void check_unit(const char *name)
{
    uint64_t cap = unit_register(name, "cap"), ecap = unit_register(name, "ecap");
    uint64_t stages = ecap & (ECAP_SSTS | ECAP_FSTS);
    bool is_mirrored = option_number("mirrored", 0);

    note("%s: CAP %" PRIx64 ", ECAP %" PRIx64, name, cap, ecap);
    if (!(ecap & ECAP_SMTS))
        failed("iommu", "%s: ECAP %#" PRIx64 " lacks SMTS", name, ecap);
    else if (is_mirrored && (stages != ECAP_SSTS || !(cap & CAP_CM)))
        failed("iommu", "%s: over mirrors there are CM and SSTS, but no FSTS; CAP is %#" PRIx64 ", ECAP %#" PRIx64, name,
               cap, ecap);
    else if (is_mirrored)
        passed("iommu", "%s has scalable mode, caching mode and only the second stage", name);
    else if (stages & ECAP_FSTS)
        passed("iommu", "%s has scalable mode and first-stage translation", name);
    else
        failed("iommu", "%s: ECAP %#" PRIx64 " lacks FSTS", name, ecap);
}

static bool is_strict_because_of(const char *name, void *context)
{
    uint64_t cap = unit_register(name, "cap"), ecap = unit_register(name, "ecap");
    bool legacy = !(ecap & ECAP_SMTS) || log_count("DMAR: Scalable mode is disallowed");

    if (strncmp(name, "dmar", 4) == 0 && (cap & CAP_CM) && (legacy || !(ecap & ECAP_FSTS)))
        *(bool *)context = true;
    return true;
}

// Linux does not batch invalidations (intel_iommu_init) if one of the units has caching mode, and
// domains there have second-stage tables: then all domains are strict.
static bool is_always_strict(void)
{
    bool strict = false;

    for_each_name("/sys/class/iommu", is_strict_because_of, &strict);
    return strict;
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
    .is_always_strict = is_always_strict,
    .check_unit = check_unit,
    .check_interrupts = check_interrupts,
    .says_refused = says_refused,
};
