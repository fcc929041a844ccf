// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
// An NVMe controller has a queue for each processor, each with its own MSI-X vector. The interrupts
// of a processor's reads are those of one queue: as many as reads, and few more.
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "../devices/devices.h"
#include "../kernel/interrupts.h"
#include "../report.h"
#include "checks.h"

// An unrelated request of the kernel in between causes one more interrupt of the same queue.
// Duplicate interrupts, or those of another queue, would be many more.
enum { READS = 64, OTHERS = 8, BLOCK = 4096, MAX_QUEUES = 64 };

struct queues {
    unsigned count;
    unsigned long interrupts[MAX_QUEUES]; // the first queue is the controller's own
};

static void take_queue(const char *text, unsigned long count, void *context)
{
    struct queues *queues = context;
    const char *number = strrchr(text, 'q');

    if (!number)
        return;
    unsigned long queue = strtoul(number + 1, NULL, 10);
    if (queue < MAX_QUEUES)
        queues->interrupts[queue] = count;
    queues->count++;
}

static struct queues find_queues(const char *controller)
{
    struct queues queues = {0};

    for_each_interrupt(controller, take_queue, &queues);
    return queues;
}

// NULL, or the error.
static const char *read_on(unsigned processor, int disk, char *block)
{
    cpu_set_t set;

    CPU_ZERO(&set);
    CPU_SET(processor, &set);
    if (sched_setaffinity(0, sizeof(set), &set) < 0)
        return strerror(errno);
    for (unsigned i = 0; i < READS; i++)
        if (pread(disk, block, BLOCK, (off_t)i * BLOCK) != BLOCK)
            return strerror(errno);
    return NULL;
}

static bool is_of_the_reads(unsigned long before, unsigned long after)
{
    unsigned long more = after - before;

    return more >= READS && more <= READS + OTHERS;
}

// Reads on each processor, and looks for the queue with these interrupts.
static void check_controller(const char *controller, int disk, char *block)
{
    unsigned processors = (unsigned)sysconf(_SC_NPROCESSORS_ONLN);
    struct queues before = find_queues(controller);
    bool used[MAX_QUEUES] = {false};

    if (processors >= MAX_QUEUES) {
        failed("queues", "%s: %u processors, and this looks at %u queues", controller, processors, MAX_QUEUES - 1);
        return;
    }
    if (before.count != processors + 1) {
        failed("queues", "%s: %u interrupts, with %u processors", controller, before.count, processors);
        return;
    }
    if (before.interrupts[0] == 0) {
        failed("queues", "%s: no interrupt of its own queue", controller);
        return;
    }
    for (unsigned processor = 0; processor < processors; processor++) {
        const char *wrong = read_on(processor, disk, block);
        if (wrong) {
            failed("queues", "%s: processor %u: %s", controller, processor, wrong);
            return;
        }
        struct queues after = find_queues(controller);
        unsigned queue = 1;
        while (queue <= processors &&
               (used[queue] || !is_of_the_reads(before.interrupts[queue], after.interrupts[queue])))
            queue++;
        if (queue > processors) {
            failed("queues", "%s: %u reads on processor %u are not as many interrupts of a queue", controller, READS,
                   processor);
            return;
        }
        used[queue] = true;
        before = after;
    }
    passed("queues", "%s: %u queues and its own, each with a message; %u reads, as many interrupts, on each processor",
           controller, processors, READS);
}

void check_queues(void)
{
    struct device device;
    cpu_set_t all;
    char path[64], controller[24], *block;

    if (!find_device("nvme", &device) || !device.node[0]) {
        failed("queues", "there is no NVMe disk");
        return;
    }
    snprintf(path, sizeof(path), "/dev/%s", device.node);
    int disk = open(path, O_RDONLY | O_DIRECT | O_CLOEXEC);
    if (disk < 0 || posix_memalign((void **)&block, BLOCK, BLOCK) || sched_getaffinity(0, sizeof(all), &all) < 0) {
        failed("queues", "%s: %s", device.node, strerror(errno));
        return;
    }
    // The controller's part of a name such as nvme0n1, which is also in its queues' names.
    snprintf(controller, sizeof(controller), "%s", device.node);
    strcpy(strrchr(controller, 'n'), "q");
    check_controller(controller, disk, block);
    sched_setaffinity(0, sizeof(all), &all);
    close(disk);
    free(block);
}
