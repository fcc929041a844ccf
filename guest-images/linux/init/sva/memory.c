// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
// One process changes its address space, and the device notices at once.
#include <errno.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include "../../pattern.h"
#include "../devices/edu_sva.h"
#include "../kernel/files.h"
#include "../kernel/options.h"
#include "../report.h"
#include "cases.h"

enum { CHUNK = 250 * SVA_PAGE, PRESENT = 50 * SVA_PAGE, ROUNDS = 25 };
#define HUGE_PAGE ((size_t)2 << 20)

const char *sva_present(void)
{
    char *from = sva_map(PRESENT + SVA_PAGE), *to = sva_map(PRESENT + SVA_PAGE);
    int file = sva_open(0);

    pattern_fill(from + 24, PRESENT, 8, 0);
    memset(to, 0, PRESENT + SVA_PAGE);
    const char *error = sva_copies(file, from + 24, to + 72, PRESENT, 8);
    if (!error)
        error = sva_copies(file, from + 24, to + 80, PRESENT, 8);
    sva_say("%d bytes copied twice, across pages", PRESENT);
    return error;
}

// The device writes the page of `seed` to all pages. Returns the seconds it took.
static double fill(int file, char *to, unsigned seed, const char **error)
{
    static char page[SVA_PAGE];
    double start = now();

    pattern_fill(page, SVA_PAGE, seed, 0);
    int failure = sva_fill(file, page, to, CHUNK);
    double took = now() - start;
    if (failure)
        *error = strerror(failure);
    for (size_t at = 0; at < CHUNK && !*error; at += SVA_PAGE)
        *error = sva_holds(to + at, SVA_PAGE, seed);
    return took;
}

const char *sva_untouched(void)
{
    size_t pages = option_number("sva.pages", SVA_PAGES), chunks = (pages * SVA_PAGE + CHUNK - 1) / CHUNK;
    double absent = 0, present = 0;
    const char *error = NULL;
    int file = sva_open(0);

    for (unsigned chunk = 0; chunk < chunks && !error; chunk++) {
        // Where the last one was: nothing of it may be left.
        char *to = sva_map(CHUNK);
        absent += fill(file, to, 2 * chunk, &error);
        if (!error)
            present += fill(file, to, 2 * chunk + 1, &error);
        munmap(to, CHUNK);
        // Silence would be taken for a machine that hangs.
        if (chunk % 4 == 3)
            note("%u pages in %.0f s", (chunk + 1) * CHUNK / SVA_PAGE, absent);
    }
    pages = chunks * CHUNK / SVA_PAGE;
    sva_say("%zu pages in %.2f s, %.0f a second; when they are there, in %.2f s: a page request adds %.0f us", pages,
            absent, (double)pages / absent, present, (absent - present) / (double)pages * 1e6);
    return error;
}

const char *sva_unmap(void)
{
    const char *error = NULL;
    char *memory = sva_map(SVA_PAGE), *copy = sva_map(SVA_PAGE);
    int file = sva_open(0);

    for (unsigned round = 0; round < ROUNDS && !error; round++) {
        pattern_fill(memory, SVA_PAGE, round, 0);
        error = sva_copies(file, memory, copy, SVA_PAGE, round);
        munmap(memory, SVA_PAGE);
        if (!error)
            error = sva_refuses_read(file, memory);
        if (!error)
            error = sva_refuses_write(file, memory);
        if (mmap(memory, SVA_PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) != memory)
            return strerror(errno);
        for (unsigned byte = 0; byte < SVA_PAGE && !error; byte++)
            if (memory[byte])
                error = "a page that was just mapped is not zero";
    }
    sva_say("%d times a page was unmapped, refused, and mapped again", ROUNDS);
    return error;
}

const char *sva_protect(void)
{
    const char *error = NULL;
    char *memory = sva_map(SVA_PAGE), *source = sva_map(SVA_PAGE), *copy = sva_map(SVA_PAGE);
    int file = sva_open(0);

    for (unsigned round = 0; round < ROUNDS && !error; round++) {
        pattern_fill(source, SVA_PAGE, round, 0);
        error = sva_copies(file, source, memory, SVA_PAGE, round);
        mprotect(memory, SVA_PAGE, PROT_READ);
        if (!error)
            error = sva_refuses_write(file, memory);
        if (!error)
            error = sva_copies(file, memory, copy, SVA_PAGE, round);
        mprotect(memory, SVA_PAGE, PROT_NONE);
        if (!error)
            error = sva_refuses_read(file, memory);
        mprotect(memory, SVA_PAGE, PROT_READ | PROT_WRITE);
        if (!error)
            error = sva_holds(memory, SVA_PAGE, round);
    }
    sva_say("%d times a page was read-only, unreadable and writable", ROUNDS);
    return error;
}

// What the child of sva_fork sees: memory as it was, until it has its own device write there.
static const char *be_child(int parents, char *memory, const char *source, int start)
{
    char byte;

    // Until the parent has written.
    if (read(start, &byte, 1) != 1)
        return "the parent is gone";
    const char *error = sva_holds(memory, SVA_PAGE, 1);
    if (!error && sva_copy(parents, source, memory, SVA_PAGE) != EPERM)
        error = "the parent's file is usable in the child";
    int file = sva_open(0);
    if (!error)
        error = sva_copies(file, source, memory, SVA_PAGE, 3);
    return error;
}

const char *sva_fork(void)
{
    char *memory = sva_map(SVA_PAGE), *source = sva_map(SVA_PAGE), *third = sva_map(SVA_PAGE);
    int file = sva_open(0);
    const char *error = NULL;

    pattern_fill(third, SVA_PAGE, 3, 0);
    for (unsigned round = 0; round < ROUNDS && !error; round++) {
        int start[2], result[2], status = 0;
        char text[200] = "";

        pattern_fill(source, SVA_PAGE, 1, 0);
        error = sva_copies(file, source, memory, SVA_PAGE, 1);
        if (error || pipe(start) < 0 || pipe(result) < 0)
            break;
        pid_t child = fork();
        if (child == 0) {
            close(start[1]);
            error = be_child(file, memory, third, start[0]);
            if (error && write(result[1], error, strlen(error)) < 0)
                _exit(2);
            _exit(error != NULL);
        }
        close(result[1]);
        // The device has the page's address with the right to write, but now it is shared.
        pattern_fill(source, SVA_PAGE, 2, 0);
        error = sva_copies(file, source, memory, SVA_PAGE, 2);
        if (write(start[1], "", 1) != 1)
            error = strerror(errno);
        ssize_t length = read(result[0], text, sizeof(text) - 1);
        waitpid(child, &status, 0);
        if (!error && status != 0)
            error = sva_error("in the child: %s", length > 0 ? text : "it died");
        if (!error)
            error = sva_holds(memory, SVA_PAGE, 2);
        close(start[0]), close(start[1]), close(result[0]);
    }
    sva_say("%d children saw the page as it was before the device wrote to their parent's, and the reverse", ROUNDS);
    return error;
}

const char *sva_huge(void)
{
    char *area = sva_map(3 * HUGE_PAGE), *source = sva_map(HUGE_PAGE);
    char *memory = (char *)(((uintptr_t)area + HUGE_PAGE - 1) & ~(HUGE_PAGE - 1));
    char *middle = memory + HUGE_PAGE / 2;
    int file = sva_open(0);

    // A mapping of its own, between others.
    munmap(area, (size_t)(memory - area));
    munmap(memory + HUGE_PAGE, (size_t)(area + 3 * HUGE_PAGE - (memory + HUGE_PAGE)));
    // Linux turns them off on a machine with less than 512 MiB.
    int error_number = write_text("/sys/kernel/mm/transparent_hugepage/enabled", "madvise");
    if (error_number || madvise(memory, HUGE_PAGE, MADV_HUGEPAGE) < 0)
        return sva_skip("the kernel has no huge pages");
    pattern_fill(source, HUGE_PAGE, 4, 0);
    // The device is the first to touch it.
    const char *error = sva_copies(file, source, memory, HUGE_PAGE, 4);
    if (error)
        return error;
    if (sva_mapped(memory, "AnonHugePages: %lu kB") < HUGE_PAGE >> 10)
        return sva_skip("the kernel found no huge page");
    // Pieces of it change: the translation of the whole must go.
    mprotect(middle, SVA_PAGE, PROT_READ);
    error = sva_refuses_write(file, middle);
    munmap(middle + SVA_PAGE, SVA_PAGE);
    if (!error)
        error = sva_refuses_read(file, middle + SVA_PAGE);
    madvise(middle + 2 * SVA_PAGE, SVA_PAGE, MADV_DONTNEED);
    static char page[SVA_PAGE], zeroes[SVA_PAGE];
    memset(page, 1, SVA_PAGE);
    if (!error && (sva_copy(file, middle + 2 * SVA_PAGE, page, SVA_PAGE) != 0 || memcmp(page, zeroes, SVA_PAGE) != 0))
        error = "a page that was given back is not zero";
    if (!error)
        error = sva_holds(memory, HUGE_PAGE / 2 + SVA_PAGE, 4);
    if (!error)
        error = sva_copies(file, memory, source, HUGE_PAGE / 2, 4);
    sva_say("2 MiB written as one page; then pieces of it were protected, unmapped and given back");
    return error;
}
