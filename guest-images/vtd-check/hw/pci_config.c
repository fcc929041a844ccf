// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
// PCI configuration space: ECAM if there is one, ports 0xCF8/0xCFC otherwise.
#include "hw/pci.h"
#include "lib/cmdline.h"
#include "lib/io.h"

#define DEFAULT_ECAM 0xb0000000u
#define BAR_WINDOW 0xe0000000u

enum {
    CONFIG_ADDRESS = 0xcf8,
    CONFIG_DATA = 0xcfc,
    HOST_BRIDGE = 0,
};

static u64 ecam;

static u32 port_read(pci_id function, u16 offset)
{
    out32(CONFIG_ADDRESS, 0x80000000u | (u32)function << 8 | (offset & 0xfc));
    return in32(CONFIG_DATA);
}

void pci_init(void)
{
    u64 base = cmdline_number("ecam", DEFAULT_ECAM);
    u32 bridge = read32(base);

    if (bridge != ~0u && bridge == port_read(HOST_BRIDGE, PCI_ID))
        ecam = base;
}

bool pci_has_ecam(void)
{
    return ecam != 0;
}

u32 pci_read(pci_id function, u16 offset)
{
    if (ecam)
        return read32(ecam + ((u64)function << 12) + offset);
    return port_read(function, offset);
}

void pci_write(pci_id function, u16 offset, u32 value)
{
    if (ecam) {
        write32(ecam + ((u64)function << 12) + offset, value);
        return;
    }
    out32(CONFIG_ADDRESS, 0x80000000u | (u32)function << 8 | (offset & 0xfc));
    out32(CONFIG_DATA, value);
}

u32 pci_bar_window(void)
{
    return BAR_WINDOW;
}
