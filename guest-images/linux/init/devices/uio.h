// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
// INTx of a PCI function without driver, through Linux's uio_pci_generic. An interrupt masks it in
// the function.
#pragma once

#include <stdbool.h>

struct uio {
    char pci[32];
    int file;
};

// Binds the function to uio_pci_generic. NULL, or the error; must be closed in any case.
const char *uio_open(struct uio *uio, const char *pci);

// Closes it, and leaves it without a driver.
void uio_close(struct uio *uio);

// Waits for an interrupt. False if none comes within PATIENCE_S.
bool uio_wait(const struct uio *uio);

// Unmasks INTx. False, with errno, on an error.
bool uio_unmask(const struct uio *uio);
