// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
#include "hw/vtd.h"
#include "lib/cmdline.h"
#include "lib/wait.h"

#define DEFAULT_BASE 0xfed90000u

// Level-triggered bits of GSTS that a GCMD write must repeat.
#define GCMD_KEEP 0x96ffffffu

#define CCMD_ICC BIT(63)
#define IOTLB_IVT BIT(63)
#define IOTLB_DRAIN (BIT(48) | BIT(49))

struct vtd vtd_units[VTD_MOST];
unsigned vtd_count;
struct vtd *vtd = &vtd_units[0];

void vtd_use(unsigned unit)
{
    vtd = &vtd_units[unit];
}

static bool unit_init(u64 base)
{
    u32 version;

    vtd->base = base;
    version = vtd_read32(VTD_VER);
    if (version == 0 || version == ~0u)
        return false;
    vtd->cap = vtd_read64(VTD_CAP);
    vtd->ecap = vtd_read64(VTD_ECAP);
    vtd->fault_records = vtd->base + 16 * bits(vtd->cap, 33, 24);
    vtd->fault_record_count = 1 + (u32)bits(vtd->cap, 47, 40);
    vtd->iotlb = vtd->base + 16 * bits(vtd->ecap, 17, 8);
    return true;
}

bool vtd_init(void)
{
    u64 bases[VTD_MOST] = {cmdline_number("vtd", DEFAULT_BASE), cmdline_number("vtd2", 0)};

    for (vtd_count = 0; vtd_count < VTD_MOST && bases[vtd_count]; vtd_count++) {
        vtd_use(vtd_count);
        if (!unit_init(bases[vtd_count]))
            return false;
    }
    vtd_use(0);
    return true;
}

u32 vtd_read32(enum vtd_register offset)
{
    return read32(vtd->base + offset);
}

void vtd_write32(enum vtd_register offset, u32 value)
{
    write32(vtd->base + offset, value);
}

u64 vtd_read64(enum vtd_register offset)
{
    return read64(vtd->base + offset);
}

void vtd_write64(enum vtd_register offset, u64 value)
{
    write64(vtd->base + offset, value);
}

bool vtd_switch(u32 bit, bool on)
{
    u32 state = vtd_read32(VTD_GSTS) & GCMD_KEEP;

    vtd_write32(VTD_GCMD, on ? state | bit : state & ~bit);
    return WAIT_UNTIL(!!(vtd_read32(VTD_GSTS) & bit) == on);
}

static bool set_pointer(enum vtd_register pointer, u64 value, u32 command)
{
    vtd_write64(pointer, value);
    vtd_write32(VTD_GCMD, (vtd_read32(VTD_GSTS) & GCMD_KEEP) | command);
    return WAIT_UNTIL(vtd_read32(VTD_GSTS) & command);
}

bool vtd_set_root(u64 rtaddr)
{
    return set_pointer(VTD_RTADDR, rtaddr, (u32)GCMD_SRTP);
}

bool vtd_set_interrupt_table(u64 irta)
{
    return set_pointer(VTD_IRTA, irta, (u32)GCMD_SIRTP);
}

// "At least": a coarser granularity has a smaller number, and 0 means that nothing was done.
static bool done_as_asked(u64 actual, unsigned asked)
{
    return actual != 0 && actual <= asked;
}

bool vtd_invalidate_context(unsigned granularity, u16 domain, u16 source)
{
    vtd_write64(VTD_CCMD, CCMD_ICC | (u64)granularity << 61 | (u64)source << 16 | domain);
    return WAIT_UNTIL(!(vtd_read64(VTD_CCMD) & CCMD_ICC)) &&
           done_as_asked(bits(vtd_read64(VTD_CCMD), 60, 59), granularity);
}

bool vtd_invalidate_iotlb(unsigned granularity, u16 domain, u64 address, unsigned mask)
{
    write64(vtd->iotlb, address | mask);
    write64(vtd->iotlb + 8, IOTLB_IVT | (u64)granularity << 60 | IOTLB_DRAIN | (u64)domain << 32);
    return WAIT_UNTIL(!(read64(vtd->iotlb + 8) & IOTLB_IVT)) &&
           done_as_asked(bits(read64(vtd->iotlb + 8), 58, 57), granularity);
}
