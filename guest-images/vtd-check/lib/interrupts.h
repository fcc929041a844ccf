// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
// Exceptions end the run with one line; interrupts are counted.
#pragma once
#include "lib/types.h"

enum {
    VECTOR_FIRST = 32, // the first that is no exception
    VECTOR_EDU_MSI = 33,
    VECTOR_EDU_INTX = 34,
    VECTOR_FAULT_EVENT = 35,
    VECTOR_INVALIDATION_EVENT = 36,
    VECTOR_VIRTIO = 37,
    VECTOR_COUNT = 48,
};

// Loads the IDT, masks the 8259s, enables the local APIC and interrupts.
void interrupts_init(void);

// Number of interrupts of `vector` since the last `interrupt_count_clear`.
u32 interrupt_count(unsigned vector);
void interrupt_count_clear(unsigned vector);

// Called at each arrival of `vector`, before the end-of-interrupt; for level-triggered lines.
void interrupt_on(unsigned vector, void (*handler)(void));

// The MSI for `vector` on this CPU.
#define MSI_ADDRESS 0xfee00000u
u32 msi_address(void);

// This CPU's APIC ID.
u32 apic_id(void);

// Routes every PCI interrupt line of the I/O APIC to `vector`, or masks them all if it is 0. False
// if there is no I/O APIC.
bool ioapic_route_pci(unsigned vector);
// The same through entry `index` of the interrupt remapping table, which has that vector, too.
bool ioapic_route_pci_remapped(unsigned vector, u16 index);
