// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
// PCI functions of bus 0 and behind bridges. Access to configuration space is provided by each guest.
#pragma once
#include "lib/types.h"

enum {
    PCI_ID = 0x00,
    PCI_COMMAND = 0x04, // command in the low half, status in the high half
    PCI_HEADER = 0x0c, // its type in the third byte
    PCI_BAR0 = 0x10,
    PCI_BUSES = 0x18, // of a bridge: its bus, the one behind it and the last one
    PCI_CAPABILITIES = 0x34,
    PCI_INTERRUPT = 0x3c, // line and pin

    PCI_COMMAND_MEMORY = 1 << 1,
    PCI_COMMAND_MASTER = 1 << 2,
    PCI_COMMAND_INTX_OFF = 1 << 10,
    PCI_STATUS_CAPABILITIES = 1 << 20,

    PCI_CAP_MSI = 0x05,
    PCI_CAP_EXPRESS = 0x10,
    PCI_CAP_MSIX = 0x11,
    PCI_EXT_CAP_ATS = 0x0f,
    PCI_EXT_CAP_PRI = 0x13,
    PCI_EXT_CAP_PASID = 0x1b,
};

// A function by bus, device and function, or a Requester ID, as in fault records.
typedef u16 pci_id;

// Provided by each guest: finds configuration space; whether its extended part is accessible;
// accesses; the range for BARs that firmware has not placed.
void pci_init(void);
bool pci_has_ecam(void);
u32 pci_read(pci_id function, u16 offset);
void pci_write(pci_id function, u16 offset, u32 value);
u32 pci_bar_window(void);

// Whether the function has an interrupt pin (INTx).
bool pci_has_pin(pci_id function);

// Finds first functions of devices with this vendor and device ID (as register 0 reads), on bus 0
// and behind bridges as firmware has numbered their buses; returns how many.
unsigned pci_find(u32 id, pci_id *found, unsigned most);

// The Requester ID of the requests of a function found so: behind a bridge from PCI Express to PCI
// it is device 0, function 0 of the bus behind that bridge.
pci_id pci_requester(pci_id function);

// Offset of a capability, 0 if the function lacks it. Extended ones need ECAM.
u16 pci_capability(pci_id function, u8 id);
u16 pci_extended_capability(pci_id function, u16 id);

// Address of BAR 0 (32-bit memory); places it if firmware has not, and enables memory decoding and
// bus mastering.
u64 pci_enable(pci_id function, u32 size);

// Makes the function's single MSI write `data` to `address`; false if it has no MSI capability.
bool pci_msi_set(pci_id function, u32 address, u32 data);

void pci_msi_disable(pci_id function);

// Enables MSI-X and makes the vector write `data` to `address`; false if the function has none, or
// nobody has placed the BAR with its table.
bool pci_msix_set(pci_id function, u32 vector, u32 address, u32 data);

void pci_msix_disable(pci_id function);

// Whether the function has a function-level reset (PCIe 6.6.2), and does it: then it answers
// configuration accesses only, and its BARs may have no address.
bool pci_can_reset(pci_id function);
void pci_reset(pci_id function);
