// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
// DMA in progress during an invalidation: after the wait, nothing accesses the old page any more,
// however early the device looked it up.
#include "fixture.h"

enum { ROUNDS = 24, BYTES = 4096 };

// Starts a write and does not wait for it.
static void start_write(const struct edu *edu, u64 iova)
{
    write64(edu->registers + EDU_DMA_SOURCE, EDU_BUFFER);
    write64(edu->registers + EDU_DMA_DESTINATION, iova);
    write64(edu->registers + EDU_DMA_COUNT, BYTES);
    write64(edu->registers + EDU_DMA_COMMAND, EDU_DMA_START | EDU_DMA_TO_MEMORY);
}

static bool is_done(const struct edu *edu)
{
    return !(read64(edu->registers + EDU_DMA_COMMAND) & EDU_DMA_START);
}

// In each round the page is unmapped while the device writes to it.
static void rounds(bool unmap)
{
    struct page_table space = space_new();
    volatile u64 *pages[2] = {page_new(), page_new()};

    map_leaf(&space, IOVA, gpa_of(pages[0]), LEVEL_4K, FS_READ_WRITE);
    attach(DEVICE, &space, DOMAIN_A);
    if (DEVICE->has_pasid)
        write32(DEVICE->registers + EDU_DMA_PASID, 0);
    REQUIRE(enable());
    for (unsigned round = 0; round < ROUNDS; round++) {
        volatile u64 *old = pages[round & 1], *new = pages[~round & 1];

        map_leaf(&space, IOVA, gpa_of(old), LEVEL_4K, FS_READ_WRITE);
        REQUIRE(invalidate(inv_pasid_iotlb(PASID_IOTLB_PAGE, DOMAIN_A, 0, IOVA)));
        start_write(DEVICE, IOVA);
        *table_entry(&space, IOVA, LEVEL_4K) = unmap ? 0 : gpa_of(new) | FS_READ_WRITE;
        REQUIRE(invalidate(inv_pasid_iotlb(PASID_IOTLB_PAGE, DOMAIN_A, 0, IOVA)));
        // The buffer's first word is the pattern, written first; a late byte would restore it.
        old[0] = 0;
        EXPECT(WAIT_UNTIL(is_done(DEVICE)), "round %u: the DMA does not end", round);
        EXPECT(old[0] == 0, "round %u: the old page was written after the invalidation", round);
        faults_clear();
    }
}

static void remapped(void) { rounds(false); }
static void unmapped(void) { rounds(true); }

static const struct check list[] = {
    {"the page is remapped while the device writes", remapped},
    {"the page is unmapped while the device writes", unmapped},
};
CHECK_GROUP(in_flight, list, setup_scalable, teardown);
