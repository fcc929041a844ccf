// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
// What a device does with the addresses of a process. Each case is a process of its own, so that it
// has a PASID of its own.
#pragma once

#include <stdbool.h>
#include <stddef.h>

// The number of untouched pages without twostage.sva.pages=.
enum { SVA_PAGE = 4096, SVA_PAGES = 10000 };

// What a case says of itself when it passes, as a printf format. It must be short.
void sva_say(const char *format, ...) __attribute__((format(printf, 1, 2)));

// Says that the case cannot be tried here. Returns NULL.
const char *sva_skip(const char *why);

// An error text.
const char *sva_error(const char *format, ...) __attribute__((format(printf, 1, 2)));

// Each returns NULL, or the error.
const char *sva_present(void);   // pages that are there, which needs no page requests
const char *sva_untouched(void); // pages that nobody has touched
const char *sva_unmap(void);     // what was unmapped, and what is mapped there afterwards
const char *sva_protect(void);   // mprotect
const char *sva_fork(void);      // copy on write
const char *sva_huge(void);      // huge pages, and pieces of them
const char *sva_swap(void);      // pages that were swapped out
const char *sva_exit(void);      // processes that end during DMA
const char *sva_kill(void);      // processes that are killed during DMA
const char *sva_processes(void); // eight at once
const char *sva_devices(void);   // two devices, one process

// Anonymous memory that nothing has touched; it ends the process if there is none.
void *sva_map(size_t size);

// NULL if this is the data of `seed`.
const char *sva_holds(const void *memory, size_t size, unsigned seed);

// NULL if the device copies data of `seed`, and `to` has it afterwards.
const char *sva_copies(int file, const void *from, void *to, size_t size, unsigned seed);

// What /proc/self/smaps says of the mapping around this address, in KiB, in a line of this format.
unsigned long sva_mapped(const void *memory, const char *line);
