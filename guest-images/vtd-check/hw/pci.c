// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
#include "pci.h"
#include "../lib/cmdline.h"
#include "../lib/interrupts.h"
#include "../lib/io.h"

#define DEFAULT_ECAM 0xb0000000u
#define BAR_WINDOW 0xe0000000u

enum {
    CONFIG_ADDRESS = 0xcf8,
    CONFIG_DATA = 0xcfc,
    HOST_BRIDGE = 0,
    MSI_CONTROL_ENABLE = 1 << 16, // message control is the upper half of the capability's first word
    MSI_CONTROL_64BIT = 1 << 23,
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

unsigned pci_find(u32 id, pci_id *found, unsigned most)
{
    unsigned count = 0;

    for (pci_id device = 0; device < 32 && count < most; device++)
        if (pci_read((pci_id)(device << 3), PCI_ID) == id)
            found[count++] = (pci_id)(device << 3);
    return count;
}

u16 pci_capability(pci_id function, u8 id)
{
    u8 offset;

    if (!(pci_read(function, PCI_COMMAND) & PCI_STATUS_CAPABILITIES))
        return 0;
    offset = (u8)pci_read(function, PCI_CAPABILITIES) & 0xfc;
    for (int most = 48; offset && most; most--) {
        u32 header = pci_read(function, offset);

        if ((u8)header == id)
            return offset;
        offset = (u8)(header >> 8) & 0xfc;
    }
    return 0;
}

u16 pci_extended_capability(pci_id function, u16 id)
{
    u16 offset = 0x100;

    for (int most = 64; ecam && offset >= 0x100 && most; most--) {
        u32 header = pci_read(function, offset);

        if (header == 0 || header == ~0u)
            return 0;
        if ((u16)header == id)
            return offset;
        offset = (u16)(header >> 20) & 0xffc;
    }
    return 0;
}

u64 pci_enable(pci_id function, u32 size)
{
    static u32 next = BAR_WINDOW;
    u32 bar = pci_read(function, PCI_BAR0) & ~0xfu;

    if (bar == 0) {
        bar = (next + size - 1) & ~(size - 1);
        next = bar + size;
        pci_write(function, PCI_BAR0, bar);
    }
    pci_write(function, PCI_COMMAND, PCI_COMMAND_MEMORY | PCI_COMMAND_MASTER);
    return bar;
}

bool pci_msi_set(pci_id function, u32 address, u32 data)
{
    u16 msi = pci_capability(function, PCI_CAP_MSI);
    u32 control;

    if (!msi)
        return false;
    control = pci_read(function, msi);
    pci_write(function, msi + 4, address);
    if (control & MSI_CONTROL_64BIT) {
        pci_write(function, msi + 8, 0);
        pci_write(function, msi + 12, data);
    } else {
        pci_write(function, msi + 8, data);
    }
    pci_write(function, msi, control | MSI_CONTROL_ENABLE);
    return true;
}

bool pci_msi_enable(pci_id function, unsigned vector)
{
    return pci_msi_set(function, msi_address(), vector);
}

void pci_msi_disable(pci_id function)
{
    u16 msi = pci_capability(function, PCI_CAP_MSI);

    if (msi)
        pci_write(function, msi, pci_read(function, msi) & ~(u32)MSI_CONTROL_ENABLE);
}
