// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
#include "hw/pci.h"

enum {
    MSI_CONTROL_ENABLE = 1 << 16, // message control is the upper half of the capability's first word
    MSI_CONTROL_64BIT = 1 << 23,
    EXPRESS_DEVICE_CAPABILITIES = 4,
    EXPRESS_FLR_CAPABLE = 1 << 28,
    EXPRESS_DEVICE_CONTROL = 8,
    EXPRESS_INITIATE_FLR = 1 << 15,
};

bool pci_has_pin(pci_id function)
{
    // The second byte of the register is the pin: 0 for none.
    return pci_read(function, PCI_INTERRUPT) >> 8 & 0xff;
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

    for (int most = 64; pci_has_ecam() && offset >= 0x100 && most; most--) {
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
    static u32 next;
    u32 bar = pci_read(function, PCI_BAR0) & ~0xfu;

    if (next == 0)
        next = pci_bar_window();
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

void pci_msi_disable(pci_id function)
{
    u16 msi = pci_capability(function, PCI_CAP_MSI);

    if (msi)
        pci_write(function, msi, pci_read(function, msi) & ~(u32)MSI_CONTROL_ENABLE);
}

bool pci_can_reset(pci_id function)
{
    u16 express = pci_capability(function, PCI_CAP_EXPRESS);

    return express && pci_read(function, express + EXPRESS_DEVICE_CAPABILITIES) & EXPRESS_FLR_CAPABLE;
}

void pci_reset(pci_id function)
{
    u16 control = pci_capability(function, PCI_CAP_EXPRESS) + EXPRESS_DEVICE_CONTROL;

    // The upper half is the status, whose bits are cleared by writing 1.
    pci_write(function, control, (u16)pci_read(function, control) | EXPRESS_INITIATE_FLR);
}
