// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
// PCI configuration space: the ECAM that the device tree names.
#include "hw/pci.h"
#include "lib/devicetree.h"
#include "lib/io.h"

static const char host_bridge[] = "pci-host-ecam-generic";

static u64 ecam;

void pci_init(void)
{
    ecam = address_of(host_bridge);
}

bool pci_has_ecam(void)
{
    return ecam != 0;
}

u32 pci_read(pci_id function, u16 offset)
{
    return read32(ecam + ((u64)function << 12) + offset);
}

void pci_write(pci_id function, u16 offset, u32 value)
{
    write32(ecam + ((u64)function << 12) + offset, value);
}

// `ranges`: kind, PCI address (2 cells), address (2), size (2).
u32 pci_bar_window(void)
{
    enum { ENTRY = 7, KIND_MASK = 0x03000000, MEMORY_32_BIT = 0x02000000 };
    u32 length;
    const u32 *ranges = property_of_compatible(host_bridge, "ranges", &length);

    for (u32 at = 0; ranges && (at + ENTRY) * 4 <= length; at += ENTRY)
        if ((cell(ranges, at) & KIND_MASK) == MEMORY_32_BIT)
            return cell(ranges, at + 2);
    return 0;
}
