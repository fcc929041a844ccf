// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
// The GICv3 that the device tree names, with its interrupt translation service (Arm IHI 0069): messages of devices
// are LPIs, which are looked for here, not taken.
#pragma once
#include "hw/pci.h"

// The first LPI there can be.
#define LPI_FIRST 8192u

// Takes memory. False if the device tree has none, or it does not answer.
bool its_init(void);

// What a device writes to (GITS_TRANSLATER).
u64 its_doorbell(void);

// From now on the function's message `event`, below 32, is this LPI. False if a command does not end.
bool its_map(pci_id function, u32 event, u32 lpi);

// Takes notice of an interrupt that is pending, and says which; 0 if there is none.
u32 its_take(void);
