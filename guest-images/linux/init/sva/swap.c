// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
// The kernel swaps out what the device has written. The disk's data is lost.
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/swap.h>
#include <unistd.h>

#include "../../pattern.h"
#include "../devices/devices.h"
#include "../devices/edu_sva.h"
#include "cases.h"

enum { SWAP_PAGES = 1024, PAGES = 80, SIZE = PAGES * SVA_PAGE, ROUNDS = 3 };

// The header of a swap area of the second version (mkswap(8)): after 1 KiB for boot loaders, the
// version, the last page's number, and that of bad ones; at the end of the page what it is.
static bool write_header(int disk)
{
    static char page[SVA_PAGE];
    const uint32_t header[] = {1, SWAP_PAGES - 1, 0};

    memcpy(page + 1024, header, sizeof(header));
    memcpy(page + SVA_PAGE - 10, "SWAPSPACE2", 10);
    return pwrite(disk, page, SVA_PAGE, 0) == SVA_PAGE && fsync(disk) == 0;
}

static const char *start_swapping(char path[static 32])
{
    struct device devices[MAX_DEVICES];
    unsigned count = find_devices(devices);

    for (unsigned i = 0; i < count; i++) {
        if (!is_disk(&devices[i]))
            continue;
        snprintf(path, 32, "/dev/%s", devices[i].node);
        int disk = open(path, O_RDWR | O_CLOEXEC);
        bool written = write_header(disk);
        close(disk);
        return written && swapon(path, 0) == 0 ? NULL : strerror(errno);
    }
    return "there is no disk";
}

const char *sva_swap(void)
{
    char *memory = sva_map(SIZE), *source = sva_map(SIZE), *copy = sva_map(SIZE), disk[32];
    int file = sva_open(0);
    const char *error = start_swapping(disk);
    unsigned long out = 0;

    if (error)
        return sva_skip(error);
    for (unsigned round = 0; round < ROUNDS && !error; round++) {
        pattern_fill(source, SIZE, round, 0);
        // From the second round on the pages have just been read from the disk, and only the flags
        // that the IOMMU sets in the page table say that they differ from it.
        int failure = sva_copy(file, source, memory, SIZE);
        if (failure)
            error = strerror(failure);
        if (madvise(memory, SIZE, MADV_PAGEOUT) < 0 && !error)
            error = strerror(errno);
        out += sva_mapped(memory, "Swap: %lu kB") / (SVA_PAGE >> 10);
        // The device is the first to want them back.
        if (!error)
            error = sva_copies(file, memory, copy, SIZE, round);
    }
    swapoff(disk);
    if (!error && out < PAGES)
        error = sva_error("the kernel swapped out only %lu pages", out);
    sva_say("%lu pages were swapped out, and in again for the device", out);
    return error;
}
