// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
// The remapping unit's registers (Intel VT-d specification, chapter 11).
#pragma once
#include "lib/types.h"

enum vtd_register {
    VTD_VER = 0x000,
    VTD_CAP = 0x008,
    VTD_ECAP = 0x010,
    VTD_GCMD = 0x018,
    VTD_GSTS = 0x01c,
    VTD_RTADDR = 0x020,
    VTD_CCMD = 0x028,
    VTD_FSTS = 0x034,
    VTD_FECTL = 0x038,
    VTD_FEDATA = 0x03c,
    VTD_FEADDR = 0x040,
    VTD_FEUADDR = 0x044,
    VTD_IQH = 0x080,
    VTD_IQT = 0x088,
    VTD_IQA = 0x090,
    VTD_ICS = 0x09c,
    VTD_IECTL = 0x0a0,
    VTD_IEDATA = 0x0a4,
    VTD_IEADDR = 0x0a8,
    VTD_IEUADDR = 0x0ac,
    VTD_IQERCD = 0x0b0,
    VTD_IRTA = 0x0b8,
    VTD_PQH = 0x0c0,
    VTD_PQT = 0x0c8,
    VTD_PQA = 0x0d0,
    VTD_PRS = 0x0dc,
    VTD_PECTL = 0x0e0,
    VTD_PEDATA = 0x0e4,
    VTD_PEADDR = 0x0e8,
};

// GCMD and GSTS.
#define GCMD_TE BIT(31)
#define GCMD_SRTP BIT(30)
#define GCMD_QIE BIT(26)
#define GCMD_IRE BIT(25)
#define GCMD_SIRTP BIT(24)
#define GCMD_CFI BIT(23)

// FSTS.
#define FSTS_PFO BIT(0)
#define FSTS_PPF BIT(1)
#define FSTS_IQE BIT(4)
#define FSTS_ICE BIT(5)
#define FSTS_ITE BIT(6)

// PRS.
#define PRS_PPR BIT(0)
#define PRS_PRO BIT(1)

// FECTL, IECTL and PECTL.
#define ECTL_IM BIT(31)
#define ECTL_IP BIT(30)

// ICS.
#define ICS_IWC BIT(0)

// RTADDR: translation table mode.
#define RTADDR_LEGACY (0ull << 10)
#define RTADDR_SCALABLE (1ull << 10)
#define RTADDR_RESERVED_MODE (2ull << 10)

// IQERCD.IQEI: why the queue stopped.
enum {
    IQEI_TAIL = 1,
    IQEI_FETCH = 2,
    IQEI_TYPE = 3,
    IQEI_RESERVED = 4,
    IQEI_WIDTH = 5,
    IQEI_TAIL_ALIGNMENT = 6,
};

// Software's state of the invalidation queue (see queue.h).
struct queue {
    u64 ring;
    u32 tail;
    bool wide;
};

struct vtd {
    u64 base;
    u64 cap, ecap;
    u64 fault_records; // address of the first
    u32 fault_record_count;
    u64 iotlb; // address of IVA; the IOTLB register follows
    struct queue queue;
};

#define VTD_MOST 2

// The units (`vtd=` and `vtd2=` on the command line), and the current one.
extern struct vtd vtd_units[VTD_MOST];
extern unsigned vtd_count;
extern struct vtd *vtd;

// Finds the units; false if nothing answers at the address of the last one tried.
bool vtd_init(void);

// Makes this unit the current one.
void vtd_use(unsigned unit);

u32 vtd_read32(enum vtd_register offset);
void vtd_write32(enum vtd_register offset, u32 value);
u64 vtd_read64(enum vtd_register offset);
void vtd_write64(enum vtd_register offset, u64 value);

// Capabilities by their names in the specification.
static inline unsigned cap_domain_bits(void) { return 4 + 2 * (unsigned)bits(vtd->cap, 2, 0); }
static inline bool cap_caching_mode(void) { return bits(vtd->cap, 7, 7); }
static inline unsigned cap_sagaw(void) { return (unsigned)bits(vtd->cap, 12, 8); }
static inline unsigned cap_mgaw(void) { return 1 + (unsigned)bits(vtd->cap, 21, 16); }
static inline bool cap_ss_2m(void) { return bits(vtd->cap, 34, 34); }
static inline bool cap_ss_1g(void) { return bits(vtd->cap, 35, 35); }
static inline bool cap_psi(void) { return bits(vtd->cap, 39, 39); }
static inline unsigned cap_mamv(void) { return (unsigned)bits(vtd->cap, 53, 48); }
static inline bool cap_fs_1g(void) { return bits(vtd->cap, 56, 56); }
static inline bool cap_fs_5_level(void) { return bits(vtd->cap, 60, 60); }
static inline bool ecap_qi(void) { return bits(vtd->ecap, 1, 1); }
static inline bool ecap_device_tlb(void) { return bits(vtd->ecap, 2, 2); }
static inline bool ecap_interrupt_remapping(void) { return bits(vtd->ecap, 3, 3); }
static inline bool ecap_extended_interrupts(void) { return bits(vtd->ecap, 4, 4); }
static inline bool ecap_pass_through(void) { return bits(vtd->ecap, 6, 6); }
static inline bool ecap_nested(void) { return bits(vtd->ecap, 26, 26); }
static inline bool ecap_page_requests(void) { return bits(vtd->ecap, 29, 29); }
static inline unsigned ecap_pasid_bits(void) { return 1 + (unsigned)bits(vtd->ecap, 39, 35); }
static inline bool ecap_pasid(void) { return bits(vtd->ecap, 40, 40); }
static inline bool ecap_scalable(void) { return bits(vtd->ecap, 43, 43); }
static inline bool ecap_second_stage_flags(void) { return bits(vtd->ecap, 45, 45); }
static inline bool ecap_second_stage(void) { return bits(vtd->ecap, 46, 46); }
static inline bool ecap_first_stage(void) { return bits(vtd->ecap, 47, 47); }
static inline bool ecap_rid_pasid(void) { return bits(vtd->ecap, 49, 49); }

// Enables or disables translation or the queue and waits until GSTS agrees.
bool vtd_switch(u32 bit, bool on);

// Sets the root table pointer to `rtaddr`.
bool vtd_set_root(u64 rtaddr);

// The same for IRTA and GCMD.SIRTP.
bool vtd_set_interrupt_table(u64 irta);

// Register-based invalidation, only while the queue is disabled. Granularity: 1 global, 2 domain, 3
// device (context cache) or page (IOTLB). True if the unit did at least that much.
bool vtd_invalidate_context(unsigned granularity, u16 domain, u16 source);
bool vtd_invalidate_iotlb(unsigned granularity, u16 domain, u64 address, unsigned mask);
