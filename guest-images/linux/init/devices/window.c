// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
#include "window.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "../../pattern.h"
#include "../kernel/files.h"

#define HUGE_PAGES "/proc/sys/vm/nr_hugepages"

enum { SLOTS = WINDOW_HUGE_SIZE / WINDOW_SLOT, ORDINARY_SLOTS = WINDOW_ORDINARY_SIZE / WINDOW_SLOT };

// A slot of `file` at an address. Whether that can be done.
static bool put(char *at, int file, unsigned slot)
{
    return mmap(at, WINDOW_SLOT, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, file, (off_t)slot * WINDOW_SLOT) == at;
}

// Addresses without memory, aligned to a slot; MAP_FAILED if there are none.
static char *reserve(uint64_t size)
{
    char *start = mmap(NULL, size + WINDOW_SLOT, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

    return start == MAP_FAILED ? start : start + (-(uintptr_t)start & (WINDOW_SLOT - 1));
}

static bool fill(struct window *window, int huge, int ordinary, uint64_t seed)
{
    bool done = true;

    for (unsigned slot = 0; slot < WINDOW_HUGE; slot++)
        done = done && put(window->memory + (size_t)slot * WINDOW_SLOT, huge, slot);
    done = done && put(window->memory + (size_t)WINDOW_HUGE * WINDOW_SLOT, ordinary, 0);
    for (unsigned slot = 0; slot < SLOTS; slot++) {
        window->order[slot] = pattern_word(seed, slot) % WINDOW_HUGE;
        done = done && put(window->huge + (size_t)slot * WINDOW_SLOT, huge, window->order[slot]);
    }
    for (unsigned slot = 0; slot < ORDINARY_SLOTS; slot++)
        done = done && put(window->ordinary + (size_t)slot * WINDOW_SLOT, ordinary, 0);
    return done;
}

const char *window_open(struct window *window, uint64_t seed)
{
    char count[16];

    snprintf(count, sizeof(count), "%d", WINDOW_HUGE);
    write_text(HUGE_PAGES, count);
    if (strcmp(first_line(HUGE_PAGES), count) != 0)
        return "the kernel has too few huge pages";
    *window = (struct window){
        .memory = reserve((size_t)WINDOW_PAGES * WINDOW_PAGE),
        .huge = reserve(WINDOW_HUGE_SIZE),
        .ordinary = reserve(WINDOW_ORDINARY_SIZE),
        .order = malloc(SLOTS),
    };
    int huge = memfd_create("huge", MFD_CLOEXEC | MFD_HUGETLB);
    int ordinary = memfd_create("ordinary", MFD_CLOEXEC);
    bool done = window->order && huge >= 0 && ordinary >= 0 && ftruncate(huge, (off_t)WINDOW_HUGE * WINDOW_SLOT) == 0 &&
                ftruncate(ordinary, WINDOW_SLOT) == 0 && fill(window, huge, ordinary, seed);
    int error = errno;
    close(huge);
    close(ordinary);
    return done ? NULL : strerror(error);
}

void window_close(struct window *window)
{
    // Without huge pages it was not made.
    if (!window->memory)
        return;
    munmap(window->memory, (size_t)WINDOW_PAGES * WINDOW_PAGE);
    munmap(window->huge, WINDOW_HUGE_SIZE);
    munmap(window->ordinary, WINDOW_ORDINARY_SIZE);
    free(window->order);
    write_text(HUGE_PAGES, "0");
}

unsigned window_page(const struct window *window, const char *address)
{
    uint64_t offset = (uint64_t)(address - window->huge);
    unsigned slot = WINDOW_HUGE;

    if (offset < WINDOW_HUGE_SIZE)
        slot = window->order[offset / WINDOW_SLOT];
    else
        offset = (uint64_t)(address - window->ordinary);
    return slot * (WINDOW_SLOT / WINDOW_PAGE) + offset % WINDOW_SLOT / WINDOW_PAGE;
}
