// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
// A program that has an `edu` device (that of number twostage.vfio.edu=, from 0) maps and unmaps
// twostage.vfio.rounds= (1000) times, 4 KiB to 1 GiB, at random (twostage.vfio.seed=, or another each
// time). The device's DMA must see what is mapped, and nothing else: this is compared after
// one in twostage.vfio.seldom= (8) rounds, and for samples of each mapping, and of what is between
// them, at the end; with twostage.vfio.every=1 for every page of the mappings of up to 2 MiB, and more
// samples of larger ones. At last all is unmapped. With seldom=0 there is no DMA, and nothing is
// compared.
//
// Memory has a pattern, but for the last word of each page, where DMA writes what it is known to
// hold.
#include <errno.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/klog.h>
#include <sys/mman.h>

#include "../../pattern.h"
#include "../devices/edu.h"
#include "../devices/vfio.h"
#include "../devices/window.h"
#include "../kernel/files.h"
#include "../kernel/options.h"
#include "../report.h"
#include "checks.h"

enum { PAGE = WINDOW_PAGE, LAST = PAGE - 8 };
// Sizes are up to 4 KiB << MAX_ORDER; those of ordinary pages, which are single mappings in tables,
// are smaller.
enum { MAX_ORDER = 18, MAX_ORDINARY_ORDER = 8 };
// Mappings: the most, and around how many there are.
enum { MAX_LIVE = 4096, USUAL_LIVE = 256, RECENT = 64, PROGRESS = 2000 };
// Pages of a mapping that are compared at the end, usually and with twostage.vfio.every=1.
enum { SAMPLES = 4, MANY_SAMPLES = (2 << 20) / PAGE };

// Where mappings are; below are three pages for the DMA that compares.
#define ARENA (UINT64_C(4) << 30)
#define ARENA_SIZE (UINT64_C(8) << 30)
enum { STAGING = 0x100000, SENTINEL = STAGING + PAGE, BOUNCE = SENTINEL + PAGE };
enum { CONSOLE_LEVEL = 8, ERRORS_ONLY = 4, PANICS_ONLY = 1 };
enum { MEMORY_SEED = 79, SENTINEL_SEED = 80 };

struct mapping {
    uint64_t iova, size;
    char *memory;
    bool writable;
};

static struct {
    struct vfio vfio;
    struct edu edu;
    struct window window;
    uint64_t last[WINDOW_PAGES]; // the last words
    struct mapping live[MAX_LIVE];
    unsigned count;
    struct mapping recent[RECENT]; // unmapped; of size 0 at first
    unsigned long maps, unmaps, compared, refused;
    uint64_t seed, drawn, seldom;
    char wrong[256];
} run;

static char own[3][PAGE] __attribute__((aligned(PAGE)));
static char *const staging = own[0], *const sentinel = own[1], *const bounce = own[2];

static bool wrong(const char *format, ...) __attribute__((format(printf, 1, 2)));
static bool wrong(const char *format, ...)
{
    va_list arguments;

    va_start(arguments, format);
    vsnprintf(run.wrong, sizeof(run.wrong), format, arguments);
    va_end(arguments);
    return false;
}

// A random number below `limit`.
static uint64_t draw(uint64_t limit)
{
    return pattern_word(run.seed, 8 * ++run.drawn) % limit;
}

// Whether DMA follows, which takes ten times as long as a round.
static bool now_and_then(void)
{
    return run.seldom && draw(run.seldom) == 0;
}

static uint64_t word_at(const char *address)
{
    return *(const volatile uint64_t *)address;
}

static bool transfer(uint64_t iova, unsigned size, bool to_memory)
{
    return edu_transfer(&run.edu, iova, size, to_memory) || wrong("DMA at %#" PRIx64 " does not end", iova);
}

// The page of a mapping is what DMA reads there, and writes there if it may.
static bool compare(const struct mapping *mapping, uint64_t offset)
{
    uint64_t iova = mapping->iova + offset, value = draw(UINT64_MAX);
    unsigned page = window_page(&run.window, mapping->memory + offset);
    char *memory = window_memory(&run.window, page);

    if (!transfer(iova, PAGE, false) || !transfer(BOUNCE, PAGE, true))
        return false;
    size_t at = pattern_check(bounce, LAST, MEMORY_SEED, (uint64_t)page * PAGE);
    if (at < LAST || word_at(bounce + LAST) != run.last[page])
        return wrong("DMA reads another page than number %u at %#" PRIx64 ", offset %#zx, in a mapping of %#" PRIx64 " bytes",
                     page, iova, at, mapping->size);
    *(volatile uint64_t *)staging = value;
    if (!transfer(STAGING, 8, false) || !transfer(iova + LAST, 8, true))
        return false;
    if (mapping->writable)
        run.last[page] = value;
    run.compared++;
    if (word_at(memory + LAST) != run.last[page])
        return wrong("DMA %s at %#" PRIx64, mapping->writable ? "does not write" : "writes without permission", iova);
    return true;
}

// DMA is refused at an address where `gone` was, if that is known: it reads nothing, so that the
// device's buffer stays as it was, or is of equal bytes, and it writes nothing.
static bool refuse(const struct mapping *gone, uint64_t iova)
{
    if (!transfer(SENTINEL, PAGE, false) || !transfer(iova, PAGE, false) || !transfer(BOUNCE, PAGE, true))
        return false;
    bool equal = (bounce[0] == 0 || bounce[0] == (char)0xff) && memcmp(bounce, bounce + 1, PAGE - 1) == 0;
    if (!equal && pattern_check(bounce, PAGE, SENTINEL_SEED, 0) < PAGE)
        return wrong("DMA reads at %#" PRIx64 ", where nothing is mapped%s", iova, gone ? " any more" : "");
    if (!transfer(iova + LAST, 8, true))
        return false;
    run.refused++;
    if (!gone)
        return true; // whole memory is compared at the end
    unsigned page = window_page(&run.window, gone->memory + (iova - gone->iova));
    return word_at(window_memory(&run.window, page) + LAST) == run.last[page] ||
           wrong("DMA writes at %#" PRIx64 ", where nothing is mapped any more", iova);
}

// The mapping that has some of these addresses; NULL: none.
static struct mapping *find(uint64_t iova, uint64_t size)
{
    for (struct mapping *mapping = run.live; mapping < run.live + run.count; mapping++)
        if (iova < mapping->iova + mapping->size && mapping->iova < iova + size)
            return mapping;
    return NULL;
}

// A page of a mapping: often the first or the last.
static uint64_t some_page(const struct mapping *mapping)
{
    switch (draw(4)) {
    case 0: return 0;
    case 1: return mapping->size - PAGE;
    default: return draw(mapping->size / PAGE) * PAGE;
    }
}

static bool unmap(struct mapping *mapping)
{
    struct mapping gone = *mapping;
    int error = vfio_unmap(&run.vfio, gone.iova, gone.size);

    if (error)
        return wrong("unmapping %#" PRIx64 " bytes at %#" PRIx64 ": %s", gone.size, gone.iova, strerror(error));
    *mapping = run.live[--run.count];
    run.recent[run.unmaps++ % RECENT] = gone;
    if (!now_and_then())
        return true;
    if (!refuse(&gone, gone.iova + some_page(&gone)))
        return false;
    const struct mapping *other = &run.live[draw(MAX_LIVE) % (run.count ? run.count : 1)];
    return run.count == 0 || compare(other, some_page(other));
}

// Sizes are powers of two, or anything below; small ones are the usual, and there is one of each at
// first.
static uint64_t some_size(void)
{
    unsigned order = 0;

    while (order < MAX_ORDER && draw(8) < 5)
        order++;
    if (run.maps <= MAX_ORDER)
        order = MAX_ORDER - (unsigned)run.maps;
    uint64_t pages = UINT64_C(1) << order;
    return (draw(4) ? pages : pages - draw(pages / 2 + 1)) * PAGE;
}

// Maps something, or unmaps what is in the way: anywhere in the arena, at its alignment or not, or
// where something was not long ago.
static bool map(void)
{
    struct mapping mapping = {.size = some_size(), .writable = draw(4) != 0};
    const struct mapping *before = &run.recent[draw(RECENT)];
    uint64_t align = PAGE, room;

    if (draw(2))
        while (align < mapping.size)
            align *= 2;
    if (draw(2) && before->size && before->iova + mapping.size <= ARENA + ARENA_SIZE)
        mapping.iova = before->iova;
    else
        mapping.iova = ARENA + draw((ARENA_SIZE - mapping.size) / align + 1) * align;
    struct mapping *other = find(mapping.iova, mapping.size);
    if (other)
        return unmap(other);

    bool ordinary = mapping.size <= (uint64_t)PAGE << MAX_ORDINARY_ORDER && draw(2);
    // The memory of most has the alignment that huge pages in tables need.
    align = !ordinary && mapping.size >= WINDOW_SLOT && draw(4) ? WINDOW_SLOT : PAGE;
    room = (ordinary ? WINDOW_ORDINARY_SIZE : WINDOW_HUGE_SIZE) - mapping.size;
    mapping.memory = (ordinary ? run.window.ordinary : run.window.huge) + draw(room / align + 1) * align;
    int error = vfio_map(&run.vfio, mapping.memory, mapping.iova, mapping.size, mapping.writable);
    if (error)
        return wrong("mapping %#" PRIx64 " bytes at %#" PRIx64 ": %s", mapping.size, mapping.iova, strerror(error));
    run.live[run.count++] = mapping;
    run.maps++;
    return !now_and_then() || compare(&mapping, some_page(&mapping));
}

static bool do_rounds(unsigned long rounds)
{
    for (unsigned long round = 0; round < rounds; round++) {
        bool less = run.count == MAX_LIVE || draw(USUAL_LIVE + run.count) < run.count;
        if (!(less ? unmap(&run.live[draw(run.count)]) : map())) {
            size_t length = strlen(run.wrong);
            snprintf(run.wrong + length, sizeof(run.wrong) - length, " (round %lu)", round);
            return false;
        }
        if ((round + 1) % PROGRESS == 0)
            note("vfio: round %lu, %u mappings", round + 1, run.count);
    }
    return true;
}

// Samples of each mapping, all of its pages if it has no more, the pages around it, and what was
// unmapped not long ago.
static bool compare_all(unsigned samples)
{
    for (unsigned i = 0; i < run.count; i++) {
        const struct mapping *mapping = &run.live[i];
        uint64_t pages = mapping->size / PAGE, around[] = {mapping->iova - PAGE, mapping->iova + mapping->size};
        for (unsigned k = 0; k < samples && k < pages; k++)
            if (!compare(mapping, pages <= samples ? (uint64_t)k * PAGE : some_page(mapping)))
                return false;
        for (unsigned k = 0; k < 2; k++)
            if (!find(around[k], PAGE) && !refuse(NULL, around[k]))
                return false;
    }
    for (unsigned i = 0; i < RECENT && run.recent[i].size; i++) {
        uint64_t iova = run.recent[i].iova + some_page(&run.recent[i]);
        if (!find(iova, PAGE) && !refuse(NULL, iova))
            return false;
    }
    return true;
}

static bool unmap_all(void)
{
    // The three pages, too, which are needed.
    int error = vfio_unmap(&run.vfio, 0, 0);
    if (!error)
        error = vfio_map(&run.vfio, own, STAGING, sizeof(own), true);
    if (error)
        return wrong("unmapping everything: %s", strerror(error));
    for (unsigned i = 0; i < run.count && run.seldom; i++)
        if (!refuse(&run.live[i], run.live[i].iova + some_page(&run.live[i])))
            return false;
    for (unsigned page = 0; page < WINDOW_PAGES; page++) {
        char *memory = window_memory(&run.window, page);
        if (pattern_check(memory, LAST, MEMORY_SEED, (uint64_t)page * PAGE) < LAST || word_at(memory + LAST) != run.last[page])
            return wrong("page %u was written", page);
    }
    return true;
}

static bool set_up(void)
{
    const char *error = vfio_open(&run.vfio, run.edu.pci);

    if (error)
        return wrong("%s", error);
    error = window_open(&run.window, run.seed);
    if (error)
        return wrong("memory: %s", error);
    for (unsigned page = 0; page < WINDOW_PAGES; page++) {
        pattern_fill(window_memory(&run.window, page), PAGE, MEMORY_SEED, (uint64_t)page * PAGE);
        run.last[page] = word_at(window_memory(&run.window, page) + LAST);
    }
    pattern_fill(sentinel, PAGE, SENTINEL_SEED, 0);
    run.edu.registers = vfio_registers(&run.vfio, EDU_REGISTERS);
    if (run.edu.registers == MAP_FAILED)
        return wrong("its registers: %s", strerror(errno));
    int mapped = vfio_map(&run.vfio, own, STAGING, sizeof(own), true);
    return !mapped || wrong("mapping three pages: %s", strerror(mapped));
}

void check_vfio(void)
{
    unsigned long rounds = option_number("vfio.rounds", 1000);
    unsigned samples = option_number("vfio.every", 0) ? MANY_SAMPLES : SAMPLES;

    if (!edu_find(&run.edu, (unsigned)option_number("vfio.edu", 0))) {
        skipped("vfio", "there is no edu device");
        return;
    }
    run.seldom = option_number("vfio.seldom", 8);
    run.seed = option_number("vfio.seed", (unsigned long)(now() * 1e9) % 1000000);
    note("vfio: %s: seed %" PRIu64, run.edu.pci, run.seed);
    // Faults are many.
    klogctl(CONSOLE_LEVEL, NULL, PANICS_ONLY);
    bool right = set_up();
    double start = now(), taken = start;
    if (right) {
        right = do_rounds(rounds);
        taken = now() - start;
        if (!run.seldom)
            printf("figure rounds-s %.3f\n", taken);
        right = right && (!run.seldom || compare_all(samples)) && unmap_all();
    }
    klogctl(CONSOLE_LEVEL, NULL, ERRORS_ONLY);
    if (right)
        passed("vfio", "%s: %lu mapped and %lu unmapped in %.1f s, then compared, %.1f s in all: DMA to %lu pages, %lu refused",
               run.edu.pci, run.maps, run.unmaps, taken, now() - start, run.compared, run.refused);
    else
        failed("vfio", "%s: %s (seed %" PRIu64 ")", run.edu.pci, run.wrong, run.seed);
    if (run.edu.registers != MAP_FAILED)
        edu_close(&run.edu);
    vfio_close(&run.vfio);
    window_close(&run.window);
}
