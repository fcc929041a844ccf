// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
// MD5 (RFC 1321), for data in whole blocks of 64 bytes.
#pragma once

#include <stddef.h>
#include <stdint.h>

enum { MD5_BLOCK = 64, MD5_TEXT = 33 };

struct md5 {
    uint32_t state[4];
    uint64_t size;
};

void md5_start(struct md5 *md5);
void md5_add(struct md5 *md5, const void *data, size_t size);
void md5_end(struct md5 *md5, char hexadecimal[static MD5_TEXT]);
