// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
// An `edu` device that uses this process's own addresses, through the module edu_sva.
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

// Loads the module. NULL, or the error.
const char *sva_load(void);

// Whether there is a device of this number.
bool sva_exists(unsigned device);

// Binds this process's address space to it. The file; -1, with errno, if that fails.
int sva_open(unsigned device);

// The PASID of this process.
uint32_t sva_pasid(int file);

// The device copies `size` bytes, by its buffer. 0, or errno.
int sva_copy(int file, const void *from, void *to, size_t size);

// The device copies a page to each of `size` bytes. 0, or errno.
int sva_fill(int file, const void *page, void *to, size_t size);

// NULL if the device is refused to read a word here, or to write one; otherwise what happens
// instead. A device that cannot tell leaves its buffer, or memory, as it was.
const char *sva_refuses_read(int file, const void *from);
const char *sva_refuses_write(int file, void *to);
