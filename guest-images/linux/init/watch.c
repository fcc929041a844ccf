// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
#include "watch.h"

#include <fcntl.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "kernel/files.h"
#include "kernel/options.h"

// Number of results, shared with the watching process.
static atomic_uint *results;

static void show_file(const char *path)
{
    char line[512];
    FILE *file = fopen(path, "re");

    while (file && fgets(line, sizeof(line), file))
        printf("# watch: %s: %.*s\n", path, (int)strcspn(line, "\n"), line);
    if (file)
        fclose(file);
}

static bool show_disk(const char *name, void *context)
{
    char path[128];

    (void)context;
    snprintf(path, sizeof(path), "/sys/block/%s/inflight", name);
    show_file(path);
    return true;
}

// The kernel's list of tasks that are blocked for too long, and of its timers.
static void show_tasks(void)
{
    char record[1024];
    ssize_t length;
    int log = open("/dev/kmsg", O_RDONLY | O_NONBLOCK | O_CLOEXEC);

    lseek(log, 0, SEEK_END);
    write_text("/proc/sysrq-trigger", "w");
    write_text("/proc/sysrq-trigger", "q");
    // Each read returns one record: numbers, a semicolon, the text.
    while ((length = read(log, record, sizeof(record) - 1)) > 0) {
        record[length] = '\0';
        char *text = strchr(record, ';');
        printf("# watch: %.*s\n", (int)strcspn(text ? text : "", "\n"), text ? text : "");
    }
    close(log);
}

static void look(void)
{
    for (int turn = 0; turn < 2; turn++) {
        printf("# watch: no result for long; look %d, uptime %s\n", turn + 1, first_line("/proc/uptime"));
        show_file("/proc/interrupts");
        show_file("/proc/1/stack");
        for_each_name("/sys/block", show_disk, NULL);
        sleep(2);
    }
    show_tasks();
}

static void watch(unsigned seconds)
{
    for (unsigned before = atomic_load(results);; before = atomic_load(results)) {
        sleep(seconds);
        if (atomic_load(results) == before) {
            look();
            return;
        }
    }
}

void watch_results(void)
{
    unsigned seconds = (unsigned)option_number("watch", 60);
    void *page = mmap(NULL, sizeof(*results), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);

    if (seconds == 0 || page == MAP_FAILED)
        return;
    results = page;
    if (fork() == 0) {
        watch(seconds);
        _exit(0);
    }
}

void result_reported(void)
{
    if (results)
        atomic_fetch_add(results, 1);
}
