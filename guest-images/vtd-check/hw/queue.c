// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
#include "hw/queue.h"
#include "hw/vtd.h"
#include "lib/memory.h"
#include "lib/wait.h"

#define IQA_WIDE BIT(11)
#define HEAD_MASK 0x7fff0u

static volatile u32 status;
static u32 next_status = 1;

bool queue_start(bool wide_descriptors)
{
    return queue_start_at(gpa_of(page_new()), wide_descriptors);
}

bool queue_start_at(u64 base, bool wide_descriptors)
{
    vtd->queue.ring = base;
    vtd->queue.wide = wide_descriptors;
    vtd->queue.tail = 0;
    vtd_write64(VTD_IQT, 0);
    vtd_write64(VTD_IQA, base | (vtd->queue.wide ? IQA_WIDE : 0));
    return vtd_switch(GCMD_QIE, true);
}

void queue_stop(void)
{
    if (vtd_read32(VTD_GSTS) & GCMD_QIE)
        (void)vtd_switch(GCMD_QIE, false);
}

unsigned queue_descriptor_size(void)
{
    return vtd->queue.wide ? 32 : 16;
}

u32 queue_bytes(void)
{
    return PAGE_SIZE;
}

u32 queue_tail(void)
{
    return vtd->queue.tail;
}

u64 *queue_slot(u32 offset)
{
    return (u64 *)(uintptr_t)(vtd->queue.ring + offset);
}

void queue_put(struct descriptor descriptor)
{
    u64 *slot = queue_slot(vtd->queue.tail);

    slot[0] = descriptor.low;
    slot[1] = descriptor.high;
    if (vtd->queue.wide)
        slot[2] = slot[3] = 0;
    vtd->queue.tail = (vtd->queue.tail + queue_descriptor_size()) % queue_bytes();
}

void queue_submit(void)
{
    vtd_write64(VTD_IQT, vtd->queue.tail);
}

bool queue_flush(void)
{
    u32 wanted = next_status++;

    queue_put(inv_wait(WAIT_SW | WAIT_FENCE, wanted, gpa_of(&status)));
    queue_submit();
    return WAIT_UNTIL(status == wanted || queue_error()) && status == wanted;
}

bool queue_run(struct descriptor descriptor)
{
    queue_put(descriptor);
    return queue_flush();
}

bool queue_invalidate_all(void)
{
    queue_put(inv_context(CONTEXT_GLOBAL, 0, 0));
    if (vtd->queue.wide)
        queue_put(inv_pasid_cache(PASID_CACHE_GLOBAL, 0, 0));
    return queue_run(inv_iotlb(IOTLB_GLOBAL, 0, 0));
}

unsigned queue_error(void)
{
    unsigned reason;

    if (!(vtd_read32(VTD_FSTS) & FSTS_IQE))
        return 0;
    reason = (unsigned)bits(vtd_read64(VTD_IQERCD), 3, 0);
    return reason ? reason : 0xff;
}

void queue_recover(void)
{
    u64 *slot = queue_slot((u32)vtd_read64(VTD_IQH) & HEAD_MASK);

    slot[0] = inv_wait(WAIT_FENCE, 0, 0).low;
    slot[1] = 0;
    if (vtd->queue.wide)
        slot[2] = slot[3] = 0;
    vtd_write32(VTD_FSTS, FSTS_IQE);
}
