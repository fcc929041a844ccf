// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
#include "hw/pci.h"
#include "lib/io.h"

enum {
    MSI_CONTROL_ENABLE = 1 << 16, // message control is the upper half of the capability's first word
    MSI_CONTROL_64BIT = 1 << 23,
    HEADER_BRIDGE = 1,
    EXPRESS_TO_PCI = 7, // in the upper half of the capability's first word
    MSIX_TABLE = 4, // the BAR in its low bits, and an offset
    MSIX_TABLE_BAR = 7,
    MSIX_CONTROL_MASK = 1 << 30,
    MSIX_CONTROL_ENABLE = 1u << 31,
    MSIX_ENTRY_SIZE = 16,
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

struct search {
    u32 id;
    pci_id *found;
    unsigned most, count;
};

// The bus behind a bridge that firmware has numbered, 0 if the function is none.
static u8 bus_behind(pci_id function)
{
    u8 secondary = (u8)(pci_read(function, PCI_BUSES) >> 8);
    bool is_bridge = (pci_read(function, PCI_HEADER) >> 16 & 0x7f) == HEADER_BRIDGE;

    // Away from the root numbers rise.
    return is_bridge && secondary > function >> 8 ? secondary : 0;
}

static void search_bus(struct search *search, u8 bus)
{
    for (unsigned device = 0; device < 32; device++) {
        pci_id function = (pci_id)(bus << 8 | device << 3);
        u32 id = pci_read(function, PCI_ID);

        if (id == search->id && search->count < search->most)
            search->found[search->count++] = function;
        if (id != ~0u && bus_behind(function))
            search_bus(search, bus_behind(function));
    }
}

unsigned pci_find(u32 id, pci_id *found, unsigned most)
{
    struct search search = {id, found, most, 0};

    search_bus(&search, 0);
    return search.count;
}

static bool is_to_pci(pci_id bridge)
{
    u16 express = pci_capability(bridge, PCI_CAP_EXPRESS);

    return express && (pci_read(bridge, express) >> 20 & 0xf) == EXPRESS_TO_PCI;
}

pci_id pci_requester(pci_id function)
{
    u8 bus = 0;

    while (bus != function >> 8) {
        u8 next = 0;

        for (unsigned device = 0; device < 32 && !next; device++) {
            pci_id bridge = (pci_id)(bus << 8 | device << 3);
            u32 buses = pci_read(bridge, PCI_BUSES);

            if (pci_read(bridge, PCI_ID) == ~0u || !bus_behind(bridge))
                continue;
            if (bus_behind(bridge) > function >> 8 || (u8)(buses >> 16) < function >> 8)
                continue;
            next = bus_behind(bridge);
            if (is_to_pci(bridge))
                return (pci_id)(next << 8);
        }
        if (!next)
            break;
        bus = next;
    }
    return function;
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

bool pci_msix_set(pci_id function, u32 vector, u32 address, u32 data)
{
    u16 msix = pci_capability(function, PCI_CAP_MSIX);
    u32 place, bar;
    u64 entry;

    if (!msix)
        return false;
    place = pci_read(function, msix + MSIX_TABLE);
    bar = pci_read(function, (u16)(PCI_BAR0 + 4 * (place & MSIX_TABLE_BAR))) & ~0xfu;
    if (!bar)
        return false;
    pci_write(function, msix, (pci_read(function, msix) | MSIX_CONTROL_ENABLE) & ~(u32)MSIX_CONTROL_MASK);
    entry = bar + (place & ~(u32)MSIX_TABLE_BAR) + (u64)vector * MSIX_ENTRY_SIZE;
    write32(entry, address);
    write32(entry + 4, 0);
    write32(entry + 8, data);
    write32(entry + 12, 0);
    return true;
}

void pci_msix_disable(pci_id function)
{
    u16 msix = pci_capability(function, PCI_CAP_MSIX);

    if (msix)
        pci_write(function, msix, pci_read(function, msix) & ~(u32)MSIX_CONTROL_ENABLE);
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
