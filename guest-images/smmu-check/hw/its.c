// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
#include "hw/its.h"
#include "lib/devicetree.h"
#include "lib/io.h"
#include "lib/memory.h"
#include "lib/wait.h"

enum {
    GICD_CTLR = 0x00,
    GICD_CTLR_ENABLE_GROUP_1 = 1 << 1,
    GICD_CTLR_AFFINITY_ROUTING = 1 << 4,

    GICR_CTLR = 0x00,
    GICR_WAKER = 0x14,
    GICR_PROPBASER = 0x70,
    GICR_PENDBASER = 0x78,
    GICR_CTLR_ENABLE_LPIS = 1 << 0,
    GICR_WAKER_PROCESSOR_SLEEP = 1 << 1,
    GICR_WAKER_CHILDREN_ASLEEP = 1 << 2,

    GITS_CTLR = 0x00,
    GITS_TYPER = 0x08,
    GITS_CBASER = 0x80,
    GITS_CWRITER = 0x88,
    GITS_CREADR = 0x90,
    GITS_BASER = 0x100,
    GITS_BASERS = 8,
    GITS_TRANSLATER = 0x10040,
    GITS_CTLR_ENABLED = 1 << 0,

    SYNC = 0x05,
    MAPD = 0x08,
    MAPC = 0x09,
    MAPTI = 0x0a,
    INV = 0x0c,

    EVENT_BITS = 5,
    ID_BITS = 16,
    COMMAND_SIZE = 32,
    LPI_ENABLED = 0xa0 | 1 << 1 | 1 << 0, // a priority, a bit that is 1, enabled
};

#define PAGES_64K 16u
#define GITS_TYPER_PTA BIT(19)
#define TABLE_VALID BIT(63)
#define TABLE_INNER_SHAREABLE (1ull << 10)
#define TABLE_PAGE_64K (2ull << 8)
#define CBASER_WRITE_BACK (7ull << 59 | TABLE_INNER_SHAREABLE)
#define GICR_WRITE_BACK (7ull << 7 | TABLE_INNER_SHAREABLE)
#define PENDBASER_ZEROED BIT(62)
#define NO_INTERRUPT 1023u

static u64 its, redistributor;
static volatile u8 *configuration; // of LPIs, a byte each
static volatile u64 *commands;
static u32 next_command; // offset

// The only processor's collection number in commands.
static u64 target(void)
{
    return read64(its + GITS_TYPER) & GITS_TYPER_PTA ? redistributor & ~0xffffull : 0;
}

static bool run(u64 first, u64 second, u64 third)
{
    volatile u64 *command = &commands[next_command / sizeof(u64)];

    command[0] = first;
    command[1] = second;
    command[2] = third;
    command[3] = 0;
    next_command = (next_command + COMMAND_SIZE) % PAGE_SIZE;
    write64(its + GITS_CWRITER, next_command);
    return WAIT_UNTIL(read64(its + GITS_CREADR) == next_command);
}

static void give_tables(void)
{
    for (unsigned n = 0; n < GITS_BASERS; n++) {
        u64 at = its + GITS_BASER + 8 * n;

        // The type of its contents; 0 if nothing must be provided.
        if (bits(read64(at), 58, 56))
            write64(at, gpa_of(pages_new(PAGES_64K)) | TABLE_VALID | CBASER_WRITE_BACK | TABLE_PAGE_64K);
    }
}

static bool redistributor_init(void)
{
    write32(redistributor + GICR_WAKER, read32(redistributor + GICR_WAKER) & ~(u32)GICR_WAKER_PROCESSOR_SLEEP);
    if (!WAIT_UNTIL(!(read32(redistributor + GICR_WAKER) & GICR_WAKER_CHILDREN_ASLEEP)))
        return false;
    configuration = pages_new(PAGES_64K);
    write64(redistributor + GICR_PROPBASER, gpa_of(configuration) | GICR_WRITE_BACK | (ID_BITS - 1));
    write64(redistributor + GICR_PENDBASER, gpa_of(pages_new(PAGES_64K)) | GICR_WRITE_BACK | PENDBASER_ZEROED);
    write32(redistributor + GICR_CTLR, read32(redistributor + GICR_CTLR) | GICR_CTLR_ENABLE_LPIS);
    return true;
}

// ICC_SRE_EL1, ICC_PMR_EL1 and ICC_IGRPEN1_EL1: registers, every priority, group 1.
static void processor_init(void)
{
    asm volatile("msr S3_0_C12_C12_5, %0\n\tisb" : : "r"(1ull));
    asm volatile("msr S3_0_C4_C6_0, %0" : : "r"(0xffull));
    asm volatile("msr S3_0_C12_C12_7, %0\n\tisb" : : "r"(1ull));
}

bool its_init(void)
{
    u32 length;
    // Distributor and redistributors, an address of two cells and a size of two each.
    const void *gic = property_of_compatible("arm,gic-v3", "reg", &length);

    its = address_of("arm,gic-v3-its");
    if (!its || !gic || length < 8 * sizeof(u32))
        return false;
    redistributor = (u64)cell(gic, 4) << 32 | cell(gic, 5);
    write32(address_of("arm,gic-v3") + GICD_CTLR, GICD_CTLR_ENABLE_GROUP_1 | GICD_CTLR_AFFINITY_ROUTING);
    if (!redistributor_init())
        return false;
    processor_init();
    give_tables();
    commands = page_new();
    write64(its + GITS_CBASER, gpa_of(commands) | TABLE_VALID | CBASER_WRITE_BACK);
    write64(its + GITS_CWRITER, 0);
    write32(its + GITS_CTLR, GITS_CTLR_ENABLED);
    return run(MAPC, 0, target() | TABLE_VALID) && run(SYNC, 0, target());
}

u64 its_doorbell(void)
{
    return its + GITS_TRANSLATER;
}

bool its_map(pci_id function, u32 event, u32 lpi)
{
    u64 device = (u64)function << 32;
    void *events = page_new();

    configuration[lpi - LPI_FIRST] = LPI_ENABLED;
    return run(MAPD | device, EVENT_BITS - 1, gpa_of(events) | TABLE_VALID) &&
           run(MAPTI | device, event | (u64)lpi << 32, 0) && run(INV | device, event, 0) && run(SYNC, 0, target());
}

u32 its_take(void)
{
    u64 number;

    // ICC_IAR1_EL1, ICC_EOIR1_EL1.
    asm volatile("mrs %0, S3_0_C12_C12_0\n\tdsb sy" : "=r"(number) : : "memory");
    if (number == NO_INTERRUPT)
        return 0;
    asm volatile("msr S3_0_C12_C12_1, %0\n\tisb" : : "r"(number) : "memory");
    return (u32)number;
}
