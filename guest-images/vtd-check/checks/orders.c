// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
// A driver that does what its serial port is told, a line each, and says what came of it: for tests
// of hosts whose disks, taps and entropy fail or hang. Nothing waits: an answer comes when the
// device has given it, and other orders are served meanwhile.
//
//   r DISK SECTOR COUNT        reads sectors: "r DISK SECTOR ok VALUE", the first 8 bytes, or
//                              "r DISK SECTOR error STATUS"
//   w DISK SECTOR COUNT VALUE  writes sectors filled with this number
//   f DISK                     flushes what was written
//   k DISK COUNT               writes sector 1 with 1, flushes, says "k 1", and so on up to COUNT
//   n                          sends a frame: "n ok" when the device has taken it
//   g                          gets entropy: "g LENGTH"
//   s                          "s STATUS ...": the status of each disk, then of the network and the
//                              entropy device
//   p TEXT                     "p TEXT": for whoever wants to know whether the guest lives
//   c                          "c NUMBER": milliseconds since the start, by the time-stamp counter
//   z                          resets the machine
//   x CODE                     ends it
#include "check.h"
#include "hw/virtio.h"
#include "lib/console.h"
#include "lib/memory.h"
#include "lib/wait.h"

enum { DISKS = 2, SLOTS = 16, CHAIN = 3, SECTOR = 512, LINE = 80 };
enum { SERIAL = 0x3f8, SERIAL_STATUS = SERIAL + 5, SERIAL_READY = 1 };
enum { BLK_READ = 0, BLK_WRITE = 1, BLK_FLUSH = 4, NO_STATUS = 0xff };
enum { RESET_REGISTER = 0xcf9, RESET_FULL = 0x06 };

// Where the data of requests is, after everything else.
#define DATA 0x4000000ull
#define DATA_SIZE 0x100000ull

// A request that the device has.
struct slot {
    char order;
    u64 sector;
};

struct disk {
    struct virtio device;
    struct slot slots[SLOTS];
    struct header {
        u32 kind, reserved;
        u64 sector;
    } *headers;
    u8 *status;
    u16 seen;
    // Numbered writes: the last one that is on the disk, and the last one that is wanted.
    u64 written, wanted;
};

static struct disk disks[DISKS];
static unsigned disk_count;
static struct virtio receive, transmit, entropy;
static bool has_net, has_entropy;
static u16 sent, given;

static u64 *data_of(const struct disk *disk, unsigned slot)
{
    return (u64 *)(uintptr_t)(DATA + ((u64)(disk - disks) * SLOTS + slot) * DATA_SIZE);
}

// Makes a request of a slot that is free. False if none is.
static bool begin(struct disk *disk, char order, u32 kind, u64 sector, u64 length, u64 value)
{
    unsigned slot = 0;
    u16 head;
    struct virtio_descriptor *chain;

    while (slot < SLOTS && disk->slots[slot].order)
        slot++;
    if (slot == SLOTS || length > DATA_SIZE)
        return false;
    disk->slots[slot] = (struct slot){order, sector};
    disk->headers[slot] = (struct header){kind, 0, sector};
    disk->status[slot] = NO_STATUS;
    for (u64 n = 0; kind == BLK_WRITE && n < length / sizeof value; n++)
        data_of(disk, slot)[n] = value;
    head = (u16)(CHAIN * slot);
    chain = disk->device.descriptors + head;
    chain[0] = (struct virtio_descriptor){gpa_of(&disk->headers[slot]), 16, VIRTIO_NEXT, (u16)(head + 1)};
    chain[1] = (struct virtio_descriptor){gpa_of(data_of(disk, slot)), (u32)length,
                                          (u16)(VIRTIO_NEXT | (kind == BLK_READ ? VIRTIO_WRITE : 0)),
                                          (u16)(head + 2)};
    chain[2] = (struct virtio_descriptor){gpa_of(&disk->status[slot]), 1, VIRTIO_WRITE, 0};
    if (!length)
        chain[0].next = (u16)(head + 2);
    virtio_put(&disk->device, head);
    return true;
}

// The next of the numbered writes, if one is wanted.
static void write_next(struct disk *disk)
{
    if (disk->written < disk->wanted)
        begin(disk, 'K', BLK_WRITE, disk->written + 1, SECTOR, disk->written + 1);
}

static void ended(struct disk *disk, unsigned slot)
{
    struct slot was = disk->slots[slot];
    u32 number = (u32)(disk - disks);
    u8 status = disk->status[slot];

    disk->slots[slot].order = 0;
    if (status) {
        disk->wanted = was.order == 'K' || was.order == 'k' ? 0 : disk->wanted;
        print("%c %u %lu error %u\n", was.order, number, was.sector, (u32)status);
        return;
    }
    switch (was.order) {
    case 'K':
        begin(disk, 'k', BLK_FLUSH, 0, 0, 0);
        break;
    case 'k':
        print("k %lu\n", ++disk->written);
        write_next(disk);
        break;
    case 'r':
        print("r %u %lu ok %lu\n", number, was.sector, *data_of(disk, slot));
        break;
    default:
        print("%c %u %lu ok\n", was.order, number, was.sector);
    }
}

static void collect(struct disk *disk)
{
    while (disk->seen != virtio_used(&disk->device))
        ended(disk, virtio_used_head(&disk->device, disk->seen++) / CHAIN);
}

static void find_devices(void)
{
    while (disk_count < DISKS && virtio_find_nth(&disks[disk_count].device, VIRTIO_BLOCK, disk_count)) {
        struct disk *disk = &disks[disk_count];

        disk->headers = page_new();
        disk->status = page_new();
        if (!virtio_start(&disk->device))
            print("disk %u does not start: status 0x%02x\n", disk_count, (u32)virtio_status(&disk->device));
        disk_count++;
    }
    has_net = virtio_find(&receive, VIRTIO_NETWORK);
    if (has_net) {
        transmit = virtio_other_queue(&receive, 1);
        virtio_begin(&receive);
        virtio_enable(&receive);
        virtio_enable(&transmit);
        virtio_ready(&receive);
        // Buffers for frames, of which nobody looks at what is in them.
        for (u16 n = 0; n < VIRTIO_QUEUE_SIZE; n++) {
            receive.descriptors[n] =
                (struct virtio_descriptor){DATA + DISKS * SLOTS * DATA_SIZE, 65562, VIRTIO_WRITE, 0};
            virtio_put(&receive, n);
        }
    }
    has_entropy = virtio_find(&entropy, VIRTIO_ENTROPY) && virtio_start(&entropy);
}

static void send_frame(void)
{
    enum { HEADER = 12, FRAME = 64, BROADCAST = 6 };
    static u8 frame[HEADER + FRAME] = {[HEADER... HEADER + BROADCAST - 1] = 0xff, [HEADER + 12] = 0x88, 0xb5};

    transmit.descriptors[0] = (struct virtio_descriptor){gpa_of(frame), sizeof frame, 0, 0};
    virtio_put(&transmit, 0);
}

static void get_entropy(void)
{
    entropy.descriptors[0] = (struct virtio_descriptor){DATA - PAGE_SIZE, PAGE_SIZE, VIRTIO_WRITE, 0};
    virtio_put(&entropy, 0);
}

// What devices have done since the last call.
static void look(void)
{
    for (unsigned n = 0; n < disk_count; n++)
        collect(&disks[n]);
    if (has_net && virtio_used(&transmit) != sent) {
        sent++;
        print("n ok\n");
    }
    if (has_entropy && virtio_used(&entropy) != given) {
        print("g %u\n", virtio_used_length(&entropy, given));
        given++;
    }
}

// The next number of a line, and what is after it.
static u64 number(const char **at)
{
    u64 value = 0;

    while (**at == ' ')
        (*at)++;
    for (; **at >= '0' && **at <= '9'; (*at)++)
        value = value * 10 + (u64)(**at - '0');
    return value;
}

static void say_status(void)
{
    print("s");
    for (unsigned n = 0; n < disk_count; n++)
        print(" %u", (u32)virtio_status(&disks[n].device));
    if (has_net)
        print(" %u", (u32)virtio_status(&receive));
    if (has_entropy)
        print(" %u", (u32)virtio_status(&entropy));
    print("\n");
}

static void obey(const char *line, u64 started)
{
    const char *at = line + 1;
    bool of_disk = *line == 'r' || *line == 'w' || *line == 'f' || *line == 'k';
    u64 n = of_disk ? number(&at) : 0, first = number(&at), second = number(&at), third = number(&at);
    struct disk *disk = &disks[n < disk_count ? n : 0];
    bool done = n < disk_count || !of_disk;

    switch (*line) {
    case 'r':
        done = done && begin(disk, 'r', BLK_READ, first, second * SECTOR, 0);
        break;
    case 'w':
        done = done && begin(disk, 'w', BLK_WRITE, first, second * SECTOR, third);
        break;
    case 'f':
        done = done && begin(disk, 'f', BLK_FLUSH, 0, 0, 0);
        break;
    case 'k':
        disk->wanted = disk->written + first;
        write_next(disk);
        break;
    case 'n':
        done = has_net;
        if (has_net)
            send_frame();
        break;
    case 'g':
        done = has_entropy;
        if (has_entropy)
            get_entropy();
        break;
    case 's':
        say_status();
        break;
    case 'p':
        print("%s\n", line);
        break;
    case 'c':
        print("c %lu\n", (timestamp() - started) / (clock_frequency() / 1000));
        break;
    case 'z':
        out8(RESET_REGISTER, RESET_FULL);
        break;
    case 'x':
        machine_exit((u8)first);
    default:
        done = false;
    }
    if (!done)
        print("not done: %s\n", line);
}

void obey_orders(void)
{
    static char line[LINE];
    unsigned length = 0;
    u64 started = timestamp();

    find_devices();
    print("ready: %u disks\n", disk_count);
    for (;;) {
        look();
        if (!(in8(SERIAL_STATUS) & SERIAL_READY))
            continue;
        line[length] = (char)in8(SERIAL);
        if (line[length] == '\n') {
            line[length] = 0;
            length = 0;
            obey(line, started);
        } else if (length < LINE - 1) {
            length++;
        }
    }
}
