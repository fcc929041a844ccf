// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
// Distinguishable data: each 8-byte word is a function of a seed and its offset, so that a stale,
// misplaced or lost word shows. Shared by the guest's checks and their peer.
#pragma once

#include <stddef.h>
#include <stdint.h>

// The finalizer of MurmurHash3: every input bit changes half of the output's.
static inline uint64_t pattern_word(uint64_t seed, uint64_t offset)
{
    uint64_t word = offset + seed * 0x9e3779b97f4a7c15;

    word = (word ^ word >> 33) * 0xff51afd7ed558ccd;
    word = (word ^ word >> 33) * 0xc4ceb9fe1a85ec53;
    return word ^ word >> 33;
}

// Fills `size` bytes, a multiple of 8, with the data at `offset`.
static inline void pattern_fill(void *data, size_t size, uint64_t seed, uint64_t offset)
{
    for (size_t at = 0; at < size; at += 8) {
        uint64_t word = pattern_word(seed, offset + at);
        __builtin_memcpy((char *)data + at, &word, 8);
    }
}

// Position of the first wrong word; `size` if there is none.
static inline size_t pattern_check(const void *data, size_t size, uint64_t seed, uint64_t offset)
{
    for (size_t at = 0; at < size; at += 8) {
        uint64_t word;
        __builtin_memcpy(&word, (const char *)data + at, 8);
        if (word != pattern_word(seed, offset + at))
            return at;
    }
    return size;
}
