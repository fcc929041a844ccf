// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
#include "lib/interrupts.h"
#include "lib/console.h"
#include "lib/io.h"
#include "lib/memory.h"

enum {
    CODE_SELECTOR = 0x08,
    STUB_SIZE = 16, // as in vectors.S
    GATE_INTERRUPT = 0x8e00,
    PIC_MASTER_MASK = 0x21,
    PIC_SLAVE_MASK = 0xa1,
};

enum {
    LAPIC = 0xfee00000,
    LAPIC_ID = LAPIC + 0x20,
    LAPIC_TASK_PRIORITY = LAPIC + 0x80,
    LAPIC_EOI = LAPIC + 0xb0,
    LAPIC_SPURIOUS = LAPIC + 0xf0,
    LAPIC_ENABLED = 1 << 8,
    SPURIOUS_VECTOR = 47,
};

enum {
    IOAPIC_INDEX = 0xfec00000,
    IOAPIC_DATA = 0xfec00010,
    IOAPIC_VERSION = 1,
    IOAPIC_REDIRECTION = 0x10,
    IOAPIC_MASKED = 1 << 16,
    IOAPIC_LEVEL = 1 << 15,
    IOAPIC_ACTIVE_LOW = 1 << 13,
    IOAPIC_INDEX_HIGH = 1 << 11,
    IOAPIC_REMAPPABLE = 1 << 16, // of the upper half
    FIRST_PCI_LINE = 16,
    LAST_PCI_LINE = 23,
};

struct trap_frame {
    u64 registers[9];
    u64 vector, error, rip, cs, rflags, rsp, ss;
};

struct gate {
    u16 offset_low, selector, type, offset_middle;
    u32 offset_high, reserved;
};

extern char vector_stubs[];
static struct gate idt[VECTOR_COUNT];
static volatile u32 counts[VECTOR_COUNT];
static void (*handlers[VECTOR_COUNT])(void);

void trap_handler(const struct trap_frame *frame)
{
    if (frame->vector < VECTOR_FIRST) {
        u64 cr2;

        asm volatile("movq %%cr2, %0" : "=r"(cr2));
        print("\nexception %u error 0x%lx at RIP 0x%lx, CR2 0x%lx\n", (u32)frame->vector, frame->error,
              frame->rip, cr2);
        machine_exit(1);
    }
    counts[frame->vector]++;
    if (handlers[frame->vector])
        handlers[frame->vector]();
    if (frame->vector != SPURIOUS_VECTOR)
        write32(LAPIC_EOI, 0);
}

static void idt_load(void)
{
    struct {
        u16 limit;
        u64 base;
    } __attribute__((packed)) pointer = {sizeof(idt) - 1, gpa_of(idt)};

    for (unsigned vector = 0; vector < VECTOR_COUNT; vector++) {
        u64 stub = gpa_of(vector_stubs) + vector * STUB_SIZE;

        idt[vector] = (struct gate){(u16)stub, CODE_SELECTOR, GATE_INTERRUPT, (u16)(stub >> 16),
                                    (u32)(stub >> 32), 0};
    }
    asm volatile("lidt %0" : : "m"(pointer));
}

void interrupts_init(void)
{
    idt_load();
    out8(PIC_MASTER_MASK, 0xff);
    out8(PIC_SLAVE_MASK, 0xff);
    write32(LAPIC_TASK_PRIORITY, 0);
    write32(LAPIC_SPURIOUS, LAPIC_ENABLED | SPURIOUS_VECTOR);
    asm volatile("sti");
}

u32 interrupt_count(unsigned vector)
{
    return counts[vector];
}

void interrupt_count_clear(unsigned vector)
{
    counts[vector] = 0;
}

void interrupt_on(unsigned vector, void (*handler)(void))
{
    handlers[vector] = handler;
}

u32 msi_address(void)
{
    return MSI_ADDRESS | apic_id() << 12;
}

u32 apic_id(void)
{
    return read32(LAPIC_ID) >> 24;
}

static void ioapic_write(u32 index, u32 value)
{
    write32(IOAPIC_INDEX, index);
    write32(IOAPIC_DATA, value);
}

// `high` is the upper half of every entry; `low` is all of the lower one.
static bool route_pci(u32 high, u32 low)
{
    u32 version;

    write32(IOAPIC_INDEX, IOAPIC_VERSION);
    version = read32(IOAPIC_DATA);
    if (version == ~0u || bits(version, 23, 16) < LAST_PCI_LINE)
        return false;
    for (u32 line = FIRST_PCI_LINE; line <= LAST_PCI_LINE; line++) {
        ioapic_write(IOAPIC_REDIRECTION + 2 * line + 1, high);
        ioapic_write(IOAPIC_REDIRECTION + 2 * line, low);
    }
    return true;
}

bool ioapic_route_pci(unsigned vector)
{
    return route_pci(apic_id() << 24, vector ? IOAPIC_LEVEL | IOAPIC_ACTIVE_LOW | vector : IOAPIC_MASKED);
}

bool ioapic_route_pci_remapped(unsigned vector, u16 index)
{
    u32 index_high = index >> 15 ? IOAPIC_INDEX_HIGH : 0;

    return route_pci((u32)index << 17 | IOAPIC_REMAPPABLE,
                     IOAPIC_LEVEL | IOAPIC_ACTIVE_LOW | index_high | vector);
}
