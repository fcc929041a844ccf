// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <linux/fs.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include "../../pattern.h"
#include "../devices/devices.h"
#include "../kernel/files.h"
#include "../kernel/options.h"
#include "../md5.h"
#include "../report.h"
#include "checks.h"

#define MIB ((uint64_t)1 << 20)
enum { BLOCK = 4096 };

struct disk {
    const char *name;
    int file;
    uint64_t size; // bytes that may be written: whole MiB, without the last one (see reboot.c)
    char *buffer;  // 1 MiB
};

// NULL, or the error. `flags` besides O_DIRECT.
static const char *open_disk(struct disk *disk, const char *name, int flags)
{
    char path[64];
    uint64_t bytes;

    *disk = (struct disk){.name = name, .file = -1};
    snprintf(path, sizeof(path), "/dev/%s", name);
    disk->file = open(path, flags | O_DIRECT | O_CLOEXEC);
    if (disk->file < 0 || ioctl(disk->file, BLKGETSIZE64, &bytes) < 0)
        return strerror(errno);
    if (bytes < 2 * MIB)
        return "smaller than 2 MiB";
    disk->size = (bytes / MIB - 1) * MIB;
    return posix_memalign((void **)&disk->buffer, BLOCK, MIB) ? "no memory" : NULL;
}

static void close_disk(struct disk *disk)
{
    if (disk->file >= 0)
        close(disk->file);
    free(disk->buffer);
}

// Writes, or reads and compares, `size` bytes at `offset`. Returns the error; "" if there is none.
static const char *transfer(struct disk *disk, bool write, uint64_t seed, uint64_t offset, size_t size)
{
    static char wrong[160];
    ssize_t done;

    if (write)
        pattern_fill(disk->buffer, size, seed, offset);
    done = write ? pwrite(disk->file, disk->buffer, size, (off_t)offset)
                 : pread(disk->file, disk->buffer, size, (off_t)offset);
    if (done != (ssize_t)size) {
        snprintf(wrong, sizeof(wrong), "%s at %#" PRIx64 ": %zd bytes of %zu, %s", write ? "write" : "read", offset,
                 done, size, done < 0 ? strerror(errno) : "short");
        return wrong;
    }
    size_t at = write ? size : pattern_check(disk->buffer, size, seed, offset);
    if (at == size)
        return "";
    uint64_t found;
    memcpy(&found, disk->buffer + at, 8);
    snprintf(wrong, sizeof(wrong), "at %#" PRIx64 ": found %#" PRIx64 ", written was %#" PRIx64, offset + at, found,
             pattern_word(seed, offset + at));
    return wrong;
}

static void sequential(struct disk *disk, uint64_t size, uint64_t seed)
{
    double seconds[2];

    for (int write = 1; write >= 0; write--) {
        double start = now();
        for (uint64_t offset = 0; offset < size; offset += MIB) {
            const char *wrong = transfer(disk, write, seed, offset, MIB);
            if (wrong[0]) {
                failed("blk", "%s, sequential: %s", disk->name, wrong);
                return;
            }
        }
        if (write && fdatasync(disk->file) < 0) {
            failed("blk", "%s: flush: %s", disk->name, strerror(errno));
            return;
        }
        seconds[write] = now() - start;
    }
    double mib = (double)(size / MIB);
    passed("blk", "%s: %.0f MiB written in %.2f s (%.0f MiB/s), read back in %.2f s (%.0f MiB/s)", disk->name, mib,
           seconds[1], mib / seconds[1], seconds[0], mib / seconds[0]);
}

// Scattered blocks, each one once: an odd multiplier that is not a factor of the count.
static uint64_t scattered(uint64_t index, uint64_t blocks)
{
    return index * 7919 % blocks;
}

static void scattered_blocks(struct disk *disk, uint64_t operations, uint64_t seed)
{
    uint64_t blocks = disk->size / BLOCK;
    double seconds[2];

    // The scatter visits each block only if the two are coprime.
    while (blocks % 7919 == 0)
        blocks--;
    if (operations > blocks)
        operations = blocks;
    for (int write = 1; write >= 0; write--) {
        double start = now();
        for (uint64_t i = 0; i < operations; i++) {
            const char *wrong = transfer(disk, write, seed, scattered(i, blocks) * BLOCK, BLOCK);
            if (wrong[0]) {
                failed("blk", "%s, block %" PRIu64 ": %s", disk->name, i, wrong);
                return;
            }
        }
        seconds[write] = now() - start;
    }
    passed("blk", "%s: %" PRIu64 " scattered 4 KiB blocks written in %.2f s (%.0f/s), read back in %.2f s (%.0f/s)",
           disk->name, operations, seconds[1], (double)operations / seconds[1], seconds[0],
           (double)operations / seconds[0]);
}

static void check_disk(const char *name, unsigned seed)
{
    struct disk disk;
    uint64_t wanted = option_number("blk.mib", 32) * MIB;

    if (strcmp(first_line("/sys/block/%s/ro", name), "1") == 0) {
        skipped("blk", "%s is read-only", name);
        return;
    }
    const char *wrong = open_disk(&disk, name, O_RDWR);
    if (wrong) {
        failed("blk", "%s: %s", name, wrong);
    } else {
        sequential(&disk, wanted < disk.size ? wanted : disk.size, seed);
        scattered_blocks(&disk, option_number("blk.blocks", 1000), 100 + seed);
    }
    close_disk(&disk);
}

void check_blk(void)
{
    struct device devices[MAX_DEVICES];
    unsigned count = find_devices(devices), disks = 0;

    for (unsigned i = 0; i < count; i++)
        if (is_disk(&devices[i]) && devices[i].node[0])
            check_disk(devices[i].node, ++disks);
    if (!disks)
        failed("blk", "there is no disk");
}

// The contents of a disk, for comparison with the file behind it.
static void digest(const char *name)
{
    struct disk disk;
    struct md5 md5;
    char hexadecimal[MD5_TEXT];
    const char *wrong = open_disk(&disk, name, O_RDONLY);

    md5_start(&md5);
    for (uint64_t offset = 0; !wrong && offset < disk.size; offset += MIB) {
        if (pread(disk.file, disk.buffer, MIB, (off_t)offset) == (ssize_t)MIB)
            md5_add(&md5, disk.buffer, MIB);
        else
            wrong = strerror(errno);
    }
    if (wrong) {
        failed("md5", "%s: %s", name, wrong);
    } else {
        md5_end(&md5, hexadecimal);
        passed("md5", "%s: %s of %" PRIu64 " MiB", name, hexadecimal, disk.size / MIB);
    }
    close_disk(&disk);
}

void check_md5(void)
{
    struct device device;

    if (find_device("nvme", &device) || find_device("virtio_blk", &device))
        digest(device.node);
    else
        failed("md5", "there is no disk");
}

const char *try_disk(const char *name)
{
    static uint64_t seed = 1000;
    struct disk disk;
    const char *wrong = open_disk(&disk, name, O_RDWR);

    seed++;
    for (int write = 1; write >= 0 && !wrong; write--) {
        const char *text = transfer(&disk, write, seed, 0, MIB);
        wrong = text[0] ? text : NULL;
    }
    close_disk(&disk);
    return wrong;
}

void note_disks(void)
{
    struct device devices[MAX_DEVICES];
    unsigned count = find_devices(devices);

    for (unsigned i = 0; i < count; i++) {
        unsigned long reads, read, writes, written;
        if (is_disk(&devices[i]) && sscanf(first_line("/sys/block/%s/stat", devices[i].node), "%lu %*u %lu %*u %lu %*u %lu",
                                           &reads, &read, &writes, &written) == 4)
            note("%s: %lu reads of %lu KiB, %lu writes of %lu KiB", devices[i].node, reads, read / 2, writes, written / 2);
    }
}
