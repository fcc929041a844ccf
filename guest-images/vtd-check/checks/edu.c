// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
// The device alone, translation disabled: the behaviour of `edu` that QEMU documents.
#include "fixture.h"

#define INTERRUPT_CAUSE 0x12u
// With MSI-X, each byte of the causes has a vector (Twostage's device; QEMU's has no MSI-X).
#define MSIX_CAUSE 0x30000u
#define MSIX_VECTOR 2u
// And BAR 2 has memory.
#define MEMORY_BAR (PCI_BAR0 + 8)
#define BARS 3u

static u32 reg(enum edu_register offset)
{
    return read32(DEVICE->registers + offset);
}

static void reg_write(enum edu_register offset, u32 value)
{
    write32(DEVICE->registers + offset, value);
}

static void identification(void)
{
    EXPECT((u16)reg(EDU_ID) == 0x00ed, "identification reads 0x%x", reg(EDU_ID));
}

static void liveness(void)
{
    reg_write(EDU_LIVENESS, 0x12345678);
    EXPECT(reg(EDU_LIVENESS) == ~0x12345678u, "0x%x", reg(EDU_LIVENESS));
}

static void factorial(void)
{
    reg_write(EDU_STATUS, 0);
    reg_write(EDU_FACTORIAL, 10);
    EXPECT(WAIT_UNTIL(!(reg(EDU_STATUS) & EDU_STATUS_COMPUTING)), "the computation does not end");
    EXPECT(reg(EDU_FACTORIAL) == 3628800, "10! = %u", reg(EDU_FACTORIAL));
}

static void interrupt_status(void)
{
    reg_write(EDU_IRQ_RAISE, INTERRUPT_CAUSE);
    EXPECT(reg(EDU_IRQ_STATUS) == INTERRUPT_CAUSE, "status 0x%x after raising", reg(EDU_IRQ_STATUS));
    reg_write(EDU_IRQ_ACK, INTERRUPT_CAUSE);
    EXPECT(reg(EDU_IRQ_STATUS) == 0, "status 0x%x after acknowledging", reg(EDU_IRQ_STATUS));
}

static void msi(void)
{
    bool arrived;

    SKIP_UNLESS(pci_msi_set(DEVICE->place, msi_address(), VECTOR_EDU_MSI), "no MSI capability");
    interrupt_count_clear(VECTOR_EDU_MSI);
    reg_write(EDU_IRQ_RAISE, INTERRUPT_CAUSE);
    arrived = WAIT_UNTIL(interrupt_count(VECTOR_EDU_MSI));
    reg_write(EDU_IRQ_ACK, INTERRUPT_CAUSE);
    pci_msi_disable(DEVICE->place);
    EXPECT(arrived, "the message does not arrive");
    EXPECT(interrupt_count(VECTOR_EDU_MSI) == 1, "%u arrivals", interrupt_count(VECTOR_EDU_MSI));
}

static void msix(void)
{
    bool arrived;

    SKIP_UNLESS(pci_msix_set(DEVICE->place, MSIX_VECTOR, msi_address(), VECTOR_EDU_MSI), "no MSI-X capability");
    interrupt_count_clear(VECTOR_EDU_MSI);
    reg_write(EDU_IRQ_RAISE, INTERRUPT_CAUSE);
    reg_write(EDU_IRQ_RAISE, MSIX_CAUSE);
    arrived = WAIT_UNTIL(interrupt_count(VECTOR_EDU_MSI));
    reg_write(EDU_IRQ_ACK, INTERRUPT_CAUSE | MSIX_CAUSE);
    pci_msix_disable(DEVICE->place);
    EXPECT(arrived, "the message does not arrive");
    EXPECT(interrupt_count(VECTOR_EDU_MSI) == 1, "%u arrivals", interrupt_count(VECTOR_EDU_MSI));
}

static void acknowledge(void)
{
    reg_write(EDU_IRQ_ACK, INTERRUPT_CAUSE);
}

static void intx(void)
{
    bool arrived;

    SKIP_UNLESS(pci_has_pin(DEVICE->place), "the device has no interrupt pin");
    SKIP_UNLESS(ioapic_route_pci(VECTOR_EDU_INTX), "no I/O APIC");
    interrupt_on(VECTOR_EDU_INTX, acknowledge);
    interrupt_count_clear(VECTOR_EDU_INTX);
    reg_write(EDU_IRQ_RAISE, INTERRUPT_CAUSE);
    arrived = WAIT_UNTIL(interrupt_count(VECTOR_EDU_INTX));
    acknowledge();
    (void)ioapic_route_pci(0);
    EXPECT(arrived, "the line's interrupt does not arrive");
    EXPECT(reg(EDU_IRQ_STATUS) == 0, "status 0x%x after acknowledging", reg(EDU_IRQ_STATUS));
}

static void dma_round_trip(void)
{
    volatile u64 *page = page_new();

    page[0] = 0x1122334455667788;
    EXPECT(edu_read_from(DEVICE, NO_PASID, gpa_of(page), 512, 8), "the read does not end");
    EXPECT(edu_write_to(DEVICE, NO_PASID, gpa_of(page) + 8, 512, 8), "the write does not end");
    EXPECT(page[1] == page[0], "0x%lx went in, 0x%lx came out", page[0], page[1]);
}

static void dma_interrupt(void)
{
    volatile u64 *page = page_new();
    bool arrived;

    SKIP_UNLESS(pci_msi_set(DEVICE->place, msi_address(), VECTOR_EDU_MSI), "no MSI capability");
    interrupt_count_clear(VECTOR_EDU_MSI);
    write64(DEVICE->registers + EDU_DMA_SOURCE, gpa_of(page));
    write64(DEVICE->registers + EDU_DMA_DESTINATION, EDU_BUFFER);
    write64(DEVICE->registers + EDU_DMA_COUNT, 8);
    write64(DEVICE->registers + EDU_DMA_COMMAND, EDU_DMA_START | EDU_DMA_IRQ);
    arrived = WAIT_UNTIL(interrupt_count(VECTOR_EDU_MSI));
    EXPECT(arrived, "the message does not arrive");
    EXPECT(reg(EDU_IRQ_STATUS) == EDU_IRQ_DMA_DONE, "status 0x%x", reg(EDU_IRQ_STATUS));
    reg_write(EDU_IRQ_ACK, EDU_IRQ_DMA_DONE);
    pci_msi_disable(DEVICE->place);
}

static void dma_whole_buffer(void)
{
    volatile u64 *pages = pages_new(2);
    const u32 last = EDU_BUFFER_SIZE / 8 - 1;

    pages[0] = 0xaaaa;
    pages[last] = 0xbbbb;
    EXPECT(edu_read_from(DEVICE, NO_PASID, gpa_of(pages), 0, EDU_BUFFER_SIZE), "the read does not end");
    EXPECT(edu_write_to(DEVICE, NO_PASID, gpa_of(pages) + PAGE_SIZE, 0, EDU_BUFFER_SIZE),
           "the write does not end");
    EXPECT(pages[512] == 0xaaaa && pages[512 + last] == 0xbbbb, "first word 0x%lx, last 0x%lx", pages[512],
           pages[512 + last]);
}

static void memory(void)
{
    u64 bar = pci_read(DEVICE->place, MEMORY_BAR) & ~0xfu;

    SKIP_UNLESS(bar, "no BAR 2");
    for (u32 i = 0; i < PAGE_SIZE; i += 8)
        write64(bar + i, ~(u64)i);
    for (u32 i = 0; i < PAGE_SIZE; i += 8)
        EXPECT(read64(bar + i) == ~(u64)i, "0x%lx at 0x%x", read64(bar + i), i);
}

// Like a device that was just switched on (PCIe 6.6.2), with nothing left of its last user.
static void function_level_reset(void)
{
    volatile u64 *page = page_new();
    u32 bars[BARS], command;

    for (u16 n = 0; n < BARS; n++)
        bars[n] = pci_read(DEVICE->place, (u16)(PCI_BAR0 + 4 * n));
    SKIP_UNLESS(pci_can_reset(DEVICE->place), "the device has no function-level reset");
    page[0] = 0x1122334455667788;
    EXPECT(edu_read_from(DEVICE, NO_PASID, gpa_of(page), 512, 8), "the read does not end");
    reg_write(EDU_LIVENESS, 0x12345678);
    reg_write(EDU_IRQ_RAISE, INTERRUPT_CAUSE);
    pci_reset(DEVICE->place);
    command = pci_read(DEVICE->place, PCI_COMMAND);
    // Whatever was found, the checks that follow need the device. Its BARs may have lost their
    // addresses.
    for (u16 n = 0; n < BARS; n++)
        pci_write(DEVICE->place, (u16)(PCI_BAR0 + 4 * n), bars[n]);
    pci_write(DEVICE->place, PCI_COMMAND, PCI_COMMAND_MEMORY | PCI_COMMAND_MASTER);
    if (DEVICE->has_pasid)
        edu_pasid_enable(DEVICE, true);
    // vfio-pci restores the register after the reset, and a VMM may show the guest that (QEMU does).
    if (!devices_assigned())
        EXPECT(!(command & (PCI_COMMAND_MEMORY | PCI_COMMAND_MASTER)), "command 0x%04x",
               (u16)command);
    EXPECT(reg(EDU_LIVENESS) == 0 && reg(EDU_IRQ_STATUS) == 0, "liveness 0x%x, interrupt status 0x%x",
           reg(EDU_LIVENESS), reg(EDU_IRQ_STATUS));
    EXPECT(edu_write_to(DEVICE, NO_PASID, gpa_of(page), 512, 8), "the write does not end");
    EXPECT(page[0] == 0, "the buffer has 0x%lx", page[0]);
}

static const struct check list[] = {
    {"identification register", identification},
    {"liveness register inverts", liveness},
    {"factorial", factorial},
    {"interrupt status is raised and acknowledged", interrupt_status},
    {"MSI arrives once", msi},
    {"MSI-X arrives once, by the vector of its cause", msix},
    {"INTx arrives through the I/O APIC", intx},
    {"DMA in and out with translation off", dma_round_trip},
    {"DMA of the whole buffer", dma_whole_buffer},
    {"DMA completion interrupt", dma_interrupt},
    {"memory in BAR 2 keeps what is written", memory},
    {"function-level reset", function_level_reset},
};
CHECK_GROUP(edu, list, NULL, NULL);
