// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
// The `edu` device (1234:11e8): the educational device that QEMU documents, with an additional
// register of Twostage's that selects the PASID of a DMA.
#pragma once
#include "hw/pci.h"

#define EDU_MOST 4

enum edu_register {
    EDU_ID = 0x00,
    EDU_LIVENESS = 0x04,
    EDU_FACTORIAL = 0x08,
    EDU_STATUS = 0x20,
    EDU_IRQ_STATUS = 0x24,
    EDU_IRQ_RAISE = 0x60,
    EDU_IRQ_ACK = 0x64,
    EDU_DMA_SOURCE = 0x80,
    EDU_DMA_DESTINATION = 0x88,
    EDU_DMA_COUNT = 0x90,
    EDU_DMA_COMMAND = 0x98,
    EDU_DMA_PASID = 0xa0,

    EDU_STATUS_COMPUTING = 1 << 0,
    EDU_DMA_START = 1 << 0,
    EDU_DMA_TO_MEMORY = 1 << 1,
    EDU_DMA_IRQ = 1 << 2,
    EDU_IRQ_DMA_DONE = 0x100,
};

// The address of the device's buffer for its DMA.
#define EDU_BUFFER 0x40000ull
#define EDU_BUFFER_SIZE 4096u

// No PASID: the transaction carries only the Requester ID.
#define NO_PASID (~0u)

struct edu {
    pci_id place; // where its configuration space is
    pci_id id;    // the Requester ID of its requests
    u64 registers;
    bool has_pasid; // the PASID extended capability is there, and enabled by `edu_init`
    bool is_loaded; // its buffer holds what the checks expect
};

// The devices in use.
extern struct edu *edus;
extern unsigned edu_count;

// Finds and enables them. All are in use.
void edu_init(void);

// Restricts the devices in use to `most` of them, from number `first` on.
void edu_use(unsigned first, unsigned most);

// A device with the same Requester ID, in use or not; null if there is none.
const struct edu *edu_sharing(const struct edu *edu);

// Starts a transfer and does not wait for it; and whether it is over.
void edu_start(const struct edu *edu, u64 source, u64 destination, u32 count, u32 direction);
bool edu_is_done(const struct edu *edu);

// Lets the device's requests carry a PASID, or not, by its PASID capability, which it must have.
void edu_pasid_enable(const struct edu *edu, bool on);

// Whether the device has the ATS capability; lets it cache translations, or not.
bool edu_has_ats(const struct edu *edu);
void edu_ats_enable(const struct edu *edu, bool on);

// Copies `count` bytes of the device's buffer from `offset` to memory at `iova`, or the reverse.
// False when the DMA does not finish.
bool edu_write_to(const struct edu *edu, u32 pasid, u64 iova, u32 offset, u32 count);
bool edu_read_from(const struct edu *edu, u32 pasid, u64 iova, u32 offset, u32 count);

// Whether every device's DMA can use `address`: all addresses, or 28 bits if an edu has its
// original DMA mask. Tests the devices the first time, which needs translation to be disabled.
bool edu_reaches(u64 address);
