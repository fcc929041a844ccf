// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
// What the checks need to know about the machine's IOMMU: one file per architecture.
#pragma once

#include <stdbool.h>
#include <stdint.h>

struct iommu {
    const char *unit;                // what one is called in results
    const char *prefix;              // of its name in /sys/class/iommu
    const char *const *of_interest;  // parts of lines of the log to show
    const char *const *faults;       // parts of lines that say that a unit refused something
    const char *domain;              // Linux's default type of one: DMA is strict, DMA-FQ lazy
    // Whether Linux is strict whatever its command line says. NULL: never.
    bool (*is_always_strict)(void);
    void (*check_unit)(const char *name);
    void (*check_interrupts)(void);
    // Whether the log has a refused access of this function to this address.
    bool (*says_refused)(const char *pci, bool write, uint64_t address);
};

extern const struct iommu iommu;
