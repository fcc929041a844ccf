// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
// An `edu` device (QEMU's docs/specs/edu.rst), which has no driver in Linux.
#pragma once

#include <stdbool.h>
#include <stdint.h>

enum { EDU_PAGE = 4096, EDU_REGISTERS = 0x100000 };

struct edu {
    char pci[32];
    char requester[32]; // what the IOMMU sees: behind a bridge to PCI, device 0 of its bus
    volatile char *registers; // BAR 0; MAP_FAILED, with errno, if it cannot be had
};

// The one of this number, from 0, without its registers. False if there are not so many.
bool edu_find(struct edu *edu, unsigned number);

// The same, with its registers through sysfs, and bus mastering enabled.
bool edu_open(struct edu *edu, unsigned number);
void edu_close(const struct edu *edu);

// Copies up to a page between the device's buffer and memory, by DMA. Returns whether it finished.
bool edu_transfer(const struct edu *edu, uint64_t address, unsigned size, bool to_memory);

// Makes it interrupt, with these bits as the reason.
void edu_interrupt(const struct edu *edu, uint32_t reason);

// Acknowledges its interrupts, so that INTx, if used, is deasserted.
uint32_t edu_acknowledge(const struct edu *edu);

// The physical address of a page of this process, which stays there; 0, with errno, if the kernel
// does not reveal it.
uint64_t physical_address(const void *page);
