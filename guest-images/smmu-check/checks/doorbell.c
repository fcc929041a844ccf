// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
// The doorbell of an assigned device: the host maps the device's MSIs to its own window, which the
// device tree names (`iommu-addresses`). If the guest maps it 1:1, they arrive at its interrupt
// controller. Runs alone, with `doorbell` on the command line.
#include "checks/fixture.h"
#include "hw/its.h"
#include "lib/devicetree.h"
#include "lib/io.h"

enum { ASID = 9, EVENT = 1, MESSAGES = 3, LPI = LPI_FIRST + 5 };

static u64 window, window_size;

// `iommu-addresses`: device, PCI address (3 cells), size (2). False if the device tree has none.
static bool window_init(void)
{
    u32 length;
    const void *addresses = property_anywhere("iommu-addresses", &length);

    if (!addresses || length < 6 * sizeof(u32))
        return false;
    window = (u64)cell(addresses, 2) << 32 | cell(addresses, 3);
    window_size = (u64)cell(addresses, 4) << 32 | cell(addresses, 5);
    return true;
}

static void enter(void)
{
    static bool ready;

    // Before the pool is first released.
    if (!ready)
        ready = window_init() && its_init() && its_map(DEVICE->id, EVENT, LPI);
    setup();
    if (!ready)
        check_fail("the device tree has no iommu-addresses, or no GIC with an ITS that answers");
    else if (!pci_msi_set(DEVICE->place, (u32)its_doorbell(), EVENT))
        check_fail("the device has no MSI");
}

static void leave(void)
{
    pci_msi_disable(DEVICE->place);
    teardown();
}

static bool translate(const struct space *space)
{
    stream_translate(DEVICE->id, space);
    if (invalidate(cfgi_ste(DEVICE->id)) && smmu_enable(true))
        return true;
    check_fail("the unit does not translate");
    return false;
}

static void raise(void)
{
    write32(DEVICE->registers + EDU_IRQ_RAISE, 1);
    write32(DEVICE->registers + EDU_IRQ_ACK, 1);
}

static void unmapped(void)
{
    struct space space = space_new(ASID);
    struct event event;

    REQUIRE(translate(&space));
    for (unsigned n = 0; n < MESSAGES; n++) {
        raise();
        EXPECT(WAIT_UNTIL(smmu_event(&event)), "no event of message %u", n);
        EXPECT(event_id(&event) == EVENT_TRANSLATION && event_stream(&event) == DEVICE->id && !event_is_read(&event) &&
                   event_address(&event) - window < window_size,
               "event 0x%02x, stream 0x%x, address 0x%lx", event_id(&event), event_stream(&event),
               event_address(&event));
    }
    EXPECT(its_take() == 0, "an interrupt arrives");
}

static void mapped(void)
{
    struct space space = space_new(ASID);
    struct event event;

    for (u64 page = window; page - window < window_size; page += PAGE_SIZE)
        space_map(&space, page, (const volatile void *)(uintptr_t)page, READ_WRITE);
    REQUIRE(translate(&space));
    for (unsigned n = 0; n < MESSAGES; n++) {
        u32 taken = 0;

        raise();
        EXPECT(WAIT_UNTIL((taken = its_take()) != 0), "message %u does not arrive", n);
        EXPECT(taken == LPI, "interrupt %u arrives", taken);
    }
    EXPECT(!smmu_event(&event), "event 0x%02x for 0x%lx", event_id(&event), event_address(&event));
}

static const struct check list[] = {
    {"where they go is not mapped: each is F_TRANSLATION, and none arrives", unmapped},
    {"it is mapped to itself: each arrives", mapped},
};

CHECK_GROUP(doorbell, list, enter, leave);
