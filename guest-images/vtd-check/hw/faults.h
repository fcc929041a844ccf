// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
// Fault recording registers (VT-d 11.4.14) and fault reasons (chapter 7).
#pragma once
#include "lib/types.h"

enum fault_reason {
    LEGACY_ROOT_NOT_PRESENT = 0x01,
    LEGACY_CONTEXT_NOT_PRESENT = 0x02,
    LEGACY_CONTEXT_INVALID = 0x03,
    LEGACY_ADDRESS_BEYOND = 0x04,
    LEGACY_NO_WRITE = 0x05,
    LEGACY_NO_READ = 0x06,
    LEGACY_TABLE_ACCESS = 0x07,
    LEGACY_ROOT_ACCESS = 0x08,
    LEGACY_CONTEXT_ACCESS = 0x09,
    LEGACY_ROOT_RESERVED = 0x0a,
    LEGACY_CONTEXT_RESERVED = 0x0b,
    LEGACY_TABLE_RESERVED = 0x0c,
    INTERRUPT_REQUEST_RESERVED = 0x20,
    INTERRUPT_INDEX_BEYOND = 0x21,
    INTERRUPT_ENTRY_NOT_PRESENT = 0x22,
    INTERRUPT_ENTRY_ACCESS = 0x23,
    INTERRUPT_ENTRY_RESERVED = 0x24,
    INTERRUPT_COMPATIBILITY_BLOCKED = 0x25,
    INTERRUPT_SOURCE_MISMATCH = 0x26,
    RTADDR_INVALID = 0x30,
    PASID_IN_LEGACY_MODE = 0x31,
    ROOT_ACCESS = 0x38,
    ROOT_NOT_PRESENT = 0x39,
    ROOT_RESERVED = 0x3a,
    CONTEXT_ACCESS = 0x40,
    CONTEXT_NOT_PRESENT = 0x41,
    CONTEXT_RESERVED = 0x42,
    PASID_NOT_ENABLED = 0x45,
    PASID_BEYOND = 0x46,
    PAGE_REQUEST_NOT_ENABLED = 0x47,
    RID_PASID_BEYOND = 0x48,
    PASID_DIRECTORY_ACCESS = 0x50,
    PASID_DIRECTORY_NOT_PRESENT = 0x51,
    PASID_DIRECTORY_RESERVED = 0x52,
    PASID_ENTRY_ACCESS = 0x58,
    PASID_ENTRY_NOT_PRESENT = 0x59,
    PASID_ENTRY_RESERVED = 0x5a,
    PASID_ENTRY_INVALID = 0x5b,
    FS_TABLE_ACCESS = 0x70,
    FS_NOT_PRESENT = 0x71,
    FS_RESERVED = 0x72,
    FS_TOP_TABLE_ACCESS = 0x73,
    FS_POINTER_BEYOND = 0x74,
    FS_TOP_TABLE_DENIED = 0x75,
    FS_TABLE_DENIED = 0x76,
    FS_FLAGS_DENIED = 0x77,
    SS_PERMISSION = 0x79,
    SS_RESERVED = 0x7a,
    NOT_CANONICAL = 0x80,
    NO_USER_ACCESS = 0x81,
    NO_WRITE = 0x85,
    NO_READ = 0x86,
};

struct fault {
    u64 address; // of the page
    u16 index;   // of an interrupt's table entry
    u16 source;
    u8 reason;
    bool is_read;
    bool has_pasid;
    u32 pasid;
};

// Takes the oldest pending record; false if there is none.
bool fault_take(struct fault *fault);

// Number of pending records, from the raw registers.
unsigned fault_pending(void);

// Clears every record and every status bit.
void faults_clear(void);

// Sends fault events to `vector`.
void fault_event_enable(unsigned vector);
void fault_event_mask(void);
