// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
// An `edu` device raises INTx: as often as it was told to, and no more.
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>

#include "../devices/edu.h"
#include "../devices/uio.h"
#include "../kernel/interrupts.h"
#include "../report.h"
#include "checks.h"

enum { OPERATIONS = 50 };

// NULL, or the error.
static const char *interrupt(const struct edu *edu, const struct uio *uio, uint32_t reason)
{
    static char wrong[96];

    edu_interrupt(edu, reason);
    if (!uio_wait(uio))
        return "no interrupt";
    uint32_t found = edu_acknowledge(edu);
    if (!uio_unmask(uio))
        return strerror(errno);
    if (found == reason)
        return NULL;
    snprintf(wrong, sizeof(wrong), "the device interrupts for %#x, not %#x", found, reason);
    return wrong;
}

static void check_pin(const struct edu *edu, const struct uio *uio)
{
    unsigned long before = interrupt_count("uio_pci_generic"), counted;
    const char *wrong = NULL;
    unsigned done = 0;

    while (done < OPERATIONS && !wrong) {
        wrong = interrupt(edu, uio, 1 << done % 8);
        done++;
    }
    counted = interrupt_count("uio_pci_generic") - before;
    if (wrong)
        failed("intx", "%s: operation %u: %s", edu->pci, done, wrong);
    else if (counted != done)
        failed("intx", "%s: %lu interrupts for %u operations", edu->pci, counted, done);
    else
        passed("intx", "%s: %u operations, as many interrupts", edu->pci, done);
}

void check_intx(void)
{
    struct edu edu;
    struct uio uio;

    if (!edu_open(&edu, 0)) {
        skipped("intx", "there is no edu device");
        return;
    }
    const char *wrong = edu.registers == MAP_FAILED ? strerror(errno) : NULL;
    if (!wrong)
        wrong = uio_open(&uio, edu.pci);
    if (wrong)
        failed("intx", "%s: %s", edu.pci, wrong);
    else
        check_pin(&edu, &uio);
    if (edu.registers != MAP_FAILED) {
        uio_close(&uio);
        edu_close(&edu);
    }
}
