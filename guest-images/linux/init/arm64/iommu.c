// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
// SMMUv3, as Linux's driver shows it.
#include "../iommu.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#include "../kernel/interrupts.h"
#include "../kernel/kernel_log.h"
#include "../report.h"

static const char *const of_interest[] = {"arm-smmu-v3", "iommu:", "ITS", NULL};

static const char *const faults[] = {
    "event: ", "unpriv data ", "events lost", "CMDQ error", "CMD_SYNC timeout", "global error", "Service Failure", NULL,
};

static void check_unit(const char *name)
{
    if (log_count("arm-smmu-v3") && log_count("oas ") && log_count("entries for cmdq"))
        passed("iommu", "%s has command and event queues", name);
    else
        failed("iommu", "the log does not say what %s has", name);
}

static void add_if_silent(const char *text, unsigned long count, void *context)
{
    unsigned *silent = context;

    (void)text;
    *silent += count == 0;
}

// Whether devices use MSIs through the ITS, and these arrive.
static void check_interrupts(void)
{
    unsigned silent = 0, sources = for_each_interrupt("ITS-PCI-MSI", add_if_silent, &silent);

    if (sources > silent)
        passed("iommu", "%u device interrupts through the ITS, %u of them used", sources, sources - silent);
    else
        failed("iommu", "%u device interrupts through the ITS, none used", sources);
}

static bool says_refused(const char *pci, bool write, uint64_t address)
{
    char event[128];
    unsigned device, function;

    // Stream IDs are requester IDs. A second line has more about the access.
    if (sscanf(pci, "%*x:%*x:%x.%u", &device, &function) != 2)
        return false;
    snprintf(event, sizeof(event), "event: F_TRANSLATION client: %s sid: 0x%x ssid: 0x0 iova: 0x%" PRIx64 " ", pci,
             device << 3 | function, address);
    return log_count(event) && log_count(write ? "data write s1" : "data read s1");
}

const struct iommu iommu = {
    .unit = "SMMUv3",
    .prefix = "smmu3.",
    .of_interest = of_interest,
    .faults = faults,
    .domain = "DMA",
    .check_unit = check_unit,
    .check_interrupts = check_interrupts,
    .says_refused = says_refused,
};
