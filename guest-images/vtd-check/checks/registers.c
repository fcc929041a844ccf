// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
// The registers after reset, and the consistency of the capabilities.
#include "fixture.h"

static void version(void)
{
    u32 value = vtd_read32(VTD_VER);

    EXPECT(bits(value, 7, 4) >= 1 && bits(value, 31, 8) == 0, "VER 0x%x", value);
}

static void capability(void)
{
    unsigned usable_widths = cap_sagaw() & 0xe;

    EXPECT(bits(vtd->cap, 2, 0) != 7, "ND is reserved");
    EXPECT((cap_sagaw() & ~0xeu) == 0, "SAGAW 0x%x has reserved bits", cap_sagaw());
    EXPECT(usable_widths || !ecap_second_stage(), "second stage without a width");
    EXPECT(cap_mgaw() >= 39 && cap_mgaw() <= 57, "MGAW %u", cap_mgaw());
    EXPECT(!cap_fs_5_level() || ecap_first_stage(), "5-level first stage without a first stage");
    EXPECT(!cap_ss_1g() || cap_ss_2m(), "1 GiB second-stage pages without 2 MiB ones");
}

static void extended_capability(void)
{
    EXPECT(!ecap_scalable() || ecap_qi(), "scalable mode without queued invalidation");
    EXPECT(!ecap_first_stage() || ecap_scalable(), "first stage without scalable mode");
    EXPECT(!ecap_nested() || (ecap_first_stage() && ecap_second_stage()), "nesting without both stages");
    EXPECT(!ecap_pasid() || ecap_scalable(), "PASIDs without scalable mode");
}

static void register_places(void)
{
    u64 records_end = vtd->fault_records + 16ull * vtd->fault_record_count;

    EXPECT(vtd->fault_records >= vtd->base + 0xc0, "fault records at offset 0x%lx", vtd->fault_records - vtd->base);
    EXPECT(vtd->iotlb >= vtd->base + 0xc0, "IOTLB registers at offset 0x%lx", vtd->iotlb - vtd->base);
    EXPECT(vtd->iotlb >= records_end || vtd->iotlb + 16 <= vtd->fault_records, "they overlap");
}

static void reset_state(void)
{
    EXPECT((vtd_read32(VTD_GSTS) & (GCMD_TE | GCMD_QIE)) == 0, "GSTS 0x%x", vtd_read32(VTD_GSTS));
    EXPECT(vtd_read32(VTD_GCMD) == 0, "GCMD reads 0x%x", vtd_read32(VTD_GCMD));
    EXPECT(vtd_read32(VTD_FSTS) == 0, "FSTS 0x%x", vtd_read32(VTD_FSTS));
    EXPECT(vtd_read32(VTD_FECTL) == ECTL_IM, "FECTL 0x%x", vtd_read32(VTD_FECTL));
    EXPECT(vtd_read32(VTD_IECTL) == ECTL_IM, "IECTL 0x%x", vtd_read32(VTD_IECTL));
    EXPECT(vtd_read64(VTD_IQH) == 0, "IQH 0x%lx", vtd_read64(VTD_IQH));
}

static void read_only(void)
{
    vtd_write64(VTD_CAP, ~vtd->cap);
    vtd_write64(VTD_ECAP, ~vtd->ecap);
    vtd_write32(VTD_GSTS, ~0u);
    vtd_write64(VTD_IQH, 0x7fff0);
    EXPECT(vtd_read64(VTD_CAP) == vtd->cap && vtd_read64(VTD_ECAP) == vtd->ecap, "CAP or ECAP changed");
    EXPECT((vtd_read32(VTD_GSTS) & (GCMD_TE | GCMD_QIE)) == 0, "GSTS 0x%x", vtd_read32(VTD_GSTS));
    EXPECT(vtd_read64(VTD_IQH) == 0, "IQH 0x%lx", vtd_read64(VTD_IQH));
}

static void halves(void)
{
    vtd_write32(VTD_RTADDR, 0x12345000);
    vtd_write32(VTD_RTADDR + 4, 0x1);
    EXPECT(vtd_read64(VTD_RTADDR) == 0x112345000, "RTADDR 0x%lx", vtd_read64(VTD_RTADDR));
    EXPECT(vtd_read32(VTD_CAP) == (u32)vtd->cap, "low half of CAP 0x%x", vtd_read32(VTD_CAP));
    EXPECT(vtd_read32(VTD_CAP + 4) == vtd->cap >> 32, "high half of CAP 0x%x", vtd_read32(VTD_CAP + 4));
    vtd_write64(VTD_RTADDR, 0);
}

static const struct check list[] = {
    {"VER is a version", version},
    {"CAP agrees with itself", capability},
    {"ECAP agrees with itself", extended_capability},
    {"fault records and IOTLB registers have places of their own", register_places},
    {"reset leaves translation, queue and events off", reset_state},
    {"read-only registers stay as they are", read_only},
    {"64-bit registers can be used in halves", halves},
};
CHECK_GROUP(registers, list, NULL, NULL);
