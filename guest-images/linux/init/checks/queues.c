// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
// A disk has a queue for each processor, each with its own MSI-X vector: an NVMe controller, or a
// virtio disk with as many. The interrupts of a processor's reads are those of one queue: as many as
// reads, and few more.
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

// What a disk's interrupts are called.
struct controller {
    char name[32];  // nvme0q, virtio1-req
    char mark;      // the last one of these is followed by the number
    unsigned first; // queue for reads: those before it are the controller's own
};

struct queues {
    char mark;
    unsigned count;
    unsigned long interrupts[MAX_QUEUES];
};

static void take_queue(const char *text, unsigned long count, void *context)
{
    struct queues *queues = context;
    const char *number = strrchr(text, queues->mark);

    if (!number)
        return;
    unsigned long queue = strtoul(number + 1, NULL, 10);
    if (queue < MAX_QUEUES)
        queues->interrupts[queue] = count;
    queues->count++;
}

static struct queues find_queues(const struct controller *controller)
{
    struct queues queues = {.mark = controller->mark};

    for_each_interrupt(controller->name, take_queue, &queues);
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
static void check_controller(const struct controller *controller, int disk, char *block)
{
    unsigned processors = (unsigned)sysconf(_SC_NPROCESSORS_ONLN), first = controller->first;
    struct queues before = find_queues(controller);
    bool used[MAX_QUEUES] = {false};

    if (processors >= MAX_QUEUES) {
        failed("queues", "%s: %u processors, and this looks at %u queues", controller->name, processors,
               MAX_QUEUES - 1);
        return;
    }
    if (before.count != first + processors) {
        failed("queues", "%s: %u interrupts, with %u processors", controller->name, before.count, processors);
        return;
    }
    for (unsigned queue = 0; queue < first; queue++) {
        if (before.interrupts[queue] == 0) {
            failed("queues", "%s: no interrupt of its own queue", controller->name);
            return;
        }
    }
    for (unsigned processor = 0; processor < processors; processor++) {
        const char *wrong = read_on(processor, disk, block);
        if (wrong) {
            failed("queues", "%s: processor %u: %s", controller->name, processor, wrong);
            return;
        }
        struct queues after = find_queues(controller);
        unsigned queue = first;
        while (queue < first + processors &&
               (used[queue] || !is_of_the_reads(before.interrupts[queue], after.interrupts[queue])))
            queue++;
        if (queue == first + processors) {
            failed("queues", "%s: %u reads on processor %u are not as many interrupts of a queue", controller->name,
                   READS, processor);
            return;
        }
        used[queue] = true;
        before = after;
    }
    passed("queues", "%s: %u queues, each with a message; %u reads, as many interrupts, on each processor",
           controller->name, processors, READS);
}

// Whether `device` is a disk that should have a queue for each processor.
static bool has_queues(const struct device *device, struct controller *controller)
{
    if (!is_disk(device) || !device->node[0])
        return false;
    if (device->virtio[0]) {
        snprintf(controller->name, sizeof(controller->name), "%s-req", device->virtio);
        controller->mark = '.';
        controller->first = 0;
        // One queue for all processors is what the machine was told.
        return find_queues(controller).count > 1;
    }
    // The controller's part of a name such as nvme0n1, which is also in its queues' names.
    snprintf(controller->name, sizeof(controller->name), "%s", device->node);
    strcpy(strrchr(controller->name, 'n'), "q");
    controller->mark = 'q';
    controller->first = 1;
    return true;
}

static void check_disk(const struct device *device, const struct controller *controller)
{
    cpu_set_t all;
    char path[64], *block = NULL;

    snprintf(path, sizeof(path), "/dev/%s", device->node);
    int disk = open(path, O_RDONLY | O_DIRECT | O_CLOEXEC);
    if (disk < 0 || posix_memalign((void **)&block, BLOCK, BLOCK) || sched_getaffinity(0, sizeof(all), &all) < 0) {
        failed("queues", "%s: %s", device->node, strerror(errno));
    } else {
        check_controller(controller, disk, block);
        sched_setaffinity(0, sizeof(all), &all);
    }
    if (disk >= 0)
        close(disk);
    free(block);
}

void check_queues(void)
{
    struct device devices[MAX_DEVICES];
    struct controller controller;
    unsigned count = find_devices(devices), disks = 0;

    for (unsigned i = 0; i < count; i++) {
        if (has_queues(&devices[i], &controller)) {
            check_disk(&devices[i], &controller);
            disks++;
        }
    }
    if (!disks)
        failed("queues", "there is no disk with a queue for each processor");
}
