// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
// Interrupt remapping (VT-d chapter 5): an MSI is remapped by its table entry, or blocked.
#include "fixture.h"
#include "lib/cmdline.h"

// IRTA: 2^(S + 1) entries; destinations of 32 bits.
#define TABLE_SIZE 7u
#define TABLE_ENTRIES 256u
#define IRTA_EXTENDED BIT(11)

// Table entries, low half.
#define IRTE_P BIT(0)
#define IRTE_FPD BIT(1)
#define IRTE_LEVEL BIT(4)
#define IRTE_RESERVED BIT(12)

// Table entries, high half: source validation.
#define SOURCE_EXACT (1ull << 18)
#define SOURCE_BUS (2ull << 18)
#define SOURCE_IGNORE_2 (1ull << 16) // bit 2 of the function number

// Messages in remappable format.
#define REMAPPABLE BIT(4)
#define SUBHANDLE_VALID BIT(3)

#define VECTOR_OTHER VECTOR_EDU_INTX
#define INDEX 5u

static u64 *table;

// In caching mode (VT-d 6.1) a unit may cache a non-present entry, so it must be invalidated.
static void entry_set(unsigned index, unsigned vector, u64 flags, u64 source)
{
    bool was_present = table[2 * index] & IRTE_P;

    table[2 * index + 1] = source;
    table[2 * index] = flags | (u64)vector << 16 | (u64)apic_id() << 40;
    if (cap_caching_mode() && !was_present)
        (void)invalidate(inv_interrupt_entry(INTERRUPT_ENTRY_INDEX, (u16)index, 0));
}

static u32 message_address(u16 handle)
{
    return MSI_ADDRESS | (u32)(handle & 0x7fff) << 5 | (u32)(handle >> 15) << 2 | (u32)REMAPPABLE;
}

static void setup_remapping(void)
{
    SKIP_UNLESS(ecap_interrupt_remapping(), "ECAP.IR is 0");
    setup_scalable();
    if (check_is_over())
        return;
    table = page_new();
    SKIP_UNLESS(pci_msi_set(DEVICE->place, message_address(INDEX), 0), "no MSI capability");
    EXPECT(vtd_set_interrupt_table(gpa_of(table) | TABLE_SIZE), "GCMD.SIRTP never showed in GSTS");
    REQUIRE(invalidate(inv_interrupt_entry(INTERRUPT_ENTRY_GLOBAL, 0, 0)));
    EXPECT(vtd_switch(GCMD_IRE, true), "GCMD.IRE never showed in GSTS");
}

static void teardown_remapping(void)
{
    if (ecap_interrupt_remapping()) {
        (void)vtd_switch(GCMD_IRE, false);
        (void)vtd_switch(GCMD_CFI, false);
        pci_msi_disable(DEVICE->place);
        pci_msix_disable(DEVICE->place);
    }
    teardown();
}

static void raise(void)
{
    interrupt_count_clear(VECTOR_EDU_MSI);
    interrupt_count_clear(VECTOR_OTHER);
    write32(DEVICE->registers + EDU_IRQ_RAISE, 1);
}

// The device's interrupt arrives as `vector`, up to `times` times, and leaves no record.
static bool arrives_up_to(u32 times, unsigned vector)
{
    bool arrived;
    u32 all;

    raise();
    arrived = WAIT_UNTIL(interrupt_count(VECTOR_EDU_MSI) + interrupt_count(VECTOR_OTHER));
    write32(DEVICE->registers + EDU_IRQ_ACK, 1);
    all = interrupt_count(VECTOR_EDU_MSI) + interrupt_count(VECTOR_OTHER);
    if (!arrived)
        check_fail("the interrupt does not arrive");
    else if (interrupt_count(vector) != all || all > times)
        check_fail("%u times vector %u, %u times vector %u, instead of %u times vector %u",
                   interrupt_count(VECTOR_EDU_MSI), VECTOR_EDU_MSI, interrupt_count(VECTOR_OTHER),
                   VECTOR_OTHER, times, vector);
    else if (fault_pending() != 0)
        check_fail("%u fault records", fault_pending());
    return !check_is_over();
}

static bool arrives(unsigned vector)
{
    return arrives_up_to(1, vector);
}

// The device's interrupt is blocked, with one record.
static bool faults(unsigned reason, u16 index)
{
    struct fault fault = {0};
    bool recorded;

    raise();
    recorded = WAIT_UNTIL(fault_pending());
    write32(DEVICE->registers + EDU_IRQ_ACK, 1);
    if (interrupt_count(VECTOR_EDU_MSI) + interrupt_count(VECTOR_OTHER))
        check_fail("the interrupt arrives");
    else if (!recorded || !fault_take(&fault))
        check_fail("no fault record");
    else if (fault.reason != reason)
        check_fail("fault reason 0x%02x instead of 0x%02x", fault.reason, reason);
    else if (fault.source != DEVICE->id)
        check_fail("fault source %04x instead of %04x", fault.source, DEVICE->id);
    else if (reason != INTERRUPT_COMPATIBILITY_BLOCKED && fault.index != index)
        check_fail("fault index %u instead of %u", fault.index, index);
    return !check_is_over();
}

static void by_entry(void)
{
    entry_set(INDEX, VECTOR_EDU_MSI, IRTE_P, 0);
    REQUIRE(arrives(VECTOR_EDU_MSI));
}

static void by_subhandle(void)
{
    entry_set(INDEX + 3, VECTOR_EDU_MSI, IRTE_P, 0);
    (void)pci_msi_set(DEVICE->place, message_address(INDEX) | (u32)SUBHANDLE_VALID, 3);
    REQUIRE(arrives(VECTOR_EDU_MSI));
}

static void not_present(void)
{
    REQUIRE(faults(INTERRUPT_ENTRY_NOT_PRESENT, INDEX));
}

static void not_present_quietly(void)
{
    entry_set(INDEX, VECTOR_EDU_MSI, IRTE_FPD, 0);
    raise();
    write32(DEVICE->registers + EDU_IRQ_ACK, 1);
    // The next MSI comes after it.
    (void)pci_msi_set(DEVICE->place, message_address(INDEX + 1), 0);
    REQUIRE(faults(INTERRUPT_ENTRY_NOT_PRESENT, INDEX + 1));
}

static void reserved(void)
{
    entry_set(INDEX, VECTOR_EDU_MSI, IRTE_P | IRTE_RESERVED, 0);
    REQUIRE(faults(INTERRUPT_ENTRY_RESERVED, INDEX));
}

static void beyond(void)
{
    (void)pci_msi_set(DEVICE->place, message_address(TABLE_ENTRIES), 0);
    REQUIRE(faults(INTERRUPT_INDEX_BEYOND, TABLE_ENTRIES));
}

static void no_memory(void)
{
    EXPECT(vtd_set_interrupt_table(NO_MEMORY | TABLE_SIZE), "GCMD.SIRTP never showed in GSTS");
    REQUIRE(invalidate(inv_interrupt_entry(INTERRUPT_ENTRY_GLOBAL, 0, 0)));
    REQUIRE(faults(INTERRUPT_ENTRY_ACCESS, INDEX));
}

static void compatibility(void)
{
    (void)pci_msi_set(DEVICE->place, msi_address(), VECTOR_EDU_MSI);
    REQUIRE(faults(INTERRUPT_COMPATIBILITY_BLOCKED, 0));
    EXPECT(vtd_switch(GCMD_CFI, true), "GCMD.CFI never showed in GSTS");
    REQUIRE(arrives(VECTOR_EDU_MSI));
    EXPECT(vtd_switch(GCMD_CFI, false), "GSTS.CFIS stays set");
    REQUIRE(faults(INTERRUPT_COMPATIBILITY_BLOCKED, 0));
}

static void source(void)
{
    entry_set(INDEX, VECTOR_EDU_MSI, IRTE_P, SOURCE_EXACT | DEVICE->id);
    REQUIRE(arrives(VECTOR_EDU_MSI));
    entry_set(INDEX, VECTOR_EDU_MSI, IRTE_P, SOURCE_EXACT | (DEVICE->id ^ 4u));
    REQUIRE(invalidate(inv_interrupt_entry(INTERRUPT_ENTRY_INDEX, INDEX, 0)));
    REQUIRE(faults(INTERRUPT_SOURCE_MISMATCH, INDEX));
    entry_set(INDEX, VECTOR_EDU_MSI, IRTE_P, SOURCE_EXACT | SOURCE_IGNORE_2 | (DEVICE->id ^ 4u));
    REQUIRE(invalidate(inv_interrupt_entry(INTERRUPT_ENTRY_INDEX, INDEX, 0)));
    REQUIRE(arrives(VECTOR_EDU_MSI));
}

static void source_bus(void)
{
    // From the bus in the upper byte to that in the lower one.
    u32 buses = (DEVICE->id & 0xff00u) | 0x10;

    entry_set(INDEX, VECTOR_EDU_MSI, IRTE_P, SOURCE_BUS | buses);
    REQUIRE(arrives(VECTOR_EDU_MSI));
    entry_set(INDEX, VECTOR_EDU_MSI, IRTE_P, SOURCE_BUS | (buses + 0x100));
    REQUIRE(invalidate(inv_interrupt_entry(INTERRUPT_ENTRY_INDEX, INDEX, 0)));
    REQUIRE(faults(INTERRUPT_SOURCE_MISMATCH, INDEX));
}

// The vector of the stale entry: with `stale-required=0` on the command line the new one is
// accepted.
static bool is_stale(void)
{
    bool may_be_fresh = cmdline_number("stale-required", 1) == 0;

    return may_be_fresh || arrives(VECTOR_EDU_MSI);
}

static void change(struct descriptor descriptor, struct descriptor other)
{
    entry_set(INDEX, VECTOR_EDU_MSI, IRTE_P, 0);
    REQUIRE(arrives(VECTOR_EDU_MSI));
    entry_set(INDEX, VECTOR_OTHER, IRTE_P, 0);
    REQUIRE(is_stale());
    REQUIRE(invalidate(other));
    REQUIRE(is_stale());
    REQUIRE(invalidate(descriptor));
    REQUIRE(arrives(VECTOR_OTHER));
}

static void stale_until_index(void)
{
    change(inv_interrupt_entry(INTERRUPT_ENTRY_INDEX, INDEX, 0),
           inv_interrupt_entry(INTERRUPT_ENTRY_INDEX, INDEX + 1, 0));
}

static void stale_until_mask(void)
{
    change(inv_interrupt_entry(INTERRUPT_ENTRY_INDEX, INDEX ^ 3, 2),
           inv_interrupt_entry(INTERRUPT_ENTRY_INDEX, INDEX ^ 4, 2));
}

static void stale_until_global(void)
{
    change(inv_interrupt_entry(INTERRUPT_ENTRY_GLOBAL, 0, 0), inv_context(CONTEXT_GLOBAL, 0, 0));
}

// What the vector's message becomes may be known to whoever sends it, and must change with the entry.
static void msix_moves(void)
{
    static const unsigned to[] = {VECTOR_OTHER, VECTOR_EDU_MSI, VECTOR_OTHER};

    pci_msi_disable(DEVICE->place);
    entry_set(INDEX, VECTOR_EDU_MSI, IRTE_P, 0);
    SKIP_UNLESS(pci_msix_set(DEVICE->place, 0, message_address(INDEX), 0), "no MSI-X capability");
    REQUIRE(arrives(VECTOR_EDU_MSI));
    for (unsigned n = 0; n < ARRAY_LEN(to); n++) {
        entry_set(INDEX, to[n], IRTE_P, 0);
        REQUIRE(invalidate(inv_interrupt_entry(INTERRUPT_ENTRY_INDEX, INDEX, 0)));
        REQUIRE(arrives(to[n]));
    }
}

static void removed(void)
{
    entry_set(INDEX, VECTOR_EDU_MSI, IRTE_P, 0);
    REQUIRE(arrives(VECTOR_EDU_MSI));
    table[2 * INDEX] = 0;
    REQUIRE(invalidate(inv_interrupt_entry(INTERRUPT_ENTRY_INDEX, INDEX, 0)));
    REQUIRE(faults(INTERRUPT_ENTRY_NOT_PRESENT, INDEX));
}

static void fault_event(void)
{
    bool told;

    interrupt_count_clear(VECTOR_FAULT_EVENT);
    fault_event_enable(VECTOR_FAULT_EVENT);
    REQUIRE(faults(INTERRUPT_ENTRY_NOT_PRESENT, INDEX));
    told = WAIT_UNTIL(interrupt_count(VECTOR_FAULT_EVENT));
    EXPECT(told, "the fault event does not arrive");
}

static void wide_destination(void)
{
    SKIP_UNLESS(ecap_extended_interrupts(), "ECAP.EIM is 0");
    EXPECT(vtd_set_interrupt_table(gpa_of(table) | IRTA_EXTENDED | TABLE_SIZE),
           "GCMD.SIRTP never showed in GSTS");
    table[2 * INDEX] = IRTE_P | (u64)VECTOR_EDU_MSI << 16 | (u64)apic_id() << 32;
    REQUIRE(invalidate(inv_interrupt_entry(INTERRUPT_ENTRY_GLOBAL, 0, 0)));
    REQUIRE(arrives(VECTOR_EDU_MSI));
    // Compatibility format is blocked whatever CFI is.
    (void)pci_msi_set(DEVICE->place, msi_address(), VECTOR_EDU_MSI);
    EXPECT(vtd_switch(GCMD_CFI, true), "GCMD.CFI never showed in GSTS");
    REQUIRE(faults(INTERRUPT_COMPATIBILITY_BLOCKED, 0));
}

static void acknowledge(void)
{
    write32(DEVICE->registers + EDU_IRQ_ACK, 1);
}

static void intx(void)
{
    SKIP_UNLESS(vtd == &vtd_units[0], "the I/O APIC is behind the first unit");
    SKIP_UNLESS(pci_has_pin(DEVICE->place), "the device has no interrupt pin");
    pci_msi_disable(DEVICE->place);
    entry_set(INDEX, VECTOR_EDU_INTX, IRTE_P | IRTE_LEVEL, 0);
    SKIP_UNLESS(ioapic_route_pci_remapped(VECTOR_EDU_INTX, INDEX), "no I/O APIC");
    interrupt_on(VECTOR_EDU_INTX, acknowledge);
    // A line that is asserted at an end of interrupt interrupts again. A KVM that emulates the
    // guest's ring 0 was seen, about once in 200 runs, to report an end before the handler had run.
    for (unsigned round = 0; round < 3 && !check_is_over(); round++)
        (void)arrives_up_to(2, VECTOR_EDU_INTX);
    if (!check_is_over()) {
        u32 seen = interrupt_count(VECTOR_EDU_INTX);

        // Each read exits: pending interrupts arrive.
        for (unsigned i = 0; i < 8; i++)
            (void)read32(DEVICE->registers + EDU_IRQ_STATUS);
        EXPECT(interrupt_count(VECTOR_EDU_INTX) == seen, "it goes on after the acknowledgement");
    }
    interrupt_on(VECTOR_EDU_INTX, NULL);
    (void)ioapic_route_pci(0);
}

static const struct check list[] = {
    {"a message goes by its table entry", by_entry},
    {"a subhandle is added to the handle", by_subhandle},
    {"entry not present: fault 22h", not_present},
    {"entry not present, with FPD: no record", not_present_quietly},
    {"reserved bit in the entry: fault 24h", reserved},
    {"index beyond the table: fault 21h", beyond},
    {"table in no memory: fault 23h", no_memory},
    {"compatibility format: fault 25h unless GCMD.CFI", compatibility},
    {"another source than the entry names: fault 26h", source},
    {"another bus than the entry names: fault 26h", source_bus},
    {"entry stale until the invalidation of its index", stale_until_index},
    {"entry stale until the invalidation of a range", stale_until_mask},
    {"entry stale until the global invalidation", stale_until_global},
    {"a vector of MSI-X moves with its entry", msix_moves},
    {"entry taken away: fault 22h after the invalidation", removed},
    {"the fault event is not remapped", fault_event},
    {"destinations of 32 bits", wide_destination},
    {"INTx through the I/O APIC, remapped", intx},
};
CHECK_GROUP(interrupt_remapping, list, setup_remapping, teardown_remapping);
