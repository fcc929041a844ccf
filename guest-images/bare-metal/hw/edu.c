// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
#include "hw/edu.h"
#include "lib/memory.h"
#include "lib/wait.h"

enum {
    EDU_PCI_ID = 0x11e81234,
    EDU_BAR_SIZE = 0x100000,
    EDU_PASID_VALID = 1u << 31,
    PASID_CONTROL = 4, // the capability register in the low half, the control register in the high
    PASID_ENABLE = 1 << 16,
    ATS_CONTROL = 4, // the same
    ATS_ENABLE = 1u << 31,
};

static struct edu all[EDU_MOST];
static unsigned all_count;

struct edu *edus = all;
unsigned edu_count;

void edu_init(void)
{
    pci_id found[EDU_MOST];

    all_count = pci_find(EDU_PCI_ID, found, EDU_MOST);
    for (unsigned n = 0; n < all_count; n++) {
        struct edu *edu = &all[n];

        edu->place = found[n];
        edu->id = pci_requester(found[n]);
        edu->registers = pci_enable(found[n], EDU_BAR_SIZE);
        edu->has_pasid = pci_extended_capability(found[n], PCI_EXT_CAP_PASID) != 0;
        if (edu->has_pasid)
            edu_pasid_enable(edu, true);
    }
    edu_use(0, EDU_MOST);
}

void edu_use(unsigned first, unsigned most)
{
    unsigned rest = first < all_count ? all_count - first : 0;

    edus = &all[first];
    edu_count = rest < most ? rest : most;
}

const struct edu *edu_sharing(const struct edu *edu)
{
    for (unsigned n = 0; n < all_count; n++)
        if (all[n].id == edu->id && all[n].place != edu->place)
            return &all[n];
    return NULL;
}

void edu_pasid_enable(const struct edu *edu, bool on)
{
    u16 pasid = pci_extended_capability(edu->place, PCI_EXT_CAP_PASID);

    pci_write(edu->place, pasid + PASID_CONTROL, on ? PASID_ENABLE : 0);
}

bool edu_has_ats(const struct edu *edu)
{
    return pci_extended_capability(edu->place, PCI_EXT_CAP_ATS) != 0;
}

void edu_ats_enable(const struct edu *edu, bool on)
{
    u16 ats = pci_extended_capability(edu->place, PCI_EXT_CAP_ATS);

    pci_write(edu->place, ats + ATS_CONTROL, on ? ATS_ENABLE : 0);
}

void edu_start(const struct edu *edu, u64 source, u64 destination, u32 count, u32 direction)
{
    write64(edu->registers + EDU_DMA_SOURCE, source);
    write64(edu->registers + EDU_DMA_DESTINATION, destination);
    write64(edu->registers + EDU_DMA_COUNT, count);
    write64(edu->registers + EDU_DMA_COMMAND, EDU_DMA_START | direction);
}

bool edu_is_done(const struct edu *edu)
{
    return !(read64(edu->registers + EDU_DMA_COMMAND) & EDU_DMA_START);
}

static bool dma(const struct edu *edu, u32 pasid, u64 source, u64 destination, u32 count, u32 direction)
{
    if (edu->has_pasid)
        write32(edu->registers + EDU_DMA_PASID, pasid == NO_PASID ? 0 : pasid | EDU_PASID_VALID);
    edu_start(edu, source, destination, count, direction);
    return WAIT_UNTIL(edu_is_done(edu));
}

bool edu_write_to(const struct edu *edu, u32 pasid, u64 iova, u32 offset, u32 count)
{
    return dma(edu, pasid, EDU_BUFFER + offset, iova, count, EDU_DMA_TO_MEMORY);
}

bool edu_read_from(const struct edu *edu, u32 pasid, u64 iova, u32 offset, u32 count)
{
    return dma(edu, pasid, iova, EDU_BUFFER + offset, count, 0);
}

// A 28-bit device drops the high bit and writes the page; a 64-bit device writes where nothing is.
static u64 ask_for_dma_mask(void)
{
    for (unsigned n = 0; n < edu_count; n++) {
        volatile u64 *word = page_new();

        *word = 1;
        (void)edu_write_to(&edus[n], NO_PASID, gpa_of(word) | BIT(40), 0, sizeof(*word));
        if (*word != 1)
            return BIT(28) - 1;
    }
    return ~0ull;
}

bool edu_reaches(u64 address)
{
    static u64 mask;

    if (!mask)
        mask = ask_for_dma_mask();
    return (address & ~mask) == 0;
}
