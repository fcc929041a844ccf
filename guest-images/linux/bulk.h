// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
// The bulk transfer between guest and peer over TCP: a request, its bytes to the peer, how many of
// them were right (8 bytes), its bytes to the guest. Both sides are little-endian.
#pragma once

#include <errno.h>
#include <stdbool.h>
#include <stdint.h>
#include <unistd.h>

#include "pattern.h"

#define BULK_MAGIC UINT64_C(0x6b6c75622d6f7774)
enum { BULK_CHUNK = 65536 };

struct bulk_request {
    uint64_t magic;
    uint64_t size; // bytes each way, a multiple of BULK_CHUNK
    uint64_t seed_up, seed_down;
};

static inline bool bulk_write(int stream, const void *data, size_t size)
{
    while (size) {
        ssize_t length = write(stream, data, size);
        if (length <= 0)
            return false;
        data = (const char *)data + length;
        size -= (size_t)length;
    }
    return true;
}

static inline bool bulk_read(int stream, void *data, size_t size)
{
    while (size) {
        ssize_t length = read(stream, data, size);
        if (length <= 0)
            return false;
        data = (char *)data + length;
        size -= (size_t)length;
    }
    return true;
}

static inline bool bulk_send(int stream, uint64_t size, uint64_t seed)
{
    static char chunk[BULK_CHUNK];

    for (uint64_t at = 0; at < size; at += BULK_CHUNK) {
        pattern_fill(chunk, BULK_CHUNK, seed, at);
        if (!bulk_write(stream, chunk, BULK_CHUNK))
            return false;
    }
    return true;
}

// *right: number of bytes before the first wrong word.
static inline bool bulk_receive(int stream, uint64_t size, uint64_t seed, uint64_t *right)
{
    static char chunk[BULK_CHUNK];
    bool all_right = true;

    *right = 0;
    for (uint64_t at = 0; at < size; at += BULK_CHUNK) {
        if (!bulk_read(stream, chunk, BULK_CHUNK))
            return false;
        if (!all_right)
            continue;
        size_t good = pattern_check(chunk, BULK_CHUNK, seed, at);
        *right += good;
        all_right = good == BULK_CHUNK;
    }
    return true;
}
