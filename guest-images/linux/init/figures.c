// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
// Writes and reads twostage.figures.mib= (32) in pieces of 1 MiB, and twostage.figures.blocks=
// (1500) scattered blocks of 4 KiB, all with O_DIRECT, one request at a time; with
// twostage.figures.pass=NAME only one of these. The data is not checked: the check `blk` does that.
// With twostage.figures.invalidations=1, and strict invalidation, also measures the driver's time
// for each invalidation.
#include "figures.h"

#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <unistd.h>

#include "kernel/files.h"
#include "kernel/options.h"
#include "report.h"
#include "watch.h"

enum { BLOCK = 4096, MIB = 1 << 20, PAUSE_US = 400 * 1000, TRACED_BLOCKS = 500, MAX_TIMES = 1 << 16 };

void mark(const char *name)
{
    printf("mark %s\n", name);
    result_reported();
    usleep(PAUSE_US);
}

// A pass over the disk: `count` pieces of `size` bytes, each `stride` pieces after the previous
// one.
struct pass {
    const char *name;
    bool write;
    size_t size;
    uint64_t count, stride;
};

// Seconds; negative after a reported disk error.
static double transfer(int disk, const struct pass *pass, void *buffer)
{
    double start = now();

    for (uint64_t i = 0; i < pass->count; i++) {
        off_t offset = (off_t)(i * pass->stride % pass->count * pass->size);
        ssize_t done = pass->write ? pwrite(disk, buffer, pass->size, offset) : pread(disk, buffer, pass->size, offset);
        if (done != (ssize_t)pass->size) {
            failed("figures", "%s at %#jx: %s", pass->name, (intmax_t)offset, done < 0 ? strerror(errno) : "short");
            return -1;
        }
    }
    return now() - start;
}

static void measure(int disk, const struct pass *pass, void *buffer)
{
    double seconds = transfer(disk, pass, buffer);

    if (seconds > 0)
        printf("figure %s %.1f\n", pass->name, (double)pass->count / seconds);
}

static int ascending(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;

    return (x > y) - (x < y);
}

#define TRACING "/sys/kernel/tracing/"

// Measures each call of the function that submits invalidations and waits for them: the median in
// microseconds, from the kernel's function-graph tracer.
static void measure_invalidations(int disk, void *buffer)
{
    static const struct {
        const char *file, *text;
    } settings[] = {
        {TRACING "buffer_size_kb", "4096"},
        {TRACING "max_graph_depth", "1"},
        {TRACING "set_graph_function", "qi_submit_sync"},
        {TRACING "set_ftrace_filter", "qi_submit_sync"},
        {TRACING "current_tracer", "function_graph"},
    };
    static double times[MAX_TIMES];
    const struct pass pass = {"traced", true, BLOCK, TRACED_BLOCKS, 1};
    char line[512];
    size_t count = 0;

    mount("tracefs", TRACING, "tracefs", 0, NULL);
    for (size_t i = 0; i < sizeof(settings) / sizeof(settings[0]); i++) {
        int error = write_text(settings[i].file, settings[i].text);
        if (error) {
            skipped("figures", "invalidations: %s: %s", settings[i].file, strerror(error));
            return;
        }
    }
    transfer(disk, &pass, buffer);
    write_text(TRACING "tracing_on", "0");
    FILE *trace = fopen(TRACING "trace", "re");
    while (trace && count < MAX_TIMES && fgets(line, sizeof(line), trace)) {
        // " 0)   3.141 us    |  qi_submit_sync();", with a mark before the time if it is long.
        char *end = strstr(line, " us "), *start = strchr(line, ')');
        if (end && start && strstr(line, "qi_submit_sync") && start < end)
            times[count++] = strtod(start + 1 + strcspn(start + 1, "0123456789"), NULL);
    }
    if (trace)
        fclose(trace);
    write_text(TRACING "current_tracer", "nop");
    if (count == 0) {
        failed("figures", "the trace has no invalidation");
        return;
    }
    qsort(times, count, sizeof(times[0]), ascending);
    printf("figure invalidation-us %.2f\nfigure invalidations-per-write %.2f\n", times[count / 2],
           (double)count / TRACED_BLOCKS);
}

void take_figures(void)
{
    uint64_t mib = option_number("figures.mib", 32), blocks = option_number("figures.blocks", 1500);
    if (blocks > mib * (MIB / BLOCK))
        blocks = mib * (MIB / BLOCK);
    // The stride is prime: each block once, far from the previous one.
    const struct pass passes[] = {
        {"write-1m", true, MIB, mib, 1},
        {"read-1m", false, MIB, mib, 1},
        {"write-4k", true, BLOCK, blocks, 7919},
        {"read-4k", false, BLOCK, blocks, 7919},
    };
    const char *only = option("figures.pass", NULL);
    void *buffer;

    mark("booted");
    int disk = open("/dev/vda", O_RDWR | O_DIRECT | O_CLOEXEC);
    if (disk < 0 || posix_memalign(&buffer, MIB, MIB)) {
        failed("figures", "/dev/vda: %s", strerror(errno));
        return;
    }
    memset(buffer, 0x5a, MIB);
    // The image is sparse until it is written, which must not be measured.
    transfer(disk, &passes[0], buffer);
    mark("ready");
    for (size_t i = 0; i < sizeof(passes) / sizeof(passes[0]); i++) {
        if (only && strcmp(only, passes[i].name) != 0)
            continue;
        measure(disk, &passes[i], buffer);
        mark(passes[i].name);
    }
    if (option_number("figures.invalidations", 0))
        measure_invalidations(disk, buffer);
    mark("done");
    close(disk);
    passed("figures", "taken");
}
