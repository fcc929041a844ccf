// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
#include "hw/faults.h"
#include "hw/vtd.h"
#include "lib/interrupts.h"
#include "lib/io.h"

// The top dword of a record has F, the pending bit, which is cleared by writing 1.
#define RECORD_SIZE 16
#define RECORD_TOP 12
#define RECORD_F BIT(31)
#define FSTS_ERRORS (FSTS_PFO | FSTS_IQE | FSTS_ICE | FSTS_ITE)

static u64 record(u32 index)
{
    return vtd->fault_records + RECORD_SIZE * index;
}

static bool is_pending(u32 index)
{
    return read32(record(index) + RECORD_TOP) & RECORD_F;
}

bool fault_take(struct fault *fault)
{
    u32 status = vtd_read32(VTD_FSTS);
    u32 first = (u32)bits(status, 15, 8);

    if (!(status & FSTS_PPF))
        return false;
    // FRI is the first record of a run; those already taken are before the oldest pending one.
    for (u32 step = 0; step < vtd->fault_record_count; step++) {
        u32 index = (first + step) % vtd->fault_record_count;
        u64 low, high;

        if (!is_pending(index))
            continue;
        low = read64(record(index));
        high = read64(record(index) + 8);
        *fault = (struct fault){
            .address = low & ~(PAGE_SIZE - 1),
            .index = (u16)bits(low, 63, 48),
            .source = (u16)high,
            .reason = (u8)bits(high, 39, 32),
            .is_read = bits(high, 62, 62),
            .has_pasid = bits(high, 31, 31),
            .pasid = (u32)bits(high, 59, 40),
        };
        write32(record(index) + RECORD_TOP, (u32)RECORD_F);
        return true;
    }
    return false;
}

unsigned fault_pending(void)
{
    unsigned count = 0;

    for (u32 index = 0; index < vtd->fault_record_count; index++)
        count += is_pending(index);
    return count;
}

void faults_clear(void)
{
    for (u32 index = 0; index < vtd->fault_record_count; index++)
        if (is_pending(index))
            write32(record(index) + RECORD_TOP, (u32)RECORD_F);
    vtd_write32(VTD_FSTS, FSTS_ERRORS);
}

void fault_event_enable(unsigned vector)
{
    vtd_write32(VTD_FEDATA, vector);
    vtd_write32(VTD_FEADDR, msi_address());
    vtd_write32(VTD_FEUADDR, 0);
    vtd_write32(VTD_FECTL, 0);
}

void fault_event_mask(void)
{
    vtd_write32(VTD_FECTL, (u32)ECTL_IM);
}
