// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
// MSIs: writes to memory, which are translated by the stream's entry and stage 1 like DMA.
//
// There is no interrupt controller here: stage 1 maps MSIs to a page of memory. An assigned device
// sends what its host has programmed, to Linux's MSI window.
#include "checks/fixture.h"

enum { ASID = 6, MESSAGES = 0x08000000, MESSAGE = MESSAGES + 0x40, DATA = 0x5a };

// A space for the device, with MSI enabled, and the unit enabled.
static struct space enter(void)
{
    struct space space = space_new(ASID);

    stream_translate(DEVICE->id, &space);
    if (!pci_msi_set(DEVICE->place, MESSAGE, DATA))
        check_fail("the device has no MSI");
    else if (invalidate(cfgi_ste(DEVICE->id)) && !smmu_enable(true))
        check_fail("CR0.SMMUEN is not taken");
    return space;
}

static void leave(void)
{
    pci_msi_disable(DEVICE->place);
    teardown();
}

static void interrupt(void)
{
    write32(DEVICE->registers + EDU_IRQ_RAISE, 1);
    write32(DEVICE->registers + EDU_IRQ_ACK, 1);
}

// Where an MSI arrives that stage 1 maps to the page.
static volatile u32 *message_in(volatile u64 *page)
{
    return (volatile u32 *)page + (MESSAGE - MESSAGES) / sizeof(u32);
}

static void mapped(void)
{
    struct space space = enter();
    volatile u64 *page = target_new();
    volatile u32 *message = message_in(page);

    *message = ~0u;
    space_map(&space, MESSAGES, page, READ_WRITE);
    REQUIRE(!check_is_over());
    interrupt();
    EXPECT(WAIT_UNTIL(*message != ~0u), "no message is in the page");
}

static void not_mapped(void)
{
    struct space space = enter();

    (void)space;
    REQUIRE(!check_is_over());
    interrupt();
    REQUIRE(is_recorded(MESSAGE, EVENT_TRANSLATION, false));
}

static void unmapped(void)
{
    struct space space = enter();
    volatile u64 *page = target_new();
    volatile u32 *message = message_in(page);
    u64 *entry;

    *message = ~0u;
    entry = space_map(&space, MESSAGES, page, READ_WRITE);
    REQUIRE(!check_is_over());
    interrupt();
    EXPECT(WAIT_UNTIL(*message != ~0u), "no message is in the page");
    *entry = 0;
    REQUIRE(invalidate(tlbi_va(ASID, MESSAGES)));
    *message = ~0u;
    interrupt();
    REQUIRE(is_recorded(MESSAGE, EVENT_TRANSLATION, false));
    EXPECT(*message == ~0u, "0x%x is in the page", *message);
}

static void aborted(void)
{
    struct space space = enter();
    volatile u64 *page = target_new();
    volatile u32 *message = message_in(page);

    *message = ~0u;
    space_map(&space, MESSAGES, page, READ_WRITE);
    stream_abort(DEVICE->id);
    REQUIRE(invalidate(cfgi_ste(DEVICE->id)));
    REQUIRE(!check_is_over());
    interrupt();
    // After the MSI, if there were one.
    REQUIRE(write_vanishes(MESSAGES, page));
    EXPECT(*message == ~0u, "0x%x is in the page", *message);
}

static const struct check list[] = {
    {"a message goes where stage 1 leads its address", mapped},
    {"a message that stage 1 leads nowhere: F_TRANSLATION, with stream and address", not_mapped},
    {"a message after its page is taken out: F_TRANSLATION", unmapped},
    {"a message of a stream that aborts: dropped, without an event", aborted},
};

CHECK_GROUP(messages, list, setup, leave);
