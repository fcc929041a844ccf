// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
// An `edu` device has no driver in Linux, so nothing is mapped in its domain. This process drives it
// through sysfs, and has it read and write a page of this process by its physical address: the IOMMU
// must refuse both, and the kernel must say so.
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "../../pattern.h"
#include "../files.h"
#include "../kernel_log.h"
#include "../report.h"
#include "checks.h"

enum { PAGE = 4096, TIMEOUT_S = 5, SEED = 77 };

// Registers of edu's BAR 0 (QEMU's docs/specs/edu.rst), and its buffer.
enum { DMA_SOURCE = 0x80, DMA_DESTINATION = 0x88, DMA_COUNT = 0x90, DMA_COMMAND = 0x98, BUFFER = 0x40000, SIZE = 0x100000 };
enum { DMA_START = 1, DMA_TO_MEMORY = 2 };

// PCI command register.
enum { COMMAND = 4, COMMAND_MEMORY = 2, COMMAND_BUS_MASTER = 4 };

static bool is_edu(const char *name, void *found)
{
    if (strcmp(first_line("/sys/bus/pci/devices/%s/vendor", name), "0x1234") != 0 ||
        strcmp(first_line("/sys/bus/pci/devices/%s/device", name), "0x11e8") != 0)
        return true;
    snprintf(found, 32, "%s", name);
    return false;
}

// The device's BAR 0, with the device allowed to do DMA; MAP_FAILED with errno.
static volatile char *open_device(const char *pci)
{
    char path[128];
    uint16_t command = 0;

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
    volatile char *registers = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, bar, 0);
    close(bar);
    return registers;
}

// The physical address of a page of this process; 0 if the kernel does not tell.
static uint64_t physical_address(const void *page)
{
    uint64_t entry = 0;
    int pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);

    if (pread(pagemap, &entry, 8, (off_t)((uintptr_t)page / PAGE * 8)) != 8)
        entry = 0;
    close(pagemap);
    return (entry & ((UINT64_C(1) << 55) - 1)) * PAGE;
}

static void write_register(volatile char *registers, unsigned at, uint64_t value)
{
    *(volatile uint64_t *)(registers + at) = value;
}

// One page between the device's buffer and memory. Whether it ended.
static bool transfer(volatile char *registers, uint64_t address, bool to_memory)
{
    double end = now() + TIMEOUT_S;

    write_register(registers, DMA_SOURCE, to_memory ? BUFFER : address);
    write_register(registers, DMA_DESTINATION, to_memory ? address : BUFFER);
    write_register(registers, DMA_COUNT, PAGE);
    write_register(registers, DMA_COMMAND, DMA_START | (to_memory ? DMA_TO_MEMORY : 0));
    while (*(volatile uint64_t *)(registers + DMA_COMMAND) & DMA_START) {
        if (now() > end)
            return false;
        usleep(1000);
    }
    return true;
}

struct fault {
    const char *access;
    char place[96];
};

// Whether a line of the log has both parts.
static bool is_logged(const void *context)
{
    const struct fault *fault = context;

    return log_count(fault->access) && log_count(fault->place);
}

static void check_direction(const char *pci, volatile char *registers, uint64_t address, bool to_memory)
{
    struct fault fault = {.access = to_memory ? "DMAR: [DMA Write" : "DMAR: [DMA Read"};
    const char *what = to_memory ? "a write" : "a read";

    // Before 7.2 the kernel leaves out the PCI domain.
    snprintf(fault.place, sizeof(fault.place), "%s] fault addr 0x%" PRIx64 " ", pci + strlen("0000:"), address);
    if (!transfer(registers, address, to_memory))
        failed("isolation", "%s: %s by DMA does not end", pci, what);
    else if (wait_until(is_logged, &fault, TIMEOUT_S))
        passed("isolation", "%s: %s by DMA at %#" PRIx64 " was refused, and the log says so", pci, what, address);
    else
        failed("isolation", "%s: no line of the log has '%s' and '%s'", pci, fault.access, fault.place);
}

void check_isolation(void)
{
    static char page[PAGE] __attribute__((aligned(PAGE)));
    char pci[32] = "";

    for_each_name("/sys/bus/pci/devices", is_edu, pci);
    if (!pci[0]) {
        skipped("isolation", "there is no edu device");
        return;
    }
    pattern_fill(page, PAGE, SEED, 0);
    volatile char *registers = open_device(pci);
    uint64_t address = physical_address(page);
    if (registers == MAP_FAILED || mlock(page, PAGE) < 0 || !address) {
        failed("isolation", "%s: %s", pci, strerror(errno));
        return;
    }
    check_direction(pci, registers, address, false);
    check_direction(pci, registers, address, true);
    if (pattern_check(page, PAGE, SEED, 0) == PAGE)
        passed("isolation", "%s: memory is as it was", pci);
    else
        failed("isolation", "%s: memory has changed", pci);
    munmap((void *)registers, SIZE);
}
