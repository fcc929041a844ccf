// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
// The number of restarts is kept on the first disk, in its last 4 KiB, which check_blk does not
// use.
#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/reboot.h>
#include <unistd.h>

#include "../devices/devices.h"
#include "../kernel/options.h"
#include "../report.h"
#include "checks.h"

#define MAGIC UINT64_C(0x746f6f6265722d32)
enum { BLOCK = 4096 };

struct record {
    uint64_t magic, restarts;
    char rest[BLOCK - 16];
} __attribute__((aligned(BLOCK)));

// The record's position; negative if there is none.
static off_t open_record(int *file)
{
    struct device devices[MAX_DEVICES];
    unsigned count = find_devices(devices), i = 0;
    char path[64];
    uint64_t bytes;

    *file = -1;
    errno = ENODEV;
    while (i < count && !is_disk(&devices[i]))
        i++;
    if (i == count)
        return -1;
    snprintf(path, sizeof(path), "/dev/%s", devices[i].node);
    *file = open(path, O_RDWR | O_DIRECT | O_CLOEXEC);
    if (*file < 0 || ioctl(*file, BLKGETSIZE64, &bytes) < 0 || bytes < BLOCK)
        return -1;
    return (off_t)(bytes / BLOCK - 1) * BLOCK;
}

void check_reboot(void)
{
    static struct record record;
    unsigned long wanted = option_number("reboots", 1);
    int file;
    off_t at = open_record(&file);

    if (at < 0 || pread(file, &record, BLOCK, at) != BLOCK) {
        failed("reboot", "the first disk cannot keep how often: %s", strerror(errno));
        return;
    }
    if (record.magic != MAGIC)
        record = (struct record){.magic = MAGIC};
    bool more = record.restarts < wanted;
    uint64_t restarts = record.restarts;
    record.restarts = more ? restarts + 1 : 0;
    if (pwrite(file, &record, BLOCK, at) != BLOCK || fsync(file) < 0) {
        failed("reboot", "the first disk: %s", strerror(errno));
        return;
    }
    close(file);
    if (!more) {
        passed("reboot", "the machine has restarted %lu times", (unsigned long)restarts);
        return;
    }
    summary();
    note("restart %lu of %lu", (unsigned long)record.restarts, wanted);
    flush_report();
    sync();
    reboot(RB_AUTOBOOT);
    failed("reboot", "%s", strerror(errno));
}
