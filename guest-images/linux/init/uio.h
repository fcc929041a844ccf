// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
// The pin (INTx) of a PCI function without driver, through Linux's uio_pci_generic. It is masked in the function when
// it has interrupted.
#pragma once

#include <stdbool.h>

struct uio {
    char pci[32];
    int file;
};

// Gives the function to uio_pci_generic. NULL, or what is wrong; to be closed in any case.
const char *uio_open(struct uio *uio, const char *pci);

// Closes it, and leaves it without a driver.
void uio_close(struct uio *uio);

// Waits for an interrupt. False if none came within PATIENCE_S.
bool uio_wait(const struct uio *uio);

// Lets the pin interrupt again. False, with errno, if that cannot be had.
bool uio_unmask(const struct uio *uio);
