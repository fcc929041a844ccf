// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
#include "edu.h"

#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "../kernel/files.h"

// Registers of edu's BAR 0 (QEMU's docs/specs/edu.rst), and its buffer.
enum { INTERRUPT_STATUS = 0x24, INTERRUPT_RAISE = 0x60, INTERRUPT_ACKNOWLEDGE = 0x64 };
enum { DMA_SOURCE = 0x80, DMA_DESTINATION = 0x88, DMA_COUNT = 0x90, DMA_COMMAND = 0x98, BUFFER = 0x40000 };
enum { DMA_START = 1, DMA_TO_MEMORY = 2 };

// PCI command register.
enum { COMMAND = 4, COMMAND_MEMORY = 2, COMMAND_BUS_MASTER = 4 };

struct wanted {
    char pci[32];
    unsigned skip; // so many come before it
};

static bool is_not_wanted(const char *name, void *context)
{
    struct wanted *wanted = context;

    if (strcmp(first_line("/sys/bus/pci/devices/%s/vendor", name), "0x1234") != 0 ||
        strcmp(first_line("/sys/bus/pci/devices/%s/device", name), "0x11e8") != 0)
        return true;
    if (wanted->skip--)
        return true;
    snprintf(wanted->pci, sizeof(wanted->pci), "%s", name);
    return false;
}

static volatile char *map_registers(const char *pci)
{
    char path[128];
    uint16_t command = 0;

    // Enables bridges on the way, too, which forward no DMA otherwise.
    snprintf(path, sizeof(path), "/sys/bus/pci/devices/%s/enable", pci);
    if (write_text(path, "1") != 0)
        return MAP_FAILED;
    snprintf(path, sizeof(path), "/sys/bus/pci/devices/%s/config", pci);
    int config = open(path, O_RDWR | O_CLOEXEC);
    if (config < 0 || pread(config, &command, 2, COMMAND) != 2)
        return MAP_FAILED;
    command |= COMMAND_MEMORY | COMMAND_BUS_MASTER;
    if (pwrite(config, &command, 2, COMMAND) != 2)
        return MAP_FAILED;
    close(config);

    snprintf(path, sizeof(path), "/sys/bus/pci/devices/%s/resource0", pci);
    int bar = open(path, O_RDWR | O_CLOEXEC);
    volatile char *registers = mmap(NULL, EDU_REGISTERS, PROT_READ | PROT_WRITE, MAP_SHARED, bar, 0);
    close(bar);
    return registers;
}

uint64_t physical_address(const void *page)
{
    uint64_t entry = 0;

    if (mlock(page, EDU_PAGE) < 0)
        return 0;
    int pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
    if (pread(pagemap, &entry, 8, (off_t)((uintptr_t)page / EDU_PAGE * 8)) != 8)
        entry = 0;
    close(pagemap);
    return (entry & ((UINT64_C(1) << 55) - 1)) * EDU_PAGE;
}

static void write_register(volatile char *registers, unsigned at, uint64_t value)
{
    *(volatile uint64_t *)(registers + at) = value;
}

bool edu_transfer(const struct edu *edu, uint64_t address, unsigned size, bool to_memory)
{
    volatile char *registers = edu->registers;
    double end = now() + PATIENCE_S;
    unsigned looks = 0;

    write_register(registers, DMA_SOURCE, to_memory ? BUFFER : address);
    write_register(registers, DMA_DESTINATION, to_memory ? address : BUFFER);
    write_register(registers, DMA_COUNT, size);
    write_register(registers, DMA_COMMAND, DMA_START | (to_memory ? DMA_TO_MEMORY : 0));
    while (*(volatile uint64_t *)(registers + DMA_COMMAND) & DMA_START) {
        if (now() > end)
            return false;
        // A look takes time, too: so many are more than QEMU's device needs, which takes 100 ms.
        // Sleeping takes a timer, and emulated machines have been seen to lose its interrupt.
        if (++looks > 10000)
            usleep(1000);
    }
    return true;
}

void edu_interrupt(const struct edu *edu, uint32_t reason)
{
    *(volatile uint32_t *)(edu->registers + INTERRUPT_RAISE) = reason;
}

uint32_t edu_acknowledge(const struct edu *edu)
{
    uint32_t reasons = *(volatile uint32_t *)(edu->registers + INTERRUPT_STATUS);

    *(volatile uint32_t *)(edu->registers + INTERRUPT_ACKNOWLEDGE) = reasons;
    return reasons;
}

bool edu_find(struct edu *edu, unsigned number)
{
    struct wanted wanted = {"", number};

    for_each_name("/sys/bus/pci/devices", is_not_wanted, &wanted);
    if (!wanted.pci[0])
        return false;
    memcpy(edu->pci, wanted.pci, sizeof(edu->pci));
    // Everything behind twostage's or QEMU's bridge from PCI Express to PCI, 1b36:000e, is one.
    bool is_conventional = strcmp(first_line("/sys/bus/pci/devices/%s/../device", edu->pci), "0x000e") == 0;
    unsigned domain = 0, bus = 0;
    if (is_conventional && sscanf(edu->pci, "%x:%x", &domain, &bus) == 2)
        snprintf(edu->requester, sizeof(edu->requester), "%04x:%02x:00.0", domain, bus);
    else
        snprintf(edu->requester, sizeof(edu->requester), "%s", edu->pci);
    edu->registers = MAP_FAILED;
    return true;
}

bool edu_open(struct edu *edu, unsigned number)
{
    if (!edu_find(edu, number))
        return false;
    edu->registers = map_registers(edu->pci);
    return true;
}

void edu_close(const struct edu *edu)
{
    munmap((void *)edu->registers, EDU_REGISTERS);
}
