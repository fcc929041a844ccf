// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
// Times of single calls to map and to unmap, by a program that has an `edu` device: 4 KiB, 2 MiB and
// 1 GiB, with few other mappings, and with twostage.figures.mappings= (50000). A gigabyte is 512 huge
// pages, in the order of their physical addresses, in which programs like to have them, and in a
// random one.
#include "figures.h"

#include <errno.h>
#include <inttypes.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "../pattern.h"
#include "checks/checks.h"
#include "devices/edu.h"
#include "devices/vfio.h"
#include "kernel/files.h"
#include "kernel/options.h"
#include "report.h"

enum { PAGE = 4096, HUGE = 2 << 20, HUGE_PAGES = 512, MAX_CALLS = 1000, SEED = 81 };
#define SIZE ((uint64_t)HUGE_PAGES * HUGE)
// Where the measured mappings are, and the others, every second page from there on.
#define MEASURED (UINT64_C(8) << 30)
#define OTHERS (UINT64_C(4) << 30)

static struct vfio vfio;

struct place {
    uint64_t physical;
    unsigned slot;
};

static int by_address(const void *a, const void *b)
{
    const struct place *x = a, *y = b;

    return (x->physical > y->physical) - (x->physical < y->physical);
}

static int ascending(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;

    return (x > y) - (x < y);
}

static double median(double *times, unsigned count)
{
    qsort(times, count, sizeof(times[0]), ascending);
    return times[count / 2] * 1e6;
}

// Maps the huge pages of `file` in this order. MAP_FAILED, with errno, on an error.
static char *arrange(int file, const struct place *places)
{
    char *start = mmap(NULL, SIZE + HUGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

    if (start == MAP_FAILED)
        return start;
    start += -(uintptr_t)start & (HUGE - 1);
    for (unsigned i = 0; i < HUGE_PAGES; i++)
        if (mmap(start + (size_t)i * HUGE, HUGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, file,
                 (off_t)places[i].slot * HUGE) == MAP_FAILED)
            return MAP_FAILED;
    return start;
}

// A gigabyte in the order of physical addresses, and in a random one. False, with errno, on an error.
static bool get_memory(char **sorted, char **shuffled)
{
    static struct place places[HUGE_PAGES];
    int file = memfd_create("huge", MFD_CLOEXEC | MFD_HUGETLB);
    char count[16];
    unsigned runs = 1;

    snprintf(count, sizeof(count), "%d", HUGE_PAGES);
    write_text("/proc/sys/vm/nr_hugepages", count);
    for (unsigned i = 0; i < HUGE_PAGES; i++)
        places[i].slot = i;
    if (file < 0 || ftruncate(file, (off_t)SIZE) < 0)
        return false;
    char *memory = arrange(file, places);
    if (memory == MAP_FAILED || mlock(memory, SIZE) < 0)
        return false;
    for (unsigned i = 0; i < HUGE_PAGES; i++)
        places[i].physical = physical_address(memory + (size_t)i * HUGE);
    qsort(places, HUGE_PAGES, sizeof(places[0]), by_address);
    for (unsigned i = 1; i < HUGE_PAGES; i++)
        runs += places[i].physical != places[i - 1].physical + HUGE;
    note("figures: %d huge pages in %u pieces of physical memory", HUGE_PAGES, runs);
    *sorted = arrange(file, places);
    for (unsigned i = HUGE_PAGES - 1; i > 0; i--) {
        unsigned other = pattern_word(SEED, i) % (i + 1);
        struct place place = places[i];
        places[i] = places[other];
        places[other] = place;
    }
    *shuffled = arrange(file, places);
    close(file);
    return *sorted != MAP_FAILED && *shuffled != MAP_FAILED;
}

// Maps and unmaps `calls` times, each time `stride` further on, and prints the medians.
static bool measure(const char *name, const char *when, const char *memory, uint64_t size, uint64_t iova, uint64_t stride,
                    unsigned calls)
{
    static double maps[MAX_CALLS], unmaps[MAX_CALLS];

    for (unsigned i = 0; i < calls; i++, iova += stride) {
        double start = now();
        int error = vfio_map(&vfio, memory, iova, size, true);
        double middle = now();
        if (!error)
            error = vfio_unmap(&vfio, iova, size);
        unmaps[i] = now() - middle;
        maps[i] = middle - start;
        if (error) {
            failed("figures", "%s at %#" PRIx64 ": %s", name, iova, strerror(error));
            return false;
        }
    }
    char moment[64];
    snprintf(moment, sizeof(moment), "%s%s", name, when);
    printf("figure calls-%s %u\nfigure map-%s %.1f\nfigure unmap-%s %.1f\n", moment, calls, moment, median(maps, calls),
           moment, median(unmaps, calls));
    mark(moment);
    return true;
}

static bool measure_sizes(const char *when, const char *sorted, const char *shuffled)
{
    // Those of 4 KiB are between the others, when these are there.
    return measure("4k", when, sorted, PAGE, OTHERS + PAGE, 16 * PAGE, 500) &&
           measure("2m", when, sorted, HUGE, MEASURED, HUGE, 200) &&
           measure("1g", when, sorted, SIZE, MEASURED, SIZE, 5) &&
           measure("1g-scattered", when, shuffled, SIZE, MEASURED, SIZE, 5);
}

static bool add_others(const char *memory, unsigned long count)
{
    double start = now();

    for (unsigned long i = 0; i < count; i++) {
        int error = vfio_map(&vfio, memory + i * PAGE % SIZE, OTHERS + i * 2 * PAGE, PAGE, true);
        if (error) {
            failed("figures", "mapping %lu of %lu: %s", i, count, strerror(error));
            return false;
        }
    }
    printf("figure calls-others %lu\nfigure others %.1f\n", count, (now() - start) * 1e6 / (double)count);
    mark("others");
    return true;
}

void take_vfio_figures(void)
{
    char *sorted = MAP_FAILED, *shuffled = MAP_FAILED;
    struct edu edu;

    mark("booted");
    const char *wrong = edu_find(&edu, 0) ? vfio_open(&vfio, edu.pci) : "there is no edu device";
    if (!wrong && !get_memory(&sorted, &shuffled))
        wrong = strerror(errno);
    if (wrong) {
        failed("figures", "%s", wrong);
        return;
    }
    mark("ready");
    if (measure_sizes("", sorted, shuffled) && add_others(sorted, option_number("figures.mappings", 50000)) &&
        measure_sizes("-many", sorted, shuffled))
        passed("figures", "taken");
    double start = now();
    vfio_unmap(&vfio, 0, 0);
    printf("figure unmap-all %.3f\n", now() - start);
    mark("all");
    vfio_close(&vfio);
    munmap(sorted, SIZE);
    munmap(shuffled, SIZE);
    mark("done");
}
