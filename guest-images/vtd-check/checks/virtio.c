// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
// Virtio devices in the middle of a request: what a driver may do to them then, and the machine's
// user. The block device's requests are large, to a disk of 4 GiB of zeroes.
#include "check.h"
#include "hw/virtio.h"
#include "lib/console.h"
#include "lib/interrupts.h"
#include "lib/memory.h"
#include "lib/wait.h"

enum { BUFFERS = 250, MSI_UPPER = 1 };

// Address of the buffers of requests, after everything else; all share one.
#define BUFFER 0x4000000ull
#define BUFFER_SIZE 0x1000000u
#define SECTOR_SIZE 512u

#define MARK 0x1111111111111111ull

static struct virtio disk;
static u8 *status;
static u64 *header;
static struct virtio_descriptor *table;

static volatile u64 *buffer(void)
{
    return (volatile u64 *)(uintptr_t)BUFFER;
}

// Chain number `n` is a read of `count` buffers of `size` bytes.
static void put_read(u16 n, unsigned count, u32 size)
{
    struct virtio_descriptor *entry = table;

    *entry++ = (struct virtio_descriptor){gpa_of(header), 16, VIRTIO_NEXT, 1};
    for (unsigned at = 0; at < count; at++, entry++)
        *entry = (struct virtio_descriptor){BUFFER, size, VIRTIO_NEXT | VIRTIO_WRITE, (u16)(at + 2)};
    *entry = (struct virtio_descriptor){gpa_of(status), 1, VIRTIO_WRITE, 0};
    disk.descriptors[n] = (struct virtio_descriptor){gpa_of(table), 16 * (count + 2), VIRTIO_INDIRECT, 0};
    virtio_put(&disk, n);
}

enum { RESET_REGISTER = 0xcf9, RESET_FULL = 0x06 };

static bool starts(void)
{
    if (!disk.bar) {
        if (!virtio_find(&disk, VIRTIO_BLOCK)) {
            check_fail("there is no virtio block device");
            return false;
        }
        status = page_new();
        header = page_new();
        table = pages_new(2);
    }
    pci_enable(disk.id, 0);
    if (!virtio_start(&disk)) {
        check_fail("the device does not start: status 0x%02x", virtio_status(&disk));
        return false;
    }
    return true;
}

static bool is_written(void)
{
    return buffer()[0] != MARK;
}

// A queue full of requests, of which the first is in progress on return.
static bool is_busy(void)
{
    if (!starts())
        return false;
    buffer()[0] = MARK;
    for (u16 n = 0; n < VIRTIO_QUEUE_SIZE; n++)
        put_read(n, BUFFERS, BUFFER_SIZE);
    if (WAIT_UNTIL(is_written()))
        return true;
    check_fail("the device writes nothing");
    return false;
}

// A millisecond and a few exits, in which a device that continues would be noticed.
static bool stays_quiet(void)
{
    u64 started;
    u16 used = virtio_used(&disk);

    buffer()[0] = MARK;
    started = timestamp();
    while (timestamp() - started < clock_frequency() / 1000)
        (void)virtio_status(&disk);
    if (is_written())
        check_fail("the device writes");
    else if (virtio_used(&disk) != used)
        check_fail("the device gives back %u chains", (u16)(virtio_used(&disk) - used));
    return !check_is_over();
}

static void bus_master(void)
{
    u32 command;

    REQUIRE(is_busy());
    command = pci_read(disk.id, PCI_COMMAND);
    for (unsigned round = 0; round < 8; round++) {
        pci_write(disk.id, PCI_COMMAND, command & ~(u32)PCI_COMMAND_MASTER);
        REQUIRE(stays_quiet());
        pci_write(disk.id, PCI_COMMAND, command);
        EXPECT(WAIT_UNTIL(is_written()), "the device does not go on");
    }
    virtio_reset(&disk);
}

static void reset(void)
{
    for (unsigned round = 0; round < 8; round++) {
        REQUIRE(is_busy());
        virtio_reset(&disk);
        REQUIRE(stays_quiet());
        EXPECT(WAIT_UNTIL(virtio_status(&disk) == 0), "the reset does not end: status 0x%02x", virtio_status(&disk));
    }
}

// One request of a sector, with its interrupt.
static bool interrupts(void)
{
    u16 used = virtio_used(&disk);

    interrupt_count_clear(VECTOR_VIRTIO);
    put_read(used % VIRTIO_QUEUE_SIZE, 1, SECTOR_SIZE);
    if (!WAIT_UNTIL(virtio_used(&disk) != used))
        check_fail("the request does not end");
    else if (*status != 0)
        check_fail("the request fails: %u", *status);
    else if (!WAIT_UNTIL(interrupt_count(VECTOR_VIRTIO)))
        check_fail("no interrupt comes");
    return !check_is_over();
}

// KVM refuses a routing with a message whose upper address is no APIC's, including all other
// entries.
static void refused_message(void)
{
    REQUIRE(starts());
    virtio_interrupts(&disk, VECTOR_VIRTIO);
    REQUIRE(interrupts());
    virtio_message(&disk, 0, (u64)MSI_UPPER << 32 | MSI_ADDRESS, VECTOR_VIRTIO);
    REQUIRE(interrupts());
    // From here on every change is one of the whole table.
    virtio_message(&disk, 1, msi_address(), VECTOR_FAULT_EVENT);
    virtio_message(&disk, 1, msi_address(), VECTOR_VIRTIO);
    for (unsigned n = 0; n < 100; n++)
        REQUIRE(interrupts());
}

void virtio_never_done(bool reset)
{
    struct virtio entropy;

    if (virtio_find(&entropy, VIRTIO_ENTROPY)) {
        virtio_start(&entropy);
        entropy.descriptors[0] = (struct virtio_descriptor){BUFFER, PAGE_SIZE, VIRTIO_WRITE, 0};
        virtio_put(&entropy, 0);
    }
    if (pci_find((u32)VIRTIO_BLOCK << 16 | 0x1af4, &disk.id, 1) && !is_busy())
        machine_exit(1);
    print("busy\n");
    if (reset)
        out8(RESET_REGISTER, RESET_FULL);
    for (;;)
        asm volatile("hlt");
}

void virtio_flood(u64 times)
{
    struct virtio entropy;

    if (!starts() || !virtio_find(&entropy, VIRTIO_ENTROPY))
        machine_exit(1);
    virtio_interrupts(&disk, VECTOR_VIRTIO);
    // Two devices at one address, which both need doorbells there.
    pci_write(entropy.id, PCI_BAR0, (u32)disk.bar);
    for (u64 n = 0; n < times; n++) {
        pci_write(entropy.id, PCI_INTERRUPT, (u32)n & 0xff);
        // A message that KVM refuses, another one each time.
        virtio_message(&disk, 0, (u64)MSI_UPPER << 32 | MSI_ADDRESS, (u32)n);
    }
    print("flooded\n");
}

static const struct check list[] = {
    {"bus mastering is switched off in the middle of a request: it ends there, and goes on when it is on", bus_master},
    {"the device is reset in the middle of a request", reset},
    {"a message that KVM refuses is left out, and no other", refused_message},
};

CHECK_GROUP(virtio, list, NULL, NULL);
