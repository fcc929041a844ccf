// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
// FEEx_xxxxh is for interrupts (VT-d 3.14): requests without PASID to it are MSIs, which are never
// translated, and no translation may lead into it.
#include "fixture.h"

static void message_while_blocked(void)
{
    bool arrived;

    SKIP_UNLESS(pci_msi_set(DEVICE->place, msi_address(), VECTOR_EDU_MSI), "no MSI capability");
    REQUIRE(enable());
    interrupt_count_clear(VECTOR_EDU_MSI);
    write32(DEVICE->registers + EDU_IRQ_RAISE, 1);
    arrived = WAIT_UNTIL(interrupt_count(VECTOR_EDU_MSI));
    write32(DEVICE->registers + EDU_IRQ_ACK, 1);
    pci_msi_disable(DEVICE->place);
    EXPECT(arrived, "the message does not arrive");
    EXPECT(fault_pending() == 0, "%u fault records", fault_pending());
}

// The reason is 87h if the unit itself walks the tables. With a nested host, its second stage
// refuses, and the virtual unit chooses the reason.
static void output_in_range(void)
{
    struct page_table space = space_new();
    struct fault fault;

    map_leaf(&space, IOVA, MSI_ADDRESS, LEVEL_4K, FS_READ_WRITE);
    attach(DEVICE, &space, DOMAIN_A);
    REQUIRE(enable());
    EXPECT(edu_write_to(DEVICE, NO_PASID, IOVA, 0, 4), "the write does not end");
    SKIP_UNLESS(!devices_assigned(), "faults of assigned devices are not reported");
    EXPECT(fault_take(&fault), "no fault record");
    EXPECT(fault.source == DEVICE->id && fault.address == IOVA, "the record names %04x, 0x%lx", fault.source,
           fault.address);
}

// The table maps the range, but the request does not use the mapping.
static void input_in_range(void)
{
    struct page_table space = space_new();
    volatile u64 *page = page_new(), *vector = page_new();

    SKIP_UNLESS(edu_reaches(MSI_ADDRESS), "the device's DMA mask is too narrow");
    SKIP_UNLESS(!devices_assigned(), "what an assigned device writes there is the host's");
    map_leaf(&space, MSI_ADDRESS, gpa_of(page), LEVEL_4K, FS_READ_WRITE);
    map_leaf(&space, IOVA, gpa_of(vector), LEVEL_4K, FS_READ_WRITE);
    attach(DEVICE, &space, DOMAIN_A);
    REQUIRE(enable());
    *vector = VECTOR_EDU_MSI;
    EXPECT(edu_read_from(DEVICE, NO_PASID, IOVA, 2048, 8), "the read does not end");
    interrupt_count_clear(VECTOR_EDU_MSI);
    EXPECT(edu_write_to(DEVICE, NO_PASID, msi_address(), 2048, 4), "the write does not end");
    EXPECT(page[(msi_address() & (PAGE_SIZE - 1)) / 8] == 0, "the request was translated");
    EXPECT(WAIT_UNTIL(interrupt_count(VECTOR_EDU_MSI)), "the request is no interrupt");
}

static const struct check list[] = {
    {"a blocked device's MSI arrives", message_while_blocked},
    {"a translation that leads there is refused", output_in_range},
    {"a write there is an interrupt, whatever the tables say", input_in_range},
};
CHECK_GROUP(interrupt_range, list, setup_scalable, teardown);
