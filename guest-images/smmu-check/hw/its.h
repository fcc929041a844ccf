// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
// The GICv3 that the device tree names, with its interrupt translation service (Arm IHI 0069):
// devices' MSIs are LPIs, which are polled here.
#pragma once
#include "hw/pci.h"

// The first LPI.
#define LPI_FIRST 8192u

// Allocates memory. False if the device tree has none, or it does not respond.
bool its_init(void);

// The address for MSIs (GITS_TRANSLATER).
u64 its_doorbell(void);

// Maps the function's MSI `event`, below 32, to this LPI. False if a command does not complete.
bool its_map(pci_id function, u32 event, u32 lpi);

// Acknowledges a pending interrupt and returns its number; 0 if there is none.
u32 its_take(void);
